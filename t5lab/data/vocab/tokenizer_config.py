"""The files beside a tokenizer: special tokens by role, and the chat template."""
import dataclasses
import pathlib

from t5lab import files
from t5lab.errors import DataError

SIBLINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
MODEL_BYTES = 256 << 20       # limit; the largest tokenizer.json of 2025's models has about 35 MB
SIBLING_BYTES = 16 << 20
ROLES = ('bos', 'eos', 'pad', 'unk', 'cls', 'sep', 'mask')


@dataclasses.dataclass(frozen=True)
class Config:
  """settings: the content of tokenizer_config.json; names: {'eos': '</s>', …}, by role."""
  settings: dict
  names: dict[str, str]
  chat_template: str | None


def siblings(path: pathlib.Path) -> list[pathlib.Path]:
  """The configuration files beside a tokenizer's file."""
  return [path.parent / name for name in SIBLINGS if (path.parent / name).is_file()]


def read_config(path: pathlib.Path) -> Config:
  """Reads the files beside a tokenizer's file; without any the Config is empty."""
  contents = {p.name: files.read_bytes(p, SIBLING_BYTES, DataError) for p in siblings(path)}

  def load(name):
    if name not in contents:
      return {}
    return files.parse_json(contents[name], path.parent / name, DataError)

  template = contents.get('chat_template.jinja')
  return config(load('tokenizer_config.json'), load('special_tokens_map.json'),
                None if template is None else template.decode('utf-8', 'replace'))


def config(settings: dict, tokens: dict | None = None, template: str | None = None) -> Config:
  """The Config of a tokenizer_config.json, a special_tokens_map.json and a template file."""
  names = {}
  for role in ROLES:
    for source in (settings, tokens or {}):
      value = source.get(f'{role}_token')
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        names.setdefault(role, value)

  if template is None:
    template = settings.get('chat_template')
    if isinstance(template, list):          # several by name, e.g. one for tools
      by_name = {t.get('name'): t.get('template') for t in template if isinstance(t, dict)}
      template = by_name.get('default')
  return Config(settings, names, template if isinstance(template, str) else None)
