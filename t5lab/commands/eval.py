"""t5lab eval --workdir DIR [--step latest|best|all|N] [--split S] [--task NAME]

Computes loss and accuracy on the split and the task's own metrics on decoded text, for the raw and
the averaged weights. Writes the scores to DIR/eval/<step>.json and the predictions to
DIR/eval/<step>.<weights>.jsonl, and prints a table.

Options --config.eval.* change the decoding, e.g. --config.eval.beams=4. Your own files are given as
in training: --config.data.files.validation=dev.tsv, --config.data.fields.inputs=question,
--config.data.prompt, --config.data.metrics=squad,rouge. A module that registers your own tasks is
imported only if it is named here: --config.data.modules=my.tasks.
"""

from t5lab import config
from t5lab.commands import Parser, split_overrides, use_compilation_cache
from t5lab.errors import CheckpointError, UsageError

MAY_CHANGE = ('eval.', 'data.files.', 'data.fields.', 'data.prompt', 'data.metrics',
              'data.bad_rows', 'data.modules')


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab eval', description=__doc__)
  add = parser.add_argument
  add('--workdir', required=True, metavar='DIR',
      help='a run, or a checkpoint written by `t5lab convert`')
  add('--step', default='latest', help='latest, best, all, or a number (default: latest)')
  add('--split', help="a split of the task (default: the config's eval.split)")
  add('--task', help="a Task or Mixture (default: the config's eval.mixture)")
  args = parser.parse_args(argv)
  for key in overrides:
    if not key.startswith(MAY_CHANGE):
      raise UsageError(f'--config.{key} cannot be set for eval, only keys of '
                       f'{", ".join(prefix.rstrip(".") for prefix in MAY_CHANGE)}')

  # The config of the run, with the changes of the command line.
  from t5lab.parallel import sharding
  from t5lab.programs import lab, loading, scoring
  use_compilation_cache()
  c = loading.read_config(args.workdir)
  # A folder may come from somebody else: modules that it names are not imported.
  modules_of_run, c.data.modules = tuple(c.data.modules), ()
  if args.task:
    c.eval.mixture = args.task
    c.data.mixture = c.data.mixture or args.task     # converted weights have no training task
  config.apply(c, overrides)
  c.eval.split = args.split or c.eval.split
  c.data.split = c.eval.split                        # the training split may not exist here
  config.check_trainable(c)

  # Open the data before any weights are loaded.
  all_steps = loading.open_checkpoints(c, args.workdir).steps()
  if not all_steps:
    raise CheckpointError(f'{args.workdir} has no checkpoint yet; train it with `t5lab train`')
  mesh = sharding.make_mesh(**c.mesh.to_dict())
  evaluator = scoring.Evaluator(c, mesh)             # compiles once for all steps and weights
  try:
    evaluator.open()
  except UsageError as e:
    if not modules_of_run or c.data.modules:
      raise
    modules = ','.join(modules_of_run)
    raise UsageError(f'{e} The run used {", ".join(modules_of_run)}: if you trust it, add '
                     f'--config.data.modules={modules}') from e

  # Score each step.
  suffix = ''.join(f'.{name}' for name in (args.task, args.split) if name)
  results = []
  for chosen in all_steps if args.step == 'all' else [args.step]:
    labs = {weights: lab.load(args.workdir, chosen, weights, config=c, engine=evaluator.engine)
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
  """Prints a table of scores, with a row per task and weights, and then some predictions."""
  from rich.console import Console
  from rich.table import Table

  from t5lab.evaluation.metrics import bleu, chrf
  rows, columns = {}, {}
  for key, value in result.scores.items():
    *task, weights, metric = key.split('/')
    rows.setdefault(('/'.join(task), weights), {})[metric] = value
    columns[metric] = True
  last = list(result.predictions.values())[-1] if result.predictions else []
  if 'bleu' in columns:
    for task in dict.fromkeys(task for task, _ in rows):
      if pairs := [(p.target, p.source) for p in last if p.task == task]:
        # The baseline of every translation: the unchanged source.
        rows[task, 'copy of the source'] = {**bleu(*zip(*pairs)), **chrf(*zip(*pairs))}

  table = Table(title=title)
  for name in ('task', 'weights', *columns):
    table.add_column(name, justify='left' if name in ('task', 'weights') else 'right')
  for (task, weights), values in rows.items():
    table.add_row(task, weights, *(f'{values[m]:.3f}' if m in values else '' for m in columns))
  console = Console()
  console.print(table)
  for p in last[:samples]:
    text = f'    source  {p.source}\n reference  {p.target}\n    output  {p.prediction}\n'
    console.print(text, markup=False, highlight=False, soft_wrap=True)
