"""t5lab check --config FILE[:ARG] [--topology v5e:4x4]

The gate before a pod: budgets of the config's `plan` section (memory, bytes of collectives), no
float32 matmul under bfloat16, donated buffers reused, no tensor gathered whole, and a toy twin: a
tiny model with the structure and every divisibility of this run, trained for 10 steps by 2
processes on 16 virtual devices, without a recompilation. Exit code 2 names the tensor or the
operation.
"""

import argparse
import json
import sys

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides
from t5lab.commands.plan import chosen_topology, prepare, read_prices
from t5lab.errors import UsageError
from t5lab.tools.planning import topology as topologies


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab check', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]')
  parser.add_argument('--topology', help="default: the config's plan.topology")
  parser.add_argument('--only', choices=('plan', 'twin'), help='one half of it')
  parser.add_argument('--timeout', type=float, default=900., metavar='S',
                      help='seconds for the toy twin (default 900)')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  args = parser.parse_args(argv)
  c = configs.load(args.config, overrides)
  topology = chosen_topology(c, args.topology)
  prepare(topology)
  say = (lambda text: None) if args.json else lambda text: print(text, file=sys.stderr, flush=True)
  found = []
  if args.only != 'twin':
    found += of_plan(c, topology, say)
  if args.only != 'plan':
    found += of_twin(c, topology, args.timeout, say)
  if args.json:
    print(json.dumps({'topology': topology.name, 'checks': [vars(f) for f in found]}))
  else:
    show(found)
  failed = [f for f in found if f.ok is False]
  if failed:
    more = f' (and {len(failed) - 1} more)' * (len(failed) > 1)
    raise UsageError(f'{failed[0].name}: {failed[0].text}{more}')
  return 0


def of_plan(c, topology, say) -> list:
  from t5lab.tools.planning import estimate, gate
  setup = estimate.set_up(c, topology)
  if topologies.has_compiler():
    say(f'compiling the train step of {c.family} for {topology.name} …')
  else:
    say("no libtpu here: memory by the formula, the compiler's checks are left out")
  plan, _ = estimate.plan(setup, read_prices(None))
  lowered = setup.program.lower().as_text(dialect='hlo', debug_info=True)
  found = [gate.hbm(setup, plan), gate.collective_bytes(setup, plan),
           gate.products(setup, lowered), gate.aliased(setup, plan), gate.partitioner(plan),
           gate.replicated(setup)]
  return [f for f in found if f is not None]


def of_twin(c, topology, seconds, say) -> list:
  from t5lab.parallel import sharding
  from t5lab.tools.planning import gate, twin
  made = twin.derive(c, sharding.mesh_sizes(c.mesh.to_dict(), topology.chips, topology.name))
  for note in made.notes:
    say(f'toy twin: {note}')
  return gate.twin_ran(twin.run(made, seconds, say))


def show(found) -> None:
  from rich.console import Console
  from rich.markup import escape
  out = Console(width=100, highlight=False)
  for f in found:
    mark = {True: '[green]ok[/]  ', False: '[bold red]FAIL[/]', None: '[dim]--[/]  '}[f.ok]
    out.print(f'{mark} [bold]{escape(f.name)}[/]: {escape(f.text)}')

