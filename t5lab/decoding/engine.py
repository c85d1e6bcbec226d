"""Batches of requests: token lists in, token lists out, over the two functions of a model.

Requests are sorted by length and padded to a few fixed shapes, so a handful of programs serves any
input: a new shape is a compilation, which costs more than the padding.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5lab.decoding.beam import beam_search
from t5lab.decoding.sample import sample

BOS = 0           # T5 starts the decoder with the padding id
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


class Engine:
  """start(params, inputs[B, S], segments, length) -> cache; step(params, tokens[B, 1], cache,
  index) -> (logits[B, V], cache). `decoder_only`: a request is a prompt that the output continues.
  """

  def __init__(self, start: Callable, step: Callable, *, eos: int, decoder_only: bool,
               batch_size: int = 32):
    self._start, self._step, self._eos = start, step, eos
    self._decoder_only, self.batch_size = decoder_only, batch_size
    self._run = jax.jit(self._decode, static_argnames=('decoding',))

  def _decode(self, params, inputs, segments, decoding: Decoding):
    step = functools.partial(self._step, params)
    rows, width = inputs.shape
    start = jnp.full((rows,), BOS, jnp.int32)
    settings = dict(length=decoding.length, eos=self._eos)
    prompt = jnp.where(segments > 0, inputs, -1) if self._decoder_only else None
    length = decoding.length + (width if self._decoder_only else 0)
    cache = self._start(params, inputs, segments, length)
    if decoding.beams > 1:
      tokens, _ = beam_search(
          step, cache, start, beams=decoding.beams, alpha=decoding.alpha, **settings)
      return tokens[:, 0]
    return sample(
        step, cache, start, rng=jax.random.key(decoding.seed), temperature=decoding.temperature,
        top_k=decoding.top_k, top_p=decoding.top_p, prompt=prompt, **settings)[0]

  def generate(self, params, requests: Sequence[Sequence[int]], decoding: Decoding, *,
               tick: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
    """Token lists -> int32[requests, length], PAD after EOS, in the order of the requests.

    tick(done, total) is called after each batch; what it raises ends the work.
    """
    out = np.zeros((len(requests), decoding.length), np.int32)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    for first in range(0, len(order), self.batch_size):
      chosen = order[first:first + self.batch_size]
      inputs, segments = self._pad([requests[i] for i in chosen])
      tokens = np.asarray(self._run(params, inputs, segments, decoding))
      out[chosen] = tokens[:len(chosen)]
      tick(first + len(chosen), len(order))
    return out

  def _pad(self, requests):
    """Fixed shapes; rows that only fill the batch repeat the first request, and end with it."""
    longest = max(map(len, requests), default=0)
    width = SHORTEST
    while width < longest:
      width *= 2
    tokens = np.zeros((self.batch_size, width), np.int32)
    segments = np.zeros_like(tokens)
    for i in range(self.batch_size):
      request = requests[i] if i < len(requests) else requests[0]
      tokens[i, :len(request)] = request
      segments[i, :len(request)] = 1
    return tokens, segments
