"""Greedy decoding and sampling over table-driven step functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5lab.decoding.sample import keep_min_p, keep_top_k, keep_top_p, sample
from t5lab.errors import UsageError

EOS = 1


def table_step(table):
  """The next token's logits depend on the last token: table[V, V]."""
  table = jnp.asarray(table, jnp.float32)
  return lambda tokens, cache, index: (table[tokens[:, 0]], cache)


def chain_step(*chain, V=8):
  """After chain[i] most probably comes chain[i + 1]: logit 5, the others 0."""
  table = np.zeros((V, V), 'f')
  for a, b in zip(chain, chain[1:]):
    table[a, b] = 5.
  return table_step(table)


def decode(step, cache, start, **kw):
  """sample as one program: op by op it would compile dozens."""
  return jax.jit(functools.partial(sample, step, **kw))(cache, start)


LOG_P = 5. - np.log(np.exp(5.) + 7)  # of a step along the chain


def test_greedy_stops_at_eos_and_pads():
  step = chain_step(2, 3, 4, 5, EOS, 6, 6)
  tokens, scores = decode(step, {}, np.array([2, 4, 6]), length=6, eos=EOS)
  assert tokens.tolist() == [[3, 4, 5, 1, 0, 0], [5, 1, 0, 0, 0, 0], [6] * 6]
  np.testing.assert_allclose(scores, np.array([4, 2, 6]) * LOG_P, rtol=1e-5)
  assert tokens.dtype == jnp.int32 and scores.dtype == jnp.float32


def test_bfloat16_logits():
  table = jnp.asarray(np.log([[.1, .2, .7]] * 3), jnp.bfloat16)
  _, scores = decode(lambda t, c, i: (table[t[:, 0]], c), {}, jnp.array([0]), length=2, eos=EOS)
  want = jax.nn.log_softmax(table[0].astype(jnp.float32)).max() * 2
  np.testing.assert_allclose(scores, [want], rtol=1e-6)


def count_calls(step, *args, **kw):
  calls = []
  def counted(tokens, cache, index):
    jax.debug.callback(lambda i: calls.append(int(i)), index, ordered=True)
    return step(tokens, cache, index)
  decode(counted, *args, **kw)
  jax.effects_barrier()
  return calls


def test_stops_when_all_rows_have_ended():
  step = chain_step(2, 3, 4, EOS)
  assert count_calls(step, {}, jnp.array([2, 3]), length=50, eos=EOS) == [0, 1, 2]
  assert count_calls(step, {}, jnp.array([5]), length=3, eos=7) == [0, 1, 2]


def test_the_cache_may_change_on_the_first_call_and_is_carried():
  def step(tokens, cache, index):
    if 'memory' in cache:
      assert index == 0
      cache = {'self': jnp.zeros(tokens.shape[0], jnp.int32), 'cross': cache['memory'] * 2}
    seen = cache['self'] + 1
    return jax.nn.one_hot(cache['cross'] + seen, 16), {**cache, 'self': seen}

  tokens, _ = decode(step, {'memory': np.array([1, 4])}, jnp.zeros(2, jnp.int32), length=4, eos=EOS)
  assert tokens.tolist() == [[3, 4, 5, 6], [9, 10, 11, 12]]


def test_index_counts_positions():
  step = lambda tokens, cache, index: (jax.nn.one_hot(jnp.array([index + 2]), 9), cache)
  assert decode(step, {}, jnp.array([0]), length=5, eos=EOS)[0].tolist() == [[2, 3, 4, 5, 6]]


def test_prompts_of_different_lengths():
  # The sum of all tokens so far, modulo 7, plus 2: every prompt token matters.
  def step(tokens, cache, index):
    total = cache + tokens[:, 0]
    return 5. * jax.nn.one_hot(total % 7 + 2, 9), total

  def by_hand(context, n):
    out = []
    for _ in range(n):
      out.append(sum(context + out) % 7 + 2)
    return out

  start = jnp.array([4, 4, 4])
  prompt = jnp.array([[3, -1, -1], [0, 5, 6], [-1, -1, -1]])
  tokens, scores = decode(step, jnp.zeros(3, jnp.int32), start, length=4, eos=99, prompt=prompt)
  assert tokens.tolist() == [by_hand([4, 3], 4), by_hand([4, 0, 5, 6], 4), by_hand([4], 4)]
  np.testing.assert_allclose(scores, [4 * (5 - np.log(np.exp(5.) + 8))] * 3, rtol=1e-5)


def test_eos_inside_a_prompt_does_not_end_it():
  step = chain_step(2, 3, 4, EOS)
  prompt = jnp.array([[EOS, 2], [3, -1]])
  tokens, _ = decode(step, {}, jnp.array([5, 5]), length=4, eos=EOS, prompt=prompt)
  assert tokens.tolist() == [[3, 4, 1, 0], [4, 1, 0, 0]]


# ------------------------------------------------------------------------------- sampling


def kept(logits):
  return np.isfinite(np.asarray(logits)).tolist()


def test_top_k():
  logits = jnp.array([[1., 4., 2., 3.], [2., 2., 1., 0.]])
  assert kept(keep_top_k(logits, 2)) == [[False, True, False, True], [True, True, False, False]]
  assert kept(keep_top_k(logits, 1)) == [[False, True, False, False], [True, True, False, False]]
  np.testing.assert_array_equal(keep_top_k(logits, 99), logits)


def test_top_p():
  logits = jnp.log(jnp.array([.2, .5, .3]))
  assert kept(keep_top_p(logits, .4)) == [False, True, False]
  assert kept(keep_top_p(logits, .6)) == [False, True, True]
  assert kept(keep_top_p(logits, .9)) == [True, True, True]
  assert kept(keep_top_p(logits, 1e-9)) == [False, True, False]


def draws(n=4000, probs=(.1, .2, .3, .4), **kw):
  step = table_step(np.log([probs] * len(probs)))
  tokens, scores = decode(step, {}, jnp.zeros(n, jnp.int32), length=1, eos=EOS,
                          keys=jax.random.split(jax.random.key(0), n), **kw)
  tokens = np.asarray(tokens)
  return np.bincount(tokens[:, 0], minlength=len(probs)) / n, tokens[:, 0], scores


@pytest.mark.parametrize('kw, want', [
    (dict(temperature=1.), [.1, .2, .3, .4]),
    (dict(temperature=.5), np.array([1, 4, 9, 16]) / 30),
    (dict(temperature=1., top_k=2), [0, 0, 3 / 7, 4 / 7]),
    (dict(temperature=1., top_p=.65), [0, 0, 3 / 7, 4 / 7]),
    (dict(temperature=1., top_k=3, top_p=.5), [0, 0, 3 / 7, 4 / 7]),
])
def test_frequencies(kw, want):
  got, _, _ = draws(**kw)
  np.testing.assert_allclose(got, want, atol=4 * .5 / np.sqrt(4000))  # four standard deviations
  np.testing.assert_array_equal(got == 0, np.asarray(want) == 0)


def test_scores_are_the_models_own_whatever_the_filters():
  _, tokens, scores = draws(temperature=.7, top_k=2)
  np.testing.assert_allclose(scores, np.log([.1, .2, .3, .4])[tokens], rtol=1e-5)


def test_draws_depend_on_the_key_of_the_row_alone():
  step = table_step(np.zeros((9, 9)))
  def go(keys, prompt=None):
    tokens, _ = decode(step, {}, jnp.zeros(len(keys), jnp.int32), length=6, eos=99, temperature=1.,
                       keys=keys, prompt=prompt)
    return tokens.tolist()
  keys = jax.random.split(jax.random.key(0), 5)
  five = go(keys)
  assert go(keys[2:4]) == five[2:4]                  # neither on its place nor on its neighbours
  assert go(keys[jnp.array([1, 1])]) == [five[1]] * 2
  assert len(set(map(tuple, five))) == 5
  assert len(set(five[0])) > 1                       # a fresh draw at each position
  # nor on its prompt, nor on how far the prompts are padded
  prompt = jnp.array([[-1, -1, -1], [3, -1, -1], [3, 4, 5], [5, 5, -1], [2, 2, 2]])
  assert go(keys, prompt) == five


def test_min_p():
  logits = jnp.log(jnp.array([[.5, .3, .2]]))
  for p, kept in ((.3, 3), (.5, 2), (.7, 1), (1., 1)):
    assert jnp.sum(keep_min_p(logits, p) > -jnp.inf) == kept


def test_bad_settings_are_named():
  go = functools.partial(sample, table_step(np.zeros((3, 3))), {}, jnp.zeros(1, jnp.int32), eos=1)
  with pytest.raises(UsageError, match='1 or more, got 0'):
    go(length=0)
  with pytest.raises(UsageError, match='top_p=1.5'):
    go(length=1, temperature=1., top_p=1.5)
  with pytest.raises(UsageError, match='temperature=0.5 needs keys'):
    go(length=1, temperature=.5)
