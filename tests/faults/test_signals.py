"""SIGTERM and SIGINT in every phase of a run, once (F9) and twice (F10)."""

from pathlib import Path
import signal
import time

import processes
from processes import Process, train_command
import pytest

AT_PHASE = (str(Path(__file__).with_name('at_phase.py')),)
# number of tokens and examples: so that decoding takes longer than a signal needs to arrive
LONG = {**processes.R, 'eval.examples': 0, 'eval.max_length': 32}


def at_phase(point, name, workdir, tmp_path, overrides=processes.R, **env):
  """A run that sends itself a signal when it enters a phase."""
  return Process([point, name, *train_command(workdir, overrides)], tmp_path / f'{point}.said',
                 program=AT_PHASE, T5LAB_PHASE_FILE=str(tmp_path / 'moment'), **env)


def moment(tmp_path) -> float | None:
  try:
    return float((tmp_path / 'moment').read_text())
  except (FileNotFoundError, ValueError):
    return None


def preempted(p, sent: float, reached, record) -> str:
  """Waits for exit code 75 within 10 s of `sent` -> what the run said.

  reached: () -> the step that had to be saved, of which none may be lost.
  """
  code = p.wait(120)
  seconds = time.monotonic() - sent
  assert code == 75, p.output()
  assert seconds <= 10, f'exit {seconds:.1f} s after the signal'
  last = p.output().splitlines()[-1]
  assert last.startswith('t5lab: SIGTERM') and 'the same command goes on' in last
  assert 'Traceback' not in p.output()
  record('exit_seconds', round(seconds, 1))
  return last


def goes_on(workdir, reference, step: int, record) -> None:
  """Every step that had its row is saved, and the resumed run is R."""
  assert not processes.saves(workdir)
  reached, kept = processes.last_row(workdir), processes.committed(workdir)[-1:]
  record('steps_lost', reached - (kept[0] if kept else 0))
  assert kept == [reached] and reached >= step
  output = processes.train(workdir)
  assert processes.resumed_from(output) == reached
  processes.assert_equal(workdir, reference)


def test_sigterm_while_it_compiles(reference, tmp_path, record):
  """F9. Nothing in the cache: the first step is compiled when the signal comes, then kept."""
  workdir, cache = tmp_path / 'run', tmp_path / 'cache'
  cache.mkdir(mode=0o700)
  with Process(train_command(workdir), tmp_path / 'said',
               JAX_COMPILATION_CACHE_DIR=str(cache)) as p:
    p.until(lambda: 'ha_ende: ' in p.output())
    time.sleep(0.3)
    assert not processes.rows(workdir)
    p.send(signal.SIGTERM)
    p.until(lambda: processes.rows(workdir), poll=0.01)
    preempted(p, time.monotonic(), 1, record)     # 10 s from the end of the step that was under way
  assert processes.last_row(workdir) == 1
  goes_on(workdir, reference, 1, record)


def test_sigterm_between_steps(reference, tmp_path, record):
  """F9. The step that is under way ends and is saved."""
  workdir = tmp_path / 'run'
  with Process(train_command(workdir), tmp_path / 'said') as p:
    p.until(lambda: processes.last_row(workdir) >= 8)
    preempted(p, p.send(signal.SIGTERM), 8, record)
  assert processes.last_row(workdir) < 12
  goes_on(workdir, reference, 8, record)


@pytest.mark.parametrize('point, step', [
    ('eval@1', 12),          # the loss of the first evaluation, at step 12
    ('decode@1', 12),        # its translations, by the raw weights
    ('decode@2', 12),        # and by the average
    ('save@2', 12),          # the thread hashes what it wrote of step 12
])
def test_sigterm_in(reference, tmp_path, record, point, step):
  """F9. Evaluations are given up and made again; a save is ended."""
  workdir = tmp_path / 'run'
  with at_phase(point, 'SIGTERM', workdir, tmp_path) as p:
    p.until(lambda: moment(tmp_path) is not None)
    preempted(p, moment(tmp_path), step, record)
  if not point.startswith('save'):
    assert 'during evaluation' in p.output()
    assert not [row for row in processes.rows(workdir) if 'eval' in row]
    assert processes.last_row(workdir) == step
  goes_on(workdir, reference, step, record)


def test_sigterm_while_it_restores(reference, tmp_path, record):
  """F9. In the middle of reading step 6: nothing is lost, no step is made."""
  workdir = tmp_path / 'run'
  with Process(train_command(workdir), tmp_path / 'first') as p:
    p.until(lambda: processes.last_row(workdir) >= 7 and processes.committed(workdir) == [6])
    p.send(signal.SIGKILL)
    p.wait()
  with at_phase('restore@2', 'SIGTERM', workdir, tmp_path) as p:
    p.until(lambda: moment(tmp_path) is not None)
    preempted(p, moment(tmp_path), 6, record)
  assert processes.last_row(workdir) == 6
  goes_on(workdir, reference, 6, record)


# -- twice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('first, second', [
    (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_twice_while_it_compiles(tmp_path, first, second, record):
  """F10. XLA runs no handler of Python; the second signal ends the process all the same."""
  cache = tmp_path / 'cache'
  cache.mkdir(mode=0o700)
  with Process(train_command(tmp_path / 'run'), tmp_path / 'said',
               JAX_COMPILATION_CACHE_DIR=str(cache)) as p:
    p.until(lambda: 'ha_ende: ' in p.output())
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
  """F10. In a save, which is given up, and in an evaluation; what is committed stays whole."""
  workdir = tmp_path / 'run'
  overrides = LONG if point.startswith('decode') else processes.R
  with at_phase(point, '0', workdir, tmp_path, overrides) as p:
    p.until(lambda: moment(tmp_path) is not None, poll=0.0005)
    p.send(signal.SIGTERM)
    time.sleep(0.001)
    sent = p.send(signal.SIGINT)
    assert p.wait(30) == 75
    seconds = time.monotonic() - sent
  record('second_signal_seconds', round(seconds, 2))
  assert seconds <= 2
  kept = processes.committed(workdir)
  assert kept in (steps, [6, 12])          # [6, 12]: the save had ended between the two signals
  output = processes.train(workdir)
  assert processes.resumed_from(output) == kept[-1]
  processes.assert_equal(workdir, reference)
