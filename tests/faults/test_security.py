"""What comes with data is never run, followed or believed (S1 to S8)."""

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

T5LAB = Path(sys.executable).with_name('t5lab')       # the installed program, as a person calls it


@pytest.fixture
def run(reference, tmp_path):
  shutil.copytree(reference, tmp_path / 'run')
  return tmp_path / 'run'


# -- S2: what is no file of ours ------------------------------------------------------------------


def test_devices_and_links_in_a_checkpoint(run, tmp_path):
  """S2. The largest file of the newest step replaced by what a reader would follow or wait for."""
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
  output = processes.train(run)                                    # does not block; falls back
  assert 'not a regular file' in output and processes.resumed_from(output) == 24


# -- S3: names that lead elsewhere ----------------------------------------------------------------


@pytest.mark.parametrize('name', ['../../secret.npy', '/tmp/secret.npy', 'a/../../b.npy'])
def test_names_in_a_zip(tmp_path, name):
  """S3. An .npz is read by its directory, never unpacked: nothing appears beside it."""
  folder = tmp_path / 'in' / 'deep'
  folder.mkdir(parents=True)
  np.savez(tmp_path / 'whole.npz', a=np.zeros(2, np.float32))
  array = zipfile.ZipFile(tmp_path / 'whole.npz').read('a.npy')
  (tmp_path / 'whole.npz').unlink()
  with zipfile.ZipFile(folder / 'w.npz', 'w') as z:
    z.writestr(name, array)
  before = sorted(tmp_path.rglob('*'))
  reader = tensor_files.open_hf(folder / 'w.npz')
  for found in reader.shapes():
    reader.read(found)
  assert sorted(tmp_path.rglob('*')) == before and not Path('/tmp/secret.npy').exists()


# -- S4: bombs, in a process whose memory is measured ---------------------------------------------


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
  found = read()
  if what == 'hf':
    for name in found.shapes():
      found.read(name)
  print('accepted')
except Failure as e:
  print('refused:', str(e)[:300].replace(chr(10), ' '))
print('MB', peak() - before)
"""


def measured(what, path) -> tuple[str, float]:
  """(what was said, MB that the peak of memory grew by)."""
  done = subprocess.run([sys.executable, '-c', MEASURE, what, str(path)], capture_output=True,
                        text=True, timeout=120, env=processes.environment())
  assert done.returncode == 0, done.stderr[-2000:]
  said, size = done.stdout.strip().splitlines()
  return said, float(size.split()[1])


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
  said, size = measured('hf', tmp_path)
  record('bomb_megabytes', round(size))
  assert said.startswith('refused'), said
  assert size < 100, f'{size:.0f} MB for {bomb}'


@pytest.mark.parametrize('bomb', ['nested', 'wide', 'a million leaves', 'a shape of 2^40'])
def test_bombs_in_a_manifest(run, bomb, record):
  """S4. A forged manifest, its checksum right."""
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
    # the manifest is whole: the shape is compared with the model's before an array is opened
    with Process(['eval', '--workdir', run], run.parent / 'said') as p:
      assert p.wait() == 4, p.output()
    assert 'float32[1099511627776,' in p.output() and 'holds another model' in p.output()
    return
  said, size = measured('manifest', step)
  record('bomb_megabytes', round(size))
  assert said.startswith('refused') and str(path) in said, said
  assert size < 100, f'{size:.0f} MB for {bomb}'


@pytest.mark.parametrize('text', ['[' * 900_000, '{"a":' * 200_000, ' ' * (1 << 24)])
def test_bombs_in_a_config(tmp_path, text):
  """S4."""
  (tmp_path / 'config.json').write_text(text)
  said, size = measured('config', tmp_path)
  assert said.startswith('refused') and size < 100, (said, size)


# -- S5: code that lies about ---------------------------------------------------------------------


# names that something might import, or that a config of a run could be
PLANTED = ('sitecustomize', 'usercustomize', 'json', 'numpy', 'jax', 'tensorflow', 'config',
           't5lab', 'get_config', 'tasks', 'planted', 'conftest', '__init__', 'setup', 'tokenizer',
           'modeling')


def test_planted_code_is_not_run(run, tmp_path):
  """S5. In a run's folder, in its checkpoints and where the command is given; by every command."""
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
  c['data']['modules'] = ['planted']                   # what a stranger would like to have run
  (run / 'config.json').write_text(json.dumps(c))
  rows = tmp_path / 'rows.txt'
  rows.write_text('Turn on the light\n')
  said = {}
  for i, argv in enumerate((
      ['eval', '--workdir', '.', '--step', '30'],
      ['infer', '--workdir', '.', '--input', rows, '--output', tmp_path / 'out.txt'],
      ['convert', '--from', 't5lab', '--to', 'hf', '.', tmp_path / 'hf'],
      train_command('.'),
      ['inspect', '--config', processes.QUICKSTART, '--html', tmp_path / 'page.html'])):
    # the installed program, in the run's own folder, without our PYTHONPATH
    with Process(argv, tmp_path / f'said{i}', program=(str(T5LAB),), cwd=run, PYTHONPATH='') as p:
      code = p.wait()
    said[argv[0]] = (code, p.output())
    assert not list(canary.iterdir()), f'{argv[0]} ran {[p.name for p in canary.iterdir()]}'
  assert said['eval'][0] == said['infer'][0] == said['convert'][0] == 0, said
  assert said['train'][0] == 2 and 'data.modules' in said['train'][1]     # another experiment
  done = subprocess.run([sys.executable, '-c', 'import planted'], cwd=run)
  assert done.returncode == 0 and list(canary.iterdir())                  # the canary sings


# -- S6: folders that others may write ------------------------------------------------------------


COMPILE = """
from t5lab.commands import use_compilation_cache
use_compilation_cache()                           # as each command does before it compiles
import jax
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
"""


def test_a_compile_cache_that_others_may_write_is_not_used(tmp_path):
  """S6. Whoever writes there runs code here."""
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


def test_checkpoints_that_others_may_write_are_warned_of(run):
  """S6. By what trains and by what reads; a folder of the owner's own says nothing."""
  rows = run.parent / 'rows.txt'
  rows.write_text('Turn on the light\n')
  (run / 'checkpoints').chmod(0o777)
  for argv in (train_command(run), ['eval', '--workdir', run],
               ['infer', '--workdir', run, '--input', rows, '--output', run.parent / 'out']):
    with Process(argv, run.parent / 'said') as p:
      assert p.wait() == 0, p.output()
    lines = [line for line in p.output().splitlines() if 'may write' in line]
    assert len(lines) == 1 and f'{run}/checkpoints' in lines[0] and 'chmod' in lines[0], p.output()
  (run / 'checkpoints').chmod(0o755)
  with Process(['eval', '--workdir', run], run.parent / 'said') as p:
    assert p.wait() == 0 and 'may write' not in p.output()


# -- S8: secrets of the environment ---------------------------------------------------------------


def test_nothing_of_the_environment_is_written(tmp_path):
  """S8. By runs, one of which fails with --debug, and by what reads them: in no byte."""
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
    with Process(argv, tmp_path / f'said{i}', **secrets) as p:
      assert p.wait() == code, p.output()
  looked = 0
  for path in tmp_path.rglob('*'):
    if path.is_file():
      data = path.read_bytes()
      looked += 1
      for name, value in secrets.items():
        assert value.encode() not in data, f'{name} is in {path}'
        assert name.encode() not in data, f'{name} is in {path}'
  assert looked > 30 and (tmp_path / 'run/checkpoints/step_00000002/MANIFEST.json').exists()
