"""A run's directory and its config.json.

  config.json       the resolved config of the run: data, never code
  run.lock          runs/lock.py
  checkpoints/      runs/checkpoint.py
  metrics.jsonl     runs/report.py
  anomalies.jsonl   runs/sentry.py
"""

from collections.abc import Mapping
import json
import os
from pathlib import Path
import stat

from t5lab import files
from t5lab.errors import UsageError

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


def config_differences(saved: Mapping, new: Mapping, allowed=()) -> list[str]:
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
