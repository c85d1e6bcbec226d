"""Files of records as seqio sources: a user's own, and those of the Hugging Face hub.

Any fault in the files is raised as one DataError, and the readers count the skipped records.
"""
import dataclasses
import itertools
import os
import pathlib

from t5lab.data.sources import base, records
from t5lab.data.tasks import hub, own_files, parts
from t5lab.data.tasks.seqio_tf import seqio, tf
from t5lab.errors import DataError, Failure

_TEXTS = tf.TensorSpec([None], tf.string)
_SIGNATURE = {'inputs': _TEXTS, 'targets': _TEXTS,
              'answers': tf.RaggedTensorSpec([None, None], tf.string, ragged_rank=1)}


class FileSource(base.RecordSource, seqio.FunctionDataSource):
  """The examples of OwnFiles as a seqio source: 'inputs', 'targets' and ragged 'answers'."""

  def __init__(self, files: own_files.OwnFiles):
    self._files = files
    self.readers: dict[str, records.RecordReader] = {}
    super().__init__(lambda split, shuffle_files, seed=None: self.shard(split, 0, 1),
                     splits=tuple(files.files))

  def shard(self, split: str, k: int, n: int):
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
    return self._files.reader(split)

  def fingerprint(self, split: str) -> str:
    one_split = dataclasses.replace(self._files, files={split: self._files.files[split]})
    return one_split.fingerprint()


def _download_folder() -> pathlib.Path:
  """The folder of TFDS's data: downloads are kept in one place."""
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()


class HubSource(FileSource):
  """The text column of a repository's Parquet files."""
  reports_bad_records = False      # every second line of WikiText is empty

  def __init__(self, repository: hub.Repository):
    self._name = repository.name
    self._clone = _download_folder() / repository.name.replace('/', '--')
    self._folder = self._clone / repository.folder
    patterns = {split: str(self._folder / glob) for split, glob in repository.files.items()}
    fields = {'inputs': '', 'targets': 'text'}
    super().__init__(own_files.OwnFiles(patterns, fields, bad_rows=1.))

  def check(self, task: str) -> None:
    if not list(self._folder.glob('*.parquet')):
      raise DataError(
          f'task {task!r}: {self._folder} contains no files: on a machine with a network run '
          f'`hf download {self._name} --repo-type dataset --local-dir {self._clone}` (pip install '
          'huggingface_hub); TFDS_DATA_DIR sets the folder that is searched')
