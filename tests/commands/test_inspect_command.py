"""`t5lab inspect`: own files and a config in; statistics, text and a page out."""
import json
import sys

import pytest

from t5lab.commands import inspect
from t5lab.data.tasks import registry
from t5lab.errors import DataError, UsageError

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', 'c', '{', '}', '<', '>', 'script',
         '[', ']', 'red', '/']
ROWS = [('a b', 'c'), ('a b', 'c'),                  # twice
        ('a b', 'b'),                                # other targets
        ('a {b}', 'a\nb'),
        ('<script>', '[red]a[/red]'),                # 10 ids, the limit is 8
        ('a a a a a a a a a a', 'Zeta a'),           # 12 ids; one unknown
        ('A', 'a ' * 9)]                             # 11 ids


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """run(*flags) -> standard output. The current folder has the file, vocabulary and config."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
  (tmp_path / 'rows.jsonl').write_text(''.join(
      json.dumps({'inputs': x, 'targets': y}) + '\n' for x, y in ROWS))
  (tmp_path / 'c.py').write_text(
      'from t5lab import config\n'
      'def get_config(arg=""):\n'
      '  c = config.tiny(config.base("t5_1_1/small"))\n'
      '  c.data.vocab = "vocab.txt"\n'
      '  c.data.lengths.inputs = c.data.lengths.targets = 8\n'
      '  return c\n')
  files = [f'--config.data.files.{split}=rows.jsonl' for split in ('train', 'validation')]

  def call(*flags):
    assert inspect.main(['--config', 'c.py', *files, *flags]) == 0
    return capsys.readouterr().out
  yield call
  registry.register()


def test_numbers(run):
  result = json.loads(run('--json'))
  assert list(result) == ['config', 'overrides', 'seed', 'tasks', 'mixture']
  assert result['overrides'] == {'data.files.train': 'rows.jsonl',
                                'data.files.validation': 'rows.jsonl'}
  task = result['tasks']['files']
  counts = lambda share: (share['count'], share['of'])
  assert task['examples'] == task['sampled'] == 7
  assert counts(task['duplicates']) == (1, 7) and counts(task['contradictions']) == (3, 7)
  assert counts(task['truncated']['examples']) == (3, 7)
  # [CLS] a b [SEP] …: 4 4 4 6 5 12 3, and 3 3 3 4 10 4 11
  sizes = [4, 4, 4, 6, 5, 12, 3], [3, 3, 3, 4, 10, 4, 11]
  assert [task['lengths'][f]['tokens'] for f in ('inputs', 'targets')] == list(map(sum, sizes))
  assert counts(task['unknown']) == (1, sum(map(sum, sizes)))
  # WordPiece loses case, white space and what it does not know: all but 'a b', 'c', 'b', 'a a …'
  restored = task['round_trip']
  assert restored['source'] == 'texts' and counts(restored['lost']) == (7, 14)
  assert restored['characters'] == dict.fromkeys('A\nZeta ', 1)
  assert restored['shown'][0] == ['a {b}', 'a { b }']


def test_text_and_page(run, tmp_path, monkeypatch):
  text = run('--html', 'page.html', '--examples', '7', '--sample', '5')
  assert text.startswith('What the model will see: c.py\n') and text.endswith('page.html\n')
  assert 'counts are over a random sample of 5' in text
  assert '\x1b' not in text and 'changed  data.files.train=rows.jsonl' in text
  page = (tmp_path / 'page.html').read_text()
  assert '<script' not in page and '&lt; script &gt;' in page
  assert page.count('files:5</p>') == 1 and '4 tokens cut' in page
  assert sorted(p.name for p in tmp_path.iterdir() if 'page' in p.name) == ['page.html']
  # The page needs matplotlib, the text does not.
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(UsageError, match='--html draws plots with matplotlib: pip install mat'):
    run('--html', 'page.html')
  text = run('--config.data.vocab=byte', '--config.data.lengths.targets=16', '--examples', '7')
  assert '[red]a[/red]<eos>' in text and 'a\\nb<eos>' in text      # markup is not read
  monkeypatch.undo()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UsageError, match='there is no folder nowhere'):
    run('--html', 'nowhere/page.html')
  with pytest.raises(UsageError, match='is a folder; name a file in it'):
    run('--html', str(tmp_path))


@pytest.mark.parametrize('flag, error, message', [
    ('--examples=-1', UsageError, '--examples must be 0 or more, got -1'),
    ('--sample=0', UsageError, '--sample must be 1 or more, got 0'),
    ('--config.data.mixture=file', UsageError, "Did you mean 'files'"),
    ('--config.model.vocab_size=8', UsageError, 'the embedding of this config'),
    ('--config.data.files.train=none.jsonl', DataError, 'none.jsonl'),
    ('--config.eval.split=test', UsageError, 'data.files.test is empty')])
def test_errors_of_training_are_found(run, flag, error, message):
  with pytest.raises(error, match=message):
    run(flag)
