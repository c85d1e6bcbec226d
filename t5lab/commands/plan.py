"""t5lab plan --config FILE[:ARG] --topology v5e:4x4 [--search] [--decode] [--json]

Whether the run fits a slice, how fast, what limits it and what it costs, before anything is spent.
Compiles the real train step (with --decode the decode step) for v4, v5e, v5p or v6e with the TPU
compiler of libtpu, on a machine without an accelerator: pip install 't5lab[tpu]'. Without libtpu an
analytic estimate, labelled as such. Several slices: --topology v5e:16x16*2.

--search tries meshes, rules, remat policies and microbatches with the formula, compiles what the
config has and the most promising others, one after the other, each correcting the formula for the
next, and prints lines for the config. Results are kept in ~/.cache/t5lab/plan.
"""

import argparse
import json
import os
from pathlib import Path
import sys

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError
from t5lab.tools.planning import topology as topologies


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab plan', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]')
  parser.add_argument('--topology', help='chip and shape, as v5e:4x4, v5p:2x2x4, v6e:16x16*2; '
                                         "default: the config's plan.topology")
  parser.add_argument('--decode', action='store_true',
                      help='the decode step: eval.batch_size rows, eval.max_length tokens')
  parser.add_argument('--search', action='store_true', help='look for a better mesh')
  parser.add_argument('--finalists', type=int, default=6, metavar='N',
                      help='of --search: how many the compiler sees (default 6)')
  parser.add_argument('--json', action='store_true', help='one JSON object and nothing else')
  parser.add_argument('--prices', metavar='FILE', help='instead of t5lab/planning/prices.json')
  parser.add_argument('--no-cache', action='store_true', help='compile again')
  parser.add_argument('--hlo', metavar='FILE', help='write the scheduled program there, as text')
  args = parser.parse_args(argv)
  c = configs.load(args.config, overrides)
  topology = chosen_topology(c, args.topology)
  prices = read_prices(args.prices)
  prepare(topology)
  from t5lab.tools.planning import estimate, report
  say = (lambda text: None) if args.json else lambda text: print(text, file=sys.stderr, flush=True)
  if args.search:
    if args.decode:
      raise UsageError('--search looks for a train step; leave --decode out')
    from t5lab.tools.planning import search
    found = search.search(c, topology, prices, finalists=args.finalists, say=say,
                          use_cache=not args.no_cache)
    print(json.dumps(found)) if args.json else report.show_search(found)
    return 0
  setup = estimate.set_up(c, topology, args.decode)
  if topologies.has_compiler():
    say(f'compiling the {"decode" if args.decode else "train"} step of {c.family} for '
        f'{topology.name} (minutes for a large model; kept for the next time) …')
  found, text = estimate.plan(setup, prices, use_cache=not args.no_cache)
  if args.hlo:
    Path(args.hlo).write_text(text)
  print(json.dumps(found)) if args.json else report.show(found)
  return 0


def chosen_topology(c, text: str | None):
  if not (text or c.plan.topology):
    raise UsageError('no slice to plan for: --topology v5e:4x4 (or v4, v5p, v6e), or plan.topology '
                     'in the config')
  return topologies.parse(text or c.plan.topology)


def prepare(topology) -> None:
  """Sets what the compiler's process needs, before jax looks."""
  wanted = topologies.environment(topology)
  os.environ.update(wanted)
  jax = sys.modules.get('jax')
  if jax is not None:                      # imported, but its backends are not yet made
    jax.config.update('jax_platforms', 'cpu')


def read_prices(path: str | None) -> dict:
  """{'date', 'currency', 'note', 'per_chip_hour': {chip: {kind: price}}}, or UsageError."""
  path = Path(path) if path else Path(topologies.__file__).parent / 'prices.json'
  try:
    found = json.loads(path.read_text())
    for key in ('date', 'currency', 'note', 'per_chip_hour'):
      found[key]
    for chip, prices in found['per_chip_hour'].items():
      for kind, price in prices.items():
        if not isinstance(price, (int, float)) or price < 0:
          raise ValueError(f'per_chip_hour.{chip}.{kind}={price!r} is no price')
  except OSError as e:
    raise UsageError(f'--prices {path}: {e.strerror}') from e
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UsageError(f'--prices {path}: {e}; it is JSON as in t5lab/planning/prices.json') from e
  return found

