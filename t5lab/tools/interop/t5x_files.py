"""T5X's checkpoint files: a msgpack tree, and a zarr directory beside it for each large leaf.

  checkpoint_1000/checkpoint                           {'version': 3, 'optimizer': {'target': …,
  checkpoint_1000/target.encoder.encoder_norm.scale/   'state': {'step', 'param_states'}}}
  checkpoint_1000/state/checkpoint                     the Orbax form: no version, no 'optimizer',
  checkpoint_1000/state/target.encoder.…/              leaves are 'PLACEHOLDER://target.encoder.…'

Read: both, older ones (no 'optimizer' level; '_optimizer'; all leaves inline; uint16 for bfloat16),
and what today's Orbax writes ('_METADATA' for a tree, one OCDBT for the directories). A path in a
file is only ever joined under its own directory. [google-research/t5x, checkpoints.py]
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

from t5lab.errors import UsageError

TARGET, SLOTS = 'target/', 'state/param_states/'
PLACEHOLDER = 'PLACEHOLDER://'
MAX_TREE = 8 << 30          # bytes of msgpack or JSON: it is read into memory whole
CHUNK = 64 << 20            # bytes; T5X's _DESIRED_CHUNK_SIZE_BYTES
# gzip expands at most 1032-fold, weights hardly at all. A header that asks for more than memory
# has would not raise but end the process, in tensorstore.
MAX_EXPANSION = 2000
CONTEXT = ts.Context({'file_io_sync': False})   # the caller flushes and renames the whole folder


class Zarr(NamedTuple):
  """A leaf in a zarr directory, unopened."""
  folder: Path                       # of the tree
  path: str                          # of the array, below it
  shape: tuple[int, ...] | None      # as the tree says; None: only its header does
  halves: bool                       # bfloat16 was written as uint16 (version 2)


class Leaves:
  """{name: a zarr directory or a numpy array} as a Reader of interop.rows."""

  def __init__(self, leaves: Mapping[str, 'Zarr | np.ndarray'], where: Path):
    self._leaves, self._where = leaves, where

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """From the tree where it says them, else from the header of each array."""
    return {name: (leaf.shape if leaf.shape is not None else tuple(_open(leaf, name).shape))
            for name, leaf in self._leaves.items()}

  def read(self, name: str) -> np.ndarray:
    """One tensor in the dtype of the file; UsageError if it is missing, damaged or incomplete."""
    if name not in self._leaves:
      raise UsageError(f'{self._where} has no {name}')
    leaf = self._leaves[name]
    return _read_zarr(leaf, name) if isinstance(leaf, Zarr) else leaf


class T5x(Leaves):
  """The parameters ('target') of one T5X checkpoint, named as T5X names them, without 'target/'.

  path: checkpoint_<step>, or the file 'checkpoint' in it. UsageError if it is no such checkpoint.
  """

  def __init__(self, path):
    path = Path(path)
    folder, tree = _tree(path)
    version = tree.get('version', 0)
    tree = next((tree[k] for k in ('optimizer', '_optimizer') if k in tree), tree)
    if not isinstance(tree, dict) or not isinstance(tree.get('target'), dict):
      raise UsageError(f"{path} has no 'target' tree of parameters, so T5X did not write it")
    all_leaves = {}
    _flatten({k: tree[k] for k in ('target', 'state') if k in tree}, (), all_leaves,
             lambda name, leaf: _leaf(name, leaf, folder, version == 2))
    self._all = all_leaves
    super().__init__(_below(all_leaves, TARGET), path)
    if not self._leaves:
      raise UsageError(f"{path} has no parameters: its 'target' is empty")

  @property
  def step(self) -> int | None:
    """Updates so far; None if the checkpoint does not say."""
    if 'state/step' not in self._all:
      return None
    step = Leaves(self._all, self._where).read('state/step')
    if step.size != 1 or step.dtype.kind not in 'iu':
      raise UsageError(f'{self._where}: state/step is {step.dtype}{step.shape}, not one integer')
    return int(step.reshape(()))

  def slots(self) -> Leaves:
    """The optimizer's state of each parameter: '<name>/{m, v, v_row, v_col}' under Adafactor."""
    return Leaves(_below(self._all, SLOTS), self._where)


def write_zarr(folder: Path, name: str, array: np.ndarray) -> dict:
  """Writes folder/<name with '.' for '/'> -> the spec that stands for it in the msgpack tree.

  As T5X's Checkpointer._get_parameter_infos: zarr 2, gzip, chunks of 64 MiB at most. UsageError
  if it is there already, or the disk is full.
  """
  array = np.asarray(array)
  row = max(1, array.nbytes // max(1, array.shape[0])) if array.ndim else 1
  chunks = [min(array.shape[0], max(1, CHUNK // row)), *array.shape[1:]] if array.ndim else []
  metadata = {'compressor': {'id': 'gzip', 'level': 1}, 'shape': list(array.shape),
              'chunks': chunks}
  path = name.replace('/', '.')
  # the dtype of the metadata, '<f4', is for the file alone: T5X's spec has 'dtype' beside it
  spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{folder / path}/'},
          'metadata': {**metadata, 'dtype': array.dtype.str}}
  try:
    ts.open(spec, create=True, context=CONTEXT).result().write(array).result()
  except ValueError as e:
    raise UsageError(f'cannot write {folder / path} ({_line(e)})') from e
  return {'driver': 'zarr', 'dtype': array.dtype.name,
          'kvstore': {'driver': 'file', 'path': f'{path}/'}, 'metadata': metadata}


def write_tree(folder: Path, tree: dict) -> None:
  """The msgpack file 'checkpoint', as flax.serialization.to_bytes writes it for T5X."""
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))


def _tree(path) -> tuple[Path, dict]:
  """(the folder that its paths are relative to, the nested dict) of a checkpoint."""
  if path.is_dir():
    tried = [path / 'checkpoint', path / 'state' / 'checkpoint', path / '_METADATA',
             path / 'state' / '_METADATA']
    file = next((f for f in tried if f.is_file()), None)
    if file is None:
      steps = sorted((f.name for f in path.glob('checkpoint_*') if f.is_dir()), reverse=True)
      more = f'; it holds {", ".join(steps[:5])}: name one of them' if steps else ''
      raise UsageError(f"no T5X checkpoint in {path}: neither 'checkpoint', 'state/checkpoint' nor "
                       f"'_METADATA' is there{more}")
  elif path.is_file():
    file = path
  else:
    raise UsageError(f'no such file or folder: {path}')
  if (size := file.stat().st_size) > MAX_TREE:
    raise UsageError(f'{file} has {size} bytes, a tree may have {MAX_TREE}: large leaves belong '
                     'in zarr directories beside it')
  data = file.read_bytes()
  if file.name == '_METADATA':
    return file.parent, _orbax_tree(file, data)
  if data.startswith(b'model_checkpoint_path'):
    raise UsageError(f"{file} is the index of a TensorFlow checkpoint; T5X's own are msgpack. "
                     "Convert it with T5X's convert_tf_checkpoint")
  try:
    # msgpack has no code in it; flax's extension types are arrays and numbers, never objects
    tree = serialization.msgpack_restore(data)
  except Exception as e:   # msgpack, flax and numpy each raise their own for damaged bytes
    raise UsageError(f'{file} is not a T5X checkpoint: not msgpack ({_line(e)})') from e
  if not isinstance(tree, dict):
    raise UsageError(f'{file} is not a T5X checkpoint: a {type(tree).__name__}, not a tree')
  return file.parent, tree


def _orbax_tree(file, data) -> dict:
  """The tree of '_METADATA', which names all leaves of a checkpoint without a msgpack file."""
  try:
    meta = json.loads(data)
    keys = [[str(k['key']) for k in entry['key_metadata']]
            for entry in meta['tree_metadata'].values()]
    zarr3 = meta.get('use_zarr3')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise UsageError(f"{file} is not Orbax's metadata of a tree ({_line(e)})") from e
  if zarr3:
    raise UsageError(f'{file} says zarr 3, which T5X does not write; only zarr 2 is read')
  tree = {}
  for key in keys:
    node = tree
    for k in key[:-1]:
      node = node.setdefault(k, {})
      if not isinstance(node, dict):
        raise UsageError(f'{file}: {"/".join(key)} lies below a leaf')
    node[key[-1]] = PLACEHOLDER + '.'.join(key)
  return tree


def _flatten(tree, at, out, leaf):
  for key, value in tree.items():
    if not isinstance(key, str) or '/' in key or not key:
      raise UsageError(f'a key of the checkpoint is {key!r} below {"/".join(at)!r}, not a name')
    name = '/'.join((*at, key))
    if isinstance(value, dict) and not {'driver', 'kvstore', 'metadata'} <= set(value):
      _flatten(value, (*at, key), out, leaf)
    elif value is not None:   # None: T5X's state of a parameter that no optimizer touches
      out[name] = leaf(name, value)


def _leaf(name, value, folder, halves):
  """A Zarr for a spec or a placeholder, a numpy array for what is inline."""
  if isinstance(value, dict):
    try:
      kvstore, metadata = value['kvstore'], value['metadata']
      path = kvstore['path'] if 'path' in kvstore else value['path']   # tensorstore before 0.1.14
      return Zarr(folder, _inside(path, name), _shape(metadata['shape'], name), halves)
    except (KeyError, TypeError) as e:
      raise UsageError(f'{name}: no tensorstore spec with a path and a shape ({_line(e)})') from e
  if isinstance(value, str):
    if not value.startswith(PLACEHOLDER):
      raise UsageError(f'{name} is the text {value[:80]!r}, not an array')
    return Zarr(folder, _inside(value.removeprefix(PLACEHOLDER), name), None, False)
  if not isinstance(value, (np.ndarray, np.generic, int, float)):
    raise UsageError(f'{name} is a {type(value).__name__}, not an array')
  array = np.asarray(value)
  if array.dtype.kind not in 'fiub' and array.dtype != jnp.bfloat16:
    raise UsageError(f'{name} has dtype {array.dtype}, not numbers')
  return array


def _inside(path, name) -> str:
  """The path, if it is one that stays below where it is joined."""
  parts = path.split('/') if isinstance(path, str) else ['..']
  if '..' in parts or path.startswith('/') or '\0' in path or not path.strip('/.'):
    raise UsageError(f'{name} lies at {path!r}, which may only be a name inside the checkpoint')
  return path.rstrip('/')


def _shape(shape, name) -> tuple[int, ...]:
  if (not isinstance(shape, (list, tuple)) or len(shape) > 8
      or any(type(n) is not int or n < 0 for n in shape)):
    raise UsageError(f'{name} has shape {str(shape)[:80]}, not a list of sizes')
  return tuple(shape)


def _read_zarr(leaf, name) -> np.ndarray:
  t, where = _open(leaf, name), leaf.folder / leaf.path
  shape, chunks = tuple(t.shape), t.chunk_layout.read_chunk.shape or ()
  if leaf.shape not in (None, shape):
    raise UsageError(f'{name} has shape {leaf.shape} in the tree and {shape} on disk')
  if _is_ocdbt(leaf):
    size = sum(f.stat().st_size for f in leaf.folder.rglob('*') if f.is_file())
  else:
    size = _complete(leaf, name, shape, chunks)
  claim = t.dtype.numpy_dtype.itemsize * max(math.prod(shape), math.prod(chunks))
  if claim > max(CHUNK, MAX_EXPANSION * size):
    raise UsageError(f'{name} claims {claim} bytes (shape {shape}, in chunks of {chunks}), but '
                     f'{size} are on disk')
  try:
    out = np.asarray(t.read().result())
  except ValueError as e:
    raise UsageError(f'{name}: {where} is damaged ({_line(e)})') from e
  return out.view(jnp.bfloat16) if leaf.halves and out.dtype == np.uint16 else out


def _complete(leaf, name, shape, chunks) -> int:
  """Bytes of all chunks; UsageError unless every one is there.

  zarr reads a missing chunk as zeros, so a download that broke off would go unnoticed.
  """
  real, root = _real(leaf, name), leaf.folder.resolve()
  count = size = 0
  for folder, _, files in os.walk(real):
    for file in files:
      if re.fullmatch(r'\d+(\.\d+)*', file):
        chunk = Path(folder, file)
        if chunk.is_symlink() and not chunk.resolve().is_relative_to(root):
          raise UsageError(f'{chunk} is a link out of the checkpoint')
        count, size = count + 1, size + chunk.stat().st_size
  want = math.prod(-(-n // c) for n, c in zip(shape, chunks))
  if count < want:
    raise UsageError(f'{name} has {count} of its {want} chunks in {real}: an incomplete copy')
  return size


def _open(leaf, name) -> ts.TensorStore:
  if _is_ocdbt(leaf):
    kvstore = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{leaf.folder.resolve()}/'},
               'path': f'{leaf.path}/'}
  else:
    kvstore = {'driver': 'file', 'path': f'{_real(leaf, name)}/'}
  try:
    return ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, read=True).result()
  except ValueError as e:
    raise UsageError(f'{name}: cannot open {leaf.folder / leaf.path} ({_line(e)})') from e


def _is_ocdbt(leaf) -> bool:
  return (leaf.folder / 'manifest.ocdbt').is_file()


def _real(leaf, name) -> Path:
  """The directory of a leaf with links resolved, which must still lie in the checkpoint."""
  real = (leaf.folder / leaf.path).resolve()
  if not real.is_relative_to(leaf.folder.resolve()):
    raise UsageError(f'{name}: {leaf.folder / leaf.path} is a link out of the checkpoint')
  return real


def _below(leaves, prefix):
  return {name.removeprefix(prefix): leaf for name, leaf in leaves.items()
          if name.startswith(prefix)}


def _line(e) -> str:
  return f'{type(e).__name__}: {e}'.split('\n')[0].split(' [')[0][:200]
