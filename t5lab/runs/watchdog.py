"""Turns a silent hang into stack traces and exit code 124.

A step that waits for a peer which stopped answering, for a disk or for a lock waits for ever and
says nothing. A thread here notices that the loop has not come by, and ends the process.
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
STEPS = 100          # that the median is taken of


class Watchdog:
  """`with Watchdog(60., workdir) as dog:` then `beat` before each step, `synced` after each fetch.

  `seconds`, or FACTOR medians of a step's time if that is more, without a sign of life end the
  process: stacks of all threads to standard error and to workdir/watchdog_<process>.txt, a line
  that says what was waited for, exit code 124. Steps run on the devices long after they were
  dispatched, so what a step takes is known only where the host waits for one, and each step that is
  still under way may take its time too. Nothing is watched before two fetches, for the first step
  compiles as long as it has to; let the loop fetch after each step until `armed`.

  beat costs a clock reading. seconds: 0 is off. leave: called with the code at last, instead of
  os._exit; it has 10 s.
  """

  def __init__(self, seconds: float, workdir, *, process: int = 0, leave=os._exit):
    self._seconds, self._path = seconds, Path(workdir) / f'watchdog_{process}.txt'
    self._leave = leave
    self._lock = threading.Lock()
    self._closing = threading.Event()
    self._last = self._fetched = time.monotonic()
    self._under_way, self._known = 0, False
    self._doing, self._limit = '', None  # _limit: of the block in `paused`
    self._steps = deque(maxlen=STEPS)    # seconds of each
    self._thread = None

  def __enter__(self):
    if self._seconds:
      self._thread = threading.Thread(target=self._run, name='watchdog', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_):
    self._closing.set()
    if self._thread:
      self._thread.join()

  @property
  def armed(self) -> bool:
    """Whether a step's time is known (or nothing is to be watched)."""
    return bool(self._steps) or not self._seconds

  def beat(self, doing: str) -> None:
    """The loop is here, and goes on to do what `doing` names."""
    with self._lock:
      self._last, self._doing = time.monotonic(), doing
      self._under_way += 1

  def synced(self) -> None:
    """The host has what the last step computed."""
    with self._lock:
      now = time.monotonic()
      if self._known and self._under_way:
        self._steps.append((now - self._fetched) / self._under_way)
      self._last = self._fetched = now
      self._known, self._under_way = self._known or self._under_way > 0, 0

  def tick(self) -> None:
    """A sign of life from inside what takes long."""
    with self._lock:
      self._last = time.monotonic()

  @contextlib.contextmanager
  def paused(self, doing: str, seconds: float = 0.):
    """A block with a limit of its own, 0: none, such as an evaluation that has to compile first;
    `tick` starts it anew. What the block takes is no step's time."""
    with self._lock:
      before, self._doing, self._limit = (self._doing, self._limit), doing, seconds
      start = self._last = time.monotonic()
    try:
      yield
    finally:
      with self._lock:
        self._doing, self._limit = before
        self._last = time.monotonic()
        self._fetched += self._last - start

  def limit(self) -> float:
    """Seconds without a sign of life that end the process now; 0: none do."""
    with self._lock:
      return self._current()

  def _current(self):
    if self._limit is not None:
      return self._limit
    if not self._steps:
      return 0.
    median = statistics.median(self._steps)
    return max(self._seconds, FACTOR * median) + self._under_way * median

  def _run(self):
    while not self._closing.wait(min(1., self._seconds / 4)):
      with self._lock:
        limit = self._current()
        waited = time.monotonic() - self._last if limit else 0.
        doing = self._doing
      if limit and waited > limit:
        self._bite(f'no sign of life for {waited:.0f} s (the limit is {limit:.0f} s); it was '
                   f'waiting for: {doing}')

  def _bite(self, reason):
    line = f't5lab: watchdog: {reason}; stacks of all threads: {self._path}; exit code {WATCHDOG}'
    # Nothing here may wait: neither for a full disk nor for a lock that the hanging thread holds.
    threading.Timer(10., os._exit, [WATCHDOG]).start()
    faulthandler.dump_traceback(2, all_threads=True)
    try:
      with open(self._path, 'w') as f:
        f.write(line + '\n')
        f.flush()
        faulthandler.dump_traceback(f, all_threads=True)
    except OSError:
      pass
    os.write(2, (line + '\n').encode())
    self._leave(WATCHDOG)
