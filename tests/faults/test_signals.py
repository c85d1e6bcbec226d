"""SIGTERM and SIGINT in every phase of a run, once (F9) and twice (F10)."""

from pathlib import Path
import signal
import time

import processes
from processes import Process, train_command
import pytest

AT_PHASE = (str(Path(__file__).with_name('at_phase.py')),)
# Enough examples and tokens that decoding takes longer than a signal needs to arrive.
LONG = {**processes.R, 'eval.examples': 0, 'eval.max_length': 32}


def at_phase(point, name, workdir, tmp_path, overrides=processes.R, **env):
  """A run that sends itself a signal when it enters a phase."""
  return Process([point, name, *train_command(workdir, overrides)], tmp_path / f'{point}.log',
                 program=AT_PHASE, T5LAB_PHASE_FILE=str(tmp_path / 'moment'), **env)


def moment(tmp_path) -> float | None:
  try:
    return float((tmp_path / 'moment').read_text())
  except (FileNotFoundError, ValueError):
    return None


def preempted(p, sent: float, record) -> str:
  """Waits for exit code 75 within 10 s of `sent` and returns the last line of output."""
  code = p.wait(120)
  seconds = time.monotonic() - sent
  assert code == 75, p.output()
  assert seconds <= 10, f'exit {seconds:.1f} s after the signal'
  last = p.output().splitlines()[-1]
  assert last.startswith('t5lab: SIGTERM') and 'run the same command to resume' in last
  assert 'Traceback' not in p.output()
  record('exit_seconds', round(seconds, 1))
  return last


def check_resume(workdir, reference, step: int, record) -> None:
  """Checks that every logged step is saved, and that the resumed run equals R."""
  assert not processes.unfinished_saves(workdir)
  reached, newest = processes.last_step(workdir), processes.committed(workdir)[-1:]
  record('steps_lost', reached - (newest[0] if newest else 0))
  assert newest == [reached] and reached >= step
  output = processes.train(workdir)
  assert processes.resumed_from(output) == reached
  processes.assert_equal(workdir, reference)


def test_sigterm_while_it_compiles(reference, tmp_path, record):
  """F9. With an empty cache: the first step is being compiled; it is then run and saved."""
  workdir, cache = tmp_path / 'run', tmp_path / 'cache'
  cache.mkdir(mode=0o700)
  with Process(train_command(workdir), tmp_path / 'log',
               JAX_COMPILATION_CACHE_DIR=str(cache)) as p:
    p.wait_for(lambda: 'ha_ende: ' in p.output())
    time.sleep(0.3)
    assert not processes.entries(workdir)
    p.send(signal.SIGTERM)
    p.wait_for(lambda: processes.entries(workdir), poll=0.01)
    preempted(p, time.monotonic(), record)     # 10 s from the end of the first step
  assert processes.last_step(workdir) == 1
  check_resume(workdir, reference, 1, record)


def test_sigterm_between_steps(reference, tmp_path, record):
  """F9. The current step ends and is saved."""
  workdir = tmp_path / 'run'
  with Process(train_command(workdir), tmp_path / 'log') as p:
    p.wait_for(lambda: processes.last_step(workdir) >= 8)
    preempted(p, p.send(signal.SIGTERM), record)
  assert processes.last_step(workdir) < 12
  check_resume(workdir, reference, 8, record)


@pytest.mark.parametrize('point, step', [
    ('eval@1', 12),          # the loss of the first evaluation, at step 12
    ('decode@1', 12),        # its translations, by the raw weights
    ('decode@2', 12),        # and by the average
    ('save@2', 12),          # the thread hashes what it wrote of step 12
])
def test_sigterm_in(reference, tmp_path, record, point, step):
  """F9. An evaluation is abandoned and repeated by the next run; a save is finished."""
  workdir = tmp_path / 'run'
  with at_phase(point, 'SIGTERM', workdir, tmp_path) as p:
    p.wait_for(lambda: moment(tmp_path) is not None)
    preempted(p, moment(tmp_path), record)
  if not point.startswith('save'):
    assert 'during evaluation' in p.output()
    assert not [row for row in processes.entries(workdir) if 'eval' in row]
    assert processes.last_step(workdir) == step
  check_resume(workdir, reference, step, record)


def test_sigterm_while_it_restores(reference, tmp_path, record):
  """F9. While it reads step 6: nothing is lost, no step is run."""
  workdir = tmp_path / 'run'
  with Process(train_command(workdir), tmp_path / 'first') as p:
    p.wait_for(lambda: processes.last_step(workdir) >= 7 and processes.committed(workdir) == [6])
    p.send(signal.SIGKILL)
    p.wait()
  with at_phase('restore@2', 'SIGTERM', workdir, tmp_path) as p:
    p.wait_for(lambda: moment(tmp_path) is not None)
    preempted(p, moment(tmp_path), record)
  assert processes.last_step(workdir) == 6
  check_resume(workdir, reference, 6, record)


# --- twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize('first, second', [
    (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_twice_while_it_compiles(tmp_path, first, second, record):
  """F10. XLA does not run Python's handlers; the second signal still ends the process."""
  cache = tmp_path / 'cache'
  cache.mkdir(mode=0o700)
  with Process(train_command(tmp_path / 'run'), tmp_path / 'log',
               JAX_COMPILATION_CACHE_DIR=str(cache)) as p:
    p.wait_for(lambda: 'ha_ende: ' in p.output())
    time.sleep(0.3)
    p.send(first)
    time.sleep(0.2)
    assert p.code() is None, p.output()
    sent = p.send(second)
    assert p.wait(30) == 75
    seconds = time.monotonic() - sent
  record('second_signal_seconds', round(seconds, 2))
  assert seconds <= 2
  assert processes.committed(tmp_path / 'run') == []


@pytest.mark.parametrize('point, steps', [('save@2', [6]), ('decode@1', [6, 12])])
def test_twice_in(reference, tmp_path, point, steps, record):
  """F10. In a save, which is abandoned, and in an evaluation; committed steps stay whole."""
  workdir = tmp_path / 'run'
  overrides = LONG if point.startswith('decode') else processes.R
  with at_phase(point, '0', workdir, tmp_path, overrides) as p:
    p.wait_for(lambda: moment(tmp_path) is not None, poll=0.0005)
    p.send(signal.SIGTERM)
    time.sleep(0.001)
    sent = p.send(signal.SIGINT)
    assert p.wait(30) == 75
    seconds = time.monotonic() - sent
  record('second_signal_seconds', round(seconds, 2))
  assert seconds <= 2
  committed = processes.committed(workdir)
  assert committed in (steps, [6, 12])     # [6, 12]: the save ended between the two signals
  output = processes.train(workdir)
  assert processes.resumed_from(output) == committed[-1]
  processes.assert_equal(workdir, reference)
