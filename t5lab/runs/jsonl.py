"""Files of one JSON object a line that a resumed run cuts back and continues."""

import json
from pathlib import Path

from t5lab import files


def read(path, number: str) -> list[dict]:
  """The objects of a file, one a line, that have a `number`; [] where there is no file. A line that
  a power cut tore is left out."""
  return [row for _, row in _json_lines(_read_bytes(path), number)]


def truncate(path, number: str, last: int) -> list[dict]:
  """Removes the lines whose `number` is over `last` -> the rows that stay.

  The file is replaced in one rename, and only if something changes.
  """
  text = _read_bytes(path)
  kept = [(line, row) for line, row in _json_lines(text, number) if row[number] <= last]
  if (new := b''.join(line + b'\n' for line, _ in kept)) != text:
    files.write_text(path, new.decode())
  return [row for _, row in kept]


def _read_bytes(path) -> bytes:
  try:
    return Path(path).read_bytes()
  except FileNotFoundError:
    return b''


def _json_lines(text: bytes, number: str):
  for line in text.splitlines():
    try:
      row = json.loads(line)
      if isinstance(row[number], int):
        yield line, row
    except (ValueError, TypeError, KeyError):
      continue
