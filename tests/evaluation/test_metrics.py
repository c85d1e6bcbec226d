import inspect
import math

import pytest

from t5lab.evaluation import metrics


def test_bleu_by_hand():
  target, prediction = 'a b c d e f g h', 'a b c d x f g h'
  # unigrams 7/8; bigrams ab bc cd fg gh of 7; trigrams abc bcd fgh of 6; 4-grams abcd of 5
  expected = 100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25
  assert metrics.bleu([target], [prediction])['bleu'] == pytest.approx(expected, rel=1e-9)


def test_bleu_brevity_penalty_by_hand():
  expected = 100 * math.exp(1 - 8 / 4)
  assert metrics.bleu(['a b c d e f g h'], ['a b c d'])['bleu'] == pytest.approx(expected, rel=1e-9)


def test_bleu_smooths_exponentially():
  """No 3- or 4-gram match: the first zero counts 1/2, the second 1/4."""
  expected = 100 * (3 / 4 * 1 / 3 * (1 / 2 / 2) * (1 / 4 / 1)) ** 0.25
  assert metrics.bleu(['a b c d'], ['a b x d'])['bleu'] == pytest.approx(expected, rel=1e-9)


def test_bleu_tokenizes_as_intl():
  """intl splits '–' off a word, where 13a does not: with 13a this is no full match."""
  assert metrics.bleu(['a b c d–e'], ['a b c d – e'])['bleu'] == pytest.approx(100.)


def test_bleu_keeps_case_and_takes_several_references():
  assert metrics.bleu(['A B C D'], ['a b c d'])['bleu'] < 1
  assert metrics.bleu([['x y z w', 'a b c d'], ['e f g h']],
                      ['a b c d', 'e f g h'])['bleu'] == pytest.approx(100.)


def test_chrf_by_hand():
  """'ab' for 'abc': 1-grams P 2/2 R 2/3, 2-grams P 1/1 R 1/2; F2 averaged over orders with n-grams.

  sacrebleu averages precision and recall over the orders that both have, then takes F2.
  """
  precision, recall = 1., (2 / 3 + 1 / 2) / 2
  expected = 100 * 5 * precision * recall / (4 * precision + recall)
  assert metrics.chrf(['abc'], ['ab'])['chrf'] == pytest.approx(expected, rel=1e-9)
  assert metrics.chrf(['abc'], ['abc'])['chrf'] == pytest.approx(100.)


def test_rouge_by_hand():
  """5 of 6 unigrams, 3 of 5 bigrams, longest common subsequence 5 of 6."""
  scores = metrics.rouge(['the cat sat on the mat'], ['the cat lay on the mat'])
  assert scores == pytest.approx({'rouge1': 500 / 6, 'rouge2': 60., 'rougeLsum': 500 / 6})


def test_rouge_does_not_stem_and_is_a_mean():
  assert metrics.rouge(['run', 'run'], ['running', 'run'])['rouge1'] == pytest.approx(50.)


def test_rouge_splits_sentences_at_spaced_stops():
  """Sentences swapped: the union of their subsequences still finds every word."""
  target, prediction = 'a b . c d', 'c d . a b'
  assert metrics.rouge([target], [prediction])['rougeLsum'] == pytest.approx(100.)
  assert metrics.rouge(['a b c d'], ['c d a b'])['rougeLsum'] == pytest.approx(50.)


def test_squad_by_hand():
  """'the big red dog' for 'red dog': articles go, 2 common of 3 and 2 words, F1 2*2/(3+2)."""
  assert metrics.squad([['red dog']], ['the big red dog']) == pytest.approx({'em': 0., 'f1': 80.})


def test_squad_takes_the_best_answer_and_normalises():
  assert metrics.squad([['1961 - 63', 'no'], ['U . S .']], ['1961 -63.', 'An U. S.']) == {
      'em': 100., 'f1': 100.}
  assert metrics.squad([['1961-63']], ['1961 - 63'])['em'] == 0.  # raw against padded loses


def test_squad_of_nothing():
  assert metrics.squad([['the']], ['']) == {'em': 100., 'f1': 0.}
  assert metrics.squad(['x'], ['']) == {'em': 0., 'f1': 0.}


def test_articles_are_whole_words():
  assert metrics.normalize_answer('The  cat, an   (area)!') == 'cat area'


def test_exact_match_and_token_accuracy():
  assert metrics.exact_match(['a', 'b', 'c', 'd'], ['a', 'b', 'c', 'x']) == {'exact_match': 75.}
  assert metrics.token_accuracy([[5, 6, 7], [8]], [[5, 0, 7, 9], []]) == {'token_accuracy': 50.}


@pytest.mark.parametrize('metric', [metrics.bleu, metrics.chrf, metrics.rouge, metrics.squad,
                                    metrics.exact_match, metrics.token_accuracy])
def test_seqios_argument_names_and_a_lost_prediction(metric):
  assert list(inspect.signature(metric).parameters) == ['targets', 'predictions']
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    metric(['a', 'b'], ['a'])
  with pytest.raises(ValueError, match='0 targets'):
    metric([], [])


def test_phoneme_error_rate_by_hand():
  """kitten -> sitting takes 3 edits, '' -> ab 2: 5 edits for 6 + 2 phonemes."""
  targets, predictions = ['kitten', 'ab', ''], ['sitting', '', '']
  assert metrics.phoneme_error_rate(targets, predictions) == {'per': 100 * 5 / 8}
  assert metrics.phoneme_error_rate(['sˈi'], ['sˈi']) == {'per': 0}
  assert metrics.phoneme_error_rate(['a'], ['bcd']) == {'per': 300}
  assert metrics.phoneme_error_rate([''], ['a']) == {'per': 100}
