"""A trained model, ready to use: `lab = t5lab.load('runs/x')`, then `lab.generate(['…'])`.

All that it needs is in the directory of the run or converted checkpoint. It imports no TensorFlow.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5lab.config import model_config
from t5lab.data import vocab
from t5lab.data.batches import features
from t5lab.decoding import options
from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding
from t5lab.errors import UsageError, did_you_mean
from t5lab.models.cache import decoding
from t5lab.models.transformer import Transformer
from t5lab.programs import batching, embedding, loading, prompting
from t5lab.programs.token_outputs import TokenOutputs, as_list, strings

Texts = Sequence[str]
Pairs = Sequence[tuple[str, str]]


class Lab(TokenOutputs):
  """A model with its weights and vocabulary.

  config: the saved config. params: float32 pytree. step: the step of the checkpoint.
  weights: 'raw' or 'ema'. vocab: converts between text and token ids.
  """

  def __init__(self, config, params, *, step: int = 0, weights: str = 'raw', engine=None):
    self.config, self.params, self.step, self.weights = config, params, step, weights
    self.model = model_config(config)
    self._engine = engine
    self._jitted = {}

  @functools.cached_property
  def vocab(self):
    if not self.config.data.vocab:
      raise UsageError('these weights came without a vocabulary: give token ids to generate_tokens '
                       'and logits, or set data.vocab in config.json')
    vocabulary = vocab.load(self.config.data.vocab)
    vocab.check_embedding_size(vocabulary, self.model.vocab_size, 'this model')
    return vocabulary

  # -- text out ---------------------------------------------------------------------------------

  def decoding(self, **changes) -> Decoding:
    """The decoding settings of the config with changes.

    Options: the fields of decoding/options.py. A temperature turns beam search off, unless beams
    are given too; see REPLACES there for others.
    """
    # Unknown names.
    known = [f.name for f in dataclasses.fields(Decoding)]
    for name in changes:
      if name not in known:
        raise UsageError(f'decoding has no option {name!r}.{did_you_mean(name, known)}')
    changes = {name: value for name, value in changes.items() if value is not None}

    e = self.config.eval
    fields = {name: e[name] for name in options.defaults()}
    fields['length'] = e.max_length or self.config.data.lengths.targets
    for name, (other, off) in options.REPLACES.items():
      if name in changes and (changes[name] or name != 'temperature'):
        fields[other] = off

    # Values.
    settings = Decoding(**{**fields, **changes})
    settings.check_ids(self.model.vocab_size)
    if self.model.kind == 'encoder':
      raise UsageError(f'{self.name} is encoder-only and generates no text; use embed, '
                       'fill_mask or classify')
    if self.model.kind == 'decoder':
      if settings.beams > 1:
        raise UsageError(f'beams={settings.beams}: beam search does not support decoder-only '
                         'models; use beams=1')
      for name in ('forced_first', 'start'):
        if getattr(settings, name) >= 0:
          raise UsageError(f'{name}={getattr(settings, name)}: a decoder-only model continues its '
                           'prompt; put the token at the end of the prompt')
    elif settings.max_total:
      raise UsageError(f'max_total={settings.max_total} is for decoder-only models; give a length')
    return settings

  def tokens(self, text: str) -> list[int]:
    """The token ids of a model input.

    Inputs of encoders get the special tokens of their vocabulary. Prompts of decoders get none,
    except that a decoder trained with inputs reads them with the EOS they had in training.
    """
    if self.model.kind != 'decoder':
      return self.vocab.frame(text)
    ids = self.vocab.encode(text)
    return ids + [self.vocab.eos_id] if self.config.data.lengths.inputs else ids

  def generate_tokens(self, requests: Sequence[Sequence[int]], *, n: int | None = None,
                      place: int = 0, tick=lambda done, total: None, **options):
    """Token lists from `tokens` -> int32[requests, length], padded with 0 after EOS.

    n: outputs per request, int32[requests, n, length]. n, place, tick: see `generate`.
    """
    settings = self.decoding(**options)
    if self.model.kind == 'decoder':
      start_id, always = self.model.start_id, self.config.data.start
      requests = [[start_id, *r] if always or not len(r) else r for r in requests]
    return self._run(requests, settings, n=n, place=place, tick=tick)

  def _run(self, requests, settings: Decoding, **engine_options) -> np.ndarray:
    for i, request in enumerate(requests):
      batching.check_ids(request, self.model.vocab_size, f'request {i}')
    longest = max(map(len, requests), default=0)
    if settings.max_total and longest >= settings.max_total:
      raise UsageError(f'a prompt of {longest} tokens leaves nothing of max_total='
                       f'{settings.max_total} to generate; shorten it, or give a length')
    if self.model.kind == 'decoder':       # prompt and output share the positions
      total = longest + settings.length
      self._check_length(min(total, settings.max_total or total))
    else:
      self._check_length(max(longest, settings.length))
    self._engine = self._engine or make_engine(self.config)
    return self._engine.generate(self.params, requests, settings, **engine_options)

  def _check_length(self, tokens: int):
    if self.model.positions == 'learned' and tokens > self.model.max_length:
      raise UsageError(f'{tokens} tokens: {self.name} has only {self.model.max_length} '
                       'learned positions; shorten the text or the length')

  def generate(self, texts: Sequence[str | dict], task: str | None = None, *,
               n: int | None = None, place: int = 0, tick=lambda done, total: None,
               source_language: str | None = None, target_language: str | None = None,
               **options) -> list[str] | list[list[str]]:
    """Generates a text for each text, in order; with n, a list of n texts for each.

    The n texts are the best hypotheses of beam search, best first, or samples. A sample depends on
    the seed, the place of its text and its number, not on the other texts. place: that of the first
    text, where texts come in several calls.

    texts: strings, or dicts of a task's fields. task: the task whose prompt is put around them;
    None is the task the model was trained on, if it has a prompt; '' takes the strings unchanged.
    source_language, target_language: codes of mBART, M2M100 and NLLB, as their tokenizers write
    them; None is what the model's files say. options: see `decoding`.
    """
    texts = prompting.fill(self.config.data, as_list(texts, 'generate'), task)
    if source_language is None and target_language is None:
      requests = [self.tokens(text) for text in texts]
    else:
      vocabulary = self.vocab.between(source_language, target_language)
      requests = [vocabulary.frame(text) for text in texts]
      if target_language is not None:
        first = 'start' if vocabulary.language_starts else 'forced_first'
        options = {first: vocabulary.target_language, **options}
    outputs = self.generate_tokens(requests, n=n, place=place, tick=tick, **options)
    settings = self.decoding(**options)
    if n is None:
      return [self._text(output, settings) for output in outputs]
    return [[self._text(output, settings) for output in group] for group in outputs]

  def _text(self, output: np.ndarray, settings: Decoding) -> str:
    """The text of one output of the engine."""
    eos = self.vocab.eos_id
    if not settings.stop_ids or eos in settings.stop_ids:
      return self.vocab.decode(output)
    # The vocabulary's end is a token like others: only one that padding follows is the engine's.
    ends = np.flatnonzero(output == eos)
    if len(ends) and not output[ends[-1] + 1:].any():
      output = output[:ends[-1]]
    return self.vocab.decoder(list(map(int, output)))

  def chat(self, messages: Sequence[Mapping[str, str]], *, template: str = '',
           tools: Sequence[dict] | None = None, documents: Sequence[dict] | None = None,
           date: str | None = None, place: int = 0, **options) -> str:
    """[{'role': 'user', 'content': '…'}, …] -> the reply, with the model's own chat template.

    The template writes everything that the model reads, including its start token. The reply also
    ends at the token that the template writes after a reply. template: the name of one of several;
    '' is tool_use with tools, or else default. tools, documents: for the template. date:
    'YYYY-MM-DD', what a template that prints the date prints; None: today. place: see `generate`.
    """
    if self.model.kind != 'decoder':
      raise UsageError(f'chat needs a decoder-only model; {self.name} is not one')
    prompt = self.vocab.encode(self.vocab.chat(
        list(messages), template=template, tools=tools, documents=documents, date=date))
    settings = self.decoding(**options)
    stops = settings.stop_ids or (self.vocab.eos_id,)
    if self.vocab.end_of_turn is not None:
      stops = tuple(dict.fromkeys((*stops, self.vocab.end_of_turn)))
    settings = dataclasses.replace(settings, stop_ids=stops)
    return self._text(self._run([prompt], settings, place=place)[0], settings)

  # -- numbers out ------------------------------------------------------------------------------

  def logits(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Model features as seqio names them, int[B, length] each -> float32[B, T, V].

    Encoder-decoder: encoder_input_tokens and decoder_input_tokens; decoder-only: the latter;
    encoder-only: the former. Optional: their _segment_ids, _positions, encoder_token_types.
    """
    if self.model.kind == 'encoder' and not (self.model.mlm_head or self.model.classes):
      raise UsageError(f'{self.name} has no head that computes logits; use embed')
    stacks = {'encoder': self.model.enc_layers, 'decoder': self.model.dec_layers}
    needed = [f'{stack}_input_tokens' for stack, layers in stacks.items() if layers]
    missing = [name for name in needed if name not in batch]
    if missing:
      raise UsageError(f'logits needs {", ".join(needed)}; missing: {", ".join(missing)}')
    return np.asarray(self._apply('__call__', batch))

  def score(self, inputs: Texts, targets: Texts, *, eos: bool | None = None) -> np.ndarray:
    """float32[n], log p(target | input) in nats, summed over the target's tokens.

    eos: whether the target includes the end of the text. None: only for encoder-decoders.
    """
    inputs, targets = strings(inputs, 'score'), strings(targets, 'score')
    if len(inputs) != len(targets):
      raise UsageError(f'score needs as many targets as inputs, got {len(inputs)} inputs and '
                       f'{len(targets)} targets')
    if self.model.kind == 'encoder':
      raise UsageError(f'{self.name} is encoder-only: it cannot score targets')
    if eos is None:
      eos = self.model.kind != 'decoder'
    end = [self.vocab.eos_id] if eos else []
    if '' in targets and not eos:
      raise UsageError(f'score: target {targets.index("")} is empty')
    rows = []
    for text, target in zip(inputs, targets):
      context, continuation = self._score_ids(text, target)
      rows.append({'inputs': np.array(context, np.int32),
                   'targets': np.array([*continuation, *end], np.int32)})
    return self._map(rows, self._log_p) if rows else np.zeros(0, np.float32)

  def _score_ids(self, text: str, target: str) -> tuple[list[int], list[int]]:
    """The ids of a text and of its target.

    A decoder-only model continues its prompt: the target's ids are those that it has in the whole
    text, from the first one that differs from the prompt's own.
    """
    if self.model.kind != 'decoder' or self.config.data.lengths.inputs:
      return self.tokens(text), [*self.vocab.target_prefix, *self.vocab.encode_target(target)]
    prompt, whole = self.vocab.encode(text), self.vocab.encode(text + target)
    if not target:
      return prompt, []
    shared = 0
    while shared < min(len(prompt), len(whole) - 1) and prompt[shared] == whole[shared]:
      shared += 1
    return whole[:shared], whole[shared:]

  def _log_p(self, batch):
    """float32[B], the sum of the log-probabilities of each row's loss tokens."""
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    log_p = jax.nn.log_softmax(self._apply('__call__', batch))
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(chosen * weights, axis=-1)

  def embed(self, texts: Texts, *, prompt: str | None = None, prompt_name: str | None = None,
            normalize: bool | None = None) -> np.ndarray:
    """float32[n, model.vector_size], a vector for each text, as sentence-transformers' encode.

    The vectors of its tokens are pooled by model.pool and pass through the layers of model.dense.
    Texts are cut to embed.max_length tokens, if it is set. prompt, prompt_name: a text that is put
    before each, or the name of one in embed.prompts; None: embed.default_prompt. normalize: whether
    vectors get length 1; None: embed.normalize, which is True unless the weights came from a
    sentence-transformers model without a Normalize module.
    """
    texts, e, m = strings(texts, 'embed'), self.config.embed, self.model
    prompt = embedding.prompt_text(e, prompt, prompt_name)
    if not texts:
      return np.zeros((0, m.vector_size), np.float32)

    ids = lambda text: self._text_ids(text.lower() if e.lowercase else text, e.max_length)
    skips = prompt and not e.pool_prompt
    pool_from = len(ids(prompt)) - embedding.ends(self.vocab, m) if skips else 0
    x = self._map([{'inputs': ids(prompt + text)} for text in texts], lambda batch: self._apply(
        'pooled', embedding.pooling_features(batch, m, pool_from)).astype(jnp.float32))
    if not (e.normalize if normalize is None else normalize):
      return x
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  def encode(self, texts: Texts, *, length: int = 0, attend_padding: bool = False,
             dtype: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's output: (hidden[n, T, D], mask bool[n, T], false at padding).

    T is the length of the longest text, or `length`: then longer texts are cut before their special
    tokens. hidden is 0 at padding. attend_padding: padding is read like text and keeps its vectors,
    as in pipelines without a mask (Flux, Stable Diffusion 3). dtype: of the activations and of
    hidden, 'float32' or 'bfloat16'; None: model.dtype. Inside your own jit, with ids int32[n, T] of
    `tokens` padded with model.pad_id:
      encode = jax.jit(functools.partial(Transformer(lab.model).apply, method='encode'))
      hidden, segments = encode({'params': lab.params}, ids)       # segments: 0 at padding
    """
    texts, m = strings(texts, 'encode'), self.model
    if m.kind == 'decoder':
      raise UsageError(f'encode needs an encoder; {self.name} is decoder-only: use embed')
    if length < 0:
      raise UsageError(f'encode: length must be 0 (the longest text) or more, got {length}')
    m = dataclasses.replace(m, dtype=dtype or m.dtype)
    if not texts:
      return np.zeros((0, length, m.d_model), jnp.dtype(m.dtype)), np.zeros((0, length), bool)
    rows = [self._text_ids(text, length) for text in texts]
    run = lambda rows: self._map(rows, lambda batch: self._apply('_encode', batch, m.dtype)[0])
    return embedding.encode(run, rows, length=length, pad_id=m.pad_id,
                            attend_padding=attend_padding)

  def _text_ids(self, text: str, limit: int) -> np.ndarray:
    return embedding.text_ids(self.vocab, text, self.model, start=self.config.data.start,
                              limit=limit)

  def classify(self, texts: Texts | Pairs) -> np.ndarray:
    """float32[n, classes], a number for each class. texts: strings, or pairs of strings.

    Probabilities that sum to 1; with eval.problem_type=multi_label_classification the probability
    of each class by itself; for a regression or a single class (a cross-encoder) the bare score.
    `labels` names the classes.
    """
    if not self.model.classes or self.model.class_of != 'input':
      other = {'token': 'of whole texts; its classes are of tokens: use tag',
               'span': 'of whole texts; it finds answers: use answer'}
      raise UsageError(f'{self.name} has no classifier '
                       + other.get(self.model.class_of, '(model.classes=0)'))
    groups = [[text] if isinstance(text, str) else list(text)
              for text in as_list(texts, 'classify')]
    for group in groups:
      if not 1 <= len(group) <= 2:
        raise UsageError(f'classify takes one text or a pair, got {len(group)} texts')
      strings(group, 'classify')
    if not groups:
      return np.zeros((0, self.model.classes), np.float32)
    rows = [self._row(*group) for group in groups]
    kind = self.config.eval.problem_type
    if kind == 'multi_label_classification':
      link = jax.nn.sigmoid
    elif kind == 'regression' or self.model.classes == 1:
      link = lambda logits: logits
    else:
      link = jax.nn.softmax
    return self._map(rows, lambda batch: link(self._apply('__call__', batch)[:, 0]))

  # -- batches ----------------------------------------------------------------------------------

  def _row(self, *texts: str) -> dict[str, np.ndarray]:
    return {'inputs': np.array(self.vocab.frame(*texts), np.int32)}

  def _map(self, rows, f):
    return batching.map_rows(rows, f, build=self._build, batch_size=self.config.eval.batch_size)

  def _build(self, row, widths):
    m, kind = self.model, self.model.kind
    if 'targets' not in row:                    # only the encoder is run, or a decoder like one
      return features.build_row([row], widths, kind='encoder',
                                eos=self.vocab.eos_id if self.vocab.second_type else -1)
    start_id = m.start_id
    if kind == 'decoder' and not self.config.data.start and len(row['inputs']):
      start_id, row = row['inputs'][0], {**row, 'inputs': row['inputs'][1:]}   # no start token
    return features.build_row([row], widths, kind=kind, start_id=start_id, eos=self.vocab.eos_id)

  def _apply(self, method: str, batch, dtype: str = ''):
    for name, x in batch.items():
      if name.endswith('_tokens'):
        batching.check_ids(x, self.model.vocab_size, name)
      if name.endswith('_positions'):
        self._check_length(int(np.max(x, initial=-1)) + 1)
    model = dataclasses.replace(self.model, dtype=dtype or self.model.dtype)
    key = (method, model.dtype)
    if key not in self._jitted:
      self._jitted[key] = jax.jit(functools.partial(Transformer(model).apply, method=method))
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    return self._jitted[key]({'params': self.params}, batch)


def make_engine(c) -> Engine | None:
  """The decoding engine of a config's model; None for encoder-only models."""
  model = model_config(c)
  if model.kind == 'encoder':
    return None
  start, step, prefill = decoding(model)
  eos = vocab.load(c.data.vocab).eos_id if c.data.vocab else model.eos_id
  if model.kind == 'decoder':
    return Engine(start, step, prefill, eos=eos, start_id=None, batch_size=c.eval.batch_size)
  return Engine(start, step, eos=eos, start_id=model.start_id, batch_size=c.eval.batch_size,
                max_width=model.max_length if model.positions == 'learned' else 0)


def load(path, step: str | int = 'latest', weights: str | None = None, *, config=None,
         engine: Engine | None = None) -> Lab:
  """Loads the model of a run or converted checkpoint.

  step: a number, 'latest', or 'best' by the run's checkpoint.best metric. weights: 'ema' or 'raw';
  None is the average if the run keeps one. Arrays go straight to the devices, sharded by the
  config's rules; adapters are merged. config: replaces the saved one. engine: shared by several
  Labs of this config, with what it compiled. Errors: CheckpointError if no checkpoint verifies.
  """
  config = config or loading.read_config(path)
  loaded = loading.load(path, step, weights, c=config)
  return Lab(config, loaded.params, step=loaded.step, weights=loaded.weights, engine=engine)
