"""Requests in any order and length, few shapes, results as one at a time."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding
from t5lab.errors import UsageError

V, EOS = 32, 1


def machine():
  """A 'model' that writes its input's tokens back, one a step, then EOS; shapes are recorded."""
  shapes = []

  def start(params, inputs, segments, length):
    shapes.append(inputs.shape)
    return {'self': {'at': jnp.zeros((1, inputs.shape[0]), jnp.int32)}, 'inputs': inputs}

  def step(params, tokens, cache, index):
    at = cache['self']['at'][0]
    rows = jnp.repeat(cache['inputs'], tokens.shape[0] // cache['inputs'].shape[0], 0)
    rows = jnp.pad(rows, ((0, 0), (0, 1)))
    token = jnp.take_along_axis(rows, at[:, None], 1)[:, 0]
    logits = 9. * (jnp.arange(V) == jnp.where(token > 0, token, EOS)[:, None])
    return logits, {'self': {'at': cache['self']['at'] + 1}, 'inputs': cache['inputs']}

  return start, step, shapes


def test_order_is_kept_and_shapes_are_few(rng):
  start, step, shapes = machine()
  engine = Engine(start, step, eos=EOS, start_id=0, batch_size=4)
  requests = [list(rng.integers(2, V, n)) for n in rng.integers(1, 40, 21)]
  done = []
  out = engine.generate({}, requests, Decoding(length=48), tick=lambda d, t: done.append((d, t)))
  for request, row in zip(requests, out):
    assert row.tolist() == request + [EOS] + [0] * (47 - len(request))
  assert set(shapes) == {(4, 16), (4, 32), (4, 64), (1, 64)}
  assert done[-1] == (21, 21) and len(done) == 6


def test_beams_and_greedy_agree_where_there_is_one_answer():
  start, step, _ = machine()
  engine = Engine(start, step, eos=EOS, start_id=0, batch_size=2)
  requests = [[5, 6, 7], [8], [9, 10]]
  greedy = engine.generate({}, requests, Decoding(length=6))
  np.testing.assert_array_equal(engine.generate({}, requests, Decoding(length=6, beams=3)), greedy)


def test_a_decoder_only_request_is_continued_after_its_own_length():
  def start(params, inputs, segments, length):
    return {'self': jnp.zeros((1, inputs.shape[0], length))}

  def step(params, tokens, cache, index):                 # counts up from the last token
    return 9. * (jnp.arange(V) == tokens + 1), cache
  engine = Engine(start, step, eos=EOS, start_id=None, batch_size=2)
  out = engine.generate({}, [[4], [9, 20], [7, 7, 7]], Decoding(length=3))
  assert out.tolist() == [[5, 6, 7], [21, 22, 23], [8, 9, 10]]


def test_no_requests():
  start, step, _ = machine()
  engine = Engine(start, step, eos=EOS, start_id=0)
  assert engine.generate({}, [], Decoding(length=5)).shape == (0, 5)


# -- several outputs for each request --------------------------------------------------------------

SAMPLING = Decoding(length=8, temperature=1., seed=3)


@functools.cache
def uniform(batch_size, start_id=0):
  """An engine whose model finds all tokens but EOS equally probable."""
  def start(params, inputs, segments, length):
    return {'self': jnp.zeros((1, inputs.shape[0]))}

  def step(params, tokens, cache, index):
    return jnp.where(jnp.arange(V) == EOS, -1e9, jnp.zeros((len(tokens), V))), cache
  prefill = None if start_id == 0 else lambda params, tokens, cache: cache
  return Engine(start, step, prefill, eos=EOS, start_id=start_id, batch_size=batch_size)


@pytest.mark.parametrize('start_id', [0, None], ids=['encoder_decoder', 'decoder'])
def test_a_sample_depends_on_the_seed_and_the_place_of_its_request_alone(start_id):
  """Not on batches, on longer or shorter neighbours, on padding or on what is read at once."""
  request = [5] * 12
  run = lambda size, requests, n=None: uniform(size, start_id).generate({}, requests, SAMPLING, n=n)
  alike = run(8, [request] * 20)
  assert len({tuple(row) for row in alike.tolist()}) == 20
  np.testing.assert_array_equal(run(3, [request] * 20), alike)
  mixed = [request if i % 3 else [7] * (i + 1) for i in range(20)]
  np.testing.assert_array_equal(run(8, mixed), alike)
  np.testing.assert_array_equal(run(8, [*mixed, [6] * 70])[:20], alike)
  rest = uniform(8, start_id).generate({}, [request] * 5, SAMPLING, place=15)
  np.testing.assert_array_equal(rest, alike[15:])
  other = uniform(8, start_id).generate({}, [request] * 20, Decoding(8, temperature=1., seed=4))
  assert not (other == alike).all(axis=1).any()


def test_n_samples_are_all_different_and_the_first_is_the_one_without_n():
  requests = [[5], [6, 7], [8]]
  one = uniform(4).generate({}, requests, SAMPLING)
  many = uniform(4).generate({}, requests, SAMPLING, n=50)
  assert many.shape == (3, 50, 8) and len({tuple(row) for row in many.reshape(150, 8)}) == 150
  np.testing.assert_array_equal(many[:, 0], one)
  np.testing.assert_array_equal(uniform(4).generate({}, requests, SAMPLING, n=2), many[:, :2])


def test_n_best_hypotheses():
  """Probably 2, then 3, then 4, and the end after it."""
  first = jnp.where(jnp.arange(V) < 2, -99., -1. * jnp.arange(V))
  end = jnp.where(jnp.arange(V) == EOS, 0., -99.)
  start = lambda params, inputs, segments, length: {'self': jnp.zeros((1, inputs.shape[0]))}
  step = lambda params, tokens, cache, index: (
      jnp.tile(jnp.where(index == 0, first, end), (len(tokens), 1)), cache)
  engine = Engine(start, step, eos=EOS, start_id=0, batch_size=2)
  beams = Decoding(length=2, beams=3)
  for n, best in ((2, [[2, EOS], [3, EOS]]), (None, [2, EOS])):
    assert engine.generate({}, [[5]] * 3, beams, n=n).tolist() == [best] * 3


@pytest.mark.parametrize('decoding, n', [
    (Decoding(4), 2), (Decoding(4, beams=2), 3), (Decoding(4, beams=2, temperature=1.), 3),
    (SAMPLING, 0)])
def test_n_needs_beams_or_a_temperature(decoding, n):
  with pytest.raises(UsageError, match=f'got n={n} with beams={decoding.beams}'):
    uniform(4).generate({}, [[5]], decoding, n=n)


@pytest.mark.parametrize('beams', [1, 2, 3])
def test_any_of_several_ids_ends_a_text(beams):
  """Written as EOS, whichever it was; with beams all hypotheses may end in each of them at once."""
  start, step, _ = machine()
  engine = Engine(start, step, eos=EOS, start_id=0, batch_size=2)
  requests = [[5, 9, 6], [11, 7], [8, 7]]
  out = engine.generate({}, requests, Decoding(length=4, beams=beams, stop_ids=(EOS, 9, 11)))
  assert out.tolist() == [[5, EOS, 0, 0], [EOS, 0, 0, 0], [8, 7, EOS, 0]]
