"""The commands of `t5lab`, a module each. Only here and in the loop do flags and configs appear."""

import argparse

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
