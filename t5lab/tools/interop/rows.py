"""Tables of rows (our path, their name, reshape), and the two walks over one: in and out.

A format is a function from a TransformerConfig to rows; reading a checkpoint fills our stacked
arrays tensor by tensor, writing one yields their tensors one by one: neither holds a model twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import math
import re
from typing import NamedTuple, Protocol

import numpy as np

from t5lab import trees
from t5lab.errors import UsageError


class Op(NamedTuple):
  """A reshape and its inverse; both may be views. inverse(forward(x)) is x, bit for bit."""
  forward: Callable[[np.ndarray], np.ndarray]   # theirs -> ours
  inverse: Callable[[np.ndarray], np.ndarray]   # ours -> theirs


COPY = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(np.transpose, np.transpose)      # torch's Linear [out, in] <-> kernel [in, out]
FLAT = Op(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1))      # [1, V] <-> [V]


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our arrays, or one layer of it, is one of their tensors, or one part of it."""
  path: str                         # ours: 'decoder/layers/attn/q/kernel'
  name: str                         # theirs
  layer: int | tuple[int, ...] | None = None   # index on our leading axes; None: the whole array
  op: Op = COPY
  part: tuple[int, int, int] | None = None     # (axis, i, n): i-th of n equal parts after op


class Reader(Protocol):
  """A checkpoint on disk that is read a tensor at a time."""

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Shape of every tensor, from headers alone."""

  def read(self, name: str) -> np.ndarray:
    """One tensor, in the dtype of the file."""


class Renamed:
  """A Reader under canonical names; tensors that are copies of another appear once.

  aliases: {name of a copy: name of the original}, canonical. Where only the copy is in the file it
  stands for the original; where both are, UsageError unless they are equal.
  """

  def __init__(self, reader: Reader, canonical: Callable[[str], str], aliases: Mapping[str, str],
               what: str):
    self._reader, shapes = reader, reader.shapes()
    self._names = {}
    for name in shapes:
      if (mine := canonical(name)) in self._names:
        raise UsageError(f'{what} has both {name} and {self._names[mine]}, one of them too many')
      self._names[mine] = name
    for copy, original in aliases.items():
      if copy not in self._names:
        continue
      theirs = self._names.pop(copy)
      if original not in self._names:
        self._names[original] = theirs
      elif not np.array_equal(reader.read(theirs), reader.read(self._names[original])):
        raise UsageError(f'{what}: {theirs} should be a copy of {self._names[original]} by the '
                         'config, and differs from it')
    self._shapes = {mine: shapes[name] for mine, name in self._names.items()}

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return self._shapes

  def read(self, name: str) -> np.ndarray:
    return self._reader.read(self._names[name])


def read(rows: Iterable[Row], reader: Reader, abstract, *, ignore: Iterable[str] = (),
         what: str = 'the checkpoint', tick=lambda done, total: None):
  """Our parameters as float32 numpy arrays, in the structure of `abstract` (shapes).

  ignore: regexes of whole names that may stay unread. UsageError lists what is missing, misshaped,
  left unread or not finite. Peak memory: the result and one tensor.
  """
  rows, shapes = list(rows), trees.flatten(abstract)
  check(rows, reader.shapes(), shapes, ignore=ignore, what=what)
  by_name = group(rows)
  ours = sum(math.prod(leaf.shape) for leaf in shapes.values())
  for name in by_name:                 # before any is read: a header may promise what fits nowhere
    if (size := math.prod(reader.shapes()[name])) > ours:
      raise UsageError(f'{what}: {name} has {size:,} numbers, the whole model has {ours:,}')
  out = {path: aligned_empty(leaf.shape) for path, leaf in shapes.items()}
  broken = []
  for done, (name, mine) in enumerate(by_name.items(), start=1):
    tensor = reader.read(name)
    if tensor.dtype.kind in 'iubcSUO':
      raise UsageError(f'{what}: {name} is {tensor.dtype}; weights are floating-point numbers, and '
                       'quantised ones are read from GGUF only')
    if not _finite(tensor):
      broken.append(name)
    for row in mine:
      value = _part(row, _forward(row, tensor, what))
      target = out[row.path] if row.layer is None else out[row.path][row.layer]
      if value.shape != target.shape:
        raise UsageError(f'{what}: {name} has shape {tensor.shape}, {row.path} needs '
                         f'{target.shape}: a config of another architecture or size')
      target[...] = value
    del tensor
    tick(done, len(by_name))
  if broken:
    raise UsageError(f'{what}: {few(broken)} not finite (NaN or infinity)')
  return trees.unflatten(out, like=abstract)


def aligned_empty(shape) -> np.ndarray:
  """float32 on a 64-byte boundary, which jax on CPU takes as it is instead of copying."""
  size = int(np.prod(shape, dtype=np.int64))
  buffer = np.empty(size + 16, np.float32)
  offset = (-buffer.ctypes.data // 4) % 16
  return buffer[offset:offset + size].reshape(shape)


def check(rows: list[Row], theirs: Mapping[str, tuple[int, ...]], ours: Mapping, *,
          ignore: Iterable[str] = (), what: str = 'the checkpoint') -> None:
  """UsageError unless the rows cover each of our arrays and each of their tensors."""
  wanted = {row.name for row in rows}
  problems = []
  if missing := [name for name in dict.fromkeys(r.name for r in rows) if name not in theirs]:
    problems.append(f'missing {few(missing)}')
  if unread := [n for n in theirs if n not in wanted and not trees.fits(n, ignore)]:
    problems.append(f'left unread {few(unread)}')
  covered = {}
  for row in rows:
    index = row.layer if row.layer is None or isinstance(row.layer, tuple) else (row.layer,)
    covered.setdefault(row.path, set()).add(index)
  if none := [path for path in ours if path not in covered]:
    problems.append(f'no row for our {few(none)}')
  if extra := [path for path in covered if path not in ours]:
    problems.append(f'rows for {few(extra)}, which this model does not have')
  for path, indices in covered.items():
    if path not in ours or indices == {None}:
      continue
    axes = len(next(iter(indices)))
    if indices != set(np.ndindex(*ours[path].shape[:axes])):
      problems.append(f'{path} has leading axes {ours[path].shape[:axes]}, the rows give '
                      f'{few(map(str, sorted(indices)))}')
  if problems:
    raise UsageError(f'{what} does not fit the model: {"; ".join(problems)}')


def write(rows: Iterable[Row], params) -> Iterator[tuple[str, np.ndarray]]:
  """(their name, tensor) for every tensor, in the order of the rows; arrays may be jax or numpy."""
  flat = trees.flatten(params)
  for name, mine in group(rows).items():
    parts = []
    for row in sorted(mine, key=lambda r: r.part[1] if r.part else 0):
      value = flat[row.path] if row.layer is None else flat[row.path][row.layer]
      parts.append((row, np.asarray(value)))
    row = parts[0][0]
    whole = parts[0][1] if row.part is None else np.concatenate(
        [value for _, value in parts], axis=row.part[0])
    yield name, row.op.inverse(whole)


def specs(rows: Iterable[Row], abstract) -> dict[str, tuple[int, ...]]:
  """{their name: shape} of what `write` yields, from our shapes alone."""
  flat = trees.flatten(abstract)
  zeros = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in flat.items()}
  out = {}
  for name, mine in group(rows).items():
    row = mine[0]
    value = zeros[row.path] if row.layer is None else zeros[row.path][row.layer]
    if row.part is not None:
      axis, _, n = row.part
      shape = list(value.shape)
      shape[axis] *= n
      value = np.broadcast_to(np.float32(0), shape)
    out[name] = tuple(row.op.inverse(value).shape)
  return out


def group(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """{their name: its rows}, in order of first use."""
  out = {}
  for row in rows:
    out.setdefault(row.name, []).append(row)
  return out


def rename(rows: Iterable[Row], pattern: str, to: str) -> list[Row]:
  """The rows with their names rewritten by re.sub."""
  return [dataclasses.replace(row, name=re.sub(pattern, to, row.name)) for row in rows]


def _forward(row, tensor, what):
  try:
    return row.op.forward(tensor)
  except ValueError as e:                          # a reshape that the shape does not allow
    raise UsageError(f'{what}: {row.name} has shape {tensor.shape}, which does not fit {row.path}: '
                     f'{e}') from e


def _part(row, value):
  if row.part is None:
    return value
  axis, i, n = row.part
  if value.shape[axis] % n:
    raise UsageError(f'{row.name} has {value.shape[axis]} columns, not a multiple of {n}')
  return np.split(value, n, axis=axis)[i]


def _finite(tensor) -> bool:
  # the sum is not finite if any element is not; a finite sum can overflow, so then look at each
  return bool(np.isfinite(tensor.sum(dtype=np.float64))) or bool(
      np.isfinite(tensor.astype(np.float32)).all())


def few(names, most: int = 8) -> str:
  names = list(names)
  return ', '.join(names[:most]) + (f', … ({len(names)} in all)' if len(names) > most else '')
