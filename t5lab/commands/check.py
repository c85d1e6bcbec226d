"""t5lab check --config FILE[:ARG] [--topology v5e:4x4]

Checks a run before it is launched on a TPU slice.

Checks the budgets in the config's `plan` section (memory, bytes of collectives), float32 matmuls
under bfloat16, donated buffers that are not reused, and tensors that the partitioner replicates.
Then trains a toy twin: a tiny model with the structure of this run and the same divisibility, for
10 steps in 2 processes on 16 virtual devices, without a recompilation. If a check fails, the exit
code is 2 and the message names the tensor or the operation.
"""

import json

from t5lab import config
from t5lab.commands import Parser, split_overrides
from t5lab.commands.plan import chosen_topology, prepare_jax, progress_log, read_prices
from t5lab.errors import UsageError
from t5lab.tools.planning import chips


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab check', description=__doc__)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]')
  parser.add_argument('--topology', help="chip and shape (default: the config's plan.topology)")
  parser.add_argument('--only', choices=('plan', 'twin'), help='run only one half of the checks')
  parser.add_argument('--timeout', type=float, default=900., metavar='S',
                      help='time limit of the toy twin in seconds (default 900)')
  parser.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
  args = parser.parse_args(argv)
  c = config.load(args.config, overrides)
  topology = chosen_topology(c, args.topology)
  prepare_jax(topology)
  log = progress_log(args.json)
  checks = []
  if args.only != 'twin':
    checks += plan_checks(c, topology, log)
  if args.only != 'plan':
    checks += twin_checks(c, topology, args.timeout, log)
  if args.json:
    print(json.dumps({'topology': topology.name, 'checks': [vars(check) for check in checks]}))
  else:
    show(checks)
  failed = [check for check in checks if check.ok is False]
  if failed:
    more = f' (and {len(failed) - 1} more)' if len(failed) > 1 else ''
    raise UsageError(f'{failed[0].name}: {failed[0].text}{more}')
  return 0


def plan_checks(c, topology: chips.Topology, log) -> list:
  from t5lab.tools.planning import estimate, gate, planned_step
  step = planned_step.describe(c, topology)
  if chips.has_compiler():
    log(f'compiling the train step of {c.family} for {topology.name} …')
  else:
    log('libtpu is not installed: memory is estimated by formula, checks that need the compiler '
        'are skipped')
  plan, _ = estimate.plan(step, read_prices(None))
  lowered = step.program.lower().as_text(dialect='hlo', debug_info=True)
  checks = [gate.check_hbm(step, plan), gate.check_collectives(step, plan),
            gate.check_float32(step, lowered), gate.check_donation(plan),
            gate.check_partitioner(plan), gate.check_replication(step)]
  return [check for check in checks if check is not None]


def twin_checks(c, topology: chips.Topology, timeout: float, log) -> list:
  from t5lab.parallel import sharding
  from t5lab.tools.planning import gate, twin
  sizes = sharding.mesh_sizes(c.mesh.to_dict(), topology.chips, topology.name)
  small = twin.derive(c, sizes)
  for note in small.notes:
    log(f'toy twin: {note}')
  return gate.check_twin(twin.run(small, timeout, log))


def show(checks: list) -> None:
  from rich.console import Console
  from rich.markup import escape
  out = Console(width=100, highlight=False)
  marks = {True: '[green]ok[/]  ', False: '[bold red]FAIL[/]', None: '[dim]--[/]  '}
  for check in checks:
    out.print(f'{marks[check.ok]} [bold]{escape(check.name)}[/]: {escape(check.text)}')
