"""`t5lab inspect`: a person's file and config in, numbers, text and a page out."""
import json

import pytest

from t5lab.commands import inspect
from t5lab.data.tasks import registry as tasks
from t5lab.errors import DataError, UsageError

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', 'c', '{', '}', '<', '>', 'script',
         '[', ']', 'red', '/']
ROWS = [('a b', 'c'), ('a b', 'c'),                  # twice
        ('a b', 'b'),                                # other targets
        ('a {b}', 'a\nb'),
        ('<script>', '[red]a[/red]'),                # 10 ids of at most 8
        ('a a a a a a a a a a', 'Zeta a'),           # 12 ids; one unknown
        ('A', 'a ' * 9)]                             # 11 ids


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """run(*flags) -> standard output. The file, vocabulary and config lie in the current folder."""
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
  tasks.register()


def test_numbers(run):
  found = json.loads(run('--json'))
  assert list(found) == ['config', 'overrides', 'seed', 'tasks', 'mixture']
  assert found['overrides'] == {'data.files.train': 'rows.jsonl',
                                'data.files.validation': 'rows.jsonl'}
  task = found['tasks']['files']
  of = lambda share: (share['count'], share['of'])
  assert task['examples'] == task['sampled'] == 7
  assert of(task['duplicates']) == (1, 7) and of(task['contradictions']) == (3, 7)
  assert of(task['truncated']['examples']) == (3, 7)
  # [CLS] a b [SEP] …: 4 4 4 6 5 12 3, and 3 3 3 4 10 4 11
  sizes = [4, 4, 4, 6, 5, 12, 3], [3, 3, 3, 4, 10, 4, 11]
  assert [task['lengths'][f]['tokens'] for f in ('inputs', 'targets')] == list(map(sum, sizes))
  assert of(task['unknown']) == (1, sum(map(sum, sizes)))
  # WordPiece loses case, white space and what it does not know: all but 'a b', 'c', 'b', 'a a …'
  back = task['round_trip']
  assert back['source'] == 'texts' and of(back['lost']) == (7, 14)
  assert back['characters'] == dict.fromkeys('A\nZeta ', 1)
  assert back['shown'][0] == ['a {b}', 'a { b }']


def test_text_and_page(run, tmp_path):
  text = run('--html', 'page.html', '--examples', '7', '--sample', '5')
  assert text.startswith('What the model will see: c.py\n') and text.endswith('page.html\n')
  assert 'counted over a random sample of 5' in text
  assert '\x1b' not in text and 'changed  data.files.train=rows.jsonl' in text
  page = (tmp_path / 'page.html').read_text()
  assert '<script' not in page and '&lt; script &gt;' in page
  assert page.count('files:5</p>') == 1 and '4 tokens cut' in page
  assert sorted(p.name for p in tmp_path.iterdir() if 'page' in p.name) == ['page.html']
  text = run('--config.data.vocab=byte', '--config.data.lengths.targets=16', '--examples', '7')
  assert '[red]a[/red]<eos>' in text and 'a\\nb<eos>' in text      # no markup is read
  with pytest.raises(UsageError, match='there is no folder nowhere'):
    run('--html', 'nowhere/page.html')
  with pytest.raises(UsageError, match='is a folder; name a file in it'):
    run('--html', str(tmp_path))


@pytest.mark.parametrize('flag, error, says', [
    ('--examples=-1', UsageError, 'must be 0 or more'),
    ('--sample=0', UsageError, 'must be 1 or more'),
    ('--config.data.mixture=file', UsageError, "Did you mean 'files'"),
    ('--config.model.vocab_size=8', UsageError, 'the embedding of this config'),
    ('--config.data.files.train=none.jsonl', DataError, 'none.jsonl'),
    ('--config.eval.split=test', UsageError, 'data.files.test is empty')])
def test_what_training_refuses(run, flag, error, says):
  with pytest.raises(error, match=says):
    run(flag)


def test_progress_is_told_after_a_while(monkeypatch, capsys):
  clock = iter(range(100))
  monkeypatch.setattr(inspect.time, 'monotonic', lambda: float(next(clock)))
  monkeypatch.setattr(inspect, 'PATIENCE', 60.)
  with inspect._progress('reading') as tick:
    tick(1, 2)
  assert capsys.readouterr().err == ''
  monkeypatch.setattr(inspect, 'PATIENCE', 0.)
  with inspect._progress('reading') as tick:
    tick(1_000, 2_000)
  err = capsys.readouterr().err
  assert 'reading … 1,000 of 2,000' in err and err.endswith('\n')
