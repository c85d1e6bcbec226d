"""Rows of a person's own files: streamed, bounded in memory, exact about what is wrong with them.

Formats go by name (`t5lab/data/sources/record_formats.py` says what each one takes):

  .jsonl .json   one JSON object a line
  .csv .tsv      a header line, then a row a line
  .txt           field 'text', a row a line
  .parquet       and .arrow, and a folder that Hugging Face's `save_to_disk` wrote

The text formats also as .gz and .zst. Every text of a Row is valid Unicode without NUL.
"""
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import glob
import gzip
import json
import os
import pathlib

from t5lab.data.sources import record_formats
from t5lab.data.vocab import tokenizer_config
from t5lab.errors import DataError, UsageError, did_you_mean

SHOWN = 20         # bad rows that a Reader remembers
PATIENCE = 100     # bad rows before a share over the limit ends the reading early


@dataclasses.dataclass(frozen=True)
class Record:
  """line: 1-based, where the row starts; of Parquet and Arrow the number of the record."""
  file: str
  line: int
  fields: dict[str, object]


def split_patterns(patterns: str | Sequence[str]) -> list[str]:
  """Comma-separated text, or a list (whose elements may hold commas), as a list."""
  if isinstance(patterns, str):
    patterns = [pattern.strip() for pattern in patterns.split(',')]
  return [pattern for pattern in patterns if pattern]


def expand(patterns: str | Sequence[str]) -> list[str]:
  """The files that patterns name: in the order of the patterns, sorted within one, none twice.

  patterns: as `split_patterns` takes them. A pattern is a path, local or such as gs://bucket/name, or a
  glob; a name that exists is not read as a glob. A folder of `save_to_disk` stands for its .arrow
  files.
  Raises DataError for a pattern that finds nothing, UsageError for any other folder.
  """
  patterns = [os.path.expanduser(pattern) for pattern in split_patterns(patterns)]
  if not patterns:
    raise UsageError('no file is named; give paths or globs, comma-separated, as data/*.jsonl')
  files = []
  for pattern in patterns:
    if record_formats.exists(pattern):
      found = [pattern]
    else:         # a glob may cross folders of other things, as ** does; a plain name may not
      found = [file for file in _glob(pattern)
               if not record_formats.is_folder(file) or 'state.json' in record_formats.names(file)]
    if not found:
      raise DataError(f'no file matches {pattern!r}.{_nearest(pattern)}')
    for file in found:
      if record_formats.is_folder(file):
        files.extend(_saved(file))
      else:
        files.append(file)
  return list(dict.fromkeys(files))


def _glob(pattern: str) -> list[str]:
  if '://' not in pattern:
    return sorted(glob.glob(pattern, recursive=True))
  fs, path = record_formats.filesystem(pattern)
  return sorted(fs.unstrip_protocol(file) for file in fs.glob(path)) if glob.has_magic(path) else []


def _nearest(pattern: str) -> str:
  """What stands where the pattern looks, as a sentence; '' where nothing does."""
  folder, _, name = pattern.rpartition('/')
  folder = folder or ('/' if pattern.startswith('/') else '.')
  if glob.has_magic(folder) or folder.endswith(':/'):
    return ''
  if not record_formats.is_folder(folder):
    return f' There is no folder {folder!r}.'
  known = [file for file in record_formats.names(folder) if not file.startswith('.')]
  return did_you_mean(name, known) if known else f' The folder {folder!r} is empty.'


def _saved(folder: str) -> list[str]:
  """The .arrow files of a folder that `datasets.save_to_disk` wrote, in its order."""
  folder = folder.rstrip('/')
  names = record_formats.names(folder)
  if 'dataset_dict.json' in names:
    splits = [name for name in names if record_formats.is_folder(f'{folder}/{name}')]
    raise UsageError(f'{folder} holds several splits; name one: '
                     + ', '.join(f'{folder}/{split}' for split in splits))
  if 'state.json' not in names:
    raise UsageError(f'{folder} is a folder; name its files, as {folder}/*.jsonl')
  state = f'{folder}/state.json'
  with record_formats.open_binary(state) as f:
    described = tokenizer_config.parse_json(f.read(tokenizer_config.LARGEST_SIBLING), state)
  if described.get('_indices_data_files'):
    raise DataError(f'{folder} was saved with an index of rows; save it again after '
                    'dataset.flatten_indices()')
  try:
    files = [entry['filename'] for entry in described['_data_files']]
  except (KeyError, TypeError) as e:
    raise DataError(f'{state} names no _data_files, as save_to_disk writes them') from e
  if missing := [file for file in files if file not in names]:
    raise DataError(f'{folder} lacks {missing[0]!r}, which its state.json names')
  return [f'{folder}/{file}' for file in files]


class RecordReader:
  """Iterating yields the good Rows of files, in order; the bad ones are counted and skipped.

  Bad are: a line that is no JSON object, wrong UTF-8, NUL or half a surrogate pair in a text, a
  wrong number of fields, a line over `max_line` bytes, and a `required` field that is missing,
  null, empty (or white space) or no text. Each iteration starts again, and its counts with it.
  A blank line is no row.

  bad_rows: the share of bad rows from which reading fails: at the end, or once PATIENCE of them
    are found. 0 fails at the first.
  shard (k, n): only rows whose running number over all files (bad ones included) is k modulo n,
    so that n shards share the rows out exactly. Counts are of the shard; the share at the end is
    for the Reader that `add`s the counts of all to judge.
  required: fields that must hold text; those that `lists` names too may hold a list of texts.
  flag: of the command line, that messages name as the way to another limit; '': there is none.
  Raises DataError for files with nothing in them, broken files and too many bad rows.
  """

  def __init__(self, patterns: str | Sequence[str], *, bad_rows: float = 0.01,
               shard: tuple[int, int] = (0, 1), required: Sequence[str] = (),
               lists: Sequence[str] = (), max_line: int = 8 * 2**20,
               flag: str = '--config.data.bad_rows'):
    if not 0 <= bad_rows <= 1:
      raise UsageError(f'bad_rows = {bad_rows} is no share of the rows; it lies in 0 to 1')
    if not 0 <= shard[0] < shard[1]:
      raise UsageError(f'shard {shard[0]} of {shard[1]} does not exist; they count from 0')
    if max_line < 1:
      raise UsageError(f'max_line = {max_line} bytes; a line has at least 1')
    self.files = expand(patterns)
    for file in self.files:
      record_formats.format_of(file)
    self.bad_rows, self.shard, self.max_line, self._flag = bad_rows, shard, max_line, flag
    self.required, self.lists = tuple(required), frozenset(lists)
    self._reset()

  def _reset(self):
    self.good = self.bad = 0
    self.problems: list[tuple[str, int, str]] = []       # the first SHOWN (file, line, reason)

  def __iter__(self) -> Iterator[Record]:
    self._reset()
    turns = record_formats.Turns(*self.shard)
    for file in self.files:
      before = turns.seen
      for line, fields in record_formats.read(file, turns, self.max_line, self.required):
        reason = fields if isinstance(fields, str) else self._fault(fields)
        if reason:
          self._refuse(file, line, reason)
        else:
          self.good += 1
          yield Record(file, line, fields)
      if turns.seen == before:
        raise DataError(f'{file} holds no rows')
    if self.shard[1] == 1:
      self.check_share()

  def _fault(self, fields: dict) -> str:
    """Why a row is bad, or ''."""
    for name, value in fields.items():
      if reason := _unclean(name, self.max_line) or _unclean(value, self.max_line):
        return f'field {name!r} {reason}'
    for name in self.required:
      if name not in fields:
        return f'no field {name!r}.' + (did_you_mean(name, fields) if fields else '')
      value = fields[name]
      if isinstance(value, list) and name in self.lists:
        texts = value
        if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
          return f'field {name!r} is a list that holds {wrong[0]}, not only text'
      else:
        texts = [value]
        if value is not None and not isinstance(value, str):
          return f'field {name!r} is {type(value).__name__}, not text'
      if value is None:
        return f'field {name!r} is null'
      if not texts or not all(text.strip() for text in texts):
        return f'field {name!r} is empty'
    return ''

  def _refuse(self, file: str, line: int, reason: str):
    self.bad += 1
    if len(self.problems) < SHOWN:
      self.problems.append((file, line, reason))
    if self.bad_rows == 0:
      how = f' (no bad row is allowed; {self._flag}=0.01 skips up to 1 %)' if self._flag else ''
      raise DataError(f'{file}:{line}: {reason}{how}')
    if self.bad > PATIENCE:
      self.check_share()

  def counts(self) -> dict:
    """What was read so far, as plain JSON."""
    return {'good': self.good, 'bad': self.bad, 'problems': self.problems}

  def add(self, counts: dict) -> None:
    """Takes in what a Reader of another shard counted."""
    self.good, self.bad = self.good + counts['good'], self.bad + counts['bad']
    problems = self.problems + [tuple(problem) for problem in counts['problems']]
    place = {file: i for i, file in enumerate(self.files)}
    self.problems = sorted(problems, key=lambda p: (place[p[0]], p[1]))[:SHOWN]

  def check_share(self) -> None:
    """DataError if more of the rows read are bad than may be."""
    total = self.good + self.bad
    if self.bad > self.bad_rows * total:
      raise DataError(
          f'{self.bad:,} of {total:,} rows are bad, {100 * self.bad / total:.3g} %; the limit is '
          f'{100 * self.bad_rows:.3g} % (raise it by {self._flag}=…): {self._first(5)}')

  def _first(self, count: int) -> str:
    more = self.bad - min(count, len(self.problems))
    return '; '.join([f'{file}:{line}: {reason}' for file, line, reason in self.problems[:count]]
                     + ([f'and {more:,} more'] if more else []))

  def summary(self) -> str:
    """One line: what was read so far."""
    if not self.bad:
      return f'{self.good:,} rows'
    share = 100 * self.bad / (self.good + self.bad)
    return f'{self.good:,} rows; {self.bad:,} bad ones skipped, {share:.3g} %: {self._first(3)}'


def _unclean(value, longest: int) -> str:
  """Why the texts in a value, however deep, are of no use; '' where they are."""
  stack = [value]
  while stack:
    value = stack.pop()
    if isinstance(value, str):
      if '\0' in value:
        return f'holds NUL at character {value.index(chr(0))}'
      if len(value) > longest:
        return f'has {len(value):,} characters; the limit is {longest:,}'
      if not value.isascii():
        try:
          value.encode('utf-8')
        except UnicodeEncodeError as e:
          return f'holds \\u{ord(value[e.start]):04x}, half of a surrogate pair'
    elif isinstance(value, (list, tuple)):
      stack.extend(value)
    elif isinstance(value, dict):
      stack.extend(value)
      stack.extend(value.values())
  return ''


@contextlib.contextmanager
def write(path: str | os.PathLike):
  """write(fields: dict) -> one JSON line; .gz and .zst by name. Times are written in ISO 8601.

  The file appears whole when the block ends, or not at all: until then it is PATH.part. Same rows,
  same bytes. Raises UsageError for another format, DataError for what cannot be written.

    with records.write('clean.jsonl.gz') as write:
      write({'text': 'one'})
  """
  path = pathlib.Path(path)
  format, packing = record_formats.format_of(str(path))
  if format != 'jsonl':
    raise UsageError(f'{path}: rows are written as JSON lines: .jsonl, .jsonl.gz or .jsonl.zst')
  part = path.with_name(path.name + '.part')
  cannot = lambda e: DataError(f'{path} cannot be written: {e.strerror or e}')
  try:
    file = open(part, 'wb')
  except OSError as e:
    raise cannot(e) from e

  def put(fields: dict):
    try:
      line = json.dumps(fields, ensure_ascii=False, default=_plain).encode('utf-8')
    except (TypeError, ValueError, RecursionError) as e:
      raise DataError(f'a row cannot be written as JSON: {e}') from e
    try:
      out.write(line + b'\n')
    except OSError as e:
      raise cannot(e) from e

  try:
    with file:
      out = _packer(file, packing)
      yield put
      try:
        if out is not file:
          out.close()
        file.flush()
        os.fsync(file.fileno())
      except OSError as e:
        raise cannot(e) from e
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)        # the new name too
    finally:
      os.close(folder)
  finally:
    part.unlink(missing_ok=True)


def _packer(file, packing: str):
  if packing == 'gz':
    return gzip.GzipFile(filename='', fileobj=file, mode='wb', compresslevel=6, mtime=0)
  if packing == 'zst':
    import pyarrow as pa
    return pa.CompressedOutputStream(_Kept(file), 'zstd')
  return file


class _Kept:
  """A file that pyarrow may write but not close: it is to be synced after its last byte."""
  closed = False

  def __init__(self, file):
    self.write, self.flush = file.write, file.flush

  def close(self):
    pass


def _plain(value) -> str:
  """Parquet's dates and times as text; TypeError for anything else that JSON has not."""
  if hasattr(value, 'isoformat'):
    return value.isoformat()
  raise TypeError(f'a value is {type(value).__name__}')
