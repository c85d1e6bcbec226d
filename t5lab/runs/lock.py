"""The lock of a run's directory: one trainer at a time."""

import datetime
import errno
import fcntl
import json
import os
from pathlib import Path
import socket
import time

from t5lab.errors import UsageError

WELL = 0.5              # seconds after which a holder of the lock that still runs is believed to


_held: set[int] = set()  # lock file descriptors of this process


def _drop_in_child():
  # A forked data worker shares the lock. If it outlived a killed trainer, it would keep the
  # directory locked, so it lets go at birth (the parent's descriptor keeps the lock).
  for fd in _held:
    os.close(fd)
  _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


def _boot_id() -> str:
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return ''


def _started(pid: int) -> str:
  """Start time of a live process in clock ticks since boot; '' if it is gone or unknown."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    return ''


def _runs(holder: dict) -> bool:
  """Whether this machine runs the holder still; while a process ends, its memory goes first."""
  try:
    return (holder.get('boot_id') == _boot_id() != '' and
            _started(holder.get('pid')) == holder.get('start') != '' and
            bool(Path(f'/proc/{holder["pid"]}/cmdline').read_bytes()))
  except (OSError, KeyError):
    return False


class RunLock:
  """Holds `directory` for one trainer: `with RunLock(workdir): ...`.

  The kernel's flock decides, and ends with the process however it dies; the JSON in the file says
  who it is. A second trainer gets a UsageError naming pid and host after `patience` seconds. What
  a dead holder left is taken over and logged.
  """

  def __init__(self, directory, *, patience: float = 2.0, log=print):
    self.path = Path(directory) / 'run.lock'
    self._patience = patience
    self._log = log
    self._fd = -1

  def __enter__(self):
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
      self._fd = os.open(self.path, flags, 0o666)
    except OSError as e:
      raise UsageError(f'cannot lock {self.path}: {e.strerror}') from None
    _held.add(self._fd)
    try:
      self._lock()
      before = self._read()
      if before:
        self._log(f'taking over {self.path} from {self._name(before)}, which ended without '
                  'releasing it')
      me = {'host': socket.gethostname(), 'pid': os.getpid(), 'boot_id': _boot_id(),
            'start': _started(os.getpid()),
            'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}
      os.ftruncate(self._fd, 0)
      os.pwrite(self._fd, json.dumps(me).encode(), 0)
      os.fsync(self._fd)
    except BaseException:
      self._close()
      raise
    return self

  def __exit__(self, *_):
    os.ftruncate(self._fd, 0)  # released in order: nothing to take over
    self._close()

  def _close(self):
    _held.discard(self._fd)
    os.close(self._fd)

  def _lock(self):
    start = time.monotonic()
    while True:
      try:
        return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
          raise UsageError(f'cannot lock {self.path}: {e.strerror}; this file system has no flock, '
                           'keep the run on another') from None
      # a trainer killed a moment ago may be on its way out; one that is well is not waited for
      holder, waited = self._read(), time.monotonic() - start
      if waited > self._patience or waited > WELL and _runs(holder):
        gone = (holder.get('boot_id') == _boot_id() != '' and holder.get('host') ==
                socket.gethostname() and _started(holder.get('pid')) != holder.get('start'))
        raise UsageError(
            f'{self.path.parent} is in use by {self._name(holder)}' +
            (', which is gone but left a child process that holds the lock: end it'
             if gone else '; wait for it, stop it, or choose another --workdir'))
      time.sleep(0.05)

  def _read(self) -> dict:
    try:
      found = json.loads(os.pread(self._fd, 4096, 0))
      return found if isinstance(found, dict) else {}
    except ValueError:
      return {}

  @staticmethod
  def _name(holder: dict) -> str:
    return (f'pid {holder.get("pid", "unknown")} on host {holder.get("host", "unknown")} '
            f'(since {holder.get("time", "unknown")})')
