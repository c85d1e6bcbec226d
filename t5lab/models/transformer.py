"""THE Transformer: encoder-decoder and decoder-only from one definition, and its cache.

seqio's model features in, float32 logits out. Layers are one `nn.scan` over stacked parameters, so
a 24-layer model compiles as fast as a 2-layer one. B batch, T and S lengths, L layers, D model,
N heads, H head, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.attention import Attention, RelativeBias, segment_mask
from t5lab.models.families import TransformerConfig
from t5lab.models.layers import Dense, Mlp, RMSNorm, dropout
from t5lab.parallel.sharding import constrain

Array = jax.Array
Cache = dict[str, Any]

REMAT_POLICIES = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': None,
}


class Block(nn.Module):
  """Pre-norm residual sublayers: self-attention, cross-attention (if any), feed-forward."""
  config: TransformerConfig
  cross: bool
  train: bool

  @nn.compact
  def __call__(self, x, cache, memory, index, mask, bias, cross_mask):
    """x[B, T, D] -> (x, cache of this layer). Without a cache, attends among the T positions."""
    c, new = self.config, {}
    drop = lambda y: dropout(self, y, c.dropout, self.train)
    norm = lambda name: RMSNorm(c, name=name)
    x = constrain(x, 'batch', 'length', 'act_embed')

    attn = Attention(c, self.train, name='attn')
    h = norm('attn_norm')(x)
    kv = attn.keys_values(h)
    if cache is not None:
      kv = {name: jax.lax.dynamic_update_slice(
          cache['self'][name], kv[name].astype(cache['self'][name].dtype), (0, 0, index, 0))
          for name in kv}
      new['self'] = kv
    x += drop(attn(h, kv, mask, bias))

    if self.cross:
      attn = Attention(c, self.train, name='cross')
      h = norm('cross_norm')(x)
      if cache is not None and 'cross' in cache:
        kv = cache['cross']
      else:
        kv = attn.keys_values(memory)
      if cache is not None:
        new['cross'] = kv
      x += drop(attn(h, kv, cross_mask))

    x += drop(Mlp(c, self.train, name='mlp')(norm('mlp_norm')(x)))
    return x, (new if cache is not None else None)


class Stack(nn.Module):
  """L blocks, the relative positions they share, and the final norm."""
  config: TransformerConfig
  layers: int
  causal: bool
  cross: bool
  train: bool

  @nn.compact
  def __call__(self, x, mask, query_positions, key_positions, *, memory=None, cross_mask=None,
               cache=None, index=0):
    c = self.config
    bias = RelativeBias(c, not self.causal, name='relpos')(query_positions, key_positions)
    block = Block
    if c.remat != 'none':
      # prevent_cse only matters outside of scan, where XLA could undo the recomputation.
      block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[c.remat])
    blocks = nn.scan(
        block, length=self.layers, in_axes=(0,) + (nn.broadcast,) * 5, out_axes=0,
        variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
        metadata_params={nn.PARTITION_NAME: 'layers'})
    x = dropout(self, x, c.dropout, self.train)
    x, cache = blocks(c, self.cross, self.train, name='layers')(
        x, cache, memory, index, mask, bias, cross_mask)
    x = RMSNorm(c, name='norm')(x)
    return dropout(self, x, c.dropout, self.train), cache


class Transformer(nn.Module):
  """Encoder-decoder, or decoder-only if no enc_layers. [Vaswani et al. 2017; Raffel et al. 2020]"""
  config: TransformerConfig
  train: bool = False

  def setup(self):
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.normal(1.), ('vocab', 'embed'))
    self.embedding = self.param('embedding', init, (c.vocab_size, c.d_model), jnp.float32)
    if c.enc_layers:
      self.encoder = Stack(c, c.enc_layers, causal=False, cross=False, train=self.train)
    self.decoder = Stack(
        c, c.dec_layers, causal=True, cross=c.enc_layers > 0, train=self.train)
    if not c.tied:
      init = nn.initializers.variance_scaling(1., 'fan_in', 'truncated_normal')
      self.logits = Dense(c.vocab_size, ('embed', 'vocab'), init, 'float32')

  def embed(self, tokens: Array) -> Array:
    """int[B, T] -> [B, T, D]. A gather: T5X's one-hot product costs 40 % more FLOPs in small T5."""
    x = jnp.take(self.embedding, tokens, axis=0, mode='clip').astype(self.config.dtype)
    return constrain(x, 'batch', 'length', 'act_embed')

  def unembed(self, x: Array) -> Array:
    """[B, T, D] -> float32 logits[B, T, V], computed in float32."""
    c, x = self.config, x.astype(jnp.float32)
    if c.tied:
      x = x * c.d_model ** -0.5 if c.scale_logits else x
      logits = jnp.einsum('BTD,VD->BTV', x, self.embedding)
    else:
      logits = self.logits(x)
    return constrain(logits, 'batch', 'length', 'act_vocab')

  def encode(self, tokens: Array, segments: Array | None = None) -> tuple[Array, Array]:
    """int[B, S] -> (memory[B, S, D], segments int[B, S]; 0 is padding)."""
    if segments is None:
      segments = (tokens > 0).astype(jnp.int32)
    at = jnp.arange(tokens.shape[1])
    x, _ = self.encoder(self.embed(tokens), segment_mask(segments, segments), at, at)
    return x, segments

  def hidden(self, batch: dict[str, Array]) -> Array:
    """The decoder's output before the softmax matrix, [B, T, D], for teacher forcing."""
    memory = cross_mask = None
    tokens = batch['decoder_input_tokens']
    segments = batch.get('decoder_segment_ids')
    at = jnp.arange(tokens.shape[1])
    mask = (at[None, :] <= at[:, None])[None, None]
    if segments is not None:
      # A padding query keeps itself as a key, so that its softmax stays finite and cheap.
      mask &= (segments[:, :, None] == segments[:, None, :])[:, None]
    if self.config.enc_layers:
      memory, memory_segments = self.encode(
          batch['encoder_input_tokens'], batch.get('encoder_segment_ids'))
      if segments is None:
        cross_mask = (memory_segments > 0)[:, None, None, :]
      else:
        cross_mask = segment_mask(segments, memory_segments)
    x, _ = self.decoder(self.embed(tokens), mask, at, at, memory=memory, cross_mask=cross_mask)
    return x

  def __call__(self, batch: dict[str, Array]) -> Array:
    """Model features -> float32 logits[B, T, V] of the token after each decoder input."""
    return self.unembed(self.hidden(batch))

  def decode(self, tokens: Array, cache: Cache, index) -> tuple[Array, Cache]:
    """T new tokens int[B, T] at positions index … index + T - 1 -> (logits[B, T, V], cache).

    The first call with a cache of `init_cache` turns the memory in it into each layer's
    cross-attention keys and values; later calls only read those.
    """
    c = self.config
    length = cache['self']['k'].shape[3]
    query_positions = index + jnp.arange(tokens.shape[1])
    key_positions = jnp.arange(length)
    mask = (key_positions[None, :] <= query_positions[:, None])[None, None]
    cross_mask = memory = None
    if c.enc_layers:
      cross_mask = cache['memory_mask'][:, None, None, :]
      memory = cache.get('memory')
    layer_cache = {k: cache[k] for k in ('self', 'cross') if k in cache}
    x, new = self.decoder(self.embed(tokens), mask, query_positions, key_positions, memory=memory,
                          cross_mask=cross_mask, cache=layer_cache, index=index)
    if c.enc_layers:
      new = {**new, 'memory_mask': cache['memory_mask']}
    return self.unembed(x), new


def init_cache(config: TransformerConfig, batch: int, length: int, memory: Array | None = None,
               memory_segments: Array | None = None) -> Cache:
  """An empty cache for `length` decoder positions: keys and values [L, B, N, length, H].

  memory[B, S, D] and memory_segments int[B, S] come from `Transformer.encode`.
  """
  shape = (config.dec_layers, batch, config.n_heads, length, config.d_head)
  cache = {'self': {name: jnp.zeros(shape, config.dtype) for name in ('k', 'v')}}
  if config.enc_layers:
    cache.update(memory=memory, memory_mask=memory_segments > 0)
  return cache


def decoding(config: TransformerConfig):
  """The model as two pure functions, all that decoding knows of it.

  start(params, inputs int[B, S], segments int[B, S], length) -> an empty cache; decoder-only models
  ignore the inputs. step(params, tokens int[B, 1], cache, index) -> (logits[B, V], cache).
  """
  model = Transformer(config)

  def start(params, inputs, segments, length):
    if not config.enc_layers:
      return init_cache(config, inputs.shape[0], length)
    memory, segments = model.apply({'params': params}, inputs, segments, method='encode')
    return init_cache(config, inputs.shape[0], length, memory, segments)

  def step(params, tokens, cache, index):
    logits, cache = model.apply({'params': params}, tokens, cache, index, method='decode')
    return logits[:, 0], cache

  return start, step
