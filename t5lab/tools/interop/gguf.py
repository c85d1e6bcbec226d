"""GGUF, llama.cpp's format: a reader that dequantises, and LLaMA's hyperparameters and name map.

The header is parsed here, each count and length compared with the file before memory is asked for:
the gguf library's reader maps the file, makes objects for each token and multiplies dimensions in
64 bits. The library does what it alone knows: block sizes, and how each type is dequantised.
[github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3]
"""

from collections.abc import Callable
import math
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.interop.rows import TRANSPOSE, Op, Row
from t5lab.tools.interop.tensor_files import HEADER_BYTES, File, refusing, show

MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 17   # known models: 50 and 3000
MAX_ITEMS = 1 << 23                        # of one array; vocabularies and merges stay below 2^20
PIECE = 1 << 20                            # numbers dequantised at once
SCALARS = {0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?',
           10: '<u8', 11: '<i8', 12: '<f8'}
STRING, ARRAY = 8, 9
PLAIN = {'F64': '<f8', 'I8': '<i1', 'I16': '<i2', 'I32': '<i4', 'I64': '<i8'}


class _Tensor(NamedTuple):
  kind: Any                # GGMLQuantizationType
  shape: tuple[int, ...]   # numpy's order: the file's last dimension first
  start: int
  size: int                # in bytes


class Gguf:
  """A .gguf file. metadata: {key: number, bool, string, list of strings or numpy array}."""

  def __init__(self, path):
    self._library = _library()
    self._file = File(path)
    self.path = self._file.path
    head = _Head(self._file)
    if (magic := head.take(4, 'the magic')) != b'GGUF':
      raise UsageError(f'{self.path} is no GGUF: it begins with {magic!r}')
    version = head.number('<u4', 'the version')
    if version not in (2, 3):
      why = ' (big-endian)' if version and version & 0xffff == 0 else ''
      raise UsageError(f'{self.path} has GGUF version {version}{why}; known: 2 and 3')
    tensors = head.count('tensors', MAX_TENSORS, 24)   # bytes that the shortest takes
    keys = head.count('metadata keys', MAX_KEYS, 13)
    self.metadata = {}
    for _ in range(keys):
      key = head.string('a key')
      if key in self.metadata:
        raise UsageError(f'{self.path}: key {show(key)} comes twice')
      self.metadata[key] = head.value(head.number('<u4', f'the type of {show(key)}'), key)
    self._tensors = self._located([self._described(head) for _ in range(tensors)], head.at)

  def _described(self, head) -> tuple[str, tuple[int, ...], Any, int]:
    """(name, shape, type, offset) of the next tensor in the header."""
    name = head.string('the name of a tensor')
    what = f'{self.path}: tensor {show(name)}'
    rank = head.number('<u4', f'the rank of {show(name)}')
    if not 1 <= rank <= 4:
      raise UsageError(f'{what} has {rank} dimensions; expected 1 to 4')
    shape = tuple(head.number('<u8', f'the shape of {show(name)}') for _ in range(rank))[::-1]
    number = head.number('<u4', f'the type of {show(name)}')
    if number not in self._library.GGML_QUANT_SIZES:
      raise UsageError(f'{what} has the type {number}, which the gguf library does not know')
    kind = self._library.GGMLQuantizationType(number)
    return name, shape, kind, head.number('<u8', f'the offset of {show(name)}')

  def _located(self, described, at) -> dict[str, _Tensor]:
    """{name: where it lies}: aligned, inside the file, none twice, none over another."""
    path, align = self.path, self.metadata.get('general.alignment', 32)
    if type(align) is not int or not 1 <= align <= 1 << 16 or align & (align - 1):
      raise UsageError(f'{path}: general.alignment is {show(align)}; expected a power of two')
    base, out, usable = -(-at // align) * align, {}, {}
    for name, shape, kind, offset in described:
      what = f'{path}: tensor {show(name)}'
      block, width = self._library.GGML_QUANT_SIZES[kind]
      if min(shape) < 1 or shape[-1] % block:
        raise UsageError(f'{what} has shape {shape}; {kind.name} comes in rows of multiples of '
                         f'{block}')
      size = math.prod(shape) // block * width
      if offset % align or base + offset + size > self._file.size:
        raise UsageError(f'{what} takes {size} bytes at {base} + {offset}; the file has '
                         f'{self._file.size}, and the alignment is {align}')
      if name in out:
        raise UsageError(f'{what} comes twice')
      if kind not in usable:
        usable[kind] = self._dequantises(kind, width)
      if not usable[kind]:
        raise UsageError(f'{what} has the quantisation {kind.name}, which the gguf library does '
                         'not dequantise; make the file again as Q8_0, F16 or BF16')
      out[name] = _Tensor(kind, shape, base + offset, size)
    last, before = base, None
    for name, t in sorted(out.items(), key=lambda item: item[1].start):
      if t.start < last:
        raise UsageError(f'{path}: tensor {show(name)} at {t.start} overlaps {show(before)}, '
                         f'which ends at {last}')
      last, before = t.start + t.size, name
    return out

  def _dequantises(self, kind, width) -> bool:
    try:
      if kind.name not in PLAIN:
        self._library.quants.dequantize(np.zeros((1, width), np.uint8), kind)
      return True
    except NotImplementedError:
      return False

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: t.shape for name, t in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """The tensor as float32, by some rows at a time; float64 and integers stay what they are."""
    t = self._tensors[name]
    if t.kind.name in PLAIN:
      return self._file.fill(np.empty(t.shape, PLAIN[t.kind.name]), t.start)
    rows, columns = math.prod(t.shape[:-1]), t.shape[-1]
    row = t.size // rows                                  # in bytes
    out, step = np.empty((rows, columns), np.float32), max(1, PIECE // columns)
    with refusing(f'{self.path}: tensor {show(name)}'):
      for i in range(0, rows, step):
        raw = np.empty((min(step, rows - i), row), np.uint8)
        self._file.fill(raw, t.start + i * row)
        out[i:i + step] = self._library.quants.dequantize(raw, t.kind)
    return out.reshape(t.shape)


class _Head:
  """The header, read forward. Nothing is read that the file, or HEADER_BYTES, does not have."""

  def __init__(self, file):
    self._file, self._stream, self.at = file, open(file.fd, 'rb', closefd=False), 0
    self._end = min(file.size, HEADER_BYTES)

  def take(self, n: int, what: str) -> bytes:
    self._fits(n, what)
    self.at += n
    return self._stream.read(n)

  def _fits(self, n, what):
    if n > self._end - self.at:
      raise UsageError(f'{self._file.path} is cut or no GGUF: {what} takes {n} bytes at {self.at}, '
                       f'of {self._file.size} (a header may have {HEADER_BYTES})')

  def number(self, kind: str, what: str):
    return np.frombuffer(self.take(np.dtype(kind).itemsize, what), kind)[0].item()

  def count(self, what: str, most: int, least_bytes: int) -> int:
    """How many follow: at most `most`, and what the rest of the file can hold."""
    n = self.number('<u8', f'the number of {what}')
    if n > most:
      raise UsageError(f'{self._file.path} claims {n} {what}; the limit is {most}')
    self._fits(n * least_bytes, f'{n} {what}')
    return n

  def string(self, what: str) -> str:
    (n,) = struct.unpack('<Q', self.take(8, what))
    return self.take(n, what).decode('utf-8', 'surrogateescape')

  def value(self, kind: int, key: str):
    """What metadata of type `kind` holds; an array as a numpy array or a list of strings."""
    what = f'the value of {show(key)}'
    if kind in SCALARS:
      return self.number(SCALARS[kind], what)
    if kind == STRING:
      return self.string(what)
    if kind != ARRAY:
      raise UsageError(f'{self._file.path}: {what} has type {kind}; known: 0 to 12')
    kind = self.number('<u4', what)
    if kind == STRING:
      n = self.count(f'strings of {show(key)}', MAX_ITEMS, 8)
      return [self.string(what) for _ in range(n)]
    if kind not in SCALARS:   # arrays of arrays: the format has them, no model does
      raise UsageError(f'{self._file.path}: {what} is an array of type {kind}; known: 0 to 8, 10 '
                       'to 12')
    width = np.dtype(SCALARS[kind]).itemsize
    n = self.count(f'numbers of {show(key)}', MAX_ITEMS, width)
    return np.frombuffer(self.take(n * width, what), SCALARS[kind])


def _library():
  try:
    import gguf
    import gguf.quants
  except ImportError:
    raise UsageError('reading GGUF needs its library: pip install gguf') from None
  return gguf


# --- LLaMA -------------------------------------------------------------------------------------

# What config() has read or checked; with another key the model may compute something else.
KNOWN = (r'vocab_size|context_length|embedding_length|block_count|feed_forward_length|'
         r'tensor_data_layout|attention\.(head_count(_kv)?|key_length|value_length|'
         r'layer_norm_rms_epsilon)|rope\.(freq_base|dimension_count|'
         r'scaling\.(type|original_context_length))')
# Tensors without a row: config() has compared rope_freqs.weight with the rope_scaling it gives.
IGNORE = (r'rope_freqs\.weight',)


def config(reader: Gguf) -> dict[str, Any]:
  """The fields of a TransformerConfig, of a file of the architecture 'llama'.

  start_id and eos_id are left out where the file names no such token. UsageError for another
  architecture, a mixture of experts, and each llama.* key or rope scaling that would be lost.
  """
  path, meta, shapes = reader.path, reader.metadata, reader.shapes()
  if (name := meta.get('general.architecture')) != 'llama':
    raise UsageError(f"{path} has the architecture {show(name)}; known: 'llama'")

  def get(key, default=None, kind=int):
    value = meta.get(key, default)
    if value is None:
      raise UsageError(f'{path} lacks {key}')
    if type(value) is not kind or not 0 <= value < 1 << 31:
      raise UsageError(f'{path}: {key} is {show(value)}; expected one {kind.__name__} for all '
                       'layers, 0 … 2^31')
    return value

  for key in ('llama.expert_count', 'llama.expert_used_count'):
    if meta.get(key, 0) != 0:
      raise UsageError(f'{path}: {key} is {show(meta[key])}: a mixture of experts; known: dense')
  for key, value in meta.items():
    if key.startswith('llama.') and 'expert' not in key and not re.fullmatch(KNOWN, key[6:]):
      raise UsageError(f'{path}: {key} is {show(value)}, which this model does not have')
  if (scaling := meta.get('llama.rope.scaling.type', 'none')) != 'none':
    raise UsageError(f"{path}: llama.rope.scaling.type is {show(scaling)}; known: 'none', and "
                     "llama 3.1's rope_freqs.weight")
  if 'token_embd.weight' not in shapes:
    raise UsageError(f'{path} lacks the tensor token_embd.weight')
  vocab, d_model = shapes['token_embd.weight'][0], get('llama.embedding_length')
  if get('llama.vocab_size', vocab) != vocab:
    raise UsageError(f"{path}: llama.vocab_size is {meta['llama.vocab_size']}, token_embd.weight "
                     f'has {vocab} rows')
  heads = get('llama.attention.head_count')
  if heads < 1 or ('llama.attention.key_length' not in meta and d_model % heads):
    raise UsageError(f'{path}: {d_model} dimensions do not divide into {heads} heads')
  d_head = get('llama.attention.key_length', d_model // heads)
  for key in ('llama.rope.dimension_count', 'llama.attention.value_length'):
    if get(key, d_head) != d_head or d_head % 2:
      raise UsageError(f'{path}: {key} is {get(key, d_head)}; expected {d_head}, '
                       'the size of a head, and even')
  theta = _decimal(get('llama.rope.freq_base', 10000., float))
  out = dict(
      vocab_size=vocab, d_model=d_model, d_ff=get('llama.feed_forward_length'), n_heads=heads,
      n_kv_heads=get('llama.attention.head_count_kv', heads), d_head=d_head, enc_layers=0,
      dec_layers=get('llama.block_count'), acts=('silu', 'linear'),
      tied='output.weight' not in shapes, scale_logits=False, scale_attn=True, norm='rms',
      norm_eps=_decimal(get('llama.attention.layer_norm_rms_epsilon', kind=float)),
      positions='rope', rope_theta=theta, rope_scaling=_scaling(reader, theta, d_head),
      bias=False, max_length=get('llama.context_length'))
  for field, key in (('start_id', 'bos'), ('eos_id', 'eos')):
    if (key := f'tokenizer.ggml.{key}_token_id') in meta:
      out[field] = get(key)
  return out


def _decimal(x: float) -> float:
  """The shortest decimal of a float32: 9.999999747378752e-06 was written as 1e-05."""
  return float(str(np.float32(x)))


def _scaling(reader, theta, d_head) -> tuple:
  """() or (factor, low, high, original context), from rope_freqs.weight, float32[H / 2].

  llama.cpp stores what llama 3.1's scaling divides each frequency by, and not the four numbers.
  Every published model has low 1, high 4 and context 8192; the factor is the largest divisor. What
  these four give must be the tensor.
  """
  if 'rope_freqs.weight' not in reader.shapes():
    return ()
  found = reader.read('rope_freqs.weight')
  if found.shape == (d_head // 2,) and (found == 1).all():
    return ()
  context = reader.metadata.get('llama.rope.scaling.original_context_length', 8192)
  factor, low, high = round(float(found.max()), 3), 1., 4.
  if type(context) is not int or not 1 <= factor <= 1024:
    raise UsageError(f'{reader.path}: rope scaling by {factor} from {show(context)} tokens')
  waves = 2 * np.pi * theta ** (np.arange(0, d_head, 2) / d_head)   # tokens a turn
  kept = np.clip((context / waves - low) / (high - low), 0, 1)
  wanted = 1 / ((1 - kept) / factor + kept)
  if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4):
    raise UsageError(f'{reader.path}: rope_freqs.weight {show(found[:4].tolist())} … is not '
                     f"llama 3.1's scaling by {factor} from {context} tokens, the only one known")
  return factor, low, high, float(context)


def rows(c) -> list[Row]:
  """The rows of a TransformerConfig made by `config`."""
  q, k = _rotary(c.n_heads), _rotary(c.n_kv_heads)
  out = [Row('embedding', 'token_embd.weight'), Row('decoder/norm/scale', 'output_norm.weight')]
  for i in range(c.dec_layers):
    out += [Row(f'decoder/layers/{path}', f'blk.{i}.{name}.weight', i, *op) for path, name, *op in (
        ('attn_norm/scale', 'attn_norm'),
        ('attn/q/kernel', 'attn_q', q),
        ('attn/k/kernel', 'attn_k', k),
        ('attn/v/kernel', 'attn_v', TRANSPOSE),
        ('attn/o/kernel', 'attn_output', TRANSPOSE),
        ('mlp_norm/scale', 'ffn_norm'),
        ('mlp/wi_0/kernel', 'ffn_gate', TRANSPOSE),
        ('mlp/wi_1/kernel', 'ffn_up', TRANSPOSE),
        ('mlp/wo/kernel', 'ffn_down', TRANSPOSE))]
  if not c.tied:
    out.append(Row('logits/kernel', 'output.weight', op=TRANSPOSE))
  return out


def _rotary(heads: int) -> Op:
  """[heads * H, D] with each head's rotated pairs adjacent <-> [D, heads * H], pairs H / 2 apart.

  Example, one head, H = 4: llama.cpp's rows 0 1 2 3 are our columns 0 2 1 3.
  """
  def swap(pairs: Callable) -> Callable:
    def op(x):
      n, d = x.shape
      if n % (2 * heads):
        raise UsageError(f'{n} rows of a query or key matrix do not divide into {heads} heads')
      return x.reshape(heads, *pairs(n // heads), d).swapaxes(1, 2).reshape(n, d)
    return op

  apart, adjacent = swap(lambda h: (h // 2, 2)), swap(lambda h: (2, h // 2))
  return Op(lambda x: apart(x).T, lambda x: adjacent(x.T))
