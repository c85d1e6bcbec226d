"""Data of TFDS that may not be on this machine: what is there, and how to get the rest.

A TFDS builder without data has no splits and says nothing: seqio would then evaluate nothing.
"""
import math
import os

from t5lab.data.sources.base import RecordSource
from t5lab.errors import DataError

# What `tfds build` does not do by itself, by the name of the data set and the config it is true of.
_SPECIAL = (
    ('c4/', 'it reads terabytes of Common Crawl with Apache Beam: a job for a cluster, see '
            '--beam_pipeline_options'),
    ('wikipedia/', 'it runs on Apache Beam: first pip install apache-beam mwparserfromhell'),
    ('xsum:', 'first put xsum-extracts-from-downloads.tar.gz, made as TFDS describes, into '
              'DIR/downloads/manual'),
    *((f'wmt{year}_translate/cs-en', 'first put the CzEng files, which need a registration, into '
                                     'DIR/downloads/manual') for year in range(15, 20)),
)


def special(name: str) -> str:
  """'; …' with what more it takes to prepare this TFDS data set, '' where the command does it all.

  name: 'data_set/config:version'.
  """
  return next((f'; {note}' for start, note in _SPECIAL if name.startswith(start)), '')


def _how(builder, name: str) -> str:
  """How to get the data of a TFDS builder that has none: TFDS makes new versions only."""
  made = sorted({str(v) for v in (builder.canonical_version, max(builder.versions))})
  if str(builder.version) in made:
    return (f'where there is a network run `tfds build {name} --data_dir DIR`, then set '
            f'TFDS_DATA_DIR=DIR{special(name)}')
  return (f'the TFDS here makes only version {" or ".join(made)} of it, so copy the folder '
          f'{builder.info.full_name} from where an older one made it to DIR, then set '
          'TFDS_DATA_DIR=DIR')


def splits(task) -> list[str]:
  """Splits of a Task that are on this machine; DataError saying how to get them if none is."""
  loader = getattr(task.source, 'tfds_dataset', None)
  if loader is None:
    if isinstance(task.source, RecordSource):
      task.source.check(task.name)
    return list(task.source.splits)
  try:
    parts = loader.tfds_splits or {None: loader}
    missing = [part for part in parts if not loader._get_builder(part).info.splits]
  except Exception as e:
    raise DataError(f'task {task.name!r}: TFDS cannot open {loader.name}: '
                    f'{str(e).strip().splitlines()[0]}') from e
  if missing:
    name, folder = loader.get_split_params(missing[0])
    folder = folder or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    raise DataError(f'task {task.name!r}: the data of {name} is not on this machine (looked in '
                    f'{folder}): {_how(loader._get_builder(missing[0]), name)}')
  return list(task.source.splits)


def num_examples(task, split: str = 'train') -> int:
  """Rows of a split of a Task, 0 if it lacks the split.

  DataError where the data is not on this machine or its size is not known.
  """
  if split not in splits(task):
    return 0
  count = task.num_input_examples(split)
  if count is None or not math.isfinite(count):  # seqio has inf for what TFDS did not count
    raise DataError(f'task {task.name!r}: the number of examples in split {split!r} is not known, '
                    'and its rate in the mixture depends on it: give the mixture a number')
  return int(count)
