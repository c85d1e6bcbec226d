"""Records of a user's files: streamed in bounded memory, with the reason why a record is bad.

The name decides the format (record_formats.py states what each one accepts):

  .jsonl .json   one JSON object per line
  .csv .tsv      a header line, then one record per line
  .txt           field 'text', one record per line
  .parquet       also .arrow, and a folder that Hugging Face's `save_to_disk` wrote

Text formats may also end in .gz and .zst. Every text of a Record is valid Unicode without NUL.
"""
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import glob
import gzip
import json
import os
import types

from t5lab import files
from t5lab.data.sources import record_formats
from t5lab.errors import DataError, UsageError, did_you_mean

SHOWN = 20         # bad records that a RecordReader remembers
PATIENCE = 100     # bad records before a fraction over the limit ends the reading early
STATE_BYTES = 16 << 20     # the limit of a saved folder's state.json


@dataclasses.dataclass(frozen=True)
class Record:
  """line: 1-based, where the record starts; its number in Parquet and Arrow."""
  file: str
  line: int
  fields: dict[str, object]


# --- names -------------------------------------------------------------------------------------


def split_patterns(patterns: str | Sequence[str]) -> list[str]:
  """Splits a comma-separated text; a list, whose elements may hold commas, is kept."""
  if isinstance(patterns, str):
    patterns = [pattern.strip() for pattern in patterns.split(',')]
  return [pattern for pattern in patterns if pattern]


def expand(patterns: str | Sequence[str]) -> list[str]:
  """The files that match: in the order of the patterns, sorted within one, without duplicates.

  patterns: as `split_patterns` takes them. A pattern is a path, local or e.g. gs://bucket/name, or
  a glob; a name that exists is not read as a glob. A folder of `save_to_disk` stands for its .arrow
  files.
  Raises DataError for a pattern without a match, UsageError for any other folder.
  """
  patterns = [os.path.expanduser(pattern) for pattern in split_patterns(patterns)]
  if not patterns:
    raise UsageError('no file is named; give comma-separated paths or globs, e.g. data/*.jsonl')
  result = []
  for pattern in patterns:
    matches = [pattern] if record_formats.exists(pattern) else _glob(pattern)
    if not matches:
      raise DataError(f'no file matches {pattern!r}.{_nearest(pattern)}')
    for path in matches:
      result += _saved_files(path) if record_formats.is_folder(path) else [path]
  return list(dict.fromkeys(result))


def _glob(pattern: str) -> list[str]:
  """The files and saved folders that match; other folders are skipped, which ** also matches."""
  if '://' not in pattern:
    paths = sorted(glob.glob(pattern, recursive=True))
  elif glob.has_magic(pattern):
    fs, path = record_formats.filesystem(pattern)
    paths = sorted(fs.unstrip_protocol(match) for match in fs.glob(path))
  else:
    paths = []
  return [path for path in paths if not record_formats.is_folder(path)
          or 'state.json' in record_formats.names(path)]


def _nearest(pattern: str) -> str:
  """A sentence about the names in the pattern's folder; '' if the folder is a pattern too."""
  folder, _, name = pattern.rpartition('/')
  folder = folder or ('/' if pattern.startswith('/') else '.')
  if glob.has_magic(folder) or folder.endswith(':/'):
    return ''
  if not record_formats.is_folder(folder):
    return f' There is no folder {folder!r}.'
  known = [file for file in record_formats.names(folder) if not file.startswith('.')]
  return did_you_mean(name, known) if known else f' The folder {folder!r} is empty.'


def _saved_files(folder: str) -> list[str]:
  """The .arrow files of a folder that `datasets.save_to_disk` wrote, in its order."""
  folder = folder.rstrip('/')
  names = record_formats.names(folder)
  if 'dataset_dict.json' in names:
    splits = [f'{folder}/{name}' for name in names if record_formats.is_folder(f'{folder}/{name}')]
    raise UsageError(f'{folder} holds several splits; name one: {", ".join(splits)}')
  if 'state.json' not in names:
    raise UsageError(f'{folder} is a folder; name its files, e.g. {folder}/*.jsonl')

  path = f'{folder}/state.json'
  with record_formats.open_binary(path) as f:
    state = files.parse_json(f.read(STATE_BYTES), path, DataError)
  if state.get('_indices_data_files'):
    raise DataError(f'{folder} was saved with an index of rows; save it again after '
                    'dataset.flatten_indices()')
  try:
    arrow_files = [entry['filename'] for entry in state['_data_files']]
  except (KeyError, TypeError) as e:
    raise DataError(f'{path} names no _data_files, which save_to_disk writes') from e
  missing = [file for file in arrow_files if file not in names]
  if missing:
    raise DataError(f'{folder} lacks {missing[0]!r}, which its state.json names')
  return [f'{folder}/{file}' for file in arrow_files]


# --- reading -----------------------------------------------------------------------------------


class RecordReader:
  """Iterating yields the good Records of files, in order; bad ones are counted and skipped.

  A record is bad if its line is not a JSON object, is not UTF-8, or has over `max_line` bytes; if a
  text holds NUL or half of a surrogate pair; if the number of fields is wrong; and if a `required`
  field is missing, null, empty (or white space) or not text. Each iteration starts from the first
  record, with new counts. A blank line is not a record.

  bad_rows: the fraction of bad records above which reading fails: at the end, or after PATIENCE
    bad records. 0 fails at the first.
  shard (k, n): only records whose number over all files (bad ones included) is k modulo n, so that
    n shards hold every record exactly once. Counts are of the shard; a RecordReader that `add`s the
    counts of all shards checks the fraction.
  required: fields that must hold text; those that are also in `lists` may hold a list of texts.
  flag: the command line flag that messages give for raising bad_rows; '' if there is none.
  Raises DataError for files without records, broken files and too many bad records.
  """

  def __init__(self, patterns: str | Sequence[str], *, bad_rows: float = 0.01,
               shard: tuple[int, int] = (0, 1), required: Sequence[str] = (),
               lists: Sequence[str] = (), max_line: int = 8 * 2**20,
               flag: str = '--config.data.bad_rows'):
    if not 0 <= bad_rows <= 1:
      raise UsageError(f'bad_rows must be a fraction between 0 and 1, got {bad_rows}')
    if not 0 <= shard[0] < shard[1]:
      raise UsageError(f'the shard must be 0 to {shard[1] - 1}, got shard {shard[0]} of {shard[1]}')
    if max_line < 1:
      raise UsageError(f'max_line must be at least 1 byte, got {max_line}')
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
        reason = fields if isinstance(fields, str) else self._problem(fields)
        if reason:
          self._skip(file, line, reason)
        else:
          self.good += 1
          yield Record(file, line, fields)
      if turns.seen == before:
        raise DataError(f'{file} holds no records')
    if self.shard[1] == 1:
      self.check_fraction()

  def _problem(self, fields: dict) -> str:
    """The reason why a record is bad, or ''."""
    for name, value in fields.items():
      if reason := _text_problem([value, name], self.max_line):
        return f'field {name!r} {reason}'
    for name in self.required:
      if name not in fields:
        return f'no field {name!r}.' + (did_you_mean(name, fields) if fields else '')
      if reason := _required_problem(fields[name], name in self.lists):
        return f'field {name!r} {reason}'
    return ''

  def _skip(self, file: str, line: int, reason: str):
    self.bad += 1
    if len(self.problems) < SHOWN:
      self.problems.append((file, line, reason))
    if self.bad_rows == 0:
      how = f' (no bad record is allowed; {self._flag}=0.01 skips up to 1 %)' if self._flag else ''
      raise DataError(f'{file}:{line}: {reason}{how}')
    if self.bad > PATIENCE:
      self.check_fraction()

  def counts(self) -> dict:
    """The counts of the reading so far, as plain JSON."""
    return {'good': self.good, 'bad': self.bad, 'problems': self.problems}

  def add(self, counts: dict) -> None:
    """Adds the `counts` of another shard's RecordReader."""
    self.good, self.bad = self.good + counts['good'], self.bad + counts['bad']
    problems = self.problems + [tuple(problem) for problem in counts['problems']]
    order = {file: i for i, file in enumerate(self.files)}
    self.problems = sorted(problems, key=lambda p: (order[p[0]], p[1]))[:SHOWN]

  def check_fraction(self) -> None:
    """DataError if the fraction of bad records is over the limit."""
    total = self.good + self.bad
    if self.bad > self.bad_rows * total:
      percent, limit = 100 * self.bad / total, 100 * self.bad_rows
      raise DataError(
          f'{self.bad:,} of {total:,} records are bad, {percent:.3g} %; the limit is {limit:.3g} % '
          f'(raise it by {self._flag}=…): {self._first(5)}')

  def _first(self, count: int) -> str:
    """The first bad records, in one line."""
    shown = [f'{file}:{line}: {reason}' for file, line, reason in self.problems[:count]]
    if self.bad > len(shown):
      shown.append(f'and {self.bad - len(shown):,} more')
    return '; '.join(shown)

  def summary(self) -> str:
    """One line about the records read so far."""
    if not self.bad:
      return f'{self.good:,} records'
    percent = 100 * self.bad / (self.good + self.bad)
    return (f'{self.good:,} records; {self.bad:,} bad ones skipped, {percent:.3g} %: '
            f'{self._first(3)}')


def _required_problem(value, may_be_list: bool) -> str:
  """The reason why a required value is unusable, or ''."""
  if value is None:
    return 'is null'
  is_list = isinstance(value, list) and may_be_list
  texts = value if is_list else [value]
  wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
  if wrong and is_list:
    return f'is a list that holds {wrong[0]}, not only text'
  if wrong:
    return f'is {wrong[0]}, not text'
  return '' if texts and all(text.strip() for text in texts) else 'is empty'


def _text_problem(value, longest: int) -> str:
  """The reason why the texts in a value, however deep, are unusable, or ''."""
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


# --- writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def write(path: str | os.PathLike):
  """write(fields: dict) -> one JSON line; .gz and .zst by name. Times are written in ISO 8601.

  The file appears whole when the block ends, or not at all. Equal records give equal bytes.
  Raises UsageError for another format, DataError for records and files that cannot be written.

    with records.write('clean.jsonl.gz') as write:
      write({'text': 'one'})
  """
  path = os.fspath(path)
  format, packing = record_formats.format_of(path)
  if format != 'jsonl':
    raise UsageError(f'{path}: records are written as .jsonl, .jsonl.gz or .jsonl.zst')

  def put(fields: dict):
    try:
      line = json.dumps(fields, ensure_ascii=False, default=_iso_format).encode('utf-8')
    except (TypeError, ValueError, RecursionError) as e:
      raise DataError(f'a record cannot be written as JSON: {e}') from e
    with _file_errors(path):
      out.write(line + b'\n')

  with contextlib.ExitStack() as stack:
    with _file_errors(path):
      file = stack.enter_context(files.replacing(path))
    out = _packer(file, packing)
    yield put
    with _file_errors(path):
      if out is not file:
        out.close()
      stack.close()                  # flushes, syncs and renames


@contextlib.contextmanager
def _file_errors(path):
  try:
    yield
  except OSError as e:
    raise DataError(f'{path} cannot be written: {e.strerror or e}') from e


def _packer(file, packing: str):
  if packing == 'gz':
    return gzip.GzipFile(filename='', fileobj=file, mode='wb', compresslevel=6, mtime=0)
  if packing == 'zst':
    import pyarrow as pa
    # pyarrow can write this file but not close it: it is synced after its last byte.
    unclosed = types.SimpleNamespace(write=file.write, flush=file.flush, close=lambda: None,
                                     closed=False)
    return pa.CompressedOutputStream(unclosed, 'zstd')
  return file


def _iso_format(value) -> str:
  """Parquet's dates and times as text; TypeError for other values that JSON cannot hold."""
  if hasattr(value, 'isoformat'):
    return value.isoformat()
  raise TypeError(f'a value is {type(value).__name__}')
