"""The analytic estimate of memory and time, for machines without a TPU compiler."""

import dataclasses

from t5lab.parallel import sharding
from t5lab.tools.planning import collectives, flops, memory
from t5lab.tools.planning.planned_step import PlannedStep
from t5lab.tools.planning.timeline import Traffic

# EFFICIENCY: the fraction of the peak that matrix products reach. SCORE_BYTES: bytes to and from
# HBM per element of attention scores, forward and backward, everything but products included.
# HIDING: the fraction of compute that can hide gathers. Fitted to estimates of libtpu 0.0.42 for T5
# 1.1 base on v5e:4x4 (ms of compute; the same remat in more microbatches is up to 13 % faster):
# none 1319 (x8), dots 1390 (x2) and 1282 (x4), full 1356 (x1) and 1182 (x4); and of XXL on
# v5e:16x16, full 1753.
EFFICIENCY = 0.95
SCORE_BYTES = {'none': 135., 'dots': 137., 'full': 117.}
HIDING = 0.8


def estimate(step: PlannedStep) -> dict:
  """The fields of a plan that the compiler would provide."""
  chip = step.topology.chip
  shards = memory.Shards(sharding.batch_devices(step.mesh), step.shards('length'),
                         step.shards('act_heads'))
  kinds = memory.bytes_by_kind(step.tensors)
  state = sum(kinds.values())
  if step.decodes:
    logits = step.rows / shards.batch * step.model.vocab_size / shards.model * 8
    temporaries = {'logits': logits}
    seconds = max(state / chip.hbm_bandwidth, step.chip_flops / chip.peak)
    times = {'step_seconds': seconds, 'compute_seconds': seconds, 'exposed_seconds': 0.,
             'limiting': 'HBM bandwidth', 'collectives': []}
  else:
    micro = step.config.optim.microbatches
    activations = memory.activation_bytes(step.model, step.rows // micro, step.enc, step.dec,
                                          shards, step.config.loss.chunks)
    temporaries = {'saved for the backward pass': activations['saved'],
                   'a layer or the logits': max(activations['layer'], activations['logits']),
                   'gradients': kinds['parameters'] * (2 if micro > 1 else 1)}
    times = _times(step, shards)
  temporary = sum(temporaries.values())
  return {
      'hbm': {'total': state + temporary, 'of_temporaries': temporaries,
              'kinds': {**kinds, 'temporaries and activations': temporary}},
      **times,
      'assumptions': _assumptions(step),
  }


def fsdp_minimum(step: PlannedStep) -> float:
  """Bytes that a device must send if parameters are sharded: 6 per parameter and microbatch.

  A parameter is gathered twice in bfloat16 and its gradient is scattered once. A model axis divides
  them.
  """
  if step.decodes:
    return 0.
  shards = step.shards('embed')
  sent = 6. * memory.elements(step.tensors, 'params') * step.config.optim.microbatches
  return sent * (shards - 1) / shards / step.shards('mlp')


def _times(step: PlannedStep, shards: memory.Shards) -> dict:
  """Seconds of a train step, and its collectives."""
  chip, c, m = step.topology.chip, step.config, step.model
  micro = c.optim.microbatches

  # compute
  row = flops.row_flops(m, step.enc, step.dec)
  executed = row.executed(m.remat, c.loss.chunks > 1) * step.rows / step.topology.chips
  enc_keys = flops.keys_per_query(m, step.enc)
  dec_keys = step.dec + step.enc * bool(m.enc_layers)
  scores_per_head = m.enc_layers * step.enc * enc_keys + m.dec_layers * step.dec * dec_keys
  scores = step.rows * m.n_heads * scores_per_head / step.topology.chips
  compute = executed / (EFFICIENCY * chip.peak) + scores * SCORE_BYTES[m.remat] / chip.hbm_bandwidth

  # collectives: parameters, gradients, activations
  mesh, rules = step.mesh.shape, sharding.rule_set(c.rules)
  network = collectives.Network(step.topology, dict(mesh))
  traffic = []

  def seconds(kind: str, target, size: float, times: int) -> float:
    axes = tuple(axis for axis in sharding.mesh_axes(target) if mesh[axis] > 1)
    if not axes or not size:
      return 0.
    c = collectives.Collective(kind, axes, sharding.num_shards(mesh, axes), size)
    total = network.seconds(c) * times
    traffic.append(Traffic(kind, c.where, count=times, size=size * times, wire=c.wire * times,
                           seconds=total, between_slices=network.crosses_slices(c)))
    return total

  item = 2 if m.dtype == 'bfloat16' else 4
  params, frozen = (memory.elements(step.tensors, tree) for tree in ('params', 'base'))
  fsdp = sharding.mesh_axes(rules.get('embed'))   # sharded at rest, gathered for use
  batch = tuple(axis for axis in sharding.BATCH_AXES if axis not in fsdp)
  gathers = seconds('all-gather', fsdp, (params + frozen) / shards.model * item, 2 * micro)
  sums = seconds('reduce-scatter', fsdp, params / shards.model * item, micro)
  sums += seconds('all-reduce', batch, params / shards.model * 4 / step.shards('embed'), 1)

  positions = m.enc_layers * step.enc + m.dec_layers * step.dec      # in all layers
  tokens = step.rows / micro / shards.batch / shards.length * positions
  passes = (4 if m.remat != 'full' else 6) * micro
  activations = seconds('all-reduce', rules.get('act_heads'), tokens * m.d_model * item, passes)
  activations += seconds('all-gather', rules.get('length'),
                         tokens * 2 * m.kv_heads * m.d_head * item, passes)
  if m.experts:
    routed = tokens / m.moe_every * m.d_model * item * m.capacity_factor * m.expert_top_k
    activations += seconds('all-to-all', rules.get('expert'), routed, passes)

  exposed = max(0., gathers - HIDING * compute) + sums + activations
  parts = {'matrix unit': executed / chip.peak, 'ICI': exposed,
           'HBM bandwidth': compute - executed / chip.peak}
  return {'step_seconds': compute + exposed, 'compute_seconds': compute,
          'exposed_seconds': exposed, 'hlo_flops': executed,
          'flops_ratio': executed / step.chip_flops, 'parts': parts,
          'limiting': max(parts, key=parts.get),
          'collectives': [dataclasses.asdict(row) for row in traffic]}


def _assumptions(step: PlannedStep) -> list[str]:
  chip = step.topology.chip
  decoding = ['decoding reads its weights and cache once from HBM; collectives are not counted']
  return [
      'not compiled: memory of temporaries, FLOPs of recomputation and time are formulas',
      *(decoding if step.decodes else []),
      f'matrix products at {EFFICIENCY:.0%} of {chip.peak / 1e12:.0f} TFLOP/s, plus '
      f'{SCORE_BYTES[step.model.remat]:.0f} bytes of HBM at {chip.hbm_bandwidth / 1e9:.0f} GB/s '
      'per element of attention scores, which covers everything but products',
      f'gathers of weights hide behind {HIDING:.0%} of compute, sums of gradients do not',
  ]
