"""SIGTERM and SIGINT, once and twice, with real processes (F10)."""

import os
import signal
import time

from children import Child
import pytest

from t5lab.runs.signals import Signals

WAIT = """
with Signals() as signals:
  print('ready')
  while not signals.requested:
    time.sleep(0.01)
  print(signals.requested)
  time.sleep(60)
"""


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_the_first_signal_sets_a_flag_and_the_second_ends_the_process(name):
  with Child(WAIT) as child:
    assert child.ready() == 'ready'
    child.process.send_signal(getattr(signal, name))
    assert child.ready() == name
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(10) == 75


def test_the_second_signal_ends_a_main_thread_busy_in_c():
  """As in a compilation, no Python handler runs: the main thread waits for a mutex it holds."""
  with Child("""
import ctypes
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: an initialised mutex
with Signals():
  libc.pthread_mutex_lock(mutex)
  print('ready')
  libc.pthread_mutex_lock(mutex)  # not interruptible, without the interpreter's lock
""") as child:
    assert child.ready() == 'ready'
    time.sleep(0.2)
    child.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(10) == 75


def test_handlers_are_restored():
  before = [signal.getsignal(s) for s in Signals.signals]
  with Signals() as signals:
    assert signals.requested == ''
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not signals.requested and time.monotonic() < deadline:
      time.sleep(0.01)
    assert signals.requested == 'SIGTERM'
  assert [signal.getsignal(s) for s in Signals.signals] == before
  assert signal.set_wakeup_fd(-1) == -1
