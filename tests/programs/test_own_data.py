"""Own files and own tasks through train, eval and infer."""
import csv
import json
import os
import sys

import pytest
import shared_programs

from t5lab import cli
from t5lab.data.tasks import registry

pytestmark = pytest.mark.usefixtures('plain_registry')

CONFIG = 'configs/quickstart.py:tiny'


def call(*argv, capsys):
  capsys.readouterr()
  code = cli.main([str(a) for a in argv])
  return code, *capsys.readouterr()


ROWS = [{'q': f'how many {{braces}} in {i}?', 'c': f'line\none {i}', 'a': [f'{i}', 'none']}
        for i in range(20)]
FIELDS = ['--config.data.fields.inputs=q', '--config.data.fields.targets=a',
          '--config.data.prompt=question: {q} context: {c}', '--config.data.metrics=squad,rouge']
SMALL = ['--config.total_steps=2', '--config.optim.ema=0', '--config.eval.beams=1',
         '--config.eval.examples=4', '--config.checkpoint.best=', '--config.eval.max_length=4']


@pytest.fixture(scope='module', autouse=True)
def one_program():
  with shared_programs.shared():
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('own')
  (path / 'train-0.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in ROWS[:12]))
  (path / 'train-1.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in ROWS[12:]))
  with open(path / 'dev.tsv', 'w') as f:
    f.write('q\tc\ta\n' + ''.join(f'{i}?\tin {i}\t{i}\n' for i in range(5)))
  (path / 'none.tsv').write_text('q\tc\ta\nonly one\n')
  with open(path / 'ask.csv', 'w', newline='') as f:
    csv.writer(f).writerows([['q', 'c'], ['how, many?', 'two\nlines'], ['x', 'y {z}']])
  return path


@pytest.fixture(scope='module')
def run(folder):
  assert cli.main(['train', '--config', CONFIG, '--workdir', str(folder / 'run'), *FIELDS, *SMALL,
                   f'--config.data.files.train={folder}/train-*.jsonl',
                   f'--config.data.files.validation={folder}/dev.tsv']) == 0
  return folder / 'run'


def test_files_are_trained_on_and_scored(run):
  scores = json.loads((run / 'eval' / '2.json').read_text())
  assert {'files/raw/em', 'files/raw/f1', 'files/raw/rouge1', 'files/raw/loss'} <= set(scores)
  rows = [json.loads(line) for line in (run / 'eval' / '2.raw.jsonl').read_text().splitlines()]
  assert [r['source'] for r in rows] == [f'question: {i}? context: in {i}' for i in range(4)]
  assert [r['target'] for r in rows] == ['0', '1', '2', '3']


def test_eval_of_another_file_and_prompt(run, folder, capsys):
  code, out, _ = call('eval', '--workdir', run, f'--config.data.files.test={folder}/train-1.jsonl',
                      '--split', 'test', '--config.data.prompt={q}',
                      '--config.data.metrics=exact_match', capsys=capsys)
  assert code == 0 and 'exact_match' in out
  rows = [json.loads(line)
          for line in (run / 'eval' / '2.test.raw.jsonl').read_text().splitlines()]
  assert rows[0]['source'] == 'how many {braces} in 12?'


def test_infer_reads_the_same_columns(run, folder, tmp_path, capsys):
  target = tmp_path / 'y.jsonl'
  code, _, err = call('infer', '--workdir', run, '--input', folder / 'ask.csv', '--output', target,
                      capsys=capsys)
  rows = [json.loads(line) for line in target.read_text().splitlines()]
  assert code == 0, err
  assert [sorted(row) for row in rows] == [['c', 'output', 'q']] * 2
  assert rows[0]['c'] == 'two\nlines'
  code, _, err = call('infer', '--workdir', run, '--input', folder / 'ask.csv', '--output', target,
                      '--config.data.prompt={q} {d}', capsys=capsys)
  assert code == 2 and 'needs the text columns q, d; missing: d; the record has: q, c' in err
  code, _, err = call('infer', '--workdir', run, '--config.optim.lr=1', capsys=capsys)
  assert code == 2 and ('--config.optim.lr cannot be set for infer, only data.prompt and '
                        'data.fields.inputs') in err


@pytest.mark.parametrize('flags, code, message', [
    (['--config.data.bad_rows=0.1'], 3, 'bad.jsonl:3: '),
    (['--config.data.fields.targets=b'], 3, "no field 'b'. Known: a, c, q"),
    (['--config.data.metrics=bleu,blue'], 2, "data.metrics names 'blue'. Did you mean 'bleu'?"),
    (['--config.data.prompt={q'], 2, "data.prompt='{q': "),
    (['--config.data.files.validation='], 2, 'data.files.validation is empty'),
    (['--config.data.files.train=none*.jsonl'], 3, "no file matches 'none*.jsonl'"),
    (['--config.data.objective=lm'], 2, "set data.fields.inputs='' and data.prompt=''"),
    (['--config.data.mixture=files,ha_endee'], 2, "no task or mixture 'ha_endee'. Did you mean"),
    (['--config.data.files.validation={folder}/none.tsv', '--config.data.bad_rows=0.5'], 3,
     'none.tsv:2: expected 3 fields, got 1'),
    (['--config.eval.mixture=ha_ende', '--config.eval.split=validatoin'], 3,
     "'ha_ende' has no split 'validatoin'. Did you mean 'validation'"),
])
def test_an_error_is_one_line_before_training(folder, tmp_path, capsys, flags, code, message):
  bad = tmp_path / 'bad.jsonl'
  bad.write_text('{"q": "a", "c": "b", "a": "c"}\n' * 2 + '{"q": 1, "c": "b", "a": "c"}\n' * 2
                 + '{"q": "a", "c": "b", "a": "c"}\n')
  flags = [flag.replace('{folder}', str(folder)) for flag in flags]
  got, out, err = call('train', '--config', CONFIG, '--workdir', tmp_path / 'run', *FIELDS, *SMALL,
                       f'--config.data.files.train={bad}', '--config.data.bad_rows=1',
                       f'--config.data.files.validation={folder}/dev.tsv', *flags, capsys=capsys)
  assert got == code and err.startswith('t5lab: ') and err.count('\n') == 1 and message in err, err
  assert 'step 1/' not in out and not list(tmp_path.glob('run/checkpoints/step_*'))


def test_unlabelled_text_with_an_objective(folder, tmp_path, capsys):
  text = tmp_path / 'text.txt'
  text.write_text('One sentence here. Another one there.\n' * 60)
  code, out, err = call(
      'train', '--config', CONFIG, '--workdir', tmp_path / 'run', *SMALL,
      '--config.data.fields.inputs=', '--config.data.fields.targets=text',
      '--config.data.objective=span_corruption', f'--config.data.files.train={text}',
      f'--config.data.files.validation={text}', capsys=capsys)
  assert code == 0, err
  assert 'files/raw/loss' in json.loads((tmp_path / 'run' / 'eval' / '2.json').read_text())


def test_files_and_a_task_are_mixed_by_their_sizes(folder, capsys, tmp_path):
  code, out, err = call(
      'train', '--config', CONFIG, '--workdir', tmp_path / 'run', *SMALL, *FIELDS,
      f'--config.data.files.train={folder}/train-*.jsonl', '--config.eval.mixture=ha_enfr',
      '--config.data.mixture=files,ha_enfr', '--config.data.mixing.limit=100', capsys=capsys)
  assert code == 0 and 'files: 20 examples' in out and 'ha_enfr: 3,692 examples' in out, err


MODULE = """
from t5lab.data.tasks.seqio_tf import SeqioVocabulary, seqio, tf
print('module imported')
rows = {'inputs': ['a b', 'c'], 'targets': ['b', 'd']}
features = {f: seqio.Feature(SeqioVocabulary('t5lab_2048'), add_eos=True) for f in rows}
if 'own_task' not in seqio.TaskRegistry.names():
  seqio.TaskRegistry.add(
      'own_task', seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(rows),
          ['train', 'validation']), features,
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim])
"""


def test_an_own_module_is_imported_when_it_is_named(tmp_path, monkeypatch, capsys):
  (tmp_path / 'my_tasks.py').write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  config = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), CONFIG)
  train = ('train', '--config', config, '--workdir', 'run', *SMALL,
           '--config.data.mixture=own_task')
  code, _, err = call(*train, capsys=capsys)
  assert code == 2 and "no task or mixture 'own_task'" in err
  code, _, err = call(*train, '--config.data.modules=my_taks', capsys=capsys)
  assert code == 2 and "data.modules: cannot import 'my_taks' from here" in err
  try:
    code, out, err = call(*train, '--config.data.modules=my_tasks', capsys=capsys)
    assert code == 0 and 'own_task: 2 examples' in out, err
    # Only modules named on the command line are imported, never those of a run's folder.
    sys.modules.pop('my_tasks')
    registry.seqio.TaskRegistry.remove('own_task')
    code, out, err = call('eval', '--workdir', 'run', capsys=capsys)
    assert code == 2 and 'if you trust it, add --config.data.modules=my_tasks' in err
    assert 'module imported' not in out
    code, out, err = call('eval', '--workdir', 'run', '--config.data.modules=my_tasks',
                          capsys=capsys)
    assert code == 0 and 'module imported' in out, err
  finally:
    sys.modules.pop('my_tasks', None)
    registry.seqio.TaskRegistry.remove('own_task')
