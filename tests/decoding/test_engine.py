"""Requests in any order and length, few shapes, results as one at a time."""

import jax.numpy as jnp
import numpy as np

from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding

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
