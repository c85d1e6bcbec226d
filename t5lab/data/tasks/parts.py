"""What tasks are made of: seqio preprocessors over batches of rows, and `add`, which registers one.

A call from tf.data into Python costs as much as tokenizing 20 sentences, so everything that is
Python goes over batches of rows: `by_batch(fn)` is a preprocessor of fn(rows, output_features).
"""
from collections.abc import Callable
import itertools

import numpy as np

from t5lab.data.tasks import prompts
from t5lab.data.tasks.seqio_tf import SeqioVocabulary, seqio, tf

LONGEST_SHUFFLE = 10_000  # examples in seqio's shuffle buffer: more than any embedded corpus has
ROWS_A_CALL = 256


def by_batch(fn):
  """Preprocessor of fn over batches of rows: a text column is string[B], a list ragged [B, n]."""
  def preprocess(dataset, output_features):
    batches = dataset.ragged_batch(ROWS_A_CALL).map(lambda rows: fn(rows, output_features))
    return batches.unbatch().map(lambda row: row)  # the map turns ragged rows into plain tensors
  return preprocess


def texts(fn, *columns):
  """fn(*str) -> str over string[B] columns."""
  def run(*columns):
    return np.array([fn(*(t.decode('utf-8') for t in row)).encode('utf-8')
                     for row in zip(*columns)], object)
  return tf.ensure_shape(tf.numpy_function(run, columns, tf.string, stateful=False), [None])


def tokenize(rows, output_features):
  """As seqio.preprocessors.tokenize, which is slow over Python: it goes row by row."""
  made = {}
  for name, value in rows.items():
    if name in output_features:
      made[f'{name}_pretokenized'] = value
      value = output_features[name].vocabulary.encode_tf(value)
    made[name] = value
  return made


def prompted(task: str, target: str):
  """rows -> {'inputs': prompt(task, row), 'targets': row[target], other fields}."""
  fields = prompts.fields(task)

  def fill(*values):
    return prompts.prompt(task, dict(zip(fields, values)))

  def preprocess(rows, output_features):
    del output_features
    rest = {k: v for k, v in rows.items() if k not in (*fields, target)}
    return {'inputs': texts(fill, *(rows[f] for f in fields)), 'targets': rows[target], **rest}
  return preprocess


def _column(row, path: str):
  for key in path.split('/'):
    row = row[key]
  return row


def _python(column: np.ndarray) -> list:
  return list(map(tf.compat.as_text, column)) if column.dtype == object else column.tolist()


def _text_array(values) -> np.ndarray:
  return np.array([value.encode('utf-8') for value in values], object)


def from_rows(columns, fn: Callable[[dict], list[dict]], extra=()):
  """Preprocessor: rows of a data set -> tokenized examples, any number for each row.

  columns: what fn reads, 'a/b' for a field b inside a. A row that fn gets is {column: str, int,
  float or a list of one of them}; it makes 'inputs' and 'targets', str, and what `extra`
  names, pairs of a name and int or list (of str).
  """
  kinds = {'inputs': str, 'targets': str, **dict(extra)}

  def make(rows, output_features):
    values = [rows[c] for c in columns]
    values = [tf.RaggedTensor.from_tensor(v) if v.shape.rank == 2 and isinstance(v, tf.Tensor)
              else v for v in values]  # lists that all have the same length
    is_list = [isinstance(v, tf.RaggedTensor) for v in values]
    flat = [part for v, ragged in zip(values, is_list)
            for part in ((v.flat_values, v.row_splits) if ragged else (v,))]

    def run(*arrays):
      arrays, read = iter(arrays), []
      for ragged in is_list:
        values = _python(next(arrays))
        read.append([values[a:b] for a, b in itertools.pairwise(next(arrays))] if ragged
                    else values)
      made = [example for row in zip(*read) for example in fn(dict(zip(columns, row)))]
      out = []
      for name, kind in kinds.items():
        values = [example[name] for example in made]
        if kind is list:
          out += [_text_array(itertools.chain(*values)),
                  np.array([len(v) for v in values], np.int64)]
        else:
          out.append(_text_array(values) if kind is str else np.array(values, np.int32))
      return out

    types = {str: [tf.string], int: [tf.int32], list: [tf.string, tf.int64]}
    flat = tf.numpy_function(run, flat, sum((types[k] for k in kinds.values()), []), stateful=False)
    flat, made = iter([tf.ensure_shape(x, [None]) for x in flat]), {}
    for name, kind in kinds.items():
      made[name] = (tf.RaggedTensor.from_row_lengths(next(flat), next(flat), validate=False)
                    if kind is list else next(flat))
    return tokenize(made, output_features)

  batches = by_batch(make)

  def preprocess(dataset, output_features):
    return batches(dataset.map(lambda row: {c: _column(row, c) for c in columns}), output_features)
  return preprocess


def trims(preprocessor) -> bool:
  """Is it seqio's append_eos_after_trim, to which we give no lengths: the pipeline cuts?"""
  return getattr(preprocessor, 'func', preprocessor) is seqio.preprocessors.append_eos_after_trim


def answers(decoded, example=None, is_target=False):
  """Postprocessor: a target is the list of its gold answers."""
  if not is_target:
    return decoded
  return [tf.compat.as_text(answer) for answer in example['answers']]


# Registration


def add(name, spec, source, preprocessors, features=('inputs', 'targets'), classes=0, framed=True,
        **options):
  """Registers a seqio Task on the vocabulary `spec`.

  classes: where targets are one of so many, instead of tokens of the vocabulary. framed: each
  feature is a whole text, and not a part of one.
  """
  found = {f: seqio.Feature(SeqioVocabulary(spec, f if framed else ''), add_eos=True)
           for f in features}
  if classes:
    found['targets'] = seqio.Feature(seqio.PassThroughVocabulary(classes), add_eos=False)
  seqio.TaskRegistry.add(name, source=source, preprocessors=preprocessors, output_features=found,
                         shuffle_buffer_size=LONGEST_SHUFFLE, **options)


def add_supervised(name, spec, source, target, metric_fns, first=(), **options):
  add(name, spec, source, [*map(by_batch, (*first, prompted(name, target), tokenize)),
                           seqio.preprocessors.append_eos_after_trim],
      metric_fns=list(metric_fns), **options)
