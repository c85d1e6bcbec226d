"""Puts the tables of tasks and mixtures into seqio's registry.

No data set is opened here. Data that is missing is an error when its task is opened, which says how
to get it; TFDS sources are read-only, so that plain seqio starts no download either.
"""
from collections.abc import Callable
import functools

from t5lab.data.sources import corpora
from t5lab.data.tasks import (
  embedded,
  names,
  own_files,
  paper_mixtures,
  papers,
  parts,
  prompts,
  record_sources,
  t5_text,
  text,
)
from t5lab.data.tasks.seqio_tf import by_rows, seqio, tf
from t5lab.errors import UsageError
from t5lab.evaluation import metrics


def register_tasks(spec: str) -> None:
  """Adds all tasks on the vocabulary `spec`."""
  for name, row in embedded.SUPERVISED.items():
    answers = 'answers' in row.columns
    preprocessors = [parts.prompted(name, row.target), parts.tokenize]
    parts.add(name, spec, _corpus(row.corpus, row.columns),
              [*map(parts.by_batch, [_pad_answers] * answers + preprocessors)],
              metric_fns=list(row.metric_fns), postprocess_fn=t5_text.answers if answers else None)
  for name, objective in embedded.TEXT.items():
    text.add(name, spec, _corpus('books', ('text',)), objective)
  parts.add('docs_match', spec, _corpus('match', ('document', 'summary', 'match')),
            [parts.by_batch(_pair)], classes=2)

  for name, row in papers.SUPERVISED.items():
    parts.add(name, spec, _tfds(row), [parts.from_records(row.text)],
              metric_fns=list(row.metric_fns), postprocess_fn=row.text.value)
  for name, row in papers.TEXT.items():
    text.add(name, spec, _tfds(row), row.objective)
  for name, place in papers.HUB.items():
    text.add(name, spec, record_sources.HubSource(*place), 'lm', 'targets')


def register_mixtures() -> None:
  """Adds all mixtures; the tasks must be registered."""
  seqio.MixtureRegistry.add(embedded.MIXTURE, embedded.MIXED,
                            default_rate=lambda task: task.num_input_examples('train'))
  for name, rates in paper_mixtures.MIXTURES.items():
    seqio.MixtureRegistry.add(name, list(rates))


def _tfds(row: papers.Supervised | papers.Text) -> seqio.TfdsDataSource:
  return seqio.TfdsDataSource(row.tfds, splits=row.splits, read_only=True)


def _corpus(corpus: str, columns: tuple[str, ...]) -> seqio.FunctionDataSource:
  """Columns of text of an embedded corpus; 'answers' is the list of answer texts."""

  def dataset(split, shuffle_files, seed=None):
    del shuffle_files, seed      # the task's shuffle buffer holds the whole corpus
    records = corpora.load(corpus, split)
    table = {c: [record[c] for record in records] for c in columns if c != 'answers'}
    if 'answers' in columns:
      table['answers'] = tf.ragged.constant([record['answers']['text'] for record in records])
    return tf.data.Dataset.from_tensor_slices(table)

  splits = ('train', 'validation')
  sizes = {split: len(corpora.load(corpus, split)) for split in splits}
  return seqio.FunctionDataSource(dataset, splits, num_input_examples=sizes)


def _pad_answers(batch, output_features):
  """Pads gold answers as the text is padded: otherwise padded predictions never match them."""
  del output_features
  answers = batch['answers'].with_flat_values(
      by_rows(prompts.pad_punctuation, str, batch['answers'].flat_values))
  return {**batch, 'answers': answers, 'target': answers[:, :1].flat_values}


def _pair(batch, output_features):
  """Both texts as one input; the last EOS is added after trimming. The target is the class."""
  vocabulary = output_features['inputs'].vocabulary.vocab

  def frame(summary, document):
    return vocabulary.frame(summary, document)[:-1]
  return {'inputs': by_rows(frame, list[int], batch['summary'], batch['document']),
          'targets': tf.cast(batch['match'], tf.int32)[:, None]}


def register_files(spec: str, files: own_files.OwnFiles) -> None:
  """Adds the task 'files' on the vocabulary `spec`."""
  files.check()
  source = record_sources.FileSource(files)
  if files.objective:
    text.add(own_files.NAME, spec, source, files.objective, 'targets')
    return
  if not (files.fields['inputs'] or files.prompt):
    raise UsageError("data.fields.inputs='' is unlabelled text, which needs an objective: set "
                     f'data.objective to one of {", ".join(names.OBJECTIVES)}')
  parts.add(own_files.NAME, spec, source, [parts.by_batch(parts.tokenize)],
            metric_fns=[_file_metric(name) for name in files.metrics],
            postprocess_fn=t5_text.answers)


def _file_metric(name: str) -> Callable:
  """A metric whose targets are lists of answers; one of a single reference takes the first."""
  metric = metrics.FOR_FILES[name]
  if name in metrics.SEVERAL_REFERENCES:
    return metric

  @functools.wraps(metric)
  def first_answer(targets, predictions):
    return metric([answers[0] for answers in targets], predictions)
  return first_answer
