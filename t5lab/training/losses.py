"""Softmax cross-entropy with T5X's z-loss and label smoothing, for all logits at once or in chunks.

All functions return sums, in float32; the train step divides by what it normalises over.
B batch, T length, D model, V vocabulary.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp

Array = jax.Array
Sums = dict[str, Array]  # float32 scalars: loss (with the z term), z_loss, weight, correct


def _smoothing(vocab: int, label_smoothing: float) -> tuple[float, float, float]:
  """The smoothed target: mass on the right token, on every other token, and its entropy."""
  on = 1. - label_smoothing
  off = label_smoothing / (vocab - 1)
  if not label_smoothing:
    return on, off, 0.
  return on, off, -on * math.log(on) - (vocab - 1) * off * math.log(off)


def _is_target(logits, targets):
  # A comparison instead of a gather: XLA fuses it into the reduction, forward and backward, so
  # neither a one-hot nor a scatter exists, and a vocabulary sharded over devices needs only a psum.
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


# A custom gradient, because autodiff would keep a float32 exp(logits) until the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _token_loss(logits, targets, z_loss, label_smoothing):
  """logits[..., V], int targets[...] -> float32 (loss with the z term, z term), both [...]."""
  return _token_loss_forward(logits, targets, z_loss, label_smoothing)[0]


def _token_loss_forward(logits, targets, z_loss, label_smoothing):
  x = logits.astype(jnp.float32)
  on, off, entropy = _smoothing(x.shape[-1], label_smoothing)
  log_z = jax.nn.logsumexp(x, axis=-1)
  target_logit = jnp.sum(jnp.where(_is_target(x, targets), x, 0.), axis=-1)
  loss = log_z - (on - off) * target_logit - entropy
  if label_smoothing:
    loss -= off * jnp.sum(x, axis=-1)
  z = z_loss * jnp.square(log_z)
  return (loss + z, z), (logits, targets, log_z)


def _token_loss_backward(z_loss, label_smoothing, residuals, cotangents):
  logits, targets, log_z = residuals
  d_loss, d_z = cotangents
  on, off, _ = _smoothing(logits.shape[-1], label_smoothing)
  softmax = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
  d_softmax = d_loss + (d_loss + d_z) * 2. * z_loss * log_z
  smooth = jnp.where(_is_target(logits, targets), on, off)
  d_logits = softmax * d_softmax[..., None] - smooth * d_loss[..., None]
  return d_logits.astype(logits.dtype), None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def cross_entropy(
    logits: Array,   # [B, T, V]
    targets: Array,  # int[B, T]
    weights: Array,  # float[B, T], 0 for padding
    *,
    z_loss: float = 0.,
    label_smoothing: float = 0.,
) -> Sums:
  """Weighted sums over tokens: loss (z term included), z_loss, weight, correct.

  A token's loss is CE(smoothed target, softmax) - H(smoothed target) + z_loss * log(Z)**2, where
  the smoothed target puts 1 - label_smoothing on the token and spreads the rest over the other
  V - 1. A perfect prediction has loss 0. [T5X losses.py; mesh-tensorflow and optax.smooth_labels
  differ: they spread over all V and keep the entropy.]
  """
  loss, z = _token_loss(logits, targets, z_loss, label_smoothing)
  weights = weights.astype(jnp.float32)
  return {
      'loss': jnp.sum(loss * weights),
      'z_loss': jnp.sum(z * weights),
      'weight': jnp.sum(weights),
      'correct': jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights),
  }


def chunked_cross_entropy(
    hidden: Array,   # [B, T, D]
    unembed: Callable[[Array], Array],  # [B, t, D] -> [B, t, V]
    targets: Array,  # int[B, T]
    weights: Array,  # float[B, T]
    *,
    chunks: int,
    z_loss: float = 0.,
    label_smoothing: float = 0.,
) -> Sums:
  """`cross_entropy` of unembed(hidden) with only [B, ceil(T / chunks), V] logits in memory.

  Each chunk's logits are computed again in the backward pass. T is padded with weight 0 to a
  multiple of chunks, and a chunk takes every chunks-th position, so that each device has its share
  of every chunk, whether B or T is sharded.
  """
  length = targets.shape[1]
  size = -(-length // chunks)

  def split(x):  # [B, T, ...] -> [chunks, B, size, ...]
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], size, chunks, *x.shape[2:]), 2, 0)

  # XLA's CSE never merges a scan body with its recomputed copy, so it need not be prevented.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def add_chunk(sums, chunk):
    hidden, targets, weights = chunk
    chunk_sums = cross_entropy(
        unembed(hidden), targets, weights, z_loss=z_loss, label_smoothing=label_smoothing)
    return jax.tree.map(jnp.add, sums, chunk_sums), None

  zeros = {name: jnp.zeros((), jnp.float32) for name in ('loss', 'z_loss', 'weight', 'correct')}
  sums, _ = jax.lax.scan(add_chunk, zeros, (split(hidden), split(targets), split(weights)))
  return sums
