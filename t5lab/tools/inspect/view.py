"""Examples and packed rows as a person reads them: special tokens, cuts and losses visible.

Nothing here knows a terminal or a page: see commands/inspect.py and inspection_page.py.
"""
import dataclasses
import re

import numpy as np

from t5lab.data.batches import features
from t5lab.data.vocab.base import UNKNOWN
from t5lab.tools.inspect import numbers as inspection

ROLES = ('eos', 'bos', 'cls', 'sep', 'mask', 'pad')   # some models have one id for two: the first
_MARKED = re.compile(rf'(<extra_id_\d+>|{re.escape(UNKNOWN)})')


def printable(text: str) -> str:
  """The text with its control and invisible characters spelled, as \\n: safe on any screen."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True)
class Span:
  """kind: 'text', or 'special', 'sentinel', 'unknown', 'number' (an id that stands for itself)."""
  kind: str
  text: str


def spans(vocab, ids) -> list[Span]:
  """The decoded text of ids, and what decoding leaves out where it stands. Texts are printable.

  Example: the ids of 'Hi <extra_id_0>' and its end -> text 'Hi ', sentinel '<extra_id_0>', special
  '</s>'.
  """
  special, out, run = _special(vocab), [], []

  def close():
    for i, part in enumerate(_MARKED.split(vocab.decode(run))):
      if part:
        marked = 'unknown' if part == UNKNOWN else 'sentinel'
        out.append(Span(marked if i % 2 else 'text', printable(part)))
    run.clear()

  for i in map(int, ids):
    if i in special:
      close()
      out.append(Span('special', special[i]))
    else:
      run.append(i)
  close()
  return out


def _special(vocab) -> dict[int, str]:
  """{id: how it is shown} of the ids that decoding leaves out."""
  found = {}
  for role in ROLES:
    i = getattr(vocab, f'{role}_id')
    if i is not None:
      found.setdefault(i, printable(vocab.names.get(role) or f'<{role}>'))
  return found


def piece(vocab, i: int) -> Span:
  """One id alone."""
  special = _special(vocab)
  if i in special:
    return Span('special', special[i])
  if i == inspection.unknown_id(vocab):
    return Span('unknown', UNKNOWN.strip())
  return Span('sentinel' if i in vocab.sentinels else 'text',
              printable(vocab.pieces([i])[0]) or f'<{i}>')


@dataclasses.dataclass(frozen=True)
class Example:
  """name: 'task:index'. features: {feature: its spans}; cut: {feature: tokens that were cut}."""
  name: str
  features: dict[str, list[Span]]
  cut: dict[str, int]


def example(rows, i: int, vocab, form: str = 'inputs') -> Example:
  """Example i as epoch 0 shows it to the model, cut to the lengths."""
  whole = rows.uncut(0, i)
  cut, _ = features.trim(whole, rows.lengths, vocab.eos_id)
  ids = {name for name in inspection.token_features(cut, form) if inspection.decodable(vocab, name)}
  return Example(f'{rows.name}:{i}',
                 {name: spans(vocab, tokens) if name in ids else
                  [Span('number', ' '.join(str(int(x)) for x in tokens))]
                  for name, tokens in cut.items()},
                 {name: len(whole[name]) - len(tokens) for name, tokens in cut.items()})


def choose(rows, count: int, rng: np.random.Generator) -> list[int]:
  """Examples to show: random ones, the last of them one that was cut, if any was."""
  chosen = inspection.sample(len(rows.examples), count, rng)
  if count > 1 and len(rows.cut) and not np.isin(chosen, rows.cut).any():
    chosen[-1] = int(rng.choice(rows.cut))
  return chosen


@dataclasses.dataclass(frozen=True)
class Slot:
  """One position of a row. predicted: what it is to say, None where it says nothing; loss: whether
  that counts."""
  segment: int
  position: int
  read: Span
  predicted: Span | None
  loss: bool


@dataclasses.dataclass(frozen=True)
class Sequence:
  """name: 'encoder' or 'decoder'. slots: the real ones; padding: how many more the row has."""
  name: str
  slots: list[Slot]
  padding: int


@dataclasses.dataclass(frozen=True)
class Row:
  """examples: names of those that it holds, in order; labels: {feature: value} of single ones."""
  examples: list[str]
  sequences: list[Sequence]
  labels: dict[str, int]


def row(rows, vocab, tries: int = 20) -> Row:
  """A row of epoch 0: of the first `tries` spread over the epoch, the one of the most examples."""
  count = rows.count if rows.blocks == 1 else min(rows.count, tries)   # a block is slow to open
  tried = np.unique(np.linspace(0, count - 1, tries, dtype=int))
  chosen = max(map(int, tried), key=lambda i: len(rows.ids(0, i)))
  made = rows.row(0, chosen)
  sequences = [_sequence(name, made, vocab) for name in ('encoder', 'decoder')
               if f'{name}_segment_ids' in made]
  return Row([f'{rows.name}:{i}' for i in rows.ids(0, chosen)], sequences,
             {name: int(x[0]) for name, x in made.items() if x.shape == (1,)})


def _sequence(name, made, vocab) -> Sequence:
  of = lambda what: made.get(f'{name}_{what}')
  segments, positions, read = of('segment_ids'), of('positions'), of('input_tokens')
  targets, weights = of('target_tokens'), of('loss_weights')
  if targets is not None and targets.shape != segments.shape:
    targets = None                                       # a class: it belongs to the whole row
  real = np.flatnonzero(segments)
  # Inputs of their own table: the shown pieces would be of the targets'.
  shown = lambda i: (piece(vocab, int(i)) if inspection.decodable(vocab, 'inputs')
                     or name == 'decoder' else Span('number', str(int(i))))
  slots = [Slot(int(segments[i]), int(positions[i]), shown(read[i]),
                None if targets is None else shown(targets[i]),
                targets is not None and bool(weights[i])) for i in real]
  return Sequence(name, slots, len(segments) - len(real))


def facts(task: dict) -> list[tuple[str, str]]:
  """(what, how much) of inspection.task_numbers with its 'round_trip', a line each."""
  slots, cut, back = task['slots'], task['truncated'], task['round_trip']
  lines = [
      ('examples', f'{task["examples"]:,}' + (
          f'; counted over a random sample of {task["sampled"]:,}'
          if task['sampled'] < task['examples'] else '')),
      ('rows an epoch', f'{task["rows"]:,}, {slots["filled"]:.1%} of their slots filled'),
      ('truncated', f'{_of(cut["examples"], "examples")}; {_of(cut["tokens"], "tokens")} lost'),
      ('unknown tokens', _of(task['unknown'], 'tokens')),
      ('round trip', f'{_of(back["lost"], "texts")} come back changed' + (
          '' if back['source'] == 'texts' else ' (from ids: blind to what encoding lost)'))]
  if back['characters']:
    lines.append(('characters lost', ', '.join(
        f'{printable(c)!r} {n:,}' for c, n in back['characters'].items())))
  lines.append(('duplicates', _of(task['duplicates'], 'examples')))
  if task['contradictions'] is not None:
    lines.append(('same inputs, other targets', _of(task['contradictions'], 'examples')))
  if task['objective']:
    lines.append(('objective', printable(task['objective'])))
  return lines


def _of(part, what) -> str:
  return f'{part["count"]:,} of {part["of"]:,} {what} ({part["share"]:.2%})'


LENGTH_COLUMNS = ('feature', 'limit', *(f'{p}%' for p in inspection.PERCENTILES), 'max', 'mean')
MIXTURE_COLUMNS = ('task', 'rate', 'rows', 'tokens', 'epochs in the run', 'steps an epoch')


def length_rows(task: dict) -> list[tuple[str, ...]]:
  """Rows under LENGTH_COLUMNS."""
  return [(name, f'{x["limit"]:,}', *(f'{v:,}' for v in x['percentiles'].values()),
           f'{x["mean"]:,.1f}') for name, x in task['lengths'].items()]


def mixture_rows(mixture: dict) -> list[tuple[str, ...]]:
  """Rows under MIXTURE_COLUMNS."""
  steps = lambda t: '-' if t['steps_an_epoch'] is None else f'{t["steps_an_epoch"]:,.1f}'
  return [(name, f'{t["rate"]:.1%}', f'{t["rows"]:.1%}', f'{t["tokens"]:.1%}',
           f'{t["epochs"]:,.2f}', steps(t)) for name, t in mixture['tasks'].items()]


def mixture_facts(mixture: dict) -> list[tuple[str, str]]:
  step, run = mixture['a_step'], mixture['run']
  return [
      ('a step', f'{step["rows"]:,} rows of {step["slots"] // step["rows"]:,} slots; '
                 f'{step["tokens"]:,.0f} tokens, {step["loss"]:,.0f} of them predicted; '
                 f'{step["padding"]:.1%} padding'),
      ('the run', f'{run["steps"]:,} steps, {run["tokens"]:,.0f} tokens, {run["loss"]:,.0f} of '
                  'them predicted'),
      ('an epoch', f'{mixture["steps_an_epoch"]:,.1f} steps, if each row came once')]
