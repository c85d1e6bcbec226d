"""t5lab eval --workdir DIR [--step latest|best|all|N] [--split S] [--task NAME]

Loss and accuracy of the split, and the task's own metrics on decoded text, of the raw and of the
averaged weights. Writes DIR/eval/<step>.json, the predictions as DIR/eval/<step>.<weights>.jsonl,
and prints a table. Options that start with --config.eval. change how it decodes, as
--config.eval.beams=4. Your own files, and what to do with them, go as in training:
--config.data.files.validation=dev.tsv, --config.data.fields.inputs=question, --config.data.prompt,
--config.data.metrics=squad,rouge. A module of yours that registers tasks is imported only if named
here: --config.data.modules=my.tasks.
"""

import argparse
import sys

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides, use_compilation_cache
from t5lab.errors import CheckpointError, UsageError

MAY_CHANGE = ('eval.', 'data.files.', 'data.fields.', 'data.prompt', 'data.metrics',
              'data.bad_rows', 'data.modules')


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab eval', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--step', default='latest', help='latest (default), best, all, or a number')
  parser.add_argument('--split', help="default: the config's eval.split")
  parser.add_argument('--task', help="a Task or Mixture; default: the config's")
  args = parser.parse_args(argv)
  for key in overrides:
    if not key.startswith(MAY_CHANGE):
      raise UsageError(f'--config.{key}: eval takes changes of eval.* and of what the data is: '
                       f'{", ".join(k.rstrip(".") for k in MAY_CHANGE[1:])}')

  from t5lab.parallel import sharding
  from t5lab.programs import lab, loading, scoring
  use_compilation_cache()
  c = loading.read_config(args.workdir)
  theirs, c.data.modules = tuple(c.data.modules), ()      # what lies in a folder is not imported
  if args.task:
    c.eval.mixture = args.task
    c.data.mixture = c.data.mixture or args.task       # converted weights were trained on none
  configs.apply(c, overrides)
  c.eval.split = args.split or c.eval.split
  c.data.split = c.eval.split                             # nothing is trained
  configs.check_trainable(c)
  checkpoints = loading.open_checkpoints(c, args.workdir)
  numbers = checkpoints.steps()
  if not numbers:
    raise CheckpointError(f'{args.workdir} has no checkpoint yet; train it with `t5lab train`')
  chosen = numbers if args.step == 'all' else [args.step]
  mesh = sharding.make_mesh(**c.mesh.to_dict())
  evaluator = scoring.Evaluator(c, mesh)   # compiles once for all steps and weights
  try:
    evaluator.open()
  except UsageError as e:
    if not theirs or c.data.modules:
      raise
    raise UsageError(f'{e} The run used {", ".join(theirs)}: if you trust it, add '
                     f'--config.data.modules={",".join(theirs)}') from e
  suffix = ''.join(f'.{x}' for x in (args.task, args.split) if x)
  results = []
  for number in chosen:
    labs = {weights: lab.load(args.workdir, number, weights, config=c, engine=evaluator.engine)
            for weights in (('raw', 'ema') if c.optim.ema else ('raw',))}
    step = labs['raw'].step
    with sharding.use(mesh, c.rules):
      result = evaluator.score(labs)
    path = scoring.write_evaluation(args.workdir, step, result, suffix)
    show(result, f'{args.workdir} · step {step} · {c.eval.split}', c.eval.samples)
    print(path)
    results.append(result)
  for result in results:
    result.check()
  return 0


def show(result, title: str, samples: int = 0) -> None:
  """Scores as a table, a row for each task and weights, then some predictions."""
  from rich.console import Console
  from rich.table import Table

  from t5lab.evaluation.metrics import bleu, chrf
  rows, columns = {}, {}
  for key, value in result.scores.items():
    *task, weights, metric = key.split('/')
    rows.setdefault(('/'.join(task), weights), {})[metric] = value
    columns[metric] = True
  last = list(result.predictions.values())[-1] if result.predictions else []
  for task in {task for task, _ in rows if 'bleu' in columns}:
    if pairs := [(p.target, p.source) for p in last if p.task == task]:
      # What handing in the source scores: the floor of any translation.
      rows[task, 'copy of the source'] = {**bleu(*zip(*pairs)), **chrf(*zip(*pairs))}
  table = Table(title=title)
  for name in ('task', 'weights', *columns):
    table.add_column(name, justify='left' if name in ('task', 'weights') else 'right')
  for (task, weights), values in rows.items():
    table.add_row(task, weights, *(f'{values[m]:.3f}' if m in values else '' for m in columns))
  console = Console()
  console.print(table)
  names = (('source', 'source'), ('reference', 'target'), ('output', 'prediction'))
  for p in last[:samples]:
    text = '\n'.join(f'{name:>10}  {getattr(p, field)}' for name, field in names)
    console.print(text + '\n', markup=False, highlight=False, soft_wrap=True)

