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

_PUNCTUATION = re.compile('([' + re.escape(string.punctuation) + '])')
_SPACES = re.compile(r'[ \t\n\f\r]+')  # RE2's \s, which T5 used: ASCII only


def pad_punctuation(text: str) -> str:
  """Puts a space on both sides of every ASCII punctuation character and collapses white space.

  'J. (1961)' -> 'J . ( 1961 ) '. Ends are not stripped, as in T5's SQuAD preprocessor.
  """
  return _SPACES.sub(' ', _PUNCTUATION.sub(r' \1 ', text))


def pieces(template: str) -> list[tuple[str, str | None]]:
  """'a: {x}.' -> [('a: ', 'x'), ('.', None)]: (literal text, the column after it)."""
  return [(literal, column) for literal, column, _, _ in string.Formatter().parse(template)]


def fill(template: list[tuple[str, str | None]], record: dict[str, str]) -> str:
  """The text of a template in pieces, with the record's columns in it."""
  return ''.join(literal + ('' if column is None else record[column])
                 for literal, column in template)


def without(template: list[tuple[str, str | None]], text: str) -> str:
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


def prompt(task: str, record: str | dict) -> str:
  """The model's input for a record, or for a text that fills the only field of the prompt."""
  needed = fields(task)
  if isinstance(record, str):
    if len(needed) > 1:
      raise UsageError(f'task {task!r} needs the fields {", ".join(needed)}: '
                       f'give JSON lines with these keys, not bare text.')
    record = {needed[0]: record}
  missing = [name for name in needed if not isinstance(record.get(name), str)]
  if missing:
    present = ', '.join(map(str, record)) or 'none'
    raise UsageError(f'task {task!r} needs the text fields {", ".join(needed)}; missing: '
                     f'{", ".join(missing)}; the record has: {present}.')
  if task not in PADDED:
    return fill(pieces(PROMPTS[task]), record)
  padded = {name: pad_punctuation(record[name]) for name in needed}
  return _SPACES.sub(' ', fill(pieces(PROMPTS[task]), padded))


def without_prompt(task: str, text: str) -> str:
  """The field inside a one-field prompt: 'translate English to German: Hi' -> 'Hi'.

  The whole text if the task has no prompt or a prompt of several fields.
  """
  return without(pieces(PROMPTS.get(task, '')), text)
