"""Logs of one JSON object per line, which a resumed run truncates and continues.

Each object has an integer under `key`, e.g. its step. Other lines, e.g. a torn one, are ignored.
"""

from collections.abc import Iterator
import json
from pathlib import Path

from t5lab import files


def read(path, key: str) -> list[dict]:
  """Returns the objects of a file; [] if there is no file."""
  return [entry for _, entry in _entries(_read_bytes(path), key)]


def truncate(path, key: str, last: int) -> list[dict]:
  """Removes the entries whose `key` is over `last` and returns the others.

  The file is replaced in one rename, and only if something changes.
  """
  text = _read_bytes(path)
  remaining = [(line, entry) for line, entry in _entries(text, key) if entry[key] <= last]
  new_text = b''.join(line + b'\n' for line, _ in remaining)
  if new_text != text:
    files.write_text(path, new_text.decode())
  return [entry for _, entry in remaining]


def _read_bytes(path) -> bytes:
  try:
    return Path(path).read_bytes()
  except FileNotFoundError:
    return b''


def _entries(text: bytes, key: str) -> Iterator[tuple[bytes, dict]]:
  for line in text.splitlines():
    try:
      entry = json.loads(line)
      if isinstance(entry[key], int):
        yield line, entry
    except (ValueError, TypeError, KeyError):
      continue
