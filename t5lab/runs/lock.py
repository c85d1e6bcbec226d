"""The lock of a run's directory: only one trainer at a time writes there."""

import datetime
import errno
import fcntl
import json
import os
from pathlib import Path
import socket
import time

from t5lab.errors import UsageError

# A holder that still runs after this many seconds is not about to exit, so it is not waited for.
SETTLED_SECONDS = 0.5

_held: set[int] = set()  # descriptors of the lock files that this process holds


def _close_in_child():
  # A forked data worker shares the lock. If it outlived a killed trainer, the directory would stay
  # locked, so the worker closes its descriptors at once; the parent's keep the lock.
  for fd in _held:
    os.close(fd)
  _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
  """Holds `directory` for one trainer: `with RunLock(workdir): ...`.

  The lock is the kernel's flock on run.lock, which ends with the process however it dies. The JSON
  in the file says who holds it. A second trainer gets a UsageError with the holder's pid and host
  after `patience` seconds. A lock that a dead process left is taken over, and that is logged.
  """

  def __init__(self, directory, *, patience: float = 2.0, log=print):
    self.path = Path(directory) / 'run.lock'
    self._patience, self._log = patience, log

  def __enter__(self):
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
      self._fd = os.open(self.path, flags, 0o666)
    except OSError as e:
      raise UsageError(f'cannot lock {self.path}: {e.strerror}') from None
    _held.add(self._fd)
    try:
      self._acquire()
      if previous := self._read_holder():
        self._log(f'taking over {self.path} from {_describe(previous)}, which ended without '
                  'releasing it')
      self._write_holder()
    except BaseException:
      self._close()
      raise
    return self

  def __exit__(self, *_):
    os.ftruncate(self._fd, 0)  # an orderly end leaves no holder to take over from
    self._close()

  def _close(self):
    _held.discard(self._fd)
    os.close(self._fd)

  def _acquire(self):
    start = time.monotonic()
    while True:
      try:
        return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
          raise UsageError(f'cannot lock {self.path}: {e.strerror}; this file system has no flock, '
                           'keep the run on another') from None

      # A trainer that was killed a moment ago may still be exiting: worth waiting for.
      holder = self._read_holder()
      waited = time.monotonic() - start
      if waited > self._patience or (waited > SETTLED_SECONDS and _is_running(holder)):
        advice = '; wait for it, stop it, or choose another --workdir'
        if _is_gone(holder):
          advice = ', which is gone but left a child process that holds the lock: end it'
        raise UsageError(f'{self.path.parent} is in use by {_describe(holder)}{advice}')
      time.sleep(0.05)

  def _read_holder(self) -> dict:
    try:
      holder = json.loads(os.pread(self._fd, 4096, 0))
    except ValueError:
      return {}
    return holder if isinstance(holder, dict) else {}

  def _write_holder(self):
    holder = {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'boot_id': _boot_id(),
        'start': _start_time(os.getpid()),
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    }
    os.ftruncate(self._fd, 0)
    os.pwrite(self._fd, json.dumps(holder).encode(), 0)
    os.fsync(self._fd)


# --- the process that holds the lock -----------------------------------------------------------


def _describe(holder: dict) -> str:
  pid, host, since = (holder.get(key, 'unknown') for key in ('pid', 'host', 'time'))
  return f'pid {pid} on host {host} (since {since})'


def _is_running(holder: dict) -> bool:
  """True if the holder runs on this machine, and is not just exiting."""
  start = _start_time(holder.get('pid'))
  if not _is_of_this_boot(holder) or not start or start != holder.get('start'):
    return False
  try:  # a process that exits loses its memory first, and with it its command line
    return bool(Path(f'/proc/{holder["pid"]}/cmdline').read_bytes())
  except OSError:
    return False


def _is_gone(holder: dict) -> bool:
  """True if the holder ran on this machine and has ended."""
  is_local = _is_of_this_boot(holder) and holder.get('host') == socket.gethostname()
  return is_local and _start_time(holder.get('pid')) != holder.get('start')


def _is_of_this_boot(holder: dict) -> bool:
  return holder.get('boot_id') == _boot_id() != ''


def _boot_id() -> str:
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return ''


def _start_time(pid: int) -> str:
  """Start time of a live process in clock ticks since boot; '' if it is gone or unknown."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    return ''
