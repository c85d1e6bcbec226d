import numpy as np
import pytest

from t5lab.data.objectives import spans
from t5lab.errors import UsageError


def test_span_corruption_lengths_are_t5s():
  lengths = {(inputs, density, mean): spans.span_corruption_lengths(inputs, density, mean)
             for inputs, density, mean in [
                 (512, .15, 3), (512, .15, 8), (512, .5, 3), (512, .5, 8), (512, .15, 64),
                 (512, .5, 64), (512, .15, 20), (1024, .15, 3), (1024, .15, 20)]}
  assert lengths == {
      (512, .15, 3): (568, 114), (512, .15, 8): (588, 100), (512, .5, 3): (766, 512),
      (512, .5, 8): (908, 512), (512, .15, 64): (600, 92), (512, .5, 64): (1006, 512),
      (512, .15, 20): (597, 95), (1024, .15, 3): (1137, 229), (1024, .15, 20): (1193, 189)}


def test_noise_counts_round_half_to_even():
  assert spans.span_noise_counts(568, .15, 3.) == (85, 28)
  assert spans.span_noise_counts(10, .15, 3.) == (2, 1)   # 1.5 tokens
  assert spans.span_noise_counts(30, .15, 3.) == (4, 1)   # 4.5 tokens
  assert spans.span_noise_counts(2, .15, 3.) == (1, 1)
  assert spans.span_noise_counts(2, .9, 3.) == (1, 1)
  assert spans.span_noise_counts(10, .8, 1.) == (8, 2)    # no more spans than kept tokens


@pytest.mark.parametrize('length', [2, 3, 7, 20, 100, 568])
@pytest.mark.parametrize('density, mean_span', [(.15, 3.), (.5, 3.), (.5, 64.), (.8, 1.)])
def test_mask_has_its_counts_starts_kept_and_ends_in_noise(rng, length, density, mean_span):
  noise, num_spans = spans.span_noise_counts(length, density, mean_span)
  for _ in range(20):
    mask = spans.span_noise_mask(rng, length, density, mean_span)
    assert mask.shape == (length,) and mask.dtype == bool
    assert mask.sum() == noise
    assert (np.diff(mask.astype(int)) == 1).sum() == num_spans
    assert not mask[0] and mask[-1]


def test_mask_of_few_tokens(rng):
  assert spans.span_noise_mask(rng, 20).tolist() == [False] * 17 + [True] * 3
  assert spans.span_noise_mask(rng, 2).tolist() == [False, True]
  assert spans.span_noise_mask(rng, 1).tolist() == [False]
  assert spans.span_noise_mask(rng, 0).tolist() == []


def test_masks_are_uniform_over_compositions(rng):
  """Length 6, 3 of noise in 2 spans: 2 x 2 compositions, each a quarter of the time."""
  masks = [''.join('.#'[int(x)] for x in spans.span_noise_mask(rng, 6, .5, 1.5))
           for _ in range(4000)]
  counts = {m: masks.count(m) for m in set(masks)}
  assert set(counts) == {'.#..##', '.##..#', '..#.##', '..##.#'}
  assert all(abs(n - 1000) < 5 * 27 for n in counts.values())  # standard deviation 27


def test_mask_density_by_position(rng):
  """Away from the ends every position is noise 15% of the time."""
  share = np.mean([spans.span_noise_mask(rng, 568) for _ in range(3000)], axis=0)
  assert abs(share.mean() - 85 / 568) < 1e-9
  assert np.abs(share[20:-20] - 0.15).max() < 0.04  # six standard deviations of 0.0065


def test_sentinels_of_the_reference_example():
  tokens = np.arange(100, 120)
  mask = np.zeros(20, bool)
  mask[[3, 4, 5, 6, 13, 14, 15, 16, 18, 19]] = True
  assert spans.noise_span_to_sentinel(tokens, mask, 32099).tolist() == [
      100, 101, 102, 32099, 107, 108, 109, 110, 111, 112, 32098, 117, 32097]
  assert spans.nonnoise_span_to_sentinel(tokens, mask, 32099).tolist() == [
      32099, 103, 104, 105, 106, 32098, 113, 114, 115, 116, 32097, 118, 119]


def test_sentinels_at_the_ends():
  tokens = np.array([5, 6, 7, 8])
  assert spans.noise_span_to_sentinel(tokens, [1, 0, 0, 1], 99).tolist() == [99, 6, 7, 98]
  assert spans.noise_span_to_sentinel(tokens, [0, 0, 0, 0], 99).tolist() == [5, 6, 7, 8]
  assert spans.noise_span_to_sentinel(tokens, [1, 1, 1, 1], 99).tolist() == [99]
  assert spans.noise_span_to_sentinel([], [], 99).tolist() == []


def _undo(inputs, targets, sentinel, eos):
  """The segment that span corruption came from."""
  assert inputs[-1] == targets[-1] == eos
  spans, at = {}, None
  for t in targets[:-1]:
    if t > sentinel - 100:
      at = spans.setdefault(t, [])
    else:
      at.append(t)
  return [t for i in inputs[:-1] for t in (spans[i] if i > sentinel - 100 else [i])]


@pytest.mark.parametrize('length', [2, 3, 20, 113, 568])
def test_span_corruption_is_invertible_and_of_the_stated_size(rng, length):
  tokens = rng.integers(0, 500, length).astype(np.int32)
  for _ in range(10):
    output = spans.span_corruption(tokens, rng, sentinel=999, eos=1)
    assert _undo(output['inputs'].tolist(), output['targets'].tolist(), 999, 1) == tokens.tolist()
    assert {k: len(v) for k, v in output.items()} == spans.span_corruption_sizes(length)
    assert output['inputs'].dtype == output['targets'].dtype == np.int32


def test_span_corruption_of_twenty_tokens(rng):
  output = spans.span_corruption(np.arange(100, 120), rng, sentinel=999, eos=1)
  assert output['inputs'].tolist() == [*range(100, 117), 999, 1]
  assert output['targets'].tolist() == [999, 117, 118, 119, 1]


def test_sizes_fill_t5s_lengths():
  assert spans.span_corruption_sizes(568) == {'inputs': 512, 'targets': 114}
  assert spans.span_corruption_sizes(1137) == {'inputs': 1024, 'targets': 229}


def test_prefix_lm_cuts_uniformly(rng):
  tokens = np.array([10, 11, 12, 13])
  cuts = []
  for _ in range(3000):
    output = spans.prefix_lm(tokens, rng, eos=1)
    cut = len(output['inputs']) - 1
    assert output['inputs'].tolist() == [*range(10, 10 + cut), 1]
    assert output['targets'].tolist() == [*range(10 + cut, 14), 1]
    cuts.append(cut)
  assert np.abs(np.bincount(cuts, minlength=4) - [0, 1000, 1000, 1000]).max() < 5 * 26


def test_prefix_lm_of_two_tokens_and_of_one(rng):
  output = spans.prefix_lm([7, 8], rng, eos=1)
  assert (output['inputs'].tolist(), output['targets'].tolist()) == ([7, 1], [8, 1])
  assert {k: len(v) for k, v in output.items()} == spans.prefix_lm_sizes(2)
  with pytest.raises(ValueError, match=r'2 tokens or more, got 1 token\(s\)'):
    spans.prefix_lm([7], rng, eos=1)


def test_sentinels_that_count_upwards():
  mask = [0, 1, 1, 0, 1, 0]
  assert spans.noise_span_to_sentinel(range(5, 11), mask, 90, 1).tolist() == [5, 90, 8, 91, 10]
  assert spans.nonnoise_span_to_sentinel(range(5, 11), mask, 90, 1).tolist() == [
      90, 6, 7, 91, 9, 92]
  output = spans.span_corruption(np.arange(5, 45), np.random.default_rng(0), sentinel=90, eos=1,
                                    step=1)
  for tokens in output.values():
    marks = [t for t in tokens if t >= 90]
    assert marks == [90, 91] and tokens[-1] == 1


def test_segments_want_sentinels():
  with pytest.raises(UsageError, match="'x' needs sentinels .* use books_lm or books_prefix_lm"):
    spans.span_corruption_segment('x', {'inputs': 64, 'targets': 64}, 0)
  with pytest.raises(UsageError, match='makes 14 spans, the vocabulary has 13 sentinels'):
    spans.span_corruption_segment('x', {'inputs': 256, 'targets': 64}, 13)


def test_segments_of_other_spans_fill_their_lengths():
  """ByT5's mean of 20 and UL2's rows: T5's rule, exact sizes, and one token more does not fit."""
  lengths = {'inputs': 1024, 'targets': 189}
  segment = lambda *noise: spans.span_corruption_segment('x', lengths, 100, *noise)
  assert segment(0.15, 20.) == 1193
  assert spans.span_corruption_sizes(1193, 0.15, 20.) == {'inputs': 1024, 'targets': 189}
  with pytest.raises(UsageError, match='targets of 229 tokens, the limit is 189'):
    segment()
  lengths = {'inputs': 64, 'targets': 64}
  assert segment(0.5, 3.) == 94
  assert spans.span_corruption_sizes(94, 0.5, 3.) == {'inputs': 64, 'targets': 64}
  lengths = {'inputs': 512, 'targets': 512}
  with pytest.raises(UsageError, match='makes 128 spans, the vocabulary has 100 sentinels'):
    segment(0.5, 3.)
  for noise in (0., 3.), (1., 3.), (1.5, 3.), (0.15, 0.5):
    message = f'between 0 and 1 .* 1 or more, got a density of {noise[0]} in spans of {noise[1]} '
    with pytest.raises(UsageError, match=message):
      segment(*noise)


@pytest.mark.parametrize('length, sizes', [(1, (2, 2)), (0, (1, 1))])
def test_span_corruption_of_a_token_or_none_keeps_it(rng, length, sizes):
  output = spans.span_corruption([7][:length], rng, sentinel=99, eos=1)
  assert output['inputs'].tolist() == [7][:length] + [1]
  assert output['targets'].tolist() == [99][:length] + [1]
  assert tuple(map(len, output.values())) == sizes
  assert all(len(output[f]) <= n for f, n in spans.span_corruption_sizes(length).items())


def test_pieces_are_the_document_closed():
  pieces = lambda tokens, length: [p.tolist() for p in spans.document_pieces(tokens, length, eos=1)]
  assert pieces([5, 6, 7, 8, 9], 4) == [[5, 6, 7, 8], [9, 1]]
  assert pieces([5, 6, 7], 4) == [[5, 6, 7, 1]]
  assert pieces([5, 6, 7, 8], 4) == [[5, 6, 7, 8], [1]]
  assert pieces([1, 1], 2) == [[1, 1], [1]]
  assert pieces([5], 1) == [[5], [1]]
  assert pieces([], 4) == []
  assert spans.document_pieces(np.array([5], np.int64), 4, eos=1)[0].dtype == np.int32
