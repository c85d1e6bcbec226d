"""Code, links and numbers that come with data are never run, followed or trusted (S1 to S8)."""

import json
import os
from pathlib import Path
import shutil
import stat
import struct
import subprocess
import sys
import zipfile

import numpy as np
import processes
from processes import Process, train_command
import pytest

from t5lab.errors import CheckpointError
from t5lab.runs import manifests
from t5lab.runs.checkpoint import Checkpoints
from t5lab.tools.interop import tensor_files

T5LAB = Path(sys.executable).with_name('t5lab')       # the installed program


@pytest.fixture
def run(reference, tmp_path):
  shutil.copytree(reference, tmp_path / 'run')
  return tmp_path / 'run'


# --- S2: links, pipes, devices -----------------------------------------------------------------


def test_devices_and_links_in_a_checkpoint(run, tmp_path):
  """S2. In place of the newest step's largest file: a reader would follow it or wait for it."""
  checkpoints = Checkpoints(run / 'checkpoints', log=lambda _: None)
  step = run / 'checkpoints' / 'step_00000030'
  victim = max((p for p in step.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  outside = tmp_path / 'outside'
  shutil.move(victim, outside)

  def device():
    try:
      os.mknod(victim, stat.S_IFCHR | 0o600, os.makedev(1, 5))      # /dev/zero never ends
    except PermissionError:
      pytest.skip('making a device node needs root')
  for plant in (lambda: victim.symlink_to(outside), lambda: os.link(outside, victim),
                lambda: os.mkfifo(victim), device):
    plant()
    with pytest.raises(CheckpointError, match='not a regular file|hard links') as e:
      checkpoints.verify(30)
    assert str(victim) in str(e.value)
    victim.unlink()
  device()
  output = processes.train(run)                                    # does not block; uses step 24
  assert 'not a regular file' in output and processes.resumed_from(output) == 24


# --- S3: names that lead elsewhere -------------------------------------------------------------


@pytest.mark.parametrize('name', ['../../secret.npy', '/tmp/secret.npy', 'a/../../b.npy'])
def test_names_in_a_zip(tmp_path, name):
  """S3. An .npz is read, never unpacked: no file appears."""
  folder = tmp_path / 'in' / 'deep'
  folder.mkdir(parents=True)
  np.savez(tmp_path / 'whole.npz', a=np.zeros(2, np.float32))
  array = zipfile.ZipFile(tmp_path / 'whole.npz').read('a.npy')
  (tmp_path / 'whole.npz').unlink()
  with zipfile.ZipFile(folder / 'w.npz', 'w') as z:
    z.writestr(name, array)
  before = sorted(tmp_path.rglob('*'))
  reader = tensor_files.open_hf(folder / 'w.npz')
  for array_name in reader.shapes():
    reader.read(array_name)
  assert sorted(tmp_path.rglob('*')) == before and not Path('/tmp/secret.npy').exists()


# --- S4: bombs, in a process whose memory is measured ------------------------------------------


MEASURE = """
import resource, sys
from t5lab.errors import Failure
from t5lab.tools.interop import tensor_files
from t5lab.runs import manifests, rundir
what, path = sys.argv[1:]
read = {'hf': lambda: tensor_files.open_hf(path), 'manifest': lambda: manifests.verify(path),
        'config': lambda: rundir.read_config(path)}[what]
def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
try:
  result = read()
  if what == 'hf':
    for name in result.shapes():
      result.read(name)
  print('accepted')
except Failure as e:
  print('refused:', str(e)[:300].replace(chr(10), ' '))
print('MB', peak() - before)
"""


def measure(what, path) -> tuple[str, float]:
  """Returns (the verdict, the growth of peak memory in MB)."""
  done = subprocess.run([sys.executable, '-c', MEASURE, what, str(path)], capture_output=True,
                        text=True, timeout=120, env=processes.environment())
  assert done.returncode == 0, done.stderr[-2000:]
  verdict, size = done.stdout.strip().splitlines()
  return verdict, float(size.split()[1])


def header(tensors: str, tail: bytes = b'') -> bytes:
  text = tensors.encode()
  return struct.pack('<Q', len(text)) + text + tail


LEAF = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
BOMBS = {
    'nested lists': lambda: header('[' * 20_000_000),
    'nested objects': lambda: header('{"a":' * 10_000_000),
    'one long number': lambda: header('{"a":' + '9' * 50_000_000 + '}'),
    'a shape of 2^40': lambda: header(json.dumps(
        {'a': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}})),
    'a rank of a million': lambda: header(json.dumps(
        {'a': {'dtype': 'F32', 'shape': [1] * 10**6, 'data_offsets': [0, 4]}}), bytes(4)),
    'a million leaves': lambda: header('{' + ','.join(map(LEAF.format, range(10**6))) + '}'),
    'a header of 2^60': lambda: struct.pack('<Q', 2**60) + b'{}',
}


@pytest.mark.parametrize('bomb', BOMBS)
def test_bombs_in_safetensors(tmp_path, bomb, record):
  """S4. Refused, with less than 100 MB."""
  (tmp_path / 'model.safetensors').write_bytes(BOMBS[bomb]())
  verdict, size = measure('hf', tmp_path)
  record('bomb_megabytes', round(size))
  assert verdict.startswith('refused'), verdict
  assert size < 100, f'{size:.0f} MB for {bomb}'


@pytest.mark.parametrize('bomb', ['nested', 'wide', 'a million leaves', 'a shape of 2^40'])
def test_bombs_in_a_manifest(run, bomb, record):
  """S4. A forged manifest with a valid checksum."""
  step = run / 'checkpoints' / 'step_00000030'
  path = step / 'MANIFEST.json'
  body = json.loads(path.read_text())['manifest']
  if bomb == 'a million leaves':
    body['leaves'] = {f'params/{i}': [[1], 'float32'] for i in range(10**6)}
    path.write_text(manifests._dump(body))
  elif bomb == 'a shape of 2^40':
    body['leaves'] = {k: [[2**40, *shape], dtype] for k, (shape, dtype) in body['leaves'].items()}
    path.write_text(manifests._dump(body))
  else:
    path.write_text({'nested': '[' * 4_000_000,
                     'wide': '{"manifest": [' + '{},' * 1_300_000 + '0]}'}[bomb])
  if bomb == 'a shape of 2^40':
    # The manifest is valid: the shape is compared with the model's before an array is read.
    with Process(['eval', '--workdir', run], run.parent / 'log') as p:
      assert p.wait() == 4, p.output()
    assert 'float32[1099511627776,' in p.output() and 'holds another model' in p.output()
    return
  verdict, size = measure('manifest', step)
  record('bomb_megabytes', round(size))
  assert verdict.startswith('refused') and str(path) in verdict, verdict
  assert size < 100, f'{size:.0f} MB for {bomb}'


@pytest.mark.parametrize('text', ['[' * 900_000, '{"a":' * 200_000, ' ' * (1 << 24)])
def test_bombs_in_a_config(tmp_path, text):
  """S4."""
  (tmp_path / 'config.json').write_text(text)
  verdict, size = measure('config', tmp_path)
  assert verdict.startswith('refused') and size < 100, (verdict, size)


# --- S5: code beside the data ------------------------------------------------------------------


# Names that some module might import, or that a run's config might have.
PLANTED = ('sitecustomize', 'usercustomize', 'json', 'numpy', 'jax', 'tensorflow', 'config',
           't5lab', 'get_config', 'tasks', 'planted', 'conftest', '__init__', 'setup', 'tokenizer',
           'modeling')


def test_planted_code_is_not_run(run, tmp_path):
  """S5. In the folders of a run and in the current directory, by any command."""
  canary = tmp_path / 'ran'
  canary.mkdir()
  folders = [run, run / 'checkpoints', run / 'checkpoints' / 'step_00000024' / 'state',
             run / 'eval', run / 'vocabulary']
  for folder in folders:
    folder.mkdir(exist_ok=True)
    for name in PLANTED:
      (folder / f'{name}.py').write_text(f'open({str(canary / name)!r}, "w").close()\n')
    (folder / 'planted.pth').write_text(f'import os; open({str(canary / "pth")!r}, "w")\n')
  c = json.loads((run / 'config.json').read_text())
  c['data']['modules'] = ['planted']                   # in a config that a stranger wrote
  (run / 'config.json').write_text(json.dumps(c))
  rows = tmp_path / 'rows.txt'
  rows.write_text('Turn on the light\n')
  results = {}
  for i, argv in enumerate((
      ['eval', '--workdir', '.', '--step', '30'],
      ['infer', '--workdir', '.', '--input', rows, '--output', tmp_path / 'out.txt'],
      ['convert', '--from', 't5lab', '--to', 'hf', '.', tmp_path / 'hf'],
      train_command('.'),
      ['inspect', '--config', processes.QUICKSTART, '--html', tmp_path / 'page.html'])):
    # The installed program, in the run's folder, without our PYTHONPATH.
    with Process(argv, tmp_path / f'log{i}', program=(str(T5LAB),), cwd=run, PYTHONPATH='') as p:
      code = p.wait()
    results[argv[0]] = (code, p.output())
    assert not list(canary.iterdir()), f'{argv[0]} ran {[p.name for p in canary.iterdir()]}'
  assert all(results[name][0] == 0 for name in ('eval', 'infer', 'convert')), results
  code, output = results['train']
  assert code == 2 and 'data.modules' in output                           # another experiment
  done = subprocess.run([sys.executable, '-c', 'import planted'], cwd=run)
  assert done.returncode == 0 and list(canary.iterdir())                  # the test can fail


# --- S6: folders that others can write to ------------------------------------------------------


COMPILE = """
from t5lab.commands import use_compilation_cache
use_compilation_cache()                           # as every command does before it compiles
import jax
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
"""


def test_a_compile_cache_that_others_can_write_is_not_used(tmp_path):
  """S6. Its files are executed."""
  home = tmp_path / 'home'
  folder = home / 't5lab' / 'jax'
  folder.mkdir(parents=True)
  for mode, used in ((0o777, False), (0o770, False), (0o700, True)):
    folder.chmod(mode)
    done = subprocess.run(
        [sys.executable, '-c', COMPILE], capture_output=True, text=True, timeout=120,
        env=processes.environment(XDG_CACHE_HOME=str(home), JAX_COMPILATION_CACHE_DIR='',
                                  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0'))
    assert done.returncode == 0, done.stderr
    assert bool(list(folder.iterdir())) == used, oct(mode)


def test_checkpoints_that_others_can_write_give_a_warning(run):
  """S6. In training and in reading; a folder that only its owner can write gives none."""
  rows = run.parent / 'rows.txt'
  rows.write_text('Turn on the light\n')
  (run / 'checkpoints').chmod(0o777)
  for argv in (train_command(run), ['eval', '--workdir', run],
               ['infer', '--workdir', run, '--input', rows, '--output', run.parent / 'out']):
    with Process(argv, run.parent / 'log') as p:
      assert p.wait() == 0, p.output()
    lines = [line for line in p.output().splitlines() if 'can write to' in line]
    assert len(lines) == 1 and f'{run}/checkpoints' in lines[0] and 'chmod' in lines[0], p.output()
  (run / 'checkpoints').chmod(0o755)
  with Process(['eval', '--workdir', run], run.parent / 'log') as p:
    assert p.wait() == 0 and 'can write to' not in p.output()


# --- S8: secrets of the environment ------------------------------------------------------------


def test_nothing_of_the_environment_is_written(tmp_path):
  """S8. Neither by runs, one of which fails with --debug, nor by commands that read them."""
  secrets = {'HF_TOKEN': 'hf_5Kd0secretA', 'WANDB_API_KEY': 'wb-7secretB',
             'T5LAB_OWN': 'own-9secretC', 'GOOGLE_APPLICATION_CREDENTIALS': '/no/key-3secretD'}
  run, rows = tmp_path / 'run', tmp_path / 'rows.txt'
  rows.write_text('Turn on the light\n')
  small = {'total_steps': 2, 'checkpoint.every': 1, 'eval.examples': 2}
  diverging = {**small, 'total_steps': 1000, 'optim.lr': 1e30, 'optim.schedule': 'constant',
               'optim.warmup': 0}
  for i, (argv, code) in enumerate((
      (train_command(run, small), 0),
      (train_command(tmp_path / 'bad', diverging, '--debug'), 1),
      (['eval', '--workdir', run], 0),
      (['infer', '--workdir', run, '--input', rows, '--output', tmp_path / 'out'], 0),
      (['convert', '--from', 't5lab', '--to', 'hf', run, tmp_path / 'hf'], 0))):
    with Process(argv, tmp_path / f'log{i}', **secrets) as p:
      assert p.wait() == code, p.output()
  n_files = 0
  for path in tmp_path.rglob('*'):
    if path.is_file():
      data = path.read_bytes()
      n_files += 1
      for name, value in secrets.items():
        assert value.encode() not in data, f'{name} is in {path}'
        assert name.encode() not in data, f'{name} is in {path}'
  assert n_files > 30 and (tmp_path / 'run/checkpoints/step_00000002/MANIFEST.json').exists()
