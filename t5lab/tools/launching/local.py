"""Several processes on this machine, each with its own devices: a pod on a desk.

The output of process 0 is printed; the others write to WORKDIR/launch/process_N.log. A signal is
passed on to all of them. If one fails, the others get `grace` seconds, then SIGTERM, then SIGKILL.
"""

from collections.abc import Sequence
import contextlib
import errno
import math
import os
from pathlib import Path
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

from t5lab.errors import UsageError
from t5lab.tools.launching.job import PORT, LaunchJob, can_retry, worst

SAVING = 120.       # seconds that a process has to save a checkpoint after SIGTERM


def environment(index: int, *, processes: int, devices: int, device: str, port: int,
                flags: str = '', given=None) -> dict[str, str]:
  """The variables that process `index` gets in addition to the caller's environment.

  flags: the caller's XLA_FLAGS. given: variables that take precedence.
  """
  result = {'TF_CPP_MIN_LOG_LEVEL': '3'}
  if processes > 1:
    result |= {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(processes),
               'JAX_PROCESS_ID': str(index)}
  if device == 'gpu':
    first = index * devices
    result |= {'JAX_PLATFORMS': 'cuda,cpu',
               'CUDA_VISIBLE_DEVICES': ','.join(map(str, range(first, first + devices)))}
  else:
    # without the second flag XLA on CPU deadlocks if two devices of a process wait for others
    own = (f'--xla_force_host_platform_device_count={devices}',
           '--xla_cpu_multi_thread_eigen=false')
    names = {flag.partition('=')[0] for flag in own}
    others = [flag for flag in flags.split() if flag.partition('=')[0] not in names]
    result |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join([*others, *own])}
  return result | dict(given or {})


def _environments(job: LaunchJob, *, processes: int, devices: int, **options) -> list[dict]:
  """The variables of all processes. UsageError for a job that cannot run on this machine."""
  if processes < 1 or devices < 1:
    raise UsageError('--processes and --devices-per-process must be 1 or more, got '
                     f'{processes} and {devices}')
  if '://' in job.workdir:
    raise UsageError('--workdir must be a folder on this machine for --platform local, got '
                     f'{job.workdir}')
  return [environment(i, processes=processes, devices=devices, given=job.environment, **options)
          for i in range(processes)]


def shell(job: LaunchJob, *, processes: int, devices: int, device: str, port: int) -> str:
  """The same as `run`, as a script for --dry-run."""
  lines = ['#!/bin/bash',
           f'# {processes} processes with {devices} {device} devices each; the coordinator is '
           f'process 0, port {port}']
  for variables in _environments(job, processes=processes, devices=devices, device=device,
                                 port=port):
    lines.append(shlex.join(['env', *(f'{k}={v}' for k, v in variables.items()),
                             *job.argv(sys.executable)]) + ' &')
  return '\n'.join([*lines, 'wait']) + '\n'


def run(job: LaunchJob, *, processes: int, devices: int, device: str = 'cpu', port: int = PORT,
        all_logs: bool = False, grace: float = 30., argv: list[str] | None = None) -> int:
  """Runs the job (or argv) to its end, with restarts -> its exit code, by job.worst."""
  environments = [os.environ | own for own in _environments(
      job, processes=processes, devices=devices, device=device, port=port,
      flags=os.environ.get('XLA_FLAGS', ''))]
  argv = argv or job.argv(sys.executable)
  logs = _log_files(job.workdir, processes) if processes > 1 and not all_logs else []
  with _caught_signals() as signals:
    for restarts_left in range(job.restarts, -1, -1):
      if processes > 1:
        check_port(port)
      codes = Group(argv, environments, logs, grace).wait(signals)
      if any(codes):
        shown = ', '.join(f'{i}: {code}' for i, code in enumerate(codes))
        print(f't5lab: exit codes {shown}', file=sys.stderr, flush=True)
      code = worst(codes)
      if not restarts_left or signals or not can_retry(code):
        return code
      print(f't5lab: ended with {code}, starting again ({restarts_left} restarts left)',
            file=sys.stderr, flush=True)


def check_port(port: int) -> None:
  """Raises UsageError if another program listens on the port."""
  with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)   # ignores connections being closed
    try:
      s.bind(('', port))
    except OSError as e:
      problem = f'cannot be used: {e.strerror}'
      if e.errno == errno.EADDRINUSE:
        problem = 'is already in use, perhaps by another job on this machine'
      raise UsageError(f'coordinator port {port} {problem}; choose another --port') from None


def _log_files(workdir, processes: int) -> list[Path | None]:
  """The log file of each process, None for process 0, which is printed.

  If the folder cannot be created, the list is empty: all processes are printed.
  """
  folder = Path(workdir) / 'launch'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    print(f't5lab: cannot write logs to {folder}: {e.strerror}', file=sys.stderr, flush=True)
    return []
  return [None, *(folder / f'process_{i}.log' for i in range(1, processes))]


@contextlib.contextmanager
def _caught_signals():
  """Yields a list to which SIGTERM and SIGINT are added, which then do not end this process."""
  caught = []
  handlers = {s: signal.signal(s, lambda number, _: caught.append(number))
              for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield caught
  finally:
    for s, handler in handlers.items():
      signal.signal(s, handler)


class Group:
  """Processes that all run `argv`, each in an environment of its own.

  logs: the log file of each process, None for one that is printed; an empty list prints all.
  """

  def __init__(self, argv, environments, logs, grace: float):
    self._grace = grace
    self._processes, self._readers = [], []
    for i, environ in enumerate(environments):
      log = open(logs[i], 'ab') if logs and logs[i] else None
      with log or contextlib.nullcontext():
        process = subprocess.Popen(
            argv, env=environ, stdin=subprocess.DEVNULL, stdout=log or subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True)   # Ctrl-C reaches this process alone
      self._processes.append(process)
      if not log:
        reader = threading.Thread(target=_print_lines, args=(i, process.stdout), daemon=True)
        reader.start()
        self._readers.append(reader)

  def wait(self, signals: Sequence[int] = (), timeout: float = math.inf) -> list[int]:
    """Waits until all processes have ended, or kills them after `timeout` seconds -> exit codes."""
    signals_sent, term_at, kill_at = 0, None, None
    deadline = time.monotonic() + timeout
    try:
      while any(p.poll() is None for p in self._processes) and time.monotonic() < deadline:
        # A signal is passed on at once.
        if len(signals) > signals_sent:
          signals_sent = len(signals)
          self._send(signal.SIGTERM)
          kill_at = time.monotonic() + SAVING
        # If a process has failed, the others are ended after the grace period.
        if term_at is None and any(p.poll() for p in self._processes):
          term_at = time.monotonic() + self._grace
        if term_at and time.monotonic() > term_at and kill_at is None:
          self._send(signal.SIGTERM)
          kill_at = time.monotonic() + min(SAVING, max(self._grace, 1.))
        if kill_at and time.monotonic() > kill_at:
          self._send(signal.SIGKILL)
        time.sleep(0.05)
    finally:
      self._send(signal.SIGKILL)
      for reader in self._readers:
        reader.join(5)
    return [p.wait() for p in self._processes]

  def _send(self, number):
    for process in self._processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          if number == signal.SIGKILL:                 # also to its data workers
            os.killpg(process.pid, number)
          process.send_signal(number)


def _print_lines(index, pipe):
  for line in pipe:
    # of a progress line that was redrawn only the last state
    text = re.sub(r'[^\n\r]*\r(?=[^\n\r])', '', line.decode(errors='replace'))
    sys.stdout.write(f'[{index}] {text}')
    sys.stdout.flush()
