"""The train step: microbatches, chunks, the average, dropout keys, donation."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.training import optim, steps

CONFIG = TransformerConfig(vocab_size=64, d_model=32, d_ff=64, n_heads=4, d_head=8, enc_layers=2,
                           dec_layers=2, acts=('gelu', 'linear'), tied=False, scale_logits=False)
TX = optim.optimizer('adamw', 1e-2, clip=1., weight_decay=0.1)


@pytest.fixture(scope='module')
def batch():
  r = np.random.RandomState(0)
  tokens = lambda n: r.randint(2, 64, (8, n)).astype(np.int32)
  targets = tokens(6)
  weights = (np.arange(6) < r.randint(1, 7, (8, 1))).astype(np.int32)   # uneven rows
  return {'encoder_input_tokens': tokens(7), 'decoder_input_tokens': np.roll(targets, 1, 1),
          'decoder_target_tokens': targets, 'decoder_loss_weights': weights}


@functools.cache
def stepper(dropout=0., microbatches=1, ema=0.9, chunks=1, seed=0):
  model = Transformer(dataclasses.replace(CONFIG, dropout=dropout), train=True)
  return jax.jit(functools.partial(
      steps.train_step, model=model, tx=TX, loss=steps.Loss(1e-4, 0.1, chunks), ema=ema, seed=seed,
      microbatches=microbatches))


@pytest.fixture(scope='module')
def state(batch):
  params = nn.unbox(steps.init_params(Transformer(CONFIG), 0, batch))
  return steps.new_state(params, TX, 0.9)


def close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


@pytest.mark.parametrize('k', [2, 4])
def test_k_microbatches_equal_one_batch(state, batch, k):
  whole, m = stepper()(state, batch)
  parts, n = stepper(microbatches=k)(state, batch)
  close(m, n, rtol=2e-5)
  close(whole.opt_state[1].mu, parts.opt_state[1].mu, rtol=1e-3, atol=1e-6)


def test_chunked_logits_equal_whole_ones(state, batch):
  a, m = stepper()(state, batch)
  b, n = stepper(chunks=3)(state, batch)
  close(m, n, rtol=2e-5)


def test_memory_stays_flat_in_the_number_of_microbatches(state, batch):
  def temporaries(k, rows):
    big = jax.tree.map(lambda x: np.tile(x, (rows // 8, 1)), batch)
    return stepper(microbatches=k).lower(state, big).compile().memory_analysis().temp_size_in_bytes
  one = temporaries(1, 512)
  two, eight = temporaries(2, 1024), temporaries(8, 4096)
  assert eight < 1.1 * two < 1.5 * one


def test_the_loss_falls_and_the_step_number_rises(state, batch):
  s, losses = state, []
  for _ in range(8):
    s, m = stepper()(s, batch)
    losses.append(float(m['loss']))
  assert int(s.step) == 8 and losses[-1] < losses[0] - 0.5


def test_loss_is_a_mean_over_loss_tokens(state, batch):
  _, m = stepper()(state, batch)
  assert float(m['tokens']) == batch['decoder_loss_weights'].sum()
  twice = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
  _, n = stepper()(state, twice)
  np.testing.assert_allclose(n['loss'], m['loss'], rtol=1e-5)
  np.testing.assert_allclose(n['grad_norm'], m['grad_norm'], rtol=1e-4)


def test_average_follows_the_parameters_in_float32(state, batch):
  s, _ = stepper()(state, batch)
  d = min(0.9, 1 / 10)                                   # the first decay of the ramp
  expected = jax.tree.map(lambda e, p: d * e + (1 - d) * p, state.ema, s.params)
  close(s.ema, expected, rtol=1e-5, atol=1e-7)
  off, _ = stepper(ema=0.)(dataclasses.replace(state, ema={}), batch)
  assert off.ema == {}


def test_dropout_is_a_function_of_seed_and_step(state, batch):
  run = stepper(dropout=0.3)
  _, a = run(state, batch)
  _, b = run(state, batch)
  assert a['loss'] == b['loss']
  _, later = run(dataclasses.replace(state, step=state.step + 1), batch)
  _, other = stepper(dropout=0.3, seed=1)(state, batch)
  assert len({float(m['loss']) for m in (a, later, other)}) == 3


def test_the_buffers_of_a_donated_state_are_all_reused(state, batch):
  model = Transformer(CONFIG, train=True)
  f = jax.jit(functools.partial(steps.train_step, model=model, tx=TX, loss=steps.Loss(), ema=0.9),
              donate_argnums=0)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  assert f.lower(state, batch).compile().memory_analysis().alias_size_in_bytes >= size
