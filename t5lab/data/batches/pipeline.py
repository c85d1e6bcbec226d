"""Tasks -> numpy batches. batch(step) is a pure function of (seed, data, step).

An epoch of a task holds each of its examples exactly once. The layout of its packed rows is
computed once (features.pack). Each epoch swaps examples of equal size between the rows, and
shuffles the rows. So a batch does not depend on what was read before it: any step costs the same,
and the position of the stream is the number of the next step. Rows do not depend on the number of
processes either: each process builds those rows of a batch that it needs.
"""

from collections.abc import Iterator, Sequence
import functools
import hashlib
import itertools
import json
from typing import NamedTuple

import grain
import numpy as np

from t5lab.data.batches import features
from t5lab.data.batches.examples import Example, Examples
from t5lab.data.batches.features import Row
from t5lab.errors import DataError, UsageError

# Threads share the GIL, so a second one only helps while numpy copies; one keeps up (see the
# input_wait column of metrics.jsonl) and leaves the cores to XLA.
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)

BLOCK = 2**16     # examples of a cache that are packed and shuffled together

Batch = dict[str, np.ndarray]     # int32[rows, length] by model feature


class _Block(NamedTuple):
  """Packed examples."""
  layout: list[np.ndarray]      # for each row, int[...] indices into members
  members: np.ndarray           # int[n], the numbers of the examples in their task
  size_class: np.ndarray        # int[n], equal where the examples have equal sizes


class TaskRows:
  """The packed rows of one task, for any epoch. row(epoch, i) -> model features.

  Examples in memory form one block. A cache of more than BLOCK examples is divided into n blocks,
  of which block b holds the examples b, b + n, ...: only one or two blocks are packed and in memory
  at a time, and each is a sample of the whole. Every epoch visits the blocks, and the rows within
  each block, in a new order.
  """

  def __init__(self, component, lengths, *, seed, pack, kind, form, eos, start_id):
    self.name, self.objective = component.name, component.objective
    examples = component.examples
    self.examples = examples if isinstance(examples, Examples) else Examples(examples)
    self.lengths, self.seed, self._pack, self._eos = lengths, seed, pack, eos
    self._build_row = functools.partial(
        features.build_row, lengths=lengths, kind=kind, form=form, eos=eos, start_id=start_id)

    # The tokens of every feature of every example after trimming; an objective states upper bounds.
    if self.objective is None:
      self._check_examples(kind, form)
      sizes, self.cut = _trimmed_sizes(self.examples.lengths, lengths)
    else:
      sizes = _objective_sizes(self.objective, self.examples.lengths)
      for name in sizes.keys() & lengths.keys():
        sizes[name] = np.minimum(sizes[name], lengths[name])
      self.cut = np.zeros(0, np.int64)

    # int[examples, sequences] and int[sequences]: what an example takes of a row, and has of it.
    count = len(self.examples)
    taken = features.row_sizes(sizes, kind).values()
    self._sizes = np.stack([np.broadcast_to(size, count) for size in taken], axis=1)
    self._room = np.array([*features.row_lengths(lengths, kind).values()])

    # Blocks are packed when they are needed; two stay in memory.
    in_memory = self.examples.fingerprint is None
    self.blocks = 1 if in_memory else -(-count // BLOCK)
    self._block = functools.lru_cache(maxsize=2)(self._make_block)
    self._ids_by_place = functools.lru_cache(maxsize=2)(self._swap)   # a batch may span two epochs
    self._block_order = functools.lru_cache(maxsize=2)(self._make_block_order)
    self._row_order = functools.lru_cache(maxsize=2)(self._make_row_order)

    # The number of rows of each block needs all layouts, so a cache stores it.
    self._key = json.dumps([lengths, pack, kind, form, repr(self.objective), BLOCK])
    if self.blocks == 1:
      self._counts = np.array([len(self._block(0).layout)])
    else:
      count_rows = lambda: np.array([len(self._layout(b)) for b in range(self.blocks)])
      self._counts = self.examples.remember('rows', self._key, count_rows)
    self.count = int(self._counts.sum())

  def _check_examples(self, kind: str, form: str) -> None:
    """Checks that every feature has a length, and an encoder's examples what their form needs."""
    unlimited = sorted({'inputs', 'targets'} & set(self.examples.lengths) - set(self.lengths))
    if unlimited:
      raise UsageError(f'task {self.name!r} has the features {", ".join(unlimited)}, which have no '
                       f'length: set data.lengths.{unlimited[0]}')
    if kind != 'encoder':
      return
    suspects = range(len(self.examples))
    if form == 'classes':              # their lengths show it: only the first bad one is read
      suspects = np.flatnonzero(self.examples.lengths['targets'] != 1)[:1]
    for i in suspects:
      features.check_example(self.examples[i], f'example {self.name}:{i}', form)

  def _layout(self, b: int) -> list[np.ndarray]:
    """The places of the examples in each row of a block."""
    sizes = self._sizes[b::self.blocks]
    if not self._pack:
      return [np.array([i]) for i in range(len(sizes))]
    if self.blocks == 1:
      return features.pack(sizes, self._room)

    def make():                # as one array: the number of rows, their sizes, their places
      layout = features.pack(sizes, self._room)
      return np.concatenate([[len(layout)], [*map(len, layout)], *layout]).astype(np.int32)

    # Packing takes a second per block, so the layout is stored with the cache.
    stored = self.examples.remember(f'layout{b}', self._key, make)
    rows = int(stored[0])
    row_sizes, places = stored[1:rows + 1], stored[rows + 1:]
    return np.split(places, np.cumsum(row_sizes)[:-1])

  def _make_block(self, b: int) -> _Block:
    members = np.arange(b, len(self.examples), self.blocks)
    _, size_class = np.unique(self._sizes[members], axis=0, return_inverse=True)
    return _Block(self._layout(b), members, size_class.ravel())

  def _swap(self, b: int, epoch: int) -> np.ndarray:
    """int[n]: the example that takes the place of each member of a block, of equal size."""
    block = self._block(b)
    seed = [self.seed] if self.blocks == 1 else [self.seed, b]
    chance = np.random.default_rng([*seed, epoch]).random(len(block.members))
    swapped = np.empty(len(block.members), np.int64)
    swapped[np.argsort(block.size_class, kind='stable')] = block.members[
        np.lexsort((chance, block.size_class))]
    return swapped

  def _make_block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(the blocks in this epoch's order, the epoch's first row of each)."""
    order = np.random.default_rng([self.seed, epoch, self.blocks]).permutation(self.blocks)
    counts = self._counts[order]
    return order, np.cumsum(counts) - counts

  def _make_row_order(self, epoch: int, b: int) -> np.ndarray:
    return np.random.default_rng([self.seed, epoch, b, 1]).permutation(self._counts[b])

  def ids(self, epoch: int, i: int) -> list[int]:
    """The numbers of the examples in the epoch's row i."""
    b, row = 0, i                      # grain has shuffled the rows of a single block
    if self.blocks > 1:
      order, first_rows = self._block_order(epoch)
      position = int(np.searchsorted(first_rows, i, side='right')) - 1
      b = int(order[position])
      row = int(self._row_order(epoch, b)[i - first_rows[position]])
    return self._ids_by_place(b, epoch)[self._block(b).layout[row]].tolist()

  def uncut(self, epoch: int, i: int) -> Example:
    """Example i in this epoch, after its objective, before it is cut to the lengths."""
    return self._draw(epoch, i, self.examples[i])

  def example(self, epoch: int, i: int) -> Example:
    return self._trim(self.uncut(epoch, i))

  def _draw(self, epoch, i, stored):
    if self.objective is None:
      return stored
    return self.objective.apply(stored, np.random.default_rng([self.seed, epoch, i]))

  def _trim(self, example):
    trimmed, _ = features.trim(example, self.lengths, self._eos)
    return trimmed

  def build(self, places: Sequence[tuple[int, int]]) -> list[Row]:
    """Model features of each (epoch, row). All examples are read from a cache in one call."""
    ids = [self.ids(epoch, i) for epoch, i in places]
    stored = iter(self.examples.many([i for row in ids for i in row]))
    rows = []
    for (epoch, _), row in zip(places, ids):
      examples = [self._trim(self._draw(epoch, i, next(stored))) for i in row]
      rows.append(self._build_row(examples))
    return rows

  def row(self, epoch: int, i: int) -> Row:
    return self.build([(epoch, i)])[0]

  @functools.cached_property
  def fill(self) -> float:
    """Fraction of the slots that hold a token; with an objective, of about 64 rows of epoch 0."""
    if self.objective is None:
      return self._sizes.sum() / (self.count * self._room.sum())
    every = -(-self.count // 64)
    rows = self.build([(0, i) for i in range(0, self.count, every)])
    tokens = sum((row[name] > 0).sum() for row in rows for name in row
                 if name.endswith('segment_ids'))
    return tokens / (len(rows) * self._room.sum())


def _trimmed_sizes(stored, lengths) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """({feature: int[n] after trimming}, the numbers of the examples that are cut)."""
  limits = dict.fromkeys(stored, lengths['inputs']) if 'weights' in stored else lengths
  sizes = {name: np.minimum(size, limits[name]) for name, size in stored.items()}
  cut = np.any([stored[name] > sizes[name] for name in stored], axis=0)
  return sizes, np.flatnonzero(cut)


def _objective_sizes(objective, stored) -> dict[str, np.ndarray]:
  """Upper bounds of an objective's features, which it gives once for each distinct example size."""
  columns = np.stack(list(stored.values()), axis=1)
  distinct, which = np.unique(columns, axis=0, return_inverse=True)
  bounds = [objective.sizes(dict(zip(stored, combination))) for combination in distinct.tolist()]
  return {name: np.array([bound[name] for bound in bounds])[which.ravel()] for name in bounds[0]}


def form_of(component, kind: str) -> str:
  """The form of an encoder's examples; other kinds of model have only one."""
  if kind != 'encoder':
    return 'inputs'
  example = component.examples[0]
  if component.objective is not None:
    example = component.objective.apply(example, np.random.default_rng(0))
  return features.form_of(example)


class Pipeline:
  """Batches of several tasks, mixed by their rates (of examples, not of rows).

  components: name, rate, examples (dicts of int32 token arrays), objective or None, note (a line
  for `summary`, or ''). lengths: tokens of each feature, EOS included. batch_size: rows over all
  processes. kind: of model, one of features.KINDS. eos: the vocabulary's id; start_id: the
  decoder's first input token. rows: the numbers of the rows of every batch that this process
  builds; None: all.
  """

  def __init__(self, components: Sequence, lengths: dict[str, int], *, batch_size: int, seed: int,
               pack: bool = True, kind: str = 'encoder_decoder', eos: int = features.EOS,
               start_id: int = features.START, rows: Sequence[int] | None = None):
    lengths = {name: length for name, length in lengths.items() if length}
    self.batch_size, self.seed, self._lengths = batch_size, seed, lengths
    self._own_rows = list(range(batch_size) if rows is None else map(int, rows))

    # One batch has one form; forms whose head reads a row's first token are not packed.
    forms = {form_of(c, kind): c.name for c in components}
    if len(forms) > 1:
      raise UsageError('the tasks of a mixture must have the same form, got ' + ', '.join(
          f'{form!r} ({name})' for form, name in forms.items()))
    form, = forms
    pack = pack and form not in features.ALONE
    self.rows = [TaskRows(component, lengths, seed=seed + 7919 * i, pack=pack, kind=kind, form=form,
                          eos=eos, start_id=start_id) for i, component in enumerate(components)]

    # A rate counts examples, but the mixture draws rows: a task whose rows hold more examples is
    # drawn less often. Rates are rounded to 1e-4: grain turns them into small integers.
    order = [self._epochs(i, rows) for i, rows in enumerate(self.rows)]
    weights = [c.rate * rows.count / len(rows.examples) for c, rows in zip(components, self.rows)]
    relative = [round(weight / max(weights), 4) for weight in weights]
    self._order = grain.MapDataset.mix(order, relative) if len(order) > 1 else order[0]
    self._notes = [c.note for c in components]
    self.fingerprint = self._fingerprint(components, pack, kind, eos, start_id)

  def _epochs(self, component: int, rows: TaskRows):
    """Endless (component, epoch, row); every epoch is a new permutation of the rows."""
    dataset = grain.MapDataset.range(rows.count)
    if rows.blocks == 1:
      dataset = dataset.seed(self.seed + component).shuffle()
    place = lambda i, row: (component, i // rows.count, int(row))
    return dataset.repeat().map_with_index(place)

  def _fingerprint(self, components, pack, kind, eos, start_id) -> str:
    """SHA-256 of everything that batch(step) depends on, so that a resumed run notices a change."""
    digest = hashlib.sha256()
    for c, rows in zip(components, self.rows):
      digest.update(json.dumps([c.name, float(c.rate), repr(c.objective)]).encode())
      if rows.examples.fingerprint is not None:
        digest.update(f'{rows.examples.fingerprint} {BLOCK}'.encode())
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
    digest.update(json.dumps(layout, sort_keys=True).encode())
    return digest.hexdigest()

  def _places(self, step: int, rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """(component, epoch, row of the component) of rows of the batch of `step`."""
    return [self._order[step * self.batch_size + row] for row in rows]

  def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
    """This process's rows of the batch of `step`, or the given ones."""
    places = self._places(step, self._own_rows if rows is None else rows)
    built = {}
    for component in {component for component, _, _ in places}:
      needed = [(epoch, i) for c, epoch, i in places if c == component]
      built[component] = iter(self.rows[component].build(needed))
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
    return [[f'{self.rows[c].name}:{i}' for i in self.rows[c].ids(epoch, row)]
            for c, epoch, row in self._places(step, range(self.batch_size))]

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


def _stack(rows: list[Row]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
