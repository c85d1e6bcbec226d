"""THE Transformer: encoder-decoder, decoder-only and encoder-only from one definition.

seqio's model features in, float32 logits out. Layers are one `nn.scan` over stacked parameters, so
a 24-layer model compiles as fast as a 2-layer one. What families differ in is data: the fields of
TransformerConfig. B batch, T and S lengths, L layers, D model, N heads, H head, V vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.errors import UsageError
from t5lab.models import long_attention
from t5lab.models.attention import Attention, segment_mask
from t5lab.models.families import TransformerConfig
from t5lab.models.layers import ACTIVATIONS, Dense, Mlp, Norm, dropout, kernel_init
from t5lab.models.moe import Moe
from t5lab.models.positions import RelativeBias, sinusoids
from t5lab.parallel.sharding import batch_shards, constrain, product

Array = jax.Array

REMAT_POLICIES = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': None,
}


def rows(table, indices, axis: str, dtype):
  """table[axis, D], int[...] -> [..., D] of dtype. A gather: T5X's one-hot product costs 40 % more
  FLOPs in small T5."""
  take = lambda i, t: jnp.take(t, i, axis=0, mode='clip')
  return product(take, indices, table, axis, 'embed', dtype=dtype)


def _copies(train: bool) -> int:
  """In how many copies layers get relative biases: in training one for each device of the batch."""
  return batch_shards() if train else 1


def _bias(table, relative, copies: int):
  """RelativeBias, int[T, S] -> float32[copies, N, T, S]."""
  bias = table(relative, copies)
  return constrain(bias, 'batch', 'act_heads', 'length', 'kv_length')


class Block(nn.Module):
  """Residual sublayers: self-attention, cross-attention (if any), feed-forward or experts.

  Pre-norm x + drop(f(norm(x))), or post-norm norm(x + drop(f(x))).
  """
  config: TransformerConfig
  cross: bool
  causal: bool
  moe: bool
  train: bool

  @nn.compact
  def __call__(self, x, cache, shared):
    """x[B, T, D] -> (x, cache of this layer). Without a cache, attends among the T positions."""
    c, new = self.config, {}

    def residual(name, x, sublayer):
      norm = Norm(c, name=f'{name}_norm')
      y = sublayer(x if c.post_norm else norm(x))
      x = x + dropout(self, y, c.dropout, self.train)
      return norm(x) if c.post_norm else x

    def attend(h):
      if 'near' in shared:
        return long_attention.LongAttention(c, self.train, name='attn')(h, shared['near'])
      attn = Attention(c, self.train, name='attn')
      kv = attn.keys_values(h, shared['positions'])
      if cache is not None:
        kv = {name: jax.lax.dynamic_update_slice(
            cache['self'][name], kv[name].astype(cache['self'][name].dtype),
            (0, 0, shared['index'], 0)) for name in kv}
        new['self'] = kv
      bias = shared['bias']
      if c.per_layer_bias:
        bias = _bias(RelativeBias(c, not self.causal, name='relpos'), shared['relative'],
                     _copies(self.train))
      return attn(h, kv, shared['mask'], bias, shared['positions'])

    def attend_memory(h):
      attn = Attention(c, self.train, name='cross')
      if cache is not None and 'cross' in cache:
        kv = cache['cross']               # not given back: the scan would copy it at every token
      else:
        kv = attn.keys_values(shared['memory'])
        if cache is not None:
          new['cross'] = kv
      return attn(h, kv, shared['cross_mask'])

    def feed_forward(h):
      if self.moe:
        return Moe(c, self.train, name='moe')(h, shared['real'])
      return Mlp(c, self.train, name='mlp')(h)

    x = constrain(x, 'batch', 'length', 'act_embed')
    x = residual('attn', x, attend)
    if self.cross:
      x = residual('cross', x, attend_memory)
    x = residual('mlp', x, feed_forward)
    return x, (new if cache is not None else None)


class Group(nn.Module):
  """`size` blocks, the last of them with experts: one turn of the scan where layers alternate."""
  config: TransformerConfig
  cross: bool
  causal: bool
  size: int
  train: bool

  @nn.compact
  def __call__(self, x, cache, shared):            # leaves of the cache have a leading axis [size]
    news = []
    for i in range(self.size):
      mine = jax.tree.map(lambda leaf, i=i: leaf[i], cache)
      x, new = Block(self.config, self.cross, self.causal, i == self.size - 1, self.train,
                     name=str(i))(x, mine, shared)
      news.append(new)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *news)


class Stack(nn.Module):
  """Positions and norm of the embeddings, L blocks, what they share, and the final norm."""
  config: TransformerConfig
  layers: int
  causal: bool
  cross: bool
  train: bool

  @nn.compact
  def __call__(self, x, mask, query_index, key_index, *, positions=None, types=None, segments=None,
               memory=None, cross_mask=None, cache=None, index=0):
    """x[B, T, D]. query_index int[T] and key_index int[S] say who is how far from whom; positions
    int[B, T] or [T] where each token stands in its own segment (None: query_index)."""
    c = self.config
    if c.positions == 'learned' and positions is None and x.shape[1] > c.max_length:
      raise UsageError(f'{x.shape[1]} tokens: the learned positions end at model.max_length='
                       f'{c.max_length}; shorten the input or choose a larger table')
    positions = query_index if positions is None else positions
    x = self._place(x, positions, types)
    shared = {'mask': mask, 'bias': None, 'positions': positions, 'index': index, 'memory': memory,
              'cross_mask': cross_mask}
    if c.experts:
      shared['real'] = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
    if c.positions == 'relative':
      relative = key_index[None, :] - query_index[:, None]
      if c.per_layer_bias:
        shared['relative'] = relative
      else:
        table = RelativeBias(c, not self.causal, name='relpos')
        if c.enc_attention != 'full' and not self.causal:
          side = None
          if c.enc_attention == 'transient_global':
            side = RelativeBias(c, True, name='global_relpos')
          shared['near'] = long_attention.share(c, segments, table, side, _copies(self.train))
        else:
          shared['bias'] = _bias(table, relative, _copies(self.train))
    x, cache = self._blocks(dropout(self, x, c.dropout, self.train), cache, shared)
    if not c.post_norm:
      x = Norm(c, name='norm')(x)
    return dropout(self, x, c.dropout if c.final_dropout else 0., self.train), cache

  def _place(self, x, positions, types):
    """Adds what says where a token stands, and normalises where the family does."""
    c = self.config
    init = nn.with_logical_partitioning(
        nn.initializers.normal(c.init_std or c.d_model ** -0.5), ('positions', 'embed'))
    if c.positions == 'learned':
      table = self.param('positions', init, (c.max_length + c.position_offset, c.d_model))
      x += rows(table, positions + c.position_offset, 'positions', c.dtype)
    elif c.positions == 'sinusoid':
      x += sinusoids(positions, c.d_model).astype(c.dtype)
    if c.types:
      table = self.param('types', init, (c.types, c.d_model))
      types = jnp.zeros(x.shape[:2], jnp.int32) if types is None else types
      x += rows(table, types, 'positions', c.dtype)
    return Norm(c, name='embed_norm')(x) if c.embed_norm else x

  def _blocks(self, x, cache, shared):
    """Scans over whole groups of layers, then over the layers that are left."""
    c = self.config
    every = c.moe_every if c.experts else 1
    groups, left = divmod(self.layers, every)
    head = jax.tree.map(lambda leaf: leaf[:groups * every], cache)
    if every > 1:
      block = (Group, every, self.train)
      head = jax.tree.map(lambda leaf: leaf.reshape(groups, every, *leaf.shape[1:]), head)
    else:
      block = (Block, bool(c.experts), self.train)
    x, new = self._scan(*block, length=groups, name='layers')(x, head, shared)
    if every > 1:
      new = jax.tree.map(lambda leaf: leaf.reshape(groups * every, *leaf.shape[2:]), new)
    if left:
      tail = jax.tree.map(lambda leaf: leaf[groups * every:], cache)
      x, last = self._scan(Block, False, self.train, length=left, name='tail')(x, tail, shared)
      new = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, last)
    return x, new

  def _scan(self, block, *fields, length, name):
    c = self.config
    if c.remat != 'none':
      # prevent_cse only matters outside of scan, where XLA could undo the recomputation.
      block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
    return nn.scan(
        block, length=length, in_axes=(0, nn.broadcast), out_axes=0,
        variable_axes={'params': 0, 'lora': 0, 'router': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True},
        metadata_params={nn.PARTITION_NAME: 'layers'})(
            c, self.cross, self.causal, *fields, name=name)


class Transformer(nn.Module):
  """[Vaswani et al. 2017; Raffel et al. 2020; Devlin et al. 2019; families.py for each variant]"""
  config: TransformerConfig
  train: bool = False

  def setup(self):
    c = self.config
    std = c.init_std or (c.d_model ** -0.5 if c.embed_scale else 1.)
    init = nn.with_logical_partitioning(nn.initializers.normal(std), ('vocab', 'embed'))
    self.embedding = self.param('embedding', init, (c.vocab_size, c.d_model), jnp.float32)
    if c.enc_layers:
      self.encoder = Stack(c, c.enc_layers, causal=False, cross=False, train=self.train)
    if c.dec_layers:
      self.decoder = Stack(
          c, c.dec_layers, causal=True, cross=c.enc_layers > 0, train=self.train)
    square = lambda: Dense(c.d_model, ('embed', 'norm'), kernel_init(c, c.d_model ** -0.5),
                           c.dtype, bias=True)
    if c.pooler:
      self.pooler = square()
    if c.mlm_head:
      self.mlm_dense, self.mlm_norm = square(), Norm(c)
    if c.nsp:
      self.nsp = Dense(2, ('embed', None), kernel_init(c, c.d_model ** -0.5), 'float32', bias=True)
    if c.classes:
      self.classifier = Dense(c.classes, ('embed', None), kernel_init(c, c.d_model ** -0.5),
                              'float32', bias=True)
    if not c.tied:
      init = nn.initializers.normal(c.init_std) if c.init_std else (
          nn.initializers.variance_scaling(1., 'fan_in', 'truncated_normal'))
      self.logits = Dense(c.vocab_size, ('embed', 'vocab'), init, 'float32')
    if c.logit_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',))
      self.logit_bias = self.param('logit_bias', init, (c.vocab_size,), jnp.float32)

  def embed(self, tokens: Array) -> Array:
    """int[B, T] -> [B, T, D]."""
    c = self.config
    x = rows(self.embedding, tokens, 'vocab', c.dtype)
    x = x * c.d_model ** 0.5 if c.embed_scale else x
    return constrain(x, 'batch', 'length', 'act_embed')

  def unembed(self, x: Array) -> Array:
    """[B, T, D] -> float32 logits[B, T, V], computed in float32; of `classes`: [B, 1, classes]."""
    c = self.config
    if c.classes:
      return self.classifier(x)
    if c.mlm_head:
      x = self.mlm_norm(ACTIVATIONS[c.acts[0]](self.mlm_dense(x)))
    x = x.astype(jnp.float32)
    if c.tied:
      x = x * c.d_model ** -0.5 if c.scale_logits else x
      logits = product(functools.partial(jnp.einsum, 'BTD,VD->BTV'), x, self.embedding,
                       'vocab', 'embed')
    else:
      logits = self.logits(x)
    if c.logit_bias:
      logits += self.logit_bias
    return constrain(logits, 'batch', 'length', 'act_vocab')

  def encode(self, tokens: Array, segments: Array | None = None, positions: Array | None = None,
             types: Array | None = None) -> tuple[Array, Array]:
    """int[B, S] -> (memory[B, S, D], segments int[B, S]; 0 is padding)."""
    if segments is None:
      segments = (tokens != self.config.pad_id).astype(jnp.int32)
    at = jnp.arange(tokens.shape[1])
    full = self.config.enc_attention == 'full'
    x, _ = self.encoder(
        self.embed(tokens), segment_mask(segments, segments) if full else None, at, at,
        positions=positions, types=types, segments=segments)
    return x, segments

  def _encode(self, batch):
    return self.encode(batch['encoder_input_tokens'], batch.get('encoder_segment_ids'),
                       batch.get('encoder_positions'), batch.get('encoder_token_types'))

  def hidden(self, batch: dict[str, Array]) -> Array:
    """What `unembed` turns into logits, for teacher forcing: the decoder's output [B, T, D], of an
    encoder-only model its own [B, S, D], and with `classes` the pooled input [B, 1, D]."""
    c = self.config
    if not c.dec_layers:
      x, segments = self._encode(batch)
      return self._pool(x, segments)[:, None] if c.classes else x
    memory = cross_mask = None
    tokens = batch['decoder_input_tokens']
    segments = batch.get('decoder_segment_ids')
    at = jnp.arange(tokens.shape[1])
    mask = (at[None, :] <= at[:, None])[None, None]
    if segments is not None:
      # A padding query keeps itself as a key, so that its softmax stays finite and cheap.
      mask &= (segments[:, :, None] == segments[:, None, :])[:, None]
    if c.enc_layers:
      memory, memory_segments = self._encode(batch)
      if segments is None:
        cross_mask = (memory_segments > 0)[:, None, None, :]
      else:
        cross_mask = segment_mask(segments, memory_segments)
    x, _ = self.decoder(self.embed(tokens), mask, at, at, memory=memory, cross_mask=cross_mask,
                        positions=batch.get('decoder_positions'), segments=segments)
    return x

  def __call__(self, batch: dict[str, Array]) -> Array:
    """Model features -> float32 logits[B, T, V]: of the token after each decoder input, or, of an
    encoder-only model, of the token at each position."""
    x = self.hidden(batch)
    if self.is_initializing() and self.config.pooler:     # heads that the logits do not pass
      self.next_logits(x)
    return self.unembed(x)

  def pooled(self, batch: dict[str, Array]) -> Array:
    """Model features -> [B, D], one vector an input: see TransformerConfig.pool."""
    if self.config.enc_layers:
      return self._pool(*self._encode(batch))
    segments = batch.get('decoder_segment_ids')
    if segments is None:
      segments = jnp.ones_like(batch['decoder_input_tokens'])
    return self._pool(self.hidden(batch), segments)

  def _pool(self, x, segments):
    c = self.config
    if c.pool == 'mean':
      real = (segments > 0)[..., None].astype(x.dtype)
      return jnp.sum(x * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
    return jnp.tanh(self.pooler(x[:, 0])) if c.pool == 'pooler' else x[:, 0]

  def next_sentence(self, batch: dict[str, Array]) -> Array:
    """Model features -> `next_logits` of the encoder's output."""
    return self.next_logits(self._encode(batch)[0])

  def next_logits(self, x: Array) -> Array:
    """[B, S, D] of the encoder -> float32[B, 2]: logits of 'is the next sentence' and 'is a random
    one'; without that head its input [B, D]. [Devlin et al. 2019, 3.1]"""
    x = jnp.tanh(self.pooler(x[:, 0]))
    return self.nsp(x) if self.config.nsp else x

  def decode(self, tokens: Array, cache: dict[str, Any], index) -> tuple[Array, dict[str, Any]]:
    """T new tokens int[B, T] at positions index … index + T - 1 -> (logits[B, T, V], cache).

    The first call with a cache of `cache.init_cache` turns the memory in it into each layer's
    cross-attention keys and values; later calls only read those.
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
    layer_cache = {k: cache[k] for k in ('self', 'cross') if k in cache}
    x, new = self.decoder(self.embed(tokens), mask, query_index, key_index, memory=memory,
                          cross_mask=cross_mask, cache=layer_cache, index=index)
    if c.enc_layers:
      new = {**{k: cache[k] for k in ('cross',) if k in cache}, **new,
             'memory_mask': cache['memory_mask']}
    return self.unembed(x), new
