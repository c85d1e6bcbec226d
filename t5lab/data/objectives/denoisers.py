"""Other ways to drop tokens than T5's spans: independent masks, and UL2's mixture. In numpy.

A dropped run becomes a sentinel as in spans.py, and both features end in EOS.
"""
import math

import numpy as np

from t5lab.data.objectives import spans
from t5lab.errors import UsageError

# --- independent masks ---------------------------------------------------------------------------
#
# T5's baseline [Raffel et al. 2020, 3.1.4; iid_noise_mask of its preprocessors].
#
# In a mask of n tokens, each noise with probability p, let N be the number of noise tokens and P
# that of neighbouring pairs that are both noise. Then there are N - P noise spans, and at most one
# more kept span. Without EOS, the inputs have n - P tokens, the targets 2N - P + 1, minus the ends
# that are noise.

TAIL = 4  # standard deviations. About 1e-4 of the masks exceed the bound; they are drawn again.


def _moments(length: int, density: float) -> tuple[float, ...]:
  """E N, E P, Var N, Var P and Cov(N, P) of the above."""
  p, pairs, triples = density, max(length - 1, 0), max(length - 2, 0)
  var_pairs = pairs * (p**2 - p**4) + 2 * triples * (p**3 - p**4)
  return length * p, pairs * p**2, length * p * (1 - p), var_pairs, 2 * pairs * (p**2 - p**3)


def iid_sizes(length: int, density: float = 0.15) -> dict[str, int]:
  """Bounds of both features, EOS included: TAIL deviations above the mean, at most the maximum."""
  noise, pairs, var_noise, var_pairs, cov = _moments(length, density)
  inputs = length + 1 - pairs + TAIL * math.sqrt(var_pairs)
  targets_deviation = math.sqrt(4 * var_noise + var_pairs - 4 * cov)
  targets = 2 * noise - pairs + 2 * (1 - density) + TAIL * targets_deviation
  return {'inputs': min(int(inputs), length + 1), 'targets': min(int(targets), length + 1)}


def iid_spans(length: int, density: float = 0.15) -> int:
  """Bound of the sentinels that a segment needs: TAIL deviations above the mean, or the maximum."""
  noise, pairs, var_noise, var_pairs, cov = _moments(length, density)
  deviation = math.sqrt(max(var_noise + var_pairs - 2 * cov, 0))
  return min(int(noise - pairs + 1 + TAIL * deviation), (length + 1) // 2)


def iid_denoising(tokens, rng, *, sentinel: int, sentinels: int, eos: int, density: float = 0.15,
                  step: int = -1) -> spans.Features:
  """int[T] -> int32 {'inputs', 'targets'}: each token is dropped with probability `density`.

  As in T5, a mask may drop nothing: then the targets are one sentinel. A mask whose features are
  longer than iid_sizes, or that has more spans than `sentinels`, is drawn again: for a density of
  15 % or more that is one in 10,000, and changes the density by under 2e-5 (measured).
  sentinel: the first one's id. step: from one sentinel's id to the next.
  ValueError if the average mask already has too many spans (iid_segment prevents it).
  """
  tokens, limits = np.asarray(tokens, np.int32), iid_sizes(len(tokens), density)
  noise, pairs, *_ = _moments(len(tokens), density)
  if noise - pairs > sentinels:
    raise ValueError(f'{len(tokens)} tokens need more than {sentinels} sentinels on average')
  while True:
    mask = rng.random(len(tokens)) < density
    features = spans.corrupted(tokens, mask, sentinel, eos, step)
    runs = 1 + np.count_nonzero(np.diff(mask)) if len(tokens) else 0     # kept and noise
    sizes = {name: len(feature) for name, feature in features.items()}
    if (runs + 1) // 2 <= sentinels and spans.fits(sizes, limits):
      return features


def iid_segment(task: str, lengths, sentinels: int, density: float = 0.15) -> int:
  """The longest that fits the inputs. UsageError if its targets do not fit, or its sentinels."""
  spans.check_sentinels(task, sentinels)
  if not 0 < density < 1:
    raise UsageError(f'task {task!r} needs a noise density between 0 and 1, got {density}')
  inputs, targets = spans.feature_lengths(task, lengths)
  tokens = inputs - 1
  if tokens < 1:
    raise UsageError(f'task {task!r} cannot drop tokens in {inputs} inputs: the minimum is 2')
  while iid_sizes(tokens + 1, density)['inputs'] <= inputs:
    tokens += 1

  needed = iid_sizes(tokens, density)['targets']
  if needed > targets:
    raise UsageError(f'i.i.d. denoising with {inputs} inputs makes targets of up to {needed} '
                     f'tokens, the limit is {targets}: set targets to {needed} or lower inputs')
  num_spans = iid_spans(tokens, density)
  if num_spans > sentinels:
    raise UsageError(f'i.i.d. denoising with {inputs} inputs makes up to {num_spans} spans, the '
                     f'vocabulary has {sentinels} sentinels: lower the inputs length')
  return tokens


# --- UL2 [Tay et al. 2022, 3.1 and Table 1] ------------------------------------------------------

SPANS = (  # mode, mean span, density of the span denoisers
    (0, 3., 0.15), (0, 8., 0.15),                                # R: regular, [NLU]
    (2, 3., 0.5), (2, 8., 0.5), (2, 64., 0.15), (2, 64., 0.5))   # X: extreme, [NLG]
SEQUENTIAL = 1                                                   # S: prefix LM, [S2S]


def ul2(tokens, rng, *, sentinel: int, eos: int, modes, share: float = 0.2,
        step: int = -1) -> spans.Features:
  """int[T >= 2] -> int32 {'inputs', 'targets'} of one denoiser; its mode tokens open the inputs.

  modes: tuples of ids for R, S and X in this order, the ids of '[NLU] ', '[S2S] ' and '[NLG] ', or
  (). share: of S, 20 % as in the paper; the others are equally likely. S cuts at a uniform point,
  as the released code does (T5's prefix_lm), not in a last quarter as in Table 1.
  """
  if len(tokens) < 2:
    raise ValueError(f'UL2 needs segments of 2 tokens or more, got {len(tokens)} token(s)')
  if rng.random() < share:
    mode, features = SEQUENTIAL, spans.prefix_lm(tokens, rng, eos=eos)
  else:
    mode, mean_span, density = SPANS[int(rng.integers(len(SPANS)))]
    features = spans.span_corruption(tokens, rng, sentinel=sentinel, eos=eos, density=density,
                                     mean_span=mean_span, step=step)
  mode_tokens = np.array(modes[mode], np.int32)
  return {**features, 'inputs': np.concatenate([mode_tokens, features['inputs']])}


def ul2_sizes(length: int, modes) -> dict[str, int]:
  """Upper bounds of both features over all denoisers, EOS and mode tokens included."""
  sizes = [(SEQUENTIAL, spans.prefix_lm_sizes(length)),
           *((mode, spans.span_corruption_sizes(length, density, mean_span))
             for mode, mean_span, density in SPANS)]
  return {'inputs': max(len(modes[mode]) + size['inputs'] for mode, size in sizes),
          'targets': max(size['targets'] for _, size in sizes)}


def ul2_segment(task: str, lengths, sentinels: int, modes) -> int:
  """The longest segment with which every denoiser fits both lengths.

  The lengths should be about equal: S may put nearly all of a segment on either side. UsageError if
  no segment fits, or without sentinels.
  """
  spans.check_sentinels(task, sentinels)
  inputs, targets = spans.feature_lengths(task, lengths)
  tokens = min(inputs, targets)
  while tokens >= 2 and not spans.fits(ul2_sizes(tokens, modes), lengths):
    tokens -= 1
  if tokens < 2:
    minimum = ul2_sizes(2, modes)
    raise UsageError(f'task {task!r} cannot corrupt text in {inputs} inputs and {targets} targets: '
                     f"the minimum is {minimum['inputs']} and {minimum['targets']}")
  num_spans = max(spans.span_noise_counts(tokens, density, mean_span)[1]
                  for _, mean_span, density in SPANS)
  if num_spans > sentinels:
    raise UsageError(f'UL2 with {inputs} inputs and {targets} targets makes up to {num_spans} '
                     f'spans, the vocabulary has {sentinels} sentinels: lower the lengths')
  return tokens
