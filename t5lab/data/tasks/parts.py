"""The parts of tasks: seqio preprocessors over batches, and `add`, which registers a task.

A call from tf.data into Python costs as much as tokenizing 20 sentences. So everything written in
Python runs on batches: `by_batch(fn)` is the preprocessor of fn(batch, output_features).
"""
import functools
import operator

from t5lab.data.tasks import prompts
from t5lab.data.tasks.seqio_tf import SeqioVocabulary, by_columns, by_rows, seqio

SHUFFLE_BUFFER = 10_000      # seqio's shuffle buffer, in examples: larger than any embedded corpus
EXAMPLES_PER_CALL = 256


def by_batch(fn):
  """Preprocessor of fn over batches: a text column is string[B], a list of texts ragged [B, n]."""
  def preprocess(dataset, output_features):
    batches = dataset.ragged_batch(EXAMPLES_PER_CALL)
    batches = batches.map(lambda batch: fn(batch, output_features))
    return batches.unbatch().map(lambda example: example)   # the map makes ragged values dense
  return preprocess


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
    inputs = by_rows(fill, str, *(batch[field] for field in fields))
    return {'inputs': inputs, 'targets': batch[target], **others}
  return preprocess


def trims(preprocessor) -> bool:
  """True for seqio's append_eos_after_trim. It gets no lengths: the pipeline trims."""
  fn = getattr(preprocessor, 'func', preprocessor)     # seqio wraps it in functools.partial
  return fn is seqio.preprocessors.append_eos_after_trim


def from_records(text):
  """Preprocessor: records of a data set -> tokenized examples, any number for each record.

  text: a t5_text.Text. 'a/b' in its columns is the field b inside a. Its fn gets {column: str, int,
  float, or a list of one of them} and returns dicts of 'inputs' and 'targets', str, and of the
  names in `extra`, int or list of str.
  """
  kinds = {'inputs': str, 'targets': str, **text.extra}

  def make(*columns):
    records = [dict(zip(text.columns, values)) for values in zip(*columns)]
    examples = [example for record in records for example in text.fn(record)]
    return [[example[name] for example in examples] for name in kinds]

  def examples(batch, output_features):
    columns = by_columns(make, [batch[column] for column in text.columns],
                         [list[str] if kind is list else kind for kind in kinds.values()])
    return tokenize(dict(zip(kinds, columns)), output_features)

  def preprocess(dataset, output_features):
    columns = dataset.map(lambda record: {
        column: functools.reduce(operator.getitem, column.split('/'), record)
        for column in text.columns})
    return by_batch(examples)(columns, output_features)
  return preprocess


def add(name, spec, source, preprocessors, features=('inputs', 'targets'), classes=0, framed=True,
        **options):
  """Registers a seqio Task on the vocabulary `spec`.

  classes: the number of classes if targets are classes instead of tokens. framed: each feature is a
  whole text, not a segment of one, and gets an EOS. options: seqio's, e.g. metric_fns.
  """
  output_features = {
      feature: seqio.Feature(SeqioVocabulary(spec, feature if framed else ''), add_eos=True)
      for feature in features}
  if framed:
    preprocessors = [*preprocessors, seqio.preprocessors.append_eos_after_trim]
  if classes:
    output_features['targets'] = seqio.Feature(
        seqio.PassThroughVocabulary(classes), add_eos=False)
  seqio.TaskRegistry.add(
      name, source=source, preprocessors=preprocessors, output_features=output_features,
      shuffle_buffer_size=SHUFFLE_BUFFER, **options)
