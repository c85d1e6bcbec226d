"""Laws that hold in every family: causality, packed = separate, cached decoding = teacher forcing.

One compiled program a family serves all of them: row 0 is packed, rows 1 and 2 are its parts.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from small_models import BATCH, CONFIGS, random_params

from t5lab.models.cache import init_cache
from t5lab.models.transformer import Transformer
from t5lab.training import steps

# Their code is that of others here: rotations and grouped heads are llama3_1's, norms and windows
# gemma2's, positions m2m100's, the rest T5's, BERT's and, in decoding, st_moe's.
SAME_CODE = ['ul2', 'llama1', 'llama2_70b', 'smollm2', 'minilm', 'blenderbot', 'marian',
             'marian_big', 'pegasus', 'roberta', 'distilbert', 'qwen2', 'qwen2_7b', 'qwen3_8b',
             'gemma']
SAME_DECODING = [*SAME_CODE, 't5_1_0', 'switch', 'longt5_local', 'longt5_tglobal']
DECODES = [name for name, c in CONFIGS.items() if c.dec_layers]


def marked(names, same):
  """Parameters, of which those in `same` are slow tests."""
  return [pytest.param(name, marks=[pytest.mark.slow] * (name in same)) for name in names]


@functools.cache
def family(name):
  """(parameters, compiled features -> logits)."""
  model = Transformer(CONFIGS[name])
  run = jax.jit(lambda params, batch: model.apply({'params': params}, batch))
  params = random_params(CONFIGS[name])
  return params, lambda batch: np.asarray(run(params, batch))


def side(tokens, segments, positions):
  """Features of one side, int32; `segments` as a string of digits a row."""
  return {'input_tokens': np.array(tokens, np.int32), 'positions': np.array(positions, np.int32),
          'segment_ids': np.array([list(map(int, s)) for s in segments], np.int32)}


def features(c, encoder, decoder):
  out = {}
  for on, name, given in ((c.enc_layers, 'encoder', encoder), (c.dec_layers, 'decoder', decoder)):
    if on:
      out |= {f'{name}_{k}': v for k, v in given.items()}
  if c.types > 1:
    out['encoder_token_types'] = (out['encoder_positions'] > 2).astype(np.int32)
  return out


# Segments start at no multiple of LongT5's blocks; id 0 is a token where a segment says so.
PACKED = (
    side([[5, 7, 9, 0, 1, 6, 0, 10, 12, 14, 16, 1, 0],
          [5, 7, 9, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], [6, 0, 10, 12, 14, 16, 1, 0, 0, 0, 0, 0, 0]],
         ['1111122222220', '1111100000000', '2222222000000'],
         [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0], [*range(13)], [*range(13)]]),
    side([[0, 20, 21, 0, 30, 0, 32, 0], [0, 20, 21, 0, 0, 0, 0, 0], [0, 30, 0, 32, 0, 0, 0, 0]],
         ['11122220', '11100000', '22220000'],
         [[0, 1, 2, 0, 1, 2, 3, 0], [*range(8)], [*range(8)]]))
PLAIN = (
    side(PACKED[0]['input_tokens'], ['1' * 13, '1' * 5 + '0' * 8, '1' * 7 + '0' * 6],
         [[*range(13)]] * 3),
    side([[0, 20, 21, 22, 23, 24, 25, 26], [0, 30, 0, 32, 33, 34, 1, 5], [0, 3, 4, 5, 6, 7, 8, 9]],
         ['1' * 8] * 3, [[*range(8)]] * 3))


@pytest.mark.parametrize('name', marked(CONFIGS, SAME_CODE))
def test_packed_equals_separate(name):
  c, (_, run) = CONFIGS[name], family(name)
  y = run(features(c, *PACKED))
  assert np.isfinite(y).all()
  sizes = (3, 4) if c.dec_layers else (5, 7)
  np.testing.assert_allclose(y[0, :sizes[0]], y[1, :sizes[0]], atol=1e-5)
  np.testing.assert_allclose(y[0, sizes[0]:sum(sizes)], y[2, :sizes[1]], atol=1e-5)


@pytest.mark.parametrize('name', marked(DECODES, SAME_CODE))
def test_causality_is_exact(name):
  c, (_, run) = CONFIGS[name], family(name)
  encoder, decoder = PLAIN
  changed = dict(decoder, input_tokens=decoder['input_tokens'].copy())
  changed['input_tokens'][:, 3:] = 40
  a, b = run(features(c, encoder, decoder)), run(features(c, encoder, changed))
  if c.expert_top_k > 1 and jax.__version_info__ >= (0, 12):
    # Later tokens move the slots of second choices, and with them the order of the terms in a sum,
    # which XLA of jax 0.12 rounds differently.
    np.testing.assert_allclose(a[:, :3], b[:, :3], atol=2e-6)
  else:
    assert (a[:, :3] == b[:, :3]).all()
  assert (a[:, 3:] != b[:, 3:]).any(axis=(1, 2)).all()


@pytest.mark.parametrize('name', marked(DECODES, SAME_DECODING))
def test_cached_decoding_equals_teacher_forcing(name):
  """A prefix of 3 at once, the rest token by token, and the rest at once."""
  c, (params, run) = CONFIGS[name], family(name)
  batch = features(c, *PLAIN)
  tokens, want = batch['decoder_input_tokens'], run(batch)
  model, memory = Transformer(c), ()
  decode = jax.jit(lambda params, *args: model.apply({'params': params}, *args, method='decode'))
  if c.enc_layers:
    memory = jax.jit(functools.partial(model.apply, method='encode'))(
        {'params': params}, batch['encoder_input_tokens'], batch['encoder_segment_ids'])
  start = init_cache(c, 3, 8, *memory)
  y, prefix = decode(params, tokens[:, :3], start, 0)
  np.testing.assert_allclose(y, want[:, :3], atol=1e-5)
  cache = prefix
  for t in range(3, 8):
    y, cache = decode(params, tokens[:, t:t + 1], cache, np.int32(t))
    np.testing.assert_allclose(y[:, 0], want[:, t], atol=1e-5, err_msg=f'position {t}')
  if name in ('t5_1_1', 'llama3_1', 'st_moe'):
    y, _ = decode(params, tokens[:, 3:], prefix, np.int32(3))
    np.testing.assert_allclose(y, want[:, 3:], atol=1e-5)


@pytest.mark.parametrize('name, remat', [('t5_1_1', 'dots'), ('st_moe', 'full')])
def test_remat_changes_nothing_but_memory(name, remat):
  """The statistics of the routers, too, survive the second computation. In a decoder alone."""
  c = dataclasses.replace(CONFIGS[name], enc_layers=0)
  params = random_params(c)
  batch = {**features(c, *PLAIN), 'decoder_target_tokens': np.full((3, 8), 7),
           'decoder_loss_weights': np.ones((3, 8), np.float32)}
  def gradient(remat):
    model = Transformer(dataclasses.replace(c, remat=remat))
    loss = steps.Loss(1e-4, balance=1e-2, router_z=1e-3)
    return jax.jit(jax.grad(lambda p: steps.loss_sums(model, p, batch, loss)['loss'] / 24))(params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6),
               gradient(remat), gradient('none'))


@pytest.mark.parametrize('name', marked(CONFIGS, SAME_CODE))
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_logits(name):
  """Every product of the program has bfloat16 operands, but for the softmax matrix and routers."""
  c = dataclasses.replace(CONFIGS[name], dtype='bfloat16')
  batch = features(c, *PLAIN)
  params = jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)['params']
  lowered = jax.jit(Transformer(c).apply).lower({'params': params}, batch)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
  assert lowered.out_info.dtype == np.float32
  products = re.findall(r'dot_general.* : \(tensor<(\S+)>, tensor<(\S+)>\)', lowered.as_text())
  wide = {b for a, b in products if 'f32' in a + b}
  router = {'16x4xf32'} if c.experts else set()
  assert wide == {'48x16xf32' if c.tied else '16x48xf32'} | router
  assert len(products) > len(wide) + 4
