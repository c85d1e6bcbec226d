"""Experts: routing by hand, a dense loop over them, the statistics, the step that adds them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, random_params

from t5lab.models.families import TransformerConfig
from t5lab.models.moe import Moe, route
from t5lab.models.transformer import Transformer
from t5lab.training import optim, steps

REAL = np.ones((1, 6), bool)
route_step = jax.jit(route, static_argnums=(2, 3))


def routed(probs, real, top_k, capacity):
  """{(token, expert, place): gate}, and which choices were dropped."""
  combine, dropped = route_step(
      np.array([probs], np.float32), np.array(real)[None] > 0, top_k, capacity)
  combine = np.asarray(combine)
  return ({tuple(map(int, at[1:])): round(float(combine[tuple(at)]), 6)
           for at in np.argwhere(combine)}, np.asarray(dropped)[0].astype(int).tolist())


def test_the_later_token_is_dropped():
  probs = [[.9, .1], [.8, .2], [.7, .3], [.4, .6]]
  places, dropped = routed(probs, [1, 1, 1, 1], top_k=1, capacity=2)
  assert places == {(0, 0, 0): .9, (1, 0, 1): .8, (3, 1, 0): .6}
  assert dropped == [[0], [0], [1], [0]]


def test_padding_takes_no_place():
  probs = [[.9, .1], [.8, .2], [.7, .3], [.4, .6]]
  places, dropped = routed(probs, [1, 0, 1, 0], top_k=1, capacity=2)
  assert places == {(0, 0, 0): .9, (2, 0, 1): .7}
  assert dropped == [[0], [0], [0], [0]]


def test_first_choices_are_placed_before_second_ones_and_two_gates_sum_to_one():
  probs = [[.6, .3, .1], [.2, .7, .1], [.1, .2, .7]]
  places, dropped = routed(probs, [1, 1, 1], top_k=2, capacity=1)
  # experts 0, 1, 2 are full of first choices before token 0 asks expert 1 for its second
  assert places == {(0, 0, 0): round(.6 / .9, 6), (1, 1, 0): round(.7 / .9, 6),
                    (2, 2, 0): round(.7 / .9, 6)}
  assert dropped == [[0, 1], [0, 1], [0, 1]]
  places, dropped = routed(probs, [1, 1, 1], top_k=2, capacity=2)
  # expert 1 has the first choice of token 1 at place 0, then the second one of token 0
  assert places == {(0, 0, 0): .666667, (0, 1, 1): .333333, (1, 1, 0): .777778, (1, 0, 1): .222222,
                    (2, 2, 0): .777778}
  assert dropped == [[0, 0], [0, 0], [0, 1]]


def config(**changes):
  return TransformerConfig(**{**dict(d_model=8, d_ff=12, experts=4, acts=('gelu', 'linear'),
                                     eval_capacity_factor=4.), **changes})


@functools.cache
def compiled(c, train=False):
  return jax.jit(functools.partial(Moe(c, train).apply, mutable=['router']))


def layer(c, x, real=None, router=None):
  """(output, parameters, statistics) of one mixture."""
  real = np.ones(x.shape[:2], bool) if real is None else real
  r = np.random.RandomState(3)
  shapes = jax.eval_shape(Moe(c, False).init, jax.random.key(0), x, real)['params']
  params = jax.tree.map(lambda s: r.randn(*s.shape).astype(np.float32) / np.sqrt(s.shape[-2]),
                        jax.tree.map(lambda b: b.value, shapes,
                                     is_leaf=lambda b: hasattr(b, 'value')))
  if router is not None:
    params['router'] = np.asarray(router, np.float32)
  y, collected = compiled(c)({'params': params}, x, real)
  return np.asarray(y), params, {k: np.asarray(v[0]) for k, v in collected['router'].items()}


@pytest.mark.parametrize('top_k', [1, 2])
def test_the_layer_is_a_loop_over_experts(top_k):
  c = config(expert_top_k=top_k)
  x = np.random.RandomState(0).randn(2, 7, 8).astype(np.float32)
  real = np.arange(7) < np.array([[7], [4]])
  y, p, statistics = layer(c, x, real)
  probs = np.asarray(jax.nn.softmax(x @ p['router']))
  gates = np.sort(probs)[..., -top_k:]                 # of the tokens' best
  gates = np.where(probs >= gates[..., :1], probs, 0)
  if top_k > 1:
    gates /= gates.sum(-1, keepdims=True)
  want = np.zeros_like(x)
  for e in range(4):
    w = {k: v[e] for k, v in p['experts'].items()}
    h = np.asarray(jax.nn.gelu(x @ w['wi_0'])) * (x @ w['wi_1'])
    want += gates[..., e:e + 1] * (h @ w['wo'])
  want[1, 4:] = 0                                      # padding has no expert
  np.testing.assert_allclose(y, want, atol=2e-6)
  assert not statistics['dropped'].any()


def test_capacity_of_training_and_of_evaluation():
  """8 tokens that all want expert 0 of 4: ceil(8 / 4 * factor) find a place."""
  c = config(capacity_factor=1.25, eval_capacity_factor=2.)
  x, real = np.random.RandomState(0).randn(1, 8, 8).astype(np.float32), np.ones((1, 8), bool)
  params = layer(c, x, router=np.zeros((8, 4)))[1]     # ties go to the first
  for train, places in ((True, 3), (False, 4)):
    y = np.asarray(compiled(c, train)({'params': params}, x, real)[0])
    assert np.abs(y[0]).any(-1).tolist() == [True] * places + [False] * (8 - places)


def test_balance_is_1_when_even_and_the_number_of_experts_when_all_go_to_one():
  c, eye = config(d_model=4), np.eye(4, dtype=np.float32)
  even = layer(c, eye[None], router=3 * eye)[2]
  np.testing.assert_allclose(even['balance'], [1.], rtol=1e-6)
  one = layer(c, np.tile(eye[:1], (1, 4, 1)), router=50 * eye)[2]
  np.testing.assert_allclose(one['balance'], [4.], rtol=1e-6)
  # a row is a group: one even, one not; padding counts nowhere
  rows = np.stack([eye, eye[[0, 0, 1, 2]]])
  real = np.array([[1, 1, 1, 1], [1, 1, 0, 0]]) > 0
  np.testing.assert_allclose(layer(c, rows, real, 50 * eye)[2]['balance'], [1., 4.], rtol=1e-6)
  two = layer(config(d_model=4, expert_top_k=2), eye[None], router=3 * (eye + eye[[1, 2, 3, 0]]))
  np.testing.assert_allclose(two[2]['balance'], [2.], rtol=1e-6)


def test_router_z_by_hand():
  """Logits (2, 0, 0, 0) and (0, 1, 0, 0): log(e^2 + 3) = 2.340753 and log(e + 3) = 1.743668."""
  x = np.eye(4, dtype=np.float32)[None, :3]
  real = np.array([[True, True, False]])
  got = layer(config(d_model=4), x, real, np.diag([2, 1, 5, 5]))[2]['router_z']
  np.testing.assert_allclose(got, [(2.340753 ** 2 + 1.743668 ** 2) / 2], rtol=1e-6)


# One layer of two has experts; 8 tokens of which each expert takes 2.
STEP = dataclasses.replace(CONFIGS['switch'], enc_layers=2, dec_layers=2, eval_capacity_factor=1.)


@functools.cache
def train_step(microbatches):
  tx = optim.optimizer('adamw', 1e-3)
  loss = steps.Loss(1e-4, balance=0.1, router_z=0.01)
  step = lambda params, batch: steps.train_step(
      steps.new_state(params, tx, 0.), batch, model=Transformer(STEP), tx=tx, loss=loss, ema=0.,
      microbatches=microbatches)
  return jax.jit(step)


def batch(encoder_real):
  r = np.random.RandomState(1)
  tokens = lambda: r.randint(2, 48, (4, 8)).astype(np.int32)
  ones = np.ones((4, 8), np.int32)
  return {'encoder_input_tokens': tokens(), 'decoder_input_tokens': tokens(),
          'encoder_segment_ids': (np.arange(8) < np.array(encoder_real)[:, None]).astype(np.int32),
          'decoder_target_tokens': tokens(), 'decoder_segment_ids': ones,
          'decoder_loss_weights': ones}


def zero_routers(params):
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x * 0 if 'router' in jax.tree_util.keystr(path) else x, params)


def test_metrics_of_a_step_whose_tokens_all_want_one_expert():
  params = zero_routers(random_params(STEP))
  _, metrics = train_step(1)(params, batch([8, 8, 8, 8]))
  # 6 of 8 in the encoder's and in the decoder's one mixture; logits are 0, so is what they prefer
  assert float(metrics['dropped']) == pytest.approx(0.75)
  assert float(metrics['balance']) == pytest.approx(1.)
  assert float(metrics['router_z']) == pytest.approx(np.log(4) ** 2)
  # encoder rows of 4 real tokens drop 2 of them, rows of 2 drop none
  _, metrics = train_step(1)(params, batch([4, 4, 2, 2]))
  assert float(metrics['dropped']) == pytest.approx(((2 / 4 + 0) / 2 + 0.75) / 2)
  # and the loss has both terms
  plain = jax.jit(lambda p, b: steps.loss_sums(Transformer(STEP), p, b, steps.Loss(1e-4)))(
      params, batch([4, 4, 2, 2]))
  np.testing.assert_allclose(
      metrics['loss'], plain['loss'] / 32 + 0.1 * 1 + 0.01 * np.log(4) ** 2, rtol=1e-5)


def test_a_batch_in_parts_is_the_whole_batch():
  params, given = random_params(STEP), batch([8, 4, 2, 6])
  given['decoder_loss_weights'] = (np.arange(8) < np.array([[8], [3], [5], [1]])).astype(np.int32)
  whole, want = train_step(1)(params, given)
  parts, got = train_step(2)(params, given)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5, err_msg=name)
  assert float(want['dropped']) > 0.02
  # Adam's first moment is the gradient
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-7),
               parts.opt_state[0].mu, whole.opt_state[0].mu)


@pytest.mark.parametrize('statistic', [None, 'balance', 'router_z'])
def test_routers_learn_from_the_output_and_from_each_term(statistic):
  c, x = config(), np.random.RandomState(0).randn(1, 6, 8).astype(np.float32)
  params = layer(c, x)[1]
  def value(router):
    y, out = Moe(c, False).apply({'params': {**params, 'router': router}}, x, REAL,
                                 mutable='router')
    return out['router'][statistic][0].sum() if statistic else y.sum()
  assert jnp.abs(jax.jit(jax.grad(value))(params['router'])).max() > 1e-3
