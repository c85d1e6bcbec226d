"""The commands of `t5lab`, one module each. Command-line flags are parsed only here."""

import argparse
import os
from pathlib import Path
import stat
import warnings

from t5lab.errors import UsageError


class Parser(argparse.ArgumentParser):
  """An argparse parser that keeps the layout of its description, the docstring of a command.

  Errors: UsageError, that is one line and exit code 2.
  """

  def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
    super().__init__(*args, formatter_class=formatter_class, **kwargs)

  def error(self, message):
    raise UsageError(f'{message} (see {self.prog} --help)')


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """Splits ['--config', 'c.py', '--config.optim.lr=1', …] -> (the rest, {'optim.lr': '1'})."""
  rest, overrides, arguments = [], {}, iter(argv)
  for argument in arguments:
    if not argument.startswith('--config.'):
      rest.append(argument)
      continue
    flag, equals, value = argument.partition('=')
    if not equals and (value := next(arguments, None)) is None:
      raise UsageError(f'{flag} needs a value: {flag}=VALUE')
    overrides[flag.removeprefix('--config.')] = value
  return rest, overrides


def use_compilation_cache() -> None:
  """Caches compiled programs in ~/.cache/t5lab: the second start of a run skips most compilation.

  The folder is not used if others can write to it, because they could then run code here.
  JAX_COMPILATION_CACHE_DIR takes precedence.
  """
  import jax
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 't5lab' / 'jax'
  try:
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    status = folder.stat()
  except OSError:
    return
  # A cache that cannot be written only means that the next start compiles again.
  warnings.filterwarnings('ignore', 'Error writing persistent compilation cache')
  if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    jax.config.update('jax_compilation_cache_dir', str(folder))
