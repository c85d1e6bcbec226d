"""A plan: all numbers about a config on a slice that are known before it runs, as one plain dict.

Its `source` is 'compiler' (libtpu compiled the real step; it estimates the time of fusions, our
model of the network that of collectives) or 'formula' (no compiler). Seconds are always estimates.
"""

import dataclasses

from t5lab import config
from t5lab.tools.planning import chips, collectives, compiling, formula, hlo, memory
from t5lab.tools.planning.planned_step import PlannedStep
from t5lab.tools.planning.timeline import Timeline, simulate


def plan(step: PlannedStep, prices: dict, use_cache: bool = True) -> tuple[dict, str]:
  """(the plan, the text of the scheduled program, '' without a compiler).

  Bytes, seconds and FLOPs are those of one chip and one step unless their names say otherwise.
  """
  result, text = _description(step), ''
  if chips.has_compiler():
    kind = 'decode' if step.decodes else 'train'
    key = compiling.cache_key(config.to_dict(step.config), step.topology, kind) if use_cache else ''
    compiled = compiling.compile_step(step.program.lower, key)
    result |= {'source': 'compiler', 'compile_seconds': compiled.seconds,
               'lower_seconds': compiled.lower_seconds, 'cached': compiled.cached,
               'spmd_warnings': compiled.warnings}
    result |= _unfit(step, compiled) if compiled.unfit else _compiled(step, compiled)
    text = compiled.text
  else:
    result |= {'source': 'formula', 'spmd_warnings': None, **formula.estimate(step)}

  chip = step.topology.chip
  hbm = result['hbm'] = {'capacity': chip.hbm, 'usable': chip.usable, **result['hbm']}
  hbm['headroom'] = hbm['usable'] - hbm['total']
  if 'step_seconds' in result:             # it fits, according to the compiler
    seconds = result['step_seconds']
    result |= {
        'fits': hbm['total'] <= chip.usable,
        'mfu': step.chip_flops / (seconds * chip.peak),
        'tokens_per_second_chip': step.tokens / step.topology.chips / seconds,
        'collective_bytes': sum(row['wire'] for row in result['collectives']),
        'fsdp_minimum': formula.fsdp_minimum(step)}
    if step.steps:
      result['run'] = _cost(step, seconds, prices)
  return result, text


def _description(step: PlannedStep) -> dict:
  return {
      'estimate': True, 'what': 'decode step' if step.decodes else 'train step',
      'family': step.config.family, 'topology': step.topology.name, 'chips': step.topology.chips,
      'chip': dataclasses.asdict(step.topology.chip),
      'mesh': {axis: n for axis, n in step.mesh.shape.items() if n > 1},
      'rules': step.config.rules, 'remat': step.model.remat, 'dtype': step.model.dtype,
      'microbatches': 1 if step.decodes else step.config.optim.microbatches,
      'parameters': memory.elements(step.tensors, 'params'),
      'rows': step.rows, 'lengths': [step.enc, step.dec], 'tokens': step.tokens,
      'steps': step.steps, 'versions': chips.versions(),
      'replicated': [dict(tensor=str(tensor), bytes=tensor.bytes)
                     for tensor in memory.large_replicated(step.tensors)],
      'model_flops': step.chip_flops,
  }


def _cost(step: PlannedStep, step_seconds: float, prices: dict) -> dict:
  """Time and money of the whole run."""
  hours = step_seconds * step.steps / 3600
  chip_hours = hours * step.topology.chips
  price = prices['per_chip_hour'].get(step.topology.chip.name, {})
  return {'hours': hours, 'chip_hours': chip_hours, 'currency': prices['currency'],
          'cost': {kind: chip_hours * each for kind, each in price.items()},
          'price_date': prices['date'], 'price_note': prices['note'],
          'price_per_chip_hour': price}


# --- from the compiler -------------------------------------------------------------------------


def _compiled(step: PlannedStep, compiled: compiling.Compiled) -> dict:
  module = hlo.parse(compiled.text)
  network = collectives.Network(step.topology, dict(step.mesh.shape),
                                *collectives.mesh_layout(step.mesh))
  return {
      'hbm': _hbm(step, compiled, module),
      'not_aliased': memory.not_aliased(module),
      'largest_buffers': memory.largest_buffers(module),
      **_times(step, simulate(module, network)),
      'assumptions': _assumptions(step, network),
  }


def _hbm(step: PlannedStep, compiled: compiling.Compiled, module: hlo.Module) -> dict:
  m = compiled.memory
  kinds = memory.bytes_by_kind(step.tensors)
  total = m['argument'] + m['output'] + m['temp'] - m['alias'] + m['generated_code']
  stacked = {} if step.decodes else memory.stacked_buffers(module)
  return {
      'total': total,
      'kinds': {**kinds, 'padding of layouts': max(0, m['argument'] - sum(kinds.values())),
                'outputs not in place': m['output'] - m['alias'],
                'temporaries and activations': m['temp'], 'program code': m['generated_code']},
      'of_temporaries': {purpose: size for purpose, size in stacked.items() if size},
      'donated': m['alias'],
      'state': sum(size for kind, size in kinds.items() if kind in memory.STATE),
  }


def _unfit(step: PlannedStep, compiled: compiling.Compiled) -> dict:
  """The fields of a plan whose program needs more memory than a chip has."""
  kinds = memory.bytes_by_kind(step.tensors)
  needed, available = compiling.exceeded_memory(compiled.unfit) or (
      float(sum(kinds.values())), step.topology.chip.usable)
  kinds['temporaries and activations'] = max(0., needed - sum(kinds.values()))
  return {
      'fits': False, 'unfit': compiled.unfit,
      'hbm': {'usable': available, 'total': needed, 'kinds': kinds, 'of_temporaries': {}},
      'largest_buffers': [dict(bytes=size, shape=shape, where='')
                          for size, shape in compiled.largest],
  }


def _times(step: PlannedStep, t: Timeline) -> dict:
  chip = step.topology.chip
  traffic = sorted(t.traffic.values(), key=lambda row: -row.wire)
  network_seconds = sum(row.seconds for row in traffic)
  product_seconds, hbm_seconds = t.flops / chip.peak, t.hbm_bytes / chip.hbm_bandwidth
  limits = {
      'matrix unit': product_seconds,
      'HBM bandwidth': hbm_seconds,
      'ICI': sum(row.exposed for row in traffic if not row.between_slices),
      'DCN': sum(row.exposed for row in traffic if row.between_slices),
      'vector unit and overheads': t.cycles / chip.clock - max(product_seconds, hbm_seconds),
  }
  unpriced = sorted(t.unpriced.items(), key=lambda item: -item[1][1])
  return {
      'step_seconds': t.seconds, 'compute_seconds': t.cycles / chip.clock,
      'exposed_seconds': t.exposed, 'wait_seconds': t.waits,
      'hlo_flops': t.flops, 'flops_ratio': t.flops / step.chip_flops,
      'flops_by_type': t.flops_by_type, 'hbm_bytes': t.hbm_bytes,
      'collectives': [dataclasses.asdict(row) for row in traffic],
      'collective_seconds': network_seconds,
      'async_share': (sum(row.asynchronous for row in traffic) / network_seconds
                      if network_seconds else 1.),
      'hidden_share': 1 - t.exposed / network_seconds if network_seconds else 1.,
      'limits': limits, 'limiting': max(limits, key=limits.get),
      'unpriced': [dict(op=name, count=n, bytes=size) for name, (n, size) in unpriced[:12]],
      'unpriced_count': sum(n for _, (n, _) in unpriced),
      'unpriced_floor_seconds': sum(size for _, (_, size) in unpriced) / chip.hbm_bandwidth,
      'unknown_loops': [where for where, trips in t.loops if trips is None],
      'hottest': [dict(seconds=seconds, op=name, kind=kind)
                  for (name, kind), seconds in t.op_seconds.most_common(12)],
  }


def _assumptions(step: PlannedStep, network: collectives.Network) -> list[str]:
  topology, chip = step.topology, step.topology.chip
  rings = ', '.join(f'{"xyz"[i]} of {n} is {"a ring" if topology.is_ring(i) else "a line"}'
                    for i, n in enumerate(topology.shape))
  axes = [f'mesh axis {axis}={n}: {" and ".join(_location(axis, network))}'
          for axis, n in step.mesh.shape.items() if n > 1]
  slices = [f'between slices: {chip.dcn / 1e9:.2f} GB/s per chip, its share of the host']
  return [
      f"compute: the compiler's estimated_cycles of each fusion, loops by their trip counts, at "
      f'{chip.clock / 1e9:.3f} GHz; bf16 peak {chip.peak / 1e12:.0f} TFLOP/s',
      f'collectives: ring formulas, {chip.ici / 1e9:.0f} GB/s per physical axis in both '
      f'directions together, half of it on a line; {topology.name}: {rings}; at least '
      f'{chips.HOP * 1e6:.0f} us for two steps of a ring',
      *axes,
      *(slices if topology.slices > 1 else []),
      'an asynchronous collective or copy costs the time that its end waits; a network runs one '
      'collective at a time',
      f'copies between HBM and VMEM at {chip.hbm_bandwidth / 1e9:.0f} GB/s; input pipeline, '
      'checkpoints and evaluation are free',
  ]


def _location(axis: str, network: collectives.Network) -> list[str]:
  """The networks that a mesh axis uses, in words."""
  location = []
  if (slices := network.slices.get(axis, 1)) > 1:
    location.append(f'{slices} slices over DCN')
  if physical := network.physical.get(axis):
    names = '+'.join('xyz'[p] for p in physical)
    location.append(f'physical axis {names}, {network.bandwidth((axis,)) / 1e9:.0f} GB/s')
  return location
