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


# --- on the network ----------------------------------------------------------------------------


class Network:
  """The devices of a mesh and what joins them. Partition i of a program is its i-th device.

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
    if slices is None:
      slices = {axis: n for axis, n in mesh_shape.items() if axis.startswith('dcn_')}
    self.slices = {axis: n for axis, n in slices.items() if n > 1}
    self.physical = physical or _physical_axes(topology, {
        axis: n for axis, n in mesh_shape.items() if not axis.startswith('dcn_')})

  def groups(self, op: hlo.Op) -> np.ndarray:
    """replica_groups or source_target_pairs as int[groups, members]."""
    text = op.attribute('source_target_pairs') or op.attribute('replica_groups')

    # {{0,1},{2,3}}
    groups = [hlo.ints(members) for members in re.findall(r'\{([\d,]+)\}', text)]
    if len(set(map(len, groups))) == 1:
      return np.array(groups)

    # [2,8]<=[4,4]T(1,0): reshape, transpose, reshape
    if match := re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
      shape, source, transposed = (hlo.ints(part or '') for part in match.groups())
      devices = np.arange(math.prod(source)).reshape(source)
      return devices.transpose(transposed or range(len(source))).reshape(shape)
    return np.arange(math.prod(self.shape.values()))[None]        # all devices

  def spanned(self, groups: np.ndarray) -> tuple[str, ...]:
    """The axes along which the members of a group differ; groups: int[groups, members]."""
    positions = np.stack(np.unravel_index(groups, tuple(self.shape.values())), -1)
    differs = (positions != positions[:, :1]).any((0, 1))
    return tuple(axis for axis, spans in zip(self.shape, differs) if spans)

  def bandwidth(self, axes: tuple[str, ...]) -> float:
    """Bytes/s out of a chip over ICI for groups over these axes."""
    used = {p for axis in axes for p in self.physical.get(axis, ())}
    in_slice = math.prod(self.shape[axis] // self.slices.get(axis, 1)
                         for axis in axes if axis in self.shape)
    rings = [self.topology.is_ring(p) and in_slice >= self.topology.shape[p] for p in used or {0}]
    return sum(self.topology.chip.ici * (1. if ring else .5) for ring in rings)

  def seconds(self, c: Collective) -> float:
    slices = math.prod(self.slices.get(axis, 1) for axis in c.axes)
    in_slice = max(1, c.group // slices)
    total = 0.
    if in_slice > 1:
      local = dataclasses.replace(c, group=in_slice)
      total += max(local.wire / self.bandwidth(c.axes), HOP * (in_slice - 1) / 2)
    if slices > 1:
      shard = dataclasses.replace(c, group=slices, size=c.size / in_slice)
      total += shard.wire / self.topology.chip.dcn + 20 * HOP
    return total or HOP                    # a group of one device

  def crosses_slices(self, c: Collective) -> bool:
    return any(axis in self.slices for axis in c.axes)


def _physical_axes(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
  """Assigns mesh axes to physical axes, the largest first, where no devices are described."""
  free = dict(enumerate(topology.shape))
  physical = {}
  for axis, n in sorted(sizes.items(), key=lambda item: -item[1]):
    assigned = []
    while n > 1:
      p = max(free, key=lambda p: (free[p] == n, math.gcd(free[p], n)))
      shared = math.gcd(free[p], n)
      if shared == 1:
        break
      assigned.append(p)
      n //= shared
      free[p] //= shared
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


# --- in the program ----------------------------------------------------------------------------


def op_collectives(module: hlo.Module, op: hlo.Op, network: Network) -> list[Collective]:
  """The collectives that a scheduled operation starts, ends or runs; [] for most operations."""
  # a collective by itself
  kind = op.kind.removesuffix('-start').removesuffix('-done')
  phase = op.kind[len(kind) + 1:] or 'sync'
  key = op.operands[0] if phase == 'done' else op.name
  if kind in KINDS:
    return [_collective(op, kind, network, phase, key)]
  if kind == 'recv':
    return _between_slices(op, network, key)
  if kind == 'async':
    return [_collective(inner, inner.kind, network, phase, key) for called in module.called(op)
            for inner in called.ops if inner.kind in KINDS]

  # inside a fusion
  fused = list(_fused(module, op))
  targets = [inner.attribute('custom_call_target') for inner in fused]
  phases = [phase for phase in ('start', 'done')
            if f'"AsyncCollective{phase.title()}"' in targets]
  collectives = []
  for inner in fused:
    if inner.kind not in KINDS:
      continue
    chain = hlo.find(r'chain_id="(\w+)"', inner.attribute('frontend_attributes'))
    if not chain:
      kind = 'reduce-scatter' if 'all-reduce-scatter' in op.calls else inner.kind
      collectives.append(_collective(inner, kind, network, 'sync', op.name))
    elif phases:
      collectives.append(_collective(inner, inner.kind, network, phases[0], chain))
  return collectives


def _between_slices(op: hlo.Op, network: Network, key: str) -> list[Collective]:
  attributes = op.attribute('frontend_attributes')
  if 'xla_megascale_runtime' not in attributes:
    return []
  kind = hlo.find(r'_xla_megascale_transfer_type="(\w+)"', attributes).lower().replace('_', '-')
  return [Collective(
      kind if kind in KINDS else 'collective-permute', tuple(network.slices),
      group=max(2, math.prod(network.slices.values())), size=op.shapes[0].bytes,
      phase='done' if op.kind == 'recv-done' else 'start', key=key)]


def _fused(module: hlo.Module, op: hlo.Op) -> Iterator[hlo.Op]:
  """Yields the operations in a fusion and in the fusions inside it."""
  if (computation := module.inside(op)) is not None:
    yield from computation.ops
    for inner in computation.ops:
      yield from _fused(module, inner)


def _collective(op: hlo.Op, kind: str, network: Network, phase: str, key: str) -> Collective:
  groups = network.groups(op)
  group = groups.shape[1]
  if kind == 'collective-permute':         # its groups are pairs of source and target
    groups = groups[groups[:, 0] != groups[:, 1]]
    group = 2
  size = op.bytes
  if op.kind.endswith('-start') and kind != 'all-reduce':
    arrays = [shape.bytes for shape in op.shapes if shape.dims]
    size = sum(arrays[len(arrays) // 2:])  # of (operands, results[, contexts]) the results
  if kind == 'reduce-scatter' and op.kind.startswith('reduce-scatter'):
    size *= group                          # the result is one shard
  return Collective(kind, network.spanned(groups), group, size, phase, key)
