"""Positions: T5's relative buckets, rope, sinusoids. A learned table is a parameter of its stack.

B batch, T length, N heads, H head, D model.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.parallel.sharding import constrain


def relative_bucket(relative, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128):
  """The bucket of relative = key position - query position, an int array of any shape.

  Half of the buckets hold one distance each; the others grow logarithmically up to max_distance.
  [Raffel et al. 2020, 2.1]
  """
  offset = 0
  if bidirectional:
    buckets //= 2
    offset = (relative > 0).astype(jnp.int32) * buckets
    distance = jnp.abs(relative)
  else:
    distance = jnp.maximum(-relative, 0)
  exact = buckets // 2
  ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
  log = jnp.log(ratio) / math.log(max_distance / exact) * (buckets - exact)
  far = jnp.minimum(exact + log.astype(jnp.int32), buckets - 1)
  return offset + jnp.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
  """A learned bias for each bucket and head."""
  config: TransformerConfig
  bidirectional: bool

  @nn.compact
  def __call__(self, relative, copies: int = 1):
    """int[..., T, S] -> float32[copies, ..., N, T, S].

    Each copy is read from its own copy of the table. With a copy per shard of the batch, gradients
    are summed over devices as tables instead of whole biases.
    """
    c = self.config
    init = nn.with_logical_partitioning(
        nn.initializers.variance_scaling(1., 'fan_avg', 'uniform'), ('buckets', 'rel_heads'))
    table = self.param('table', init, (c.rel_buckets, c.n_heads), jnp.float32)
    bucket = relative_bucket(relative, bidirectional=self.bidirectional, buckets=c.rel_buckets,
                             max_distance=c.rel_max_distance)
    table = constrain(jnp.broadcast_to(table, (copies, *table.shape)),
                      'batch', 'buckets', 'rel_heads')
    return jnp.moveaxis(jnp.take(table, bucket, axis=1, mode='clip'), -1, -3)


def rope_frequencies(c: TransformerConfig):
  """float32[H / 2], in radians per position. [Su et al. 2021]

  rope_scaling is (factor, low, high, original length): wavelengths above original / low are
  multiplied by factor, those below original / high are kept, and between them it interpolates.
  [Llama 3.1]
  """
  frequency = c.rope_theta ** (-jnp.arange(0, c.d_head, 2, dtype=jnp.float32) / c.d_head)
  if not c.rope_scaling:
    return frequency
  factor, low, high, original = c.rope_scaling
  wave = 2 * math.pi / frequency
  smooth = jnp.clip((original / wave - low) / (high - low), 0., 1.)
  return (1 - smooth) * frequency / factor + smooth * frequency


def rope(x, positions, c: TransformerConfig):
  """Rotates x[B, T, N, H] by its positions, int[B, T] or [T].

  Pairs are (i, i + H / 2), as in Hugging Face; conversion permutes Meta's interleaved weights.
  """
  angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c)   # [(B,) T, 1, H/2]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sinusoids(positions, d_model: int) -> jax.Array:
  """int[...] -> float32[..., D]: sin and cos interleaved, wavelengths 2 pi to 10000 * 2 pi.

  [Vaswani et al. 2017, 3.5; tensor2tensor puts all sines first and spaces frequencies otherwise]
  """
  frequency = 10_000. ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angle = positions[..., None].astype(jnp.float32) * frequency
  both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
  return both.reshape(*positions.shape, -1)[..., :d_model]
