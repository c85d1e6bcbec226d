"""A run as a person has it: trained, killed, resumed, refused; bits compared, processes real."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from processes import arrays, entries, environment
import pytest

from t5lab import cli, config
from t5lab.errors import CheckpointError, DataError, NumericalError, UsageError
from t5lab.programs import loop
from t5lab.runs import sentry

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = str(ROOT / 'configs' / 'quickstart.py')
STEPS = 24
KILLED = {'total_steps': str(STEPS), 'checkpoint.every': '6', 'log.every': '1',
          'checkpoint.keep': '10', 'eval.every': '12', 'model.dropout': '0.1', 'eval.beams': '1',
          'eval.max_length': '4'}
# The flags of tests/conftest.py, which compile faster, but one device.
ENVIRONMENT = environment(
    XLA_FLAGS=os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1'))


def tiny(**overrides):
  return config.load(QUICKSTART + ':tiny', {k.replace('__', '.'): v for k, v in overrides.items()})


def command(workdir, overrides, *more):
  return [sys.executable, '-m', 't5lab', 'train', '--config', QUICKSTART + ':tiny',
          '--workdir', str(workdir), *(f'--config.{k}={v}' for k, v in overrides.items()), *more]


def run(workdir, overrides, *more, **env):
  return subprocess.run(command(workdir, overrides, *more), env={**ENVIRONMENT, **env}, timeout=240,
                        capture_output=True, text=True)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """An uninterrupted run, in a process of its own with one device."""
  workdir = tmp_path_factory.mktemp('reference')
  done = run(workdir, KILLED)
  assert done.returncode == 0, done.stderr
  return workdir


def test_a_finished_run_says_what_came_out_and_where_it_lies(reference, capsys):
  """Again: nothing to train, the same report."""
  code = cli.main(command(reference, KILLED)[3:])
  done = capsys.readouterr()
  assert code == 0, done.err
  for text in ('copy of the source', 'bleu', 'chrf', 'reference', 'infer --workdir',
               'metrics.jsonl', 'tensorboard', f'resuming from step {STEPS}'):
    assert text in done.out, text
  assert len(entries(reference)) == STEPS + 2
  scores = json.loads((reference / 'eval' / f'{STEPS}.json').read_text())
  assert {'ha_ende/raw/bleu', 'ha_ende/ema/chrf', 'ha_ende/ema/loss'} <= scores.keys()
  lines = (reference / 'eval' / f'{STEPS}.ema.jsonl').read_text().splitlines()
  assert len(lines) == 8 and json.loads(lines[0]).keys() == {
      'task', 'index', 'source', 'target', 'prediction'}


def test_killed_damaged_stopped_and_resumed_equals_uninterrupted(reference, tmp_path):
  """SIGKILL while a save commits, a bit of the newest checkpoint flipped, SIGTERM between steps:
  then the same losses, bit for bit."""
  killed = run(tmp_path, KILLED, T5LAB_FAILPOINT='before_rename@18')
  assert killed.returncode == -signal.SIGKILL
  stale = [p.name for p in (tmp_path / 'checkpoints').iterdir() if '.tmp-' in p.name]
  assert len(stale) == 1 and stale[0].startswith('step_00000018')

  victim = max((tmp_path / 'checkpoints' / 'step_00000012').rglob('*'),
               key=lambda p: p.stat().st_size if p.is_file() else 0)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)

  log = tmp_path / 'log.txt'
  with log.open('w') as f:
    process = subprocess.Popen(command(tmp_path, KILLED), env=ENVIRONMENT, stdout=f, stderr=f)
    while 'step 7/24' not in log.read_text() and process.poll() is None:
      time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=100)
  output = log.read_text()
  assert 'step_00000012.corrupt' in output and 'resuming from step 6' in output
  assert process.returncode == 75, output
  assert 'run the same command to resume' in output and 'Traceback' not in output
  assert not list((tmp_path / 'checkpoints').glob('*.tmp-*'))

  done = run(tmp_path, KILLED)
  assert done.returncode == 0, done.stderr
  assert entries(tmp_path) == entries(reference)
  ours, expected = arrays(tmp_path, STEPS), arrays(reference, STEPS)
  assert ours.keys() == expected.keys() and any(k.startswith('ema/') for k in ours)
  for path in ours:
    np.testing.assert_array_equal(ours[path], expected[path], err_msg=path)


# -- refusals, in this process --


def test_another_experiment_in_the_workdir_is_refused_with_what_differs(reference):
  other = {**KILLED, 'model.d_ff': '32', 'optim.lr': '1.0'}
  with pytest.raises(UsageError) as e:
    loop.train(tiny(**{k.replace('.', '__'): v for k, v in other.items()}), reference)
  text = str(e.value)
  assert 'model.d_ff: 64 -> 32' in text and 'optim.lr: ' in text and 'total_steps' in text
  with pytest.raises(UsageError, match='--resume=never'):
    loop.train(tiny(), reference, resume='never')
  assert json.loads((reference / 'config.json').read_text())['model']['d_ff'] == 64


def test_resume_must_find_a_checkpoint(tmp_path):
  with pytest.raises(UsageError, match='--resume=must'):
    loop.train(tiny(), tmp_path, resume='must')


def test_changed_data_is_refused_unless_allowed(reference, tmp_path, monkeypatch):
  from t5lab.data.batches import pipeline
  shutil.copytree(reference, tmp_path / 'run')
  same = pipeline.Pipeline._fingerprint
  monkeypatch.setattr(pipeline.Pipeline, '_fingerprint',
                      lambda self, *a: same(self, *a)[::-1])
  c = tiny(**{k.replace('.', '__'): v for k, v in KILLED.items()})
  with pytest.raises(DataError, match='--allow-data-change'):
    loop.train(c, tmp_path / 'run')


@pytest.mark.parametrize('overrides, error, message', [
    (dict(data__mixture='ha_endee'), UsageError, "no task or mixture 'ha_endee'. Did you mean"),
    (dict(data__split='tset'), DataError, "has no split 'tset'"),
    (dict(data__batch_size='12'), UsageError, 'not a multiple of the 8 devices'),
    (dict(optim__microbatches='4'), UsageError, 'not a multiple of the 8 devices'),
    (dict(model__vocab_size='1024'), UsageError,
     'sentinels = 2,048; .*model.vocab_size.* has 1,024 rows'),
    (dict(data__vocab='t5lab_999'), UsageError, "no vocabulary 't5lab_999'"),
    (dict(optim__name='adamm'), UsageError, "optim.name='adamm' is unknown. Did you mean 'adamw'"),
    (dict(optim__schedule='cosin'), UsageError, "Did you mean 'cosine'"),
    (dict(rules='fdsp'), UsageError, "rules='fdsp' is unknown. Did you mean 'fsdp'"),
])
def test_bad_input_is_one_line(overrides, error, message, tmp_path):
  with pytest.raises(error, match=message) as e:
    loop.train(tiny(**overrides), tmp_path)
  assert '\n' not in str(e.value)
  assert not (tmp_path / 'checkpoints').exists() or not any((tmp_path / 'checkpoints').iterdir())


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_step(tmp_path):
  c = tiny(optim__lr='1e30', optim__schedule='constant', optim__warmup='0', checkpoint__every='1')
  with pytest.raises(NumericalError) as e:
    loop.train(c, tmp_path)
  assert e.value.code == 70
  step = int(str(e.value).split(':')[0].removeprefix('step '))
  record, = sentry.read_anomalies(tmp_path)
  assert record['step'] == step and record['examples'][0].startswith('ha_ende:')
  assert record['examples'][0] in str(e.value) and 'last good checkpoint' in str(e.value)
  for path, x in arrays(tmp_path, step - 1).items() if step > 1 else ():
    assert np.isfinite(x).all(), path


def test_every_checkpoint_damaged_never_starts_from_scratch(reference, tmp_path):
  shutil.copytree(reference, tmp_path / 'run')
  for path in (tmp_path / 'run' / 'checkpoints').rglob('MANIFEST.json'):
    path.write_text('{}')
  c = tiny(**{k.replace('.', '__'): v for k, v in KILLED.items()})
  with pytest.raises(CheckpointError, match='not starting from scratch'):
    loop.train(c, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_killed_at_random_moments_equals_uninterrupted(reference, tmp_path, seed):
  """SIGKILL after a random time, again and again, until the run gets through."""
  stream, kills = np.random.default_rng(seed), 0
  for _ in range(12):
    process = subprocess.Popen(command(tmp_path, KILLED), env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # The moments that matter come after the start-up, whose length the machine decides.
    before = len(entries(tmp_path)) if (tmp_path / 'metrics.jsonl').exists() else 0
    while process.poll() is None and kills < 5:
      if (tmp_path / 'metrics.jsonl').exists() and len(entries(tmp_path)) != before:
        time.sleep(stream.uniform(0, 1.5))
        process.kill()
        kills += 1
        break
      time.sleep(0.01)
    output, _ = process.communicate(timeout=200)
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, output
  assert process.returncode == 0 and kills
  assert entries(tmp_path) == entries(reference)
  ours, expected = arrays(tmp_path, STEPS), arrays(reference, STEPS)
  for path in expected:
    np.testing.assert_array_equal(ours[path], expected[path], err_msg=path)
