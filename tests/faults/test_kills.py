"""SIGKILL at any moment (F1, F2, F3, F12, F30): the same command resumes to the same end."""

import signal
import time

import numpy as np
import processes
from processes import EVERY, STEPS, Process, train_command
import pytest


def resume(workdir, reference, killed_pid: int) -> str:
  """Resumes a killed run to its end: it must take over the lock (F12) and equal R. -> output"""
  output = processes.train(workdir)
  assert 'taking over' in output and f'pid {killed_pid} ' in output, output
  processes.assert_equal(workdir, reference)
  return output


@pytest.mark.parametrize('seed', range(5))
def test_killed_in_a_step(reference, tmp_path, record, seed):
  """F1. At a random step, while nothing is being saved: at most one save interval is repeated."""
  workdir, step = tmp_path / 'run', int(np.random.default_rng(seed).integers(1, STEPS))
  with Process(train_command(workdir), tmp_path / 'killed') as p:
    p.wait_for(lambda: (processes.last_step(workdir) >= step
                        and not processes.unfinished_saves(workdir)), poll=0.001)
    p.send(signal.SIGKILL)
    killed = time.monotonic()
    assert p.wait() == -signal.SIGKILL
  reached = processes.last_step(workdir)
  with Process(train_command(workdir), tmp_path / 'resumed') as p:
    p.wait_for(lambda: processes.has_made_a_step(p.output()), poll=0.01)
    start = processes.resumed_from(p.output())
    record('restart_seconds', round(time.monotonic() - killed, 1))
    assert p.wait() == 0, p.output()
    output = p.output()
  assert 'taking over' in output
  record('redone_steps', reached - start)
  assert 0 <= reached - start <= EVERY, (reached, start)
  processes.assert_equal(workdir, reference)


@pytest.mark.parametrize('chain', range(2))
def test_killed_in_a_save(reference, tmp_path, record, chain):
  """F2. Five times, 0 to 300 ms after a save has begun; ten times in both chains together."""
  workdir, delays = tmp_path / 'run', np.linspace(0, 0.3, 10)[chain::2]
  within = 0
  for i, delay in enumerate(delays):
    before = processes.committed(workdir)
    with Process(train_command(workdir), tmp_path / f'killed{i}') as p:
      # This run's own saves: it removes those of a killed run before it prints where it starts.
      p.wait_for(lambda: 'ha_ende: ' in p.output() and processes.unfinished_saves(workdir),
                 poll=0.0005)
      if i:
        assert 'taking over' in p.output()
        assert processes.resumed_from(p.output()) == (before[-1] if before else 0)
      name = processes.unfinished_saves(workdir)
      time.sleep(delay)
      p.send(signal.SIGKILL)
      assert p.wait() == -signal.SIGKILL
    steps = processes.committed(workdir)              # each verifies
    assert set(before) <= set(steps)                  # none of them is lost
    unfinished = processes.unfinished_saves(workdir)
    assert len(unfinished) <= 1
    within += bool(unfinished)
    assert name, 'no save was seen'
  record('killed_within_a_save', within)
  assert within                                       # otherwise nothing was tested
  output = resume(workdir, reference, p.pid)
  assert processes.resumed_from(output) == (steps[-1] if steps else 0)


@pytest.mark.parametrize('failpoint, newest', [('before_manifest', 6), ('before_rename', 6),
                                               ('after_rename', 12)])
def test_killed_at_the_commit(reference, tmp_path, failpoint, newest):
  """F3. Just before and after the rename that commits a step: half a step is never chosen."""
  workdir = tmp_path / 'run'
  with Process(train_command(workdir), tmp_path / 'killed', T5LAB_FAILPOINT=f'{failpoint}@12') as p:
    assert p.wait() == -signal.SIGKILL, p.output()
  assert processes.committed(workdir)[-1] == newest
  assert len(processes.unfinished_saves(workdir)) == (newest == 6)
  output = resume(workdir, reference, p.pid)
  assert processes.resumed_from(output) == newest


SOAK = {'total_steps': 200, 'checkpoint.every': 5, 'log.every': 1, 'checkpoint.keep': 3,
        'eval.every': 0, 'model.dropout': 0.1, 'data.batch_size': 96, 'eval.examples': 2}


def test_200_steps_with_a_kill_every_3_to_15_seconds(common, tmp_path, record):
  """F30. Killed again and again while it trains, until it ends.

  Goodput is the fraction of the computed steps that were kept. (The fraction of the time would say
  little: here a start takes as long as a run lives.)
  """
  whole = processes.shared(common, 'soak', lambda path: processes.train(path, SOAK))
  assert len(processes.losses(whole)) == 200
  workdir, random, kills, computed = tmp_path / 'run', np.random.default_rng(0), 0, 0
  began = time.monotonic()
  while True:
    start = (processes.committed(workdir) or [0])[-1]
    with Process(train_command(workdir, SOAK), tmp_path / f'log{kills}') as p:
      # Time counts from the first step: what comes before only loads libraries.
      p.wait_for(lambda start=start: processes.has_made_a_step(p.output()) or start == 200,
                 poll=0.01)
      end = time.monotonic() + random.uniform(3, 15)
      while p.code() is None and time.monotonic() < end:
        time.sleep(0.01)
      if p.code() is None:
        p.send(signal.SIGKILL)
      code = p.wait()
    assert processes.resumed_from(p.output()) == start
    computed += processes.last_step(workdir) - start
    if code == 0:
      break
    assert code == -signal.SIGKILL, p.output()
    kills += 1
    assert kills < 60
  wall = time.monotonic() - began
  assert kills >= 2, 'the machine is too fast: raise data.batch_size'
  processes.assert_equal(workdir, whole, 200)
  record('soak_kills', kills)
  record('soak_goodput', round(200 / computed, 3))
  record('soak_seconds', round(wall, 1))
  assert 200 / computed >= 0.7
