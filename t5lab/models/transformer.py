"""The Transformer: encoder-decoder, decoder-only and encoder-only from one definition.

It maps seqio's model features to float32 logits. Layers are one `nn.scan` over stacked parameters,
so a 24-layer model compiles as fast as a 2-layer one. Families differ only in the fields of
TransformerConfig. B batch, T and S lengths, L layers, D model, N heads, H head, V vocabulary.
"""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5lab.errors import UsageError
from t5lab.models import long_attention
from t5lab.models.attention import (
  Attention,
  append_memory,
  segment_mask,
  softcap,
  window_mask,
)
from t5lab.models.families import TransformerConfig
from t5lab.models.layers import ACTIVATIONS, Dense, Mlp, Norm, dropout, kernel_init, up_init
from t5lab.models.moe import Moe
from t5lab.models.pooling import pool
from t5lab.models.positions import RelativeBias, local_config, rotation, sinusoids
from t5lab.parallel.sharding import batch_shards, constrain, lookup, product

Array = jax.Array

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


class Transformer(nn.Module):
  """Embedding, encoder and decoder stacks, and heads.

  [Vaswani et al. 2017; Raffel et al. 2020; Devlin et al. 2019; families.py for each variant]
  """
  config: TransformerConfig
  train: bool = False

  def setup(self):
    c = self.config
    std = c.init_std or (c.d_model ** -0.5 if c.embed_scale else 1.)
    init = nn.with_logical_partitioning(nn.initializers.normal(std), ('vocab', 'embed'))
    self.embedding = self.param('embedding', init, (c.vocab_size, c.d_model), jnp.float32)
    self.target_embedding = self.embedding if c.shared_embedding else self.param(
        'target_embedding', init, (c.vocab_size, c.d_model), jnp.float32)
    if c.enc_layers:
      self.encoder = Stack(c, c.enc_layers, causal=False, cross=False, train=self.train)
    if c.dec_layers:
      self.decoder = Stack(
          c, c.dec_layers, causal=True, cross=c.enc_layers > 0, train=self.train)

    # BERT's heads and the classifier.
    head = lambda features, axis, dtype: Dense(
        features, ('embed', axis), kernel_init(c, c.d_model ** -0.5), dtype, bias=True)
    if c.pooler:
      self.pooler = head(c.d_model, 'norm', c.dtype)
    if c.mlm_head:
      self.mlm_dense, self.mlm_norm = head(c.d_model, 'norm', c.dtype), Norm(c)
    if c.nsp:
      self.nsp = head(2, None, 'float32')
    if c.classes:
      self.classifier = head(c.classes, None, 'float32')
    self.dense = [
        Dense(width, ('embed', 'norm'), kernel_init(c, c.d_model ** -0.5), c.dtype, bias)
        for width, bias in zip(c.dense, c.dense_bias)]

    # The softmax matrix.
    if not c.tied:
      self.logits = Dense(c.vocab_size, ('embed', 'vocab'), up_init(c), 'float32')
    if c.logit_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',))
      self.logit_bias = self.param('logit_bias', init, (c.vocab_size,), jnp.float32)

  def embed(self, tokens: Array, table: Array) -> Array:
    """int[B, T] -> [B, T, D], rows of a table[V, D]."""
    c = self.config
    x = lookup(table, tokens, 'vocab', c.dtype)
    x = x * c.d_model ** 0.5 if c.embed_scale else x
    return constrain(x, 'batch', 'length', 'act_embed')

  def unembed(self, x: Array) -> Array:
    """[B, T, D] -> logits[B, T, V], or [B, 1, classes] of a classifier. Computed in float32."""
    c = self.config
    if c.classes:
      return self.classifier(x)
    if c.mlm_head:
      x = self.mlm_norm(ACTIVATIONS[c.acts[0]](self.mlm_dense(x)))
    x = x.astype(jnp.float32)
    if c.tied:
      x = x * c.d_model ** -0.5 if c.scale_logits else x
      logits = product(functools.partial(jnp.einsum, 'BTD,VD->BTV'), x, self.target_embedding,
                       'vocab', 'embed')
    else:
      logits = self.logits(x)
    if c.logit_bias:
      logits += self.logit_bias
    if c.logit_softcap:
      logits = softcap(logits, c.logit_softcap)
    return constrain(logits, 'batch', 'length', 'act_vocab')

  def encode(self, tokens: Array, segments: Array | None = None, positions: Array | None = None,
             types: Array | None = None) -> tuple[Array, Array]:
    """int[B, S] -> (memory[B, S, D], segments int[B, S]; 0 is padding)."""
    if segments is None:
      segments = (tokens != self.config.pad_id).astype(jnp.int32)
    index = jnp.arange(tokens.shape[1])
    is_full = self.config.enc_attention == 'full'
    mask = segment_mask(segments, segments) if is_full else None
    x, _ = self.encoder(self.embed(tokens, self.embedding), mask, index, index,
                        positions=positions, types=types, segments=segments)
    return x, segments

  def _encode(self, batch):
    return self.encode(batch['encoder_input_tokens'], batch.get('encoder_segment_ids'),
                       batch.get('encoder_positions'), batch.get('encoder_token_types'))

  def hidden(self, batch: dict[str, Array]) -> Array:
    """The input of `unembed`, for teacher forcing.

    The output of the decoder, [B, T, D]; of the encoder, [B, S, D], in encoder-only models; the
    pooled input, [B, 1, D], in classifiers.
    """
    c = self.config
    if not c.dec_layers:
      x, segments = self._encode(batch)
      return self._vector(x, segments)[:, None] if c.classes else x

    # Causal, and within segments.
    tokens = batch['decoder_input_tokens']
    segments = batch.get('decoder_segment_ids')
    index = jnp.arange(tokens.shape[1])
    mask = (index[None, :] <= index[:, None])[None, None]
    if segments is not None:
      # A padding query keeps itself as a key, so that its softmax stays finite and cheap.
      mask &= (segments[:, :, None] == segments[:, None, :])[:, None]

    # The encoder's output.
    memory = cross_mask = None
    if c.enc_layers:
      memory, memory_segments = self._encode(batch)
      if segments is None:
        cross_mask = (memory_segments > 0)[:, None, None, :]
      else:
        cross_mask = segment_mask(segments, memory_segments)
    x, _ = self.decoder(
        self.embed(tokens, self.target_embedding), mask, index, index, memory=memory,
        cross_mask=cross_mask, positions=batch.get('decoder_positions'), segments=segments)
    return x

  def __call__(self, batch: dict[str, Array]) -> Array:
    """Model features -> float32 logits[B, T, V] of the token after each decoder input, or of the
    token at each position in encoder-only models."""
    if self.is_initializing():
      self._use_all_heads()
    return self.unembed(self.hidden(batch))

  def _use_all_heads(self):
    """Initializes the heads that the logits do not use."""
    c = self.config
    x = jnp.zeros((1, 1, c.d_model), c.dtype)
    if c.pooler:
      self.next_logits(x)
    self._vector(x, jnp.ones((1, 1), jnp.int32))

  def pooled(self, batch: dict[str, Array]) -> Array:
    """Model features -> [B, TransformerConfig.vector_size], one vector per input.

    pool_from, int[B], optional: tokens before this position, those of a prompt, are not pooled.
    """
    if self.config.enc_layers:
      return self._vector(*self._encode(batch), batch.get('pool_from'))
    segments = batch.get('decoder_segment_ids')
    if segments is None:
      segments = jnp.ones_like(batch['decoder_input_tokens'])
    return self._vector(self.hidden(batch), segments, batch.get('pool_from'))

  def _vector(self, x, segments, pool_from=None):
    c = self.config
    mask = segments > 0
    if pool_from is not None:
      mask &= jnp.arange(mask.shape[1]) >= pool_from[:, None]
    vectors = [self._pooler_output(x) if mode == 'pooler' else pool(mode, x, mask)
               for mode in c.pool.split('+')]
    vector = jnp.concatenate(vectors, axis=-1)
    for layer, act in zip(self.dense, c.dense_acts):
      vector = ACTIVATIONS[act](layer(vector))
    return vector

  def _pooler_output(self, x):
    return ACTIVATIONS[self.config.pooler_act](self.pooler(x[:, 0]))

  def next_logits(self, x: Array) -> Array:
    """Encoder output [B, S, D] -> float32[B, 2], the logits of 'next' and 'random sentence'.

    Without the next-sentence head, the input of that head, [B, D]. [Devlin et al. 2019, 3.1]
    """
    x = self._pooler_output(x)
    return self.nsp(x) if self.config.nsp else x

  def decode(self, tokens: Array, cache: dict[str, Any], index) -> tuple[Array, dict[str, Any]]:
    """T new tokens int[B, T] at positions index to index + T - 1 -> (logits[B, T, V], cache).

    The first call with a cache of `cache.init_cache` computes each layer's cross-attention keys and
    values from the memory in the cache; later calls only read them.
    """
    c = self.config
    length = cache['self']['k'].shape[3]
    query_index = index + jnp.arange(tokens.shape[1])
    key_index = jnp.arange(length)
    mask = (key_index[None, :] <= query_index[:, None])[None, None]
    cross_mask = memory = None
    if c.enc_layers:
      cross_mask = cache['memory_mask'][:, None, None, :]
      memory = cache.get('memory')
    layer_cache = {name: cache[name] for name in ('self', 'cross') if name in cache}
    x, new_cache = self.decoder(
        self.embed(tokens, self.target_embedding), mask, query_index, key_index, memory=memory,
        cross_mask=cross_mask, cache=layer_cache, index=index)
    if c.enc_layers:
      if 'cross' in cache:
        new_cache['cross'] = cache['cross']
      new_cache['memory_mask'] = cache['memory_mask']
    return self.unembed(x), new_cache
