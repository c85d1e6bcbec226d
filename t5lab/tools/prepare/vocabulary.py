"""Trains a sentencepiece vocabulary on your own files and measures it on held-out records.

Settings and ids are those of the embedded vocabularies: pad 0, end of sequence 1, unknown 2, then
bytes and pieces, and 100 sentinels at the end. Text is not normalized, so decode(encode(text)) is
text.

Training uses lines of up to 1000 characters: all of them, or the --max-sentences with the smallest
hashes. One percent of the records, at most 1000 and chosen the same way, is held out. So neither
choice depends on the order of the records (the sums inside sentencepiece do, slightly).

Memory: 8 bytes per line used, 16 at peaks, the held-out records, and sentencepiece's own memory,
which holds at least all training lines.
"""
import collections
from collections.abc import Iterable
import io

import numpy as np
import sentencepiece

from t5lab.data import vocab
from t5lab.errors import DataError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import PrepareJob

MAX_SENTENCES = 1_000_000
HELD_OUT, MAX_HELD_OUT = 0.01, 1000
LINE = 1000     # characters; sentencepiece drops lines of more than max_sentence_length bytes


def split_lines(texts: Iterable[str]) -> list[str]:
  """Splits texts into lines of at most LINE characters."""
  return [text[i:i + LINE] for text in texts for i in range(0, len(text), LINE)]


def train(lines: Iterable[str], size: int) -> bytes:
  """Returns a model file of size - 100 pieces (the sentinels are not in the file)."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_writer=model, vocab_size=size - vocab.NUM_SENTINELS,
      model_type='unigram', pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=True,
      character_coverage=0.9999, split_digits=True, max_sentence_length=8 * LINE,
      shuffle_input_sentence=False, num_threads=4, minloglevel=2)
  return model.getvalue()


def measure(vocabulary: vocab.Vocab, texts: Iterable[str]) -> dict[str, float]:
  """Returns how well a vocabulary fits texts.

  The fractions of texts and of characters that decoding does not restore, the fraction of unknown
  ids, and tokens per word (between spaces) and per byte.
  """
  n = collections.Counter()
  for text in texts:
    ids = vocabulary.encode(text)
    restored = vocabulary.decode(ids)
    n['texts'] += 1
    n['lost'] += restored != text
    n['lost_characters'] += (collections.Counter(text) - collections.Counter(restored)).total()
    n['characters'] += len(text)
    n['unknown'] += ids.count(vocabulary.unk_id)
    n['tokens'] += len(ids)
    n['words'] += len(text.split())
    n['bytes'] += len(text.encode('utf-8'))
  per = lambda count, unit: n[count] / max(1, n[unit])
  return {'texts': n['texts'], 'texts_lost': per('lost', 'texts'),
          'characters_lost': per('lost_characters', 'characters'),
          'unknown_rate': per('unknown', 'tokens'), 'tokens_per_word': per('tokens', 'words'),
          'tokens_per_byte': per('tokens', 'bytes')}


class SmallestHashes:
  """Keeps the `count` smallest distinct 64-bit numbers of a stream."""

  def __init__(self, count: int):
    self._count, self._kept, self._new = count, np.zeros(0, np.uint64), []

  def add(self, number: int) -> None:
    if len(self._kept) < self._count or number < self._kept[-1]:
      self._new.append(number)
      if len(self._new) == 2**16:
        self._merge()

  def __len__(self) -> int:
    self._merge()
    return len(self._kept)

  def _merge(self):
    new = np.array(self._new, np.uint64)
    self._kept, self._new = np.unique(np.concatenate([self._kept, new]))[:self._count], []

  def limit(self, count: int | None = None) -> int:
    """Returns the largest number kept, or the count-th smallest; -1 if there is none."""
    self._merge()
    kept = self._kept[:count]
    return int(kept[-1]) if len(kept) else -1


def run(job: PrepareJob, size: int, max_sentences: int = MAX_SENTENCES) -> None:
  """Trains on the job's fields and writes the model file, which t5lab.data.vocab.load opens.

  size: number of ids, sentinels included. Raises DataError if the texts cannot fill it.
  """
  # First pass: find the hashes below which a line is used and a record is held out.
  line_hashes, record_hashes = SmallestHashes(max_sentences), SmallestHashes(MAX_HELD_OUT + 1)
  count = 0
  for record in job.read('sampling'):
    texts = job.texts(record)
    record_hashes.add(record_hash(texts))
    count += 1
    for line in split_lines(texts):
      line_hashes.add(hashes.hash64(line))
  # At least one record, but never all: records with the same text are held out together.
  held_out_count = min(MAX_HELD_OUT, int(count * HELD_OUT) or 1, len(record_hashes) - 1)
  last_record = record_hashes.limit(held_out_count)
  last_line = line_hashes.limit()
  del line_hashes, record_hashes

  # Second pass: train.
  held_out, used = [], collections.Counter()

  def training_lines():
    for record in job.read('training', again=True):
      texts = job.texts(record)
      if record_hash(texts) <= last_record:
        if len(held_out) < MAX_HELD_OUT:
          held_out.extend(texts)
        continue
      for line in split_lines(texts):
        if hashes.hash64(line) <= last_line:
          used.update(lines=1, characters=len(line))
          yield line

  try:
    model = train(training_lines(), size)
  except RuntimeError as e:
    # Without the position in sentencepiece's source. Its numbers do not count the sentinels.
    reason = str(e).rpartition('] ')[2].strip() or str(e)
    raise DataError(f'--size {size}, less {vocab.NUM_SENTINELS} sentinels, is not a size that '
                    f'sentencepiece can make of these texts: {reason}') from e
  vocabulary = vocab.sentencepiece_model(job.output, model)
  job.write_bytes(model)
  job.extra['vocabulary'] = {'size': vocabulary.size, 'bytes': len(model),
                             'sha256': vocabulary.sha256, 'trained_on': dict(used)}
  job.extra['held_out'] = measure(vocabulary, held_out)
  job.finish()


def record_hash(texts: list[str]) -> int:
  """Differs from the hash of its line, so that being held out and being used are independent."""
  return hashes.hash64('\x1f'.join(['row', *texts]))
