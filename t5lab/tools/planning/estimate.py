"""A plan: everything that is known of a config on a slice before it runs, as one plain dict.

Its `source` says where the numbers come from: 'compiler' (libtpu compiled the real step; its costs
of fusions, our model of the network) or 'formula' (no compiler here). Seconds are estimates anyway.
"""

import dataclasses
import math

import jax

from t5lab import config as configs
from t5lab.parallel import sharding
from t5lab.programs import build as programs
from t5lab.tools.planning import collectives, compiling, decode, flops, hlo, memory, timeline
from t5lab.tools.planning import topology as topologies
from t5lab.tools.planning.topology import GIB, Topology

# Of the formula, where no compiler is: the share of the peak that products reach; bytes to and from
# HBM for an element of attention scores, forward and backward, with all else that is no product;
# the part of compute that can hide gathers. Fitted to what libtpu 0.0.42 makes of T5 1.1 base on
# v5e:4x4 (ms of compute; the same remat in more microbatches is up to 13 % faster): none 1319 (x8),
# dots 1390 (x2) and 1282 (x4), full 1356 (x1) and 1182 (x4); and of XXL on v5e:16x16, full 1753.
EFFICIENCY, SCORE, HIDING = 0.95, {'none': 135., 'dots': 137., 'full': 117.}, 0.8


@dataclasses.dataclass(frozen=True)
class Setup:
  """A program on described devices, and what is known of it without compiling. rows, enc, dec: of
  the global batch; steps: of the whole run, 0 for decoding."""
  config: object
  topology: Topology
  program: object                # program.Program or decode.DecodeStep
  tensors: list
  model: object
  rows: int
  enc: int
  dec: int
  steps: int
  work: float                    # model FLOPs of one step, all chips

  @property
  def mesh(self):
    return self.program.mesh

  def changed(self, c) -> 'Setup':
    """With a config that differs in remat and microbatches alone: the same shapes."""
    return dataclasses.replace(self, config=c, model=configs.model_config(c))

  @property
  def decodes(self) -> bool:
    return isinstance(self.program, decode.DecodeStep)

  @property
  def tokens(self) -> int:
    """Positions that a step works on: of inputs and targets; decoding, new tokens."""
    return self.rows if self.decodes else self.rows * (self.enc + self.dec)


def devices(topology: Topology) -> list:
  """Described TPU devices, or as many virtual CPU devices where there is no TPU compiler."""
  if topologies.has_compiler():
    return list(topologies.devices(topology))
  found = jax.devices('cpu')
  if len(found) < topology.chips:
    raise RuntimeError(f'{len(found)} CPU devices for {topology.name}: virtual ones must be asked '
                       'for before jax starts (planning.topology.environment)')
  return found[:topology.chips]


def set_up(c, topology: Topology, decodes: bool = False) -> Setup:
  """UsageError for what does not divide."""
  m = configs.model_config(c)
  if decodes:
    p = decode.build(c, devices(topology))
    found = memory.tensors(params=p.params, cache=p.cache)
    return Setup(c, topology, p, found, m, p.rows, p.memory, 1, 0,
                 flops.of_decode_step(m, p.rows, p.memory, p.length))
  p = programs.build(c, devices(topology))
  length = lambda side: next((x.shape[1] for k, x in p.batch.items()
                              if k == f'{side}_input_tokens'), 0)
  enc, dec = length('encoder'), length('decoder')
  row = flops.of_row(m, enc, dec)
  work = (2. if c.lora.rank else 3.) * row.forward * c.data.batch_size
  return Setup(c, topology, p, memory.of_program(p), m, c.data.batch_size, enc, dec,
               c.total_steps, work)


def plan(setup: Setup, prices: dict, use_cache: bool = True) -> tuple[dict, str]:
  """(the plan, the scheduled program's text, '' without a compiler). Compiles where it can.

  Bytes, seconds and FLOPs are those of one chip and one step where their names say nothing else.
  """
  chip = setup.topology.chip
  found, text = _about(setup), ''
  if topologies.has_compiler():
    name = compiling.key(configs.to_dict(setup.config), setup.topology,
                         'decode' if setup.decodes else 'train') if use_cache else ''
    compiled = compiling.compile_step(setup.program.lower, name)
    found |= {'source': 'compiler', 'compile_seconds': compiled.seconds,
              'lower_seconds': compiled.lower_seconds, 'cached': compiled.cached,
              'spmd_warnings': compiled.warnings}
    if compiled.unfit:
      found |= {'fits': False, 'unfit': compiled.unfit, 'hbm': _unfit(setup, compiled),
                'largest_buffers': [dict(bytes=b, shape=s, where='')
                                    for b, s in compiled.largest]}
      return found, ''
    text = compiled.text
    module = hlo.parse(text)
    mesh = setup.mesh
    physical, slices = collectives.layout(mesh)
    network = collectives.Network(setup.topology, dict(mesh.shape), physical, slices)
    axes = collectives.Axes(tuple(mesh.axis_names), tuple(mesh.shape.values()), slices)
    played = timeline.Player(module, chip, axes, network).run()
    found |= {'hbm': _compiled_hbm(setup, compiled, module),
              'not_aliased': memory.not_aliased(module),
              'largest_buffers': [dict(bytes=b, shape=s, where=w)
                                  for b, s, w in memory.largest(module)]}
    found |= _played(setup, played, compiled, network)
  else:
    found |= {'source': 'formula', 'spmd_warnings': None}
    found |= formula(setup)
  found['fits'] = found['hbm']['total'] <= chip.usable
  return found | _money(setup, found, prices), text


def _about(s: Setup) -> dict:
  mesh = {axis: n for axis, n in s.mesh.shape.items() if n > 1}
  return {
      'estimate': True, 'what': 'decode step' if s.decodes else 'train step',
      'family': s.config.family, 'topology': s.topology.name, 'chips': s.topology.chips,
      'chip': dataclasses.asdict(s.topology.chip), 'mesh': mesh, 'rules': s.config.rules,
      'remat': s.model.remat, 'dtype': s.model.dtype,
      'microbatches': 1 if s.decodes else s.config.optim.microbatches,
      'parameters': sum(math.prod(t.shape) for t in s.tensors if t.path.startswith('params/')),
      'rows': s.rows, 'lengths': [s.enc, s.dec], 'tokens': s.tokens, 'steps': s.steps,
      'versions': topologies.versions(),
      'replicated': [dict(tensor=str(t), bytes=t.bytes) for t in memory.replicated(s.tensors)],
      'model_flops': s.work / s.topology.chips,
  }


# -- what the compiler says -----------------------------------------------------------------------


def _compiled_hbm(s, compiled, module) -> dict:
  m = compiled.memory
  kinds = memory.by_kind(s.tensors)
  total = m['argument'] + m['output'] + m['temp'] - m['alias'] + m['generated_code']
  rest = m['argument'] - sum(kinds.values())
  chip = s.topology.chip
  inside = {k: v for k, v in memory.saved(module).items() if v} if not s.decodes else {}
  return {
      'capacity': chip.hbm, 'usable': chip.usable, 'total': total, 'headroom': chip.usable - total,
      'kinds': {**kinds, 'padding of layouts': max(0, rest),
                'outputs not in place': m['output'] - m['alias'],
                'temporaries and activations': m['temp'], 'program code': m['generated_code']},
      'of_temporaries': inside, 'donated': m['alias'],
      'state': sum(v for k, v in kinds.items() if k in (
          'parameters', 'optimizer', 'average (EMA)')),
  }


def _unfit(s, compiled) -> dict:
  kinds = memory.by_kind(s.tensors)
  needed, available = compiling.exceeded(compiled.unfit) or (
      float(sum(kinds.values())), s.topology.chip.usable)
  kinds['temporaries and activations'] = max(0., needed - sum(kinds.values()))
  return {'capacity': s.topology.chip.hbm, 'usable': available, 'total': needed,
          'headroom': available - needed, 'kinds': kinds,
          'of_temporaries': {}}


def _played(s, r: timeline.Result, compiled, network) -> dict:
  chip = s.topology.chip
  rows = sorted(r.traffic.values(), key=lambda t: -t.wire)
  seconds = sum(t.seconds for t in rows)
  unpriced = sorted(r.unpriced.items(), key=lambda item: -item[1][1])
  floor = sum(size for _, (_, size) in unpriced) / chip.hbm_bandwidth
  limits = {
      'matrix unit': r.flops / chip.peak,
      'HBM bandwidth': r.hbm_bytes / chip.hbm_bandwidth,
      'ICI': sum(t.exposed for t in rows if not t.between_slices),
      'DCN': sum(t.exposed for t in rows if t.between_slices),
      'vector unit and overheads': r.cycles / chip.clock - max(
          r.flops / chip.peak, r.hbm_bytes / chip.hbm_bandwidth),
  }
  return {
      'step_seconds': r.seconds, 'compute_seconds': r.cycles / chip.clock,
      'exposed_seconds': r.exposed, 'wait_seconds': r.waits,
      'hlo_flops': r.flops, 'flops_ratio': r.flops / (s.work / s.topology.chips),
      'flops_by_type': r.flops_by_type, 'hbm_bytes': r.hbm_bytes,
      'mfu': s.work / s.topology.chips / (r.seconds * chip.peak),
      'tokens_per_second_chip': s.tokens / s.topology.chips / r.seconds,
      'collectives': [dataclasses.asdict(t) for t in rows],
      'collective_bytes': sum(t.wire for t in rows), 'collective_seconds': seconds,
      'async_share': sum(t.asynchronous for t in rows) / seconds if seconds else 1.,
      'hidden_share': 1 - r.exposed / seconds if seconds else 1.,
      'fsdp_minimum': _fsdp_minimum(s),
      'limits': limits, 'limiting': max(limits, key=limits.get),
      'unpriced': [dict(op=name, count=n, bytes=size) for name, (n, size) in unpriced[:12]],
      'unpriced_count': sum(n for _, (n, _) in unpriced), 'unpriced_floor_seconds': floor,
      'unknown_loops': [where for where, trips in r.loops if trips is None],
      'hottest': [dict(seconds=t, op=name, kind=kind) for t, name, kind in r.hottest],
      'assumptions': _assumptions(s, network),
  }


def _fsdp_minimum(s) -> float:
  """Bytes that a device must send where parameters are split: 6 a parameter and microbatch, which
  is gathered twice in bfloat16 and its gradient scattered once; of those a model axis leaves it."""
  if s.decodes:
    return 0.
  shape = s.mesh.shape
  n = sharding.spread(shape, sharding.rules_row(s.config.rules).get('embed'))
  other = shape['model'] if sharding.rules_row(s.config.rules).get('mlp') else 1
  count = sum(math.prod(t.shape) for t in s.tensors if t.path.startswith('params/'))
  return 6. * count * s.config.optim.microbatches * (n - 1) / n / other


def _assumptions(s, network) -> list[str]:
  chip, shape = s.topology.chip, s.topology.shape
  used = []
  for axis, n in s.mesh.shape.items():
    if n > 1:
      on = network.physical.get(axis, ())
      far = network.slices.get(axis, 1)
      used.append(f'{axis}={n}: ' + (f'{far} slices over DCN' if far > 1 else '') + (
          ' and ' if far > 1 and on else '') + (
          f'physical axis {"+".join("xyz"[p] for p in on)}, '
          f'{network.bandwidth((axis,)) / 1e9:.0f} GB/s' if on else ''))
  closed = [('a ring' if s.topology.closed(p) else 'a line') for p in range(len(shape))]
  return [
      f"compute: the compiler's estimated_cycles of each fusion, loops by their trip counts, at "
      f'{chip.clock / 1e9:.3f} GHz; bf16 peak {chip.peak / 1e12:.0f} TFLOP/s',
      f'collectives: ring formulas, {chip.ici / 1e9:.0f} GB/s a physical axis both ways, half '
      f'where the line is open; {s.topology.name}: ' + ', '.join(
          f'{"xyz"[i]} of {n} is {kind}' for i, (n, kind) in enumerate(zip(shape, closed)))
      + f'; at least {topologies.HOP * 1e6:.0f} us for two steps of a ring',
      *[f'mesh axis {text}' for text in used],
      *([f'between slices: {chip.dcn / 1e9:.2f} GB/s a chip, its share of the host'] * (
          s.topology.slices > 1)),
      'an asynchronous collective or copy costs what its end waits for; one network, one at a time',
      f'copies between HBM and VMEM at {chip.hbm_bandwidth / 1e9:.0f} GB/s; input pipeline, '
      'checkpoints and evaluation are free',
  ]


# -- without the compiler -------------------------------------------------------------------------


def formula(s: Setup) -> dict:
  """The analytic estimate of memory and time."""
  chip, c = s.topology.chip, s.config
  kinds = memory.by_kind(s.tensors)
  shape, row = dict(s.mesh.shape), c.rules
  split = lambda axis, name: shape[axis] if sharding.rules_row(row).get(name) else 1
  shards = memory.Shards(
      batch=sharding.batch_devices(s.mesh), length=split('sequence', 'length'),
      model=split('model', 'act_heads'))
  network = collectives.Network(s.topology, shape)
  own = sum(t.bytes for t in s.tensors if t.path.startswith('params/'))
  if s.decodes:
    temporaries = {'logits': s.rows / shards.batch * s.model.vocab_size / shards.model * 8}
    seconds = max(sum(kinds.values()) / chip.hbm_bandwidth,
                  s.work / s.topology.chips / chip.peak)
    times = {'step_seconds': seconds, 'compute_seconds': seconds, 'exposed_seconds': 0.}
    traffic = []
  else:
    micro = c.optim.microbatches
    parts = memory.activations(s.model, s.rows // micro, s.enc, s.dec, shards, c.loss.chunks)
    temporaries = {'saved for the backward pass': parts['saved'],
                   'a layer or the logits': max(parts['layer'], parts['logits']),
                   'gradients': own * (2 if micro > 1 else 1)}
    times, traffic = _formula_times(s, shards, network)
  total = sum(kinds.values()) + sum(temporaries.values())
  seconds = times['step_seconds']
  wire = sum(t['wire'] for t in traffic)
  return {
      'hbm': {'capacity': chip.hbm, 'usable': chip.usable, 'total': total,
              'headroom': chip.usable - total,
              'kinds': {**kinds, 'temporaries and activations': sum(temporaries.values())},
              'of_temporaries': temporaries},
      **times, 'mfu': s.work / s.topology.chips / (seconds * chip.peak),
      'tokens_per_second_chip': s.tokens / s.topology.chips / seconds,
      'collectives': traffic, 'collective_bytes': wire,
      'fsdp_minimum': _fsdp_minimum(s),
      'limiting': max(times['parts'], key=times['parts'].get) if 'parts' in times else
      'HBM bandwidth',
      'assumptions': [
          'no compiler: memory of temporaries, FLOPs of recomputation and time are formulas',
          *(['decoding reads its weights and cache once from HBM; no collective is counted']
            * s.decodes),
          f'products at {EFFICIENCY:.0%} of {chip.peak / 1e12:.0f} TFLOP/s, then '
          f'{SCORE[s.model.remat]:.0f} bytes of HBM at {chip.hbm_bandwidth / 1e9:.0f} GB/s for an '
          'element of attention scores, all that is no product included',
          f'gathers of weights hide behind {HIDING:.0%} of compute, sums of gradients do not',
      ],
  }


def _formula_times(s: Setup, shards, network) -> tuple[dict, list]:
  chip, c, m = s.topology.chip, s.config, s.model
  row = flops.of_row(m, s.enc, s.dec)
  executed = row.executed(m.remat, c.loss.chunks > 1) * s.rows / s.topology.chips
  scores = s.rows * m.n_heads * (
      m.enc_layers * s.enc * flops.keys_met(m, s.enc)
      + m.dec_layers * s.dec * (s.dec + s.enc * bool(m.enc_layers))) / s.topology.chips
  compute = (executed / (EFFICIENCY * chip.peak)
             + scores * SCORE[m.remat] / chip.hbm_bandwidth)
  item = 2 if m.dtype == 'bfloat16' else 4
  shape, micro = s.mesh.shape, c.optim.microbatches
  count = sum(math.prod(t.shape) for t in s.tensors if t.path.startswith('params/'))
  frozen = sum(math.prod(t.shape) for t in s.tensors if t.path.startswith('base/'))
  found = []
  def move(kind, axes, size, times):
    axes = tuple(a for a in axes if shape.get(a, 1) > 1)
    if axes and size:
      one = collectives.Collective(kind, axes, math.prod(shape[a] for a in axes), size, 'sync', '',
                                   None)
      found.append(dict(kind=kind, where='+'.join(axes), count=times, size=size * times,
                        wire=one.wire * times, seconds=network.seconds(one) * times,
                        asynchronous=0., exposed=0., between_slices=network.crosses_slices(one)))
      return network.seconds(one) * times
    return 0.
  rules = sharding.rules_row(c.rules)
  fsdp = sharding.mesh_axes(rules.get('embed'))   # split while they rest, gathered for use
  local = shards.model
  gathers = move('all-gather', fsdp, (count + frozen) / local * item, 2 * micro)
  sums = move('reduce-scatter', fsdp, count / local * item, micro)
  batch = [a for a in sharding.BATCH if a not in fsdp]
  sums += move('all-reduce', batch, count / local * 4 / math.prod(shape[a] for a in fsdp), 1)
  layers = m.enc_layers * s.enc + m.dec_layers * s.dec
  tokens = s.rows / micro / shards.batch / shards.length
  times = (4 if m.remat != 'full' else 6) * micro
  model = move('all-reduce', ('model',) if rules.get('act_heads') else (),
               tokens * layers * m.d_model * item, times)
  model += move('all-gather', ('sequence',) if shards.length > 1 else (),
                tokens * layers * 2 * m.kv_heads * m.d_head * item, times)
  if m.experts:
    model += move('all-to-all', ('expert',), tokens * layers / m.moe_every * m.d_model * item
                  * m.capacity_factor * m.expert_top_k, times)
  exposed = max(0., gathers - HIDING * compute) + sums + model
  parts = {'matrix unit': executed / chip.peak, 'ICI': exposed,
           'HBM bandwidth': compute - executed / chip.peak}
  return {'step_seconds': compute + exposed, 'compute_seconds': compute,
          'exposed_seconds': exposed, 'hlo_flops': executed,
          'flops_ratio': executed / (s.work / s.topology.chips), 'parts': parts}, found


# -- money ----------------------------------------------------------------------------------------


def _money(s: Setup, found: dict, prices: dict) -> dict:
  if not s.steps or 'step_seconds' not in found:
    return {}
  hours = found['step_seconds'] * s.steps / 3600
  price = prices['per_chip_hour'].get(s.topology.chip.name, {})
  return {'run': {
      'hours': hours, 'chip_hours': hours * s.topology.chips, 'currency': prices['currency'],
      'cost': {kind: hours * s.topology.chips * each for kind, each in price.items()},
      'price_date': prices['date'], 'price_note': prices['note'],
      'price_per_chip_hour': price}}


def gib(size: float) -> str:
  return f'{size / GIB:.2f} GiB'
