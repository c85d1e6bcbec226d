"""A conversation -> a prompt, by the template that a model's tokenizer files carry.

The template is text from elsewhere: it runs in jinja2's immutable sandbox, with Hugging Face's
settings and names (transformers' chat templates), without a clock, so it renders the same each day.
"""
import json

import jinja2
from jinja2 import sandbox
import jinja2.ext

from t5lab.errors import DataError

LONGEST = 1_000_000       # characters of a template, and of what it may add to the messages


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # jinja2's own escapes < > & ' for HTML, which a model has not seen
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def render(template: str, messages: list[dict[str, str]], tokens: dict[str, str],
           add_generation_prompt: bool, what: str) -> str:
  """The prompt. tokens: text of special tokens by role, as {'eos': '</s>'}. what: for errors."""
  if not isinstance(messages, list) or not messages or not all(
      isinstance(m, dict) and isinstance(m.get('role'), str) and isinstance(m.get('content'), str)
      for m in messages):
    raise DataError("a chat is a list of {'role': …, 'content': …} with text values, at least one; "
                    f'got {str(messages)[:80]}')
  if len(template) > LONGEST:
    raise DataError(f'the chat template of {what} has {len(template):,} characters; the limit is '
                    f'{LONGEST:,}')
  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
  environment.globals['raise_exception'] = _raise_exception
  environment.filters['tojson'] = _to_json
  names = {f'{role}_token': text for role, text in tokens.items() if text is not None}
  most = LONGEST + 100 * sum(len(m['role']) + len(m['content']) for m in messages)
  made, length = [], 0
  try:
    for part in environment.from_string(template).generate(
        messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
        documents=None, **names):
      made.append(part)
      length += len(part)
      if length > most:
        raise jinja2.TemplateError(f'it makes over {most:,} characters')
  except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
          RecursionError, TypeError, ValueError) as e:
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise DataError(f'the chat template of {what} failed: {reason}') from e
  return ''.join(made)
