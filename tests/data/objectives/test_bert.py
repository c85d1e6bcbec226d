import numpy as np
import pytest

from t5lab.data.objectives import bert
from t5lab.errors import UsageError


class Drawn:
  """A generator whose draws are given in order, each with the range that it is asked for."""

  def __init__(self, *draws):
    self.draws = list(draws)

  def random(self, size=None):
    return np.array(self.draws.pop(0)) if size else self.draws.pop(0)

  def integers(self, low, high=None, size=None):
    (first, end), drawn = self.draws.pop(0)
    assert (first, end) == ((0, low) if high is None else (low, high))
    return drawn if size is None else np.array(drawn)

  def choice(self, able, size, replace):
    expected, drawn = self.draws.pop(0)
    assert able.tolist() == expected and size == len(drawn) and not replace
    return np.array(drawn)


def lengths(example):
  return {f: len(x) for f, x in example.items()}


def plain(instances):
  return [(i['first'].tolist(), i['second'].tolist(), i['next'].tolist()) for i in instances]


def test_pairs_draw_by_draw():
  """Two documents, room for 5 tokens: create_instances_from_document, worked by hand."""
  documents = [[[10, 11], [12], [13, 14, 15]], [[20], [21, 22]]]
  rng = Drawn(
      .1,                     # the first document is not short
      ((1, 3), 2),            # 6 tokens of 3 sentences: the first has 2 of them
      .49,                    # the second is random, the third sentence is put back
      ((0, 2), 0),            # from this document: drawn again
      ((0, 2), 1), ((0, 2), 0),   # from the other one, its first sentence on, for 2 tokens
      .49,                    # 3 + 3 tokens: the second loses its front
      ((0, 2), 1), ((0, 2), 1),   # 13 14 15 are alone, so the second is random
      .09, ((2, 6), 2),       # the second document is short: 2 tokens
      ((1, 2), 1), .5)        # cut in two, and the second follows
  output = bert.pairs(documents, rng, 8)
  assert not rng.draws
  assert plain(output) == [([10, 11, 12], [21, 22], [1]), ([13, 14, 15], [21, 22], [1]),
                         ([20], [21, 22], [0])]
  assert all(x.dtype == np.int32 for instance in output for x in instance.values())


def test_the_longer_loses_its_front_or_back():
  a, b = np.arange(10, 16), np.arange(20, 24)
  first, second = bert._truncated(a, b, 6, Drawn(.49, .5, .5, .49))   # a, a, of equals b, a
  assert (first.tolist(), second.tolist()) == ([12, 13, 14], [20, 21, 22])
  first, second = bert._truncated(a, b[:0], 2, Drawn(.5, .5, .49, .5))
  assert (first.tolist(), second.tolist()) == ([11, 12], [])


def test_random_texts_come_from_one_other_document_until_long_enough():
  documents = [[[1]], [[20, 21], [22], [23]]]
  take = lambda wanted, *draws: bert._other_text(documents, 0, Drawn(*draws), wanted).tolist()
  assert take(3, ((0, 2), 1), ((0, 3), 0)) == [20, 21, 22]
  assert take(9, ((0, 2), 1), ((0, 3), 1)) == [22, 23]
  assert take(-3, ((0, 2), 1), ((0, 3), 1)) == [22]
  assert take(1, *[((0, 2), 0)] * 10, ((0, 1), 0)) == [1]    # ten draws, and it is this document


def test_pairs_of_few_or_no_sentences(rng):
  assert bert.pairs([], rng, 8) == [] and bert.pairs([[], [[]]], rng, 8) == []
  for documents in [[[7]]], [[[], [7]], [[]], []]:
    assert plain(bert.pairs(documents, rng, 5)) == [([7], [7], [1])]
  (first, second, _), = plain(bert.pairs([[[7, 8, 9]]], rng, 5))
  assert first in ([7], [8], [9]) and second in ([7], [8], [9])
  with pytest.raises(UsageError, match='needs a length of 5 tokens or more, got 4'):
    bert.pairs([[[7]]], rng, 4)


def test_pairs_lose_no_sentence_and_half_follow(rng):
  """Sentences of one token each are never cut: firsts and true seconds are the document again."""
  documents = [[[100 * d + s] for s in range(60)] for d in range(40)]
  output = bert.pairs(documents, rng, 13)
  text = [t for i in output for t in [*i['first'], *(i['second'] if not i['next'][0] else [])]]
  assert text == [t for document in documents for sentence in document for t in sentence]
  random = [i for i in output if i['next'][0]]
  assert all(i['first'][0] // 100 != i['second'][0] // 100 for i in random)
  assert all((np.diff(i['second']) == 1).all() for i in output)
  assert all(len(i['first']) + len(i['second']) <= 10 and min(map(len, i.values())) for i in output)
  assert abs(len(random) - len(output) / 2) < 5 * len(output)**0.5 / 2
  short = bert.pairs(documents, np.random.default_rng(1), 13, short_probability=1.)
  assert np.mean([len(i['first']) + len(i['second']) for i in short]) < 6.5
  full = bert.pairs(documents, np.random.default_rng(1), 13, short_probability=0.)
  assert np.mean([len(i['first']) + len(i['second']) for i in full]) > 8.5


def test_masks_draw_by_draw():
  """1 and 2 are special. Below .8 a mask, below .9 as it is, then a word of the vocabulary."""
  rng = Drawn(([1, 2, 3, 5], [5, 1, 3, 2]), [.79, .8, .89, .9], ((0, 50), [30, 31, 32, 33]))
  masked, weights = bert.mask_words([1, 5, 6, 7, 2, 8, 2], rng, mask=3, vocab_size=50,
                                    special=(1, 2), density=0.5)
  assert masked.tolist() == [1, 5, 33, 7, 2, 3, 2]
  assert weights.tolist() == [0, 1, 1, 1, 0, 1, 0]
  assert masked.dtype == weights.dtype == np.int32


@pytest.mark.parametrize('length, count', [(1, 1), (2, 1), (10, 2), (20, 3), (30, 4), (130, 20)])
def test_counts_round_half_to_even(rng, length, count):
  count_of = lambda **limit: bert.mask_words(
      np.arange(length) + 9, rng, mask=3, vocab_size=50, **limit)[1].sum()
  assert count_of() == count and count_of(max_predictions=19) == min(count, 19)


def test_masks_of_nothing_to_mask(rng):
  for tokens in [], [1, 2, 2]:
    masked, weights = bert.mask_words(tokens, rng, mask=3, vocab_size=50, special=(1, 2))
    assert masked.tolist() == tokens and weights.tolist() == [0] * len(tokens)
  masked, weights = bert.mask_words([1, 7, 2], rng, mask=3, vocab_size=50, special=(1, 2),
                                    density=1.)
  assert weights.tolist() == [0, 1, 0]      # three are wanted, one can be


def test_shares_of_masks(rng):
  """Eighty, ten and ten in a hundred, at every position alike, words from the whole vocabulary."""
  tokens = np.full(200, 1000)
  masked, weights = map(np.array, zip(*(
      bert.mask_words(tokens, rng, mask=3, vocab_size=50) for _ in range(600))))
  assert (weights.sum(1) == 30).all() and (masked[weights == 0] == 1000).all()
  assert np.abs(weights.mean(0) - 0.15).max() < 5 * 0.0146
  chosen = masked[weights == 1]             # 18,000
  words = chosen[chosen < 50]
  assert abs((chosen == 1000).mean() - 0.1) < 5 * 0.0022
  assert abs((words == 3).sum() - 18_000 * (0.8 + 0.1 / 50)) < 5 * 54
  counts = np.delete(np.bincount(words, minlength=50), 3)
  assert len(counts) == 49 and abs(counts - 36).max() < 5 * 6


def test_mlm_of_a_pair(rng):
  example = {'first': np.array([5, 6, 7]), 'second': np.array([8, 9]), 'next': np.array([1])}
  output = bert.mlm(example, rng, cls=1, sep=2, mask=3, vocab_size=50)
  assert output['targets'].tolist() == [1, 5, 6, 7, 2, 8, 9, 2]
  assert output['types'].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
  assert output['next'].tolist() == [1] and output['weights'].sum() == 1
  changed = output['inputs'] != output['targets']
  assert (output['weights'][changed] == 1).all()
  assert all(x.dtype == np.int32 for x in output.values())
  assert {f: len(x) for f, x in output.items()} == bert.mlm_sizes(lengths(example)) == {
      'inputs': 8, 'targets': 8, 'weights': 8, 'types': 8, 'next': 1}
  again = [tuple(bert.mlm(example, rng, cls=1, sep=2, mask=3, vocab_size=50)['inputs'])
           for _ in range(30)]
  assert len(set(again)) > 5                # another mask each time


def test_mlm_of_one_text(rng):
  example = {'targets': np.array([5, 2, 1, 6])}
  output = bert.mlm(example, rng, cls=1, sep=2, mask=3, vocab_size=50, density=1.)
  assert output['targets'].tolist() == [1, 5, 2, 1, 6, 2]
  assert output['weights'].tolist() == [0, 1, 0, 0, 1, 0]    # marks in the text are not masked
  assert output['types'].tolist() == [0] * 6
  assert {f: len(x) for f, x in output.items()} == bert.mlm_sizes(lengths(example))
  assert 'next' not in output
  few = bert.mlm(example, rng, cls=1, sep=2, mask=3, vocab_size=50, density=1., max_predictions=1)
  assert few['weights'].sum() == 1
  output = bert.mlm({'targets': []}, rng, cls=1, sep=2, mask=3, vocab_size=50)
  assert output['inputs'].tolist() == [1, 2] and output['weights'].sum() == 0


def test_segments():
  assert bert.mlm_segment('x', {'inputs': 128}) == 126
  assert bert.mlm_sizes({'targets': 126})['inputs'] == 128
  with pytest.raises(UsageError, match="task 'x' cannot mask text in 2 inputs: the minimum is 3"):
    bert.mlm_segment('x', {'inputs': 2})


def test_a_vocabulary_without_an_opening_token_opens_with_none():
  pair = {'first': np.array([5, 6]), 'second': np.array([7]), 'next': np.array([1])}
  output = bert.mlm(pair, np.random.default_rng(0), cls=None, sep=2, mask=3, vocab_size=50)
  assert output['targets'].tolist() == [5, 6, 2, 7, 2]
  assert output['types'].tolist() == [0, 0, 0, 1, 1] and output['next'].tolist() == [1]
