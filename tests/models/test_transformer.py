"""The Transformer against golden vectors of T5X's code, and its own laws."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5x_names import golden_params

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

BATCH = {
    'encoder_input_tokens': np.array([[5, 7, 9, 11, 13, 1, 0, 0], [6, 8, 10, 1, 0, 0, 0, 0]]),
    'decoder_input_tokens': np.array([[0, 20, 21, 22, 1], [0, 30, 31, 1, 0]]),
}
TARGETS = np.array([[20, 21, 22, 1, 0], [30, 31, 1, 0, 0]])


def random_params(c, seed=0):
  """Every leaf normal / sqrt(fan-in) from a numpy stream of its own path."""
  abstract = jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)
  flat = {}
  for path, leaf in trees.flatten(nn.unbox(abstract)['params']).items():
    stream = np.random.RandomState(sum(map(ord, path)) + seed)
    fan = leaf.shape[-2] if leaf.ndim > 1 else 1
    x = stream.randn(*leaf.shape) / np.sqrt(fan)
    flat[path] = (1 + 0.1 * x if path.endswith('scale') else x).astype(np.float32)
  return trees.unflatten(flat)


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


def test_golden_parameters_are_all_of_ours():
  for c in (T5_1_0, T5_1_1):
    ours = jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)
    ours = {k: v.shape for k, v in trees.flatten(nn.unbox(ours)['params']).items()}
    assert {k: v.shape for k, v in trees.flatten(golden_params(c)).items()} == ours


@pytest.mark.parametrize('name, count', [
    ('t5_1_0/small', 60_506_624), ('t5_1_0/base', 222_903_552), ('t5_1_0/large', 737_668_096),
    ('t5_1_0/3b', 2_851_598_336), ('t5_1_0/11b', 11_307_321_344), ('t5_1_1/small', 76_961_152),
    ('t5_1_1/base', 247_577_856), ('t5_1_1/large', 783_150_080), ('t5_1_1/xl', 2_849_757_184),
    ('t5_1_1/xxl', 11_135_332_352)])
def test_parameter_counts_of_the_paper(name, count):
  model = Transformer(TransformerConfig(**families.row(name)))
  abstract = jax.eval_shape(model.init, jax.random.key(0), BATCH)
  assert sum(x.size for x in jax.tree.leaves(abstract)) == count


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


@pytest.mark.parametrize('config', [T5_1_1, DECODER], ids=['encdec', 'decoder'])
def test_causality_is_exact(config):
  params = random_params(config)
  changed = {**BATCH, 'decoder_input_tokens': BATCH['decoder_input_tokens'].copy()}
  changed['decoder_input_tokens'][:, 3:] = 40
  a, b = logits(config, params, BATCH), logits(config, params, changed)
  assert (a[:, :3] == b[:, :3]).all()
  assert (a[:, 3:] != b[:, 3:]).any()


@pytest.mark.parametrize('config', [T5_1_0, T5_1_1, DECODER], ids=['1.0', '1.1', 'decoder'])
def test_cached_decoding_equals_teacher_forcing(config):
  params, model = random_params(config), Transformer(config)
  tokens = BATCH['decoder_input_tokens']
  want = logits(config, params, BATCH)
  memory = ()
  if config.enc_layers:
    memory = model.apply({'params': params}, BATCH['encoder_input_tokens'], method='encode')
  cache = init_cache(config, 2, tokens.shape[1], *memory)
  for t in range(tokens.shape[1]):
    y, cache = model.apply({'params': params}, tokens[:, t:t + 1], cache, t, method='decode')
    np.testing.assert_allclose(y[:, 0], want[:, t], atol=3e-6, err_msg=f'position {t}')
  # and a prefix at once
  cache = init_cache(config, 2, tokens.shape[1], *memory)
  y, cache = model.apply({'params': params}, tokens[:, :3], cache, 0, method='decode')
  np.testing.assert_allclose(y, want[:, :3], atol=3e-6)
  y, cache = model.apply({'params': params}, tokens[:, 3:], cache, 3, method='decode')
  np.testing.assert_allclose(y, want[:, 3:], atol=3e-6)


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


@pytest.mark.parametrize('config', [T5_1_1, DECODER], ids=['encdec', 'decoder'])
def test_packed_equals_separate(config):
  params = random_params(config)
  packed = {
      'encoder_input_tokens': np.array([[5, 7, 1, 6, 0, 10, 1, 0]]),    # a real id 0 inside
      'encoder_segment_ids': np.array([[1, 1, 1, 2, 2, 2, 2, 0]]),
      'decoder_input_tokens': np.array([[0, 20, 0, 30, 0, 0]]),
      'decoder_segment_ids': np.array([[1, 1, 2, 2, 2, 0]]),
  }
  y = logits(config, params, packed)
  for i, (enc, dec) in enumerate([((0, 3), (0, 2)), ((3, 7), (2, 5))]):
    one = {'encoder_input_tokens': packed['encoder_input_tokens'][:, slice(*enc)],
           'encoder_segment_ids': np.ones((1, enc[1] - enc[0]), int),
           'decoder_input_tokens': packed['decoder_input_tokens'][:, slice(*dec)],
           'decoder_segment_ids': np.ones((1, dec[1] - dec[0]), int)}
    np.testing.assert_allclose(
        y[:, slice(*dec)], logits(config, params, one), atol=3e-6, err_msg=f'segment {i}')


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_nothing_but_memory(remat):
  params = random_params(T5_1_1)
  def gradient(c):
    loss = lambda p: jnp.square(Transformer(c).apply({'params': p}, BATCH)).mean()
    return jax.grad(loss)(params)
  a, b = gradient(T5_1_1), gradient(dataclasses.replace(T5_1_1, remat=remat))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), a, b)


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


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
  c = dataclasses.replace(T5_1_1, dtype='bfloat16')
  variables = Transformer(c).init(jax.random.key(0), BATCH)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  text = jax.jit(Transformer(c).apply).lower(variables, BATCH).as_text()
  assert 'tensor<2x8x16xbf16>' in text
  assert Transformer(c).apply(variables, BATCH).dtype == jnp.float32
