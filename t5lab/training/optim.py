"""Schedules and optimizers as optax chains, and the float32 average of the weights (EMA)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5lab import trees
from t5lab.errors import UsageError, did_you_mean

PyTree = Any

SCHEDULES = ('rsqrt', 'cosine', 'linear', 'constant', 'wsd')
OPTIMIZERS = ('adafactor', 'adamw')

def stacked_axes(path: str) -> int:
  """Leading axes that hold independent matrices: layers of an `nn.scan`, then experts."""
  return trees.fits(path, [r'(.*/)?(layers|tail)/.*']) + trees.fits(path, [r'.*/experts/.*'])


# Norm scales, biases and relative-position tables. By path: a stacked scale [L, D] is 2-D too.
DECAY_EXCLUDE = (r'(.*/)?(scale|bias|logit_bias)', r'(.*/)?(global_)?rel\w*/.*')


def schedule(name: str, *, lr: float, warmup: int, total: int, end: float = 0.,
             decay_fraction: float = 0.1) -> optax.Schedule:
  """Learning rate by step; `lr` is the largest, reached at step `warmup`, `end` the one at `total`.

  rsqrt     lr until warmup, then lr * sqrt(warmup / step): no ramp. [Raffel et al. 2020, 3.1.2]
            lr = 1e-2, warmup = 10_000 is T5's 1 / sqrt(max(step, 10_000)).
  cosine    linear warm-up from 0, half a cosine down to end. [Loshchilov and Hutter 2017]
  linear    linear warm-up, straight line down to end. [Devlin et al. 2019]
  constant  linear warm-up, then lr.
  wsd       linear warm-up, lr, straight line to end in the last decay_fraction of total.
            [Hu et al. 2024 (MiniCPM); the linear form of Hägele et al. 2024]
  """
  if name not in SCHEDULES:
    raise UsageError(f"unknown schedule '{name}'.{did_you_mean(name, SCHEDULES)}")
  if name == 'rsqrt':
    start = max(warmup, 1)
    return lambda step: lr * jnp.sqrt(start / jnp.maximum(jnp.asarray(step, jnp.float32), start))
  if not 0 <= warmup <= total:
    raise UsageError(f'schedule {name}: warmup {warmup} is not within 0 … total {total}.')
  left = max(total - warmup, 1)
  if name == 'cosine':
    alpha = end / lr if lr else 0.
    pieces, at = [optax.cosine_decay_schedule(lr, left, alpha)], []
  elif name == 'linear':
    pieces, at = [optax.linear_schedule(lr, end, left)], []
  elif name == 'constant':
    pieces, at = [optax.constant_schedule(lr)], []
  else:
    decay = round(total * decay_fraction)
    if not 1 <= decay <= total - warmup:
      raise UsageError(f'schedule wsd: decay_fraction {decay_fraction} of total {total} is {decay} '
                       f'steps; 1 … {total - warmup} are left after warmup {warmup}.')
    pieces = [optax.constant_schedule(lr), optax.linear_schedule(lr, end, decay)]
    at = [total - decay]
  if warmup:
    pieces, at = [optax.linear_schedule(0., lr, warmup), *pieces], [warmup, *at]
  return optax.join_schedules(pieces, at)


class AdafactorState(NamedTuple):
  """Second moments: v_row, v_col of factored leaves, v of the others; the unused ones are [1]."""
  count: jax.Array  # int32[], updates so far
  v_row: PyTree
  v_col: PyTree
  v: PyTree


def scale_by_adafactor(
    *,
    stacked: Callable[[str], int] = stacked_axes,
    decay_rate: float = 0.8,
    min_factored: int = 128,
) -> optax.GradientTransformation:
  """T5X's Adafactor before learning rate, momentum and weight decay. [Shazeer and Stern 2018]

  Gradient / sqrt(factored second moment), its RMS clipped to 1, times max(RMS(parameter), 1e-3).
  optax's pieces do this as T5X does for matrices, but take RMS and factors over all layers of a
  stacked leaf at once; so they run here under `vmap`, one layer at a time.

  stacked: from a path to the number of leading axes that are not the matrix's. min_factored: both
  sides of a factored matrix have it.
  """
  factored_rms = optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_factored, epsilon=1e-30)
  rescale = optax.chain(optax.clip_by_block_rms(1.), optax.scale_by_param_block_rms(1e-3))

  def by_layer(f, path):
    for _ in range(stacked(path)):
      f = jax.vmap(f)
    return f

  def init(params):
    def one(param):
      state = factored_rms.init(param)
      return state.v_row, state.v_col, state.v
    moments = trees.map_paths(lambda path, p: by_layer(one, path)(p), params)
    v_row, v_col, v = (jax.tree.map(lambda _, m, i=i: m[i], params, moments) for i in range(3))
    return AdafactorState(jnp.zeros((), jnp.int32), v_row, v_col, v)

  def update(grads, state, params=None):
    if params is None:
      raise ValueError('Adafactor needs the parameters: tx.update(grads, state, params)')

    def one(grad, v_row, v_col, v, param):
      moments = optax.FactoredState(state.count, v_row, v_col, v)
      u, moments = factored_rms.update(grad.astype(jnp.float32), moments, param)
      u, _ = rescale.update(u, rescale.init(param), param)
      return u, moments.v_row, moments.v_col, moments.v

    out = trees.map_paths(lambda path, *leaves: by_layer(one, path)(*leaves),
                          grads, state.v_row, state.v_col, state.v, params)
    u, v_row, v_col, v = (jax.tree.map(lambda _, o, i=i: o[i], grads, out) for i in range(4))
    return u, AdafactorState(optax.safe_increment(state.count), v_row, v_col, v)

  return optax.GradientTransformation(init, update)


def decay_mask(params: PyTree, exclude: Sequence[str] = DECAY_EXCLUDE) -> PyTree:
  """True where weight decay applies: no regex of `exclude` matches the whole path."""
  return trees.map_paths(lambda path, _: not trees.fits(path, exclude), params)


def optimizer(
    name: str,
    schedule: optax.ScalarOrSchedule,
    *,
    clip: float = 0.,
    weight_decay: float = 0.,
    decay_exclude: Sequence[str] = DECAY_EXCLUDE,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.,
    decay_rate: float = 0.8,
    min_factored: int = 128,
    stacked: Callable[[str], int] = stacked_axes,
) -> optax.GradientTransformation:
  """'adafactor' or 'adamw'; its state is a plain pytree of arrays.

  clip: the gradient's global norm is clipped to it first; 0 is off.
  weight_decay: adamw subtracts lr * weight_decay * parameter; adafactor subtracts
  weight_decay * parameter, *not* times lr, as T5X does. decay_exclude: regexes of whole paths that
  are not decayed (T5X decays all: pass ()).
  b1, b2, eps: adamw. momentum (T5X's beta1), decay_rate, min_factored, stacked: adafactor.
  """
  if name not in OPTIMIZERS:
    raise UsageError(f"unknown optimizer '{name}'.{did_you_mean(name, OPTIMIZERS)}")
  chain = [optax.clip_by_global_norm(clip)] if clip else []
  mask = lambda params: decay_mask(params, decay_exclude)
  if name == 'adamw':
    chain.append(optax.scale_by_adam(b1, b2, eps))
    if weight_decay:
      chain.append(optax.add_decayed_weights(weight_decay, mask))
    chain.append(optax.scale_by_learning_rate(schedule))
  else:
    chain.append(scale_by_adafactor(
        stacked=stacked, decay_rate=decay_rate, min_factored=min_factored))
    chain.append(optax.scale_by_learning_rate(schedule))
    if momentum:
      chain.append(optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32))
    if weight_decay:
      chain.append(optax.add_decayed_weights(-weight_decay, mask))
  return optax.chain(*chain)


def ema_init(params: PyTree) -> PyTree:
  """A float32 copy in buffers of its own, so that a step can donate both."""
  return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(ema: PyTree, params: PyTree, step, decay: float) -> PyTree:
  """The average after update number `step` (int32[], from 0), with the parameters it produced.

  ema + (1 - d) * (params - ema) with d = min(decay, (1 + step) / (10 + step)), so that the start is
  soon forgotten. In float32: in bfloat16 an average at 0.9999 never moves, since its steps round
  to 0. Unbiased, because it starts at the parameters and not at zero as `optax.ema` does.
  """
  step = jnp.asarray(step, jnp.float32)
  d = jnp.minimum(decay, (1. + step) / (10. + step))
  blend = lambda e, p: e.astype(jnp.float32) + (1. - d) * (p.astype(jnp.float32) - e)
  return jax.tree.map(blend, ema, params)
