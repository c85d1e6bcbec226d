"""The seqio registry: importing this module registers t5lab's Tasks and its Mixture.

The vocabulary is an option of a run, so `register(spec)` puts the same names on another vocabulary.
`open_components(name, …)` is how the pipeline reads a Task or Mixture, ours or any other: as numpy
examples in memory, made by the task's own source and preprocessors. This is the only module that
imports TensorFlow, and TensorFlow never sees an accelerator.
"""
from collections.abc import Callable
import contextlib
import dataclasses
import os


@contextlib.contextmanager
def _greetings_discarded():
  """TensorFlow's C++ writes lines to file descriptor 2 before any log level takes effect."""
  kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(null)


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
with _greetings_discarded():
  import tensorflow as tf
  for _kind in ('GPU', 'TPU'):
    try:
      tf.config.set_visible_devices([], _kind)
    except RuntimeError:  # the caller has started TensorFlow: its devices are the caller's choice
      pass
  import seqio

import numpy as np  # noqa: E402

from t5lab.data import corpora, objectives, prompts, vocab  # noqa: E402
from t5lab.errors import DataError, UsageError, did_you_mean  # noqa: E402
from t5lab.evaluation import metrics  # noqa: E402

SUPERVISED = tuple(prompts.PROMPTS)
TEXT = ('books_span_corruption', 'books_prefix_lm', 'books_lm')
CLASSES = ('docs_match',)
OURS = (*SUPERVISED, *TEXT, *CLASSES)
MIXTURE = 'embedded_supervised'
MIXED = tuple(task for task in SUPERVISED if task not in prompts.BARE)
LONGEST_SHUFFLE = 10_000  # examples in seqio's shuffle buffer: more than any embedded corpus has


class SeqioVocabulary(seqio.Vocabulary):
  """A vocab.Vocab as seqio wants it; the ids are the same. The sentinels count as extra ids.

  feature: 'inputs' and 'targets' put the vocabulary's prefix before every text (BART's <s>, which
  its decoder writes too), 'targets' encodes as a target; '' is text as it is.
  """

  def __init__(self, spec: str, feature: str = ''):
    self.vocab = v = vocab.load(spec)
    super().__init__(extra_ids=v.num_sentinels)
    self._prefix = list(v.prefix) if feature else []
    self._of_targets = feature == 'targets' and v.target_encoder is not None
    self._key = (v.sha256, tuple(self._prefix), self._of_targets)

  # pad_id stays seqio's 0, with which it pads: segment ids, not ids, say what is real.
  bos_id = property(lambda self: self.vocab.bos_id)
  eos_id = property(lambda self: self.vocab.eos_id)
  unk_id = property(lambda self: self.vocab.unk_id)

  @property
  def _base_vocab_size(self):
    return self.vocab.size - self.vocab.num_sentinels

  def __eq__(self, other):
    return isinstance(other, SeqioVocabulary) and self._key == other._key

  def __hash__(self):
    return hash(self._key)

  def _encode(self, s):
    encode = self.vocab.encode_target if self._of_targets else self.vocab.encode
    return self._prefix + encode(s)

  def _decode(self, ids):
    return self.vocab.decode(ids)

  def decode(self, ids):
    return self.vocab.decode(np.asarray(ids))  # seqio's own would print sentinels as unknown

  def _encode_tf(self, s):
    """string[] -> int32[T]; string[B] -> ragged int32[B, T]."""
    s = tf.convert_to_tensor(s)
    ids = _token_lists(self._encode, tf.reshape(s, [-1]))
    return ids.flat_values if s.shape.rank == 0 else ids

  def decode_tf(self, ids):
    return self._decode_tf(ids)

  def _decode_tf(self, ids):
    def decode(ids):
      texts = [self.vocab.decode(row).encode('utf-8') for row in ids.reshape(-1, ids.shape[-1])]
      return np.array(texts, object).reshape(ids.shape[:-1])
    return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False),
                           ids.shape[:-1])


def _token_lists(fn, *columns):
  """fn(*str) -> ids over string[B] columns -> ragged int32[B, T]."""
  def run(*columns):
    ids = [np.array(fn(*map(tf.compat.as_text, row)), np.int32) for row in zip(*columns)]
    return np.concatenate([np.zeros(0, np.int32), *ids]), np.array(list(map(len, ids)), np.int64)
  flat, lengths = tf.numpy_function(run, columns, [tf.int32, tf.int64], stateful=False)
  return tf.RaggedTensor.from_row_lengths(
      tf.ensure_shape(flat, [None]), tf.ensure_shape(lengths, [None]), validate=False)


class NumpyObjective:
  """A stochastic seqio preprocessor that is a numpy function, and must stand last in its task.

  fn(tokens int[T], rng, **options) -> features, EOS included; size(T) -> upper bound of each
  feature. plain seqio runs it in tf.data with a seed for each example; the pipeline calls `apply`.
  """

  def __init__(self, fn: Callable, size: Callable, **options):
    self._fn, self._size, self._options = fn, size, options

  def __repr__(self):
    options = ', '.join(f'{k}={v!r}' for k, v in sorted(self._options.items()))
    return f'{self._fn.__name__}({options})'

  def apply(self, example, rng) -> dict[str, np.ndarray]:
    """{'targets': int[T]}, numpy Generator -> the features of one training example."""
    return self._fn(example['targets'], rng, **self._options)

  def sizes(self, example) -> dict[str, int]:
    """Upper bound of each feature's length, for packing."""
    return self._size(len(example['targets']))

  def __call__(self, dataset, output_features):
    names = sorted(output_features)

    def run(tokens, seed):
      rng = np.random.default_rng(seed.astype(np.uint32))
      features = self.apply({'targets': tokens}, rng)
      return [features[name].astype(np.int32) for name in names]

    @seqio.map_over_dataset(num_seeds=1)
    def map_one(example, seed):
      made = tf.numpy_function(run, [example['targets'], seed], [tf.int32] * len(names))
      return {name: tf.ensure_shape(x, [None]) for name, x in zip(names, made)}
    return map_one(dataset)


# Sources and preprocessors

ROWS_A_CALL = 256  # a call from tf.data into Python costs as much as tokenizing 20 sentences


def _by_batch(fn):
  """Preprocessor of fn over batches of rows: a text column is string[B], a list ragged [B, n]."""
  def preprocess(dataset, output_features):
    batches = dataset.ragged_batch(ROWS_A_CALL).map(lambda rows: fn(rows, output_features))
    return batches.unbatch().map(lambda row: row)  # the map turns ragged rows into plain tensors
  return preprocess


def _texts(fn, *columns):
  """fn(*str) -> str over string[B] columns."""
  def run(*columns):
    return np.array([fn(*(t.decode('utf-8') for t in row)).encode('utf-8')
                     for row in zip(*columns)], object)
  return tf.ensure_shape(tf.numpy_function(run, columns, tf.string, stateful=False), [None])


def _tokenize(rows, output_features):
  """As seqio.preprocessors.tokenize, which is slow over Python: it goes row by row."""
  made = {}
  for name, value in rows.items():
    if name in output_features:
      made[f'{name}_pretokenized'] = value
      value = output_features[name].vocabulary.encode_tf(value)
    made[name] = value
  return made


def _source(corpus: str, columns: tuple[str, ...]) -> seqio.FunctionDataSource:
  """Text columns of an embedded corpus; 'answers' is the list of answer texts."""

  def dataset(split, shuffle_files, seed=None):
    del shuffle_files, seed  # the task's shuffle buffer holds the whole corpus
    rows = corpora.load(corpus, split)
    table = {c: [row[c] for row in rows] for c in columns if c != 'answers'}
    if 'answers' in columns:
      table['answers'] = tf.ragged.constant([row['answers']['text'] for row in rows])
    return tf.data.Dataset.from_tensor_slices(table)

  splits = ('train', 'validation')
  return seqio.FunctionDataSource(
      dataset, splits, num_input_examples={s: corpora.num_rows(corpus, s) for s in splits})


def _prompted(task: str, target: str):
  """rows -> {'inputs': prompt(task, row), 'targets': row[target], other fields}."""
  fields = prompts.fields(task)

  def fill(*values):
    return prompts.prompt(task, dict(zip(fields, values)))

  def preprocess(rows, output_features):
    del output_features
    rest = {k: v for k, v in rows.items() if k not in (*fields, target)}
    return {'inputs': _texts(fill, *(rows[f] for f in fields)), 'targets': rows[target], **rest}
  return preprocess


def _pad_answers(rows, output_features):
  """Gold answers padded as the text is: scoring padded predictions against raw ones loses EM."""
  del output_features
  answers = rows['answers'].with_flat_values(
      _texts(prompts.pad_punctuation, rows['answers'].flat_values))
  return {**rows, 'answers': answers, 'target': answers[:, :1].flat_values}


def _only_targets(dataset):
  return dataset.map(lambda row: {'targets': row['text']})


def _segments(task: str, segment_length: Callable, least: int, **options):
  """Preprocessor: token lists -> their concatenation cut to segment_length(task, lengths), rest
  dropped if shorter than `least`. T5 concatenates 128 documents at a time, without a separator."""
  def preprocess(dataset, sequence_length):
    if sequence_length is None:
      raise UsageError(f'task {task!r} cuts text into segments and needs the feature lengths')
    length = segment_length(task, sequence_length, **options)
    tokens = dataset.map(lambda row: row['targets']).rebatch(length)
    tokens = tokens.filter(lambda segment: tf.size(segment) >= least)
    return tokens.map(lambda segment: {'targets': segment})
  return preprocess


def _matched(rows, output_features):
  """Both texts in one input, each but the last closed here; targets is the class."""
  v = output_features['inputs'].vocabulary.vocab
  pair = lambda summary, document: v.frame(summary, document)[:-1]
  return {'inputs': _token_lists(pair, rows['summary'], rows['document']),
          'targets': tf.cast(rows['match'], tf.int32)[:, None]}


def _answers(decoded, example=None, is_target=False):
  """Postprocessor: a target is the list of its gold answers."""
  if not is_target:
    return decoded
  return [tf.compat.as_text(answer) for answer in example['answers']]


# Registration

_registered: str | None = None


def _add(name, spec, source, preprocessors, features=('inputs', 'targets'), classes=0, framed=True,
         **options):
  """classes: where targets are one of so many, instead of tokens of the vocabulary. framed: each
  feature is a whole text, and not a part of one."""
  found = {f: seqio.Feature(SeqioVocabulary(spec, f if framed else ''), add_eos=True)
           for f in features}
  if classes:
    found['targets'] = seqio.Feature(seqio.PassThroughVocabulary(classes), add_eos=False)
  seqio.TaskRegistry.add(name, source=source, preprocessors=preprocessors, output_features=found,
                         shuffle_buffer_size=LONGEST_SHUFFLE, **options)


def _add_supervised(name, spec, source, target, metric_fns, first=(), **options):
  _add(name, spec, source, [*map(_by_batch, (*first, _prompted(name, target), _tokenize)),
                            seqio.preprocessors.append_eos_after_trim],
       metric_fns=list(metric_fns), **options)


def _add_text(name, spec, features, preprocessors):
  _add(name, spec, _source('books', ('text',)),
       [_only_targets, _by_batch(_tokenize), *preprocessors], features, framed=False)


def register(spec: str = vocab.DEFAULT) -> None:
  """Puts the tasks on the vocabulary `spec`, replacing those on another one. Idempotent."""
  global _registered
  if spec == _registered:
    return
  v = vocab.load(spec)
  for name in OURS:
    seqio.TaskRegistry.remove(name)
  for pair, language in (('ende', 'de'), ('enfr', 'fr'), ('enes', 'es')):
    _add_supervised(f'ha_{pair}', spec, _source(pair, ('en', language)), language,
                    (metrics.bleu, metrics.chrf))
  _add_supervised('docs_summarize', spec, _source('summarize', ('document', 'summary')), 'summary',
                  (metrics.rouge,))
  _add_supervised('numpydoc_qa', spec, _source('qa', ('id', 'question', 'context', 'answers')),
                  'target', (metrics.squad,), first=(_pad_answers,), postprocess_fn=_answers)
  _add_supervised('g2p_en_us', spec, _source('g2p', ('word', 'phonemes')), 'phonemes',
                  (metrics.exact_match, metrics.phoneme_error_rate))
  _add('docs_match', spec, _source('match', ('document', 'summary', 'match')),
       [_by_batch(_matched), seqio.preprocessors.append_eos_after_trim], classes=2)
  # A vocabulary without sentinels in a row keeps the name: opening the task says what is missing.
  sentinels = v.num_sentinels if v.sentinel_step else 0
  _add_text('books_span_corruption', spec, ('inputs', 'targets'), [
      _segments('books_span_corruption', objectives.span_corruption_segment, 2,
                sentinels=sentinels),
      NumpyObjective(objectives.span_corruption, objectives.span_corruption_sizes,
                     sentinel=v.sentinel(0) if sentinels else None, eos=v.eos_id,
                     **({'step': 1} if v.sentinel_step > 0 else {}))])
  _add_text('books_prefix_lm', spec, ('inputs', 'targets'), [
      _segments('books_prefix_lm', objectives.prefix_lm_segment, 2),
      NumpyObjective(objectives.prefix_lm, objectives.prefix_lm_sizes, eos=v.eos_id)])
  _add_text('books_lm', spec, ('targets',), [
      seqio.preprocessors.append_eos, _segments('books_lm', objectives.lm_segment, 1)])
  if _registered is None:
    seqio.MixtureRegistry.add(
        MIXTURE, MIXED, default_rate=lambda task: task.num_input_examples('train'))
  else:
    _rebuild_mixtures()
  _registered = spec


def _rebuild_mixtures():
  """A seqio Mixture holds the Task objects that it was made with: make those of our tasks anew."""
  stale = set(OURS)
  for name in list(seqio.MixtureRegistry.names()):
    mixture = seqio.MixtureRegistry.get(name)
    if stale & {task.name for task in mixture.tasks}:
      seqio.MixtureRegistry.remove(name)
      seqio.MixtureRegistry.add(name, list(mixture.rate_per_task_name.items()),
                                sample_fn=mixture._sample_fn)


# Reading


@dataclasses.dataclass(frozen=True)
class Component:
  """One task of a mixture. examples: dicts of int32[length], untrimmed; rate: relative weight."""
  name: str
  rate: float
  examples: list[dict[str, np.ndarray]]
  objective: NumpyObjective | None


def get(name: str):
  """The seqio Task or Mixture of this name; UsageError with the nearest names if there is none."""
  known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if name not in known:
    raise UsageError(f'no task or mixture {name!r}.{did_you_mean(name, known)}')
  return seqio.get_mixture_or_task(name)


def splits(task) -> list[str]:
  """Splits of a Task that are on this machine; DataError saying how to get them if none is."""
  loader = getattr(task.source, 'tfds_dataset', None)
  if loader is None:
    return list(task.source.splits)
  # A builder without data has no splits and says nothing: seqio would then evaluate nothing.
  try:
    parts = loader.tfds_splits or {None: loader}
    missing = [loader.get_split_params(part)[0] for part in parts
               if not loader._get_builder(part).info.splits]
  except Exception as e:
    raise DataError(f'task {task.name!r}: TFDS cannot open {loader.name}: '
                    f'{str(e).strip().splitlines()[0]}') from e
  if missing:
    folder = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    raise DataError(
        f'task {task.name!r}: the data of {missing[0]} is not on this machine (looked in '
        f'{loader.data_dir or folder}): where there is a network run `tfds build {missing[0]} '
        f'--data_dir DIR`, then set TFDS_DATA_DIR=DIR')
  return list(task.source.splits)


def _arrays(column) -> list[np.ndarray]:
  """A batch of a feature -> int32[length] of each row; one of a fixed length is not ragged."""
  if not isinstance(column, tf.RaggedTensor):
    return list(column.numpy().astype(np.int32))
  return np.split(column.flat_values.numpy().astype(np.int32), column.row_splits.numpy()[1:-1])


def _materialise(task, split, lengths, vocabulary) -> tuple[list, NumpyObjective | None]:
  for name, feature in task.output_features.items():
    if feature.rank != 1:
      raise UsageError(f'task {task.name!r}: feature {name!r} has rank {feature.rank}, not 1')
    if (not isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        and feature.vocabulary.vocab_size > vocabulary.size):
      raise UsageError(
          f'task {task.name!r} has its own vocabulary of {feature.vocabulary.vocab_size} ids for '
          f'{name!r}, data.vocab={vocabulary.spec!r} has {vocabulary.size}: use the same one')
  preprocessors = list(task.preprocessors)
  at = [i for i, p in enumerate(preprocessors) if isinstance(p, NumpyObjective)]
  if at and at != [len(preprocessors) - 1]:
    raise UsageError(f'task {task.name!r}: a NumpyObjective must be the last preprocessor, once')
  objective = preprocessors.pop() if at else None
  with seqio.utils.map_seed_manager(0):  # a user's random preprocessor draws once, the same always
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for preprocessor in preprocessors:
      if isinstance(preprocessor, seqio.CacheDatasetPlaceholder):
        continue
      trims = getattr(preprocessor, 'func', preprocessor) is (
          seqio.preprocessors.append_eos_after_trim)
      dataset = seqio.utils.add_kwargs_to_transform(
          preprocessor, sequence_length=None if trims else lengths,
          output_features=task.output_features)(dataset)
    wanted = ('targets',) if objective else tuple(task.output_features)
    dataset = dataset.map(lambda row: {name: row[name] for name in wanted if name in row})
    # Ragged batches, since crossing from TensorFlow to numpy costs 0.2 ms each time.
    examples = []
    for rows in dataset.ragged_batch(ROWS_A_CALL):
      columns = {name: _arrays(column) for name, column in rows.items()}
      examples += [dict(zip(columns, row)) for row in zip(*columns.values())]
  return examples, objective


def open_components(name: str, split: str, lengths: dict[str, int],
                    vocab_spec: str = vocab.DEFAULT) -> list[Component]:
  """The tasks behind a Task or Mixture name, their examples tokenized once and held in memory.

  lengths: tokens of each feature; text is cut into segments to fill them, all else is left whole.
  Errors: UsageError for an unknown name or a length that cannot be; DataError for a split that does
  not exist, data that is not on this machine, or no examples.
  """
  register(vocab_spec)
  lengths = {feature: length for feature, length in lengths.items() if length}
  found = get(name)
  is_mixture = isinstance(found, seqio.Mixture)
  tasks = found.tasks if is_mixture else [found]
  available = {task.name: splits(task) for task in tasks}
  components = []
  for task in tasks:
    if split.split('[')[0] not in available[task.name]:
      continue  # seqio too leaves out the tasks of a mixture that lack the split
    examples, objective = _materialise(task, split, lengths, vocab.load(vocab_spec))
    if not examples:
      raise DataError(f'task {task.name!r} has no examples in split {split!r} '
                      f'(lengths {lengths})')
    rate = float(found.get_rate(task)) if is_mixture else 1.
    components.append(Component(task.name, rate, examples, objective))
  if not components:
    known = sorted(set().union(*available.values()))
    raise DataError(f'{name!r} has no split {split!r}.{did_you_mean(split, known)}')
  return components


register()
