"""Two processes of one run: one is killed, gets SIGTERM, or hangs (F15)."""

import signal
import time

import processes
from processes import R, train_together
import pytest

LONG = {**R, 'total_steps': 20_000, 'checkpoint.every': 500, 'eval.every': 0, 'guard.watchdog': 20.}


def wait_for_step(both, workdir, step=10):
  both[0].wait_for(lambda: processes.last_step(workdir) >= step or both[1].code() is not None)
  assert both[1].code() is None, both[1].output()


@pytest.mark.parametrize('victim', [0, 1])
def test_one_is_killed(tmp_path, record, victim):
  """F15. The other one, coordinator or not, ends within 30 s with an error."""
  workdir = tmp_path / 'run'
  with train_together(2, workdir, tmp_path / 'log', LONG) as both:
    wait_for_step(both, workdir)
    sent = both[victim].send(signal.SIGKILL)
    other = both[1 - victim]
    code = other.wait(90)
    seconds = time.monotonic() - sent
  record('dead_peer_seconds', round(seconds, 1))
  assert code not in (0, 75), other.output()
  assert seconds <= 30, f'{seconds:.1f} s'
  for step in processes.committed(workdir):
    assert step % 500 == 0


def test_two_processes_resume_after_one_was_killed(reference, tmp_path):
  """F15. R on two processes, one killed in the save of step 12; two processes resume to the end."""
  workdir = tmp_path / 'run'
  both_halves = {**R, 'mesh.data': 2}
  with train_together(2, workdir, tmp_path / 'killed', both_halves,
                T5LAB_FAILPOINT='before_rename@12') as both:
    assert both[0].wait(200) == -signal.SIGKILL, both[0].output()
    assert both[1].wait(60) not in (0, 75), both[1].output()
  assert processes.committed(workdir) == [6]
  with train_together(2, workdir, tmp_path / 'resumed', both_halves) as both:
    codes = [p.wait(200) for p in both]
  assert codes == [0, 0], both[0].output() + both[1].output()
  assert processes.resumed_from(both[0].output()) == 6
  assert [step for step, _ in processes.losses(workdir)] == list(range(1, 31))
  ours, theirs = (dict(processes.losses(w)) for w in (workdir, reference))
  for step in ours:                      # close only: sums depend on the mesh (F13)
    assert float.fromhex(ours[step]) == pytest.approx(float.fromhex(theirs[step]), rel=1e-4), step
  whole = tmp_path / 'whole'             # on the same mesh without a kill: bit for bit
  with train_together(2, whole, tmp_path / 'uninterrupted', both_halves) as both:
    assert [p.wait(200) for p in both] == [0, 0], both[0].output()
  processes.assert_equal(workdir, whole)


@pytest.mark.parametrize('target', [0, 1])
def test_one_gets_sigterm(tmp_path, record, target):
  """F15. Both save the same step and exit 75; no step is lost."""
  workdir = tmp_path / 'run'
  with train_together(2, workdir, tmp_path / 'log', LONG) as both:
    wait_for_step(both, workdir)
    sent = both[target].send(signal.SIGTERM)
    codes = [p.wait(60) for p in both]
    seconds = time.monotonic() - sent
  assert codes == [75, 75], both[0].output() + both[1].output()
  record('exit_seconds', round(seconds, 1))
  last = processes.last_step(workdir)
  record('steps_lost', last - processes.committed(workdir)[-1])
  assert processes.committed(workdir)[-1] == last
  for p in both:
    assert f'step {last} is saved' in p.output() and 'Traceback' not in p.output()
  assert not processes.unfinished_saves(workdir)


@pytest.mark.parametrize('stopped', [0, 1])
def test_one_is_stopped(tmp_path, record, stopped):
  """F15. SIGSTOP: the process exists but does nothing; its peer prints its stacks and ends.

  JAX's heartbeat, which a stopped process does not send, may end it before the watchdog does.
  """
  workdir = tmp_path / 'run'
  with train_together(2, workdir, tmp_path / 'log', LONG) as both:
    wait_for_step(both, workdir)
    sent = both[stopped].send(signal.SIGSTOP)
    other = both[1 - stopped]
    code = other.wait(120)
    seconds = time.monotonic() - sent
  record('stopped_peer_seconds', round(seconds, 1))
  assert code not in (0, 75), other.output()
  assert seconds <= 60, f'{seconds:.1f} s'


@pytest.mark.parametrize('stuck', [0, 1])
def test_one_is_stuck(tmp_path, record, stuck):
  """F15. The process sends heartbeats but never reaches its step: the watchdog must end both."""
  workdir = tmp_path / 'run'
  with train_together(2, workdir, tmp_path / 'log', LONG, T5LAB_FAULT=f'hang@12:{stuck}') as both:
    both[0].wait_for(lambda: processes.last_step(workdir) >= 10 or both[1].code() is not None)
    began = time.monotonic()
    codes = [p.wait(120) for p in both]
    seconds = time.monotonic() - began
  record('stuck_peer_seconds', round(seconds, 1))
  assert codes == [124, 124], both[0].output() + both[1].output()
  assert seconds <= 60, f'{seconds:.1f} s'
  other = both[1 - stuck].output()
  assert 'Thread 0x' in other or 'Current thread' in other       # the stacks
  assert 'watchdog' in other and '124' in other
  assert list(workdir.glob('watchdog_*.txt'))
