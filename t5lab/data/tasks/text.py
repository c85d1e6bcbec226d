"""Registers tasks on unlabelled text: a recipe of objectives/table.py as seqio preprocessors.

The preprocessors close over functions and plain values only: the identity of a cache follows them.
"""
from t5lab.data import vocab
from t5lab.data.objectives import table
from t5lab.data.tasks import parts
from t5lab.data.tasks.seqio_tf import NumpyObjective, by_columns, seqio, tf
from t5lab.errors import UsageError


def add(name: str, spec: str, source, objective: str, column: str = 'text', **options) -> None:
  """Registers the task `name` of an objective on the texts in the source's `column`.

  options: of the objective's function, e.g. density=0.5, mean_span=3.
  """
  if objective not in table.TABLE:
    raise UsageError(f'task {name!r}: no objective {objective!r}; there are '
                     f'{", ".join(table.TABLE)}')
  row = table.TABLE[objective]
  recipe = row.recipe(vocab.load(spec), options)

  def only_text(dataset):
    return dataset.map(lambda record: {'targets': record[column]})

  preprocessors = [only_text, _needs(name, recipe.marks), *_cut(name, recipe.cut)]
  if draw := recipe.draw:
    preprocessors.append(
        NumpyObjective(draw.fn, draw.sizes, recipe.cut.features, **draw.options))
  parts.add(name, spec, source, preprocessors, row.features, framed=False)


def _needs(task: str, marks):
  """A preprocessor that changes nothing, but reports tokens that the vocabulary lacks."""
  def preprocess(dataset):
    missing = [name for name, token in marks.items() if token is None]
    if missing:
      raise UsageError(f'task {task!r} needs tokens for {", ".join(missing)}, and the vocabulary '
                       'has neither them nor sentinels: use another vocabulary, or books_lm')
    return dataset
  return preprocess


def _cut(task: str, cut: table.Segments | table.Pieces) -> list:
  """The preprocessors that make stored examples of {'targets': text}."""
  tokenize = parts.by_batch(parts.tokenize)
  if isinstance(cut, table.Segments):
    append_eos = [seqio.preprocessors.append_eos] if cut.closed else []
    return [tokenize, *append_eos, _segments(task, cut.length, cut.least)]
  pieces = _pieces(task, cut.prepare, cut.features)
  return [tokenize, pieces] if cut.tokenized else [pieces]


def _segments(task, length, least):
  """Joins token lists and cuts them. T5 joins 128 documents at a time, without a separator."""
  def preprocess(dataset, sequence_length):
    tokens = dataset.map(lambda example: example['targets'])
    segments = tokens.rebatch(length(task, _known(task, sequence_length)))
    segments = segments.filter(lambda segment: tf.size(segment) >= least)
    return segments.map(lambda segment: {'targets': segment})
  return preprocess


def _pieces(task, prepare, features):
  """Runs the function that `prepare` returns over batches of texts or of token ids."""
  def preprocess(dataset, sequence_length):
    make = prepare(task, _known(task, sequence_length))

    def run(texts):
      pieces = make(texts)
      return [[piece[name] for piece in pieces] for name in features]

    def expand(batch, output_features):
      del output_features
      columns = by_columns(run, [batch['targets']], [list[int]] * len(features))
      return dict(zip(features, columns))

    return parts.by_batch(expand)(dataset, None)
  return preprocess


def _known(task: str, sequence_length):
  if sequence_length is None:
    raise UsageError(f'task {task!r} cuts text into segments and needs the feature lengths')
  return sequence_length
