"""The files beside a tokenizer: special tokens by role, and the chat template."""
import dataclasses
import pathlib

from t5lab import files
from t5lab.errors import DataError

SIBLINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
BYTES = 32 << 20      # limit of tokenizer_config.json, which may list many tokens
ROLES = ('bos', 'eos', 'pad', 'unk', 'cls', 'sep', 'mask')


@dataclasses.dataclass(frozen=True)
class Config:
  """settings: the content of tokenizer_config.json; names: {'eos': '</s>', …}, by role."""
  settings: dict
  names: dict[str, str]
  chat_template: str | None


NO_CONFIG = Config({}, {}, None)


def config(contents: dict[str, bytes], folder: pathlib.Path) -> Config:
  """The Config of the files beside a tokenizer in `folder`, {name: contents}; empty without any."""
  settings, tokens = (files.parse_json(contents.get(name, b'{}'), folder / name, DataError)
                      for name in SIBLINGS[:2])
  names = {}
  for role in ROLES:
    for source in (settings, tokens):
      value = source.get(f'{role}_token')
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        names.setdefault(role, value)

  template = settings.get('chat_template')
  if isinstance(template, list):          # several by name, e.g. one for tools
    by_name = {t.get('name'): t.get('template') for t in template if isinstance(t, dict)}
    template = by_name.get('default')
  if SIBLINGS[2] in contents:
    template = contents[SIBLINGS[2]].decode('utf-8', 'replace')
  return Config(settings, names, template if isinstance(template, str) else None)
