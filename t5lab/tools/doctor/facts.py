"""Facts that a host reports for `t5lab doctor` to compare: versions, data and the workdir."""

import contextlib
import hashlib
from importlib import metadata
import os
from pathlib import Path
import platform
import shutil
import time

import t5lab
from t5lab import config, files
from t5lab.errors import Failure
from t5lab.programs import streams

WHOLE = 256 << 20     # bytes of all files together up to which they are hashed whole
SAMPLE = 1 << 20      # bytes hashed at the start, the middle and the end of larger ones
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow',
            'seqio')


def versions(c) -> dict[str, str]:
  """Everything that must be the same on all hosts, by name."""
  return {'python': platform.python_version(), **{name: _version(name) for name in PACKAGES},
          't5lab': t5lab.__version__, 't5lab source': _source_hash(),
          'config': config.digest(c)[:12]}


def _version(package) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return 'absent'


def _source_hash() -> str:
  """12 hex digits of t5lab's own files; they change with an edited checkout too, git or not."""
  root = Path(t5lab.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(path.relative_to(root).as_posix().encode() + b'\0' + path.read_bytes() + b'\0')
  return digest.hexdigest()[:12]


# --- the workdir ---------------------------------------------------------------------------------


def write_file(folder, index) -> str:
  """Writes FOLDER/INDEX with fsync and rename, as checkpoints do -> '' or the error."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / str(index), folder.name)
  except OSError as e:
    return f'cannot write to {e.filename or folder.parent}: {e.strerror}'
  return ''


def visible_files(folder, errors) -> list[int]:
  """The hosts whose files this host sees; a mounted bucket may take a moment to show them.

  errors: of write_file on each host.
  """
  written = {i for i, error in enumerate(errors) if not error}
  end = time.monotonic() + 5
  while True:
    visible = {i for i in written if _is_visible(folder, str(i))}
    if visible == written or time.monotonic() > end:
      return sorted(visible)
    time.sleep(0.2)


def _is_visible(folder, name) -> bool:
  with contextlib.suppress(OSError):
    return name in os.listdir(folder) and (folder / name).read_text() == folder.name
  return False


def remove_file(folder, index):
  """Removes the file of this host; the last host removes the folder too."""
  with contextlib.suppress(OSError):
    (folder / str(index)).unlink(missing_ok=True)
    folder.rmdir()


def free(workdir) -> int | None:
  """Bytes free in the file system of the workdir, which need not exist yet; None if unknown."""
  with contextlib.suppress(OSError):
    return shutil.disk_usage(next(p for p in (workdir, *workdir.parents) if p.is_dir())).free
  return None


# --- data and vocabulary -------------------------------------------------------------------------


def data_hashes(c) -> dict:
  """{'vocabulary': hash, 'tasks': {name: hash}, 'error': '' or a message}, in seconds.

  For each task there is a hash of the code that makes its examples, and one of its data: the
  manifest of a cache; names, sizes and contents of files (of large ones three samples); the
  dataset_info of TFDS. No example is made.
  """
  from t5lab.data import vocab
  from t5lab.data.tasks import identity, registry
  report = {'vocabulary': '', 'tasks': {}, 'error': ''}
  try:
    spec = streams.settle_vocabulary(c)
    vocabulary = vocab.load(spec)
    report['vocabulary'] = vocabulary.sha256[:12]
    vocab.check_embedding_size(vocabulary, c.model.vocab_size, 'this config (model.vocab_size)')

    registry.register(spec, config.files(c), tuple(c.data.modules))
    lengths = {name: n for name, n in c.data.lengths.to_dict().items() if n}
    for mixture, split in ((c.data.mixture, c.data.split),
                           (c.eval.mixture or c.data.mixture, c.eval.split)):
      for task, rate in registry.select(mixture, split):
        registry.check(task, vocabulary)
        code = {**identity.identity(task, split, lengths, spec), 'rate': rate}
        code.pop('vocabulary')
        hashes = {'preprocessing': _hash(repr(sorted(code.items()))),
                  **_source_hashes(c, task, split)}
        for kind, value in hashes.items():
          report['tasks'][f'{task.name}, {split}: {kind}'] = value
  except Failure as e:
    report['error'] = str(e)
  except OSError as e:
    report['error'] = f'cannot read {e.filename or "the data"}: {e.strerror or e}'
  return report


def _source_hashes(c, task, split) -> dict[str, str]:
  """{kind of data: hash}; empty if the data is part of t5lab."""
  from t5lab.data.batches import cache
  from t5lab.data.tasks.record_sources import FileSource
  if split == c.data.split and c.data.cache:
    manifest = cache.folder(c.data.cache, task.name, split) / cache.MANIFEST
    if manifest.is_file():
      return {'manifest of the cache': _hash(manifest.read_bytes())}
  if isinstance(task.source, FileSource):
    return {'files': _hash_files(task.source.files(split))}
  if loader := getattr(task.source, 'tfds_dataset', None):
    return {'TFDS data': _hash(_describe_tfds(loader))}
  return {}


def _hash(data: bytes | str) -> str:
  return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:12]


def _describe_tfds(loader) -> str:
  infos = [loader._get_builder(split).info for split in loader.tfds_splits or {None: loader}]
  return repr([(info.full_name, {name: (split.num_examples, split.shard_lengths)
                                 for name, split in info.splits.items()}) for info in infos])


def _hash_files(names: list[str]) -> str:
  from t5lab.data.sources import record_formats
  places = [record_formats.filesystem(name) if '://' in name else (None, name) for name in names]
  sizes = [fs.size(path) if fs else os.path.getsize(path) for fs, path in places]
  whole, digest = sum(sizes) <= WHOLE, hashlib.sha256()
  for (fs, path), size in zip(places, sizes):
    digest.update(f'{Path(path).name} {size}\n'.encode())
    with fs.open(path, 'rb') if fs else open(path, 'rb') as f:
      if whole:
        while block := f.read(SAMPLE):
          digest.update(block)
        continue
      for start in sorted({0, size // 2, max(size - SAMPLE, 0)}):
        f.seek(start)
        digest.update(f.read(SAMPLE))
  return digest.hexdigest()[:12]
