"""T5's objectives over token ids: span corruption, prefix LM and language modeling. In numpy.

Results equal those of T5's preprocessors (t5/data/preprocessors.py), which round in float32, half
to even. [Raffel et al. 2020, 3.1.4 and 3.3]
"""
import numpy as np

from t5lab.errors import UsageError

Features = dict[str, np.ndarray]


def span_noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """(noise tokens, noise spans) of a segment of `length` >= 2 tokens; both are at least 1."""
  length = max(length, 2)
  noise = int(np.round(np.float32(length) * np.float32(density)))
  noise = min(max(noise, 1), length - 1)
  spans = max(int(np.round(np.float32(noise) / np.float32(mean_span))), 1)
  return noise, min(spans, length - noise)  # a kept token precedes each span; T5 fails without


def span_noise_mask(rng, length: int, density: float = 0.15, mean_span: float = 3.) -> np.ndarray:
  """bool[length], True where noise, in round(round(length * density) / mean_span) spans.

  The mask starts with a kept span and ends with a noise span. A single token is kept. [3.1.4]
  rng: numpy Generator.
  Example: length 20 always gives 17 kept tokens, then 3 of noise.
  """
  noise, spans = span_noise_counts(length, density, mean_span)

  def composition(total):
    """int[spans] >= 1 that sum to total; all of these are equally likely."""
    cuts = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)

  kept_and_noise = [composition(max(length, 2) - noise), composition(noise)]
  runs = np.stack(kept_and_noise, axis=1).ravel()
  return np.repeat([False, True] * spans, runs)[:length]


def noise_span_to_sentinel(tokens, mask, sentinel: int, step: int = -1) -> np.ndarray:
  """Replaces each run of True by one sentinel: `sentinel`, `sentinel` + step, … from left to right.

  Example: tokens 5 6 7 8, mask 0 1 1 0, sentinel 99 -> 5 99 8
  """
  tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
  previous = np.concatenate([[False], mask])[:-1]
  starts = mask & ~previous
  marked = np.where(starts, sentinel + step * (np.cumsum(starts) - 1), tokens)
  return marked[~(mask & previous)].astype(np.int32)


def nonnoise_span_to_sentinel(tokens, mask, sentinel: int, step: int = -1) -> np.ndarray:
  """Replaces each run of False by one sentinel. No sentinel follows a last noise span."""
  return noise_span_to_sentinel(tokens, ~np.asarray(mask, bool), sentinel, step)


def closed(inputs, targets, eos: int) -> Features:
  """Two int32 arrays as the features 'inputs' and 'targets', each with an EOS after it."""
  return {'inputs': np.append(inputs, np.int32(eos)), 'targets': np.append(targets, np.int32(eos))}


def corrupted(tokens, mask, sentinel: int, eos: int, step: int) -> Features:
  """inputs: the tokens without the noise; targets: the noise. Sentinels stand for the others."""
  return closed(noise_span_to_sentinel(tokens, mask, sentinel, step),
                nonnoise_span_to_sentinel(tokens, mask, sentinel, step), eos)


def span_corruption(tokens, rng, *, sentinel: int, eos: int, density: float = 0.15,
                    mean_span: float = 3., step: int = -1) -> Features:
  """int[T] -> int32 {'inputs', 'targets'}, each ending in EOS.

  inputs: the kept text with a sentinel for each dropped span. targets: sentinel, span, sentinel, …
  sentinel: the first one's id. step: from one sentinel's id to the next.
  """
  mask = span_noise_mask(rng, len(tokens), density, mean_span)
  return corrupted(tokens, mask, sentinel, eos, step)


def span_corruption_sizes(length: int, density: float = 0.15,
                          mean_span: float = 3.) -> dict[str, int]:
  """Exact sizes of both features, EOS included, for a segment of `length` tokens."""
  noise, spans = span_noise_counts(length, density, mean_span)
  return {'inputs': max(length, 2) - noise + spans + 1, 'targets': noise + spans + 1}


def span_corruption_lengths(inputs_length: int, density: float = 0.15,
                            mean_span: float = 3.) -> tuple[int, int]:
  """(segment length, targets length) that fill `inputs_length`; both features include their EOS.

  This is T5's rule: the largest segment that still fits, with one sentinel per span.
  Example: 512 -> (568, 114)
  """
  def sizes(tokens):
    noise = round(tokens * density)
    spans = round(noise / mean_span)
    return tokens - noise + spans + 1, noise + spans + 1

  tokens = inputs_length - 1
  while sizes(tokens + 1)[0] <= inputs_length:
    tokens += 1
  targets = sizes(tokens)[1]
  if density == 0.5 and targets > inputs_length:  # T5 prefers equal lengths to one token more
    return tokens - 1, targets - 1
  return tokens, targets


# --- prefix LM and language modeling -------------------------------------------------------------


def prefix_lm(tokens, rng, *, eos: int) -> Features:
  """int[T >= 2] -> int32 {'inputs', 'targets'}, each ending in EOS.

  The cut is at a uniform point of [1, T). [3.2.3]
  """
  if len(tokens) < 2:
    raise ValueError(f'prefix LM needs segments of 2 tokens or more, got {len(tokens)} token(s)')
  tokens = np.asarray(tokens, np.int32)
  cut = int(rng.integers(1, len(tokens)))
  return closed(tokens[:cut], tokens[cut:], eos)


def prefix_lm_sizes(length: int) -> dict[str, int]:
  """Upper bounds of both features, EOS included: the cut leaves at least one token on each side."""
  return {'inputs': length, 'targets': length}


def document_pieces(tokens, length: int, eos: int) -> list[np.ndarray]:
  """Cuts a document int[T] and its EOS into pieces, int32[<= length] each.

  For packing with segment ids: a row then holds whole documents, or whole pieces of long ones, that
  do not see each other, and only the end of a document is an EOS. An empty document has no piece.
  """
  if not len(tokens):
    return []
  closed = np.append(np.asarray(tokens, np.int32), np.int32(eos))
  return [closed[start:start + length] for start in range(0, len(closed), length)]


# --- the length of the segments that a task cuts text into ---------------------------------------


def feature_length(task: str, lengths, feature: str) -> int:
  if not lengths.get(feature):
    raise UsageError(f'task {task!r} needs a length for {feature!r}, got {dict(lengths)}')
  return lengths[feature]


def feature_lengths(task: str, lengths) -> list[int]:
  return [feature_length(task, lengths, feature) for feature in ('inputs', 'targets')]


def fits(sizes, lengths) -> bool:
  return all(size <= lengths[feature] for feature, size in sizes.items())


def check_sentinels(task: str, sentinels: int) -> None:
  if not sentinels:
    raise UsageError(f'task {task!r} needs sentinels <extra_id_0>, <extra_id_1>, … with '
                     'consecutive ids, and the vocabulary has none: use books_lm or '
                     'books_prefix_lm')


def span_corruption_segment(task: str, lengths, sentinels: int, density: float = 0.15,
                            mean_span: float = 3.) -> int:
  """The longest segment that fits both lengths. UsageError if none does, or without sentinels."""
  check_sentinels(task, sentinels)
  if not (0 < density < 1 and mean_span >= 1):
    raise UsageError(f'task {task!r} needs a noise density between 0 and 1 and a mean span of 1 or '
                     f'more, got a density of {density} in spans of {mean_span} tokens')
  inputs, targets = feature_lengths(task, lengths)
  tokens, needed = span_corruption_lengths(inputs, density, mean_span)
  if needed > targets:
    raise UsageError(f'span corruption with {inputs} inputs makes targets of {needed} tokens, the '
                     f'limit is {targets}: set targets to {needed} or lower inputs')
  # The rule rounds in float64 and the mask in float32. They rarely differ; T5 then loses tokens.
  while not fits(span_corruption_sizes(tokens, density, mean_span), lengths):
    tokens -= 1
    if tokens < 2:
      raise UsageError(f'task {task!r} cannot corrupt text in {inputs} inputs and {targets} '
                       'targets: the minimum is 3 and 3')

  spans = span_noise_counts(tokens, density, mean_span)[1]
  if spans > sentinels:
    raise UsageError(f'span corruption with {inputs} inputs makes {spans} spans, the vocabulary '
                     f'has {sentinels} sentinels: lower the inputs length')
  return tokens


def prefix_lm_segment(task: str, lengths) -> int:
  return min(feature_lengths(task, lengths))


def lm_segment(task: str, lengths) -> int:
  return feature_length(task, lengths, 'targets')
