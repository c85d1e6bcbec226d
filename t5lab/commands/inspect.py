"""t5lab inspect --config FILE[:ARG] [--config.KEY=VALUE …] [--html PAGE.html] [--json]

Shows what the model will see, before anything is trained: decoded examples, a packed row, lengths
and how many examples are cut, unknown tokens, texts that the vocabulary changes, duplicates, and
what the mixture draws over the run. Prints text to the terminal; --html also writes a page with
plots in a single file. Everything that `t5lab train` would reject in the config and the data is
rejected here too, except what depends on the devices.
"""

import importlib.util
import json
import pathlib
import sys

import numpy as np

from t5lab import config, files
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError

SLOTS = 24       # shown of a sequence


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  args = _parse(argv)
  c = config.load(args.config, overrides)
  if args.html:
    _check_page(pathlib.Path(args.html))

  # Open the data as training does.
  from t5lab.data.batches import task_rows
  from t5lab.programs import streams
  from t5lab.tools.inspect import view
  print(f'reading and packing {c.data.mixture}, {c.data.split}', file=sys.stderr)
  stream = streams.open_stream(c)
  vocabulary = stream.vocabulary
  form = task_rows.form_of(stream.components[0], config.model_config(c).kind)   # all have the same

  # Collect the statistics, and the examples and the row to show of each task.
  numbers = _statistics(c, stream, form, args.sample)
  shown, rng = {}, np.random.default_rng(c.seed)
  for component, rows in zip(stream.components, stream.batches.rows):
    chosen = view.choose(rows, args.examples, rng)
    shown[rows.name] = ([component.note] if component.note else [],
                        [view.example(rows, i, vocabulary, form) for i in chosen],
                        view.row(rows, vocabulary))
  title = f'What the model will see: {args.config}'
  settings = [('data', f'{c.data.mixture}, split {c.data.split}'),
              ('vocabulary', f'{vocabulary.spec}, {vocabulary.size:,} ids'),
              ('lengths', ', '.join(f'{k} {v:,}' for k, v in c.data.lengths.items() if v)),
              ('seed', f'{c.seed:,}')]
  if overrides:
    settings.append(('changed', ' '.join(f'{k}={v}' for k, v in overrides.items())))

  # Print them and write the page.
  if args.json:
    print(json.dumps({'config': args.config, 'overrides': overrides, 'seed': c.seed, **numbers},
                     indent=1))
  else:
    _show(title, settings, numbers, shown)
  if args.html:
    from t5lab.tools.inspect import page
    text = page.render(title, settings, numbers, shown)
    try:
      files.write_text(args.html, text)
    except OSError as e:
      raise UsageError(f'--html={args.html} cannot be written: {e.strerror}') from e
    print(args.html, file=sys.stderr if args.json else sys.stdout)
  return 0


def _parse(argv):
  parser = Parser('t5lab inspect', description=__doc__)
  add = parser.add_argument
  add('--config', required=True, metavar='FILE[:ARG]',
      help='a config file; ARG is passed to its get_config')
  add('--html', metavar='PAGE.html', help='also write a page with plots (needs matplotlib)')
  add('--examples', type=int, default=3, metavar='N',
      help='examples to show per task (default: 3)')
  add('--sample', type=int, default=20_000, metavar='N',
      help='examples per task to count over (default: 20000); lengths are always counted over all')
  add('--json', action='store_true',
      help='print the statistics as one JSON object instead of text')
  args = parser.parse_args(argv)
  for name, least in (('examples', 0), ('sample', 1)):
    if getattr(args, name) < least:
      raise UsageError(f'--{name} must be {least} or more, got {getattr(args, name)}')
  return args


def _check_page(path: pathlib.Path) -> None:
  """Raises UsageError before the work rather than after it if the page cannot be written."""
  if importlib.util.find_spec('matplotlib') is None:
    raise UsageError('--html draws plots with matplotlib: pip install matplotlib')
  if not path.parent.is_dir():
    raise UsageError(f'--html={path}: there is no folder {path.parent}')
  if path.is_dir():
    raise UsageError(f'--html={path} is a folder; name a file in it, e.g. {path / "page.html"}')


def _statistics(c, stream, form, size) -> dict:
  """Returns {'tasks': {name: task_statistics with 'round_trip'}, 'mixture': mixture_statistics}."""
  from t5lab.data.tasks import registry
  from t5lab.tools.inspect import round_trip, statistics
  lengths = {feature: length for feature, length in c.data.lengths.items() if length}
  by_task, rng = {}, np.random.default_rng(c.seed)
  tasks = registry.select(c.data.mixture, c.data.split)
  for (task, _), rows in zip(tasks, stream.batches.rows, strict=True):
    count = min(len(rows.examples), size)
    with files.Progress(f'{rows.name}: counting', 'examples', count) as progress:
      numbers = statistics.task_statistics(rows, stream.vocabulary, rng, form=form, size=size,
                                           tick=progress.add)
    chosen = statistics.sample(len(rows.examples), size, rng)
    with files.Progress(f'{rows.name}: round trip', 'texts') as progress:
      numbers['round_trip'] = (
          round_trip.task_losses(task, c.data.split, lengths, size, progress.add)
          or round_trip.id_losses(rows, stream.vocabulary, form, chosen, progress.add))
    by_task[rows.name] = numbers
  rates = [component.rate for component in stream.components]
  return {'tasks': by_task, 'mixture': statistics.mixture_statistics(
      rates, by_task, batch_size=c.data.batch_size, total_steps=c.total_steps)}


STYLES = {'text': '', 'special': 'blue', 'sentinel': 'bold blue', 'unknown': 'bold red',
          'number': 'dim'}


def _show(title, settings, numbers, shown) -> None:
  """Prints everything. Text of the data goes through rich.text.Text, so markup is not read."""
  from rich.console import Console
  from rich.text import Text

  from t5lab.tools.inspect import view
  console = Console(highlight=False)

  def write(*parts):
    console.print(Text.assemble(*parts), soft_wrap=True)

  def write_facts(pairs):
    for name, value in pairs:
      write((f'{name:>26}  ', 'dim'), view.printable(value))

  write((title, 'bold'))
  write_facts(settings)
  for name, task in numbers['tasks'].items():
    notes, examples, row = shown[name]
    console.print(_table(f'{name}: lengths in tokens before cutting', view.LENGTH_COLUMNS,
                         view.length_table(task)))
    write_facts([*view.facts(task), *(('note', note) for note in notes)])
    for text, restored in task['round_trip']['shown']:
      write_facts([('text', text), ('after the round trip', restored)])
    for example in examples:
      write(f'\n{example.name}')
      for feature, spans in example.features.items():
        cut = example.cut[feature]
        write((f'{feature:>10}  ', 'dim'), *((s.text, STYLES[s.kind]) for s in spans),
              (f' ✂ {cut:,} tokens cut' if cut else '', 'bold red'))
    _show_row(write, row)
  console.print(_table('The mixture', view.MIXTURE_COLUMNS,
                       view.mixture_table(numbers['mixture'])))
  write_facts(view.mixture_facts(numbers['mixture']))


def _table(title, columns, rows):
  from rich.table import Table
  from rich.text import Text
  table = Table(title=Text(f'\n{title}', 'bold'), title_justify='left', box=None,
                padding=(0, 2, 0, 0), header_style='dim')
  for i, name in enumerate(columns):
    table.add_column(name, justify='right' if i else 'left')
  for cells in rows:
    table.add_row(*map(Text, cells))
  return table


def _show_row(write, row) -> None:
  """Prints a line per token: segment, position, the token read and the token to predict."""
  labels = ''.join(f'; {name} = {value}' for name, value in row.labels.items())
  write(f'\nA row of {_count(len(row.examples), "example")}: {", ".join(row.examples[:4])}'
        f'{", …" * (len(row.examples) > 4)}{labels}')
  for sequence in row.sequences:
    tokens = _count(len(sequence.slots), 'token')
    write((f'  {sequence.name}: {tokens}, {sequence.padding:,} padding', 'dim'))
    write(('  segment position  reads'.ljust(42) + 'predicts', 'dim'))
    for slot in sequence.slots[:SLOTS]:
      predicted = '' if slot.predicted is None else f"'{slot.predicted.text}'"
      predicted += ' (loss)' * slot.loss
      write(f'  {slot.segment:>7} {slot.position:>8}  ',
            (f"'{slot.read.text}'".ljust(22), STYLES[slot.read.kind]),
            (predicted, 'green' if slot.loss else 'dim'))
    if len(sequence.slots) > SLOTS:
      write((f'  … {len(sequence.slots) - SLOTS:,} more', 'dim'))


def _count(n: int, unit: str) -> str:
  return f'{n:,} {unit}{"s" * (n != 1)}'
