"""One vector for a text, from the vectors of its tokens.

The formulas are those of sentence-transformers (sentence_transformers.models.Pooling);
`weighted_mean` and `last` are from SGPT [Muennighoff 2022, 2202.08904]. B batch, T length, D model.
"""

import jax.numpy as jnp


def pool(mode: str, x, mask):
  """x[B, T, D], mask bool[B, T] of the tokens to pool -> [B, D] in the dtype of x.

  mode: mean, max, mean_sqrt (the sum over the square root of the length), weighted_mean (the token
  at position p counts p + 1 times), first or last. Sums are in float32. Without any token in the
  mask, `first` gives the vector of position 0, `max` gives -inf and the others give 0.
  """
  is_token = mask[..., None]
  if mode == 'max':
    return jnp.max(jnp.where(is_token, x, -jnp.inf), axis=1)
  if mode in ('first', 'last'):
    index = jnp.arange(mask.shape[1])
    chosen = jnp.argmax(mask, axis=1) if mode == 'first' else jnp.max(index * mask, axis=1)
    vector = jnp.take_along_axis(x, chosen[:, None, None], axis=1)[:, 0]
    return vector if mode == 'first' else jnp.where(jnp.any(mask, axis=1)[:, None], vector, 0)

  weights = is_token.astype(jnp.float32)
  if mode == 'weighted_mean':
    weights *= jnp.arange(1, mask.shape[1] + 1)[:, None]
  total = jnp.maximum(jnp.sum(weights, axis=1), 1)
  if mode == 'mean_sqrt':
    total = jnp.sqrt(total)
  return (jnp.sum(x * weights, axis=1) / total).astype(x.dtype)
