"""Maps between our parameters and the tensors of another format: a list of rows, read both ways.

A format is a function from a TransformerConfig to its rows. Reading a checkpoint fills our stacked
arrays tensor by tensor and writing one yields its tensors one by one, so neither holds two models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.files import Progress


class Op(NamedTuple):
  """A reshape and its inverse; both may return views. inverse(forward(x)) is x, bit for bit."""
  forward: Callable[[np.ndarray], np.ndarray]   # from their layout to ours
  inverse: Callable[[np.ndarray], np.ndarray]   # from our layout to theirs


COPY = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(np.transpose, np.transpose)      # torch's Linear [out, in] <-> kernel [in, out]
FLATTEN = Op(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1))   # [1, V] <-> [V]


@dataclasses.dataclass(frozen=True)
class TensorRow:
  """Maps one of our arrays, or one layer of it, to one of their tensors, or a part of one."""
  path: str                         # of our array, e.g. 'decoder/layers/attn/q/kernel'
  name: str                         # of their tensor
  layer: int | tuple[int, ...] | None = None   # index on our leading axes; None: the whole array
  op: Op = COPY
  part: tuple[int, int, int] | None = None     # (axis, i, n): the i-th of n equal parts, after op;
                                               # their rows are in this order

  def layer_of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our array, or the layer of it that this row maps, from {path: array}."""
    return arrays[self.path] if self.layer is None else arrays[self.path][self.layer]


def module_rows(path: str, name: str, modules: dict[str, str], layer=None, bias: bool = True,
                op: Op = TRANSPOSE) -> list[TensorRow]:
  """Returns the rows of Linears, and of norms where our path says so.

  modules: {our path below `path`: their name below `name`}. op: of the kernels.
  """
  rows = []
  for ours, theirs in modules.items():
    leaf, leaf_op = ('scale', COPY) if ours.endswith('norm') else ('kernel', op)
    rows.append(TensorRow(f'{path}{ours}/{leaf}', f'{name}{theirs}.weight', layer, leaf_op))
    if bias:
      rows.append(TensorRow(f'{path}{ours}/bias', f'{name}{theirs}.bias', layer))
  return rows


class TensorReader:
  """A checkpoint that is read one tensor at a time; as it is, arrays in memory.

  tensors: {name: anything that has a shape}. copies: {name of a copy: [name of the original, where
  the copy is]}.
  """
  copies: Mapping[str, list[str]] = {}

  def __init__(self, tensors: Mapping[str, Any]):
    self._tensors = tensors

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Returns the shape of every tensor, from headers alone."""
    return {name: tuple(t.shape) for name, t in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor in the dtype of the file."""
    return self._tensors[name]


class RenamedReader(TensorReader):
  """A TensorReader with canonical names, in which copies of a tensor appear once.

  aliases: {canonical name of a copy: canonical name of the original}. If the file has only the
  copy, it is used as the original. If it has both, or two names of one tensor, they must be equal
  (UsageError).
  """

  def __init__(self, reader: TensorReader, canonical: Callable[[str], str],
               aliases: Mapping[str, str] | None = None):
    self._reader = reader
    self._stored = {}                 # {canonical name: name in the file}
    self.copies = dict(reader.copies)
    for stored in reader.shapes():
      name = canonical(stored)
      first = self._stored.setdefault(name, stored)
      if first != stored:
        self._check_equal(stored, first, 'they are two names of one tensor')
        self.copies[stored] = [first, 'in the file, equal']
    for alias, original in (aliases or {}).items():
      copy = self._stored.pop(alias, None)
      if copy is None:
        where = 'not in the file'
      elif self._stored.setdefault(original, copy) == copy:
        where = 'in the file, which lacks the original'
      else:
        self._check_equal(copy, self._stored[original], 'according to the config it is a copy')
        where = 'in the file, equal'
      self.copies[alias] = [original, where]

  def _check_equal(self, copy, original, why):
    if not np.array_equal(self._reader.read(copy), self._reader.read(original)):
      raise UsageError(f'the checkpoint: {copy} should be a copy of {original} ({why}), but it '
                       'differs')

  def source_name(self, name: str) -> str:
    """Returns the name of a tensor in the file."""
    return self._stored[name]

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    shapes = self._reader.shapes()
    return {name: shapes[stored] for name, stored in self._stored.items()}

  def read(self, name: str) -> np.ndarray:
    return self._reader.read(self._stored[name])


class JoinedReader(TensorReader):
  """Several TensorReaders as one. readers: {what their names start with here: reader}."""

  def __init__(self, readers: Mapping[str, TensorReader]):
    self.copies = {prefix + copy: [prefix + original, where] for prefix, reader in readers.items()
                   for copy, (original, where) in reader.copies.items()}
    self._stored = {prefix + name: (reader, name, shape) for prefix, reader in readers.items()
                    for name, shape in reader.shapes().items()}

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: shape for name, (_, _, shape) in self._stored.items()}

  def read(self, name: str) -> np.ndarray:
    reader, stored, _ = self._stored[name]
    return reader.read(stored)


def read(rows: Iterable[TensorRow], reader: TensorReader, abstract, *, ignore: Iterable[str] = (),
         what: str = 'the checkpoint', progress: Callable[[int], Progress] | None = None):
  """Reads our parameters as float32 numpy arrays, in the structure of `abstract` (shapes).

  ignore: regexes of whole names that may stay unread. progress: makes the progress line for a
  number of tensors. UsageError lists tensors that are missing, misshaped, unread or not finite.
  Peak memory: the result and one tensor.
  """
  rows, ours = list(rows), trees.flatten(abstract)
  by_name = check_shapes(rows, reader, abstract, ignore=ignore, what=what)

  params = {path: aligned_empty(leaf.shape) for path, leaf in ours.items()}
  not_finite = []
  with progress(len(by_name)) if progress else contextlib.nullcontext() as line:
    for name, its_rows in by_name.items():
      tensor = reader.read(name)
      if tensor.dtype.kind in 'iubcSUO':
        raise UsageError(f'{what}: {name} is {tensor.dtype}; weights must be floating-point '
                         'numbers, or int8 with a scale beside them')
      # The sum is not finite if any number is not; if a finite one overflows, each is checked.
      if not (np.isfinite(tensor.sum(dtype=np.float64))
              or np.isfinite(tensor.astype(np.float32)).all()):
        not_finite.append(name)
      for row in its_rows:
        value, target = _our_value(row, tensor, what), row.layer_of(params)
        _check_shape(row, tensor, value.shape, params[row.path].shape, what)
        target[...] = value
      del tensor
      if line:
        line.add(1)
  if not_finite:
    raise UsageError(f'{what}: {name_list(not_finite)} not finite (NaN or infinity)')
  return trees.unflatten(params, like=abstract)


def check_shapes(rows: list[TensorRow], reader: TensorReader, abstract, *,
                 ignore: Iterable[str] = (), what: str = 'the checkpoint') -> dict:
  """Checks names and shapes from headers alone; returns {their name: its rows}.

  UsageError lists tensors that are missing, misshaped or unread.
  """
  ours, shapes = trees.flatten(abstract), reader.shapes()
  check(rows, shapes, ours, ignore=ignore, what=what)
  by_name = group(rows)
  # Before anything is allocated: a forged header may claim more than fits into memory, and so may
  # a config. An array of strides 0 takes none, whatever its shape.
  for row in rows:
    empty = np.broadcast_to(np.float32(0), shapes[row.name])
    _check_shape(row, empty, _our_value(row, empty, what).shape, ours[row.path].shape, what)
  return by_name


def _check_shape(row: TensorRow, tensor, shape, whole_shape, what: str) -> None:
  """UsageError unless `shape`, read by the row, is that of the row's layer in our array."""
  leading = 0 if row.layer is None else np.size(row.layer)
  if tuple(shape) != tuple(whole_shape[leading:]):
    raise UsageError(f'{what}: {row.name} has shape {tensor.shape}, {row.path} needs '
                     f'{tuple(whole_shape[leading:])}: the config is of another architecture or '
                     'size')


def aligned_empty(shape) -> np.ndarray:
  """Returns a float32 array on a 64-byte boundary, which jax on CPU uses without copying it."""
  size = math.prod(shape)
  buffer = np.empty(size + 16, np.float32)
  offset = (-buffer.ctypes.data // 4) % 16
  return buffer[offset:offset + size].reshape(shape)


def check(rows: list[TensorRow], names: Iterable[str], ours: Mapping, *,
          ignore: Iterable[str] = (), what: str = 'the checkpoint') -> None:
  """Raises UsageError unless the rows cover all our arrays and all tensors in `names`.

  ours: {path: array, or a struct with its shape}. The layers of an array must be covered one by
  one or as a whole.
  """
  mapped, names = dict.fromkeys(row.name for row in rows), dict.fromkeys(names)
  covered = {}                        # {path: indices on its leading axes, None for the whole}
  for row in rows:
    index = (row.layer,) if isinstance(row.layer, int) else row.layer
    covered.setdefault(row.path, set()).add(index)

  problems = [f'{start} {name_list(found)}{end}' for start, found, end in (
      ('missing', [name for name in mapped if name not in names], ''),
      ('unread', [name for name in names
                  if name not in mapped and not trees.fits(name, ignore)], ''),
      ('no row for our', [path for path in ours if path not in covered], ''),
      ('rows for', [path for path in covered if path not in ours],
       ', which this model does not have')) if found]
  for path, indices in covered.items():
    if path not in ours or indices == {None}:
      continue
    axes = ours[path].shape[:len(next(iter(indices)))]
    if indices != set(np.ndindex(*axes)):
      problems.append(f'{path} has leading axes {axes}, the rows give '
                      f'{name_list(map(str, sorted(indices)))}')
  if problems:
    raise UsageError(f'{what} does not fit the model: {"; ".join(problems)}')


def write(rows: Iterable[TensorRow], params) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (their name, tensor) in the order of the rows, from jax or numpy arrays."""
  arrays = trees.flatten(params)
  for name, its_rows in group(rows).items():
    parts = [np.asarray(row.layer_of(arrays)) for row in its_rows]
    first = its_rows[0]
    whole = parts[0] if first.part is None else np.concatenate(parts, axis=first.part[0])
    yield name, first.op.inverse(whole)


def shapes(rows: Iterable[TensorRow], abstract) -> dict[str, tuple[int, ...]]:
  """Returns {their name: shape} of what `write` yields, from the shapes of our arrays alone."""
  zeros = trees.map_paths(lambda _, leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
  return {name: tensor.shape for name, tensor in write(rows, zeros)}


def group(rows: Iterable[TensorRow]) -> dict[str, list[TensorRow]]:
  """Returns {their name: its rows}, in order of first use."""
  out = {}
  for row in rows:
    out.setdefault(row.name, []).append(row)
  return out


def name_list(names) -> str:
  """Joins names for an error message; of more than 8 only the first are listed."""
  names = list(names)
  return ', '.join(names[:8]) + (f', … ({len(names)} in all)' if len(names) > 8 else '')


def _our_value(row, tensor, what):
  try:
    value = row.op.forward(tensor)
  except ValueError as e:             # numpy: the shape does not allow the reshape
    raise UsageError(f'{what}: {row.name} has shape {tensor.shape}, which does not fit {row.path}: '
                     f'{e}') from e
  if row.part is None:
    return value
  axis, i, n = row.part
  if value.shape[axis] % n:
    raise UsageError(f'{row.name} has {value.shape[axis]} columns, not a multiple of {n}')
  return np.split(value, n, axis=axis)[i]
