"""Attention with T5's relative positions, segment-aware masks and an explicit cache.

B batch, T query length, S key length, N heads, H head, D model.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.models.layers import Dense, dropout
from t5lab.parallel.sharding import constrain

MASKED = -1e10   # not -inf: a row with no key must give finite numbers, and -1e10 fits bfloat16


def relative_bucket(relative, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128):
  """Bucket of relative = key position - query position; int array of any shape.

  Half of the buckets are exact distances, the rest grow logarithmically up to max_distance.
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
  """A learned number for each (bucket, head), shared by all layers of a stack."""
  config: TransformerConfig
  bidirectional: bool

  @nn.compact
  def __call__(self, query_positions, key_positions):          # int[T], int[S] -> [1, N, T, S]
    c = self.config
    init = nn.with_logical_partitioning(
        nn.initializers.variance_scaling(1., 'fan_avg', 'uniform'), ('buckets', 'rel_heads'))
    table = self.param('table', init, (c.rel_buckets, c.n_heads), jnp.float32)
    bucket = relative_bucket(
        key_positions[None, :] - query_positions[:, None], bidirectional=self.bidirectional,
        buckets=c.rel_buckets, max_distance=c.rel_max_distance)
    return table[bucket].transpose(2, 0, 1)[None]


def segment_mask(query_segments, key_segments):
  """int[B, T], int[B, S] -> bool[B, 1, T, S]: same segment, and the key is not padding (0)."""
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return (same & (key_segments > 0)[:, None, :])[:, None]


class Attention(nn.Module):
  """Multi-head attention; kernels [D, N * H] and [N * H, D].

  T5 leaves out 1 / sqrt(H) and starts the query kernel smaller by it: the same function under
  Adafactor's relative steps, not under Adam, hence `scale_attn`.
  """
  config: TransformerConfig
  train: bool

  def setup(self):
    c = self.config
    width = c.n_heads * c.d_head
    normal = nn.initializers.normal
    q_std = (c.d_model * (1 if c.scale_attn else c.d_head)) ** -0.5
    into = lambda std: Dense(width, ('embed', 'heads'), normal(std), c.dtype)
    self.q, self.k, self.v = into(q_std), into(c.d_model ** -0.5), into(c.d_model ** -0.5)
    self.o = Dense(c.d_model, ('heads', 'embed'), normal(width ** -0.5), c.dtype)

  def _heads(self, x):                                         # [B, T, N * H] -> [B, T, N, H]
    c = self.config
    x = x.reshape(*x.shape[:-1], c.n_heads, c.d_head)
    return constrain(x, 'batch', 'length', 'act_heads', None)

  def keys_values(self, y):
    """[B, S, D] -> k and v, each [B, N, S, H]: the cache's layout, contiguous for each head."""
    return {'k': self._heads(self.k(y)).swapaxes(1, 2), 'v': self._heads(self.v(y)).swapaxes(1, 2)}

  def __call__(self, x, kv, mask, bias=None):
    """x[B, T, D] attends to kv; mask is bool[B, 1, T, S] or None, bias float[1, N, T, S] or None.

    kv may have B / R rows: each serves R consecutive rows of x (beams), which are then queries of
    one row, so that beam search neither copies nor reorders the encoder's keys.
    """
    c = self.config
    B, T, _ = x.shape
    rows = kv['k'].shape[0]
    q = self._heads(self.q(x)).reshape(rows, B // rows * T, c.n_heads, c.d_head)
    if c.scale_attn:
      q *= c.d_head ** -0.5
    scores = jnp.einsum('BTNH,BNSH->BNTS', q, kv['k'], preferred_element_type=jnp.float32)
    if bias is not None:
      scores += bias
    if mask is not None:
      scores = jnp.where(mask, scores, MASKED)
    probs = jax.nn.softmax(scores).astype(c.dtype)
    probs = constrain(probs, 'batch', 'act_heads', 'length', None)
    probs = dropout(self, probs, c.dropout, self.train)
    out = jnp.einsum('BNTS,BNSH->BTNH', probs, kv['v']).reshape(B, T, c.n_heads * c.d_head)
    return self.o(out)
