"""Greedy decoding and sampling over a step function, entirely on the device.

step(tokens int[B, 1], cache, index) -> (logits[B, V], cache) reads the tokens at position `index`
and predicts the next ones. Its first call gets the Python int 0 and may change the structure of the
cache (it computes cross-attention keys from the encoder's output); later calls must keep it.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp

from t5lab.decoding.processors import Process, Read
from t5lab.errors import UsageError

Array = jax.Array
Step = Callable[[Array, Any, Any], tuple[Array, Any]]

PAD = 0  # seqio's padding id, written after the end


def is_end(tokens: Array, eos: int | Sequence[int]) -> Array:
  """bool of the shape of tokens: which of them are eos, or one of several."""
  return jnp.isin(tokens, jnp.atleast_1d(jnp.array(eos, jnp.int32)))


def keep_top_k(logits: Array, k: int) -> Array:
  """[..., V] with all but the k largest set to -inf; ties are kept. [Fan et al. 2018]"""
  kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
  """[..., V] with all but the nucleus set to -inf. [Holtzman et al. 2020]

  The nucleus is the smallest set of most probable tokens with a total probability of at least p;
  ties with the last of them are kept.
  Example: probabilities .5 .3 .2 keep one at p = .4, two at p = .6.
  """
  largest = -jnp.sort(-logits, axis=-1)
  probs = jax.nn.softmax(largest)
  before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more probable tokens
  last = jnp.sum(before < p, axis=-1, keepdims=True) - 1
  threshold = jnp.take_along_axis(largest, jnp.maximum(last, 0), axis=-1)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_min_p(logits: Array, p: float) -> Array:
  """[..., V] with all set to -inf that are less than p times as probable as the best one.

  [Nguyen et al. 2024]
  """
  return jnp.where(logits < jnp.max(logits, axis=-1, keepdims=True) + math.log(p), -jnp.inf, logits)


def sample(
    step: Step,
    cache: Any,
    start: Array,  # int[B], fed at position 0, not part of the output
    *,
    length: int,
    eos: int | Sequence[int],
    keys: Array | None = None,
    temperature: float = 0.,
    top_k: int = 0,
    top_p: float = 1.,
    min_p: float = 0.,
    prompt: Array | None = None,
    limit: Array | None = None,
    process: Process | None = None,
    history: Array | None = None,
) -> tuple[Array, Array]:
  """(tokens int32[B, length], scores float32[B]); after `eos`, or one of several, a row holds PAD.

  Temperature 0 takes the most probable token. Otherwise tokens are drawn from softmax(logits /
  temperature), restricted to the top_k (0: all), then to the nucleus top_p (1: all) and then to
  those at least min_p times as probable as the best (0: all).
  keys: jax.random keys [B], needed for a temperature above 0. The draws of a row depend on its key,
  its logits and the number of tokens generated so far: not on other rows, nor on the prompt's
  padding.
  scores: the sum of log p over the generated tokens, eos included, under the model's own
  distribution, without temperature and filters, so that scores are comparable.
  prompt: int[B, P], right-padded with -1, follows `start` and is not part of the output; each row
  continues its own prompt. The cache needs P + length positions. Each step reads one position.
  limit: int[B], tokens that each row may generate, at most length; None: length.
  process: changes the logits before a token is chosen. history: int[B, H], all that was read up to
  and including `start`, which it sees before the prompt; None: `start` alone.
  Stops as soon as all rows have ended.
  """
  _check(length, keys, temperature, top_k, top_p, min_p)
  batch = start.shape[0]
  prompt = jnp.zeros((batch, 0), jnp.int32) if prompt is None else prompt.astype(jnp.int32)
  prompt_length = jnp.sum(prompt >= 0, axis=1)  # int[B]
  end = prompt_length + (length if limit is None else limit)
  history = start[:, None] if history is None else history

  def choose(i, logits):
    if not temperature:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k:
      logits = keep_top_k(logits, top_k)
    if top_p < 1:
      logits = keep_top_p(logits, top_p)
    if min_p:
      logits = keep_min_p(logits, min_p)
    draw = lambda key, n, x: jax.random.categorical(jax.random.fold_in(key, n), x)
    return jax.vmap(draw)(keys, i - prompt_length, logits).astype(jnp.int32)

  def emit(i, logits, tokens, scores, ended):
    """Writes token i: that of the prompt, PAD after the end, or else one chosen from the logits."""
    logits = logits.astype(jnp.float32)
    processed = logits
    if process:
      read = Read(jnp.concatenate([history, tokens], axis=1), history.shape[1] + i,
                  new=i - prompt_length, left=end - i)
      processed = process(logits, read)
    chosen = choose(i, processed)
    log_p = (jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
             - jax.nn.logsumexp(logits, axis=1))
    generates = (i >= prompt_length) & ~ended
    token = jnp.where(generates, chosen, tokens[:, i])
    scores += jnp.where(generates, log_p, 0.)
    ended |= generates & (is_end(token, eos) | (i + 1 >= end))
    return tokens.at[:, i].set(token), scores, ended

  def is_running(state):
    i, _, _, _, ended = state
    return (i < prompt.shape[1] + length) & ~jnp.all(ended)

  def body(state):
    i, cache, tokens, *rest = state
    last = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
    logits, cache = step(last, cache, i)
    return i + 1, cache, *emit(i, logits, tokens, *rest)

  tokens = jnp.pad(jnp.maximum(prompt, PAD), [(0, 0), (0, length)], constant_values=PAD)
  logits, cache = step(start[:, None].astype(jnp.int32), cache, 0)
  state = emit(0, logits, tokens, jnp.zeros(batch), jnp.zeros(batch, bool))
  _, _, tokens, scores, _ = jax.lax.while_loop(is_running, body, (jnp.int32(1), cache, *state))
  output = prompt_length[:, None] + jnp.arange(length)
  return jnp.take_along_axis(tokens, output, axis=1), scores


def _check(length, keys, temperature, k, p, min_p):
  if length < 1:
    raise UsageError(f'the decoding length must be 1 or more, got {length}')
  if temperature < 0 or k < 0 or not 0 < p <= 1 or not 0 <= min_p <= 1:
    raise UsageError('decoding needs temperature >= 0, top_k >= 0 (0 is off), 0 < top_p <= 1 (1 is '
                     f'off) and 0 <= min_p <= 1, got temperature={temperature}, top_k={k}, '
                     f'top_p={p}, min_p={min_p}')
  if temperature > 0 and keys is None:
    raise UsageError(f'temperature={temperature} needs keys, a jax.random.key for each row; 0 is '
                     'greedy')
