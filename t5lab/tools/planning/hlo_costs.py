"""FLOPs of matrix products, and HBM bytes, of operations in scheduled HLO."""

from collections.abc import Iterator
import functools
import math
import re

import numpy as np

from t5lab.tools.planning.hlo import Computation, Module, Op, ints

# Operations that move no data themselves.
FREE = ('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional',
        'call', 'after-all', 'partition-id', 'replica-id', 'optimization-barrier')


# --- FLOPs -------------------------------------------------------------------------------------


def matrix_products(module: Module, op: Op,
                    computation: Computation) -> Iterator[tuple[Op, Computation]]:
  """Yields (product, its computation): an operation, or the matrix products inside a fusion."""
  if op.kind in ('convolution', 'dot'):
    yield op, computation
  elif (fused := module.inside(op)) is not None:
    for inner in fused.ops:
      yield from matrix_products(module, inner, fused)


def product_flops(op: Op, computation: Computation) -> float:
  """2 x multiply-adds of a dot or convolution.

  Positions in padding or between dilated elements do not count, as in XLA's HloCostAnalysis.
  """
  left, right = (computation.by_name[name].shapes[0] for name in op.operands[:2])
  out = op.shapes[0]
  if op.kind == 'dot':
    contracted = ints(op.attribute('lhs_contracting_dims'))
    return 2. * math.prod(out.dims) * math.prod(left.dims[i] for i in contracted)

  # dim_labels such as b01f_01io->b01f name the axes: batch, features in and out, 0, 1 are spatial.
  lhs, rhs, result = re.split('_|->', op.attribute('dim_labels'))
  spatial = [label for label in result if label.isdigit()]
  window = _window(op.attribute('window'), len(spatial))
  positions = 1
  for i, axis in enumerate(spatial):
    positions *= _valid_positions(
        left.dims[lhs.index(axis)], right.dims[rhs.index(axis)], out.dims[result.index(axis)],
        **{field: values[i] for field, values in window.items()})
  batch = left.dims[lhs.index('b')] // int(op.attribute('batch_group_count') or 1)
  features_in = right.dims[rhs.index('i')]           # already divided by feature_group_count
  features_out = out.dims[result.index('f')]
  return 2. * batch * features_out * features_in * positions


def _window(text: str, rank: int) -> dict[str, list[int]]:
  """'{size=3x3 pad=1_1x1_1}' -> {field: a value for each spatial axis}; of pad the low one."""
  window = {'stride': [1] * rank, 'pad': [0] * rank, 'lhs_dilate': [1] * rank,
            'rhs_dilate': [1] * rank}
  for field, values in re.findall(r'(\w+)=([\d_x-]+)', text):
    if field in window:
      window[field] = [int(value.split('_')[0]) for value in values.split('x')]
  return window


@functools.lru_cache(maxsize=4096)
def _valid_positions(size: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int,
                     rhs_dilate: int) -> int:
  """Counts the pairs of output position and kernel element that read a real input element."""
  read = np.arange(out) * stride + np.arange(kernel)[:, None] * rhs_dilate - pad
  valid = (0 <= read) & (read <= (size - 1) * lhs_dilate) & (read % lhs_dilate == 0)
  return int(valid.sum())


# --- bytes -------------------------------------------------------------------------------------


def hbm_bytes(module: Module, op: Op, computation: Computation) -> float:
  """Bytes that a scheduled operation reads from and writes to HBM.

  Buffers in VMEM are free. If a fusion slices a buffer or updates it in place, only the slice or
  the update counts.
  """
  if op.kind in FREE or op.kind.endswith('-done'):
    return 0.
  if op.kind in ('copy-start', 'slice-start'):     # (result, source, …), ((source), result, …)
    ends = op.shapes[:2]
    return min(shape.bytes for shape in ends) * sum(shape.space == 0 for shape in ends)

  # reads
  inner, values = module.inside(op), computation.by_name
  total = 0.
  for i, name in enumerate(op.operands):
    if name in values:
      total += _bytes_read(module, inner, i, values[name].hbm_bytes)

  # writes
  if op.kind == 'dynamic-update-slice' and op.hbm_bytes:
    return total + values[op.operands[1]].bytes
  if inner is None or len(inner.results) != len(op.shapes):
    return total + op.hbm_bytes
  return total + sum(_bytes_written(module, inner, result, shape.bytes)
                     for result, shape in zip(inner.results, op.shapes) if shape.space == 0)


def _bytes_read(module: Module, inner: Computation | None, number: int, size: float) -> float:
  """Bytes read of operand `number`, which has `size` bytes; inner: the inside of a fusion."""
  if inner is None or number not in inner.parameters:
    return size

  def read_by_users(name) -> float:
    total = 0.
    for user in inner.users.get(name, []):
      in_place = user.kind == 'dynamic-update-slice' and user.operands[0] == name
      returned = user.kind == 'tuple' and user.root
      if in_place or returned:                      # nothing is read
        continue
      if user.kind in ('dynamic-slice', 'slice', 'gather'):
        total += user.bytes
      elif user.kind == 'bitcast':
        total += read_by_users(user.name)
      elif (nested := module.inside(user)) is not None:
        for i, operand in enumerate(user.operands):
          if operand == name:
            total += _bytes_read(module, nested, i, size)
      else:
        return size
    return total
  return min(size, read_by_users(inner.parameters[number].name))


def _bytes_written(module: Module, inner: Computation, name: str, size: float) -> float:
  """Bytes that a fusion writes of its result `name`, which has `size` bytes."""
  source = inner.source(name, through=('bitcast',))
  if source is None:
    return size
  if source.kind == 'parameter':
    return 0.                                       # returned unchanged
  if source.kind == 'dynamic-update-slice':
    return inner.by_name[source.operands[1]].bytes
  nested = module.inside(source)
  if nested is None or nested.root.kind == 'tuple':
    return size
  return _bytes_written(module, nested, nested.root.name, size)
