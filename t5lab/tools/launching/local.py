"""Several processes on this machine, each with its own devices: a pod for the desk.

Process 0 is shown, the others write to WORKDIR/launch/process_N.log. A signal goes to all of them.
When one dies the others have `grace` seconds, then SIGTERM, then SIGKILL.
"""

import contextlib
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
from t5lab.tools.launching.job import PORT, Job, again, worst

SAVING = 120.       # seconds that a process has after SIGTERM


def environment(index: int, *, processes: int, devices: int, device: str, port: int,
                flags: str = '', given=None) -> dict[str, str]:
  """What process `index` gets on top of this one's environment. flags: XLA_FLAGS there already."""
  result = {'TF_CPP_MIN_LOG_LEVEL': '3'}
  if processes > 1:
    result |= {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(processes),
               'JAX_PROCESS_ID': str(index)}
  if device == 'gpu':
    first = index * devices
    result |= {'JAX_PLATFORMS': 'cuda,cpu',
               'CUDA_VISIBLE_DEVICES': ','.join(map(str, range(first, first + devices)))}
  else:
    # without the last flag XLA on CPU deadlocks where two of a process's devices wait for others
    ours = (f'--xla_force_host_platform_device_count={devices}',
            '--xla_cpu_multi_thread_eigen=false')
    names = {flag.partition('=')[0] for flag in ours}
    kept = [flag for flag in flags.split() if flag.partition('=')[0] not in names]
    result |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join([*kept, *ours])}
  return result | dict(given or {})


def check(job: Job, *, processes: int, devices: int, device: str) -> None:
  if processes < 1 or devices < 1:
    raise UsageError(f'--processes {processes}, --devices-per-process {devices}: 1 or more')
  if '://' in job.workdir:
    raise UsageError(f'--workdir {job.workdir}: --platform local needs a folder of this machine')
  if device not in ('cpu', 'gpu'):
    raise UsageError(f"--device {device!r}: 'cpu' or 'gpu'")


def shell(job: Job, *, processes: int, devices: int, device: str, port: int = PORT) -> str:
  """The same as a script, for --dry-run."""
  check(job, processes=processes, devices=devices, device=device)
  lines = ['#!/bin/bash', f'# {processes} processes, {devices} {device} devices each; coordinator: '
           f'process 0, port {port}']
  for i in range(processes):
    added = environment(i, processes=processes, devices=devices, device=device, port=port,
                        given=job.environment)
    lines.append(shlex.join(['env', *(f'{k}={v}' for k, v in added.items()),
                             *job.argv(sys.executable)]) + ' &')
  return '\n'.join([*lines, 'wait']) + '\n'


def run(job: Job, *, processes: int, devices: int, device: str = 'cpu', port: int = PORT,
        all_logs: bool = False, grace: float = 30., argv: list[str] | None = None) -> int:
  """Runs job (or argv) until it ends -> its exit code, see job.worst."""
  check(job, processes=processes, devices=devices, device=device)
  argv = argv or job.argv(sys.executable)
  logs = [] if all_logs or processes == 1 else _logs(job.workdir, processes)
  with _Signals() as signals:
    for left in range(job.restarts, -1, -1):
      if processes > 1:
        check_port(port)
      environments = [
          os.environ | environment(i, processes=processes, devices=devices, device=device,
                                   port=port, flags=os.environ.get('XLA_FLAGS', ''),
                                   given=job.environment)
          for i in range(processes)]
      codes = Group(argv, environments, logs, grace).wait(signals)
      if any(codes):
        shown = ', '.join(f'{i}: {code}' for i, code in enumerate(codes))
        print(f't5lab: exit codes {shown}', file=sys.stderr, flush=True)
      code = worst(codes)
      if not left or signals.count or not again(code):
        return code
      print(f't5lab: ended with {code}, starting again, {left} times left', file=sys.stderr,
            flush=True)


def check_port(port: int) -> None:
  """UsageError if something listens there."""
  with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)   # what is only closing does not count
    try:
      s.bind(('', port))
    except OSError as e:
      raise UsageError(f'port {port}, where the processes meet, cannot be had here: {e.strerror}. '
                       'Another job on this machine? Give this one its own --port') from None


def _logs(workdir, processes: int) -> list[Path | None]:
  """The log file of each process, None for process 0, which is shown.

  If the folder cannot be created, the list is empty: all processes are shown.
  """
  folder = Path(workdir) / 'launch'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    print(f't5lab: no logs in {folder}: {e.strerror}', file=sys.stderr, flush=True)
    return []
  return [None, *(folder / f'process_{i}.log' for i in range(1, processes))]


class _Signals:
  """Counts SIGTERM and SIGINT instead of dying of them."""

  def __enter__(self):
    self.count = 0
    self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_):
    for s, handler in self._old.items():
      signal.signal(s, handler)

  def _handle(self, *_):
    self.count += 1


class Group:
  """The processes of one start, which run `argv` in one environment each.

  logs: the log file of each process, None for one that is shown; an empty list shows all.
  """

  def __init__(self, argv, environments, logs, grace: float):
    self._grace = grace
    self._files, self._processes, self._readers = [], [], []
    for i, environ in enumerate(environments):
      process = subprocess.Popen(
          argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT, start_new_session=True)     # Ctrl-C comes to us alone
      log = None
      if logs and logs[i]:
        log = open(logs[i], 'ab')
        self._files.append(log)
      reader = threading.Thread(target=self._read, args=(i, process.stdout, log), daemon=True)
      reader.start()
      self._processes.append(process)
      self._readers.append(reader)

  def wait(self, signals: _Signals | None = None, timeout: float = math.inf) -> list[int]:
    """Waits until all processes have ended, or kills them after `timeout` seconds -> exit codes."""
    passed_on, end, kill = 0, None, None
    deadline = time.monotonic() + timeout
    try:
      while any(p.poll() is None for p in self._processes) and time.monotonic() < deadline:
        if signals and signals.count > passed_on:
          passed_on = signals.count
          self._send(signal.SIGTERM)
          kill = time.monotonic() + SAVING
        codes = [p.poll() for p in self._processes]
        if end is None and any(codes):                 # neither alive nor well
          end = time.monotonic() + self._grace
        if end and time.monotonic() > end and kill is None:
          self._send(signal.SIGTERM)
          kill = time.monotonic() + min(SAVING, max(self._grace, 1.))
        if kill and time.monotonic() > kill:
          self._send(signal.SIGKILL)
        time.sleep(0.05)
    finally:
      self._send(signal.SIGKILL)
      for reader in self._readers:
        reader.join(5)
      for file in self._files:
        file.close()
    return [p.wait() for p in self._processes]

  def _send(self, number):
    for process in self._processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          if number == signal.SIGKILL:                 # and its data workers
            os.killpg(process.pid, number)
          process.send_signal(number)

  @staticmethod
  def _read(index, pipe, log):
    for line in pipe:
      if log:
        log.write(line)
        log.flush()
      else:
        text = re.sub(r'[^\n\r]*\r(?=[^\n\r])', '', line.decode(errors='replace'))
        sys.stdout.write(f'[{index}] {text}')
        sys.stdout.flush()
