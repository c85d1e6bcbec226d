"""One update, pure: (state, batch) -> (state, metrics). No files, flags, clocks or logs here.

Randomness is fold_in(seed, step): a resumed run needs no generator state.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models import moe
from t5lab.models.transformer import Transformer
from t5lab.training import guards, lora, losses, optim

Array = jax.Array
PyTree = Any
Metrics = dict[str, Array]


@flax.struct.dataclass
class TrainState:
  step: Array        # int32[], updates done
  params: PyTree     # float32
  opt_state: PyTree
  ema: PyTree        # like params, float32, or {} when off


@dataclasses.dataclass(frozen=True)
class Loss:
  """What is minimised: see losses.cross_entropy."""
  z_loss: float = 0.
  label_smoothing: float = 0.
  chunks: int = 1
  balance: float = 0.      # of models with experts, a token: see models/moe.py
  router_z: float = 0.


def init_params(model: Transformer, seed: int, batch) -> PyTree:
  """Boxed float32 parameters, each with its logical axes. `batch` only gives shapes."""
  return model.init({'params': jax.random.key(seed)}, batch)['params']


def new_state(params: PyTree, tx: optax.GradientTransformation, ema: float) -> TrainState:
  """The state of step 0. The average starts at the parameters, so it is never biased to zero."""
  average = optim.ema_init(params) if ema else {}
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def variables(params: PyTree, base: PyTree | None, lora_scale: float) -> PyTree:
  """What the model is applied to: params, or frozen base weights with params as their adapters."""
  if base is None:
    return {'params': params}
  return {'params': base, 'lora': lora.scaled(params, lora_scale)}


def loss_sums(model: Transformer, params: PyTree, batch, loss: Loss, rngs=None, base=None,
              lora_scale: float = 1.) -> losses.Sums:
  """Sums over the batch's tokens: loss, z_loss, weight, correct; with experts their statistics too,
  each times weight, so that a division by weight gives their mean.

  Of a model with nsp and a batch with its labels, sums over the rows too: nsp_loss, nsp_weight,
  nsp_correct, from the same pass of the encoder.
  """
  given = variables(params, base, lora_scale)
  hidden, collected = model.apply(given, batch, rngs=rngs, method='hidden', mutable=['router'])
  unembed = lambda x: model.apply(given, x, method='unembed')
  side = 'decoder' if model.config.dec_layers else 'encoder'
  targets, weights = batch[f'{side}_target_tokens'], batch[f'{side}_loss_weights']
  if hidden.shape[:2] != targets.shape:
    raise UsageError(
        f'the data has {targets.shape[1]} targets a row, the model predicts {hidden.shape[1]} with '
        f'model.classes={model.config.classes}: a classifier takes one class an input, all else '
        'needs model.classes=0')
  settings = dict(z_loss=loss.z_loss, label_smoothing=loss.label_smoothing)
  if loss.chunks > 1:
    sums = losses.chunked_cross_entropy(
        hidden, unembed, targets, weights, chunks=loss.chunks, **settings)
  else:
    sums = losses.cross_entropy(unembed(hidden), targets, weights, **settings)
  if model.config.experts:
    for name in moe.STATISTICS:
      layers = [x for path, x in trees.flatten(collected['router']).items()
                if f'/{name}/' in path]
      # a row counts as its loss tokens do, so that a batch in parts is the whole batch
      rows = jnp.mean(jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in layers]), axis=0)
      sums[name] = jnp.sum(rows * jnp.sum(weights, axis=1))
    sums['loss'] += loss.balance * sums['balance'] + loss.router_z * sums['router_z']
  if _has_next(model, batch):
    logits = model.apply(given, hidden, method='next_logits')[:, None]
    found = losses.cross_entropy(logits, batch['encoder_next_labels'],
                                 batch['encoder_next_weights'])
    sums |= {f'nsp_{name}': found[name] for name in ('loss', 'weight', 'correct')}
  return sums


def _has_next(model, batch) -> bool:
  return model.config.nsp and 'encoder_next_labels' in batch


def _count(weights: Array) -> Array:
  """What a sum over so many is divided by: float32, at least 1."""
  return jnp.maximum(jnp.sum(weights.astype(jnp.float32)), 1.)


def gradients(model, params, batch, loss: Loss, key, microbatches: int, **frozen):
  """(gradient of the summed loss, sums), over microbatches in one scan when there are several.

  Nothing is divided before the end, so k x B/k rows weigh each token as 1 x B does. Microbatch i
  takes every k-th row: rows sharded over devices stay where they are. Next-sentence losses are
  summed times tokens / labels of the whole batch: a division by its tokens leaves their mean.
  """
  if has_next := _has_next(model, batch):
    scale = _count(batch['encoder_loss_weights']) / _count(batch['encoder_next_weights'])

  def one(batch, key):
    def f(p):
      sums = loss_sums(model, p, batch, loss, {'dropout': key}, **frozen)
      return sums['loss'] + scale * sums['nsp_loss'] if has_next else sums['loss'], sums
    return jax.grad(f, has_aux=True)(params)

  if microbatches == 1:
    return one(batch, key)

  split = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
  def body(total, xs):
    i, micro = xs
    return jax.tree.map(jnp.add, total, one(micro, jax.random.fold_in(key, i))), None
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: split(x)[0], batch), key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(
      body, zeros, (jnp.arange(microbatches), jax.tree.map(split, batch)))
  return total


def train_step(state: TrainState, batch: dict[str, Array], base: PyTree | None = None, *,
               model: Transformer, tx: optax.GradientTransformation, loss: Loss, ema: float,
               seed: int = 0, microbatches: int = 1, lora_scale: float = 1.,
               ) -> tuple[TrainState, Metrics]:
  """One update. Pure: same state and batch, same result, on any mesh. Metrics are float32 scalars.

  The loss is the mean over the loss tokens of the global batch, in whatever parts it was computed;
  where it has next-sentence labels, plus the mean of their loss. [Devlin et al. 2019, A.2; their
  code divides by the tokens + 1e-5, this by at least 1]
  base: frozen weights, of which state.params are then the adapters (training/lora.py).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  grads, sums = gradients(model, state.params, batch, loss, key, microbatches, base=base,
                          lora_scale=lora_scale)
  tokens = _count(sums['weight'])
  grads = jax.tree.map(lambda g: g / tokens, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  average = optim.ema_update(state.ema, params, state.step, ema) if ema else state.ema
  metrics = {
      'loss': sums['loss'] / tokens,
      'z_loss': sums['z_loss'] / tokens,
      'accuracy': sums['correct'] / tokens,
      'tokens': sums['weight'],
      'grad_norm': optax.global_norm(grads),
      'param_norm': optax.global_norm(params),
      **{name: sums[name] / tokens for name in moe.STATISTICS if name in sums},
  }
  if 'nsp_loss' in sums:
    rows = _count(sums['nsp_weight'])
    metrics |= {'nsp_loss': sums['nsp_loss'] / rows, 'nsp_accuracy': sums['nsp_correct'] / rows}
    metrics['loss'] += metrics['nsp_loss']
  return TrainState(state.step + 1, params, opt_state, average), metrics


def guarded_step(state: TrainState, batch: dict[str, Array], base: PyTree | None,
                 guard: guards.Guard, *, settings: guards.Settings, **options,
                 ) -> tuple[TrainState, guards.Guard, Metrics]:
  """`train_step`, whose update counts only if guard.judge finds nothing wrong with it.

  A step that does not count leaves every array of the state as it was, its step number, and so the
  dropout keys and learning rates to come, included: the run goes on as one without that batch.
  """
  new, metrics = train_step(state, batch, base, **options)
  ok, guard, added = guards.judge(guard, metrics, settings)
  state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
  return state, guard, metrics | added


def eval_step(params: PyTree, batch, *, model: Transformer) -> losses.Sums:
  """`loss_sums` of the plain cross-entropy, without dropout, smoothing or z-loss."""
  return loss_sums(model, params, batch, Loss())


def abstract_params(model: Transformer, batch):
  """(boxed, unboxed) shapes of the parameters; nothing is allocated."""
  boxed = jax.eval_shape(functools.partial(init_params, model, 0), batch)
  return boxed, nn.unbox(boxed)
