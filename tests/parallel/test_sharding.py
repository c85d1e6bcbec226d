"""Rules, constraints and placement on eight virtual devices."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from small_models import jit

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.training import optim
from t5lab.training import step as steps

CONFIG = TransformerConfig(vocab_size=64, d_model=32, d_ff=64, n_heads=4, d_head=8, enc_layers=2,
                           dec_layers=2, acts=('gelu', 'linear'), tied=False, scale_logits=False)
# T5Gemma's attention; each second layer is 4 experts, of which a token asks 2
EXPERTS = dataclasses.replace(
    CONFIG, n_kv_heads=2, positions='rope', scale_attn=True, experts=4, expert_top_k=2,
    eval_capacity_factor=1.)


def batch(rows=8):
  r = np.random.RandomState(0)
  tokens = lambda n: r.randint(2, 64, (rows, n)).astype(np.int32)
  targets = tokens(6)
  return {'encoder_input_tokens': tokens(8), 'encoder_segment_ids': np.ones((rows, 8), np.int32),
          'decoder_input_tokens': np.roll(targets, 1, 1), 'decoder_target_tokens': targets,
          'decoder_segment_ids': np.ones((rows, 6), np.int32),
          'decoder_loss_weights': np.ones((rows, 6), np.int32)}


def test_an_unknown_axis_raises_and_a_known_one_reaches_the_program():
  x = jnp.zeros((8, 4))
  with pytest.raises(UsageError, match="no logical axis 'bacth'. Did you mean 'batch'"):
    sharding.constrain(x, 'bacth', None)
  with pytest.raises(ValueError, match='axes'):
    sharding.constrain(x, 'batch')
  f = jax.jit(lambda x: sharding.constrain(x, 'batch', 'act_mlp') * 2)
  assert 'sharding_constraint' not in f.lower(x).as_text()
  with sharding.use(sharding.make_mesh(4, 2), 'tp'):
    text = jax.jit(lambda x: sharding.constrain(x, 'batch', 'act_mlp') * 2).lower(x).as_text()
  assert 'sharding_constraint' in text and '"data"' in text and '"model"' in text


def test_a_mesh_axis_is_used_once():
  assert sharding.spec(('embed', 'batch'), sharding.RULES['fsdp']) == P('data', 'expert')


@pytest.mark.parametrize('data, model, message', [
    (3, 1, 'this machine has 8'), (-1, 3, 'this machine has 8'), (-1, -1, 'one -1'),
    (0, 1, '1 or')])
def test_a_mesh_that_does_not_fit(data, model, message):
  with pytest.raises(UsageError, match=message):
    sharding.make_mesh(data, model)


def test_an_axis_that_the_mesh_does_not_divide_is_named():
  boxed, _ = steps.abstract_params(Transformer(
      TransformerConfig(**{**vars(CONFIG), 'd_ff': 36})), batch())
  with pytest.raises(UsageError, match="mlp.*axis 'mlp' has 36 rows.*8 devices"):
    sharding.shardings(boxed, sharding.make_mesh(1, 8), 'tp')


def first_step(config, mesh, rules):
  """(metrics on the host, state) of one update from numpy parameters."""
  boxed, abstract = steps.abstract_params(Transformer(config), batch())
  r = np.random.RandomState(1)
  params = jax.tree.map(
      lambda x: (r.randn(*x.shape) / np.sqrt(x.shape[-1])).astype(np.float32), abstract)
  placed = sharding.shardings(boxed, mesh, rules)
  params = jax.tree.map(jax.device_put, params, placed)
  tx = optim.optimizer('adafactor', 1e-2)
  state = steps.new_state(params, tx, 0.9)
  loss = steps.Loss(1e-4, balance=0.1, router_z=0.01)
  step = jit(lambda s, b: steps.train_step(
      s, b, model=Transformer(config), tx=tx, loss=loss, ema=0.9))
  with sharding.use(mesh, rules):
    state, metrics = step(state, sharding.put(batch(), mesh))
  return jax.device_get(metrics), state


@functools.cache
def on_one_device(config):
  return first_step(config, sharding.make_mesh(devices=jax.devices()[:1]), 'dp')[0]


@pytest.mark.parametrize('data, model, rules', [
    (8, 1, 'dp'), (8, 1, 'fsdp'), (2, 4, 'tp'), (4, 2, 'fsdp_tp')])
def test_first_step_is_the_same_on_every_mesh(data, model, rules):
  want = on_one_device(CONFIG)
  got, state = first_step(CONFIG, sharding.make_mesh(data, model), rules)
  for name in ('loss', 'grad_norm', 'param_norm', 'tokens'):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  spec = state.params['encoder']['layers']['mlp']['wi_0']['kernel'].sharding.spec
  want = {'dp': (), 'fsdp': (None, 'data'), 'tp': (None, None, 'model'),
          'fsdp_tp': (None, 'data', 'model')}[rules]
  assert tuple(spec)[:len(want)] == want


@pytest.mark.parametrize('data, expert, model, rules', [
    (8, 1, 1, 'dp'), (2, 4, 1, 'dp'), (2, 2, 2, 'fsdp_tp')])
def test_experts_and_grouped_keys_are_the_same_on_every_mesh(data, expert, model, rules):
  """Experts that overflow (6 to 8 tokens a row, 4 or 5 places an expert of 4), 2 key heads."""
  want, mesh = on_one_device(EXPERTS), sharding.make_mesh(data, model, expert)
  got, state = first_step(EXPERTS, mesh, rules)
  assert sorted(got) == sorted(want) and got['dropped'] > 0.01
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  layers = state.params['decoder']['layers']
  kernels, key = layers['1']['moe']['experts'], layers['0']['attn']['k']['kernel']
  rows, columns = ('data', 'model') if rules == 'fsdp_tp' else (None, None)
  local = lambda x: x.sharding.shard_shape(x.shape)
  shard = lambda size, axis: size // (mesh.shape[axis] if axis else 1)
  for name, axes, (i, o) in (('wi_0', (rows, columns), (32, 64)),
                             ('wo', (columns, rows), (64, 32))):
    assert kernels[name].sharding.is_equivalent_to(
        NamedSharding(mesh, P(None, 'expert', *axes)), 4), name
    assert local(kernels[name]) == (1, 4 // expert, shard(i, axes[0]), shard(o, axes[1]))
  assert local(key) == (1, shard(32, rows), shard(16, columns))


def test_the_batch_is_spread_over_data_and_expert_outside_of_the_experts():
  mesh = sharding.make_mesh(2, 1, 4)
  assert sharding.batch_devices(mesh) == 8
  placed = sharding.put({'x': np.zeros((8, 3), np.int32)}, mesh)['x']
  assert placed.sharding.shard_shape((8, 3)) == (1, 3)
  # where the experts axis comes first it has the mesh axis, and the batch only 'data'
  rules = sharding.RULES['fsdp_tp']
  assert sharding.spec(('expert', 'batch', None, 'act_mlp'), rules) == P(
      'expert', 'data', None, 'model')
  assert sharding.spec(('batch', 'length', 'act_embed'), rules) == P(
      ('data', 'expert'), None, None)


@pytest.mark.parametrize('rules, heads, kv_heads, message', [
    ('tp', 6, 6, 'model.n_heads: 6 heads do not divide over mesh.model=4'),
    ('fsdp_tp', 8, 2, 'model.n_kv_heads: 2 heads do not divide over mesh.model=4'),
    ('tp', 8, 4, None), ('fsdp', 6, 3, None)])
def test_heads_are_not_cut(rules, heads, kv_heads, message):
  mesh = sharding.make_mesh(2, 4)
  if message is None:
    return sharding.check_heads(mesh, rules, heads, kv_heads)
  with pytest.raises(UsageError, match=message):
    sharding.check_heads(mesh, rules, heads, kv_heads)


def test_optimizer_state_lies_as_its_parameters_do():
  mesh = sharding.make_mesh(4, 2)
  boxed, params = steps.abstract_params(Transformer(CONFIG), batch())
  placed = sharding.shardings(boxed, mesh, 'fsdp_tp')
  state = jax.eval_shape(optim.optimizer('adamw', 1e-3).init, params)
  got = sharding.like_params(state, params, placed, mesh)
  assert jax.tree.leaves(got[0].mu) == jax.tree.leaves(placed)
  assert got[0].count.spec == P()


@pytest.mark.parametrize('config', [CONFIG, EXPERTS], ids=['t5', 'experts'])
def test_boxes_carry_known_axes_only(config):
  boxed, _ = steps.abstract_params(Transformer(config), batch())
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  boxes = jax.tree.leaves(boxed, is_leaf=is_box)
  assert all(is_box(b) and len(b.names) == b.value.ndim for b in boxes)
  assert {n for b in boxes for n in b.names} <= {*sharding.AXES, None}
