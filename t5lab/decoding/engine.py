"""Batches of requests: token lists in, token lists out, over the functions of a model.

Requests are sorted by length and padded to a few fixed shapes, so a handful of programs serves any
input: a new shape is a compilation, which costs more than the padding.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from t5lab.decoding.beam import beam_search
from t5lab.decoding.sample import sample
from t5lab.parallel import multihost

SHORTEST = 16     # tokens of the smallest shape; each next one is twice as long


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How to choose tokens. Greedy as it stands; `beams` > 1 searches and then ignores the rest."""
  length: int                # most tokens generated, EOS included
  beams: int = 1
  alpha: float = 0.6         # length penalty of beam search [Wu et al. 2016]
  temperature: float = 0.    # 0: the most probable token
  top_k: int = 0             # 0: all
  top_p: float = 1.          # 1: all
  seed: int = 0
  forced_first: int = -1     # every output begins with this token; -1: none


def buckets(n: int, smallest: int, factor: int = 2) -> int:
  """The least smallest * factor ** i that is n or more."""
  while smallest < n:
    smallest *= factor
  return smallest


class Engine:
  """start(params, inputs[B, S], segments, length) -> cache; step(params, tokens[B, 1], cache,
  index) -> (logits[B, V], cache).

  begin: what an encoder-decoder's decoder reads first. None: a decoder-only model, whose requests
  are prompts that the output continues; prefill(params, tokens[B, P], cache) -> cache then reads
  what the prompts of a batch all have, P positions at once.
  """

  def __init__(self, start: Callable, step: Callable, prefill: Callable | None = None, *, eos: int,
               begin: int | None, batch_size: int = 32, widest: int = 0):
    """widest: positions that the model has, where they end; inputs are not padded beyond it."""
    self._start, self._step, self._prefill = start, step, prefill
    self._eos, self._begin, self.batch_size, self._widest = eos, begin, batch_size, widest
    self._run = jax.jit(self._decode, static_argnames=('decoding', 'known'))

  def _decode(self, params, inputs, segments, decoding: Decoding, known: int):
    rows, width = inputs.shape
    settings = dict(length=decoding.length, eos=self._eos)
    prompt = None
    if self._begin is None:
      cache = self._start(params, inputs, segments, width + decoding.length)
      if known:
        cache = self._prefill(params, inputs[:, :known], cache)
      begin = inputs[:, known]
      prompt = jnp.where(segments > 0, inputs, -1)[:, known + 1:]
    else:
      cache = self._start(params, inputs, segments, decoding.length)
      begin = jnp.full((rows,), self._begin, jnp.int32)

    def step(tokens, cache, index):
      logits, cache = self._step(params, tokens, cache, index + known)
      if decoding.forced_first >= 0:
        other = jnp.arange(logits.shape[-1]) != decoding.forced_first
        # -inf: beam search would take a finite number for a hypothesis that is possible
        logits = jnp.where((index == 0) & other, -jnp.inf, logits)
      return logits, cache

    if decoding.beams > 1:
      tokens, _ = beam_search(
          step, cache, begin, beams=decoding.beams, alpha=decoding.alpha, **settings)
      return tokens[:, 0]
    return sample(
        step, cache, begin, rng=jax.random.key(decoding.seed), temperature=decoding.temperature,
        top_k=decoding.top_k, top_p=decoding.top_p, prompt=prompt, **settings)[0]

  def generate(self, params, requests: Sequence[Sequence[int]], decoding: Decoding, *,
               tick: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
    """Token lists -> int32[requests, length], PAD after EOS, in the order of the requests.

    A prompt of a decoder-only model has at least one token. tick(done, total) is called after each
    batch; what it raises ends the work.
    """
    out = np.zeros((len(requests), decoding.length), np.int32)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    for first in range(0, len(order), self.batch_size):
      chosen = order[first:first + self.batch_size]
      inputs, segments, known = self._pad([requests[i] for i in chosen])
      tokens = multihost.fetch(self._run(params, inputs, segments, decoding, known))
      out[chosen] = tokens[:len(chosen)]
      tick(first + len(chosen), len(order))
    return out

  def _pad(self, requests):
    """Fixed shapes; rows that only fill the batch repeat the first request, and end with it."""
    longest = max(map(len, requests), default=0)
    width = buckets(longest, SHORTEST)
    if self._widest:
      width = max(longest, min(width, self._widest))
    rows = min(buckets(len(requests), 1, 4), self.batch_size)
    tokens = np.zeros((rows, width), np.int32)
    segments = np.zeros_like(tokens)
    for i in range(rows):
      request = requests[i] if i < len(requests) else requests[0]
      tokens[i, :len(request)] = request
      segments[i, :len(request)] = 1
    known, shortest = 0, len(requests[0])
    if self._prefill and shortest > SHORTEST // 2:    # at least one token is left for `begin`
      known = buckets(shortest, SHORTEST // 2) // 2
    return tokens, segments, known
