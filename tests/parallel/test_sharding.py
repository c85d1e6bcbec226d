"""Rules, constraints and shardings on eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import meshes
import numpy as np
import pytest

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.training import optim, steps

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


def pins(lowered) -> list[str]:
  """The lines of a lowered program that constrain a sharding."""
  return [line for line in lowered.as_text().splitlines() if 'sharding_constraint' in line]


def test_an_unknown_axis_raises_and_a_known_one_reaches_the_program():
  x = jnp.zeros((8, 4))
  with pytest.raises(UsageError, match="logical axis 'bacth' is unknown. Did you mean 'batch'"):
    sharding.constrain(x, 'bacth', None)
  with pytest.raises(ValueError, match='axes'):
    sharding.constrain(x, 'batch')
  f = jax.jit(lambda x: sharding.constrain(x, 'batch', 'act_mlp') * 2)
  assert not pins(f.lower(x))
  with sharding.use(sharding.make_mesh(4, 2), 'tp'):
    pin, = pins(jax.jit(lambda x: sharding.constrain(x, 'batch', 'act_mlp') * 2).lower(x))
  assert '"data"' in pin and '"model"' in pin


def test_the_mesh_axes_of_each_rule_set():
  """The axes that split weights other than experts. Other tests derive their meshes from them."""
  expected = {
      'dp': (), 'fsdp': ('dcn_fsdp', 'fsdp'), 'tp': ('model',),
      'fsdp_tp': ('dcn_fsdp', 'fsdp', 'model'), 'sp': ('dcn_fsdp', 'fsdp', 'sequence', 'model'),
      'ep': ('dcn_fsdp', 'fsdp', 'expert', 'model')}
  assert {rules: meshes.weight_axes(rules) for rules in expected} == expected
  assert all(sharding.rule_set(rules)['expert'] == 'expert' for rules in expected)


def test_a_mesh_axis_is_used_once():
  assert sharding.spec(('embed', 'batch'), sharding.RULES['fsdp']) == P(
      ('dcn_fsdp', 'fsdp'), ('dcn_data', 'data', 'expert'))


@pytest.mark.parametrize('data, model, message', [
    (3, 1, 'mesh.data=3 asks for 3 devices, this machine has 8; the sizes must multiply to 8'),
    (-1, 3, 'mesh.model=3 asks for a multiple of 3 devices, this machine has 8'),
    (-1, -1, 'one axis may be -1'), (0, 1, 'must have 1 or more devices')])
def test_a_mesh_that_does_not_fit(data, model, message):
  with pytest.raises(UsageError, match=message):
    sharding.make_mesh(data, model)


def test_minus_one_means_the_rest():
  assert sharding.mesh_sizes({'data': -1, 'model': 2}, 8) == {'data': 4, 'model': 2}
  assert sharding.make_mesh(data=2, fsdp=-1, model=2).shape['fsdp'] == 2
  with pytest.raises(UsageError, match='mesh.data=3 asks for 3 devices, v5e:4x4 has 16'):
    sharding.mesh_sizes({'data': 3, 'model': 1}, 16, 'v5e:4x4')


def test_an_axis_that_the_mesh_does_not_divide_is_named():
  boxed, _ = steps.abstract_params(Transformer(
      TransformerConfig(**{**vars(CONFIG), 'd_ff': 36})), batch())
  with pytest.raises(UsageError, match="mlp.*: axis 'mlp' has size 36, which the 8 devices of mesh "
                                       "axis 'model' do not divide"):
    sharding.shardings(boxed, sharding.make_mesh(1, 8), 'tp')


def test_the_batch_is_sharded_over_all_batch_axes():
  mesh = sharding.make_mesh(2, 1, 4)
  assert sharding.batch_devices(mesh) == 8
  placed = sharding.put({'x': np.zeros((8, 3), np.int32)}, mesh)['x']
  assert placed.sharding.shard_shape((8, 3)) == (1, 3)
  # the first logical axis takes the mesh axis: here `expert`, so the batch has the others
  rules = sharding.RULES['fsdp_tp']
  assert sharding.spec(('expert', 'batch', None, 'act_mlp'), rules) == P(
      'expert', ('dcn_data', 'dcn_fsdp', 'data', 'fsdp'), None, 'model')
  assert sharding.spec(('batch', 'length', 'act_embed'), rules) == P(
      ('dcn_data', 'dcn_fsdp', 'data', 'fsdp', 'expert'), None, None)


def test_one_position_is_not_split():
  x = jnp.zeros((2, 1, 8))
  with sharding.use(sharding.make_mesh(2, sequence=4), 'sp'):
    cut = lambda x: sharding.constrain(x, 'batch', 'length', 'act_embed')
    pinned = lambda x: pins(jax.jit(cut).lower(x))
    assert len(pinned(x)) == 1 and '"sequence"' not in pinned(x)[0]
    assert '"sequence"' in pinned(jnp.zeros((2, 4, 8)))[0]


@pytest.mark.parametrize('mesh, rules, message', [
    (dict(data=2, model=4), 'fsdp', "mesh.model=4: rules='fsdp' do not use this axis, so its "
     r"devices would repeat each other's work; rules that do: tp, (\w+, )*fsdp_tp, (\w+, )*sp, "
     r'(\w+, )*ep'),
    (dict(data=2, sequence=4), 'ep', r'mesh.sequence=4: .* rules that do: (\w+, )*sp(, \w+)*$'),
    (dict(), 'fsdp', "rules='fsdp' split by mesh.fsdp, which is 1 of 8 devices: "
     '--config.mesh.data=1 --config.mesh.fsdp=-1'),
    (dict(data=4, model=2), 'fsdp_tp', '--config.mesh.data=1 --config.mesh.fsdp=-1'),
    (dict(), 'sp', '--config.mesh.data=1 --config.mesh.sequence=-1'),
    (dict(), 'fdsp', "rules='fdsp' is unknown. Did you mean 'fsdp'"),
    (dict(data=2, fsdp=4), 'fsdp', None), (dict(data=1, dcn_fsdp=2, fsdp=4), 'fsdp', None),
    (dict(data=1, dcn_fsdp=8), 'fsdp', None), (dict(data=2, fsdp=2, expert=2), 'dp', None),
    (dict(data=1, fsdp=8), 'ep', None)])
def test_no_mesh_axis_is_idle(mesh, rules, message):
  mesh = sharding.make_mesh(**mesh)
  if message is None:
    return sharding.check_mesh(mesh, rules)
  with pytest.raises(UsageError, match=message) as e:
    sharding.check_mesh(mesh, rules)
  assert '\n' not in str(e.value)


def test_one_device_takes_any_rules():
  for rules in sharding.RULES:
    sharding.check_mesh(sharding.make_mesh(devices=jax.devices()[:1]), rules)


@dataclasses.dataclass(frozen=True)
class Device:
  """The attributes of a TPU device that make_mesh reads."""
  id: int
  slice_index: int
  process_index: int
  coords: tuple[int, ...]
  core_on_chip: int = 0
  platform: str = 'tpu'
  device_kind: str = 'TPU v5 lite'


def slices(n):
  """The devices of n slices of 2 x 2 chips, two hosts each, in a bad order."""
  chips = [Device(100 * s + 2 * y + x, s, 2 * s + y, (x, y, 0))
           for s in range(n) for y in range(2) for x in range(2)]
  return chips[::2] + chips[1::2]


def test_slices_are_joined_by_the_dcn_axes_alone():
  for axes in (dict(dcn_data=2, data=2, fsdp=2), dict(dcn_fsdp=2, data=1, model=4)):
    mesh = sharding.make_mesh(**axes, devices=slices(2))
    first, second = mesh.devices.reshape(2, 4)
    assert {d.slice_index for d in first} == {0} and {d.slice_index for d in second} == {1}
  mesh = sharding.make_mesh(1, dcn_data=2, dcn_fsdp=2, fsdp=2, model=2, devices=slices(4))
  for block in mesh.devices.reshape(4, 4):
    assert len({d.slice_index for d in block}) == 1


@pytest.mark.parametrize('n, axes, message', [
    (2, dict(data=8), 'mesh.data=8: the devices are 2 slices of 4, so mesh.dcn_data [*] '
     'mesh.dcn_fsdp must be 2, got 1'),
    (1, dict(dcn_data=2), 'the devices are 1 slices of 4, .* must be 1, got 2'),
    (4, dict(dcn_data=2, data=8), 'must be 4, got 2')])
def test_dcn_axes_that_do_not_match_the_slices(n, axes, message):
  with pytest.raises(UsageError, match=message):
    sharding.make_mesh(**axes, devices=slices(n))


def test_devices_without_slices_are_joined_in_their_order():
  mesh = sharding.make_mesh(2, model=2, dcn_data=2)
  assert [d.id for d in mesh.devices.flat] == list(range(8))
  assert dict(mesh.shape, dcn_data=2, data=2, model=2) == dict(mesh.shape)


@pytest.mark.parametrize('rules, heads, kv_heads, message', [
    ('tp', 6, 6, 'model.n_heads: 6 heads do not divide over mesh.model=4'),
    ('fsdp_tp', 8, 2, 'model.n_kv_heads: 2 heads do not divide over mesh.model=4'),
    ('tp', 8, 4, None), ('fsdp', 6, 3, None)])
def test_heads_are_not_split(rules, heads, kv_heads, message):
  mesh = sharding.make_mesh(2, 4)
  if message is None:
    return sharding.check_heads(mesh, rules, heads, kv_heads)
  with pytest.raises(UsageError, match=message):
    sharding.check_heads(mesh, rules, heads, kv_heads)


def state_specs(tx, mesh, rules, config=CONFIG):
  """The optimizer state of tx -> {path: PartitionSpec as a tuple}."""
  boxed, params = steps.abstract_params(Transformer(config), batch())
  state = jax.eval_shape(tx.init, params)
  shardings = sharding.like_params(state, boxed, mesh, rules)
  for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
    s.shard_shape(x.shape)                                     # raises if it does not divide
  return {path: tuple(s.spec) for path, s in trees.flatten(shardings).items()}


def test_optimizer_state_is_sharded_like_parameters_and_over_the_batch(monkeypatch):
  monkeypatch.setattr(sharding, 'SMALL', 1024)
  mesh = sharding.make_mesh(2, 2, fsdp=2)
  specs = state_specs(optim.optimizer('adamw', 1e-3), mesh, 'fsdp_tp')
  fsdp = ('dcn_fsdp', 'fsdp')
  for moment in ('0/mu', '0/nu'):
    at = lambda path, moment=moment: specs[f'{moment}/{path}']
    # each layer has 32 * 64 elements; the axis `layers` is never split
    assert at('encoder/layers/mlp/wi_0/kernel') == (None, (*fsdp, 'data'), 'model')
    assert at('encoder/layers/mlp/wo/kernel') == (None, ('model', 'data'), fsdp)
    assert at('embedding') == (('model', 'data'), fsdp)
    assert at('decoder/layers/mlp_norm/scale') == (None, None)
    assert at('decoder/relpos/table') == (None, None)
  assert specs['0/count'] == ()
  # dp leaves all axes of the batch, but those between slices are not used
  mesh = sharding.make_mesh(2, fsdp=2, dcn_data=2)
  specs = state_specs(optim.optimizer('adamw', 1e-3), mesh, 'dp')
  assert specs['0/mu/encoder/layers/mlp/wi_0/kernel'] == (None, ('data', 'fsdp'), None)


def test_zero_splits_the_first_axis_that_divides():
  mesh = sharding.make_mesh(2, fsdp=4)
  names = ('layers', 'vocab', 'embed')
  zero = lambda shape, s=P(None, None, None): tuple(sharding._zero_spec(s, shape, names, mesh))
  assert zero((8, 2 ** 12, 4)) == (None, ('data', 'fsdp'), None)
  assert zero((8, 2 * 4097, 4)) == (None, 'data', 'fsdp')
  assert zero((8, 4097, 12), P(None, None, 'fsdp')) == (None, None, 'fsdp')
  assert zero((8, 4097, 8), P(None, None, 'fsdp')) == (None, None, ('fsdp', 'data'))
  assert zero((8, 4097, 5)) == (None, None, None)
  assert zero((64, 128, 127)) == (None, None, None)            # just below SMALL, a layer
  assert zero((64, 128, 128)) == (None, ('data', 'fsdp'), None)


def test_factored_moments_are_sharded_like_the_other_axes_of_their_parameter():
  mesh = sharding.make_mesh(1, 2, fsdp=4)
  tx = optim.optimizer('adafactor', 1e-3, min_factored=16)
  specs = state_specs(tx, mesh, 'fsdp_tp')
  fsdp = ('dcn_fsdp', 'fsdp')
  at = lambda path: (specs[f'0/v_row/{path}'], specs[f'0/v_col/{path}'])
  # wi: D 32, F 64: v_row is a mean over F. wo: F 64, D 32: over F too.
  assert at('encoder/layers/mlp/wi_0/kernel') == ((None, fsdp), (None, 'model'))
  assert at('encoder/layers/mlp/wo/kernel') == ((None, fsdp), (None, 'model'))
  assert at('encoder/layers/attn/q/kernel') == ((None, fsdp), (None, 'model'))   # 32 x 32
  assert at('embedding') == ((fsdp,), ('model',))
  assert at('encoder/layers/mlp_norm/scale') == ((), ())       # not factored: [L, 1] each
  assert specs['0/v/encoder/layers/mlp_norm/scale'] == (None, None)


@pytest.mark.parametrize('size', [(32, 48), (48, 32), (32, 32)])
def test_factored_axes_are_those_of_optax(size):
  state = optim.optimizer('adafactor', 1e-3, min_factored=16).init({'w': jnp.zeros(size)})[0]
  for name in ('v_row', 'v_col'):
    axis = sharding._factored_axis(name, size)
    assert getattr(state, name)['w'].shape == size[:axis] + size[axis + 1:]
  # the shapes of a square matrix do not show the axis; the values do
  tx = optim.optimizer('adafactor', 1e-3, min_factored=16)
  grad = {'w': jnp.arange(1., size[0] * size[1] + 1).reshape(size)}
  _, (state, _) = tx.update(grad, tx.init(grad), grad)
  for name in ('v_row', 'v_col'):
    mean = np.mean(np.square(grad['w']), axis=sharding._factored_axis(name, size))
    np.testing.assert_allclose(getattr(state, name)['w'], mean, rtol=1e-5)


def test_product_equals_the_plain_product_and_pins_its_weight(monkeypatch):
  monkeypatch.setattr(sharding, 'SMALL', 1)
  x, w = jnp.ones((8, 4, 16)), jnp.arange(16. * 32).reshape(16, 32)
  f = lambda x, w: jnp.sum(sharding.product(jnp.matmul, x, w, 'embed', 'mlp') ** 2)
  expected = jax.grad(f, (0, 1))(x, w)
  with pytest.raises(UsageError, match="logical axis 'embd' is unknown. Did you mean 'embed'"):
    sharding.product(jnp.matmul, x, w, 'embd', 'mlp')
  with sharding.use(sharding.make_mesh(2, 2, fsdp=2), 'fsdp_tp'):
    g = jax.jit(jax.grad(f, (0, 1)))
    jax.tree.map(np.testing.assert_allclose, g(x, w), expected)
    # gathered for both passes; its gradient is sharded like the weight, then like optimizer state
    forward, backward, gradient, split_gradient = pins(g.lower(x, w))
    assert '"fsdp"' not in forward and '"fsdp"' not in backward
    assert '"fsdp"' in gradient and '"data"' not in gradient and '"data"' in split_gradient
    # one position: nothing is pinned, the compiler may move the activations instead
    assert not pins(g.lower(x[:, :1], w))
