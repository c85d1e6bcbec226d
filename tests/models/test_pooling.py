"""Pooling against the formulas of sentence-transformers 6.2 (Pooling._forward_padded) in numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_params, shrink

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models.families import CHOICES
from t5lab.models.pooling import pool
from t5lab.models.transformer import Transformer

X = np.random.RandomState(0).randn(3, 5, 4).astype(np.float32)
LENGTHS = (5, 3, 1)


def theirs(mode, x):
  """x[T, D]: the vectors of one text without padding -> [D]."""
  t = np.arange(1, len(x) + 1)[:, None]
  return {'first': x[0], 'last': x[-1], 'max': x.max(0), 'mean': x.sum(0) / len(x),
          'mean_sqrt': x.sum(0) / np.sqrt(len(x)), 'weighted_mean': (x * t).sum(0) / t.sum()}[mode]


MODES = [mode for mode in CHOICES['pool'] if mode != 'pooler']


@pytest.mark.parametrize('mode', MODES)
def test_each_mode_without_the_padding(mode):
  mask = np.arange(5) < np.array(LENGTHS)[:, None]
  want = [theirs(mode, x[:n]) for x, n in zip(X, LENGTHS)]
  np.testing.assert_allclose(pool(mode, jnp.array(X), jnp.array(mask)), want, rtol=1e-6, atol=1e-7)
  # sums are in float32, the result has the dtype of x
  half = pool(mode, jnp.array(X, jnp.bfloat16), jnp.array(mask))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(np.float32), want, rtol=0.02, atol=0.02)


def test_tokens_of_a_prompt_are_not_pooled_and_keep_their_places():
  mask = jnp.array((np.arange(5) >= 2)[None])
  x = X[:1]
  for mode in ('first', 'last', 'max', 'mean', 'mean_sqrt'):
    np.testing.assert_allclose(pool(mode, x, mask)[0], theirs(mode, x[0, 2:]), rtol=1e-6, atol=1e-7)
  t = np.array([3, 4, 5])[:, None]
  np.testing.assert_allclose(pool('weighted_mean', x, mask)[0], (x[0, 2:] * t).sum(0) / 12,
                             rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'max'])
def test_without_a_token_it_is_finite(mode):
  got = pool(mode, X[:1], jnp.zeros((1, 5), bool))
  np.testing.assert_array_equal(got, X[:1, 0] if mode == 'first' else np.zeros((1, 4)))


def test_several_modes_and_dense_layers():
  c = dataclasses.replace(
      shrink('minilm/l6'), pool='max+first', dense=(24, 6), dense_acts=('tanh', 'linear'),
      dense_bias=(True, False), pooler=False)
  assert c.vector_size == 6
  params = random_params(c)
  shapes = {path: x.shape for path, x in trees.flatten(params).items() if 'dense' in path}
  assert shapes == {'dense_0/kernel': (32, 24), 'dense_0/bias': (24,), 'dense_1/kernel': (24, 6)}
  ids = np.array([[5, 7, 9, 0], [4, 3, 0, 0]])
  run = lambda method, c=c, **more: Transformer(c).apply(
      {'params': params}, {'encoder_input_tokens': ids, **more}, method=method)
  x, _ = run('_encode')
  for row, tokens, vector in zip(x, (3, 2), run('pooled')):
    pooled = np.concatenate([theirs('max', row[:tokens]), row[0]])
    d = params['dense_0']
    want = np.tanh(pooled @ d['kernel'] + d['bias']) @ params['dense_1']['kernel']
    np.testing.assert_allclose(vector, want, rtol=1e-4, atol=1e-5)
  # without the first token
  bare = dataclasses.replace(c, pool='mean', dense=(), dense_acts=(), dense_bias=())
  assert bare.vector_size == 16
  got = run('pooled', bare, pool_from=np.array([1, 1]))
  np.testing.assert_allclose(got, [x[0, 1:3].mean(0), x[1, 1]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('fields, message', [
    (dict(pool='mean+maxx'), "model.pool='maxx' is unknown. Did you mean"),
    (dict(pool=''), "model.pool='' is unknown"),
    (dict(pool='mean+pooler', pooler=False), 'model.pooler=True'),
    (dict(dense=(4,)), 'an entry for each dense layer'),
    (dict(dense=(0,), dense_acts=('tanh',), dense_bias=(True,)), 'widths of 1 or more'),
    (dict(dense=(4,), dense_acts=('tan',), dense_bias=(True,)), "dense_acts has 'tan'.*tanh"),
])
def test_bad_fields(fields, message):
  with pytest.raises(UsageError, match=message):
    dataclasses.replace(shrink('minilm/l6'), **fields)
