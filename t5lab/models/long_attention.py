"""LongT5's encoder attention: to near keys and, with 'transient_global', to sums over blocks.

Memory and time grow with S * radius instead of S * S. [Guo et al. 2022, 3.1]
B batch, S length, N heads, H head, D model, b = radius + 1 tokens per block, n blocks, P global
tokens (length / global_block).
"""

import jax
import jax.numpy as jnp

from t5lab.models.attention import MASKED, Attention, add_bias
from t5lab.models.layers import Norm, dropout
from t5lab.parallel.sharding import constrain


def blocks(x, size: int):
  """[B, S, ...] -> [B, n, size, ...], padded with 0."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])   # -1 fails if P is 0


def with_neighbours(x):
  """[B, n, b, ...] -> [B, n, 3 b, ...], each block with its left and right neighbours."""
  padded = jnp.pad(x, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2))
  n = x.shape[1]
  return jnp.concatenate([padded[:, i:i + n] for i in range(3)], axis=2)


def local_offsets(radius: int):
  """int[b, 3 b]: key position - query position within a block and its neighbours."""
  b = radius + 1
  return jnp.arange(3 * b)[None, :] - b - jnp.arange(b)[:, None]


def local_mask(segments, radius: int):
  """int[B, S] -> bool[B, n, b, 3 b], true for keys within `radius` in the same segment."""
  own = blocks(segments, radius + 1)
  near = with_neighbours(own)[:, :, None, :]
  return ((jnp.abs(local_offsets(radius)) <= radius)
          & (own[..., None] == near) & (near > 0))


def global_blocks(segments, size: int):
  """Assigns positions to global tokens.

  segments int[B, S] -> (the global token of each position, int[B, S], or -1; the segment of each
  global token, int[B, P], or 0).
  Blocks start at the first token of each segment, so packed segments do not share blocks. A tail
  that does not fill a block joins the block before it. A segment shorter than a block has none.
  Example (size 2): 1 1 1 1 1 2 2 3 0 gives 0 0 1 1 1 2 2 -1 -1 and 1 1 2 0.
  """
  length = segments.shape[1]
  index, is_token = jnp.arange(length), segments > 0
  change = segments[:, 1:] != segments[:, :-1]
  edge = jnp.ones_like(segments[:, :1], bool)
  start = jax.lax.cummax(jnp.where(jnp.concatenate([edge, change], 1), index, 0), axis=1)
  end = jax.lax.cummin(
      jnp.where(jnp.concatenate([change, edge], 1), index, length), axis=1, reverse=True)
  ends_block = is_token & ((index - start) % size == size - 1)
  completed = jnp.cumsum(ends_block, axis=1)                   # blocks that end here or before
  before = completed - ends_block
  last = jnp.take_along_axis(completed, end, axis=1) - 1       # the last block of the segment
  has_block = last >= jnp.take_along_axis(before, start, axis=1)
  block = jnp.where(is_token & has_block, jnp.minimum(before, last), -1)
  member = block[..., None] == jnp.arange(length // size)      # [B, S, P]
  return block, jnp.max(jnp.where(member, segments[..., None], 0), axis=1)


class LongAttention(Attention):
  """Self-attention of an encoder. Adds a norm of the global tokens to Attention's parameters."""

  def setup(self):
    super().setup()
    if self.config.enc_attention == 'transient_global':
      self.global_norm = Norm(self.config)

  def __call__(self, x, near):
    """x[B, S, D] -> [B, S, D]. near: the masks and biases of `share`."""
    c = self.config
    B, S, _ = x.shape
    b = c.local_radius + 1

    # Scores of the keys in the block and its neighbours.
    q = blocks(self.queries(x), b)                             # [B, n, b, N, H]
    kv = {k: v.swapaxes(1, 2) for k, v in self.keys_values(x).items()}
    k, v = (with_neighbours(blocks(kv[name], b)) for name in ('k', 'v'))
    scores = jnp.einsum('BnqNH,BnkNH->BnNqk', q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(near['mask'][:, :, None], add_bias(scores, near['bias'][:, None]), MASKED)
    scores = constrain(scores, 'batch', 'length', 'act_heads', None, None)

    # Scores of the global tokens, which are sums over blocks.
    if c.enc_attention == 'transient_global':
      P = near['side_mask'].shape[-1]
      one_hot = jax.nn.one_hot(near['block'], P, dtype=c.dtype)               # [B, S, P]
      globals_ = self.global_norm(jnp.einsum('BSD,BSP->BPD', x, one_hot))
      side = self.keys_values(globals_)                        # [B, N, P, H]
      far = jnp.einsum('BnqNH,BNPH->BnNqP', q, side['k'], preferred_element_type=jnp.float32)
      scores = jnp.concatenate([scores, jnp.where(
          near['side_mask'][:, :, None], far + near['side_bias'], MASKED)], axis=-1)

    # The average of the values.
    probs = dropout(self, jax.nn.softmax(scores).astype(c.dtype), c.dropout, self.train)
    out = jnp.einsum('BnNqk,BnkNH->BnqNH', probs[..., :3 * b], v)
    if c.enc_attention == 'transient_global':
      out += jnp.einsum('BnNqP,BNPH->BnqNH', probs[..., 3 * b:], side['v'])
    out = out.reshape(B, -1, c.n_heads * c.d_head)[:, :S]
    return self.o(constrain(out, 'batch', 'length', 'act_heads'))


def share(c, segments, bias, side_bias, copies: int = 1) -> dict:
  """The masks and biases that the layers of a stack share, from segments int[B, S] (0: padding).

  bias, side_bias: the RelativeBias of keys, of which `copies` are made, and of global tokens.
  """
  near = {'mask': local_mask(segments, c.local_radius),
          'bias': constrain(bias(local_offsets(c.local_radius), copies),
                            'batch', 'act_heads', None, None)}
  if c.enc_attention == 'transient_global':
    b = c.local_radius + 1
    block, owner = global_blocks(segments, c.global_block)
    mask = (segments[..., None] == owner[:, None, :]) & (segments > 0)[..., None]    # [B, S, P]
    relative = jnp.arange(owner.shape[1]) - block[..., None]   # [B, S, P]
    table, = side_bias(relative)                               # [B, N, S, P]
    near.update(block=block, side_mask=blocks(mask, b),
                side_bias=constrain(blocks(table.swapaxes(1, 2), b).swapaxes(2, 3),
                                    'batch', 'length', 'act_heads', None, None))
  return near
