"""The first train step has the same loss, gradient norm and weights on every mesh of 8 devices."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import meshes
import numpy as np
import optax
import pytest

from t5lab import trees
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.programs import scoring
from t5lab.training import optim, steps

ENCODER_DECODER = TransformerConfig(
    vocab_size=64, d_model=32, d_ff=64, n_heads=8, d_head=4, enc_layers=2, dec_layers=2,
    acts=('gelu', 'linear'), tied=False, scale_logits=False)
DECODER = dataclasses.replace(ENCODER_DECODER, enc_layers=0, positions='rope', n_kv_heads=4,
                              scale_attn=True, acts=('silu', 'linear'))
# every second layer has 4 experts, 2 per token, and too little capacity for all of them
EXPERTS = dataclasses.replace(DECODER, positions='relative', tied=True, experts=4, expert_top_k=2,
                              capacity_factor=1.)
MODELS = {'encoder_decoder': ENCODER_DECODER, 'decoder': DECODER, 'experts': EXPERTS}
TX = optim.optimizer('adafactor', 1e-2, min_factored=8)


def batch():
  """8 rows, each with two packed segments and padding."""
  r = np.random.RandomState(0)
  tokens = lambda: r.randint(2, 64, (8, 8)).astype(np.int32)
  targets = tokens()
  rows = lambda *row: np.tile(np.array(row, np.int32), (8, 1))
  return {'encoder_input_tokens': tokens(), 'encoder_segment_ids': rows(1, 1, 1, 1, 1, 2, 2, 0),
          'decoder_input_tokens': np.roll(targets, 1, 1), 'decoder_target_tokens': targets,
          'decoder_segment_ids': rows(1, 1, 1, 2, 2, 2, 2, 0),
          'decoder_positions': rows(0, 1, 2, 0, 1, 2, 3, 0),
          'decoder_loss_weights': rows(1, 1, 1, 1, 1, 1, 1, 0)}


@functools.cache
def numpy_params(config):
  r = np.random.RandomState(1)
  _, abstract = steps.abstract_params(Transformer(config), batch())
  return jax.tree.map(
      lambda x: (r.randn(*x.shape) / np.sqrt(x.shape[-1])).astype(np.float32), abstract)


def make_step(config, mesh, rules, tx=TX, chunks=1):
  """-> (the jitted update, its first state), sharded as the program does."""
  boxed, abstract = steps.abstract_params(Transformer(config), batch())
  new = lambda p: steps.new_state(p, tx, 0.9)
  shapes = jax.eval_shape(new, abstract)
  like_params = functools.partial(sharding.like_params, boxed=boxed, mesh=mesh, rules=rules)
  placed = steps.TrainState(sharding.replicated(mesh), sharding.shardings(boxed, mesh, rules),
                            like_params(shapes.opt_state), like_params(shapes.ema))
  state = jax.device_put(new(numpy_params(config)), placed)
  step = jax.jit(functools.partial(
      steps.train_step, model=Transformer(config, train=True), tx=tx, ema=0.9,
      loss=steps.Loss(1e-4, balance=0.1, router_z=0.01, chunks=chunks)),
      out_shardings=(placed, sharding.replicated(mesh)))
  return step, state


@functools.cache
def compiled_step(config, mesh, rules, tx=TX, chunks=1):
  """-> (the compiled update, its first state)."""
  step, state = make_step(config, mesh, rules, tx, chunks)
  with sharding.use(mesh, rules):
    return step.lower(state, sharding.put(batch(), mesh)).compile(), state


@functools.cache
def first_step(config, mesh, rules, tx=TX, chunks=1):
  """Runs one update -> (metrics on the host, the next state)."""
  step, state = compiled_step(config, mesh, rules, tx, chunks)
  state, metrics = step(state, sharding.put(batch(), mesh))
  return jax.device_get(metrics), state


@functools.cache
def on_one_device(config):
  """The same step without a mesh, so nothing is pinned -> (metrics, average)."""
  step = jax.jit(functools.partial(
      steps.train_step, model=Transformer(config, train=True), tx=TX, ema=0.9,
      loss=steps.Loss(1e-4, balance=0.1, router_z=0.01)))
  state, metrics = step(steps.new_state(numpy_params(config), TX, 0.9), batch())
  return jax.device_get(metrics), jax.device_get(state.ema)


@pytest.fixture(autouse=True)
def _small_leaves_too(monkeypatch):
  """The optimizer state of these small leaves is split like that of large ones."""
  monkeypatch.setattr(sharding, 'SMALL', 1)


def local_shape(x):
  return x.sharding.shard_shape(x.shape)


DEFAULT = [  # covers rule sets, models and mesh axes; all other cases are slow
    ('encoder_decoder', 'dp', dict(data=4, dcn_data=2)),
    ('encoder_decoder', 'tp', dict(data=2, model=4)),
    ('encoder_decoder', 'sp', dict(data=2, sequence=4)),
    ('decoder', 'fsdp', dict(data=2, fsdp=4)),
    ('decoder', 'sp', dict(data=1, fsdp=2, sequence=2, model=2)),
    ('experts', 'fsdp_tp', dict(data=2, fsdp=2, model=2)),
    ('experts', 'ep', dict(data=2, expert=4)),
]
# a new rule set is tested by default without an entry above
DEFAULT += [('decoder', rules, meshes.meshes(rules)[-1]) for rules in sharding.RULES
            if rules not in {default for _, default, _ in DEFAULT}]
MORE_MESHES = [
    ('dp', dict(data=2, expert=4)), ('dp', dict(data=4, dcn_data=2)),
    ('fsdp', dict(data=1, fsdp=8)), ('fsdp', dict(data=1, dcn_fsdp=2, fsdp=4)),
    ('tp', dict(data=1, model=8)), ('tp', dict(data=4, model=2)),
    ('fsdp_tp', dict(data=1, fsdp=2, model=4)), ('sp', dict(data=1, sequence=8)),
    ('ep', dict(data=1, fsdp=2, expert=4)),
]
SLOW = [(model, rules, mesh) for model in MODELS for rules, mesh in meshes.ALL + MORE_MESHES
        if mesh.get('model', 1) <= MODELS[model].kv_heads and (model, rules, mesh) not in DEFAULT]


@pytest.mark.parametrize(
    'model, rules, mesh', DEFAULT + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
    ids=meshes.mesh_id)
def test_the_first_step_is_the_same_on_every_mesh(model, rules, mesh):
  expected, expected_ema = on_one_device(MODELS[model])
  mesh = sharding.make_mesh(**mesh)
  # with sp, chunks of the loss are cut along the axis that is split
  metrics, state = first_step(MODELS[model], mesh, rules, TX, 3 if rules == 'sp' else 1)
  assert sorted(metrics) == sorted(expected)
  assert model != 'experts' or metrics['dropped'] > 0.01
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
  expected_ema = trees.flatten(expected_ema)                   # shows what the step learned
  for path, x in trees.flatten(jax.device_get(state.ema)).items():
    np.testing.assert_allclose(x, expected_ema[path], rtol=1e-3, atol=1e-5, err_msg=path)
  assert_large_arrays_are_sharded(state, rules, mesh)


def assert_large_arrays_are_sharded(state, rules, mesh):
  """Matrices of parameters are split over the axes of the rule set, all others over all devices."""
  if rules == 'dp':
    ema_shards = mesh.size // (mesh.shape['dcn_data'] * mesh.shape['dcn_fsdp'])
  else:
    ema_shards = mesh.size // mesh.shape['dcn_data']
  params = trees.flatten(state.params)
  for path, x in trees.flatten(state.ema).items():
    is_expert = '/experts/' in path
    if not path.endswith(('kernel', 'embedding')) and not is_expert:
      continue
    assert x.size == np.prod(local_shape(x)) * ema_shards, path
    axes = set(meshes.weight_axes(rules)) | ({'expert'} if is_expert else set())
    shards = params[path].size // int(np.prod(local_shape(params[path])))
    assert shards == np.prod([mesh.shape[axis] for axis in axes]), path


def test_moments_of_dp_are_an_eighth_on_each_of_eight_devices():
  """ZeRO-1, by the shards that each device holds after a step."""
  mesh = sharding.make_mesh(8)
  metrics, state = first_step(DECODER, mesh, 'dp', optim.optimizer('adamw', 1e-2))
  expected, _ = on_one_device(DECODER)
  for name in set(expected) - {'param_norm'}:                   # that of another optimizer
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
  for tree in (state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
    x = tree['decoder']['layers']['mlp']['wi_0']['kernel']
    assert [s.data.shape for s in x.addressable_shards] == [(2, 4, 64)] * 8
    assert len({str(s.index) for s in x.addressable_shards}) == 8
  kernel = state.params['decoder']['layers']['mlp']['wi_0']['kernel']
  assert local_shape(kernel) == (2, 32, 64)
  local_size = lambda tree: sum(np.prod(local_shape(x)) for x in jax.tree.leaves(tree))
  assert local_size(state.opt_state[0].mu) < local_size(state.params) / 7


def test_scored_weights_are_sharded_like_parameters():
  """The average too, which between steps is split over the devices of the batch."""
  mesh = sharding.make_mesh(data=4, dcn_data=2)
  _, state = first_step(ENCODER_DECODER, mesh, 'dp', TX, 1)
  scored = scoring.eval_weights(state)
  shardings = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
  assert shardings(state.ema) != shardings(state.params)
  assert shardings(state.params) == shardings(scored['ema']) == shardings(scored['raw'])
  jax.tree.map(np.testing.assert_array_equal, scored['ema'], state.ema)
  assert list(scoring.eval_weights(dataclasses.replace(state, ema={}))) == ['raw']


@pytest.mark.parametrize('changes, tx', [
    ({}, TX), (dict(enc_layers=0, per_layer_bias=True), optax.sgd(1e-2)),
    (dict(enc_attention='local', local_radius=1), optax.sgd(1e-2))])
def test_relative_bias_is_all_reduced_as_its_table(changes, tx):
  """Gradients of scores [B, N, T, T] are reduced to the table of 32 buckets before."""
  mesh = sharding.make_mesh(data=4, dcn_data=2)
  step, _ = compiled_step(
      dataclasses.replace(ENCODER_DECODER, **changes), mesh, 'dp', tx, 1)
  text = step.as_text()
  reduced = re.findall(r' = .*? all-reduce(?:-start)?\(', text)
  shapes = {s for line in reduced for s in re.findall(r'f32\[([\d,]+)\]', line)}
  assert any(s.endswith('32,8') for s in shapes), shapes        # the table itself
  heads_and_scores = [s for s in shapes if re.search(r'\b8,8,8\b|\b8,2,6\b', s)]
  assert not heads_and_scores, heads_and_scores


def test_parameters_have_known_axes_only():
  for config in MODELS.values():
    boxed, _ = steps.abstract_params(Transformer(config), batch())
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    boxes = jax.tree.leaves(boxed, is_leaf=is_box)
    assert all(is_box(b) and len(b.names) == b.value.ndim for b in boxes)
    assert {n for b in boxes for n in b.names} <= {*sharding.LOGICAL_AXES, None}
