"""TensorFlow and seqio for whoever needs them, and what seqio needs of ours: a vocabulary and a way
to run a numpy objective.

The only module that imports TensorFlow: others take `tf` and `seqio` from here. TensorFlow never
sees an accelerator.
"""
from collections.abc import Callable
import contextlib
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


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')    # what fails in its C++, we say in one line
with _greetings_discarded():
  import tensorflow as tf
  for _kind in ('GPU', 'TPU'):
    try:
      tf.config.set_visible_devices([], _kind)
    except RuntimeError:  # the caller has started TensorFlow: its devices are the caller's choice
      pass
  import seqio

import numpy as np  # noqa: E402

from t5lab.data import vocab  # noqa: E402


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
    ids = token_lists(self._encode, tf.reshape(s, [-1]))
    return ids.flat_values if s.shape.rank == 0 else ids

  def decode_tf(self, ids):
    return self._decode_tf(ids)

  def _decode_tf(self, ids):
    def decode(ids):
      texts = [self.vocab.decode(row).encode('utf-8') for row in ids.reshape(-1, ids.shape[-1])]
      return np.array(texts, object).reshape(ids.shape[:-1])
    return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False),
                           ids.shape[:-1])


def token_lists(fn, *columns):
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
  feature. Where `wants` names other features than targets alone, both are given a dict instead of
  tokens and of T. plain seqio runs it in tf.data with a seed for each example; the pipeline calls
  `apply`.
  """

  def __init__(self, fn: Callable, size: Callable, wants: tuple[str, ...] = ('targets',),
               **options):
    self._fn, self._size, self._options = fn, size, options
    self.wants = wants

  def __repr__(self):
    options = ', '.join(f'{k}={v!r}' for k, v in sorted(self._options.items()))
    return f'{self._fn.__name__}({options})'

  def _given(self, example):
    return example['targets'] if self.wants == ('targets',) else example

  def apply(self, example, rng) -> dict[str, np.ndarray]:
    """{feature: int[T]} of `wants`, numpy Generator -> the features of one training example."""
    return self._fn(self._given(example), rng, **self._options)

  def sizes(self, lengths: dict[str, int]) -> dict[str, int]:
    """Lengths of an example's features -> upper bounds of what apply makes, for packing."""
    return self._size(self._given(lengths))

  def __call__(self, dataset, output_features):
    names = sorted(output_features)

    def run(seed, *tokens):
      rng = np.random.default_rng(seed.astype(np.uint32))
      features = self.apply(dict(zip(self.wants, tokens)), rng)
      return [features[name].astype(np.int32) for name in names]

    @seqio.map_over_dataset(num_seeds=1)
    def map_one(example, seed):
      made = tf.numpy_function(run, [seed, *(example[name] for name in self.wants)],
                               [tf.int32] * len(names))
      return {name: tf.ensure_shape(x, [None]) for name, x in zip(names, made)}
    return map_one(dataset)
