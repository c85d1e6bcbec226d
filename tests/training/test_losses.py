"""Cross-entropy: T5X's numbers, gradients, and chunks against all logits at once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5lab.training import losses
from t5lab.training.losses import chunked_cross_entropy

B, T, D, V = 2, 5, 8, 11
cross_entropy = jax.jit(losses.cross_entropy, static_argnames=('z_loss', 'label_smoothing'))


def random_batch(seed=0):
  rng = np.random.RandomState(seed)
  return (rng.randn(B, T, V).astype(np.float32) * 3, rng.randint(0, V, (B, T)),
          rng.rand(B, T).astype(np.float32) * (rng.rand(B, T) > .3))


def one_token(logits, target, **kw):
  return cross_entropy(jnp.array([[logits]]), jnp.array([[target]]), jnp.ones((1, 1)), **kw)


def smoothed(targets, eps):  # T5X: on = 1 - eps, off = eps / (V - 1)
  return np.where(np.arange(V) == targets[..., None], 1 - eps, eps / (V - 1))


def test_sums_against_optax():
  logits, targets, weights = random_batch()
  got = cross_entropy(logits, targets, weights)
  token = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(logits, targets)
  np.testing.assert_allclose(got['loss'], (token * weights).sum(), rtol=1e-6)
  np.testing.assert_allclose(got['weight'], weights.sum(), rtol=1e-6)
  np.testing.assert_allclose(
      got['correct'], ((logits.argmax(-1) == targets) * weights).sum(), rtol=1e-6)
  assert got['z_loss'] == 0
  assert all(x.dtype == jnp.float32 and x.shape == () for x in got.values())


def test_label_smoothing_number_of_t5x():
  logits = np.array([2., .5, -1., .2, -.3], np.float32)
  got = one_token(logits, 0, label_smoothing=.1)['loss']
  np.testing.assert_allclose(got, .182079, atol=1e-6)
  # The convention of mesh-tensorflow and optax gives another number.
  labels = .1 / 5 + .9 * (np.arange(5) == 0)                    # optax.smooth_labels
  usual = jax.jit(optax.softmax_cross_entropy)(logits, labels)
  np.testing.assert_allclose(usual, .602792, atol=1e-6)


def test_label_smoothing_against_optax():
  logits, targets, weights = random_batch(1)
  labels = smoothed(targets, .2)
  entropy = -(labels * np.log(labels)).sum(-1)
  expected = ((jax.jit(optax.softmax_cross_entropy)(logits, labels) - entropy) * weights).sum()
  got = cross_entropy(logits, targets, weights, label_smoothing=.2)
  np.testing.assert_allclose(got['loss'], expected, rtol=1e-5)


def test_a_perfect_prediction_has_no_loss():
  logits = np.log(np.array([.9, .025, .025, .025, .025]))
  np.testing.assert_allclose(one_token(logits, 0, label_smoothing=.1)['loss'], 0, atol=1e-6)


def test_z_loss_is_added_and_reported():
  logits = np.array([1., 2., 3.], np.float32)
  log_z = math.log(sum(map(math.exp, logits)))
  got = one_token(logits, 2, z_loss=.5)
  np.testing.assert_allclose(got['z_loss'], .5 * log_z ** 2, rtol=1e-6)
  np.testing.assert_allclose(got['loss'], log_z - 3. + .5 * log_z ** 2, rtol=1e-6)


def test_z_loss_multiplies_the_softmax_of_the_gradient():
  logits, targets, weights = random_batch(2)
  z = 1e-2
  got = jax.jit(jax.grad(lambda x: cross_entropy(x, targets, weights, z_loss=z)['loss']))(logits)
  log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = np.exp(logits - log_z) * (1 + 2 * z * log_z) - smoothed(targets, 0.)
  np.testing.assert_allclose(got, expected * weights[..., None], rtol=1e-5, atol=1e-6)


def test_gradient_equals_autodiff_of_the_formula():
  logits, targets, weights = random_batch(3)

  def formula(x):
    labels = smoothed(targets, .1)
    z = .03 * jnp.square(jax.nn.logsumexp(x, axis=-1))
    ce = optax.softmax_cross_entropy(x, labels)
    return jnp.sum((ce + z) * weights) - 2 * jnp.sum(z * weights)

  def ours(x):
    sums = cross_entropy(x, targets, weights, z_loss=.03, label_smoothing=.1)
    return sums['loss'] - 2 * sums['z_loss']

  np.testing.assert_allclose(jax.jit(jax.grad(ours))(logits), jax.jit(jax.grad(formula))(logits),
                             rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
  logits, targets, weights = random_batch(4)
  low = jnp.asarray(logits, jnp.bfloat16)
  got, grad = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, targets, weights)['loss']))(low)
  expected = cross_entropy(low.astype(jnp.float32), targets, weights)['loss']
  assert got.dtype == jnp.float32 and got == expected
  assert grad.dtype == jnp.bfloat16


def test_no_one_hot_and_no_second_float32_copy_is_kept():
  logits, targets, weights = random_batch(5)
  f = lambda x: losses.cross_entropy(
      x, targets, weights, z_loss=1e-4, label_smoothing=.1)['loss']
  _, pullback = jax.vjp(f, jnp.asarray(logits, jnp.bfloat16))
  kept = [x for x in jax.tree.leaves(pullback) if getattr(x, 'shape', ()) == (B, T, V)]
  assert [x.dtype for x in kept] == [jnp.bfloat16]


@pytest.mark.parametrize('chunks', [1, 2, 5])
def test_chunks_equal_the_whole(chunks):
  _, targets, weights = random_batch(6)
  rng = np.random.RandomState(7)
  hidden, matrix = rng.randn(B, T, D).astype('f'), rng.randn(D, V).astype('f')
  kw = dict(z_loss=1e-2, label_smoothing=.1)

  def whole(h, m):
    sums = cross_entropy(h @ m, targets, weights, **kw)
    return sums['loss'], sums

  def parts(h, m):
    sums = chunked_cross_entropy(h, lambda x: x @ m, targets, weights, chunks=chunks, **kw)
    return sums['loss'], sums

  (_, a), a_grads = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(hidden, matrix)
  (_, b), b_grads = jax.jit(jax.value_and_grad(parts, (0, 1), has_aux=True))(hidden, matrix)
  for x, y in zip(jax.tree.leaves((a, a_grads)), jax.tree.leaves((b, b_grads)), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5)


def test_whole_logits_never_exist():
  T, D = 6, 3
  hidden, matrix = jnp.ones((B, T, D)), jnp.ones((D, V))
  targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))

  def most_tokens(chunks):  # of any array [..., V] in the compiled gradient
    f = jax.grad(lambda h, m: chunked_cross_entropy(
        h, lambda x: x @ m, targets, weights, chunks=chunks)['loss'], (0, 1))
    text = jax.jit(f).lower(hidden, matrix).compile().as_text()
    shapes = [tuple(map(int, dims.split(','))) for dims in re.findall(r'\[(\d+(?:,\d+)+)\]', text)]
    return max(math.prod(shape) // V for shape in shapes if V in shape)

  assert most_tokens(1) == B * T
  assert most_tokens(3) == B * T // 3
