import collections
import io
import json

import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.tools.prepare import augment
from t5lab.tools.prepare.job import PrepareJob

TEXT = '  The whale\tswam away\nfrom all of the ships. '


class Fixed:
  """A generator with fixed draws."""

  def __init__(self, draws, number=0):
    self.draws, self.number = draws, number

  def random(self, count):
    assert count == len(self.draws)
    return np.array(self.draws)

  def integers(self, count):
    return self.number


def test_word_dropout():
  draws = [.05, .2, .05, .2, .2, .2, .1, .2, .05]
  assert augment.word_dropout(TEXT, Fixed(draws), 0.1) == '  whale away\nfrom all of the '
  assert augment.word_dropout(TEXT, Fixed([.9] * 9), 0.1) == TEXT
  assert augment.word_dropout(TEXT, Fixed([0.] * 9, 1), 0.1) == '  whale '
  assert augment.word_dropout('', Fixed([]), 0.1) == ''
  assert augment.word_dropout(' ', Fixed([]), 0.1) == ' '


def test_word_dropout_drops_its_fraction(rng):
  text = ' '.join(map(str, range(20_000)))
  kept = augment.word_dropout(text, rng, 0.3).split()
  assert abs(len(kept) / 20_000 - 0.7) < 0.01
  assert list(map(int, kept)) == sorted(map(int, kept))


def test_span_deletion(rng):
  """round(0.15 * 20) = 3 of 20 words in one span at any position; it may wrap around the end."""
  text = ' '.join(map(str, range(20)))
  times_deleted = collections.Counter()
  for _ in range(2000):
    kept = list(map(int, augment.span_deletion(text, rng, 0.15, 3.).split()))
    deleted = sorted(set(range(20)) - set(kept))
    assert len(deleted) == 3 and kept == sorted(kept)
    assert any({i % 20, (i + 1) % 20, (i + 2) % 20} == set(deleted) for i in range(20))
    times_deleted.update(deleted)
  # 300 each, standard deviation 16.
  assert min(times_deleted.values()) > 220 and max(times_deleted.values()) < 380


@pytest.mark.parametrize('text, outcomes', [
    ('', {''}), ('one', {'one'}), (' one two ', {' one ', ' two '})])
def test_span_deletion_of_few_words(rng, text, outcomes):
  assert {augment.span_deletion(text, rng, 0.15, 3.) for _ in range(50)} == outcomes
  assert {augment.span_deletion(text, rng, 0.99, 3.) for _ in range(50)} == outcomes


def test_back_translate():
  calls = []

  def generate(texts):
    calls.append(texts)
    return [text.upper() for text in texts]

  rows = [{'de': 'a', 'en': 'x', 'n': 1}, {'de': 'b'}, {'de': 'c', 'en': 'z'}]
  assert augment.back_translate(rows, generate, 'en', 'de') == [
      {'de': 'a', 'en': 'A', 'n': 1}, {'de': 'b', 'en': 'B'}, {'de': 'c', 'en': 'C'}]
  assert calls == [['a', 'b', 'c']]
  assert augment.back_translate(rows[:1], generate, 'en', 'de', tag='<BT>') == [
      {'de': 'a', 'en': '<BT> A', 'n': 1}]
  with pytest.raises(ValueError):
    augment.back_translate(rows, lambda texts: texts[1:], 'en', 'de')
  assert rows[0]['en'] == 'x'


def make(tmp_path, rows, fields=('text',), name='in.jsonl'):
  source = tmp_path / name
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  target = tmp_path / f'{name}.out.jsonl'
  return PrepareJob('augment', [str(source)], target, fields, overwrite=True, log=io.StringIO())


def written(job):
  with open(job.output) as f:
    return [json.loads(line) for line in f]


def test_noise_keeps_records_and_does_not_depend_on_their_order(tmp_path):
  rows = [{'text': ' '.join(f'{n}.{i}' for i in range(30)), 'n': n} for n in range(4)]
  job = make(tmp_path, rows)
  augment.run_noise(job, 'word_dropout', copies=2, seed=5, rate=0.3)
  first = written(job)
  assert [row['n'] for row in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
  assert first[::3] == rows
  assert len({row['text'] for row in first}) == 12
  kept = [tuple(word.split('.')[1] for word in row['text'].split()) for row in first]
  assert len(set(kept)) == 9                     # equal but for their number, with different noise
  assert job.counts['written'] == 12 and job.rules['word_dropout']['count'] == 8
  assert job.settings == {'rate': 0.3}
  reversed_tail = make(tmp_path, rows[:1:-1], name='part.jsonl')
  augment.run_noise(reversed_tail, 'word_dropout', copies=2, seed=5, rate=0.3)
  assert written(reversed_tail) == first[9:] + first[6:9]
  other = make(tmp_path, rows, name='other.jsonl')
  augment.run_noise(other, 'word_dropout', copies=2, seed=6, rate=0.3)
  assert not {row['text'] for row in written(other)[1::3]} & {row['text'] for row in first}


def test_noise_in_every_field_and_unchanged_copies(tmp_path):
  job = make(tmp_path, [{'a': 'x y', 'b': 'z w'}, {'a': 'x', 'b': 'z'}], ['a', 'b'])
  augment.run_noise(job, 'span_deletion', rate=0.5, mean_span=1.)
  out = written(job)
  assert out[0] == {'a': 'x y', 'b': 'z w'} and out[2:] == [{'a': 'x', 'b': 'z'}]
  assert out[1]['a'] in 'xy' and out[1]['b'] in 'zw'
  assert job.rules['unchanged']['count'] == 1


def test_back_translation_of_a_file(tmp_path):
  job = make(tmp_path, [{'de': 'eins', 'en': 'one'}, {'de': 'zwei'}, {'de': 'drei', 'en': 'three'}],
           ['de'])
  translations = {'eins': 'un', 'zwei': 'deux', 'drei': ' '}
  augment.run_back_translation(job, lambda texts: list(map(translations.get, texts)), 'en',
                               tag='<BT>')
  assert written(job) == [{'de': 'eins', 'en': 'one'}, {'de': 'drei', 'en': 'three'},
                        {'de': 'eins', 'en': '<BT> un'}, {'de': 'zwei', 'en': '<BT> deux'}]
  assert {rule: entry['count'] for rule, entry in job.rules.items()} == {
      'back_translation': 2, 'empty': 1}


def test_back_translation_in_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(augment, 'CHUNK', 2)
  calls = []

  def generate(texts):
    calls.append(texts)
    return [text.upper() for text in texts]
  rows = [{'de': 'a', 'en': 'x', 'n': 1}, {'de': 'b'}, {'de': 'c', 'en': 'z'}]
  job = make(tmp_path, rows, ['de'])
  augment.run_back_translation(job, generate, 'en')
  assert written(job) == [{'de': 'a', 'en': 'x', 'n': 1}, {'de': 'a', 'en': 'A', 'n': 1},
                          {'de': 'b', 'en': 'B'}, {'de': 'c', 'en': 'z'}, {'de': 'c', 'en': 'C'}]
  assert calls == [['a', 'b'], ['c']]


@pytest.mark.parametrize('options, message', [
    ({'copies': 0}, '--copies must be at least 1, got 0'),
    ({'seed': -1}, '--seed must be at least 0, got -1'),
    ({'rate': 1.}, '--rate must be a fraction between 0 and 1, got 1.0'),
    ({'rate': 0}, '--rate must be a fraction between 0 and 1, got 0'),
    ({'mean_span': .5}, '--mean-span must be at least 1 word, got 0.5')])
def test_invalid_options(tmp_path, options, message):
  with pytest.raises(UsageError, match=message):
    augment.run_noise(make(tmp_path, [{'text': 'a'}]), 'span_deletion',
                      **{'rate': 0.1, 'mean_span': 3., **options})
