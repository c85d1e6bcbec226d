"""Beam search over a step function, as T5's: live and finished hypotheses are kept apart.

B batch, V vocabulary; each row has `beams` hypotheses. A batch of beams [B * beams] is row-major:
beam k of row b is b * beams + k.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5lab import trees
from t5lab.decoding.sample import PAD, Step, is_end
from t5lab.errors import UsageError

Array = jax.Array

# (regex of a cache path, batch axis). Leaves with an axis belong to a hypothesis. Leaves with None
# (the encoder's keys, values and mask) are the same for all beams of a row and keep B rows.
CACHE_AXES = (('self/.*', 1), ('.*', None))


class _State(NamedTuple):
  index: Array        # int32[], tokens written so far
  cache: Any          # of the live hypotheses
  live: Array         # int32[B, beams, length]
  live_log_p: Array   # [B, beams], best first
  done: Array         # int32[B, beams, length], hypotheses that ended with eos
  done_scores: Array  # [B, beams], best first, -inf if there is none yet


def length_penalty(length, alpha: float):
  """((5 + length) / 6) ** alpha; length counts eos but not the start token. [Wu et al. 2016]"""
  return ((5. + length) / 6.) ** alpha


def beam_search(
    step: Step,
    cache: Any,
    start: Array,  # int[B], fed at position 0, not part of the output
    *,
    beams: int,
    length: int,
    eos: int | Sequence[int],
    alpha: float = 0.6,
    cache_axes: Iterable[tuple[str, int | None]] = CACHE_AXES,
) -> tuple[Array, Array]:
  """int[B] start tokens -> (tokens int32[B, beams, length], scores[B, beams]), best first.

  Scores are log p / length_penalty(length, alpha); after eos a hypothesis holds PAD.
  The first call is step(tokens[B, 1], cache, 0) and may change the structure of the cache; the
  later ones are step(tokens[B * beams, 1], cache, index).
  cache_axes: the first row that matches the path of a leaf counts. Leaves with a batch axis grow to
  B * beams and follow their hypotheses; leaves with None keep B rows, which the step shares (row b
  serves rows b * beams to b * beams + beams - 1).

  Each step keeps the 2 * beams best continuations: at most `beams` of them end, so `beams` remain.
  With several eos, more are kept, for each hypothesis may end with any of them.
  A row stops when its worst finished score beats the best that a live hypothesis could still reach,
  which is its log p so far / length_penalty(length). A row that finished fewer than `beams` has
  score -inf and PAD in the rest; one that finished none returns its live hypotheses, cut off.
  With beams = 1 an eos that is only second best is finished too, so it is not greedy decoding.
  [Wu et al. 2016; T5X decoding.py, which returns the best *last*]

  Example (V = 4: PAD, eos = 1, a = 2, b = 3; beams 2, length 3, alpha 1) with p(eos, a, b) =
  (.1, .5, .4) after start, (.2, .5, .3) after a, (.9, .06, .04) after b:
    token 0: a .5, b .4, eos .1.            live a, b.   finished eos -2.303
    token 1: b-eos .36, aa .25, ab .15, a-eos .10 are the best four.
             live aa, ab.   finished b-eos log .36 / (7/6) = -0.876, a-eos -1.974 (drops eos)
             the best live could reach log .25 / (8/6) = -1.040 > -1.974: continue
    token 2: ab-eos .135, aaa .125, aab .075, aa-eos .05.
             finished b-eos -0.876, ab-eos log .135 / (8/6) = -1.502 (drops a-eos)
    -> tokens [[3, 1, 0], [2, 3, 1]], scores [-0.876, -1.502]; greedy would go a a a.
  """
  if beams < 1 or length < 1 or alpha < 0:
    raise UsageError('beam search needs beams >= 1, length >= 1 and alpha >= 0, got '
                     f'beams={beams}, length={length}, alpha={alpha}')
  batch = start.shape[0]
  row = jnp.arange(batch)[:, None]  # [B, 1]
  kept = beams * (1 + np.size(eos))

  def follow(cache, parents):
    """Row i of the new cache is row parents[i] of the old one."""
    axes = trees.match(cache, cache_axes)
    return jax.tree.map(
        lambda x, axis: x if axis is None else jnp.take(x, parents, axis=axis), cache, axes)

  def choose(s, logits):
    """logits[B, beams, V] -> (the state without its cache after one more token, parents)."""
    vocab = logits.shape[-1]
    log_p = s.live_log_p[..., None] + jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p, index = jax.lax.top_k(log_p.reshape(batch, beams * vocab), kept)
    parents, token = index // vocab, (index % vocab).astype(jnp.int32)
    tokens = s.live[row, parents].at[:, :, s.index].set(token)
    ended = is_end(token, eos)

    # The best hypotheses that have not ended.
    live_log_p, best = jax.lax.top_k(jnp.where(ended, -jnp.inf, log_p), beams)
    live, parents = tokens[row, best], parents[row, best]

    # The best of the finished ones, old and new.
    scores = jnp.where(ended, log_p / length_penalty(s.index + 1, alpha), -jnp.inf)
    done_scores, best = jax.lax.top_k(jnp.concatenate([s.done_scores, scores], axis=1), beams)
    done = jnp.concatenate([s.done, tokens], axis=1)[row, best]
    return _State(s.index + 1, None, live, live_log_p, done, done_scores), parents

  def is_running(s):
    reachable = s.live_log_p[:, 0] / length_penalty(length, alpha)
    # An equal score would not replace a finished one, so >= does not stop a row too early.
    return (s.index < length) & ~jnp.all(s.done_scores[:, -1] >= reachable)

  def body(s):
    last = jax.lax.dynamic_slice_in_dim(s.live, s.index - 1, 1, axis=2)
    logits, cache = step(last.reshape(batch * beams, 1), s.cache, s.index)
    new, parents = choose(s, logits.reshape(batch, beams, -1))
    return new._replace(cache=follow(cache, (row * beams + parents).reshape(-1)))

  nothing = jnp.full((batch, beams), -jnp.inf)
  empty = jnp.full((batch, beams, length), PAD, jnp.int32)
  # All beams start with the same token, so all but the first start with probability 0.
  first = _State(jnp.int32(0), None, empty, nothing.at[:, 0].set(0.), empty, nothing)
  logits, cache = step(start[:, None].astype(jnp.int32), cache, 0)
  state, _ = choose(first, jnp.repeat(logits[:, None], beams, axis=1))
  state = state._replace(cache=follow(cache, jnp.repeat(jnp.arange(batch), beams)))
  s = jax.lax.while_loop(is_running, body, state)

  finished = s.done_scores[:, :1] > -jnp.inf
  scores = jnp.where(finished, s.done_scores, s.live_log_p / length_penalty(length, alpha))
  tokens = jnp.where(finished[..., None], s.done, s.live)
  return jnp.where(scores[..., None] > -jnp.inf, tokens, PAD), scores
