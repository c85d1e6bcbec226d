"""t5lab COMMAND. See `t5lab COMMAND --help` for its options.

Exit codes: 0 done · 2 usage or config · 3 data · 4 checkpoint · 70 numerical or internal ·
75 preempted: run the same command to resume · 124 watchdog.
An error is one line; --debug shows the traceback.
"""

import importlib
import importlib.util
import logging
import os
from pathlib import Path
import sys
import warnings

from t5lab.errors import Failure, Preempted, UsageError, did_you_mean

# Each is a module of t5lab/commands with main(argv).
COMMANDS = {
    'train': 'train a config; the same command resumes it',
    'eval': "score a run's checkpoints on a task",
    'infer': 'generate, classify or embed text with a trained model',
    'cache': 'tokenize a large training split once, in many processes',
    'data': 'prepare files: vocab, clean, dedup, decontaminate, scrub, augment',
    'inspect': 'show what the model will read, as text and as a page with plots',
    'params': 'list the parameters of a model: shapes, axes, sharding, counts',
    'plan': 'memory, time and cost of a run on a TPU slice, without a TPU',
    'check': 'the same as a gate with budgets, plus a tiny twin of the run',
    'replay': 'recompute a window of a finished run and compare it bit for bit',
    'bisect': 'find the first step and tensor at which two runs differ',
    'convert': 'convert weights to and from Hugging Face, T5X and GGUF, verified',
    'launch': 'run a command on all hosts: Cloud TPU VMs, GKE, SLURM, local processes',
    'doctor': 'check in a minute that a cluster is ready for the run',
}


def main(argv: list[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  debug = '--debug' in argv
  argv = [arg for arg in argv if arg != '--debug']
  if not debug:
    _silence_libraries()
  try:
    return _run(argv)
  except Failure as e:
    if debug:
      raise
    return _exit(e.code, ' '.join(str(e).split()))
  except KeyboardInterrupt:
    print('t5lab: interrupted', file=sys.stderr)
    return 75
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # the reader left: `| head`
    return 0
  except Exception as e:                   # a bug of ours: still one line, and how to see more
    if debug:
      raise
    if multihost := sys.modules.get('t5lab.parallel.multihost'):
      multihost.await_abort()
    reason = ' '.join(str(e).split())[:300]
    return _exit(Failure.code, f'internal error, {type(e).__name__}: {reason} '
                               '(--debug shows the traceback)')


def _silence_libraries() -> None:
  """Turns off what libraries print: users get our one line instead."""
  # Failed writes, which Orbax and TensorStore log with their tracebacks.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # Deprecations that are for us to fix, not for the user.
  warnings.simplefilter('ignore', DeprecationWarning)
  warnings.simplefilter('ignore', FutureWarning)
  # TensorFlow's start-up messages from C++.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def _exit(code: int, message: str) -> int:
  """Prints the reason in one line. In a run of several processes, the others end with this one."""
  print(f't5lab: {message}', file=sys.stderr)
  multihost = sys.modules.get('t5lab.parallel.multihost')
  if multihost and code != Preempted.code:       # all processes agreed on a preemption
    multihost.abort_all(code, message)
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


PCI_DEVICES = Path('/sys/bus/pci/devices')
GOOGLE = '0x1ae0'                          # Google's vendor id: a TPU


def choose_platform() -> None:
  """Sets JAX_PLATFORMS=cpu where libtpu is installed, for `t5lab plan`, but there is no TPU.

  Otherwise JAX would start libtpu, which looks for a metadata server and complains at length.
  Nothing is set if the user has set it, or if the plugin of another accelerator is installed.
  """
  is_installed = importlib.util.find_spec
  if 'JAX_PLATFORMS' in os.environ or not is_installed('libtpu') or is_installed('jax_plugins'):
    return
  vendors = [path.read_text().strip() for path in PCI_DEVICES.glob('*/vendor')]
  if GOOGLE not in vendors:
    os.environ['JAX_PLATFORMS'] = 'cpu'
