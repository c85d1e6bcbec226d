"""Token examples on disk: ArrayRecord shards under a manifest, written once and read at random.

  DIR/<task>/<split>/MANIFEST.json                        last of all: without it there is no cache
  DIR/<task>/<split>/shard-00003-of-00016.array_record    a record an example
  DIR/<task>/<split>/shard-00003-of-00016.npy             int32[rows, features]: their lengths
  DIR/<task>/<split>/shard-00003-of-00016.json            the shard's entry of the manifest

A shard appears whole or not at all, so a build that was killed goes on with the shards it lacks and
no row is written twice. Shard k of n has the source's rows k, k + n, …, whoever writes it, so the
cache does not depend on how many processes built it.
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

from array_record.python import array_record_data_source, array_record_module
import numpy as np

from t5lab.errors import DataError

FORMAT = 1                # of the files; counts as a part of a cache's identity
MANIFEST = 'MANIFEST.json'


def folder(root: str, task: str, split: str) -> Path:
  """Where a task's split lies: names may hold ':' and '[', which paths do without."""
  safe = lambda name: ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)
  return Path(root) / safe(task) / safe(split)


def _stem(k: int, n: int) -> str:
  return f'shard-{k:05}-of-{n:05}'


def _encode(example: dict[str, np.ndarray], features: Sequence[str]) -> bytes:
  """uint32 length of each feature, then their int32 tokens, little-endian."""
  columns = [np.ascontiguousarray(example.get(name, ()), '<i4') for name in features]
  return struct.pack(f'<{len(columns)}I', *map(len, columns)) + b''.join(c.data for c in columns)


def _decode(record: bytes, features: Sequence[str]) -> dict[str, np.ndarray]:
  sizes = struct.unpack_from(f'<{len(features)}I', record)
  ends = np.cumsum([4 * len(features), *(4 * size for size in sizes)])
  return {name: np.frombuffer(record, '<i4', size, start)
          for name, size, start in zip(features, sizes, ends)}


def _write_json(path: Path, value) -> None:
  part = path.with_suffix('.part')
  with open(part, 'w', encoding='utf-8') as f:
    f.write(json.dumps(value, indent=1) + '\n')
    f.flush()
    os.fsync(f.fileno())
  os.replace(part, path)


def _sha256(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def write_shard(where: Path, k: int, n: int, examples: Iterable[dict[str, np.ndarray]],
                features: Sequence[str], tick=lambda rows: None, read=dict) -> dict:
  """Writes shard k of n -> its entry of the manifest. Holds 4 bytes a feature of each row.

  read: called at the end -> what the entry is to say of the rows that the examples were made of.
  Errors: DataError if the disk does not take it; what was written of the shard is removed.
  """
  target = where / f'{_stem(k, n)}.array_record'
  part = target.with_suffix(f'.{os.getpid()}.part')
  table_part = target.with_suffix(f'.npy.{os.getpid()}.part')
  lengths = array.array('i')
  rows = 0
  try:
    with writing(where):
      writer = array_record_module.ArrayRecordWriter(str(part), 'group_size:1')
    for example in examples:
      with writing(where):
        writer.write(_encode(example, features))
      lengths.extend(len(example.get(name, ())) for name in features)
      rows += 1
      if rows % 1000 == 0:
        tick(1000)
    tick(rows % 1000)
    with writing(where):
      writer.close()
      _check_records(part, rows)
      table = np.array(lengths, '<i4').reshape(rows, len(features))
      with open(table_part, 'wb') as f:
        np.save(f, table)
      for path in (part, table_part):
        _sync(path)
      os.replace(table_part, target.with_suffix('.npy'))
      os.replace(part, target)
      status = target.stat()
      entry = dict(file=target.name, rows=rows, bytes=status.st_size, mtime=status.st_mtime_ns,
                   sha256=_sha256(target), lengths=_sha256(target.with_suffix('.npy')),
                   tokens=int(table.sum()), read=read())
      _write_json(target.with_suffix('.json'), entry)
    return entry
  except BaseException:
    for path in (part, table_part):
      path.unlink(missing_ok=True)
    raise


def _sync(path: Path) -> None:
  with open(path, 'r+b') as f:
    os.fsync(f.fileno())


def _check_records(path: Path, rows: int) -> None:
  """A writer on a full disk may close without a word: count what can be read back."""
  reader = array_record_module.ArrayRecordReader(str(path))
  found = reader.num_records()
  reader.close()
  if found != rows:
    raise OSError(errno.ENOSPC, f'{found} of {rows} records arrived')


@contextlib.contextmanager
def writing(where: Path):
  """What fails while writing -> one DataError that says how much room there is."""
  try:
    yield
  except (OSError, RuntimeError) as e:      # ArrayRecord raises RuntimeError
    status = os.statvfs(where)
    free = status.f_bavail * status.f_frsize / 2**20
    what = ' '.join(str(e).split(';')[0].split())[:120]
    raise DataError(
        f'cannot write the cache in {where}: {what} ({free:,.0f} MiB free there); make room, and '
        'the same command goes on with the shards that are missing') from e


def finished(where: Path, n: int) -> dict[int, dict]:
  """{k: entry} of the shards that a build before this one finished."""
  found = {}
  for k in range(n):
    target = where / f'{_stem(k, n)}.array_record'
    try:
      entry = json.loads(target.with_suffix('.json').read_text())
      if target.stat().st_size == entry['bytes'] and target.with_suffix('.npy').exists():
        found[k] = entry
    except (OSError, ValueError, KeyError):
      continue
  return found


def begin(where: Path, identity: dict, n: int, files: dict) -> dict[int, dict]:
  """Makes the folder ready for a build -> the shards that are there already.

  A build that another vocabulary, task or number of shards began is started over, and so is one of
  other `files`, as `stamps` has them: shards of the old and of the new would share no row out.
  """
  where.mkdir(parents=True, exist_ok=True)
  plan = where / 'PLAN.json'
  new = dict(identity=identity, shards=n, files=files)
  try:
    same = json.loads(plan.read_text()) == new
  except (OSError, ValueError):
    same = False
  for path in where.iterdir():
    if path.suffix == '.part' or not same and path.name.startswith(('shard-', MANIFEST)):
      path.unlink()
  _write_json(plan, new)
  return finished(where, n)


def stamps(files: Sequence[str]) -> dict[str, list[int]]:
  """{file: [bytes, nanoseconds of its last change]}; [-1, 0] of one that is not on a local disk."""
  found = dict.fromkeys(files, [-1, 0])
  for file in files:
    with contextlib.suppress(OSError):
      status = os.stat(file)
      found[file] = [status.st_size, status.st_mtime_ns]
  return found


def commit(where: Path, identity: dict, features: Sequence[str], entries: dict[int, dict],
           files: dict, note: str) -> dict:
  """Writes the manifest: from now on the cache is there. files: as `stamps` has those that it was
  made of; note: what is to be said of their rows."""
  shards = [entries[k] for k in sorted(entries)]
  manifest = dict(identity=identity, features=list(features), rows=sum(s['rows'] for s in shards),
                  tokens=sum(s['tokens'] for s in shards), shards=shards, files=files,
                  note=note)
  with writing(where):
    _write_json(where / MANIFEST, manifest)
  return manifest


def read_manifest(where: Path, command: str) -> dict:
  """DataError, naming the command that makes it, if there is no finished cache."""
  try:
    manifest = json.loads((where / MANIFEST).read_text())
    lacking = {'identity', 'features', 'rows', 'tokens', 'shards', 'files', 'note'} - set(manifest)
    if lacking:
      raise ValueError(f'it has no {min(lacking)!r}')
    return manifest
  except FileNotFoundError as e:
    begun = (where / 'PLAN.json').exists()
    raise DataError(f'no cache in {where}' + ' (a build began and did not finish)' * begun
                    + f': run `{command}`') from e
  except (TypeError, ValueError) as e:
    raise DataError(f'{where / MANIFEST} is damaged or of another version ({e}): '
                    f'run `{command}`') from e


class Cached(Sequence):
  """The examples of a cache: dicts of int32[length], read from disk one at a time.

  lengths: {feature: int32[rows]}, in memory. fingerprint: of identity and contents. note: what is
  to be said of the rows that it was made of.
  """

  def __init__(self, where: Path, identity: dict, command: str):
    """Errors: DataError for a cache that is missing, of another identity, of files that are another
    size now, or whose shards are not those of the manifest. Shards whose time of change is another
    are read and hashed."""
    manifest = read_manifest(where, command)
    _check_identity(where, manifest['identity'], identity, command)
    _check_files(where, manifest['files'], command)
    self.features, self.note = manifest['features'], manifest['note']
    paths, tables = [], []
    for shard in manifest['shards']:
      path = where / shard['file']
      _check_shard(path, shard, command)
      paths.append(str(path))
      tables.append(np.load(path.with_suffix('.npy'), allow_pickle=False))
    table = np.concatenate(tables)
    self.lengths = {name: np.ascontiguousarray(table[:, i])
                    for i, name in enumerate(self.features)}
    filled = [path for path, shard in zip(paths, manifest['shards']) if shard['rows']]
    self._where = where
    self._records = array_record_data_source.ArrayRecordDataSource(filled)
    self.fingerprint = hashlib.sha256(json.dumps(
        [manifest['identity'], [[s['sha256'], s['lengths']] for s in manifest['shards']]],
        sort_keys=True).encode()).hexdigest()

  def __len__(self):
    return len(self._records)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(f'example {i} of {len(self)}')
    return _decode(self._records[i], self.features)

  def many(self, wanted: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """The examples of these numbers, in order; several times as fast as one by one."""
    return [_decode(record, self.features) for record in self._records.__getitems__(wanted)]

  def remember(self, what: str, key: str, make) -> np.ndarray:
    """make(), an array that depends on the cache and on `key` alone, kept in the cache's folder."""
    digest = hashlib.sha256(f'{self.fingerprint} {key}'.encode()).hexdigest()[:16]
    path = self._where / f'{what}-{digest}.npy'
    with contextlib.suppress(OSError, ValueError):
      return np.load(path, allow_pickle=False)
    value = make()
    part = path.with_suffix(f'.{os.getpid()}.part')
    with contextlib.suppress(OSError):               # a read-only cache is packed anew each time
      with open(part, 'wb') as f:
        np.save(f, value)
      os.replace(part, path)
    return value


def _check_identity(where, cached, wanted, command):
  differ = [key for key in {**wanted, **cached} if cached.get(key) != wanted.get(key)]
  if differ:
    short = lambda value: str(value)[:60]
    what = '; '.join(f'{key}: cached {short(cached.get(key))}, now {short(wanted.get(key))}'
                     for key in differ)
    raise DataError(f'the cache in {where} is of other data than this run asks for: {what}. Build '
                    f'it anew with `{command}`, or set data.cache to another folder')


def _check_files(where, cached, command):
  """Files that are not where the cache was taken to are passed over."""
  for file, (size, _) in stamps(list(cached)).items():
    if size >= 0 and size != cached[file][0]:
      raise DataError(f'{file} has {size:,} bytes now, and {cached[file][0]:,} when the cache in '
                      f'{where} was made of it: run `{command}`, or restore the file')


def _check_shard(path, shard, command):
  try:
    status = path.stat()
    same = status.st_size == shard['bytes'] and (
        status.st_mtime_ns == shard['mtime'] or _sha256(path) == shard['sha256'])
    same = same and _sha256(path.with_suffix('.npy')) == shard['lengths']
  except FileNotFoundError as e:
    raise DataError(f'{e.filename} is in the manifest and not on disk: restore it, or remove '
                    f'{path.with_suffix(".json")} and run `{command}`') from e
  if not same:
    raise DataError(
        f'{path} is not the shard that the manifest names ({shard["rows"]:,} rows, '
        f'{shard["bytes"]:,} bytes, sha256 {shard["sha256"][:12]}): restore it, or remove '
        f'{path.with_suffix(".json")} and run `{command}`')
