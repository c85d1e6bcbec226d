"""BERT's two objectives over token ids: masked words and next-sentence prediction. In numpy.

They follow create_pretraining_data.py of google-research/bert. [Devlin et al. 2019, 3.1 and A.1]
Pairs are made once. Masks are drawn again at each use, as in RoBERTa, instead of BERT's ten fixed
copies. [Liu et al. 2019, 4.1]
"""
import numpy as np

from t5lab.data.objectives import spans
from t5lab.errors import UsageError


def pairs(documents, rng, max_length: int,
          short_probability: float = 0.1) -> list[spans.Features]:
  """Documents of sentences of ids -> int32 {'first': [A], 'second': [B], 'next': [1]}.

  next: 0 if the second text follows the first in its document, 1 if it comes from another document:
  for half of the pairs, and whenever one sentence fills a pair. (If ten draws find no other
  document, it is the same one.) A + B <= max_length - 3, and both are at least 1. With
  `short_probability`, all pairs of a document aim at one shorter length. Empty sentences and
  documents are ignored. Pairs are in the order of the documents: shuffle them.
  UsageError: max_length has no room for two tokens and BERT's three marks.
  """
  room = max_length - 3
  if room < 2:
    raise UsageError(f'a pair of texts needs a length of 5 tokens or more, got {max_length}')
  documents = [[s for s in document if len(s)] for document in documents]
  documents = [document for document in documents if document]
  examples = []
  for i in range(len(documents)):
    target = room
    if rng.random() < short_probability:
      target = int(rng.integers(2, room + 1))
    examples += _document_pairs(documents, i, rng, target, room)
  return examples


def _document_pairs(documents, index, rng, target, room):
  document, examples, start = documents[index], [], 0
  while start < len(document):
    # Sentences up to the target length ...
    stop = length = 0
    for stop in range(start + 1, len(document) + 1):
      length += len(document[stop - 1])
      if length >= target:
        break

    # ... of which the first text takes one or more.
    count = stop - start
    cut = start + (int(rng.integers(1, count)) if count > 1 else 1)
    first = np.concatenate(document[start:cut])

    # The second text is the rest, or random; then the rest starts the next pair.
    is_random = count == 1 or rng.random() < 0.5
    if is_random:
      second = _other_text(documents, index, rng, target - len(first))
      start = cut
    else:
      second = np.concatenate(document[cut:stop])
      start = stop

    first, second = _truncated(first, second, room, rng)
    examples.append({'first': first.astype(np.int32), 'second': second.astype(np.int32),
                     'next': np.array([is_random], np.int32)})
  return examples


def _other_text(documents, index, rng, min_length):
  """Whole sentences of a random document, from a random one on, until `min_length` is reached."""
  for _ in range(10):
    other = int(rng.integers(len(documents)))
    if other != index:
      break
  document = documents[other]
  start = stop = int(rng.integers(len(document)))
  length = 0
  while stop == start or (stop < len(document) and length < min_length):
    length += len(document[stop])
    stop += 1
  return np.concatenate(document[start:stop])


def _truncated(first, second, room, rng):
  """Drops tokens of the longer text, or of the second, at a random end until both fit."""
  texts = [first, second]
  while len(texts[0]) + len(texts[1]) > room:
    longer = 0 if len(texts[0]) > len(texts[1]) else 1
    texts[longer] = texts[longer][1:] if rng.random() < 0.5 else texts[longer][:-1]
  return texts


def mask_words(tokens, rng, *, mask: int, vocab_size: int, special=(), density: float = 0.15,
               max_predictions: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """int[T] -> (int32[T] masked, int32[T] weights, 1 where a word is to be predicted).

  round(T * density) of the tokens that are not `special` ids, at least 1 and at most
  max_predictions: 80 % become `mask`, 10 % any id of the vocabulary, and 10 % stay. T includes the
  special tokens, as in BERT.
  """
  masked, weights = np.array(tokens, np.int32), np.zeros(len(tokens), np.int32)
  candidates = np.flatnonzero(~np.isin(masked, special))
  count = max(round(len(masked) * density), 1)
  if max_predictions is not None:
    count = min(count, max_predictions)
  chosen = rng.choice(candidates, min(count, len(candidates)), replace=False)
  weights[chosen] = 1

  u = rng.random(len(chosen))
  words = rng.integers(0, vocab_size, len(chosen))
  masked[chosen] = np.where(u < 0.8, mask, np.where(u < 0.9, masked[chosen], words))
  return masked, weights


def mlm(example, rng, *, cls: int | None, sep: int, **options) -> spans.Features:
  """{'first': int[A], 'second': int[B], 'next': int[1]}, or only {'targets': int[A]} -> int32:

  inputs [T]   cls A sep B sep (or cls A sep), masked; without cls if it is None
  targets [T]  the same, not masked
  weights [T]  1 where a word is to be predicted
  types [T]    0 up to the first sep, then 1
  next [1]     0 if B follows A, 1 if it does not; absent for a single text
  A cls or sep inside a text is never masked. options: of mask_words.
  """
  texts = [example[f] for f in ('first', 'second', 'targets') if f in example]
  framed = [np.append(np.asarray(text, np.int32), np.int32(sep)) for text in texts]
  opening = [] if cls is None else [cls]
  framed[0] = np.insert(framed[0], 0, opening)

  targets = np.concatenate(framed)
  inputs, weights = mask_words(targets, rng, special=(*opening, sep), **options)
  types = np.repeat(np.arange(len(framed), dtype=np.int32), [len(text) for text in framed])
  features = {'inputs': inputs, 'targets': targets, 'weights': weights, 'types': types}
  if 'next' in example:
    features['next'] = np.array(example['next'], np.int32)
  return features


def mlm_sizes(lengths: dict[str, int]) -> dict[str, int]:
  """Sizes of mlm's features from the lengths of an example; one too many without a cls."""
  marks = 3 if 'first' in lengths else 2
  length = marks + sum(lengths[f] for f in ('first', 'second', 'targets') if f in lengths)
  sizes = dict.fromkeys(('inputs', 'targets', 'weights', 'types'), length)
  return {**sizes, 'next': 1} if 'next' in lengths else sizes


def mlm_segment(task: str, lengths) -> int:
  """Length of a single text; pairs() takes the length of the inputs itself."""
  inputs = spans.feature_length(task, lengths, 'inputs')
  if inputs < 3:
    raise UsageError(f'task {task!r} cannot mask text in {inputs} inputs: the minimum is 3')
  return inputs - 2
