"""The lock (F11, F12), config.json, atomic files, and signals (F10), with real processes."""

import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import pytest

from t5lab import files
from t5lab.errors import UsageError
from t5lab.runs import rundir
from t5lab.runs.lock import RunLock
from t5lab.runs.signals import Signals

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = """
import os, sys, time
from t5lab.runs.lock import RunLock
from t5lab.runs.signals import Signals
"""


class Child:
  """A Python process that runs `code`; `ready()` waits for a line of its output."""

  def __init__(self, code, *arguments):
    self.process = subprocess.Popen(
        [sys.executable, '-u', '-c', IMPORTS + code, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()
    self.process.communicate()

  def ready(self):
    return self.process.stdout.readline().strip()


HOLD = """
with RunLock(sys.argv[1]):
  print('held')
  time.sleep(60)
"""


# --- the lock ----------------------------------------------------------------------------------


def test_second_trainer_is_refused_and_the_first_unharmed(tmp_path):
  with Child(HOLD, tmp_path) as first:
    assert first.ready() == 'held'
    before = (tmp_path / 'run.lock').read_text()
    with pytest.raises(UsageError) as e, RunLock(tmp_path, patience=0.2):
      pass
    assert e.value.code == 2
    assert f'pid {first.process.pid} on host {socket.gethostname()}' in str(e.value)
    assert 'child process' not in str(e.value)
    assert (tmp_path / 'run.lock').read_text() == before
    assert first.process.poll() is None


def test_lock_of_a_killed_trainer_is_taken_over_and_said(tmp_path):
  lines = []
  with Child(HOLD, tmp_path) as first:
    assert first.ready() == 'held'
    first.process.kill()
    with RunLock(tmp_path, log=lines.append):
      assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
    assert len(lines) == 1 and f'from pid {first.process.pid} on' in lines[0]


def test_released_lock_is_free_and_silent(tmp_path):
  lines = []
  for _ in range(2):
    with RunLock(tmp_path / 'new', log=lines.append):
      holder = json.loads((tmp_path / 'new/run.lock').read_text())
      assert sorted(holder) == ['boot_id', 'host', 'pid', 'start', 'time']
  assert lines == []


def test_forked_worker_does_not_keep_the_lock(tmp_path):
  """A data worker forked by the trainer outlives its kill."""
  with Child("""
with RunLock(sys.argv[1]):
  if (pid := os.fork()) == 0:
    print('worker', os.getpid())
    time.sleep(60)
    os._exit(0)
  time.sleep(60)
""", tmp_path) as trainer:
    worker = int(trainer.ready().split()[1])
    trainer.process.kill()
    try:
      with RunLock(tmp_path, log=lambda _: None):
        os.kill(worker, 0)  # still there
    finally:
      os.kill(worker, signal.SIGKILL)


def test_lock_in_the_way_or_forged(tmp_path):
  (tmp_path / 'run.lock').write_text('[1, 2')
  with RunLock(tmp_path):
    pass
  (tmp_path / 'run.lock').unlink()
  (tmp_path / 'run.lock').symlink_to(tmp_path / 'victim')
  with pytest.raises(UsageError, match='cannot lock'), RunLock(tmp_path):
    pass
  assert not (tmp_path / 'victim').exists()


# --- config.json and atomic files --------------------------------------------------------------


def test_config_round_trip(tmp_path):
  config = {'model': {'layers': 2, 'act': ['gelu', 'linear']}, 'lr': 1e-3, 'name': 'ü', 'x': None}
  rundir.write_config(tmp_path, config)
  assert rundir.read_config(tmp_path) == config
  assert os.listdir(tmp_path) == ['config.json']


@pytest.mark.parametrize('value', [object(), len, {1, 2}, b'x', float('nan')])
def test_config_is_plain_json(tmp_path, value):
  with pytest.raises(UsageError, match='plain JSON'):
    rundir.write_config(tmp_path, {'a': value})
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('text', [
    '', '[1]', '{"a": ', '\xff', '[' * 100_000, ' ' * (files.CONFIG_BYTES + 1)])
def test_bad_config_is_one_line(tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(UsageError, match='config.json') as e:
    rundir.read_config(tmp_path)
  assert '\n' not in str(e.value)


def test_directory_without_config(tmp_path):
  for directory in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(UsageError, match='is not a run of t5lab'):
      rundir.read_config(directory)


def test_differences_between_configs():
  saved = {'total_steps': 100, 'model': {'layers': 2, 'act': ['gelu']}, 'log': {'every': 10},
           'logits': 1, 'empty': {}}
  new = {'total_steps': 200, 'model': {'layers': 3, 'act': ('gelu',), 'heads': 4},
         'log': {'every': 5}, 'logits': 2, 'empty': {}}
  assert rundir.config_differences(saved, new, allowed=('total_steps', 'log')) == [
      'logits: 1 -> 2', 'model.heads: absent -> 4', 'model.layers: 2 -> 3']
  assert rundir.config_differences(new, new) == []
  assert rundir.config_differences({'a': {}}, {'a': {'b': 1}}) == [
      'a: {} -> absent', 'a.b: absent -> 1']
  assert rundir.config_differences({'a': True}, {'a': 1}) == ['a: true -> 1']


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'f'
  files.write_text(path, 'old ü\n')
  def full(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    files.write_text(path, 'new')
  assert path.read_text() == 'old ü\n' and os.listdir(tmp_path) == ['f']


def test_write_does_not_follow_a_planted_link(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('mine')
  (tmp_path / '.f.tmp').symlink_to(victim)
  with pytest.raises(OSError):
    files.write_text(tmp_path / 'f', 'x')
  assert victim.read_text() == 'mine'


# --- signals -----------------------------------------------------------------------------------

WAIT = """
with Signals() as signals:
  print('ready')
  while not signals.requested:
    time.sleep(0.01)
  print(signals.requested)
  time.sleep(60)
"""


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_first_signal_asks_and_second_ends(name):
  with Child(WAIT) as child:
    assert child.ready() == 'ready'
    child.process.send_signal(getattr(signal, name))
    assert child.ready() == name
    assert child.process.poll() is None
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(10) == 75


def test_second_signal_ends_a_main_thread_busy_in_c():
  """A compilation runs no Python handlers; here the main thread waits for a mutex it holds."""
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
