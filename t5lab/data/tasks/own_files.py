"""A person's own files -> examples {'inputs', 'targets', 'answers'} of text. Knows no tokens."""
from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import json
import string

from t5lab.data.sources import records
from t5lab.data.tasks.names import METRICS, OBJECTIVES
from t5lab.errors import DataError, UsageError, did_you_mean

NAME = 'files'   # of the seqio task that file_tasks.py makes of them
READING = 1      # part of the fingerprint: raise it when the same files give other examples


@dataclasses.dataclass(frozen=True)
class OwnFiles:
  """What to read, and how a row becomes an example.

  files: split -> patterns, as records.expand takes them: {'train': 'train/*.jsonl', …}.
  fields: {'inputs': column, 'targets': column}; inputs '' for text alone (language models). A
    targets column may hold a list of texts: all are right answers, the first is trained on.
  prompt: the inputs text, each {column} replaced by that column's text; {{ and }} are braces.
    '' is the inputs column as it is. 'translate English to German: {en}'
  bad_rows: as RecordReader takes it. metrics, objective: names, of names.METRICS and OBJECTIVES; an
    objective learns from text without inputs.
  """
  files: dict[str, str]
  fields: dict[str, str]
  prompt: str = ''
  bad_rows: float = 0.01
  metrics: tuple[str, ...] = ()
  objective: str = ''

  def check(self) -> None:
    """UsageError where this names no file or no column, or the prompt is none. Reads no file."""
    if not self.files or not all(self.files.values()):
      raise UsageError(f'data.files = {self.files} names no files of some split; it is '
                       "{'train': 'train/*.jsonl', 'validation': 'validation.jsonl'}")
    if set(self.fields) != {'inputs', 'targets'}:
      raise UsageError(f'data.fields = {self.fields} is not '
                       "{'inputs': column or '', 'targets': column}")
    if not self.fields['targets']:
      raise UsageError("data.fields.targets = '' names no column; text alone is targets, "
                       "with data.fields.inputs = ''")
    if self.objective and (self.fields['inputs'] or self.prompt):
      raise UsageError(f'data.objective={self.objective!r} makes inputs of its own from the column '
                       "data.fields.targets: set data.fields.inputs='' and data.prompt=''")
    for name in self.metrics:
      if name not in METRICS:
        raise UsageError(f'data.metrics names {name!r}.{did_you_mean(name, METRICS)}')
    if self.objective and self.objective not in OBJECTIVES:
      raise UsageError(f'data.objective={self.objective!r}.'
                       + did_you_mean(self.objective, OBJECTIVES))
    if not self.prompt:
      return
    if not self.fields['inputs']:
      raise UsageError(f'data.prompt = {self.prompt!r} makes inputs, and data.fields.inputs = '
                       "'' says that there are none: set one of them")
    if not any(column is not None for _, column in _pieces(self.prompt)):
      raise UsageError(f'data.prompt = {self.prompt!r} names no column, so all inputs were the '
                       f'same; did you mean {self.prompt + "{" + self.fields["inputs"] + "}"!r}?')

  def _input_columns(self) -> list[str]:
    if self.prompt:
      named = [column for _, column in _pieces(self.prompt) if column is not None]
      return list(dict.fromkeys(named))
    return [self.fields['inputs']] if self.fields['inputs'] else []

  def columns(self) -> list[str]:
    """The columns that every row needs, each once: those of the inputs, then targets."""
    return list(dict.fromkeys([*self._input_columns(), self.fields['targets']]))

  def prompt_of(self, fields: dict[str, str]) -> str:
    """The inputs text of a row: {'en': 'Hi'} -> 'translate English to German: Hi'.

    Braces in the fields' texts stay as they are. DataError for a column that is not there.
    """
    for column in self._input_columns():
      if column not in fields:
        raise DataError(f'the prompt needs the column {column!r}.{did_you_mean(column, fields)}')
    if not self.prompt:
      return fields[self.fields['inputs']] if self.fields['inputs'] else ''
    return ''.join(literal + ('' if column is None else fields[column])
                   for literal, column in _pieces(self.prompt))

  def ask(self, row: str | dict) -> str:
    """The model's input for a row of the columns, or for a text that fills the only one."""
    columns = self._input_columns()
    if isinstance(row, str):
      if not columns:
        return row
      if len(columns) > 1:
        raise UsageError(f'the prompt needs the columns {", ".join(columns)}: give JSON lines with '
                         'these keys, not bare text')
      row = {columns[0]: row}
    missing = [name for name in columns if not isinstance(row.get(name), str)]
    if missing:
      raise UsageError(f'the prompt needs the text columns {", ".join(columns)}; missing: '
                       f'{", ".join(missing)}; the row has: {", ".join(map(str, row)) or "none"}')
    return self.prompt_of(row)

  def source(self, text: str) -> str:
    """The column inside a prompt of one column: 'translate: Hi' -> 'Hi'; else the text."""
    pieces = _pieces(self.prompt)
    if sum(column is not None for _, column in pieces) != 1:
      return text
    at = next(i for i, (_, column) in enumerate(pieces) if column is not None)
    before = ''.join(literal for literal, _ in pieces[:at + 1])
    after = ''.join(literal for literal, _ in pieces[at + 1:])
    return text.removeprefix(before).removesuffix(after)

  def reader(self, split: str, shard: tuple[int, int] = (0, 1)) -> records.RecordReader:
    """The rows of a split, whose counts say how the reading went."""
    if split not in self.files:
      raise UsageError(f'data.files has no split {split!r}.{did_you_mean(split, self.files)}')
    targets = self.fields['targets']
    lists = () if targets in self._input_columns() else (targets,)
    return records.RecordReader(self.files[split], bad_rows=self.bad_rows, shard=shard,
                                required=self.columns(), lists=lists)

  def example(self, fields: dict) -> dict:
    """{'inputs': str, 'targets': str, 'answers': [str, …]} of a row's fields."""
    targets = fields[self.fields['targets']]
    answers = list(targets) if isinstance(targets, list) else [targets]
    return {'inputs': self.prompt_of(fields), 'targets': answers[0], 'answers': answers}

  def examples(self, split: str, shard: tuple[int, int] = (0, 1)) -> Iterator[dict]:
    """The examples of one split, in the order of the files; shard (k, n) as RecordReader takes it."""
    return (self.example(row.fields) for row in self.reader(split, shard))

  def fingerprint(self) -> str:
    """32 hex digits of all that decides the examples, but for what the files hold.

    Not bad_rows: it decides whether reading fails, not what it gives.
    """
    said = json.dumps([READING, self.files, self.fields, self.prompt], sort_keys=True)
    return hashlib.sha256(said.encode('utf-8')).hexdigest()[:32]


@functools.lru_cache(maxsize=64)
def _pieces(prompt: str) -> tuple[tuple[str, str | None], ...]:
  """(literal text, column or None) in order. Only names: no index, attribute or format."""
  how = 'a column is {name}, a brace {{ or }}'
  try:
    pieces = list(string.Formatter().parse(prompt))
  except ValueError as e:
    raise UsageError(f'data.prompt = {prompt!r}: {e}; {how}') from e
  for _, column, form, conversion in pieces:
    if column is None:
      continue
    if not column.strip() or column.isdigit():
      raise UsageError(f'data.prompt = {prompt!r}: {{{column}}} names no column; {how}')
    if form or conversion:
      raise UsageError(f'data.prompt = {prompt!r}: {{{column}}} has a format behind its name, '
                       f'and only text is put in; {how}')
  return tuple((literal, column) for literal, column, _, _ in pieces)
