"""A stack of layers, an encoder or a decoder, and the layer it repeats.

Layers are one `nn.scan` over stacked parameters, so a 24-layer model compiles as fast as a 2-layer
one. B batch, T and S lengths, L layers, D model, N heads.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5lab.errors import UsageError
from t5lab.models import long_attention
from t5lab.models.attention import Attention, append_memory, window_mask
from t5lab.models.families import TransformerConfig
from t5lab.models.layers import Mlp, Norm, dropout, kernel_init, lookup
from t5lab.models.moe import Moe
from t5lab.models.positions import RelativeBias, local_config, rotation, sinusoids
from t5lab.parallel.sharding import batch_shards, constrain

REMAT_POLICIES = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': None,
}


def _bias_copies(train: bool) -> int:
  """The number of copies of the relative biases: in training, one for each shard of the batch."""
  return batch_shards() if train else 1


def _relative_bias(module, relative, copies: int):
  """Applies a RelativeBias: int[T, S] -> float32[copies, N, T, S]."""
  return constrain(module(relative, copies), 'batch', 'act_heads', 'length', 'kv_length')


class Block(nn.Module):
  """Residual sublayers: self-attention, cross-attention if any, feed-forward or experts.

  Pre-norm: x + drop(f(norm(x))). Post-norm: norm(x + drop(f(x))). Sandwich norm: x +
  drop(norm(f(norm(x)))).
  """
  config: TransformerConfig
  cross: bool
  causal: bool
  moe: bool
  train: bool

  @nn.compact
  def __call__(self, x, cache, has_window, shared):
    """x[B, T, D] -> (x, cache of this layer). Without a cache, x attends to itself.

    has_window: bool[], whether this layer's attention has a window; None if all layers are alike.
    shared: masks, biases, rotations and memory, which all layers use (see Stack).
    """
    c, new_cache = self.config, {}

    def residual(name, x, sublayer):
      norm = Norm(c, name=f'{name}_norm')
      y = sublayer(x if c.post_norm else norm(x))
      if c.sandwich_norm:
        y = Norm(c, name=f'{name}_output_norm')(y)
      x = x + dropout(self, y, c.dropout, self.train)
      return norm(x) if c.post_norm else x

    def attend(h):
      if 'near' in shared:
        return long_attention.LongAttention(c, self.train, name='attn')(h, shared['near'])
      attn = Attention(c, self.train, name='attn')
      mask, angle = shared['mask'], shared['angle']
      if has_window is not None:
        choose = functools.partial(jnp.where, has_window)
        mask = choose(shared['window_mask'], mask)
        angle = jax.tree.map(choose, shared['window_angle'], angle)
      kv = attn.keys_values(h, angle)
      if cache is not None:
        write = lambda old, new: jax.lax.dynamic_update_slice(
            old, new.astype(old.dtype), (0, 0, shared['index'], 0))
        kv = new_cache['self'] = jax.tree.map(write, cache['self'], kv)
      bias = shared['bias']
      if c.per_layer_bias:
        bias = _relative_bias(RelativeBias(c, not self.causal, name='relpos'),
                              shared['relative'], _bias_copies(self.train))
      if self.cross and c.merged_attention:
        kv, mask = append_memory(
            h, kv, mask, memory_of(attn), shared['cross_mask'])
      return attn(h, kv, mask, bias, angle)

    def memory_of(attn):
      if cache and 'cross' in cache:
        return cache['cross']             # not returned: the scan would copy it for every token
      new_cache['cross'] = attn.keys_values(shared['memory'])
      return new_cache['cross']

    def attend_memory(h):
      attn = Attention(c, self.train, name='cross')
      return attn(h, memory_of(attn), shared['cross_mask'])

    def feed_forward(h):
      if self.moe:
        return Moe(c, self.train, name='moe')(h, shared['is_token'])
      return Mlp(c, self.train, name='mlp')(h)

    x = constrain(x, 'batch', 'length', 'act_embed')
    x = residual('attn', x, attend)
    if self.cross and not c.merged_attention:
      x = residual('cross', x, attend_memory)
    x = residual('mlp', x, feed_forward)
    return x, (new_cache if cache is not None else None)


class Group(nn.Module):
  """`size` blocks of which the last has experts: one iteration of the scan in Switch models."""
  config: TransformerConfig
  cross: bool
  causal: bool
  size: int
  train: bool

  @nn.compact
  def __call__(self, x, cache, has_window, shared):    # leaves of the cache are [size, …]
    new_caches = []
    for i in range(self.size):
      has_experts = i == self.size - 1
      block = Block(self.config, self.cross, self.causal, has_experts, self.train, name=str(i))
      layer_cache = jax.tree.map(lambda leaf, i=i: leaf[i], cache)
      x, new_cache = block(x, layer_cache, has_window, shared)
      new_caches.append(new_cache)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new_caches)


class Stack(nn.Module):
  """An encoder or decoder: positions and norm of the embeddings, L blocks, the final norm."""
  config: TransformerConfig
  layers: int
  causal: bool
  cross: bool
  train: bool

  @nn.compact
  def __call__(self, x, mask, query_index, key_index, *, positions=None, types=None, segments=None,
               memory=None, cross_mask=None, cache=None, index=0):
    """x[B, T, D] -> (x[B, T, D], cache).

    query_index int[T] and key_index int[S] are indices in the row, whose differences are the
    relative positions. positions int[B, T] or [T] are those within each segment; None: query_index.
    """
    c = self.config
    if c.positions == 'learned' and positions is None and x.shape[1] > c.max_length:
      raise UsageError(f'{x.shape[1]} tokens, but the model has only model.max_length='
                       f'{c.max_length} learned positions; shorten the input or enlarge the table')

    # Embeddings.
    positions = query_index if positions is None else positions
    x = self._add_positions(x, positions, types)
    x = dropout(self, x, c.dropout, self.train)

    # What the layers share.
    shared = {'mask': mask, 'bias': None, 'index': index, 'memory': memory,
              'cross_mask': cross_mask,
              'angle': rotation(positions, c) if c.positions == 'rope' else None}
    has_window = None
    if c.window:
      near = window_mask(query_index, key_index, c, self.causal)
      if all(c.window_pattern):
        shared['mask'] = mask & near
      else:
        pattern = itertools.islice(itertools.cycle(c.window_pattern), self.layers)
        has_window = np.fromiter(pattern, bool)
        shared.update(window_mask=mask & near, window_angle=shared['angle'])
      if c.rope_local_theta:
        where = 'angle' if has_window is None else 'window_angle'
        shared[where] = rotation(positions, local_config(c))
    if c.experts:
      shared['is_token'] = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
    if c.positions == 'relative':
      relative = key_index[None, :] - query_index[:, None]
      if c.per_layer_bias:
        shared['relative'] = relative
      else:
        shared.update(self._shared_bias(relative, segments))

    # Layers and the final norm.
    x, cache = self._blocks(x, cache, has_window, shared)
    if not c.post_norm:
      x = Norm(c, name='norm')(x)
    return dropout(self, x, c.dropout if c.final_dropout else 0., self.train), cache

  def _shared_bias(self, relative, segments):
    """{'bias': …} of full attention, or {'near': …} of LongT5's encoder."""
    c, copies = self.config, _bias_copies(self.train)
    module = RelativeBias(c, not self.causal, name='relpos')
    if c.enc_attention == 'full' or self.causal:
      return {'bias': _relative_bias(module, relative, copies)}
    far = c.enc_attention == 'transient_global'
    global_module = RelativeBias(c, True, name='global_relpos') if far else None
    return {'near': long_attention.share(c, segments, module, global_module, copies)}

  def _add_positions(self, x, positions, types):
    """Adds absolute positions and token types, and applies the embedding norm, if there are any."""
    c = self.config
    init = nn.with_logical_partitioning(kernel_init(c, c.d_model ** -0.5), ('positions', 'embed'))
    if c.positions == 'learned':
      table = self.param('positions', init, (c.max_length + c.position_offset, c.d_model))
      x += lookup(table, positions + c.position_offset, 'positions', c.dtype)
    elif c.positions == 'sinusoid':
      positions += c.position_offset
      x += sinusoids(positions, c.d_model, c.sinusoids).astype(c.dtype)
    if c.types:
      table = self.param('types', init, (c.types, c.d_model))
      types = jnp.zeros(x.shape[:2], jnp.int32) if types is None else types
      x += lookup(table, types, 'positions', c.dtype)
    return Norm(c, name='embed_norm')(x) if c.embed_norm else x

  def _blocks(self, x, cache, has_window, shared):
    """Scans over the layers: over groups of `moe_every` layers first, then over the remaining ones.
    """
    c = self.config
    if not c.experts or c.moe_every == 1:
      scan = self._scan(Block, bool(c.experts), self.train, length=self.layers, name='layers')
      return scan(x, cache, has_window, shared)

    # Whole groups: the caches of their layers get a second leading axis.
    size = c.moe_every
    groups, remaining = divmod(self.layers, size)
    group_cache = jax.tree.map(
        lambda leaf: leaf[:groups * size].reshape(groups, size, *leaf.shape[1:]), cache)
    scan = self._scan(Group, size, self.train, length=groups, name='layers')
    x, new_cache = scan(x, group_cache, None, shared)      # windows exclude experts
    new_cache = jax.tree.map(
        lambda leaf: leaf.reshape(groups * size, *leaf.shape[2:]), new_cache)

    # The remaining layers have no experts.
    if remaining:
      tail_cache = jax.tree.map(lambda leaf: leaf[groups * size:], cache)
      scan = self._scan(Block, False, self.train, length=remaining, name='tail')
      x, new_tail = scan(x, tail_cache, None, shared)
      new_cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new_cache, new_tail)
    return x, new_cache

  def _scan(self, block, *fields, length, name):
    c = self.config
    if c.remat != 'none':
      # Outside a scan, XLA could undo the recomputation without prevent_cse.
      block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
    return nn.scan(
        block, length=length, in_axes=(0, 0, nn.broadcast), out_axes=0,
        variable_axes={'params': 0, 'lora': 0, 'router': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True},
        metadata_params={nn.PARTITION_NAME: 'layers'})(
            c, self.cross, self.causal, *fields, name=name)
