"""File formats of rows.py: `read` streams (line, fields) or (line, why the row is bad).

CSV   as the csv module reads it, strictly: quoted fields may hold newlines (CRLF becomes one \\n).
      A quote that never closes makes every line that it swallowed a bad row.
TSV   nothing is quoted or escaped: a field ends at a tab, a row at a newline.
Text  UTF-8; a byte order mark, CRLF and blank lines are passed over.

Nothing holds more than a line, a CSV record or BATCH records of Parquet or Arrow.
"""
from collections.abc import Iterator, Sequence
import contextlib
import csv
import functools
import gzip
import io
import json
import os
import pathlib
import zlib

from t5lab.data.vocab import tokenizer_config
from t5lab.errors import DataError, UsageError, did_you_mean

BATCH = 256              # records of Parquet and Arrow that become Python objects at once
BUFFER = 1 << 18         # bytes
EXTENSIONS = {'jsonl': 'jsonl', 'json': 'jsonl', 'csv': 'csv', 'tsv': 'tsv', 'txt': 'txt',
              'parquet': 'parquet', 'arrow': 'arrow'}
PACKED = ('gz', 'zst')
ARROW_END = b'\xff\xff\xff\xff\0\0\0\0'     # of a stream that was closed, as save_to_disk does


def format_of(file: str) -> tuple[str, str]:
  """(format, 'gz', 'zst' or '') by the name; UsageError for a name that says nothing."""
  stem, _, last = file.lower().rpartition('.')
  packing = last if last in PACKED else ''
  format = EXTENSIONS.get(stem.rpartition('.')[2] if packing else last)
  if format is None or packing and format in ('parquet', 'arrow'):
    raise UsageError(
        f'{file}: rows are read from .jsonl, .json (one object a line), .csv, .tsv and .txt, each '
        'also with .gz or .zst behind it, from .parquet and .arrow')
  return format, packing


def is_table(file: str) -> bool:
  """Do its rows have named fields, by the name of the file? Text of other names has lines."""
  try:
    return format_of(file)[0] != 'txt'
  except UsageError:
    return False


class Turns:
  """Which rows are those of shard k of n, by their running number over all files."""

  def __init__(self, k: int, n: int):
    self.k, self.n, self.seen = k, n, 0

  def take(self, count: int = 1) -> range:
    """Of the next `count` rows, the positions of those that are ours."""
    mine = range((self.k - self.seen) % self.n, count, self.n)
    self.seen += count
    return mine


def read(file: str, turns: Turns, max_line: int, required: Sequence[str] = ()) -> Iterator[tuple]:
  """(line, fields dict or the reason why the row is bad) of the rows that are this shard's turn.

  required: columns that a file with a header or a schema must have.
  Raises DataError for a file that is broken, cut short or unreadable.
  """
  format, packing = format_of(file)
  try:
    if format in ('parquet', 'arrow'):
      yield from _records(file, format, turns, required)
      return
    with _open_text(file, packing) as stream:
      lines = _lines(stream, max_line)
      if format == 'csv':
        rows, parse = _csv(lines, max_line), list
      else:
        rows = ((line, text) for line, text in lines if text is None or text.strip())
        parse = functools.partial(_text, parse=TEXT[format], max_line=max_line)
      if format in ('csv', 'tsv'):
        rows, parse = _table(file, rows, parse, required)
      for line, raw in rows:
        if turns.take():
          yield line, raw if isinstance(raw, str) else parse(raw)
  except (OSError, EOFError, zlib.error) as e:
    if getattr(e, 'errno', None):
      raise DataError(f'{file} cannot be read: {e.strerror}') from e
    raise DataError(f'{file} is broken or cut short: {" ".join(str(e).split())[:200]}') from e


def _lines(stream, max_line: int) -> Iterator[tuple[int, bytes | None]]:
  """(1-based number, line without its end); None for a line over max_line, which is not held."""
  number = 0
  while line := stream.readline(max_line + 2):
    number += 1
    rest = line
    while rest and not rest.endswith(b'\n'):
      rest = stream.readline(BUFFER)
    line = line.removesuffix(b'\n').removesuffix(b'\r')
    yield number, line if len(line) <= max_line else None


def _text(line: bytes | None, parse, max_line: int):
  """parse(text of the line), or the reason why there is no text."""
  if line is None:
    return _too_long(max_line)
  try:
    return parse(line.decode('utf-8'))
  except UnicodeDecodeError as e:
    return _not_utf8(e)


def _too_long(max_line: int) -> str:
  return f'the line has over {max_line:,} bytes, the limit'


def _not_utf8(e: UnicodeDecodeError) -> str:
  return f'not UTF-8: byte 0x{e.object[e.start]:02x} at byte {e.start} of the line'


def _json(text: str):
  try:
    value = json.loads(text)
  except RecursionError:
    return 'not JSON that can be read: nested too deeply'
  except ValueError as e:
    return f'not JSON: {" ".join(str(e).split())[:200]}'
  return value if isinstance(value, dict) else f'a JSON {type(value).__name__}, not an object'


TEXT = {'jsonl': _json, 'tsv': lambda text: text.split('\t'), 'txt': lambda text: {'text': text}}


def _table(file: str, rows: Iterator, parse, required: Sequence[str]):
  """Takes the header from rows. parse: raw -> list of values, or a reason."""
  line, raw = next(rows, (0, ''))
  if line == 0:
    raise DataError(f'{file} holds no rows')
  names = raw if isinstance(raw, str) else parse(raw)
  if isinstance(names, str):
    raise DataError(f'{file}:{line}: the header is bad: {names}')
  _check_columns(f'{file}:{line}: the header', names, required)

  def row(raw):
    values = parse(raw)
    if isinstance(values, str):
      return values
    if len(values) != len(names):
      return f'expected {len(names)} fields, found {len(values)}'
    return dict(zip(names, values))

  return rows, row


def _check_columns(what: str, names: Sequence[str], required: Sequence[str]):
  for i, name in enumerate(names):
    if not name.strip():
      raise DataError(f'{what} has no name for column {i + 1} of {len(names)}')
    if name in names[:i]:
      raise DataError(f'{what} names {name!r} twice')
  for name in required:
    if name not in names:
      raise DataError(f'{what} has no column {name!r}.{did_you_mean(name, names)}')


class _CsvSource:
  """Text lines for csv.reader, which remember what was wrong with one since the record began."""

  def __init__(self, lines: Iterator, max_line: int):
    self.lines, self.max_line, self.number, self.problem = lines, max_line, 0, ''

  def __iter__(self):
    return self

  def __next__(self) -> str:
    self.number, line = next(self.lines)
    if line is None:
      self.problem = self.problem or _too_long(self.max_line)
      return '\n'
    try:
      return line.decode('utf-8') + '\n'
    except UnicodeDecodeError as e:         # its quotes still count
      self.problem = self.problem or _not_utf8(e)
      return line.decode('utf-8', 'replace') + '\n'


def _csv(lines: Iterator, max_line: int) -> Iterator[tuple]:
  """(first line, values or a reason) of each record."""
  # The module's one limit, 131,072 characters a field, is for all its readers: only ever raised.
  csv.field_size_limit(max(csv.field_size_limit(), max_line))
  source = _CsvSource(lines, max_line)
  records = csv.reader(source, strict=True)
  while True:
    start, source.problem = source.number + 1, ''
    try:
      values = next(records, None)
    except csv.Error as e:
      reason = source.problem or f'not CSV: {e}'
      reason = reason.replace('not CSV: unexpected end of data', 'unclosed quote')
      yield start, reason
      for line in range(start + 1, source.number + 1):
        yield line, f'lost to line {start}: {reason}'
      continue
    if source.problem:
      yield start, source.problem
    elif values:
      yield start, values
    elif values is None:
      return


def _records(file: str, format: str, turns: Turns, required: Sequence[str]) -> Iterator[tuple]:
  """(record number, fields) of Parquet or Arrow."""
  import pyarrow as pa
  try:
    with open_binary(file) as f:
      source = f if '://' in file else pa.memory_map(file)
      with source:
        schema, batches = (_parquet if format == 'parquet' else _arrow)(file, source)
        _check_columns(f'{file}:', schema.names, required)
        start = 0
        for batch in batches:
          mine = turns.take(batch.num_rows)
          if mine:
            rows = batch if turns.n == 1 else batch.take(pa.array(mine, pa.int64()))
            yield from zip((start + i + 1 for i in mine), _python(rows))
          start += batch.num_rows
  except pa.lib.ArrowException as e:
    raise DataError(f'{file} is broken or cut short: {" ".join(str(e).split())[:200]}') from e


def _parquet(file: str, source):
  import pyarrow.parquet as pq
  # pre_buffer, the default, would read whole column chunks of a remote file and ignore the buffer
  whole = pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
  return whole.schema_arrow, (batch for group in range(whole.num_row_groups)
                              for batch in whole.iter_batches(BATCH, row_groups=[group]))


def _arrow(file: str, source):
  """A stream, as `datasets` writes it, or a file of Arrow's IPC."""
  import pyarrow as pa
  if source.read(6) == b'ARROW1':
    source.seek(0)
    whole = pa.ipc.open_file(source)
    batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
  else:
    source.seek(max(0, source.seek(0, os.SEEK_END) - len(ARROW_END)))
    if source.read(len(ARROW_END)) != ARROW_END:
      raise DataError(f'{file} is broken or cut short: its last bytes do not end an Arrow stream')
    source.seek(0)
    whole = pa.ipc.open_stream(source)
    batches = iter(whole)
  return whole.schema, (batch.slice(start, BATCH) for batch in map(_checked, batches)
                        for start in range(0, batch.num_rows, BATCH))


def _checked(batch):
  """Raises ArrowException for offsets that lead out of the data: Arrow would follow them."""
  import pyarrow as pa
  for column in batch.columns:
    try:
      column.validate(full=True)
    except pa.ArrowInvalid as e:
      if 'UTF8' not in str(e):          # that is a bad row, not a broken file
        raise
  return batch


def _python(batch) -> list:
  try:
    return batch.to_pylist()
  except UnicodeDecodeError:
    return [_one(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _one(batch):
  try:
    return batch.to_pylist()[0]
  except UnicodeDecodeError as e:
    return f'not UTF-8: byte 0x{e.object[e.start]:02x} at byte {e.start} of a field'


@contextlib.contextmanager
def _open_text(file: str, packing: str):
  """A buffered binary stream of what the file holds, unpacked, behind its byte order mark."""
  with open_binary(file) as stream:
    if packing == 'gz':
      stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), BUFFER)
    elif packing == 'zst':     # python-zstandard reads a stream that is cut short without a word
      import pyarrow as pa
      stream = io.BufferedReader(pa.CompressedInputStream(stream, 'zstd'), BUFFER)
    head = stream.peek(3)[:3]
    if head[:2] in (b'\xff\xfe', b'\xfe\xff'):
      raise DataError(f'{file} is UTF-16; rows are read as UTF-8: iconv -f UTF-16 -t UTF-8')
    if head == b'\xef\xbb\xbf':
      stream.read(3)
    yield stream


def filesystem(url: str):
  """(fsspec file system, path in it) of a URL such as gs://bucket/name."""
  import fsspec
  try:
    return fsspec.core.url_to_fs(url)
  except ImportError as e:
    scheme = url.partition('://')[0]
    package = {'gs': 'gcsfs', 'gcs': 'gcsfs'}.get(scheme)
    how = f'pip install {package}' if package else ' '.join(str(e).split())
    raise UsageError(f'{url}: reading {scheme}:// needs another package: {how}') from e
  except ValueError as e:
    raise UsageError(f'{url}: {" ".join(str(e).split())}') from e


def open_binary(file: str):
  """A buffered binary file, local or by URL."""
  if '://' not in file:
    tokenizer_config.check_regular(pathlib.Path(file))
    return open(file, 'rb', buffering=BUFFER)
  fs, path = filesystem(file)
  return io.BufferedReader(fs.open(path, 'rb'), BUFFER)


def exists(path: str) -> bool:
  if '://' not in path:
    return os.path.exists(path)
  fs, path = filesystem(path)
  return fs.exists(path)


def is_folder(path: str) -> bool:
  if '://' not in path:
    return os.path.isdir(path)
  fs, path = filesystem(path)
  return fs.isdir(path)


def names(folder: str) -> list[str]:
  """What a folder holds, sorted."""
  if '://' not in folder:
    return sorted(os.listdir(folder))
  fs, path = filesystem(folder)
  return sorted(entry.rstrip('/').rpartition('/')[2] for entry in fs.ls(path, detail=False))
