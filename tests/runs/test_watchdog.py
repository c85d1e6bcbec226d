"""A hang becomes stack traces and exit code 124; slow work does not."""

import subprocess
import sys
import time

import pytest

from t5lab.runs import watchdog
from t5lab.runs.watchdog import Watchdog

# Beats three steps, then waits forever in a function whose name the stacks must show.
HANG = """
import sys, threading, time
from t5lab.runs.watchdog import Watchdog

def waits_for_a_peer():
  threading.Event().wait()

with Watchdog(0.5, sys.argv[1], process=2) as dog:
  for step in range(3):
    dog.beat(f'step {step + 1}')
    time.sleep(0.01)
    dog.synced()
  dog.beat('step 4')
  if sys.argv[2] == 'paused':
    with dog.paused('the evaluation at step 3', 0.5):
      waits_for_a_peer()
  waits_for_a_peer()
"""


def start(tmp_path, how):
  return subprocess.run([sys.executable, '-c', HANG, str(tmp_path), how], capture_output=True,
                        text=True, timeout=60)


@pytest.mark.parametrize('how, doing', [('step', 'step 4'), ('paused', 'the evaluation at step 3')])
def test_a_hang_ends_with_stacks_and_124(tmp_path, how, doing):
  done = start(tmp_path, how)
  assert done.returncode == 124
  last = done.stderr.splitlines()[-1]
  assert last.startswith('t5lab: watchdog: no sign of life for') and 'exit code 124' in last
  assert '(limit: ' in last and f'while waiting for: {doing};' in last
  assert str(tmp_path / 'watchdog_2.txt') in last
  written = (tmp_path / 'watchdog_2.txt').read_text()
  assert written.splitlines()[0] == last
  for text in (done.stderr, written):
    assert 'waits_for_a_peer' in text and text.count('Thread 0x') >= 2


def test_a_full_disk_or_a_missing_folder_does_not_stop_it(tmp_path):
  done = start(tmp_path / 'gone', 'step')
  assert done.returncode == 124 and done.stderr.splitlines()[-1].startswith('t5lab: watchdog: ')


class Clock:
  """Replaces the module's time, so that tests need not wait."""
  now = 100.

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(watchdog, 'time', clock)
  return clock


def steps(dog, clock, n, seconds):
  for _ in range(n):
    dog.beat('step')
    clock.now += seconds
    dog.synced()


def test_the_first_step_may_take_as_long_as_it_likes(tmp_path, clock):
  dog = Watchdog(60., tmp_path)
  assert not dog.armed and dog.limit() == 0
  steps(dog, clock, 1, 3600.)                     # compiles
  assert not dog.armed and dog.limit() == 0
  steps(dog, clock, 1, 2.)
  assert dog.armed and dog.limit() == 60
  assert Watchdog(0., tmp_path).armed             # nothing to arm


def test_slow_steps_and_steps_in_flight_raise_the_limit(tmp_path, clock):
  dog = Watchdog(60., tmp_path)
  steps(dog, clock, 5, 10.)
  assert dog.limit() == 20 * 10
  for _ in range(30):                             # dispatched, not fetched: each may take its 10 s
    dog.beat('step')
  assert dog.limit() == 20 * 10 + 30 * 10
  clock.now += 300.
  dog.synced()
  assert dog.limit() == 20 * 10


def test_an_evaluation_has_its_own_limit_and_is_not_a_step(tmp_path, clock):
  dog = Watchdog(60., tmp_path)
  steps(dog, clock, 2, 1.)
  dog.beat('step')
  with dog.paused('the evaluation', 600.):
    assert dog.limit() == 600
    with dog.paused('the checkpoint', 50.):
      assert dog.limit() == 50
    assert dog.limit() == 600
    clock.now += 500.
  clock.now += 1.
  dog.synced()
  assert dog.limit() == 60                        # the evaluation does not enter the median
  with dog.paused('loading', 0.):
    assert dog.limit() == 0


def test_a_sign_of_life_restarts_the_limit(tmp_path):
  """With the real thread: 1.6 s in an evaluation with a limit of 1 s that ticks is not a hang."""
  exits = []
  with Watchdog(1., tmp_path, leave=exits.append) as dog:
    for _ in range(2):
      dog.beat('step')
      dog.synced()
    with dog.paused('the evaluation', 1.):
      for _ in range(8):
        time.sleep(0.2)
        dog.tick()
  assert not exits and not (tmp_path / 'watchdog_0.txt').exists()
