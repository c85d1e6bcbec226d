"""Relative buckets, rotations, sinusoids and learned positions against their formulas."""

import math

import jax
import numpy as np
import pytest
from small_models import CONFIGS, random_params

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.positions import relative_bucket, rope, rope_frequencies, rotation, sinusoids
from t5lab.models.transformer import Transformer

bucket_of = jax.jit(relative_bucket, static_argnames='bidirectional')
rotated = jax.jit(lambda x, p, c: rope(x, rotation(p, c)), static_argnums=2)


def test_relative_buckets_of_the_paper():
  past = np.arange(0, 200)
  both = np.asarray(bucket_of(-past, bidirectional=True))
  assert list(both[:8]) == list(range(8))
  for bucket, low, high in [(8, 8, 11), (9, 12, 15), (10, 16, 22), (11, 23, 31), (12, 32, 45),
                            (13, 46, 63), (14, 64, 90), (15, 91, 199)]:
    assert set(both[low:high + 1]) == {bucket}
  future = np.asarray(bucket_of(past, bidirectional=True))[1:]
  assert (future == both[1:] + 16).all() and 16 not in future
  one = np.asarray(bucket_of(-past, bidirectional=False))
  edges = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113, 200]
  for bucket, (low, high) in enumerate(zip(edges, edges[1:]), start=16):
    assert set(one[low:high]) == {bucket}, bucket
  assert set(np.asarray(bucket_of(past, bidirectional=False))) == {0}


def test_rotations_depend_on_the_difference_of_positions():
  c = TransformerConfig(positions='rope', d_head=8)
  q, k = np.random.RandomState(0).randn(2, 1, 1, 2, 8).astype(np.float32)
  at = lambda x, p: np.asarray(rotated(x, np.array([p]), c))
  dot = lambda i, j: np.einsum('BTNH,BTNH->N', at(q, i), at(k, j))
  assert (np.asarray(at(q, 0)) == q).all()
  np.testing.assert_allclose(dot(7, 4), dot(3, 0), atol=1e-5)
  np.testing.assert_allclose(dot(1003, 1000), dot(3, 0), atol=2e-4)
  assert (abs(dot(4, 7) - dot(3, 0)) > 1e-3).all()      # not of its absolute value
  # dimension i turns with i + H / 2, by position * theta ** (-2 i / H): here i = 1
  e1 = np.zeros((1, 1, 2, 8), np.float32)
  e1[..., 1] = 1
  got = at(e1, 3)[0, 0, 0]
  angle = 3 * 10_000 ** (-2 / 8)
  np.testing.assert_allclose(got[[1, 5]], [math.cos(angle), math.sin(angle)], atol=1e-6)
  assert not got[[0, 2, 3, 4, 6, 7]].any()


def test_positions_of_each_row_rotate_that_row():
  c = TransformerConfig(positions='rope', d_head=4)
  x = np.random.RandomState(0).randn(2, 3, 1, 4).astype(np.float32)
  both = rotated(x, np.array([[0, 1, 2], [0, 0, 1]]), c)
  np.testing.assert_allclose(both[0], rotated(x, np.arange(3), c)[0], atol=1e-6)
  np.testing.assert_allclose(both[1], rotated(x, np.array([0, 0, 1]), c)[1], atol=1e-6)


def test_scaling_of_llama_3_1():
  """Three waves of H = 128, theta 500000, original length 8192: shorter than 8192 / 4 = 2048 stays,
  longer than 8192 slows by 8, between them both in parts. [Llama 3.1]"""
  plain = TransformerConfig(positions='rope', d_head=128, rope_theta=500_000.)
  scaled = TransformerConfig(positions='rope', d_head=128, rope_theta=500_000.,
                             rope_scaling=(8., 1., 4., 8192.))
  frequencies = jax.jit(rope_frequencies, static_argnums=0)
  inv, got = (np.asarray(frequencies(c), np.float64) for c in (plain, scaled))
  waves = 2 * np.pi / inv
  assert waves[10] < 2048 < waves[32] < 8192 < waves[50]
  wave = 2 * np.pi * 500_000 ** (64 / 128)                     # 4442.9 of dimension 32
  smooth = (8192 / wave - 1) / (4 - 1)                         # 0.281
  middle = (1 - smooth) / (500_000 ** 0.5 * 8) + smooth / 500_000 ** 0.5
  np.testing.assert_allclose(got[[10, 32, 50]], [inv[10], middle, inv[50] / 8], rtol=1e-5)
  assert (got[waves < 2048] == inv[waves < 2048]).all()


def test_sinusoids_of_the_paper():
  """PE(p, 2 i) = sin(p / 10000 ** (2 i / D)), PE(p, 2 i + 1) its cosine, interleaved."""
  got = np.asarray(jax.jit(sinusoids, static_argnums=1)(np.array([0, 1, 30]), 6))
  np.testing.assert_allclose(got[0], [0, 1, 0, 1, 0, 1], atol=1e-7)
  np.testing.assert_allclose(
      got[1], [0.841471, 0.540302, 0.046399, 0.998923, 0.002154, 0.999998], atol=1e-6)
  want = [f(30 / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
  np.testing.assert_allclose(got[2], want, atol=1e-5)


def test_bart_reads_position_p_in_row_p_plus_2():
  c = CONFIGS['bart']
  params, tokens = random_params(c), np.array([[5, 7, 9, 11]])
  first = lambda p: Transformer(c).apply({'params': p}, tokens, method='encode')[0][0, :, 0]
  used = np.abs(jax.jit(jax.jacrev(first))(params)['encoder']['positions']).sum(-1)
  assert c.position_offset == 2 and used.shape == (4, 18)
  assert (used.sum(0) > 0).tolist() == [False] * 2 + [True] * 4 + [False] * 12


def test_learned_positions_end_where_their_table_ends():
  c = CONFIGS['gpt2']
  apply = lambda **b: jax.eval_shape(lambda: Transformer(c).init(jax.random.key(0), b))
  long = np.ones((1, 17), int)
  with pytest.raises(UsageError, match='17 tokens.*max_length=16'):
    apply(decoder_input_tokens=long)
  apply(decoder_input_tokens=long, decoder_positions=np.arange(17)[None] % 9)     # packed
