"""t5lab inspect --config FILE[:ARG] [--config.KEY=VALUE …] [--html PAGE.html] [--json]

What the model will see, before anything is trained: decoded examples, a packed row, lengths and how
many are cut, unknown tokens, texts that the vocabulary changes, repeats, and what the mixture draws
over the run. Text goes to the terminal; --html writes one page more, with plots, that needs nothing
else and no network. What `t5lab train` would refuse of the config and the data is refused here too,
but for what depends on the devices.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import threading
import time

import numpy as np

from t5lab import config as configs
from t5lab import files
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError

SLOTS = 24       # of a sequence that the terminal shows
PATIENCE = 2.    # seconds before progress is told


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab inspect', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]')
  parser.add_argument('--html', metavar='PAGE.html', help='write the page there too')
  parser.add_argument('--examples', type=int, default=3, metavar='N',
                      help='shown of each task (default 3)')
  parser.add_argument('--sample', type=int, default=20_000, metavar='N',
                      help='examples of each task that are counted over (default 20000); lengths '
                           'are of all')
  parser.add_argument('--json', action='store_true',
                      help='print the numbers as one JSON object, and no text')
  args = parser.parse_args(argv)
  for name, least in (('examples', 0), ('sample', 1)):
    if getattr(args, name) < least:
      raise UsageError(f'--{name}={getattr(args, name)}: it must be {least} or more')
  c = configs.load(args.config, overrides)
  if args.html:
    _check_page(pathlib.Path(args.html))

  from t5lab.data.batches import pipeline
  from t5lab.programs import streams
  from t5lab.tools.inspect import view
  with _progress(f'reading and packing {c.data.mixture}, {c.data.split}'):
    stream = streams.open_stream(c)
  words, components, data = stream.vocabulary, stream.components, stream.batches
  form = pipeline.form_of(components[0], configs.model_config(c).kind)   # of all of them
  numbers = _numbers(c, words, components, data, form, args.sample)
  shown, rng = {}, np.random.default_rng(c.seed)
  for component, rows in zip(components, data.rows):
    chosen = view.choose(rows, args.examples, rng)
    shown[rows.name] = ([component.note] if component.note else [],
                        [view.example(rows, i, words, form) for i in chosen],
                        view.row(rows, words))
  title = f'What the model will see: {args.config}'
  settings = [('data', f'{c.data.mixture}, split {c.data.split}'),
              ('vocabulary', f'{words.spec}, {words.size:,} ids'),
              ('lengths', ', '.join(f'{k} {v:,}' for k, v in c.data.lengths.items() if v)),
              ('seed', f'{c.seed:,}')]
  if overrides:
    settings.append(('changed', ' '.join(f'{k}={v}' for k, v in overrides.items())))
  if args.json:
    print(json.dumps({'config': args.config, 'overrides': overrides, 'seed': c.seed, **numbers},
                     indent=1))
  else:
    _show(title, settings, numbers, shown)
  if args.html:
    from t5lab.tools.inspect import page as inspection_page
    with _progress(f'drawing {args.html}'):
      page = inspection_page.render(title, settings, numbers, shown)
    _write_page(args.html, page)
    print(args.html, file=sys.stderr if args.json else sys.stdout)
  return 0


def _check_page(path: pathlib.Path) -> None:
  """UsageError before the work, rather than after it, for a page that cannot be written."""
  if not path.parent.is_dir():
    raise UsageError(f'--html={path}: there is no folder {path.parent}')
  if path.is_dir():
    raise UsageError(f'--html={path} is a folder; name a file in it, as {path / "page.html"}')


def _write_page(path: str, page: str) -> None:
  try:
    files.write_text(path, page)
  except OSError as e:
    raise UsageError(f'--html={path} cannot be written: {e.strerror}') from e


def _numbers(c, words, components, data, form, most) -> dict:
  """{'tasks': {name: inspection.task_numbers and 'round_trip'}, 'mixture'}."""
  from t5lab.data.tasks import registry as tasks
  from t5lab.tools.inspect import numbers as inspection
  from t5lab.tools.inspect import texts as inspection_texts
  lengths = {feature: length for feature, length in c.data.lengths.items() if length}
  found, rng = {}, np.random.default_rng(c.seed)
  for (task, _), rows in zip(tasks.select(c.data.mixture, c.data.split), data.rows, strict=True):
    with _progress(f'{rows.name}: counting') as tick:
      numbers = inspection.task_numbers(rows, words, rng, form=form, most=most, tick=tick)
    with _progress(f'{rows.name}: decoding'):
      chosen = inspection.sample(len(rows.examples), most, rng)
      numbers['round_trip'] = (
          inspection_texts.of_task(task, c.data.split, lengths, most)
          or inspection_texts.of_ids(rows, words, form, chosen))
    found[rows.name] = numbers
  return {'tasks': found, 'mixture': inspection.mixture_numbers(
      [component.rate for component in components], found, batch_size=c.data.batch_size,
      total_steps=c.total_steps)}


@contextlib.contextmanager
def _progress(what: str):
  """Says on standard error what goes on, if it goes on for over PATIENCE; yields tick(done, of)."""
  start = shown = time.monotonic()

  def say(text):
    print(f'\r{what} …{text}   ', end='', file=sys.stderr, flush=True)

  def tick(done, of):
    nonlocal shown
    if (now := time.monotonic()) - start > PATIENCE and now - shown > 0.5:
      shown = now
      say(f' {done:,} of {of:,}')

  timer = threading.Timer(PATIENCE, say, [''])
  timer.daemon = True
  timer.start()
  try:
    yield tick
  finally:
    timer.cancel()
    timer.join()
    if time.monotonic() - start > PATIENCE:
      print(file=sys.stderr)


STYLES = {'text': '', 'special': 'blue', 'sentinel': 'bold blue', 'unknown': 'bold red',
          'number': 'dim'}


def _show(title, settings, numbers, shown) -> None:
  """All of it on the terminal. Text of the data goes through rich.text.Text: no markup is read."""
  from rich.console import Console
  from rich.text import Text

  from t5lab.tools.inspect import view
  console = Console(highlight=False)
  say = lambda *parts: console.print(Text.assemble(*parts), soft_wrap=True)
  facts = lambda pairs: [say((f'{name:>26}  ', 'dim'), view.printable(value))
                         for name, value in pairs]
  say((title, 'bold'))
  facts(settings)
  for name, task in numbers['tasks'].items():
    notes, examples, row = shown[name]
    console.print(_table(f'{name}: lengths in tokens before cutting', view.LENGTH_COLUMNS,
                         view.length_rows(task)))
    facts([*view.facts(task), *(('note', note) for note in notes)])
    for text, back in task['round_trip']['shown']:
      say(('                      text  ', 'dim'), view.printable(text))
      say(('                comes back  ', 'dim'), view.printable(back))
    for example in examples:
      say(f'\n{example.name}')
      for feature, spans in example.features.items():
        cut = example.cut[feature]
        say((f'{feature:>10}  ', 'dim'), *((s.text, STYLES[s.kind]) for s in spans),
            (f' ✂ {cut:,} tokens cut' if cut else '', 'bold red'))
    _show_row(say, row)
  console.print(_table('The mixture', view.MIXTURE_COLUMNS,
                       view.mixture_rows(numbers['mixture'])))
  facts(view.mixture_facts(numbers['mixture']))


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


def _show_row(say, row) -> None:
  """A line a token: segment, position, what is read, what is predicted."""
  labels = ''.join(f'; {name} = {value}' for name, value in row.labels.items())
  say(f'\nA row of {_count(len(row.examples), "example")}: {", ".join(row.examples[:4])}'
      f'{", …" * (len(row.examples) > 4)}{labels}')
  for sequence in row.sequences:
    tokens = _count(len(sequence.slots), 'token')
    say((f'  {sequence.name}: {tokens}, {sequence.padding:,} of padding', 'dim'))
    say(('  segment position  reads'.ljust(42) + 'predicts', 'dim'))
    for slot in sequence.slots[:SLOTS]:
      said = slot.predicted
      style = 'green' if slot.loss else 'dim'
      say(f'  {slot.segment:>7} {slot.position:>8}  ',
          (f"'{slot.read.text}'".ljust(22), STYLES[slot.read.kind]),
          ('' if said is None else f"'{said.text}'" + ' (loss)' * slot.loss, style))
    if len(sequence.slots) > SLOTS:
      say((f'  … {len(sequence.slots) - SLOTS:,} more', 'dim'))


def _count(n: int, what: str) -> str:
  return f'{n:,} {what}{"s" * (n != 1)}'

