import io
import json

import pytest

from t5lab.errors import UsageError
from t5lab.tools.prepare import decontaminate
from t5lab.tools.prepare.job import PrepareJob


def numbers(first, last, separator=' '):
  return separator.join(map(str, range(first, last)))


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def eval_set(*texts):
  e = decontaminate.EvalSet()
  for text in texts:
    e.add([text])
  e.settle()
  return e


def test_thirteen_consecutive_words():
  e = eval_set(numbers(0, 30), numbers(100, 113))
  assert e.overlap(f'x {numbers(5, 18, ", ")} y') == ([0], numbers(5, 18))
  assert e.overlap(f'x {numbers(5, 17)} y {numbers(17, 29)}') is None
  assert e.hit.tolist() == [True, False]
  assert e.overlap(f'{numbers(0, 15)} {numbers(100, 120)}') == ([0, 1], numbers(0, 13))
  assert e.hit.tolist() == [True, True]
  assert e.overlap(numbers(100, 112)) is None


def test_eight_words_of_a_short_text():
  e = eval_set(numbers(0, 12), numbers(20, 28), numbers(40, 53))
  assert e.overlap(f'x {numbers(2, 10)}') == ([0], numbers(2, 10))
  assert e.overlap(f'x {numbers(2, 9)} y') is None
  assert e.overlap(f'{numbers(20, 28)}!') == ([1], numbers(20, 28))
  assert e.overlap(numbers(40, 52)) is None        # of a text of 13 words
  # The longest shared run is shown, not the first.
  assert e.overlap(f'{numbers(2, 10)} x {numbers(40, 53)}') == ([0, 2], numbers(40, 53))


def test_a_shorter_text_must_match_as_a_whole():
  e = eval_set('Home, sweet home', numbers(0, 7))
  assert e.overlap('home SWEET home!') == ([0], 'home sweet home')
  assert e.overlap('my home sweet home') is None
  assert e.overlap('home sweet') is None
  assert e.overlap(numbers(0, 7)) == ([1], numbers(0, 7))
  assert e.overlap('') is None and e.overlap('?!') is None


def test_the_same_words_in_two_records():
  e = eval_set(numbers(0, 20), numbers(5, 30))
  assert e.overlap(numbers(5, 18)) == ([0, 1], numbers(5, 18))


TRAIN = [{'en': f'a {numbers(0, 13)}', 'de': 'x', 'n': 1}, {'en': 'clean', 'de': 'rein'},
         {'en': 'y', 'de': f'{numbers(47, 70)} z'}, {'en': 'ja', 'de': 'yes'}]
TEST = [{'q': numbers(0, 13), 'answers': ['no', 'maybe']}, {'q': 'why', 'answers': ['so', 'Yes!']},
        {'q': 'never seen', 'answers': ['x y z']}]
DEV = [{'q': numbers(40, 60), 'answers': 'none at all'}]


@pytest.fixture
def files(tmp_path):
  return {name: [write(tmp_path / f'{name}.jsonl', rows)] for name, rows in (
      ('train', TRAIN), ('test', TEST), ('dev', DEV))}


@pytest.mark.parametrize('drop', [True, False])
def test_run(tmp_path, files, drop):
  target = tmp_path / 'out.jsonl'
  job = PrepareJob('decontaminate', files.pop('train'), target, ['en', 'de'], log=io.StringIO())
  decontaminate.run(job, files, fields=['q', 'answers'], drop=drop)
  report = json.loads((tmp_path / 'out.jsonl.report.json').read_text())
  if drop:
    assert [json.loads(line) for line in target.read_text().splitlines()] == [TRAIN[1]]
    assert report['rows'] == {
        'read': 4, 'unreadable': 0, 'contaminated': 3, 'dropped': 3, 'written': 1}
  else:
    assert not target.exists()
    assert report['rows'] == {'read': 4, 'unreadable': 0, 'contaminated': 3}
  at = lambda name, line: f'{tmp_path}/{name}.jsonl:{line}'
  assert report['evaluations'] == {
      'test': {
          'rows': 3, 'found_in_training': 2, 'share': 0.666667,
          'rows_found': [at('test', 1), at('test', 2)], 'training_rows': 2,
          'listed': [{'row': at('train', 1), 'evaluation': [at('test', 1)],
                      'words': numbers(0, 13)},
                     {'row': at('train', 4), 'evaluation': [at('test', 2)], 'words': 'yes'}]},
      'dev': {
          'rows': 1, 'found_in_training': 1, 'share': 1.0, 'rows_found': [at('dev', 1)],
          'training_rows': 1,
          'listed': [{'row': at('train', 3), 'evaluation': [at('dev', 1)],
                      'words': numbers(47, 60)}]}}


def test_other_lengths(tmp_path, files):
  job = PrepareJob('decontaminate', files['train'], tmp_path / 'o.jsonl', ['en'], log=io.StringIO())
  decontaminate.run(job, {'test': files['test']}, fields=['q'], ngram=3, short=3)
  assert job.rules['test']['examples'][0]['text'] == '0 1 2'
  job = PrepareJob('decontaminate', files['train'], tmp_path / 'p.jsonl', log=io.StringIO())
  message = '--short must be between 1 and the 3 words of --ngram, got 8'
  with pytest.raises(UsageError, match=message):
    decontaminate.run(job, {'test': files['test']}, ngram=3)
