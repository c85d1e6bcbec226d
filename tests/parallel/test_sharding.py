"""Rules, constraints and placement on eight virtual devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.training import optim
from t5lab.training import step as steps

CONFIG = TransformerConfig(vocab_size=64, d_model=32, d_ff=64, n_heads=4, d_head=8, enc_layers=2,
                           dec_layers=2, acts=('gelu', 'linear'), tied=False, scale_logits=False)


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


@pytest.mark.parametrize('data, model, rules', [
    (8, 1, 'dp'), (8, 1, 'fsdp'), (2, 4, 'tp'), (4, 2, 'fsdp_tp')])
def test_first_step_is_the_same_on_every_mesh(data, model, rules):
  def first_step(mesh, rules):
    boxed, abstract = steps.abstract_params(Transformer(CONFIG), batch())
    r = np.random.RandomState(1)
    params = jax.tree.map(
        lambda x: (r.randn(*x.shape) / np.sqrt(x.shape[-1])).astype(np.float32), abstract)
    placed = sharding.shardings(boxed, mesh, rules)
    params = jax.tree.map(jax.device_put, params, placed)
    tx = optim.optimizer('adafactor', 1e-2)
    state = steps.new_state(params, tx, 0.9)
    step = jax.jit(lambda s, b: steps.train_step(
        s, b, model=Transformer(CONFIG), tx=tx, loss=steps.Loss(1e-4), ema=0.9))
    with sharding.use(mesh, rules):
      state, metrics = step(state, sharding.put(batch(), mesh))
    return jax.device_get(metrics), state
  want, _ = first_step(sharding.make_mesh(devices=jax.devices()[:1]), 'dp')
  got, state = first_step(sharding.make_mesh(data, model), rules)
  for name in ('loss', 'grad_norm', 'param_norm', 'tokens'):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  spec = state.params['encoder']['layers']['mlp']['wi_0']['kernel'].sharding.spec
  want = {'dp': (), 'fsdp': (None, 'data'), 'tp': (None, None, 'model'),
          'fsdp_tp': (None, 'data', 'model')}[rules]
  assert tuple(spec)[:len(want)] == want


def test_optimizer_state_lies_as_its_parameters_do():
  mesh = sharding.make_mesh(4, 2)
  boxed, params = steps.abstract_params(Transformer(CONFIG), batch())
  placed = sharding.shardings(boxed, mesh, 'fsdp_tp')
  state = jax.eval_shape(optim.optimizer('adamw', 1e-3).init, params)
  got = sharding.like_params(state, params, placed, mesh)
  assert jax.tree.leaves(got[0].mu) == jax.tree.leaves(placed)
  assert got[0].count.spec == P()


def test_boxes_carry_known_axes_only():
  boxed, _ = steps.abstract_params(Transformer(CONFIG), batch())
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  boxes = jax.tree.leaves(boxed, is_leaf=is_box)
  assert all(is_box(b) and len(b.names) == b.value.ndim for b in boxes)
  assert {n for b in boxes for n in b.names} <= set(sharding.AXES)
