"""Positions: T5's relative buckets, rope, sinusoids. A learned table is a parameter of its stack.

B batch, T length, N heads, H head, D model.
"""

import dataclasses
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


def rope_frequencies(c: TransformerConfig, length=None):
  """float32[H / 2], in radians per position. [Su et al. 2021]

  length: the number of positions so far, for rope_type 'dynamic'; None: the original one. The
  meaning of rope_scaling's numbers depends on rope_type:
  llama3: wavelengths above original / low are multiplied by factor, those below original / high are
  kept, and between them it interpolates. [Llama 3.1]
  linear: all wavelengths times factor. [Chen et al. 2023, 2306.15595]
  dynamic: theta grows with the length beyond the original one. [NTK-aware scaling]
  yarn: dimensions that turn less than beta_slow times within the original length are multiplied by
  factor, those that turn more than beta_fast times are kept. [Peng et al. 2023, 2309.00071, 3.2]
  """
  exponent = jnp.arange(0, c.d_head, 2, dtype=jnp.float32) / c.d_head
  frequency = c.rope_theta ** -exponent
  if not c.rope_scaling:
    return frequency
  factor = c.rope_scaling[0]
  if c.rope_type == 'linear':
    return frequency / factor
  if c.rope_type == 'dynamic':
    original = c.rope_scaling[1]
    length = original if length is None else jnp.maximum(length, original)
    stretch = factor * length / original - (factor - 1)
    return (c.rope_theta * stretch ** (c.d_head / (c.d_head - 2))) ** -exponent
  if c.rope_type == 'yarn':
    _, fast, slow, original, _ = c.rope_scaling
    turns_at = lambda turns: c.d_head * math.log(original / (turns * 2 * math.pi)) / (
        2 * math.log(c.rope_theta))
    low, high = max(math.floor(turns_at(fast)), 0), min(math.ceil(turns_at(slow)), c.d_head - 1)
    ramp = (jnp.arange(c.d_head // 2) - low) / max(high - low, 0.001)
    kept = 1 - jnp.clip(ramp, 0., 1.)
    return (1 - kept) * frequency / factor + kept * frequency
  _, low, high, original = c.rope_scaling
  wave = 2 * math.pi / frequency
  smooth = jnp.clip((original / wave - low) / (high - low), 0., 1.)
  return (1 - smooth) * frequency / factor + smooth * frequency


def rotation(positions, c: TransformerConfig):
  """int[B, T] or [T] -> (sin, cos), each float32[(B,) T, 1, H / 2], for `rope`."""
  length = jnp.max(positions) + 1 if c.rope_type == 'dynamic' else None
  angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c, length)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if c.rope_type == 'yarn' and c.rope_scaling:
    return sin * c.rope_scaling[4], cos * c.rope_scaling[4]
  return sin, cos


def local_config(c: TransformerConfig) -> TransformerConfig:
  """The config whose `rotation` is that of layers with a window."""
  return dataclasses.replace(c, rope_theta=c.rope_local_theta, rope_scaling=())


def rope(x, angle):
  """Rotates x[B, T, N, H] by the angle that `rotation` returned.

  Pairs are (i, i + H / 2), as in Hugging Face; conversion permutes Meta's interleaved weights.
  """
  sin, cos = angle
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def sinusoids(positions, d_model: int, kind: str = 'interleaved') -> jax.Array:
  """int[...] -> float32[..., D], wavelengths from 2 pi to 10000 * 2 pi.

  interleaved: sin and cos by turns. [Vaswani et al. 2017, 3.5] concatenated: all sines, then all
  cosines. fairseq: so too, and the last wavelength is 10000 * 2 pi itself. [tensor2tensor]
  """
  if kind == 'fairseq':
    half = d_model // 2
    frequency = jnp.exp(jnp.arange(half, dtype=jnp.float32) * -(math.log(10_000.) / (half - 1)))
  else:
    frequency = 10_000. ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angle = positions[..., None].astype(jnp.float32) * frequency
  if kind == 'interleaved':
    both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, -1)
    return both[..., :d_model]
  cos = jnp.cos(angle[..., :d_model // 2])
  both = jnp.concatenate([jnp.sin(angle), cos], axis=-1)
  return jnp.pad(both, [(0, 0)] * positions.ndim + [(0, d_model - both.shape[-1])])
