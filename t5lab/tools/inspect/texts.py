"""What a vocabulary loses of a task's texts: those for which decode(encode(text)) is another text.

Most tasks keep the text beside its ids for a while ('targets_pretokenized', as seqio's tokenizer
does): there every loss is seen, of unknown characters, case, accents and white space. The texts are
the first of the source, since a stream has no others without reading all of it. Where a task keeps
no text, its stored ids are decoded, encoded and decoded again: that sees texts that do not survive
the way out, and not what was lost on the way in.
"""
import collections
from collections.abc import Iterable, Iterator

import numpy as np

from t5lab.data.tasks.parts import ROWS_A_CALL
from t5lab.data.tasks.seqio_tf import NumpyObjective, seqio, tf
from t5lab.tools.inspect import numbers as inspection

SUFFIX = '_pretokenized'
SHOWN = 3                         # texts that are shown, of those that were lost
AROUND = 40                       # characters shown on both sides of the first difference
CHARACTERS = 10                   # most frequent ones that did not come back


def of_task(task, split: str, lengths: dict[str, int], most: int) -> dict | None:
  """losses() of the texts of the task's first `most` examples.

  None where no preprocessor keeps them, or where the source is gone, as behind a cache it may be.
  """
  try:
    pairs = _pairs(task, split, lengths, most)
    return losses(pairs, 'texts') if pairs else None
  except tf.errors.OpError:
    return None


def of_ids(rows, vocab, form: str, chosen: Iterable[int]) -> dict:
  """losses() of the texts that the stored ids of these examples decode to."""
  def pairs():
    for i in chosen:
      example = rows.examples[i]
      for name in inspection.token_features(example, form):
        if not inspection.decodable(vocab, name):
          continue
        tokens = np.asarray(example[name])
        for run in np.split(tokens, np.flatnonzero(tokens == vocab.eos_id) + 1):
          if text := vocab.decode(run):
            encode = vocab.encode_target if name == 'targets' else vocab.encode
            yield text, vocab.decode(encode(text))
  return losses(pairs(), 'ids')


def _pairs(task, split, lengths, most) -> Iterator[tuple[str, str]] | None:
  """(text, what its ids decode to) of each feature, read as the task does up to its tokenizer."""
  dataset = task.source.get_dataset(split=split, shuffle=False)
  with seqio.utils.map_seed_manager(0):
    for preprocessor in task.preprocessors:
      if _kept(task, dataset) or isinstance(preprocessor, NumpyObjective):
        break
      if not isinstance(preprocessor, seqio.CacheDatasetPlaceholder):
        dataset = seqio.utils.add_kwargs_to_transform(
            preprocessor, sequence_length=lengths, output_features=task.output_features)(dataset)
  names = _kept(task, dataset)
  if not names:
    return None
  columns = []
  for name in names:
    vocabulary = task.output_features[name].vocabulary
    ours = getattr(vocabulary, 'vocab', None)            # seqio's own have one table
    if ours is None or inspection.decodable(ours, name):
      columns.append((name, vocabulary))
  wanted = [column for name, _ in columns for column in (name, name + SUFFIX)]
  dataset = dataset.map(lambda row: {column: row[column] for column in wanted}).take(most)

  def read():
    for batch in dataset.ragged_batch(ROWS_A_CALL):
      for name, vocabulary in columns:
        ids = batch[name]
        ids = ids.to_list() if isinstance(ids, tf.RaggedTensor) else ids.numpy().tolist()
        for text, row in zip(batch[name + SUFFIX].numpy(), ids):
          yield text.decode('utf-8', 'replace'), vocabulary.decode(row)
  return read()


def _kept(task, dataset) -> list[str]:
  """Features whose text and ids both stand in the rows."""
  spec = dataset.element_spec
  return [name for name in task.output_features
          if name + SUFFIX in spec and name in spec and spec[name].dtype.is_integer]


def losses(pairs: Iterable[tuple[str, str]], source: str) -> dict:
  """(text, what came back) -> {'source', 'lost': share, 'characters', 'shown'}.

  source: 'texts' or 'ids', passed through. characters: {character: how often it did not come back},
  most frequent first; shown: the first (text, back), around where they differ.
  Example: ('aß', 'a ⁇ ') -> lost 1 of 1, characters {'ß': 1}.
  """
  total = lost = 0
  characters, shown = collections.Counter(), []
  for text, back in pairs:
    total += 1
    if text == back:
      continue
    lost += 1
    characters.update(collections.Counter(text) - collections.Counter(back))
    if len(shown) < SHOWN:
      at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b),
                min(len(text), len(back)))
      window = slice(max(at - AROUND, 0), at + AROUND)
      shown.append((text[window], back[window]))
  return {'source': source, 'lost': inspection.share(lost, total),
          'characters': dict(characters.most_common(CHARACTERS)), 'shown': shown}
