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


@pytest.mark.parametrize('metric', [
    metrics.bleu, metrics.chrf, metrics.rouge, metrics.squad, metrics.exact_match,
    metrics.token_accuracy, metrics.squad_v2, metrics.trivia_qa, metrics.record, metrics.accuracy,
    metrics.matthews_corrcoef, metrics.f1_score_with_invalid, metrics.mean_3class_f1,
    metrics.multirc_exact_match, metrics.pearson_corrcoef, metrics.spearman_corrcoef])
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


# Answers


@pytest.mark.parametrize('answers, prediction, em, f1', [
    ([], '', 100., 100.),              # SQuAD 1.1's script has no such question
    ([], 'the', 100., 100.),           # normalises to nothing
    ([], 'Ada', 0., 0.),
    (['Ada Lovelace'], '', 0., 0.),
    (['Ada Lovelace', 'Ada'], 'the Ada.', 100., 100.),
    (['red dog'], 'the big red dog', 0., 80.),
    (['the', 'dog'], '', 0., 0.),      # 'the' normalises to nothing, 'dog' does not
    (['the'], '', 100., 100.)])
def test_squad_v2_by_hand(answers, prediction, em, f1):
  assert metrics.squad_v2([answers], [prediction]) == pytest.approx({'em': em, 'f1': f1})


def test_squad_v2_is_a_mean():
  assert metrics.squad_v2([[], 'Ada', ['b']], ['', 'ada', '']) == pytest.approx(
      {'em': 200 / 3, 'f1': 200 / 3})


def test_trivia_qa_puts_spaces_for_punctuation():
  """'1961-63' is two words here and one in SQuAD; quotes are punctuation here alone."""
  assert metrics.trivia_qa([['x', '1961-63']], ['1961 63']) == {'em': 100., 'f1': 100.}
  assert metrics.trivia_qa([['‘The’ Who´s_`A’']], ['who s']) == {'em': 100., 'f1': 100.}
  assert metrics.squad([['1961-63']], ['1961 63'])['em'] == 0.
  assert metrics.trivia_qa([['red dog']], ['a big-red dog']) == pytest.approx({'em': 0., 'f1': 80.})


def test_record_takes_the_first_of_each_group():
  targets = [{'value': ['a1', 'b1'], 'group': (0, 0)}, {'value': ['a1', 'b1'], 'group': (0, 0)},
             {'value': ['c1'], 'group': (0, 1)}, {'value': ['d1'], 'group': (1, 0)}]
  predictions = [{'value': x} for x in ('b1', 'zz', 'c1', 'zz')]
  assert metrics.record(targets, predictions) == pytest.approx({'em': 200 / 3, 'f1': 200 / 3})


# Classes and scores


def test_accuracy():
  assert metrics.accuracy([0, 1, 2, 0], [0, 1, -1, 0]) == {'accuracy': 75.}
  assert metrics.accuracy(['Ada', 'Bo'], ['Ada', 'bo']) == {'accuracy': 50.}


@pytest.mark.parametrize('targets, predictions, expected', [
    ([1, 1, 1, 0, 0], [1, 1, 0, 0, 1], 1 / 6),    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    ([1, 0, 1], [1, 0, 1], 1.), ([1, 0], [0, 1], -1.),
    ([1, 1, 0, 0], [1, -1, 0, 0], 6 / 80 ** .5),  # 3 * 4 - 6, (16 - 1 - 1 - 4) * (16 - 4 - 4)
    ([1, 0, 1], [1, 1, 1], 0.), ([1, 1], [1, 0], 0.), ([1, 1], [1, 1], 0.)])
def test_matthews_by_hand(targets, predictions, expected):
  measured = metrics.matthews_corrcoef(targets, predictions)['matthews_corrcoef']
  assert measured == pytest.approx(100 * expected, rel=1e-12)


def test_f1_counts_an_invalid_prediction_as_wrong():
  """[1, -1, -1, 0] for [1, 1, 0, 0] is [1, 0, 1, 0]: 1 right of 2 predicted and 2 there are."""
  assert metrics.f1_score_with_invalid([1, 1, 0, 0], [1, -1, -1, 0]) == {'f1': 50.}
  assert metrics.f1_score_with_invalid([1, 0, 1], [1, 0, 0]) == pytest.approx({'f1': 200 / 3})
  assert metrics.f1_score_with_invalid([0, 0], [0, 0]) == {'f1': 0.}
  assert metrics.f1_score_with_invalid([0, 0], [7, 7]) == {'f1': 0.}


def test_mean_of_the_f1_of_three_classes():
  """Class 0: 1 right of 1 and 2; class 1: 1 of 2 and 1; class 2: none of 0 and 1."""
  assert metrics.mean_3class_f1([0, 0, 1, 2], [0, 1, 1, -1]) == pytest.approx(
      {'mean_3class_f1': 100 * (2 / 3 + 2 / 3 + 0) / 3})
  assert metrics.mean_3class_f1([0, 0], [0, 0]) == pytest.approx({'mean_3class_f1': 100 / 3})


def test_multirc_by_hand():
  """Question 0 of paragraph 0 is right in both answers, its namesake of paragraph 1 in one."""
  targets = [{'value': v, 'group': g} for v, g in
             [(1, (0, 0)), (0, (0, 0)), (1, (1, 0)), (1, (1, 0)), (0, (1, 1))]]
  predictions = [{'value': v} for v in (1, 0, -1, 1, -1)]
  assert metrics.multirc_exact_match(targets, predictions) == pytest.approx(
      {'exact_match': 100 / 3})
  # 1 0 0 1 1 for 1 0 1 1 0
  assert metrics.multirc_f1_over_all_answers(targets, predictions) == pytest.approx(
      {'f1': 100 * 2 * 2 / (3 + 3)})


def test_correlations_by_hand():
  """1 2 2 3 has ranks 1 2.5 2.5 4."""
  assert metrics.pearson_corrcoef([1, 2, 3], [1, 2, 4]) == pytest.approx(
      {'pearson_corrcoef': 900 / 84 ** .5}, rel=1e-12)
  assert metrics.pearson_corrcoef([1., 2.], [7., -7.]) == pytest.approx(
      {'pearson_corrcoef': -100.})
  assert metrics.spearman_corrcoef([1, 2, 2, 3], [10, 20, 30, 400]) == pytest.approx(
      {'spearman_corrcoef': 100 * 4.5 / 22.5 ** .5}, rel=1e-12)
  assert metrics.spearman_corrcoef([3, 1, 2], [1, 9, 8]) == pytest.approx(
      {'spearman_corrcoef': -100.})


def test_a_constant_has_no_correlation():
  """A model that has not learnt to write numbers answers -1 always: 0, where scipy has nan."""
  for metric in (metrics.pearson_corrcoef, metrics.spearman_corrcoef):
    assert list(metric([1., 2., 4.], [-1., -1., -1.]).values()) == [0.]
    assert list(metric([.1, .1, .1], [1., 2., 4.]).values()) == [0.]
