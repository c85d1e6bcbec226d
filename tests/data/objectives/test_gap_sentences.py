import itertools

import numpy as np
import pytest
from rouge_score import rouge_scorer

from t5lab.data.objectives import gap_sentences
from t5lab.errors import UsageError

IDS = dict(mask=3, eos=1)
# Five sentences: 10 11 | 12 | 10 13 10 | 14 15 | 10 12
DOCUMENT = {'targets': np.array([10, 11, 12, 10, 13, 10, 14, 15, 10, 12], np.int32),
            'sentences': np.array([0, 2, 3, 6, 8])}


def gapped(example, rng, **options):
  features = gap_sentences.gap_sentences(example, rng, **IDS, **options)
  assert list(features) == ['inputs', 'targets']
  assert all(x.dtype == np.int32 for x in features.values())
  return [x.tolist() for x in features.values()]


def drawn(rng, lengths, vocab=9):
  starts = np.cumsum([0, *lengths])
  return {'targets': rng.integers(10, 10 + vocab, starts[-1]).astype(np.int32),
          'sentences': starts[:-1]}


def test_importance_by_hand():
  """Overlaps with the rest: 10; 12; two of 10; none; 10 and 12. Of 10 tokens."""
  assert gap_sentences.importance(**renamed(DOCUMENT)).tolist() == [.2, .2, .4, 0, .4]
  assert gap_sentences.importance([5, 6, 5, 7, 8, 9], [0, 2, 4]).tolist() == [1 / 3, 1 / 3, 0]
  assert gap_sentences.importance([5, 5, 5], [0, 1]).tolist() == [2 / 3, 2 / 3]
  assert gap_sentences.importance([5], [0]).tolist() == [0]
  assert gap_sentences.importance([], [0, 0]).tolist() == [0, 0]
  assert gap_sentences.importance([], []).tolist() == []


def renamed(example):
  return {'tokens': example['targets'], 'starts': example['sentences']}


def test_importance_is_rouge(rng):
  """ROUGE-1 F of the rouge_score package, the ids as words."""
  scorer = rouge_scorer.RougeScorer(['rouge1'])
  for lengths in [4, 1, 7, 3], [5, 5], [12, 2, 2, 9, 1, 1]:
    example = drawn(rng, lengths)
    sentences = [s.tolist() for s in np.split(example['targets'], example['sentences'][1:])]
    words = lambda sentences: ' '.join(f'w{t}' for s in sentences for t in s)
    scores = [scorer.score(words(sentences[:i] + sentences[i + 1:]), words([s]))['rouge1'].fmeasure
              for i, s in enumerate(sentences)]
    np.testing.assert_allclose(gap_sentences.importance(**renamed(example)), scores, atol=1e-12)


def test_counts_are_the_released_codes():
  counts = [gap_sentences.gap_count(n, .3) for n in (0, 1, 2, 3, 4, 6, 7, 10, 20)]
  assert counts == [0, 1, 1, 1, 1, 1, 2, 3, 6]
  assert gap_sentences.gap_count(3, 1.) == gap_sentences.gap_count(3, 1.4) == 3


def test_strategies_of_a_document():
  """The third and fifth score the same: the later one first."""
  assert gapped(DOCUMENT, None, ratio=.3) == [[10, 11, 12, 10, 13, 10, 14, 15, 3, 1], [10, 12, 1]]
  assert gapped(DOCUMENT, None, ratio=.4) == [
      [10, 11, 12, 3, 14, 15, 3, 1], [10, 13, 10, 10, 12, 1]]
  assert gapped(DOCUMENT, None, ratio=.4, strategy='lead') == [
      [3, 3, 10, 13, 10, 14, 15, 10, 12, 1], [10, 11, 12, 1]]
  assert gapped(DOCUMENT, None, ratio=1.) == [[3, 3, 3, 3, 3, 1], [*DOCUMENT['targets'], 1]]
  with pytest.raises(UsageError, match="unknown strategy 'principle' .* Did you mean 'principal'"):
    gapped(DOCUMENT, None, strategy='principle')


def test_documents_of_one_sentence_and_of_none():
  one = {'targets': np.array([5, 6]), 'sentences': np.array([0])}
  assert gapped(one, None) == [[3, 1], [5, 6, 1]]
  none = {'targets': np.zeros(0, np.int32), 'sentences': np.zeros(0, np.int64)}
  for strategy in gap_sentences.STRATEGIES:
    assert gapped(none, np.random.default_rng(0), strategy=strategy) == [[1], [1]]
    assert gap_sentences.gap_sentences_sizes(none, strategy=strategy) == {
        'inputs': 1, 'targets': 1}
  empty = {'targets': np.array([5]), 'sentences': np.array([0, 0, 1])}   # two sentences of no token
  assert gapped(empty, None, strategy='lead', ratio=.4) == [[3, 5, 1], [1]]
  assert gapped(empty, None, strategy='lead', ratio=1.) == [[3, 3, 3, 1], [5, 1]]
  assert gap_sentences.gap_sentences_sizes(empty, strategy='random') == {'inputs': 3, 'targets': 2}


def test_ids_of_the_text_that_equal_the_marks_pass_through():
  example = {'targets': np.array([3, 1, 3, 1]), 'sentences': np.array([0, 2])}
  assert gapped(example, None, strategy='lead') == [[3, 3, 1, 1], [3, 1, 1]]


def test_random_takes_every_sentence_alike(rng):
  counts = np.zeros(5)
  for _ in range(3000):
    gaps = gap_sentences.gap_mask(DOCUMENT, rng, ratio=.4, strategy='random')
    assert gaps.sum() == 2
    counts += gaps
  assert np.abs(counts - 1200).max() < 5 * 27


def test_ratios_and_noise_are_drawn(rng):
  """10 sentences, 15 % to 45 %: 1 or 4 of them a sixth of the time each, 2 or 3 a third."""
  example = drawn(rng, [3] * 10)
  counts = np.bincount([gap_sentences.gap_mask(example, rng, ratio=(.15, .45)).sum()
                        for _ in range(3000)], minlength=5)
  assert np.abs(counts - [0, 500, 1000, 1000, 500]).max() < 5 * 26
  # Scores of .4 and .4 stand above two of .2: noise up to a fifth reorders only the equal ones.
  best = [gap_sentences.gap_mask(DOCUMENT, rng, noise=.2).tolist().index(True)
          for _ in range(1000)]
  assert set(best) == {2, 4} and abs(best.count(2) - 500) < 5 * 16
  far = [gap_sentences.gap_mask(DOCUMENT, rng, noise=.6).tolist().index(True)
         for _ in range(1000)]
  assert set(far) == {0, 1, 2, 4}           # .2 * 1.6 can pass .4 * .4


@pytest.mark.parametrize('options', [
    {}, {'strategy': 'lead'}, {'strategy': 'random'}, {'ratio': (.15, .45), 'noise': .2},
    {'ratio': (.2, .7), 'strategy': 'lead'}, {'ratio': .5, 'noise': .9}])
def test_sizes_hold_and_gaps_filled_give_the_text(rng, options):
  for lengths in [4, 1, 7, 3, 1, 9, 2, 2], [5, 5], [3]:
    example = drawn(rng, lengths, vocab=4)
    sentences = np.split(example['targets'], example['sentences'][1:])
    sizes, seen = gap_sentences.gap_sentences_sizes(example, **options), []
    for _ in range(100):
      inputs, targets = gapped(example, rng, **options)
      seen.append((len(inputs), len(targets)))
      masks = inputs.count(3)
      assert any(  # some choice of so many sentences explains both features
          targets == [t for i in gaps for t in sentences[i]] + [1]
          and inputs == [t for i, s in enumerate(sentences)
                         for t in ([3] if i in gaps else s)] + [1]
          for gaps in itertools.combinations(range(len(sentences)), masks))
    assert all(i <= sizes['inputs'] and t <= sizes['targets'] for i, t in seen)
    if not {'ratio', 'noise'} & set(options) and options.get('strategy') != 'random':
      assert set(seen) == {(sizes['inputs'], sizes['targets'])}


def test_bounds_of_what_is_drawn():
  """10 11 | 12 | 10 13 10 | 14 15 | 10 12: two gaps leave out 1 + 2 tokens or 3 + 2."""
  size = lambda **options: tuple(gap_sentences.gap_sentences_sizes(DOCUMENT, **options).values())
  assert size(ratio=.4, strategy='random') == (10 - 3 + 2 + 1, 5 + 1)
  assert size(ratio=(.2, .4), noise=.1) == (10 - 1 + 1 + 1, 5 + 1)
  assert size(ratio=(.2, .4), strategy='lead') == (10 - 2 + 1 + 1, 3 + 1)
  assert size(ratio=.4) == (8, 6)


@pytest.mark.parametrize('options', [{}, {'strategy': 'lead'}, {'strategy': 'random'},
                                     {'ratio': (.15, .45), 'noise': .2}])
def test_pieces_are_whole_sentences_that_fit(rng, options):
  lengths = {'inputs': 24, 'targets': 13}
  example = drawn(rng, rng.integers(1, 8, 200))
  pieces = gap_sentences.gap_sentences_pieces('x', example, lengths, **options)
  text = np.concatenate([p['targets'] for p in pieces])
  lost = len(example['targets']) - len(text)
  assert text.tolist() == example['targets'][:len(text)].tolist() and 0 <= lost < 8
  starts, at = [], 0
  for piece in pieces:
    assert len(piece['sentences']) >= 2 and piece['sentences'][0] == 0
    sizes = gap_sentences.gap_sentences_sizes(piece, **options)
    assert sizes['inputs'] <= 24 and sizes['targets'] <= 13
    starts += (piece['sentences'] + at).tolist()
    at += len(piece['targets'])
  assert starts == example['sentences'][:len(starts)].tolist()
  for piece, following in zip(pieces, pieces[1:]):   # and one sentence more would not
    first = (following['sentences'][1:2])[0]
    longer = {'targets': np.concatenate([piece['targets'], following['targets'][:first]]),
              'sentences': np.append(piece['sentences'], len(piece['targets']))}
    sizes = gap_sentences.gap_sentences_sizes(longer, **options)
    assert sizes['inputs'] > 24 or sizes['targets'] > 13


def test_pieces_of_long_sentences():
  """Five tokens at most: two of them share 7 inputs and 6 targets."""
  example = {'targets': np.arange(10, 25), 'sentences': np.array([0, 12])}
  for inputs, targets in (7, 6), (8, 6), (7, 7):
    pieces = gap_sentences.gap_sentences_pieces(
        'x', example, {'inputs': inputs, 'targets': targets})
    assert [(p['targets'].tolist(), p['sentences'].tolist()) for p in pieces] == [
        ([*range(10, 20)], [0, 5]), ([*range(20, 25)], [0, 2])]
  whole, = gap_sentences.gap_sentences_pieces('x', DOCUMENT, {'inputs': 99, 'targets': 99})
  assert all(whole[f].tolist() == DOCUMENT[f].tolist() for f in DOCUMENT)
  one = {'targets': np.array([5, 6]), 'sentences': np.array([0])}
  assert gap_sentences.gap_sentences_pieces('x', one, {'inputs': 9, 'targets': 9}) == []
  assert len(gap_sentences.gap_sentences_pieces('x', one, {'inputs': 3, 'targets': 2})) == 1
  with pytest.raises(UsageError, match='in 2 inputs and 9 targets: the minimum is 3 and 2'):
    gap_sentences.gap_sentences_pieces('x', one, {'inputs': 2, 'targets': 9})
