"""A scheduled program played through: compute, collectives and copies in the compiler's order.

Compute takes the compiler's estimated cycles. An asynchronous collective or copy starts when its
network is free and costs only what its -done has to wait. A synchronous one stops compute.
"""

import collections
import dataclasses

from t5lab.tools.planning import collectives, hlo
from t5lab.tools.planning.topology import Chip

# They move no data worth a price: scalars, bookkeeping, and what the compiler folds away.
_FREE = hlo._FREE + ('copy-start', 'copy-done', 'slice-start', 'slice-done', 'custom-call',
                     'async-start', 'async-done', 'async-update', 'send', 'recv')
SMALL = 4096                  # bytes below which an operation without a cost is not worth listing


@dataclasses.dataclass
class Traffic:
  """Of one kind of collective over one set of mesh axes, in a step of one device."""
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
class Result:
  """Seconds of a step and where they go. waits: for copies between HBM and VMEM."""
  seconds: float = 0.
  cycles: float = 0.
  waits: float = 0.
  exposed: float = 0.
  flops: float = 0.
  hbm_bytes: float = 0.
  prefetch_bytes: float = 0.
  traffic: dict = dataclasses.field(default_factory=dict)
  unpriced: dict = dataclasses.field(default_factory=dict)   # name -> [count, bytes]
  flops_by_type: dict = dataclasses.field(default_factory=dict)
  loops: list = dataclasses.field(default_factory=list)      # (where, trips or None)
  hottest: list = dataclasses.field(default_factory=list)    # (seconds, op_name, kind)


class Player:
  """Plays a module once; `result` then holds what it took."""

  def __init__(self, module: hlo.Module, chip: Chip, axes: collectives.Axes,
               network: collectives.Network):
    self.module, self.chip, self.axes, self.network = module, chip, axes, network
    self.result = Result()
    self._hot = collections.Counter()
    self._seen = {}

  def run(self) -> Result:
    r = self.result
    r.seconds = self._play(self.module.entry, 1)
    r.hottest = [(seconds, *key) for key, seconds in self._hot.most_common(12)]
    return r

  def _play(self, computation, times) -> float:
    """Seconds of one run of a computation that runs `times` times; adds its parts to the result."""
    r, now = self.result, 0.
    free = {'ici': 0., 'dcn': 0., 'hbm': 0.}
    ends = {}                              # what has started -> (when it is done, its traffic)
    for op in computation.ops:
      if op.kind == 'while':
        body, trips = self.module.loop(op, computation)
        r.loops.append((op.op_name or op.name, trips))
        now += (trips or 1) * self._play(body, times * (trips or 1))
        continue
      if op.kind in ('call', 'conditional'):
        inner = self.module.called(op) if op.kind == 'call' else self.module.branches(op)
        now += max((self._play(c, times) for c in inner), default=0.)
        continue
      for c in collectives.find(self.module, op, self.axes):
        now = self._collective(c, now, free, ends, times)
      now = self._copy(op, computation, now, free, ends, times)
      cycles = op.cycles or 0
      now += cycles / self.chip.clock
      r.cycles += cycles * times
      if cycles:
        self._hot[op.op_name or op.name, op.kind] += cycles * times / self.chip.clock
      self._count(op, computation, times)
    return now

  def _collective(self, c, now, free, ends, times) -> float:
    r = self.result
    net = 'dcn' if self.network.crosses_slices(c) else 'ici'
    if c.phase == 'done':
      done, traffic = ends.pop(c.key, (now, None))
      if traffic is not None and done > now:
        traffic.exposed += (done - now) * times
        r.exposed += (done - now) * times
      return max(now, done)
    seconds = self.network.seconds(c)
    traffic = r.traffic.setdefault((c.kind, c.where), Traffic(c.kind, c.where))
    traffic.count += times
    traffic.size += c.size * times
    traffic.wire += c.wire * times
    traffic.seconds += seconds * times
    traffic.between_slices = net == 'dcn'
    begin = max(now, free[net])
    free[net] = begin + seconds
    if c.phase == 'start':
      traffic.asynchronous += seconds * times
      ends[c.key] = (free[net], traffic)
      return now
    wait = free[net] - now
    traffic.exposed += wait * times
    r.exposed += wait * times
    return free[net]

  def _copy(self, op, computation, now, free, ends, times) -> float:
    """Asynchronous copies to and from VMEM share HBM's bandwidth; fusions' own reads do not count
    against it here, they are in their cycles."""
    if op.kind in ('copy-start', 'slice-start'):
      moved = hlo.hbm_bytes(self.module, op, computation)
      self.result.prefetch_bytes += moved * times
      free['hbm'] = max(now, free['hbm']) + moved / self.chip.hbm_bandwidth
      ends[op.name] = (free['hbm'], None)
    elif op.kind in ('copy-done', 'slice-done') and op.operands[0] in ends:
      done, _ = ends.pop(op.operands[0])
      if done > now:
        self.result.waits += (done - now) * times
        return done
    return now

  def _count(self, op, computation, times):
    """FLOPs, bytes, and what has no price."""
    r = self.result
    if op.kind in ('convolution', 'dot'):
      inside = [(op, computation)]
    else:
      inside = [p for c in self.module.called(op) * (op.kind == 'fusion')
                for p in hlo.products(self.module, c)]
    for product, where in inside:
      flops = hlo.product_flops(product, where) * times
      kind = where.by_name[product.operands[0]].shapes[0].dtype
      r.flops += flops
      r.flops_by_type[kind] = r.flops_by_type.get(kind, 0.) + flops
    moved = hlo.hbm_bytes(self.module, op, computation)
    r.hbm_bytes += moved * times
    if op.cycles is None and op.kind not in _FREE and not self._is_collective(op):
      size = max(op.bytes, moved)
      if size > SMALL:
        name = f'{op.kind} {op.op_name.rpartition("jit(train_step)/")[2] or op.name}'
        entry = r.unpriced.setdefault(name, [0, 0.])
        entry[0] += times
        entry[1] += size * times

  def _is_collective(self, op) -> bool:
    if op.kind.removesuffix('-start').removesuffix('-done') in collectives.KINDS:
      return True
    return bool(op.kind == 'fusion' and collectives.find(self.module, op, self.axes)) or (
        'async-collective' in op.name)
