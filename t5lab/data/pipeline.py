"""Task or Mixture -> numpy batches. batch(step) is a pure function of (seed, data, step).

Every example of a task stands exactly once in an epoch of that task. How rows are packed is decided
once (features.pack); each epoch deals the examples of equal size anew among the places, and
shuffles the rows. So nothing depends on what was read before, any step costs the same, and the
position of the stream is the number of the next step. Rows do not depend on how many processes read
them: process i of n builds the i-th n-th of every batch.
"""

from collections.abc import Iterator, Sequence
import functools
import hashlib
import json

import grain
import numpy as np

from t5lab.data import features
from t5lab.errors import DataError, UsageError

# Threads share the GIL, so a second one only helps while numpy copies; one keeps up (see the
# input_wait column of metrics.jsonl) and leaves the cores to XLA.
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


class _Rows:
  """The packed rows of one component, for any epoch. row(epoch, i) -> model features."""

  def __init__(self, component, lengths, *, seed, pack, kind, eos, start):
    self.name, self.objective = component.name, component.objective
    self.lengths, self.seed, self._eos = lengths, seed, eos
    self._build = functools.partial(features.build_row, lengths=lengths, kind=kind, eos=eos,
                                    start=start)
    self.examples, self.tokens, self.cut = [], 0, []
    sizes = []
    for i, example in enumerate(component.examples):
      if self.objective is None:
        if kind == 'encoder' and 'targets' in lengths:
          features.check_class(example, f'example {self.name}:{i}')
        example, lost = features.trim(example, lengths, eos)
        if lost:
          self.cut.append(i)
        size = {name: len(tokens) for name, tokens in example.items()}
      else:
        size = self.objective.sizes(example)
      self.examples.append(example)
      sizes.append(list(features.row_sizes(size, kind).values()))
    sizes = np.array(sizes)
    room = np.array(list(features.row_lengths(lengths, kind).values()))
    self.layout = features.pack(sizes, room) if pack else [
        np.array([i]) for i in range(len(sizes))]
    self.fill = sizes.sum() / (len(self.layout) * room.sum())
    self._kind = np.unique(sizes, axis=0, return_inverse=True)[1].ravel()
    self._in_order = np.argsort(self._kind, kind='stable')
    self._dealt = functools.lru_cache(maxsize=2)(self._deal)   # a batch may span two epochs

  def _deal(self, epoch: int) -> np.ndarray:
    """int[n]: the example that this epoch puts where the layout has example i, of equal size."""
    chance = np.random.default_rng([self.seed, epoch]).random(len(self.examples))
    dealt = np.empty(len(self.examples), np.int64)
    dealt[self._in_order] = np.lexsort((chance, self._kind))
    return dealt

  def ids(self, epoch: int, i: int) -> list[int]:
    return [int(x) for x in self._dealt(epoch)[self.layout[i]]]

  def row(self, epoch: int, i: int) -> dict[str, np.ndarray]:
    out = []
    for example_id in self.ids(epoch, i):
      example = self.examples[example_id]
      if self.objective is not None:
        rng = np.random.default_rng([self.seed, epoch, example_id])
        example = self.objective.apply(example, rng)
        example, _ = features.trim(example, self.lengths, self._eos)
      out.append(example)
    return self._build(out)


class Pipeline:
  """Batches of a list of tasks.Component, mixed by their rates (of examples, not of rows).

  components: name, rate, examples (dicts of int32 token arrays), objective or None.
  lengths: tokens of each feature, EOS included. batch_size: rows over all processes. kind: of
  model, one of features.KINDS; decoder_only is the older way to say 'decoder'. eos: the
  vocabulary's; start: the decoder's first input token.
  """

  def __init__(self, components: Sequence, lengths: dict[str, int], *, batch_size: int, seed: int,
               pack: bool = True, kind: str | None = None, decoder_only: bool = False,
               eos: int = features.EOS, start: int = features.BOS, process_index: int = 0,
               process_count: int = 1):
    if batch_size % process_count:
      raise UsageError(f'data.batch_size={batch_size} is not a multiple of the {process_count} '
                       'processes')
    lengths = {k: v for k, v in lengths.items() if v}
    self.batch_size, self.seed, self._lengths = batch_size, seed, lengths
    self._local = batch_size // process_count
    self._first = process_index * self._local
    kind = features.kind_of(kind, decoder_only)
    pack = pack and not (kind == 'encoder' and 'targets' in lengths)     # a row has one class
    self.rows = [_Rows(c, lengths, seed=seed + 7919 * i, pack=pack, kind=kind, eos=eos, start=start)
                 for i, c in enumerate(components)]
    order = [self._epochs(i, len(r.layout)) for i, r in enumerate(self.rows)]
    # A rate counts examples, the mixture draws rows: a task whose rows hold more examples is drawn
    # less often. Rates are kept to 1e-4 of each other: grain turns them into small integers.
    weights = [c.rate * len(r.layout) / len(r.examples) for c, r in zip(components, self.rows)]
    self._order = order[0] if len(order) == 1 else grain.MapDataset.mix(
        order, [round(w / max(weights), 4) for w in weights])
    self.fingerprint = self._fingerprint(components, pack, kind, eos, start)

  def _epochs(self, component: int, rows: int):
    """Endless (component, epoch, row): each epoch a fresh permutation of the rows."""
    dataset = grain.MapDataset.range(rows).seed(self.seed + component).shuffle().repeat()
    return dataset.map_with_index(lambda i, row: (component, i // rows, int(row)))

  def _fingerprint(self, components, pack, kind, eos, start) -> str:
    """SHA-256 of everything that batch(step) depends on, so that a resumed run can tell."""
    digest = hashlib.sha256()
    for c, rows in zip(components, self.rows):
      digest.update(json.dumps([c.name, float(c.rate), repr(c.objective)]).encode())
      for example in rows.examples:
        for name in sorted(example):
          digest.update(f'{name} {len(example[name])} '.encode())
          digest.update(np.ascontiguousarray(example[name], np.int32))
    layout = [self._lengths, self.batch_size, self.seed, pack, kind == 'decoder']
    if kind == 'encoder' or (eos, start) != (features.EOS, features.BOS):
      layout += [kind, eos, start]      # T5's print as they did, so that older runs go on
    digest.update(json.dumps(layout, sort_keys=True).encode())
    return digest.hexdigest()

  def _places(self, step: int, first: int, count: int):
    start = step * self.batch_size + first
    return [self._order[i] for i in range(start, start + count)]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows of the batch of `step`: int32[rows, length] for each model feature."""
    rows = [self.rows[c].row(epoch, r) for c, epoch, r in
            self._places(step, self._first, self._local)]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}

  def epoch(self) -> Iterator[dict[str, np.ndarray]]:
    """Each row of each task once, in a fixed order, for evaluation: all of it in every process.

    The last batch is filled with empty rows, which carry no loss.
    """
    places = [(r, i) for r in self.rows for i in range(len(r.layout))]
    for first in range(0, len(places), self.batch_size):
      rows = [r.row(0, i) for r, i in places[first:first + self.batch_size]]
      empty = {name: np.zeros_like(x) for name, x in rows[0].items()}
      rows += [empty] * (self.batch_size - len(rows))
      yield {name: np.stack([r[name] for r in rows]) for name in empty}

  def example_ids(self, step: int) -> list[str]:
    """What the whole batch of `step` was made of, as 'task:index', for reports."""
    return [f'{self.rows[c].name}:{i}' for c, epoch, r in self._places(step, 0, self.batch_size)
            for i in self.rows[c].ids(epoch, r)]

  def iterate(self, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """batch(start) … batch(stop - 1), made ahead of use by a thread."""
    batches = grain.MapDataset.range(start, stop).map(lambda step: self.batch(int(step)))
    return iter(batches.to_iter_dataset(PREFETCH))

  def position(self, step: int) -> dict:
    """Where the stream stands before `step`: all that a checkpoint has to hold of it."""
    return {'step': step, 'fingerprint': self.fingerprint}

  def check_position(self, position: dict) -> None:
    """DataError if a saved position belongs to other data or another layout of it."""
    if position['fingerprint'] != self.fingerprint:
      raise DataError(
          f'the data changed since step {position["step"]} was saved (fingerprint '
          f'{position["fingerprint"][:12]}, now {self.fingerprint[:12]}): restore the files, the '
          'vocabulary, data.lengths and data.batch_size, or pass --allow-data-change to go on')

  def summary(self) -> list[str]:
    """A line for each task: examples, rows, fill, and how many were cut to the length limit."""
    lines = []
    for r in self.rows:
      line = (f'{r.name}: {len(r.examples):,} examples in {len(r.layout):,} rows an epoch, '
              f'{r.fill:.0%} of the slots filled')
      if r.cut:
        first = ', '.join(f'{r.name}:{i}' for i in r.cut[:3])
        limit = ', '.join(f'{k} {v}' for k, v in self._lengths.items())
        line += f'; {len(r.cut)} longer than the limit ({limit}) were cut, EOS kept: {first}, …'
      lines.append(line)
    return lines
