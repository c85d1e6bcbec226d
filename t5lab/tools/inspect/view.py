"""Examples and packed rows prepared for reading, with special tokens, cuts and losses visible.

Independent of the output: commands/inspect.py prints to the terminal, page.py renders HTML.
"""
import dataclasses
import itertools
import re

import numpy as np

from t5lab.data.batches import features
from t5lab.data.vocab.base import UNKNOWN
from t5lab.tools.inspect import statistics

ROLES = ('pad', 'mask', 'sep', 'cls', 'bos', 'eos')   # if two share an id, the last is shown
_MARKED = re.compile(rf'(<extra_id_\d+>|{re.escape(UNKNOWN)})')


def printable(text: str) -> str:
  """Escapes control and invisible characters, e.g. as \\n: the text is safe on any terminal."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclasses.dataclass(frozen=True)
class Span:
  """kind: 'text', 'special', 'sentinel', 'unknown', or 'number' (ids that are not decoded)."""
  kind: str
  text: str


def spans(vocab, ids) -> list[Span]:
  """Decodes ids and inserts what decoding leaves out. The texts are printable.

  Example: the ids of 'Hi <extra_id_0>' and its end -> text 'Hi ', sentinel '<extra_id_0>', special
  '</s>'.
  """
  special, result = _special(vocab), []
  for is_special, run in itertools.groupby(map(int, ids), special.__contains__):
    if is_special:
      result += [Span('special', special[i]) for i in run]
      continue
    for i, part in enumerate(_MARKED.split(vocab.decode(list(run)))):
      marked = 'unknown' if part == UNKNOWN else 'sentinel'
      if part:
        result.append(Span(marked if i % 2 else 'text', printable(part)))
  return result


def _special(vocab) -> dict[int, str]:
  """Returns {id: its name} for the ids that decoding leaves out."""
  names = {getattr(vocab, f'{role}_id'): printable(vocab.names.get(role) or f'<{role}>')
           for role in ROLES}
  names.pop(None, None)
  return names


def piece(vocab, i: int) -> Span:
  """Returns the span of a single id."""
  special = _special(vocab)
  if i in special:
    return Span('special', special[i])
  if i == statistics.unknown_id(vocab):
    return Span('unknown', UNKNOWN.strip())
  return Span('sentinel' if i in vocab.sentinels else 'text',
              printable(vocab.pieces([i])[0]) or f'<{i}>')


@dataclasses.dataclass(frozen=True)
class ShownExample:
  """name: 'task:index'. features: {feature: spans}. cut: {feature: number of tokens cut}."""
  name: str
  features: dict[str, list[Span]]
  cut: dict[str, int]


def example(rows, i: int, vocab, form: str = 'inputs') -> ShownExample:
  """Returns example i as the model sees it in epoch 0, cut to the lengths."""
  whole = rows.uncut(0, i)
  trimmed, _ = features.trim(whole, rows.lengths, vocab.eos_id)
  shown = {name: [Span('number', ' '.join(str(int(x)) for x in tokens))]
           for name, tokens in trimmed.items()}
  for name in statistics.token_features(trimmed, form):
    if statistics.decodable(vocab, name):
      shown[name] = spans(vocab, trimmed[name])
  return ShownExample(f'{rows.name}:{i}', shown,
                      {name: len(whole[name]) - len(tokens) for name, tokens in trimmed.items()})


def choose(rows, count: int, rng: np.random.Generator) -> list[int]:
  """Chooses random examples to show; the last is one that was cut, if any was."""
  chosen = statistics.sample(len(rows.examples), count, rng)
  if count > 1 and len(rows.cut) and not np.isin(chosen, rows.cut).any():
    chosen[-1] = int(rng.choice(rows.cut))
  return chosen


@dataclasses.dataclass(frozen=True)
class Slot:
  """One position of a row.

  predicted: the token to predict there, None if there is none. loss: True if it is counted.
  """
  segment: int
  position: int
  read: Span
  predicted: Span | None
  loss: bool


@dataclasses.dataclass(frozen=True)
class ShownSequence:
  """name: 'encoder' or 'decoder'. slots: those with tokens. padding: the number of others."""
  name: str
  slots: list[Slot]
  padding: int


@dataclasses.dataclass(frozen=True)
class ShownRow:
  """examples: their names, in order. labels: {feature: value} of features with a single value."""
  examples: list[str]
  sequences: list[ShownSequence]
  labels: dict[str, int]


def row(rows, vocab, tries: int = 20) -> ShownRow:
  """Returns a row of epoch 0: the one with the most examples of `tries` across the epoch."""
  count = rows.count if rows.blocks == 1 else min(rows.count, tries)   # blocks are slow to open
  tried = np.unique(np.linspace(0, count - 1, tries, dtype=int))
  chosen = max(map(int, tried), key=lambda i: len(rows.ids(0, i)))
  packed = rows.row(0, chosen)
  sequences = [_sequence(name, packed, vocab) for name in ('encoder', 'decoder')
               if f'{name}_segment_ids' in packed]
  return ShownRow([f'{rows.name}:{i}' for i in rows.ids(0, chosen)], sequences,
                  {name: int(x[0]) for name, x in packed.items() if x.shape == (1,)})


def _sequence(name, packed, vocab) -> ShownSequence:
  segments, positions, read, targets, weights = (packed.get(f'{name}_{feature}') for feature in (
      'segment_ids', 'positions', 'input_tokens', 'target_tokens', 'loss_weights'))
  if targets is not None and targets.shape != segments.shape:
    targets = None                                       # a class: it belongs to the whole row
  # Inputs with a table of their own cannot be shown: Vocab.pieces has the targets' table.
  has_pieces = name == 'decoder' or statistics.decodable(vocab, 'inputs')

  def span(token):
    return piece(vocab, int(token)) if has_pieces else Span('number', str(int(token)))

  real = np.flatnonzero(segments)
  slots = [Slot(int(segments[i]), int(positions[i]), span(read[i]),
                None if targets is None else span(targets[i]),
                targets is not None and bool(weights[i])) for i in real]
  return ShownSequence(name, slots, len(segments) - len(real))


def facts(task: dict) -> list[tuple[str, str]]:
  """Returns lines of (name, value) for statistics.task_statistics with its 'round_trip'."""
  slots, truncated, round_trip = task['slots'], task['truncated'], task['round_trip']
  examples = f'{task["examples"]:,}'
  if task['sampled'] < task['examples']:
    examples += f'; counts are over a random sample of {task["sampled"]:,}'
  changed = f'{_share(round_trip["lost"], "texts")} change'
  if round_trip['source'] != 'texts':
    changed += ' (measured from ids: losses of the first encoding are not seen)'
  lines = [
      ('examples', examples),
      ('rows per epoch', f'{task["rows"]:,}, {slots["filled"]:.1%} of their slots filled'),
      ('truncated', f'{_share(truncated["examples"], "examples")}; '
                    f'{_share(truncated["tokens"], "tokens")} lost'),
      ('unknown tokens', _share(task['unknown'], 'tokens')),
      ('round trip', changed)]
  if round_trip['characters']:
    lines.append(('characters lost', ', '.join(
        f'{printable(c)!r} {n:,}' for c, n in round_trip['characters'].items())))
  lines.append(('duplicates', _share(task['duplicates'], 'examples')))
  if task['contradictions'] is not None:
    lines.append(('same inputs, other targets', _share(task['contradictions'], 'examples')))
  if task['objective']:
    lines.append(('objective', printable(task['objective'])))
  return lines


def _share(share, unit) -> str:
  return f'{share["count"]:,} of {share["of"]:,} {unit} ({share["share"]:.2%})'


LENGTH_COLUMNS = ('feature', 'limit', *(f'{p}%' for p in statistics.PERCENTILES), 'max', 'mean')
MIXTURE_COLUMNS = ('task', 'rate', 'rows', 'tokens', 'epochs in the run', 'steps per epoch')


def length_table(task: dict) -> list[tuple[str, ...]]:
  """Returns the lines of a table with LENGTH_COLUMNS."""
  return [(name, f'{x["limit"]:,}', *(f'{v:,}' for v in x['percentiles'].values()),
           f'{x["mean"]:,.1f}') for name, x in task['lengths'].items()]


def mixture_table(mixture: dict) -> list[tuple[str, ...]]:
  """Returns the lines of a table with MIXTURE_COLUMNS."""
  lines = []
  for name, task in mixture['tasks'].items():
    steps = '-' if task['steps_an_epoch'] is None else f'{task["steps_an_epoch"]:,.1f}'
    lines.append((name, f'{task["rate"]:.1%}', f'{task["rows"]:.1%}', f'{task["tokens"]:.1%}',
                  f'{task["epochs"]:,.2f}', steps))
  return lines


def mixture_facts(mixture: dict) -> list[tuple[str, str]]:
  step, run = mixture['a_step'], mixture['run']
  return [
      ('per step', f'{step["rows"]:,} rows of {step["slots"] // step["rows"]:,} slots; '
                   f'{step["tokens"]:,.0f} tokens, {step["loss"]:,.0f} of them predicted; '
                   f'{step["padding"]:.1%} padding'),
      ('in the run', f'{run["steps"]:,} steps, {run["tokens"]:,.0f} tokens, {run["loss"]:,.0f} of '
                     'them predicted'),
      ('per epoch', f'{mixture["steps_an_epoch"]:,.1f} steps, if each row were used once')]
