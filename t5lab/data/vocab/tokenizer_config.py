"""The files beside a tokenizer: special tokens by role, and the chat templates."""
import dataclasses
import pathlib

from t5lab import files
from t5lab.errors import DataError

SIBLINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja',
            'chat_template.json')
BYTES = 32 << 20      # limit of tokenizer_config.json, which may list many tokens
TEMPLATES = 'additional_chat_templates'       # a folder of NAME.jinja
ROLES = ('bos', 'eos', 'pad', 'unk', 'cls', 'sep', 'mask')


@dataclasses.dataclass(frozen=True)
class Config:
  """settings: the content of tokenizer_config.json; names: {'eos': '</s>', …}, by role.

  chat_template: a template, or several by name.
  """
  settings: dict
  names: dict[str, str]
  chat_template: str | dict[str, str] | None


NO_CONFIG = Config({}, {}, None)


def config(contents: dict[str, bytes], folder: pathlib.Path) -> Config:
  """The Config of the files beside a tokenizer in `folder`, {name: contents}; empty without any."""
  settings, tokens, processor = (
      files.parse_json(contents.get(name, b'{}'), folder / name, DataError)
      for name in (*SIBLINGS[:2], SIBLINGS[3]))
  names = {}
  for role in ROLES:
    for source in (settings, tokens):
      value = source.get(f'{role}_token')
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        names.setdefault(role, value)
  return Config(settings, names, _chat_template(contents, settings, processor))


def template_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of additional_chat_templates."""
  return sorted((folder / TEMPLATES).glob('*.jinja'))


def _chat_template(contents, settings, processor) -> str | dict[str, str] | None:
  """The templates of the .jinja files; without any, of tokenizer_config.json or the processor's."""
  templates = {}
  for name, data in contents.items():
    if name == SIBLINGS[2]:
      templates['default'] = data.decode('utf-8', 'replace')
    elif name.startswith(f'{TEMPLATES}/'):
      templates[pathlib.PurePath(name).stem] = data.decode('utf-8', 'replace')
  for source in (settings, processor):
    template = source.get('chat_template')
    if templates or not template:
      continue
    if isinstance(template, str):
      template = {'default': template}
    if isinstance(template, list):          # several by name, e.g. one for tools
      template = {t.get('name'): t.get('template') for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
      templates = {name: text for name, text in template.items()
                   if isinstance(name, str) and isinstance(text, str)}
  if list(templates) == ['default']:
    return templates['default']
  return templates or None
