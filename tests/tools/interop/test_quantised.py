"""Quantised weights: multiplied by their scales, or refused by the name of the method."""

import json

import ml_dtypes
import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.tools.interop import convert, quantised, tensor_files
from t5lab.tools.interop.tensor_map import TensorReader

F8 = ml_dtypes.float8_e4m3fn
WEIGHT = np.arange(-12, 12).reshape(4, 6).astype(F8)
PLAIN = WEIGHT.astype(np.float32)
F32 = lambda *x: np.array(x, np.float32)


def read(tensors, settings=None):
  config = {} if settings is None else {'quantization_config': settings}
  reader, notes = quantised.dequantised(TensorReader(tensors), config)
  return reader, notes


# name -> (tensors beside a.weight, quantization_config, the scale of every number of the weight)
ROWS = F32(1, 2, 3, 4)[:, None]
BLOCKS = np.repeat(np.repeat(F32([1, 2], [3, 4]), 3, 0)[:4], 4, 1)[:, :6]
SCALED = {
    'fp8 by tensor': ({'a.weight_scale_inv': F32(2.)}, {'quant_method': 'fp8'}, 2),
    'fp8, a scalar': ({'a.weight_scale_inv': np.float32(2)}, {'quant_method': 'fp8'}, 2),
    'fp8 in blocks': ({'a.weight_scale_inv': F32([1, 2], [3, 4])},
                      {'quant_method': 'fp8', 'weight_block_size': [3, 4]}, BLOCKS),
    'blocks that divide': ({'a.weight_scale_inv': F32([1, 2, 3], [4, 5, 6])},
                           {'quant_method': 'fp8'},
                           np.repeat(np.repeat(F32([1, 2, 3], [4, 5, 6]), 2, 0), 2, 1)),
    'activations': ({'a.weight_scale_inv': F32(2), 'a.activation_scale': F32(7)},
                    {'quant_method': 'fp8', 'activation_scheme': 'static'}, 2),
    'fbgemm': ({'a.weight_scale': ROWS}, {'quant_method': 'fbgemm_fp8'}, ROWS),
    'compressed-tensors': ({'a.weight_scale': ROWS.astype(ml_dtypes.bfloat16),
                            'a.input_scale': F32(3)}, {'quant_method': 'compressed-tensors'}, ROWS),
    'a row, flat': ({'a.weight_scale': F32(1, 2, 3, 4)}, {'quant_method': 'modelopt'}, ROWS),
    'groups': ({'a.weight_scale': np.tile(F32([1, 2]), (4, 1))}, {'quant_method': 'modelopt'},
               np.repeat(F32([1, 2]), 3, 1)),
    'exponents': ({'a.weight_scale_inv': np.array([[128, 126]], np.uint8)}, {'quant_method': 'fp8'},
                  np.repeat(F32([2, .5]), 3, 1)),
    'e8m0': ({'a.weight_scale_inv': F32([2, .5]).astype(ml_dtypes.float8_e8m0fnu)},
             {'quant_method': 'fp8'}, np.repeat(F32([2, .5]), 3, 1)),
    'ComfyUI, without a config': ({'a.scale_weight': F32(.5), 'scaled_fp8': np.zeros(0, F8),
                                   'a.scale_input': F32(9)}, None, .5),
}


@pytest.mark.parametrize('case', SCALED)
def test_a_weight_is_multiplied_by_its_scale(case):
  beside, settings, scale = SCALED[case]
  reader, notes = read({'a.weight': WEIGHT, 'b.bias': F32(1, 2), **beside}, settings)
  assert reader.shapes().keys() == {'a.weight', 'b.bias'}
  value = reader.read('a.weight')
  assert value.dtype == np.float32
  np.testing.assert_array_equal(value, PLAIN * scale)
  assert reader.read('b.bias').tolist() == [1, 2]
  assert notes == ['1 quantised tensors are multiplied by their scales']


@pytest.mark.parametrize('settings', [
    {'quant_method': 'bitsandbytes', 'load_in_8bit': True, 'load_in_4bit': False},
    {'load_in_8bit': True}, None])
def test_int8_of_bitsandbytes(settings):
  stored = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)
  scb = F32(1, 2, 3, 127)
  reader, _ = read({'a.weight': stored, 'a.SCB': scb, 'a.weight_format': np.uint8(0)}, settings)
  np.testing.assert_allclose(reader.read('a.weight'), stored * scb[:, None] / 127, rtol=1e-6)
  assert list(reader.shapes()) == ['a.weight']


REFUSED = {
    'gptq': ({'a.qweight': 1, 'a.qzeros': 1, 'a.scales': 1, 'a.g_idx': 1}, {'quant_method': 'gptq'},
             r'by gptq \(GPTQ\) are'),
    'gptq, no config': ({'a.qweight': 1, 'a.g_idx': 1}, None, 'by GPTQ are'),
    'awq': ({'a.qweight': 1, 'a.qzeros': 1}, {'quant_method': 'awq'}, r'by awq \(GPTQ or AWQ\)'),
    'bnb 4-bit': ({'a.weight': 1, 'a.weight.quant_state.bitsandbytes__nf4': 1},
                  {'quant_method': 'bitsandbytes', 'load_in_4bit': True}, 'bitsandbytes 4-bit'),
    'bnb 4-bit, no config': ({'a.weight.quant_map': 1}, None, 'by bitsandbytes 4-bit are'),
    'bnb 4-bit, config alone': ({'a.weight': 1}, {'load_in_4bit': True}, 'by bitsandbytes 4-bit'),
    'packed': ({'a.weight_packed': 1, 'a.weight_scale': 1}, {'quant_method': 'compressed-tensors'},
               r'by compressed-tensors \(compressed-tensors, packed\)'),
    'zero points': ({'a.weight': 1, 'a.weight_scale': 1, 'a.weight_zero_point': 1},
                    {'quant_method': 'compressed-tensors'}, 'with zero points'),
    'nvfp4': ({'a.weight_scale_2': 1}, {'quant_method': 'modelopt'}, 'NVFP4'),
    'mxfp4': ({'experts.gate_up_proj_blocks': 1}, {'quant_method': 'mxfp4'}, r'by mxfp4 \(MXFP4\)'),
    'aqlm': ({'a.codes': 1, 'a.codebooks': 1}, None, 'by AQLM are'),
    'hqq': ({'a.W_q': 1}, {'quant_method': 'hqq'}, r'by hqq \(HQQ\)'),
    'quanto': ({'a.weight._data': 1, 'a.weight._scale': 1}, None, 'by quanto are'),
    'torchao': ({'a._weight_qdata': 1}, {'quant_method': 'torchao'}, r'by torchao \(torchao\)'),
    'bitnet': ({'a.weight': 1, 'a.weight_scale': 1}, {'quant_method': 'bitnet'}, 'by bitnet are'),
    'a new one': ({'a.weight': 1}, {'quant_method': 'sparsy'}, 'by sparsy are'),
    'not an object': ({'a.weight': 1}, ['gptq'], 'quantization_config must be an object'),
    'lines': ({'a.weight': 1}, {'quant_method': 'a\nb'}, r'by a\\nb are'),
    'a number': ({'a.weight': 1}, {'quant_method': 4}, 'by 4 are'),
    'two scales': ({'a.weight': 1, 'a.weight_scale': 1, 'a.weight_scale_inv': 1}, None,
                   'two scales'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_other_methods_are_refused_by_name(case):
  names, settings, message = REFUSED[case]
  with pytest.raises(UsageError, match=message) as e:
    read(dict.fromkeys(names, np.zeros(1)), settings)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('tensors, settings, message', [
    ({'a.weight': WEIGHT}, {'quant_method': 'fp8'}, 'a.weight is float8_e4m3fn and has no scale'),
    ({'a.weight': WEIGHT, 'b.weight': WEIGHT, 'b.weight_scale': F32(1)}, None, 'a.weight is .* no'),
    ({'a.weight': WEIGHT.view(np.uint8), 'a.weight_scale': F32(1)}, None, 'a.weight is uint8 and'),
    ({'a.weight': WEIGHT, 'a.weight_scale': F32(1, 2)}, None, r'shape \(2,\), which does not fit'),
    ({'a.weight': WEIGHT, 'a.weight_scale': F32([1, 2, 3])[:, :0]}, None, 'has 0 scales for 6'),
    ({'a.weight': WEIGHT, 'a.weight_scale': np.ones((4, 4), np.float32)}, None, '4 scales for 6'),
    ({'a.weight': WEIGHT, 'a.weight_scale': np.ones((2, 2), np.float32)},
     {'quant_method': 'fp8', 'weight_block_size': [1, 1]}, '2 scales for 4 .*not blocks of 1'),
])
def test_scales_that_are_missing_or_misshaped_are_refused(tensors, settings, message):
  reader, _ = read(tensors, settings)
  with pytest.raises(UsageError, match=message):
    reader.read('a.weight')


def test_a_directory_of_float8_is_certified_as_its_dequantised_form(tmp_path):
  """Kernels in blocks of 16, norms and the embedding in bfloat16: as transformers writes fp8."""
  from hf_models import model, save
  save('llama', tmp_path / 'src')
  tensors, expected = {}, {}
  for name, x in model('llama').state_dict().items():
    x = x.numpy()
    if x.ndim < 2 or 'embed' in name or 'lm_head' in name:
      tensors[name] = x.astype(ml_dtypes.bfloat16)
      expected[name] = tensors[name].astype(np.float32)
      continue
    blocks = x.reshape(x.shape[0] // 16, 16, -1, 16)
    scale = np.abs(blocks).max((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).astype(F8)
    tensors[name], tensors[f'{name}_scale_inv'] = stored.reshape(x.shape), scale
    expected[name] = (stored.astype(np.float32) * scale[:, None, :, None]).reshape(x.shape)
  (tmp_path / 'src' / 'model.safetensors').unlink()
  tensor_files.write_safetensors(tmp_path / 'src', tensors.items(),
                                 {k: (v.shape, v.dtype) for k, v in tensors.items()})
  path = tmp_path / 'src' / 'config.json'
  config = json.loads(path.read_text())
  config['quantization_config'] = {'quant_method': 'fp8', 'weight_block_size': [16, 16]}
  path.write_text(json.dumps(config))
  source = convert.read_hf(tmp_path / 'src')
  proof = convert.convert(source, tmp_path / 'hf', 'hf', log=lambda line: None)
  assert list(proof['notes']) == ['14 quantised tensors are multiplied by their scales']
  assert proof['logits']['largest_relative_difference'] < 1e-5
  written = tensor_files.open_hf(tmp_path / 'hf')
  for name, x in expected.items():
    np.testing.assert_array_equal(written.read(name), x)
