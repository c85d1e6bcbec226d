"""t5lab <command>. `t5lab <command> --help` says the rest.

Exit codes: 0 done · 2 usage or config · 3 data · 4 checkpoint · 70 numerical or internal ·
75 preempted: the same command goes on · 124 watchdog.
An error is one line; --debug shows the trace.
"""

import importlib
import importlib.util
import logging
import os
from pathlib import Path
import sys

from t5lab.errors import Failure, Preempted, UsageError, did_you_mean

# Each is a module with main(argv) that also runs alone: python -m t5lab.commands.train.
COMMANDS = {
    'train': 'train a config; the same command resumes it',
    'eval': "score a run's checkpoints on a task",
    'infer': 'text in, text out',
    'cache': 'tokenize a large training split once, on many processes',
    'data': 'prepare files: vocab, clean, dedup, decontaminate, scrub, augment',
    'inspect': 'what the model will see, as text and as a page with plots',
    'plan': 'fits a pod? how fast? what does it cost? asks the TPU compiler, needs no TPU',
    'check': 'the same as a gate, and a tiny twin of the run on this machine',
    'replay': 'a window of a finished run again, compared bit for bit',
    'bisect': 'the first step and tensor at which two runs part',
    'convert': 'weights from and to Hugging Face, T5X and GGUF, certified',
    'launch': 'a command on all hosts: Cloud TPU VMs, GKE, SLURM, local processes',
    'doctor': 'is this cluster fit for the run? a minute, before the hours',
}


def main(argv: list[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  debug = '--debug' in argv
  argv = [a for a in argv if a != '--debug']
  if not debug:      # what a library logs of a failed write, traces and all, we say in one line
    for name in ('absl', 'asyncio'):
      logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    return _run(argv)
  except Failure as e:
    if debug:
      raise
    return _end(e.code, ' '.join(str(e).split()))
  except KeyboardInterrupt:
    print('t5lab: interrupted', file=sys.stderr)
    return 75
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # the reader left: `| head`
    return 0
  except Exception as e:                   # a fault of ours: still one line, and how to see more
    if debug:
      raise
    if together := sys.modules.get('t5lab.parallel.multihost'):
      together.await_abort()
    what = ' '.join(str(e).split())[:300]
    return _end(Failure.code,
                f'internal error, {type(e).__name__}: {what} (--debug shows the trace)')


def _end(code: int, message: str) -> int:
  """Says why in one line; where this is one of several processes, the others end with it."""
  together = sys.modules.get('t5lab.parallel.multihost')
  print(f't5lab: {message}', file=sys.stderr)
  if together and code != Preempted.code:       # that all of them agreed on
    together.abort_all(code, message)
  return code


def _run(argv):
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(__doc__.strip(), '\n')
    for name, text in COMMANDS.items():
      print(f'  {name:8}{text}')
    return 0
  if argv[0] == '--version':
    from t5lab import __version__
    print(__version__)
    return 0
  if argv[0] not in COMMANDS:
    raise UsageError(f'no command {argv[0]!r}.{did_you_mean(argv[0], COMMANDS)}')
  choose_platform()
  return importlib.import_module(f't5lab.commands.{argv[0]}').main(argv[1:]) or 0


PCI, GOOGLE = Path('/sys/bus/pci/devices'), '0x1ae0'      # its devices, and a vendor's number


def choose_platform() -> None:
  """JAX_PLATFORMS=cpu where libtpu is installed and no TPU is: there for `t5lab plan`.

  JAX would start libtpu all the same, which looks for a metadata server and complains at length.
  Nothing is chosen where somebody has, or where another accelerator's plugin is installed.
  """
  found = importlib.util.find_spec
  if 'JAX_PLATFORMS' in os.environ or not found('libtpu') or found('jax_plugins'):
    return
  if not any(vendor.read_text().strip() == GOOGLE for vendor in PCI.glob('*/vendor')):
    os.environ['JAX_PLATFORMS'] = 'cpu'


