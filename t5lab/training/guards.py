"""Whether a step counts: decided inside jit, on global values, so that every device agrees.

A step is bad if its loss, its gradient norm or the parameters it makes are no numbers, or if its
loss or gradient norm is a spike: so many deviations above its running mean. A bad step changes
nothing (training/steps.py, guarded_step). What happens then is the policy:

  stop, rewind   the first bad step halts: no later step changes anything either, so that the host,
                 which looks only every log.every steps, still finds the state before the bad step.
  skip           the run goes on as if the batch had not been there; `patience` bad steps in a row
                 halt.

PaLM restarted from a checkpoint about 100 steps before a spike and left out 200-500 batches
[Chowdhery et al. 2022, 5.1]: that is `rewind`. optax.apply_if_finite accepts the update after so
many errors in a row; this never does.
"""

import dataclasses
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
# A deviation is at least this: of the loss relative to its mean, of the gradient norm in log units.
# Without it, a run whose loss hardly moves would call every step a spike.
FLOOR = (0.01, 0.05)


@flax.struct.dataclass
class Guard:
  """What a step knows of those before. Scalars; carried from step to step on the devices."""
  halted: Array       # int32, 1: no step counts any more
  bad: Array          # int32, bad steps in a row
  good: Array         # int32, good steps up to WINDOW
  mean: Array         # float32[2]: of the loss, of the log gradient norm
  variance: Array     # float32[2]


@dataclasses.dataclass(frozen=True)
class Settings:
  """policy: one of POLICIES; patience: bad steps in a row that halt under 'skip'; spike: deviations
  above the mean, 0: none are looked for."""
  policy: str = 'stop'
  patience: int = 3
  spike: float = 0.

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise UsageError(f'guard.policy={self.policy!r} is unknown.'
                       f'{did_you_mean(self.policy, POLICIES)}')
    if self.patience < 1 or not 0 <= self.spike < math.inf:
      raise UsageError(f'guard.patience={self.patience}, guard.spike={self.spike}: at least 1 step '
                       'of patience, and 0 (off) or more deviations')


def initial() -> Guard:
  """That of step 0, as numpy arrays: see `place`."""
  zero, two = np.zeros((), np.int32), np.zeros(2, np.float32)
  return Guard(zero, zero, zero, two, two)


def place(guard: Guard, sharding) -> Guard:
  """Numpy arrays -> arrays of a (replicated) sharding, each its own buffer: steps donate them."""
  put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
  return jax.tree.map(put, guard)


def judge(guard: Guard, metrics: dict[str, Array], settings: Settings,
          ) -> tuple[Array, Guard, dict[str, Array]]:
  """(whether the step counts, the next guard, metrics to add): skipped, halted and, where spikes
  are looked for, deviations, the larger of both numbers'."""
  finite = jnp.all(jnp.isfinite(jnp.stack(
      [metrics['loss'], metrics['grad_norm'], metrics['param_norm']])))
  x = jnp.stack([metrics['loss'], jnp.log(jnp.maximum(metrics['grad_norm'], 1e-30))])
  floor = jnp.asarray(FLOOR) * jnp.stack([jnp.abs(guard.mean[0]), jnp.ones(())])
  deviation = jnp.maximum(jnp.sqrt(guard.variance), jnp.maximum(floor, 1e-6))
  deviations = jnp.where(guard.good >= WARM_UP, jnp.max((x - guard.mean) / deviation), 0.)
  wrong = ~finite
  if settings.spike:
    wrong |= deviations > settings.spike
  was_halted = guard.halted > 0
  ok = ~(wrong | was_halted)
  limit = settings.patience if settings.policy == 'skip' else 1
  bad = jnp.where(ok, 0, guard.bad + (~was_halted).astype(jnp.int32))
  # Exponential mean and variance, a plain average at first. [West 1979]
  rate = 1. / jnp.minimum(guard.good + 1, WINDOW).astype(jnp.float32)
  delta = x - guard.mean
  mean = guard.mean + rate * delta
  variance = (1. - rate) * (guard.variance + rate * jnp.square(delta))
  following = Guard(halted=(was_halted | (bad >= limit)).astype(jnp.int32), bad=bad,
                    good=jnp.where(ok, jnp.minimum(guard.good + 1, WINDOW), guard.good),
                    mean=jnp.where(ok, mean, guard.mean),
                    variance=jnp.where(ok, variance, guard.variance))
  added = {'skipped': (~ok).astype(jnp.float32), 'halted': following.halted.astype(jnp.float32)}
  if settings.spike:
    added['deviations'] = deviations
  return ok, following, added


def to_json(guard: Guard) -> dict:
  """Plain numbers, exactly: for the meta of a checkpoint, so that a resumed run judges alike."""
  host = jax.device_get(guard)
  return {name: getattr(host, name).tolist() for name in Guard.__dataclass_fields__}


def from_json(saved: dict | None) -> Guard:
  """The guard of a checkpoint's meta; a new one for a checkpoint that has none. Numpy, as `new`."""
  if not saved:
    return initial()
  fresh = initial()
  return Guard(**{name: np.asarray(saved[name], getattr(fresh, name).dtype)
                  for name in Guard.__dataclass_fields__})
