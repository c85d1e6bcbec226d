"""Learning rate schedules, optimizers as optax chains, and an average of the weights (EMA).

To add an optimizer, write a function that returns its transformations and add it to OPTIMIZERS; a
schedule likewise to SCHEDULES.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5lab import trees
from t5lab.errors import UsageError, did_you_mean
from t5lab.training import adafactor

PyTree = Any

# Norm scales, biases and relative-position tables. By path: a stacked scale [L, D] is 2-D too.
DECAY_EXCLUDE = (r'(.*/)?(scale|bias|logit_bias)', r'(.*/)?(global_)?rel\w*/.*')


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
  """Like T5X, subtracts weight_decay * parameter, *not* times lr. momentum is T5X's beta1."""
  chain = [adafactor.scale_by_adafactor(min_factored=min_factored),
           optax.scale_by_learning_rate(schedule)]
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
  like `optax.ema`. In float32: the steps of a bfloat16 average at 0.9999 round to 0.
  """
  step = jnp.asarray(step, jnp.float32)
  d = jnp.minimum(decay, (1. + step) / (10. + step))
  blend = lambda e, p: e.astype(jnp.float32) + (1. - d) * (p.astype(jnp.float32) - e)
  return jax.tree.map(blend, ema, params)
