"""The checkout as an archive: what git tracks, and nothing else.

Ignored and untracked files stay behind: that is where keys, notebooks and runs lie.
"""

import os
from pathlib import Path
import shlex
import subprocess

from t5lab.errors import UsageError
from t5lab.tools.launching.job import MOUNT, Job


def root_of(config: str) -> Path:
  """The checkout that the config file lies in; UsageError unless it is one of t5lab."""
  path = Path(config if os.path.isfile(config) else config.rpartition(':')[0])
  if not path.is_file():
    raise UsageError(f'no config file {config!r}')
  top = _git(path.resolve().parent, 'rev-parse', '--show-toplevel')
  if top is None or not (Path(top) / 't5lab' / '__init__.py').is_file():
    raise UsageError(f'{path} is not in a git checkout of t5lab: the hosts install that checkout, '
                     'so keep the config in a clone of it')
  if _git(top, 'ls-files', '--error-unmatch', '--', str(path.resolve())) is None:
    raise UsageError(f'{path} is not tracked by git, so the hosts would not have it: '
                     f'git add {path}')
  return Path(top)


def inside(config: str, root: Path) -> str:
  """FILE[:ARG] with FILE relative to the checkout."""
  file, arg = (config, '') if os.path.isfile(config) else config.rpartition(':')[::2]
  return str(Path(file).resolve().relative_to(root.resolve())) + (f':{arg}' if arg else '')


def check_clean(root: Path, dirty: bool) -> None:
  """UsageError for changes that are not committed, unless `dirty`."""
  head = _git(root, 'rev-parse', 'HEAD')
  if head is None:
    raise UsageError(f'{root} has no commit yet')
  changed = _git(root, 'status', '--porcelain', '--untracked-files=no')
  if changed and not dirty:
    names = [line[3:] for line in changed.splitlines()]
    raise UsageError(f'{root} has changes that are not committed ({", ".join(names[:5])}'
                     f'{", …" * (len(names) > 5)}): commit them, so that the run can be repeated, '
                     'or --allow-dirty sends them as they are')


def check_sent(root: Path, job: Job, paths: list[tuple[str, str]]) -> None:
  """UsageError for a path that no host would have, before the hosts are paid for.

  paths: (knob, a path or glob that the job reads). What is relative, the checkout has to hold.
  """
  where = f'{MOUNT}/{job.bucket}/…, in the bucket of the workdir' if job.on_bucket else (
      'a folder that all hosts share')
  for knob, path in paths:
    if os.path.isabs(path):
      if job.on_bucket and not path.startswith(f'{MOUNT}/{job.bucket}/'):
        raise UsageError(f'{knob}={path}: no host has it; they have the checkout and {where}')
    elif not _git(root, 'ls-files', '--', path):
      raise UsageError(f'{knob}={path}: git does not track it in {root}, so no host would have it: '
                       f'git add it, or put it into {where}')


def shell(root: Path, dirty: bool, to: str) -> str:
  """What `make` does."""
  git = f'git -C {shlex.quote(str(root))}'
  commit = f'$({git} stash create)' if dirty else 'HEAD'
  return (f'commit="{commit}"\n{git} archive --format=tar.gz --output={shlex.quote(to)} '
          '"${commit:-HEAD}"')


def make(root: Path, dirty: bool, to: str) -> None:
  """Writes the archive. Of changes git makes an object; neither files nor branches change."""
  commit = dirty and _git(root, 'stash', 'create') or 'HEAD'
  if _git(root, 'archive', '--format=tar.gz', f'--output={to}', commit) is None:
    raise UsageError(f'git archive of {root} to {to} failed')


def _git(folder, *argv) -> str | None:
  """Its output, or None where it fails."""
  try:
    done = subprocess.run(['git', '-C', str(folder), *argv], capture_output=True, text=True,
                          env=os.environ | {'GIT_OPTIONAL_LOCKS': '0'})     # status writes nothing
  except OSError as e:
    raise UsageError(f'git: {e.strerror}') from None
  return None if done.returncode else done.stdout.rstrip('\n')
