"""The train step: microbatches, chunks, the average, dropout keys, donation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_models import random_params

from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.training import optim, steps

# A decoder compiles in half the time of an encoder-decoder.
CONFIG = TransformerConfig(vocab_size=64, d_model=32, d_ff=64, n_heads=4, d_head=8, enc_layers=0,
                           dec_layers=2, acts=('gelu', 'linear'), tied=False, scale_logits=False)
MODEL = Transformer(CONFIG, train=True)
TX = optim.optimizer('adamw', 1e-2, clip=1., weight_decay=0.1)


@pytest.fixture(scope='module')
def batch():
  r = np.random.RandomState(0)
  tokens = lambda n: r.randint(2, 64, (8, n)).astype(np.int32)
  targets = tokens(6)
  weights = (np.arange(6) < r.randint(1, 7, (8, 1))).astype(np.int32)   # uneven rows
  return {'decoder_input_tokens': np.roll(targets, 1, 1),
          'decoder_target_tokens': targets, 'decoder_loss_weights': weights}


@functools.cache
def stepper(microbatches=1, chunks=1):
  """The compiled update of arrays of the shapes of `state` and `batch`; it donates the state."""
  return jax.jit(functools.partial(
      steps.train_step, model=MODEL, tx=TX, loss=steps.Loss(1e-4, 0.1, chunks), ema=0.9,
      microbatches=microbatches), donate_argnums=0)


@pytest.fixture(scope='module')
def state():
  """On the host: each step donates its own copy."""
  return jax.device_get(steps.new_state(random_params(CONFIG), TX, 0.9))


@pytest.fixture(scope='module')
def stepped(state, batch):
  return stepper()(state, batch)


def close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def test_four_microbatches_in_chunks_equal_one_batch(state, batch, stepped):
  """Four parts of the rows, and three of each row's logits."""
  whole, m = stepped
  parts, n = stepper(microbatches=4, chunks=3)(state, batch)
  close(m, n, rtol=2e-5)
  close(whole.opt_state[1].mu, parts.opt_state[1].mu, rtol=1e-3, atol=1e-6)


def test_memory_stays_flat_in_the_number_of_microbatches(state, batch):
  def temporaries(k, rows):
    big = jax.tree.map(lambda x: np.tile(x, (rows // 8, 1)), batch)
    f = jax.jit(lambda params, batch: steps.gradients(
        MODEL, params, batch, steps.Loss(1e-4, 0.1), jax.random.key(0), k))
    return f.lower(state.params, big).compile().memory_analysis().temp_size_in_bytes
  one = temporaries(1, 512)
  two, eight = temporaries(2, 1024), temporaries(8, 4096)
  assert eight < 1.1 * two < 1.5 * one


def test_the_loss_falls_and_the_step_number_rises(state, batch):
  s, losses = state, []
  for _ in range(8):
    s, m = stepper()(s, batch)
    losses.append(float(m['loss']))
  assert int(s.step) == 8 and losses[-1] < losses[0] - 0.5


def test_loss_is_a_mean_over_loss_tokens(state, batch, stepped):
  """Four rows without loss change nothing else than four that repeat the others."""
  assert float(stepped[1]['tokens']) == batch['decoder_loss_weights'].sum()
  twice = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), batch)
  weights = twice['decoder_loss_weights'] * (np.arange(8) < 4)[:, None].astype(np.int32)
  _, m = stepper()(state, {**batch, 'decoder_loss_weights': weights})
  _, n = stepper()(state, twice)
  assert n['tokens'] == 2 * m['tokens'] == 2 * batch['decoder_loss_weights'][:4].sum()
  np.testing.assert_allclose(n['loss'], m['loss'], rtol=1e-5)
  np.testing.assert_allclose(n['grad_norm'], m['grad_norm'], rtol=1e-4)


def test_average_follows_the_parameters_in_float32(state, batch, stepped):
  s, _ = stepped
  d = min(0.9, 1 / 10)                                   # the first decay of the ramp
  expected = jax.tree.map(lambda e, p: d * e + (1 - d) * p, state.ema, s.params)
  close(s.ema, expected, rtol=1e-5, atol=1e-7)
  assert steps.new_state(state.params, TX, 0.).ema == {}
  off, _ = jax.eval_shape(functools.partial(
      steps.train_step, model=MODEL, tx=TX, loss=steps.Loss(), ema=0.),
      dataclasses.replace(state, ema={}), batch)
  assert off.ema == {}


def test_dropout_is_a_function_of_seed_and_step(state, batch):
  model = Transformer(dataclasses.replace(CONFIG, dropout=0.3), train=True)
  @jax.jit
  def loss(state, seed):
    return steps.train_step(state, batch, model=model, tx=TX, loss=steps.Loss(1e-4, 0.1), ema=0.9,
                            seed=seed)[1]['loss']
  first = loss(state, 0)
  assert loss(state, 0) == first
  later = loss(dataclasses.replace(state, step=state.step + 1), 0)
  assert len({float(x) for x in (first, later, loss(state, 1))}) == 3


def test_the_buffers_of_a_donated_state_are_all_reused(state, batch):
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  memory = stepper().lower(state, batch).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= size
