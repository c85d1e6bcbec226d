"""Quantised weights: those with one scale per tensor, row or block are dequantised, others refused.

Read are float8 (transformers' fp8 and fbgemm_fp8, compressed-tensors, ModelOpt, ComfyUI's scaled
text encoders) and int8 (compressed-tensors, bitsandbytes' LLM.int8): weight = stored * scale. Of
the other methods each would need its own unpacking. [Dettmers et al. 2022 for SCB: absmax of a row]
"""

from collections.abc import Mapping
import re

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.interop.tensor_map import TensorReader, name_list
from t5lab.tools.interop.untrusted import show

SUPPORTED = ('fp8', 'fbgemm_fp8', 'compressed-tensors', 'modelopt', 'bitsandbytes')
# {ending of the name of a scale, for the weight X.weight: factor}
SCALES = {'.weight_scale_inv': 1., '.weight_scale': 1., '.scale_weight': 1., '.SCB': 1 / 127}
# Tensors beside a weight that quantise activations or describe the layout: not part of the weight.
UNREAD = re.compile(r'.*\.(input_scale(_ub)?|activation_scale|scale_input|[kv]_scale|weight_format)'
                    r'|(.*\.)?scaled_fp8')
# Tensors that only these methods write.
METHODS = {
    r'.*\.g_idx': 'GPTQ', r'.*\.(qweight|qzeros)': 'GPTQ or AWQ',
    r'.*\.weight\.(absmax|quant_map|quant_state\..*)': 'bitsandbytes 4-bit',
    r'.*\.weight_packed': 'compressed-tensors, packed',
    r'.*\.(weight_zero_point|zero_point)': 'compressed-tensors with zero points',
    r'.*\.weight_scale_2': 'NVFP4', r'.*_blocks': 'MXFP4', r'.*\.(codes|codebooks)': 'AQLM',
    r'.*\.W_q': 'HQQ', r'.*\.weight\._(data|scale)': 'quanto',
    r'.*[._:](_weight_)?(qdata|tensor_impl|layout_tensor).*': 'torchao'}


def dequantised(reader: TensorReader, config: Mapping) -> tuple[TensorReader, list[str]]:
  """Returns a reader of float weights, and notes.

  UsageError names a method that is not supported, from config.json or from the tensors.
  """
  settings = config.get('quantization_config', config.get('compression_config'))
  method = _method(settings)
  names = reader.shapes()
  found = next((name for pattern, name in METHODS.items()
                if any(re.fullmatch(pattern, tensor) for tensor in names)), None)
  if found or method not in (None, *SUPPORTED):
    what = f'{method} ({found})' if found and method else method or found
    raise UsageError(f'weights quantised by {what} are not supported; supported: float8 and int8 '
                     f'with scales ({", ".join(SUPPORTED)} 8-bit), GGUF, and weights saved after '
                     'dequantising (model.dequantize() in transformers)')
  scaled = ScaledReader(reader, settings or {})
  count = len(scaled.scales)
  return scaled, [f'{count} quantised tensors are multiplied by their scales'] if count else []


def _method(settings) -> str | None:
  if settings is None:
    return None
  if not isinstance(settings, Mapping):
    raise UsageError(f'config.json: quantization_config must be an object, got {show(settings)}')
  method = settings.get('quant_method', settings.get('quantization_method'))
  if settings.get('load_in_4bit') or settings.get('_load_in_4bit'):
    return 'bitsandbytes 4-bit'
  if method is None and (settings.get('load_in_8bit') or settings.get('_load_in_8bit')):
    return 'bitsandbytes'
  return method if method is None or method in SUPPORTED else show(method).strip("'")


class ScaledReader(TensorReader):
  """A TensorReader that multiplies weights by the scales beside them. scales: {weight: scale}."""

  def __init__(self, reader: TensorReader, settings: Mapping):
    self._reader, self.copies = reader, reader.copies
    self._block = settings.get('weight_block_size')
    names = reader.shapes()
    self.scales = {}
    for name in names:
      ending = next((ending for ending in SCALES if name.endswith(ending)), None)
      weight = f'{name.removesuffix(ending)}.weight' if ending else None
      if weight in names:
        if weight in self.scales:
          raise UsageError(f'{weight} has two scales: {self.scales[weight]} and {name}')
        self.scales[weight] = name
    hidden = set(self.scales.values())
    if hidden:
      hidden |= {name for name in names if UNREAD.fullmatch(name)}
    self._shapes = {name: shape for name, shape in names.items() if name not in hidden}
    # Where some weights have scales, one without would be silently wrong. A file of float8 alone,
    # which config.json does not call quantised, was cast and needs none.
    self._must_scale = bool(self.scales or settings)

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return self._shapes

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor; a quantised one as float32."""
    stored = self._reader.read(name)
    if name not in self.scales:
      if self._must_scale and stored.dtype.itemsize == 1 and stored.size:
        raise UsageError(f'{name} is {stored.dtype} and has no scale '
                         f'({name_list(SCALES)} instead of .weight)')
      return stored
    scale_name = self.scales[name]
    scale = self._reader.read(scale_name)
    if not (stored.dtype == np.int8 or stored.dtype.name.startswith('float8')):
      raise UsageError(f'{name} is {stored.dtype} and has the scale {scale_name}; only float8 and '
                       'int8 are dequantised')
    if scale.dtype == np.uint8:                     # MX formats: biased exponents
      scale = np.exp2(scale.astype(np.float32) - 127)
    factor = next(f for ending, f in SCALES.items() if scale_name.endswith(ending))
    scale = self._expand(scale.astype(np.float32), stored.shape, scale_name)
    return stored.astype(np.float32) * (scale * np.float32(factor))

  def _expand(self, scale: np.ndarray, shape, name: str) -> np.ndarray:
    """Returns the scale in a shape that broadcasts to the weight's."""
    if scale.size == 1:
      return scale.reshape(())
    if scale.ndim == 1 and len(shape) == 2 and scale.shape[0] == shape[0]:
      return scale[:, None]
    if scale.ndim == 2 and len(shape) == 2:
      for axis in (0, 1):
        scale = self._repeat(scale, axis, shape, name)
      return scale
    raise UsageError(f'{name} has shape {scale.shape}, which does not fit a weight of shape '
                     f'{shape}')

  def _repeat(self, scale, axis, shape, name):
    """Repeats the scales of blocks along an axis, of which the last block may be cut."""
    count, size = scale.shape[axis], shape[axis]
    if count in (1, size):
      return scale
    block = self._block[axis] if _is_block(self._block) else size // count if count else 0
    if block < 1 or -(-size // block) != count:
      raise UsageError(f'{name} has {count} scales for {size} rows or columns of its weight, '
                       f'which are not blocks of {block} (weight_block_size={show(self._block)})')
    return np.repeat(scale, block, axis=axis).take(range(size), axis=axis)


def _is_block(value) -> bool:
  return isinstance(value, list) and len(value) == 2 and all(
      type(size) is int and 0 < size < 1 << 31 for size in value)
