"""Batched decoding of requests: token lists in, token lists out, over the functions of a model.

Requests are sorted by length and padded to a few fixed shapes, so that a few programs serve any
input: compiling another shape would cost more than the padding.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5lab.decoding import processors
from t5lab.decoding.beam import beam_search
from t5lab.decoding.options import Decoding
from t5lab.decoding.sample import PAD, is_end, sample
from t5lab.errors import UsageError
from t5lab.parallel import multihost

SHORTEST = 16     # tokens in the smallest shape; each larger one is twice as long


def buckets(n: int, smallest: int, factor: int = 2) -> int:
  """The smallest value of smallest * factor ** i that is at least n."""
  while smallest < n:
    smallest *= factor
  return smallest


def row_keys(seed: int, places: jax.Array) -> jax.Array:
  """A key for each of places int[B, 2]: (request, number of its sample)."""
  def key(place):
    request_key = jax.random.fold_in(jax.random.key(seed), place[0])
    return jax.random.fold_in(request_key, place[1])
  return jax.vmap(key)(places)


class Engine:
  """Decodes batches of requests with three functions of a model.

  start(params, inputs[B, S], segments, length) -> cache
  step(params, tokens[B, 1], cache, index) -> (logits[B, V], cache)
  prefill(params, tokens[B, P], cache) -> cache, which reads P positions at once
  start_id: the first input of an encoder-decoder's decoder. None for a decoder-only model, whose
  requests are prompts; `prefill` then reads the positions that all prompts of a batch have.
  eos: ends a text unless the options have stop_ids, and is written where one of them ended it.
  """

  def __init__(self, start: Callable, step: Callable, prefill: Callable | None = None, *, eos: int,
               start_id: int | None, batch_size: int = 32, max_width: int = 0):
    """max_width: positions of the model, beyond which inputs are not padded; 0: no limit."""
    self._start, self._step, self._prefill = start, step, prefill
    self._eos, self._start_id = eos, start_id
    self.batch_size, self._max_width = batch_size, max_width
    self._run = jax.jit(self._decode, static_argnames=('decoding', 'prefilled', 'best'))

  def _decode(self, params, inputs, segments, places, decoding: Decoding, prefilled: int,
              best: int):
    """int32[B, best, length]. places: int[B, 2], the request and the sample of each row."""
    # The cache, the first tokens that the decoder reads, and all up to them.
    rows, width = inputs.shape
    prompt = limit = None
    if self._start_id is None:
      cache = self._start(params, inputs, segments, width + decoding.length)
      if prefilled:
        cache = self._prefill(params, inputs[:, :prefilled], cache)
      history = inputs[:, :prefilled + 1]
      prompt = jnp.where(segments > 0, inputs, -1)[:, prefilled + 1:]
      if decoding.max_total:
        prompt_length = jnp.sum(segments > 0, axis=1)
        limit = jnp.minimum(decoding.length, decoding.max_total - prompt_length)
    else:
      cache = self._start(params, inputs, segments, decoding.length)
      start_id = self._start_id if decoding.start < 0 else decoding.start
      history = jnp.full((rows, 1), start_id, jnp.int32)
    first = history[:, -1]

    def step(tokens, cache, index):
      return self._step(params, tokens, cache, index + prefilled)

    # Search or sample.
    stops = decoding.stop_ids or (self._eos,)
    process = processors.compose(decoding, stops, reads_start=self._start_id is not None)
    if decoding.beams > 1:
      tokens, _ = beam_search(
          step, cache, first, beams=decoding.beams, length=decoding.length, eos=stops,
          alpha=decoding.alpha, power=decoding.length_penalty,
          early_stopping=decoding.early_stopping, process=process)
      tokens = tokens[:, :best]
    else:
      tokens, _ = sample(
          step, cache, first, length=decoding.length, eos=stops,
          keys=row_keys(decoding.seed, places), temperature=decoding.temperature,
          top_k=decoding.top_k, top_p=decoding.top_p, min_p=decoding.min_p, prompt=prompt,
          limit=limit, process=process, history=history)
      tokens = tokens[:, None]
    ends = is_end(tokens, stops)
    if limit is not None:
      # Where max_total cut a text off, EOS shows where: PAD may be a token like others.
      is_cut = ~jnp.any(ends, axis=-1, keepdims=True)
      ends |= is_cut & (jnp.arange(decoding.length) == limit[:, None, None])
    # PAD, which follows the first end, may be among the ends itself.
    count = jnp.cumsum(ends, axis=-1)
    return jnp.where(count == 0, tokens, jnp.where(ends & (count == 1), self._eos, PAD))

  def generate(self, params, requests: Sequence[Sequence[int]], decoding: Decoding, *,
               n: int | None = None, place: int = 0,
               tick: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
    """Token lists -> int32[requests, length], PAD after EOS, in the order of the requests.

    A text that was cut off by max_total, not by its length, has EOS there. A prompt of a
    decoder-only model must have at least one token. A sample depends on the seed, the place of its
    request in `requests` and its number, not on other requests or the batch size.
    n: outputs per request: int32[requests, n, length], the n best hypotheses of beam search or n
    samples, of which the first is the one without n. place: that of the first request, where
    requests come in several calls.
    tick(done, total) is called after each batch; an exception that it raises ends the decoding.
    """
    count = 1 if n is None else n
    most = decoding.beams if decoding.beams > 1 or not decoding.temperature else count
    if not 1 <= count <= most:
      raise UsageError(f'n must be at least 1, and above 1 it needs as many beams or a temperature '
                       f'above 0 without beams, got n={n} with beams={decoding.beams} and '
                       f'temperature={decoding.temperature}')
    best = count if decoding.beams > 1 else 1
    samples = count // best

    out = np.zeros((len(requests), count, decoding.length), np.int32)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    rows = [(i, number) for i in order for number in range(samples)]
    for first in range(0, len(rows), self.batch_size):
      chosen = rows[first:first + self.batch_size]
      inputs, segments, prefilled = self._pad([requests[i] for i, _ in chosen])
      # Rows that only fill the batch are copies of its first row.
      places = np.array(chosen + [chosen[0]] * (len(inputs) - len(chosen)), np.int32)
      places[:, 0] += place
      tokens = multihost.fetch(
          self._run(params, inputs, segments, places, decoding, prefilled, best))
      for (i, number), outputs in zip(chosen, tokens):
        out[i, number:number + best] = outputs
      tick(first + len(chosen), len(rows))
    return out[:, 0] if n is None else out

  def _pad(self, requests):
    """Pads to a fixed shape -> (tokens, segments, number of positions to prefill).

    Rows that only fill the batch repeat the first request, so they end when it ends.
    """
    longest = max(map(len, requests), default=0)
    width = buckets(longest, SHORTEST)
    if self._max_width:
      width = max(longest, min(width, self._max_width))
    rows = min(buckets(len(requests), 1, 4), self.batch_size)
    tokens = np.zeros((rows, width), np.int32)
    segments = np.zeros_like(tokens)
    for i in range(rows):
      request = requests[i] if i < len(requests) else requests[0]
      tokens[i, :len(request)] = request
      segments[i, :len(request)] = 1
    prefilled, shortest = 0, len(requests[0])
    if self._prefill and shortest > SHORTEST // 2:    # at least one token is left for `step`
      prefilled = buckets(shortest, SHORTEST // 2) // 2
    return tokens, segments, prefilled
