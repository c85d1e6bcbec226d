"""Scores of text against references, as T5 computed them. Plain Python and numpy.

Every function takes seqio's (targets, predictions), one entry an example, and returns a dict of
floats in 0..100 (an error rate may pass 100). [Raffel et al. 2020, 2.3; t5/evaluation/metrics.py]
"""
import collections
import re
import string

import numpy as np
from rouge_score import rouge_scorer
import sacrebleu

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def _check(targets, predictions):
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(f'{len(targets)} targets and {len(predictions)} predictions: '
                     f'a score needs one prediction a target and at least one of each')


def _references(targets) -> list[list[str]]:
  """Reference streams, as sacrebleu wants them: streams[i][n] is reference i of example n."""
  if isinstance(targets[0], str):
    return [list(targets)]
  most = max(map(len, targets))
  return [[refs[i] if i < len(refs) else None for refs in targets] for i in range(most)]


def bleu(targets, predictions) -> dict[str, float]:
  """Corpus BLEU of sacrebleu, smoothing exp, tokenizer intl (the paper's; sacrebleu's own is 13a).

  targets: str, or a list of references, an example.
  """
  _check(targets, predictions)
  score = sacrebleu.corpus_bleu(
      list(predictions), _references(targets), smooth_method='exp', smooth_value=0.0, force=False,
      lowercase=False, tokenize='intl', use_effective_order=False)
  return {'bleu': score.score}


def chrf(targets, predictions) -> dict[str, float]:
  """Corpus chrF2: character 1..6-grams, no words. [Popović 2015; sacrebleu's default]"""
  _check(targets, predictions)
  return {'chrf': sacrebleu.corpus_chrf(list(predictions), _references(targets)).score}


def rouge(targets, predictions) -> dict[str, float]:
  """Mean F of ROUGE-1, ROUGE-2 and summary-level ROUGE-L, without stemming. [Lin 2004]

  T5 reports the median of 1000 bootstrap means, which is random; this is the mean itself.
  """
  _check(targets, predictions)
  keys = ('rouge1', 'rouge2', 'rougeLsum')
  scorer = rouge_scorer.RougeScorer(list(keys), use_stemmer=False)
  sentences = lambda text: text.replace(' . ', ' .\n')  # rougeLsum splits sentences at newlines
  scores = [scorer.score(sentences(t), sentences(p)) for t, p in zip(targets, predictions)]
  return {key: 100 * float(np.mean([score[key].fmeasure for score in scores])) for key in keys}


def normalize_answer(text: str) -> str:
  """Lower case, no ASCII punctuation, no articles, single spaces. [Rajpurkar et al. 2016]"""
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_NO_PUNCTUATION)).split())


def _token_f1(target: str, prediction: str) -> float:
  target, prediction = target.split(), prediction.split()
  same = sum((collections.Counter(target) & collections.Counter(prediction)).values())
  return 2 * same / (len(target) + len(prediction)) if same else 0.


def squad(targets, predictions) -> dict[str, float]:
  """Exact match and token F1, the best over each example's answers (a list of str, or one str).

  F1 of an empty prediction and an empty answer is 0, as in SQuAD 1.1's script.
  """
  _check(targets, predictions)
  em, f1 = [], []
  for answers, prediction in zip(targets, predictions):
    answers = [answers] if isinstance(answers, str) else answers
    prediction = normalize_answer(prediction)
    answers = [normalize_answer(answer) for answer in answers]
    em.append(max(answer == prediction for answer in answers))
    f1.append(max(_token_f1(answer, prediction) for answer in answers))
  return {'em': 100 * float(np.mean(em)), 'f1': 100 * float(np.mean(f1))}


def exact_match(targets, predictions) -> dict[str, float]:
  """Share of predictions equal to their target."""
  _check(targets, predictions)
  return {'exact_match': 100 * float(np.mean([t == p for t, p in zip(targets, predictions)]))}


def _edits(target: str, prediction: str) -> int:
  """Fewest insertions, deletions and substitutions of a character. [Levenshtein 1966]"""
  row = list(range(len(prediction) + 1))
  for i, t in enumerate(target, start=1):
    before, row[0] = row[0], i
    for j, p in enumerate(prediction, start=1):
      before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (t != p))
  return row[-1]


def phoneme_error_rate(targets, predictions) -> dict[str, float]:
  """Edits over all examples for 100 phonemes of their targets; a character is a phoneme.

  Stress marks count as phonemes, as do length marks: what the dictionary writes is compared.
  """
  _check(targets, predictions)
  edits = sum(map(_edits, targets, predictions))
  return {'per': 100 * edits / max(1, sum(map(len, targets)))}


def token_accuracy(targets, predictions) -> dict[str, float]:
  """Share of target positions where the prediction has the same token, over id sequences."""
  _check(targets, predictions)
  same = sum(int(t == p) for ts, ps in zip(targets, predictions) for t, p in zip(ts, ps))
  return {'token_accuracy': 100 * same / max(1, sum(map(len, targets)))}
