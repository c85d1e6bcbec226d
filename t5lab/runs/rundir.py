"""A run's directory: who holds it, its config.json, small files that are whole or absent, signals.

  config.json     the resolved config of the run: data, never code
  run.lock        {host, pid, boot id, start time} of the trainer that holds the directory
  checkpoints/    runs/checkpoint.py
  metrics.jsonl   runs/report.py
"""

from collections.abc import Mapping
import datetime
import errno
import fcntl
import json
import os
from pathlib import Path
import signal
import socket
import stat
import threading
import time

from t5lab import files
from t5lab.errors import UsageError

PREEMPTED = 75
WELL = 0.5              # seconds after which a holder of the lock that still runs is believed to


# --- files -------------------------------------------------------------------------------------


def json_rows(path, number: str) -> list[dict]:
  """The objects of a file, one a line, that have a `number`; [] where there is no file. A line that
  a power cut tore is left out."""
  return [row for _, row in _json_lines(_read_bytes(path), number)]


def keep_rows(path, number: str, last: int) -> list[dict]:
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


_warned: set[str] = set()


def warn_if_others_write(directory, log) -> None:
  """Says once in a process that everybody on this machine may change what lies in `directory`."""
  try:
    mode = os.stat(directory).st_mode
  except OSError:
    return
  if mode & stat.S_IWOTH and str(directory) not in _warned:
    _warned.add(str(directory))
    log(f'anybody on this machine may write in {directory}, and so change what is loaded: '
        f'chmod o-w {directory}')


# --- config.json -------------------------------------------------------------------------------


def write_config(directory, config: Mapping) -> None:
  """Writes `directory/config.json`; UsageError if a value is not plain JSON."""
  try:
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
  except (TypeError, ValueError) as e:
    raise UsageError(f'config.json holds plain JSON values only: {e}') from None
  files.write_text(Path(directory) / 'config.json', text + '\n')


def read_config(directory) -> dict:
  """The config of the run in `directory`; UsageError if there is none or it is not JSON."""
  path = Path(directory) / 'config.json'
  if not path.is_file():
    raise UsageError(f'{directory} is not a run of t5lab: it has no config.json')
  return files.read_json(path)


def _leaves(tree, prefix=''):
  for key, value in tree.items():
    name = f'{prefix}{key}'
    if isinstance(value, dict) and value:
      yield from _leaves(value, name + '.')
    else:
      yield name, value


def check_same_config(saved: Mapping, new: Mapping, allowed=()) -> list[str]:
  """Keys in which two configs differ, as 'a.b: 1 -> 2', sorted; [] if resuming is safe.

  allowed: keys ('total_steps') or sections ('log') that a resumed run may change.
  """
  old, new = (dict(_leaves(json.loads(json.dumps(c)))) for c in (saved, new))
  lines = []
  for key in sorted(old.keys() | new.keys()):
    if any(key == a or key.startswith(a + '.') for a in allowed):
      continue
    was, now = (json.dumps(c[key]) if key in c else 'absent' for c in (old, new))
    if was != now:
      lines.append(f'{key}: {was} -> {now}')
  return lines


# --- the lock ----------------------------------------------------------------------------------

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


# --- signals -----------------------------------------------------------------------------------


class Signals:
  """Turns the first SIGTERM or SIGINT into a flag and the second into an immediate exit 75.

  `with Signals() as signals:` ... `if signals.requested:` save, then raise Preempted. `requested`
  is '' or the signal's name. The main thread may sit in a compilation for minutes, where Python
  runs no handlers: a thread reads the wakeup pipe, so the second signal ends the process even
  then. It touches no file: what is committed stays valid, the rest is removed at the next start.
  """
  signals = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.requested = ''
    self._by_handler = 0

  def __enter__(self):
    self._read_fd, self._write_fd = os.pipe()
    os.set_blocking(self._write_fd, False)
    self._old = {s: signal.signal(s, self._handle) for s in self.signals}
    self._old_wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, name='signals', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    for s, handler in self._old.items():
      signal.signal(s, handler)
    signal.set_wakeup_fd(self._old_wakeup)
    os.write(self._write_fd, b'\0')  # no signal has number 0: ends the thread
    self._thread.join()
    os.close(self._read_fd)
    os.close(self._write_fd)

  def _handle(self, number, _):
    # counts by itself, because an event loop may have taken the wakeup pipe for its own
    self.requested = signal.Signals(number).name
    self._by_handler += 1
    if self._by_handler > 1:
      os._exit(PREEMPTED)

  def _watch(self):
    count = 0
    while (number := os.read(self._read_fd, 1)[0]) != 0:
      if number in self.signals:
        self.requested = signal.Signals(number).name
        count += 1
        if count > 1:
          os._exit(PREEMPTED)
