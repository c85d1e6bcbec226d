"""Two trainers in one directory (F11)."""

import socket
import time

import processes
from processes import Process, train_command


def test_the_second_is_refused_and_the_first_unaffected(reference, tmp_path, record):
  """F11. The second starts 2 s after the first; it ends within 5 s and names the holder."""
  workdir = tmp_path / 'run'
  with Process(train_command(workdir), tmp_path / 'first') as first:
    lock = workdir / 'run.lock'
    first.wait_for(lambda: lock.exists() and lock.stat().st_size)
    time.sleep(2)
    with Process(train_command(workdir), tmp_path / 'second') as second:
      assert second.wait(60) == 2, second.output()
      seconds = time.monotonic() - second.started
    assert first.code() is None
    last = second.output().splitlines()[-1]
    assert f'{workdir} is in use by pid {first.pid} on host {socket.gethostname()}' in last
    assert 'choose another --workdir' in last
    record('second_trainer_seconds', round(seconds, 1))
    assert first.wait() == 0, first.output()
  processes.assert_equal(workdir, reference)
  assert seconds <= 5, f'{seconds:.1f} s'
