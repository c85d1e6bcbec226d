"""A sentencepiece vocabulary of a person's own files, and how well it fits them.

Settings and ids are those of the embedded ones (train_vocab.py): pad 0, end of sequence 1, unknown
2, bytes, pieces, and 100 sentinels on top. Nothing is normalised, so every text comes back.

Lines of up to 1000 characters are what it learns from; of more than --max-sentences of them, those
whose hashes are smallest. A hundredth of the rows, up to 1000, is held out and measured, chosen
likewise. So neither depends on the order of the rows; sentencepiece's sums do, a little.

Memory: 8 bytes a line that is used, 16 at times, the rows held out, and what sentencepiece keeps,
which is the lines and more.
"""
import collections

import numpy as np

from t5lab.data import vocab
from t5lab.errors import DataError
from t5lab.tools.prepare import hashes, train_vocab
from t5lab.tools.prepare.job import Job

MOST = 1_000_000
HELD_OUT, MOST_HELD_OUT = 0.01, 1000


class Smallest:
  """Keeps the `most` smallest 64-bit numbers that it was shown; equal ones count once."""

  def __init__(self, most: int):
    self._most, self._kept, self._new = most, np.zeros(0, np.uint64), []

  def add(self, number: int) -> None:
    if len(self._kept) < self._most or number < self._kept[-1]:
      self._new.append(number)
      if len(self._new) == 2**16:
        self._merge()

  def __len__(self) -> int:
    self._merge()
    return len(self._kept)

  def _merge(self):
    new = np.array(self._new, np.uint64)
    self._kept, self._new = np.unique(np.concatenate([self._kept, new]))[:self._most], []

  def limit(self, count: int | None = None) -> int:
    """The largest that is kept, or the count-th smallest; -1 if there is none."""
    self._merge()
    kept = self._kept[:count]
    return int(kept[-1]) if len(kept) else -1


def lines(text: str) -> list[str]:
  return [text[i:i + train_vocab.LINE] for i in range(0, len(text), train_vocab.LINE)]


def measure(vocabulary: vocab.Vocab, texts: list[str]) -> dict[str, float]:
  """What a vocabulary makes of texts: shares that do not come back, of texts and of characters;
  share of unknown ids; tokens a word (between spaces) and a byte."""
  lost = lost_characters = characters = unknown = tokens = words = size = 0
  for text in texts:
    ids = vocabulary.encode(text)
    back = vocabulary.decode(ids)
    lost += back != text
    lost_characters += (collections.Counter(text) - collections.Counter(back)).total()
    characters += len(text)
    unknown += ids.count(vocabulary.unk_id)
    tokens += len(ids)
    words += len(text.split())
    size += len(text.encode('utf-8'))
  return {'texts': len(texts), 'texts_lost': lost / max(1, len(texts)),
          'characters_lost': lost_characters / max(1, characters),
          'unknown_rate': unknown / max(1, tokens), 'tokens_per_word': tokens / max(1, words),
          'tokens_per_byte': tokens / max(1, size)}


def run(job: Job, size: int, most: int = MOST) -> None:
  """Trains on the job's fields and writes the model file, which t5lab.data.vocab.load opens.

  size: ids in all, sentinels included. DataError where the texts do not support so many.
  """
  line_hashes, row_hashes, count = Smallest(most), Smallest(MOST_HELD_OUT + 1), 0
  for row in job.read('sampling'):
    texts = job.texts(row)
    row_hashes.add(row_hash(texts))
    count += 1
    for text in texts:
      for line in lines(text):
        line_hashes.add(hashes.hash64(line))
  # At least one, and never all: rows of the same text are held out together.
  held = min(MOST_HELD_OUT, int(count * HELD_OUT) or 1, len(row_hashes) - 1)
  last_line, last_row = line_hashes.limit(), row_hashes.limit(held) if held else -1
  del line_hashes, row_hashes
  held_out, used = [], collections.Counter()

  def sample():
    for row in job.read('training', again=True):
      texts = job.texts(row)
      if row_hash(texts) <= last_row:
        if len(held_out) < MOST_HELD_OUT:
          held_out.extend(texts)
        continue
      for text in texts:
        for line in lines(text):
          if hashes.hash64(line) <= last_line:
            used.update(lines=1, characters=len(line))
            yield line

  try:
    model = train_vocab.train(sample(), size)
  except RuntimeError as e:
    raise DataError(f'--size {size}, less {vocab.NUM_SENTINELS} sentinels, is more or less than '
                    f'sentencepiece can make of these texts: {_reason(e)}') from e
  vocabulary = vocab.sentencepiece_model(job.output, model)
  job.write_bytes(model)
  job.more['vocabulary'] = {'size': vocabulary.size, 'bytes': len(model),
                            'sha256': vocabulary.sha256, 'trained_on': dict(used)}
  job.more['held_out'] = measure(vocabulary, held_out)
  job.finish()


def row_hash(texts: list[str]) -> int:
  """Another number than that of its lines, so that being held out says nothing of being used."""
  return hashes.hash64('\x1f'.join(['row', *texts]))


def _reason(error: RuntimeError) -> str:
  """sentencepiece's message without the place in its source. Its numbers are without sentinels."""
  return str(error).rpartition('] ')[2].strip() or str(error)
