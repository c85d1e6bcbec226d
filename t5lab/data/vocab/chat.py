"""Renders a conversation as a prompt, with the template of a model's tokenizer files.

The template is untrusted text. It runs in jinja2's immutable sandbox, with the settings and names
of transformers' chat templates, in a child process with limits on its time and memory. The child is
this file, run alone: it imports nothing of t5lab.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import datetime
import json
import os
import re
import resource
import subprocess
import sys

MAX_CHARACTERS = 1_000_000     # of a template, and of what it may add to the messages
MEMORY = 512 << 20             # bytes of address space of the child
SECONDS = 10                   # of its CPU time
REFUSED = 3                    # its exit code if the template fails


def choose(templates: str | Mapping[str, str] | None, name: str, has_tools: bool, what: str) -> str:
  """The text of the template `name`.

  templates: one template, which is 'default', or several by name. name: '' is tool_use if there
  are tools and a template of that name, or else default, as in transformers. what: whose they are.
  Errors: DataError if there is no such template.
  """
  from t5lab.errors import DataError, did_you_mean
  if not templates:
    raise DataError(f'vocabulary {what!r} has no chat template: give the model plain text')
  by_name = {'default': templates} if isinstance(templates, str) else templates
  name = name or ('tool_use' if has_tools and 'tool_use' in by_name else 'default')
  if name not in by_name:
    raise DataError(f'vocabulary {what!r} has no chat template {name!r}.'
                    f'{did_you_mean(name, by_name)}')
  return by_name[name]


def render(template: str, messages: list[dict[str, str]], tokens: dict[str, str],
           add_generation_prompt: bool, what: str, *, tools: Sequence[dict] | None = None,
           documents: Sequence[dict] | None = None, date: str | None = None) -> str:
  """Returns the prompt.

  tokens: special tokens by role, e.g. {'eos': '</s>'}. what: whose template it is, for messages.
  tools, documents: JSON values that the template may show. date: 'YYYY-MM-DD', what strftime_now
  prints; None is now, as in transformers: a prompt with a date is another one on another day.
  Errors: DataError for malformed messages, and for a template that is too long or fails.
  """
  from t5lab.errors import DataError, UsageError
  try:
    date and datetime.date.fromisoformat(date)
  except (TypeError, ValueError):
    raise UsageError(f'chat: date must be YYYY-MM-DD, got {date!r}') from None
  if not isinstance(messages, list) or not messages or not all(
      isinstance(message, dict) and isinstance(message.get('role'), str)
      and isinstance(message.get('content'), str) for message in messages):
    raise DataError("a chat must be a list of {'role': …, 'content': …} with text values, at least "
                    f'one; got {str(messages)[:80]}')
  if len(template) > MAX_CHARACTERS:
    raise DataError(f'the chat template of {what} has {len(template):,} characters; the limit is '
                    f'{MAX_CHARACTERS:,}')
  names = {f'{role}_token': text for role, text in tokens.items() if text is not None}
  names.update(messages=messages, add_generation_prompt=add_generation_prompt, tools=tools,
               documents=documents)
  characters = sum(len(message['role']) + len(message['content']) for message in messages)
  try:
    job = json.dumps({'template': template, 'names': names, 'date': date,
                      'limit': MAX_CHARACTERS + 100 * characters, 'memory': MEMORY,
                      'seconds': SECONDS})
  except (TypeError, ValueError, RecursionError) as e:
    raise DataError(f'a chat, its tools and its documents must hold JSON values: {e}') from e

  try:
    child = subprocess.run([sys.executable, '-I', os.path.abspath(__file__)], input=job.encode(),
                           capture_output=True, timeout=6 * SECONDS)
  except subprocess.TimeoutExpired:
    raise DataError(f'the chat template of {what} ran for more than {6 * SECONDS} s') from None
  if child.returncode == REFUSED:
    raise DataError(f'the chat template of {what} failed: {json.loads(child.stdout)}')
  if child.returncode:
    raise DataError(f'the chat template of {what} ended a process with a limit of {SECONDS} s and '
                    f'{MEMORY >> 20} MiB (exit code {child.returncode})')
  return json.loads(child.stdout)


REPLY = 'qxreplyxq'        # no template changes it


def end_of_turn(render: Callable[[list], str], special: Mapping[str, int]) -> int | None:
  """The id of the special token that follows a reply in a rendered conversation, or None.

  Only white space may be between them. render: messages -> text, or DataError.
  """
  from t5lab.errors import DataError
  try:
    text = render([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': REPLY}])
  except DataError:            # no template, or one of another kind of conversation
    return None
  _, found, rest = text.rpartition(REPLY)
  rest = rest.lstrip()
  ends = [token for token in special if token and rest.startswith(token)]
  return special[max(ends, key=len)] if found and ends else None


# -- the child ----------------------------------------------------------------------------------


def _environment(now: datetime.datetime):
  import jinja2
  from jinja2 import nodes, sandbox
  import jinja2.ext

  class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant says, and prints it."""
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return nodes.CallBlock(self.call_method('_print'), [], [], body).set_lineno(line)

    def _print(self, caller):
      return caller()

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def strftime_now(format):
    if re.search(r'%[^a-zA-Z%]*\d', format):        # a width, which may be of any size
      raise jinja2.TemplateError(f'strftime_now({format!r}): a width is not supported')
    return now.strftime(format)

  def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # jinja2's own filter escapes < > & ' for HTML, which a model has not seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

  environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
  environment.filters['tojson'] = to_json
  return environment


def _render(template: str, names: dict, date: str | None, limit: int) -> str:
  """Renders in pieces, so that an endless template is stopped; ValueError at the limit."""
  now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
  pieces, length = [], 0
  for piece in _environment(now).from_string(template).generate(**names):
    pieces.append(piece)
    length += len(piece)
    if length > limit:
      raise ValueError(f'it generates more than {limit:,} characters')
  return ''.join(pieces)


def _main() -> int:
  job = json.load(sys.stdin)
  for kind, limit in ((resource.RLIMIT_AS, job.pop('memory')), (resource.RLIMIT_CORE, 0),
                      (resource.RLIMIT_CPU, job.pop('seconds'))):
    with contextlib.suppress(ValueError, OSError):       # not every system has each of them
      resource.setrlimit(kind, (limit, limit))
  try:
    print(json.dumps(_render(**job)))
  except Exception as e:       # of the template, whatever it is
    print(json.dumps(' '.join(str(e).split())[:300] or type(e).__name__))
    return REFUSED
  return 0


if __name__ == '__main__':
  sys.exit(_main())
