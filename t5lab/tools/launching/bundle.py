"""The checkout as an archive of the files that git tracks.

Ignored and untracked files, which may be keys, notebooks and runs, are never sent.
"""

import os
from pathlib import Path
import shlex
import subprocess

from t5lab.errors import UsageError
from t5lab.tools.launching.job import MOUNT, LaunchJob


def split_config(config: str) -> tuple[Path, str]:
  """FILE[:ARG] -> (FILE, ARG); UsageError if there is no such file."""
  file, arg = (config, '') if os.path.isfile(config) else config.rpartition(':')[::2]
  if not os.path.isfile(file):
    raise UsageError(f'config file {config!r} does not exist')
  return Path(file), arg


def locate(config: str) -> tuple[Path, str]:
  """-> (the checkout of t5lab with the config file, FILE[:ARG] relative to it), or UsageError."""
  path, arg = split_config(config)
  file = path.resolve()
  top = _git(file.parent, 'rev-parse', '--show-toplevel')
  if top is None or not (Path(top) / 't5lab' / '__init__.py').is_file():
    raise UsageError(f'{path} is not in a git checkout of t5lab; the hosts install that checkout, '
                     'so the config must be in a clone of it')
  if _git(top, 'ls-files', '--error-unmatch', '--', str(file)) is None:
    raise UsageError(f'{path} is not tracked by git, so the hosts would not have it; run '
                     f'git add {path}')
  return Path(top), str(file.relative_to(Path(top).resolve())) + (f':{arg}' if arg else '')


def check_clean(root: Path, dirty: bool) -> None:
  """Raises UsageError if there are uncommitted changes, unless `dirty`."""
  head = _git(root, 'rev-parse', 'HEAD')
  if head is None:
    raise UsageError(f'{root} has no commit yet; commit the checkout first')
  changed = _git(root, 'status', '--porcelain', '--untracked-files=no')
  if changed and not dirty:
    names = [line[3:] for line in changed.splitlines()]
    more = ', …' if len(names) > 5 else ''
    raise UsageError(f'{root} has uncommitted changes ({", ".join(names[:5])}{more}); commit them, '
                     'so that the run can be reproduced, or add --allow-dirty to send them')


def check_paths(root: Path, job: LaunchJob, paths: list[tuple[str, str]]) -> None:
  """Raises UsageError for a path that the hosts would not have.

  paths: (config key, a path or glob that the job reads). The checkout must contain relative paths.
  """
  bucket = f'{MOUNT}/{job.bucket}/'
  shared = 'a folder that all hosts share'
  if job.on_bucket:
    shared = f'{bucket}…, in the bucket of the workdir'
  for key, path in paths:
    if os.path.isabs(path):
      if job.on_bucket and not path.startswith(bucket):
        raise UsageError(f'{key}={path}: the hosts have only the checkout and {shared}')
    elif not _git(root, 'ls-files', '--', path):
      raise UsageError(f'{key}={path} is not tracked by git in {root}, so the hosts would not have '
                       f'it; git add it, or put it into {shared}')


def shell(root: Path, dirty: bool, to: str) -> str:
  """Shell that does the same as `make`."""
  git = f'git -C {shlex.quote(str(root))}'
  commit = f'$({git} stash create)' if dirty else 'HEAD'
  return (f'commit="{commit}"\n{git} archive --format=tar.gz --output={shlex.quote(to)} '
          '"${commit:-HEAD}"')


def make(root: Path, dirty: bool, to: str) -> None:
  """Writes the archive. `git stash create` makes a commit of changes without touching them."""
  commit = dirty and _git(root, 'stash', 'create') or 'HEAD'
  if _git(root, 'archive', '--format=tar.gz', f'--output={to}', commit) is None:
    raise UsageError(f'git archive of {root} to {to} failed')


def _git(folder, *argv) -> str | None:
  """Runs git -> its output, or None if it fails."""
  try:
    process = subprocess.run(['git', '-C', str(folder), *argv], capture_output=True, text=True,
                             env=os.environ | {'GIT_OPTIONAL_LOCKS': '0'})  # status writes nothing
  except OSError as e:
    raise UsageError(f'git: {e.strerror}') from None
  return None if process.returncode else process.stdout.rstrip('\n')
