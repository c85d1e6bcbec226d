"""The prompts of supervised tasks: the text around the fields of a record.

This module is pure text without TensorFlow, so that inference needs none. [Raffel et al. 2020,
appendix D]
"""
import re
import string
from types import MappingProxyType

from t5lab.errors import UsageError, did_you_mean

PROMPTS = MappingProxyType({
    'ha_ende': 'translate English to German: {en}',
    'ha_enfr': 'translate English to French: {en}',
    'ha_enes': 'translate English to Spanish: {en}',
    'docs_summarize': 'summarize: {document}',
    'numpydoc_qa': 'question: {question} context: {context}',
    'g2p_en_us': '{word}',
})
BARE = frozenset({'g2p_en_us'})      # only the field: in a mixture, nothing would name the task
PADDED = frozenset({'numpydoc_qa'})  # fields and prompt go through T5's punctuation padding

Pieces = list[tuple[str, str | None]]     # of a template: literal text, the column after it

_PUNCTUATION = re.compile('([' + re.escape(string.punctuation) + '])')
_SPACES = re.compile(r'[ \t\n\f\r]+')  # RE2's \s, which T5 used: ASCII only


def pad_punctuation(text: str) -> str:
  """Puts a space on both sides of every ASCII punctuation character and collapses white space.

  'J. (1961)' -> 'J . ( 1961 ) '. Ends are not stripped, as in T5's SQuAD preprocessor.
  """
  return _SPACES.sub(' ', _PUNCTUATION.sub(r' \1 ', text))


def pieces(template: str) -> Pieces:
  """'a: {x}.' -> [('a: ', 'x'), ('.', None)]."""
  return [(literal, column) for literal, column, _, _ in string.Formatter().parse(template)]


def fill(template: Pieces, record: dict[str, str]) -> str:
  """The text of a template in pieces, with the record's columns in it."""
  return ''.join(literal + ('' if column is None else record[column])
                 for literal, column in template)


def without(template: Pieces, text: str) -> str:
  """The column inside a filled template of one column; the text if there are several or none."""
  places = [i for i, (_, column) in enumerate(template) if column is not None]
  if len(places) != 1:
    return text
  literals = [literal for literal, _ in template]
  before, after = ''.join(literals[:places[0] + 1]), ''.join(literals[places[0] + 1:])
  return text.removeprefix(before).removesuffix(after)


def fields(task: str) -> list[str]:
  """The names of the fields in the task's prompt, in order."""
  if task not in PROMPTS:
    raise UsageError(f'task {task!r} has no prompt.{did_you_mean(task, PROMPTS)}')
  return [column for _, column in pieces(PROMPTS[task]) if column]


def problem(record: str | dict, needed: list[str], who: str, names: str) -> str:
  """Why a record, or a text for the only column, lacks `needed` columns; '' if it has all."""
  if isinstance(record, str):
    return '' if len(needed) < 2 else (f'{who} needs the {names} {", ".join(needed)}: give JSON '
                                       'lines with these keys, not bare text')
  missing = [name for name in needed if not isinstance(record.get(name), str)]
  if not missing:
    return ''
  return (f'{who} needs the text {names} {", ".join(needed)}; missing: {", ".join(missing)}; the '
          f'record has: {", ".join(map(str, record)) or "none"}')


def prompt(task: str, record: str | dict) -> str:
  """The model's input for a record, or for a text that fills the only field of the prompt."""
  needed = fields(task)
  if reason := problem(record, needed, f'task {task!r}', 'fields'):
    raise UsageError(f'{reason}.')
  if isinstance(record, str):
    record = {needed[0]: record}
  if task not in PADDED:
    return fill(pieces(PROMPTS[task]), record)
  padded = {name: pad_punctuation(record[name]) for name in needed}
  return _SPACES.sub(' ', fill(pieces(PROMPTS[task]), padded))


def without_prompt(task: str, text: str) -> str:
  """The field inside a one-field prompt, else the text: 'to German: Hi' -> 'Hi'."""
  return without(pieces(PROMPTS.get(task, '')), text)
