"""Two processes that train together: one is killed, told to end, or stalls (F15)."""

import signal
import time

import processes
from processes import R, together
import pytest

LONG = {**R, 'total_steps': 20_000, 'checkpoint.every': 500, 'eval.every': 0, 'guard.watchdog': 20.}


def started(both, workdir, step=10):
  both[0].until(lambda: processes.last_row(workdir) >= step or both[1].code() is not None)
  assert both[1].code() is None, both[1].output()


@pytest.mark.parametrize('victim', [0, 1])
def test_one_is_killed(tmp_path, record, victim):
  """F15. The other, be it the coordinator or not, ends within 30 s and not with success."""
  workdir = tmp_path / 'run'
  with together(2, workdir, tmp_path / 'said', LONG) as both:
    started(both, workdir)
    sent = both[victim].send(signal.SIGKILL)
    other = both[1 - victim]
    code = other.wait(90)
    seconds = time.monotonic() - sent
  record('dead_peer_seconds', round(seconds, 1))
  assert code not in (0, 75), other.output()
  assert seconds <= 30, f'{seconds:.1f} s'
  for step in processes.committed(workdir):
    assert step % 500 == 0


def test_what_two_lost_two_or_one_go_on_with(reference, tmp_path):
  """F15. R on two processes, one killed during the save of step 12; then two again to the end."""
  workdir = tmp_path / 'run'
  both_halves = {**R, 'mesh.data': 2}
  with together(2, workdir, tmp_path / 'saida', both_halves,
                T5LAB_FAILPOINT='before_rename@12') as both:
    assert both[0].wait(200) == -signal.SIGKILL, both[0].output()
    assert both[1].wait(60) not in (0, 75), both[1].output()
  assert processes.committed(workdir) == [6]
  with together(2, workdir, tmp_path / 'saidb', both_halves) as both:
    codes = [p.wait(200) for p in both]
  assert codes == [0, 0], both[0].output() + both[1].output()
  assert processes.resumed_from(both[0].output()) == 6
  assert [step for step, _ in processes.losses(workdir)] == list(range(1, 31))
  ours, theirs = (dict(processes.losses(w)) for w in (workdir, reference))
  for step in ours:                      # other devices, other sums: as on any other mesh (F13)
    assert float.fromhex(ours[step]) == pytest.approx(float.fromhex(theirs[step]), rel=1e-4), step
  whole = tmp_path / 'whole'             # and what was not killed, on the same two, bit for bit
  with together(2, whole, tmp_path / 'saidc', both_halves) as both:
    assert [p.wait(200) for p in both] == [0, 0], both[0].output()
  processes.assert_equal(workdir, whole)


@pytest.mark.parametrize('told', [0, 1])
def test_one_is_told_to_end(tmp_path, record, told):
  """F15. Both save the same step and exit 75; nothing that was made is lost."""
  workdir = tmp_path / 'run'
  with together(2, workdir, tmp_path / 'said', LONG) as both:
    started(both, workdir)
    sent = both[told].send(signal.SIGTERM)
    codes = [p.wait(60) for p in both]
    seconds = time.monotonic() - sent
  assert codes == [75, 75], both[0].output() + both[1].output()
  record('exit_seconds', round(seconds, 1))
  last = processes.last_row(workdir)
  record('steps_lost', last - processes.committed(workdir)[-1])
  assert processes.committed(workdir)[-1] == last
  for p in both:
    assert f'step {last} is saved' in p.output() and 'Traceback' not in p.output()
  assert not processes.saves(workdir)


@pytest.mark.parametrize('stopped', [0, 1])
def test_one_is_stopped(tmp_path, record, stopped):
  """F15. SIGSTOP: alive for the kernel, stuck for its peer, which shows its stacks and ends.

  JAX's heartbeat may be sooner than the watchdog: a stopped process sends none.
  """
  workdir = tmp_path / 'run'
  with together(2, workdir, tmp_path / 'said', LONG) as both:
    started(both, workdir)
    sent = both[stopped].send(signal.SIGSTOP)
    other = both[1 - stopped]
    code = other.wait(120)
    seconds = time.monotonic() - sent
  record('stopped_peer_seconds', round(seconds, 1))
  assert code not in (0, 75), other.output()
  assert seconds <= 60, f'{seconds:.1f} s'


@pytest.mark.parametrize('stuck', [0, 1])
def test_one_is_stuck(tmp_path, record, stuck):
  """F15. Alive and with a heartbeat, but it never comes to its step: the watchdog's case."""
  workdir = tmp_path / 'run'
  with together(2, workdir, tmp_path / 'said', LONG, T5LAB_FAULT=f'hang@12:{stuck}') as both:
    both[0].until(lambda: processes.last_row(workdir) >= 10 or both[1].code() is not None)
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
