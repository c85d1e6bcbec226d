"""Tensor files, read and written a tensor at a time: safetensors, torch's pickles, .npz.

A file may come from a stranger. Each size in it is compared with the file before memory is asked
for, links and names lead nowhere else, and nothing in it is run; what is malformed is a UsageError
of one line. Tensors are read with pread into memory of ours, not mapped, as the pages of a map
count as ours: the peak is the largest tensor.
"""

from collections.abc import Iterable, Mapping
import contextlib
import json
import math
import os
from pathlib import Path
import re
import stat
from typing import NamedTuple
import weakref
import zipfile

import ml_dtypes
import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.interop.rows import Reader

SAFE, BIN = 'model.safetensors', 'pytorch_model.bin'
INDEX = '.index.json'
HEADER_BYTES = 100_000_000   # the limit that safetensors itself sets on a header
PIECE = 64 << 20             # bytes copied at once while writing
RATIO = 100                  # of an .npz array over PIECE to its bytes in the zip; weights: 1 to 3

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
    'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz, 'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz,
    'F8_E8M0': ml_dtypes.float8_e8m0fnu, 'C64': np.complex64,
    'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8,
    'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
}.items()}
CODES = {dtype: name for name, dtype in DTYPES.items()}


class File:
  """A regular file, open for reading at offsets; pipes, devices and directories are refused."""

  def __init__(self, path):
    self.path = os.fspath(path)
    try:
      fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # to open a FIFO would block
    except OSError as e:
      raise UsageError(f'cannot read {self.path}: {e.strerror}') from None
    weakref.finalize(self, os.close, fd)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
      raise UsageError(f'{self.path} is not a regular file')
    self.fd, self.size = fd, info.st_size

  def fill(self, out: np.ndarray, offset: int) -> np.ndarray:
    """The C-contiguous `out` with its bytes read from `offset`. UsageError if the file ends."""
    view = memoryview(out.reshape(-1).view(np.uint8))
    while view:
      n = os.preadv(self.fd, [view], offset)
      if not n:
        raise UsageError(f'{self.path} ends at byte {offset}, {len(view)} short: it was cut')
      view, offset = view[n:], offset + n
    return out

  def head(self, offset: int, n: int) -> bytes:
    if n > HEADER_BYTES:
      raise UsageError(f'{self.path}: a header of {n} bytes; the limit is {HEADER_BYTES}')
    return self.fill(np.empty(n, np.uint8), offset).tobytes()


class _Tensor(NamedTuple):
  file: File
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int           # of its bytes in the file


class Safetensors:
  """A .safetensors file, or a directory with model.safetensors or model.safetensors.index.json."""

  def __init__(self, path):
    paths, where = _parts(path, SAFE)
    self._tensors = _placed(
        {part: _header(File(real)) for part, real in paths.items()}, where, path)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: t.shape for name, t in self._tensors.items()}

  def dtypes(self) -> dict[str, np.dtype]:
    return {name: t.dtype for name, t in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """The tensor in memory of its own, in the file's dtype (bfloat16 and float8: ml_dtypes')."""
    t = self._tensors[name]
    out = t.file.fill(np.empty(t.shape, t.dtype), t.start)
    if t.dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
      raise UsageError(f'{t.file.path}: BOOL tensor {show(name)} has bytes beside 0 and 1')
    return out


def _header(file) -> dict[str, _Tensor]:
  """{name: where it lies}, once the tensors are known to cover the file, each byte once."""
  path, room = file.path, file.size - 8
  length = int.from_bytes(file.head(0, 8), 'little')
  if length > room:
    raise UsageError(f'{path} is cut short or no safetensors file: a header of {length} bytes, and '
                     f'{room} after its length')
  entries, spans, room = _json(file.head(8, length), path), [], room - length
  metadata = entries.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise UsageError(f'{path}: __metadata__ is not a map of strings to strings')
  for name, entry in entries.items():
    what = f'{path}: tensor {show(name)}'
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
      raise UsageError(f'{what} has not exactly dtype, shape and data_offsets')
    dtype, shape, span = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in DTYPES:
      raise UsageError(f'{what} has dtype {show(dtype)}; known: {", ".join(DTYPES)}')
    size = _nbytes(shape, DTYPES[dtype], what)
    if not _naturals(span) or len(span) != 2 or not span[0] <= span[1] <= room:
      raise UsageError(f'{what} has data_offsets {show(span)}; expected two in 0 … {room}')
    if span[1] - span[0] != size:
      raise UsageError(f'{what}: {dtype} {show(shape)} takes {size} bytes, its data_offsets '
                       f'{show(span)} hold {span[1] - span[0]}')
    spans.append((*span, name))
  at, last = 0, 'the header'
  for begin, end, name in [*sorted(spans), (room, room, '')]:
    what = f'tensor {show(name)}' if name else 'the end of the file'
    if begin < at:
      raise UsageError(f'{path}: {what} begins at {begin} and overlaps {last}, which ends at {at}')
    if begin > at:
      raise UsageError(f'{path}: {begin - at} bytes between {last} and {what} belong to no tensor')
    at, last = end, what
  return {name: _Tensor(file, DTYPES[e['dtype']], tuple(e['shape']),
                        8 + length + e['data_offsets'][0]) for name, e in entries.items()}


class Pickled:
  """pytorch_model.bin, or its shards, through torch's weights-only loader; never by default."""

  def __init__(self, path, *, allow_pickle: bool = False):
    paths, where = _parts(path, BIN)
    if not allow_pickle:
      raise UsageError(
          f'{os.fspath(path)} holds pickled weights ({next(iter(paths))}), which can run code when '
          'read; convert them to safetensors where they were made, or pass --allow-pickle to read '
          "them with torch's weights-only loader")
    self._tensors = _placed({part: _unpickled(real) for part, real in paths.items()}, where, path)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    import torch
    t = self._tensors[name]
    raw = t.reshape(-1).view(torch.uint8).numpy()   # numpy has no bfloat16; ml_dtypes names it so
    return raw.view(str(t.dtype).removeprefix('torch.')).reshape(t.shape).copy()


def _unpickled(path) -> dict:
  """{name: torch tensor}, still on disk where the file is a zip (torch 1.6 and later)."""
  try:
    import torch
  except ImportError:
    raise UsageError(f"{path}: reading pickled weights needs torch: pip install 't5lab[parity]'"
                     ) from None
  if tuple(map(int, re.findall(r'\d+', torch.__version__)[:2])) < (2, 6):
    raise UsageError(f'torch {torch.__version__}: a file can run code in its weights-only loader '
                     '(CVE-2025-32434); torch 2.6 or later is needed')
  file = File(path)
  with refusing(f"{path}: torch's weights-only loader refuses it, and ran nothing of it"):
    if mapped := zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as z:
        if any(i.compress_type or i.file_size > file.size for i in z.infolist()):
          raise UsageError(f'{path} is compressed inside, which torch never writes')
    state = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
  if not isinstance(state, dict):
    raise UsageError(f'{path} holds a {type(state).__name__}; expected a dict of tensors')
  for name, t in state.items():
    if not isinstance(name, str) or not isinstance(t, torch.Tensor) or (
        t.layout != torch.strided or t.is_quantized or t.device.type != 'cpu'):
      raise UsageError(f'{path}: {show(name)} is a {type(t).__name__}; expected only names and '
                       'dense tensors on the CPU: save the state_dict alone')
    if t.numel() * t.element_size() > file.size:   # a stride of 0 claims more than there is
      raise UsageError(f'{path}: {show(name)} has shape {tuple(t.shape)}, more than the '
                       f'{file.size} bytes of the file')
  return {name: t.detach() for name, t in state.items()}


class Npz:
  """A .npz of numbers and strings. Objects, and arrays that expand beyond reason, are refused."""

  def __init__(self, path):
    self._file = File(path)
    with refusing(f'{self._file.path} is no .npz'):
      self._zip = zipfile.ZipFile(open(self._file.fd, 'rb', closefd=False))
      self._arrays = {}
      for info in self._zip.infolist():
        name = info.filename.removesuffix('.npy')
        if name == info.filename or name in self._arrays:
          raise UsageError(f'{path}: entry {show(info.filename)} twice, or not named .npy')
        self._arrays[name] = info, self._checked(info)

  def _checked(self, info) -> tuple[int, ...]:
    """The shape of an entry of the zip, whose header agrees with its size."""
    what = f'{self._file.path}: array {show(info.filename)}'
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise UsageError(f'{what} is encrypted or compressed other than by deflate')
    if info.compress_size > self._file.size or info.file_size > max(
        PIECE, RATIO * info.compress_size):
      raise UsageError(f'{what} claims {info.file_size} bytes from {info.compress_size}; the limit '
                       f'is {RATIO} times, of a file of {self._file.size}')
    with self._zip.open(info) as f:
      version = np.lib.format.read_magic(f)   # above 2.0 are only names of fields
      shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                         else np.lib.format.read_array_header_2_0)(f)
      size = info.file_size - f.tell()
    if dtype.kind not in 'fiubUS':
      raise UsageError(f'{what} has dtype {show(str(dtype))}; expected numbers or strings')
    if _nbytes(list(shape), dtype, what) != size:
      raise UsageError(f'{what}: {dtype} {show(shape)} does not take the {size} bytes it has')
    return shape

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in self._arrays.items()}

  def read(self, name: str) -> np.ndarray:
    with refusing(f'{self._file.path}: array {show(name)}'):
      with self._zip.open(self._arrays[name][0]) as f:
        out = np.lib.format.read_array(f, allow_pickle=False)
    return out.astype(out.dtype.newbyteorder('='), copy=False)


def open_hf(path, *, allow_pickle: bool = False) -> Reader:
  """The reader of a Hugging Face directory or of one weights file; safetensors before pickles."""
  path = os.fspath(path)
  if not os.path.lexists(path):
    raise UsageError(f'{path} does not exist')
  if not os.path.isdir(path):
    kinds = {'.safetensors': Safetensors, '.npz': Npz,
             '.bin': lambda path: Pickled(path, allow_pickle=allow_pickle)}
    if Path(path).suffix in kinds:
      return kinds[Path(path).suffix](path)
    raise UsageError(f'{path}: known endings are {", ".join(kinds)}')
  names = sorted(os.listdir(path))
  if SAFE in names or SAFE + INDEX in names:
    return Safetensors(path)
  if BIN in names or BIN + INDEX in names:
    return Pickled(path, allow_pickle=allow_pickle)
  arrays = [name for name in names if name.endswith('.npz')]
  if len(arrays) == 1:
    return Npz(inside(path, arrays[0]))
  raise UsageError(f'{path} holds no weights: looked for {SAFE}, {SAFE + INDEX}, {BIN}, '
                   f'{BIN + INDEX} and one .npz; found {show(names)}')


def write_safetensors(folder, tensors: Iterable[tuple[str, np.ndarray]],
                      specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], *,
                      max_shard_bytes: int = 5_000_000_000,
                      metadata: Mapping[str, str] | None = None) -> list[str]:
  """Writes model.safetensors, or shards and their index, into `folder`; returns the names written.

  specs: {name: (shape, dtype)} of all tensors, which sets the shards; tensors: each once, in any
  order, numpy or jax, one in memory at a time. metadata: {'format': 'pt'} if None, which
  transformers asks for. No file has its name before all are whole and on disk. UsageError if the
  folder has weights or cannot be written; ValueError if tensors and specs do not agree.
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
  files = [SAFE] if len(shards) == 1 else [
      f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
  made, places = {}, {}   # {a file's name for now: the file}, {tensor: (file, offset)}

  def make(file, head):
    partial = Path(folder, f'{file}.{os.getpid()}.partial')
    f = made[partial] = stack.enter_context(open(partial, 'xb'))
    stack.callback(partial.unlink, missing_ok=True)
    f.write(head)
    return f

  try:
    if held := [n for n in os.listdir(folder) if n.endswith('.safetensors') or n == SAFE + INDEX]:
      raise UsageError(f'{folder} already holds {held[0]}; choose an empty folder')
    with contextlib.ExitStack() as stack:
      for file, names in zip(files, shards):
        head, ends = _written(names, specs, sizes, metadata or {'format': 'pt'})
        f = make(file, head)
        places.update({name: (f, len(head) + end - sizes[name]) for name, end in ends.items()})
      for name, array in tensors:
        if name not in places:
          raise ValueError(f'tensor {name!r} has no spec, or came twice')
        f, at = places.pop(name)
        array = np.asarray(array)
        if (array.shape, array.dtype) != specs[name]:
          raise ValueError(f'{name!r} is {array.dtype} {array.shape}, its spec {specs[name]}')
        f.seek(at)
        f.writelines(_pieces(array))
        del array   # before the next one is made
      if places:
        raise ValueError(f'specs without a tensor: {", ".join(places)}')
      if len(files) > 1:
        files.append(SAFE + INDEX)
        make(files[-1], json.dumps({
            'metadata': {'total_size': sum(sizes.values())},
            'weight_map': {n: file for file, names in zip(files, shards) for n in names},
        }, indent=2).encode())
      for f in made.values():
        f.flush()
        os.fsync(f.fileno())
      for partial, file in zip(made, files):   # the index last
        partial.rename(partial.with_name(file))
      fd = os.open(folder, os.O_RDONLY)
      stack.callback(os.close, fd)
      os.fsync(fd)   # the names too
  except OSError as e:
    raise UsageError(f'cannot write to {folder}: {e.strerror or e}') from None
  return files


def _written(names, specs, sizes, metadata) -> tuple[bytes, dict[str, int]]:
  """(a file's first bytes, {name: where its bytes end}); wide dtypes first, so all are aligned."""
  header, ends, at = {'__metadata__': dict(metadata)}, {}, 0
  for name in sorted(names, key=lambda n: (-specs[n][1].itemsize, n)):
    shape, dtype = specs[name]
    ends[name] = at + sizes[name]
    header[name] = {'dtype': CODES[dtype], 'shape': shape, 'data_offsets': [at, ends[name]]}
    at = ends[name]
  raw = json.dumps(header, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % 8)
  return len(raw).to_bytes(8, 'little') + raw, ends


def _pieces(array):
  """Its bytes in C order, some rows at a time: a transposed view is never copied whole."""
  array = np.atleast_1d(array)
  rows = max(1, PIECE * len(array) // max(1, array.nbytes))
  for i in range(0, len(array), rows):
    yield np.ascontiguousarray(array[i:i + rows]).reshape(-1).view(np.uint8)


def _parts(path, single) -> tuple[dict[str, str], dict[str, str] | None]:
  """({file: real path}, {tensor: file} of the index, None without one) of a file or directory."""
  path = os.fspath(path)
  if not os.path.isdir(path):
    return {os.path.basename(path): path}, None
  if os.path.lexists(os.path.join(path, single)):
    return {single: inside(path, single)}, None
  index = File(inside(path, single + INDEX))
  where = _json(index.head(0, index.size), index.path).get('weight_map')
  if not isinstance(where, dict) or not where:
    raise UsageError(f'{index.path} has no weight_map of tensors to files')
  files = {}
  for name, file in where.items():
    if not isinstance(file, str) or file in ('', '.', '..') or re.search(r'[/\\\x00-\x1f]', file):
      raise UsageError(f'{index.path} maps {show(name)} to {show(file)}; expected the plain name '
                       'of a file beside it')
    files.setdefault(file)
  if lost := [f for f in files if not os.path.lexists(os.path.join(path, f))]:
    raise UsageError(f'{path} lacks {len(lost)} of the {len(files)} files of its index: '
                     f'{", ".join(lost[:20])}{", …" * (len(lost) > 20)}')
  return {file: inside(path, file) for file in files}, where


def inside(folder, name) -> str:
  """The real path of folder/name. A link may stay in the folder, or lead to a cache's blobs.

  Hugging Face's cache has <model>/snapshots/<revision>/<name> -> ../../blobs/<hash>.
  """
  root, real = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
  model, snapshots = os.path.split(os.path.dirname(root))
  if os.path.dirname(real) != root and (
      snapshots != 'snapshots' or os.path.dirname(real) != os.path.join(model, 'blobs')):
    raise UsageError(f'{os.path.join(folder, name)} links out of its directory, to {show(real)}')
  return real


def _placed(parts: dict[str, dict], where, path) -> dict:
  """{tensor: its entry}, from {file: {tensor: entry}}; each in one file, as the index says."""
  where, out = where or {}, {}
  for file, entries in parts.items():
    for name, entry in entries.items():
      if where.get(name, file) == file:
        if name in out:
          raise UsageError(f'{path}: tensor {show(name)} is in two files and not in the index')
        out[name] = entry
  for name, file in where.items():
    if name not in out:
      raise UsageError(f'{path}: the index maps {show(name)} to {file}, which does not hold it')
  return out


def _json(raw: bytes, path) -> dict:
  def once(pairs):
    found = {}
    for key, value in pairs:
      if key in found:
        raise UsageError(f'{path}: key {show(key)} comes twice')
      found[key] = value
    return found

  if (n := sum(map(raw.count, b'{[,'))) > 10 ** 6:     # each takes some 70 bytes of memory
    raise UsageError(f'{path}: {n} values in its JSON; the limit is {10 ** 6}')
  with refusing(f'{path} is not readable JSON'):
    found = json.loads(raw.decode('utf-8'), object_pairs_hook=once)
  if not isinstance(found, dict):
    raise UsageError(f'{path}: expected a JSON object, found {type(found).__name__}')
  return found


def _naturals(x) -> bool:
  return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)


def _nbytes(shape, dtype, what) -> int:
  """Bytes of an array, in Python's integers, which do not overflow; UsageError for no shape."""
  if not _naturals(shape) or len(shape) > 32 or (
      math.prod(max(1, n) for n in shape) * dtype.itemsize >= 1 << 63):
    raise UsageError(f'{what} has shape {show(shape)}; expected up to 32 natural numbers and less '
                     'than 2^63 bytes')
  return math.prod(shape) * dtype.itemsize


def show(x) -> str:
  """A value of a file in an error: escaped, and short."""
  text = repr(x)
  return text if len(text) <= 100 else text[:80] + '…' + text[-19:]


@contextlib.contextmanager
def refusing(what):
  """UsageError for whatever a library raises over a malformed file: none names all it may."""
  try:
    yield
  except UsageError:
    raise
  except Exception as e:
    asks = re.search(r'GLOBAL ([\w.]+)', str(e))   # torch says in line 9 what it would not import
    why = f'it asks for {asks[1]}' if asks else f'{type(e).__name__}: {str(e).strip()[:200]}'
    raise UsageError(f'{what}: {why.splitlines()[0]}') from None
