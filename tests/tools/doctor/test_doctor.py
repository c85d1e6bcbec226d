"""Faults planted on one of two real processes: each has its own sentence and exit code."""

import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5lab import cli
from t5lab import config as configs
from t5lab.programs import build as programs
from t5lab.tools.doctor import examine, facts
from t5lab.tools.launching import local

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / 'configs/quickstart.py:tiny')


# --- one process: cheap --------------------------------------------------------------------------


def test_one_healthy_machine(tmp_path, capsys):
  assert cli.main(['doctor', '--config', CONFIG, '--workdir', str(tmp_path / 'run'),
                   '--seconds', '600', '--expect-devices', str(len(jax.devices()))]) == 0
  said = capsys.readouterr().out
  assert 'fit for the run' in said and 'BAD' not in said
  for check in examine.CODES:
    assert f'ok  {check} ' in said
  assert not list((tmp_path / 'run').iterdir())                       # it leaves nothing behind


@pytest.mark.parametrize('options, code, says', [
    (('--expect-devices', '4096'), 2, 'BAD  devices'),
    (('--config.mesh.data=4096',), 2, 'mesh.data=4096 asks for 4096 devices'),
    (('--free-gb', '1e9'), 4, 'the run needs 1e+09 GB'),
    (('--config.data.vocab=/nowhere/x.model',), 3, "cannot read vocabulary '/nowhere/x.model'"),
    (('--config.data.vocab=t5lab_8192',), 3, 'rows must be at least 8,192'),
    (('--config.data.mixture=ha_ened',), 3, "no task or mixture 'ha_ened'"),
    (('--config.data.split=dev',), 3, "has no split 'dev'"),
])
def test_faults_of_one_machine(tmp_path, capsys, options, code, says):
  assert cli.main(['doctor', '--config', CONFIG, '--workdir', str(tmp_path), '--seconds', '600',
                   *options]) == code
  said = capsys.readouterr().out
  assert says in said and '1 not well' in said


def test_a_workdir_that_is_a_file(tmp_path, capsys):
  (tmp_path / 'run').write_text('')
  assert cli.main(['doctor', '--config', CONFIG, '--workdir', str(tmp_path / 'run'),
                   '--seconds', '600']) == 4
  said = capsys.readouterr().out
  assert 'host 0: cannot write to' in said and 'Not a directory' in said
  assert '-  save and restore' in said                                # not tried: no second fault


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')   # of Orbax
def test_a_disk_that_is_full(mounted, capsys):
  argv = ['doctor', '--config', CONFIG, '--seconds', '600', '--workdir']
  disk = mounted('size=64k')
  assert cli.main([*argv, str(disk)]) == 4
  said = capsys.readouterr().out
  assert 'BAD  disk' in said and 'GB free in' in said
  assert cli.main([*argv, str(disk), '--free-gb', '1e-9']) == 4
  said = capsys.readouterr().out
  assert 'ok  disk' in said and 'BAD  save and restore' in said
  assert 'No space left' in said or 'RESOURCE_EXHAUSTED' in said or 'cannot write' in said
  assert not list(disk.iterdir())


def test_a_state_that_comes_back_other_than_it_went(tmp_path, monkeypatch):
  program = programs.build(configs.load(CONFIG))
  assert examine.save_and_restore(program.abstract, tmp_path / 'a') == ''
  restore = examine.checkpoint.Checkpoints.restore

  def damaged(self, abstract):
    state, manifest = restore(self, abstract)
    return state.replace(step=state.step + 1), manifest
  monkeypatch.setattr(examine.checkpoint.Checkpoints, 'restore', damaged)
  assert examine.save_and_restore(program.abstract, tmp_path / 'b') == (
      'step came back other than it was saved')
  assert not list(tmp_path.iterdir())


def test_scaled_down_keeps_paths_types_and_shardings():
  c = configs.load(CONFIG, {'rules': 'fsdp_tp', 'mesh.data': '1', 'mesh.fsdp': '-1',
                            'mesh.model': '2'})
  abstract = programs.build(c).abstract
  small = jax.tree.map(examine.scaled_down, abstract)
  for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(small)):
    assert (x.dtype, x.sharding, len(x.shape)) == (y.dtype, y.sharding, len(y.shape))
    assert y.size <= x.size and np.prod(y.shape) <= 64
    y.sharding.shard_shape(y.shape)                                   # it divides


def test_the_content_of_files_counts(tmp_path, monkeypatch):
  """Of small ones all of it, of large ones the start, the middle and the end."""
  file = tmp_path / 'a.txt'
  file.write_bytes(bytes(1000))
  before = facts._hash_files([str(file)])
  file.write_bytes(bytes(999) + b'x')
  assert facts._hash_files([str(file)]) != before
  monkeypatch.setattr(facts, 'WHOLE', 500)
  monkeypatch.setattr(facts, 'PARTS', 10)
  found = set()
  for at in (0, 500, 990, 300):
    content = bytearray(1000)
    content[at] = 1
    file.write_bytes(content)
    found.add(facts._hash_files([str(file)]))
  file.write_bytes(bytes(1000))
  assert facts._hash_files([str(file)]) in found and len(found) == 4  # 300 is not looked at
  file.write_bytes(bytes(1001))
  assert facts._hash_files([str(file)]) not in found


def test_the_manifest_of_a_cache_counts(tmp_path):
  from t5lab.data.batches import cache
  where = cache.folder(str(tmp_path), 'ha_ende', 'train')
  where.mkdir(parents=True)
  c = configs.load(CONFIG, {'data.cache': str(tmp_path)})
  found = []
  for text in ('{}', '{"rows": 1}'):
    (where / cache.MANIFEST).write_text(text)
    found.append(facts.of_data(c))
  assert not found[0]['error'] and found[0]['vocabulary'] == found[1]['vocabulary']
  differ = {k for k in found[0]['tasks'] if found[0]['tasks'][k] != found[1]['tasks'][k]}
  assert differ == {'ha_ende, train: manifest of the cache'}


# --- two processes -------------------------------------------------------------------------------


class Host:
  """A process of two, with a folder of its own as the current one."""

  def __init__(self, folder, index, port, options, **environment):
    folder.mkdir(exist_ok=True)
    added = local.environment(index, processes=2, devices=2, device='cpu', port=port,
                              given=environment)
    self._process = subprocess.Popen(
        [sys.executable, '-m', 't5lab', 'doctor', '--config', CONFIG, '--seconds', '280',
         *options], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache/jax')} | added)

  def end(self):
    """-> (exit code, stdout, stderr)."""
    try:
      out, err = self._process.communicate(timeout=300)
    finally:
      self._process.kill()
    out = ''.join(line for line in out.splitlines(True) if not line.startswith('[Gloo]'))
    return self._process.returncode, out, err


@pytest.fixture
def port():
  with socket.socket() as s:
    s.bind(('', 0))
    return s.getsockname()[1]


def two(tmp_path, port, options=(), second=None, **environment):
  """Both hosts; `environment` is planted on host 1 -> [(code, stdout, stderr)] * 2."""
  if '--workdir' not in options:
    options = (*options, '--workdir', str(tmp_path / 'run'))
  hosts = [Host(tmp_path / f'host{i}', i, port, second if i and second else options,
                **(environment if i else {})) for i in range(2)]
  return [host.end() for host in hosts]


def expect(ended, code, check, says):
  (code0, table, _), (code1, silent, _) = ended
  assert (code0, code1) == (code, code), ended
  assert f'BAD  {check}' in table and says in ' '.join(table.split()), table
  assert table.count('BAD') == 1 and '1 not well' in table
  assert not silent                                  # one table for all


@pytest.mark.slow
def test_two_healthy_hosts(tmp_path, port):
  (code0, table, err), (code1, silent, _) = two(tmp_path, port, ('--expect-devices', '4'))
  assert (code0, code1, silent) == (0, 0, ''), table + err
  assert '4 of cpu, mesh data=4' in table and table.count('  ok  ') == len(examine.CODES)
  assert not list((tmp_path / 'run').iterdir())


@pytest.mark.slow
def test_too_few_devices(tmp_path, port):
  ended = two(tmp_path, port, ('--expect-devices', '8'))
  expect(ended, 2, 'devices', '8 devices are expected, there are 4: host 0 has 2, host 1 has 2')


@pytest.mark.slow
def test_a_package_of_another_version(tmp_path, port):
  other = tmp_path / 'site/flax-9.9.9.dist-info'
  other.mkdir(parents=True)
  (other / 'METADATA').write_text('Metadata-Version: 2.1\nName: flax\nVersion: 9.9.9\n')
  ended = two(tmp_path, port, PYTHONPATH=str(tmp_path / 'site'))
  expect(ended, 2, 'versions', 'on host 0, 9.9.9 on host 1: install the same everywhere')
  assert 'not looked at: hosts of different versions' in ended[0][1]


@pytest.mark.slow
def test_another_source_of_t5lab(tmp_path, port):
  shutil.copytree(ROOT / 't5lab', tmp_path / 'site/t5lab',
                  ignore=shutil.ignore_patterns('__pycache__'))
  with open(tmp_path / 'site/t5lab/trees.py', 'a') as f:
    f.write('# changed\n')
  expect(two(tmp_path, port, PYTHONPATH=str(tmp_path / 'site')), 2, 'versions', 't5lab source is ')


@pytest.mark.slow
def test_another_config(tmp_path, port):
  options = ('--workdir', str(tmp_path / 'run'))
  ended = two(tmp_path, port, options, second=(*options, '--config.optim.lr=7e-3'))
  expect(ended, 2, 'versions', 'config is ')


@pytest.mark.slow
def test_a_coordinator_that_cannot_be_reached(tmp_path, port):
  code, _, err = Host(tmp_path / 'host1', 1, port,
                      ('--workdir', str(tmp_path), '--arrive', '2')).end()
  assert code == 2 and err.count('\n') == 1
  assert (f'process 1 on {socket.gethostname()} cannot reach the coordinator at 127.0.0.1:{port}'
          in err)


@pytest.mark.slow
def test_a_host_that_does_not_come(tmp_path, port):
  code, _, err = Host(tmp_path / 'host0', 0, port,
                      ('--workdir', str(tmp_path), '--arrive', '2')).end()
  assert code == 2 and err.count('\n') == 1
  assert f'process 1 of 2 did not come to 127.0.0.1:{port} within 2 s; came: 0.' in err


@pytest.mark.slow
def test_a_clock_that_is_wrong(tmp_path, port):
  ended = two(tmp_path, port, T5LAB_CLOCK_AHEAD='-61')
  expect(ended, 70, 'clocks',
         'the clock of host 1 is 61.0 s behind that of host 0, the limit is 5 s')


@pytest.mark.slow
def test_a_workdir_that_is_not_shared(tmp_path, port):
  ended = two(tmp_path, port, ('--workdir', 'run'))
  (code0, table, _), (code1, _, _) = ended
  assert (code0, code1) == (4, 4) and 'host 1 does not see in' in table
  assert 'it is not the same folder on all' in table


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written(tmp_path, port, mounted):
  disk = mounted('size=1m')
  subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
  ended = two(tmp_path, port, ('--free-gb', '1e-9', '--workdir', str(disk)))
  expect(ended, 4, 'workdir', 'Read-only file system; host 1: cannot write to')


@pytest.mark.slow
def test_a_disk_that_fills_while_two_save(tmp_path, port, mounted):
  """Process 0 finds out, and process 1 does not wait for it for ever."""
  (code0, table, _), (code1, _, err) = two(tmp_path, port, (
      '--free-gb', '1e-9', '--workdir', str(mounted('size=64k'))))
  assert (code0, code1) == (4, 4), (table, err)
  assert 'BAD  save and restore' in table or 'process 0 ends with process 1' in table


OWN = ('--config.data.files.train=train.jsonl', '--config.data.files.validation=dev.jsonl',
       '--config.checkpoint.best=')


def own_files(tmp_path):
  for i in range(2):
    (tmp_path / f'host{i}').mkdir()
    for name in ('train', 'dev'):
      (tmp_path / f'host{i}/{name}.jsonl').write_text(''.join(
          json.dumps({'inputs': f'a {n}', 'targets': f'b {n}'}) + '\n' for n in range(40)))
  return tmp_path / 'host1/train.jsonl'


@pytest.mark.slow
def test_another_data_file(tmp_path, port):
  file = own_files(tmp_path)
  file.write_text(file.read_text().replace('b 17', 'b 71'))
  expect(two(tmp_path, port, OWN), 3, 'data', 'files, train: files: ')


@pytest.mark.slow
def test_a_data_file_that_is_missing(tmp_path, port):
  own_files(tmp_path).unlink()
  expect(two(tmp_path, port, OWN), 3, 'data', "host 1: no file matches 'train.jsonl'")


@pytest.mark.slow
def test_another_vocabulary_file(tmp_path, port):
  own_files(tmp_path)
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', *map(str, range(40))]
  for i in range(2):
    (tmp_path / f'host{i}/vocab.txt').write_text('\n'.join([*words, f'host{i}']) + '\n')
  expect(two(tmp_path, port, (*OWN, '--config.data.vocab=vocab.txt')), 3, 'vocabulary',
         'the vocabulary differs, its hash is ')


@pytest.mark.slow
def test_a_host_that_hangs_is_ended_and_says_where(tmp_path, port):
  """Its data file is a pipe that nobody writes to."""
  file = own_files(tmp_path)
  file.unlink()
  os.mkfifo(file)
  (code0, _, err0), (code1, _, err1) = two(tmp_path, port, (
      *OWN, '--seconds', '45', '--workdir', str(tmp_path / 'run')))
  assert code1 == 3 and 'the check of data has not ended after 45 s' in err1
  assert code0 in (2, 3) and ('process 1' in err0 or 'the check of data' in err0)


@pytest.mark.slow
def test_launched_on_two_processes(tmp_path, port):
  done = subprocess.run(
      [sys.executable, '-m', 't5lab', 'launch', '--platform', 'local', '--command', 'doctor',
       '--config', CONFIG, '--workdir', str(tmp_path), '--processes', '2',
       '--devices-per-process', '2', '--port', str(port), '--', '--seconds', '280'], cwd=ROOT,
      capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '[0]   ok  save and restore' in done.stdout and '4 of cpu' in done.stdout
