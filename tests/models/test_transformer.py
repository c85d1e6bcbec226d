"""The Transformer against golden vectors of T5X's code, and its own laws."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BATCH, random_params

from t5lab import trees
from t5lab.models import families
from t5lab.models.positions import relative_bucket
from t5lab.models.families import TransformerConfig
from t5lab.models.cache import init_cache
from t5lab.models.transformer import Transformer

T5_1_0 = TransformerConfig(vocab_size=48, d_model=16, d_ff=32, n_heads=2, d_head=8, enc_layers=2,
                           dec_layers=2)
T5_1_1 = dataclasses.replace(T5_1_0, acts=('gelu', 'linear'), tied=False, scale_logits=False)
DECODER = dataclasses.replace(T5_1_1, enc_layers=0, tied=True, scale_logits=True)

TARGETS = np.array([[20, 21, 22, 1, 0], [30, 31, 1, 0, 0]])


def logits(c, params, batch):
  return np.asarray(Transformer(c).apply({'params': params}, batch))


@pytest.mark.parametrize('config, first, second, total', [
    (T5_1_0, [-1.596574, -2.330164, -2.759761, -2.829319, -2.529764, -1.900176],
     [-2.743946, -2.644504, -2.200060, -1.468596, -0.545539, 0.448689], 615.61231),
    (T5_1_1, [-0.466039, -0.373009, -0.229494, -0.054918, 0.127091, 0.291898],
     [-0.098646, -0.057758, -0.009053, 0.040877, 0.085275, 0.118131], 84.592950),
], ids=['1.0', '1.1'])
def test_golden_vectors_of_t5x(config, first, second, total):
  y = logits(config, golden_params(config), BATCH)
  np.testing.assert_allclose(y[0, 0, :6], first, atol=2e-6)
  np.testing.assert_allclose(y[1, 2, :6], second, atol=2e-6)
  np.testing.assert_allclose(np.abs(y)[TARGETS > 0].sum(), total, rtol=1e-6)


def golden_params(c):
  """Parameters filled by the golden vectors' rule: the i-th sorted T5X name holds sin(0.37 n + i),
  scaled by its kind. They are all of ours, in our shapes, or `rows.write` raises."""
  abstract = nn.unbox(jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)['params'])
  table, filled = t5x.rows(c, scanned=False), {}
  theirs = dict(rows.write(table, jax.tree.map(lambda x: np.empty(x.shape, np.float32), abstract)))
  for i, name in enumerate(sorted(theirs)):
    x = np.sin(np.arange(theirs[name].size) * 0.37 + i).reshape(theirs[name].shape)
    x = 1 + 0.1 * x if name.endswith('/scale') else x if 'embedding' in name else 0.3 * x
    filled[name] = x.astype(np.float32)
  return rows.read(table, Tensors(filled), abstract)


def test_relative_buckets_of_the_paper():
  past = np.arange(0, 200)
  both = np.asarray(relative_bucket(-past, bidirectional=True))
  assert list(both[:8]) == list(range(8))
  for bucket, low, high in [(8, 8, 11), (9, 12, 15), (10, 16, 22), (11, 23, 31), (12, 32, 45),
                            (13, 46, 63), (14, 64, 90), (15, 91, 199)]:
    assert set(both[low:high + 1]) == {bucket}
  future = np.asarray(relative_bucket(past[1:], bidirectional=True))
  assert (future == both[1:] + 16).all() and 16 not in future
  one = np.asarray(relative_bucket(-past, bidirectional=False))
  edges = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113, 200]
  for bucket, (low, high) in enumerate(zip(edges, edges[1:]), start=16):
    assert set(one[low:high]) == {bucket}, bucket
  assert set(np.asarray(relative_bucket(past, bidirectional=False))) == {0}


def test_beams_share_one_copy_of_the_encoder_keys():
  """Two decoder rows for each encoder row equal the encoder row repeated."""
  config, rows = T5_1_1, np.array([[3, 4], [5, 6], [7, 8], [9, 10]])
  params, model = random_params(config), Transformer(config)
  decode = lambda *a: model.apply({'params': params}, *a, method='decode')
  memory, segments = model.apply(
      {'params': params}, BATCH['encoder_input_tokens'], method='encode')
  repeated = init_cache(config, 4, 2, jnp.repeat(memory, 2, 0), jnp.repeat(segments, 2, 0))
  want, _ = decode(rows, repeated, 0)
  shared = init_cache(config, 4, 2, memory, segments)
  got, cache = decode(rows, shared, 0)
  np.testing.assert_allclose(got, want, atol=3e-6)
  assert cache['cross']['k'].shape[1] == 2


def test_dropout_is_shared_over_the_length_and_differs_between_layers():
  c = dataclasses.replace(T5_1_1, dropout=0.5)
  params, model = random_params(c), Transformer(c, train=True)
  run = lambda seed: model.apply({'params': params}, BATCH, rngs={'dropout': jax.random.key(seed)})
  assert (np.asarray(run(0)) == np.asarray(run(0))).all()
  assert (np.asarray(run(0)) != np.asarray(run(1))).any()
  from t5lab.models.layers import dropout

  class Drop(nn.Module):
    @nn.compact
    def __call__(self, x):
      return dropout(self, x, 0.25, True), dropout(self, x, 0.25, True)

  x, other = Drop().apply({}, jnp.ones((4, 7, 64)), rngs={'dropout': jax.random.key(0)})
  x = np.asarray(x)
  assert (x == x[:, :1]).all() and set(np.unique(x)) == {0., np.float32(1 / 0.75)}
  assert 0.6 < (x > 0).mean() < 0.9 and (x != other).any()
