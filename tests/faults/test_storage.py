"""Disks that are full, read-only or removed, and clocks that were set back (F8, F26)."""

import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import time

import processes
from processes import EVERY, Process, R, train_command
import pytest


def used_bytes(place) -> int:
  status = os.statvfs(place)
  return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_a_disk_that_fills_during_a_save(reference, mounted):
  """F8. On a tmpfs with room for one and a half steps; with more room the same command resumes."""
  one = sum(p.stat().st_blocks * 512 for p in (reference / 'checkpoints/step_00000006').rglob('*'))
  other = 700_000                                           # config, lock, metrics, TensorBoard
  place = mounted(f'size={one * 3 // 2 + other}')
  workdir = place / 'run'
  output = processes.train(workdir, code=4)
  last = output.splitlines()[-1]
  assert 'saving step 12' in last and 'newest committed step: 6' in last, output
  assert any(word in last for word in ('No space', 'RESOURCE_EXHAUSTED')), last
  assert processes.committed(workdir) == [EVERY] and not processes.unfinished_saves(workdir)
  # The run ends within one save interval.
  assert processes.last_step(workdir) <= 12 + EVERY
  assert used_bytes(place) < one + other                    # the failed save is removed
  subprocess.run(['mount', '-o', 'remount,size=64m', place], check=True)
  output = processes.train(workdir)
  assert processes.resumed_from(output) == EVERY
  processes.assert_equal(workdir, reference)


def test_files_that_may_not_grow(reference, tmp_path):
  """F8. The same with RLIMIT_FSIZE, which fails in the middle of a file."""
  # TensorStore may write the arrays into one file or several.
  sizes = lambda step: [p.stat().st_size for p in step.rglob('*') if p.is_file()]
  largest = min(max(sizes(step)) for step in (reference / 'checkpoints').glob('step_*')) // 4

  def limit():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
  workdir = tmp_path / 'run'
  output = processes.train(workdir, code=4, before=limit)
  last = output.splitlines()[-1]
  assert 'saving step 6' in last and 'no step is committed' in last
  assert not processes.unfinished_saves(workdir) and processes.committed(workdir) == []
  processes.train(workdir)
  processes.assert_equal(workdir, reference)


@pytest.fixture
def read_only(reference, mounted):
  place = mounted('size=64m')
  shutil.copytree(reference, place / 'run')
  subprocess.run(['mount', '-o', 'remount,ro', place], check=True)
  return place / 'run'


def command(*argv, log, code):
  with Process(argv, log) as p:
    assert p.wait() == code, p.output()
  return p.output()


def test_a_read_only_directory(read_only, tmp_path):
  """F26. Training and evaluation report that they cannot write; inference only reads and works."""
  output = command(*train_command(read_only), log=tmp_path / 'train', code=2)
  assert output.splitlines()[-1] == (
      f't5lab: cannot lock {read_only}/run.lock: Read-only file system')
  output = command(*train_command(read_only.parent / 'new'), log=tmp_path / 'new', code=2)
  assert 'cannot lock' in output and 'Read-only file system' in output
  output = command('eval', '--workdir', read_only, log=tmp_path / 'eval', code=2)
  last = output.splitlines()[-1]
  assert last.startswith('t5lab: ') and 'Read-only file system' in last and 'internal' not in last
  assert str(read_only) in last
  rows = tmp_path / 'rows.txt'
  rows.write_text('Turn on the light\n')
  command('infer', '--workdir', read_only, '--input', rows, '--output', tmp_path / 'out.txt',
          log=tmp_path / 'infer', code=0)
  assert (tmp_path / 'out.txt').exists()


def test_a_directory_that_is_removed_during_the_run(tmp_path):
  """F26. The next save fails; nothing is written where the run was, and the run ends."""
  workdir = tmp_path / 'run'
  long = {**R, 'total_steps': 100_000, 'checkpoint.every': 500, 'eval.every': 0}
  with Process(train_command(workdir, long), tmp_path / 'log') as p:
    p.wait_for(lambda: processes.last_step(workdir) >= 2)
    removed = tmp_path / 'removed'
    workdir.rename(removed)                                # atomically, whatever is being written
    shutil.rmtree(removed)
    code = p.wait(120)
  last = p.output().splitlines()[-1]
  assert code == 4, p.output()
  assert last.startswith('t5lab: ') and str(workdir) in last and 'internal error' not in last
  assert not list(workdir.rglob('step_*'))


def test_a_clock_that_was_set_back(reference, tmp_path):
  """F26. The newest step is the one with the largest number, whatever the times of the files."""
  workdir = tmp_path / 'run'
  shutil.copytree(reference, workdir)
  shutil.rmtree(workdir / 'checkpoints' / 'step_00000030')
  now = time.time()
  for path in sorted(workdir.rglob('*')):
    step = next((int(p[5:]) for p in path.parts if p.startswith('step_')), 0)
    os.utime(path, (now + 86_400 - 1000 * step,) * 2)
  output = processes.train(workdir)
  assert processes.resumed_from(output) == 24
  processes.assert_equal(workdir, reference)
  assert Path(workdir / 'checkpoints/step_00000030').stat().st_mtime < now + 3600
