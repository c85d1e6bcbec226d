"""What a checkpoint step consists of, and the proof that it is whole.

MANIFEST.json lists every file of a step (size, SHA-256) and every array (path, shape, dtype),
with what the trainer wants to know again (`meta`) and the metrics at that step:

  {"manifest": {"format": 1, "step": 20, "files": {"state/params/_METADATA": [564, "9f86…"], …},
                "leaves": {"params/embed": [[2048, 128], "float32"], …}, "meta": {…},
                "metrics": {…}},
   "sha256": "<of the manifest's text, so that a flip in the manifest itself is seen>"}

Orbax sees neither a flipped bit nor a link that leads out of the checkpoint; this file does. A step
comes from disk or from a stranger: nothing in it is believed before it is compared.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
import re
import stat

from t5lab import files, trees
from t5lab.errors import CheckpointError

FORMAT = 1
NAME = 'MANIFEST.json'
MANIFEST_BYTES = 4 << 20  # ~25,000 arrays; bounds what a hostile file makes us allocate


class Invalid(CheckpointError):
  """A step that is damaged or forged, as opposed to one of another model or one we cannot read."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  step: int
  files: dict[str, tuple[int, str]]               # relative path -> (bytes, sha256 hex)
  leaves: dict[str, tuple[tuple[int, ...], str]]  # 'params/embed' -> (shape, dtype name)
  meta: dict
  metrics: dict[str, float]

  @property
  def parts(self) -> list[str]:
    """Top-level keys of the state that hold arrays: ['ema', 'opt_state', 'params', 'step']."""
    return sorted({path.split('/')[0] for path in self.leaves})


# --- trees as paths ----------------------------------------------------------------------------


def signatures(tree) -> dict[str, tuple[tuple[int, ...], str]]:
  """Pytree of arrays or jax.ShapeDtypeStruct -> {path: (shape, dtype name)}."""
  return {path: (tuple(x.shape), str(x.dtype)) for path, x in trees.flatten(tree).items()}


def differences(wanted: dict, found: dict) -> list[str]:
  """Where the leaves of a model (`wanted`) and of a checkpoint (`found`) differ; one line each."""
  show = lambda leaf: f'{leaf[1]}[{",".join(map(str, leaf[0]))}]'
  lines = []
  for path in sorted(wanted.keys() | found.keys()):
    if path not in found:
      lines.append(f'{path}: {show(wanted[path])} in the model, absent in the checkpoint')
    elif path not in wanted:
      lines.append(f'{path}: absent in the model, {show(found[path])} in the checkpoint')
    elif wanted[path] != found[path]:
      lines.append(f'{path}: {show(wanted[path])} in the model, {show(found[path])} '
                   'in the checkpoint')
  return lines


# --- writing -----------------------------------------------------------------------------------


def seal(directory) -> dict[str, tuple[int, str]]:
  """Flushes every file and folder under `directory` to disk -> {relative path: (bytes, sha256)}."""
  directory = Path(directory)
  sealed = {}
  for folder, _, names in os.walk(directory, topdown=False):
    for name in names:
      path = Path(folder, name)
      with open(path, 'rb') as f:
        os.fsync(f.fileno())
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
        sealed[path.relative_to(directory).as_posix()] = (os.fstat(f.fileno()).st_size, digest)
    files.fsync_directory(folder)
  return sealed


def write(directory, manifest: Manifest) -> None:
  text = _dump({'format': FORMAT, **dataclasses.asdict(manifest)})
  if len(text) > MANIFEST_BYTES:  # read() would refuse it
    raise CheckpointError(f'{NAME} would have {len(text)} bytes, the limit is {MANIFEST_BYTES}')
  files.write_text(Path(directory) / NAME, text)


def _dump(body: dict) -> str:
  text = lambda x: json.dumps(x, indent=1, sort_keys=True)
  return text({'manifest': body, 'sha256': hashlib.sha256(text(body).encode()).hexdigest()}) + '\n'


# --- reading -----------------------------------------------------------------------------------


def read(directory) -> Manifest:
  """The manifest of a step; Invalid if it is absent, damaged or names files outside the step."""
  path = Path(directory) / NAME
  if not stat.S_ISDIR(_lstat(directory).st_mode):
    raise Invalid(f'{directory}: not a directory')
  _regular(path)
  with open(path, 'rb') as f:
    data = f.read(MANIFEST_BYTES + 1)
  if len(data) > MANIFEST_BYTES:
    raise Invalid(f'{path}: over {MANIFEST_BYTES} bytes')
  try:
    body = json.loads(data)['manifest']
    # Written and read by us alone: text that is not byte for byte what we would write was changed.
    if _dump(body).encode() != data:
      raise Invalid(f'{path}: SHA-256 does not match its content')
    if body['format'] != FORMAT:
      raise CheckpointError(f'{path}: format {body["format"]}, this version reads {FORMAT}')
    sealed = {name: (int(size), str(digest)) for name, (size, digest) in body['files'].items()}
    leaves = {name: (tuple(int(n) for n in shape), str(dtype))
              for name, (shape, dtype) in body['leaves'].items()}
    manifest = Manifest(int(body['step']), sealed, leaves, dict(body['meta']),
                        dict(body['metrics']))
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
    raise Invalid(f'{path}: not a manifest: {type(e).__name__} {str(e)[:200]}') from None
  for name in sealed:
    if not re.fullmatch(r'state(/[\w.\-]+)+', name) or {'.', '..'} & set(name.split('/')):
      raise Invalid(f'{path}: refused file name {name[:200]!r}: it must lie under state/')
  return manifest


def verify(directory, *, full: bool = True, parts=None) -> Manifest:
  """Checks a step's names, kinds and sizes, and with `full` its SHA-256 sums -> its manifest.

  parts: hash only state/<part>/ of these (what is going to be read); names and sizes are always
  all checked. Invalid names the first file that is missing, extra, a link or damaged.
  """
  directory = Path(directory)
  manifest = read(directory)
  expected = {NAME, *manifest.files}
  for folder, folders, names in os.walk(directory):  # does not follow links
    for name in [*folders, *names]:
      path = Path(folder, name)
      relative = path.relative_to(directory).as_posix()
      if name in folders and stat.S_ISDIR(_lstat(path).st_mode):
        continue
      if relative not in expected:
        raise Invalid(f'{path}: not in {NAME}')
  for name, (size, digest) in sorted(manifest.files.items()):
    path = directory / name
    found = _regular(path).st_size
    if found != size:
      raise Invalid(f'{path}: {found} bytes, expected {size}')
    if full and (parts is None or name.split('/')[1] in parts):
      fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
      with os.fdopen(fd, 'rb') as f:
        if hashlib.file_digest(f, 'sha256').hexdigest() != digest:
          raise Invalid(f'{path}: SHA-256 differs from {NAME}')
  return manifest


def _lstat(path) -> os.stat_result:
  try:
    return os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    raise Invalid(f'{path}: missing') from None


def _regular(path) -> os.stat_result:
  """lstat of a plain file with one name; Invalid for links, pipes, devices and the rest."""
  found = _lstat(path)
  if not stat.S_ISREG(found.st_mode):
    raise Invalid(f'{path}: not a regular file')
  if found.st_nlink > 1:
    raise Invalid(f'{path}: refused, it has {found.st_nlink} hard links')
  return found
