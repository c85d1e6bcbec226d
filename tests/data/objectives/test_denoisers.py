import itertools

import numpy as np
import pytest

from t5lab.data.objectives import denoisers, spans
from t5lab.errors import UsageError

MODES = ((41,), (42, 43), (44,))   # R, S, X
UL2 = dict(sentinel=999, eos=1, modes=MODES)


class Drawn:
  """A generator whose draws are given: uniform numbers, array by array."""

  def __init__(self, *draws):
    self.draws = list(draws)

  def random(self, size):
    assert size == len(self.draws[0])
    return np.array(self.draws.pop(0))


def runs(tokens, sentinels):
  """The text between the sentinels."""
  out = [[]]
  for token in tokens:
    if token in sentinels:
      out.append([])
    else:
      out[-1].append(token)
  return out


def undo(pair, sentinels):
  """Puts kept runs and dropped runs together again; whichever text has no sentinel first, starts.
  """
  kept, dropped = (runs(pair[f].tolist()[:-1], sentinels) for f in ('inputs', 'targets'))
  pairs = [kept, dropped] if kept[0] else [dropped, kept]
  pairs[1] = pairs[1][1:]   # what stands before the first sentinel is nothing
  return [t for both in itertools.zip_longest(*pairs, fillvalue=[]) for run in both for t in run]


# Independent masks


def test_iid_denoising_of_six_tokens():
  draws = Drawn([.9, .1, .14, .15, .9, .05])
  pair = denoisers.iid_denoising(range(5, 11), draws, sentinel=99, sentinels=9, eos=1)
  assert pair['inputs'].tolist() == [5, 99, 8, 9, 98, 1]
  assert pair['targets'].tolist() == [99, 6, 7, 98, 10, 1]
  assert pair['inputs'].dtype == pair['targets'].dtype == np.int32
  up = denoisers.iid_denoising(range(5, 11), Drawn([.1, .9, .9, .1, .9, .9]), sentinel=90,
                               sentinels=9, eos=1, step=1)
  assert up['inputs'].tolist() == [90, 6, 7, 91, 9, 10, 1]
  assert up['targets'].tolist() == [5, 90, 8, 91, 1]


def test_iid_denoising_of_no_noise_or_hardly_a_token(rng):
  options = dict(sentinel=99, sentinels=9, eos=1)
  pair = denoisers.iid_denoising([5, 6], Drawn([.9, .9]), **options)
  assert (pair['inputs'].tolist(), pair['targets'].tolist()) == ([5, 6, 1], [99, 1])
  pair = denoisers.iid_denoising([5, 6], Drawn([0, 0]), **options)
  assert (pair['inputs'].tolist(), pair['targets'].tolist()) == ([99, 1], [5, 6, 1])
  pair = denoisers.iid_denoising([5], Drawn([0]), **options)
  assert (pair['inputs'].tolist(), pair['targets'].tolist()) == ([99, 1], [5, 1])
  pair = denoisers.iid_denoising([], rng, **options)
  assert (pair['inputs'].tolist(), pair['targets'].tolist()) == ([1], [1])


def test_a_token_that_equals_a_sentinel_passes_through():
  pair = denoisers.iid_denoising([99, 98, 1], Drawn([.9, .1, .9]), sentinel=99, sentinels=9, eos=1)
  assert (pair['inputs'].tolist(), pair['targets'].tolist()) == ([99, 99, 1, 1], [99, 98, 98, 1])


def test_a_mask_beyond_the_limits_is_drawn_anew(rng):
  many, one = [.9, .1, .9, .1, .9, .9], [.9, .9, .9, .1, .1, .1]
  pair = denoisers.iid_denoising(range(5, 11), Drawn(many, one), sentinel=99, sentinels=1, eos=1)
  assert pair['inputs'].tolist() == [5, 6, 7, 99, 1]
  middle = [.9, .9, .9, .1, .9, .9]     # one noise span, but two sentinels in the targets
  pair = denoisers.iid_denoising(range(5, 11), Drawn(middle, one), sentinel=99, sentinels=1, eos=1)
  assert pair['targets'].tolist() == [99, 8, 9, 10, 1]
  long, short = [.1, .9] * 32, [.1] + [.9] * 63    # 65 targets, the limit is 39
  pair = denoisers.iid_denoising(range(5, 69), Drawn(long, short), sentinel=999, sentinels=99,
                                 eos=1)
  assert pair['targets'].tolist() == [5, 999, 1]
  with pytest.raises(ValueError, match='64 tokens need more than 8 sentinels on average'):
    denoisers.iid_denoising(range(64), None, sentinel=999, sentinels=8, eos=1)
  denoisers.iid_denoising(range(64), rng, sentinel=999, sentinels=9, eos=1)   # 8.2 on average


@pytest.mark.parametrize('density', [0.15, 0.5, 0.8])
@pytest.mark.parametrize('length', [1, 2, 3, 9])
def test_moments_are_those_of_all_masks(length, density):
  masks = np.array(list(itertools.product([0, 1], repeat=length)))
  chance = np.prod(np.where(masks, density, 1 - density), axis=1)
  noise, pairs = masks.sum(1), (masks[:, 1:] * masks[:, :-1]).sum(1)
  mean = lambda x: (chance * x).sum()
  expected = [mean(noise), mean(pairs), mean(noise**2) - mean(noise)**2,
              mean(pairs**2) - mean(pairs)**2, mean(noise * pairs) - mean(noise) * mean(pairs)]
  np.testing.assert_allclose(denoisers._moments(length, density), expected, atol=1e-12)


def test_iid_bounds_are_tight_and_rarely_passed(rng):
  assert denoisers.iid_sizes(512) == {'inputs': 513, 'targets': 199}
  assert denoisers.iid_sizes(512, 0.5) == {'inputs': 435, 'targets': 435}
  assert denoisers.iid_sizes(1) == {'inputs': 2, 'targets': 2}
  assert denoisers.iid_sizes(0) == {'inputs': 1, 'targets': 1}
  assert (denoisers.iid_spans(512), denoisers.iid_spans(5)) == (91, 3)
  masks = rng.random((20_000, 512)) < 0.5
  noise, pairs = masks.sum(1), (masks[:, 1:] & masks[:, :-1]).sum(1)
  inputs = 513 - pairs
  targets = 2 * noise - pairs + 2 - masks[:, 0] - masks[:, -1]
  redrawn = (inputs > 435) | (targets > 435)
  assert redrawn.mean() < 3e-4
  assert abs(noise[~redrawn].mean() - noise.mean()) < 512 * 1e-4
  assert np.quantile(inputs, 0.99) > 412 and np.quantile(targets, 0.99) > 412   # tight: within 5 %


@pytest.mark.parametrize('length, density', [(1, .15), (2, .5), (7, .15), (64, .15), (64, .5)])
def test_iid_denoising_is_invertible_and_within_its_bounds(rng, length, density):
  tokens = rng.integers(2, 500, length)
  limits = denoisers.iid_sizes(length, density)
  for _ in range(200):
    pair = denoisers.iid_denoising(tokens, rng, sentinel=999, sentinels=40, eos=1, density=density)
    assert undo(pair, range(900, 1000)) == tokens.tolist()
    assert all(len(pair[f]) <= limits[f] for f in limits)


def test_iid_noise_is_independent(rng):
  kept = np.zeros((4000, 32), bool)
  for row in kept:
    pair = denoisers.iid_denoising(np.arange(32), rng, sentinel=999, sentinels=40, eos=99)
    row[pair['inputs'][pair['inputs'] < 32]] = True
  noise = ~kept
  assert np.abs(noise.mean(0) - 0.15).max() < 5 * 0.0057        # sqrt(.15 * .85 / 4000)
  both = (noise[:, 1:] & noise[:, :-1]).mean()
  assert abs(both - 0.15**2) < 5 * 0.0007


def test_iid_segments():
  segment = lambda *options, sentinels=100, **lengths: denoisers.iid_segment(
      'x', lengths, sentinels, *options)
  assert segment(inputs=512, targets=199) == 511
  assert segment(0.5, inputs=435, targets=436, sentinels=152) == 512
  assert segment(inputs=2, targets=2) == 1
  with pytest.raises(UsageError, match='up to 199 tokens, the limit is 198: set targets to 199'):
    segment(inputs=512, targets=198)
  with pytest.raises(UsageError, match='up to 91 spans, the vocabulary has 90 sentinels'):
    segment(inputs=512, targets=199, sentinels=90)
  with pytest.raises(UsageError, match='up to 435 tokens, the limit is 434'):
    segment(0.5, inputs=435, targets=434)
  with pytest.raises(UsageError, match='up to 151 spans, the vocabulary has 150 sentinels'):
    segment(0.5, inputs=435, targets=435, sentinels=150)
  with pytest.raises(UsageError, match="task 'x' needs sentinels"):
    segment(inputs=512, targets=199, sentinels=0)
  with pytest.raises(UsageError, match='in 1 inputs: the minimum is 2'):
    segment(inputs=1, targets=9)
  with pytest.raises(UsageError, match='needs a noise density between 0 and 1, got 1.0'):
    segment(1., inputs=64, targets=64)


# UL2


def test_ul2_of_two_tokens(rng):
  """All that can come of them: a span denoiser drops the second, S cuts between them."""
  pair = {tuple(map(tuple, (m['inputs'].tolist(), m['targets'].tolist())))
          for m in (denoisers.ul2([7, 8], rng, **UL2) for _ in range(200))}
  assert pair == {((41, 7, 999, 1), (999, 8, 1)), ((42, 43, 7, 1), (8, 1)),
                  ((44, 7, 999, 1), (999, 8, 1))}
  with pytest.raises(ValueError, match=r'2 tokens or more, got 1 token\(s\)'):
    denoisers.ul2([7], rng, **UL2)


def test_ul2_draws_its_table(rng):
  """100 tokens: the sizes tell the rows apart. S has a fifth, the six others share the rest."""
  names = {(41, 91 + 1, 21): 'R3', (41, 88 + 1, 18): 'R8', (44, 68 + 1, 68): 'X3',
           (44, 57 + 1, 57): 'X8', (44, 87 + 1, 17): 'X64 .15', (44, 52 + 1, 52): 'X64 .5'}
  counts = dict.fromkeys(['S', *names.values()], 0)
  tokens, limits = rng.integers(100, 500, 100), denoisers.ul2_sizes(100, MODES)
  for _ in range(3000):
    pair = denoisers.ul2(tokens, rng, **UL2)
    inputs, targets = pair['inputs'], pair['targets']
    assert inputs.dtype == targets.dtype == np.int32
    assert len(inputs) <= limits['inputs'] and len(targets) <= limits['targets']
    if inputs[0] == 42:
      counts['S'] += 1
      assert [*inputs[:2], *inputs[2:-1], *targets[:-1]] == [42, 43, *tokens]
    else:
      counts[names[inputs[0], len(inputs), len(targets)]] += 1
      assert undo({**pair, 'inputs': inputs[1:]}, range(900, 1000)) == tokens.tolist()
  assert abs(counts.pop('S') - 600) < 5 * 22
  assert all(abs(n - 400) < 5 * 19 for n in counts.values())


def test_ul2_without_modes_and_of_another_share(rng):
  options = {**UL2, 'modes': ((), (), ()), 'step': 1}
  pair = denoisers.ul2([7, 8, 9], rng, share=1., **options)
  assert [*pair['inputs'][:-1], *pair['targets'][:-1]] == [7, 8, 9]
  for _ in range(20):
    pair = denoisers.ul2(np.arange(100), rng, share=0., **{**options, 'sentinel': 500})
    sentinels = pair['inputs'][pair['inputs'] >= 400].tolist()
    assert sentinels == list(range(500, 500 + len(sentinels))) and sentinels


def test_ul2_segments_fit_every_denoiser():
  segment = lambda inputs, targets, sentinels=100, modes=MODES: denoisers.ul2_segment(
      'x', {'inputs': inputs, 'targets': targets}, sentinels, modes)
  assert segment(512, 512) == 510      # S may keep all but one, after its two mode tokens
  assert denoisers.ul2_sizes(510, MODES) == {'inputs': 512, 'targets': 510}
  assert segment(512, 114) == 114
  assert segment(64, 64, modes=((), (), (9,) * 30)) == 38
  assert denoisers.ul2_sizes(38, ((), (), (9,) * 30)) == {'inputs': 30 + 34, 'targets': 38}
  with pytest.raises(UsageError, match='85 spans, the vocabulary has 84 sentinels: lower'):
    segment(512, 512, sentinels=84)
  with pytest.raises(UsageError, match='in 4 inputs and 2 targets: the minimum is 4 and 3'):
    segment(4, 2)
  assert segment(4, 3) == 2
  with pytest.raises(UsageError, match="task 'x' needs sentinels"):
    segment(512, 512, sentinels=0)


def test_ul2_sizes_are_reached(rng):
  """Bounds of 12 tokens: exactly the longest that comes up."""
  pair = [denoisers.ul2(np.arange(100, 112), rng, **UL2) for _ in range(1000)]
  assert denoisers.ul2_sizes(12, MODES) == {
      f: max(len(m[f]) for m in pair) for f in ('inputs', 'targets')}
  assert spans.prefix_lm_sizes(12)['inputs'] + 2 == 14
