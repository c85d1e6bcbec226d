"""File formats of records.py: `read` streams (line, fields) or (line, reason why it is bad).

CSV   as the csv module reads it, strictly: quoted fields may hold newlines (CRLF becomes one \\n).
      A quote that never closes makes every line up to the end of the file a bad record.
TSV   without quoting or escaping: a field ends at a tab, a record at a newline.
Text  UTF-8; a byte order mark, CRLF and blank lines are skipped.

Memory holds at most a line, a CSV record or BATCH records of Parquet or Arrow.
"""
from collections.abc import Iterator, Sequence
import contextlib
import csv
import functools
import gzip
import io
import json
import os
import zlib

from t5lab import files
from t5lab.errors import DataError, UsageError, did_you_mean

BATCH = 256              # records of Parquet and Arrow converted to Python objects at once
BUFFER = 1 << 18         # bytes
EXTENSIONS = {'jsonl': 'jsonl', 'json': 'jsonl', 'csv': 'csv', 'tsv': 'tsv', 'txt': 'txt',
              'parquet': 'parquet', 'arrow': 'arrow'}
PACKED = ('gz', 'zst')
ARROW_END = b'\xff\xff\xff\xff\0\0\0\0'     # of a closed stream; save_to_disk closes it


def format_of(file: str) -> tuple[str, str]:
  """(format, 'gz', 'zst' or '') by the name; UsageError for an unknown extension."""
  stem, _, last = file.lower().rpartition('.')
  packing = last if last in PACKED else ''
  format = EXTENSIONS.get(stem.rpartition('.')[2] if packing else last)
  if format is None or packing and format in ('parquet', 'arrow'):
    raise UsageError(
        f'{file}: records are read from .jsonl, .json (one object per line), .csv, .tsv and .txt, '
        'each also with .gz or .zst after it, from .parquet and .arrow')
  return format, packing


def is_table(file: str) -> bool:
  """True for formats with named fields; all others are lines of text."""
  try:
    return format_of(file)[0] != 'txt'
  except UsageError:
    return False


class Turns:
  """Selects the records of shard k of n, by their number over all files."""

  def __init__(self, k: int, n: int):
    self.k, self.n, self.seen = k, n, 0

  def take(self, count: int = 1) -> range:
    """The positions of the shard's records among the next `count`."""
    positions = range((self.k - self.seen) % self.n, count, self.n)
    self.seen += count
    return positions


def read(file: str, turns: Turns, max_line: int, required: Sequence[str] = ()) -> Iterator[tuple]:
  """Yields (line, fields dict or the reason why it is bad) of the records of one shard.

  required: columns that a file with a header or a schema must have.
  Raises DataError for a file that is damaged, truncated or unreadable.
  """
  format, packing = format_of(file)
  try:
    if format in ('parquet', 'arrow'):
      yield from _records(file, format, turns, required)
      return
    with _open_text(file, packing) as stream:
      # raw: (line, bytes, values, or a reason) of every record; parse: raw -> fields or a reason.
      # Records of other shards are not parsed.
      lines = _lines(stream, max_line)
      if format == 'csv':
        raw, parse = _csv(lines, max_line), list
      else:
        raw = ((line, text) for line, text in lines if text is None or text.strip())
        parse = functools.partial(_text, parse=TEXT[format], max_line=max_line)
      if format in ('csv', 'tsv'):
        raw, parse = _table(file, raw, parse, required)
      for line, value in raw:
        if turns.take():
          yield line, value if isinstance(value, str) else parse(value)
  except (OSError, EOFError, zlib.error) as e:
    if isinstance(e, OSError) and e.errno:
      raise DataError(f'{file} cannot be read: {e.strerror}') from e
    raise _damaged(file, e) from e


def _damaged(file: str, error) -> DataError:
  return DataError(f'{file} is damaged or truncated: {" ".join(str(error).split())[:200]}')


def _lines(stream, max_line: int) -> Iterator[tuple[int, bytes | None]]:
  """Yields (1-based number, line without its end); None for a line of over max_line bytes."""
  number = 0
  while line := stream.readline(max_line + 2):
    number += 1
    rest = line
    while rest and not rest.endswith(b'\n'):     # skip the rest of a long line
      rest = stream.readline(BUFFER)
    line = line.removesuffix(b'\n').removesuffix(b'\r')
    yield number, line if len(line) <= max_line else None


def _text(line: bytes | None, parse, max_line: int):
  """parse(text of the line), or the reason why the line is not text."""
  if line is None:
    return f'the line has over {max_line:,} bytes, the limit'
  try:
    return parse(line.decode('utf-8'))
  except UnicodeDecodeError as e:
    return f'not UTF-8: byte 0x{e.object[e.start]:02x} at byte {e.start} of the line'


def _json(text: str):
  try:
    value = json.loads(text)
  except RecursionError:
    return 'not valid JSON: nested too deeply'
  except ValueError as e:
    return f'not valid JSON: {" ".join(str(e).split())[:200]}'
  return value if isinstance(value, dict) else f'a JSON {type(value).__name__}, not an object'


TEXT = {'jsonl': _json, 'tsv': lambda text: text.split('\t'), 'txt': lambda text: {'text': text}}


def _table(file: str, raw: Iterator, parse, required: Sequence[str]):
  """Takes the header from raw -> (raw, parse to fields). parse: to the values, or a reason."""
  line, value = next(raw, (0, ''))
  if line == 0:
    raise DataError(f'{file} holds no records')
  names = value if isinstance(value, str) else parse(value)
  if isinstance(names, str):
    raise DataError(f'{file}:{line}: the header is bad: {names}')
  _check_columns(f'{file}:{line}: the header', names, required)

  def parse_fields(value):
    values = parse(value)
    if isinstance(values, str):
      return values
    if len(values) != len(names):
      return f'expected {len(names)} fields, got {len(values)}'
    return dict(zip(names, values))

  return raw, parse_fields


def _check_columns(what: str, names: Sequence[str], required: Sequence[str]):
  for i, name in enumerate(names):
    if not name.strip():
      raise DataError(f'{what} has no name for column {i + 1} of {len(names)}')
    if name in names[:i]:
      raise DataError(f'{what} names {name!r} twice')
  for name in required:
    if name not in names:
      raise DataError(f'{what} has no column {name!r}.{did_you_mean(name, names)}')


def _csv(lines: Iterator, max_line: int) -> Iterator[tuple]:
  """Yields (first line, values or a reason) of each record."""
  # The module has one limit for all its readers (131,072 characters per field): it is only raised.
  csv.field_size_limit(max(csv.field_size_limit(), max_line))
  number, problem = 0, ''          # of the last line; the first since the current record started

  def texts():
    nonlocal number, problem
    for line_number, line in lines:
      number = line_number
      # The quotes of a line that is not UTF-8 still count.
      problem = problem or _text(line, lambda text: '', max_line)
      yield (line or b'').decode('utf-8', 'replace') + '\n'

  records = csv.reader(texts(), strict=True)
  while True:
    start, problem = number + 1, ''
    try:
      values = next(records, None)
    except csv.Error as e:
      reason = problem or f'not valid CSV: {e}'
      reason = reason.replace('not valid CSV: unexpected end of data', 'unclosed quote')
      yield start, reason
      for line in range(start + 1, number + 1):
        yield line, f'part of the record at line {start}: {reason}'
      continue
    if problem or values:
      yield start, problem or values
    elif values is None:
      return


def _records(file: str, format: str, turns: Turns, required: Sequence[str]) -> Iterator[tuple]:
  """Yields (record number, fields) of Parquet or Arrow."""
  import pyarrow as pa
  try:
    with open_binary(file) as f:
      source = f if '://' in file else pa.memory_map(file)
      with source:
        schema, batches = (_parquet if format == 'parquet' else _arrow)(file, source)
        _check_columns(f'{file}:', schema.names, required)
        start = 0
        for batch in batches:
          positions = turns.take(batch.num_rows)
          if positions:
            own = batch if turns.n == 1 else batch.take(pa.array(positions, pa.int64()))
            yield from zip((start + i + 1 for i in positions), _to_python(own))
          start += batch.num_rows
  except pa.lib.ArrowException as e:
    raise _damaged(file, e) from e


def _parquet(file: str, source):
  import pyarrow.parquet as pq
  # pre_buffer, the default, would read whole column chunks of a remote file and ignore the buffer
  parquet = pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
  batches = (batch for group in range(parquet.num_row_groups)
             for batch in parquet.iter_batches(BATCH, row_groups=[group]))
  return parquet.schema_arrow, batches


def _arrow(file: str, source):
  """Arrow's IPC: a stream, which `datasets` writes, or a file."""
  import pyarrow as pa
  if source.read(6) == b'ARROW1':
    source.seek(0)
    arrow = pa.ipc.open_file(source)
    batches = (arrow.get_batch(i) for i in range(arrow.num_record_batches))
  else:
    source.seek(max(0, source.seek(0, os.SEEK_END) - len(ARROW_END)))
    if source.read(len(ARROW_END)) != ARROW_END:
      raise _damaged(file, 'its last bytes do not end an Arrow stream')
    source.seek(0)
    arrow = pa.ipc.open_stream(source)
    batches = iter(arrow)
  small = (batch.slice(start, BATCH) for batch in map(_checked, batches)
           for start in range(0, batch.num_rows, BATCH))
  return arrow.schema, small


def _checked(batch):
  """Raises ArrowException for offsets outside the data, which Arrow would follow."""
  import pyarrow as pa
  for column in batch.columns:
    try:
      column.validate(full=True)
    except pa.ArrowInvalid as e:
      if 'UTF8' not in str(e):          # that is a bad record, not a damaged file
        raise
  return batch


def _to_python(batch) -> list:
  try:
    return batch.to_pylist()
  except UnicodeDecodeError as e:
    if batch.num_rows > 1:
      return [_to_python(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
    return [f'not UTF-8: byte 0x{e.object[e.start]:02x} at byte {e.start} of a field']


@contextlib.contextmanager
def _open_text(file: str, packing: str):
  """A buffered binary stream of the file's content, unpacked, after its byte order mark."""
  with open_binary(file) as stream:
    if packing == 'gz':
      stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), BUFFER)
    elif packing == 'zst':     # python-zstandard reads a truncated stream without an error
      import pyarrow as pa
      stream = io.BufferedReader(pa.CompressedInputStream(stream, 'zstd'), BUFFER)
    head = stream.peek(3)[:3]
    if head[:2] in (b'\xff\xfe', b'\xfe\xff'):
      raise DataError(f'{file} is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8')
    if head == b'\xef\xbb\xbf':
      stream.read(3)
    yield stream


def filesystem(url: str):
  """(fsspec file system, path in it) of a URL, e.g. gs://bucket/name."""
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
    files.check_regular(file, DataError)
    return open(file, 'rb', buffering=BUFFER)
  fs, path = filesystem(file)
  return io.BufferedReader(fs.open(path, 'rb'), BUFFER)


def exists(path: str) -> bool:
  fs, remote = filesystem(path) if '://' in path else (os.path, path)
  return fs.exists(remote)


def is_folder(path: str) -> bool:
  fs, remote = filesystem(path) if '://' in path else (os.path, path)
  return fs.isdir(remote)


def names(folder: str) -> list[str]:
  """The names in a folder, sorted."""
  if '://' not in folder:
    return sorted(os.listdir(folder))
  fs, path = filesystem(folder)
  return sorted(entry.rstrip('/').rpartition('/')[2] for entry in fs.ls(path, detail=False))
