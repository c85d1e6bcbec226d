"""The train step, pure: (state, batch) -> (state, metrics). No files, flags, clocks or logs here.

Random keys are fold_in(seed, step), so a resumed run needs no generator state.
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
  """Settings of the loss, see losses.cross_entropy."""
  z_loss: float = 0.
  label_smoothing: float = 0.
  chunks: int = 1
  balance: float = 0.      # weight per token of the experts' load balancing loss, see models/moe.py
  router_z: float = 0.     # and of their router's z-loss


# --- parameters and state ----------------------------------------------------------------------


def init_params(model: Transformer, seed: int, batch) -> PyTree:
  """Boxed float32 parameters, each with its logical axes. `batch` only gives shapes."""
  return model.init({'params': jax.random.key(seed)}, batch)['params']


def abstract_params(model: Transformer, batch):
  """(boxed, unboxed) shapes of the parameters; allocates nothing."""
  boxed = jax.eval_shape(functools.partial(init_params, model, 0), batch)
  return boxed, nn.unbox(boxed)


def new_state(params: PyTree, tx: optax.GradientTransformation, ema: float) -> TrainState:
  """The state at step 0. The average starts at the parameters, so it is not biased towards zero."""
  average = optim.ema_init(params) if ema else {}
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def variables(params: PyTree, base: PyTree | None, lora_scale: float) -> PyTree:
  """The model's variables: params, or frozen base weights with params as their adapters."""
  if base is None:
    return {'params': params}
  return {'params': base, 'lora': lora.scaled(params, lora_scale)}


# --- loss --------------------------------------------------------------------------------------


def loss_sums(model: Transformer, params: PyTree, batch, loss: Loss, rngs=None, base=None,
              lora_scale: float = 1.) -> losses.Sums:
  """Returns sums over the batch's tokens: loss, z_loss, weight, correct.

  A model with experts adds their statistics, each times weight, so that a division by weight gives
  their mean. A model with nsp and a batch with its labels add sums over the rows, from the same
  pass of the encoder: nsp_loss, nsp_weight, nsp_correct.
  """
  model_variables = variables(params, base, lora_scale)
  hidden, collected = model.apply(
      model_variables, batch, rngs=rngs, method='hidden', mutable=['router'])
  unembed = lambda x: model.apply(model_variables, x, method='unembed')
  side = 'decoder' if model.config.dec_layers else 'encoder'
  targets, weights = batch[f'{side}_target_tokens'], batch[f'{side}_loss_weights']
  if hidden.shape[:2] != targets.shape:
    raise UsageError(
        f'the data has {targets.shape[1]} targets per row, but the model predicts '
        f'{hidden.shape[1]} with model.classes={model.config.classes}: a classifier needs one '
        'class per input, every other model needs model.classes=0')

  # Cross-entropy, in chunks if the logits of the whole batch would be too large.
  options = dict(z_loss=loss.z_loss, label_smoothing=loss.label_smoothing)
  if loss.chunks > 1:
    sums = losses.chunked_cross_entropy(
        hidden, unembed, targets, weights, chunks=loss.chunks, **options)
  else:
    sums = losses.cross_entropy(unembed(hidden), targets, weights, **options)

  if model.config.experts:
    sums |= _router_sums(collected['router'], weights)
    sums['loss'] += loss.balance * sums['balance'] + loss.router_z * sums['router_z']
  if _has_next(model, batch):
    logits = model.apply(model_variables, hidden, method='next_logits')[:, None]
    next_sums = losses.cross_entropy(
        logits, batch['encoder_next_labels'], batch['encoder_next_weights'])
    sums |= {f'nsp_{name}': next_sums[name] for name in ('loss', 'weight', 'correct')}
  return sums


def _router_sums(collected, weights) -> losses.Sums:
  """Statistics of the experts, averaged over layers and summed over the batch's tokens."""
  flat, sums = trees.flatten(collected), {}
  for name in moe.STATISTICS:
    layers = [x.reshape(-1, x.shape[-1]) for path, x in flat.items() if f'/{name}/' in path]
    # A row counts by its loss tokens, so that microbatches add up to the whole batch.
    rows = jnp.mean(jnp.concatenate(layers), axis=0)
    sums[name] = jnp.sum(rows * jnp.sum(weights, axis=1))
  return sums


def _has_next(model, batch) -> bool:
  """True if the loss includes next-sentence prediction."""
  return model.config.nsp and 'encoder_next_labels' in batch


def _total(weights: Array) -> Array:
  """The sum of weights as a divisor: float32, at least 1."""
  return jnp.maximum(jnp.sum(weights.astype(jnp.float32)), 1.)


def gradients(model, params, batch, loss: Loss, key, microbatches: int, **frozen):
  """Returns (gradient of the summed loss, sums), in one scan if there are several microbatches.

  Sums are divided only at the end, so k x B/k rows weigh each token as 1 x B rows do. Microbatch i
  takes every k-th row, so rows that are sharded over devices stay where they are. Next-sentence
  losses are scaled by tokens / labels of the batch: divided by its tokens, they give their mean.
  """
  if has_next := _has_next(model, batch):
    next_scale = _total(batch['encoder_loss_weights']) / _total(batch['encoder_next_weights'])

  def one(batch, key):
    def summed_loss(params):
      sums = loss_sums(model, params, batch, loss, {'dropout': key}, **frozen)
      if has_next:
        return sums['loss'] + next_scale * sums['nsp_loss'], sums
      return sums['loss'], sums
    return jax.grad(summed_loss, has_aux=True)(params)

  if microbatches == 1:
    return one(batch, key)

  def add(total, xs):
    i, microbatch = xs
    return jax.tree.map(jnp.add, total, one(microbatch, jax.random.fold_in(key, i))), None

  split = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: split(x)[0], batch), key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), jax.tree.map(split, batch)))
  return total


def step_gradients(params, step, batch, base=None, *, model: Transformer, loss: Loss, seed: int = 0,
                   microbatches: int = 1, lora_scale: float = 1.):
  """`gradients` with the dropout of update number `step`."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return gradients(model, params, batch, loss, key, microbatches, base=base, lora_scale=lora_scale)


# --- steps -------------------------------------------------------------------------------------


def train_step(state: TrainState, batch: dict[str, Array], base: PyTree | None = None, *,
               tx: optax.GradientTransformation, ema: float, **options,
               ) -> tuple[TrainState, Metrics]:
  """One update. The same state and batch give the same result, on any mesh.

  The loss is the mean over the loss tokens of the global batch, however many microbatches compute
  it. With next-sentence labels, the mean of their loss is added. [Devlin et al. 2019, A.2; their
  code divides by the tokens + 1e-5, this by at least 1]
  base: frozen weights; state.params are then their adapters (training/lora.py).
  options: of `step_gradients`. Metrics are float32 scalars.
  """
  grads, sums = step_gradients(state.params, state.step, batch, base, **options)
  tokens = _total(sums['weight'])
  grads = jax.tree.map(lambda g: g / tokens, grads)

  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  average = optim.ema_update(state.ema, params, state.step, ema) if ema else state.ema

  metrics = {
      'loss': sums['loss'] / tokens,
      'z_loss': sums['z_loss'] / tokens,
      'accuracy': sums['correct'] / tokens,
      'tokens': sums['weight'],
      'grad_norm': optax.tree.norm(grads),
      'param_norm': optax.tree.norm(params),
      **{name: sums[name] / tokens for name in moe.STATISTICS if name in sums},
  }
  if 'nsp_loss' in sums:
    labels = _total(sums['nsp_weight'])
    metrics['nsp_loss'] = sums['nsp_loss'] / labels
    metrics['nsp_accuracy'] = sums['nsp_correct'] / labels
    metrics['loss'] += metrics['nsp_loss']
  return TrainState(state.step + 1, params, opt_state, average), metrics


def guarded_step(state: TrainState, batch: dict[str, Array], base: PyTree | None,
                 guard: guards.Guard, *, settings: guards.Settings, **options,
                 ) -> tuple[TrainState, guards.Guard, Metrics]:
  """`train_step`, whose update counts only if guards.judge accepts it.

  A step that does not count leaves the whole state as it was, its step number included, and so the
  dropout keys and learning rates to come: the run continues as one without that batch.
  """
  updated, metrics = train_step(state, batch, base, **options)
  ok, guard, added = guards.judge(guard, metrics, settings)
  state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), updated, state)
  return state, guard, metrics | added


def eval_step(params: PyTree, batch, *, model: Transformer) -> losses.Sums:
  """`loss_sums` of the plain cross-entropy, without dropout, smoothing or z-loss."""
  return loss_sums(model, params, batch, Loss())
