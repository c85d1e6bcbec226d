"""The header of a GGUF file, llama.cpp's format: metadata and the list of tensors.

Every count and every length is compared with the limits below and with the size of the file before
memory is allocated for it, so a hostile header costs at most HEADER_BYTES.
[github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3]
"""
import dataclasses
from typing import Any, BinaryIO

import numpy as np

from t5lab.errors import DataError

HEADER_BYTES = 100_000_000                 # of the whole header; known models stay below 20 MB
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 17   # known models: 50 and 3000
MAX_ITEMS = 1 << 23                        # of one array; vocabularies and merges stay below 2^20
KEY_BYTES, TENSOR_BYTES = 13, 24           # the shortest entry of each kind
SCALARS = {0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?',
           10: '<u8', 11: '<i8', 12: '<f8'}
STRING, ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One entry of the list of tensors. type: ggml's number; offset: from the start of the data."""
  name: str
  shape: tuple[int, ...]                   # numpy's order: the file's last dimension first
  type: int
  offset: int


@dataclasses.dataclass(frozen=True)
class Header:
  """metadata: {key: number, bool, string, list of strings or numpy array}. size: in bytes."""
  metadata: dict[str, Any]
  tensors: list[Tensor]
  size: int


def read_header(file: BinaryIO, path, *, error=DataError,
                decode_errors: str = 'surrogateescape') -> Header:
  """Reads the header of an open GGUF file.

  path: for messages. decode_errors: how `bytes.decode` treats strings that are not UTF-8.
  Errors: `error` for a file that is not GGUF, is truncated, or exceeds a limit; the tensors' types,
  offsets and overlaps are for the caller to check.
  """
  reader = _Reader(file, path, error, decode_errors)
  if (magic := reader.take(4, 'the magic')) != b'GGUF':
    raise error(f'{path} is not a GGUF file: it begins with {magic!r}')
  version = reader.number('<u4', 'the version')
  if version not in (2, 3):
    why = ' (big-endian)' if version and version & 0xffff == 0 else ''
    raise error(f'{path} has GGUF version {version}{why}; known: 2 and 3')

  tensor_count = reader.count('tensors', MAX_TENSORS, TENSOR_BYTES)
  key_count = reader.count('metadata keys', MAX_KEYS, KEY_BYTES)
  metadata = {}
  for _ in range(key_count):
    key = reader.string('a key')
    if key in metadata:
      raise error(f'{path}: key {_quoted(key)} occurs twice')
    value_type = reader.number('<u4', f'the type of {_quoted(key)}')
    metadata[key] = reader.value(value_type, key)
  tensors = [reader.tensor() for _ in range(tensor_count)]
  return Header(metadata, tensors, reader.position)


class _Reader:
  """Reads little-endian values one after the other, never past the end of the file."""

  def __init__(self, file, path, error, decode_errors):
    self._file, self._path, self._error = file, path, error
    self._decode_errors = decode_errors
    self._file_size = file.seek(0, 2)
    self._end = min(self._file_size, HEADER_BYTES)
    self.position = file.seek(0)

  def take(self, size: int, what: str) -> bytes:
    self._check_fits(size, what)
    self.position += size
    return self._file.read(size)

  def _check_fits(self, size, what):
    if size > self._end - self.position:
      raise self._error(
          f'{self._path} is truncated or not a GGUF file: {what} takes {size} bytes at '
          f'{self.position}, of {self._file_size} (the limit for a header is {HEADER_BYTES})')

  def number(self, dtype: str, what: str):
    data = self.take(np.dtype(dtype).itemsize, what)
    return np.frombuffer(data, dtype)[0].item()

  def count(self, what: str, most: int, least_bytes: int) -> int:
    """Reads the number of entries that follow, of at least `least_bytes` each."""
    count = self.number('<u8', f'the number of {what}')
    if count > most:
      raise self._error(f'{self._path} claims {count} {what}; the limit is {most}')
    self._check_fits(count * least_bytes, f'the list of {count} {what}')
    return count

  def string(self, what: str) -> str:
    size = self.number('<u8', what)
    return self.take(size, what).decode('utf-8', self._decode_errors)

  def value(self, value_type: int, key: str):
    what = f'the value of {_quoted(key)}'
    if value_type in SCALARS:
      return self.number(SCALARS[value_type], what)
    if value_type == STRING:
      return self.string(what)
    if value_type != ARRAY:
      raise self._error(f'{self._path}: {what} has type {value_type}; known: 0 to 12')
    item_type = self.number('<u4', what)
    if item_type == STRING:
      count = self.count(f'strings of {_quoted(key)}', MAX_ITEMS, 8)
      return [self.string(what) for _ in range(count)]
    if item_type not in SCALARS:           # arrays of arrays: the format has them, no model does
      raise self._error(f'{self._path}: {what} is an array of type {item_type}; known: 0 to 8, '
                        '10 to 12')
    dtype = np.dtype(SCALARS[item_type])
    count = self.count(f'numbers of {_quoted(key)}', MAX_ITEMS, dtype.itemsize)
    return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

  def tensor(self) -> Tensor:
    name = self.string('the name of a tensor')
    rank = self.number('<u4', f'the rank of {_quoted(name)}')
    if not 1 <= rank <= 4:
      raise self._error(f'{self._path}: tensor {_quoted(name)} has {rank} dimensions; expected 1 '
                        'to 4')
    sizes = [self.number('<u8', f'the shape of {_quoted(name)}') for _ in range(rank)]
    return Tensor(name, tuple(reversed(sizes)),
                  type=self.number('<u4', f'the type of {_quoted(name)}'),
                  offset=self.number('<u8', f'the offset of {_quoted(name)}'))


def _quoted(name: str) -> str:
  """A name from the file for a message: escaped, and short."""
  return repr(name if len(name) <= 80 else name[:80] + '…')
