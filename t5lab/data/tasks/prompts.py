"""What a supervised task says to the model: the text around a row's fields.

Pure text, no TensorFlow, so that inference needs none. [Raffel et al. 2020, appendix D]
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
BARE = frozenset({'g2p_en_us'})      # says nothing but its field: a mixture could not tell it apart
PADDED = frozenset({'numpydoc_qa'})  # fields and prompt go through T5's punctuation padding

_PUNCTUATION = re.compile('([' + re.escape(string.punctuation) + '])')
_SPACES = re.compile(r'[ \t\n\f\r]+')  # RE2's \s, which T5 used: ASCII only


def pad_punctuation(text: str) -> str:
  """A space on both sides of every ASCII punctuation character, runs of whitespace collapsed.

  'J. (1961)' -> 'J . ( 1961 ) '. Ends are not stripped, as in T5's SQuAD preprocessor.
  """
  return _SPACES.sub(' ', _PUNCTUATION.sub(r' \1 ', text))


def fields(task: str) -> list[str]:
  """Names of the fields that the task's prompt wants, in order."""
  if task not in PROMPTS:
    raise UsageError(f'task {task!r} has no prompt.{did_you_mean(task, PROMPTS)}')
  return [name for _, name, _, _ in string.Formatter().parse(PROMPTS[task]) if name]


def prompt(task: str, row: str | dict) -> str:
  """The model's input text for a row; a bare string fills the only field of a one-field prompt."""
  wanted = fields(task)
  if isinstance(row, str):
    if len(wanted) > 1:
      raise UsageError(f'task {task!r} needs the fields {", ".join(wanted)}: '
                       f'give JSON lines with these keys, not bare text.')
    row = {wanted[0]: row}
  missing = [name for name in wanted if not isinstance(row.get(name), str)]
  if missing:
    raise UsageError(f'task {task!r} needs the text fields {", ".join(wanted)}; missing: '
                     f'{", ".join(missing)}; the row has: {", ".join(map(str, row)) or "none"}.')
  values = {name: row[name] for name in wanted}
  if task not in PADDED:
    return PROMPTS[task].format(**values)
  values = {name: pad_punctuation(text) for name, text in values.items()}
  return _SPACES.sub(' ', PROMPTS[task].format(**values))


def source(task: str, text: str) -> str:
  """The field inside a one-field prompt: 'translate English to German: Hi' -> 'Hi'.

  The whole text where the task has no prompt or a prompt of several fields.
  """
  if task not in PROMPTS or len(fields(task)) != 1:
    return text
  before, _, after = PROMPTS[task].partition('{' + fields(task)[0] + '}')
  return text.removeprefix(before).removesuffix(after)
