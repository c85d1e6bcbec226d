"""Several processes as one run: they join, agree through the coordination service, end together.

The same command runs on every host. Where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID are set, or JAX knows the cluster (Cloud TPU, GKE, SLURM), `start` joins them;
elsewhere a process is a run of its own, and everything here costs nothing.

What processes say to each other before, between and after steps goes through the service's
key-value store and not through devices: it has timeouts, names who is late, and meets no collective
of a train step.
"""

import atexit
from collections.abc import Callable
import contextlib
import faulthandler
import itertools
import json
import os
import re
import sys
import threading
import time

import jax
from jax._src import distributed  # the store has no public name; Orbax does the same
from jax.experimental import multihost_utils
import numpy as np

from t5lab import errors
from t5lab.errors import Failure, UsageError
from t5lab.parallel.meeting import whereabouts

PORT = 8476                    # of the coordinator, on all platforms
SECONDS = 300.                 # that processes wait for each other where nothing else is said
POLL = 0.5                     # seconds between looks at what the others say
_calls = itertools.count()     # every process asks the same questions in the same order


def start(seconds: float = SECONDS) -> None:
  """Joins the processes of this run. Before anything touches a device; a second call does nothing.

  T5LAB_HEARTBEAT: seconds without a sign of life after which a process counts as dead and the
  others end (default 100). UsageError if the coordinator cannot be reached.
  """
  if distributed.global_state.client is not None:
    return
  place = whereabouts(seconds)
  if place.count == 1:
    return
  try:
    heartbeat = int(os.environ.get('T5LAB_HEARTBEAT', 100))
  except ValueError as e:
    raise UsageError(f'T5LAB_HEARTBEAT: {e}') from None
  try:
    jax.distributed.initialize(place.address, place.count, place.index,
                               heartbeat_timeout_seconds=heartbeat,
                               initialization_timeout=int(seconds))
  except (ValueError, RuntimeError) as e:
    raise UsageError(f'cannot join the run at {place.address} as process {place.index} of '
                     f'{place.count}: {_first_line(e)}; `t5lab doctor` looks further') from e
  _listener.start()
  atexit.register(_listener.stop)


def index() -> int:
  return distributed.global_state.process_id if _joined() else 0


def count() -> int:
  return distributed.global_state.num_processes if _joined() else 1


def is_main() -> bool:
  """Whether this process writes what a run writes once."""
  return index() == 0


def _joined() -> bool:
  return distributed.global_state.client is not None


def _store():
  return distributed.global_state.client


# --- agreement ---------------------------------------------------------------------------------


def agreed(decide: Callable, seconds: float = SECONDS):
  """What `decide` gives on process 0, in all of them: JSON. Its Failure is raised in all."""
  if count() == 1:
    return decide()
  key = f't5lab/agreed/{next(_calls)}'
  if not is_main():
    said = json.loads(_get(key, seconds, 'process 0'))
    if 'error' in said:
      raise getattr(errors, said['error'])(said['message'])
    return said['value']
  try:
    value = decide()
  except Failure as e:
    kind = next(k.__name__ for k in type(e).__mro__ if k.__module__ == errors.__name__)
    _store().key_value_set(key, json.dumps({'error': kind, 'message': str(e)}))
    raise
  _store().key_value_set(key, json.dumps({'value': value}))
  return value


def gather(value, seconds: float = SECONDS) -> list:
  """JSON of every process, in their order. Failure names the processes that did not say it."""
  if count() == 1:
    return [value]
  key = f't5lab/gather/{next(_calls)}'
  _store().key_value_set(f'{key}/{index()}', json.dumps(value))
  end, found = time.monotonic() + seconds, {}
  for i in range(count()):
    with contextlib.suppress(Failure):
      found[i] = json.loads(_get(f'{key}/{i}', max(end - time.monotonic(), 0.1), f'process {i}'))
  if late := [i for i in range(count()) if i not in found]:
    raise Failure(f'no sign of process {", ".join(map(str, late))} of {count()} after '
                  f'{seconds:g} s; look at their output, or run `t5lab doctor` on all hosts')
  return [found[i] for i in range(count())]


def barrier(name: str, seconds: float = SECONDS) -> None:
  """Waits until all are here. Failure names who is late; safe in a thread."""
  if count() == 1:
    return
  try:
    _store().wait_at_barrier(f't5lab/{name}', int(seconds * 1000))
  except jax.errors.JaxRuntimeError as e:
    late = sorted(set(re.findall(r'task:(\d+)', str(e))), key=int)
    raise Failure(f'{name}: process {", ".join(late) or "?"} of {count()} did not come within '
                  f'{seconds:g} s') from e


def _get(key, seconds, who) -> str:
  try:
    return _store().blocking_key_value_get(key, int(seconds * 1000))
  except jax.errors.JaxRuntimeError as e:
    raise Failure(f'nothing heard from {who} of {count()} in {seconds:g} s: '
                  f'{_first_line(e)}') from e


def _first_line(e) -> str:
  return (str(e).splitlines() or [type(e).__name__])[0][:200]


def fetch(x) -> np.ndarray:
  """A global array as numpy, in every process."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


# --- ending together ---------------------------------------------------------------------------


class Together:
  """`with Together(signals) as stop: … if why := stop.check(): save, then raise Preempted`.

  check() is '' or the reason to stop, and gives it to every process at the same call of check, so
  all of them must call it at the same points of the same program. A signal to one process is
  enough: a thread tells the others, each says how often it has checked while its own check is
  held, and the next number after the largest is where they stop. No device and no main thread
  takes part, so it also works while they compile, or wait for each other in a step.

  signals: with `requested`, '' or the name of a signal (runs/rundir.py).
  """

  def __init__(self, signals):
    self._signals = signals
    self._lock = threading.Lock()
    self._checks, self._at, self._why = 0, None, ''
    self._told = False

  def __enter__(self):
    _listener.together = self
    return self

  def __exit__(self, *_):
    _listener.together = None

  def check(self) -> str:
    if count() == 1:
      return self._signals.requested
    with self._lock:
      self._checks += 1
      return self._why if self._at is not None and self._checks >= self._at else ''

  def listen(self, stop: str | None) -> None:
    """Called by the thread that listens: `stop` is why somebody wants to."""
    if self._signals.requested and not self._told:
      self._told = True
      _store().key_value_set('t5lab/end/stop', self._signals.requested, allow_overwrite=True)
    if stop and self._at is None:
      self._settle(stop)

  def _settle(self, why):
    try:
      with self._lock:
        _store().key_value_set(f't5lab/stop/{index()}', str(self._checks))
        _store().wait_at_barrier('t5lab/stop', 30_000)
        checks = [int(_store().blocking_key_value_get(f't5lab/stop/{i}', 10_000))
                  for i in range(count())]
        self._at, self._why = max(checks) + 1, why
    except jax.errors.JaxRuntimeError as e:
      print(f't5lab: cannot agree on where to stop: {_first_line(e)}', file=sys.stderr, flush=True)


class _Listener:
  """A thread that looks every POLL seconds whether some process stops or has failed."""

  def __init__(self):
    self.together, self.stderr = None, 2
    self._closing = threading.Event()

  def start(self):
    self.stderr = os.dup(2)
    self._thread = threading.Thread(target=self._run, name='listener', daemon=True)
    self._thread.start()

  def stop(self):
    self._closing.set()
    self._thread.join()

  def _run(self):
    while not self._closing.wait(POLL):
      try:
        said = dict(_store().key_value_dir_get('t5lab/end/'))
        for key, value in said.items():
          if key.startswith('t5lab/end/failed/'):
            _follow(int(key.rpartition('/')[2]), json.loads(value))
        if self.together:
          self.together.listen(said.get('t5lab/end/stop'))
      except jax.errors.JaxRuntimeError:
        return                            # the service is gone: JAX itself ends this process


_listener = _Listener()


def give_up(code: int, message: str) -> None:
  """Ends this process of several and has the others end with the same code, saying why.

  Without this they would wait in a step for one that is gone until its heartbeat is missed.
  """
  if count() == 1:
    return
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _store().key_value_set(f't5lab/end/failed/{index()}',
                           json.dumps({'code': code, 'message': message}))
    _leave()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def heed() -> None:
  """Where a step failed because another process left it: lets this one end with that one's reason,
  which its listener has within two looks."""
  if count() > 1:
    time.sleep(3 * POLL)


def _follow(who: int, said: dict):
  if who == index():
    return
  # while TensorFlow is imported, descriptor 2 leads nowhere (data/tasks/seqio_tf.py)
  os.write(_listener.stderr, f't5lab: process {index()} ends with process {who}: '
           f'{said["message"]}\n'.encode())
  if said['code'] == errors.WATCHDOG:            # what this one was waiting for may be the reason
    faulthandler.dump_traceback(_listener.stderr, all_threads=True)
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _leave()
  os._exit(said['code'])


def _leave():
  """Says that this process goes, and waits until all say so: 3 s at most, process 0, which is the
  service, 5. Else a closed socket would reach the others before the reason does."""
  _store().key_value_set(f't5lab/left/{index()}', '', allow_overwrite=True)
  end = time.monotonic() + (5 if is_main() else 3)
  while time.monotonic() < end:
    if len(_store().key_value_dir_get('t5lab/left/')) == count():
      time.sleep(0.2)                     # their last call has its answer
      return
    time.sleep(0.1)
