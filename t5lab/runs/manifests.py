"""The manifest of a checkpoint step: what it consists of, and how to verify that it is whole.

MANIFEST.json lists every file of a step (size, SHA-256) and every array (path, shape, dtype), with
`meta`, which the trainer reads when it resumes, and the metrics at that step:

  {"manifest": {"format": 1, "step": 20, "files": {"state/params/_METADATA": [564, "9f86…"], …},
                "leaves": {"params/embed": [[2048, 128], "float32"], …}, "meta": {…},
                "metrics": {…}},
   "sha256": "<of the manifest's text, which detects a flipped bit in the manifest itself>"}

Orbax detects neither a flipped bit nor a link that leads out of the checkpoint; this file does. A
step may come from a faulty disk or from a stranger, so everything is compared before it is used.
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
MANIFEST_BYTES = 4 << 20  # about 25,000 arrays; bounds what a hostile file makes us allocate


class Invalid(CheckpointError):
  """A step that is damaged or forged, not one of another model or one that we cannot read."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  step: int
  files: dict[str, tuple[int, str]]               # relative path -> (bytes, sha256 hex)
  leaves: dict[str, tuple[tuple[int, ...], str]]  # 'params/embed' -> (shape, dtype name)
  meta: dict
  metrics: dict[str, float]


# --- arrays ------------------------------------------------------------------------------------


def signatures(tree) -> dict[str, tuple[tuple[int, ...], str]]:
  """{path: (shape, dtype name)} of a pytree of arrays or jax.ShapeDtypeStruct."""
  return {path: (tuple(x.shape), str(x.dtype)) for path, x in trees.flatten(tree).items()}


def differences(model: dict, checkpoint: dict) -> list[str]:
  """One line for each array in which two signatures differ."""
  def describe(leaves, path):
    if path not in leaves:
      return 'absent'
    shape, dtype = leaves[path]
    return f'{dtype}[{",".join(map(str, shape))}]'

  return [f'{path}: {describe(model, path)} in the model, '
          f'{describe(checkpoint, path)} in the checkpoint'
          for path in sorted(model.keys() | checkpoint.keys())
          if model.get(path) != checkpoint.get(path)]


# --- writing -----------------------------------------------------------------------------------


def seal(directory) -> dict[str, tuple[int, str]]:
  """Flushes every file and folder below `directory`; returns {relative path: (bytes, sha256)}."""
  directory = Path(directory)
  sealed = {}
  for folder, _, names in os.walk(directory, topdown=False):
    for name in names:
      path = Path(folder, name)
      with open(path, 'rb') as f:
        os.fsync(f.fileno())
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
        size = os.fstat(f.fileno()).st_size
      sealed[path.relative_to(directory).as_posix()] = (size, digest)
    files.fsync_directory(folder)
  return sealed


def write(directory, manifest: Manifest) -> None:
  text = _dump({'format': FORMAT, **dataclasses.asdict(manifest)})
  if len(text) > MANIFEST_BYTES:  # read() would refuse it
    raise CheckpointError(
        f'{NAME} must have at most {MANIFEST_BYTES:,} bytes, got {len(text):,}; shorten meta')
  files.write_text(Path(directory) / NAME, text)


def _dump(body: dict) -> str:
  to_text = lambda x: json.dumps(x, indent=1, sort_keys=True)
  digest = hashlib.sha256(to_text(body).encode()).hexdigest()
  return to_text({'manifest': body, 'sha256': digest}) + '\n'


# --- reading -----------------------------------------------------------------------------------


def read(directory) -> Manifest:
  """Reads the manifest of a step.

  Errors: Invalid if it is missing, damaged or names files outside; CheckpointError: other format.
  """
  path = Path(directory) / NAME
  if not stat.S_ISDIR(_lstat(directory).st_mode):
    raise Invalid(f'{directory}: not a directory')
  _check_plain_file(path)
  data = files.read_bytes(path, MANIFEST_BYTES, Invalid)
  try:
    manifest = _parse(data, path)
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
    raise Invalid(f'{path}: not a manifest: {type(e).__name__} {str(e)[:200]}') from None
  for name in manifest.files:
    if not re.fullmatch(r'state(/[\w.\-]+)+', name) or {'.', '..'} & set(name.split('/')):
      raise Invalid(f'{path}: refused file name {name[:200]!r}: it must be below state/')
  return manifest


def _parse(data: bytes, path) -> Manifest:
  body = json.loads(data)['manifest']
  # Only this module writes manifests: text that we would not write byte for byte was changed.
  if _dump(body).encode() != data:
    raise Invalid(f'{path}: SHA-256 does not match its content')
  if body['format'] != FORMAT:
    raise CheckpointError(f'{path}: format must be {FORMAT} for this version, got {body["format"]}')
  return Manifest(
      step=int(body['step']),
      files={name: (int(size), str(digest)) for name, (size, digest) in body['files'].items()},
      leaves={name: (tuple(map(int, shape)), str(dtype))
              for name, (shape, dtype) in body['leaves'].items()},
      meta=dict(body['meta']),
      metrics=dict(body['metrics']))


def verify(directory, *, full: bool = True, parts=None) -> Manifest:
  """Checks the names, kinds and sizes of a step's files, and their SHA-256 if `full`.

  parts: hashes only the files below state/<part>/ of these; names and sizes are checked for all.
  Errors: Invalid names the first file that is missing, unexpected, a link or damaged.
  """
  directory = Path(directory)
  manifest = read(directory)

  # Nothing but the listed files and the folders that hold them. os.walk does not follow links.
  expected = {NAME, *manifest.files}
  for folder, folders, names in os.walk(directory):
    for name in [*folders, *names]:
      path = Path(folder, name)
      if name in folders and stat.S_ISDIR(_lstat(path).st_mode):
        continue
      if path.relative_to(directory).as_posix() not in expected:
        raise Invalid(f'{path}: not in {NAME}')

  # Every listed file with its content.
  for name, (expected_size, expected_digest) in sorted(manifest.files.items()):
    path = directory / name
    size = _check_plain_file(path).st_size
    if size != expected_size:
      raise Invalid(f'{path}: {size} bytes, expected {expected_size}')
    is_read = parts is None or name.split('/')[1] in parts
    if full and is_read and _sha256(path) != expected_digest:
      raise Invalid(f'{path}: SHA-256 differs from {NAME}')
  return manifest


def _sha256(path) -> str:
  fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
  with os.fdopen(fd, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _lstat(path) -> os.stat_result:
  try:
    return os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    raise Invalid(f'{path}: missing') from None


def _check_plain_file(path) -> os.stat_result:
  """lstat of a regular file with one name; Invalid for links, pipes, devices and the rest."""
  status = _lstat(path)
  if not stat.S_ISREG(status.st_mode):
    raise Invalid(f'{path}: not a regular file')
  if status.st_nlink > 1:
    raise Invalid(f'{path}: refused, it has {status.st_nlink} hard links')
  return status
