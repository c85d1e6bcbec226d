"""Files of records as seqio sources: a user's own, and those of the Hugging Face hub.

Any fault in the files is raised as one DataError, and the readers count the skipped records.
"""
import dataclasses
import itertools
import os
import pathlib

from t5lab.data.sources import records
from t5lab.data.tasks import own_files, parts
from t5lab.data.tasks.seqio_tf import seqio, tf
from t5lab.errors import DataError, Failure

_TEXTS = tf.TensorSpec([None], tf.string)
_SIGNATURE = {'inputs': _TEXTS, 'targets': _TEXTS,
              'answers': tf.RaggedTensorSpec([None, None], tf.string, ragged_rank=1)}


class FileSource(seqio.FunctionDataSource):
  """The examples of OwnFiles as a seqio source: 'inputs', 'targets' and ragged 'answers'.

  Unlike seqio's own sources it can be sharded, and asked which of its records were skipped.
  """
  failure: Failure | None = None       # ended the last reading; tf.data raises an error of its own
  reports_bad_records = True           # whether skipped records are worth a line

  def __init__(self, files: own_files.OwnFiles):
    self._files = files
    self.readers: dict[str, records.RecordReader] = {}   # of the last reading of a split
    super().__init__(lambda split, shuffle_files, seed=None: self.shard(split, 0, 1),
                     splits=tuple(files.files))

  def shard(self, split: str, k: int, n: int):
    """Returns a tf.data.Dataset of the records k, k + n, …; the others are not parsed."""
    def batches():
      self.failure = None
      try:
        reader = self.readers[split] = self._files.reader(split, (k, n))
        examples = (self._files.example(record.fields) for record in reader)
        while batch := list(itertools.islice(examples, parts.EXAMPLES_PER_CALL)):
          answers = [example['answers'] for example in batch]
          yield {'inputs': [example['inputs'] for example in batch],
                 'targets': [example['targets'] for example in batch],
                 'answers': tf.ragged.constant(answers, tf.string)}
      except Failure as e:
        self.failure = e
        raise
    return tf.data.Dataset.from_generator(batches, output_signature=_SIGNATURE).unbatch()

  def reader(self, split: str) -> records.RecordReader:
    """Returns a new reader of all records of a split."""
    return self._files.reader(split)

  def files(self, split: str) -> list[str]:
    return self.reader(split).files

  def check(self, task: str) -> None:
    """DataError if the files are not on this machine, with the command that gets them."""

  def read_through(self, split: str) -> None:
    """Reads the whole split to find what is wrong with its files. Errors: DataError."""
    reader = self.reader(split)
    if not sum(1 for _ in reader):
      raise DataError(f'split {split!r} has no usable records: {reader.summary()}')

  def fingerprint(self, split: str) -> str:
    """Identifies what decides the split's examples, except for the contents of the files."""
    one_split = dataclasses.replace(self._files, files={split: self._files.files[split]})
    return one_split.fingerprint()


class HubSource(FileSource):
  """The text column of a folder of Parquet files, in a clone of a repository of the hub.

  The clone is in the folder of TFDS's data: downloads are kept in one place.
  """
  reports_bad_records = False      # every second line of WikiText is empty

  def __init__(self, repository: str, folder: str):
    downloads = pathlib.Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
    self._name = repository
    self._clone = downloads.expanduser() / repository.replace('/', '--')
    self._folder = self._clone / folder
    files = {split: str(self._folder / f'{split}-*.parquet')
             for split in ('train', 'validation', 'test')}
    super().__init__(own_files.OwnFiles(files, {'inputs': '', 'targets': 'text'}, bad_rows=1.))

  def check(self, task: str) -> None:
    if not list(self._folder.glob('*.parquet')):
      raise DataError(
          f'task {task!r}: {self._folder} contains no files: on a machine with a network run '
          f'`hf download {self._name} --repo-type dataset --local-dir {self._clone}` (pip install '
          'huggingface_hub); TFDS_DATA_DIR sets the folder that is searched')
