"""Evaluations in which one task fails (F29): it is named, the others are scored."""

import json
import shutil
import sys

import processes
import pytest

from t5lab import cli
from t5lab.decoding.engine import Engine

pytestmark = pytest.mark.usefixtures('plain_registry')

MODULE = """
from t5lab.data.tasks.seqio_tf import SeqioVocabulary, seqio, tf

def first_word(targets, predictions):
  return {'first_word': 100. * sum(t.split()[:1] == p.split()[:1]
                                   for t, p in zip(targets, predictions)) / len(targets)}

def broken(targets, predictions):
  return {'share': 1 / sum(map(len, []))}

features = {f: seqio.Feature(SeqioVocabulary('t5lab_2048'), add_eos=True)
            for f in ('inputs', 'targets')}

def add(name, targets, metric):
  rows = {'inputs': ['a b', 'c', 'd'], 'targets': targets}
  seqio.TaskRegistry.add(
      name, seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(rows),
          ['train', 'validation']), features,
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
      metric_fns=[first_word, metric] if metric else [first_word])

add('fault_metric', ['a', 'b', 'c'], broken)
add('fault_target', ['a', '', 'c'], None)
add('fault_none', ['a', 'b', 'c'], None)
for bad in ('metric', 'target', 'none'):
  seqio.MixtureRegistry.add(f'fault_with_{bad}', [('ha_ende', 1.), (f'fault_{bad}', 1.)])
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
  """A user's module with tasks, importable by name."""
  from t5lab.data.tasks.seqio_tf import seqio
  (tmp_path / 'fault_tasks.py').write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  yield '--config.data.modules=fault_tasks'
  sys.modules.pop('fault_tasks', None)
  for bad in ('metric', 'target', 'none'):
    if f'fault_with_{bad}' in seqio.MixtureRegistry.names():
      seqio.MixtureRegistry.remove(f'fault_with_{bad}')
      seqio.TaskRegistry.remove(f'fault_{bad}')


def call(*argv, capsys):
  capsys.readouterr()
  code = cli.main([str(a) for a in argv])
  return code, *capsys.readouterr()


CASES = {
    'metric': "task 'fault_metric': metric broken raised ZeroDivisionError",
    'target': "task 'fault_target': the target of example 1 of split 'validation' is empty",
}


@pytest.fixture
def run(reference, tmp_path):
  shutil.copytree(reference, tmp_path / 'run')
  return tmp_path / 'run'


@pytest.mark.parametrize('bad', CASES)
def test_eval_scores_the_other_tasks(run, modules, capsys, bad):
  mixture = f'fault_with_{bad}'
  whole = dict(json.loads((run / 'eval' / '30.json').read_text()))
  code, out, err = call('eval', '--workdir', run, '--task', mixture, modules, capsys=capsys)
  assert code not in (0, 75) and err.startswith('t5lab: not scored: ') and err.count('\n') == 1
  assert f'fault_{bad}/raw, fault_{bad}/ema' in err and CASES[bad] in err
  scores = json.loads((run / 'eval' / f'30.{mixture}.json').read_text())
  for key in ('bleu', 'chrf'):
    for weights in ('raw', 'ema'):
      assert scores[f'ha_ende/{weights}/{key}'] == whole[f'ha_ende/{weights}/{key}']
  assert CASES[bad] in scores['failed'][f'fault_{bad}/ema']
  assert not [k for k in scores if k.startswith(f'fault_{bad}/')]
  assert 'ha_ende' in out                          # the table of what was scored is shown
  assert processes.committed(run)[-1] == 30


@pytest.mark.parametrize('bad', CASES)
def test_training_ends_its_run_and_keeps_its_checkpoints(tmp_path, modules, capsys, bad):
  """Neither an evaluation during the run nor the last one loses a step."""
  train = [*processes.train_command(tmp_path / 'run', {
      'total_steps': 4, 'checkpoint.every': 2, 'eval.every': 2,
      'eval.mixture': f'fault_with_{bad}', 'checkpoint.best': 'ha_ende/ema/bleu'}), modules]
  for _ in range(2):                               # the second has nothing to train
    code, out, err = call(*train, capsys=capsys)
    assert code not in (0, 75) and CASES[bad] in err and err.count('\n') == 1
    assert processes.committed(tmp_path / 'run') == [2, 4]
  assert processes.last_step(tmp_path / 'run') == 4
  evaluated = {entry['step']: entry['eval'] for entry in processes.entries(tmp_path / 'run')
               if 'eval' in entry}
  assert sorted(evaluated) == [2, 4]
  for scores in evaluated.values():
    assert 'ha_ende/ema/bleu' in scores and not [
        k for k in scores if k.startswith(f'fault_{bad}/')]
  notes = json.loads((tmp_path / 'run' / 'checkpoints' / 'annotations.json').read_text())
  assert 'ha_ende/ema/bleu' in notes['4']


def test_a_prediction_that_is_missing(run, modules, capsys, monkeypatch):
  """The decoder returns one prediction too few for the task of three examples."""
  real = Engine.generate
  monkeypatch.setattr(Engine, 'generate', lambda self, params, requests, *a, **k: real(
      self, params, requests, *a, **k)[:-1 if len(requests) == 3 else None])
  code, _, err = call('eval', '--workdir', run, '--task', 'fault_with_none', modules, capsys=capsys)
  assert code not in (0, 75)
  assert "task 'fault_none': 1 of 3 examples have no prediction, first 2" in err
  scores = json.loads((run / 'eval' / '30.fault_with_none.json').read_text())
  assert 'ha_ende/ema/bleu' in scores and 'fault_none/raw' in scores['failed']
  monkeypatch.undo()


def test_a_good_evaluation_reports_no_error(run, modules, capsys):
  code, _, err = call('eval', '--workdir', run, '--task', 'fault_with_none', modules, capsys=capsys)
  assert code == 0 and not err
  scores = json.loads((run / 'eval' / '30.fault_with_none.json').read_text())
  assert 'fault_none/ema/first_word' in scores and 'failed' not in scores
