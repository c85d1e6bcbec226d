"""The directory of a run and its config.json.

  config.json       the resolved config of the run: data, never code
  run.lock          runs/lock.py
  checkpoints/      runs/checkpoint.py
  metrics.jsonl     runs/report.py
  tensorboard/      runs/report.py
  anomalies.jsonl   runs/sentry.py
  watchdog_N.txt    runs/watchdog.py
"""

from collections.abc import Mapping
import json
import os
from pathlib import Path
import stat

from t5lab import files
from t5lab.errors import UsageError


def write_config(directory, config: Mapping) -> None:
  """Writes `directory/config.json`; UsageError if a value is not plain JSON."""
  try:
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
  except (TypeError, ValueError) as e:
    raise UsageError(f'config.json must hold plain JSON values only: {e}') from None
  files.write_text(Path(directory) / 'config.json', text + '\n')


def read_config(directory) -> dict:
  """Reads the config of the run in `directory`; UsageError if it has none or it is not JSON."""
  path = Path(directory) / 'config.json'
  if not path.is_file():
    raise UsageError(f'{directory} is not a run of t5lab: it has no config.json')
  return files.read_json(path)


def config_differences(saved: Mapping, new: Mapping, allowed=()) -> list[str]:
  """Lists the keys in which two configs differ, as 'a.b: 1 -> 2', sorted.

  allowed: keys ('total_steps') or sections ('log') that may differ.
  """
  saved, new = _leaves(saved), _leaves(new)
  differing = [key for key in sorted({**saved, **new}) if saved.get(key) != new.get(key)]
  is_allowed = lambda key: any(key == a or key.startswith(f'{a}.') for a in allowed)
  return [f'{key}: {saved.get(key, "absent")} -> {new.get(key, "absent")}'
          for key in differing if not is_allowed(key)]


def _leaves(config: Mapping) -> dict[str, str]:
  """{'a.b': JSON text of the value}. As text, true and 1 differ."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      leaves |= {f'{key}.{inner}': text for inner, text in _leaves(value).items()}
    else:
      leaves[key] = json.dumps(value)
  return leaves


_warned: set[str] = set()


def warn_if_others_write(directory, log) -> None:
  """Warns, once per process, if every user of this machine may change files in `directory`."""
  try:
    mode = os.stat(directory).st_mode
  except OSError:
    return
  if mode & stat.S_IWOTH and str(directory) not in _warned:
    _warned.add(str(directory))
    log(f'any user of this machine can write to {directory} and so change what is loaded: '
        f'chmod o-w {directory}')
