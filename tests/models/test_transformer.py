"""Beams and dropout. The laws and golden vectors of all families are in files of their own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from small_models import BATCH, CONFIGS, random_params

from t5lab.models.cache import init_cache
from t5lab.models.layers import dropout
from t5lab.models.transformer import Transformer

T5_1_1 = CONFIGS['t5_1_1']


def test_beams_share_one_copy_of_the_encoder_keys():
  """Two decoder rows for each encoder row equal the encoder row repeated."""
  config, rows = T5_1_1, np.array([[3, 4], [5, 6], [7, 8], [9, 10]])
  params, model = random_params(config), Transformer(config)
  apply = jax.jit(model.apply, static_argnames='method')
  decode = lambda *a: apply({'params': params}, *a, method='decode')
  memory, segments = apply({'params': params}, BATCH['encoder_input_tokens'], method='encode')
  repeated = init_cache(config, 4, 2, jnp.repeat(memory, 2, 0), jnp.repeat(segments, 2, 0))
  want, _ = decode(rows, repeated, 0)
  shared = init_cache(config, 4, 2, memory, segments)
  got, cache = decode(rows, shared, 0)
  np.testing.assert_allclose(got, want, atol=3e-6)
  assert cache['cross']['k'].shape[1] == 2


def test_dropout_is_shared_over_the_length_and_differs_between_layers():
  c = dataclasses.replace(T5_1_1, dropout=0.5)
  params, model = random_params(c), Transformer(c, train=True)
  apply = jax.jit(lambda params, key: model.apply({'params': params}, BATCH, rngs={'dropout': key}))
  run = lambda seed: apply(params, jax.random.key(seed))
  assert (np.asarray(run(0)) == np.asarray(run(0))).all()
  assert (np.asarray(run(0)) != np.asarray(run(1))).any()

  class Drop(nn.Module):
    @nn.compact
    def __call__(self, x):
      return dropout(self, x, 0.25, True), dropout(self, x, 0.25, True)

  x, other = Drop().apply({}, jnp.ones((4, 7, 64)), rngs={'dropout': jax.random.key(0)})
  x = np.asarray(x)
  assert (x == x[:, :1]).all() and set(np.unique(x)) == {0., np.float32(1 / 0.75)}
  assert 0.6 < (x > 0).mean() < 0.9 and (x != other).any()
