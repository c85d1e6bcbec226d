"""Runs of t5lab as processes that can be killed, stopped and compared bit for bit.

The reference run R is configs/quickstart.py:tiny with dropout, for 30 steps, with a checkpoint
every 6 steps and evaluations at 12, 24 and 30. A run survives a fault if it ends exactly as R did.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from t5lab import trees
from t5lab.runs.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = f'{ROOT}/configs/quickstart.py:tiny'
EVERY, STEPS = 6, 30
R = {'total_steps': STEPS, 'checkpoint.every': EVERY, 'log.every': 1, 'checkpoint.keep': 20,
     'eval.every': 12, 'model.dropout': 0.1}


def environment(devices: int = 1, **more) -> dict:
  """The environment of a run with `devices` virtual CPU devices."""
  # One device computes with Eigen's threads; several would wait for each other (tests/conftest.py).
  flags = (f'--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false'
           if devices > 1 else '')
  env = {k: v for k, v in os.environ.items() if not k.startswith(('T5LAB_', 'PYTEST_', 'JAX_'))}
  return {**env, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'TF_CPP_MIN_LOG_LEVEL': '3',
          'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1',
          'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2', **more}


def train_command(workdir, overrides=R, *more, config: str = QUICKSTART) -> list[str]:
  return ['train', '--config', config, '--workdir', str(workdir),
          *(f'--config.{k}={v}' for k, v in overrides.items()), *more]


class Process:
  """`python -m t5lab <argv>` in a process group of its own, with its output in the file `log`.

  As a context manager it leaves no process behind.
  """

  def __init__(self, argv, log: Path, *, devices: int = 1, program=('-m', 't5lab'), cwd=None,
               before=None, **env):
    self.log = Path(log)
    with open(self.log, 'w') as f:
      self._popen = subprocess.Popen(
          [sys.executable, *program, *map(str, argv)], env=environment(devices, **env), stdout=f,
          stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd or ROOT, preexec_fn=before)
    self.pid, self.started = self._popen.pid, time.monotonic()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)      # its data workers too, if it left any
    self._popen.wait()

  def send(self, number) -> float:
    self._popen.send_signal(number)
    return time.monotonic()

  def output(self) -> str:
    return self.log.read_text(errors='replace')

  def code(self) -> int | None:
    return self._popen.poll()

  def wait(self, timeout: float = 240) -> int:
    """Waits for the end and returns the exit code."""
    return self._popen.wait(timeout)

  def wait_for(self, happened, timeout: float = 180, poll: float = 0.003):
    """Waits until `happened()` is true and returns its value; fails if the process ends before."""
    end = time.monotonic() + timeout
    while not (value := happened()):
      assert self.code() is None, f'ended early ({self.code()}):\n{self.output()[-2000:]}'
      assert time.monotonic() < end, f'not within {timeout} s:\n{self.output()[-2000:]}'
      time.sleep(poll)
    return value


def train(workdir, overrides=R, *more, code: int = 0, config: str = QUICKSTART, **kwargs) -> str:
  """Runs to the end, checks the exit code and returns the output."""
  log = Path(f'{workdir}.log')
  with Process(train_command(workdir, overrides, *more, config=config), log, **kwargs) as p:
    got = p.wait()
  assert got == code, f'exit code {got}, expected {code}:\n{p.output()[-3000:]}'
  assert code == 0 or 'Traceback' not in p.output(), p.output()
  return p.output()


# --- files of a run ----------------------------------------------------------------------------


def entries(workdir) -> list[dict]:
  """metrics.jsonl without its timing; a line that is still being written is left out."""
  try:
    lines = (Path(workdir) / 'metrics.jsonl').read_bytes().split(b'\n')[:-1]
  except FileNotFoundError:
    return []
  return [{k: v for k, v in json.loads(line).items() if k != 'timing'} for line in lines]


def last_step(workdir) -> int:
  """The newest step in metrics.jsonl, 0 if there is none."""
  return max((entry['step'] for entry in entries(workdir) if 'loss' in entry), default=0)


def losses(workdir) -> list[tuple[int, str]]:
  """(step, loss as float.hex) of each training entry, in the order of the file."""
  return [(entry['step'], entry['loss'].hex()) for entry in entries(workdir) if 'loss' in entry]


def unfinished_saves(workdir, step: int | None = None) -> list[str]:
  """The names of the .tmp- directories (of a step)."""
  start = f'step_{step:08d}' if step is not None else 'step_'
  try:
    names = os.listdir(Path(workdir) / 'checkpoints')
  except FileNotFoundError:
    return []
  return [n for n in names if n.startswith(start) and '.tmp-' in n and 'pruned' not in n]


def committed(workdir) -> list[int]:
  """The committed steps; each must verify to the last bit."""
  checkpoints = Checkpoints(Path(workdir) / 'checkpoints', log=lambda _: None)
  for step in checkpoints.steps():
    checkpoints.verify(step)
  return checkpoints.steps()


def arrays(workdir, step: int) -> dict[str, np.ndarray]:
  """{path: array} of a checkpoint: parameters, optimizer state, average, step."""
  checkpoints = Checkpoints(Path(workdir) / 'checkpoints')
  abstract = {path: jax.ShapeDtypeStruct(shape, dtype)
              for path, (shape, dtype) in checkpoints.manifest(step).leaves.items()}
  return trees.flatten(checkpoints.restore(trees.unflatten(abstract), step)[0])


def digests(workdir, step: int = STEPS) -> dict[str, str]:
  """{path: SHA-256 of the array's type, shape and bytes}."""
  return {path: hashlib.sha256(f'{x.dtype} {x.shape} '.encode() + x.tobytes()).hexdigest()
          for path, x in arrays(workdir, step).items()}


def resumed_from(output: str) -> int:
  """The step that a run printed it resumes from, 0 if it started from the beginning."""
  _, separator, rest = output.partition('resuming from step ')
  return int(rest.split()[0]) if separator else 0


def has_made_a_step(output: str) -> bool:
  """True once a run has printed its first step. (Its entries may be those of the run before.)"""
  return re.search(r'^step \d+/\d+ ', output, re.M) is not None


def assert_equal(workdir, reference, steps: int = STEPS) -> None:
  """Checks that a run ended as the reference did, bit for bit, and left nothing unfinished."""
  assert losses(workdir) == losses(reference)
  assert [step for step, _ in losses(workdir)] == list(range(1, steps + 1))   # each once, in order
  assert entries(workdir) == entries(reference)                               # evaluations too
  ours, theirs = digests(workdir, steps), digests(reference, steps)
  assert ours == theirs and any(path.startswith('ema/') for path in ours)
  assert not unfinished_saves(workdir) and committed(workdir)[-1] == steps


def shared(base: Path, name: str, make) -> Path:
  """base/name, made by make(path) in the first of several test processes that asks for it."""
  base.mkdir(parents=True, exist_ok=True)
  with open(base / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (base / f'{name}.made').exists():
      make(base / name)
      (base / f'{name}.made').touch()
  return base / name


# --- several processes of one run --------------------------------------------------------------


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def train_together(count: int, workdir, log, overrides=R, *, heartbeat: int = 10, last=None,
                   before_last=None, **options):
  """Starts `count` processes that train as one run; their outputs are in <log>0, <log>1, …

  last: overrides of the last process only; before_last: called in it before it starts.
  """
  address = f'localhost:{free_port()}'
  with contextlib.ExitStack() as stack:
    started = []
    for i in range(count):
      is_last = i == count - 1
      started.append(stack.enter_context(Process(
          train_command(workdir, overrides | (last or {}) if is_last else overrides), f'{log}{i}',
          JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(i),
          T5LAB_HEARTBEAT=str(heartbeat), before=before_last if is_last else None, **options)))
    yield started
