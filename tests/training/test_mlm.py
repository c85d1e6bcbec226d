"""BERT's two losses, from examples to the update: by hand, in microbatches, on meshes."""

import functools

import jax
import numpy as np
import optax
import pytest
from small_models import CONFIGS, next_sentence, random_params

from t5lab.data.batches import features
from t5lab.errors import UsageError
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.training import steps

CONFIG = CONFIGS['bert']                     # two layers of 16, 48 ids
MODEL = Transformer(CONFIG)
CLS, SEP, MASK, LENGTH = 2, 1, 3, 14
TX = optax.adam(5e-3)


def example(r, pair=True):
  """A pair of random texts. Of four predicted tokens two are masked, one is random, one kept."""
  a, b = (r.randint(4, 48, r.randint(2, 6)) for _ in range(2))
  targets = np.array([CLS, *a, SEP, *b, SEP], np.int32)
  inputs, weights = targets.copy(), np.zeros_like(targets)
  predicted = r.permutation(np.flatnonzero(targets > MASK))[:r.randint(1, 5)]
  weights[predicted] = 1
  inputs[predicted[:2]] = MASK
  inputs[predicted[2:3]] = 40
  out = {'inputs': inputs, 'targets': targets, 'weights': weights}
  if pair:
    out['types'] = np.repeat([0, 1], [len(a) + 2, len(b) + 1])
    out['next'] = np.array([r.randint(2)])
  return out


def make_batch(form, rows):
  """Model features of lists of examples, one list per row."""
  built = [features.build_row(row, {'inputs': LENGTH}, kind='encoder', form=form, eos=SEP)
          for row in rows]
  return {name: np.stack([row[name] for row in built]) for name in built[0]}


@pytest.fixture(scope='module')
def examples():
  r = np.random.RandomState(5)
  return [example(r) for _ in range(6)]


@pytest.fixture(scope='module')
def batch(examples):
  """Eight rows; 3 and 7 are empty, so that the last of four microbatches has no loss at all."""
  a, b, c, d, e, f = ([x] for x in examples)
  return make_batch('nsp', [a, b, c, [], d, e, f, []])


@pytest.fixture(scope='module')
def state():
  return steps.new_state(random_params(CONFIG), TX, 0.)


@functools.cache
def stepper(microbatches=1, **loss):
  return jax.jit(functools.partial(steps.train_step, model=MODEL, tx=TX, loss=steps.Loss(**loss),
                               ema=0., microbatches=microbatches))


@pytest.fixture(scope='module')
def stepped(state, batch):
  return stepper()(state, batch)


def gradient(state):
  return jax.tree.map(lambda m: np.asarray(m) / 0.1, state.opt_state[0].mu)   # after one step


def close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def by_hand(logits, targets):
  """float64 losses [...] and hits [...] of logits [..., V]."""
  x = np.asarray(logits, np.float64)
  log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], x.argmax(-1) == targets


def test_both_losses_follow_from_the_logits(state, batch, stepped):
  apply = lambda method: jax.jit(functools.partial(MODEL.apply, method=method))(
      {'params': state.params}, batch)
  loss, hit = by_hand(apply('__call__'), batch['encoder_target_tokens'])
  next_loss, next_hit = by_hand(apply(next_sentence), batch['encoder_next_labels'][:, 0])
  predicted, rows = batch['encoder_loss_weights'] > 0, batch['encoder_next_weights'][:, 0] > 0
  # tokens that are not masked are predicted too
  assert predicted.sum() == 15 and (batch['encoder_input_tokens'] == MASK).sum() == 10
  assert rows.sum() == 6 and 0 < batch['encoder_next_labels'].sum() < 6
  expected = {'loss': loss[predicted].mean() + next_loss[rows].mean(),
          'accuracy': hit[predicted].mean(), 'tokens': 15, 'z_loss': 0,
          'nsp_loss': next_loss[rows].mean(), 'nsp_accuracy': next_hit[rows].mean()}
  got = dict(stepped[1])
  assert got.pop('grad_norm') > 0 and got.pop('param_norm') > 0
  close(got, expected, rtol=1e-5)
  sums = jax.jit(functools.partial(steps.eval_step, model=MODEL))(state.params, batch)
  close(dict(sums), {
      'loss': loss[predicted].sum(), 'z_loss': 0, 'weight': 15, 'correct': hit[predicted].sum(),
      'nsp_loss': next_loss[rows].sum(), 'nsp_weight': 6, 'nsp_correct': next_hit[rows].sum()},
        rtol=1e-5)


def test_the_gradient_is_of_the_sum_of_both_means(state, batch, stepped):
  def loss(params):
    given = {'params': params}
    mean = lambda logits, targets, weights: (optax.softmax_cross_entropy_with_integer_labels(
        logits, targets) * weights).sum() / weights.sum()
    tokens = MODEL.apply(given, batch)
    pairs = MODEL.apply(given, batch, method=next_sentence)
    return (mean(tokens, batch['encoder_target_tokens'], batch['encoder_loss_weights'])
            + mean(pairs, batch['encoder_next_labels'][:, 0], batch['encoder_next_weights'][:, 0]))
  expected = jax.jit(jax.grad(loss))(state.params)
  for head in ('nsp', 'pooler', 'mlm_dense'):
    assert np.abs(expected[head]['kernel']).max() > 1e-3
  close(gradient(stepped[0]), expected, rtol=1e-4, atol=1e-6)


def test_four_microbatches_in_chunks_equal_one_batch(state, batch, stepped):
  parts, metrics = stepper(microbatches=4, chunks=4)(state, batch)
  close(metrics, stepped[1], rtol=2e-5)
  close(gradient(parts), gradient(stepped[0]), rtol=1e-4, atol=1e-6)


def test_thirty_steps_bring_both_losses_down(state, batch, stepped):
  s, first = stepped
  for _ in range(30):
    s, last = stepper()(s, batch)
  assert first['loss'] - first['nsp_loss'] > 4 and first['nsp_loss'] > 0.6
  assert last['loss'] - last['nsp_loss'] < 2.5 and last['nsp_loss'] < 0.1
  assert last['accuracy'] > first['accuracy'] and last['nsp_accuracy'] == 1


def test_eight_devices_equal_one(state, batch, stepped):
  mesh = sharding.make_mesh(8, 1)
  boxed, _ = steps.abstract_params(MODEL, batch)
  params = jax.tree.map(jax.device_put, state.params, sharding.shardings(boxed, mesh, 'fsdp'))
  with sharding.use(mesh, 'fsdp'):
    spread, metrics = stepper(z_loss=0.)(
        steps.new_state(params, TX, 0.), sharding.put(batch, mesh))
  assert spread.params['pooler']['kernel'].sharding.num_devices == 8
  close(metrics, stepped[1], rtol=1e-5)
  close(gradient(spread), gradient(stepped[0]), rtol=1e-4, atol=1e-6)


def test_without_pairs_texts_are_packed_and_only_tokens_count(state):
  r = np.random.RandomState(1)
  texts = [x for x in (example(r, pair=False) for _ in range(40)) if len(x['inputs']) == 7][:2]
  sums = jax.jit(functools.partial(steps.eval_step, model=MODEL))
  packed = sums(state.params, make_batch('mlm', [texts, []]))
  assert sorted(packed) == ['correct', 'loss', 'weight', 'z_loss'] and packed['weight'] > 2
  close(sums(state.params, make_batch('mlm', [[x] for x in texts])), packed, rtol=1e-5)


def test_targets_that_do_not_fit_the_model_are_an_error(batch):
  params = jax.eval_shape(functools.partial(steps.init_params, MODEL, 0), batch)
  one = dict(batch, encoder_target_tokens=batch['encoder_target_tokens'][:, :1])
  message = '1 targets per row, but the model predicts 14 with model.classes=0'
  with pytest.raises(UsageError, match=message):
    jax.eval_shape(functools.partial(steps.eval_step, model=MODEL), params, one)


def test_both_losses_read_one_pass_of_the_encoder(batch):
  params = jax.eval_shape(functools.partial(steps.init_params, MODEL, 0), batch)
  program = str(jax.make_jaxpr(functools.partial(steps.eval_step, model=MODEL))(params, batch))
  assert program.count('scan[') == 1
