"""Tasks -> numpy batches. batch(step) is a pure function of (seed, data, step).

The rows of each task (task_rows.py) are mixed by the rates of the tasks. A batch does not depend on
what was read before it: any step costs the same, and the position of the stream is the number of
the next step. Rows do not depend on the number of processes either: each process builds those rows
of a batch that it needs.
"""

import collections
from collections.abc import Iterator, Sequence
import hashlib
import itertools
import json

import grain
import numpy as np

from t5lab.data.batches import features, task_rows
from t5lab.data.batches.features import Row
from t5lab.data.batches.task_rows import TaskRows, form_of
from t5lab.errors import DataError, UsageError

# Threads share the GIL, so a second one only helps while numpy copies; one keeps up (see the
# input_wait column of metrics.jsonl) and leaves the cores to XLA.
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)

Batch = dict[str, np.ndarray]     # int32[rows, length] by model feature


class Pipeline:
  """Batches of several tasks, mixed by their rates (of examples, not of rows).

  components: name, rate, examples (dicts of int32 token arrays), objective or None, note (a line
  for `summary`, or ''). lengths: tokens of each feature, EOS included. batch_size: rows over all
  processes. kind: of model, one of features.KINDS. eos, second_type: the vocabulary's.
  start_id: the decoder's first input token. rows: the numbers of the rows of every batch that this
  process builds; None: all.
  """

  def __init__(
      self,
      components: Sequence,
      lengths: dict[str, int],
      *,
      batch_size: int,
      seed: int,
      pack: bool = True,
      kind: str = 'encoder_decoder',
      eos: int = features.EOS,
      second_type: bool = True,
      start_id: int = features.START,
      rows: Sequence[int] | None = None,
  ):
    self.batch_size = batch_size
    self.seed = seed
    self._lengths = {name: length for name, length in lengths.items() if length}
    self._own_rows = list(range(batch_size) if rows is None else map(int, rows))
    self._notes = [component.note for component in components]

    # One batch has one form; forms whose head reads a row's first token are not packed.
    form = _common_form(components, kind)
    pack = pack and form not in features.ALONE

    self.rows: list[TaskRows] = []
    for i, component in enumerate(components):
      task = TaskRows(component, self._lengths, seed=seed + 7919 * i, pack=pack, kind=kind,
                      form=form, eos=eos, second_type=second_type, start_id=start_id)
      self.rows.append(task)

    self._order = self._mix(components)
    self.fingerprint = self._fingerprint(components, pack, kind, eos, second_type, start_id)

  def _mix(self, components):
    """Endless (component, epoch, row) of the mixture."""
    orders = [self._epochs(i, rows) for i, rows in enumerate(self.rows)]
    if len(orders) == 1:
      return orders[0]

    # A rate counts examples, but the mixture draws rows: a task whose rows hold more examples is
    # drawn less often.
    weights = []
    for component, rows in zip(components, self.rows):
      rows_per_example = rows.count / len(rows.examples)
      weights.append(component.rate * rows_per_example)
    # Rounded, because grain turns the weights into small integers.
    relative = [round(weight / max(weights), 4) for weight in weights]
    return grain.MapDataset.mix(orders, relative)

  def _epochs(self, component: int, rows: TaskRows):
    """Endless (component, epoch, row); every epoch is a new permutation of the rows."""
    dataset = grain.MapDataset.range(rows.count)
    if rows.blocks == 1:
      dataset = dataset.seed(self.seed + component).shuffle()
    place = lambda i, row: (component, i // rows.count, int(row))
    return dataset.repeat().map_with_index(place)

  def _fingerprint(self, components, pack, kind, eos, second_type, start_id) -> str:
    """SHA-256 of everything that batch(step) depends on, so that a resumed run notices a change."""
    digest = hashlib.sha256()
    for c, rows in zip(components, self.rows):
      digest.update(json.dumps([c.name, float(c.rate), repr(c.objective)]).encode())
      if rows.examples.fingerprint is not None:
        digest.update(f'{rows.examples.fingerprint} {task_rows.BLOCK}'.encode())
        continue
      for example in rows.examples:
        if c.objective is None:
          example, _ = features.trim(example, self._lengths, eos)
        for name in sorted(example):
          digest.update(f'{name} {len(example[name])} '.encode())
          digest.update(np.ascontiguousarray(example[name], np.int32))
    layout = [self._lengths, self.batch_size, self.seed, pack, kind == 'decoder']
    if kind == 'encoder' or (eos, start_id) != (features.EOS, features.START):
      layout += [kind, eos, start_id]      # absent for T5's defaults, so that older runs resume
    if not second_type:
      layout.append('token types are 0')
    digest.update(json.dumps(layout, sort_keys=True).encode())
    return digest.hexdigest()

  def _places(self, step: int, rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """(component, epoch, row of the component) of rows of the batch of `step`."""
    return [self._order[step * self.batch_size + row] for row in rows]

  def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
    """This process's rows of the batch of `step`, or the given ones."""
    places = self._places(step, self._own_rows if rows is None else rows)
    needed = collections.defaultdict(list)     # of each component, in the order of the batch
    for component, epoch, i in places:
      needed[component].append((epoch, i))
    built = {}
    for component, component_places in needed.items():
      built[component] = iter(self.rows[component].build(component_places))
    return _stack([next(built[component]) for component, _, _ in places])

  def epoch(self) -> Iterator[Batch]:
    """Every row of every task once, in a fixed order, for evaluation; the same in all processes.

    The last batch is filled with empty rows, which carry no loss.
    """
    rows = (task.row(0, i) for task in self.rows for i in range(task.count))
    while batch := list(itertools.islice(rows, self.batch_size)):
      empty = {name: np.zeros_like(x) for name, x in batch[0].items()}
      yield _stack(batch + [empty] * (self.batch_size - len(batch)))

  def example_ids(self, step: int) -> list[str]:
    """The examples of the whole batch of `step` as 'task:number', for reports."""
    return [i for row in self.row_ids(step) for i in row]

  def row_ids(self, step: int) -> list[list[str]]:
    """`example_ids` of each row."""
    ids = []
    for component, epoch, i in self._places(step, range(self.batch_size)):
      task = self.rows[component]
      ids.append([f'{task.name}:{number}' for number in task.ids(epoch, i)])
    return ids

  def iterate(self, start: int, stop: int) -> Iterator[Batch]:
    """batch(start) ... batch(stop - 1), prefetched by a thread."""
    batches = grain.MapDataset.range(start, stop).map(lambda step: self.batch(int(step)))
    return iter(batches.to_iter_dataset(PREFETCH))

  def position(self, step: int) -> dict:
    """The position of the stream before `step`, for a checkpoint."""
    return {'step': step, 'fingerprint': self.fingerprint}

  def check_position(self, position: dict) -> None:
    """DataError if a saved position belongs to other data or to another layout of it."""
    if position['fingerprint'] != self.fingerprint:
      raise DataError(
          f'the data changed since step {position["step"]} was saved (fingerprint '
          f'{position["fingerprint"][:12]}, now {self.fingerprint[:12]}): restore the files, the '
          'vocabulary, data.lengths and data.batch_size, or pass --allow-data-change to resume '
          'anyway')

  def summary(self) -> list[str]:
    """A line for each task: examples, rows, fill, and how many were cut to the lengths."""
    lines = []
    for rows, note in zip(self.rows, self._notes):
      if note:
        lines.append(note)
      line = (f'{rows.name}: {len(rows.examples):,} examples in {rows.count:,} rows per epoch, '
              f'{rows.fill:.0%} of the slots filled')
      if len(rows.cut):
        limits = ', '.join(f'{name} {length}' for name, length in self._lengths.items())
        first = ', '.join(f'{rows.name}:{i}' for i in rows.cut[:3])
        more = ', …' if len(rows.cut) > 3 else ''
        line += (f'; {len(rows.cut):,} longer than the limit ({limits}) were cut, EOS kept: '
                 f'{first}{more}')
      lines.append(line)
    return lines


def _common_form(components: Sequence, kind: str) -> str:
  forms = {form_of(component, kind): component.name for component in components}
  if len(forms) > 1:
    listed = ', '.join(f'{form!r} ({name})' for form, name in forms.items())
    raise UsageError(f'the tasks of a mixture must have the same form, got {listed}')
  form, = forms
  return form


def _stack(rows: list[Row]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
