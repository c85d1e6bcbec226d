"""t5lab plan --config FILE[:ARG] --topology v5e:4x4 [--search] [--decode] [--json]

Estimates memory, speed, bottleneck and cost of a run on a TPU slice before you pay for one.

It compiles the real train step (or the decode step, with --decode) for v4, v5e, v5p or v6e with the
TPU compiler in libtpu. No accelerator is needed: pip install 't5lab[tpu]'. Without libtpu it prints
an analytic estimate and says so. For several slices: --topology v5e:16x16*2.

--search tries meshes, rules, remat policies and microbatches by formula, compiles the current
config and the most promising alternatives, and prints lines to paste into the config. Compiled
results are cached in ~/.cache/t5lab/plan.
"""

import json
import os
from pathlib import Path
import sys

from t5lab import config, files
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError
from t5lab.tools.planning import chips

PRICES = Path(chips.__file__).with_name('prices.json')


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab plan', description=__doc__)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]')
  parser.add_argument('--topology', help='chip and shape, e.g. v5e:4x4, v5p:2x2x4, v6e:16x16*2 '
                                         "(default: the config's plan.topology)")
  parser.add_argument('--decode', action='store_true',
                      help='plan the decode step: eval.batch_size rows, eval.max_length tokens')
  parser.add_argument('--search', action='store_true', help='search for a faster mesh')
  parser.add_argument('--finalists', type=int, default=6, metavar='N',
                      help='number of combinations that --search compiles (default 6)')
  parser.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
  parser.add_argument('--prices', metavar='FILE',
                      help='replacement for t5lab/tools/planning/prices.json')
  parser.add_argument('--no-cache', action='store_true', help='compile even if a result is cached')
  parser.add_argument('--hlo', metavar='FILE', help='write the scheduled program to FILE as text')
  args = parser.parse_args(argv)
  c = config.load(args.config, overrides)
  topology = chosen_topology(c, args.topology)
  prices = read_prices(args.prices)
  prepare_jax(topology)
  log = progress_log(args.json)
  if args.search and args.decode:
    raise UsageError('--search plans the train step; remove --decode')

  from t5lab.tools.planning import estimate, planned_step, report, search
  if args.search:
    show = report.show_search
    result = search.search(c, topology, prices, finalists=args.finalists, log=log,
                           use_cache=not args.no_cache)
  else:
    show = report.show
    step = planned_step.describe(c, topology, args.decode)
    if chips.has_compiler():
      log(f'compiling the {"decode" if args.decode else "train"} step of {c.family} for '
          f'{topology.name} (minutes for a large model; the result is cached) …')
    result, text = estimate.plan(step, prices, use_cache=not args.no_cache)
    if args.hlo:
      Path(args.hlo).write_text(text)
  print(json.dumps(result)) if args.json else show(result)
  return 0


# --- shared with `t5lab check` -----------------------------------------------------------------


def chosen_topology(c, flag: str | None) -> chips.Topology:
  name = flag or c.plan.topology
  if not name:
    raise UsageError('give the slice to plan for: --topology v5e:4x4 (or v4, v5p, v6e), or '
                     'plan.topology in the config')
  return chips.parse(name)


def prepare_jax(topology: chips.Topology) -> None:
  """Sets the environment that the compiler needs, before jax creates its backends."""
  os.environ.update(chips.environment(topology))
  jax = sys.modules.get('jax')
  if jax is not None:                      # imported, so it does not read the environment again
    jax.config.update('jax_platforms', 'cpu')


def progress_log(silent: bool):
  """A function that prints a line on standard error, unless silent."""
  def log(text: str) -> None:
    if not silent:
      print(text, file=sys.stderr, flush=True)
  return log


def read_prices(path: str | None) -> dict:
  """{'date', 'currency', 'note', 'per_chip_hour': {chip: {kind: price}}}, or UsageError."""
  path = path or PRICES
  prices = files.read_json(path)
  try:
    for key in ('date', 'currency', 'note', 'per_chip_hour'):
      prices[key]
    for chip, kinds in prices['per_chip_hour'].items():
      for kind, price in kinds.items():
        if not isinstance(price, (int, float)) or price < 0:
          raise ValueError(f'per_chip_hour.{chip}.{kind} must be a number of at least 0, got '
                           f'{price!r}')
  except (ValueError, KeyError, AttributeError) as e:
    raise UsageError(f'--prices {path}: {e}; see the format of '
                     't5lab/tools/planning/prices.json') from e
  return prices
