"""Renders a conversation as a prompt, with the template of a model's tokenizer files.

The template is untrusted text: it runs in jinja2's immutable sandbox, with Hugging Face's settings
and names (transformers' chat templates). There is no clock, so it renders the same every day.
"""
from collections.abc import Callable, Mapping
import json

import jinja2
from jinja2 import sandbox
import jinja2.ext

from t5lab.errors import DataError

MAX_CHARACTERS = 1_000_000     # of a template, and of what it may add to the messages


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # jinja2's own filter escapes < > & ' for HTML, which a model has not seen.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def render(template: str, messages: list[dict[str, str]], tokens: dict[str, str],
           add_generation_prompt: bool, what: str) -> str:
  """Returns the prompt.

  tokens: special tokens by role, e.g. {'eos': '</s>'}. what: whose template it is, for messages.
  Errors: DataError for malformed messages, and for a template that is too long or fails.
  """
  if not isinstance(messages, list) or not messages or not all(
      isinstance(message, dict) and isinstance(message.get('role'), str)
      and isinstance(message.get('content'), str) for message in messages):
    raise DataError("a chat must be a list of {'role': …, 'content': …} with text values, at least "
                    f'one; got {str(messages)[:80]}')
  if len(template) > MAX_CHARACTERS:
    raise DataError(f'the chat template of {what} has {len(template):,} characters; the limit is '
                    f'{MAX_CHARACTERS:,}')

  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
  environment.globals['raise_exception'] = _raise_exception
  environment.filters['tojson'] = _to_json
  names = {f'{role}_token': text for role, text in tokens.items() if text is not None}

  # The output is generated in pieces, so that an endless template is stopped.
  characters = sum(len(message['role']) + len(message['content']) for message in messages)
  limit = MAX_CHARACTERS + 100 * characters
  pieces, length = [], 0
  try:
    for piece in environment.from_string(template).generate(
        messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
        documents=None, **names):
      pieces.append(piece)
      length += len(piece)
      if length > limit:
        raise jinja2.TemplateError(f'it generates more than {limit:,} characters')
  except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
          RecursionError, TypeError, ValueError) as e:
    reason = ' '.join(str(e).split())[:300] or type(e).__name__
    raise DataError(f'the chat template of {what} failed: {reason}') from e
  return ''.join(pieces)


REPLY = 'qxreplyxq'        # no template changes it


def end_of_turn(render: Callable[[list], str], special: Mapping[str, int]) -> int | None:
  """The id of the special token that follows a reply in a rendered conversation, or None.

  Only white space may be between them. render: messages -> text, or DataError.
  """
  try:
    text = render([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': REPLY}])
  except DataError:            # no template, or one of another kind of conversation
    return None
  _, found, rest = text.rpartition(REPLY)
  rest = rest.lstrip()
  ends = [token for token in special if token and rest.startswith(token)]
  return special[max(ends, key=len)] if found and ends else None
