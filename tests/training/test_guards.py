"""Bad steps: judged inside jit, left out bit for bit, diagnosed."""

import dataclasses
import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.runs import injected_faults
from t5lab.training import diagnosis, guards, optim, steps

# A decoder compiles in half the time of an encoder-decoder.
CONFIG = TransformerConfig(vocab_size=64, d_model=16, d_ff=32, n_heads=2, d_head=8, enc_layers=0,
                           dec_layers=2, dropout=0.1)
MODEL = Transformer(CONFIG, train=True)
# Every update has another learning rate: a skipped step must not use one up. Update 1,000
# overflows.
LINEAR = optim.schedule('linear', lr=1e-2, warmup=4, total=20)
TX = optim.optimizer('adamw', lambda n: jnp.where(n == 1000, 1e38, LINEAR(n)), clip=1.)
SKIP = dict(policy='skip', spike=8.)     # no spike is looked for in the first steps
OPTIONS = dict(model=MODEL, tx=TX, loss=steps.Loss(1e-4), ema=0.9, seed=3)


def make_batch(i):
  r = np.random.RandomState(i)
  tokens = lambda n: r.randint(2, 64, (8, n)).astype(np.int32)
  targets = tokens(6)
  weights = (np.arange(6) < r.randint(1, 7, (8, 1))).astype(np.float32)
  return {'decoder_input_tokens': np.roll(targets, 1, 1), 'decoder_target_tokens': targets,
          'decoder_loss_weights': weights}


def broken(batch, kind, **fault):
  return injected_faults.Fault(kind, 1, 1, fault.get('row')).inject(batch, 1)


@pytest.fixture(scope='module')
def state():
  params = jax.jit(functools.partial(steps.init_params, Transformer(CONFIG), 0))(make_batch(0))
  return steps.new_state(nn.unbox(params), TX, 0.9)


@functools.cache
def stepper(**settings):
  return jax.jit(functools.partial(steps.guarded_step, settings=guards.Settings(**settings),
                                   **OPTIONS))


def run(state, batches, **settings):
  """Returns (state, guard, metrics of each step)."""
  guard, history = guards.initial(), []
  for batch in batches:
    state, guard, metrics = stepper(**settings)(state, batch, None, guard)
    history.append(jax.device_get(metrics))
  return state, guard, history


def assert_same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


# --- the guarded step --------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['nan_grad', 'inf_loss', 'nan_shard'])
def test_a_run_with_a_skipped_batch_equals_one_without_it(state, kind):
  batches = [make_batch(i) for i in range(6)]
  bad = broken(batches[2], kind, row=3 if kind == 'nan_shard' else None)
  ours, guard, metrics = run(state, [*batches[:2], bad, *batches[3:]], **SKIP)
  without, guard_without, _ = run(state, [*batches[:2], *batches[3:]], **SKIP)
  assert [m['skipped'] for m in metrics] == [0, 0, 1, 0, 0, 0]
  assert not math.isfinite(metrics[2]['loss']) and int(ours.step) == 5
  assert_same(ours, without)
  assert_same(guard, guard_without)


def test_an_infinite_loss_is_reported_as_infinite(state):
  _, _, metrics = run(state, [broken(make_batch(0), 'inf_loss')], **SKIP)
  assert metrics[0]['loss'] == math.inf


def test_after_a_bad_step_no_step_counts(state):
  batches = [make_batch(i) for i in range(5)]
  bad = [*batches[:2], broken(batches[2], 'nan_grad'), *batches[3:]]
  ours, guard, metrics = run(state, bad, policy='stop')
  assert [m['halted'] for m in metrics] == [0, 0, 1, 1, 1]
  assert [m['skipped'] for m in metrics] == [0, 0, 1, 1, 1]
  assert int(guard.halted) and int(ours.step) == 2
  assert_same(ours, run(state, batches[:2], policy='stop')[0])


def test_skipping_ends_after_patience_bad_steps_in_a_row(state):
  good, bad = make_batch(0), broken(make_batch(1), 'nan_grad')
  _, _, metrics = run(state, [bad, bad, good, bad, bad, bad, good], **SKIP)
  assert [m['halted'] for m in metrics] == [0, 0, 0, 0, 0, 1, 1]
  assert [m['skipped'] for m in metrics] == [1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize('non_finite', ['gradient', 'parameters'])
def test_a_finite_loss_does_not_make_a_step_good(state, non_finite, monkeypatch):
  """The gradient is NaN, or the update overflows."""
  step = stepper(**SKIP)
  if non_finite == 'gradient':
    real = steps.gradients
    def gradients(*args, **kwargs):
      grads, sums = real(*args, **kwargs)
      return jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads), sums
    monkeypatch.setattr(steps, 'gradients', gradients)
    step = jax.jit(functools.partial(
        steps.guarded_step, settings=guards.Settings('skip'), **OPTIONS))
  else:
    state = state.replace(opt_state=trees.map_paths(
        lambda p, x: jnp.int32(1000) if p.endswith('count') else x, state.opt_state))
  after, _, metrics = step(state, make_batch(0), None, guards.initial())
  assert math.isfinite(metrics['loss']) and metrics['skipped'] == 1
  assert_same(after, state)


def test_nan_on_one_shard_is_the_same_decision_on_every_device(state):
  mesh = sharding.make_mesh()
  assert mesh.size == 8
  replicated = sharding.replicated(mesh)
  step = jax.jit(functools.partial(steps.guarded_step, settings=guards.Settings('skip'), **OPTIONS),
                 out_shardings=replicated)
  batches = [make_batch(i) for i in range(3)]
  bad = broken(batches[1], 'nan_shard', row=5)
  with sharding.use(mesh, 'dp'):
    def run_on_mesh(batches):
      s, guard = jax.device_put(state, replicated), guards.place(guards.initial(), replicated)
      skipped = []
      for batch in batches:
        s, guard, metrics = step(s, sharding.put(batch, mesh), None, guard)
        for shard in metrics['skipped'].addressable_shards:
          skipped.append(float(shard.data))
      return s, skipped
    ours, skipped = run_on_mesh([batches[0], bad, batches[2]])
    without, _ = run_on_mesh([batches[0], batches[2]])
  assert skipped == [0] * 8 + [1] * 8 + [0] * 8
  assert_same(ours, without)
  for x in jax.tree.leaves(ours):
    first = np.asarray(x.addressable_shards[0].data)
    assert all(np.array_equal(first, np.asarray(s.data)) for s in x.addressable_shards)


# --- the verdict -------------------------------------------------------------------------------


@functools.cache
def judge_step(**settings):
  return jax.jit(functools.partial(guards.judge, settings=guards.Settings(**settings)))


def judge(losses, norms=None, **settings):
  """Returns (whether each step counts, the last guard, the last added metrics)."""
  guard, verdicts = guards.initial(), []
  f = judge_step(**settings)
  for loss, norm in zip(losses, norms or [1.] * len(losses)):
    ok, guard, added = f(guard, {'loss': jnp.float32(loss), 'grad_norm': jnp.float32(norm),
                                 'param_norm': jnp.float32(1.)})
    verdicts.append(bool(ok))
  return verdicts, guard, added


def test_the_running_mean_is_a_plain_average_at_first():
  losses = np.random.default_rng(0).normal(5, 1, 30)
  _, guard, _ = judge(losses, policy='skip', spike=50.)
  np.testing.assert_allclose(guard.mean[0], losses.mean(), rtol=1e-6)
  np.testing.assert_allclose(guard.variance[0], losses.var(), rtol=1e-5)


@pytest.mark.parametrize('which', ['loss', 'grad_norm'])
def test_spikes_are_found_only_after_the_warm_up_and_only_if_enabled(which):
  noise = np.random.default_rng(1).normal(0, 0.1, 40)
  series = 5 + noise
  series[[10, 30]] = 50, 500           # the first is within the warm-up
  args = (series,) if which == 'loss' else (5 + noise, series.tolist())
  ok, guard, _ = judge(*args, policy='skip', spike=6.)
  assert [i for i, good in enumerate(ok) if not good] == [30]
  assert int(guard.good) == 39                    # the spike does not enter the mean
  assert all(judge(*args, policy='skip', spike=0.)[0])
  for policy in ('stop', 'rewind'):
    ok, guard, _ = judge(*args, policy=policy, spike=6.)
    assert all(ok[:30]) and not any(ok[30:]) and int(guard.halted)


@pytest.mark.parametrize('policy', ['stop', 'rewind'])
def test_one_loss_that_is_not_finite_halts(policy):
  ok, guard, added = judge([5., 5., math.nan, 5.], policy=policy, spike=6.)
  assert ok == [True, True, False, False] and int(guard.halted) == added['halted'] == 1


def test_rounding_of_a_flat_loss_is_not_a_spike():
  ok, _, _ = judge([3.] * 30 + [3.01] * 5, policy='skip', spike=6.)
  assert all(ok)


def test_a_guard_survives_a_checkpoint_bit_for_bit():
  _, guard, _ = judge(np.random.default_rng(0).normal(5, 1, 25), policy='skip', spike=6.)
  restored = guards.from_json(json.loads(json.dumps(guards.to_json(guard))))
  assert_same(guard, restored)
  dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
  assert dtypes(guard) == dtypes(restored)
  assert_same(guards.from_json(None), guards.initial())


@pytest.mark.parametrize('settings, message', [
    (dict(policy='skp'), "guard.policy='skp' is unknown. Did you mean 'skip'"),
    (dict(patience=0), 'guard.patience must be at least 1 step, got 0'),
    (dict(spike=-1.), r'guard.spike must be 0 \(off\) or a number of deviations, got -1.0'),
    (dict(spike=math.inf), r'guard.spike must be 0 \(off\) .* got inf')])
def test_bad_settings_are_an_error(settings, message):
  with pytest.raises(UsageError, match=message):
    guards.Settings(**settings)


def test_guard_settings_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    guards.Settings().policy = 'skip'


def test_the_guard_sees_an_injected_spike(state):
  batches = [make_batch(i) for i in range(guards.WARM_UP)]
  _, _, metrics = run(state, [*batches, make_batch(30), broken(make_batch(31), 'spike')],
                      **SKIP)
  assert [m['skipped'] for m in metrics[-3:]] == [0, 0, 1], [m['deviations'] for m in metrics]
  assert math.isfinite(metrics[-1]['loss'])


# --- the diagnosis -----------------------------------------------------------------------------


@functools.cache
def diagnose(microbatches=1):
  """explain(state, batch) of a Diagnosis that is compiled once."""
  return diagnosis.Diagnosis(sharding.make_mesh(devices=jax.devices()[:1]), model=MODEL,
                             loss=steps.Loss(1e-4), seed=3, microbatches=microbatches).explain


def with_value(state, path, value, index):
  def set_value(p, x):
    return x.at[index].set(value) if p == path else x
  return state.replace(params=trees.map_paths(set_value, state.params))


def test_non_finite_weights_are_named(state):
  bad = with_value(state, 'decoder/layers/mlp/wo/kernel', math.inf, (1, 0, 0))
  finding = diagnose()(bad, make_batch(0))
  assert finding.layer == 'decoder/layers/mlp/wo/kernel, layer 1 of 2'
  assert 'the weights are not finite in decoder/layers/mlp/wo/kernel, layer 1 of 2' == finding.text


@pytest.mark.parametrize('microbatches, layer', [(1, 1), (2, 0)])
def test_the_first_layer_whose_output_overflows_is_named(state, microbatches, layer):
  """The weights are finite but too large: one layer overflows, later ones are NaN too."""
  big = with_value(state, 'decoder/layers/mlp/wo/kernel', 3e38, (layer,))
  finding = diagnose(microbatches)(big, make_batch(0))
  assert finding.layer == f'decoder/layers/mlp/wo, layer {layer} of 2'
  assert finding.rows == list(range(8))


def test_a_bad_row_of_the_batch_is_named(state):
  finding = diagnose()(state, broken(make_batch(0), 'nan_shard', row=5))
  assert finding.rows == [5] and 'decoder_loss_weights' in finding.text
  finding = diagnose(2)(state, broken(make_batch(0), 'inf_loss'))
  assert finding.rows == [0] and finding.text == 'every layer is finite, the loss is not'


def test_a_non_finite_gradient_is_traced_to_the_layer_nearest_the_loss(state, monkeypatch):
  real = steps.gradients
  def gradients(*args, **kwargs):
    grads, sums = real(*args, **kwargs)
    broken = lambda p: p == 'embedding' or p.startswith('decoder/layers/attn')
    return trees.map_paths(lambda p, g: g.at[0].set(jnp.nan) if broken(p) else g, grads), sums
  monkeypatch.setattr(steps, 'gradients', gradients)
  finding = diagnosis.Diagnosis(sharding.make_mesh(devices=jax.devices()[:1]), model=MODEL,
                              loss=steps.Loss(1e-4)).explain(state, make_batch(0))
  assert finding.layer.startswith('decoder/layers/attn/') and 'layer 0 of 2' in finding.layer
  assert 'loss and layers are finite, the gradient is not' in finding.text


def test_a_spike_is_traced_to_the_worst_rows_and_the_largest_gradient(state):
  # Relative to weights of 0, any gradient is large.
  big = with_value(state, 'decoder/layers/attn_norm/scale', 0., (0,))
  finding = diagnose()(big, make_batch(0))
  assert finding.layer == 'decoder/layers/attn_norm/scale, layer 0 of 2'
  assert sorted(finding.rows) == list(range(8))
