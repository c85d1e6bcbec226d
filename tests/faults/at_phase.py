"""t5lab with a signal at a chosen point: python at_phase.py PHASE@N SIGNAL <arguments of t5lab>.

The process sends SIGNAL to itself when it enters PHASE for the Nth time (from 1), and continues;
SIGNAL 0 sends none. The time is written to the file T5LAB_PHASE_FILE, in seconds of
time.monotonic. The rest of the program is unchanged.
"""

import os
from pathlib import Path
import signal
import sys
import time


def entry_point(phase):
  """(object, attribute) whose call begins the phase."""
  if phase == 'eval':
    from t5lab.training import steps
    return steps, 'eval_step'                    # traced when the first evaluation loss is computed
  if phase == 'decode':
    from t5lab.decoding.engine import Engine
    return Engine, 'generate'
  if phase == 'save':
    from t5lab.runs import manifests
    return manifests, 'seal'                      # in the thread: arrays written, nothing committed
  if phase == 'restore':
    import orbax.checkpoint as ocp
    return ocp.PyTreeCheckpointHandler, 'restore'
  raise SystemExit(f'unknown phase {phase!r}')


def main():
  point, name, *argv = sys.argv[1:]
  phase, _, number = point.partition('@')
  owner, attribute = entry_point(phase)
  real, calls = getattr(owner, attribute), []

  def entered(*args, **kwargs):
    calls.append(None)
    if len(calls) == int(number):
      Path(os.environ['T5LAB_PHASE_FILE']).write_text(repr(time.monotonic()))
      if name != '0':
        os.kill(os.getpid(), getattr(signal, name))
    return real(*args, **kwargs)
  setattr(owner, attribute, entered)
  from t5lab import cli
  sys.exit(cli.main(argv))


if __name__ == '__main__':
  main()
