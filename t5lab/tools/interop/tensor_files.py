"""Tensor files, read and written one tensor at a time: safetensors, torch's pickles, .npz.

Files are not trusted. Each size in them is compared with the file before memory is allocated, links
and names cannot lead elsewhere, and nothing in them is executed; a malformed file is a UsageError
of one line. Tensors are read with pread and not mapped, because mapped pages would count as memory
of this process: the peak is the largest tensor.
"""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
import math
import os
from pathlib import Path
import re
from typing import NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from t5lab import files
from t5lab.errors import UsageError
from t5lab.tools.interop.tensor_map import TensorReader
from t5lab.tools.interop.untrusted import File, refusing, show

SAFE, BIN = 'model.safetensors', 'pytorch_model.bin'
INDEX = '.index.json'
PIECE = 64 << 20             # bytes copied at once while writing
RATIO = 100                  # most expansion of an .npz array over PIECE; weights: 1 to 3

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
    'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz, 'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz,
    'F8_E8M0': ml_dtypes.float8_e8m0fnu, 'C64': np.complex64,
    'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
    'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}.items()}
CODES = {dtype: name for name, dtype in DTYPES.items()}


class _Tensor(NamedTuple):
  file: File
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int           # position of its bytes in the file


class Safetensors(TensorReader):
  """A .safetensors file, or a directory with model.safetensors or model.safetensors.index.json."""

  def __init__(self, path):
    super().__init__(_merge(path, *_weight_files(path, SAFE), _read_header))

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor into new memory, in its own dtype (bfloat16 and float8: of ml_dtypes)."""
    t = self._tensors[name]
    out = t.file.fill(np.empty(t.shape, t.dtype), t.start)
    if t.dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
      raise UsageError(f'{t.file.path}: BOOL tensor {show(name)} has bytes other than 0 and 1')
    return out


def _read_header(path) -> dict[str, _Tensor]:
  """Returns the tensors of a .safetensors file, after checking that they cover every byte once."""
  file = File(path)
  room = file.size - 8
  length = int.from_bytes(file.header(0, 8), 'little')
  if length > room:
    raise UsageError(f'{path} is truncated or not a safetensors file: a header of {length} bytes, '
                     f'and {room} after its length')
  entries, room = _parse_json(file.header(8, length), path), room - length
  metadata = entries.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise UsageError(f'{path}: __metadata__ is not a map of strings to strings')

  tensors, spans = {}, []
  for name, entry in entries.items():
    what = f'{path}: tensor {show(name)}'
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
      raise UsageError(f'{what} must have exactly dtype, shape and data_offsets')
    dtype, shape, span = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in DTYPES:
      raise UsageError(f'{what} has dtype {show(dtype)}; known: {", ".join(DTYPES)}')
    size = _byte_count(shape, DTYPES[dtype], what)
    if not _are_naturals(span) or len(span) != 2 or not span[0] <= span[1] <= room:
      raise UsageError(f'{what} has data_offsets {show(span)}; expected two in 0 … {room}')
    if span[1] - span[0] != size:
      raise UsageError(f'{what}: {dtype} {show(shape)} takes {size} bytes, its data_offsets '
                       f'{show(span)} hold {span[1] - span[0]}')
    tensors[name] = _Tensor(file, DTYPES[dtype], tuple(shape), 8 + length + span[0])
    spans.append((*span, name))

  end, previous = 0, 'the header'
  for start, next_end, name in [*sorted(spans), (room, room, '')]:
    what = f'tensor {show(name)}' if name else 'the end of the file'
    if start < end:
      raise UsageError(f'{path}: {what} begins at {start} and overlaps {previous}, which ends at '
                       f'{end}')
    if start > end:
      raise UsageError(f'{path}: {start - end} bytes between {previous} and {what} belong to no '
                       'tensor')
    end, previous = next_end, what
  return tensors


class Pickled(TensorReader):
  """pytorch_model.bin or its shards, through torch's weights-only loader; never by default."""

  def __init__(self, path, *, allow_pickle: bool = False):
    paths, index = _weight_files(path, BIN)
    if not allow_pickle:
      raise UsageError(
          f'{os.fspath(path)} holds pickled weights ({next(iter(paths))}), which can run code when '
          'read; convert them to safetensors where they were made, or pass --allow-pickle to read '
          "them with torch's weights-only loader")
    super().__init__(_merge(path, paths, index, _unpickle))

  def read(self, name: str) -> np.ndarray:
    import torch
    t = self._tensors[name]
    raw = t.reshape(-1).view(torch.uint8).numpy()   # numpy knows bfloat16 through ml_dtypes
    return raw.view(str(t.dtype).removeprefix('torch.')).reshape(t.shape).copy()


def _unpickle(path) -> dict:
  """Returns {name: torch tensor}, still on disk if the file is a zip (torch 1.6 and later)."""
  try:
    import torch
  except ImportError:
    raise UsageError(f"{path}: reading pickled weights needs torch: pip install 't5lab[parity]'"
                     ) from None
  if tuple(map(int, re.findall(r'\d+', torch.__version__)[:2])) < (2, 6):
    raise UsageError(f'torch {torch.__version__}: a file can run code in its weights-only loader '
                     '(CVE-2025-32434); torch 2.6 or later is needed')
  file = File(path)
  with refusing(f"{path}: torch's weights-only loader refuses it and executed nothing"):
    if mapped := zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as z:
        if any(i.compress_type or i.file_size > file.size for i in z.infolist()):
          raise UsageError(f'{path} contains compressed entries, which torch never writes')
    state = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
  if not isinstance(state, dict):
    raise UsageError(f'{path} holds a {type(state).__name__}; expected a dict of tensors')
  for name, t in state.items():
    is_dense = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
    if not isinstance(name, str) or not is_dense or t.device.type != 'cpu':
      raise UsageError(f'{path}: {show(name)} is a {type(t).__name__}; expected only names and '
                       'dense tensors on the CPU: save the state_dict alone')
    if t.numel() * t.element_size() > file.size:   # strides of 0 claim more than is stored
      raise UsageError(f'{path}: {show(name)} has shape {tuple(t.shape)}, more than the '
                       f'{file.size} bytes of the file')
  return {name: t.detach() for name, t in state.items()}


class Npz(TensorReader):
  """A .npz of numbers and strings; UsageError for objects and for arrays that expand too much."""

  def __init__(self, path):
    self._file = File(path)
    with refusing(f'{self._file.path} is not a .npz'):
      self._zip = zipfile.ZipFile(open(self._file.fd, 'rb', closefd=False))
      self._shapes = {}
      for info in self._zip.infolist():
        name = info.filename.removesuffix('.npy')
        if name == info.filename or name in self._shapes:
          raise UsageError(f'{path}: entry {show(info.filename)} occurs twice or is not named .npy')
        self._shapes[name] = self._read_shape(info)

  def _read_shape(self, info) -> tuple[int, ...]:
    """Returns the shape of an entry of the zip, after checking its header against its size."""
    what = f'{self._file.path}: array {show(info.filename)}'
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise UsageError(f'{what} is encrypted or compressed other than by deflate')
    if info.compress_size > self._file.size or info.file_size > max(
        PIECE, RATIO * info.compress_size):
      raise UsageError(f'{what} claims {info.file_size} bytes from {info.compress_size}; the limit '
                       f'is {RATIO} times, in a file of {self._file.size}')
    with self._zip.open(info) as f:
      if np.lib.format.read_magic(f) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
      else:                                   # versions above 2.0 differ in field names only
        shape, _, dtype = np.lib.format.read_array_header_2_0(f)
      size = info.file_size - f.tell()
    if dtype.kind not in 'fiubUS':
      raise UsageError(f'{what} has dtype {show(str(dtype))}; expected numbers or strings')
    if _byte_count(list(shape), dtype, what) != size:
      raise UsageError(f'{what}: {dtype} {show(shape)} does not take the {size} bytes it has')
    return shape

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return self._shapes

  def read(self, name: str) -> np.ndarray:
    with refusing(f'{self._file.path}: array {show(name)}'):
      with self._zip.open(f'{name}.npy') as f:
        out = np.lib.format.read_array(f, allow_pickle=False)
    return out.astype(out.dtype.newbyteorder('='), copy=False)


def open_hf(path, *, allow_pickle: bool = False) -> TensorReader:
  """Opens a Hugging Face directory or one weights file; safetensors are preferred to pickles."""
  path = os.fspath(path)
  if not os.path.lexists(path):
    raise UsageError(f'{path} does not exist')
  if not os.path.isdir(path):
    if path.endswith('.bin'):
      return Pickled(path, allow_pickle=allow_pickle)
    if path.endswith(('.safetensors', '.npz')):
      return Npz(path) if path.endswith('.npz') else Safetensors(path)
    raise UsageError(f'{path}: known endings are .safetensors, .npz, .bin')
  names = sorted(os.listdir(path))
  if SAFE in names or SAFE + INDEX in names:
    return Safetensors(path)
  if BIN in names or BIN + INDEX in names:
    return Pickled(path, allow_pickle=allow_pickle)
  arrays = [name for name in names if name.endswith('.npz')]
  if len(arrays) == 1:
    return Npz(resolve_inside(path, arrays[0]))
  raise UsageError(f'{path} contains no weights: looked for {SAFE}, {SAFE + INDEX}, {BIN}, '
                   f'{BIN + INDEX} and one .npz; found {show(names)}')


def write_safetensors(folder, tensors: Iterable[tuple[str, np.ndarray]],
                      specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], *,
                      max_shard_bytes: int = 5_000_000_000) -> list[str]:
  """Writes model.safetensors, or shards and their index, into `folder`; returns the names written.

  specs: {name: (shape, dtype)} of all tensors, which determines the shards. tensors: each exactly
  once, in any order, numpy or jax; only one is in memory at a time. No file gets its name before
  all are complete and on disk, and the index is the last. UsageError if the folder has weights or
  cannot be written; ValueError if tensors and specs disagree.
  """
  specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in specs.items()}
  sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items()}
  shards, room = [[]], max_shard_bytes
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  names = [SAFE] if len(shards) == 1 else [
      f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
  written = names + [SAFE + INDEX] * (len(shards) > 1)
  index = json.dumps({
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': {tensor: name for name, shard in zip(names, shards) for tensor in shard},
  }, indent=2).encode()

  try:
    for name in os.listdir(folder):
      if name.endswith('.safetensors') or name == SAFE + INDEX:
        raise UsageError(f'{folder} already holds {name}; choose an empty folder')
    with contextlib.ExitStack() as stack:
      # The stack renames in the reverse order of opening: the index last.
      handles = {name: stack.enter_context(files.replacing(Path(folder, name)))
                 for name in reversed(written)}
      if SAFE + INDEX in handles:
        handles[SAFE + INDEX].write(index)
      places = {}                # {tensor: (file, offset)}
      for name, shard in zip(names, shards):
        header, starts = _make_header(shard, specs, sizes)
        handles[name].write(header)
        for tensor, start in starts.items():
          places[tensor] = handles[name], len(header) + start

      for name, array in tensors:
        if name not in places:
          raise ValueError(f'tensor {name!r} has no spec or was given twice')
        f, offset = places.pop(name)
        array = np.asarray(array)
        if (array.shape, array.dtype) != specs[name]:
          raise ValueError(f'{name!r} is {array.dtype} {array.shape}, its spec {specs[name]}')
        f.seek(offset)
        f.writelines(_pieces(array))
        del array                # before the next one is made
      if places:
        raise ValueError(f'specs without a tensor: {", ".join(places)}')
      for f in handles.values():   # all are on disk before the first is renamed
        f.flush()
        os.fsync(f.fileno())
  except OSError as e:
    raise UsageError(f'cannot write to {folder}: {e.strerror or e}') from None
  return written


def _make_header(names, specs, sizes) -> tuple[bytes, dict[str, int]]:
  """Returns (a file's first bytes, {name: start of its data}); wide dtypes first, for alignment."""
  header, starts, end = {'__metadata__': {'format': 'pt'}}, {}, 0    # transformers requires it
  for name in sorted(names, key=lambda n: (-specs[n][1].itemsize, n)):
    shape, dtype = specs[name]
    starts[name], end = end, end + sizes[name]
    header[name] = {'dtype': CODES[dtype], 'shape': shape, 'data_offsets': [starts[name], end]}
  raw = json.dumps(header, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % 8)
  return len(raw).to_bytes(8, 'little') + raw, starts


def _pieces(array):
  """Yields its bytes in C order, some rows at a time: a transposed view is never copied whole."""
  array = np.atleast_1d(array)
  rows = max(1, PIECE * len(array) // max(1, array.nbytes))
  for i in range(0, len(array), rows):
    yield np.ascontiguousarray(array[i:i + rows]).reshape(-1).view(np.uint8)


def _weight_files(path, single) -> tuple[dict[str, str], dict[str, str]]:
  """Returns ({file: real path}, {tensor: file} of the index, or {}) of a file or directory."""
  path = os.fspath(path)
  if not os.path.isdir(path):
    return {os.path.basename(path): path}, {}
  if os.path.lexists(os.path.join(path, single)):
    return {single: resolve_inside(path, single)}, {}
  file = File(resolve_inside(path, single + INDEX))
  index = _parse_json(file.header(0, file.size), file.path).get('weight_map')
  if not isinstance(index, dict) or not index:
    raise UsageError(f'{file.path} has no weight_map of tensors to files')
  for tensor, name in index.items():
    is_name = isinstance(name, str) and name not in ('', '.', '..')
    if not is_name or re.search(r'[/\\\x00-\x1f]', name):
      raise UsageError(f'{file.path} maps {show(tensor)} to {show(name)}; expected the plain name '
                       'of a file beside it')
  names = list(dict.fromkeys(index.values()))
  if missing := [name for name in names if not os.path.lexists(os.path.join(path, name))]:
    raise UsageError(f'{path} lacks {len(missing)} of the {len(names)} files of its index: '
                     f'{", ".join(missing[:20])}{", …" * (len(missing) > 20)}')
  return {name: resolve_inside(path, name) for name in names}, index


def resolve_inside(folder, name) -> str:
  """Returns the real path of folder/name; a link must stay in the folder or lead to cached blobs.

  Hugging Face's cache has <model>/snapshots/<revision>/<name> -> ../../blobs/<hash>; the folder may
  also be one inside the revision.
  """
  root, real = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
  allowed = [root]
  for revision in (root, os.path.dirname(root)):
    model, snapshots = os.path.split(os.path.dirname(revision))
    allowed += [os.path.join(model, 'blobs')] * (snapshots == 'snapshots')
  if os.path.dirname(real) not in allowed:
    raise UsageError(f'{os.path.join(folder, name)} links out of its directory, to {show(real)}')
  return real


def _merge(path, paths: dict[str, str], index: Mapping[str, str], read_file: Callable) -> dict:
  """Returns {tensor: entry}, each from the file that the index says, by read_file(real path)."""
  out = {}
  for file, real in paths.items():
    for name, entry in read_file(real).items():
      if index.get(name, file) != file:
        continue
      if name in out:
        raise UsageError(f'{path}: tensor {show(name)} is in two files and not in the index')
      out[name] = entry
  for name, file in index.items():
    if name not in out:
      raise UsageError(f'{path}: the index maps {show(name)} to {file}, which does not contain it')
  return out


def _parse_json(raw: bytes, path) -> dict:
  """Returns a JSON object. Stricter than files.parse_json: no key twice, a limit on values."""
  def unique(pairs):
    out = {}
    for key, value in pairs:
      if key in out:
        raise UsageError(f'{path}: key {show(key)} occurs twice')
      out[key] = value
    return out

  if (n := sum(map(raw.count, b'{[,'))) > 10 ** 6:     # each takes about 70 bytes of memory
    raise UsageError(f'{path}: {n} values in its JSON; the limit is {10 ** 6}')
  with refusing(f'{path} is not readable JSON'):
    value = json.loads(raw.decode('utf-8'), object_pairs_hook=unique)
  if not isinstance(value, dict):
    raise UsageError(f'{path}: expected a JSON object, found {type(value).__name__}')
  return value


def _are_naturals(x) -> bool:
  return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)


def _byte_count(shape, dtype, what) -> int:
  """Returns the bytes of an array, in Python's unbounded ints; UsageError for an invalid shape."""
  is_valid = _are_naturals(shape) and len(shape) <= 32
  if not is_valid or math.prod(max(1, n) for n in shape) * dtype.itemsize >= 1 << 63:
    raise UsageError(f'{what} has shape {show(shape)}; expected up to 32 natural numbers and less '
                     'than 2^63 bytes')
  return math.prod(shape) * dtype.itemsize
