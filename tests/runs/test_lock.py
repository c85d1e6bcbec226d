"""The lock of a run's directory, with real processes (F11, F12)."""

import json
import os
import signal
import socket

from children import Child
import pytest

from t5lab.errors import UsageError
from t5lab.runs.lock import RunLock

HOLD = """
with RunLock(sys.argv[1]):
  print('held')
  time.sleep(60)
"""


def test_a_second_trainer_is_refused_and_the_first_unaffected(tmp_path):
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


def test_the_lock_of_a_killed_trainer_is_taken_over_and_logged(tmp_path):
  lines = []
  with Child(HOLD, tmp_path) as first:
    assert first.ready() == 'held'
    first.process.kill()
    with RunLock(tmp_path, log=lines.append):
      assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
    assert len(lines) == 1 and f'from pid {first.process.pid} on' in lines[0]


def test_a_released_lock_is_taken_silently(tmp_path):
  lines = []
  for _ in range(2):
    with RunLock(tmp_path / 'new', log=lines.append):
      holder = json.loads((tmp_path / 'new/run.lock').read_text())
      assert sorted(holder) == ['boot_id', 'host', 'pid', 'start', 'time']
  assert lines == []


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
  """A data worker that the trainer forked outlives the kill of the trainer."""
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


def test_a_lock_file_that_is_not_ours(tmp_path):
  (tmp_path / 'run.lock').write_text('[1, 2')
  with RunLock(tmp_path):
    pass
  (tmp_path / 'run.lock').unlink()
  (tmp_path / 'run.lock').symlink_to(tmp_path / 'victim')
  with pytest.raises(UsageError, match='cannot lock'), RunLock(tmp_path):
    pass
  assert not (tmp_path / 'victim').exists()
