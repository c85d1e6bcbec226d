"""Rows that are there already, exactly or nearly. The first stays. [Lee et al. 2022]

Exact: the same text but for case, spaces and compatibility forms. Near: Jaccard similarity of the
sets of 5-word shingles of at least 0.8, estimated by 128 MinHash values [Broder 1997] of the
datasketch library, for pairs that have a band of them in common.

One pass, each row against the rows that stay: one that goes is near to one that stays, and no two
that stay were found near. Lee et al. join chains of near rows into clusters and keep one of each;
here what is near to none that stays, stays. A cluster is a row that stays and those near to it.

Memory: some 850 bytes a row that stays (512 of MinHash values, 16 for each of 18 bands, 16 of the
exact text, 12 of its place), 1100 at times; without the near ones 30, 45 at times. And 4 MB.
"""
import array
import hashlib
import heapq
import unicodedata

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import Job

NUM_PERM = 128
SHINGLE = 5
THRESHOLD = 0.8
RECALL = 0.95                  # of the bands, for a pair that is just as similar as the threshold
LARGEST = 20                   # clusters in the report
_BLOCK = 256


def exact_key(texts: list[str]) -> int:
  """Of texts that are the same but for case, runs of spaces and compatibility forms."""
  plain = (' '.join(unicodedata.normalize('NFKC', text).casefold().split()) for text in texts)
  return hashes.hash64('\x1f'.join(plain))


def shingles(texts: list[str]) -> np.ndarray:
  """uint64[n] of every five words in a row; of all the words of a shorter text."""
  out = []
  for text in texts:
    found = hashes.words(text)
    out.append(hashes.ngrams(hashes.hash_all(found), min(SHINGLE, max(1, len(found)))))
  return np.unique(np.concatenate(out))


def bands(threshold: float) -> tuple[int, int]:
  """(bands, MinHash values in each): the longest that still find a pair of that similarity.

  A pair of similarity s shares one with probability 1 - (1 - s**values)**bands, wanted to be at
  least 0.95 at the threshold. Example: 0.8 -> (18, 7), 0.5 -> (42, 3).
  """
  for values in range(NUM_PERM, 0, -1):
    count = NUM_PERM // values
    if 1 - (1 - threshold**values)**count >= RECALL:
      return count, values
  raise UsageError(f'--threshold {threshold}: {NUM_PERM} MinHash values find no pairs so unlike; '
                   'the least is 0.03')


class Near:
  """MinHash values of the rows that stay, by number, and the ones near to another row."""

  def __init__(self, threshold: float = THRESHOLD):
    try:
      from datasketch import MinHash  # here, as it loads scipy
    except ImportError as e:
      raise UsageError('near rows need datasketch: pip install datasketch, or use --exact') from e
    self._threshold, (self._bands, self._width) = threshold, bands(threshold)
    self._empty = MinHash(NUM_PERM, hashfunc=int)     # shingles are hashed already
    self._table, self._blocks, self._count = hashes.Table(), [], 0

  def signature(self, texts: list[str]) -> np.ndarray | None:
    """uint32[128], or None of texts without a word."""
    found = shingles(texts)
    if not len(found):
      return None
    minhash = self._empty.copy()
    for i in range(0, len(found), _BLOCK):      # 128 numbers for each, for a moment
      minhash.update_batch((found[i:i + _BLOCK] >> np.uint64(32)).astype(np.uint32))
    return minhash.hashvalues

  def _keys(self, signature):
    used = signature[:self._bands * self._width].reshape(self._bands, self._width)
    return np.array([int.from_bytes(hashlib.blake2b(
        bytes([i]) + band.tobytes(), digest_size=8).digest(), 'little')
        for i, band in enumerate(used)], np.uint64)

  def find(self, signature: np.ndarray) -> tuple[int, float] | None:
    """(number, estimated similarity) of the nearest row at or over the threshold, the first of
    equals."""
    numbers = self._table.values(self._keys(signature))
    if not len(numbers):
      return None
    there = np.stack([self._blocks[i // _BLOCK][i % _BLOCK] for i in numbers.tolist()])
    similar = (there == signature).mean(axis=1)
    best = int(similar.argmax())
    return (int(numbers[best]), float(similar[best])) if similar[best] >= self._threshold else None

  def add(self, signature: np.ndarray | None) -> int:
    """Takes the next number for it; None takes a number and is near to nothing."""
    number = self._count
    if number % _BLOCK == 0:
      self._blocks.append(np.zeros((_BLOCK, NUM_PERM), np.uint32))
    if signature is not None:
      self._blocks[-1][number % _BLOCK] = signature
      self._table.add(self._keys(signature), number)
    self._count += 1
    return number


def run(job: Job, *, near: bool = True, threshold: float = THRESHOLD) -> None:
  """Writes the first of each cluster. A row's fields are compared together."""
  if not 0 < threshold <= 1:
    raise UsageError(f'--threshold {threshold}: a similarity over 0, up to 1')
  exact, index = hashes.Table(), Near(threshold) if near else None
  files, places = {}, (array.array('I'), array.array('Q'))      # of the rows that stay
  sizes = {}
  job.counts['dropped'] = 0
  for rule in ('exact', 'near')[:1 + near]:
    job.count(rule, by=0)
  place = lambda i: f'{list(files)[places[0][i]]}:{places[1][i]}'
  with job.write() as write:
    for row in job.read():
      texts = job.texts(row)
      key = np.array([exact_key(texts)], np.uint64)
      signature = None
      if exact.contains(key)[0]:
        rule, of, how = 'exact', int(exact.values(key)[0]), '='
      else:
        signature = index.signature(texts) if near else None
        found = index.find(signature) if signature is not None else None
        rule, of, how = ('near', found[0], f'{found[1]:.2f}') if found else (None, None, None)
      if rule:
        sizes[of] = sizes.get(of, 1) + 1
        job.counts['dropped'] += 1
        job.count(rule, row, f'{how} {place(of)}: {" | ".join(texts)}')
        continue
      number = index.add(signature) if near else len(places[0])
      exact.add(key, number)
      places[0].append(files.setdefault(row.file, len(files)))
      places[1].append(row.line)
      write(row.fields)
    largest = heapq.nlargest(LARGEST, sizes.items(), key=lambda item: (item[1], -item[0]))
    job.more['clusters'] = {
        'count': len(sizes), 'rows': sum(sizes.values()),
        'largest': [{'first': place(i), 'rows': n} for i, n in largest]}
