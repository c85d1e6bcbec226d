"""A simulation of a scheduled program: compute, collectives and copies in the compiler's order.

Compute takes the compiler's estimated cycles. An asynchronous collective or copy starts when its
network is free and costs only the time that its -done waits. A synchronous one blocks compute.
"""

import collections
import dataclasses

from t5lab.tools.planning import hlo, hlo_costs
from t5lab.tools.planning.collectives import KINDS, Collective, Network, op_collectives

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
  op_seconds: collections.Counter = dataclasses.field(       # of (op_name, kind)
      default_factory=collections.Counter)


def simulate(module: hlo.Module, network: Network) -> Timeline:
  """Runs the program once."""
  timeline = Timeline()
  timeline.seconds = _Run(module, network, timeline).run(module.entry)
  return timeline


@dataclasses.dataclass
class _Run:
  """One run of a computation that a step runs `times` times."""
  module: hlo.Module
  network: Network
  timeline: Timeline
  times: int = 1
  now: float = 0.
  free_at: dict = dataclasses.field(                # when ici, dcn and hbm are free again
      default_factory=lambda: collections.defaultdict(float))
  pending: dict = dataclasses.field(default_factory=dict)    # key of a start -> arguments of _wait

  def run(self, computation: hlo.Computation) -> float:
    """-> the seconds of one run."""
    for op in computation.ops:
      if op.kind == 'while':
        body, trips = self.module.loop(op, computation)
        self.timeline.loops.append((op.op_name or op.name, trips))
        self.now += (trips or 1) * self._inner_run(body, trips or 1)
      elif op.kind in ('call', 'conditional'):
        self.now += max((self._inner_run(c) for c in self.module.called(op)), default=0.)
      else:
        self._run_op(op, computation)
    return self.now

  def _inner_run(self, computation: hlo.Computation, trips: int = 1) -> float:
    return _Run(self.module, self.network, self.timeline, self.times * trips).run(computation)

  def _run_op(self, op: hlo.Op, computation: hlo.Computation) -> None:
    timeline, chip = self.timeline, self.network.topology.chip

    # collectives and copies, then compute
    collectives = op_collectives(self.module, op, self.network)
    for c in collectives:
      self._communicate(c)
    moved = hlo_costs.hbm_bytes(self.module, op, computation)
    if op.kind in ('copy-start', 'slice-start'):
      # The reads and writes of fusions do not compete with it here: their cycles include them.
      self.pending[op.name] = (self._occupy('hbm', moved / chip.hbm_bandwidth),)
    elif op.kind in ('copy-done', 'slice-done'):
      self._wait(*self.pending.pop(op.operands[0], (self.now,)))
    if op.cycles:
      self.now += op.cycles / chip.clock
      timeline.cycles += op.cycles * self.times
      timeline.op_seconds[op.op_name or op.name, op.kind] += op.cycles * self.times / chip.clock

    # what it costs
    for product, parent in hlo_costs.matrix_products(self.module, op, computation):
      flops = hlo_costs.product_flops(product, parent) * self.times
      dtype = parent.by_name[product.operands[0]].shapes[0].dtype
      timeline.flops += flops
      timeline.flops_by_type[dtype] = timeline.flops_by_type.get(dtype, 0.) + flops
    timeline.hbm_bytes += moved * self.times
    self._list_unpriced(op, max(op.bytes, moved), communicates=bool(collectives))

  def _communicate(self, c: Collective) -> None:
    if c.phase == 'done':
      self._wait(*self.pending.pop(c.key, (self.now,)))
      return
    seconds, between_slices = self.network.seconds(c), self.network.crosses_slices(c)
    traffic = self.timeline.traffic.setdefault((c.kind, c.where), Traffic(c.kind, c.where))
    traffic.count += self.times
    traffic.size += c.size * self.times
    traffic.wire += c.wire * self.times
    traffic.seconds += seconds * self.times
    traffic.between_slices = between_slices
    end = self._occupy('dcn' if between_slices else 'ici', seconds)
    if c.phase == 'start':
      traffic.asynchronous += seconds * self.times
      self.pending[c.key] = end, traffic
    else:
      self._wait(end, traffic)

  def _occupy(self, network: str, seconds: float) -> float:
    """Uses a network as soon as it is free -> the time at the end."""
    self.free_at[network] = max(self.now, self.free_at[network]) + seconds
    return self.free_at[network]

  def _wait(self, end: float, traffic: Traffic | None = None) -> None:
    """Compute waits until `end`, for a collective or, without traffic, for a copy."""
    waited = max(0., end - self.now) * self.times
    self.now = max(self.now, end)
    if traffic is None:
      self.timeline.waits += waited
    else:
      traffic.exposed += waited
      self.timeline.exposed += waited

  def _list_unpriced(self, op: hlo.Op, size: float, communicates: bool) -> None:
    """Lists an operation of `size` bytes if the compiler has no cycles for it."""
    if op.cycles is not None or op.kind in UNPRICED or size <= SMALL:
      return
    kind = op.kind.removesuffix('-start').removesuffix('-done')
    if kind in KINDS or 'async-collective' in op.name or (communicates and op.kind == 'fusion'):
      return
    name = f'{op.kind} {op.op_name.rpartition("jit(train_step)/")[2] or op.name}'
    entry = self.timeline.unpriced.setdefault(name, [0, 0.])
    entry[0] += self.times
    entry[1] += size * self.times
