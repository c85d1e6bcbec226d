"""Collectives in scheduled HLO: bytes, mesh axes, and a model of how long the network takes.

TPU text has collectives in four forms: synchronous; as a -start and -done pair; as a fusion with an
AsyncCollectiveStart, then fusions that compute meanwhile, then one with AsyncCollectiveDone (each
prints the same collective, with one chain_id); and inside an all-reduce-scatter fusion, which is a
reduce-scatter. Between slices a collective is a send and a recv through the host, whose frontend
attributes name it; its groups then count the devices of one slice.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

import numpy as np

from t5lab.tools.planning import hlo
from t5lab.tools.planning.chips import HOP, Topology

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
         'collective-permute', 'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One run of a collective.

  size: bytes of its full (gathered or unreduced) array on a device; phase: sync | start | done.
  """
  kind: str
  axes: tuple[str, ...]                  # mesh axes that its groups span
  group: int                             # devices in a group
  size: float
  phase: str = 'sync'
  key: str = ''                          # the same for a start and its done

  @property
  def wire(self) -> float:
    """Bytes that a device sends, by the ring formulas.

    all-gather, reduce-scatter, all-to-all: size (n - 1) / n; all-reduce twice that.
    """
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return self.size
    passes = 2 if self.kind == 'all-reduce' else 1
    return self.size * (self.group - 1) / self.group * passes

  @property
  def where(self) -> str:
    return '+'.join(self.axes) or 'one device'


class Axes:
  """Maps groups of partition numbers to mesh axes. Partition i is the mesh's i-th device."""

  def __init__(self, names: tuple[str, ...], shape: tuple[int, ...],
               slices: dict[str, int] | None = None):
    """slices: {axis: number of slices that it crosses}."""
    self.names, self.shape = names, shape
    self.slices = {axis: n for axis, n in (slices or {}).items() if n > 1}

  def spanned(self, groups: np.ndarray) -> tuple[str, ...]:
    """The axes along which the members of a group differ; groups: int[groups, members]."""
    positions = np.stack(np.unravel_index(groups.reshape(-1), self.shape), -1)
    positions = positions.reshape(*groups.shape, len(self.shape))
    differs = (positions != positions[:, :1]).any((0, 1))
    return tuple(name for name, spans in zip(self.names, differs) if spans)

  def groups(self, op: hlo.Op) -> np.ndarray:
    """replica_groups or source_target_pairs as int[groups, members]."""
    text = op.attribute('source_target_pairs') or op.attribute('replica_groups')
    all_devices = np.arange(math.prod(self.shape))[None]

    # {{0,1},{2,3}}
    if not text or text == '{}':
      return all_devices
    if text.startswith('{'):
      groups = [_ints(members) for members in re.findall(r'\{([\d,]+)\}', text)]
      same_size = len(set(map(len, groups))) == 1
      return np.array(groups) if same_size else all_devices

    # [2,8]<=[4,4]T(1,0): reshape, transpose, reshape
    match = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if not match:
      return all_devices
    shape, source, transposed = match.groups()
    devices = np.arange(math.prod(_ints(source))).reshape(_ints(source))
    if transposed:
      devices = devices.transpose(_ints(transposed))
    return devices.reshape(_ints(shape))


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


# --- in the program ----------------------------------------------------------------------------


def op_collectives(module: hlo.Module, op: hlo.Op, axes: Axes) -> list[Collective]:
  """The collectives that a scheduled operation starts, ends or runs; [] for most operations."""
  # a collective by itself
  kind, _, suffix = op.kind.rpartition('-')
  if suffix in ('start', 'done') and kind in KINDS:
    key = op.operands[0] if suffix == 'done' else op.name
    return [_collective(op, kind, axes, suffix, key)]
  if op.kind in KINDS:
    return [_collective(op, op.kind, axes, 'sync', op.name)]
  if op.kind in ('recv', 'recv-done'):
    return _between_slices(op, axes)
  if op.kind in ('async-start', 'async-done'):
    phase = op.kind.removeprefix('async-')
    key = op.operands[0] if phase == 'done' else op.name
    return [_collective(inner, inner.kind, axes, phase, key) for called in module.called(op)
            for inner in called.ops if inner.kind in KINDS]

  # inside a fusion
  fused = [inner for computation in _nested(module, module.inside(op)) for inner in computation.ops]
  targets = {inner.attribute('custom_call_target').strip('"')
             for inner in fused if inner.kind == 'custom-call'}
  collectives = []
  for inner in fused:
    if inner.kind not in KINDS:
      continue
    chain = re.search(r'chain_id="(\w+)"', inner.attribute('frontend_attributes'))
    if not chain:
      scatter = 'all-reduce-scatter' in op.calls[0]
      kind = 'reduce-scatter' if scatter else inner.kind
      collectives.append(_collective(inner, kind, axes, 'sync', op.name))
    elif 'AsyncCollectiveStart' in targets:
      collectives.append(_collective(inner, inner.kind, axes, 'start', chain.group(1)))
    elif 'AsyncCollectiveDone' in targets:
      collectives.append(_collective(inner, inner.kind, axes, 'done', chain.group(1)))
  return collectives


def _between_slices(op: hlo.Op, axes: Axes) -> list[Collective]:
  attributes = op.attribute('frontend_attributes')
  if 'xla_megascale_runtime' not in attributes:
    return []
  match = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
  kind = match.group(1).lower().replace('_', '-') if match else ''
  done = op.kind == 'recv-done'
  return [Collective(
      kind if kind in KINDS else 'collective-permute', tuple(axes.slices),
      group=max(2, math.prod(axes.slices.values())), size=op.shapes[0].bytes,
      phase='done' if done else 'start', key=op.operands[0] if done else op.name)]


def _nested(module: hlo.Module, computation: hlo.Computation | None) -> Iterator[hlo.Computation]:
  """Yields the computation of a fusion and those of the fusions inside it."""
  if computation is None:
    return
  yield computation
  for op in computation.ops:
    yield from _nested(module, module.inside(op))


def _collective(op: hlo.Op, kind: str, axes: Axes, phase: str, key: str) -> Collective:
  groups = axes.groups(op)
  if kind == 'collective-permute':         # its groups are pairs of source and target
    moving = groups[groups[:, 0] != groups[:, 1]]
    names, group = (axes.spanned(moving) if len(moving) else ()), 2
  else:
    names, group = axes.spanned(groups), groups.shape[1]

  sizes = [shape.bytes for shape in op.shapes]
  if op.kind.endswith('-start') and kind != 'all-reduce':
    # (operands, results[, contexts]): the results
    arrays = [shape.bytes for shape in op.shapes if shape.dims]
    sizes = arrays[len(arrays) // 2:]
  size = sum(sizes)
  if kind == 'reduce-scatter' and op.kind.startswith('reduce-scatter'):
    size *= group                          # the result is one shard
  return Collective(kind, names, max(group, 1), size, phase, key)


# --- on the network ----------------------------------------------------------------------------


class Network:
  """Estimates the seconds of a collective.

  A group over mesh axes uses all their physical axes at once, with `ici` bytes/s each, or half of
  that if the group's line is not closed to a ring. Between slices a chip has its share of its
  host's network, and only the shard that remains after the collective within the slice is sent.
  """

  def __init__(self, topology: Topology, mesh_shape: dict[str, int],
               physical: dict[str, tuple[int, ...]] | None = None,
               slices: dict[str, int] | None = None):
    """physical: {mesh axis: its physical axes}; None: one each, the largest mesh axis as many as it
    needs. slices: {mesh axis: number of slices that it crosses}."""
    self.topology, self.shape = topology, mesh_shape
    self.slices = slices if slices is not None else {
        axis: n for axis, n in mesh_shape.items() if axis.startswith('dcn_')}
    self.physical = physical or _physical_axes(topology, {
        axis: n for axis, n in mesh_shape.items() if not axis.startswith('dcn_')})

  def bandwidth(self, axes: tuple[str, ...]) -> float:
    """Bytes/s out of a chip over ICI for groups over these axes."""
    used = {p for axis in axes for p in self.physical.get(axis, ())}
    in_slice = math.prod(self.shape[axis] // self.slices.get(axis, 1)
                         for axis in axes if axis in self.shape)
    total = 0.
    for p in used or {0}:
      ring = self.topology.is_ring(p) and in_slice >= self.topology.shape[p]
      total += self.topology.chip.ici * (1. if ring else .5)
    return total

  def seconds(self, c: Collective) -> float:
    slices = math.prod(self.slices.get(axis, 1) for axis in c.axes)
    in_slice = max(1, c.group // slices)
    if in_slice == slices == 1:
      return HOP
    total = 0.
    if in_slice > 1:
      local = dataclasses.replace(c, group=in_slice)
      total += max(local.wire / self.bandwidth(c.axes), HOP * (in_slice - 1) / 2)
    if slices > 1:
      shard = dataclasses.replace(c, group=slices, size=c.size / in_slice)
      total += shard.wire / self.topology.chip.dcn + 20 * HOP
    return total

  def crosses_slices(self, c: Collective) -> bool:
    return any(self.slices.get(axis, 1) > 1 for axis in c.axes)


def _physical_axes(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
  """Assigns mesh axes to physical axes, the largest first.

  Used where no devices are described; a library that assigns them by hand does the same.
  """
  free = dict(enumerate(topology.shape))
  physical = {}
  for axis, n in sorted(sizes.items(), key=lambda item: -item[1]):
    assigned = []
    while n > 1 and free:
      p = max(free, key=lambda p: (free[p] == n, math.gcd(free[p], n)))
      shared = math.gcd(free[p], n)
      if shared == 1:
        break
      assigned.append(p)
      n //= shared
      free[p] //= shared
      if free[p] == 1:
        del free[p]
    physical[axis] = tuple(assigned)
  return physical


def mesh_layout(mesh) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
  """A mesh of described TPU devices -> {axis: its physical axes}, {axis: slices it crosses}."""
  grid = mesh.devices
  physical, slices = {}, {}
  for i, axis in enumerate(mesh.axis_names):
    line = np.moveaxis(grid, i, 0).reshape(grid.shape[i], -1)[:, 0]
    positions = np.array([(*d.coords, getattr(d, 'slice_index', 0) or 0) for d in line])
    differs = (positions != positions[0]).any(0)
    physical[axis] = tuple(int(p) for p in np.flatnonzero(differs[:-1]))
    slices[axis] = len(set(positions[:, -1].tolist()))
  return physical, slices
