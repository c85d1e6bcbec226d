"""The interface of a source that reads files of records, beside what seqio asks of any source."""
from t5lab.data.sources.records import RecordReader
from t5lab.errors import DataError, Failure


class RecordSource:
  """A source that can be sharded, read twice, and asked which of its records were skipped.

  Code that handles every kind of task tests `isinstance(task.source, RecordSource)`; seqio's own
  sources are not.
  """
  failure: Failure | None = None       # ended the last reading; tf.data raises an error of its own
  reports_bad_records = True           # whether skipped records are worth a line
  readers: dict[str, RecordReader]     # by split: the reader of the last reading, with its counts

  def shard(self, split: str, k: int, n: int):
    """Returns a tf.data.Dataset of the records k, k + n, …; the others are not parsed."""
    raise NotImplementedError

  def reader(self, split: str) -> RecordReader:
    """Returns a new reader of all records of a split."""
    raise NotImplementedError

  def fingerprint(self, split: str) -> str:
    """Identifies what decides the split's examples, except for the contents of the files."""
    raise NotImplementedError

  def check(self, task: str) -> None:
    """DataError if the files are not on this machine, with the command that gets them."""

  def files(self, split: str) -> list[str]:
    return self.reader(split).files

  def read_through(self, split: str) -> None:
    """Reads the whole split to find what is wrong with its files. Errors: DataError."""
    reader = self.reader(split)
    good = sum(1 for _ in reader)
    if not good:
      raise DataError(f'split {split!r} has no usable records: {reader.summary()}')
