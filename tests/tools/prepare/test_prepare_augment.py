import collections
import io
import json

import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.tools.prepare import augment, job

TEXT = '  The whale\tswam away\nfrom all of the ships. '


class Fixed:
  """A generator whose draws are given."""

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


def test_word_dropout_drops_its_share(rng):
  text = ' '.join(map(str, range(20_000)))
  kept = augment.word_dropout(text, rng, 0.3).split()
  assert abs(len(kept) / 20_000 - 0.7) < 0.01
  assert list(map(int, kept)) == sorted(map(int, kept))


def test_span_deletion(rng):
  """round(0.15 * 20) = 3 of 20 words, one span, wherever; it may go round the end."""
  text = ' '.join(map(str, range(20)))
  gone = collections.Counter()
  for _ in range(2000):
    kept = list(map(int, augment.span_deletion(text, rng, 0.15, 3.).split()))
    left = sorted(set(range(20)) - set(kept))
    assert len(left) == 3 and kept == sorted(kept)
    assert any({i % 20, (i + 1) % 20, (i + 2) % 20} == set(left) for i in range(20))
    gone.update(left)
  assert min(gone.values()) > 220 and max(gone.values()) < 380       # 300 each, deviation 16


@pytest.mark.parametrize('text, outcomes', [
    ('', {''}), ('one', {'one'}), (' one two ', {' one ', ' two '})])
def test_span_deletion_of_few_words(rng, text, outcomes):
  assert {augment.span_deletion(text, rng, 0.15, 3.) for _ in range(50)} == outcomes
  assert {augment.span_deletion(text, rng, 0.99, 3.) for _ in range(50)} == outcomes


def test_back_translate():
  asked = []

  def generate(texts):
    asked.append(texts)
    return [text.upper() for text in texts]

  rows = [{'de': 'a', 'en': 'x', 'n': 1}, {'de': 'b'}, {'de': 'c', 'en': 'z'}]
  assert list(augment.back_translate(rows, generate, 'en', 'de', batch=2)) == [
      {'de': 'a', 'en': 'A', 'n': 1}, {'de': 'b', 'en': 'B'}, {'de': 'c', 'en': 'C'}]
  assert asked == [['a', 'b'], ['c']]
  assert list(augment.back_translate(rows[:1], generate, 'en', 'de', tag='<BT>')) == [
      {'de': 'a', 'en': '<BT> A', 'n': 1}]
  with pytest.raises(ValueError):
    list(augment.back_translate(rows, lambda texts: texts[1:], 'en', 'de'))
  assert rows[0]['en'] == 'x'


def make(tmp_path, rows, fields=('text',), name='in.jsonl'):
  source = tmp_path / name
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  target = tmp_path / f'{name}.out.jsonl'
  return job.Job('augment', [str(source)], target, fields, overwrite=True, says=io.StringIO())


def written(j):
  with open(j.output) as f:
    return [json.loads(line) for line in f]


def test_noise_keeps_rows_and_does_not_depend_on_their_order(tmp_path):
  rows = [{'text': ' '.join(f'{n}.{i}' for i in range(30)), 'n': n} for n in range(4)]
  j = make(tmp_path, rows)
  augment.run_noise(j, 'word_dropout', copies=2, seed=5, rate=0.3)
  first = written(j)
  assert [row['n'] for row in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
  assert first[::3] == rows
  assert len({row['text'] for row in first}) == 12
  kept = [tuple(word.split('.')[1] for word in row['text'].split()) for row in first]
  assert len(set(kept)) == 9                     # the four rows are one, their noise is not
  assert j.counts['written'] == 12 and j.rules['word_dropout']['count'] == 8
  assert j.settings == {'rate': 0.3}
  turned = make(tmp_path, rows[:1:-1], name='part.jsonl')
  augment.run_noise(turned, 'word_dropout', copies=2, seed=5, rate=0.3)
  assert written(turned) == first[9:] + first[6:9]
  other = make(tmp_path, rows, name='other.jsonl')
  augment.run_noise(other, 'word_dropout', copies=2, seed=6, rate=0.3)
  assert not {row['text'] for row in written(other)[1::3]} & {row['text'] for row in first}


def test_noise_in_every_field_and_copies_that_are_the_row(tmp_path):
  j = make(tmp_path, [{'a': 'x y', 'b': 'z w'}, {'a': 'x', 'b': 'z'}], ['a', 'b'])
  augment.run_noise(j, 'span_deletion', rate=0.5, mean_span=1.)
  out = written(j)
  assert out[0] == {'a': 'x y', 'b': 'z w'} and out[2:] == [{'a': 'x', 'b': 'z'}]
  assert out[1]['a'] in 'xy' and out[1]['b'] in 'zw'
  assert j.rules['unchanged']['count'] == 1


def test_back_translation_of_a_file(tmp_path):
  j = make(tmp_path, [{'de': 'eins', 'en': 'one'}, {'de': 'zwei'}, {'de': 'drei', 'en': 'three'}],
           ['de'])
  made = {'eins': 'un', 'zwei': 'deux', 'drei': ' '}
  augment.run_back_translation(j, lambda texts: [made[t] for t in texts], 'en', tag='<BT>')
  assert written(j) == [{'de': 'eins', 'en': 'one'}, {'de': 'drei', 'en': 'three'},
                        {'de': 'eins', 'en': '<BT> un'}, {'de': 'zwei', 'en': '<BT> deux'}]
  assert {rule: found['count'] for rule, found in j.rules.items()} == {
      'back_translation': 2, 'empty': 1}


@pytest.mark.parametrize('options, said', [
    ({'copies': 0}, '--copies 0: at least 1'), ({'seed': -1}, '--seed -1: at least 0'),
    ({'rate': 1.}, '--rate 1.0: a share between 0 and 1'), ({'rate': 0}, '--rate 0: a share'),
    ({'mean_span': .5}, '--mean-span 0.5: at least 1')])
def test_refused(tmp_path, options, said):
  with pytest.raises(UsageError, match=said):
    augment.run_noise(make(tmp_path, [{'text': 'a'}]), 'span_deletion',
                      **{'rate': 0.1, 'mean_span': 3., **options})
