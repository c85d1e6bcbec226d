"""Data sets of TFDS: which splits are on this machine, and how to get the others.

A TFDS builder without data has no splits and raises no error: seqio would then evaluate nothing.
"""
import math
import os

from t5lab.errors import DataError

# Steps beyond `tfds build`, by the start of the data set's name and config.
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
  """'; …' with the steps beyond `tfds build` for 'data_set/config:version', '' if there is none."""
  return next((f'; {note}' for start, note in _SPECIAL if name.startswith(start)), '')


def _instructions(builder, name: str) -> str:
  """How to get the data of a TFDS builder; TFDS can build only new versions."""
  buildable = sorted({str(v) for v in (builder.canonical_version, max(builder.versions))})
  if str(builder.version) in buildable:
    return (f'on a machine with a network run `tfds build {name} --data_dir DIR`, then set '
            f'TFDS_DATA_DIR=DIR{special(name)}')
  return (f'this TFDS builds only version {" or ".join(buildable)}, so copy the folder '
          f'{builder.info.full_name} from a machine where an older TFDS built it to DIR, then set '
          'TFDS_DATA_DIR=DIR')


def splits(task) -> list[str]:
  """The splits of a Task on this machine; DataError with instructions if its data is missing."""
  if check := getattr(task.source, 'check', None):          # of our FileSource
    check(task.name)
  loader = getattr(task.source, 'tfds_dataset', None)       # of seqio's TfdsDataSource
  if loader is None:
    return list(task.source.splits)
  try:
    names = loader.tfds_splits or {None: loader}
    missing = [name for name in names if not loader._get_builder(name).info.splits]
  except Exception as e:
    raise DataError(f'task {task.name!r}: TFDS cannot open {loader.name}: '
                    f'{str(e).strip().splitlines()[0]}') from e
  if missing:
    name, folder = loader.get_split_params(missing[0])
    folder = folder or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    instructions = _instructions(loader._get_builder(missing[0]), name)
    raise DataError(f'task {task.name!r}: the data of {name} is not on this machine (looked in '
                    f'{folder}): {instructions}')
  return list(task.source.splits)


def num_examples(task, split: str = 'train') -> int:
  """The number of examples in a split of a Task, 0 if it does not have the split.

  DataError if the data is not on this machine or its size is unknown.
  """
  if split not in splits(task):
    return 0
  count = task.num_input_examples(split)
  if count is None or not math.isfinite(count):  # seqio has inf if TFDS did not count
    raise DataError(f'task {task.name!r}: the number of examples in split {split!r} is unknown, '
                    'and its rate in the mixture depends on it: give the mixture a number')
  return int(count)
