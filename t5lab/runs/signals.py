"""SIGTERM and SIGINT: the first asks the run to save and stop, the second ends the process."""

import os
import signal
import threading

from t5lab.errors import Preempted


class Signals:
  """Turns the first SIGTERM or SIGINT into a flag and the second into an immediate exit 75.

  `with Signals() as signals:` … `if signals.requested:` save, then raise Preempted.
  `requested` is '' or the signal's name.

  The main thread may be in a compilation for minutes, where Python runs no handlers. A thread
  reads the wakeup pipe, so that the second signal ends the process even then. It touches no file:
  committed checkpoints stay valid, and the next start removes the rest.
  """
  signals = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.requested = ''
    self._handled = 0

  def __enter__(self):
    self._read_fd, self._write_fd = os.pipe()
    os.set_blocking(self._write_fd, False)
    self._old_handlers = {s: signal.signal(s, self._handle) for s in self.signals}
    self._old_wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, name='signals', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_wakeup)
    os.write(self._write_fd, b'\0')  # ends the thread: no signal has number 0
    self._thread.join()
    os.close(self._read_fd)
    os.close(self._write_fd)

  def _handle(self, number, _):
    # Counts apart from the thread, because an event loop may have taken over the wakeup pipe.
    self.requested = signal.Signals(number).name
    self._handled += 1
    if self._handled > 1:
      os._exit(Preempted.code)

  def _watch(self):
    count = 0
    while (number := os.read(self._read_fd, 1)[0]) != 0:
      if number in self.signals:
        self.requested = signal.Signals(number).name
        count += 1
        if count > 1:
          os._exit(Preempted.code)
