"""The commands of `t5lab`, a module each. Only here and in the loop do flags and configs appear."""

import argparse
import os
from pathlib import Path
import stat
import warnings

from t5lab.errors import UsageError


class Parser(argparse.ArgumentParser):
  """argparse whose complaints are a UsageError: one line, exit code 2."""

  def error(self, message):
    raise UsageError(f'{message} (see {self.prog} --help)')


def split_overrides(argv: list[str], name: str = 'config') -> tuple[list[str], dict[str, str]]:
  """['--config', 'c.py', '--config.optim.lr=1', …] -> (the rest, {'optim.lr': '1'})."""
  rest, overrides, i = [], {}, 0
  while i < len(argv):
    if argv[i].startswith(f'--{name}.'):
      key, equals, value = argv[i].removeprefix(f'--{name}.').partition('=')
      if not equals:
        if i + 1 == len(argv):
          raise UsageError(f'--{name}.{key} needs a value, as --{name}.{key}=…')
        i += 1
        value = argv[i]
      overrides[key] = value
    else:
      rest.append(argv[i])
    i += 1
  return rest, overrides


def use_compilation_cache() -> None:
  """Keeps compiled programs in ~/.cache/t5lab: the second start of a run skips most compiling.

  Whoever can write there can run code here, so a folder that others may write is not used. A folder
  of the person's own, JAX_COMPILATION_CACHE_DIR, goes before.
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
  # Where it cannot be written, the next start compiles again; there is nothing to say of that.
  warnings.filterwarnings('ignore', 'Error writing persistent compilation cache')
  if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    jax.config.update('jax_compilation_cache_dir', str(folder))
