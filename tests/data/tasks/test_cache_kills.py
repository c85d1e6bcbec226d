"""`t5lab cache`, killed repeatedly, builds the same cache as an undisturbed build."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from t5lab.data.batches import cache

pytestmark = pytest.mark.slow
ROWS, SHARDS = 60_000, 6


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('rows') / 'train.jsonl'
  rng = np.random.default_rng(0)
  with open(path, 'w') as f:
    for i in range(ROWS):
      f.write(json.dumps({'q': f'{i} ' + 'word ' * int(rng.integers(1, 30)), 'a': str(i)}) + '\n')
  return path


def start(source, root, processes=2, **kwargs):
  return subprocess.Popen(
      [sys.executable, '-m', 't5lab', 'cache', '--config', 'configs/quickstart.py:tiny',
       f'--config.data.cache={root}', f'--config.data.files.train={source}',
       f'--config.data.files.validation={source}', '--config.data.fields.inputs=q',
       '--config.data.fields.targets=a', f'--processes={processes}', f'--shards={SHARDS}'],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs)


def finish(process, timeout=200):
  out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def contents(root):
  """Every example of every shard, in order, and the sums of the shards' lengths."""
  where = cache.folder(str(root), 'files', 'train')
  manifest = cache.read_manifest(where, '')
  examples = cache.Cached(where, manifest['identity'], '')
  tokens = [np.concatenate([len(e['inputs']) * np.ones(1, int), e['inputs'], e['targets']])
            for e in (examples[i] for i in range(len(examples)))]
  return np.concatenate(tokens), [(s['rows'], s['lengths']) for s in manifest['shards']]


@pytest.fixture(scope='module')
def untouched(source, tmp_path_factory):
  root = tmp_path_factory.mktemp('whole')
  code, out, err = finish(start(source, root, processes=1))
  assert code == 0 and f'files: {ROWS:,} examples' in out, err
  return contents(root)


def living(group):
  processes = subprocess.run(['pgrep', '-g', str(group)], capture_output=True, text=True)
  return processes.stdout.split()


@pytest.mark.parametrize('seed', range(2))
def test_killed_at_random_moments_nothing_is_lost_or_twice(source, untouched, tmp_path, seed):
  rng, kills = random.Random(seed), 0
  while True:
    process = start(source, tmp_path)
    try:
      code, out, err = finish(process, 4 + 10 * rng.random() if kills < 4 else 200)
      break
    except subprocess.TimeoutExpired:
      kills += 1
      if rng.random() < 0.5:
        os.killpg(process.pid, signal.SIGKILL)
      else:
        process.kill()                                # without its workers
      process.wait()
      deadline = time.monotonic() + 30
      while living(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
      assert not living(process.pid)
  assert code == 0 and f'files: {ROWS:,} examples' in out, err
  tokens, shards = contents(tmp_path)
  np.testing.assert_array_equal(tokens, untouched[0])
  assert shards == untouched[1] and kills > 0
  assert not list(tmp_path.rglob('*.part'))


def test_a_second_builder_is_refused_while_the_first_one_runs(source, untouched, tmp_path):
  first = start(source, tmp_path)
  while not (tmp_path / 'run.lock').exists() or not (tmp_path / 'run.lock').read_text():
    time.sleep(0.1)
    assert first.poll() is None
  code, _, err = finish(start(source, tmp_path))
  assert code == 2 and err.count('\n') == 1 and f'pid {first.pid}' in err
  assert finish(first)[0] == 0
  np.testing.assert_array_equal(contents(tmp_path)[0], untouched[0])


def test_a_disk_that_was_full_is_filled_when_there_is_room(source, untouched, tmp_path):
  def small():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
  code, _, err = finish(start(source, tmp_path, preexec_fn=small))
  last = err.splitlines()[-1]
  assert code == 3 and last.startswith('t5lab: shard ') and 'cannot write the cache in' in last
  assert not list(tmp_path.rglob('*.part'))
  assert finish(start(source, tmp_path))[0] == 0
  np.testing.assert_array_equal(contents(tmp_path)[0], untouched[0])


def test_training_from_a_cache_does_not_see_how_many_processes_built_it(source, tmp_path):
  assert finish(start(source, tmp_path / 'two'))[0] == 0
  assert finish(start(source, tmp_path / 'one', processes=1))[0] == 0
  losses = []
  for name in ('one', 'two'):
    done = subprocess.run(
        [sys.executable, '-m', 't5lab', 'train', '--config', 'configs/quickstart.py:tiny',
         '--workdir', tmp_path / f'run_{name}', f'--config.data.cache={tmp_path / name}',
         f'--config.data.files.train={source}', f'--config.data.files.validation={source}',
         '--config.data.fields.inputs=q', '--config.data.fields.targets=a',
         '--config.total_steps=4', '--config.eval.examples=2', '--config.checkpoint.best='],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / f'run_{name}' / 'metrics.jsonl').read_text().splitlines()
    losses.append([json.loads(line)['loss'] for line in metrics if '"loss"' in line])
  assert losses[0] == losses[1] and len(losses[0]) == 4
