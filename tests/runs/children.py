"""Child processes of the tests of the lock and the signals."""

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = """
import os, sys, time
from t5lab.runs.lock import RunLock
from t5lab.runs.signals import Signals
"""


class Child:
  """A Python process that runs `code`; `ready()` waits for a line of its output."""

  def __init__(self, code, *arguments):
    self.process = subprocess.Popen(
        [sys.executable, '-u', '-c', IMPORTS + code, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()
    self.process.communicate()

  def ready(self):
    return self.process.stdout.readline().strip()
