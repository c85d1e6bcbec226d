"""Learning rate schedules, optimizers as optax chains, and an average of the weights (EMA).

To add an optimizer, write a function that returns its transformations and add it to OPTIMIZERS; a
schedule likewise to SCHEDULES.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5lab import trees
from t5lab.errors import UsageError, did_you_mean

PyTree = Any

# Norm scales, biases and relative-position tables. By path: a stacked scale [L, D] is 2-D too.
DECAY_EXCLUDE = (r'(.*/)?(scale|bias|logit_bias)', r'(.*/)?(global_)?rel\w*/.*')


def stacked_axes(path: str) -> int:
  """Counts the leading axes that hold independent matrices: layers of `nn.scan`, then experts."""
  return trees.fits(path, [r'(.*/)?(layers|tail)/.*']) + trees.fits(path, [r'.*/experts/.*'])


# --- schedules ---------------------------------------------------------------------------------


def _rsqrt(*, lr, warmup, **_):
  """lr until warmup, then lr * sqrt(warmup / step): no ramp. [Raffel et al. 2020, 3.1.2]"""
  start = max(warmup, 1)
  return lambda step: lr * jnp.sqrt(start / jnp.maximum(jnp.asarray(step, jnp.float32), start))


def _cosine(*, lr, warmup, total, end, **_):
  """Linear warm-up, then half a cosine down to end. [Loshchilov and Hutter 2017]"""
  decay = optax.cosine_decay_schedule(lr, max(total - warmup, 1), alpha=end / lr if lr else 0.)
  return _after_warmup(lr, warmup, total, [decay])


def _linear(*, lr, warmup, total, end, **_):
  """Linear warm-up, then a straight line down to end. [Devlin et al. 2019]"""
  decay = optax.linear_schedule(lr, end, max(total - warmup, 1))
  return _after_warmup(lr, warmup, total, [decay])


def _constant(*, lr, warmup, total, **_):
  """Linear warm-up, then lr."""
  return _after_warmup(lr, warmup, total, [optax.constant_schedule(lr)])


def _wsd(*, lr, warmup, total, end, decay_fraction):
  """Linear warm-up, lr, then a straight line to end in the last decay_fraction of total.

  [Hu et al. 2024 (MiniCPM); the linear form of Hägele et al. 2024]
  """
  _check_warmup(warmup, total)
  decay_steps = round(total * decay_fraction)
  if not 1 <= decay_steps <= total - warmup:
    raise UsageError(
        f'optim.decay_fraction must give 1 to {total - warmup} steps with optim.warmup={warmup} '
        f'and total_steps={total}, got {decay_fraction}, which gives {decay_steps}')
  decay = optax.linear_schedule(lr, end, decay_steps)
  return _after_warmup(lr, warmup, total, [optax.constant_schedule(lr), decay],
                       [total - decay_steps])


def _after_warmup(lr, warmup, total, pieces, boundaries=()):
  """Joins a linear warm-up from 0 and the pieces that follow it."""
  _check_warmup(warmup, total)
  if warmup:
    pieces = [optax.linear_schedule(0., lr, warmup), *pieces]
    boundaries = [warmup, *boundaries]
  return optax.join_schedules(pieces, list(boundaries))


def _check_warmup(warmup, total):
  if not 0 <= warmup <= total:
    raise UsageError(f'optim.warmup must be between 0 and total_steps={total}, got {warmup}')


SCHEDULES = {'rsqrt': _rsqrt, 'cosine': _cosine, 'linear': _linear, 'constant': _constant,
             'wsd': _wsd}


def schedule(name: str, *, lr: float, warmup: int, total: int, end: float = 0.,
             decay_fraction: float = 0.1) -> optax.Schedule:
  """Returns the learning rate as a function of the step.

  name: one of SCHEDULES. lr: the peak, reached at step `warmup`. end: the rate at step `total`.
  T5's 1 / sqrt(max(step, 10_000)) is 'rsqrt' with lr=1e-2 and warmup=10_000.
  """
  if name not in SCHEDULES:
    raise UsageError(f'optim.schedule={name!r} is unknown.{did_you_mean(name, SCHEDULES)}')
  return SCHEDULES[name](
      lr=lr, warmup=warmup, total=total, end=end, decay_fraction=decay_fraction)


# --- Adafactor ---------------------------------------------------------------------------------


class AdafactorState(NamedTuple):
  """Second moments: v_row and v_col of factored leaves, v of the others; unused ones are [1]."""
  count: jax.Array  # int32[], updates so far
  v_row: PyTree
  v_col: PyTree
  v: PyTree


def scale_by_adafactor(*, min_factored: int = 128) -> optax.GradientTransformation:
  """T5X's Adafactor before learning rate, momentum and weight decay. [Shazeer and Stern 2018]

  The gradient / sqrt(factored second moment), its RMS clipped to 1, times
  max(RMS(parameter), 1e-3). optax's transformations do this as T5X does for matrices, but take RMS
  and factors over all layers of a stacked leaf at once; here they run under `vmap`, one layer at a
  time.

  min_factored: both sides of a matrix must be at least this long for it to be factored.
  """
  factored_rms = optax.scale_by_factored_rms(
      decay_rate=0.8, min_dim_size_to_factor=min_factored, epsilon=1e-30)
  rescale = optax.chain(optax.clip_by_block_rms(1.), optax.scale_by_param_block_rms(1e-3))

  def by_layer(f, path):
    for _ in range(stacked_axes(path)):
      f = jax.vmap(f)
    return f

  def init(params):
    def init_one(param):
      state = factored_rms.init(param)
      return state.v_row, state.v_col, state.v
    moments = trees.map_paths(lambda path, p: by_layer(init_one, path)(p), params)
    v_row, v_col, v = _unzip(moments, params, 3)
    return AdafactorState(jnp.zeros((), jnp.int32), v_row, v_col, v)

  def update(grads, state, params=None):
    if params is None:
      raise ValueError('Adafactor needs the parameters: tx.update(grads, state, params)')

    def update_one(grad, v_row, v_col, v, param):
      moments = optax.FactoredState(state.count, v_row, v_col, v)
      u, moments = factored_rms.update(grad.astype(jnp.float32), moments, param)
      u, _ = rescale.update(u, rescale.init(param), param)
      return u, moments.v_row, moments.v_col, moments.v

    out = trees.map_paths(lambda path, *leaves: by_layer(update_one, path)(*leaves),
                          grads, state.v_row, state.v_col, state.v, params)
    u, v_row, v_col, v = _unzip(out, grads, 4)
    return u, AdafactorState(optax.safe_increment(state.count), v_row, v_col, v)

  return optax.GradientTransformation(init, update)


def _unzip(tree: PyTree, like: PyTree, n: int) -> list[PyTree]:
  """A tree of n-tuples -> n trees. like: a tree that has an array where `tree` has a tuple."""
  return [jax.tree.map(lambda _, leaf, i=i: leaf[i], like, tree) for i in range(n)]


# --- optimizers --------------------------------------------------------------------------------


def decay_mask(params: PyTree, exclude: Sequence[str] = DECAY_EXCLUDE) -> PyTree:
  """True where weight decay applies: where no regex of `exclude` matches the whole path."""
  return trees.map_paths(lambda path, _: not trees.fits(path, exclude), params)


def _adamw(schedule, weight_decay, mask, *, b1, b2, eps, **_):
  """Subtracts lr * (Adam's update + weight_decay * parameter)."""
  chain = [optax.scale_by_adam(b1, b2, eps)]
  if weight_decay:
    chain.append(optax.add_decayed_weights(weight_decay, mask))
  return [*chain, optax.scale_by_learning_rate(schedule)]


def _adafactor(schedule, weight_decay, mask, *, momentum, min_factored, **_):
  """As T5X: subtracts weight_decay * parameter, *not* times lr. momentum is T5X's beta1."""
  chain = [scale_by_adafactor(min_factored=min_factored), optax.scale_by_learning_rate(schedule)]
  if momentum:
    chain.append(optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32))
  if weight_decay:
    chain.append(optax.add_decayed_weights(-weight_decay, mask))
  return chain


OPTIMIZERS = {'adafactor': _adafactor, 'adamw': _adamw}


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
    min_factored: int = 128,
) -> optax.GradientTransformation:
  """Returns an optimizer whose state is a plain pytree of arrays.

  name: one of OPTIMIZERS; each takes the options that it knows and ignores the others.
  clip: the global norm to which the gradient is clipped first; 0 is off.
  decay_exclude: regexes of whole paths that are not decayed (T5X decays all: pass ()).
  b1, b2, eps: of adamw. momentum, min_factored: of adafactor.
  """
  if name not in OPTIMIZERS:
    raise UsageError(f'optim.name={name!r} is unknown.{did_you_mean(name, OPTIMIZERS)}')
  mask = lambda params: decay_mask(params, decay_exclude)
  chain = OPTIMIZERS[name](schedule, weight_decay, mask, b1=b1, b2=b2, eps=eps, momentum=momentum,
                           min_factored=min_factored)
  if clip:
    chain = [optax.clip_by_global_norm(clip), *chain]
  return optax.chain(*chain)


# --- the average of the weights ----------------------------------------------------------------


def ema_init(params: PyTree) -> PyTree:
  """A float32 copy in buffers of its own, so that a step can donate both."""
  return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(ema: PyTree, params: PyTree, step, decay: float) -> PyTree:
  """Returns the average after update number `step` (int32[], from 0), which produced `params`.

  ema + (1 - d) * (params - ema) with d = min(decay, (1 + step) / (10 + step)), so that the initial
  weights are soon forgotten. It is unbiased, because it starts at the parameters and not at zero
  like `optax.ema`. In float32: a bfloat16 average at 0.9999 never moves, because its steps round to
  0.
  """
  step = jnp.asarray(step, jnp.float32)
  d = jnp.minimum(decay, (1. + step) / (10. + step))
  blend = lambda e, p: e.astype(jnp.float32) + (1. - d) * (p.astype(jnp.float32) - e)
  return jax.tree.map(blend, ema, params)
