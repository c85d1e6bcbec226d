"""Watchdog: turns a silent hang into stack traces and exit code 124.

A step that waits for a silent peer, a disk or a lock waits forever and prints nothing. A thread
notices that the training loop has stopped, and ends the process.
"""

from collections import deque
import contextlib
import faulthandler
import os
from pathlib import Path
import statistics
import threading
import time

from t5lab.errors import WATCHDOG

FACTOR = 20          # times the median time of a step
STEPS = 100          # the newest steps, of which the median is taken
LEAVE_SECONDS = 10.  # for the stack traces and `leave`


class Watchdog:
  """`with Watchdog(60., workdir) as dog:` then `beat` before each step, `synced` after each fetch.

  The process ends after `seconds` without a sign of life, or FACTOR times the median time of a step
  if that is longer: with the stacks of all threads on standard error and in
  workdir/watchdog_<process>.txt, a line that says what the loop was waiting for, and exit code 124.

  The devices run steps long after the host dispatched them, so a step's time is known only where
  the host fetches a result, and each step in flight adds its own time to the limit. The limit holds
  from the second fetch on, because the first step compiles for an unknown time; the loop should
  fetch after each step until `armed`.

  seconds: 0 turns the watchdog off. leave: called with the exit code instead of os._exit, for at
  most LEAVE_SECONDS.
  """

  def __init__(self, seconds: float, workdir, *, process: int = 0, leave=os._exit):
    self._seconds, self._leave = seconds, leave
    self._path = Path(workdir) / f'watchdog_{process}.txt'
    self._thread = None
    self._closing = threading.Event()

    self._lock = threading.RLock()         # of everything below
    self._last_sign = self._last_fetch = time.monotonic()
    self._in_flight = 0                    # steps dispatched since the last fetch
    self._has_fetched = False
    self._step_seconds = deque(maxlen=STEPS)
    self._doing = ''
    self._paused_limit = None              # of the block in `paused`

  def __enter__(self):
    if self._seconds:
      self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_):
    self._closing.set()
    if self._thread:
      self._thread.join()

  @property
  def armed(self) -> bool:
    """True if a step's time is known, or the watchdog is off."""
    return bool(self._step_seconds) or not self._seconds

  def beat(self, doing: str) -> None:
    """Reports that the loop is about to dispatch the step that `doing` names."""
    with self._lock:
      self._last_sign = time.monotonic()
      self._doing = doing
      self._in_flight += 1

  def synced(self) -> None:
    """Reports that the host has the results of all steps in flight."""
    with self._lock:
      now = time.monotonic()
      if self._in_flight:
        if self._has_fetched:
          self._step_seconds.append((now - self._last_fetch) / self._in_flight)
        self._has_fetched = True
      self._last_sign = self._last_fetch = now
      self._in_flight = 0

  def tick(self) -> None:
    """A sign of life from inside an operation that takes long."""
    with self._lock:
      self._last_sign = time.monotonic()

  @contextlib.contextmanager
  def paused(self, doing: str, seconds: float = 0.):
    """A block with a limit of its own (0: none), e.g. an evaluation, which may compile first.

    `tick` restarts the limit. The time of the block does not count as a step's.
    """
    with self._lock:
      outer = self._doing, self._paused_limit
      self._doing, self._paused_limit = doing, seconds
      start = self._last_sign = time.monotonic()
    try:
      yield
    finally:
      with self._lock:
        self._doing, self._paused_limit = outer
        self._last_sign = time.monotonic()
        self._last_fetch += self._last_sign - start

  def limit(self) -> float:
    """Seconds without a sign of life that would end the process now; 0: no limit."""
    with self._lock:
      if self._paused_limit is not None:
        return self._paused_limit
      if not self._step_seconds:
        return 0.
      median = statistics.median(self._step_seconds)
      return max(self._seconds, FACTOR * median) + self._in_flight * median

  def _watch(self):
    while not self._closing.wait(min(1., self._seconds / 4)):
      with self._lock:
        limit, doing = self.limit(), self._doing
        silent = time.monotonic() - self._last_sign
      if limit and silent > limit:
        self._end_process(f'no sign of life for {silent:.0f} s (limit: {limit:.0f} s) while '
                          f'waiting for: {doing}')

  def _end_process(self, reason):
    line = (f't5lab: watchdog: {reason}; stacks of all threads: {self._path}; '
            f'exit code {WATCHDOG}\n')
    # Nothing here may block: neither a full disk nor a lock that the hanging thread holds.
    threading.Timer(LEAVE_SECONDS, os._exit, [WATCHDOG]).start()
    faulthandler.dump_traceback(2, all_threads=True)
    with contextlib.suppress(OSError), open(self._path, 'w') as f:
      f.write(line)
      f.flush()
      faulthandler.dump_traceback(f, all_threads=True)
    os.write(2, line.encode())
    self._leave(WATCHDOG)
