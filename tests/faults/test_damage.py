"""Damaged checkpoints (F4 to F7): all damage is detected; the newest whole step is used."""

import json
import random
import shutil

import jax
import processes
from processes import STEPS
import pytest

from t5lab import trees
from t5lab.errors import CheckpointError
from t5lab.runs.checkpoint import Checkpoints


@pytest.fixture
def run(reference, tmp_path):
  """A copy of R, which this test may damage."""
  shutil.copytree(reference, tmp_path / 'run')
  return tmp_path / 'run'


def newest(run):
  return run / 'checkpoints' / f'step_{STEPS:08d}'


def files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def abstract(checkpoints, step=STEPS):
  """The state of a step as shapes."""
  return trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in
                          checkpoints.manifest(step).leaves.items()})


def test_a_truncated_file_costs_the_steps_since_the_previous_save(run, reference):
  """F4. The largest data file of the newest step, cut in half."""
  victim = max(files(newest(run)), key=lambda p: p.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:victim.stat().st_size // 2])
  output = processes.train(run)
  lines = [line for line in output.splitlines() if 'is damaged' in line]
  assert len(lines) == 1 and str(victim) in lines[0] and f'step_{STEPS:08d}.corrupt' in lines[0]
  assert processes.resumed_from(output) == 24
  assert (newest(run).parent / f'step_{STEPS:08d}.corrupt').is_dir()
  processes.assert_equal(run, reference)


def test_100_flipped_bits(run, record):
  """F5. One bit anywhere in any file of a step: the saved state is loaded, or nothing is."""
  checkpoints = Checkpoints(run / 'checkpoints', log=lambda _: None)
  state, stream, paths = abstract(checkpoints), random.Random(0), files(newest(run))
  silent = []
  for trial in range(100):
    path = paths[trial % len(paths)] if trial < len(paths) else stream.choice(paths)
    whole = path.read_bytes()
    bit = stream.randrange(8 * len(whole))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
      checkpoints.restore(state, STEPS)
      silent.append((path.name, bit))
    except CheckpointError as e:
      assert str(path) in str(e) and '\n' not in str(e)
    path.write_bytes(whole)
  record('silent_corruptions', f'{len(silent)}/100')
  assert not silent
  assert checkpoints.restore(state, STEPS)[1].step == STEPS


METADATA = ['MANIFEST.json', *(
    f'state/{part}/{name}' for part in ('params', 'opt_state', 'ema', 'step')
    for name in ('_METADATA', 'manifest.ocdbt', 'ocdbt.process_0/manifest.ocdbt'))]


@pytest.mark.parametrize('damage', ['deleted', 'emptied'])
def test_each_file_of_metadata(run, damage):
  """F6. The file is named, its step is quarantined and the older one is used."""
  names = {p.relative_to(newest(run)).as_posix() for p in files(newest(run))
           if p.parent.name != 'd'}
  assert names == set(METADATA)                    # there are no other kinds of files
  for name in METADATA:
    lines = []
    checkpoints = Checkpoints(run / 'checkpoints', log=lines.append)
    state = abstract(checkpoints)
    victim = newest(run) / name
    whole = victim.read_bytes()
    victim.unlink() if damage == 'deleted' else victim.write_bytes(b'')
    _, manifest = checkpoints.restore(state, quarantine=True)
    assert manifest.step == 24
    assert len(lines) == 1 and str(victim) in lines[0] and f'step_{STEPS:08d}.corrupt' in lines[0]
    quarantined = newest(run).with_name(f'step_{STEPS:08d}.corrupt')
    (quarantined / name).write_bytes(whole)
    quarantined.rename(newest(run))
  assert checkpoints.restore(state)[1].step == STEPS


@pytest.mark.parametrize('name', ['annotations.json', 'metrics.jsonl', 'config.json', 'run.lock'])
@pytest.mark.parametrize('damage', ['deleted', 'emptied'])
def test_each_file_beside_the_steps(run, name, damage, reference):
  """F6. Files beside the steps are written again; if that is impossible, the error names them."""
  path = run / ('checkpoints/' + name if name == 'annotations.json' else name)
  path.unlink() if damage == 'deleted' else path.write_bytes(b'')
  is_config = name == 'config.json'                # it says which run this is
  output = processes.train(run, code=2 if is_config else 0)
  if is_config:
    assert 'config.json' in output.splitlines()[-1] and str(run) in output.splitlines()[-1]
    return
  assert processes.resumed_from(output) == STEPS
  assert processes.digests(run) == processes.digests(reference)
  assert json.loads((run / 'config.json').read_text())['total_steps'] == STEPS
  if name == 'annotations.json' and damage == 'emptied':
    assert 'annotations.json ignored' in output


def test_all_steps_damaged(run):
  """F7. Exit 4, and nothing is trained from scratch, at the second start either."""
  for manifest in (run / 'checkpoints').rglob('MANIFEST.json'):
    manifest.write_bytes(manifest.read_bytes()[:-40])
  before = processes.entries(run)
  for _ in range(2):
    output = processes.train(run, code=4)
    last = output.splitlines()[-1]
    assert 'no checkpoint is valid' in last and 'not starting from scratch' in last
    assert 'choose another --workdir' in last and 'step 1/' not in output
  assert processes.entries(run) == before
