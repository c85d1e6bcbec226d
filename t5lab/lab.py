"""A trained model in hand: `lab = t5lab.load('runs/x')`, then `lab.generate(['…'])`.

Imports no TensorFlow. Everything it needs is in the run's directory: config.json, which alone
rebuilds the model, and a verified checkpoint.
"""

from collections.abc import Sequence
import dataclasses
import functools
from pathlib import Path

import jax

from t5lab import config as configs
from t5lab.data import features, prompts, vocab
from t5lab.decoding.engine import Decoding, Engine
from t5lab.errors import CheckpointError, UsageError, did_you_mean
from t5lab.models.transformer import Transformer, decoding
from t5lab.parallel import sharding
from t5lab.training import rundir
from t5lab.training import step as steps
from t5lab.training.checkpoint import Checkpoints

WEIGHTS = ('ema', 'raw')


class Lab:
  """config: as saved; params: float32 pytree; vocab: text <-> ids; step: of the checkpoint."""

  def __init__(self, config, params, *, step: int = 0, weights: str = 'raw', engine=None):
    self.config, self.params, self.step, self.weights = config, params, step, weights
    self.vocab = vocab.load(config.data.vocab)
    self._engine = engine or make_engine(config)

  def decoding(self, **changes) -> Decoding:
    """The config's way to decode, with changes: length, beams, alpha, temperature, top_k, top_p,
    seed."""
    e = self.config.eval
    fields = dict(length=e.max_length or self.config.data.lengths.targets, beams=e.beams,
                  alpha=e.alpha, temperature=e.temperature)
    if changes.get('temperature') and not changes.get('beams'):
      fields['beams'] = 1                # asked to sample: the config's search would ignore it
    known = [f.name for f in dataclasses.fields(Decoding)]
    for name in changes:
      if name not in known:
        raise UsageError(f'decoding has no option {name!r}.{did_you_mean(name, known)}')
    settings = Decoding(**{**fields, **{k: v for k, v in changes.items() if v is not None}})
    if settings.beams > 1 and not self.config.model.enc_layers:
      raise UsageError(f'beams={settings.beams}: a decoder-only model is sampled, not searched; '
                       'use beams=1')
    return settings

  def tokens(self, text: str) -> list[int]:
    """A model input as ids. It ends in EOS where the model was trained on inputs with one."""
    ids = self.vocab.encode(text)
    return ids + [self.vocab.eos_id] if self.config.data.lengths.inputs else ids

  def generate_tokens(self, requests: Sequence[Sequence[int]], *, tick=lambda done, total: None,
                      **options):
    """Token lists, as `tokens` makes them -> int32[requests, length], padded with 0 after EOS."""
    return self._engine.generate(self.params, requests, self.decoding(**options), tick=tick)

  def generate(self, texts: Sequence[str | dict], task: str | None = None, *,
               tick=lambda done, total: None, **options) -> list[str]:
    """Texts -> texts, in order.

    texts: bare strings, or dicts of a task's fields. task: whose prompt to put around them; None
    is the task the model was trained on where it has a prompt; '' takes strings as they are.
    options: see `decoding`.
    """
    if isinstance(texts, str):
      raise UsageError("generate takes a list of texts: generate(['…'])")
    if task is None:
      task = self.config.data.mixture if self.config.data.mixture in prompts.PROMPTS else ''
    if not task and any(not isinstance(text, str) for text in texts):
      raise UsageError('rows of fields need a task: pass task=, one of '
                       + ', '.join(prompts.PROMPTS))
    asked = [prompts.prompt(task, text) if task else text for text in texts]
    out = self.generate_tokens([self.tokens(text) for text in asked], tick=tick, **options)
    return [self.vocab.decode(row) for row in out]


def make_engine(config) -> Engine:
  start, step = decoding(configs.model_config(config))
  return Engine(start, step, eos=vocab.EOS, decoder_only=not config.model.enc_layers,
                batch_size=config.eval.batch_size)


def batch_shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  """The model features of one row, as shapes: enough to build parameters."""
  row = features.build_row([], config.data.lengths.to_dict(),
                           decoder_only=not config.model.enc_layers)
  return {k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype) for k, v in row.items()}


def load(workdir, step: str | int = 'latest', weights: str | None = None, *,
         config=None, engine: Engine | None = None) -> Lab:
  """The model of a run. step: a number, 'latest', or 'best' by the run's checkpoint.best metric.

  weights: 'ema' or 'raw'; None is the average where the run keeps one. Arrays go straight to the
  devices, sharded by the config's rules. config: instead of the saved one. engine: one that
  other Labs of this config share, and with it what it compiled. CheckpointError if no checkpoint
  verifies.
  """
  workdir = Path(workdir)
  config = config or configs.from_dict(rundir.read_config(workdir))
  weights = weights or ('ema' if config.optim.ema else 'raw')
  if weights not in WEIGHTS or (weights == 'ema' and not config.optim.ema):
    raise UsageError(f'weights={weights!r}: this run has ' +
                     (' and '.join(WEIGHTS) if config.optim.ema else 'raw only (optim.ema=0)'))
  checkpoints = open_checkpoints(config, workdir)
  number = choose_step(checkpoints, step)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  model = Transformer(configs.model_config(config))
  boxed, abstract = steps.abstract_params(model, batch_shapes(config))
  placed = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract,
      sharding.shardings(boxed, mesh, config.rules))
  part = 'ema' if weights == 'ema' else 'params'
  found = checkpoints.restore({part: placed}, number, only=(part,))
  if found is None:
    raise CheckpointError(f'{workdir} has no checkpoint yet; train it with `t5lab train`')
  state, manifest = found
  return Lab(config, state[part], step=manifest.step, weights=weights, engine=engine)


def open_checkpoints(config, workdir, log=functools.partial(print, flush=True)) -> Checkpoints:
  k = config.checkpoint
  return Checkpoints(Path(workdir) / 'checkpoints', keep=k.keep, best_metric=k.best,
                     best_mode='min' if k.best.endswith('loss') else 'max', log=log)


def choose_step(checkpoints: Checkpoints, step: str | int) -> int | None:
  """'latest' -> None (the newest that verifies), 'best' -> its number, N -> N."""
  if step == 'latest':
    return None
  if step == 'best':
    best = checkpoints.best_step()
    if best is None:
      raise UsageError('no checkpoint has an evaluation of checkpoint.best='
                       f'{checkpoints._best_metric!r}; use --step latest')
    return best
  try:
    return int(step)
  except ValueError:
    raise UsageError(f'step {step!r}: a number, latest or best') from None
