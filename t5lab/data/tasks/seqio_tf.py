"""TensorFlow and seqio, and our two seqio parts: a vocabulary and numpy objectives.

This is the only module that imports TensorFlow; others take `tf` and `seqio` from here. TensorFlow
never sees an accelerator.
"""
from collections.abc import Callable, Iterator
import contextlib
import itertools
import os


@contextlib.contextmanager
def _stderr_discarded():
  """TensorFlow's C++ writes to file descriptor 2 before any log level takes effect."""
  stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(null)


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')    # we report its failures in one line ourselves
with _stderr_discarded():
  import tensorflow as tf
  for _device in ('GPU', 'TPU'):
    try:
      tf.config.set_visible_devices([], _device)
    except RuntimeError:     # the caller has already started TensorFlow: its devices are theirs
      pass
  import seqio

import numpy as np  # noqa: E402

from t5lab.data import vocab  # noqa: E402
from t5lab.errors import UsageError  # noqa: E402


def by_columns(fn, columns, kinds) -> list:
  """Calls fn(*columns) -> columns in tf.data: from and to tensors [B], or ragged [B, n] for lists.

  fn gets lists of str, int or float, or lists of such lists. kinds: what its columns hold: str,
  int, list[str] or list[int]; they may have another length than the batch.
  """
  def ragged(column):        # lists of one length arrive as a matrix
    is_matrix = isinstance(column, tf.Tensor) and column.shape.rank == 2
    return tf.RaggedTensor.from_tensor(column) if is_matrix else column

  # numpy_function takes and returns flat arrays only.
  columns = list(map(ragged, columns))
  are_lists = [isinstance(column, tf.RaggedTensor) for column in columns]
  arrays = tf.nest.flatten(columns, expand_composites=True)     # of lists: values and row splits

  def run(*arrays):
    rest = iter(arrays)
    values = [_python_values(rest, is_list) for is_list in are_lists]
    return [array for column, kind in zip(fn(*values), kinds) for array in _flat(column, kind)]

  dtypes = {str: [tf.string], int: [tf.int32], list[str]: [tf.string, tf.int64],
            list[int]: [tf.int32, tf.int64]}
  types = [dtype for kind in kinds for dtype in dtypes[kind]]
  results = tf.numpy_function(run, arrays, types, stateful=False)
  flat = (tf.ensure_shape(array, [None]) for array in results)
  return [next(flat) if kind in (str, int) else
          tf.RaggedTensor.from_row_lengths(next(flat), next(flat), validate=False)
          for kind in kinds]


def by_rows(fn, kind, *columns):
  """The column of fn(*values of a row): see by_columns."""
  return by_columns(lambda *values: [list(map(fn, *values))], columns, [kind])[0]


def _python_values(arrays: Iterator[np.ndarray], are_lists: bool) -> list:
  array = next(arrays)
  values = [*map(tf.compat.as_text, array)] if array.dtype == object else array.tolist()
  return [values[a:b] for a, b in itertools.pairwise(next(arrays))] if are_lists else values


def _flat(column: list, kind) -> list[np.ndarray]:
  if kind is str:
    return [np.array([text.encode('utf-8') for text in column], object)]
  if kind is int:
    return [np.asarray(column, np.int32)]
  item, = kind.__args__
  lists = [_flat(values, item)[0] for values in column]
  return [np.concatenate([_flat([], item)[0], *lists]), np.array([*map(len, lists)], np.int64)]


class SeqioVocabulary(seqio.Vocabulary):
  """A vocab.Vocab with seqio's interface and the same ids. The sentinels count as extra ids.

  feature: 'inputs' and 'targets' put the vocabulary's prefix before every text (BART's <s>, which
  its decoder produces too), and 'targets' encodes as a target; '' encodes plain text.
  """

  def __init__(self, spec: str, feature: str = ''):
    self.vocab = v = vocab.load(spec)
    super().__init__(extra_ids=v.num_sentinels)
    self._prefix = []
    if feature:
      self._prefix = list(v.target_prefix if feature == 'targets' else v.prefix)
    if feature == 'inputs' and v.suffix:
      raise UsageError(f'vocabulary {spec!r} puts {v.suffix} after the end of an input: t5lab does '
                       'not train with it')
    self._encodes_targets = feature == 'targets' and v.target_encoder is not None
    self._key = (v.sha256, tuple(self._prefix), self._encodes_targets)

  # pad_id stays seqio's 0, with which it pads: segment ids, not token ids, mark padding.
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
    encode = self.vocab.encode_target if self._encodes_targets else self.vocab.encode
    return self._prefix + encode(s)

  def decode(self, ids):
    return self.vocab.decode(np.asarray(ids))  # seqio's own would print sentinels as unknown

  _decode = decode

  def _encode_tf(self, s):
    """string[] -> int32[T]; string[B] -> ragged int32[B, T]."""
    s = tf.convert_to_tensor(s)
    ids = by_rows(self._encode, list[int], tf.reshape(s, [-1]))
    return ids.flat_values if s.shape.rank == 0 else ids

  def decode_tf(self, ids):
    def decode(ids):
      texts = [self.vocab.decode(row).encode('utf-8') for row in ids.reshape(-1, ids.shape[-1])]
      return np.array(texts, object).reshape(ids.shape[:-1])
    texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(texts, ids.shape[:-1])

  _decode_tf = decode_tf


class NumpyObjective:
  """A stochastic seqio preprocessor that runs a numpy function. It must be last in its task.

  fn(tokens int[T], rng, **options) -> features, EOS included; size(T) -> an upper bound per
  feature. If `wants` names other features than targets alone, both get a dict instead of tokens and
  of T. Plain seqio runs it in tf.data with one seed per example; the pipeline calls `apply`.
  """

  def __init__(self, fn: Callable, size: Callable, wants: tuple[str, ...] = ('targets',),
               **options):
    self._fn, self._size, self._options = fn, size, options
    self.wants = wants

  def __repr__(self):
    """Part of the data fingerprint of a run: must not change."""
    options = ', '.join(f'{k}={v!r}' for k, v in sorted(self._options.items()))
    return f'{self._fn.__name__}({options})'

  def _argument(self, example):
    return example['targets'] if self.wants == ('targets',) else example

  def apply(self, example, rng) -> dict[str, np.ndarray]:
    """The features of one training example, from {feature: int[T]} of `wants`."""
    return self._fn(self._argument(example), rng, **self._options)

  def sizes(self, lengths: dict[str, int]) -> dict[str, int]:
    """Upper bounds of what `apply` returns, for packing, from the lengths of an example."""
    return self._size(self._argument(lengths))

  def __call__(self, dataset, output_features):
    names = sorted(output_features)

    def run(seed, *tokens):
      rng = np.random.default_rng(seed.astype(np.uint32))
      features = self.apply(dict(zip(self.wants, tokens)), rng)
      return [features[name].astype(np.int32) for name in names]

    @seqio.map_over_dataset(num_seeds=1)
    def map_one(example, seed):
      stored = [example[name] for name in self.wants]
      features = tf.numpy_function(run, [seed, *stored], [tf.int32] * len(names))
      return {name: tf.ensure_shape(x, [None]) for name, x in zip(names, features)}
    return map_one(dataset)
