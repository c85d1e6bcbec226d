"""T5X's checkpoint files: a msgpack tree, and a zarr directory beside it for each large leaf.

  checkpoint_1000/checkpoint                           {'version': 3, 'optimizer': {'target': …,
  checkpoint_1000/target.encoder.encoder_norm.scale/   'state': {'step', 'param_states'}}}
  checkpoint_1000/state/checkpoint                     the Orbax form: no version, no 'optimizer',
  checkpoint_1000/state/target.encoder.…/              leaves are 'PLACEHOLDER://target.encoder.…'

Reads both forms, older ones (no 'optimizer' level; '_optimizer'; all leaves inline; uint16 for
bfloat16) and the output of current Orbax ('_METADATA' instead of the tree, one OCDBT database
instead of the directories). A path in a file is only ever joined below its own directory.
[google-research/t5x, checkpoints.py]
"""

from collections.abc import Mapping
import json
import math
import os
from pathlib import Path
import re
from typing import NamedTuple

from flax import serialization
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from t5lab import files
from t5lab.errors import UsageError
from t5lab.tools.interop.tensor_map import TensorReader

TARGET, SLOTS = 'target/', 'state/param_states/'
PLACEHOLDER = 'PLACEHOLDER://'
MAX_TREE = 8 << 30          # bytes of msgpack or JSON, which is read into memory whole
CHUNK = 64 << 20            # bytes; T5X's _DESIRED_CHUNK_SIZE_BYTES
# gzip expands at most 1032-fold, weights hardly at all. If a header claims more than memory has,
# tensorstore does not raise but ends the process.
MAX_EXPANSION = 2000
CONTEXT = ts.Context({'file_io_sync': False})   # the caller flushes and renames the whole folder


class ZarrLeaf(NamedTuple):
  """An array in a zarr directory or an Orbax database, unopened."""
  name: str
  folder: Path                       # of the tree
  path: str                          # of the array, below `folder`
  tree_shape: tuple[int, ...] | None   # None: the shape is only in the array's own header
  bfloat16_as_uint16: bool           # version 2 wrote it so

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.open().shape) if self.tree_shape is None else self.tree_shape

  def open(self) -> ts.TensorStore:
    if self.is_ocdbt():
      kvstore = {'driver': 'ocdbt', 'path': f'{self.path}/',
                 'base': {'driver': 'file', 'path': f'{self.folder.resolve()}/'}}
    else:
      kvstore = {'driver': 'file', 'path': f'{self.real_folder()}/'}
    try:
      return ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, read=True).result()
    except ValueError as e:
      raise UsageError(
          f'{self.name}: cannot open {self.folder / self.path} ({_one_line(e)})') from e

  def read(self) -> np.ndarray:
    store, name = self.open(), self.name
    shape, chunks = tuple(store.shape), store.chunk_layout.read_chunk.shape or ()
    if self.tree_shape not in (None, shape):
      raise UsageError(f'{name} has shape {self.tree_shape} in the tree and {shape} on disk')
    size = self.stored_bytes(shape, chunks)
    claim = store.dtype.numpy_dtype.itemsize * max(math.prod(shape), math.prod(chunks))
    if claim > max(CHUNK, MAX_EXPANSION * size):
      raise UsageError(f'{name} claims {claim} bytes (shape {shape}, in chunks of {chunks}), but '
                       f'{size} are on disk')
    try:
      out = np.asarray(store.read().result())
    except ValueError as e:
      raise UsageError(f'{name}: {self.folder / self.path} is damaged ({_one_line(e)})') from e
    return out.view(jnp.bfloat16) if self.bfloat16_as_uint16 and out.dtype == np.uint16 else out

  def stored_bytes(self, shape, chunks) -> int:
    """Returns the bytes of all chunks, or of the whole database; UsageError if a chunk is missing.

    zarr reads a missing chunk as zeros, so an incomplete download would go unnoticed.
    """
    if self.is_ocdbt():
      return sum(f.stat().st_size for f in self.folder.rglob('*') if f.is_file())
    real, root = self.real_folder(), self.folder.resolve()
    count = size = 0
    for folder, _, names in os.walk(real):
      for file in names:
        if re.fullmatch(r'\d+(\.\d+)*', file):
          chunk = Path(folder, file)
          if chunk.is_symlink() and not chunk.resolve().is_relative_to(root):
            raise UsageError(f'{chunk} is a link out of the checkpoint')
          count, size = count + 1, size + chunk.stat().st_size
    expected = math.prod(-(-n // c) for n, c in zip(shape, chunks))
    if count < expected:
      raise UsageError(f'{self.name} has {count} of its {expected} chunks in {real}: an incomplete '
                       'copy')
    return size

  def is_ocdbt(self) -> bool:
    return (self.folder / 'manifest.ocdbt').is_file()

  def real_folder(self) -> Path:
    """Returns the directory with links resolved; it must still be in the checkpoint."""
    real = (self.folder / self.path).resolve()
    if not real.is_relative_to(self.folder.resolve()):
      raise UsageError(f'{self.name}: {self.folder / self.path} is a link out of the checkpoint')
    return real


class Leaves(TensorReader):
  """The leaves whose names begin with `prefix` as a TensorReader, by the rest of their names."""

  def __init__(self, leaves: Mapping[str, ZarrLeaf | np.ndarray], prefix: str, path: Path):
    below = {name.removeprefix(prefix): leaf for name, leaf in leaves.items()
             if name.startswith(prefix)}
    super().__init__({name: leaf._replace(name=name) if isinstance(leaf, ZarrLeaf) else leaf
                      for name, leaf in below.items()})
    self._path = path

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor in its own dtype; UsageError if it is missing, damaged or incomplete."""
    if name not in self._tensors:
      raise UsageError(f'{self._path} has no {name}')
    leaf = self._tensors[name]
    return leaf.read() if isinstance(leaf, ZarrLeaf) else leaf


class T5x(Leaves):
  """The parameters ('target') of one T5X checkpoint, with T5X's names without 'target/'.

  path: checkpoint_<step>, or the file 'checkpoint' in it. UsageError for anything else.
  """

  def __init__(self, path):
    path = Path(path)
    folder, tree = _read_tree(path)
    version = tree.get('version', 0)
    tree = next((tree[k] for k in ('optimizer', '_optimizer') if k in tree), tree)
    if not isinstance(tree, dict) or not isinstance(tree.get('target'), dict):
      raise UsageError(f"{path} has no 'target' tree of parameters, so T5X did not write it")
    tree = {k: tree[k] for k in ('target', 'state') if k in tree}
    self._all = {name: _leaf(name, value, folder, version == 2)
                 for name, value in _flatten(tree)}
    super().__init__(self._all, TARGET, path)
    if not self._tensors:
      raise UsageError(f"{path} has no parameters: its 'target' is empty")

  @property
  def step(self) -> int | None:
    """The number of updates so far; None if the checkpoint does not record it."""
    if 'state/step' not in self._all:
      return None
    step = Leaves(self._all, '', self._path).read('state/step')
    if step.size != 1 or step.dtype.kind not in 'iu':
      raise UsageError(f'{self._path}: state/step must be one integer, got '
                       f'{step.dtype}{step.shape}')
    return int(step.reshape(()))

  def slots(self) -> Leaves:
    """Returns the optimizer state: '<parameter>/{m, v, v_row, v_col}' under Adafactor."""
    return Leaves(self._all, SLOTS, self._path)


def write_zarr(folder: Path, name: str, array: np.ndarray) -> dict:
  """Writes the directory `name` (with '.' for '/'); returns its spec for the msgpack tree.

  Like T5X's Checkpointer._get_parameter_infos: zarr 2, gzip, chunks of at most 64 MiB. UsageError
  if the directory exists already or the disk is full.
  """
  row_bytes = max(1, array.nbytes // max(1, len(array)))
  metadata = {'compressor': {'id': 'gzip', 'level': 1}, 'shape': list(array.shape),
              'chunks': [min(len(array), max(1, CHUNK // row_bytes)), *array.shape[1:]]}
  path = name.replace('/', '.')
  # In the file the dtype is in the metadata, '<f4'; in T5X's spec it is beside the metadata.
  spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{folder / path}/'},
          'metadata': {**metadata, 'dtype': array.dtype.str}}
  try:
    ts.open(spec, create=True, context=CONTEXT).result().write(array).result()
  except ValueError as e:
    raise UsageError(f'cannot write {folder / path} ({_one_line(e)})') from e
  return {'driver': 'zarr', 'dtype': array.dtype.name,
          'kvstore': {'driver': 'file', 'path': f'{path}/'}, 'metadata': metadata}


def _read_tree(path) -> tuple[Path, dict]:
  """Returns (the folder that the tree's paths are relative to, the nested dict)."""
  if path.is_dir():
    candidates = [path / 'checkpoint', path / 'state' / 'checkpoint', path / '_METADATA',
                  path / 'state' / '_METADATA']
    file = next((f for f in candidates if f.is_file()), None)
    if file is None:
      steps = sorted((f.name for f in path.glob('checkpoint_*') if f.is_dir()), reverse=True)
      more = f'; it holds {", ".join(steps[:5])}: name one of them' if steps else ''
      raise UsageError(f"no T5X checkpoint in {path}: it has neither 'checkpoint', "
                       f"'state/checkpoint' nor '_METADATA'{more}")
  elif path.is_file():
    file = path
  else:
    raise UsageError(f'no such file or folder: {path}')
  data = files.read_bytes(file, MAX_TREE)     # large leaves are in zarr directories beside it
  if file.name == '_METADATA':
    return file.parent, _orbax_tree(file, data)
  if data.startswith(b'model_checkpoint_path'):
    raise UsageError(f"{file} is the index of a TensorFlow checkpoint; T5X's own are msgpack. "
                     "Convert it with T5X's convert_tf_checkpoint")
  try:
    # msgpack holds no code, and flax's extension types are arrays and numbers, never objects.
    tree = serialization.msgpack_restore(data)
  except Exception as e:   # damaged bytes: msgpack, flax and numpy each raise their own types
    raise UsageError(f'{file} is not a T5X checkpoint: not msgpack ({_one_line(e)})') from e
  if not isinstance(tree, dict):
    raise UsageError(f'{file} is not a T5X checkpoint: a {type(tree).__name__}, not a tree')
  return file.parent, tree


def _orbax_tree(file, data) -> dict:
  """Returns the tree of '_METADATA', which lists the leaves of a checkpoint without msgpack."""
  try:
    meta = json.loads(data)
    keys = [[str(k['key']) for k in entry['key_metadata']]
            for entry in meta['tree_metadata'].values()]
    zarr3 = meta.get('use_zarr3')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise UsageError(f"{file} is not Orbax's metadata of a tree ({_one_line(e)})") from e
  if zarr3:
    raise UsageError(f'{file} has use_zarr3, which T5X does not write; only zarr 2 is supported')
  tree = {}
  for key in keys:
    node = tree
    for k in key[:-1]:
      node = node.setdefault(k, {})
      if not isinstance(node, dict):
        raise UsageError(f'{file}: {"/".join(key)} is below a leaf')
    node[key[-1]] = PLACEHOLDER + '.'.join(key)
  return tree


def _flatten(tree, parents=()):
  """Yields (name, value) of every leaf: an array, a number, a text or the spec of an array."""
  for key, value in tree.items():
    if not isinstance(key, str) or '/' in key or not key:
      raise UsageError(f'a key of the checkpoint below {"/".join(parents)!r} is {key!r}, which is '
                       'not a name')
    is_spec = isinstance(value, dict) and {'driver', 'kvstore', 'metadata'} <= set(value)
    if isinstance(value, dict) and not is_spec:
      yield from _flatten(value, (*parents, key))
    elif value is not None:   # None: T5X's state of a parameter that no optimizer updates
      yield '/'.join((*parents, key)), value


def _leaf(name, value, folder, bfloat16_as_uint16):
  """Returns a ZarrLeaf for a spec or a placeholder, a numpy array for an inline value."""
  if isinstance(value, dict):
    try:
      kvstore = value['kvstore']
      path = kvstore['path'] if 'path' in kvstore else value['path']   # tensorstore before 0.1.14
      shape = value['metadata']['shape']
    except (KeyError, TypeError) as e:
      raise UsageError(f'{name} is not a tensorstore spec with a path and a shape '
                       f'({_one_line(e)})') from e
    path = _relative_path(path, name)
    is_list = isinstance(shape, (list, tuple)) and len(shape) <= 8
    if not is_list or any(type(n) is not int or n < 0 for n in shape):
      raise UsageError(f'{name} has shape {str(shape)[:80]}, not a list of sizes')
    return ZarrLeaf(name, folder, path, tuple(shape), bfloat16_as_uint16)
  if isinstance(value, str):
    if not value.startswith(PLACEHOLDER):
      raise UsageError(f'{name} is the text {value[:80]!r}, not an array')
    path = _relative_path(value.removeprefix(PLACEHOLDER), name)
    return ZarrLeaf(name, folder, path, None, False)
  if not isinstance(value, (np.ndarray, np.generic, int, float)):
    raise UsageError(f'{name} is a {type(value).__name__}, not an array')
  array = np.asarray(value)
  if array.dtype.kind not in 'fiub' and array.dtype != jnp.bfloat16:
    raise UsageError(f'{name} has dtype {array.dtype}, which is not numeric')
  return array


def _relative_path(path, name) -> str:
  """Returns the path; UsageError unless it stays below the folder that it is joined to."""
  parts = path.split('/') if isinstance(path, str) else ['..']
  if '..' in parts or path.startswith('/') or '\0' in path or not path.strip('/.'):
    raise UsageError(f'{name} is stored at {path!r}, which must be a name inside the checkpoint')
  return path.rstrip('/')


def _one_line(e) -> str:
  return f'{type(e).__name__}: {e}'.split('\n')[0].split(' [')[0][:200]
