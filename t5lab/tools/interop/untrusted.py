"""Reading files that are not trusted: bounded reads, one-line errors."""

import contextlib
import os
import re
import stat
import weakref

import numpy as np

from t5lab.errors import UsageError

HEADER_BYTES = 100_000_000   # the limit that safetensors itself sets on a header


class File:
  """A regular file, open for reading at offsets; UsageError for pipes, devices and directories."""

  def __init__(self, path):
    self.path = os.fspath(path)
    try:
      fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would block
    except OSError as e:
      raise UsageError(f'cannot read {self.path}: {e.strerror}') from None
    weakref.finalize(self, os.close, fd)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
      raise UsageError(f'{self.path} is not a regular file')
    self.fd, self.size = fd, info.st_size

  def fill(self, out: np.ndarray, offset: int) -> np.ndarray:
    """Reads the bytes of the C-contiguous `out` from `offset`; UsageError if the file ends."""
    view = memoryview(out.reshape(-1).view(np.uint8))
    while view:
      n = os.preadv(self.fd, [view], offset)
      if not n:
        raise UsageError(f'{self.path} ends at byte {offset}, {len(view)} short: it is truncated')
      view, offset = view[n:], offset + n
    return out

  def header(self, offset: int, size: int) -> bytes:
    if size > HEADER_BYTES:
      raise UsageError(f'{self.path}: a header of {size} bytes; the limit is {HEADER_BYTES}')
    return self.fill(np.empty(size, np.uint8), offset).tobytes()


def show(x) -> str:
  """Formats a value from a file for an error: escaped and short."""
  text = repr(x)
  return text if len(text) <= 100 else text[:80] + '…' + text[-19:]


@contextlib.contextmanager
def refusing(what):
  """Turns any exception of a library over a malformed file into UsageError; none lists them all."""
  try:
    yield
  except UsageError:
    raise
  except Exception as e:
    asks = re.search(r'GLOBAL ([\w.]+)', str(e))   # line 9 of torch's message: what it refused
    why = f'it asks for {asks[1]}' if asks else f'{type(e).__name__}: {str(e).strip()[:200]}'
    raise UsageError(f'{what}: {why.splitlines()[0]}') from None
