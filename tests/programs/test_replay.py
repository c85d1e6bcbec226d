"""`t5lab replay` and `t5lab bisect` on real runs, in processes of their own."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
from processes import environment
import pytest

from t5lab import config, trees
from t5lab.programs import bisect
from t5lab.programs.replay import (
  Difference,
  compare,
  compare_trees,
  differing_keys,
  read_rows,
)
from t5lab.runs import rundir, sentry
from t5lab.runs.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = str(ROOT / 'configs' / 'quickstart.py')
RUN = {'total_steps': '12', 'checkpoint.every': '4', 'checkpoint.keep': '10', 'log.every': '1',
       'model.dropout': '0.1', 'eval.examples': '1', 'eval.max_length': '2', 'eval.beams': '1'}


def t5lab(*argv, **env):
  return subprocess.run([sys.executable, '-m', 't5lab', *map(str, argv)],
                        env=environment(**env), timeout=240, capture_output=True, text=True)


def train(workdir, overrides=RUN, code=0, **env):
  done = t5lab('train', '--config', QUICKSTART + ':tiny', '--workdir', workdir,
               *(f'--config.{k}={v}' for k, v in overrides.items()), **env)
  assert done.returncode == code, done.stdout + done.stderr
  return workdir


def tree(folder):
  """The content of a folder: bytes and modification times."""
  return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b'')
          for p in sorted(folder.rglob('*'))}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  return train(tmp_path_factory.mktemp('runs') / 'reference')


@pytest.fixture
def copy(reference, tmp_path):
  shutil.copytree(reference, tmp_path / 'copy')
  return tmp_path / 'copy'


def edit_rows(workdir, change):
  path = workdir / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  path.write_text(''.join(json.dumps(change(row)) + '\n' for row in rows))


def flip(workdir, step, part, name, where, value=None):
  """Changes one number of a checkpoint and writes a manifest that matches."""
  checkpoints = Checkpoints(workdir / 'checkpoints', keep=0)
  manifest = checkpoints.manifest(step)
  abstract = {p: jax.ShapeDtypeStruct(shape, dtype)
              for p, (shape, dtype) in manifest.leaves.items()}
  state, _ = checkpoints.restore(trees.unflatten(abstract), step)
  flat = {p: np.array(x) for p, x in trees.flatten(state).items()}
  x = flat[f'{part}/{name}']
  x[where] = np.nextafter(x[where], np.float32(9)) if value is None else value
  shutil.rmtree(checkpoints.path(step))
  checkpoints.save(step, trees.unflatten(flat), meta=manifest.meta)
  checkpoints.wait()


# -- replay --


@pytest.mark.slow
def test_a_window_is_reproduced_bit_for_bit_and_the_run_is_unchanged(reference, tmp_path):
  before = tree(reference)
  done = t5lab('replay', '--workdir', reference, '--from', 4, '--steps', 6,
               '--output', tmp_path / 'out')
  assert done.returncode == 0, done.stdout + done.stderr
  assert tree(reference) == before
  assert done.stdout.count('bit-equal') == 7              # six rows, one checkpoint
  assert 'steps 5 to 10 are reproduced bit for bit: 6 rows of metrics, 1 checkpoint' in done.stdout
  ours, theirs = read_rows(tmp_path / 'out'), read_rows(reference)
  assert ours == {step: theirs[step] for step in range(5, 11)}
  assert Checkpoints(tmp_path / 'out' / 'checkpoints').steps() == [10]
  assert (tmp_path / 'out' / 'config.json').exists()


@pytest.mark.slow
def test_from_the_seed_to_the_end(reference):
  done = t5lab('replay', '--workdir', reference, '--from', 0, '--steps', 12)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '12 rows of metrics, 3 checkpoints' in done.stdout


@pytest.mark.slow
def test_a_number_that_is_not_reproduced_is_named(copy):
  edit_rows(copy, lambda row: {**row, 'loss': np.nextafter(row['loss'], 9)} if row['step'] == 6
            and 'loss' in row else row)
  done = t5lab('replay', '--workdir', copy, '--from', 4)
  assert done.returncode == 70
  assert done.stderr.startswith('t5lab: not reproduced: step 6: loss is ')
  flip(copy, 12, 'params', 'embedding', (3, 5))
  done = t5lab('replay', '--workdir', copy, '--from', 8)
  assert done.returncode == 70
  assert 'step 12: params/embedding differs from the checkpoint: 1 of 65536' in done.stderr
  assert 'first at [3, 5]' in done.stderr


@pytest.mark.slow
def test_a_changed_config_is_reported(copy):
  settings = json.loads((copy / 'config.json').read_text())
  settings['optim']['lr'] *= 2
  (copy / 'config.json').write_text(json.dumps(settings))
  done = t5lab('replay', '--workdir', copy, '--from', 4)
  assert done.returncode == 70 and 'the config was changed after' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('argv, code, message', [
    (('--from', 5), 4, 'has no checkpoint of step 5 to start from; available: 0, 4, 8, 12'),
    (('--from', 12, '--steps', 3), 2, 'neither a row nor a checkpoint of steps 13 to 15'),
    (('--from', 4, '--steps', 0), 2, '--steps 1 or more, got --from 4 --steps 0'),
    (('--from', 4, '--output', '{run}/out'), 2, 'is inside the replayed run'),
])
def test_replay_refuses(reference, argv, code, message):
  done = t5lab('replay', '--workdir', reference,
               *(str(a).replace('{run}', str(reference)) for a in argv))
  assert done.returncode == code and message in done.stderr, done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_skipped_batch_is_skipped_again(tmp_path):
  run = train(tmp_path / 'run', {**RUN, 'guard.policy': 'skip'}, T5LAB_FAULT='nan_grad@6')
  done = t5lab('replay', '--workdir', run, '--from', 4, '--steps', 8, T5LAB_FAULT='nan_grad@6')
  assert done.returncode == 0, done.stderr
  assert done.stdout.count(', skipped') == 1 and '8 rows of metrics, 2 checkpoints' in done.stdout


@pytest.mark.slow
def test_a_run_that_rewound_is_replayed_along_its_final_path(tmp_path):
  run = train(tmp_path / 'run', {**RUN, 'guard.policy': 'rewind'}, T5LAB_FAULT='nan_grad@6-7')
  assert [r['offset'] for r in sentry.read_anomalies(run) if 'rewound_to' in r] == [2, 3]
  for start in (0, 4, 8):              # before, at and after the checkpoint it returned to
    done = t5lab('replay', '--workdir', run, '--from', start, '--steps', 12 - start,
                 T5LAB_FAULT='nan_grad@6-7')
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'{12 - start} rows of metrics' in done.stdout


@pytest.mark.slow
def test_a_run_that_stopped_at_a_bad_step_stops_there_again(tmp_path):
  run = train(tmp_path / 'run', RUN, 70, T5LAB_FAULT='inf_loss@10')
  done = t5lab('replay', '--workdir', run, '--from', 4, '--steps', 8, T5LAB_FAULT='inf_loss@10')
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'step 10 is bad again, as it was in the run' in done.stdout
  (run / sentry.NAME).unlink()
  done = t5lab('replay', '--workdir', run, '--from', 4, '--steps', 8, T5LAB_FAULT='inf_loss@10')
  assert done.returncode == 70
  assert 'step 10 is bad in the replay; the bad steps of the run were []' in done.stderr


# -- bisect --


def last_line(done):
  return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_equal_runs_are_equal(reference, copy):
  done = t5lab('bisect', reference, copy)
  assert done.returncode == 0, done.stderr
  assert last_line(done) == 'equal: everything that both runs wrote, up to step 12'


@pytest.mark.slow
@pytest.mark.parametrize('key, value, step, texts', [
    ('seed', '5', 0, ['before any training: params/', ' differs']),
    ('optim.lr', '0.5', 2, ['the update makes params/']),          # at step 1 the rate is 0 in both
    ('loss.z_loss', '0.01', 1, ['the data is the same, loss is ']),
    ('model.d_ff', '32', 0, ['their models or optimizers differ; ']),
])
def test_runs_of_other_configs(reference, tmp_path, key, value, step, texts):
  other = train(tmp_path / 'other', {**RUN, key: value, 'total_steps': '12'})
  done = t5lab('bisect', reference, other)
  assert done.returncode == 70, done.stderr
  assert f'config {key}: ' in done.stdout
  verdict = last_line(done)
  assert verdict.startswith(f'the runs differ at step {step}' if key != 'model.d_ff' else
                            'the runs cannot be compared')
  for text in texts:
    assert text in verdict, verdict


@pytest.mark.slow
def test_gradients_that_differ_although_the_loss_does_not(tmp_path):
  """So little label smoothing changes some gradients, but not the loss."""
  runs = [train(tmp_path / name, {**RUN, 'total_steps': '4', 'loss.label_smoothing': value})
          for name, value in (('a', '0.'), ('b', '5e-9'))]
  verdict = last_line(t5lab('bisect', *runs))
  assert verdict.startswith('the runs differ at step 1: data and loss are the same, the gradient '
                            'of decoder/'), verdict


@pytest.mark.slow
def test_one_changed_example_is_found_in_its_batch(tmp_path):
  def run(name, rows):
    path = tmp_path / f'{name}.tsv'
    path.write_text('source\ttarget\n' + ''.join(f'{s}\t{t}\n' for s, t in rows))
    return train(tmp_path / name, {
        **RUN, 'data.files.train': str(path), 'data.files.validation': str(path),
        'data.fields.inputs': 'source', 'data.fields.targets': 'target', 'data.pack': 'false'})
  rows = [(f'source {i}', f'target {i}') for i in range(64)]     # eight steps an epoch
  a = run('a', rows)
  data = stream_of(a)
  example, = data.row_ids(5)[3]
  changed = int(example.split(':')[1])
  # another target with as many tokens, because the order of the rows depends on lengths
  size = lambda i: len(data.rows[0].examples[i]['targets'])
  other = next(i for i in range(64) if i != changed and size(i) == size(changed))
  rows[changed] = (rows[changed][0], rows[other][1])
  b = run('b', rows)
  done = t5lab('bisect', a, b)
  assert done.returncode == 70, done.stderr
  assert 'replaying both from the checkpoint of step 4 to step 6' in done.stdout
  verdict = last_line(done)
  assert verdict.startswith('the runs differ at step 6: batch features decoder_'), verdict
  assert '(rows 3)' in verdict
  assert verdict.endswith(f'row 3 holds {example} and {example}'), verdict


def stream_of(workdir):
  from t5lab.programs import streams
  return streams.open_stream(config.from_dict(rundir.read_config(workdir))).batches


@pytest.mark.slow
def test_a_flipped_number_in_a_checkpoint_is_not_blamed_on_training(reference, copy):
  flip(copy, 8, 'opt_state', '1/mu/encoder/layers/mlp/wo/kernel', (1, 2, 3), 0.5)
  done = t5lab('bisect', reference, copy)
  assert done.returncode == 70, done.stderr
  verdict = last_line(done)
  assert verdict.startswith('the runs differ at step 8 in what they wrote, not in what they '
                            'compute')
  assert (f'{copy} is not what its config, data and start produce (the checkpoint of step 8, '
          'opt_state/1/mu/encoder/layers/mlp/wo/kernel: 1 of') in verdict
  assert 'first at [1, 2, 3]' in verdict
  assert f'{reference} is not' not in verdict


@pytest.mark.slow
def test_runs_that_differ_later_are_replayed_from_the_last_common_checkpoint(
    copy, reference, tmp_path):
  """Resumed from step 8 with another weight decay, by editing config.json: a resume refuses it."""
  for step in (12,):
    shutil.rmtree(copy / 'checkpoints' / f'step_{step:08d}')
  settings = json.loads((copy / 'config.json').read_text())
  settings['optim']['weight_decay'] = 0.5
  (copy / 'config.json').write_text(json.dumps(settings))
  train(copy, {**RUN, 'optim.weight_decay': '0.5'})
  done = t5lab('bisect', reference, copy)
  assert done.returncode == 70, done.stderr
  assert 'replaying both from the checkpoint of step 8 to step 9' in done.stdout
  assert last_line(done).startswith('the runs differ at step 9: data, loss and gradients are the '
                                    'same, the update makes params/')


# -- comparing --


def test_arrays_are_compared_by_their_bits():
  a = np.array([[1., np.nan, 0.], [2., 3., 4.]], np.float32)
  assert compare('a', a, a.copy()) is None           # NaN is NaN
  b = a.copy()
  b[0, 2], b[1, 1] = -0., 3.5
  difference = compare('a', a, b)
  assert (difference.name, difference.count, difference.largest) == ('a', 2, 0.5)
  assert difference.text.endswith('first at [0, 2]: 0.0 and -0.0')
  assert 'float32[2,3] and int32[2,3]' in compare('a', a, a.view(np.int32)).text
  assert [d.name for d in compare_trees({'x': a, 'y': a}, {'x': b, 'z': a})] == [
      'x', 'y', 'z']


def test_numbers_of_rows_are_compared_by_their_bits_and_causes_come_first():
  row = {'step': 1, 'accuracy': 0., 'loss': 5., 'data': 'ab', 'only': 1.}
  other = {**row, 'accuracy': -0., 'loss': np.nextafter(5., 6), 'data': 'ac'}
  assert differing_keys(row, other) == ['data', 'loss', 'accuracy']
  assert differing_keys({'loss': float('nan')}, {'loss': float('nan')}) == []
  assert differing_keys(row, {'loss': 5.}) == []


def test_gradients_are_looked_at_from_the_loss_back():
  paths = ['decoder/x', 'embedding', 'encoder/y', 'logits/kernel']
  ordered = sorted((Difference(p, 1, 0., '') for p in paths), key=bisect._backward_order)
  assert [d.name for d in ordered] == ['logits/kernel', 'decoder/x', 'encoder/y', 'embedding']
