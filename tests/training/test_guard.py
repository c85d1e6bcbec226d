"""Bad steps: judged in jit, left out bit for bit, explained, written down, rewound."""

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
from t5lab.errors import NumericalError, UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.runs import injected_faults, sentry
from t5lab.training import diagnosis, guards, optim, steps

# a decoder alone: half of what an encoder-decoder takes to compile
CONFIG = TransformerConfig(vocab_size=64, d_model=16, d_ff=32, n_heads=2, d_head=8, enc_layers=0,
                           dec_layers=2, dropout=0.1)
MODEL = Transformer(CONFIG, train=True)
# a schedule that moves every update: a step that is skipped must not use one up
TX = optim.optimizer('adamw', optim.schedule('linear', lr=1e-2, warmup=4, total=20), clip=1.)
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
  params = nn.unbox(steps.init_params(Transformer(CONFIG), 0, make_batch(0)))
  return steps.new_state(params, TX, 0.9)


@functools.cache
def stepper(**settings):
  return jax.jit(functools.partial(steps.guarded_step, settings=guards.Settings(**settings),
                                   **OPTIONS))


def run(state, batches, **settings):
  """-> (state, guard, metrics of each step)."""
  guard, found = guards.initial(), []
  for batch in batches:
    state, guard, metrics = stepper(**settings)(state, batch, None, guard)
    found.append(jax.device_get(metrics))
  return state, guard, found


def assert_same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


# -- the step --


@pytest.mark.parametrize('kind', ['nan_grad', 'inf_loss', 'nan_shard'])
def test_a_skipped_batch_leaves_the_run_as_without_it(state, kind):
  batches = [make_batch(i) for i in range(6)]
  bad = broken(batches[2], kind, row=3 if kind == 'nan_shard' else None)
  ours, guard, metrics = run(state, [*batches[:2], bad, *batches[3:]], policy='skip')
  without, other, _ = run(state, [*batches[:2], *batches[3:]], policy='skip')
  assert [m['skipped'] for m in metrics] == [0, 0, 1, 0, 0, 0]
  assert not math.isfinite(metrics[2]['loss']) and int(ours.step) == 5
  assert_same(ours, without)
  assert_same(guard, other)


def test_an_infinite_loss_is_one_and_not_a_nan(state):
  _, _, metrics = run(state, [broken(make_batch(0), 'inf_loss')], policy='skip')
  assert metrics[0]['loss'] == math.inf


@pytest.mark.parametrize('policy', ['stop', 'rewind'])
def test_after_a_bad_step_nothing_counts_any_more(state, policy):
  batches = [make_batch(i) for i in range(5)]
  bad = [*batches[:2], broken(batches[2], 'nan_grad'), *batches[3:]]
  ours, guard, metrics = run(state, bad, policy=policy)
  assert [m['halted'] for m in metrics] == [0, 0, 1, 1, 1]
  assert [m['skipped'] for m in metrics] == [0, 0, 1, 1, 1]
  assert int(guard.halted) and int(ours.step) == 2
  assert_same(ours, run(state, batches[:2], policy=policy)[0])


def test_skipping_ends_after_patience_bad_steps_in_a_row(state):
  good, bad = make_batch(0), broken(make_batch(1), 'nan_grad')
  _, _, metrics = run(state, [bad, bad, good, bad, bad, bad, good], policy='skip')
  assert [m['halted'] for m in metrics] == [0, 0, 0, 0, 0, 1, 1]
  assert [m['skipped'] for m in metrics] == [1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize('what', ['gradient', 'parameters'])
def test_a_finite_loss_does_not_make_a_step_good(state, what, monkeypatch):
  """A gradient that is NaN, or an update that overflows, with a finite loss."""
  options = OPTIONS
  if what == 'gradient':
    real = steps.gradients
    def gradients(*args, **kwargs):
      grads, sums = real(*args, **kwargs)
      return jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads), sums
    monkeypatch.setattr(steps, 'gradients', gradients)
  else:
    options = {**OPTIONS, 'tx': optim.optimizer('adamw', 1e38)}
  if what == 'parameters':
    state = steps.new_state(state.params, options['tx'], 0.9)
  step = jax.jit(functools.partial(steps.guarded_step, settings=guards.Settings('skip'), **options))
  after, _, metrics = step(state, make_batch(0), None, guards.initial())
  assert math.isfinite(metrics['loss']) and metrics['skipped'] == 1
  assert_same(after, state)


def test_nan_on_one_shard_is_the_same_decision_on_every_device(state):
  mesh = sharding.make_mesh()
  assert mesh.size == 8
  alone = sharding.replicated(mesh)
  step = jax.jit(functools.partial(steps.guarded_step, settings=guards.Settings('skip'), **OPTIONS),
                 out_shardings=alone)
  batches = [make_batch(i) for i in range(3)]
  bad = broken(batches[1], 'nan_shard', row=5)
  with sharding.use(mesh, 'dp'):
    def go(batches):
      s, guard, skipped = jax.device_put(state, alone), guards.place(guards.initial(), alone), []
      for batch in batches:
        s, guard, metrics = step(s, sharding.put(batch, mesh), None, guard)
        for shard in metrics['skipped'].addressable_shards:
          skipped.append(float(shard.data))
      return s, skipped
    ours, skipped = go([batches[0], bad, batches[2]])
    without, _ = go([batches[0], batches[2]])
  assert skipped == [0] * 8 + [1] * 8 + [0] * 8
  assert_same(ours, without)
  for x in jax.tree.leaves(ours):
    first = np.asarray(x.addressable_shards[0].data)
    assert all(np.array_equal(first, np.asarray(s.data)) for s in x.addressable_shards)


def judge(losses, norms=None, **settings):
  guard, found = guards.initial(), []
  f = jax.jit(functools.partial(guards.judge, settings=guards.Settings(**settings)))
  for loss, norm in zip(losses, norms or [1.] * len(losses)):
    ok, guard, added = f(guard, {'loss': jnp.float32(loss), 'grad_norm': jnp.float32(norm),
                                 'param_norm': jnp.float32(1.)})
    found.append(bool(ok))
  return found, guard, added


def test_the_running_mean_is_that_of_numpy_at_first():
  losses = np.random.default_rng(0).normal(5, 1, 30)
  _, guard, _ = judge(losses, policy='skip', spike=50.)
  np.testing.assert_allclose(guard.mean[0], losses.mean(), rtol=1e-6)
  np.testing.assert_allclose(guard.variance[0], losses.var(), rtol=1e-5)


@pytest.mark.parametrize('which', ['loss', 'grad_norm'])
def test_a_spike_is_one_only_after_the_warm_up_and_where_it_is_looked_for(which):
  noise = np.random.default_rng(1).normal(0, 0.1, 40)
  series = 5 + noise
  series[[10, 30]] = 50, 500           # the first of them within the warm-up
  args = (series,) if which == 'loss' else (5 + noise, series.tolist())
  ok, guard, _ = judge(*args, policy='skip', spike=6.)
  assert [i for i, good in enumerate(ok) if not good] == [30]
  assert int(guard.good) == 39                    # the spike does not enter the mean
  assert all(judge(*args, policy='skip', spike=0.)[0])
  ok, guard, _ = judge(*args, policy='stop', spike=6.)
  assert not any(ok[30:]) and int(guard.halted)


def test_a_flat_loss_has_no_spikes_of_rounding():
  ok, _, _ = judge([3.] * 30 + [3.01] * 5, policy='skip', spike=6.)
  assert all(ok)


def test_a_guard_survives_a_checkpoint_bit_for_bit():
  _, guard, _ = judge(np.random.default_rng(0).normal(5, 1, 25), policy='skip', spike=6.)
  again = guards.from_json(json.loads(json.dumps(guards.to_json(guard))))
  assert_same(guard, again)
  assert [x.dtype for x in jax.tree.leaves(guard)] == [x.dtype for x in jax.tree.leaves(again)]
  assert_same(guards.from_json(None), guards.initial())


@pytest.mark.parametrize('settings, message', [
    (dict(policy='skp'), "guard.policy='skp' is unknown. Did you mean 'skip'"),
    (dict(patience=0), 'guard.patience=0'), (dict(spike=-1.), 'guard.spike=-1.0')])
def test_settings_that_are_none(settings, message):
  with pytest.raises(UsageError, match=message):
    guards.Settings(**settings)


# -- where it went wrong --


@functools.cache
def doctor(microbatches=1):
  return diagnosis.Diagnosis(sharding.make_mesh(devices=jax.devices()[:1]), model=MODEL,
                             loss=steps.Loss(1e-4), seed=3, microbatches=microbatches)


def put(state, path, value, where):
  def one(p, x):
    return x.at[where].set(value) if p == path else x
  return state.replace(params=trees.map_paths(one, state.params))


def test_weights_that_are_not_finite_are_named(state):
  bad = put(state, 'decoder/layers/mlp/wo/kernel', math.inf, (1, 0, 0))
  found = doctor().explain(bad, make_batch(0))
  assert found.layer == 'decoder/layers/mlp/wo/kernel, layer 1 of 2'
  assert 'the weights are not finite in decoder/layers/mlp/wo/kernel, layer 1 of 2' == found.text


@pytest.mark.parametrize('microbatches, layer', [(1, 1), (2, 0)])
def test_the_first_layer_whose_output_overflows_is_named(state, microbatches, layer):
  """Finite weights, too large: the product overflows in one layer, later ones are NaN too."""
  big = put(state, 'decoder/layers/mlp/wo/kernel', 3e38, (layer,))
  found = doctor(microbatches).explain(big, make_batch(0))
  assert found.layer == f'decoder/layers/mlp/wo, layer {layer} of 2'
  assert found.rows == list(range(8))


def test_a_bad_row_of_the_batch_is_named(state):
  found = doctor().explain(state, broken(make_batch(0), 'nan_shard', row=5))
  assert found.rows == [5] and 'decoder_loss_weights' in found.text
  found = doctor(2).explain(state, broken(make_batch(0), 'inf_loss'))
  assert found.rows == [0] and found.text == 'every layer is finite, the loss is not'


def test_a_gradient_that_is_not_finite_is_traced_to_the_layer_nearest_the_loss(state, monkeypatch):
  real = steps.gradients
  def gradients(*args, **kwargs):
    grads, sums = real(*args, **kwargs)
    broken = lambda p: p == 'embedding' or p.startswith('decoder/layers/attn')
    return trees.map_paths(lambda p, g: g.at[0].set(jnp.nan) if broken(p) else g, grads), sums
  monkeypatch.setattr(steps, 'gradients', gradients)
  found = diagnosis.Diagnosis(sharding.make_mesh(devices=jax.devices()[:1]), model=MODEL,
                              loss=steps.Loss(1e-4)).explain(state, make_batch(0))
  assert found.layer.startswith('decoder/layers/attn/') and 'layer 0 of 2' in found.layer
  assert 'loss and layers are finite, the gradient is not' in found.text


def test_of_a_spike_the_worst_rows_and_the_largest_gradient_are_named(state):
  big = put(state, 'decoder/layers/attn_norm/scale', 0., (0,))   # beside it any gradient is large
  found = doctor().explain(big, make_batch(0))
  assert found.layer == 'decoder/layers/attn_norm/scale, layer 0 of 2'
  assert sorted(found.rows) == list(range(8))


# -- what is said and written --


@pytest.fixture(scope='module')
def stream():
  from t5lab import config
  from t5lab.programs import streams
  c = config.load('configs/quickstart.py:tiny', {})
  return streams.open_stream(c)


def watch(stream, workdir, rows=(1,), said=None, **kwargs):
  settings = guards.Settings(**{k: kwargs.pop(k) for k in ('policy', 'patience') if k in kwargs})
  explain = lambda state, number: diagnosis.Finding('here', 'decoder/x', list(rows))
  said = [] if said is None else said
  return sentry.Sentry(workdir, settings, data=stream.batches, vocabulary=stream.vocabulary,
                       explain=explain, newest=lambda: 4, log=said.append, **kwargs)


def metrics(loss=2., **more):
  return {'loss': loss, 'grad_norm': 1., 'param_norm': 3., 'skipped': 0., 'halted': 0., **more}


BAD = dict(loss=math.nan, skipped=1.)


def test_a_skipped_step_is_one_line_and_one_record(stream, tmp_path, state):
  said = []
  watched = watch(stream, tmp_path, said=said, policy='skip', offset=2)
  rows = watched.check([(5, metrics()), (6, metrics(**BAD)), (7, metrics())], state)
  assert [step for step, _ in rows] == [5, 6, 7] and 'halted' not in rows[0][1]
  record, = sentry.read_anomalies(tmp_path)
  ids = stream.batches.row_ids(7)                       # batch number 8 of the stream
  assert (record['step'], record['batch'], record['kind']) == (6, 8, 'nonfinite')
  assert math.isnan(record['loss']) and record['layer'] == 'decoder/x' and record['rows'] == [1]
  assert record['examples'] == [i for row in ids for i in row] == stream.batches.example_ids(7)
  assert record['blamed'] == ids[1]
  corpus = stream.batches.rows[0].examples
  for text in record['text']:
    stored = corpus[int(text['id'].split(':')[1])]
    assert text['id'] in ids[1]
    assert text['inputs'] == stream.vocabulary.decode(list(stored['inputs']))
    assert text['targets'] == stream.vocabulary.decode(list(stored['targets']))
  assert len(said) == 1 and '\n' not in said[0] and said[0].endswith('; skipped')
  for part in ('step 6: loss is nan', 'rows 1', ids[1][0], record['text'][0]['inputs'][:20]):
    assert part in said[0]
  # the state has moved on since: it says with which weights it looked
  assert 'some good steps later' in record['found']


def test_stopping_names_all_and_the_last_good_checkpoint(stream, tmp_path, state):
  watched = watch(stream, tmp_path, policy='stop')
  later = metrics(skipped=1., halted=1.)
  with pytest.raises(NumericalError) as e:
    watched.check([(5, metrics()), (6, metrics(**BAD, halted=1.)), (7, later)], state)
  text = str(e.value)
  assert text.startswith('step 6: loss is nan, gradient norm 1; here (rows 1)')
  assert 'last good checkpoint: step 4' in text and 'guard.policy=skip' in text and '\n' not in text
  anomaly, = sentry.read_anomalies(tmp_path)
  assert anomaly['found'] == 'here'


def test_patience_used_up_ends_the_run_after_a_record_of_each(stream, tmp_path, state):
  watched = watch(stream, tmp_path, policy='skip', patience=2)
  with pytest.raises(NumericalError, match='step 7: .* 2 bad steps in a row'):
    watched.check([(6, metrics(**BAD)), (7, metrics(**BAD, halted=1.)),
                   (8, metrics(skipped=1., halted=1.))], state)
  assert [r['step'] for r in sentry.read_anomalies(tmp_path)] == [6, 7]


def test_a_spike_is_called_one(stream, tmp_path, state):
  said = []
  watch(stream, tmp_path, said=said, policy='skip').check(
      [(6, metrics(loss=90., deviations=41.5, skipped=1.))], state)
  assert sentry.read_anomalies(tmp_path)[0]['kind'] == 'spike'
  assert 'loss is 90, gradient norm 1, 41.5 deviations above' in said[0]


def test_rewinds_shift_the_stream_and_end_without_progress(stream, tmp_path, state):
  watched = watch(stream, tmp_path, policy='rewind', patience=2)
  with pytest.raises(sentry.Rewind) as e:
    watched.check([(6, metrics(**BAD, halted=1.))], state)
  assert e.value.step == 6
  assert watched.rewound(6, 4) == 2            # step 5 reads batch 7, the first after the bad one
  assert watched.rewound(5, 4) == 3            # batch 7 was bad too: step 5 reads batch 8
  assert watched.rewound(12, 10) == 5          # a newer checkpoint: patience is whole again
  assert watched.rewound(11, 10) == 6
  with pytest.raises(NumericalError, match='after 2 rewinds to step 10'):
    watched.rewound(11, 10)
  assert [r['offset'] for r in sentry.read_anomalies(tmp_path)[1:]] == [2, 3, 5, 6]


def test_a_resumed_run_forgets_what_it_will_meet_again(stream, tmp_path, state):
  watched = watch(stream, tmp_path, policy='skip', offset=2)
  watched.check([(s, metrics(**BAD)) for s in (3, 5)], state)          # batches 5 and 7
  (tmp_path / sentry.NAME).open('a').write('{"step": 6, "bat')      # torn
  watch(stream, tmp_path, policy='skip', step=2, offset=4, write=False)
  assert len(sentry.read_anomalies(tmp_path)) == 2
  watch(stream, tmp_path, policy='skip', step=2, offset=4)             # has read six
  assert [r['step'] for r in sentry.read_anomalies(tmp_path)] == [3]


# -- faults on demand --


def test_faults_are_what_they_say(monkeypatch):
  monkeypatch.delenv('T5LAB_FAULT', raising=False)
  assert injected_faults.requested() is None
  monkeypatch.setenv('T5LAB_FAULT', 'nan_shard@7-9:3')
  fault = injected_faults.requested()
  batch = {k: v for k, v in make_batch(0).items()}
  assert fault.inject(batch, 6) is batch and fault.inject(batch, 10) is batch
  hit = fault.inject(batch, 8)['decoder_loss_weights']
  assert np.isnan(hit[3]).all() and np.isfinite(np.delete(hit, 3, 0)).all()
  mine = fault.inject({k: v[4:] for k, v in batch.items()}, 8, rows=[3, 5, 6, 7])
  assert np.isnan(mine['decoder_loss_weights'][0]).all()
  monkeypatch.setenv('T5LAB_FAULT', 'nan@7')
  with pytest.raises(UsageError, match='T5LAB_FAULT'):
    injected_faults.requested()


def test_the_spike_is_one_that_the_guard_sees(state):
  batches = [make_batch(i) for i in range(guards.WARM_UP)]
  _, _, found = run(state, [*batches, make_batch(30), broken(make_batch(31), 'spike')],
                    policy='skip', spike=8.)
  assert [m['skipped'] for m in found[-3:]] == [0, 0, 1], [m.get('deviations') for m in found]
  assert math.isfinite(found[-1]['loss'])


def test_guard_settings_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    guards.Settings().policy = 'skip'
