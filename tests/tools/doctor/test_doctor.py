"""The doctor on one machine, and on two real processes with a fault planted on one of them.

Each fault has its own message and exit code.
"""

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

from t5lab import cli, config
from t5lab.programs import build
from t5lab.runs.checkpoint import Checkpoints
from t5lab.tools.doctor import examine, facts
from t5lab.tools.launching import local

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / 'configs/quickstart.py:tiny')


# --- one process ---------------------------------------------------------------------------------


def doctor(capsys, workdir, *options) -> tuple[int, str]:
  """-> (exit code, table)."""
  code = cli.main(['doctor', '--config', CONFIG, '--workdir', str(workdir), '--seconds', '600',
                   *options])
  return code, capsys.readouterr().out


def test_one_healthy_machine(tmp_path, capsys):
  code, table = doctor(capsys, tmp_path / 'run', '--expect-devices', str(len(jax.devices())))
  assert code == 0, table
  assert 'ready for the run, in' in table and 'FAIL' not in table
  for check in examine.CODES:
    assert f'ok  {check} ' in table
  assert not list((tmp_path / 'run').iterdir())                       # it leaves nothing behind


@pytest.mark.parametrize('options, code, message', [
    (('--expect-devices', '4096'), 2, 'FAIL  devices'),
    (('--config.mesh.data=4096',), 2, 'mesh.data=4096 asks for 4096 devices'),
    (('--free-gb', '1e9'), 4, 'the run needs 1e+09 GB'),
    (('--config.data.vocab=/nowhere/x.model',), 3, "cannot read vocabulary '/nowhere/x.model'"),
    (('--config.data.vocab=t5lab_8192',), 3, 'rows and needs at least 8,192'),
    (('--config.data.mixture=ha_ened',), 3, "no task or mixture 'ha_ened'"),
    (('--config.data.split=dev',), 3, "has no split 'dev'"),
])
def test_faults_of_one_machine(tmp_path, capsys, monkeypatch, options, code, message):
  monkeypatch.setattr(examine, 'save_and_restore', lambda abstract, folder: '')   # takes seconds
  exit_code, table = doctor(capsys, tmp_path, *options)
  assert exit_code == code, table
  assert message in table and '1 check failed, in' in table


def test_a_workdir_that_is_a_file(tmp_path, capsys):
  (tmp_path / 'run').write_text('')
  code, table = doctor(capsys, tmp_path / 'run')
  assert code == 4
  assert 'host 0: cannot write to' in table and 'Not a directory' in table
  assert '-  save and restore' in table and 'skipped: the workdir is not usable' in table


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')   # of Orbax
def test_a_disk_that_is_full(mounted, capsys):
  disk = mounted('size=64k')
  code, table = doctor(capsys, disk)
  assert code == 4 and 'FAIL  disk' in table and 'GB free in' in table
  code, table = doctor(capsys, disk, '--free-gb', '1e-9')
  assert code == 4 and 'ok  disk' in table and 'FAIL  save and restore' in table
  assert any(text in table for text in ('No space left', 'RESOURCE_EXHAUSTED', 'cannot write'))
  assert not list(disk.iterdir())


def test_a_state_that_is_restored_with_other_values(tmp_path, monkeypatch):
  abstract = build.program(config.load(CONFIG)).abstract
  assert examine.save_and_restore(abstract, tmp_path / 'a') == ''
  restore = Checkpoints.restore

  def damaged_restore(self, abstract):
    state, manifest = restore(self, abstract)
    return state.replace(step=state.step + 1), manifest
  monkeypatch.setattr(Checkpoints, 'restore', damaged_restore)
  assert examine.save_and_restore(abstract, tmp_path / 'b') == (
      'step was restored with other values than were saved')
  assert not list(tmp_path.iterdir())


def test_scaled_down_keeps_paths_types_and_shardings():
  c = config.load(CONFIG, {'rules': 'fsdp_tp', 'mesh.data': '1', 'mesh.fsdp': '-1',
                           'mesh.model': '2'})
  abstract = build.program(c).abstract
  small = jax.tree.map(examine.scaled_down, abstract)
  for x, y in zip(jax.tree.leaves(abstract), jax.tree.leaves(small)):
    assert (x.dtype, x.sharding, len(x.shape)) == (y.dtype, y.sharding, len(y.shape))
    assert y.size <= x.size and np.prod(y.shape) <= 64
    y.sharding.shard_shape(y.shape)                                   # it divides


def test_the_hash_of_files_depends_on_their_content(tmp_path, monkeypatch):
  """All of the content of small files; of large ones the start, the middle and the end."""
  file = tmp_path / 'a.txt'
  file.write_bytes(bytes(1000))
  before = facts._hash_files([str(file)])
  file.write_bytes(bytes(999) + b'x')
  assert facts._hash_files([str(file)]) != before

  monkeypatch.setattr(facts, 'WHOLE', 500)
  monkeypatch.setattr(facts, 'SAMPLE', 10)
  hashes = set()
  for changed in (0, 500, 990, 300):
    content = bytearray(1000)
    content[changed] = 1
    file.write_bytes(content)
    hashes.add(facts._hash_files([str(file)]))
  file.write_bytes(bytes(1000))
  assert facts._hash_files([str(file)]) in hashes and len(hashes) == 4  # byte 300 is in no sample
  file.write_bytes(bytes(1001))
  assert facts._hash_files([str(file)]) not in hashes


def test_the_hash_of_a_cache_is_that_of_its_manifest(tmp_path):
  from t5lab.data.batches import cache
  folder = cache.folder(str(tmp_path), 'ha_ende', 'train')
  folder.mkdir(parents=True)
  c = config.load(CONFIG, {'data.cache': str(tmp_path)})
  reports = []
  for text in ('{}', '{"rows": 1}'):
    (folder / cache.MANIFEST).write_text(text)
    reports.append(facts.data_hashes(c))
  first, second = reports
  assert not first['error'] and first['vocabulary'] == second['vocabulary']
  differing = {name for name in first['tasks'] if first['tasks'][name] != second['tasks'][name]}
  assert differing == {'ha_ende, train: manifest of the cache'}


# --- facts of several hosts ----------------------------------------------------------------------


def data(vocabulary='v', error='', **tasks):
  return {'vocabulary': vocabulary, 'tasks': tasks, 'error': error}


@pytest.mark.parametrize('compare, arguments, expected', [
    ('versions', ([{'jax': '1', 'os': 'a'}, {'jax': '2'}, {'jax': '1', 'os': 'a'}],), {
        'versions': 'jax is 1 on hosts 0, 2, 2 on host 1; os is a on hosts 0, 2, absent on host 1: '
                    'install the same versions everywhere'}),
    ('clocks', ({'0': (0., 0.), '1': (-61., .1), '2': (7., 3.)},), {
        'clocks': 'the clock of host 1 is 61.0 s behind that of host 0, the limit is 5 s: start '
                  'NTP there'}),
    ('workdirs', ('/w', ['', 'cannot write to /w: disk full', ''], [[0, 2], [0, 2], [2]]), {
        'workdir': 'host 1: cannot write to /w: disk full; host 2 does not see the file in /w that '
                   'host 0 wrote: it is not the same folder on all hosts'}),
    ('data', ([data(a='1'), data(a='2')],), {'data': 'a: 1 on host 0, 2 on host 1'}),
    ('data', ([data(a='1'), data(error='no file')],), {'data': 'host 1: no file'}),
    ('data', ([data('v', a='1'), data('w', a='1')],), {
        'vocabulary': 'the vocabulary differs, its hash is v on host 0, w on host 1'}),
    ('data', ([data(a='1'), data('', 'cannot read')],), {
        'vocabulary': 'host 1: cannot read'}),
    ('data', ([data(a='1'), data(a='1')],), {}),
])
def test_differences_between_hosts_are_named(compare, arguments, expected):
  checks = examine.Examination(lambda check: None)
  getattr(examine, f'_compare_{compare}')(checks, *arguments)
  failures = {finding.check: finding.message for finding in checks.findings if not finding.ok}
  assert failures == expected
  assert checks.code == (examine.CODES[next(iter(expected))] if expected else 0)


# --- two processes -------------------------------------------------------------------------------


class Host:
  """One of two processes, with a current directory of its own."""

  def __init__(self, folder, index, port, options, **environment):
    folder.mkdir(exist_ok=True)
    added = local.environment(index, processes=2, devices=2, device='cpu', port=port,
                              given=environment)
    self._process = subprocess.Popen(
        [sys.executable, '-m', 't5lab', 'doctor', '--config', CONFIG, '--seconds', '280',
         *options], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache/jax')} | added)

  def wait(self) -> tuple[int, str, str]:
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
  """Runs both hosts -> [(exit code, stdout, stderr)] * 2.

  environment, and `second` instead of `options`: for host 1 only.
  """
  if '--workdir' not in options:
    options = (*options, '--workdir', str(tmp_path / 'run'))
  hosts = [Host(tmp_path / f'host{i}', i, port, second if i and second else options,
                **(environment if i else {})) for i in range(2)]
  return [host.wait() for host in hosts]


def expect(results, code, check, message):
  """Both hosts ended with `code`, and host 0 alone printed the table with the failed check."""
  (code0, table, _), (code1, output1, _) = results
  assert (code0, code1) == (code, code), results
  assert f'FAIL  {check}' in table and message in ' '.join(table.split()), table
  assert table.count('FAIL') == 1 and '1 check failed' in table
  assert not output1


@pytest.mark.slow
def test_two_healthy_hosts(tmp_path, port):
  (code0, table, err), (code1, output1, _) = two(tmp_path, port, ('--expect-devices', '4'))
  assert (code0, code1, output1) == (0, 0, ''), table + err
  assert '4 cpu devices, mesh data=4' in table and table.count('  ok  ') == len(examine.CODES)
  assert not list((tmp_path / 'run').iterdir())


@pytest.mark.slow
def test_too_few_devices(tmp_path, port):
  results = two(tmp_path, port, ('--expect-devices', '8'))
  expect(results, 2, 'devices', 'expected 8 devices, found 4: host 0 has 2, host 1 has 2')


@pytest.mark.slow
def test_a_package_of_another_version(tmp_path, port):
  other = tmp_path / 'site/flax-9.9.9.dist-info'
  other.mkdir(parents=True)
  (other / 'METADATA').write_text('Metadata-Version: 2.1\nName: flax\nVersion: 9.9.9\n')
  results = two(tmp_path, port, PYTHONPATH=str(tmp_path / 'site'))
  expect(results, 2, 'versions', 'on host 0, 9.9.9 on host 1: install the same versions everywhere')
  assert 'skipped: hosts with different versions' in results[0][1]


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
  results = two(tmp_path, port, options, second=(*options, '--config.optim.lr=7e-3'))
  expect(results, 2, 'versions', 'config is ')


@pytest.mark.slow
def test_a_coordinator_that_cannot_be_reached(tmp_path, port):
  code, _, err = Host(tmp_path / 'host1', 1, port,
                      ('--workdir', str(tmp_path), '--arrive', '2')).wait()
  assert code == 2 and err.count('\n') == 1
  assert (f'process 1 on {socket.gethostname()} cannot reach the coordinator at 127.0.0.1:{port}'
          in err)


@pytest.mark.slow
def test_a_host_that_does_not_connect(tmp_path, port):
  code, _, err = Host(tmp_path / 'host0', 0, port,
                      ('--workdir', str(tmp_path), '--arrive', '2')).wait()
  assert code == 2 and err.count('\n') == 1
  assert f'process 1 of 2 did not connect to 127.0.0.1:{port} within 2 s; connected: 0.' in err


@pytest.mark.slow
def test_a_clock_that_is_wrong(tmp_path, port):
  results = two(tmp_path, port, T5LAB_CLOCK_AHEAD='-61')
  expect(results, 70, 'clocks',
         'the clock of host 1 is 61.0 s behind that of host 0, the limit is 5 s')


@pytest.mark.slow
def test_a_workdir_that_is_not_shared(tmp_path, port):
  results = two(tmp_path, port, ('--workdir', 'run'))
  (code0, table, _), (code1, _, _) = results
  assert (code0, code1) == (4, 4) and 'host 1 does not see the file in' in table
  assert 'it is not the same folder on all hosts' in table


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written(tmp_path, port, mounted):
  disk = mounted('size=1m')
  subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
  results = two(tmp_path, port, ('--free-gb', '1e-9', '--workdir', str(disk)))
  expect(results, 4, 'workdir', 'Read-only file system; host 1: cannot write to')


@pytest.mark.slow
def test_a_disk_that_fills_while_two_save(tmp_path, port, mounted):
  """Process 0 notices, and process 1 does not wait for it for ever."""
  (code0, table, _), (code1, _, err) = two(tmp_path, port, (
      '--free-gb', '1e-9', '--workdir', str(mounted('size=64k'))))
  assert (code0, code1) == (4, 4), (table, err)
  assert 'FAIL  save and restore' in table or 'process 0 ended because process 1' in table


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
def test_a_host_that_hangs_ends_and_names_the_check(tmp_path, port):
  """Its data file is a FIFO that nobody writes to."""
  file = own_files(tmp_path)
  file.unlink()
  os.mkfifo(file)
  (code0, _, err0), (code1, _, err1) = two(tmp_path, port, (
      *OWN, '--seconds', '45', '--workdir', str(tmp_path / 'run')))
  assert code1 == 3 and 'the check of data has not ended within 45 s' in err1
  assert code0 in (2, 3) and ('process 1' in err0 or 'the check of data' in err0)


@pytest.mark.slow
def test_launched_on_two_processes(tmp_path, port):
  done = subprocess.run(
      [sys.executable, '-m', 't5lab', 'launch', '--platform', 'local', '--command', 'doctor',
       '--config', CONFIG, '--workdir', str(tmp_path), '--processes', '2',
       '--devices-per-process', '2', '--port', str(port), '--', '--seconds', '280'], cwd=ROOT,
      capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '[0]   ok  save and restore' in done.stdout and '4 cpu devices' in done.stdout
