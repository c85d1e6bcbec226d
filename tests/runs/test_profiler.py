"""Profiles of training steps."""

import jax
import jax.numpy as jnp

from t5lab.runs.profiler import Profiler


def test_profiles_the_steps_that_were_asked_for(tmp_path):
  step = jax.jit(lambda x: x * 2)
  profiler = Profiler(tmp_path, 2)
  written = []
  for i in range(1, 7):
    profiler.before(i)
    profiler.after(i, {'loss': step(jnp.ones(()))})
    written.append(len(list(tmp_path.rglob('*.xplane.pb'))))
  assert written == [0, 0, 0, 1, 1, 1]          # steps 2, 3 and 4


def test_off_by_default_and_stopped_early(tmp_path):
  for first in (0, 1):
    with Profiler(tmp_path / str(first), first) as profiler:
      profiler.before(1)
    assert bool(list((tmp_path / str(first)).rglob('*.xplane.pb'))) == bool(first)
