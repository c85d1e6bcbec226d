"""What `t5lab check` looks at: each a name, whether it holds, and one line that says why."""

import dataclasses

from t5lab.tools.planning import float32, memory
from t5lab.tools.planning.topology import GIB


@dataclasses.dataclass(frozen=True)
class Check:
  name: str
  ok: bool | None              # None: could not be looked at here
  text: str


def hbm(setup, plan: dict) -> Check:
  """plan.max_hbm_gb, or the memory that the chip leaves to a program."""
  own = setup.config.plan.max_hbm_gb
  limit = own * GIB if own else plan['hbm']['usable']
  name = f'plan.max_hbm_gb={own:g}' if own else f'memory of {setup.topology.chip.name}'
  total = plan['hbm']['total']
  made = '' if plan['source'] == 'compiler' else ' by the formula'
  if total <= limit:
    return Check(name, True, f'the step needs {total / GIB:.2f} of {limit / GIB:.2f} GiB{made}')
  kinds = sorted(plan['hbm']['kinds'].items(), key=lambda item: -item[1])
  parts = ', '.join(f'{kind} {size / GIB:.2f}' for kind, size in kinds[:3])
  tensor = max((t for t in setup.tensors), key=lambda t: t.bytes)
  biggest = f'{tensor} {tensor.bytes / GIB:.2f} GiB'
  buffers = plan.get('largest_buffers') or []
  if buffers and buffers[0]['bytes'] > tensor.bytes:
    where = f' of {buffers[0]["where"]}' * bool(buffers[0]['where'])
    biggest = f'{buffers[0]["shape"]}{where} {buffers[0]["bytes"] / GIB:.2f} GiB'
  return Check(name, False, f'the step needs {total / GIB:.2f} GiB of {limit / GIB:.2f}{made}: '
                            f'{parts}; largest: {biggest}')


def collective_bytes(setup, plan: dict) -> Check | None:
  """plan.max_collective_gb; None where there is no budget."""
  limit = setup.config.plan.max_collective_gb
  if not limit or 'collective_bytes' not in plan:
    return None
  name, sent = f'plan.max_collective_gb={limit:g}', plan['collective_bytes'] / GIB
  if sent <= limit:
    return Check(name, True, f'a chip sends {sent:.2f} GiB a step')
  first = max(plan['collectives'], key=lambda t: t['wire'])
  return Check(name, False, f'a chip sends {sent:.2f} GiB a step; most of it {first["kind"]} over '
                            f'{first["where"]}, {first["wire"] / GIB:.2f} GiB in {first["count"]}')


def products(setup, text: str) -> Check:
  """No float32 product under bfloat16; text: of the lowered program."""
  name = 'no float32 matmul'
  if setup.model.dtype != 'bfloat16':
    return Check(name, True, f'model.dtype={setup.model.dtype}')
  found = float32.find(text, tuple(setup.config.plan.float32))
  if not found:
    return Check(name, True, 'all in bfloat16 but logits, routers and gradients of softmax')
  more = f' and {len(found) - 1} more' * (len(found) > 1)
  return Check(name, False, f'{found[0]}{more}')


def aliased(setup, plan: dict) -> Check:
  """Every donated buffer becomes a result."""
  name = 'donated buffers are reused'
  if 'not_aliased' not in plan:
    return Check(name, None, 'needs libtpu' if plan['source'] == 'formula' else 'nothing compiled')
  left = plan['not_aliased']
  if left:
    return Check(name, False, f'{len(left)} are not: {", ".join(left[:4])}')
  state = plan['hbm']['state']
  if plan['hbm']['donated'] < state:
    return Check(name, False, f'{plan["hbm"]["donated"] / GIB:.2f} GiB of the state\'s '
                              f'{state / GIB:.2f}')
  return Check(name, True, f'{plan["hbm"]["donated"] / GIB:.2f} GiB')


def partitioner(plan: dict) -> Check:
  """No tensor is gathered whole because two of its shardings do not meet."""
  said = plan['spmd_warnings']
  name = 'no full rematerialization'
  if said is None:
    return Check(name, None, 'needs libtpu')
  return Check(name, not said, said[0] if said else 'the partitioner said nothing')


def replicated(setup) -> Check:
  """State above 64 MB that every chip holds whole although the rules split parameters: the rules do
  not reach it. Under dp and tp that is how it is meant."""
  found = memory.replicated(setup.tensors)
  name = 'large state is split'
  if setup.config.rules in ('dp', 'tp') or not found:
    size = sum(t.bytes for t in found) / GIB
    return Check(name, True, f'{size:.2f} GiB whole on each, as rules {setup.config.rules} say'
                 if found else f'nothing above {memory.REPLICATED >> 20} MiB is whole on each chip')
  return Check(name, False, f'{found[0]}, {found[0].bytes / GIB:.2f} GiB, is whole on every chip')


def twin_ran(outcome) -> list[Check]:
  if outcome.failure:
    return [Check('toy twin', False, outcome.failure)]
  ran = Check('toy twin', outcome.steps > 0,
              f'{outcome.steps} steps in {outcome.seconds:.0f} s, loss {outcome.first_loss:.3f} to '
              f'{outcome.last_loss:.3f}')
  once = outcome.compilations
  return [ran, Check(
      'no recompile between steps', once == 1,
      f'the step was compiled {once} time{"s" * (once != 1)} in {outcome.steps} steps')]
