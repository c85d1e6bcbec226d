"""A model in hand: `lab = t5lab.load('runs/x')`, then `lab.generate(['…'])`.

Imports no TensorFlow. Everything it needs is in the directory of the run or converted checkpoint.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5lab import config as configs
from t5lab.data import vocab
from t5lab.data.batches import features
from t5lab.data.tasks import own_files, prompts
from t5lab.decoding.engine import SHORTEST, Decoding, Engine, buckets
from t5lab.errors import DataError, UsageError, did_you_mean
from t5lab.models.cache import decoding
from t5lab.models.transformer import Transformer
from t5lab.programs import loading

Texts = Sequence[str]
Pairs = Sequence[tuple[str, str]]


class Lab:
  """config: as saved; params: float32 pytree; vocab: text <-> ids; step: of the checkpoint."""

  def __init__(self, config, params, *, step: int = 0, weights: str = 'raw', engine=None):
    self.config, self.params, self.step, self.weights = config, params, step, weights
    self.model = configs.model_config(config)
    self._engine = engine
    self._jitted = {}

  @functools.cached_property
  def vocab(self):
    if not self.config.data.vocab:
      raise UsageError('these weights came without a vocabulary: give token ids to generate_tokens '
                       'and logits, or set data.vocab in config.json')
    found = vocab.load(self.config.data.vocab)
    vocab.check_rows(found, self.model.vocab_size, 'this model')
    return found

  # -- text out ---------------------------------------------------------------------------------

  def decoding(self, **changes) -> Decoding:
    """The config's way to decode, with changes: length, beams, alpha, temperature, top_k, top_p,
    seed, forced_first."""
    e = self.config.eval
    fields = dict(length=e.max_length or self.config.data.lengths.targets, beams=e.beams,
                  alpha=e.alpha, temperature=e.temperature, forced_first=e.forced_first)
    if changes.get('temperature') and not changes.get('beams'):
      fields['beams'] = 1                # asked to sample: the config's search would ignore it
    known = [f.name for f in dataclasses.fields(Decoding)]
    for name in changes:
      if name not in known:
        raise UsageError(f'decoding has no option {name!r}.{did_you_mean(name, known)}')
    settings = Decoding(**{**fields, **{k: v for k, v in changes.items() if v is not None}})
    if self.model.kind == 'encoder':
      raise UsageError(f'{self.config.family} has no decoder and writes no text; it can embed, '
                       'fill_mask and classify')
    if settings.beams > 1 and self.model.kind == 'decoder':
      raise UsageError(f'beams={settings.beams}: a decoder-only model is sampled, not searched; '
                       'use beams=1')
    if settings.forced_first >= 0 and self.model.kind == 'decoder':
      raise UsageError(f'forced_first={settings.forced_first}: a decoder-only model goes on after '
                       'its prompt; put the token at the end of that')
    if settings.forced_first >= self.model.vocab_size:
      raise UsageError(f'forced_first={settings.forced_first}: the model has '
                       f'{self.model.vocab_size} tokens')
    return settings

  def tokens(self, text: str) -> list[int]:
    """A model input as ids: an encoder's as its vocabulary frames it, a decoder's prompt as it is.

    A decoder that was trained on inputs reads them with the EOS that they had.
    """
    if self.model.kind != 'decoder':
      return self.vocab.frame(text)
    ids = self.vocab.encode(text)
    return ids + [self.vocab.eos_id] if self.config.data.lengths.inputs else ids

  def generate_tokens(self, requests: Sequence[Sequence[int]], *, tick=lambda done, total: None,
                      **options):
    """Token lists, as `tokens` makes them -> int32[requests, length], padded with 0 after EOS."""
    settings = self.decoding(**options)
    if self.model.kind == 'decoder':
      start = [self.model.start_id]
      requests = [[*start, *r] if self.config.data.start or not len(r) else r for r in requests]
    return self._run(requests, settings, tick)

  def _run(self, requests, settings: Decoding, tick=lambda done, total: None) -> np.ndarray:
    for i, request in enumerate(requests):
      _check_ids(request, self.model.vocab_size, f'request {i}')
    longest = max(map(len, requests), default=0)
    alone = self.model.kind == 'decoder'
    self._check_length(longest + settings.length if alone else max(longest, settings.length))
    self._engine = self._engine or make_engine(self.config)
    return self._engine.generate(self.params, requests, settings, tick=tick)

  def _check_length(self, tokens: int):
    if self.model.positions == 'learned' and tokens > self.model.max_length:
      raise UsageError(f'{tokens} tokens: the learned positions of {self.config.family} end at '
                       f'{self.model.max_length}; shorten text or length')

  def generate(self, texts: Sequence[str | dict], task: str | None = None, *,
               tick=lambda done, total: None, **options) -> list[str]:
    """Texts -> texts, in order.

    texts: bare strings, or dicts of a task's fields. task: whose prompt to put around them; None
    is the task the model was trained on where it has a prompt; '' takes strings as they are.
    options: see `decoding`.
    """
    texts = _several(texts, 'generate')
    if task is None:
      named = self.config.data.mixture
      task = named if named in prompts.PROMPTS or named == own_files.NAME else ''
    if not task and any(not isinstance(text, str) for text in texts):
      raise UsageError('rows of fields need a task: pass task=, one of '
                       + ', '.join(prompts.PROMPTS))
    ask = functools.partial(prompts.prompt, task) if task else lambda text: text
    if task == own_files.NAME:
      d = self.config.data
      ask = own_files.OwnFiles(d.files.to_dict(), d.fields.to_dict(), d.prompt).ask
    asked = [ask(text) for text in texts]
    out = self.generate_tokens([self.tokens(text) for text in asked], tick=tick, **options)
    return [self.vocab.decode(row) for row in out]

  def chat(self, messages: Sequence[Mapping[str, str]], **options) -> str:
    """[{'role': 'user', 'content': '…'}, …] -> the reply, by the model's own chat template.

    The template says all that the model reads, its beginning too.
    """
    if self.model.kind != 'decoder':
      raise UsageError(f'{self.config.family} is no decoder-only model: chat has no meaning for it')
    prompt = self.vocab.encode(self.vocab.chat(list(messages)))
    return self.vocab.decode(self._run([prompt], self.decoding(**options))[0])

  # -- numbers out ------------------------------------------------------------------------------

  def logits(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """seqio's model features, int[B, length] each -> float32[B, T, V].

    Encoder-decoder: encoder_input_tokens and decoder_input_tokens; decoder-only: the latter;
    encoder-only: the former. Optional: their _segment_ids, _positions, encoder_token_types.
    """
    if self.model.kind == 'encoder' and not (self.model.mlm_head or self.model.classes):
      raise UsageError(f'{self.config.family} has no head that makes logits; use embed')
    wanted = [f'{side}_input_tokens' for side, layers in (
        ('encoder', self.model.enc_layers), ('decoder', self.model.dec_layers)) if layers]
    missing = [name for name in wanted if name not in batch]
    if missing:
      raise UsageError(f'logits needs {", ".join(wanted)}; missing: {", ".join(missing)}')
    return np.asarray(self._apply('__call__', batch))

  def score(self, inputs: Texts, targets: Texts, *, eos: bool | None = None) -> np.ndarray:
    """float32[n], log p(target | input) in nats, summed over the target's tokens.

    eos: whether the end of the text is part of the target; None: of an encoder-decoder's, whose
    targets end, not of a decoder's, which goes on.
    """
    inputs, targets = _several(inputs, 'score'), _several(targets, 'score')
    _check_texts([*inputs, *targets], 'score')
    if len(inputs) != len(targets):
      raise UsageError(f'score: {len(inputs)} inputs and {len(targets)} targets')
    if self.model.kind == 'encoder':
      raise UsageError(f'{self.config.family} has no decoder: it scores no targets')
    decoder = self.model.kind == 'decoder'
    end = [self.vocab.eos_id] if (not decoder if eos is None else eos) else []
    rows = [{'inputs': np.array(self.tokens(text), np.int32),
             'targets': np.array([*self.vocab.prefix, *self.vocab.encode_target(target), *end],
                                 np.int32)}
            for text, target in zip(inputs, targets)]
    if empty := [i for i, target in enumerate(targets) if not target and not end]:
      raise UsageError(f'score: target {empty[0]} is empty')
    return self._map(rows, self._log_p) if rows else np.zeros(0, np.float32)

  def _log_p(self, batch):
    """Sums of the log-probabilities of the loss tokens, row by row."""
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    log_p = jax.nn.log_softmax(self._apply('__call__', batch))
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(chosen * weights, axis=-1)

  def embed(self, texts: Texts) -> np.ndarray:
    """float32[n, D], a vector of length 1 for each text, pooled as model.pool says."""
    texts = _check_texts(_several(texts, 'embed'), 'embed')
    if not texts:
      return np.zeros((0, self.model.d_model), np.float32)
    rows = [self._row(text) for text in texts]
    x = self._map(rows, lambda batch: self._apply('pooled', batch).astype(jnp.float32))
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  def classify(self, texts: Texts | Pairs) -> np.ndarray:
    """float32[n, classes], the probability of each class; texts are strings or pairs of them."""
    if not self.model.classes:
      raise UsageError(f'{self.config.family} has no classifier (model.classes=0)')
    rows = [[text] if isinstance(text, str) else list(text)
            for text in _several(texts, 'classify')]
    if wrong := [row for row in rows if not 1 <= len(row) <= 2]:
      raise UsageError(f'classify takes a text or two of them, not {len(wrong[0])}')
    _check_texts([text for row in rows for text in row], 'classify')
    if not rows:
      return np.zeros((0, self.model.classes), np.float32)
    rows = [self._row(*row) for row in rows]
    return self._map(rows, lambda batch: jax.nn.softmax(self._apply('__call__', batch)[:, 0]))

  def fill_mask(self, texts: Texts, k: int = 5) -> list[list[list[tuple[str, float]]]]:
    """For each text, for each mask in it, the k most probable (piece, probability), best first.

    A mask is the vocabulary's own token, as '[MASK]', or else '<extra_id_0>'.
    """
    mask, m = self.vocab.mask_id, self.model
    if mask is None and self.vocab.num_sentinels:
      mask = self.vocab.sentinel(0)
    if mask is None or not m.mlm_head or m.classes:
      raise UsageError(f'{self.config.family} has no masked-token head: fill_mask needs a BERT '
                       'with its MLM head and a vocabulary with a mask')
    if not 1 <= k <= m.vocab_size:
      raise UsageError(f'fill_mask: k={k} of the {m.vocab_size} words of the vocabulary')
    texts = _check_texts(_several(texts, 'fill_mask'), 'fill_mask')
    rows = [self._row(text) for text in texts]
    at = [np.flatnonzero(row['inputs'] == mask) for row in rows]
    if unmasked := [i for i, found in enumerate(at) if not len(found)]:
      raise UsageError(f'text {unmasked[0] + 1} of {len(texts)} has no '
                       f'{self.vocab.pieces([mask])[0]}: {texts[unmasked[0]]!r}')
    if not rows:
      return []
    best = lambda batch: jax.lax.top_k(jax.nn.softmax(self._apply('__call__', batch)), k)
    probs, ids = self._map(rows, best)
    return [[list(zip(self.vocab.pieces(ids[i, j]), map(float, probs[i, j]))) for j in found]
            for i, found in enumerate(at)]

  # -- batches ----------------------------------------------------------------------------------

  def _row(self, *texts: str) -> dict[str, np.ndarray]:
    if self.model.kind != 'decoder':
      return {'inputs': np.array(self.vocab.frame(*texts), np.int32)}
    return {'inputs': np.array(self.vocab.encode(texts[0]), np.int32),
            'targets': np.array([self.vocab.eos_id], np.int32)}     # read by no position

  def _map(self, rows, f):
    """f(model features of a batch) for one row or more of any length, in order; few shapes, as the
    engine."""
    size = lambda row: max(map(len, row.values()))
    order = sorted(range(len(rows)), key=lambda i: size(rows[i]))
    out = [None] * len(rows)
    for first in range(0, len(order), self.config.eval.batch_size):
      chosen = order[first:first + self.config.eval.batch_size]
      widths = {name: buckets(max(len(rows[i][name]) for i in chosen), SHORTEST)
                for name in rows[chosen[0]]}
      made = [self._build(rows[i], widths) for i in chosen]
      made += made[:1] * (min(buckets(len(made), 1, 4), self.config.eval.batch_size) - len(made))
      batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
      result = jax.tree.map(np.asarray, f(batch))
      for place, i in enumerate(chosen):
        out[i] = jax.tree.map(lambda x, place=place: x[place], result)
    pad = lambda *xs: np.stack([np.pad(x, [(0, max(y.shape[0] for y in xs) - x.shape[0])]
                                       + [(0, 0)] * (x.ndim - 1)) if x.ndim else x for x in xs])
    return jax.tree.map(pad, *out)

  def _build(self, row, widths):
    start, m = self.model.start_id, self.model
    if m.kind == 'decoder' and not self.config.data.start and len(row['inputs']):
      start, row = row['inputs'][0], {**row, 'inputs': row['inputs'][1:]}   # begins as its text
    kind = m.kind if 'targets' in row else 'encoder'          # embedding, the encoder reads alone
    return features.build_row([row], widths, kind=kind, start=start, eos=self.vocab.eos_id)

  def _apply(self, method: str, batch):
    for name in batch:
      if name.endswith('_tokens'):
        _check_ids(batch[name], self.model.vocab_size, name)
    if method not in self._jitted:
      self._jitted[method] = jax.jit(functools.partial(
          Transformer(self.model).apply, method=method))
    self._check_length(max((int(np.max(x, initial=-1)) + 1 for name, x in batch.items()
                            if name.endswith('_positions')), default=0))
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    return self._jitted[method]({'params': self.params}, batch)


def _several(texts, use: str) -> list:
  if isinstance(texts, str):
    raise UsageError(f"{use} takes a list of texts: {use}(['…'])")
  return list(texts)


def _check_texts(texts: list, use: str) -> list:
  for text in texts:
    if not isinstance(text, str):
      raise UsageError(f'{use} takes texts, not a {type(text).__name__} as {str(text)[:60]}')
  return texts


def _check_ids(ids, size: int, what: str) -> None:
  """DataError for an id that is none: a gather of JAX's clamps or fills it, and says nothing."""
  ids = np.asarray(ids)
  if len(wrong := ids[(ids < 0) | (ids >= size)]):
    raise DataError(f'{what} holds the id {wrong[0]}; the ids of this model are 0 to {size - 1:,}')


def make_engine(config) -> Engine:
  model = configs.model_config(config)
  if model.kind == 'encoder':
    return None
  start, step, prefill = decoding(model)
  alone = model.kind == 'decoder'
  eos = vocab.load(config.data.vocab).eos_id if config.data.vocab else model.eos_id
  return Engine(start, step, prefill if alone else None, eos=eos,
                begin=None if alone else model.start_id, batch_size=config.eval.batch_size,
                widest=model.max_length if model.positions == 'learned' and not alone else 0)


def load(path, step: str | int = 'latest', weights: str | None = None, *, config=None,
         engine: Engine | None = None) -> Lab:
  """The model of a run or converted checkpoint. step: a number, 'latest', or 'best' by the run's
  checkpoint.best metric.

  weights: 'ema' or 'raw'; None is the average where the run keeps one. Arrays go straight to the
  devices, sharded by the config's rules; adapters are merged. config: instead of the saved one.
  engine: one that other Labs of this config share, and with it what it compiled. CheckpointError if
  no checkpoint verifies.
  """
  config = config or loading.read_config(path)
  found = loading.load(path, step, weights, c=config)
  return Lab(config, found.params, step=found.step, weights=found.weights, engine=engine)
