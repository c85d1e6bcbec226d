"""Other ways to drop tokens than T5's spans: independent masks, and UL2's mixture. In numpy.

A dropped run becomes a sentinel as in objectives.py, and both features end in EOS.
"""
import math

import numpy as np

from t5lab.data.objectives import spans as objectives
from t5lab.errors import UsageError

# Independent masks, T5's baseline [Raffel et al. 2020, 3.1.4; iid_noise_mask of its preprocessors]
#
# Of a mask of n tokens, each noise with probability p, let N be the noise tokens and P the pairs of
# neighbours that are both noise. Then there are N - P noise spans and at most one kept span more;
# EOS aside, the inputs have n - P tokens, the targets 2N - P + 1 less the ends that are noise.

TAIL = 4  # standard deviations. Beyond are about 1e-4 of the masks, which are drawn anew.


def _moments(length: int, density: float) -> tuple[float, ...]:
  """E N, E P, Var N, Var P, Cov(N, P) of the above."""
  p, pairs, triples = density, max(length - 1, 0), max(length - 2, 0)
  return (length * p, pairs * p**2, length * p * (1 - p),
          pairs * (p**2 - p**4) + 2 * triples * (p**3 - p**4), 2 * pairs * (p**2 - p**3))


def iid_sizes(length: int, density: float = 0.15) -> dict[str, int]:
  """Bounds of both features, EOS included: TAIL deviations above the mean, or all there can be."""
  n, p, var_n, var_p, cov = _moments(length, density)
  inputs = length + 1 - p + TAIL * math.sqrt(var_p)
  targets = 2 * n - p + 2 * (1 - density) + TAIL * math.sqrt(4 * var_n + var_p - 4 * cov)
  return {'inputs': min(int(inputs), length + 1), 'targets': min(int(targets), length + 1)}


def iid_spans(length: int, density: float = 0.15) -> int:
  """Sentinels that a segment may need: TAIL deviations above the mean, or all there can be."""
  n, p, var_n, var_p, cov = _moments(length, density)
  spans = n - p + 1 + TAIL * math.sqrt(max(var_n + var_p - 2 * cov, 0))
  return min(int(spans), (length + 1) // 2)


def iid_denoising(tokens, rng, *, sentinel: int, sentinels: int, eos: int, density: float = 0.15,
                  step: int = -1) -> dict[str, np.ndarray]:
  """int[T] -> int32 {'inputs', 'targets'}: each token is dropped with probability `density`.

  As T5 has it, a mask may drop nothing: then the targets are one sentinel. A mask whose features
  would be longer than iid_sizes, or with more spans than `sentinels`, is drawn anew: at 15 %
  of noise or more that is one in 10,000, and moves the share by under 2e-5 (measured).
  sentinel: the first one's id; step: from one to the next.
  ValueError where the average mask already has too many spans (iid_segment prevents it).
  """
  tokens, limits = np.asarray(tokens, np.int32), iid_sizes(len(tokens), density)
  noise, pairs, *_ = _moments(len(tokens), density)
  if noise - pairs > sentinels:
    raise ValueError(f'{len(tokens)} tokens need more than {sentinels} sentinels on average')
  end = np.array([eos], np.int32)
  while True:
    mask = rng.random(len(tokens)) < density
    starts = 1 + np.count_nonzero(np.diff(mask))   # spans of both kinds
    made = {'inputs': np.append(objectives.noise_span_to_sentinel(tokens, mask, sentinel, step),
                                end),
            'targets': np.append(objectives.nonnoise_span_to_sentinel(tokens, mask, sentinel, step),
                                 end)}
    most = (starts + 1) // 2 if len(tokens) else 0
    if most <= sentinels and all(len(made[f]) <= limits[f] for f in limits):
      return made


def iid_segment(task: str, lengths, sentinels: int, density: float = 0.15) -> int:
  """The longest that fits the inputs. UsageError if its targets do not fit, or its sentinels."""
  objectives.need_sentinels(task, sentinels)
  if not 0 < density < 1:
    raise UsageError(f'task {task!r} drops a share of {density} of the tokens: it must lie between '
                     '0 and 1')
  inputs, targets = (objectives.length_of(task, lengths, f) for f in ('inputs', 'targets'))
  tokens = inputs - 1
  if tokens < 1:
    raise UsageError(f'task {task!r} cannot drop tokens in {inputs} inputs: the least are 2')
  while iid_sizes(tokens + 1, density)['inputs'] <= inputs:
    tokens += 1
  needed = iid_sizes(tokens, density)['targets']
  if needed > targets:
    raise UsageError(f'i.i.d. denoising with {inputs} inputs makes targets of up to {needed} '
                     f'tokens, the limit is {targets}: set targets to {needed} or lower inputs')
  spans = iid_spans(tokens, density)
  if spans > sentinels:
    raise UsageError(f'i.i.d. denoising with {inputs} inputs makes up to {spans} spans, the '
                     f'vocabulary has {sentinels} sentinels: lower the inputs length')
  return tokens


# UL2 [Tay et al. 2022, 3.1 and Table 1]

SPANS = (  # mode, mean span, density of the span denoisers
    (0, 3., 0.15), (0, 8., 0.15),                                # R: regular, [NLU]
    (2, 3., 0.5), (2, 8., 0.5), (2, 64., 0.15), (2, 64., 0.5))   # X: extreme, [NLG]
SEQUENTIAL = 1                                                   # S: prefix LM, [S2S]


def ul2(tokens, rng, *, sentinel: int, eos: int, modes, share: float = 0.2,
        step: int = -1) -> dict[str, np.ndarray]:
  """int[T >= 2] -> int32 {'inputs', 'targets'} of one denoiser, its mode tokens before the inputs.

  modes: for R, S and X in this order, a tuple of ids: what '[NLU] ', '[S2S] ', '[NLG] ' encode to,
  or (). share: of S, 20 % as in the paper; the others are equally likely. S cuts at a uniform
  point, as the released code does (T5's prefix_lm), and not in a last quarter as in Table 1.
  """
  if len(tokens) < 2:
    raise ValueError(f'UL2 cannot corrupt a segment of {len(tokens)} token(s), needs 2 or more')
  if rng.random() < share:
    mode, made = SEQUENTIAL, objectives.prefix_lm(tokens, rng, eos=eos)
  else:
    mode, mean_span, density = SPANS[int(rng.integers(len(SPANS)))]
    made = objectives.span_corruption(tokens, rng, sentinel=sentinel, eos=eos, density=density,
                                      mean_span=mean_span, step=step)
  return {**made, 'inputs': np.concatenate([np.array(modes[mode], np.int32), made['inputs']])}


def ul2_sizes(length: int, modes) -> dict[str, int]:
  """Upper bounds of both features over all denoisers, EOS and mode tokens included."""
  sizes = [(SEQUENTIAL, objectives.prefix_lm_sizes(length))] + [
      (mode, objectives.span_corruption_sizes(length, density, mean_span))
      for mode, mean_span, density in SPANS]
  return {'inputs': max(len(modes[mode]) + size['inputs'] for mode, size in sizes),
          'targets': max(size['targets'] for _, size in sizes)}


def ul2_segment(task: str, lengths, sentinels: int, modes) -> int:
  """The longest with which every denoiser fits both lengths, so they should be about equal: S may
  put nearly all of a segment on either side. UsageError if none fits, or for want of sentinels."""
  objectives.need_sentinels(task, sentinels)
  inputs, targets = (objectives.length_of(task, lengths, f) for f in ('inputs', 'targets'))
  tokens = min(inputs, targets)
  while tokens >= 2 and any(size > lengths[f] for f, size in ul2_sizes(tokens, modes).items()):
    tokens -= 1
  if tokens < 2:
    least = ul2_sizes(2, modes)
    raise UsageError(f'task {task!r} cannot corrupt text in {inputs} inputs and {targets} targets: '
                     f"the least are {least['inputs']} and {least['targets']}")
  spans = max(objectives.span_noise_counts(tokens, density, mean_span)[1]
              for _, mean_span, density in SPANS)
  if spans > sentinels:
    raise UsageError(f'UL2 with {inputs} inputs and {targets} targets makes up to {spans} spans, '
                     f'the vocabulary has {sentinels} sentinels: lower the lengths')
  return tokens
