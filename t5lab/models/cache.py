"""A model as decoding sees it: an explicit cache and pure functions over it.

B batch, S memory length, L layers, K key heads, H head, D model, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer

Array = jax.Array


def init_cache(config: TransformerConfig, batch: int, length: int, memory: Array | None = None,
               memory_segments: Array | None = None) -> dict[str, Any]:
  """An empty cache for `length` decoder positions: keys and values [L, B, K, length, H].

  memory[B, S, D] and memory_segments int[B, S] come from `Transformer.encode`.
  """
  shape = (config.dec_layers, batch, config.kv_heads, length, config.d_head)
  cache = {'self': {name: jnp.zeros(shape, config.dtype) for name in ('k', 'v')}}
  if config.enc_layers:
    cache.update(memory=memory, memory_mask=memory_segments > 0)
  return cache


def decoding(config: TransformerConfig):
  """The model as pure functions (start, step, prefill), which is all that decoding knows of it.

  start(params, inputs int[B, S], segments int[B, S], length) -> an empty cache. Decoder-only models
  ignore the inputs.
  step(params, tokens int[B, 1], cache, index) -> (logits[B, V], cache).
  prefill(params, tokens int[B, P], cache) -> the cache after the first P tokens.
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

  def prefill(params, tokens, cache):
    return model.apply({'params': params}, tokens, cache, 0, method='decode')[1]

  return start, step, prefill
