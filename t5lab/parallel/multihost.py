"""Several processes as one run: they join, agree through the coordination service, stop together.

The same command runs on every host. If JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID are set, or JAX recognizes the cluster (Cloud TPU, GKE, SLURM), `initialize` joins
the processes. Otherwise a process is a run of its own, and everything here costs nothing.

What processes tell each other before, between and after steps goes through the key-value store of
the coordination service, not through devices: the store has timeouts, its errors name the process
that is late, and it cannot get in the way of a collective of a train step.
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
from t5lab.errors import Failure, UsageError, first_line
from t5lab.parallel import rendezvous

PORT = 8476                    # of the coordinator, on all platforms
SECONDS = 300.                 # the default timeout for other processes
POLL = 0.5                     # seconds between looks at the store
_calls = itertools.count()     # every process makes the same calls in the same order


def initialize(seconds: float = SECONDS) -> None:
  """Joins the processes of this run. Call it before JAX touches a device; a repeated call is free.

  T5LAB_HEARTBEAT: seconds without a sign of life after which a process counts as dead and the
  others end (default 100). UsageError if the coordinator cannot be reached.
  """
  if _store():
    return
  address = rendezvous.find_address(seconds)
  if address.count == 1:
    return
  try:
    heartbeat = int(os.environ.get('T5LAB_HEARTBEAT', 100))
  except ValueError as e:
    raise UsageError(f'T5LAB_HEARTBEAT: {e}') from None
  try:
    jax.distributed.initialize(address.coordinator, address.count, address.index,
                               heartbeat_timeout_seconds=heartbeat,
                               initialization_timeout=int(seconds))
  except (ValueError, RuntimeError) as e:
    raise UsageError(f'cannot join the run at coordinator {address.coordinator} as process '
                     f'{address.index} of {address.count}: {first_line(e)}; run `t5lab doctor` on '
                     'all hosts') from e
  _listener.start()
  atexit.register(_listener.stop)


def index() -> int:
  return distributed.global_state.process_id if _store() else 0


def count() -> int:
  return distributed.global_state.num_processes if _store() else 1


def is_main() -> bool:
  """Returns True in process 0, which alone writes the files of the run."""
  return index() == 0


def _store():
  return distributed.global_state.client


# --- agreement ---------------------------------------------------------------------------------


def broadcast(decide: Callable):
  """Runs `decide` on process 0 and returns its value, which is JSON, in every process.

  A Failure of `decide` is raised in every process.
  """
  if count() == 1:
    return decide()
  key = f't5lab/broadcast/{next(_calls)}'
  if not is_main():
    message = json.loads(_get(key, SECONDS, 'process 0'))
    if 'error' in message:
      raise getattr(errors, message['error'])(message['message'])
    return message['value']
  try:
    value = decide()
  except Failure as e:
    # its own class, or the nearest base class that the other processes know too
    kind = next(k.__name__ for k in type(e).__mro__ if k.__module__ == errors.__name__)
    _store().key_value_set(key, json.dumps({'error': kind, 'message': str(e)}))
    raise
  _store().key_value_set(key, json.dumps({'value': value}))
  return value


def gather(value, seconds: float = SECONDS) -> list:
  """The values (JSON) of all processes, in their order, in every process.

  Failure names the processes that did not send theirs in time.
  """
  if count() == 1:
    return [value]
  key = f't5lab/gather/{next(_calls)}'
  _store().key_value_set(f'{key}/{index()}', json.dumps(value))
  end, values, late = time.monotonic() + seconds, [], []
  for i in range(count()):
    try:
      remaining = max(end - time.monotonic(), 0.1)
      values.append(json.loads(_get(f'{key}/{i}', remaining, f'process {i}')))
    except Failure:
      late.append(i)
  if late:
    raise Failure(f'no message from process {", ".join(map(str, late))} of {count()} within '
                  f'{seconds:g} s; see their output, or run `t5lab doctor` on all hosts')
  return values


def barrier(name: str, seconds: float = SECONDS) -> None:
  """Waits until all processes have arrived. Failure names those that are late. Safe in a thread."""
  if count() == 1:
    return
  try:
    _store().wait_at_barrier(f't5lab/{name}', int(seconds * 1000))
  except jax.errors.JaxRuntimeError as e:
    late = sorted(set(re.findall(r'task:(\d+)', str(e))), key=int)
    raise Failure(f'{name}: process {", ".join(late) or "?"} of {count()} did not arrive within '
                  f'{seconds:g} s') from e


def _get(key: str, seconds: float, sender: str) -> str:
  try:
    return _store().blocking_key_value_get(key, int(seconds * 1000))
  except jax.errors.JaxRuntimeError as e:
    raise Failure(f'no message from {sender} of {count()} within {seconds:g} s: '
                  f'{first_line(e)}') from e


def fetch(x) -> np.ndarray:
  """A global array as numpy, in every process."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


# --- stopping together -------------------------------------------------------------------------


class CoordinatedStop:
  """Lets a signal to one process stop all of them after the same step.

    with CoordinatedStop(signals) as stop:
      …                                  # every process calls check() at the same points
      if reason := stop.check(): save, then raise Preempted

  check() returns '' or, in every process at the same call of check, the reason to stop. To agree on
  that call, a thread in each process publishes how often its process has called check, with further
  calls held meanwhile; all stop at the call after the largest count. Neither devices nor the main
  thread take part, so this also works while processes compile or wait for each other in a step.

  signals: has `requested`, '' or the name of a signal (runs/signals.py).
  """

  def __init__(self, signals):
    self._signals = signals
    self._lock = threading.Lock()
    self._checks = 0                        # calls of check() so far
    self._stop_at, self._reason = None, ''  # the call of check() at which all stop
    self._announced = False

  def __enter__(self):
    _listener.stop_request = self
    return self

  def __exit__(self, *_):
    _listener.stop_request = None

  def check(self) -> str:
    if count() == 1:
      return self._signals.requested
    with self._lock:
      self._checks += 1
      reached = self._stop_at is not None and self._checks >= self._stop_at
      return self._reason if reached else ''

  def poll(self, reason: str | None) -> None:
    """Called by the listener's thread. reason: of a process that was asked to stop, or None."""
    if self._signals.requested and not self._announced:
      self._announced = True
      _store().key_value_set('t5lab/end/stop', self._signals.requested, allow_overwrite=True)
    if reason and self._stop_at is None:
      self._agree(reason)

  def _agree(self, reason: str) -> None:
    try:
      with self._lock:
        _store().key_value_set(f't5lab/stop/{index()}', str(self._checks))
        _store().wait_at_barrier('t5lab/stop', 30_000)
        checks = [int(_store().blocking_key_value_get(f't5lab/stop/{i}', 10_000))
                  for i in range(count())]
        self._stop_at, self._reason = max(checks) + 1, reason
    except jax.errors.JaxRuntimeError as e:
      print(f't5lab: the processes cannot agree on a step to stop at: {first_line(e)}',
            file=sys.stderr, flush=True)


class _Listener:
  """A thread that looks every POLL seconds whether a process wants to stop or has failed."""

  def __init__(self):
    self.stop_request: CoordinatedStop | None = None
    self.stderr = 2
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
        entries = dict(_store().key_value_dir_get('t5lab/end/'))
        for key, value in entries.items():
          if key.startswith('t5lab/end/failed/'):
            _end_with(int(key.rpartition('/')[2]), json.loads(value))
        if self.stop_request:
          self.stop_request.poll(entries.get('t5lab/end/stop'))
      except jax.errors.JaxRuntimeError:
        return                            # the service is gone: JAX itself ends this process


_listener = _Listener()


# --- failing together --------------------------------------------------------------------------


def abort_all(code: int, message: str) -> None:
  """Ends all processes with `code`, the others with `message`; nothing in a run of one process.

  Without it the others would wait inside a step until the heartbeat of this process is missed.
  """
  if count() == 1:
    return
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _store().key_value_set(f't5lab/end/failed/{index()}',
                           json.dumps({'code': code, 'message': message}))
  _exit(code)


def await_abort() -> None:
  """Gives the listener time to end this process because another process failed: call it when a step
  failed, perhaps for that reason, which is in the store within two looks."""
  if count() > 1:
    time.sleep(3 * POLL)


def _end_with(failed: int, cause: dict) -> None:
  """Ends this process because process `failed` called abort_all."""
  if failed == index():
    return
  # while TensorFlow is imported, descriptor 2 leads nowhere (data/tasks/seqio_tf.py)
  os.write(_listener.stderr, f't5lab: process {index()} ended because process {failed} failed: '
           f'{cause["message"]}\n'.encode())
  if cause['code'] == errors.WATCHDOG:           # this process may be why the other one waited
    faulthandler.dump_traceback(_listener.stderr, all_threads=True)
  _exit(cause['code'])


def _exit(code: int) -> None:
  """Announces that this process ends, and waits until all have: 3 s at most, or 5 in process 0,
  which hosts the service. Otherwise a closed socket would reach the others before the reason."""
  sys.stdout.flush()
  sys.stderr.flush()
  end = time.monotonic() + (5 if is_main() else 3)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _store().key_value_set(f't5lab/left/{index()}', '', allow_overwrite=True)
    while time.monotonic() < end:
      if len(_store().key_value_dir_get('t5lab/left/')) == count():
        time.sleep(0.2)                   # the other processes get the answer to their last call
        break
      time.sleep(0.1)
  os._exit(code)
