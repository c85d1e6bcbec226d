"""T5X checkpoints: built here like T5X builds them and read by us; written by us, read like T5X."""

import functools
import json
import os
import shutil

from flax import serialization
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.tools.interop import t5x, t5x_files, tensor_map
from t5lab.training import adafactor

GATED = dict(acts=('gelu', 'linear'), tied=False, scale_logits=False)
TINY = dict(vocab_size=48, d_model=16, d_ff=32, n_heads=2, d_head=8, enc_layers=2, dec_layers=2)
T5_1_0 = TransformerConfig(**TINY)
T5_1_1 = TransformerConfig(**TINY | GATED)
BYT5 = TransformerConfig(**TINY | GATED | dict(enc_layers=3, dec_layers=1, d_head=3))
UMT5 = TransformerConfig(**TINY | GATED | dict(dec_layers=3, per_layer_bias=True))
DECODER = TransformerConfig(**TINY | dict(acts=('gelu', 'linear'), enc_layers=0))

# --- T5X's side, written from its source without our code --------------------------------------


def t5x_shapes(c):
  """{T5X's unscanned name: shape} from examples/t5/network.py and decoder_only/network.py."""
  D, A, F, N, V = c.d_model, c.n_heads * c.d_head, c.d_ff, c.n_heads, c.vocab_size
  out = {('' if c.enc_layers else 'decoder/') + 'token_embedder/embedding': (V, D)}
  if not c.tied:
    out['decoder/logits_dense/kernel'] = (D, V)
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    if not layers:
      continue
    out[f'{stack}/{stack}_norm/scale'] = (D,)
    out[f'{stack}/relpos_bias/rel_embedding'] = (N, 32)
    blocks = {'attention': 'pre_attention_layer_norm'} if stack == 'encoder' else {
        'self_attention': 'pre_self_attention_layer_norm',
        'encoder_decoder_attention': 'pre_cross_attention_layer_norm'}
    if not c.enc_layers:
      del blocks['encoder_decoder_attention']
    for i in range(layers):
      at = f'{stack}/layers_{i}'
      for block, norm in blocks.items():
        out |= {f'{at}/{block}/{p}/kernel': (D, A) for p in ('query', 'key', 'value')}
        out |= {f'{at}/{block}/out/kernel': (A, D), f'{at}/{norm}/scale': (D,)}
      out |= {f'{at}/mlp/{wi}/kernel': (D, F)
              for wi in (['wi'] if len(c.acts) == 1 else ['wi_0', 'wi_1'])}
      out |= {f'{at}/mlp/wo/kernel': (F, D), f'{at}/pre_mlp_layer_norm/scale': (D,)}
  return out


def umt5_shapes(c):
  """{scalable_t5's name: shape}, layers on axis 1."""
  D, N, H, F, V = c.d_model, c.n_heads, c.d_head, c.d_ff, c.vocab_size
  out = {'token_embedder/embedding': (V, D), 'decoder/logits_dense/kernel': (D, V)}
  for stack, L in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    at = f'{stack}/{stack}'
    out[f'{stack}/{stack}_norm/scale'] = (D,)
    out[f'{at}/relpos_bias/rel_embedding'] = (N, L, 32)
    blocks = {'attention': 'pre_attention_layer_norm'} if stack == 'encoder' else {
        'self_attention': 'pre_self_attention_layer_norm',
        'encoder_decoder_attention': 'pre_cross_attention_layer_norm'}
    for block, norm in blocks.items():
      out |= {f'{at}/{block}/{p}/kernel': (D, L, N, H) for p in ('query', 'key', 'value')}
      out |= {f'{at}/{block}/out/kernel': (N, L, H, D), f'{at}/{norm}/scale': (D, L)}
    out |= {f'{at}/mlp/{wi}/kernel': (D, L, F) for wi in ('wi_0', 'wi_1')}
    out |= {f'{at}/mlp/wo/kernel': (F, L, D), f'{at}/pre_mlp_layer_norm/scale': (D, L)}
  return out


def nest(flat):
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for p in parents:
      node = node.setdefault(p, {})
    node[last] = leaf
  return tree


def zarr(folder, name, array, driver='file', inline=False, dtype=None):
  """T5X's Checkpointer._write_array: writes an array, returns its spec for the msgpack."""
  if inline:
    return array
  spec = {'driver': 'zarr', 'dtype': dtype or array.dtype.name,
          'kvstore': {'driver': 'file', 'path': name.replace('/', '.')},
          'metadata': {'compressor': {'id': 'gzip'}, 'shape': array.shape,
                       'chunks': [max(1, n // 2) for n in array.shape]}}
  spec = ts.Spec(spec).to_json()
  relative = spec['kvstore']['path']
  spec['kvstore']['path'] = os.path.join(folder, relative)
  ts.open(ts.Spec(spec), create=True).result().write(array).result()
  spec['kvstore'] = {'driver': driver, 'path': relative}
  if driver == 'gcs':
    spec['kvstore']['bucket'] = 't5x-dummy-bucket'
    spec['path'] = spec['kvstore'].pop('path')             # tensorstore before 0.1.14
  return spec


def save(folder, target, slots=None, step=7, wrap=lambda o: {'version': 3, 'optimizer': o}, **how):
  folder.mkdir(parents=True, exist_ok=True)
  put = lambda at, flat: nest({k: zarr(folder, f'{at}/{k}', v, **how) for k, v in flat.items()})
  state = {'step': np.asarray(step, np.int32)}
  if slots:
    state['param_states'] = put('state/param_states', slots)
  tree = wrap({'target': put('target', target), 'state': state})
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  return folder


def load_as_t5x(folder):
  """Like load_t5x_checkpoint: finds arrays and specs, joins each path, opens without chunks."""
  tree = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  assert tree['version'] == 3 and set(tree) == {'version', 'optimizer'}
  out = {}

  def walk(node, at):
    for k, v in node.items():
      if isinstance(v, dict) and set(v) >= {'driver', 'kvstore', 'metadata'}:
        v = ts.Spec(v).to_json()
        del v['metadata']['chunks'], v['metadata']['compressor']
        v['kvstore']['path'] = os.path.join(folder, v['kvstore']['path'])
        out['/'.join((*at, k))] = ts.open(v, open=True).result().read().result()
      elif isinstance(v, dict):
        walk(v, (*at, k))
      else:
        out['/'.join((*at, k))] = v

  walk(tree['optimizer'], ())
  return out


def golden(names):
  """Element n of the i-th sorted name is sin(0.37 n + i), scaled by its kind. [T5X's code]"""
  out = {}
  for i, name in enumerate(sorted(names)):
    v = np.sin(np.arange(np.prod(names[name])) * 0.37 + i).reshape(names[name])
    v = 1 + 0.1 * v if name.endswith('/scale') else v if 'embedding' in name else 0.3 * v
    out[name] = v.astype(np.float32)
  return out


def random_target(shapes, rng):
  return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


# --- our side ----------------------------------------------------------------------------------


@functools.cache
def abstract(c):
  batch = {k: jnp.ones((1, 4), jnp.int32) for k in (
      ['encoder_input_tokens'] if c.enc_layers else []) + ['decoder_input_tokens']}
  return nn.unbox(jax.eval_shape(Transformer(c).init, jax.random.key(0), batch)['params'])


def random_params(c, rng):
  return trees.map_paths(
      lambda _, x: rng.standard_normal(x.shape).astype(np.float32), abstract(c))


def random_state(params, rng, min_factored):
  state = adafactor.scale_by_adafactor(min_factored=min_factored).init(params)
  fill = lambda x: (rng.random(x.shape) if x.size > x.shape[0] or x.ndim == 1 and x.size > 1
                    else np.zeros(x.shape)).astype(np.float32)
  return state._replace(count=np.int32(7), **{
      k: jax.tree.map(fill, getattr(state, k)) for k in ('v_row', 'v_col', 'v')})


def assert_equal(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert list(a) == list(b)
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert np.shape(a[path]) == np.shape(b[path]), path


def read(folder, c):
  reader = t5x.T5x(folder)
  return tensor_map.read(t5x.tensor_rows(c, t5x.is_scanned(reader)), reader, abstract(c))


@pytest.mark.parametrize('c, first, other, total', [
    (T5_1_0, [-1.596574, -2.330164, -2.759761, -2.829319, -2.529764, -1.900176],
     [-2.743946, -2.644504, -2.200060, -1.468596, -0.545539, 0.448689], 615.61231),
    (T5_1_1, [-0.466039, -0.373009, -0.229494, -0.054918, 0.127091, 0.291898],
     [-0.098646, -0.057758, -0.009053, 0.040877, 0.085275, 0.118131], 84.592950)])
def test_a_checkpoint_of_t5x_gives_the_logits_of_t5x(tmp_path, c, first, other, total):
  folder = save(tmp_path / 'checkpoint_7', golden(t5x_shapes(c)), driver='gfile')
  reader = t5x.T5x(folder)
  assert TransformerConfig(**t5x.fields(reader)) == c
  assert not t5x.is_scanned(reader) and reader.step == 7
  targets = np.array([[20, 21, 22, 1, 0], [30, 31, 1, 0, 0]])
  logits = jax.jit(Transformer(c).apply)({'params': read(folder, c)}, {
      'encoder_input_tokens': jnp.array([[5, 7, 9, 11, 13, 1, 0, 0], [6, 8, 10, 1, 0, 0, 0, 0]]),
      'decoder_input_tokens': jnp.array([[0, 20, 21, 22, 1], [0, 30, 31, 1, 0]])})
  np.testing.assert_allclose(logits[0, 0, :6], first, atol=2e-6)
  np.testing.assert_allclose(logits[1, 2, :6], other, atol=2e-6)
  np.testing.assert_allclose(np.abs(logits)[targets > 0].sum(), total, rtol=1e-6)


@pytest.mark.parametrize('c', [T5_1_0, T5_1_1, BYT5, DECODER])
def test_names_and_shapes_are_those_of_t5x(tmp_path, c, rng):
  params = random_params(c, rng)
  t5x.write(tmp_path / 'c', c, params, 7)
  assert t5x.T5x(tmp_path / 'c').shapes() == t5x_shapes(c)
  assert TransformerConfig(**t5x.fields(t5x.T5x(tmp_path / 'c'))) == c


def test_scanned_names_shapes_and_layers_are_those_of_scalable_t5(tmp_path, rng):
  target = random_target(umt5_shapes(UMT5), rng)
  reader = t5x.T5x(save(tmp_path / 'c', target, driver='gcs'))
  assert t5x.is_scanned(reader) and TransformerConfig(**t5x.fields(reader)) == UMT5
  params = read(tmp_path / 'c', UMT5)
  layer = lambda name: np.moveaxis(target[f'decoder/decoder/{name}'], 1, 0)[2]
  decoder = jax.tree.map(lambda x: x[2], params['decoder']['layers'])
  np.testing.assert_array_equal(
      decoder['cross']['q']['kernel'][:, 8:], layer('encoder_decoder_attention/query/kernel')[:, 1])
  np.testing.assert_array_equal(
      decoder['attn']['o']['kernel'][8:], layer('self_attention/out/kernel')[1])
  np.testing.assert_array_equal(decoder['mlp']['wo']['kernel'], layer('mlp/wo/kernel'))
  np.testing.assert_array_equal(decoder['relpos']['table'], layer('relpos_bias/rel_embedding').T)
  np.testing.assert_array_equal(
      decoder['cross_norm']['scale'], layer('pre_cross_attention_layer_norm/scale'))
  t5x.write(tmp_path / 'back', UMT5, params, 7, scanned=True)
  back = load_as_t5x(tmp_path / 'back')
  assert back.keys() == {f'target/{k}' for k in target} | {'state/step'}
  for name in target:
    np.testing.assert_array_equal(back[f'target/{name}'], target[name], err_msg=name)


@pytest.mark.parametrize('form', ['t5x', 'orbax'])
@pytest.mark.parametrize('c, scanned', [
    (T5_1_0, False), (T5_1_1, True), (BYT5, False), (BYT5, True), (UMT5, False), (UMT5, True),
    (DECODER, False)])
def test_round_trip_is_bit_equal(tmp_path, c, scanned, form, rng):
  params = random_params(c, rng)
  t5x.write(tmp_path / 'c', c, params, 7, scanned=scanned, form=form)
  reader = t5x.T5x(tmp_path / 'c')
  assert reader.step == 7 and t5x.is_scanned(reader) == scanned
  assert_equal(read(tmp_path / 'c', c), params)
  with pytest.raises(UsageError, match='optimizer state is missing'):
    t5x.read_optimizer(reader, c, scanned, None)


@pytest.mark.parametrize('c, scanned, form, min_factored', [
    (T5_1_1, False, 't5x', 16), (T5_1_0, False, 'orbax', 128), (BYT5, False, 't5x', 4),
    (UMT5, True, 't5x', 16), (UMT5, True, 'orbax', 16), (UMT5, False, 't5x', 16)])
def test_round_trip_of_the_optimizer_is_bit_equal(tmp_path, c, scanned, form, min_factored, rng):
  params = random_params(c, rng)
  state = random_state(params, rng, min_factored)
  t5x.write(tmp_path / 'c', c, params, 7, scanned, form, optimizer=state)
  like = jax.eval_shape(adafactor.scale_by_adafactor(min_factored=min_factored).init, params)
  again = t5x.read_optimizer(t5x.T5x(tmp_path / 'c'), c, scanned, like)
  assert type(again) is adafactor.AdafactorState
  assert_equal(again, state)
  assert_equal(read(tmp_path / 'c', c), params)


def test_written_files_are_those_that_t5x_writes(tmp_path, rng):
  params = random_params(T5_1_1, rng)
  state = random_state(params, rng, 16)
  t5x.write(tmp_path / 'c', T5_1_1, params, 7, optimizer=state)
  written = load_as_t5x(tmp_path / 'c')
  names = t5x_shapes(T5_1_1)
  assert set(written) == {f'target/{k}' for k in names} | {'state/step'} | {
      f'state/param_states/{k}/{s}' for k in names for s in ('m', 'v', 'v_row', 'v_col')}
  assert written['state/step'].dtype == np.int32 and written['state/step'] == 7
  assert all(v.dtype == np.float32 for k, v in written.items() if k != 'state/step')
  wo = 'decoder/layers_1/mlp/wo/kernel'                   # [32, 16]: v_row is the smaller axis
  slots = {s: written[f'state/param_states/{wo}/{s}'] for s in ('m', 'v', 'v_row', 'v_col')}
  assert {s: x.shape for s, x in slots.items()} == {
      'm': (1,), 'v': (1,), 'v_row': (16,), 'v_col': (32,)}
  scale = 'state/param_states/encoder/encoder_norm/scale'
  assert {s: written[f'{scale}/{s}'].shape for s in ('m', 'v', 'v_row', 'v_col')} == {
      'm': (1,), 'v': (16,), 'v_row': (1,), 'v_col': (1,)}
  # Parameters and v are zarr; slots to which Adafactor.derive_logical_axes gives no axes, inline.
  folders = {p.name for p in (tmp_path / 'c').iterdir()} - {'checkpoint'}
  unfactored = {k for k in names if written[f'state/param_states/{k}/v'].shape != (1,)}
  assert folders == {f'target.{k}'.replace('/', '.') for k in names} | {
      f'state.param_states.{k}.v'.replace('/', '.') for k in unfactored}
  tree = serialization.msgpack_restore((tmp_path / 'c' / 'checkpoint').read_bytes())
  assert tree['optimizer']['target']['token_embedder']['embedding'] == {
      'driver': 'zarr', 'dtype': 'float32',
      'kvstore': {'driver': 'file', 'path': 'target.token_embedder.embedding/'},
      'metadata': {'chunks': [48, 16], 'compressor': {'id': 'gzip', 'level': 1},
                   'shape': [48, 16]}}
  header = json.loads((tmp_path / 'c/target.token_embedder.embedding/.zarray').read_text())
  assert (header['dtype'], header['zarr_format'], header['order']) == ('<f4', 2, 'C')


def test_the_orbax_form_is_a_folder_named_state_that_orbax_restores(tmp_path, rng):
  params = random_params(DECODER, rng)
  t5x.write(tmp_path / 'c', DECODER, params, 7, form='orbax')
  tree = serialization.msgpack_restore((tmp_path / 'c/state/checkpoint').read_bytes())
  assert set(tree) == {'target', 'state'} and tree['state'] == {'step': 7}
  assert tree['target']['decoder']['decoder_norm']['scale'] == (
      'PLACEHOLDER://target.decoder.decoder_norm.scale')
  restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).restore(
      tmp_path / 'c/state')
  assert restored['state']['step'] == 7 and restored['target'].keys() == {'decoder'}
  assert_equal(restored['target']['decoder']['token_embedder'], {'embedding': params['embedding']})


def test_large_arrays_are_cut_along_the_first_axis(tmp_path, monkeypatch, rng):
  monkeypatch.setattr(t5x_files, 'CHUNK', 5 * 16 * 4)
  params = random_params(DECODER, rng)
  t5x.write(tmp_path / 'c', DECODER, params, 7)
  folder = tmp_path / 'c/target.decoder.token_embedder.embedding'
  assert {p.name for p in folder.iterdir()} == {'.zarray'} | {f'{i}.0' for i in range(10)}
  assert_equal(read(tmp_path / 'c', DECODER), params)


# --- Adafactor: one step of T5X from its slots equals one step of ours from the converted ones ---


def adafactor_by_hand(param, slots, grad, step, rows, cols):
  """Returns (update, new slots) at learning rate 1. [Shazeer and Stern 2018, algorithms 4 and 5]

  v_row is the mean over the axes `cols`, v_col over `rows`; axes in neither are independent.
  """
  beta = 1 - (step + 1.) ** -0.8
  axes = rows + cols if rows or cols else tuple(range(param.ndim))
  squared, slots = grad ** 2 + 1e-30, dict(slots)
  if slots['v'].shape == (1,):
    slots['v_row'] = beta * slots['v_row'] + (1 - beta) * squared.mean(cols)
    slots['v_col'] = beta * slots['v_col'] + (1 - beta) * squared.mean(rows)
    row, col = np.expand_dims(slots['v_row'], cols), np.expand_dims(slots['v_col'], rows)
    u = grad / np.sqrt(row * col / row.mean(rows, keepdims=True))
  else:
    slots['v'] = beta * slots['v'] + (1 - beta) * squared
    u = grad / np.sqrt(slots['v'])
  rms = lambda x: np.sqrt((x ** 2).mean(axes, keepdims=True))
  return u / np.maximum(1, rms(u)) * np.maximum(1e-3, rms(param)), slots


def axes_of(name, shape, scanned):
  """Returns (rows, cols, whether factored at 16): the smaller and the larger axis of a matrix.

  Scanned: 'embed', and the other axes except 'layers' (axis 1).
  """
  if scanned and name.split('/')[0] == name.split('/')[1]:
    if len(shape) == 2:
      return (0,), (), False
    if 'rel_embedding' in name:
      return (0,), (2,), False
    embed = len(shape) - 1 if name.endswith(('out/kernel', 'wo/kernel')) else 0
    return (embed,), tuple(a for a in range(len(shape)) if a not in (1, embed)), True
  if len(shape) < 2:
    return (0,), (), False
  small, large = np.argsort(shape)
  return (int(small),), (int(large),), min(shape) >= 16


@pytest.mark.parametrize('c, scanned', [(T5_1_1, False), (UMT5, True)])
def test_adafactor_continues_like_t5x(tmp_path, c, scanned, rng):
  shapes = umt5_shapes(c) if scanned else t5x_shapes(c)
  params, grads = random_target(shapes, rng), random_target(shapes, rng)
  slots, expected = {}, {}
  for name, shape in shapes.items():
    rows, cols, factored = axes_of(name, shape, scanned)
    pick = lambda axes, shape=shape: rng.random(np.delete(shape, axes)).astype(np.float32)
    state = dict.fromkeys(('m', 'v', 'v_row', 'v_col'), np.zeros((1,), np.float32)) | (
        {'v_row': pick(cols), 'v_col': pick(rows)} if factored else {'v': pick(())})
    slots |= {f'{name}/{k}': v for k, v in state.items()}
    expected[name], new = adafactor_by_hand(params[name], state, grads[name], 7, rows, cols)
    expected |= {f'{name}/{k}': v for k, v in new.items() if v.shape != (1,)}
  save(tmp_path / 'c', params, slots)
  ours = read(tmp_path / 'c', c)
  gradients = read(save(tmp_path / 'g', grads), c)
  tx = adafactor.scale_by_adafactor(min_factored=16)
  state = t5x.read_optimizer(
      t5x.T5x(tmp_path / 'c'), c, scanned, jax.eval_shape(tx.init, ours))
  assert state.count == 7
  update, state = jax.jit(tx.update)(gradients, state, ours)
  t5x.write(tmp_path / 'new', c, update, 8, scanned, optimizer=state)
  written = load_as_t5x(tmp_path / 'new')
  for name, value in expected.items():
    at = 'target' if name in shapes else 'state/param_states'
    np.testing.assert_allclose(written[f'{at}/{name}'], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_square_table_of_positions_swaps_its_factors(tmp_path, rng):
  c = TransformerConfig(**TINY | dict(n_heads=32, enc_layers=1, dec_layers=1))   # [32, 32]
  params = random_params(c, rng)
  state = random_state(params, rng, 32)
  t5x.write(tmp_path / 'c', c, params, 7, optimizer=state)
  written = load_as_t5x(tmp_path / 'c')
  np.testing.assert_array_equal(
      written['state/param_states/encoder/relpos_bias/rel_embedding/v_col'],
      state.v_row['encoder']['relpos']['table'])
  like = jax.eval_shape(adafactor.scale_by_adafactor(min_factored=32).init, params)
  assert_equal(t5x.read_optimizer(t5x.T5x(tmp_path / 'c'), c, False, like), state)


@pytest.mark.parametrize('change, message', [
    (dict(m=np.ones((16, 32), np.float32)), r'has momentum \(.*/m of shape \(16, 32\)\)'),
    (dict(v_row=None, v_col=None, v=np.ones((16, 32), np.float32)), 'Take the parameters'),
    (dict(v_row=np.ones((32,), np.float32), v_col=np.ones((16,), np.float32)),
     'is not of Adafactor'),
    (dict(mu=np.ones((16, 32), np.float32)), "not Adafactor's slots"),
    (dict(v_col=np.full((32,), np.nan, np.float32)), 'not finite')])
def test_slots_that_do_not_fit(tmp_path, change, message, rng):
  params = random_params(DECODER, rng)
  tx = adafactor.scale_by_adafactor(min_factored=16)
  t5x.write(tmp_path / 'c', DECODER, params, 7, optimizer=tx.init(params))
  file = tmp_path / 'c/checkpoint'
  tree = serialization.msgpack_restore(file.read_bytes())
  slots = tree['optimizer']['state']['param_states']['decoder']['layers_0']['mlp']['wi_0']['kernel']
  for k, v in change.items():
    slots[k] = v
  file.write_bytes(serialization.msgpack_serialize(tree))
  with pytest.raises(UsageError, match=message):
    t5x.read_optimizer(t5x.T5x(tmp_path / 'c'), DECODER, False, jax.eval_shape(tx.init, params))


def test_momentum_that_is_zero_is_accepted(tmp_path, rng):
  params = random_params(DECODER, rng)
  tx = adafactor.scale_by_adafactor()
  t5x.write(tmp_path / 'c', DECODER, params, 7, optimizer=tx.init(params))
  file = tmp_path / 'c/checkpoint'
  tree = serialization.msgpack_restore(file.read_bytes())
  slots = tree['optimizer']['state']['param_states']['decoder']['decoder_norm']['scale']
  slots['m'] = np.zeros((16,), np.float32)
  file.write_bytes(serialization.msgpack_serialize(tree))
  like = jax.eval_shape(tx.init, params)
  assert_equal(t5x.read_optimizer(t5x.T5x(file), DECODER, False, like),
               tx.init(params)._replace(count=7))


def test_slots_that_a_scanned_checkpoint_cannot_hold(tmp_path, rng):
  params = random_params(UMT5, rng)
  with pytest.raises(UsageError, match='is not factored in our optimizer state'):
    t5x.write(tmp_path / 'a', UMT5, params, 7, scanned=True,
              optimizer=adafactor.scale_by_adafactor().init(params))
  params = random_params(T5_1_1, rng)
  with pytest.raises(UsageError, match='table of relative positions that all layers share'):
    t5x.write(tmp_path / 'b', T5_1_1, params, 7, scanned=True,
              optimizer=adafactor.scale_by_adafactor(min_factored=16).init(params))
  assert not (tmp_path / 'b/checkpoint').exists()


# --- other forms, other models, damaged files --------------------------------------------------


@pytest.mark.parametrize('wrap', [
    lambda o: o,                                                       # version 0
    lambda o: {'version': 2, 'optimizer': o},
    lambda o: {'_optimizer': o, 'flax_mutables': None, 'params_axes': None}])
def test_older_forms(tmp_path, wrap, monkeypatch, rng):
  target = random_target(t5x_shapes(DECODER), rng)
  monkeypatch.setattr(serialization, 'MAX_CHUNK_SIZE', 100)            # flax splits larger arrays
  reader = t5x.T5x(save(tmp_path / 'c', target, wrap=wrap, inline=True))
  assert reader.shapes() == t5x_shapes(DECODER) and reader.step == 7
  np.testing.assert_array_equal(
      reader.read('decoder/token_embedder/embedding'), target['decoder/token_embedder/embedding'])


def test_version_2_wrote_bfloat16_as_uint16(tmp_path, rng):
  target = {k: v.astype(jnp.bfloat16) for k, v in random_target(t5x_shapes(DECODER), rng).items()}
  save(tmp_path / 'c', {k: v.view(np.uint16) for k, v in target.items()},
       wrap=lambda o: {'version': 2, 'optimizer': o})
  ours = read(tmp_path / 'c', DECODER)
  np.testing.assert_array_equal(
      ours['embedding'], target['decoder/token_embedder/embedding'].astype(np.float32))


@pytest.mark.parametrize('ocdbt', [True, False])
@pytest.mark.parametrize('below', ['', 'state'])
def test_current_orbax_is_read(tmp_path, ocdbt, below, rng):
  target = random_target(t5x_shapes(DECODER), rng)
  tree = {'target': nest(target), 'state': {'step': np.int32(7)}}
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)).save(
      tmp_path / 'c' / below, args=ocp.args.PyTreeSave(tree))
  reader = t5x.T5x(tmp_path / 'c')
  assert reader.step == 7 and reader.shapes() == t5x_shapes(DECODER)
  np.testing.assert_array_equal(
      read(tmp_path / 'c', DECODER)['embedding'], target['decoder/token_embedder/embedding'])


def test_an_orbax_database_may_not_claim_more_than_it_holds(tmp_path, monkeypatch):
  zeros = {'target': {'a': np.zeros((1 << 20,), np.float32)}}
  cut = {'target': {'a': ocp.SaveArgs(chunk_byte_size=1 << 18)}}
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(
      tmp_path / 'c', args=ocp.args.PyTreeSave(zeros, cut))
  monkeypatch.setattr(t5x_files, 'CHUNK', 1 << 20)
  monkeypatch.setattr(t5x_files, 'MAX_EXPANSION', 1)
  with pytest.raises(UsageError, match='a claims 4194304 bytes'):
    t5x.T5x(tmp_path / 'c').read('a')


def test_tables_of_the_layers_must_be_equal_to_become_one(tmp_path, rng):
  save(tmp_path / 'c', random_target(umt5_shapes(UMT5), rng))
  shared = TransformerConfig(**TINY | GATED | dict(dec_layers=3))
  with pytest.raises(UsageError, match='per_layer_bias=True'):
    read(tmp_path / 'c', shared)


@pytest.mark.parametrize('change', [
    dict(positions='rope'), dict(scale_attn=True), dict(scale_logits=False), dict(norm='layer'),
    dict(n_kv_heads=1)])
def test_models_that_t5x_does_not_have(tmp_path, change):
  c = TransformerConfig(**TINY | change)
  with pytest.raises(UsageError, match=f'{next(iter(change))}='):
    t5x.tensor_rows(c, False)


def test_checkpoints_and_models_that_are_not_t5(tmp_path, rng):
  save(tmp_path / 'c', {'dense/kernel': np.ones((3, 2), np.float32)})
  with pytest.raises(UsageError, match='decoder/token_embedder/embedding is missing, a T5'):
    t5x.fields(t5x.T5x(tmp_path / 'c'))
  save(tmp_path / 'd', random_target(t5x_shapes(DECODER), rng))
  with pytest.raises(UsageError, match='missing token_embedder/embedding'):
    read(tmp_path / 'd', T5_1_1)
  with pytest.raises(UsageError, match='scans the layers of encoder-decoders only'):
    t5x.tensor_rows(DECODER, True)
  with pytest.raises(UsageError, match="form 'gguf'"):
    t5x.write(tmp_path / 'e', DECODER, {}, 7, form='gguf')
  params = {**random_params(DECODER, rng), 'extra': np.ones(3)}
  with pytest.raises(UsageError, match='no row for our extra'):
    t5x.write(tmp_path / 'e', DECODER, params, 7)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A checkpoint of DECODER, to copy."""
  folder = tmp_path_factory.mktemp('t5x') / 'checkpoint_7'
  t5x.write(folder, DECODER, random_params(DECODER, np.random.default_rng(0)), 7)
  return folder


def edit(file, change):
  tree = serialization.msgpack_restore(file.read_bytes())
  change(tree)
  file.write_bytes(serialization.msgpack_serialize(tree))


def scale(tree):
  return tree['optimizer']['target']['decoder']['decoder_norm']


def set_path(path):
  move = lambda tree: scale(tree)['scale']['kvstore'].update(path=path)
  return lambda at: edit(at / 'checkpoint', move)


def header(**change):
  def damage(at):
    file = at / 'target.decoder.decoder_norm.scale/.zarray'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
  return damage


def link_out(at):
  folder = at / 'target.decoder.decoder_norm.scale'
  folder.rename(at.parent / 'elsewhere')
  folder.symlink_to(at.parent / 'elsewhere')


def link_chunk_out(at):
  chunk = at / 'target.decoder.decoder_norm.scale/0'
  chunk.rename(at.parent / 'elsewhere')
  chunk.symlink_to(at.parent / 'elsewhere')


def claim(at):
  header(shape=[10 ** 12], chunks=[10 ** 12])(at)
  edit(at / 'checkpoint', lambda t: scale(t)['scale']['metadata'].update(shape=[10 ** 12]))


@pytest.mark.parametrize('damage, message', [
    (set_path('../elsewhere'), 'must be a name inside'),
    (set_path('a/../../elsewhere'), 'must be a name inside'),
    (set_path('/etc'), 'must be a name inside'),
    (set_path('.'), 'must be a name inside'),
    (set_path(7), 'must be a name inside'),
    (link_out, 'link out of the checkpoint'),
    (link_chunk_out, 'link out of the checkpoint'),
    (set_path('target.gone'), 'cannot open'),
    (header(shape=[8]), r'shape \(16,\) in the tree and \(8,\) on disk'),
    (header(shape='big'), 'cannot open'),
    (header(shape=[-16]), 'cannot open'),
    (header(chunks=[0]), 'cannot open'),
    (header(chunks=[10 ** 12]), 'claims 4000000000000 bytes'),
    (header(dtype='|V99999999999'), 'on disk|cannot open'),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t)['scale']['metadata'].update(shape=[-1])),
     'not a list of sizes'),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t)['scale']['metadata'].update(shape=[1.])),
     'not a list of sizes'),
    (header(compressor={'id': 'pickle'}), 'cannot open'),
    (claim, 'has shape'),
    (lambda at: (at / 'target.decoder.decoder_norm.scale/0').unlink(), '0 of its 1 chunks'),
    (lambda at: (at / 'target.decoder.decoder_norm.scale/0').write_bytes(b'junk'), 'is damaged'),
    (lambda at: (at / 'checkpoint').write_bytes(b'\x82\xa1'), 'not msgpack'),
    (lambda at: (at / 'checkpoint').write_bytes(b'\x07'), 'a int, not a tree'),
    (lambda at: (at / 'checkpoint').write_bytes(b'model_checkpoint_path: "x"'), 'TensorFlow'),
    (lambda at: (at / 'checkpoint').unlink(), 'no T5X checkpoint in'),
    (lambda at: edit(at / 'checkpoint', lambda t: t['optimizer'].pop('target')), "no 'target'"),
    (lambda at: edit(at / 'checkpoint', lambda t: t['optimizer'].update(target={})), 'is empty'),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t).update(scale='rm')), "the text 'rm'"),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t).update(scale=[1])), 'is a list'),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t).update(scale=np.ones(1, complex))),
     'dtype complex128, which is not numeric'),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t).update({'a/b': 1})),
     "below 'target/decoder/decoder_norm' is 'a/b', which is not a name"),
    (lambda at: edit(at / 'checkpoint', lambda t: scale(t)['scale'].update(metadata=[])),
     'is not a tensorstore spec')])
def test_damaged_and_hostile_files_are_refused_in_one_line(written, tmp_path, damage, message):
  at = tmp_path / 'checkpoint_7'
  shutil.copytree(written, at)
  damage(at)
  with pytest.raises(UsageError, match=message) as e:
    read(at, DECODER)
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_a_claim_is_refused_by_the_reader_too(written, tmp_path):
  shutil.copytree(written, tmp_path / 'x')
  claim(tmp_path / 'x')
  with pytest.raises(UsageError, match='claims 4000000000000 bytes'):
    t5x.T5x(tmp_path / 'x').read('decoder/decoder_norm/scale')


def test_the_tree_has_a_size_limit(tmp_path, monkeypatch):
  save(tmp_path / 'c', {'a': np.ones(2, np.float32)})
  monkeypatch.setattr(t5x_files, 'MAX_TREE', 50)
  with pytest.raises(UsageError, match=r'has \d+ bytes; the limit for this kind of file is 50'):
    t5x.T5x(tmp_path / 'c')


@pytest.mark.parametrize('text, message', [
    ('{"tree_metadata": {}, "use_zarr3": true}', 'has use_zarr3'),
    ('[' * 9999, 'metadata of a tree'),
    ('{"tree_metadata": {"a": 1}}', 'metadata of a tree')])
def test_invalid_orbax_metadata(tmp_path, text, message):
  (tmp_path / '_METADATA').write_text(text)
  with pytest.raises(UsageError, match=message):
    t5x.T5x(tmp_path)


def test_an_existing_checkpoint_is_not_overwritten(written, rng):
  params = random_params(DECODER, rng)
  with pytest.raises(UsageError, match='cannot write'):
    t5x.write(written, DECODER, params, 8)


def test_a_model_dir_names_its_steps(tmp_path):
  (tmp_path / 'checkpoint_7').mkdir()
  with pytest.raises(UsageError, match='it holds checkpoint_7: name one of them'):
    t5x.T5x(tmp_path)
  with pytest.raises(UsageError, match='no such file or folder'):
    t5x.T5x(tmp_path / 'checkpoint_8')


def test_a_step_is_one_integer(tmp_path):
  target = {'a': np.ones(2, np.float32)}
  assert t5x.T5x(save(tmp_path / 'a', target, wrap=lambda o: {'target': o['target']})).step is None
  with pytest.raises(UsageError, match=r'must be one integer, got int32\(2,\)'):
    _ = t5x.T5x(save(tmp_path / 'b', target, step=[1, 2])).step
