"""Scores of text against references, as T5 computed them. Plain Python and numpy.

Every function takes seqio's (targets, predictions), one entry an example, and returns a dict of
floats in 0..100 (an error rate may pass 100, a correlation be negative).
[Raffel et al. 2020, 2.3; t5/evaluation/metrics.py]
"""
import collections
import re
import string

import numpy as np

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
_SPACED_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + '‘’´`', ' '))


def _check(targets, predictions):
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(f'{len(targets)} targets and {len(predictions)} predictions: '
                     f'a score needs one prediction a target and at least one of each')


def _percent(values) -> float:
  """100 times the mean of numbers or bools."""
  return 100 * float(np.mean(values))


def _references(targets) -> list[list[str]]:
  """Reference streams for sacrebleu: streams[i][n] is reference i of example n."""
  if isinstance(targets[0], str):
    return [list(targets)]
  most = max(map(len, targets))
  return [[refs[i] if i < len(refs) else None for refs in targets] for i in range(most)]


def bleu(targets, predictions) -> dict[str, float]:
  """Corpus BLEU of sacrebleu, smoothing exp, tokenizer intl (as in T5; sacrebleu's default is 13a).

  targets: str, or a list of references, an example.
  """
  import sacrebleu
  _check(targets, predictions)
  score = sacrebleu.corpus_bleu(
      list(predictions), _references(targets), smooth_method='exp', smooth_value=0.0, force=False,
      lowercase=False, tokenize='intl', use_effective_order=False)
  return {'bleu': score.score}


def chrf(targets, predictions) -> dict[str, float]:
  """Corpus chrF2: character 1..6-grams, no words. [Popović 2015; sacrebleu's default]"""
  import sacrebleu
  _check(targets, predictions)
  return {'chrf': sacrebleu.corpus_chrf(list(predictions), _references(targets)).score}


def rouge(targets, predictions) -> dict[str, float]:
  """Mean F of ROUGE-1, ROUGE-2 and summary-level ROUGE-L, without stemming. [Lin 2004]

  T5 reports the median of 1000 bootstrap means, which is random; this is the mean itself.
  """
  from rouge_score import rouge_scorer
  _check(targets, predictions)
  keys = ('rouge1', 'rouge2', 'rougeLsum')
  scorer = rouge_scorer.RougeScorer(list(keys), use_stemmer=False)
  sentences = lambda text: text.replace(' . ', ' .\n')  # rougeLsum splits sentences at newlines
  scores = [scorer.score(sentences(t), sentences(p)) for t, p in zip(targets, predictions)]
  return {key: _percent([score[key].fmeasure for score in scores]) for key in keys}


# Answers to questions


def normalize_answer(text: str, punctuation=_NO_PUNCTUATION) -> str:
  """Lower case without ASCII punctuation and articles, single spaces. [Rajpurkar et al. 2016]"""
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(punctuation)).split())


def _token_f1(target: str, prediction: str) -> float:
  target, prediction = target.split(), prediction.split()
  same = sum((collections.Counter(target) & collections.Counter(prediction)).values())
  return 2 * same / (len(target) + len(prediction)) if same else 0.


def _best_answers(targets, predictions, punctuation=_NO_PUNCTUATION, unanswerable=False):
  _check(targets, predictions)
  em, f1 = [], []
  for answers, prediction in zip(targets, predictions):
    answers = [answers] if isinstance(answers, str) else answers
    prediction = normalize_answer(prediction, punctuation)
    answers = [normalize_answer(answer, punctuation) for answer in answers]
    if unanswerable:
      answers = list(filter(None, answers)) or ['']
    em.append(prediction in answers)
    f1.append(max(_token_f1(answer, prediction) for answer in answers))
    if unanswerable and answers == ['']:
      f1[-1] = float(not prediction)
  return {'em': _percent(em), 'f1': _percent(f1)}


def squad(targets, predictions) -> dict[str, float]:
  """Exact match and token F1, the best over each example's answers (a list of str, or one str).

  F1 of an empty prediction and an empty answer is 0, as in SQuAD 1.1's script.
  """
  return _best_answers(targets, predictions)


def squad_v2(targets, predictions) -> dict[str, float]:
  """`squad` by SQuAD 2.0's script: the right prediction for an unanswerable question is empty.

  Answers that normalise to nothing are left out, unless all do: then both scores are 1 for a
  prediction that does too, else 0. [Rajpurkar et al. 2018; evaluate-v2.0.py]
  """
  return _best_answers(targets, predictions, unanswerable=True)


def trivia_qa(targets, predictions) -> dict[str, float]:
  """`squad` by TriviaQA's script: punctuation and quotes become spaces. [Joshi 2017]"""
  return _best_answers(targets, predictions, _SPACED_PUNCTUATION)


def record(targets, predictions) -> dict[str, float]:
  """`squad` over the first example of each group: ReCoRD has an example for each right answer.

  targets: {'value': answers, 'group': of a query}; predictions: {'value': str}.
  """
  _check(targets, predictions)
  first = {}
  for target, prediction in zip(targets, predictions):
    first.setdefault(target['group'], (target['value'], prediction['value']))
  return squad(*zip(*first.values()))


# Classes and scores: an invalid class is predicted as -1


def accuracy(targets, predictions) -> dict[str, float]:
  """The fraction of predictions that equal their target, of any type."""
  _check(targets, predictions)
  return {'accuracy': _percent([t == p for t, p in zip(targets, predictions)])}


def matthews_corrcoef(targets, predictions) -> dict[str, float]:
  """Matthews correlation; an invalid prediction is one more class. 0 if all are of one class.

  [Gorodkin 2004, R_K; as scikit-learn's, which T5 uses]
  """
  _check(targets, predictions)
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  classes = np.union1d(targets, predictions)
  t, p = (np.array([np.sum(x == c) for c in classes], float) for x in (targets, predictions))
  n, right = len(targets), np.sum(targets == predictions)
  spread = (n**2 - p @ p) * (n**2 - t @ t)
  return {'matthews_corrcoef': 100 * float((right * n - t @ p) / np.sqrt(spread)) if spread else 0.}


def _class_f1(targets, predictions, label) -> float:
  """F1 of one class, from 0 to 1; 0 if it is neither a target nor predicted."""
  targets, predictions = (np.asarray(x) == label for x in (targets, predictions))
  both, either = np.sum(targets & predictions), np.sum(targets) + np.sum(predictions)
  return 2 * float(both) / max(1, int(either))


def f1_score_with_invalid(targets, predictions) -> dict[str, float]:
  """F1 of class 1 of 0 and 1; an invalid prediction counts as the wrong class."""
  _check(targets, predictions)
  valid = [p if p in (0, 1) else 1 - t for t, p in zip(targets, predictions)]
  return {'f1': 100 * _class_f1(targets, valid, 1)}


def mean_3class_f1(targets, predictions) -> dict[str, float]:
  """Mean of the F1 of classes 0, 1 and 2, for CommitmentBank."""
  _check(targets, predictions)
  return {'mean_3class_f1': _percent([_class_f1(targets, predictions, c) for c in range(3)])}


def multirc_f1_over_all_answers(targets, predictions) -> dict[str, float]:
  """f1_score_with_invalid over {'value': class}: MultiRC's F1a. [Khashabi et al. 2018]"""
  return f1_score_with_invalid([t['value'] for t in targets], [p['value'] for p in predictions])


def multirc_exact_match(targets, predictions) -> dict[str, float]:
  """The fraction of questions, which are groups of answers, with every answer judged correctly.

  targets: {'value': class, 'group': of a question}; predictions: {'value': class}.
  """
  _check(targets, predictions)
  right = {}
  for target, prediction in zip(targets, predictions):
    group = target['group']
    right[group] = right.get(group, True) and target['value'] == prediction['value']
  return {'exact_match': _percent(list(right.values()))}


def _correlation(x, y) -> float:
  """Pearson correlation, from -100 to 100; 0 if one side is constant (scipy gives NaN)."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if not (np.ptp(x) and np.ptp(y)):
    return 0.
  x, y = x - x.mean(), y - y.mean()
  return 100 * float((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)))


def _ranks(x) -> np.ndarray:
  """float[n], 1 for the smallest; equal values get the mean of their ranks."""
  _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[which]


def pearson_corrcoef(targets, predictions) -> dict[str, float]:
  """Linear correlation, from -100 to 100."""
  _check(targets, predictions)
  return {'pearson_corrcoef': _correlation(targets, predictions)}


def spearman_corrcoef(targets, predictions) -> dict[str, float]:
  """Rank correlation, from -100 to 100."""
  _check(targets, predictions)
  return {'spearman_corrcoef': _correlation(_ranks(targets), _ranks(predictions))}


# Tokens and phonemes


def exact_match(targets, predictions) -> dict[str, float]:
  """The fraction of predictions that equal their target."""
  return {'exact_match': accuracy(targets, predictions)['accuracy']}


def _edits(target: str, prediction: str) -> int:
  """The least number of insertions, deletions and substitutions. [Levenshtein 1966]"""
  row = list(range(len(prediction) + 1))
  for i, t in enumerate(target, start=1):
    before, row[0] = row[0], i
    for j, p in enumerate(prediction, start=1):
      before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (t != p))
  return row[-1]


def phoneme_error_rate(targets, predictions) -> dict[str, float]:
  """Edits per 100 target phonemes, over all examples; a character is a phoneme.

  Stress marks count as phonemes, as do length marks: what the dictionary writes is compared.
  """
  _check(targets, predictions)
  edits = sum(map(_edits, targets, predictions))
  return {'per': 100 * edits / max(1, sum(map(len, targets)))}


def token_accuracy(targets, predictions) -> dict[str, float]:
  """The fraction of target positions at which the prediction has the same token id."""
  _check(targets, predictions)
  same = sum(int(t == p) for ts, ps in zip(targets, predictions) for t, p in zip(ts, ps))
  return {'token_accuracy': 100 * same / max(1, sum(map(len, targets)))}


# Metrics for a user's files, by name (data.metrics). Those of the first group accept a list of
# references as a target; the others score against its first entry.
SEVERAL_REFERENCES = {fn.__name__: fn for fn in (bleu, chrf, squad, trivia_qa)}
FOR_FILES = {**SEVERAL_REFERENCES, **{fn.__name__: fn for fn in (rouge, exact_match)}}
