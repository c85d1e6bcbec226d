"""A person's own files as the seqio task 'files': nobody writes Python.

What is wrong in the files is raised as one DataError, and the source's readers say how many rows
were skipped.
"""
from collections.abc import Callable
import dataclasses
import functools
import itertools

from t5lab.data.sources import base, records
from t5lab.data.tasks import own_files, parts
from t5lab.data.tasks import text as text_tasks
from t5lab.data.tasks.seqio_tf import seqio, tf
from t5lab.errors import Failure, UsageError
from t5lab.evaluation import metrics

SEVERAL = {f.__name__: f for f in (                  # metrics over several right answers
    metrics.bleu, metrics.chrf, metrics.squad, metrics.trivia_qa)}
METRICS = {**SEVERAL, **{f.__name__: f for f in (metrics.rouge, metrics.exact_match)}}


class FileSource(base.RecordSource, seqio.FunctionDataSource):
  """The examples of OwnFiles as a seqio source: 'inputs', 'targets' and ragged 'answers'."""

  def __init__(self, files: own_files.OwnFiles):
    self._files = files
    self.readers: dict[str, records.RecordReader] = {}
    super().__init__(lambda split, shuffle_files, seed=None: self.shard(split, 0, 1),
                     splits=tuple(files.files))

  def shard(self, split: str, k: int, n: int):
    """A tf.data.Dataset of every n-th row, from the k-th on."""
    def batches():
      self.failure = None
      try:
        reader = self.readers[split] = self._files.reader(split, (k, n))
        examples = (self._files.example(row.fields) for row in reader)
        while batch := list(itertools.islice(examples, parts.ROWS_A_CALL)):
          yield {'inputs': [e['inputs'] for e in batch], 'targets': [e['targets'] for e in batch],
                 'answers': tf.ragged.constant([e['answers'] for e in batch], tf.string)}
      except Failure as e:
        self.failure = e
        raise

    texts = tf.TensorSpec([None], tf.string)
    dataset = tf.data.Dataset.from_generator(batches, output_signature={
        'inputs': texts, 'targets': texts,
        'answers': tf.RaggedTensorSpec([None, None], tf.string, ragged_rank=1)})
    return dataset.unbatch()

  def reader(self, split: str) -> records.RecordReader:
    return self._files.reader(split)

  def fingerprint(self, split: str) -> str:
    """Of what decides the split's examples, but for what its files hold."""
    return dataclasses.replace(self._files, files={split: self._files.files[split]}).fingerprint()


def _of_first(metric: Callable) -> Callable:
  """A metric of one reference, on targets that are lists of answers: the first is it."""
  @functools.wraps(metric)
  def of_first(targets, predictions):
    return metric([answers[0] for answers in targets], predictions)
  return of_first


def add(spec: str, files: own_files.OwnFiles) -> None:
  """Registers the task 'files' on the vocabulary `spec`."""
  files.check()
  if not (files.objective or files.fields['inputs'] or files.prompt):
    raise UsageError("data.fields.inputs='' is text without inputs: say what to learn from it with "
                     f'data.objective, one of {", ".join(text_tasks.OBJECTIVES)}')
  source = FileSource(files)
  if files.objective:
    text_tasks.add(own_files.NAME, spec, source, files.objective, column='targets')
    return
  fns = [METRICS[name] if name in SEVERAL else _of_first(METRICS[name]) for name in files.metrics]
  parts.add(own_files.NAME, spec, source,
            [parts.by_batch(parts.tokenize), seqio.preprocessors.append_eos_after_trim],
            metric_fns=fns, postprocess_fn=parts.answers)
