"""Beam search against brute force, against a search over Python lists, and worked by hand."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5lab.decoding.beam import beam_search
from t5lab.decoding.sample import sample
from t5lab.errors import UsageError

V, EOS = 4, 1


def starts(rows):
  return jnp.arange(rows) % V


def history_step(table):
  """Logits from table[row, history in base V + 1, V]; the history lives in the cache's 'self'.

  Like the model: the first call turns 'memory' [B] into 'cross', which stays at B rows.
  """
  table = jnp.asarray(table, jnp.float32)

  def step(tokens, cache, index):
    rows = tokens.shape[0]
    if 'memory' in cache:
      assert index == 0
      cache = {'self': {'seen': cache['self']['seen']}, 'cross': {'row': cache['memory']}}
    seen = jax.lax.dynamic_update_slice(cache['self']['seen'], tokens[None], (0, 0, index))
    row = cache['cross']['row']
    assert row.shape[0] == len(table) and seen.shape[:2] == (1, rows)
    at = jnp.sum((seen[0] + 1) * (V + 1) ** jnp.arange(seen.shape[2])
                 * (jnp.arange(seen.shape[2]) <= index), axis=1)
    logits = table[jnp.repeat(row, rows // len(table)), at]
    return logits, {'self': {'seen': seen}, 'cross': {'row': row}}

  return step


def at(history):
  return sum((token + 1) * (V + 1) ** i for i, token in enumerate(history))


def problem(seed, length, rows=2):
  table = np.random.RandomState(seed).randn(rows, (V + 1) ** length, V) * 1.5
  cache = {'self': {'seen': jnp.full((1, rows, length), 9)}, 'memory': jnp.arange(rows)}
  log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
  return history_step(table), cache, log_p


def search(step, cache, rows=2, **kw):
  run = jax.jit(lambda cache, start: beam_search(step, cache, start, eos=EOS, **kw))
  return jax.tree.map(np.asarray, run(cache, starts(rows)))


def greedy(step, cache, start, length):
  return jax.jit(functools.partial(sample, step, length=length, eos=EOS))(cache, start)


def penalty(n, alpha):
  return ((5 + n) / 6) ** alpha


def log_prob(log_p, row, tokens):
  return sum(log_p[row, at((row % V, *tokens[:i])), t] for i, t in enumerate(tokens))


def all_finished(log_p, row, length, alpha):
  """Every sequence that ends with its first eos within length, best first: [(score, tokens)]."""
  others = [t for t in range(V) if t != EOS]
  hypotheses = []
  for n in range(length):
    for body in itertools.product(others, repeat=n):
      tokens = (*body, EOS)
      hypotheses.append((log_prob(log_p, row, tokens) / penalty(n + 1, alpha), tokens))
  return sorted(hypotheses, reverse=True)


def padded(tokens, length):
  return list(tokens) + [0] * (length - len(tokens))


@pytest.mark.parametrize('alpha', [0., .6, 1.5])
@pytest.mark.parametrize('seed', [0, 1])
def test_wide_beam_is_brute_force(alpha, seed):
  # 54 beams hold each of the 27 live prefixes and all 108 continuations: nothing is pruned.
  length = 4
  step, cache, log_p = problem(seed, length)
  tokens, scores = search(step, cache, beams=54, length=length, alpha=alpha)
  for row in range(2):
    want = all_finished(log_p, row, length, alpha)
    assert len(want) == 40
    assert tokens[row, :40].tolist() == [padded(t, length) for _, t in want]
    np.testing.assert_allclose(scores[row, :40], [s for s, _ in want], rtol=1e-5)
    assert (scores[row, 40:] == -np.inf).all() and (tokens[row, 40:] == 0).all()


def list_search(log_p, row, beams, length, alpha):
  """The definition on Python lists, without the early stop: [(score, tokens)], best first."""
  live, done = [(0., ())], []
  for n in range(1, length + 1):
    grown = [(lp + log_p[row, at((row % V, *t)), v], (*t, v)) for lp, t in live for v in range(V)]
    grown = sorted(grown, reverse=True)[:2 * beams]
    done += [(lp / penalty(n, alpha), t) for lp, t in grown if t[-1] == EOS]
    done = sorted(done, reverse=True)[:beams]
    live = [(lp, t) for lp, t in grown if t[-1] != EOS][:beams]
  return done


@pytest.mark.parametrize('beams, alpha', [(1, .6), (2, 0.), (2, .6), (3, 1.)])
def test_narrow_beam_is_the_search_on_lists(beams, alpha):
  length, rows = 5, 8
  step, cache, log_p = problem(beams, length, rows)
  tokens, scores = search(step, cache, rows, beams=beams, length=length, alpha=alpha)
  for row in range(rows):
    want = list_search(log_p, row, beams, length, alpha)
    assert tokens[row, :len(want)].tolist() == [padded(t, length) for _, t in want]
    np.testing.assert_allclose(scores[row, :len(want)], [s for s, _ in want], rtol=1e-5)


def markov_step(probs):
  """The next token depends on the last one; no cache at all."""
  with np.errstate(divide='ignore'):
    table = jnp.asarray(np.log(probs), jnp.float32)
  return lambda tokens, cache, index: (table[tokens[:, 0]], cache)


WORKED = [[0, .1, .5, .4],    # after the start token 0: PAD, eos, a, b
          [1, 0, 0, 0],
          [0, .2, .5, .3],    # after a
          [0, .9, .06, .04]]  # after b


def test_the_worked_example_of_the_docstring():
  tokens, scores = search(markov_step(WORKED), {}, 1, beams=2, length=3, alpha=1.)
  assert tokens.tolist() == [[[3, 1, 0], [2, 3, 1]]]
  np.testing.assert_allclose(scores, [[math.log(.36) / (7 / 6), math.log(.135) / (8 / 6)]],
                             rtol=1e-5)
  assert greedy(markov_step(WORKED), {}, jnp.array([0]), length=3)[0].tolist() == [[2, 2, 2]]


def count_calls(step, rows, **kw):
  calls = []
  def counted(tokens, cache, index):
    jax.debug.callback(lambda: calls.append(tokens.shape), ordered=True)
    return step(tokens, cache, index)
  search(counted, {}, rows, **kw)
  jax.effects_barrier()
  return calls


def test_first_call_has_one_row_an_example():
  assert count_calls(markov_step(WORKED), 2, beams=3, length=3) == [(2, 1), (6, 1), (6, 1)]


def test_stops_when_no_live_hypothesis_can_win():
  # After token 1: finished .9 and .09 x .9; the best live has .09 x .09, whatever comes.
  probs = [[0, .9, .09, .01]] * V
  assert len(count_calls(markov_step(probs), 1, beams=2, length=50, alpha=0.)) == 2
  # With alpha 4, a long hypothesis at log(.09 * .09) / (55 / 6)**4 could still win: go on.
  assert len(count_calls(markov_step(probs), 1, beams=2, length=6, alpha=4.)) > 2


@pytest.mark.parametrize('seed', range(3))
def test_one_beam_is_greedy_where_the_end_is_sure(seed):
  # eos is improbable until the path reaches it, so that no early end is worth its score.
  rng = np.random.RandomState(seed)
  length = 6
  logits = rng.randn(2, (V + 1) ** length, V) * 2
  logits[..., EOS] = -20.
  for history in itertools.product(range(V), repeat=length - 2):
    for row in range(2):
      logits[row, at((row % V, *history)), EOS] = 20.
  step = history_step(logits)
  cache = {'self': {'seen': jnp.full((1, 2, length), 9)}, 'memory': jnp.arange(2)}
  tokens, scores = search(step, cache, beams=1, length=length, alpha=0.)
  best, log_p = map(np.asarray, greedy(step, cache, starts(2), length))
  assert (best[:, length - 2] == EOS).all()
  assert tokens[:, 0].tolist() == best.tolist()
  np.testing.assert_allclose(scores[:, 0], log_p, rtol=1e-5)


def test_finished_beats_live_however_improbable():
  probs = np.array([[0, .001, .999, 0]] * V)
  tokens, scores = search(markov_step(probs), {}, 1, beams=2, length=3, alpha=0.)
  assert tokens.tolist() == [[[1, 0, 0], [2, 1, 0]]]
  np.testing.assert_allclose(scores, np.log([[.001, .000999]]), rtol=1e-4)


def test_as_in_transformers_a_hypothesis_that_is_cut_off_counts_as_finished():
  probs = np.array([[0, .001, .999, 0]] * V)
  tokens, scores = search(markov_step(probs), {}, 1, beams=2, length=3, alpha=0.,
                          early_stopping='never')
  assert tokens.tolist() == [[[2, 2, 2], [1, 0, 0]]]
  np.testing.assert_allclose(scores, np.log([[.999 ** 3, .001]]), rtol=1e-4)


def test_nothing_finished_returns_live_and_fills_with_pad():
  probs = [[0, 0, .75, .25]] * V
  tokens, scores = search(markov_step(probs), {}, 1, beams=3, length=2, alpha=1.)
  assert tokens.tolist()[0][0] == [2, 2]
  assert sorted(tokens.tolist()[0][1:]) == [[2, 3], [3, 2]]
  np.testing.assert_allclose(scores[0, :2], np.log([.5625, .1875]) / (7 / 6), rtol=1e-5)
  # Two possible words for eight beams and one position: six slots are empty.
  tokens, scores = search(markov_step(probs), {}, 1, beams=8, length=1)
  assert tokens.tolist() == [[[2], [3]] + [[0]] * 6]
  assert (scores[0, 2:] == -np.inf).all()


def test_rows_are_independent():
  step, cache, _ = problem(5, 4)
  run = jax.jit(functools.partial(beam_search, step, eos=EOS, beams=3, length=4))
  both = run(cache, starts(2))
  swapped = run({**cache, 'memory': jnp.array([1, 0])}, starts(2)[::-1])
  for a, b in zip(both, swapped):
    np.testing.assert_allclose(a, np.asarray(b)[::-1], rtol=1e-6)


def test_cache_axes_can_grow_every_leaf():
  # A step that wants its own copy of 'cross' for each beam.
  step, cache, _ = problem(6, 4)
  def grown(tokens, cache, index):
    if 'cross' in cache and cache['cross']['row'].shape[0] > 2:
      own = cache['cross']['row']
      assert own.shape[0] == tokens.shape[0]
      logits, cache = step(tokens, {**cache, 'cross': {'row': own[::3]}}, index)
      return logits, {**cache, 'cross': {'row': own}}
    return step(tokens, cache, index)
  want = search(step, cache, beams=3, length=4)
  got = search(grown, cache, beams=3, length=4, cache_axes=[('cross/.*', 0), ('self/.*', 1)])
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a, b)


def test_bad_settings_are_named():
  go = functools.partial(beam_search, markov_step(WORKED), {}, jnp.zeros(1, jnp.int32), eos=EOS)
  with pytest.raises(UsageError, match='beams=0, length=3'):
    go(beams=0, length=3)
  with pytest.raises(UsageError, match="early_stopping must be one of exact, .*, got 'soon'"):
    go(beams=2, length=3, early_stopping='soon')
  with pytest.raises(UsageError, match="no row matches 'k'"):
    beam_search(lambda t, c, i: (jnp.zeros((1, V)), c), {'k': jnp.zeros(1)},
                jnp.zeros(1, jnp.int32), beams=2, length=2, eos=EOS, cache_axes=[('self', 0)])


@pytest.mark.parametrize('eos, best', [((1, 2), [3, 1]), ((1,), [1, 0])])
def test_with_several_ends_a_hypothesis_that_does_not_end_remains(eos, best):
  """p(1, 2, 3) = .4, .35, .25 at first; after 3 comes 1. log .25 / (7/6)^3 = -0.873 is better than
  log .4 = -0.916, but both ends are more probable than 3 after the first step."""
  first = jnp.log(jnp.array([1e-9, .4, .35, .25]))
  then = jnp.log(jnp.array([1e-9, 1., 1e-9, 1e-9]))
  step = lambda tokens, cache, index: (jnp.where(tokens == 3, then, first), cache)
  tokens, _ = beam_search(step, {}, jnp.zeros(1, jnp.int32), beams=1, length=2, eos=eos, alpha=3.)
  assert tokens[0, 0].tolist() == best
