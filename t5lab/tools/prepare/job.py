"""What the preparation tools share: rows in with progress, rows out, a report of what was done.

A report is OUTPUT.report.json: {command, inputs: [{file, bytes}], rows: {read, unreadable, written,
…}, rules: {name: {count, examples}}, settings, seconds, and what a tool adds}.
"""
from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import sys
import time

from t5lab.data.sources import rows
from t5lab.errors import DataError, UsageError

EXAMPLES = 3                    # of a rule, in the report
SHOWN = 200                     # characters of an example
ROWS = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
PLAIN = ('.jsonl', '.json', '.csv', '.tsv', '.txt')   # their bytes are about those of the fields
EVERY = 5.                      # seconds between two lines of progress


class Job:
  """One run of a tool: its inputs and output, the rows it reads and writes, what its rules did.

  inputs: patterns as rows.expand takes them. fields: columns of text that every row must have.
  settings: for the report. ends: what the name of the output may end in; says: where progress goes.
  UsageError before anything is read: an output that exists (unless overwrite), that is an input,
  whose folder does not exist, or whose name ends otherwise.
  """

  def __init__(self, command: str, inputs: str | Sequence[str], output: str,
               fields: Sequence[str] = ('text',), *, settings: dict | None = None,
               bad_rows: float = 0.01, overwrite: bool = False, ends: Sequence[str] = ROWS,
               says=None):
    self.command, self.output, self.fields = command, str(output), tuple(fields)
    self.settings = dict(settings or {})
    self.files = rows.expand(inputs)
    self.counts = {'read': 0, 'unreadable': 0}
    self.rules, self.more = {}, {}
    self.report_path = f'{self.output}.report.json'
    self._bad_rows, self._says = bad_rows, says or sys.stderr
    self._began = time.perf_counter()
    self._check_output(ends, overwrite)

  def _check_output(self, ends, overwrite):
    path = pathlib.Path(self.output)
    if not self.output.endswith(tuple(ends)):
      raise UsageError(f'--output {self.output}: its name must end in {" or ".join(ends)}')
    if not path.absolute().parent.is_dir():
      raise UsageError(f'--output {self.output}: its folder does not exist')
    if os.path.realpath(path) in map(os.path.realpath, self.files):
      raise UsageError(f'--output {self.output} is one of the inputs; name another file')
    for there in (self.output, self.report_path):
      if os.path.exists(there) and not overwrite:
        raise UsageError(f'{there} exists; --overwrite replaces it')

  def read(self, what: str = '', *, again: bool = False) -> Iterator[rows.Row]:
    """The rows one by one, with progress on stderr. `again`: a later pass over them."""
    reader = rows.Reader(self.files, bad_rows=self._bad_rows, required=self.fields,
                         flag='--bad-rows')
    yield from self._shown(reader, what, self.counts['read'] if again else 0)
    self.counts.update(read=reader.good, unreadable=reader.bad)
    if reader.bad:
      self.more['unreadable'] = [{'row': f'{file}:{line}', 'reason': why}
                                 for file, line, why in reader.problems]

  def read_others(self, what: str, files: Sequence[str], fields: Sequence[str]
                  ) -> Iterator[rows.Row]:
    """Rows of other files, whose fields may hold lists of texts."""
    reader = rows.Reader(files, bad_rows=self._bad_rows, required=fields, lists=fields,
                         flag='--bad-rows')
    yield from self._shown(reader, what)

  def _shown(self, reader, what, rows_in_all=0):
    progress = Progress(f'{self.command} {what}'.strip(), reader.files, self._says, rows_in_all)
    for row in reader:
      progress.tick(row)
      yield row
    progress.done()

  def texts(self, row: rows.Row) -> list[str]:
    return [row.fields[name] for name in self.fields]

  def count(self, rule: str, row: rows.Row | None = None, text: str = '', at: int = 0,
            by: int = 1) -> None:
    """Counts what a rule did; the first few texts it did it to, around `at`, become examples."""
    entry = self.rules.setdefault(rule, {'count': 0, 'examples': []})
    entry['count'] += by
    if row is not None and len(entry['examples']) < EXAMPLES:
      entry['examples'].append({'row': where(row), 'text': shorten(text, at)})

  @contextlib.contextmanager
  def write(self):
    """A function that writes a row's fields. Output and report appear when all went well."""
    self.counts['written'] = 0

    def put(fields: dict) -> None:
      write(fields)
      self.counts['written'] += 1

    with rows.write(self.output) as write:
      yield put
      remove(self.report_path)          # of an output that this one replaces
    self.finish()

  def write_bytes(self, data: bytes) -> None:
    """An output that is no rows: whole or not at all. The report is the caller's to finish."""
    remove(self.report_path)
    replace(self.output, data)

  def finish(self) -> dict:
    """Writes the report, and returns it."""
    report = {
        'command': self.command,
        'inputs': [{'file': file, 'bytes': size(file)} for file in self.files],
        'output': self.output, 'fields': list(self.fields), 'rows': self.counts,
        'rules': self.rules, **self.more, 'settings': self.settings,
        'seconds': round(time.perf_counter() - self._began, 3)}
    text = json.dumps(report, ensure_ascii=False, indent=1) + '\n'
    replace(self.report_path, text.encode('utf-8', 'backslashreplace'))
    return report


class Progress:
  """A line every few seconds: rows, rows a second, and the time left where it can be known.

  It can be where the number of rows is known from an earlier pass (`rows_in_all`), or the bytes of
  the files: a plain file is as far as its rows' texts add up to, a packed one counts when it ends.
  """

  def __init__(self, what: str, files: Sequence[str], says, rows_in_all: int = 0):
    self._what, self._says, self._in_all = what, says, rows_in_all
    self._sizes = {file: size(file) for file in files}
    self._file, self._before, self._inside = None, 0, 0
    self._rows = 0
    self._began = self._said = time.perf_counter()

  def tick(self, row: rows.Row) -> None:
    self._rows += 1
    if row.file != self._file:
      self._before += self._sizes.get(self._file) or 0
      self._file, self._inside = row.file, 0
    if row.file.endswith(PLAIN):
      self._inside += sum(len(v.encode('utf-8', 'replace')) + len(name) + 6
                          for name, v in row.fields.items() if isinstance(v, str))
    if self._rows % 64 == 0 and (now := time.perf_counter()) - self._said >= EVERY:
      self._said = now
      left = self._left(now - self._began)
      eta = '' if left is None else f' · ETA {int(left) // 60}:{int(left) % 60:02d}'
      self._say(now, eta)

  def _left(self, took: float) -> float | None:
    if self._in_all:
      share = self._rows / self._in_all
    elif self._sizes and None not in self._sizes.values():
      inside = min(self._inside, self._sizes.get(self._file, 0))
      share = (self._before + inside) / max(1, sum(self._sizes.values()))
    else:
      return None
    return took * (1 / share - 1) if share > 0 else None

  def done(self) -> None:
    self._say(time.perf_counter(), ' · done')

  def _say(self, now, end):
    rate = self._rows / max(now - self._began, 1e-9)
    print(f'{self._what}: {self._rows:,} rows · {rate:,.0f} rows/s{end}', file=self._says,
          flush=True)


def where(row: rows.Row) -> str:
  return f'{row.file}:{row.line}'


def shorten(text: str, at: int = 0) -> str:
  first = max(0, at - SHOWN // 2)
  last = first + SHOWN
  return '…' * (first > 0) + text[first:last] + '…' * (last < len(text))


def size(file: str) -> int | None:
  """Bytes of a local file, or of the files of a folder; None of one elsewhere."""
  path = pathlib.Path(file)
  if path.is_dir():
    return sum(p.stat().st_size for p in path.rglob('*') if p.is_file())
  return path.stat().st_size if path.is_file() else None


def remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)


def replace(path: str, data: bytes) -> None:
  """A file that appears whole or not at all."""
  part = f'{path}.part'
  try:
    with open(part, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, path)
  except OSError as e:
    raise DataError(f'cannot write {path}: {e.strerror}') from e
  finally:
    remove(part)
