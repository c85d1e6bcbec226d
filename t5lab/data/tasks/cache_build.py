"""Fills a cache (cache.py) with the examples of a task, on many processes, each a shard at a time.

Every process holds a batch of rows and 4 bytes for each feature of the rows of its shard. A process
whose parent is gone ends within a second.
"""
from collections.abc import Callable
import concurrent.futures
import dataclasses
import multiprocessing
import os
from pathlib import Path
import threading
import time

from t5lab.data.batches import cache
from t5lab.data.sources.base import RecordSource
from t5lab.errors import DataError, Failure


@dataclasses.dataclass(frozen=True)
class Job:
  """One task and split, by what another process needs to open it itself: see tasks.register."""
  task: str
  split: str
  lengths: dict[str, int]
  vocab_spec: str
  files: object = None
  modules: tuple[str, ...] = ()


def build(job: Job, root: str, *, shards: int, processes: int,
          tick: Callable[[int], None] = lambda rows: None) -> dict:
  """The manifest of the task's cache under `root`; nothing is done if it is there already.

  tick: called with so many rows more, those of shards that were there among them.
  Errors: DataError for rows that cannot be read, a disk that is full, a process that died; the
  finished shards stay, and the same call goes on with the others. One for too many bad rows too,
  which only all shards together can tell.
  """
  from t5lab.data.tasks import identity as task_identity
  from t5lab.data.tasks import registry as tasks
  task = _open(job)
  where = cache.folder(root, job.task, job.split)
  identity = task_identity.identity(task, job.split, job.lengths, job.vocab_spec)
  features = tasks.stored_features(task)
  own = isinstance(task.source, RecordSource)
  files = cache.stamps(task.source.files(job.split)) if own else {}
  with cache.writing(where):
    entries = cache.begin(where, identity, shards, files)
  tick(sum(entry['rows'] for entry in entries.values()))
  missing = [k for k in range(shards) if k not in entries]
  entries.update(_run(job, where, missing, shards, processes, tick))
  read = _read(task, job.split, entries)
  if not missing and (where / cache.MANIFEST).exists():
    return cache.read_manifest(where, '')
  if not sum(entry['rows'] for entry in entries.values()):
    raise DataError(f'task {job.task!r} has no examples in split {job.split!r} '
                    f'(lengths {job.lengths})')
  return cache.commit(where, identity, features, entries, files, tasks.note(task, job.split, read))


def _read(task, split, entries):
  """A Reader with the counts of all shards, if they are of files that one reads."""
  counts = [entry['read'] for entry in entries.values() if entry['read']]
  if not counts:
    return None
  read = task.source.reader(split)
  for found in counts:
    read.add(found)
  read.check_share()
  return read


def _run(job, where, missing, shards, processes, tick):
  if processes == 1 or len(missing) < 2:
    for k in missing:
      yield _shard(job, where, k, shards, tick)
    return
  context = multiprocessing.get_context('spawn')     # TensorFlow's threads do not survive a fork
  others = multiprocessing.active_children()
  progress = context.Queue()
  pool = concurrent.futures.ProcessPoolExecutor(
      min(processes, len(missing)), context, _started, (progress, os.getpid()))
  try:
    running = {pool.submit(_remote, job, where, k, shards) for k in missing}
    while running:
      done, running = concurrent.futures.wait(running, 0.2, 'FIRST_COMPLETED')
      while not progress.empty():
        tick(progress.get())
      for future in done:
        yield future.result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise DataError(f'a process that was writing {where} died (out of memory?): the finished '
                    'shards stay, the same command goes on; try fewer --processes') from e
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in set(multiprocessing.active_children()) - set(others):
      process.terminate()
      process.join()
    for part in where.glob('*.part'):         # of those that were not asked
      part.unlink()


def _started(progress, parent):
  global _progress
  _progress = progress
  threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent):
  while os.getppid() == parent:
    time.sleep(0.5)
  os._exit(1)


def _remote(job, where, k, shards):
  return _shard(job, where, k, shards, _progress.put)


def _open(job):
  from t5lab.data import vocab
  from t5lab.data.tasks import registry as tasks
  tasks.register(job.vocab_spec, job.files, job.modules)
  task = tasks.get(job.task)
  tasks.check(task, vocab.load(job.vocab_spec))
  return task


def _shard(job: Job, where: Path, k: int, shards: int, tick) -> tuple[int, dict]:
  """(k, the manifest's entry)."""
  from t5lab.data import vocab
  from t5lab.data.tasks import registry as tasks
  task = _open(job)
  examples = tasks.stream(task, job.split, job.lengths, vocab.load(job.vocab_spec).size,
                          (k, shards))
  try:
    read = lambda: found.counts() if (found := tasks.reader(task, job.split)) else {}
    return k, cache.write_shard(where, k, shards, examples, tasks.stored_features(task), tick, read)
  except Failure as e:
    raise type(e)(f'shard {k} of {shards}: {e}') from e
