"""PEGASUS: write the sentences that say most about the rest of a document. In numpy, over ids.

[Zhang et al. 2020, 3.1], with the rules of its released code (pegasus/ops/sentence_selection.cc)
where the paper is silent: how many sentences, and which of two that score the same. Scores count
token ids, where the paper's count words. An example is {'targets': int[T], 'sentences': int[n]},
the document and where each sentence starts in it, the first at 0.
"""
import numpy as np

from t5lab.data.objectives import spans as objectives
from t5lab.errors import UsageError, did_you_mean

STRATEGIES = ('principal', 'random', 'lead')


def gap_count(sentences: int, ratio: float) -> int:
  """Gap sentences of a document: its share of `ratio`, rounded down, and at least 1."""
  return min(max(int(np.float32(sentences) * np.float32(ratio)), 1), sentences)


def importance(tokens, starts) -> np.ndarray:
  """float64[n]: ROUGE-1 F of each sentence against all the others together (Ind-Orig).

  A word counts as often as it stands on both sides. F is 2 * overlap / (both lengths), and both
  lengths are always the document's.
  Example: 5 6 | 5 7 | 8 9, starts 0 2 4 -> 1/3, 1/3, 0
  """
  tokens, starts = np.asarray(tokens), np.asarray(starts, np.int64)
  if not len(tokens):
    return np.zeros(len(starts))
  words, ids = np.unique(tokens, return_inverse=True)
  of = np.repeat(np.arange(len(starts)), _lengths(tokens, starts))
  counts = np.zeros((len(starts), len(words)), np.int64)
  np.add.at(counts, (of, ids), 1)
  return 2 * np.minimum(counts, counts.sum(0) - counts).sum(1) / len(tokens)


def _lengths(tokens, starts) -> np.ndarray:
  return np.diff(starts, append=len(tokens))


def _range(ratio) -> tuple[float, float]:
  return ratio if isinstance(ratio, tuple) else (ratio, ratio)


def gap_mask(example, rng, *, ratio=0.3, strategy: str = 'principal',
             noise: float = 0.) -> np.ndarray:
  """bool[n], True at the gap sentences. The options are those of gap_sentences."""
  if strategy not in STRATEGIES:
    raise UsageError(f'no strategy {strategy!r} of gap sentences.'
                     f'{did_you_mean(strategy, STRATEGIES)}')
  starts = example['sentences']
  low, high = _range(ratio)
  count = gap_count(len(starts), low if low == high else rng.uniform(low, high))
  if strategy == 'random':
    chosen = rng.choice(len(starts), count, replace=False)
  elif strategy == 'lead':
    chosen = np.arange(count)
  else:
    scores = importance(example['targets'], starts)
    if noise:
      scores = scores * (1 + noise * rng.uniform(-1, 1, len(scores)))
    chosen = np.argsort(scores, kind='stable')[len(starts) - count:]   # of equal scores, the later
  return np.isin(np.arange(len(starts)), chosen)


def gap_sentences(example, rng, *, mask: int, eos: int, ratio=0.3, strategy: str = 'principal',
                  noise: float = 0.) -> dict[str, np.ndarray]:
  """-> int32 {'inputs', 'targets'}, both ending in EOS.

  inputs: the document with the one id `mask` in place of each gap sentence; targets: the gap
  sentences in the document's order. A document of one sentence is all gap.
  ratio: share of the sentences, or (low, high) to draw it from. strategy: 'principal' takes the
  best by importance(), 'random' any, 'lead' the first. noise: a score times 1 + U(-noise, noise).
  The released model's "mixed & stochastic" data is ratio=(0.15, 0.45), noise=0.2, as its README
  says; its code draws that noise from a normal distribution.
  """
  tokens = np.asarray(example['targets'], np.int32)
  gaps = gap_mask(example, rng, ratio=ratio, strategy=strategy, noise=noise)
  lengths = _lengths(tokens, example['sentences'])
  gap_tokens = np.repeat(gaps, lengths)
  firsts = np.asarray(example['sentences'], np.int64)[gaps]
  # A mask stands before its sentence's first token, then the sentence goes.
  marked = np.insert(tokens, firsts, mask)
  kept = np.insert(~gap_tokens, firsts, True)
  end = np.int32(eos)
  return {'inputs': np.append(marked[kept], end), 'targets': np.append(tokens[gap_tokens], end)}


def gap_sentences_sizes(example, *, ratio=0.3, strategy: str = 'principal',
                        noise: float = 0.) -> dict[str, int]:
  """Upper bounds of both features; exact where nothing is drawn (one ratio, no noise, not random).

  Where it is: the shortest sentences, or the longest, for any number that the ratio allows.
  """
  lengths = _lengths(example['targets'], example['sentences'])
  low, high = _range(ratio)
  total = len(example['targets'])
  if low == high and not noise and strategy != 'random':
    gaps = gap_mask(example, None, ratio=ratio, strategy=strategy)
    return {'inputs': int(total - lengths[gaps].sum() + gaps.sum() + 1),
            'targets': int(lengths[gaps].sum() + 1)}
  counts = np.arange(gap_count(len(lengths), low), gap_count(len(lengths), high) + 1)
  if strategy == 'lead':
    least = most = np.concatenate([[0], np.cumsum(lengths)])
  else:
    least = np.concatenate([[0], np.cumsum(np.sort(lengths))])
    most = np.concatenate([[0], np.cumsum(np.sort(lengths)[::-1])])
  return {'inputs': int((total - least[counts] + counts).max() + 1),
          'targets': int(most[counts].max() + 1)}


def gap_sentences_pieces(task: str, example, lengths, **options) -> list[dict[str, np.ndarray]]:
  """A document -> pieces of whole sentences, as many to each as fit the lengths of both.

  A sentence that could not even share a piece with another is first cut into ones that can. A
  piece of one sentence would leave nothing to read: it is dropped, which happens to a document's
  last sentence, or to a document of one. options: ratio, strategy, noise, as in gap_sentences.
  UsageError where two tokens do not fit.
  """
  inputs, targets = (objectives.length_of(task, lengths, f) for f in ('inputs', 'targets'))
  longest = min(inputs - 2, targets - 1)   # one sentence masked and one not, and EOS
  if longest < 1:
    raise UsageError(f'task {task!r} cannot leave out sentences in {inputs} inputs and {targets} '
                     'targets: the least are 3 and 2')
  tokens = np.asarray(example['targets'], np.int32)
  ends = [*example['sentences'][1:], len(tokens)]
  starts = np.array([at for start, end in zip(example['sentences'], ends)
                     for at in range(start, end, longest)], np.int64)
  bounds = np.append(starts, len(tokens))

  def piece(first, last):
    return {'targets': tokens[bounds[first]:bounds[last]],
            'sentences': starts[first:last] - bounds[first]}

  def fits(first, last):
    sizes = gap_sentences_sizes(piece(first, last), **options)
    return sizes['inputs'] <= inputs and sizes['targets'] <= targets

  out, first = [], 0
  while first + 1 < len(starts):
    # Two always fit, and more tokens than both features hold never do. Between them, nearly always
    # the more sentences the longer: bisect.
    fit, over = first + 2, int(np.searchsorted(bounds, bounds[first] + inputs + targets)) + 1
    over = min(over, len(starts) + 1)
    while over - fit > 1:
      middle = (fit + over) // 2
      fit, over = (middle, over) if fits(first, middle) else (fit, middle)
    out.append(piece(first, fit))
    first = fit
  return out
