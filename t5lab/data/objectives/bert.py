"""BERT's two objectives over token ids: masked words, and does the second text follow. In numpy.

As create_pretraining_data.py of google-research/bert has them. [Devlin et al. 2019, 3.1 and A.1]
Pairs are made once; masks are drawn anew at each use, as RoBERTa does, in place of BERT's ten fixed
copies. [Liu et al. 2019, 4.1]
"""
import numpy as np

from t5lab.data.objectives import spans as objectives
from t5lab.errors import UsageError


def pairs(documents, rng, max_length: int,
          short_probability: float = 0.1) -> list[dict[str, np.ndarray]]:
  """Documents of sentences of ids -> int32 {'first': [A], 'second': [B], 'next': [1]}.

  next: 0 where the second follows the first in its document, 1 where it is from another: half, and
  wherever one sentence fills a pair. (Where ten draws find no other document, it is the same one.)
  A + B <= max_length - 3, both at least 1; by `short_probability`, all pairs of a document aim at
  one shorter length. Empty sentences and documents are left out. Instances are in the order of the
  documents: shuffle them.
  UsageError: max_length has no room for two tokens and BERT's three marks.
  """
  room = max_length - 3
  if room < 2:
    raise UsageError(f'a pair of texts does not fit {max_length} tokens: the least are 5')
  documents = [[s for s in document if len(s)] for document in documents]
  documents = [document for document in documents if document]
  out = []
  for i in range(len(documents)):
    target = room
    if rng.random() < short_probability:
      target = int(rng.integers(2, room + 1))
    out += _pairs_of(documents, i, rng, target, room)
  return out


def _pairs_of(documents, index, rng, target, room):
  document, out, start = documents[index], [], 0
  while start < len(document):
    stop = length = 0
    for stop in range(start + 1, len(document) + 1):
      length += len(document[stop - 1])
      if length >= target:
        break
    count = stop - start
    cut = start + (int(rng.integers(1, count)) if count > 1 else 1)
    first = np.concatenate(document[start:cut])
    random = count == 1 or rng.random() < 0.5
    if random:
      second = _elsewhere(documents, index, rng, target - len(first))
      start = cut   # the sentences after the cut were not used: put back
    else:
      second = np.concatenate(document[cut:stop])
      start = stop
    first, second = _truncated(first, second, room, rng)
    out.append({'first': first.astype(np.int32), 'second': second.astype(np.int32),
                'next': np.array([random], np.int32)})
  return out


def _elsewhere(documents, index, rng, wanted):
  """Whole sentences of a random document, from a random one on, up to `wanted` tokens or more."""
  for _ in range(10):
    other = int(rng.integers(len(documents)))
    if other != index:
      break
  document = documents[other]
  start = stop = int(rng.integers(len(document)))
  length = 0
  while stop == start or (stop < len(document) and length < wanted):
    length += len(document[stop])
    stop += 1
  return np.concatenate(document[start:stop])


def _truncated(first, second, room, rng):
  """The longer one (the second, of equals) loses a token at its front or back until both fit."""
  ends = [[0, len(first)], [0, len(second)]]
  lengths = [len(first), len(second)]
  while sum(lengths) > room:
    longer = 0 if lengths[0] > lengths[1] else 1
    if rng.random() < 0.5:
      ends[longer][0] += 1
    else:
      ends[longer][1] -= 1
    lengths[longer] -= 1
  return first[slice(*ends[0])], second[slice(*ends[1])]


def mask_words(tokens, rng, *, mask: int, vocab_size: int, special=(), density: float = 0.15,
               max_predictions: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """int[T] -> (int32[T] masked, int32[T] weights, 1 where a word is to be predicted).

  round(T * density) of the tokens that are not `special` ids, at least 1 and at most
  max_predictions: 80 % become `mask`, 10 % any id of the vocabulary, 10 % stay. T counts the
  special ones, as BERT does.
  """
  masked, weights = np.array(tokens, np.int32), np.zeros(len(tokens), np.int32)
  able = np.flatnonzero(~np.isin(masked, special))
  wanted = max(round(len(masked) * density), 1)
  if max_predictions is not None:
    wanted = min(wanted, max_predictions)
  chosen = rng.choice(able, min(wanted, len(able)), replace=False)
  weights[chosen] = 1
  kind, words = rng.random(len(chosen)), rng.integers(0, vocab_size, len(chosen))
  masked[chosen] = np.where(kind < 0.8, mask, np.where(kind < 0.9, masked[chosen], words))
  return masked, weights


def mlm(example, rng, *, cls: int | None, sep: int, mask: int, vocab_size: int,
        density: float = 0.15, max_predictions: int | None = None) -> dict[str, np.ndarray]:
  """{'first': int[A], 'second': int[B], 'next': int[1]}, or {'targets': int[A]} alone -> int32:

  inputs [T]   cls A sep B sep (of one text: cls A sep), masked; cls None: a vocabulary without one
  targets [T]  the same, not masked
  weights [T]  1 where a word is to be predicted
  types [T]    0 up to the first sep, then 1
  next [1]     0 if B follows A, 1 if it is from elsewhere; absent of one text
  A cls or sep inside a text is never masked.
  """
  texts = [example[f] for f in ('first', 'second', 'targets') if f in example]
  framed = [np.append(np.asarray(text, np.int32), np.int32(sep)) for text in texts]
  opened = [] if cls is None else [cls]
  framed[0] = np.insert(framed[0], 0, opened)
  targets = np.concatenate(framed)
  inputs, weights = mask_words(targets, rng, mask=mask, vocab_size=vocab_size,
                               special=(*opened, sep), density=density,
                               max_predictions=max_predictions)
  made = {'inputs': inputs, 'targets': targets, 'weights': weights,
          'types': np.repeat(np.arange(len(framed), dtype=np.int32), [len(t) for t in framed])}
  return {**made, 'next': np.array(example['next'], np.int32)} if 'next' in example else made


def mlm_sizes(lengths: dict[str, int]) -> dict[str, int]:
  """Lengths of an example's features -> sizes of what mlm makes of it; one more without a cls."""
  marks = 3 if 'first' in lengths else 2
  length = marks + sum(lengths[f] for f in ('first', 'second', 'targets') if f in lengths)
  sizes = dict.fromkeys(('inputs', 'targets', 'weights', 'types'), length)
  return {**sizes, 'next': 1} if 'next' in lengths else sizes


def mlm_segment(task: str, lengths) -> int:
  """Of one text; pairs() takes the length of the inputs itself."""
  inputs = objectives.length_of(task, lengths, 'inputs')
  if inputs < 3:
    raise UsageError(f'task {task!r} cannot mask text in {inputs} inputs: the least are 3')
  return inputs - 2
