"""Runs that resume on another mesh (F13), and meshes that do not fit (F14)."""

import shutil

import jax
import numpy as np
import processes
from processes import QUICKSTART, STEPS, Process, R, train_command
import pytest

from t5lab import config, trees
from t5lab.programs import build
from t5lab.runs.checkpoint import Checkpoints

START = 12
# name: (devices, overrides). R ran on one device with rules 'dp'.
MESHES = {
    'data2': (2, {'mesh.data': 2}),
    'model2': (2, {'mesh.data': 1, 'mesh.model': 2, 'rules': 'tp'}),
    'data4': (4, {'mesh.data': 4}),
    'data2_model2': (4, {'mesh.data': 2, 'mesh.model': 2, 'rules': 'tp'}),
    'fsdp4': (4, {'mesh.data': 1, 'mesh.fsdp': 4, 'rules': 'fsdp'}),
}


def from_step(reference, workdir, step: int = START):
  """Copies R as it was when `step` was its newest checkpoint."""
  shutil.copytree(reference, workdir)
  for path in (workdir / 'checkpoints').glob('step_*'):
    if int(path.name[5:]) > step:
      shutil.rmtree(path)


def relative_errors(workdir, reference) -> np.ndarray:
  """float[18]: the relative errors of the losses after START."""
  ours, theirs = (np.array([float.fromhex(loss) for _, loss in processes.losses(w)])
                  for w in (workdir, reference))
  assert len(ours) == len(theirs) == STEPS
  return (np.abs(ours - theirs) / np.abs(theirs))[START:]


@pytest.mark.parametrize('name', MESHES)
def test_the_restored_state_is_bit_equal(reference, name):
  """F13. Parameters, optimizer state and average, restored into the shards of another mesh."""
  devices, overrides = MESHES[name]
  c = config.load(QUICKSTART, {k: str(v) for k, v in {**R, **overrides}.items()})
  abstract = build.program(c, jax.devices()[:devices]).abstract
  state, manifest = Checkpoints(reference / 'checkpoints').restore(abstract, START)
  assert manifest.step == START
  expected, n_sharded = processes.arrays(reference, START), 0
  restored = trees.flatten(state)
  assert restored.keys() == expected.keys()
  for path, x in restored.items():
    assert len(x.sharding.device_set) == devices
    n_sharded += not x.sharding.is_fully_replicated
    assert x.dtype == expected[path].dtype
    assert np.asarray(x).tobytes() == expected[path].tobytes(), path
  assert n_sharded or name in ('data2', 'data4')       # otherwise nothing was tested


@pytest.mark.parametrize('name', MESHES)
def test_the_run_continues_as_on_the_old_mesh(reference, tmp_path, record, name):
  """F13. The next loss agrees within a relative 1e-6, the last one within 1e-4."""
  devices, overrides = MESHES[name]
  workdir = tmp_path / 'run'
  from_step(reference, workdir)
  output = processes.train(workdir, {**R, **overrides}, devices=devices)
  assert processes.resumed_from(output) == START
  assert f'on {devices} cpu devices' in output
  errors = relative_errors(workdir, reference)
  record('next_loss_off', f'{errors[0]:.1e}')
  record('final_loss_off', f'{errors[-1]:.1e}')
  assert errors[0] <= 1e-6 and errors[-1] <= 1e-4, errors


def test_from_one_to_two_to_four_devices_and_back(reference, tmp_path, record):
  """F13. 1 until step 12, then 2 until 18, then 2 x 2 until 24, then 1."""
  workdir = tmp_path / 'run'
  from_step(reference, workdir)
  for step, name in ((18, 'data2'), (24, 'data2_model2')):
    devices, overrides = MESHES[name]
    with Process(train_command(workdir, {**R, **overrides}), tmp_path / name, devices=devices,
                 T5LAB_FAILPOINT=f'after_rename@{step}') as p:
      assert p.wait() == -9, p.output()
    assert processes.committed(workdir)[-1] == step
  output = processes.train(workdir)
  assert processes.resumed_from(output) == 24
  errors = relative_errors(workdir, reference)
  record('final_loss_off', f'{errors[-1]:.1e}')
  assert errors[0] <= 1e-6 and errors[-1] <= 1e-4, errors


@pytest.mark.parametrize('devices, overrides, numbers', [
    (2, {'mesh.data': 8}, ('mesh.data=8', '8 devices', 'has 2')),
    (4, {'data.batch_size': 10}, ('data.batch_size = 10', '4 devices', '8 and 12')),
    (4, {'mesh.data': 1, 'mesh.model': 4, 'rules': 'tp'}, ('2 heads', 'mesh.model=4')),
])
def test_a_mesh_that_does_not_fit(tmp_path, devices, overrides, numbers):
  """F14. Exit 2 with both numbers before anything is compiled."""
  with Process(train_command(tmp_path / 'run', overrides), tmp_path / 'log', devices=devices,
               JAX_LOG_COMPILES='1') as p:
    assert p.wait() == 2, p.output()
  last = p.output().splitlines()[-1]
  assert last.startswith('t5lab: ') and all(number in last for number in numbers), last
  assert 'Compiling' not in p.output() and 'Finished' not in p.output()
  assert not list((tmp_path / 'run').glob('checkpoints/*'))


def test_compilation_would_be_seen(tmp_path):
  """The previous test can fail: a mesh that fits logs its compilations."""
  with Process(train_command(tmp_path / 'run', {'total_steps': 2, 'eval.examples': 1}),
               tmp_path / 'log', JAX_LOG_COMPILES='1') as p:
    assert p.wait() == 0, p.output()
  assert 'Compiling' in p.output()
