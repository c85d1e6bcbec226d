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
from t5lab.decoding.options import EARLY_STOPPING
from t5lab.decoding.processors import Process, Read
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
  is_open: Array      # bool[B], whether the finished hypotheses may still change


def length_penalty(length, alpha: float, power: float = 0.):
  """((5 + length) / 6) ** alpha [Wu et al. 2016]; or length ** power, if power is not 0.

  length counts eos but not the start token. The second is transformers' length_penalty.
  """
  length = jnp.asarray(length, jnp.float32)
  return length ** power if power else ((5. + length) / 6.) ** alpha


def beam_search(
    step: Step,
    cache: Any,
    start: Array,  # int[B], fed at position 0, not part of the output
    *,
    beams: int,
    length: int,
    eos: int | Sequence[int],
    alpha: float = 0.6,
    power: float = 0.,
    early_stopping: str = 'exact',
    process: Process | None = None,
    cache_axes: Iterable[tuple[str, int | None]] = CACHE_AXES,
) -> tuple[Array, Array]:
  """int[B] start tokens -> (tokens int32[B, beams, length], scores[B, beams]), best first.

  Scores are log p / length_penalty(length, alpha, power); after eos a hypothesis holds PAD.
  process changes the log-probabilities of the next token, which are not normalized again.
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

  That is early_stopping='exact'. The others are transformers' beam search (5.24, generation/
  utils.py): a continuation finishes only if it is among the `beams` best of its step, and at the
  last step all of these do. A row stops for good once its worst finished score beats
  never: the best that a live hypothesis could reach, as above, but with its present length if power
    is not above 0;
  false: the score of the best live hypothesis at its present length;
  true: likewise, or once `beams` hypotheses have finished.

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
  if early_stopping not in EARLY_STOPPING:
    raise UsageError(f'early_stopping must be one of {", ".join(EARLY_STOPPING)}, got '
                     f'{early_stopping!r}')
  batch, exact = start.shape[0], early_stopping == 'exact'
  row = jnp.arange(batch)[:, None]  # [B, 1]
  kept = beams * (1 + np.size(eos))

  def follow(cache, parents):
    """Row i of the new cache is row parents[i] of the old one."""
    axes = trees.match(cache, cache_axes)
    return jax.tree.map(
        lambda x, axis: x if axis is None else jnp.take(x, parents, axis=axis), cache, axes)

  def next_log_p(logits, start, written, index):
    """logits[R, V] of rows that read start[R] and wrote `index` of written[R, length]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if process:
      ids = jnp.concatenate([start[:, None], written], axis=1)
      log_p = process(log_p, Read(ids, index + 1, new=index, left=length - index))
    return log_p

  def reachable(s):
    """[B], the best score that the live hypotheses are thought to reach."""
    if exact:               # of a quasi-convex function, the largest value is at one of the ends
      ends = jnp.stack([length_penalty(s.index + 1, alpha, power),
                        length_penalty(length, alpha, power)])
      return s.live_log_p[:, 0] / jnp.max(ends)
    at_the_end = early_stopping == 'never' and (power or alpha) > 0
    return s.live_log_p[:, 0] / length_penalty(length if at_the_end else s.index, alpha, power)

  def choose(s, log_p):
    """log_p[B, beams, V] -> (the state without its cache after one more token, parents)."""
    vocab = log_p.shape[-1]
    log_p = s.live_log_p[..., None] + log_p
    log_p, index = jax.lax.top_k(log_p.reshape(batch, beams * vocab), kept)
    parents, token = index // vocab, (index % vocab).astype(jnp.int32)
    tokens = s.live[row, parents].at[:, :, s.index].set(token)
    ended = is_end(token, eos)

    # The best hypotheses that have not ended.
    live_log_p, best = jax.lax.top_k(jnp.where(ended, -jnp.inf, log_p), beams)
    live, parents = tokens[row, best], parents[row, best]

    # The best of the finished ones, old and new.
    if not exact:
      is_full = s.done_scores[:, -1] > -jnp.inf
      is_open = s.is_open & ~is_full if early_stopping == 'true' else s.is_open
      ended |= s.index + 1 >= length
      ended &= (jnp.arange(kept) < beams) & is_open[:, None]
    scores = jnp.where(ended, log_p / length_penalty(s.index + 1, alpha, power), -jnp.inf)
    done_scores, best = jax.lax.top_k(jnp.concatenate([s.done_scores, scores], axis=1), beams)
    done = jnp.concatenate([s.done, tokens], axis=1)[row, best]
    new = _State(s.index + 1, None, live, live_log_p, done, done_scores, s.is_open)
    # An equal score would not replace a finished one, so > does not stop a row too early.
    is_open = new.is_open & (reachable(new) > done_scores[:, -1])
    return new._replace(is_open=is_open), parents

  def is_running(s):
    is_open = s.is_open
    if early_stopping == 'true':
      is_open = jnp.any(is_open) & jnp.any(s.done_scores[:, -1] == -jnp.inf)
    return (s.index < length) & jnp.any(is_open)

  def body(s):
    last = jax.lax.dynamic_slice_in_dim(s.live, s.index - 1, 1, axis=2)
    logits, cache = step(last.reshape(batch * beams, 1), s.cache, s.index)
    log_p = next_log_p(logits, jnp.repeat(start, beams), s.live.reshape(batch * beams, -1), s.index)
    new, parents = choose(s, log_p.reshape(batch, beams, -1))
    return new._replace(cache=follow(cache, (row * beams + parents).reshape(-1)))

  nothing = jnp.full((batch, beams), -jnp.inf)
  empty = jnp.full((batch, beams, length), PAD, jnp.int32)
  # All beams start with the same token, so all but the first start with probability 0.
  first = _State(jnp.int32(0), None, empty, nothing.at[:, 0].set(0.), empty, nothing,
                 jnp.ones(batch, bool))
  start = start.astype(jnp.int32)
  logits, cache = step(start[:, None], cache, 0)
  log_p = next_log_p(logits, start, empty[:, 0], 0)
  state, _ = choose(first, jnp.repeat(log_p[:, None], beams, axis=1))
  state = state._replace(cache=follow(cache, jnp.repeat(jnp.arange(batch), beams)))
  s = jax.lax.while_loop(is_running, body, state)

  finished = s.done_scores[:, :1] > -jnp.inf
  scores = jnp.where(finished, s.done_scores, s.live_log_p / length_penalty(length, alpha, power))
  tokens = jnp.where(finished[..., None], s.done, s.live)
  return jnp.where(scores[..., None] > -jnp.inf, tokens, PAD), scores
