"""Checkpoints that are killed, damaged or forged (F2 to F8, F24, S2 to S4), and round trips."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5lab import trees
from t5lab.errors import CheckpointError, NumericalError
from t5lab.runs import checkpoint, manifests


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  opt_state: Any
  ema: Any


def make(seed=0, tx=None, ema=True, width=8):
  """A state in which every array depends on `seed`, so that no two steps are equal."""
  tx = tx or optax.adamw(1e-3)
  rng = np.random.default_rng(seed)
  params = {'embed': jnp.asarray(rng.normal(size=(6, width)), jnp.float32),
            'block': {'w': jnp.asarray(rng.normal(size=(width, 4)), jnp.bfloat16)}}
  grads = jax.tree.map(lambda x: x * 0.5, params)
  _, opt_state = tx.update(grads, tx.init(params), params)
  ema = jax.tree.map(lambda x: x.astype(jnp.float32) * 0.9, params) if ema else {}
  return State(jnp.int32(seed), params, opt_state, ema)


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def digest(tree):
  h = hashlib.sha256()
  for path, x in trees.flatten(tree).items():
    h.update(f'{path} {x.dtype} {x.shape} '.encode() + np.asarray(x).tobytes())
  return h.hexdigest()


def write(directory, *steps, **options):
  saver = checkpoint.Checkpoints(directory, **options)
  for step in steps:
    saver.save(step, make(step), meta={'data': {'position': step}})
    saver.wait()
  return saver


@pytest.fixture(scope='session')
def two_steps(tmp_path_factory):
  directory = tmp_path_factory.mktemp('two_steps')
  write(directory, 10, 20)
  return directory


@pytest.fixture
def copy(two_steps, tmp_path):
  shutil.copytree(two_steps, tmp_path / 'c')
  return tmp_path / 'c'


def step_files(directory, step=20):
  root = directory / f'step_{step:08d}'
  return sorted(p for p in root.rglob('*') if p.is_file())


def forge(directory, change, step=20):
  """Changes a manifest and its checksum, as an attacker would."""
  path = directory / f'step_{step:08d}' / 'MANIFEST.json'
  body = json.loads(path.read_text())['manifest']
  change(body)
  path.write_text(manifests._dump(body))


# --- round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize('tx', [
    optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=4, momentum=0.9)],
    ids=['adamw', 'adafactor'])
def test_round_trip_is_bit_equal(tmp_path, tx, ema):
  state = make(3, tx, ema)
  saver = checkpoint.Checkpoints(tmp_path / 'c')
  assert saver.save(3, state, meta={'git': 'abc', 'data': {'position': 7}}, metrics={'loss': 0.1})
  saver.wait()
  restored, manifest = saver.restore(abstract(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert digest(restored) == digest(state)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
  assert manifest.step == 3 and manifest.meta == {'git': 'abc', 'data': {'position': 7}}
  assert manifest.metrics == {'loss': 0.1}
  assert manifest.leaves['params/block/w'] == ((8, 4), 'bfloat16')
  assert any(path.startswith('ema/') for path in manifest.leaves) == ema
  assert os.listdir(tmp_path / 'c') == ['step_00000003']


def test_caller_may_donate_the_state_at_once(tmp_path):
  state = make(1, width=4096)
  before, shapes = digest(state), abstract(state)
  saver = checkpoint.Checkpoints(tmp_path)
  saver.save(1, state, meta={})
  bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  for _ in range(3):
    state = bump(state)
  jax.block_until_ready(state)
  saver.wait()
  assert digest(saver.restore(shapes)[0]) == before


def test_restores_to_another_sharding(two_steps):
  mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P('data'))
  shapes = abstract(make())
  shapes = shapes.replace(params=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes.params))
  restored, _ = checkpoint.Checkpoints(two_steps).restore(shapes)
  assert restored.params['embed'].sharding == sharding
  assert digest(restored) == digest(make(20))


def test_only_reads_nothing_else(copy):
  """Inference ignores damage in the optimizer's arrays, and notices damage in params."""
  reader = checkpoint.Checkpoints(copy)
  for path in (copy / 'step_00000020/state/opt_state').rglob('d/*'):
    path.write_bytes(bytes(path.stat().st_size))
  restored, _ = reader.restore(abstract(make()), only=('params', 'ema'))
  assert sorted(restored) == ['ema', 'params']
  assert digest(restored['params']) == digest(make(20).params)
  shapes = {'params': jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make().params)}
  restored, _ = reader.restore(shapes, 20, only=('params',))
  assert type(restored['params']['embed']) is np.ndarray
  with pytest.raises(CheckpointError, match='opt_state'):
    reader.restore(abstract(make()), 20)
  for path in (copy / 'step_00000020/state/params').rglob('d/*'):
    path.write_bytes(bytes(path.stat().st_size))
  assert reader.restore(abstract(make()), only=('params',))[1].step == 10


def test_nothing_saved_is_none(tmp_path):
  assert checkpoint.Checkpoints(tmp_path / 'none').restore(abstract(make())) is None


def test_an_unknown_step_lists_the_available_ones(two_steps):
  reader = checkpoint.Checkpoints(two_steps)
  with pytest.raises(CheckpointError, match='no checkpoint of step 15 .*; available steps: 10, 20'):
    reader.restore(abstract(make()), 15)
  assert digest(reader.restore(abstract(make()), 10)[0]) == digest(make(10))


def test_saving_a_step_twice_keeps_the_first(tmp_path):
  lines = []
  saver = write(tmp_path, 10, log=lines.append)
  assert saver.save(10, make(99), meta={}) is False
  assert digest(saver.restore(abstract(make()))[0]) == digest(make(10))
  assert lines == ['checkpoint of step 10 exists already, not written again']


# --- keep-N and best ---------------------------------------------------------------------------


def test_keeps_the_newest_and_the_best(tmp_path):
  saver = checkpoint.Checkpoints(tmp_path, keep=2, best_metric='bleu')
  for step, bleu in enumerate([1., 9., 3., float('nan'), 2., 4.]):
    saver.save(step, make(step), meta={}, metrics={'bleu': bleu})
  saver.wait()
  assert saver.steps() == [1, 4, 5] and saver.best_step() == 1
  saver = checkpoint.Checkpoints(tmp_path, keep=2, best_metric='bleu', best_mode='min')
  assert saver.best_step() == 4
  assert checkpoint.Checkpoints(tmp_path, best_metric='absent').best_step() is None


def test_an_annotated_metric_decides_and_the_step_stays_valid(tmp_path):
  saver = checkpoint.Checkpoints(tmp_path, keep=1, best_metric='bleu')
  for step, bleu in [(1, 5.), (2, 7.), (3, 6.), (4, 1.)]:
    saver.save(step, make(step), meta={}, metrics={'loss': 2.})
    saver.annotate(step, {'bleu': bleu})
  saver.wait()
  assert saver.steps() == [2, 4] and saver.best_step() == 2
  assert saver.verify(2).step == 2
  assert saver.manifest(2).metrics == {'loss': 2., 'bleu': 7.}
  assert sorted(json.loads((tmp_path / 'annotations.json').read_text())) == ['2', '4']
  with pytest.raises(CheckpointError, match='no checkpoint of step 3'):
    saver.annotate(3, {'bleu': 1.})


def test_damaged_steps_do_not_push_out_the_last_good_one(tmp_path):
  saver = write(tmp_path, 1, 2, 3, keep=0)
  for step in (2, 3):
    (tmp_path / f'step_{step:08d}' / 'state/params/_METADATA').unlink()
  saver = write(tmp_path, 4, keep=2)
  assert saver.steps() == [1, 2, 3, 4]  # 2 and 3 are left for quarantine


def test_clean_removes_only_killed_saves(copy):
  for name in ('step_00000030.tmp-0123abcd', 'step_00000005.tmp-pruned'):
    (copy / name / 'state').mkdir(parents=True)
  (copy / 'step_00000001.corrupt').mkdir()
  (copy / 'notes').write_text('x')
  saver = checkpoint.Checkpoints(copy)
  assert sorted(saver.clean()) == ['step_00000005.tmp-pruned', 'step_00000030.tmp-0123abcd']
  assert sorted(os.listdir(copy)) == ['notes', 'step_00000001.corrupt', 'step_00000010',
                                      'step_00000020']


# --- damage (F4 to F7) -------------------------------------------------------------------------


def test_100_flipped_bits_are_all_detected(copy):
  rng = random.Random(0)
  reader = checkpoint.Checkpoints(copy)
  paths = step_files(copy)
  silent = []
  for trial in range(100):
    path = paths[trial % len(paths)]  # every file in turn
    data = path.read_bytes()
    position, bit = rng.randrange(len(data)), rng.randrange(8)
    flipped = bytearray(data)
    flipped[position] ^= 1 << bit
    path.write_bytes(flipped)
    try:
      reader.verify(20)
      silent.append((path.name, position, bit))
    except CheckpointError:
      pass
    path.write_bytes(data)
  assert not silent
  assert reader.verify(20).step == 20


@pytest.mark.parametrize('damage', ['truncate', 'empty', 'delete', 'extra'])
def test_any_damaged_file_is_named_and_the_older_step_used(copy, damage):
  reader = checkpoint.Checkpoints(copy)
  for path in step_files(copy):
    data = path.read_bytes()
    if damage == 'delete':
      path.unlink()
    elif damage == 'extra':
      path.with_name('planted').write_bytes(b'x')
    else:
      path.write_bytes(data[:len(data) // 2 if damage == 'truncate' else 0])
    named = path.with_name('planted') if damage == 'extra' else path
    with pytest.raises(CheckpointError) as e:
      reader.verify(20, full=False)
    assert str(named) in str(e.value) and '\n' not in str(e.value)
    path.write_bytes(data)
    path.with_name('planted').unlink(missing_ok=True)
  assert reader.verify(20).step == 20


def test_falls_back_and_quarantines(copy):
  lines = []
  saver = checkpoint.Checkpoints(copy, log=lines.append)
  big = max(step_files(copy), key=lambda p: p.stat().st_size)
  big.write_bytes(big.read_bytes()[:-1])
  restored, manifest = saver.restore(abstract(make()))  # a reader does not rename it
  assert manifest.step == 10 and saver.steps() == [10, 20] and len(lines) == 1
  restored, manifest = saver.restore(abstract(make()), quarantine=True)
  assert manifest.step == 10 and digest(restored) == digest(make(10))
  assert sorted(os.listdir(copy)) == ['step_00000010', 'step_00000020.corrupt']
  assert len(lines) == 2 and 'step 20' in lines[1] and str(big) in lines[1]
  saver.save(20, make(20), meta={})  # the run reaches 20 again
  saver.wait()
  assert digest(saver.restore(abstract(make()))[0]) == digest(make(20))


@pytest.mark.parametrize('quarantine', [False, True])
def test_all_damaged_never_starts_from_scratch(copy, quarantine):
  saver = checkpoint.Checkpoints(copy)
  for step in (10, 20):
    step_files(copy, step)[-1].write_bytes(b'')
  for _ in range(2):  # the second start sees only the steps that the first one renamed
    with pytest.raises(CheckpointError, match='not starting from scratch') as e:
      saver.restore(abstract(make()), quarantine=quarantine)
    assert e.value.code == 4


def test_an_unreadable_step_is_not_called_damaged(copy, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, 'Permission denied', 'x')
  monkeypatch.setattr(manifests, 'read', refuse)
  with pytest.raises(CheckpointError, match='cannot read x: Permission denied'):
    checkpoint.Checkpoints(copy).restore(abstract(make()), quarantine=True)
  assert sorted(os.listdir(copy)) == ['step_00000010', 'step_00000020']


def test_damaged_annotations_are_ignored(copy):
  (copy / 'annotations.json').write_text('{"20": ')
  lines = []
  assert checkpoint.Checkpoints(copy, log=lines.append).manifest(20).metrics == {}
  assert len(lines) == 1


# --- another model (F24) -----------------------------------------------------------------------


def test_differences_list_paths_shapes_and_dtypes(two_steps):
  reader = checkpoint.Checkpoints(two_steps)
  state = make(width=12)
  with pytest.raises(CheckpointError) as e:
    reader.restore(abstract(state))
  text = str(e.value)
  assert e.value.code == 4
  assert 'params/embed: float32[6,12] in the model, float32[6,8] in the checkpoint' in text
  state = make()
  half = state.replace(params=state.params | {'embed': state.params['embed'].astype(jnp.float16)})
  with pytest.raises(CheckpointError, match=r'params/embed: float16\[6,8\] in the model, float32'):
    reader.restore(abstract(half))
  floats = state.replace(step=jnp.float32(3))
  with pytest.raises(CheckpointError, match=r'step: float32\[\] in the model, int32\[\]'):
    reader.restore(abstract(floats))
  with pytest.raises(CheckpointError, match=r'ema/embed: absent in the model, float32\[6,8\]'):
    reader.restore(abstract(make(ema=False)))
  more = state.replace(params=state.params | {f'x{i:02}': jnp.ones(i) for i in range(15)})
  with pytest.raises(CheckpointError) as e:
    reader.restore(abstract(more), quarantine=True)
  text = str(e.value)
  assert 'params/x09: float32[9] in the model, absent in the checkpoint' in text
  assert 'x10' not in text and '… and 5 more' in text
  assert reader.steps() == [10, 20]


# --- forgery (S2 to S4) ------------------------------------------------------------------------


def test_links_pipes_and_second_names_are_refused(copy, tmp_path):
  reader = checkpoint.Checkpoints(copy)
  path = max(step_files(copy), key=lambda p: p.stat().st_size)
  outside = tmp_path / 'outside'
  shutil.move(path, outside)
  for plant in (lambda: path.symlink_to(outside), lambda: os.link(outside, path),
                lambda: os.mkfifo(path), lambda: path.mkdir()):
    plant()
    with pytest.raises(CheckpointError, match='not a regular file|hard links'):
      reader.verify(20)
    path.rmdir() if path.is_dir() else path.unlink()
  shutil.move(outside, path)
  assert reader.verify(20)
  part = copy / 'step_00000020/state/params'
  shutil.move(part, tmp_path / 'params')
  part.symlink_to(tmp_path / 'params')
  with pytest.raises(CheckpointError, match='not in MANIFEST.json'):
    reader.verify(20)
  part.unlink()
  shutil.move(tmp_path / 'params', part)
  shutil.move(copy / 'step_00000020', tmp_path / 'real')
  (copy / 'step_00000020').symlink_to(tmp_path / 'real')
  with pytest.raises(CheckpointError, match='not a directory'):
    reader.verify(20)


@pytest.mark.parametrize('name', [
    '../step_00000010/MANIFEST.json', '/etc/passwd', 'state/../../x', 'state/./x', 'state//x',
    'state\\x', 'state/a\x00b', 'other/x', 'state'])
def test_names_outside_the_step_are_refused(copy, name):
  forge(copy, lambda body: body['files'].update({name: [3, '0' * 64]}))
  with pytest.raises(CheckpointError, match='refused file name'):
    checkpoint.Checkpoints(copy).verify(20)


def test_hostile_manifests_are_refused(copy):
  reader = checkpoint.Checkpoints(copy)
  path = copy / 'step_00000020/MANIFEST.json'
  good = path.read_text()
  for text in ('', 'null', '[]', '{"manifest": 3, "sha256": ""}', '[' * 100_000,
               '{"a":' * 100_000, good[:-1], good + ' ', '\xff', '9' * 10_000,
               ' ' * (manifests.MANIFEST_BYTES + 1)):
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(CheckpointError) as e:
      reader.verify(20)
    assert len(str(e.value)) < 500
  path.write_text(good)
  forge(copy, lambda body: body['meta'].update(bomb=' ' * manifests.MANIFEST_BYTES))
  with pytest.raises(CheckpointError, match='has 4,19.*; the limit .* is 4,194,304'):
    reader.verify(20)
  path.write_text(good)
  forge(copy, lambda body: body.update(step=10))
  with pytest.raises(CheckpointError, match='its manifest is of step 10'):
    reader.verify(20)
  path.write_text(good)
  # a forged shape differs from the model's, so nothing of that size is allocated
  forge(copy, lambda body: body['leaves'].update({'params/embed': [[2**40, 8], 'float32']}))
  with pytest.raises(CheckpointError, match=r'float32\[1099511627776,8\] in the checkpoint'):
    reader.restore(abstract(make()))


def test_forged_array_of_another_shape_is_refused(copy, tmp_path):
  """The manifest has the shapes of the model, but the arrays have others."""
  saver = checkpoint.Checkpoints(tmp_path / 'wide')
  saver.save(20, make(20, width=12), meta={})
  saver.wait()
  forge(tmp_path / 'wide', lambda body: body.update(leaves={
      path: [list(shape), dtype]
      for path, (shape, dtype) in manifests.signatures(make(20)).items()}))
  with pytest.raises(CheckpointError, match='cannot read'):
    saver.restore(abstract(make()))


def test_a_newer_format_is_reported_and_kept(copy):
  forge(copy, lambda body: body.update(format=2))
  with pytest.raises(CheckpointError, match='format must be 1 for this version, got 2'):
    checkpoint.Checkpoints(copy).restore(abstract(make()), quarantine=True)
  assert sorted(os.listdir(copy)) == ['step_00000010', 'step_00000020']


# --- non-finite, full disks, kills (F2, F3, F8, F16) -------------------------------------------


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('part', ['params', 'ema'])
def test_non_finite_parameters_are_never_saved(copy, part, value):
  saver = checkpoint.Checkpoints(copy, keep=1)
  state = make(30)
  bad = getattr(state, part) | {'block': {'w': state.params['block']['w'].at[0, 0].set(value)}}
  with pytest.raises(NumericalError, match=f'step 30 .* {part}/block/w; newest.* 20'):
    saver.save(30, state.replace(**{part: bad}), meta={})
  saver.wait()
  assert sorted(os.listdir(copy)) == ['step_00000010', 'step_00000020']


def test_failed_save_is_raised_by_the_next_call_and_leaves_nothing(copy, monkeypatch):
  saver = checkpoint.Checkpoints(copy)
  monkeypatch.setattr(manifests, 'seal', lambda _: (_ for _ in ()).throw(OSError(28, 'No space')))
  saver.save(30, make(30), meta={})
  with pytest.raises(CheckpointError, match='saving step 30 .*No space.*newest committed step: 20'):
    saver.save(40, make(40), meta={})
  monkeypatch.undo()
  assert sorted(os.listdir(copy)) == ['step_00000010', 'step_00000020']
  saver.save(30, make(30), meta={'long': ' ' * manifests.MANIFEST_BYTES})
  with pytest.raises(CheckpointError, match='at most 4,194,304 bytes, got 4,19'):
    saver.wait()
  saver.save(40, make(40), meta={})
  saver.wait()
  assert saver.steps() == [10, 20, 40]


# A line of JSON per case: (directory of checkpoints, failpoint, bytes that a file may have). The
# cases fork from one process that has imported everything and started no backend.
CHILD = """
import json, os, resource, sys
import test_checkpoint as t
from t5lab.errors import CheckpointError
from t5lab.runs import checkpoint

def save(directory, failpoint, limit):
  os.environ['T5LAB_FAILPOINT'] = failpoint
  saver = checkpoint.Checkpoints(directory)
  if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  saver.save(30, t.make(30), meta={'data': {'position': 30}})
  try:
    saver.wait()
  except CheckpointError as e:
    print(e, file=sys.stderr, flush=True)
    os._exit(e.code)
  os._exit(0)

for line in sys.stdin:
  pid = os.fork()
  if not pid:
    save(*json.loads(line))
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
NAMES = ('before_manifest', 'before_rename@30', 'after_rename', 'full_disk')


@pytest.fixture(scope='module')
def interrupted(two_steps, tmp_path_factory):
  """{name: (directory of a save of step 30 that was killed or failed, exit code)}, and output."""
  folder = tmp_path_factory.mktemp('interrupted')
  cases = []
  for name in NAMES:
    shutil.copytree(two_steps, folder / name)
    # 600 bytes: the arrays are larger
    cases.append((str(folder / name), *(('', 600) if name == 'full_disk' else (name, 0))))
  here = pathlib.Path(__file__).resolve()
  paths = os.pathsep.join(map(str, [here.parent, here.parents[2]]))
  done = subprocess.run(
      [sys.executable, '-c', CHILD], input='\n'.join(map(json.dumps, cases)),
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': paths}, capture_output=True,
      text=True, timeout=240)
  assert done.returncode == 0, done.stderr
  codes = map(int, done.stdout.split())
  return {name: (folder / name, code) for name, code in zip(NAMES, codes, strict=True)}, done.stderr


@pytest.mark.parametrize('name, newest', [
    ('before_manifest', 20), ('before_rename@30', 20), ('after_rename', 30)])
def test_kill_between_leaves_only_whole_steps(interrupted, name, newest):
  directory, code = interrupted[0][name]
  assert code == -signal.SIGKILL, interrupted[1]
  saver = checkpoint.Checkpoints(directory)
  assert len(saver.clean()) == (newest == 20)
  restored, manifest = saver.restore(abstract(make()), quarantine=True)
  assert manifest.step == newest and manifest.meta == {'data': {'position': newest}}
  assert digest(restored) == digest(make(newest))
  assert not [name for name in os.listdir(directory) if 'tmp' in name or 'corrupt' in name]


def test_full_disk_is_raised_and_leaves_the_older_step(interrupted):
  directory, code = interrupted[0]['full_disk']
  assert code == 4, interrupted[1]
  assert f'saving step 30 to {directory} failed: ' in interrupted[1]
  assert '(newest committed step: 20)' in interrupted[1]
  assert sorted(os.listdir(directory)) == ['step_00000010', 'step_00000020']
  assert checkpoint.Checkpoints(directory).verify(20).step == 20
