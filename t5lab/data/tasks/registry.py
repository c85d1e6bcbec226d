"""The seqio registry and its reader: importing this module registers t5lab's tasks and mixtures.

The vocabulary is an option of a run, so `register(spec)` puts the same names on another vocabulary.
`open_components(name, …)` is how the pipeline reads any seqio Task or Mixture: as numpy examples,
from the task's own source and preprocessors, in memory or in a cache on disk.
"""
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import importlib
import os
import sys

import numpy as np

from t5lab.data import vocab
from t5lab.data.batches import cache
from t5lab.data.sources.tfds import splits
from t5lab.data.tasks import builtin, identity, names, own_files
from t5lab.data.tasks.parts import EXAMPLES_PER_CALL, trims
from t5lab.data.tasks.record_sources import FileSource
from t5lab.data.tasks.seqio_tf import NumpyObjective, seqio, tf
from t5lab.errors import DataError, Failure, UsageError, did_you_mean

_OURS = (*names.TASKS, own_files.NAME)
_registered: tuple = ()      # the arguments of the last `register`


def register(spec: str = vocab.DEFAULT, files: own_files.OwnFiles | None = None,
             modules: Sequence[str] = ()) -> None:
  """Puts the tasks on the vocabulary `spec`, replacing those on another one. Idempotent.

  files: the user's own files, which become the task 'files'.
  modules: the user's modules that register seqio Tasks; the current folder is on their path.
  """
  global _registered
  for module in modules:
    _import(module)
  if (spec, files) == _registered:
    return

  vocab.load(spec)      # an unknown vocabulary is reported before anything changes
  for name in _OURS:
    seqio.TaskRegistry.remove(name)
  builtin.register_tasks(spec)
  if files:
    builtin.register_files(spec, files)

  if not _registered:
    builtin.register_mixtures()
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
  """Replaces the mixtures of our tasks: a seqio Mixture holds Task objects, which are stale now."""
  for name in list(seqio.MixtureRegistry.names()):
    mixture = seqio.MixtureRegistry.get(name)
    if any(task.name in _OURS for task in mixture.tasks):
      rates = list(mixture.rate_per_task_name.items())
      seqio.MixtureRegistry.remove(name)
      seqio.MixtureRegistry.add(name, rates, sample_fn=mixture._sample_fn)


def get(name: str):
  """Returns the seqio Task or Mixture; UsageError with the nearest names for an unknown one."""
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in known:
    raise UsageError(f'no task or mixture {name!r}.{did_you_mean(name, known)}')
  return seqio.get_mixture_or_task(name)


def select(name: str, split: str) -> list[tuple]:
  """[(Task, rate)] behind a name, or comma-separated names, restricted to tasks with the split."""
  selected, known_splits = [], set()
  for part in name.split(','):
    provider = get(part.strip())
    is_mixture = isinstance(provider, seqio.Mixture)
    for task in provider.tasks if is_mixture else [provider]:
      available = splits(task)
      known_splits |= set(available)
      if split.split('[')[0] in available:     # like seqio, which omits tasks without the split
        rate = float(provider.get_rate(task)) if is_mixture else 1.
        selected.append((task, rate))
  if not selected:
    raise DataError(f'{name!r} has no split {split!r}.{did_you_mean(split, sorted(known_splits))}')

  selected_names = [task.name for task, _ in selected]
  repeated = {n for n in selected_names if selected_names.count(n) > 1}
  if repeated:
    raise UsageError(f'data.mixture={name!r} names {", ".join(sorted(repeated))} twice')
  return selected


def check(task, vocabulary) -> None:
  """UsageError for a task that the pipeline cannot read, or that is on another vocabulary."""
  for name, feature in task.output_features.items():
    if feature.rank != 1:
      raise UsageError(
          f'task {task.name!r}: feature {name!r} must have rank 1, got {feature.rank}')
    is_tokens = not isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
    if is_tokens and feature.vocabulary.vocab_size > vocabulary.size:
      raise UsageError(
          f'task {task.name!r} has its own vocabulary of {feature.vocabulary.vocab_size} ids for '
          f'{name!r}, data.vocab={vocabulary.spec!r} has {vocabulary.size}: use the same one')
  objectives = [isinstance(p, NumpyObjective) for p in task.preprocessors]
  if any(objectives[:-1]):
    raise UsageError(f'task {task.name!r}: a NumpyObjective must be the last preprocessor, once')


def objective_of(task) -> NumpyObjective | None:
  last = task.preprocessors[-1] if task.preprocessors else None
  return last if isinstance(last, NumpyObjective) else None


def stored_features(task) -> tuple[str, ...]:
  """Features of an example before the objective, which draws again each epoch."""
  objective = objective_of(task)
  return objective.wants if objective else tuple(task.output_features)


# --- reading one task ----------------------------------------------------------------------------


def stream(task, split: str, lengths: dict[str, int], num_ids: int,
           shard: tuple[int, int] = (0, 1), by_seqio: str = '') -> Iterator[dict[str, np.ndarray]]:
  """Yields the task's examples, {feature: int32[length]}, untrimmed and before its objective.

  lengths: tokens per feature. num_ids: the size of the vocabulary.
  shard: for (k, n), the records k, k + n, k + 2n, … of the source.
  by_seqio: a folder that seqio's own caching filled from the source.
  Only EXAMPLES_PER_CALL examples are in memory at a time.
  Errors: DataError, also for an id outside the vocabulary, which an embedding would clamp silently.
  """
  wanted = stored_features(task)
  # A random preprocessor of the user draws only here, and the same numbers every time.
  with seqio.utils.map_seed_manager(0):
    k, n = shard
    preprocessors = task.preprocessors
    if by_seqio:
      dataset, preprocessors = _open_seqio_cache(task, split, by_seqio)
    elif isinstance(task.source, FileSource):      # parses only the records of this shard
      dataset = task.source.shard(split, k, n)
    else:
      dataset = task.source.get_dataset(split=split, shuffle=False).shard(n, k)
    for preprocessor in preprocessors:
      if not isinstance(preprocessor, (NumpyObjective, seqio.CacheDatasetPlaceholder)):
        dataset = seqio.utils.add_kwargs_to_transform(
            preprocessor, sequence_length=None if trims(preprocessor) else lengths,
            output_features=task.output_features)(dataset)
    dataset = dataset.map(
        lambda example: {name: example[name] for name in wanted if name in example})

    try:
      yield from _numpy_examples(task, dataset, num_ids)
    except tf.errors.OpError as e:
      if isinstance(task.source, FileSource) and task.source.failure:
        raise task.source.failure from e
      reason = str(e).strip().splitlines()[-1][:300]
      raise DataError(f'task {task.name!r}, split {split!r}: {reason}') from e


def _open_seqio_cache(task, split, folder):
  """Returns the cached dataset and the preprocessors that follow it."""
  cached_before = [i for i, preprocessor in enumerate(task.preprocessors)
                   if isinstance(preprocessor, seqio.CacheDatasetPlaceholder)]
  if not cached_before:
    raise UsageError(f'task {task.name!r} has no CacheDatasetPlaceholder, so {folder} cannot be '
                     'its cache')
  source = seqio.dataset_providers._CachedDataSource(folder, split)
  dataset = source.get_dataset(split=split, shuffle=False)
  return dataset, task.preprocessors[cached_before[0]:]


def _numpy_examples(task, dataset, num_ids):
  """Reads ragged batches: each crossing from TensorFlow to numpy costs 0.2 ms."""
  count = 0
  for batch in dataset.ragged_batch(EXAMPLES_PER_CALL):
    columns = {name: _arrays(column) for name, column in batch.items()}
    for name, feature in task.output_features.items():
      if name in columns:
        limit = min(num_ids, feature.vocabulary.vocab_size)
        _check_ids(task, name, columns[name], limit, count)
    for arrays in zip(*columns.values()):
      count += 1
      yield {name: x.astype(np.int32, copy=False) for name, x in zip(columns, arrays)}


def _arrays(column) -> list[np.ndarray]:
  """A feature of a batch as int[length] per example. One of a fixed length is not ragged."""
  if not isinstance(column, tf.RaggedTensor):
    return list(column.numpy())
  return np.split(column.flat_values.numpy(), column.row_splits.numpy()[1:-1])


def _check_ids(task, name, column, size, first):
  ids = np.concatenate(column)
  outside = np.flatnonzero((ids < 0) | (ids >= size))
  if len(outside):
    i = first + np.searchsorted(np.cumsum([*map(len, column)]), outside[0], side='right')
    raise DataError(f'task {task.name!r}, example {i}: {name} holds the id {ids[outside[0]]}; '
                    f'the ids of its vocabulary are 0 to {size - 1}')


def report(task, split: str, reader=None) -> str:
  """One line about bad records that `reader` (by default the split's last) skipped, or ''."""
  if not isinstance(task.source, FileSource) or not task.source.reports_bad_records:
    return ''
  reader = reader or task.source.readers.get(split)
  return f'{task.name}, {split}: {reader.summary()}' if reader and reader.bad else ''


# --- opening what a run trains on ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Component:
  """One task of a mixture.

  rate: its relative weight. examples: dicts of int32[length], untrimmed.
  note: one line about skipped records, or ''.
  """
  name: str
  rate: float
  examples: Sequence[dict[str, np.ndarray]]
  objective: NumpyObjective | None
  note: str = ''


def open_components(name: str, split: str, lengths: dict[str, int],
                    vocab_spec: str = vocab.DEFAULT, *, files: own_files.OwnFiles | None = None,
                    modules: Sequence[str] = (), cached: str = '',
                    mixing: Callable[[int], float] | None = None) -> list[Component]:
  """Opens the tasks behind the name of a Task or Mixture, or behind comma-separated names.

  lengths: tokens of each feature. Text is cut into segments of these; other examples stay whole.
  files, modules: see `register`.
  cached: a folder with the examples, written by `t5lab cache` or seqio; '': they are tokenized now
    and held in memory.
  mixing: the rate of a task with so many examples, instead of a Mixture's.
  Errors: UsageError for an unknown name or an impossible length; DataError for an unknown split,
    data that is not on this machine, a cache of other data, or no examples.
  """
  register(vocab_spec, files, modules)
  vocabulary = vocab.load(vocab_spec)
  lengths = {feature: length for feature, length in lengths.items() if length}
  components = []
  for task, rate in select(name, split):
    check(task, vocabulary)
    by_seqio = _cached_by_seqio(cached, task, split)
    if cached and not by_seqio:
      examples = cache.Cached(cache.folder(cached, task.name, split),
                              identity.identity(task, split, lengths, vocab_spec),
                              't5lab cache --config …')
      note = examples.note
    else:
      examples = list(stream(task, split, lengths, vocabulary.size, by_seqio=by_seqio))
      note = report(task, split)
    if not examples:
      raise DataError(f'task {task.name!r} has no examples in split {split!r} '
                      f'(lengths {lengths}) {note}')
    components.append(Component(task.name, rate, examples, objective_of(task), note))
  if mixing:
    components = [dataclasses.replace(c, rate=mixing(len(c.examples))) for c in components]
  return components


def _cached_by_seqio(root: str, task, split: str) -> str:
  """The folder under `root` where seqio's own caching stored this split; '' if it did not."""
  if not root:
    return ''
  folder = os.path.join(root, seqio.utils.get_task_dir_from_name(task.name))
  complete = os.path.exists(os.path.join(folder, 'COMPLETED'))
  has_split = os.path.exists(seqio.utils.get_cached_info_path(folder, split))
  return folder if complete and has_split else ''


register()
