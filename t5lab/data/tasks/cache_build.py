"""Fills a cache (batches/cache.py) with the examples of a task, in many processes, by shards.

Every process holds one batch of examples, and 4 bytes per feature and example of its shard. A
process whose parent has ended exits within a second.
"""
from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import multiprocessing
import os
from pathlib import Path
import threading
import time

from t5lab.data import vocab
from t5lab.data.batches import cache
from t5lab.errors import DataError, Failure


@dataclasses.dataclass(frozen=True)
class CacheJob:
  """One task and split, described so that another process can open it: see registry.register."""
  task: str
  split: str
  lengths: dict[str, int]
  vocab_spec: str
  files: object = None
  modules: tuple[str, ...] = ()


def build(job: CacheJob, root: str, *, shards: int, processes: int,
          tick: Callable[[int], None] = lambda rows: None) -> dict:
  """Builds the task's cache under `root` unless it is there, and returns its manifest.

  tick: called with the number of new examples; finished shards of an earlier build count too.
  Errors: DataError for unreadable records, too many bad records over all shards, a full disk or a
    process that died. Finished shards stay, and the same call resumes with the others.
  """
  from t5lab.data.tasks import identity, record_sources, registry
  task = _open(job)
  folder = cache.folder(root, job.task, job.split)
  task_identity = identity.identity(task, job.split, job.lengths, job.vocab_spec)
  has_files = isinstance(task.source, record_sources.FileSource)
  files = cache.stamps(task.source.files(job.split)) if has_files else {}
  with cache.writing(folder):
    entries = cache.begin(folder, task_identity, shards, files)
  tick(sum(entry['rows'] for entry in entries.values()))
  missing = [k for k in range(shards) if k not in entries]
  entries.update(_write_shards(job, folder, missing, shards, processes, tick))

  # A reader with the counts of all shards, which checks the share of bad records.
  reader = task.source.reader(job.split) if has_files else None
  if reader:
    for entry in entries.values():
      reader.add(entry['read'])
    reader.check_fraction()
  if not missing and (folder / cache.MANIFEST).exists():
    return cache.read_manifest(folder, '')
  if not sum(entry['rows'] for entry in entries.values()):
    raise DataError(f'task {job.task!r} has no examples in split {job.split!r} '
                    f'(lengths {job.lengths})')
  note = registry.report(task, job.split, reader)
  return cache.commit(folder, task_identity, registry.stored_features(task), entries, files, note)


def _write_shards(job, folder, missing, shards, processes, tick) -> Iterator[tuple[int, dict]]:
  """Yields (k, the manifest's entry) of the missing shards as they are finished."""
  if processes == 1 or len(missing) < 2:
    for k in missing:
      yield _write_shard(job, folder, k, shards, tick)
    return
  context = multiprocessing.get_context('spawn')     # TensorFlow's threads do not survive a fork
  other_children = multiprocessing.active_children()
  progress = context.Queue()
  pool = concurrent.futures.ProcessPoolExecutor(
      min(processes, len(missing)), context, _start_worker, (progress, os.getpid()))
  try:
    running = {pool.submit(_write_shard, job, folder, k, shards) for k in missing}
    while running:
      done, running = concurrent.futures.wait(running, 0.2, 'FIRST_COMPLETED')
      while not progress.empty():
        tick(progress.get())
      for future in done:
        yield future.result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise DataError(f'a process that was writing {folder} died (out of memory?): the finished '
                    'shards stay; run the same command to resume, with fewer --processes') from e
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in set(multiprocessing.active_children()) - set(other_children):
      process.terminate()
      process.join()
    cache.remove_temporary(folder)          # of the processes that were terminated


_progress = None     # of a worker process: the queue for its progress


def _start_worker(progress, parent):
  global _progress
  _progress = progress
  threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent):
  while os.getppid() == parent:
    time.sleep(0.5)
  os._exit(1)


def _write_shard(job: CacheJob, folder: Path, k: int, shards: int,
                 tick=None) -> tuple[int, dict]:
  """Returns (k, the manifest's entry). tick: None for the queue of a worker process."""
  from t5lab.data.tasks import record_sources, registry
  task = _open(job)
  num_ids = vocab.load(job.vocab_spec).size
  examples = registry.stream(task, job.split, job.lengths, num_ids, (k, shards))
  counts = dict
  if isinstance(task.source, record_sources.FileSource):
    counts = lambda: task.source.readers[job.split].counts()
  try:
    return k, cache.write_shard(folder, k, shards, examples, registry.stored_features(task),
                                tick or _progress.put, counts)
  except Failure as e:
    raise type(e)(f'shard {k} of {shards}: {e}') from e


def _open(job):
  from t5lab.data.tasks import registry
  registry.register(job.vocab_spec, job.files, job.modules)
  task = registry.get(job.task)
  registry.check(task, vocab.load(job.vocab_spec))
  return task
