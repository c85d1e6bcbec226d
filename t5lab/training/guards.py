"""The guard: decides inside jit, on global values, whether a step counts.

A step is bad if its loss, its gradient norm or its new parameters are not finite, or if its loss or
gradient norm is a spike: `spike` deviations above its running mean. A bad step changes nothing
(steps.guarded_step). The policy says what happens next:

  stop, rewind   The first bad step halts the run: later steps change nothing either, so the host,
                 which looks only every log.every steps, still finds the state before the bad step.
  skip           The run continues as if the batch had not been there; `patience` bad steps in a row
                 halt it. Unlike optax.apply_if_finite, which accepts the update after some errors
                 in a row, the guard never accepts a bad step.

'rewind' follows PaLM, which restarted from a checkpoint about 100 steps before a spike and left out
200-500 batches [Chowdhery et al. 2022, 5.1].
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t5lab.errors import UsageError, did_you_mean

Array = jax.Array

POLICIES = ('stop', 'skip', 'rewind')
WINDOW = 100     # steps of the running means; MaxText's window has 128
WARM_UP = 20     # good steps before anything is a spike
# The least deviation: of the loss relative to its mean, of the gradient norm in log units. Without
# it, a run whose loss hardly moves would call every step a spike.
FLOOR = (0.01, 0.05)


@flax.struct.dataclass
class Guard:
  """Statistics of the steps so far, carried from step to step on the devices."""
  halted: Array       # int32, 1: later steps do not count
  bad: Array          # int32, bad steps in a row
  good: Array         # int32, good steps, at most WINDOW
  mean: Array         # float32[2]: of the loss and of the log gradient norm
  variance: Array     # float32[2]


@dataclasses.dataclass(frozen=True)
class Settings:
  policy: str = 'stop'    # one of POLICIES
  patience: int = 3       # bad steps in a row that halt under 'skip'
  spike: float = 0.       # deviations above the mean; 0: spikes count as good steps

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise UsageError(f'guard.policy={self.policy!r} is unknown.'
                       f'{did_you_mean(self.policy, POLICIES)}')
    if self.patience < 1:
      raise UsageError(f'guard.patience must be at least 1 step, got {self.patience}')
    if not 0 <= self.spike < math.inf:
      raise UsageError(f'guard.spike must be 0 (off) or a number of deviations, got {self.spike}')


def initial() -> Guard:
  """The guard at step 0, as numpy arrays; `place` puts it on the devices."""
  zero, two = np.zeros((), np.int32), np.zeros(2, np.float32)
  return Guard(zero, zero, zero, two, two)


def place(guard: Guard, sharding) -> Guard:
  """Puts numpy arrays on the devices, each in a buffer of its own, because steps donate them."""
  put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
  return jax.tree.map(put, guard)


def judge(guard: Guard, metrics: dict[str, Array], settings: Settings,
          ) -> tuple[Array, Guard, dict[str, Array]]:
  """Returns (whether the step counts, the next guard, metrics to add).

  The metrics are skipped, halted and, if spikes are looked for, deviations: how far above its mean
  the loss or the gradient norm is, whichever is further.
  """
  # Non-finite, or far above the running means?
  is_bad = ~jnp.all(jnp.isfinite(jnp.stack(
      [metrics['loss'], metrics['grad_norm'], metrics['param_norm']])))
  x = jnp.stack([metrics['loss'], jnp.log(jnp.maximum(metrics['grad_norm'], 1e-30))])
  floor = jnp.asarray(FLOOR) * jnp.stack([jnp.abs(guard.mean[0]), jnp.ones(())])
  deviation = jnp.maximum(jnp.sqrt(guard.variance), jnp.maximum(floor, 1e-6))
  deviations = jnp.where(guard.good >= WARM_UP, jnp.max((x - guard.mean) / deviation), 0.)
  if settings.spike:
    is_bad |= deviations > settings.spike

  # Once halted, a step counts neither as good nor as bad.
  was_halted = guard.halted > 0
  ok = ~(is_bad | was_halted)
  bad = jnp.where(ok, 0, guard.bad + (~was_halted).astype(jnp.int32))
  limit = settings.patience if settings.policy == 'skip' else 1
  halted = (was_halted | (bad >= limit)).astype(jnp.int32)

  # Exponential mean and variance of good steps, a plain average at first. [West 1979]
  good = jnp.minimum(guard.good + 1, WINDOW)
  rate = 1. / good.astype(jnp.float32)
  delta = x - guard.mean
  mean = guard.mean + rate * delta
  variance = (1. - rate) * (guard.variance + rate * jnp.square(delta))
  keep = functools.partial(jnp.where, ok)
  new_guard = Guard(halted, bad, keep(good, guard.good), keep(mean, guard.mean),
                    keep(variance, guard.variance))

  added = {'skipped': (~ok).astype(jnp.float32), 'halted': halted.astype(jnp.float32)}
  if settings.spike:
    added['deviations'] = deviations
  return ok, new_guard, added


def to_json(guard: Guard) -> dict:
  """Plain numbers, exactly: kept in a checkpoint's meta so that a resumed run judges alike."""
  host = jax.device_get(guard)
  return {name: getattr(host, name).tolist() for name in Guard.__dataclass_fields__}


def from_json(saved: dict | None) -> Guard:
  """The guard of a checkpoint's meta, as numpy arrays; the initial one if the meta has none."""
  default = initial()
  if not saved:
    return default
  return Guard(**{name: np.asarray(saved[name], getattr(default, name).dtype)
                  for name in Guard.__dataclass_fields__})
