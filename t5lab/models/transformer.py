"""The Transformer: encoder-decoder, decoder-only and encoder-only from one definition.

It maps seqio's model features to float32 logits. Families differ only in the fields of
TransformerConfig. B batch, T and S lengths, L layers, D model, N heads, H head, V vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.attention import segment_mask, softcap
from t5lab.models.families import TransformerConfig
from t5lab.models.layers import ACTIVATIONS, Dense, Norm, kernel_init, lookup, up_init
from t5lab.models.pooling import pool
from t5lab.models.stack import Stack
from t5lab.parallel.sharding import constrain, product

Array = jax.Array


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
    """[B, T, D] -> float32 logits[B, T, V], or of a classifier [B, 1 or T, classes]."""
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
    pooled input, [B, 1, D], in classifiers of whole inputs.
    """
    c = self.config
    if not c.dec_layers:
      x, segments = self._encode(batch)
      is_pooled = c.classes and c.class_of == 'input'
      return self._vector(x, segments)[:, None] if is_pooled else x

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
