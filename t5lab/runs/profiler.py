"""A profile of a few training steps, for TensorBoard or Perfetto."""

import contextlib
from pathlib import Path

import jax

STEPS = 3


class Profiler(contextlib.AbstractContextManager):
  """Profiles STEPS steps from step `first` on (0: none) into workdir/profile.

  To view it: `tensorboard --logdir WORKDIR/profile`, with tensorboard-plugin-profile installed.
  `with Profiler(…) as profiler`, then `before(step)` and `after(step, metrics)` around every step.
  """

  def __init__(self, workdir, first: int):
    self._folder = Path(workdir) / 'profile'
    self._first, self._running = first, False

  def before(self, step: int) -> None:
    if self._first and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, metrics) -> None:
    if self._running and step >= self._first + STEPS - 1:
      jax.block_until_ready(metrics['loss'])
      self.__exit__()

  def __exit__(self, *_):
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
