"""A simulation of a scheduled program: compute, collectives and copies in the compiler's order.

Compute takes the compiler's estimated cycles. An asynchronous collective or copy starts when its
network is free and costs only the time that its -done waits. A synchronous one blocks compute.
"""

import collections
import dataclasses

from t5lab.tools.planning import hlo, hlo_costs
from t5lab.tools.planning.chips import Chip
from t5lab.tools.planning.collectives import KINDS, Axes, Collective, Network, op_collectives

# Operations that have no estimated cycles and need none: bookkeeping, and those simulated below.
UNPRICED = (*hlo_costs.FREE, 'copy-start', 'copy-done', 'slice-start', 'slice-done', 'custom-call',
            'async-start', 'async-done', 'async-update', 'send', 'recv')
SMALL = 4096                  # bytes; smaller operations without cycles are not listed


@dataclasses.dataclass
class Traffic:
  """One kind of collective over one set of mesh axes, in one step of one device."""
  kind: str
  where: str
  count: int = 0
  size: float = 0.
  wire: float = 0.
  seconds: float = 0.
  asynchronous: float = 0.     # of `seconds`
  exposed: float = 0.          # seconds that compute waits for it
  between_slices: bool = False


@dataclasses.dataclass
class Timeline:
  """The seconds of a step and where they go. waits: for copies between HBM and VMEM."""
  seconds: float = 0.
  cycles: float = 0.
  waits: float = 0.
  exposed: float = 0.
  flops: float = 0.
  hbm_bytes: float = 0.
  traffic: dict = dataclasses.field(default_factory=dict)    # (kind, where) -> Traffic
  unpriced: dict = dataclasses.field(default_factory=dict)   # name -> [count, bytes]
  flops_by_type: dict = dataclasses.field(default_factory=dict)
  loops: list = dataclasses.field(default_factory=list)      # (where, trips or None)
  hottest: list = dataclasses.field(default_factory=list)    # (seconds, op_name, kind)


class Simulator:
  """Runs a module once; `timeline` collects the times."""

  def __init__(self, module: hlo.Module, chip: Chip, axes: Axes, network: Network):
    self.module, self.chip, self.axes, self.network = module, chip, axes, network
    self.timeline = Timeline()
    self._op_seconds = collections.Counter()

  def run(self) -> Timeline:
    self.timeline.seconds = self._run(self.module.entry, 1)
    self.timeline.hottest = [(seconds, *op) for op, seconds in self._op_seconds.most_common(12)]
    return self.timeline

  def _run(self, computation: hlo.Computation, times: int) -> float:
    """Seconds of one run of a computation that a step runs `times` times."""
    timeline, now = self.timeline, 0.
    free_at = {'ici': 0., 'dcn': 0., 'hbm': 0.}     # when each network is free again
    pending = {}                                    # key of a start -> (end, its Traffic or None)
    for op in computation.ops:
      # control flow
      if op.kind == 'while':
        body, trips = self.module.loop(op, computation)
        timeline.loops.append((op.op_name or op.name, trips))
        now += (trips or 1) * self._run(body, times * (trips or 1))
        continue
      if op.kind in ('call', 'conditional'):
        called = self.module.called(op) if op.kind == 'call' else self.module.branches(op)
        now += max((self._run(c, times) for c in called), default=0.)
        continue

      # data movement, then compute
      running = op_collectives(self.module, op, self.axes)
      for c in running:
        now = self._communicate(c, now, free_at, pending, times)
      now = self._copy(op, computation, now, free_at, pending, times)
      seconds = (op.cycles or 0) / self.chip.clock
      now += seconds
      timeline.cycles += (op.cycles or 0) * times
      if seconds:
        self._op_seconds[op.op_name or op.name, op.kind] += op.cycles * times / self.chip.clock
      self._count_flops(op, computation, times)
      self._count_bytes(op, computation, times, communicates=bool(running))
    return now

  def _communicate(self, c: Collective, now, free_at, pending, times) -> float:
    timeline = self.timeline
    if c.phase == 'done':
      end, traffic = pending.pop(c.key, (now, None))
      if traffic is not None and end > now:
        traffic.exposed += (end - now) * times
        timeline.exposed += (end - now) * times
      return max(now, end)

    seconds = self.network.seconds(c)
    net = 'dcn' if self.network.crosses_slices(c) else 'ici'
    traffic = timeline.traffic.setdefault((c.kind, c.where), Traffic(c.kind, c.where))
    traffic.count += times
    traffic.size += c.size * times
    traffic.wire += c.wire * times
    traffic.seconds += seconds * times
    traffic.between_slices = net == 'dcn'

    free_at[net] = max(now, free_at[net]) + seconds
    if c.phase == 'start':
      traffic.asynchronous += seconds * times
      pending[c.key] = (free_at[net], traffic)
      return now
    wait = free_at[net] - now
    traffic.exposed += wait * times
    timeline.exposed += wait * times
    return free_at[net]

  def _copy(self, op: hlo.Op, computation, now, free_at, pending, times) -> float:
    """Asynchronous copies between HBM and VMEM share HBM's bandwidth.

    The reads and writes of fusions do not compete with them here: their cycles include them.
    """
    if op.kind in ('copy-start', 'slice-start'):
      moved = hlo_costs.hbm_bytes(self.module, op, computation)
      free_at['hbm'] = max(now, free_at['hbm']) + moved / self.chip.hbm_bandwidth
      pending[op.name] = (free_at['hbm'], None)
    elif op.kind in ('copy-done', 'slice-done') and op.operands[0] in pending:
      end, _ = pending.pop(op.operands[0])
      if end > now:
        self.timeline.waits += (end - now) * times
        return end
    return now

  def _count_flops(self, op: hlo.Op, computation, times) -> None:
    products = []
    if op.kind in ('convolution', 'dot'):
      products = [(op, computation)]
    elif (fused := self.module.inside(op)) is not None:
      products = hlo_costs.matrix_products(self.module, fused)
    for product, parent in products:
      flops = hlo_costs.product_flops(product, parent) * times
      dtype = parent.by_name[product.operands[0]].shapes[0].dtype
      self.timeline.flops += flops
      by_type = self.timeline.flops_by_type
      by_type[dtype] = by_type.get(dtype, 0.) + flops

  def _count_bytes(self, op: hlo.Op, computation, times, communicates: bool) -> None:
    """Counts HBM bytes, and lists the operation if the compiler has no cycles for it."""
    moved = hlo_costs.hbm_bytes(self.module, op, computation)
    self.timeline.hbm_bytes += moved * times
    size = max(op.bytes, moved)
    if op.cycles is not None or op.kind in UNPRICED or size <= SMALL:
      return
    kind = op.kind.removesuffix('-start').removesuffix('-done')
    if kind in KINDS or 'async-collective' in op.name or (communicates and op.kind == 'fusion'):
      return
    name = f'{op.kind} {op.op_name.rpartition("jit(train_step)/")[2] or op.name}'
    entry = self.timeline.unpriced.setdefault(name, [0, 0.])
    entry[0] += times
    entry[1] += size * times
