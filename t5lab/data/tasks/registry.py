"""The seqio registry, and reading it: importing this module registers t5lab's Tasks and Mixtures.

The vocabulary is an option of a run, so `register(spec)` puts the same names on another vocabulary.
`open_components(name, …)` is how the pipeline reads a Task or Mixture, ours or any other: as numpy
examples, made by the task's own source and preprocessors, in memory or in a cache on disk.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import importlib
import os
import sys

import numpy as np

from t5lab.data import vocab
from t5lab.data.batches import cache
from t5lab.data.sources.base import RecordSource
from t5lab.data.sources.tfds import splits
from t5lab.data.tasks import embedded as embedded_tasks
from t5lab.data.tasks import files as file_tasks
from t5lab.data.tasks import hub as hub_files
from t5lab.data.tasks import identity as task_identity
from t5lab.data.tasks import own_files, paper_mixtures
from t5lab.data.tasks import papers as paper_tasks
from t5lab.data.tasks.parts import ROWS_A_CALL, trims
from t5lab.data.tasks.seqio_tf import NumpyObjective, seqio, tf
from t5lab.errors import DataError, Failure, UsageError, did_you_mean

OURS = (*embedded_tasks.NAMES, *paper_tasks.NAMES, *hub_files.NAMES)
_registered: tuple = ()


def register(spec: str = vocab.DEFAULT, files: own_files.OwnFiles | None = None,
             modules: Sequence[str] = ()) -> None:
  """Puts the tasks on the vocabulary `spec`, replacing those on another one. Idempotent.

  files: a person's own files, as the task 'files'. modules: names of modules of theirs that
  register seqio Tasks, imported with the current folder on the path.
  """
  global _registered
  for module in modules:
    _import(module)
  if (spec, files) == _registered:
    return
  vocab.load(spec)
  for name in (*OURS, own_files.NAME):
    seqio.TaskRegistry.remove(name)
  embedded_tasks.register(spec)
  paper_tasks.register(spec)
  hub_files.register(spec)
  if files:
    file_tasks.add(spec, files)
  if not _registered:
    embedded_tasks.register_mixtures()
    paper_mixtures.register_mixtures()
  else:
    _rebuild_mixtures()
  _registered = spec, files


def _import(module: str) -> None:
  if '' not in sys.path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    importlib.import_module(module)
  except Failure:
    raise
  except Exception as e:
    raise UsageError(f'data.modules: cannot import {module!r} from here ({os.getcwd()}): '
                     f'{type(e).__name__}: {e}') from e


def _rebuild_mixtures():
  """A seqio Mixture holds the Task objects that it was made with: make those of our tasks anew."""
  stale = {*OURS, own_files.NAME}
  for name in list(seqio.MixtureRegistry.names()):
    mixture = seqio.MixtureRegistry.get(name)
    if stale & {task.name for task in mixture.tasks}:
      seqio.MixtureRegistry.remove(name)
      seqio.MixtureRegistry.add(name, list(mixture.rate_per_task_name.items()),
                                sample_fn=mixture._sample_fn)


# Reading


@dataclasses.dataclass(frozen=True)
class Component:
  """One task of a mixture. examples: dicts of int32[length], untrimmed; rate: relative weight;
  note: what is to be said of how they were read."""
  name: str
  rate: float
  examples: Sequence[dict[str, np.ndarray]]
  objective: NumpyObjective | None
  note: str = ''


def get(name: str):
  """The seqio Task or Mixture of this name; UsageError with the nearest names if there is none."""
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in known:
    raise UsageError(f'no task or mixture {name!r}.{did_you_mean(name, known)}')
  return seqio.get_mixture_or_task(name)


def _arrays(column) -> list[np.ndarray]:
  """A batch of a feature -> int[length] of each row; one of a fixed length is not ragged."""
  if not isinstance(column, tf.RaggedTensor):
    return list(column.numpy())
  return np.split(column.flat_values.numpy(), column.row_splits.numpy()[1:-1])


def check(task, vocabulary) -> None:
  """UsageError for a task that the pipeline cannot read, or that is on another vocabulary."""
  for name, feature in task.output_features.items():
    if feature.rank != 1:
      raise UsageError(f'task {task.name!r}: feature {name!r} has rank {feature.rank}, not 1')
    if (not isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        and feature.vocabulary.vocab_size > vocabulary.size):
      raise UsageError(
          f'task {task.name!r} has its own vocabulary of {feature.vocabulary.vocab_size} ids for '
          f'{name!r}, data.vocab={vocabulary.spec!r} has {vocabulary.size}: use the same one')
  at = [i for i, p in enumerate(task.preprocessors) if isinstance(p, NumpyObjective)]
  if at and at != [len(task.preprocessors) - 1]:
    raise UsageError(f'task {task.name!r}: a NumpyObjective must be the last preprocessor, once')


def objective(task) -> NumpyObjective | None:
  last = task.preprocessors[-1:]
  return last[0] if last and isinstance(last[0], NumpyObjective) else None


def stored_features(task) -> tuple[str, ...]:
  """Features of an example before the objective, which draws anew each epoch."""
  found = objective(task)
  return found.wants if found else tuple(task.output_features)


def stream(task, split: str, lengths: dict[str, int], ids: int, shard: tuple[int, int] = (0, 1),
           by_seqio: str = '') -> Iterator[dict[str, np.ndarray]]:
  """The task's examples, {feature: int32[length]}, untrimmed and before its objective.

  ids: as many as the vocabulary has. shard: (k, n): of the source's rows the k-th, the k+n-th, ….
  by_seqio: a folder with what seqio's own caching made of the source. Holds ROWS_A_CALL rows at a
  time. DataError for an id that is none, which an embedding would clamp without a word.
  """
  preprocessors = [p for p in task.preprocessors if not isinstance(p, NumpyObjective)]
  at = [i for i, p in enumerate(preprocessors) if isinstance(p, seqio.CacheDatasetPlaceholder)]
  if by_seqio and not at:
    raise UsageError(f'task {task.name!r} has no CacheDatasetPlaceholder, so {by_seqio} is not of '
                     'this task')
  wanted = stored_features(task)
  with seqio.utils.map_seed_manager(0):  # a user's random preprocessor draws once, the same always
    if by_seqio:
      dataset = seqio.dataset_providers._CachedDataSource(by_seqio, split).get_dataset(
          split=split, shuffle=False)
      preprocessors = preprocessors[at[0]:]
    else:
      dataset = _rows(task, split, shard)
    for preprocessor in preprocessors:
      if isinstance(preprocessor, seqio.CacheDatasetPlaceholder):
        continue
      dataset = seqio.utils.add_kwargs_to_transform(
          preprocessor, sequence_length=None if trims(preprocessor) else lengths,
          output_features=task.output_features)(dataset)
    dataset = dataset.map(lambda row: {name: row[name] for name in wanted if name in row})
    count = 0
    try:
      # Ragged batches, since crossing from TensorFlow to numpy costs 0.2 ms each time.
      for rows in dataset.ragged_batch(ROWS_A_CALL):
        columns = {name: _arrays(column) for name, column in rows.items()}
        for name, feature in task.output_features.items():
          if name in columns:
            _check_ids(task, name, columns[name], min(ids, feature.vocabulary.vocab_size), count)
        yield from ({name: x.astype(np.int32, copy=False) for name, x in zip(columns, row)}
                    for row in zip(*columns.values()))
        count += len(next(iter(columns.values())))
    except tf.errors.OpError as e:
      if isinstance(task.source, RecordSource) and task.source.failure:
        raise task.source.failure from e
      raise DataError(
          f'task {task.name!r}, split {split!r}: {str(e).strip().splitlines()[-1][:300]}') from e


def _check_ids(task, name, column, size, first):
  found = np.concatenate(column)
  if len(found) and not 0 <= found.min() <= found.max() < size:
    i = next(i for i, x in enumerate(column) if len(x) and not 0 <= x.min() <= x.max() < size)
    wrong = column[i][(column[i] < 0) | (column[i] >= size)][0]
    raise DataError(f'task {task.name!r}, example {first + i}: {name} holds the id {wrong}; the '
                    f'ids of its vocabulary are 0 to {size - 1}')


def reader(task, split: str):
  """The records.RecordReader that read a person's own files last; None for other tasks."""
  return task.source.readers.get(split) if isinstance(task.source, RecordSource) else None


def note(task, split: str, read=None) -> str:
  """What is to be said of the rows that `read`, or else the last reader, read: those that were bad.
  """
  read = read or reader(task, split)
  reported = read and read.bad and task.source.reports_bad_records
  return f'{task.name}, {split}: {read.summary()}' if reported else ''


def _rows(task, split, shard):
  k, n = shard
  if isinstance(task.source, RecordSource):        # parses only the records of this shard
    return task.source.shard(split, k, n)
  dataset = task.source.get_dataset(split=split, shuffle=False)
  return dataset.shard(n, k) if n > 1 else dataset


def open_components(name: str, split: str, lengths: dict[str, int],
                    vocab_spec: str = vocab.DEFAULT, *, files: own_files.OwnFiles | None = None,
                    modules: Sequence[str] = (), cached: str = '',
                    mixing: 'Mixing | None' = None) -> list[Component]:
  """The tasks behind a Task or Mixture name, or several names with commas between them.

  lengths: tokens of each feature; text is cut into segments to fill them, all else is left whole.
  files, modules: as register's. cached: a folder that holds their examples, which `t5lab cache` or
  seqio wrote; '': they are tokenized now and held in memory. mixing: rates of several names.
  Errors: UsageError for an unknown name or a length that cannot be; DataError for a split that does
  not exist, data that is not on this machine, a cache of other data, or no examples.
  """
  register(vocab_spec, files, modules)
  lengths = {feature: length for feature, length in lengths.items() if length}
  components, size = [], vocab.load(vocab_spec).size
  for task, rate in select(name, split):
    check(task, vocab.load(vocab_spec))
    where = cache.folder(cached, task.name, split) if cached else None
    if where is None:
      examples = list(stream(task, split, lengths, size))
    elif by_seqio := _by_seqio(cached, task, split):
      examples = list(stream(task, split, lengths, size, by_seqio=by_seqio))
    else:
      examples = cache.Cached(where, task_identity.identity(task, split, lengths, vocab_spec),
                              't5lab cache --config …')
    said = examples.note if isinstance(examples, cache.Cached) else note(task, split)
    if not examples:
      raise DataError(f'task {task.name!r} has no examples in split {split!r} '
                      f'(lengths {lengths}) {said}')
    components.append(Component(task.name, rate, examples, objective(task), said))
  if mixing:
    components = [dataclasses.replace(c, rate=mixing.rate(len(c.examples))) for c in components]
  return components


def select(name: str, split: str) -> list[tuple]:
  """[(Task, rate)] behind a name, or names with commas between them, that have the split."""
  found, known = [], set()
  for part in name.split(','):
    provider = get(part.strip())
    is_mixture = isinstance(provider, seqio.Mixture)
    for task in provider.tasks if is_mixture else [provider]:
      available = splits(task)
      known |= set(available)
      if split.split('[')[0] in available:   # seqio too leaves out tasks that lack the split
        found.append((task, float(provider.get_rate(task)) if is_mixture else 1.))
  if not found:
    raise DataError(f'{name!r} has no split {split!r}.{did_you_mean(split, sorted(known))}')
  twice = {task.name for task, _ in found if [t.name for t, _ in found].count(task.name) > 1}
  if twice:
    raise UsageError(f'data.mixture={name!r} names {", ".join(sorted(twice))} twice')
  return found


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Rates by the number of examples n: min(n, limit) ** (1 / temperature).

  Temperature 1 is examples-proportional, a large one mixes equally. limit 0: none.
  [Raffel et al. 2020, 3.5.2]
  """
  temperature: float = 1.
  limit: int = 0

  def rate(self, examples: int) -> float:
    return paper_mixtures.rate(examples, self.limit or None, self.temperature)


def _by_seqio(root, task, split) -> str:
  """The folder where seqio's own caching put this split; '' if it did not."""
  where = os.path.join(root, seqio.utils.get_task_dir_from_name(task.name))
  done = (os.path.join(where, 'COMPLETED'), seqio.utils.get_cached_info_path(where, split))
  return where if all(map(os.path.exists, done)) else ''


register()
