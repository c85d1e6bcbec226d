"""Runs of t5lab as processes that can be killed, stopped and compared bit for bit.

The reference R: configs/quickstart.py:tiny with dropout, 30 steps, a checkpoint each 6, evaluated
at 12, 24 and 30. A fault is survived if a run that had it ends as R did.
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
  """The environment of a run with so many virtual CPU devices."""
  # one device computes with Eigen's threads, several would wait for each other (tests/conftest.py)
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
  """`python -m t5lab.cli <argv>` in a group of its own, its output in a file beside the workdir.

  As a context manager nothing of it is left behind.
  """

  def __init__(self, argv, said: Path, *, devices: int = 1, program=('-m', 't5lab'), cwd=None,
               before=None, **env):
    self.said = Path(said)
    with open(self.said, 'w') as f:
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
    return self.said.read_text(errors='replace')

  def code(self) -> int | None:
    return self._popen.poll()

  def wait(self, timeout: float = 240) -> int:
    """The exit code."""
    return self._popen.wait(timeout)

  def until(self, happened, timeout: float = 180, poll: float = 0.003):
    """Waits for `happened()` to be true -> what it gave; fails if the process ends before."""
    end = time.monotonic() + timeout
    while not (found := happened()):
      assert self.code() is None, f'ended with {self.code()} too early:\n{self.output()[-2000:]}'
      assert time.monotonic() < end, f'not within {timeout} s:\n{self.output()[-2000:]}'
      time.sleep(poll)
    return found


def train(workdir, overrides=R, *more, code: int = 0, config: str = QUICKSTART, **kwargs) -> str:
  """A run to its end, which must have this exit code -> what it said."""
  said = Path(f'{workdir}.said')
  with Process(train_command(workdir, overrides, *more, config=config), said, **kwargs) as p:
    got = p.wait()
  assert got == code, f'exit code {got}, not {code}:\n{p.output()[-3000:]}'
  assert code == 0 or 'Traceback' not in p.output(), p.output()
  return p.output()


# -- what a run left ----------------------------------------------------------------------------


def rows(workdir) -> list[dict]:
  """metrics.jsonl without what the clock decides; a line that is being written is left out."""
  try:
    lines = (Path(workdir) / 'metrics.jsonl').read_bytes().split(b'\n')[:-1]
  except FileNotFoundError:
    return []
  return [{k: v for k, v in json.loads(line).items() if k != 'timing'} for line in lines]


def last_row(workdir) -> int:
  """The newest step of metrics.jsonl, 0 if there is none."""
  return max((row['step'] for row in rows(workdir) if 'loss' in row), default=0)


def losses(workdir) -> list[tuple[int, str]]:
  """(step, loss as float.hex) of each training row, in the order of the file."""
  return [(row['step'], row['loss'].hex()) for row in rows(workdir) if 'loss' in row]


def saves(workdir, step: int | None = None) -> list[str]:
  """Saves in progress: the names of the .tmp- directories (of a step)."""
  start = f'step_{step:08d}' if step is not None else 'step_'
  try:
    names = os.listdir(Path(workdir) / 'checkpoints')
  except FileNotFoundError:
    return []
  return [n for n in names if n.startswith(start) and '.tmp-' in n and 'pruned' not in n]


def committed(workdir) -> list[int]:
  """The steps that exist, each of which must verify to the last bit."""
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
  """The step that a run said it went on from, 0 if it began anew."""
  _, found, rest = output.partition('resuming from step ')
  return int(rest.split()[0]) if found else 0


def made_a_step(output: str) -> bool:
  """Whether a run has said its first step. (Its rows may be those of the life before.)"""
  return re.search(r'^step \d+/\d+ ', output, re.M) is not None


def assert_equal(workdir, reference, steps: int = STEPS) -> None:
  """The run in workdir ended as the reference did, bit for bit, and left nothing half-done."""
  assert losses(workdir) == losses(reference)
  assert [step for step, _ in losses(workdir)] == list(range(1, steps + 1))   # each once, in order
  assert rows(workdir) == rows(reference)                                     # evaluations too
  ours, theirs = digests(workdir, steps), digests(reference, steps)
  assert ours == theirs and any(path.startswith('ema/') for path in ours)
  assert not saves(workdir) and committed(workdir)[-1] == steps


def shared(base: Path, name: str, make) -> Path:
  """base/name, made once by make(path) whoever of several test processes comes first."""
  base.mkdir(parents=True, exist_ok=True)
  with open(base / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (base / f'{name}.made').exists():
      make(base / name)
      (base / f'{name}.made').touch()
  return base / name


# -- several that are one run ---------------------------------------------------------------------


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def together(count: int, workdir, said, overrides=R, *, heartbeat: int = 10, last=None,
             before_last=None, **options):
  """So many processes that train as one run; their outputs are in <said>0, <said>1, …

  last: what the last one is told otherwise; before_last: called in it before it starts.
  """
  address = f'localhost:{free_port()}'
  with contextlib.ExitStack() as stack:
    started = []
    for i in range(count):
      odd = i == count - 1
      started.append(stack.enter_context(Process(
          train_command(workdir, overrides | (last or {}) if odd else overrides), f'{said}{i}',
          JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(i),
          T5LAB_HEARTBEAT=str(heartbeat), before=before_last if odd else None, **options)))
    yield started
