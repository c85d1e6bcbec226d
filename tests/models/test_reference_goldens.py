"""Golden vectors made outside this code: T5X's T5, and Hugging Face's Flax GPT-2, LLaMA and BERT.

The i-th of their sorted names holds sin(0.37 n + i), scaled by its kind.
"""

import dataclasses
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_models import BATCH, next_sentence

from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.tools.interop import t5x, tensor_map
from t5lab.tools.interop.formats import bert, gpt2, llama

T5_1_0 = TransformerConfig(vocab_size=48, d_model=16, d_ff=32, n_heads=2, d_head=8, enc_layers=2,
                           dec_layers=2)
T5_1_1 = dataclasses.replace(T5_1_0, acts=('gelu', 'linear'), tied=False, scale_logits=False)


def sized(row, **changes):
  return TransformerConfig(**{**families.row(row), 'vocab_size': 40, 'd_model': 16, **changes})


GPT2 = sized('gpt2/small', d_ff=64, n_heads=2, d_head=8, dec_layers=2, max_length=16)
LLAMA = sized('llama2/70b', d_ff=32, n_heads=4, n_kv_heads=2, d_head=4, dec_layers=2)
BERT = sized('bert/base', d_ff=32, n_heads=2, d_head=8, enc_layers=2, max_length=16)

IDS = np.array([[3, 9, 14, 20, 7, 2], [4, 8, 1, 5, 6, 11]])
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def flax_name(name, ndim, norm):
  """torch's name -> (Flax's name, whether its array is the transpose). norm: leaf of a norm."""
  if '/' in name:                                              # T5X: as it is
    return name, False
  *parents, leaf = name.split('.')
  embeds = re.search('embed(dings|_tokens)|wte|wpe', name) and 'LayerNorm' not in name
  if leaf == 'weight':
    leaf = norm if ndim == 1 else 'embedding' if embeds else 'kernel'
  return '/'.join([*parents, leaf]), leaf == 'kernel'


class Filled(tensor_map.TensorReader):
  """A checkpoint of the golden rule, read by their names."""

  def __init__(self, shapes, norm):
    names = {flax_name(name, len(shape), norm): name for name, shape in shapes.items()}
    tensors = {}
    for i, (name, transposed) in enumerate(sorted(names)):
      shape, leaf = shapes[names[name, transposed]], name.split('/')[-1]
      shape = shape[::-1] if transposed else shape
      x = np.sin(np.arange(np.prod(shape)) * 0.37 + i).reshape(shape)
      if re.search('ln_|norm', name.lower()) and leaf in ('scale', 'weight'):
        x = 1 + 0.1 * x
      elif leaf == 'bias':
        x = 0.1 * x
      elif 'embedding' not in leaf:
        x = 0.3 * x
      tensors[names[name, transposed]] = (x.T if transposed else x).astype(np.float32)
    super().__init__(tensors)


def golden_params(c, table, norm='scale'):
  """All of our parameters in our shapes; `tensor_map.read` refuses leftovers on either side."""
  abstract = nn.unbox(jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)['params'])
  return tensor_map.read(table, Filled(tensor_map.shapes(table, abstract), norm), abstract)


def run(c, params, batch, method='__call__'):
  apply = jax.jit(Transformer(c).apply, static_argnames='method')
  return np.asarray(apply({'params': params}, batch, method=method))


@pytest.mark.parametrize('config, first, second, total', [
    (T5_1_0, [-1.596574, -2.330164, -2.759761, -2.829319, -2.529764, -1.900176],
     [-2.743946, -2.644504, -2.200060, -1.468596, -0.545539, 0.448689], 615.61231),
    (T5_1_1, [-0.466039, -0.373009, -0.229494, -0.054918, 0.127091, 0.291898],
     [-0.098646, -0.057758, -0.009053, 0.040877, 0.085275, 0.118131], 84.592950),
], ids=['1.0', '1.1'])
def test_t5x(config, first, second, total):
  y = run(config, golden_params(config, t5x.tensor_rows(config, scanned=False)), BATCH)
  np.testing.assert_allclose(y[0, 0, :6], first, atol=2e-6)
  np.testing.assert_allclose(y[1, 2, :6], second, atol=2e-6)
  real = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]) > 0
  np.testing.assert_allclose(np.abs(y)[real].sum(), total, rtol=1e-6)


@pytest.mark.parametrize('config, table, norm, first, second, total', [
    (GPT2, gpt2.tensor_rows, 'scale',
     [-3.689631, -4.084224, -3.945988, -3.292959, -2.210330, -0.839341],
     [-3.852344, -3.681278, -3.029952, -1.983338, -0.677978, 0.715831], 1359.93208),
    (LLAMA, llama.tensor_rows, 'weight',
     [-0.109416, -0.119862, -0.114086, -0.092868, -0.059082, -0.017299],
     [-0.049785, -0.051491, -0.046228, -0.034708, -0.018491, 0.000230], 91.324669),
], ids=['gpt2', 'llama'])
def test_decoders_of_hugging_face(config, table, norm, first, second, total):
  y = run(config, golden_params(config, table(config), norm), {'decoder_input_tokens': IDS})
  np.testing.assert_allclose(y[0, 5, :6], first, atol=2e-6)
  np.testing.assert_allclose(y[1, 2, :6], second, atol=2e-6)
  np.testing.assert_allclose(np.abs(y).sum(), total, rtol=1e-6)


def test_bert_of_hugging_face():
  """Its gelu is exact: the tanh approximation would give -5.845035 first."""
  params = golden_params(BERT, bert.BERT.tensor_rows(BERT))
  batch = {'encoder_input_tokens': IDS, 'encoder_token_types': TYPES, 'encoder_segment_ids': MASK}
  y = run(BERT, params, batch)
  np.testing.assert_allclose(
      y[0, 5, :6], [-5.845225, -8.116333, -9.329070, -9.325172, -8.105037, -5.827691], atol=5e-6)
  np.testing.assert_allclose(
      y[1, 2, :6], [-4.231391, -6.898671, -8.666436, -9.304012, -8.728113, -7.013716], atol=5e-6)
  np.testing.assert_allclose(run(BERT, params, batch, next_sentence),
                             [[-0.080492, -0.140045], [-0.074306, -0.129687]], atol=2e-6)
