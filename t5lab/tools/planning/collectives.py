"""Collectives in scheduled HLO: what moves, over which mesh axes, and how long a network takes.

On TPU a collective appears in four shapes: alone and synchronous; as a -start and -done pair; as a
fusion that holds an AsyncCollectiveStart, then fusions that compute while it goes on, then one with
AsyncCollectiveDone (the same collective is printed in each, with one chain_id); and inside an
all-reduce-scatter fusion, which is a reduce-scatter. Between slices it is a send and a recv through
the host, whose frontend attributes say what the runtime makes of it; groups then count the devices
of one slice.
"""

from collections.abc import Callable
import dataclasses
import math
import re

import numpy as np

from t5lab.tools.planning import hlo
from t5lab.tools.planning.topology import HOP, Topology

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
         'collective-permute', 'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One run of a collective. size: bytes of its full (gathered or unreduced) array on a device;
  wire: bytes that a device sends, by the ring formula. phase: sync | start | done."""
  kind: str
  axes: tuple[str, ...]                  # mesh axes that its groups span
  group: int                             # devices in a group
  size: float
  phase: str
  key: str                               # joins a start to its done
  op: hlo.Op

  @property
  def wire(self) -> float:
    """all-gather, reduce-scatter, all-to-all: size (n - 1) / n; all-reduce twice that."""
    n = self.group
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return self.size
    return self.size * (n - 1) / n * (2 if self.kind == 'all-reduce' else 1)

  @property
  def where(self) -> str:
    return '+'.join(self.axes) or 'one device'


class Axes:
  """Groups of partition numbers -> mesh axes. Partition i is the mesh's i-th device."""

  def __init__(self, names: tuple[str, ...], shape: tuple[int, ...],
               slices: dict[str, int] | None = None):
    """slices: axis -> over how many slices it goes, of those that leave a slice."""
    self.names, self.shape = names, shape
    self.slices = {axis: n for axis, n in (slices or {}).items() if n > 1}

  def of(self, groups: np.ndarray) -> tuple[str, ...]:
    """The axes along which the members of a group differ; groups: int[groups, members]."""
    places = np.stack(np.unravel_index(groups.reshape(-1), self.shape), -1)
    places = places.reshape(*groups.shape, len(self.shape))
    differ = (places != places[:, :1]).any((0, 1))
    return tuple(name for name, yes in zip(self.names, differ) if yes)

  def groups(self, op: hlo.Op) -> np.ndarray:
    """replica_groups or source_target_pairs as int[groups, members]."""
    text = op.attribute('source_target_pairs') or op.attribute('replica_groups')
    everyone = np.arange(math.prod(self.shape))[None]
    if not text or text == '{}':
      return everyone
    if text.startswith('{'):
      rows = [[int(n) for n in row.split(',')] for row in re.findall(r'\{([\d,]+)\}', text)]
      if len({len(row) for row in rows}) != 1:
        return everyone
      return np.array(rows)
    found = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if not found:
      return everyone
    numbers = lambda part: [int(n) for n in part.split(',')]
    order = np.arange(math.prod(numbers(found.group(2)))).reshape(numbers(found.group(2)))
    if found.group(3):
      order = order.transpose(numbers(found.group(3)))
    return order.reshape(numbers(found.group(1)))


def find(module: hlo.Module, op: hlo.Op, axes: Axes) -> list[Collective]:
  """The collectives that a scheduled operation starts, ends or runs; [] for most."""
  kind, _, suffix = op.kind.rpartition('-')
  if suffix in ('start', 'done') and kind in KINDS:
    return [_make(op, kind, axes, suffix, op.operands[0] if suffix == 'done' else op.name)]
  if op.kind in KINDS:
    return [_make(op, op.kind, axes, 'sync', op.name)]
  if op.kind in ('recv', 'recv-done'):
    return _between_slices(op, axes)
  if op.kind in ('async-start', 'async-done'):
    inside = [o for c in module.called(op) for o in c.ops if o.kind in KINDS]
    key = op.operands[0] if op.kind == 'async-done' else op.name
    return [_make(o, o.kind, axes, op.kind[6:], key) for o in inside]
  body = module.inside(op)
  inside = [(c, o) for c in _nested(module, body) for o in c.ops if o.kind in KINDS]
  if not inside:
    return []
  targets = {o.attribute('custom_call_target').strip('"') for c in _nested(module, body)
             for o in c.ops if o.kind == 'custom-call'}
  found = []
  for _, o in inside:
    chain = o.attribute('frontend_attributes')
    chain = re.search(r'chain_id="(\w+)"', chain)
    if not chain:
      kind = 'reduce-scatter' if 'all-reduce-scatter' in op.calls[0] else o.kind
      found.append(_make(o, kind, axes, 'sync', op.name))
    elif 'AsyncCollectiveStart' in targets:
      found.append(_make(o, o.kind, axes, 'start', chain.group(1)))
    elif 'AsyncCollectiveDone' in targets:
      found.append(_make(o, o.kind, axes, 'done', chain.group(1)))
  return found


def _between_slices(op, axes) -> list[Collective]:
  attributes = op.attribute('frontend_attributes')
  if 'xla_megascale_runtime' not in attributes:
    return []
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
  kind = found.group(1).lower().replace('_', '-') if found else 'collective-permute'
  kind = kind if kind in KINDS else 'collective-permute'
  done = op.kind == 'recv-done'
  return [Collective(kind, tuple(axes.slices), max(2, math.prod(axes.slices.values())),
                     op.shapes[0].bytes, 'done' if done else 'start',
                     op.operands[0] if done else op.name, op)]


def _nested(module, body):
  if body is None:
    return
  yield body
  for op in body.ops:
    if op.kind == 'fusion':
      for inner in module.called(op):
        yield from _nested(module, inner)


def _make(op, kind, axes, phase, key) -> Collective:
  groups = axes.groups(op)
  if kind == 'collective-permute':
    moving = groups[groups[:, 0] != groups[:, 1]]
    names, group = (axes.of(moving) if len(moving) else ()), 2
  else:
    names, group = axes.of(groups), groups.shape[1]
  shapes = op.shapes
  if op.kind.endswith('-start'):           # (operands, results[, contexts]): the results
    if kind == 'all-reduce':
      size = sum(s.bytes for s in shapes)
    else:
      real = [s.bytes for s in shapes if s.dims]
      size = sum(real[len(real) // 2:])
  else:
    size = sum(s.bytes for s in shapes)
  if kind == 'reduce-scatter' and op.kind.startswith('reduce-scatter'):
    size *= group                          # its result is a part
  return Collective(kind, names, max(group, 1), size, phase, key, op)


class Network:
  """Seconds of a collective on a slice.

  A group over mesh axes uses the physical axes that these lie on, all at once: ici bytes/s each,
  half of it where the group's line is not closed to a ring. Between slices it is the chip's share
  of its host's network, and only the part that the slice's own chips have left.
  """

  def __init__(self, topology: Topology, mesh_shape: dict[str, int],
               physical: dict[str, tuple[int, ...]] | None = None,
               slices: dict[str, int] | None = None):
    """physical: axis -> the physical axes that it lies on; None: one for each, in turn, the largest
    mesh axis over as many as it needs. slices: axis -> over how many slices it goes."""
    self.topology, self.shape = topology, mesh_shape
    self.slices = slices if slices is not None else {
        axis: n for axis, n in mesh_shape.items() if axis.startswith('dcn_')}
    self.physical = physical or _guess(topology, {
        axis: n for axis, n in mesh_shape.items() if not axis.startswith('dcn_')})

  def bandwidth(self, axes: tuple[str, ...]) -> float:
    """Bytes/s out of a chip over ICI for groups over these axes."""
    chip = self.topology.chip
    used = {p for axis in axes for p in self.physical.get(axis, ())}
    inside = math.prod(self.shape[a] // self.slices.get(a, 1) for a in axes if a in self.shape)
    total = 0.
    for p in used or {0}:
      whole = self.topology.closed(p) and inside >= self.topology.shape[p]
      total += chip.ici * (1. if whole else .5)
    return total

  def seconds(self, c: Collective) -> float:
    far = math.prod(self.slices.get(axis, 1) for axis in c.axes)
    near = max(1, c.group // far)
    local = dataclasses.replace(c, group=near) if near > 1 else None
    total = 0.
    if local is not None:
      total += max(local.wire / self.bandwidth(c.axes), HOP * (near - 1) / 2)
    elif far == 1:
      return HOP
    if far > 1:
      part = dataclasses.replace(c, group=far, size=c.size / near)
      total += part.wire / self.topology.chip.dcn + 20 * HOP
    return total

  def crosses_slices(self, c: Collective) -> bool:
    return any(self.slices.get(axis, 1) > 1 for axis in c.axes)


def _guess(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
  """Mesh axes laid onto physical ones, largest first: what a library that places them by hand
  would do. Used where no devices are described."""
  left = dict(enumerate(topology.shape))
  found = {}
  for axis, n in sorted(sizes.items(), key=lambda item: -item[1]):
    mine = []
    while n > 1 and left:
      p = max(left, key=lambda p: (left[p] == n, math.gcd(left[p], n)))
      shared = math.gcd(left[p], n)
      if shared == 1:
        break
      mine.append(p)
      n //= shared
      left[p] //= shared
      if left[p] == 1:
        del left[p]
    found[axis] = tuple(mine)
  return found


def layout(mesh) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
  """Of a mesh of described TPU devices: axis -> the physical axes along which its neighbours lie,
  and axis -> over how many slices it goes."""
  place: Callable = lambda d: (*d.coords, getattr(d, 'slice_index', 0) or 0)
  grid = mesh.devices
  physical, slices = {}, {}
  for i, axis in enumerate(mesh.axis_names):
    line = np.moveaxis(grid, i, 0).reshape(grid.shape[i], -1)[:, 0]
    places = np.array([place(d) for d in line])
    differ = (places != places[0]).any(0)
    physical[axis] = tuple(int(p) for p in np.flatnonzero(differ[:-1]))
    slices[axis] = len(set(places[:, -1].tolist()))
  return physical, slices
