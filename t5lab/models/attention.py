"""Attention with grouped keys, segment-aware masks and an explicit cache.

B batch, T query length, S key length, N heads, K key heads, G = N / K, H head, D model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.models.layers import Dense, Norm, dropout, kernel_init
from t5lab.models.positions import rope
from t5lab.parallel.sharding import constrain

MASKED = -1e10   # not -inf: a query without a key must give finite numbers; bfloat16 can hold it


def segment_mask(query_segments, key_segments):
  """int[B, T], int[B, S] -> bool[B, 1, T, S], true for keys of the same segment except padding (0).
  """
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return (same & (key_segments > 0)[:, None, :])[:, None]


def window_mask(query_index, key_index, c: TransformerConfig, causal: bool):
  """int[T], int[S] -> bool[1, 1, T, S], true for the keys in a query's window.

  Causal: the last W positions, the query's own included; otherwise W to each side, or W in all.
  [Beltagy et al. 2020, 2004.05150; the sizes are those of Mistral, Gemma and T5Gemma]
  """
  distance = query_index[:, None] - key_index[None, :]
  if causal:
    near = distance < c.window
  elif c.encoder_window == 'each_side':
    near = jnp.abs(distance) <= c.window
  else:
    near = (distance < (c.window + 1) // 2) & (-distance <= c.window // 2)
  return near[None, None]


def append_memory(x, kv, mask, memory, memory_mask):
  """(keys and values, mask) of x[B, T, D] itself and of its memory, one after the other.

  memory may have fewer rows than x: each serves consecutive rows (beams).
  """
  rows, length = x.shape[:2]
  beams = rows // memory['k'].shape[0]
  memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), memory)
  kv = jax.tree.map(lambda own, other: jnp.concatenate([own, other], axis=2), kv, memory)
  whole = lambda mask: jnp.broadcast_to(mask, (rows, 1, length, mask.shape[-1]))
  memory_mask = jnp.repeat(memory_mask, rows // memory_mask.shape[0], axis=0)
  return kv, jnp.concatenate([whole(mask), whole(memory_mask)], axis=-1)


def add_bias(scores, bias):
  """scores[B, ...] + bias[R, ...], where each row of bias is added to B / R rows of scores."""
  parts = scores.reshape(bias.shape[0], -1, *scores.shape[1:])
  return (parts + bias[:, None]).reshape(scores.shape)


def softcap(x, cap: float):
  """cap * tanh(x / cap), which keeps x within -cap to cap. [Gemma 2, 2408.00118, section 2]"""
  return cap * jnp.tanh(x / cap)


class Attention(nn.Module):
  """Multi-head attention; kernels [D, N * H], for keys and values [D, K * H], and [N * H, D].

  Query head n reads key head n // G. [Ainslie et al. 2023]
  T5 has no factor 1 / sqrt(H) and initializes the query kernel smaller instead. That is equivalent
  under Adafactor's relative step sizes but not under Adam, hence `scale_attn`.
  """
  config: TransformerConfig
  train: bool

  def setup(self):
    c = self.config
    width = c.n_heads * c.d_head
    q_std = (c.d_model * (1 if c.scale_attn else c.d_head)) ** -0.5
    bias = c.bias or c.attn_bias != 'none'
    def into(heads, axis, std):
      return Dense(heads * c.d_head, ('embed', axis), kernel_init(c, std), c.dtype, bias)
    self.q = into(c.n_heads, 'heads', q_std)
    self.k = into(c.kv_heads, 'kv_heads', c.d_model ** -0.5)
    self.v = into(c.kv_heads, 'kv_heads', c.d_model ** -0.5)
    self.o = Dense(c.d_model, ('heads', 'embed'), kernel_init(c, width ** -0.5), c.dtype,
                   c.bias or c.attn_bias == 'qkvo')
    if c.qk_norm:
      self.q_norm, self.k_norm = Norm(c), Norm(c)

  def split(self, x, heads: int):                              # [B, T, n * H] -> [B, T, n, H]
    axis = 'act_heads' if heads == self.config.n_heads else 'act_kv_heads'
    x = x.reshape(*x.shape[:-1], heads, self.config.d_head)
    return constrain(x, 'batch', 'length', axis, None)

  def keys_values(self, y, angle=None):
    """[B, S, D] -> k and v, each [B, K, S, H], the layout of the cache: contiguous for each head.

    angle: the `rotation` of the keys; None in cross-attention and without rope.
    """
    c = self.config
    k, v = self.split(self.k(y), c.kv_heads), self.split(self.v(y), c.kv_heads)
    if c.qk_norm:
      k = self.k_norm(k)
    if angle is not None:
      k = rope(k, angle)
    # Every query reads all keys: if the length is sharded, they are gathered here, once per layer.
    pin = lambda x: constrain(x.swapaxes(1, 2), 'batch', 'act_kv_heads', 'kv_length', None)
    return {'k': pin(k), 'v': pin(v)}

  def queries(self, x, angle=None):                            # [B, T, D] -> [B, T, N, H]
    c = self.config
    q = self.split(self.q(x), c.n_heads)
    if c.qk_norm:
      q = self.q_norm(q)
    if angle is not None:
      q = rope(q, angle)
    return q * (c.attn_scalar or c.d_head) ** -0.5 if c.scale_attn else q

  def __call__(self, x, kv, mask, bias=None, angle=None):
    """x[B, T, D] attends to kv -> [B, T, D].

    mask: bool[B, 1, T, S] or None. bias: float[R, N, T, S] or None, R equal copies for R parts of
    the batch. kv may have fewer rows than x: each row then serves consecutive rows of x (beams),
    which become queries of one row, so beam search neither copies nor reorders the encoder's keys.
    """
    c = self.config
    B, T, _ = x.shape
    K, G = c.kv_heads, c.n_heads // c.kv_heads
    rows = kv['k'].shape[0]
    q = self.queries(x, angle).reshape(rows, B // rows * T, K, G, c.d_head)
    scores = jnp.einsum('BTKGH,BKSH->BKGTS', q, kv['k'], preferred_element_type=jnp.float32)
    if c.attn_softcap:
      scores = softcap(scores, c.attn_softcap)
    if bias is not None:
      scores = add_bias(scores, bias.reshape(bias.shape[0], K, G, *bias.shape[2:]))
    if mask is not None:
      scores = jnp.where(mask[:, :, None], scores, MASKED)
    probs = jax.nn.softmax(scores).astype(c.dtype)
    probs = constrain(probs, 'batch', 'act_kv_heads', None, 'length', 'kv_length')
    probs = dropout(self, probs, c.dropout, self.train)
    out = jnp.einsum('BKGTS,BKSH->BTKGH', probs, kv['v'])
    out = out.reshape(B, T, c.n_heads * c.d_head)
    return self.o(constrain(out, 'batch', 'length', 'act_heads'))
