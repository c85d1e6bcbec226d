"""What a host knows about itself, for `t5lab doctor` to compare: versions, data, the workdir."""

import contextlib
import hashlib
from importlib import metadata
import os
from pathlib import Path
import platform
import shutil
import time

import t5lab
from t5lab import config as configs
from t5lab.errors import Failure
from t5lab.programs import streams

PARTS = 1 << 20       # bytes at the start, the middle and the end of a large file that are hashed
WHOLE = 256 << 20     # bytes of all files up to which they are hashed whole
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow',
            'seqio')


def versions(c) -> dict[str, str]:
  """What has to be the same on all hosts, by name."""
  return {'python': platform.python_version(), **{name: _version(name) for name in PACKAGES},
          't5lab': t5lab.__version__, 't5lab source': _source(), 'config': configs.digest(c)[:12]}


def _version(package) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return 'absent'


def _source() -> str:
  """12 hex digits of t5lab's own files: tells a changed checkout too, git or not."""
  root = Path(t5lab.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(path.relative_to(root).as_posix().encode() + b'\0' + path.read_bytes() + b'\0')
  return digest.hexdigest()[:12]


# --- the workdir ---------------------------------------------------------------------------------


def leave_a_file(workdir, token, index) -> str:
  """Makes WORKDIR/TOKEN/INDEX with fsync and rename, as checkpoints do -> '' or what went wrong."""
  try:
    folder = workdir / token
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f'{index}.tmp', 'w') as f:
      f.write(token)
      f.flush()
      os.fsync(f.fileno())
    os.rename(folder / f'{index}.tmp', folder / str(index))
  except OSError as e:
    return f'cannot write to {e.filename or workdir}: {e.strerror}'
  return ''


def look_for_files(workdir, token, second) -> list[int]:
  """The hosts whose files this one sees; a mounted bucket may need a moment."""
  wanted = {i for i, f in enumerate(second) if not f['workdir']}
  end = time.monotonic() + 5
  while True:
    try:
      seen = {i for i in wanted if (workdir / token / str(i)).read_text() == token
              and str(i) in os.listdir(workdir / token)}
    except OSError:
      seen = set()
      for i in wanted:
        with contextlib.suppress(OSError):
          if (workdir / token / str(i)).is_file():
            seen.add(i)
    if seen == wanted or time.monotonic() > end:
      return sorted(seen)
    time.sleep(0.2)


def tidy(workdir, token, index):
  """Removes the file of this host; who is last, the folder."""
  with contextlib.suppress(OSError):
    (workdir / token / str(index)).unlink(missing_ok=True)
    (workdir / token).rmdir()


def free(workdir) -> int | None:
  """Bytes free where the workdir is or will be."""
  with contextlib.suppress(OSError):
    return shutil.disk_usage(next(p for p in (workdir, *workdir.parents) if p.is_dir())).free
  return None


# --- data and vocabulary -------------------------------------------------------------------------


def of_data(c) -> dict:
  """{'vocabulary': hash, 'tasks': {what: hash}, 'error': [code, sentence] or None}, in seconds.

  Of a cache its manifest; of a person's files their names, sizes and content (of large ones three
  parts); of TFDS what its dataset_info says; of all the code that makes examples. No example is
  made.
  """
  facts = {'vocabulary': '', 'tasks': {}, 'error': None}
  try:
    from t5lab.data import vocab
    from t5lab.data.batches import cache
    from t5lab.data.tasks import identity as task_identity
    from t5lab.data.tasks import registry as tasks
    spec = streams.settle_vocabulary(c)
    words = vocab.load(spec)
    facts['vocabulary'] = words.sha256[:12]
    vocab.check_rows(words, c.model.vocab_size, 'this config (model.vocab_size)')
    tasks.register(spec, configs.files(c), tuple(c.data.modules))
    lengths = {k: n for k, n in c.data.lengths.to_dict().items() if n}
    parts = ((c.data.mixture, c.data.split), (c.eval.mixture or c.data.mixture, c.eval.split))
    for mixture, split in parts:
      for task, rate in tasks.select(mixture, split):
        tasks.check(task, words)
        said = {**task_identity.identity(task, split, lengths, spec), 'rate': rate}
        said.pop('vocabulary')
        name = f'{task.name}, {split}'
        facts['tasks'][f'{name}: preprocessing'] = _hash(repr(sorted(said.items())))
        if split == c.data.split and c.data.cache and (
            where := cache.folder(c.data.cache, task.name, split) / cache.MANIFEST).is_file():
          facts['tasks'][f'{name}: manifest of the cache'] = _hash(where.read_bytes())
        elif hasattr(task.source, 'files') and callable(task.source.files):
          facts['tasks'][f'{name}: files'] = _hash_files(task.source.files(split))
        elif loader := getattr(task.source, 'tfds_dataset', None):
          facts['tasks'][f'{name}: data of TFDS'] = _hash(_tfds(loader))
  except Failure as e:
    facts['error'] = [e.code, str(e)]
  except OSError as e:
    facts['error'] = [3, f'cannot read {e.filename or "the data"}: {e.strerror or e}']
  return facts


def _hash(what) -> str:
  return hashlib.sha256(what if isinstance(what, bytes) else what.encode()).hexdigest()[:12]


def _tfds(loader) -> str:
  infos = [loader._get_builder(part).info for part in loader.tfds_splits or {None: loader}]
  return repr([(info.full_name, {k: (s.num_examples, s.shard_lengths) for k, s in
                                 info.splits.items()}) for info in infos])


def _hash_files(files) -> str:
  from t5lab.data.sources import record_formats
  digest, sizes, opened = hashlib.sha256(), {}, {}
  for file in files:
    fs, path = record_formats.filesystem(file) if '://' in file else (None, file)
    sizes[file] = fs.size(path) if fs else os.path.getsize(path)
    opened[file] = (lambda fs=fs, path=path: fs.open(path, 'rb') if fs else open(path, 'rb'))
  whole = sum(sizes.values()) <= WHOLE
  for file in files:
    size = sizes[file]
    digest.update(f'{Path(file).name} {size}\n'.encode())
    with opened[file]() as f:
      for start in (0,) if whole else sorted({0, max(size // 2, 0), max(size - PARTS, 0)}):
        f.seek(start)
        left = size if whole else PARTS
        while left > 0 and (block := f.read(min(left, PARTS))):
          digest.update(block)
          left -= len(block)
  return digest.hexdigest()[:12]
