"""The checks of `t5lab check`: each has a name, an outcome, and one line of explanation."""

import dataclasses

from t5lab.parallel import sharding
from t5lab.tools.planning import float32, memory
from t5lab.tools.planning.chips import GIB


@dataclasses.dataclass(frozen=True)
class BudgetCheck:
  name: str
  ok: bool | None              # None: not possible on this machine
  text: str


def check_hbm(step, plan: dict) -> BudgetCheck:
  """Compares memory with plan.max_hbm_gb, or with the memory that the chip gives to a program."""
  budget = step.config.plan.max_hbm_gb
  name = f'plan.max_hbm_gb={budget:g}' if budget else f'memory of {step.topology.chip.name}'
  limit = budget * GIB if budget else plan['hbm']['usable']
  total = plan['hbm']['total']
  source = '' if plan['source'] == 'compiler' else ' by the formula'
  if total <= limit:
    return BudgetCheck(
        name, True, f'the step needs {total / GIB:.2f} of {limit / GIB:.2f} GiB{source}')

  # over the limit: the largest kinds, and the largest tensor or buffer
  kinds = sorted(plan['hbm']['kinds'].items(), key=lambda item: -item[1])
  parts = ', '.join(f'{kind} {size / GIB:.2f}' for kind, size in kinds[:3])
  tensor = max(step.tensors, key=lambda t: t.bytes)
  largest = f'{tensor} {tensor.bytes / GIB:.2f} GiB'
  buffers = plan.get('largest_buffers') or []
  if buffers and buffers[0]['bytes'] > tensor.bytes:
    where = f' of {buffers[0]["where"]}' if buffers[0]['where'] else ''
    largest = f'{buffers[0]["shape"]}{where} {buffers[0]["bytes"] / GIB:.2f} GiB'
  return BudgetCheck(
      name, False, f'the step needs {total / GIB:.2f} GiB of {limit / GIB:.2f}{source}: {parts}; '
                   f'largest: {largest}')


def check_collectives(step, plan: dict) -> BudgetCheck | None:
  """Compares the bytes sent with plan.max_collective_gb; None without a budget."""
  limit = step.config.plan.max_collective_gb
  if not limit or 'collective_bytes' not in plan:
    return None
  name, sent = f'plan.max_collective_gb={limit:g}', plan['collective_bytes'] / GIB
  if sent <= limit:
    return BudgetCheck(name, True, f'a chip sends {sent:.2f} GiB per step')
  first = max(plan['collectives'], key=lambda t: t['wire'])
  return BudgetCheck(
      name, False, f'a chip sends {sent:.2f} GiB per step, most of it in {first["count"]} '
                   f'{first["kind"]} over {first["where"]}: {first["wire"] / GIB:.2f} GiB')


def check_float32(step, text: str) -> BudgetCheck:
  """Finds float32 matrix products under bfloat16; text: HLO of the lowered program."""
  name = 'no float32 matmul'
  if step.model.dtype != 'bfloat16':
    return BudgetCheck(name, True, f'model.dtype={step.model.dtype}')
  products = float32.unexpected_products(text, tuple(step.config.plan.float32))
  if not products:
    return BudgetCheck(
        name, True, 'all in bfloat16 except logits, routers and gradients of softmax')
  more = f' and {len(products) - 1} more' if len(products) > 1 else ''
  return BudgetCheck(name, False, f'{products[0]}{more}')


def check_donation(plan: dict) -> BudgetCheck:
  """Checks that the buffer of every donated argument becomes a result."""
  name = 'donated buffers are reused'
  if 'not_aliased' not in plan:
    reason = 'needs libtpu' if plan['source'] == 'formula' else 'the program does not compile'
    return BudgetCheck(name, None, reason)
  lost = plan['not_aliased']
  if lost:
    return BudgetCheck(name, False, f'{len(lost)} are not: {", ".join(lost[:4])}')
  donated, state = plan['hbm']['donated'], plan['hbm']['state']
  if donated < state:
    return BudgetCheck(name, False, f'{donated / GIB:.2f} GiB of the {state / GIB:.2f} GiB state')
  return BudgetCheck(name, True, f'{donated / GIB:.2f} GiB')


def check_partitioner(plan: dict) -> BudgetCheck:
  """Checks that the partitioner does not replicate a tensor to change its sharding."""
  name, warnings = 'no full rematerialization', plan['spmd_warnings']
  if warnings is None:
    return BudgetCheck(name, None, 'needs libtpu')
  if warnings:
    return BudgetCheck(name, False, warnings[0])
  return BudgetCheck(name, True, 'no warning from the partitioner')


def check_replication(step) -> BudgetCheck:
  """Finds large state that every chip holds whole although the rules shard parameters.

  Rules that do not shard the `embed` axis, which every large parameter has, replicate on purpose.
  """
  name, rules = 'large state is split', step.config.rules
  replicated = memory.large_replicated(step.tensors)
  if not replicated:
    return BudgetCheck(
        name, True, f'nothing larger than {memory.LARGE >> 20} MiB is whole on each chip')
  if not sharding.rule_set(rules).get('embed'):
    size = sum(tensor.bytes for tensor in replicated) / GIB
    return BudgetCheck(
        name, True, f'{size:.2f} GiB whole on each chip, which rules={rules!r} intend')
  largest = replicated[0]
  return BudgetCheck(
      name, False, f'{largest}, {largest.bytes / GIB:.2f} GiB, is whole on every chip')


def check_twin(outcome) -> list[BudgetCheck]:
  """Checks that the toy twin ran, and that its step was compiled once."""
  if outcome.failure:
    return [BudgetCheck('toy twin', False, outcome.failure)]
  times = '1 time' if outcome.compilations == 1 else f'{outcome.compilations} times'
  return [
      BudgetCheck('toy twin', outcome.steps > 0,
                  f'{outcome.steps} steps in {outcome.seconds:.0f} s, loss '
                  f'{outcome.first_loss:.3f} to {outcome.last_loss:.3f}'),
      BudgetCheck('no recompile between steps', outcome.compilations == 1,
                  f'the step was compiled {times} in {outcome.steps} steps')]
