"""The first step has one loss and one gradient norm, however eight devices share the work."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_models import jit

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
# each second layer is 4 experts, of which a token asks 2: some find no place
EXPERTS = dataclasses.replace(DECODER, positions='relative', tied=True, experts=4, expert_top_k=2,
                              capacity_factor=1.)
MODELS = {'encoder_decoder': ENCODER_DECODER, 'decoder': DECODER, 'experts': EXPERTS}
TX = optim.optimizer('adafactor', 1e-2, min_factored=8)


def batch():
  """8 rows of two packed segments and padding."""
  r = np.random.RandomState(0)
  tokens = lambda: r.randint(2, 64, (8, 8)).astype(np.int32)
  targets, rows = tokens(), lambda *row: np.tile(np.array(row, np.int32), (8, 1))
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


def make_step(config, mesh, rules, tx=TX, **loss):
  """(the jitted update, its first state), lying as the program's does."""
  boxed, abstract = steps.abstract_params(Transformer(config), batch())
  new = lambda p: steps.new_state(p, tx, 0.9)
  shapes = jax.eval_shape(new, abstract)
  spread = functools.partial(sharding.like_params, boxed=boxed, mesh=mesh, rules=rules)
  placed = steps.TrainState(sharding.replicated(mesh), sharding.shardings(boxed, mesh, rules),
                            spread(shapes.opt_state), spread(shapes.ema))
  state = jax.device_put(new(numpy_params(config)), placed)
  step = jit(functools.partial(
      steps.train_step, model=Transformer(config, train=True), tx=tx, ema=0.9,
      loss=steps.Loss(1e-4, balance=0.1, router_z=0.01, **loss)),
      out_shardings=(placed, sharding.replicated(mesh)))
  return step, state


def first_step(config, mesh, rules, tx=TX, **loss):
  """(metrics on the host, the next state) of one update."""
  step, state = make_step(config, mesh, rules, tx, **loss)
  with sharding.use(mesh, rules):
    state, metrics = step(state, sharding.put(batch(), mesh))
  return jax.device_get(metrics), state


@functools.cache
def on_one_device(config):
  """The same step where no mesh exists and nothing is pinned."""
  step = jit(functools.partial(
      steps.train_step, model=Transformer(config, train=True), tx=TX, ema=0.9,
      loss=steps.Loss(1e-4, balance=0.1, router_z=0.01)))
  state, metrics = step(steps.new_state(numpy_params(config), TX, 0.9), batch())
  return jax.device_get(metrics), jax.device_get(state.ema)


@pytest.fixture(autouse=True)
def _small_leaves_too(monkeypatch):
  """Optimizer state of these tiny leaves is split as that of large ones would be."""
  monkeypatch.setattr(sharding, 'SMALL', 1)


def local(x):
  return x.sharding.shard_shape(x.shape)


CASES = [  # a subset that covers rows, models and axes; the rest is slow
    ('encoder_decoder', 'dp', dict(data=8)),
    ('encoder_decoder', 'tp', dict(data=2, model=4)),
    ('encoder_decoder', 'sp', dict(data=2, sequence=4)),
    ('decoder', 'fsdp', dict(data=2, fsdp=4)),
    ('decoder', 'sp', dict(data=1, fsdp=2, sequence=2, model=2)),
    ('decoder', 'dp', dict(data=4, dcn_data=2)),
    ('experts', 'fsdp_tp', dict(data=2, fsdp=2, model=2)),
    ('experts', 'ep', dict(data=2, expert=4)),
]
MESHES = [
    ('dp', dict(data=8)), ('dp', dict(data=2, expert=4)), ('dp', dict(data=4, dcn_data=2)),
    ('fsdp', dict(data=1, fsdp=8)), ('fsdp', dict(data=2, fsdp=4)),
    ('fsdp', dict(data=1, dcn_fsdp=2, fsdp=4)), ('tp', dict(data=1, model=8)),
    ('tp', dict(data=2, model=4)), ('tp', dict(data=4, model=2)),
    ('fsdp_tp', dict(data=1, fsdp=2, model=4)), ('fsdp_tp', dict(data=2, fsdp=2, model=2)),
    ('sp', dict(data=2, sequence=4)), ('sp', dict(data=1, sequence=8)),
    ('sp', dict(data=1, fsdp=2, sequence=2, model=2)), ('ep', dict(data=2, expert=4)),
    ('ep', dict(data=1, fsdp=2, expert=4)), ('ep', dict(data=1, fsdp=2, expert=2, model=2)),
]
ALL = [(model, rules, mesh) for model in MODELS for rules, mesh in MESHES
       if mesh.get('model', 1) <= MODELS[model].kv_heads]
identify = lambda v: v if isinstance(v, str) else ','.join(f'{k}={n}' for k, n in v.items())


@pytest.mark.parametrize('model, rules, mesh', CASES + [
    pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CASES], ids=identify)
def test_first_step_is_the_same_on_every_mesh(model, rules, mesh):
  want, average = on_one_device(MODELS[model])
  mesh = sharding.make_mesh(**mesh)
  # with chunks of the loss where they are cut along the length, as it is
  got, state = first_step(MODELS[model], mesh, rules, chunks=3 if rules == 'sp' else 1)
  assert sorted(got) == sorted(want) and (model != 'experts' or got['dropped'] > 0.01)
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
  for path, x in trees.flatten(jax.device_get(state.ema)).items():      # 0.9 * what was learned
    np.testing.assert_allclose(x, trees.flatten(average)[path], rtol=1e-3, atol=1e-5, err_msg=path)
  assert_nothing_large_is_whole(state, rules, mesh)


def assert_nothing_large_is_whole(state, rules, mesh):
  """Of each matrix a device has 1 / n: parameters over what their row names, all else over all."""
  dcn = mesh.shape['dcn_data'] * mesh.shape['dcn_fsdp']
  for path, x in trees.flatten(state.ema).items():
    if path.endswith(('kernel', 'embedding')) or '/experts/' in path:
      within = mesh.size // (dcn if rules == 'dp' else mesh.shape['dcn_data'])
      assert x.size == np.prod(local(x)) * within, path
      p = trees.flatten(state.params)[path]
      split = p.size // int(np.prod(local(p)))
      devices = {axis: n for axis, n in mesh.shape.items() if n > 1}
      named = {'dp': (), 'fsdp': sharding.FSDP, 'tp': ('model',),
               'fsdp_tp': (*sharding.FSDP, 'model'), 'sp': (*sharding.FSDP, 'sequence', 'model'),
               'ep': (*sharding.FSDP, 'expert', 'model')}[rules]
      named += ('expert',) * ('/experts/' in path and 'expert' not in named)
      assert split == np.prod([devices.get(axis, 1) for axis in named]), path


def test_moments_of_dp_are_an_eighth_on_each_of_eight_devices():
  """ZeRO-1, by what each device really holds, in and out of a step."""
  mesh = sharding.make_mesh(8)
  _, state = first_step(DECODER, mesh, 'dp', optim.optimizer('adamw', 1e-2))
  for tree in (state.opt_state[0].mu, state.opt_state[0].nu, state.ema):
    x = tree['decoder']['layers']['mlp']['wi_0']['kernel']
    assert [s.data.shape for s in x.addressable_shards] == [(2, 4, 64)] * 8
    assert len({str(s.index) for s in x.addressable_shards}) == 8
  kernel = state.params['decoder']['layers']['mlp']['wi_0']['kernel']
  assert local(kernel) == (2, 32, 64)
  held = lambda tree: sum(np.prod(local(x)) for x in jax.tree.leaves(tree))
  assert held(state.opt_state[0].mu) < held(state.params) / 7


def test_what_is_scored_lies_as_parameters_do():
  """The average too, which between steps is split over the devices that share the batch."""
  _, state = first_step(ENCODER_DECODER, sharding.make_mesh(8), 'dp')
  scored = scoring.weights_of(state)
  where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
  assert where(state.ema) != where(state.params) == where(scored['ema']) == where(scored['raw'])
  jax.tree.map(np.testing.assert_array_equal, scored['ema'], state.ema)
  assert list(scoring.weights_of(dataclasses.replace(state, ema={}))) == ['raw']


@pytest.mark.parametrize('changes', [{}, dict(per_layer_bias=True),
                                     dict(enc_attention='local', local_radius=1)])
def test_no_relative_bias_is_summed_whole(changes):
  """Gradients of scores [B, N, T, T] are summed over devices as the table of 32 buckets."""
  mesh = sharding.make_mesh(8)
  step, state = make_step(dataclasses.replace(ENCODER_DECODER, **changes), mesh, 'dp')
  with sharding.use(mesh, 'dp'):
    text = step.lower(state, sharding.put(batch(), mesh)).compile().as_text()
  summed = re.findall(r' = .*? all-reduce(?:-start)?\(', text)
  shapes = {s for line in summed for s in re.findall(r'f32\[([\d,]+)\]', line)}
  assert any(s.endswith('32,8') for s in shapes), shapes        # the table itself
  heads_and_scores = [s for s in shapes if re.search(r'\b8,8,8\b|\b8,2,6\b', s)]
  assert not heads_and_scores, heads_and_scores


def test_boxes_carry_known_axes_only():
  for config in MODELS.values():
    boxed, _ = steps.abstract_params(Transformer(config), batch())
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    boxes = jax.tree.leaves(boxed, is_leaf=is_box)
    assert all(is_box(b) and len(b.names) == b.value.ndim for b in boxes)
    assert {n for b in boxes for n in b.names} <= {*sharding.AXES, None}
