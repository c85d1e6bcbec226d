"""Shared by the preparation tools: records in with progress, records out, and a report.

The report is OUTPUT.report.json: {command, inputs: [{file, bytes}], output, fields, rows: {read,
unreadable, written, …}, rules: {name: {count, examples}}, settings, seconds, and keys that a tool
adds}.
"""
from collections.abc import Iterator, Sequence
import contextlib
import json
import os
from pathlib import Path
import time
from typing import IO

from t5lab import files
from t5lab.data.sources import records
from t5lab.errors import DataError, UsageError

EXAMPLES_PER_RULE = 3           # in the report
EXCERPT = 200                   # characters of an example
OUTPUT_SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
PLAIN_SUFFIXES = ('.jsonl', '.json', '.csv', '.tsv', '.txt')   # about as large as their fields


class PrepareJob:
  """One run of a tool: its inputs and output, its records, and counts of what its rules did.

  inputs: patterns as records.expand takes them. fields: text columns that every record must have.
  settings: copied into the report. suffixes: how the output's name may end. log: file for progress
  lines (default: standard error).
  Raises UsageError before anything is read if the output exists (unless overwrite), is an input, is
  in a folder that does not exist, or has another suffix.
  """

  def __init__(self, command: str, inputs: str | Sequence[str], output: str,
               fields: Sequence[str] = ('text',), *, settings: dict | None = None,
               bad_rows: float = 0.01, overwrite: bool = False,
               suffixes: Sequence[str] = OUTPUT_SUFFIXES, log: IO | None = None):
    self.command, self.output, self.fields = command, str(output), tuple(fields)
    self.settings = dict(settings or {})
    self.files = records.expand(inputs)
    self.counts = {'read': 0, 'unreadable': 0}
    self.rules, self.extra = {}, {}
    self.report_path = f'{self.output}.report.json'
    self._bad_rows, self._log = bad_rows, log
    self._start = time.perf_counter()

    path = Path(self.output)
    if not self.output.endswith(tuple(suffixes)):
      raise UsageError(f'--output must end in {" or ".join(suffixes)}, got {self.output}')
    if not path.absolute().parent.is_dir():
      raise UsageError(f'--output {self.output}: its folder does not exist')
    if os.path.realpath(path) in map(os.path.realpath, self.files):
      raise UsageError(f'--output {self.output} is one of the inputs; choose another file')
    for existing in (self.output, self.report_path):
      if os.path.exists(existing) and not overwrite:
        raise UsageError(f'{existing} exists; add --overwrite to replace it')

  def read(self, phase: str = '', *, again: bool = False) -> Iterator[records.Record]:
    """Yields the records of the inputs. again: a later pass, whose length is known."""
    reader = yield from self._read(self.files, phase, self.counts['read'] if again else None,
                                   required=self.fields)
    self.counts.update(read=reader.good, unreadable=reader.bad)
    if reader.bad:
      self.extra['unreadable'] = [{'row': f'{file}:{line}', 'reason': reason}
                                  for file, line, reason in reader.problems]

  def read_others(self, phase: str, paths: Sequence[str], fields: Sequence[str]
                  ) -> Iterator[records.Record]:
    """Yields the records of other files, whose fields may hold lists of texts."""
    return self._read(paths, phase, required=fields, lists=fields)

  def _read(self, paths, phase, total=None, **options):
    """Yields records, then returns their reader. Without a total, bytes read give the time left.

    In a plain file the texts of its records are summed; a compressed one counts when it ends.
    """
    reader = records.RecordReader(paths, bad_rows=self._bad_rows, flag='--bad-rows', **options)
    sizes = {path: _local_bytes(path) for path in reader.files}
    is_known = not total and None not in sizes.values()
    all_bytes = max(1, sum(sizes.values())) if is_known else None
    file, in_file, in_earlier_files, fraction = '', 0, 0, None
    with files.Progress(f'{self.command} {phase}'.strip(), 'records', total,
                        file=self._log) as progress:
      for record in reader:
        if is_known:
          if record.file != file:
            in_earlier_files += sizes.get(file, 0)
            file, in_file = record.file, 0
          if file.endswith(PLAIN_SUFFIXES):
            # 6: the quotes, colon and comma around a name and its value.
            in_file += sum(len(value.encode('utf-8', 'replace')) + len(name) + 6
                           for name, value in record.fields.items() if isinstance(value, str))
          fraction = (in_earlier_files + min(in_file, sizes[file])) / all_bytes
        progress.add(1, fraction)
        yield record
    return reader

  def texts(self, record: records.Record) -> list[str]:
    return [record.fields[name] for name in self.fields]

  def declare(self, *rules: str) -> None:
    """Adds rules to the report with a count of zero."""
    for rule in rules:
      self.rules.setdefault(rule, {'count': 0, 'examples': []})

  def count(self, rule: str, record: records.Record, text: str, at: int = 0) -> None:
    """Counts one application of a rule; the first few excerpts, around `at`, become examples."""
    self.declare(rule)
    entry = self.rules[rule]
    entry['count'] += 1
    if len(entry['examples']) < EXAMPLES_PER_RULE:
      entry['examples'].append({'row': location(record), 'text': excerpt(text, at)})

  @contextlib.contextmanager
  def write(self):
    """Yields a function that writes a record's fields.

    The output and the report appear when the block ends without an exception.
    """
    self.counts['written'] = 0

    def write_record(fields: dict) -> None:
      write(fields)
      self.counts['written'] += 1

    with records.write(self.output) as write:
      yield write_record
      self._remove_old_report()
    self.finish()

  def write_bytes(self, data: bytes) -> None:
    """Writes an output that is not made of records. The caller calls finish()."""
    self._remove_old_report()
    _write(self.output, data)

  def _remove_old_report(self):
    """Removes the report of the output that is about to be replaced."""
    Path(self.report_path).unlink(missing_ok=True)

  def finish(self) -> None:
    """Writes the report."""
    report = {
        'command': self.command,
        'inputs': [{'file': file, 'bytes': _local_bytes(file)} for file in self.files],
        'output': self.output, 'fields': list(self.fields), 'rows': self.counts,
        'rules': self.rules, **self.extra, 'settings': self.settings,
        'seconds': round(time.perf_counter() - self._start, 3)}
    text = json.dumps(report, ensure_ascii=False, indent=1) + '\n'
    _write(self.report_path, text.encode('utf-8', 'backslashreplace'))


def location(record: records.Record) -> str:
  return f'{record.file}:{record.line}'


def excerpt(text: str, at: int = 0) -> str:
  first = max(0, at - EXCERPT // 2)
  last = first + EXCERPT
  return '…' * (first > 0) + text[first:last] + '…' * (last < len(text))


def _local_bytes(file: str) -> int | None:
  """None for a file that is not local."""
  path = Path(file)
  return path.stat().st_size if path.is_file() else None


def _write(path: str, data: bytes) -> None:
  try:
    with files.replacing(path) as f:
      f.write(data)
  except OSError as e:
    raise DataError(f'cannot write {path}: {e.strerror}') from e
