"""Files that are whole or absent, reads with a size limit, and a progress line."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import sys
import time
from typing import IO

from t5lab.errors import UsageError

CONFIG_BYTES = 1 << 20     # the limit of a config file, which has a few KiB


# --- writing -----------------------------------------------------------------------------------


def fsync_directory(path) -> None:
  """Makes the names in `path` (new, renamed, removed) survive a power cut."""
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


@contextlib.contextmanager
def replacing(path, mode: str = 'wb', *, suffix: str = '') -> Iterator[IO]:
  """A file to write that replaces `path` when the block ends; an exception leaves `path` as it was.

  After a kill or a full disk `path` holds the old content or the new, never a mixture. The
  temporary file is `.NAME.tmp` beside it, so a killed writer leaves at most one, which the next
  writer reuses. Processes that may write the same path at once each need their own `suffix`.
  Errors: OSError, of the file system.
  """
  path = Path(path)
  temporary = path.with_name(f'.{path.name}.tmp{suffix}')
  # O_NOFOLLOW: a planted link must not make us overwrite a file elsewhere.
  flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
  text = {} if 'b' in mode else {'encoding': 'utf-8', 'newline': ''}
  try:
    with os.fdopen(os.open(temporary, flags, 0o666), mode, **text) as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  fsync_directory(path.parent)


def write_text(path, text: str) -> None:
  """Replaces `path` with `text` in UTF-8, as `replacing` does."""
  with replacing(path, 'w') as f:
    f.write(text)


# --- reading -----------------------------------------------------------------------------------


def check_regular(path, error=UsageError) -> None:
  """Raises for a directory, a device or a FIFO, whose reading could block for ever."""
  path = Path(path)
  if path.exists() and not path.is_file():
    raise error(f'{path} is not a regular file')


def read_bytes(path, limit: int, error=UsageError) -> bytes:
  """The bytes of a regular file of at most `limit` bytes.

  Errors: `error` for a larger file or one that is not regular; OSError as `open` raises it.
  """
  check_regular(path, error)
  with open(path, 'rb') as f:
    size = os.fstat(f.fileno()).st_size
    data = f.read(limit + 1) if size <= limit else b''
  if max(size, len(data)) > limit:           # the file may have grown since
    raise error(f'{path} has {max(size, len(data)):,} bytes; the limit for this kind of file is '
                f'{limit:,}')
  return data


def parse_json(data: bytes, name, error=UsageError, kind: type = dict):
  """A JSON object (or list, by kind) from the bytes of the file `name`.

  Errors: `error`, in one line.
  """
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as e:
    raise error(f'{name} is not valid JSON: {" ".join(str(e).split())[:200]}') from None
  if not isinstance(value, kind):
    expected = 'object' if kind is dict else kind.__name__
    raise error(f'{name} must hold a JSON {expected}, got {type(value).__name__}')
  return value


def read_json(path, limit: int = CONFIG_BYTES, error=UsageError, kind: type = dict):
  """The JSON object (or list, by kind) in a file of at most `limit` bytes.

  Errors: `error`, in one line.
  """
  try:
    data = read_bytes(path, limit, error)
  except OSError as e:
    raise error(f'cannot read {path}: {e.strerror}') from None
  return parse_json(data, path, error, kind)


# --- progress ----------------------------------------------------------------------------------


class Progress(contextlib.AbstractContextManager):
  """A progress line on standard error: task, count, rate, and the remaining time if it is known.

  Example: `cleaning: 12,800 rows · 4,210 rows/s · ETA 1:05`
  On a terminal the line is redrawn every second; elsewhere a new line is printed every 5 seconds.
  Work that is done sooner prints nothing. Use it in a `with` block, or call `done()`.
  """

  def __init__(self, what: str, unit: str, total: int | None = None, *, file: IO | None = None,
               every: float | None = None):
    self._what, self._unit, self._total = what, unit, total
    self._file = file or sys.stderr
    self._redraws = self._file.isatty()
    self._every = every if every is not None else 1. if self._redraws else 5.
    self._start = self._printed = time.monotonic()
    self._done = 0
    self._has_printed = False

  def add(self, count: int, fraction: float | None = None) -> None:
    """Adds `count` to the counter. fraction: of the work done, instead of count / total."""
    self._done += count
    now = time.monotonic()
    if now - self._printed >= self._every:
      self._printed = now
      self._print(now, self._eta(now, fraction))

  def _eta(self, now: float, fraction: float | None) -> str:
    if fraction is None and self._total:
      fraction = self._done / self._total
    if not fraction or fraction > 1:
      return ''
    seconds = int((now - self._start) * (1 / fraction - 1))
    return f' · ETA {seconds // 60}:{seconds % 60:02d}'

  def _print(self, now: float, end: str) -> None:
    rate = self._done / max(now - self._start, 1e-9)
    of = f' of {self._total:,}' if self._total else ''
    line = (f'{self._what}: {self._done:,}{of} {self._unit} · {rate:,.0f} {self._unit}/s{end}')
    start, stop = ('\r', '   ') if self._redraws else ('', '\n')
    print(f'{start}{line}', end=stop, file=self._file, flush=True)
    self._has_printed = True

  def done(self) -> None:
    """Prints the last line."""
    if self._has_printed:
      self._print(time.monotonic(), ' · done')
      self._end_line()

  def _end_line(self) -> None:
    if self._redraws:
      print(file=self._file)

  def __exit__(self, error, *_) -> None:
    if error is None:
      self.done()
    elif self._has_printed:
      self._end_line()
