"""The parts of tasks: seqio preprocessors over batches, and `add`, which registers a task.

A call from tf.data into Python costs as much as tokenizing 20 sentences. So everything written in
Python runs on batches: `by_batch(fn)` is the preprocessor of fn(batch, output_features).
"""
import itertools

import numpy as np

from t5lab.data.tasks import prompts
from t5lab.data.tasks.seqio_tf import SeqioVocabulary, ragged, seqio, tf

SHUFFLE_BUFFER = 10_000      # seqio's shuffle buffer, in examples: larger than any embedded corpus
EXAMPLES_PER_CALL = 256


def by_batch(fn):
  """Preprocessor of fn over batches: a text column is string[B], a list of texts ragged [B, n]."""
  def preprocess(dataset, output_features):
    batches = dataset.ragged_batch(EXAMPLES_PER_CALL)
    batches = batches.map(lambda batch: fn(batch, output_features))
    return batches.unbatch().map(lambda example: example)   # the map makes ragged values dense
  return preprocess


def texts(fn, *columns):
  """Applies fn(*str) -> str to string[B] columns."""
  def run(*columns):
    rows = [[text.decode('utf-8') for text in row] for row in zip(*columns)]
    return _text_array([fn(*row) for row in rows])
  return tf.ensure_shape(tf.numpy_function(run, columns, tf.string, stateful=False), [None])


def _text_array(values) -> np.ndarray:
  return np.array([value.encode('utf-8') for value in values], object)


# --- preprocessors -------------------------------------------------------------------------------


def tokenize(batch, output_features):
  """Like seqio.preprocessors.tokenize, which calls Python once per example and is slow."""
  tokenized = {}
  for name, value in batch.items():
    if name in output_features:
      tokenized[f'{name}_pretokenized'] = value
      value = output_features[name].vocabulary.encode_tf(value)
    tokenized[name] = value
  return tokenized


def prompted(task: str, target: str):
  """batch -> {'inputs': the task's prompt, 'targets': batch[target], other columns}."""
  fields = prompts.fields(task)

  def fill(*values):
    return prompts.prompt(task, dict(zip(fields, values)))

  def preprocess(batch, output_features):
    del output_features
    others = {k: v for k, v in batch.items() if k not in (*fields, target)}
    inputs = texts(fill, *(batch[field] for field in fields))
    return {'inputs': inputs, 'targets': batch[target], **others}
  return preprocess


def trims(preprocessor) -> bool:
  """True for seqio's append_eos_after_trim. It gets no lengths: the pipeline trims."""
  fn = getattr(preprocessor, 'func', preprocessor)     # seqio wraps it in functools.partial
  return fn is seqio.preprocessors.append_eos_after_trim


# --- records of a data set -----------------------------------------------------------------------


def from_records(text):
  """Preprocessor: records of a data set -> tokenized examples, any number for each record.

  text: a t5_text.Text. 'a/b' in its columns is the field b inside a. Its fn gets {column: str, int,
  float, or a list of one of them} and returns dicts of 'inputs' and 'targets', str, and of the
  names in `extra`, int or list of str.
  """
  batches = by_batch(lambda batch, output_features: tokenize(
      _examples(text, batch), output_features))

  def preprocess(dataset, output_features):
    columns = dataset.map(lambda record: {c: _column(record, c) for c in text.columns})
    return batches(columns, output_features)
  return preprocess


def _column(record, path: str):
  for key in path.split('/'):
    record = record[key]
  return record


def _examples(text, batch):
  """Runs text.fn on every record of a batch. numpy_function takes and returns flat arrays only."""
  values = [_ragged_if_list(batch[column]) for column in text.columns]
  is_list = [isinstance(value, tf.RaggedTensor) for value in values]
  arrays = []
  for value in values:
    if isinstance(value, tf.RaggedTensor):
      arrays += [value.flat_values, value.row_splits]
    else:
      arrays.append(value)

  kinds = {'inputs': str, 'targets': str, **dict(text.extra)}
  types = {str: [tf.string], int: [tf.int32], list: [tf.string, tf.int64]}

  def run(*arrays):
    columns = _python_columns(iter(arrays), is_list)
    records = [dict(zip(text.columns, values)) for values in zip(*columns)]
    examples = [example for record in records for example in text.fn(record)]
    flat = []
    for name, kind in kinds.items():
      flat += _flat_column([example[name] for example in examples], kind)
    return flat

  flat = iter(tf.numpy_function(
      run, arrays, sum((types[kind] for kind in kinds.values()), []), stateful=False))
  return {name: ragged(next(flat), next(flat)) if kind is list
          else tf.ensure_shape(next(flat), [None]) for name, kind in kinds.items()}


def _ragged_if_list(value):
  """A batch whose lists all have the same length arrives as a dense matrix."""
  if isinstance(value, tf.Tensor) and value.shape.rank == 2:
    return tf.RaggedTensor.from_tensor(value)
  return value


def _python_columns(arrays, is_list: list[bool]) -> list[list]:
  columns = []
  for ragged_column in is_list:
    values = _python_values(next(arrays))
    if ragged_column:
      values = [values[a:b] for a, b in itertools.pairwise(next(arrays))]
    columns.append(values)
  return columns


def _python_values(array: np.ndarray) -> list:
  if array.dtype == object:
    return [tf.compat.as_text(value) for value in array]
  return array.tolist()


def _flat_column(values: list, kind: type) -> list[np.ndarray]:
  if kind is list:
    lengths = np.array([len(value) for value in values], np.int64)
    return [_text_array(itertools.chain(*values)), lengths]
  return [_text_array(values) if kind is str else np.array(values, np.int32)]


# --- registration --------------------------------------------------------------------------------


def add(name, spec, source, preprocessors, features=('inputs', 'targets'), classes=0, framed=True,
        **options):
  """Registers a seqio Task on the vocabulary `spec`.

  classes: the number of classes if targets are classes instead of tokens. framed: each feature is a
  whole text, not a segment of one. options: seqio's, e.g. metric_fns.
  """
  output_features = {
      feature: seqio.Feature(SeqioVocabulary(spec, feature if framed else ''), add_eos=True)
      for feature in features}
  if classes:
    output_features['targets'] = seqio.Feature(
        seqio.PassThroughVocabulary(classes), add_eos=False)
  seqio.TaskRegistry.add(
      name, source=source, preprocessors=preprocessors, output_features=output_features,
      shuffle_buffer_size=SHUFFLE_BUFFER, **options)


def add_supervised(name, spec, source, target, metric_fns, first=(), **options):
  """Registers a task of prompts.py. first: preprocessors that run before the prompt."""
  preprocessors = [*first, prompted(name, target), tokenize]
  add(name, spec, source,
      [*map(by_batch, preprocessors), seqio.preprocessors.append_eos_after_trim],
      metric_fns=list(metric_fns), **options)
