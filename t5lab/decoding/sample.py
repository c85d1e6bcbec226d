"""Greedy decoding and sampling over a step function, on the device from first token to last.

step(tokens int[B, 1], cache, index) -> (logits[B, V], cache) reads the tokens of position `index`
and predicts the next ones. Its first call gets the Python int 0 and may change the cache's
structure (it turns the encoder's output into cross-attention keys); later calls must keep it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5lab.errors import UsageError

Array = jax.Array
Step = Callable[[Array, Any, Any], tuple[Array, Any]]

PAD = 0  # seqio's padding id, emitted after the end


def top_k(logits: Array, k: int) -> Array:
  """[..., V] with all but the k largest at -inf (ties with the k-th stay). [Fan et al. 2018]"""
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < kth, -jnp.inf, logits)


def top_p(logits: Array, p: float) -> Array:
  """[..., V] with all but the nucleus at -inf. [Holtzman et al. 2020]

  The nucleus is the fewest most probable tokens that together have probability >= p; ties with
  the last of them stay. Example: probabilities .5 .3 .2 keep one at p = .4, two at p = .6.
  """
  largest = -jnp.sort(-logits, axis=-1)
  probs = jax.nn.softmax(largest)
  before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more probable tokens
  last = jnp.sum(before < p, axis=-1, keepdims=True) - 1
  threshold = jnp.take_along_axis(largest, jnp.maximum(last, 0), axis=-1)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def sample(
    step: Step,
    cache: Any,
    start: Array,  # int[B], fed at position 0, not part of the output
    *,
    length: int,
    eos: int,
    rng: Array | None = None,
    temperature: float = 0.,
    top_k: int = 0,
    top_p: float = 1.,
    prompt: Array | None = None,
) -> tuple[Array, Array]:
  """(tokens int32[B, length], scores float32[B]); after `eos` a row holds PAD.

  temperature 0 takes the most probable token; else samples from softmax(logits / temperature),
  kept to the top_k (0: all), then to the nucleus top_p (1: all). Row b's draws depend on rng, b and
  its logits only: not on the size of the batch.
  scores: sum of log p over the emitted tokens, eos included, under the model's own distribution,
  whatever the temperature and filters: one scale for all settings.
  prompt: int[B, P], right-padded with -1, follows `start` and is not part of the output; each row
  goes on after its own prompt. The cache needs P + length positions. One position is read a step.
  Stops as soon as all rows have ended.
  """
  _check(length, rng, temperature, top_k, top_p)
  batch = start.shape[0]
  prompt = jnp.zeros((batch, 0), jnp.int32) if prompt is None else prompt.astype(jnp.int32)
  given = jnp.sum(prompt >= 0, axis=1)  # each row's prompt length
  limit = prompt.shape[1] + length
  if temperature > 0:
    keys = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(batch))

  def choose(i, logits):
    if not temperature:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _filtered(logits / temperature, top_k, top_p)
    draw = lambda key, x: jax.random.categorical(jax.random.fold_in(key, i), x)
    return jax.vmap(draw)(keys, logits).astype(jnp.int32)

  def emit(i, logits, tokens, scores, ended):
    """Writes token i: the prompt's, PAD after the end, else one chosen from the logits."""
    logits = logits.astype(jnp.float32)
    chosen = choose(i, logits)
    log_p = (jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
             - jax.nn.logsumexp(logits, axis=1))
    free = (i >= given) & ~ended
    token = jnp.where(free, chosen, tokens[:, i])
    scores += jnp.where(free, log_p, 0.)
    ended |= free & ((token == eos) | (i + 1 >= given + length))
    return tokens.at[:, i].set(token), scores, ended

  def go_on(state):
    i, _, _, _, ended = state
    return (i < limit) & ~jnp.all(ended)

  def body(state):
    i, cache, tokens, *rest = state
    last = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
    logits, cache = step(last, cache, i)
    return i + 1, cache, *emit(i, logits, tokens, *rest)

  tokens = jnp.pad(jnp.maximum(prompt, PAD), [(0, 0), (0, length)], constant_values=PAD)
  logits, cache = step(start[:, None].astype(jnp.int32), cache, 0)
  state = emit(0, logits, tokens, jnp.zeros(batch), jnp.zeros(batch, bool))
  _, _, tokens, scores, _ = jax.lax.while_loop(go_on, body, (jnp.int32(1), cache, *state))
  return jnp.take_along_axis(tokens, given[:, None] + jnp.arange(length), axis=1), scores


def _filtered(logits, k, p):
  logits = top_k(logits, k) if k else logits
  return top_p(logits, p) if p < 1 else logits


def _check(length, rng, temperature, k, p):
  if length < 1:
    raise UsageError(f'decoding length {length}: at least 1.')
  if temperature < 0 or k < 0 or not 0 < p <= 1:
    raise UsageError(f'temperature {temperature}, top_k {k}, top_p {p}: temperature >= 0, '
                     'top_k >= 0 (0 is off) and 0 < top_p <= 1 (1 is off).')
  if temperature > 0 and rng is None:
    raise UsageError(f'temperature {temperature} needs rng (a jax.random.key); 0 is greedy.')
