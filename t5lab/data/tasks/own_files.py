"""The user's own files as examples {'inputs', 'targets', 'answers'} of plain text."""
import dataclasses
import functools
import hashlib
import json
import string

from t5lab.data.sources import records
from t5lab.data.tasks import names, prompts
from t5lab.errors import DataError, UsageError, did_you_mean

NAME = 'files'   # of the seqio task on these files, see builtin.py
READING = 1      # part of the fingerprint: raise it when the same files give other examples


@dataclasses.dataclass(frozen=True)
class OwnFiles:
  """The files to read, and how a record becomes an example.

  files: split -> patterns for records.expand, e.g. {'train': 'train/*.jsonl'}.
  fields: {'inputs': column, 'targets': column}; inputs '' for unlabelled text (language models). If
    the targets column holds a list, every entry counts as correct, and the first is trained on.
  prompt: the inputs text, e.g. 'translate English to German: {en}'. Each {column} is replaced by
    that column's text; {{ and }} are braces. '' uses the inputs column as it is.
  bad_rows: the fraction of bad records that RecordReader tolerates.
  metrics, objective: among names.METRICS and names.OBJECTIVES. An objective learns from unlabelled
    text.
  """
  files: dict[str, str]
  fields: dict[str, str]
  prompt: str = ''
  bad_rows: float = 0.01
  metrics: tuple[str, ...] = ()
  objective: str = ''

  def check(self) -> None:
    """UsageError for missing files or columns, a bad prompt or an unknown name; reads no file."""
    if not self.files or not all(self.files.values()):
      raise UsageError(f'data.files must name files for every split, got {self.files}; e.g. '
                       "{'train': 'train/*.jsonl', 'validation': 'validation.jsonl'}")
    if set(self.fields) != {'inputs', 'targets'}:
      raise UsageError("data.fields must be {'inputs': column or '', 'targets': column}, got "
                       f'{self.fields}')
    if not self.fields['targets']:
      raise UsageError("data.fields.targets must name a column, got ''; for unlabelled text name "
                       "its column and set data.fields.inputs=''")
    for name in self.metrics:
      if name not in names.METRICS:
        raise UsageError(f'data.metrics names {name!r}.{did_you_mean(name, names.METRICS)}')
    if self.objective and (self.fields['inputs'] or self.prompt):
      raise UsageError(f'data.objective={self.objective!r} makes its own inputs from the column '
                       "data.fields.targets: set data.fields.inputs='' and data.prompt=''")
    if self.objective and self.objective not in names.OBJECTIVES:
      raise UsageError(f'data.objective={self.objective!r}.'
                       + did_you_mean(self.objective, names.OBJECTIVES))
    if self.prompt and not self.fields['inputs']:
      raise UsageError(f'data.prompt={self.prompt!r} makes inputs, and data.fields.inputs='
                       "'' means that there are none: set one of them")
    if self.prompt and not self._input_columns():
      suggestion = self.prompt + '{' + self.fields['inputs'] + '}'
      raise UsageError(f'data.prompt={self.prompt!r} names no column, so all inputs would be the '
                       f'same; did you mean {suggestion!r}?')

  def _template(self) -> prompts.Pieces:
    """The inputs as pieces: see prompts.py."""
    if self.prompt:
      return _checked_pieces(self.prompt)
    return [('', self.fields['inputs'])] if self.fields['inputs'] else []

  def _input_columns(self) -> list[str]:
    return list(dict.fromkeys(
        column for _, column in self._template() if column is not None))

  def columns(self) -> list[str]:
    """The columns that every record needs, each once: those of the inputs, then targets."""
    return list(dict.fromkeys([*self._input_columns(), self.fields['targets']]))

  def fill_prompt(self, fields: dict[str, str]) -> str:
    """The inputs text of a record, whose texts may hold braces. DataError for a missing column."""
    for column in self._input_columns():
      if column not in fields:
        raise DataError(f'the prompt needs the column {column!r}.{did_you_mean(column, fields)}')
    return prompts.fill(self._template(), fields)

  def inputs_for(self, record: str | dict) -> str:
    """The model's input for a user's record, or for a text that fills the only column."""
    columns = self._input_columns()
    if reason := prompts.problem(record, columns, 'the prompt', 'columns'):
      raise UsageError(reason)
    if isinstance(record, str):
      return self.fill_prompt({columns[0]: record}) if columns else record
    return self.fill_prompt(record)

  def without_prompt(self, text: str) -> str:
    """The column inside a prompt of one column: 'translate: Hi' -> 'Hi'. Otherwise the text."""
    return prompts.without(self._template(), text)

  def example(self, fields: dict) -> dict:
    """{'inputs': str, 'targets': str, 'answers': [str, …]} of a record's fields."""
    targets = fields[self.fields['targets']]
    answers = list(targets) if isinstance(targets, list) else [targets]
    return {'inputs': self.fill_prompt(fields), 'targets': answers[0], 'answers': answers}

  def reader(self, split: str, shard: tuple[int, int] = (0, 1)) -> records.RecordReader:
    """A reader of the records of a split; it counts the good and the bad ones."""
    if split not in self.files:
      raise UsageError(f'data.files has no split {split!r}.{did_you_mean(split, self.files)}')
    targets = self.fields['targets']
    lists = () if targets in self._input_columns() else (targets,)
    return records.RecordReader(self.files[split], bad_rows=self.bad_rows, shard=shard,
                                required=self.columns(), lists=lists)

  def fingerprint(self) -> str:
    """32 hex digits of the settings that decide the examples: no file contents, and no bad_rows."""
    settings = json.dumps([READING, self.files, self.fields, self.prompt], sort_keys=True)
    return hashlib.sha256(settings.encode('utf-8')).hexdigest()[:32]


@functools.lru_cache(maxsize=64)
def _checked_pieces(prompt: str) -> prompts.Pieces:
  """The pieces of a prompt. UsageError for a column that has a format or is not a valid name."""
  syntax = 'a column is {name}, a brace {{ or }}'
  try:
    parsed = list(string.Formatter().parse(prompt))
  except ValueError as e:
    raise UsageError(f'data.prompt={prompt!r}: {e}; {syntax}') from e
  for _, column, format_spec, conversion in parsed:
    if column is None:
      continue
    if not column.strip() or column.isdigit():
      raise UsageError(f'data.prompt={prompt!r}: {{{column}}} names no column; {syntax}')
    if format_spec or conversion:
      raise UsageError(f'data.prompt={prompt!r}: {{{column}}} has a format after its name, but '
                       f'only text is inserted; {syntax}')
  return prompts.pieces(prompt)
