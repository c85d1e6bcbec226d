"""GGUF, llama.cpp's format: a reader that dequantises, and LLaMA's hyperparameters and tensors.

The header is read by t5lab.data.vocab.gguf_header, which compares every count and length with the
file before allocating memory: the gguf library's own reader maps the file, makes objects for each
token and multiplies dimensions in 64 bits. The library is used for block sizes and dequantising.
"""

from collections.abc import Callable
import math
import os
import re
from typing import Any, NamedTuple

import numpy as np

from t5lab.data.vocab import gguf_header
from t5lab.errors import UsageError
from t5lab.tools.interop import tensor_files
from t5lab.tools.interop.tensor_map import (
  TRANSPOSE,
  Op,
  TensorReader,
  TensorRow,
  module_rows,
  name_list,
)
from t5lab.tools.interop.untrusted import File, refusing, show

PIECE = 1 << 20                            # numbers dequantised at once
PLAIN = {'F64': '<f8', 'I8': '<i1', 'I16': '<i2', 'I32': '<i4', 'I64': '<i8'}


class _Tensor(NamedTuple):
  kind: Any                # GGMLQuantizationType
  shape: tuple[int, ...]
  start: int               # position in the file
  size: int                # in bytes


class Gguf(TensorReader):
  """A .gguf file as a TensorReader. metadata: see gguf_header.Header."""

  def __init__(self, path):
    try:
      import gguf
      import gguf.quants
    except ImportError:
      raise UsageError('reading GGUF needs its library: pip install gguf') from None
    self._library = gguf
    self._file = File(path)
    self.path = self._file.path
    with open(self._file.fd, 'rb', closefd=False) as f:
      header = gguf_header.read_header(f, self.path, error=UsageError)
    self.metadata = header.metadata
    super().__init__(self._locate(header))

  def _locate(self, header) -> dict[str, _Tensor]:
    """Checks that the tensors are readable, aligned, inside the file, and do not overlap."""
    path, align = self.path, self.metadata.get('general.alignment', 32)
    if type(align) is not int or not 1 <= align <= 1 << 16 or align & (align - 1):
      raise UsageError(f'{path}: general.alignment must be a power of two, got {show(align)}')
    base = -(-header.size // align) * align
    tensors, kinds = {}, {}
    for entry in header.tensors:
      what = f'{path}: tensor {show(entry.name)}'
      if entry.type not in kinds:
        kinds[entry.type] = self._quantisation(entry.type, what)
      kind, block, block_bytes = kinds[entry.type]
      if min(entry.shape) < 1 or entry.shape[-1] % block:
        raise UsageError(f'{what} has shape {entry.shape}; the last size of {kind.name} must be a '
                         f'multiple of {block}')
      size = math.prod(entry.shape) // block * block_bytes
      if entry.offset % align or base + entry.offset + size > self._file.size:
        raise UsageError(f'{what} takes {size} bytes at {base} + {entry.offset}; the file has '
                         f'{self._file.size}, and the alignment is {align}')
      if entry.name in tensors:
        raise UsageError(f'{what} occurs twice')
      tensors[entry.name] = _Tensor(kind, entry.shape, base + entry.offset, size)

    end, previous = base, None
    for name, t in sorted(tensors.items(), key=lambda item: item[1].start):
      if t.start < end:
        raise UsageError(f'{path}: tensor {show(name)} at {t.start} overlaps {show(previous)}, '
                         f'which ends at {end}')
      end, previous = t.start + t.size, name
    return tensors

  def _quantisation(self, number: int, what: str) -> tuple[Any, int, int]:
    """Returns (type, numbers per block, bytes per block); UsageError if it is not dequantised."""
    sizes = self._library.GGML_QUANT_SIZES
    if number not in sizes:
      raise UsageError(f'{what} has type {number}, which the gguf library does not know')
    kind = self._library.GGMLQuantizationType(number)
    block, block_bytes = sizes[kind]
    if kind.name not in PLAIN:
      try:
        self._library.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
      except NotImplementedError:
        raise UsageError(f'{what} has the quantisation {kind.name}, which the gguf library does '
                         'not dequantise; make the file again as Q8_0, F16 or BF16') from None
    return kind, block, block_bytes

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor as float32, a few rows at a time; float64 and integers keep their dtype."""
    t = self._tensors[name]
    if t.kind.name in PLAIN:
      return self._file.fill(np.empty(t.shape, PLAIN[t.kind.name]), t.start)
    count, columns = math.prod(t.shape[:-1]), t.shape[-1]
    row_bytes, step = t.size // count, max(1, PIECE // columns)
    out = np.empty((count, columns), np.float32)
    with refusing(f'{self.path}: tensor {show(name)}'):
      for i in range(0, count, step):
        raw = np.empty((min(step, count - i), row_bytes), np.uint8)
        self._file.fill(raw, t.start + i * row_bytes)
        out[i:i + step] = self._library.quants.dequantize(raw, t.kind)
    return out.reshape(t.shape)


# --- parts -------------------------------------------------------------------------------------

PART_NAME = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')


class Parts(TensorReader):
  """A model that gguf-split cut into files. metadata, path: of the first part, which has it all."""

  def __init__(self, parts: list[Gguf]):
    self.metadata, self.path = parts[0].metadata, parts[0].path
    self._parts = {}
    for part in parts:
      for name in part.shapes():
        if name in self._parts:
          raise UsageError(f'tensor {show(name)} is in {self._parts[name].path} and in {part.path}')
        self._parts[name] = part

  def shapes(self):
    return {name: part.shapes()[name] for name, part in self._parts.items()}

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor as Gguf.read does."""
    return self._parts[name].read(name)


def open_file(path) -> Gguf | Parts:
  """Opens a .gguf file; of a split model any part, with the other parts beside it.

  UsageError says which part the file is and which one is missing.
  """
  file = Gguf(path)
  count = file.metadata.get('split.count', 0)
  if type(count) is not int or not 0 <= count < 1 << 16:
    raise UsageError(f'{file.path}: split.count must be a number of parts, got {show(count)}')
  if count < 2:
    return file

  number = file.metadata.get('split.no')
  if type(number) is not int or not 0 <= number < count:
    raise UsageError(f'{file.path}: split.no must be from 0 to {count - 1}, got {show(number)}')
  what = f'{file.path} is part {number + 1} of {count}'
  folder, name = os.path.split(file.path)
  match = PART_NAME.fullmatch(name)
  if not match or (int(match[2]), int(match[3])) != (number + 1, count):
    raise UsageError(f'{what}, but is not named NAME-{number + 1:05}-of-{count:05}.gguf, by which '
                     'the other parts are found; rename it or join the parts with gguf-split '
                     '--merge')
  names = [f'{match[1]}-{i + 1:05}-of-{count:05}.gguf' for i in range(count)]
  if missing := [name for name in names if not os.path.lexists(os.path.join(folder, name))]:
    raise UsageError(f'{what}; beside it must be {name_list(missing)}')
  parts = [file if i == number else Gguf(tensor_files.resolve_inside(folder or '.', name))
           for i, name in enumerate(names)]
  for i, part in enumerate(parts):
    place = part.metadata.get('split.no'), part.metadata.get('split.count')
    if place != (i, count):
      raise UsageError(f'{part.path} should be part {i + 1} of {count}; its split.no and '
                       f'split.count are {show(place)}')
  whole = Parts(parts)
  total = whole.metadata.get('split.tensors.count', len(whole.shapes()))
  if total != len(whole.shapes()):
    raise UsageError(f'{what}: they have {len(whole.shapes())} tensors, split.tensors.count is '
                     f'{show(total)}')
  return whole


# --- LLaMA -------------------------------------------------------------------------------------

# The llama.* keys that `fields` reads or checks; with any other the model may compute otherwise.
KNOWN = (r'vocab_size|context_length|embedding_length|block_count|feed_forward_length|'
         r'tensor_data_layout|attention\.(head_count(_kv)?|key_length|value_length|'
         r'layer_norm_rms_epsilon)|rope\.(freq_base|dimension_count|'
         r'scaling\.(type|original_context_length))')
# Tensors without a row: `fields` compares rope_freqs.weight with the rope_scaling it returns.
IGNORE = (r'rope_freqs\.weight',)


def fields(reader: Gguf | Parts) -> dict[str, Any]:
  """Returns the fields of a TransformerConfig for a file of the architecture 'llama'.

  start_id and eos_id are left out if the file does not name these tokens. UsageError for another
  architecture, a mixture of experts, and every llama.* key or rope scaling that would be lost.
  """
  path, metadata, shapes = reader.path, reader.metadata, reader.shapes()
  if (architecture := metadata.get('general.architecture')) != 'llama':
    raise UsageError(f"{path} has the architecture {show(architecture)}; known: 'llama'")

  def get(key, default=None, kind=int):
    value = metadata.get(key, default)
    if value is None:
      raise UsageError(f'{path} lacks {key}')
    if type(value) is not kind or not 0 <= value < 1 << 31:
      raise UsageError(f'{path}: {key} must be one {kind.__name__} for all layers, from 0 to 2^31, '
                       f'got {show(value)}')
    return value

  # What this model cannot compute.
  for key in ('llama.expert_count', 'llama.expert_used_count'):
    if metadata.get(key, 0) != 0:
      raise UsageError(f'{path}: {key} is {show(metadata[key])}: a mixture of experts; only dense '
                       'models are supported')
  for key, value in metadata.items():
    if key.startswith('llama.') and 'expert' not in key and not re.fullmatch(KNOWN, key[6:]):
      raise UsageError(f'{path}: {key} is {show(value)}, which this model does not have')
  if (scaling := metadata.get('llama.rope.scaling.type', 'none')) != 'none':
    raise UsageError(f"{path}: llama.rope.scaling.type is {show(scaling)}; known: 'none', and "
                     "llama 3.1's rope_freqs.weight")

  # Sizes, from the keys and the embedding.
  if 'token_embd.weight' not in shapes:
    raise UsageError(f'{path} lacks the tensor token_embd.weight')
  vocab_size, d_model = shapes['token_embd.weight'][0], get('llama.embedding_length')
  if get('llama.vocab_size', vocab_size) != vocab_size:
    raise UsageError(f"{path}: llama.vocab_size is {metadata['llama.vocab_size']}, "
                     f'token_embd.weight has {vocab_size} rows')
  heads = get('llama.attention.head_count')
  if heads < 1 or ('llama.attention.key_length' not in metadata and d_model % heads):
    raise UsageError(f'{path}: {d_model} dimensions do not divide into {heads} heads')
  d_head = get('llama.attention.key_length', d_model // heads)
  for key in ('llama.rope.dimension_count', 'llama.attention.value_length'):
    if get(key, d_head) != d_head or d_head % 2:
      raise UsageError(f'{path}: {key} must be {d_head}, the size of a head, and even, got '
                       f'{get(key, d_head)}')

  theta = _shortest_decimal(get('llama.rope.freq_base', 10000., float))
  out = dict(
      vocab_size=vocab_size, d_model=d_model, d_ff=get('llama.feed_forward_length'),
      n_heads=heads, n_kv_heads=get('llama.attention.head_count_kv', heads), d_head=d_head,
      enc_layers=0, dec_layers=get('llama.block_count'), acts=('silu', 'linear'),
      tied='output.weight' not in shapes, scale_logits=False, scale_attn=True, norm='rms',
      norm_eps=_shortest_decimal(get('llama.attention.layer_norm_rms_epsilon', kind=float)),
      positions='rope', rope_theta=theta, rope_scaling=_rope_scaling(reader, theta, d_head),
      bias=False, max_length=get('llama.context_length'))
  ids = {'start_id': 'tokenizer.ggml.bos_token_id', 'eos_id': 'tokenizer.ggml.eos_token_id'}
  return out | {field: get(key) for field, key in ids.items() if key in metadata}


def ends(reader) -> list[int]:
  """Returns the ids that end a text: of the sequence, of a turn and of a message."""
  keys = [f'tokenizer.ggml.{name}_token_id' for name in ('eos', 'eot', 'eom')]
  return list(dict.fromkeys(reader.metadata[key] for key in keys if key in reader.metadata))


def _shortest_decimal(x: float) -> float:
  """Returns the shortest decimal of a float32: 9.999999747378752e-06 was written as 1e-05."""
  return float(str(np.float32(x)))


def _rope_scaling(reader, theta, d_head) -> tuple:
  """Returns () or (factor, low, high, original context) from rope_freqs.weight, float32[H / 2].

  llama.cpp stores the divisor of each frequency under llama 3.1's scaling, not the four numbers.
  Every published model has low 1, high 4 and context 8192; the factor is the largest divisor. The
  divisors that these four numbers give must equal the tensor.
  """
  if 'rope_freqs.weight' not in reader.shapes():
    return ()
  stored = reader.read('rope_freqs.weight')
  if stored.shape == (d_head // 2,) and (stored == 1).all():
    return ()
  context = reader.metadata.get('llama.rope.scaling.original_context_length', 8192)
  factor, low, high = round(float(stored.max()), 3), 1., 4.
  if type(context) is not int or not 1 <= factor <= 1024:
    raise UsageError(f'{reader.path}: rope scaling by {factor} from {show(context)} tokens')
  wavelengths = 2 * np.pi * theta ** (np.arange(0, d_head, 2) / d_head)   # in tokens
  unscaled = np.clip((context / wavelengths - low) / (high - low), 0, 1)
  divisors = 1 / ((1 - unscaled) / factor + unscaled)
  if stored.shape != divisors.shape or not np.allclose(stored, divisors, rtol=1e-4):
    raise UsageError(f'{reader.path}: rope_freqs.weight {show(stored[:4].tolist())} … is not '
                     f"llama 3.1's scaling by {factor} from {context} tokens, the only one known")
  return factor, low, high, float(context)


def tensor_rows(c) -> list[TensorRow]:
  """Returns the rows for a TransformerConfig made from `fields`."""
  modules = {'attn_norm': 'attn_norm', 'attn/v': 'attn_v', 'attn/o': 'attn_output',
             'mlp_norm': 'ffn_norm', 'mlp/wi_0': 'ffn_gate', 'mlp/wi_1': 'ffn_up',
             'mlp/wo': 'ffn_down'}
  rows = [TensorRow('embedding', 'token_embd.weight'),
          TensorRow('decoder/norm/scale', 'output_norm.weight')]
  for i in range(c.dec_layers):
    for names, op in ((modules, TRANSPOSE), ({'attn/q': 'attn_q'}, _rotary(c.n_heads)),
                      ({'attn/k': 'attn_k'}, _rotary(c.n_kv_heads))):
      rows += module_rows('decoder/layers/', f'blk.{i}.', names, i, bias=False, op=op)
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'output.weight', op=TRANSPOSE))
  return rows


def _rotary(heads: int) -> Op:
  """Maps [heads * H, D], in which the rotated pairs of a head are adjacent, to our [D, heads * H].

  Our pairs are H / 2 apart. Example with one head and H = 4: llama.cpp's rows 0 1 2 3 are our
  columns 0 2 1 3.
  """
  def reorder(x, pairs: Callable):
    n, d = x.shape
    if n % (2 * heads):
      raise UsageError(f'{n} rows of a query or key matrix do not divide into {heads} heads')
    return x.reshape(heads, *pairs(n // heads), d).swapaxes(1, 2).reshape(n, d)

  return Op(lambda x: reorder(x, lambda size: (size // 2, 2)).T,
            lambda x: reorder(x.T, lambda size: (2, size // 2)))
