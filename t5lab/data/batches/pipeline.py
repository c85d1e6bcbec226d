"""Task or Mixture -> numpy batches. batch(step) is a pure function of (seed, data, step).

Every example of a task stands exactly once in an epoch of that task. How rows are packed is decided
once (features.pack); each epoch deals the examples of equal size anew among the places, and
shuffles the rows. So nothing depends on what was read before, any step costs the same, and the
position of the stream is the number of the next step. Rows do not depend on how many processes read
them: each builds those of every batch that it is asked for.
"""

from collections.abc import Iterator, Sequence
import functools
import hashlib
import itertools
import json

import grain
import numpy as np

from t5lab.data.batches import features
from t5lab.errors import DataError, UsageError

# Threads share the GIL, so a second one only helps while numpy copies; one keeps up (see the
# input_wait column of metrics.jsonl) and leaves the cores to XLA.
PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


BLOCK = 2**16     # examples of a cache that are packed and shuffled together


class _Block:
  """Some examples of a component, packed: which rows there are, and who stands in them when."""

  def __init__(self, layout, kind, members, seed):
    self.layout = layout                               # int[…] for each row: places in members
    self.members = members                             # int[n]: their numbers in the component
    self._seed, self._kind = seed, kind                # kind int[n]: equal where the sizes are
    self._in_order = np.argsort(kind, kind='stable')
    self._dealt = functools.lru_cache(maxsize=2)(self._deal)   # a batch may span two epochs

  def _deal(self, epoch: int) -> np.ndarray:
    """int[n]: the example that this epoch puts where the layout has example i, of equal size."""
    chance = np.random.default_rng([*self._seed, epoch]).random(len(self._kind))
    dealt = np.empty(len(self._kind), np.int64)
    dealt[self._in_order] = np.lexsort((chance, self._kind))
    return dealt

  def ids(self, epoch: int, i: int) -> list[int]:
    return [int(x) for x in self.members[self._dealt(epoch)[self.layout[i]]]]


class _Rows:
  """The packed rows of one component, for any epoch. row(epoch, i) -> model features.

  Examples in memory are one block. A cache of more than BLOCK is cut into blocks, block b of n the
  examples b, b + n, …: only a block or two at a time are packed and in memory, and each is a sample
  of the whole. Every epoch goes through the blocks, and through each one's rows, in a new order.
  """

  def __init__(self, component, lengths, *, seed, pack, kind, form, eos, start):
    self.name, self.objective = component.name, component.objective
    self.examples, self.seed, self._eos, self._pack = component.examples, seed, eos, pack
    self.lengths = lengths
    self._build = functools.partial(features.build_row, lengths=lengths, kind=kind, form=form,
                                    eos=eos, start=start)
    found = lengths_of(self.examples)
    if self.objective is None and (unlimited := set(found) & {'inputs', 'targets'} - set(lengths)):
      raise UsageError(f'task {self.name!r} makes {", ".join(sorted(unlimited))}, which have no '
                       f'length: set data.lengths.{sorted(unlimited)[0]}')
    self.cut = np.zeros(0, np.int64)
    if self.objective is None:
      if kind == 'encoder':
        for i in self._strange(form, found):
          features.check_example(self.examples[i], f'example {self.name}:{i}', form)
      limits = dict.fromkeys(found, lengths['inputs']) if 'weights' in found else lengths
      kept = {name: np.minimum(found[name], limits[name]) for name in found}
      self.cut = np.flatnonzero(np.any([found[name] > kept[name] for name in found], axis=0))
    else:
      kept = {name: np.minimum(size, lengths.get(name, size))       # as trim will leave it
              for name, size in _objective_sizes(self.objective, found).items()}
    sizes = features.row_sizes(kept, kind)
    self._sizes = np.stack(np.broadcast_arrays(*sizes.values(), found[next(iter(found))])[:-1],
                           axis=1)
    self._room = np.array(list(features.row_lengths(lengths, kind).values()))
    count = len(self.examples)
    memory = not hasattr(self.examples, 'fingerprint')
    self.blocks = 1 if memory else -(-count // BLOCK)
    self._block = functools.lru_cache(maxsize=2)(self._make_block)
    self._order = functools.lru_cache(maxsize=2)(self._block_order)
    self._within = functools.lru_cache(maxsize=2)(self._row_order)
    self._key = json.dumps([lengths, pack, kind, form, repr(self.objective), BLOCK])
    self._counts = np.array([len(self._block(0).layout)]) if self.blocks == 1 else (
        self.examples.remember('rows', self._key, lambda: np.array(
            [len(self._layout(b)) for b in range(self.blocks)])))
    self.count = int(self._counts.sum())

  @functools.cached_property
  def fill(self) -> float:
    """Share of the slots that hold a token; of an objective's rows, of some 64 of the first epoch.
    """
    if self.objective is None:
      return self._sizes.sum() / (self.count * self._room.sum())
    some = self.build([(0, i) for i in range(0, self.count, -(-self.count // 64))])
    full = sum((x > 0).sum() for row in some for name, x in row.items()
               if name.endswith('segment_ids'))
    return full / (len(some) * self._room.sum())

  def _strange(self, form, found):
    """The examples that features.check_example has to see: of classes, the first that is none."""
    if form == 'classes':
      return np.flatnonzero(found['targets'] != 1)[:1]
    return range(len(self.examples))

  def _layout(self, b: int) -> list[np.ndarray]:
    """For each row of a block, the places of its examples. Packing takes a second a block, so the
    folder of a cache keeps it."""
    sizes = self._sizes[b::self.blocks]
    if not self._pack:
      return [np.array([i]) for i in range(len(sizes))]
    if self.blocks == 1:
      return features.pack(sizes, self._room)

    def make():
      layout = features.pack(sizes, self._room)
      return np.concatenate([[len(layout)], list(map(len, layout)), *layout]).astype(np.int32)
    kept = self.examples.remember(f'layout{b}', self._key, make)
    rows = int(kept[0])
    return np.split(kept[rows + 1:], np.cumsum(kept[1:rows + 1])[:-1])

  def _make_block(self, b: int) -> _Block:
    members = np.arange(b, len(self.examples), self.blocks)
    kind = np.unique(self._sizes[members], axis=0, return_inverse=True)[1].ravel()
    seed = [self.seed] if self.blocks == 1 else [self.seed, b]
    return _Block(self._layout(b), kind, members, seed)

  def _block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(blocks in this epoch's order, the epoch's first row of each)."""
    order = np.random.default_rng([self.seed, epoch, self.blocks]).permutation(self.blocks)
    return order, np.cumsum(self._counts[order]) - self._counts[order]

  def _row_order(self, epoch: int, b: int) -> np.ndarray:
    return np.random.default_rng([self.seed, epoch, b, 1]).permutation(self._counts[b])

  def ids(self, epoch: int, i: int) -> list[int]:
    """The examples of the epoch's row i, which grain has shuffled if there is one block."""
    if self.blocks == 1:
      return self._block(0).ids(epoch, i)
    order, starts = self._order(epoch)
    at = int(np.searchsorted(starts, i, side='right')) - 1
    b = int(order[at])
    return self._block(b).ids(epoch, int(self._within(epoch, b)[i - starts[at]]))

  def uncut(self, epoch: int, i: int) -> dict[str, np.ndarray]:
    """Example i as this epoch has it: what its objective draws, not yet cut to the lengths."""
    return self._drawn(epoch, i, self.examples[i])

  def example(self, epoch: int, i: int) -> dict[str, np.ndarray]:
    return self._trim(self.uncut(epoch, i))

  def _drawn(self, epoch, i, stored):
    if self.objective is None:
      return stored
    return self.objective.apply(stored, np.random.default_rng([self.seed, epoch, i]))

  def _trim(self, example):
    return features.trim(example, self.lengths, self._eos)[0]

  def build(self, places: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
    """Model features of each (epoch, row). A cache reads their examples in one go."""
    ids = [self.ids(*place) for place in places]
    wanted = [i for row in ids for i in row]
    read = getattr(self.examples, 'many', lambda wanted: [self.examples[i] for i in wanted])
    stored = iter(read(wanted))
    return [self._build([self._trim(self._drawn(epoch, i, next(stored))) for i in row])
            for (epoch, _), row in zip(places, ids)]

  def row(self, epoch: int, i: int) -> dict[str, np.ndarray]:
    return self.build([(epoch, i)])[0]


def lengths_of(examples: Sequence) -> dict[str, np.ndarray]:
  """{feature: int[n]}, of examples in memory or of a cache, which knows."""
  if hasattr(examples, 'lengths'):
    return examples.lengths
  return {name: np.array([len(example[name]) for example in examples]) for name in examples[0]}


def _objective_sizes(objective, lengths) -> dict[str, np.ndarray]:
  """Upper bounds of each feature of all examples, asked once for each combination of lengths."""
  table, inverse = np.unique(np.stack(list(lengths.values()), axis=1), axis=0, return_inverse=True)
  made = [objective.sizes(dict(zip(lengths, map(int, row)))) for row in table]
  return {name: np.array([size[name] for size in made])[inverse.ravel()] for name in made[0]}


def form_of(component, kind: str) -> str:
  """The form of an encoder's examples; other kinds have one only."""
  if kind != 'encoder':
    return 'inputs'
  example = component.examples[0]
  if component.objective is not None:
    example = component.objective.apply(example, np.random.default_rng(0))
  return features.form_of(example)


class Pipeline:
  """Batches of a list of tasks.Component, mixed by their rates (of examples, not of rows).

  components: name, rate, examples (dicts of int32 token arrays), objective or None.
  lengths: tokens of each feature, EOS included. batch_size: rows over all processes. kind: of
  model, one of features.KINDS. eos: the vocabulary's; start: the decoder's first input token. rows:
  those of every batch that this process builds, by number; None: all.
  """

  def __init__(self, components: Sequence, lengths: dict[str, int], *, batch_size: int, seed: int,
               pack: bool = True, kind: str = 'encoder_decoder', eos: int = features.EOS,
               start: int = features.BOS, rows: Sequence[int] | None = None):
    lengths = {k: v for k, v in lengths.items() if v}
    self.batch_size, self.seed, self._lengths = batch_size, seed, lengths
    self._mine = list(range(batch_size) if rows is None else map(int, rows))
    forms = {form_of(c, kind): c.name for c in components}
    if len(forms) > 1:
      raise UsageError('the tasks of this mixture make different rows: ' + ', '.join(
          f'{name} is of the form {form!r}' for form, name in forms.items()))
    form, = forms
    pack = pack and form not in features.ALONE
    self.rows = [_Rows(c, lengths, seed=seed + 7919 * i, pack=pack, kind=kind, form=form, eos=eos,
                       start=start) for i, c in enumerate(components)]
    order = [self._epochs(i, r) for i, r in enumerate(self.rows)]
    # A rate counts examples, the mixture draws rows: a task whose rows hold more examples is drawn
    # less often. Rates are kept to 1e-4 of each other: grain turns them into small integers.
    weights = [c.rate * r.count / len(r.examples) for c, r in zip(components, self.rows)]
    self._order = order[0] if len(order) == 1 else grain.MapDataset.mix(
        order, [round(w / max(weights), 4) for w in weights])
    self._notes = [getattr(c, 'note', '') for c in components]
    self.fingerprint = self._fingerprint(components, pack, kind, eos, start)

  def _epochs(self, component: int, rows: _Rows):
    """Endless (component, epoch, row): each epoch a fresh permutation of the rows."""
    dataset = grain.MapDataset.range(rows.count)
    if rows.blocks == 1:
      dataset = dataset.seed(self.seed + component).shuffle()
    return dataset.repeat().map_with_index(lambda i, row: (component, i // rows.count, int(row)))

  def _fingerprint(self, components, pack, kind, eos, start) -> str:
    """SHA-256 of everything that batch(step) depends on, so that a resumed run can tell."""
    digest = hashlib.sha256()
    for c in components:
      digest.update(json.dumps([c.name, float(c.rate), repr(c.objective)]).encode())
      if known := getattr(c.examples, 'fingerprint', ''):
        digest.update(f'{known} {BLOCK}'.encode())
        continue
      for example in c.examples:
        if c.objective is None:
          example, _ = features.trim(example, self._lengths, eos)
        for name in sorted(example):
          digest.update(f'{name} {len(example[name])} '.encode())
          digest.update(np.ascontiguousarray(example[name], np.int32))
    layout = [self._lengths, self.batch_size, self.seed, pack, kind == 'decoder']
    if kind == 'encoder' or (eos, start) != (features.EOS, features.BOS):
      layout += [kind, eos, start]      # T5's print as they did, so that older runs go on
    digest.update(json.dumps(layout, sort_keys=True).encode())
    return digest.hexdigest()

  def _places(self, step: int, rows: Sequence[int]):
    return [self._order[step * self.batch_size + row] for row in rows]

  def batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """This process's rows of the batch of `step`, or these: int32[rows, length] a model feature."""
    places = self._places(step, self._mine if rows is None else rows)
    made = {c: iter(self.rows[c].build([place for k, *place in places if k == c]))
            for c in {c for c, _, _ in places}}
    rows = [next(made[c]) for c, _, _ in places]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}

  def epoch(self) -> Iterator[dict[str, np.ndarray]]:
    """Each row of each task once, in a fixed order, for evaluation: all of it in every process.

    The last batch is filled with empty rows, which carry no loss.
    """
    places = ((r, i) for r in self.rows for i in range(r.count))
    while part := list(itertools.islice(places, self.batch_size)):
      rows = [r.row(0, i) for r, i in part]
      empty = {name: np.zeros_like(x) for name, x in rows[0].items()}
      rows += [empty] * (self.batch_size - len(rows))
      yield {name: np.stack([r[name] for r in rows]) for name in empty}

  def example_ids(self, step: int) -> list[str]:
    """What the whole batch of `step` was made of, as 'task:index', for reports."""
    return [i for row in self.row_ids(step) for i in row]

  def row_ids(self, step: int) -> list[list[str]]:
    """`example_ids` row by row."""
    return [[f'{self.rows[c].name}:{i}' for i in self.rows[c].ids(epoch, r)]
            for c, epoch, r in self._places(step, range(self.batch_size))]

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
    for r, note in zip(self.rows, self._notes):
      lines += [note] if note else []
      line = (f'{r.name}: {len(r.examples):,} examples in {r.count:,} rows an epoch, '
              f'{r.fill:.0%} of the slots filled')
      if len(r.cut):
        first = ', '.join(f'{r.name}:{i}' for i in r.cut[:3])
        limit = ', '.join(f'{k} {v}' for k, v in self._lengths.items())
        line += f'; {len(r.cut):,} longer than the limit ({limit}) were cut, EOS kept: {first}'
        line += ', …' * (len(r.cut) > 3)
      lines.append(line)
    return lines
