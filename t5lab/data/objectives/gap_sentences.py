"""PEGASUS: generate the sentences that say most about the rest of a document. In numpy, over ids.

[Zhang et al. 2020, 3.1]. Where the paper is silent (the number of sentences, and ties of scores),
the rules are those of its released code (pegasus/ops/sentence_selection.cc). Scores count token
ids; the paper's count words. An example is {'targets': int[T], 'sentences': int[n]}: a document,
and the position of the first token of each of its sentences.
"""
import numpy as np

from t5lab.data.objectives import spans
from t5lab.errors import UsageError, did_you_mean

STRATEGIES = ('principal', 'random', 'lead')


def gap_count(sentences: int, ratio: float) -> int:
  """The number of gap sentences: a share `ratio` of all, rounded down, and at least 1."""
  return min(max(int(np.float32(sentences) * np.float32(ratio)), 1), sentences)


def importance(tokens, starts) -> np.ndarray:
  """float64[n]: ROUGE-1 F of each sentence against all the others together (Ind-Orig).

  A word counts as often as it occurs on both sides. F is 2 * overlap / (sum of both lengths), and
  that sum is always the document's length.
  Example: 5 6 | 5 7 | 8 9, starts 0 2 4 -> 1/3, 1/3, 0
  """
  tokens, starts = np.asarray(tokens), np.asarray(starts, np.int64)
  if not len(tokens):
    return np.zeros(len(starts))
  words, ids = np.unique(tokens, return_inverse=True)
  sentence = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(tokens)))
  counts = np.zeros((len(starts), len(words)), np.int64)
  np.add.at(counts, (sentence, ids), 1)
  overlap = np.minimum(counts, counts.sum(0) - counts).sum(1)
  return 2 * overlap / len(tokens)


def _range(ratio) -> tuple[float, float]:
  return ratio if isinstance(ratio, tuple) else (ratio, ratio)


def gap_mask(example, rng, *, ratio=0.3, strategy: str = 'principal',
             noise: float = 0.) -> np.ndarray:
  """bool[n], True for the gap sentences. The options are those of gap_sentences."""
  if strategy not in STRATEGIES:
    raise UsageError(f'unknown strategy {strategy!r} for gap sentences.'
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
    chosen = np.argsort(scores, kind='stable')[len(starts) - count:]   # a tie: the later one
  return np.isin(np.arange(len(starts)), chosen)


def gap_sentences(example, rng, *, mask: int, eos: int, **options) -> spans.Features:
  """A document -> int32 {'inputs', 'targets'}, both ending in EOS.

  inputs: the document with the single id `mask` in place of each gap sentence. targets: the gap
  sentences in the document's order. The only sentence of a document is a gap.
  options, of gap_mask: ratio, the share of the sentences, or (low, high) to draw it from; strategy:
  'principal' takes the best by importance(), 'random' any, 'lead' the first; noise: multiplies
  scores by 1 + U(-noise, noise).
  The released model's "mixed & stochastic" data is ratio=(0.15, 0.45), noise=0.2 according to its
  README; its code draws that noise from a normal distribution.
  """
  tokens = np.asarray(example['targets'], np.int32)
  starts = np.asarray(example['sentences'], np.int64)
  gaps = gap_mask(example, rng, **options)
  gap_tokens = np.repeat(gaps, np.diff(starts, append=len(tokens)))
  # Insert a mask before the first token of each gap, then remove the tokens of the gaps.
  marked = np.insert(tokens, starts[gaps], mask)
  kept = np.insert(~gap_tokens, starts[gaps], True)
  return spans.closed(marked[kept], tokens[gap_tokens], eos)


def gap_sentences_sizes(example, *, ratio=0.3, strategy: str = 'principal',
                        noise: float = 0.) -> dict[str, int]:
  """Upper bounds of both features; exact if nothing is random (one ratio, no noise).

  Otherwise: the shortest sentences, or the longest, for any number that the ratio allows.
  """
  total = len(example['targets'])
  lengths = np.diff(example['sentences'], append=total)
  low, high = _range(ratio)
  if low == high and not noise and strategy != 'random':
    gaps = gap_mask(example, None, ratio=ratio, strategy=strategy)
    return {'inputs': int(total - lengths[gaps].sum() + gaps.sum() + 1),
            'targets': int(lengths[gaps].sum() + 1)}
  counts = np.arange(gap_count(len(lengths), low), gap_count(len(lengths), high) + 1)
  shortest = lengths if strategy == 'lead' else np.sort(lengths)
  longest = lengths if strategy == 'lead' else shortest[::-1]
  least, most = (np.concatenate([[0], np.cumsum(order)]) for order in (shortest, longest))
  return {'inputs': int((total - least[counts] + counts).max() + 1),
          'targets': int(most[counts].max() + 1)}


def gap_sentences_pieces(task: str, example, lengths, **options) -> list[spans.Features]:
  """Cuts a document into pieces of whole sentences, as many to each as fit both lengths.

  A sentence that is too long to share a piece with another is first cut into ones that can. A piece
  of one sentence would have inputs without text: it is dropped, which happens to the last sentence
  of a document, or to a document of one. options: ratio, strategy, noise, as in gap_sentences.
  UsageError if two tokens do not fit.
  """
  inputs, targets = spans.feature_lengths(task, lengths)
  longest = min(inputs - 2, targets - 1)   # one sentence masked and one not, and EOS
  if longest < 1:
    raise UsageError(f'task {task!r} cannot mask sentences in {inputs} inputs and {targets} '
                     'targets: the minimum is 3 and 2')
  tokens = np.asarray(example['targets'], np.int32)
  ends = [*example['sentences'][1:], len(tokens)]
  starts = [cut for start, end in zip(example['sentences'], ends)
            for cut in range(start, end, longest)]
  starts = np.array(starts, np.int64)
  bounds = np.append(starts, len(tokens))

  def piece(first, last):
    return {'targets': tokens[bounds[first]:bounds[last]],
            'sentences': starts[first:last] - bounds[first]}

  pieces, first = [], 0
  while first + 1 < len(starts):
    # Two sentences always fit, and more tokens than both features hold never do. In between, sizes
    # nearly always grow with the number of sentences: bisect.
    fit = first + 2
    over = int(np.searchsorted(bounds, bounds[first] + inputs + targets)) + 1
    over = min(over, len(starts) + 1)
    while over - fit > 1:
      middle = (fit + over) // 2
      if spans.fits(gap_sentences_sizes(piece(first, middle), **options), lengths):
        fit = middle
      else:
        over = middle
    pieces.append(piece(first, fit))
    first = fit
  return pieces
