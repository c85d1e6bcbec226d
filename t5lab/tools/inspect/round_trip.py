"""Texts of a task that its vocabulary loses: those for which decode(encode(text)) is another text.

Most tasks keep the text beside its ids for a while ('targets_pretokenized', from seqio's
tokenizer). There every loss is seen: unknown characters, case, accents and white space. The texts
are the first of the source, because drawing others means reading all of it. If a task keeps no
text, its stored ids are decoded, encoded and decoded again; that misses what the first encoding
lost.
"""
import collections
from collections.abc import Callable, Iterable, Iterator
import os

import numpy as np

from t5lab.data.tasks.parts import EXAMPLES_PER_CALL
from t5lab.data.tasks.seqio_tf import NumpyObjective, seqio, tf
from t5lab.tools.inspect import statistics

SUFFIX = '_pretokenized'
SHOWN = 3                         # changed texts in the result
CONTEXT = 40                      # characters shown on both sides of the first difference
CHARACTERS = 10                   # most frequently lost characters in the result


def task_losses(task, split: str, lengths: dict[str, int], size: int,
                tick: Callable[[int], None] = lambda count: None) -> dict | None:
  """Returns losses() of the texts of the task's first `size` examples.

  None if no preprocessor keeps the texts or the source is gone, which is possible behind a cache.
  """
  try:
    pairs = _pairs(task, split, lengths, size)
    return losses(pairs, 'texts', tick) if pairs else None
  except tf.errors.OpError:
    return None


def id_losses(rows, vocab, form: str, chosen: Iterable[int],
              tick: Callable[[int], None] = lambda count: None) -> dict:
  """Returns losses() of the texts decoded from the stored ids of the chosen examples."""
  def pairs():
    for i in chosen:
      example = rows.examples[i]
      for name in statistics.token_features(example, form):
        if not statistics.decodable(vocab, name):
          continue
        encode = vocab.encode_target if name == 'targets' else vocab.encode
        ids = np.asarray(example[name])
        for segment in np.split(ids, np.flatnonzero(ids == vocab.eos_id) + 1):
          if text := vocab.decode(segment):
            yield text, vocab.decode(encode(text))
  return losses(pairs(), 'ids', tick)


def _pairs(task, split, lengths, size) -> Iterator[tuple[str, str]] | None:
  """Yields (text, decoded ids) of each feature, from the point where the task has both."""
  # Run the task's preprocessors until one keeps the text beside the ids.
  dataset = task.source.get_dataset(split=split, shuffle=False)
  with seqio.utils.map_seed_manager(0):
    for preprocessor in task.preprocessors:
      if _features_with_text(task, dataset) or isinstance(preprocessor, NumpyObjective):
        break
      if not isinstance(preprocessor, seqio.CacheDatasetPlaceholder):
        dataset = seqio.utils.add_kwargs_to_transform(
            preprocessor, sequence_length=lengths, output_features=task.output_features)(dataset)
  names = _features_with_text(task, dataset)
  if not names:
    return None

  # Of these, take the features that can be decoded.
  vocabularies = {}
  for name in names:
    vocabulary = task.output_features[name].vocabulary
    own = getattr(vocabulary, 'vocab', None)             # seqio's own classes have a single table
    if own is None or statistics.decodable(own, name):
      vocabularies[name] = vocabulary
  columns = [column for name in vocabularies for column in (name, name + SUFFIX)]
  dataset = dataset.map(lambda row: {column: row[column] for column in columns}).take(size)

  def read():
    for batch in dataset.ragged_batch(EXAMPLES_PER_CALL):
      for name, vocabulary in vocabularies.items():
        ids = batch[name]
        ids = ids.to_list() if isinstance(ids, tf.RaggedTensor) else ids.numpy().tolist()
        for text, text_ids in zip(batch[name + SUFFIX].numpy(), ids):
          yield text.decode('utf-8', 'replace'), vocabulary.decode(text_ids)
  return read()


def _features_with_text(task, dataset) -> list[str]:
  spec = dataset.element_spec
  return [name for name in task.output_features
          if name + SUFFIX in spec and name in spec and spec[name].dtype.is_integer]


def losses(pairs: Iterable[tuple[str, str]], source: str,
           tick: Callable[[int], None] = lambda count: None) -> dict:
  """Compares pairs of (text, restored text) -> {'source', 'lost': share, 'characters', 'shown'}.

  source: 'texts' or 'ids', passed through. characters: {character: times lost}, most frequent
  first. shown: the first changed pairs, around their first difference. tick(1) is called per pair.
  Example: ('aß', 'a ⁇ ') -> lost 1 of 1, characters {'ß': 1}.
  """
  total = lost = 0
  characters, shown = collections.Counter(), []
  for text, restored in pairs:
    total += 1
    tick(1)
    if text == restored:
      continue
    lost += 1
    characters.update(collections.Counter(text) - collections.Counter(restored))
    if len(shown) < SHOWN:
      at = len(os.path.commonprefix([text, restored]))
      window = slice(max(at - CONTEXT, 0), at + CONTEXT)
      shown.append((text[window], restored[window]))
  return {'source': source, 'lost': statistics.share(lost, total),
          'characters': dict(characters.most_common(CHARACTERS)), 'shown': shown}
