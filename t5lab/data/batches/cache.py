"""Token examples on disk: ArrayRecord shards under a manifest, written once and read at random.

  DIR/<task>/<split>/MANIFEST.json                        written last: without it there is no cache
  DIR/<task>/<split>/shard-00003-of-00016.array_record    one record per example
  DIR/<task>/<split>/shard-00003-of-00016.npy             int32[examples, features]: their lengths
  DIR/<task>/<split>/shard-00003-of-00016.json            the shard's entry of the manifest

A shard appears whole or not at all, so a build that was killed resumes with the missing shards and
writes no example twice. Shard k of n has the source's records k, k + n, ..., whichever process
writes it, so the cache does not depend on how many processes built it.
"""
import array
from collections.abc import Iterable, Sequence
import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
import struct

from array_record.python import (
  array_record_data_source,
  array_record_module,  # ty: ignore[missing-module-member] (a C extension)
)
import numpy as np

from t5lab import files
from t5lab.data.batches.examples import Example, Examples
from t5lab.errors import DataError

FORMAT = 1                # of the files; part of a cache's identity
MANIFEST, PLAN = 'MANIFEST.json', 'PLAN.json'
MANIFEST_KEYS = ('features', 'files', 'identity', 'note', 'rows', 'shards', 'tokens')


def folder(root: str, task: str, split: str) -> Path:
  """The folder of a task's split; ':' and '[' of names are replaced, which paths do without."""
  safe = lambda name: ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)
  return Path(root) / safe(task) / safe(split)


def _shard_path(where: Path, k: int, n: int) -> Path:
  return where / f'shard-{k:05}-of-{n:05}.array_record'


def _encode(example: Example, features: Sequence[str]) -> bytes:
  """uint32 length of each feature, then their int32 tokens, little-endian."""
  columns = [np.ascontiguousarray(example.get(name, ()), '<i4') for name in features]
  return struct.pack(f'<{len(columns)}I', *map(len, columns)) + b''.join(c.data for c in columns)


def _decode(record: bytes, features: Sequence[str]) -> Example:
  sizes = struct.unpack_from(f'<{len(features)}I', record)
  starts = np.cumsum([4 * len(features), *(4 * size for size in sizes)])
  return {name: np.frombuffer(record, '<i4', size, start)
          for name, size, start in zip(features, sizes, starts)}


def _sha256(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


# --- writing -----------------------------------------------------------------------------------


def _write_json(path: Path, value) -> None:
  files.write_text(path, json.dumps(value, indent=1) + '\n')


def write_shard(where: Path, k: int, n: int, examples: Iterable[Example], features: Sequence[str],
                tick=lambda count: None, counts=dict) -> dict:
  """Writes shard k of n -> its entry of the manifest. Holds 4 bytes per feature of each example.

  tick: called with the number of examples written since its last call. counts: called at the end
  for what the entry states about the records that the examples were made from.
  Errors: DataError if the disk refuses them; an unfinished shard is removed.
  """
  path = _shard_path(where, k, n)
  part = path.with_suffix(f'.{os.getpid()}.part')
  try:
    lengths = _write_records(where, part, examples, features, tick)
    with writing(where):
      # The entry comes last: a shard without one is written again.
      with files.replacing(path.with_suffix('.npy')) as f:
        np.save(f, lengths)
      os.replace(part, path)
      status = path.stat()
      entry = dict(file=path.name, rows=len(lengths), bytes=status.st_size,
                   mtime=status.st_mtime_ns, sha256=_sha256(path),
                   lengths=_sha256(path.with_suffix('.npy')), tokens=int(lengths.sum()),
                   read=counts())
      _write_json(path.with_suffix('.json'), entry)
    return entry
  finally:
    part.unlink(missing_ok=True)


def _write_records(where, path, examples, features, tick) -> np.ndarray:
  """Writes the records of a shard -> int32[examples, features], their lengths."""
  lengths = array.array('i')
  count = 0
  with writing(where):
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for count, example in enumerate(examples, start=1):
    with writing(where):
      writer.write(_encode(example, features))
    lengths.extend(len(example.get(name, ())) for name in features)
    if count % 1000 == 0:
      tick(1000)
  tick(count % 1000)
  with writing(where):
    writer.close()
    reader = array_record_module.ArrayRecordReader(str(path))
    written = reader.num_records()
    reader.close()
    if written != count:       # on a full disk a writer may close without an error
      raise OSError(errno.ENOSPC, f'{written} of {count} records were written')
    with open(path, 'r+b') as f:
      os.fsync(f.fileno())
  return np.array(lengths, '<i4').reshape(count, len(features))


@contextlib.contextmanager
def writing(where: Path):
  """Turns an error of writing into one DataError that states the free space."""
  try:
    yield
  except (OSError, RuntimeError) as e:      # ArrayRecord raises RuntimeError
    status = os.statvfs(where)
    free = status.f_bavail * status.f_frsize / 2**20
    reason = ' '.join(str(e).split(';')[0].split())[:120]
    raise DataError(
        f'cannot write the cache in {where}: {reason} ({free:,.0f} MiB free); make room and run '
        'the same command to write the missing shards') from e


def begin(where: Path, identity: dict, n: int, sources: dict) -> dict[int, dict]:
  """Prepares the folder for a build of n shards -> the entries of those that are finished.

  A build with another vocabulary, task or number of shards starts over, and so does one of changed
  `sources` (see `stamps`): its shards and the old ones would not hold every record exactly once.
  """
  where.mkdir(parents=True, exist_ok=True)
  plan = dict(identity=identity, shards=n, files=sources)
  try:
    same = json.loads((where / PLAN).read_text()) == plan
  except (OSError, ValueError):
    same = False
  remove_temporary(where)
  if not same:
    for path in [*where.glob('shard-*'), *where.glob(MANIFEST)]:
      path.unlink()
  _write_json(where / PLAN, plan)

  entries = {}
  for k in range(n):
    path = _shard_path(where, k, n)
    with contextlib.suppress(OSError, ValueError, KeyError):     # not finished
      entry = json.loads(path.with_suffix('.json').read_text())
      if path.stat().st_size == entry['bytes'] and path.with_suffix('.npy').exists():
        entries[k] = entry
  return entries


def remove_temporary(where: Path) -> None:
  """Removes the files that killed processes were writing."""
  for path in [*where.glob('*.part'), *where.glob('.*.tmp*')]:
    path.unlink(missing_ok=True)


def stamps(sources: Sequence[str]) -> dict[str, list[int]]:
  """{file: [bytes, nanoseconds of its last change]}; [-1, 0] if it is not on a local disk."""
  result = {}
  for file in sources:
    result[file] = [-1, 0]
    with contextlib.suppress(OSError):
      status = os.stat(file)
      result[file] = [status.st_size, status.st_mtime_ns]
  return result


def commit(where: Path, identity: dict, features: Sequence[str], entries: dict[int, dict],
           sources: dict, note: str) -> dict:
  """Writes the manifest, which completes the cache.

  sources: `stamps` of the files that it was made from. note: a line about their records, or ''.
  """
  shards = [entry for _, entry in sorted(entries.items())]
  manifest = dict(identity=identity, features=list(features), rows=sum(s['rows'] for s in shards),
                  tokens=sum(s['tokens'] for s in shards), shards=shards, files=sources, note=note)
  with writing(where):
    _write_json(where / MANIFEST, manifest)
  return manifest


# --- reading -----------------------------------------------------------------------------------


def read_manifest(where: Path, command: str) -> dict:
  """The manifest of a finished cache; DataError naming `command`, which builds it, without one."""
  try:
    manifest = json.loads((where / MANIFEST).read_text())
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
      raise ValueError(f'it has no {missing[0]!r}')
    return manifest
  except FileNotFoundError as e:
    started = ' (a build was started and not finished)' if (where / PLAN).exists() else ''
    raise DataError(f'no cache in {where}{started}: run `{command}`') from e
  except (TypeError, ValueError) as e:
    raise DataError(f'{where / MANIFEST} is damaged or of another version ({e}): '
                    f'run `{command}`') from e


class Cached(Examples):
  """The examples of a cache: dicts of int32[length], read from disk on access.

  lengths: {feature: int32[n]}, in memory. fingerprint: of identity and contents. note: a line about
  the records that the cache was made from, or ''.
  """

  def __init__(self, where: Path, identity: dict, command: str):
    """command: builds the cache, for messages.

    Errors: DataError for a cache that is missing or has another identity, whose source files have
    changed their size, or whose shards are not those of the manifest. A shard is hashed only if its
    modification time has changed.
    """
    manifest = read_manifest(where, command)
    _check_identity(where, manifest['identity'], identity, command)
    _check_sources(where, manifest['files'], command)
    self.features, self.note = manifest['features'], manifest['note']
    shards = manifest['shards']
    table = np.concatenate([_checked_lengths(where / shard['file'], shard, command)
                            for shard in shards])
    self.lengths = {name: np.ascontiguousarray(table[:, i])
                    for i, name in enumerate(self.features)}

    self._where = where
    self._records = array_record_data_source.ArrayRecordDataSource(
        [str(where / shard['file']) for shard in shards if shard['rows']])
    contents = [manifest['identity'], [[shard['sha256'], shard['lengths']] for shard in shards]]
    self.fingerprint = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

  def __len__(self):
    return len(self._records)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    return _decode(self._records[i], self.features)

  def many(self, ids: Sequence[int]) -> list[Example]:
    return [_decode(record, self.features) for record in self._records.__getitems__(ids)]

  def remember(self, name: str, key: str, make) -> np.ndarray:
    """Returns make(), stored in the cache's folder; a read-only cache computes it each time."""
    digest = hashlib.sha256(f'{self.fingerprint} {key}'.encode()).hexdigest()[:16]
    path = self._where / f'{name}-{digest}.npy'
    with contextlib.suppress(OSError, ValueError):
      return np.load(path, allow_pickle=False)
    value = make()
    with contextlib.suppress(OSError), files.replacing(path, suffix=f'.{os.getpid()}') as f:
      np.save(f, value)
    return value


def _check_identity(where, cached, expected, command):
  differ = [key for key in {**expected, **cached} if cached.get(key) != expected.get(key)]
  if differ:
    short = lambda value: str(value)[:60]
    changes = '; '.join(f'{key}: cached {short(cached.get(key))}, now {short(expected.get(key))}'
                        for key in differ)
    raise DataError(f'the cache in {where} holds other data than this run needs: {changes}. '
                    f'Rebuild it with `{command}`, or set data.cache to another folder')


def _check_sources(where, cached, command):
  """Compares sizes; files that are not here, because the cache was copied, are skipped."""
  for file, (size, _) in stamps(list(cached)).items():
    if size >= 0 and size != cached[file][0]:
      raise DataError(f'{file} has {size:,} bytes; it had {cached[file][0]:,} when the cache in '
                      f'{where} was built from it: run `{command}`, or restore the file')


def _checked_lengths(path, shard, command) -> np.ndarray:
  """int32[examples, features] of a shard. DataError unless it is the manifest's."""
  how = f'restore it, or remove {path.with_suffix(".json")} and run `{command}`'
  try:
    status = path.stat()
    same = status.st_size == shard['bytes']
    if same and status.st_mtime_ns != shard['mtime']:
      same = _sha256(path) == shard['sha256']
    same = same and _sha256(path.with_suffix('.npy')) == shard['lengths']
  except FileNotFoundError as e:
    raise DataError(f'{e.filename} is in the manifest but not on disk: {how}') from e
  if not same:
    raise DataError(
        f'{path} is not the shard that the manifest lists ({shard["rows"]:,} examples, '
        f'{shard["bytes"]:,} bytes, sha256 {shard["sha256"][:12]}): {how}')
  return np.load(path.with_suffix('.npy'), allow_pickle=False)
