"""The files beside a tokenizer: special tokens by role, chat template; read with size limits."""
import dataclasses
import json
import pathlib

from t5lab.errors import DataError

SIBLINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
LARGEST = 256 << 20           # bytes; the largest tokenizer.json of 2025's models has some 35 MB
LARGEST_SIBLING = 16 << 20
ROLES = ('bos', 'eos', 'pad', 'unk', 'cls', 'sep', 'mask')


@dataclasses.dataclass(frozen=True)
class Config:
  """settings: tokenizer_config.json as it is; names: {'eos': '</s>', …} of the roles it names."""
  settings: dict
  names: dict[str, str]
  chat_template: str | None


def check_regular(path: pathlib.Path) -> None:
  """DataError for a folder, a device or a FIFO, which would be opened and waited on."""
  if path.exists() and not path.is_file():
    raise DataError(f'{path} is not a regular file')


def read(path: pathlib.Path, largest: int = LARGEST) -> bytes:
  """The bytes of a regular file of at most `largest` bytes; OSError as open raises it."""
  check_regular(path)
  size = path.stat().st_size
  if size > largest:
    raise DataError(f'{path} has {size:,} bytes; a file of this kind has at most {largest:,}')
  return path.read_bytes()


def parse_json(data: bytes, what) -> dict:
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise DataError(f'{what} is not JSON: {" ".join(str(e).split())[:120]}') from e
  if not isinstance(value, dict):
    raise DataError(f'{what} holds a {type(value).__name__}, not a JSON object')
  return value


def siblings(path: pathlib.Path) -> list[pathlib.Path]:
  """The files beside `path` that say something about it, those that exist."""
  return [path.parent / name for name in SIBLINGS if (path.parent / name).is_file()]


def read_config(path: pathlib.Path) -> Config:
  """What the files beside a tokenizer's file say; empty where there are none."""
  found = {p.name: read(p, LARGEST_SIBLING) for p in siblings(path)}
  load = lambda name: parse_json(found[name], path.parent / name) if name in found else {}
  template = found.get('chat_template.jinja')
  return config(load('tokenizer_config.json'), load('special_tokens_map.json'),
                None if template is None else template.decode('utf-8', 'replace'))


def config(settings: dict, tokens: dict | None = None, template: str | None = None) -> Config:
  """Config of a tokenizer_config.json, of a special_tokens_map.json and of a template file."""
  names = {}
  for role in ROLES:
    for source in (settings, tokens or {}):
      value = source.get(f'{role}_token')
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        names.setdefault(role, value)
  if template is None:
    template = settings.get('chat_template')
    if isinstance(template, list):          # several by name: the one that serves no special end
      template = {t.get('name'): t.get('template') for t in template
                  if isinstance(t, dict)}.get('default')
  return Config(settings, names, template if isinstance(template, str) else None)
