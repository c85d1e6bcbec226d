"""The packed rows of one task: which examples are in which row, in any epoch.

An epoch of a task holds each of its examples exactly once. The layout of its packed rows is
computed once (features.pack). Each epoch swaps examples of equal size between the rows, and
shuffles the rows, so a row is a pure function of (seed, data, epoch, row).
"""

from collections.abc import Sequence
import functools
import itertools
import json
import math
from typing import NamedTuple

import numpy as np

from t5lab.data.batches import features
from t5lab.data.batches.examples import Example, Examples
from t5lab.data.batches.features import Row
from t5lab.errors import UsageError

BLOCK = 2**16     # examples of a cache that are packed and shuffled together


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

  def __init__(self, component, lengths, *, seed, pack, kind, form, eos, second_type,
               start_id):
    self.name = component.name
    self.objective = component.objective
    examples = component.examples
    self.examples = examples if isinstance(examples, Examples) else Examples(examples)
    self.lengths = lengths
    self.seed = seed
    self._pack = pack
    self._eos = eos
    self._build_row = functools.partial(
        features.build_row, lengths=lengths, kind=kind, form=form,
        eos=eos if second_type else -1, start_id=start_id)

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
    taken = features.row_sizes(sizes, kind)
    columns = [np.broadcast_to(size, count) for size in taken.values()]
    self._sizes = np.stack(columns, axis=1)
    self._room = np.array(list(features.row_lengths(lengths, kind).values()))

    # Blocks are packed when they are needed; two stay in memory.
    in_memory = self.examples.fingerprint is None
    self.blocks = 1 if in_memory else math.ceil(count / BLOCK)
    self._block = functools.lru_cache(maxsize=2)(self._make_block)
    self._ids_by_place = functools.lru_cache(maxsize=2)(self._swap)   # a batch may span two epochs
    self._block_order = functools.lru_cache(maxsize=2)(self._make_block_order)
    self._row_order = functools.lru_cache(maxsize=2)(self._make_row_order)

    # The number of rows of each block needs all layouts, so a cache stores it.
    self._key = json.dumps([lengths, pack, kind, form, repr(self.objective), BLOCK])
    if self.blocks == 1:
      self._counts = np.array([len(self._block(0).layout)])
    else:
      self._counts = self.examples.remember('rows', self._key, self._count_rows)
    self.count = int(self._counts.sum())

  def _count_rows(self) -> np.ndarray:
    return np.array([len(self._layout(b)) for b in range(self.blocks)])

  def _check_examples(self, kind: str, form: str) -> None:
    """Checks that every feature has a length, and an encoder's examples what their form needs."""
    present = {'inputs', 'targets'} & set(self.examples.lengths)
    unlimited = sorted(present - set(self.lengths))
    if unlimited:
      raise UsageError(f'task {self.name!r} has the features {", ".join(unlimited)}, which have no '
                       f'length: set data.lengths.{unlimited[0]}')
    if kind != 'encoder':
      return
    suspects = range(len(self.examples))
    if form == 'classes':              # their lengths show it: only the first bad one is read
      has_one_label = self.examples.lengths['targets'] == 1
      suspects = np.flatnonzero(~has_one_label)[:1]
    for i in suspects:
      features.check_example(self.examples[i], f'example {self.name}:{i}', form)

  def _layout(self, b: int) -> list[np.ndarray]:
    """The places of the examples in each row of a block."""
    sizes = self._sizes[b::self.blocks]
    if not self._pack:
      return [np.array([i]) for i in range(len(sizes))]
    if self.blocks == 1:
      return features.pack(sizes, self._room)

    # Packing takes a second per block, so the layout is stored with the cache, as one array: the
    # number of rows, the size of each, their places.
    def make():
      layout = features.pack(sizes, self._room)
      row_sizes = [len(row) for row in layout]
      return np.concatenate([[len(layout)], row_sizes, *layout]).astype(np.int32)

    stored = self.examples.remember(f'layout{b}', self._key, make)
    rows = int(stored[0])
    row_sizes = stored[1:rows + 1]
    places = stored[rows + 1:]
    return np.split(places, np.cumsum(row_sizes)[:-1])

  def _make_block(self, b: int) -> _Block:
    members = np.arange(b, len(self.examples), self.blocks)
    _, size_class = np.unique(self._sizes[members], axis=0, return_inverse=True)
    return _Block(self._layout(b), members, size_class.ravel())

  def _swap(self, b: int, epoch: int) -> np.ndarray:
    """int[n]: the example that takes the place of each member of a block, of equal size."""
    block = self._block(b)
    n = len(block.members)
    seed = [self.seed] if self.blocks == 1 else [self.seed, b]
    chance = np.random.default_rng([*seed, epoch]).random(n)

    # Within each size class, members in a random order take the places of members in order.
    places = np.argsort(block.size_class, kind='stable')
    shuffled = np.lexsort((chance, block.size_class))
    swapped = np.empty(n, np.int64)
    swapped[places] = block.members[shuffled]
    return swapped

  def _make_block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(the blocks in this epoch's order, the epoch's first row of each)."""
    stream = np.random.default_rng([self.seed, epoch, self.blocks])
    order = stream.permutation(self.blocks)
    counts = self._counts[order]
    return order, np.cumsum(counts) - counts

  def _make_row_order(self, epoch: int, b: int) -> np.ndarray:
    stream = np.random.default_rng([self.seed, epoch, b, 1])
    return stream.permutation(self._counts[b])

  def ids(self, epoch: int, i: int) -> list[int]:
    """The numbers of the examples in the epoch's row i."""
    b, row = 0, i                      # grain has shuffled the rows of a single block
    if self.blocks > 1:
      order, first_rows = self._block_order(epoch)
      position = int(np.searchsorted(first_rows, i, side='right')) - 1
      b = int(order[position])
      row = int(self._row_order(epoch, b)[i - first_rows[position]])
    places = self._block(b).layout[row]
    return self._ids_by_place(b, epoch)[places].tolist()

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
    stored = iter(self.examples.many(list(itertools.chain(*ids))))
    rows = []
    for (epoch, _), row_ids in zip(places, ids):
      drawn = [self._draw(epoch, i, next(stored)) for i in row_ids]
      rows.append(self._build_row([self._trim(example) for example in drawn]))
    return rows

  def row(self, epoch: int, i: int) -> Row:
    return self.build([(epoch, i)])[0]

  @functools.cached_property
  def fill(self) -> float:
    """Fraction of the slots that hold a token; with an objective, of about 64 rows of epoch 0."""
    if self.objective is None:
      return self._sizes.sum() / (self.count * self._room.sum())
    every = math.ceil(self.count / 64)
    rows = self.build([(0, i) for i in range(0, self.count, every)])
    tokens = 0
    for row in rows:
      tokens += sum((x > 0).sum() for name, x in row.items() if name.endswith('segment_ids'))
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
  bounds = [objective.sizes(dict(zip(stored, sizes))) for sizes in distinct.tolist()]
  column = lambda name: np.array([bound[name] for bound in bounds])
  return {name: column(name)[which.ravel()] for name in bounds[0]}


def form_of(component, kind: str) -> str:
  """The form of an encoder's examples; other kinds of model have only one."""
  if kind != 'encoder':
    return 'inputs'
  example = component.examples[0]
  if component.objective is not None:
    example = component.objective.apply(example, np.random.default_rng(0))
  return features.form_of(example)
