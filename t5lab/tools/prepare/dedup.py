"""Drops exact and near duplicates; the first of each is kept. [Lee et al. 2022]

Exact duplicates have the same text up to case, spaces and Unicode compatibility forms. For near
duplicates the sets of 5-word shingles have a Jaccard similarity of at least 0.8. It is estimated
from 128 MinHash values [Broder 1997] (datasketch library), for pairs that share a band of them.

A single pass compares each record with the records kept so far: every dropped record is near to a
kept one, and no two kept records were found to be near. Lee et al. instead join chains of near
records into clusters and keep one record per cluster. Here a cluster is a kept record and the
dropped ones near to it.

Memory: about 850 bytes per kept record (512 for MinHash values, 16 for each of 18 bands, 16 for the
exact text, 12 for its location), 1100 at peaks; with --exact 30, 45 at peaks. Plus 4 MB.
"""
import array
import hashlib
import heapq
import unicodedata

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import PrepareJob

NUM_PERM = 128
SHINGLE = 5
THRESHOLD = 0.8
RECALL = 0.95                  # of the bands, for a pair exactly as similar as the threshold
LARGEST = 20                   # clusters in the report
_BLOCK = 256


def exact_key(texts: list[str]) -> int:
  """Returns a hash that ignores case, runs of spaces and Unicode compatibility forms."""
  plain = (' '.join(unicodedata.normalize('NFKC', text).casefold().split()) for text in texts)
  return hashes.hash64('\x1f'.join(plain))


def shingles(texts: list[str]) -> np.ndarray:
  """Returns uint64[n]: hashes of every five consecutive words; of all words of a shorter text."""
  shingles_by_text = []
  for text in texts:
    words = hashes.words(text)
    n = min(SHINGLE, max(1, len(words)))
    shingles_by_text.append(hashes.ngrams(hashes.hash_all(words), n))
  return np.unique(np.concatenate(shingles_by_text))


def bands(threshold: float) -> tuple[int, int]:
  """Returns (number of bands, MinHash values per band): the longest bands with enough recall.

  A pair of similarity s shares a band with probability 1 - (1 - s**values)**bands, which must be at
  least 0.95 at the threshold. Example: 0.8 -> (18, 7), 0.5 -> (42, 3).
  """
  for values in range(NUM_PERM, 0, -1):
    count = NUM_PERM // values
    if 1 - (1 - threshold**values)**count >= RECALL:
      return count, values
  raise UsageError(f'--threshold must be at least 0.03 for {NUM_PERM} MinHash values, '
                   f'got {threshold}')


class NearIndex:
  """MinHash values of the kept records, by number, and a search for the nearest one."""

  def __init__(self, threshold: float = THRESHOLD):
    try:
      from datasketch import MinHash  # not at the top: it loads scipy
    except ImportError as e:
      raise UsageError('near duplicates need datasketch: pip install datasketch, or use --exact'
                       ) from e
    self._threshold = threshold
    self._bands, self._width = bands(threshold)
    self._empty = MinHash(NUM_PERM, hashfunc=int)     # shingles are hashed already
    self._table, self._blocks, self._count = hashes.Table(), [], 0

  def signature(self, texts: list[str]) -> np.ndarray | None:
    """Returns uint32[128], or None if the texts have no words."""
    hashed = shingles(texts)
    if not len(hashed):
      return None
    minhash = self._empty.copy()
    for i in range(0, len(hashed), _BLOCK):      # datasketch expands each shingle to 128 numbers
      minhash.update_batch((hashed[i:i + _BLOCK] >> np.uint64(32)).astype(np.uint32))
    return minhash.hashvalues

  def _keys(self, signature):
    """Returns uint64[bands]: a hash of each band and its number."""
    used = signature[:self._bands * self._width].reshape(self._bands, self._width)
    digests = [hashlib.blake2b(bytes([i]) + band.tobytes(), digest_size=8).digest()
               for i, band in enumerate(used)]
    return np.frombuffer(b''.join(digests), '<u8')

  def find(self, signature: np.ndarray) -> tuple[int, float] | None:
    """Returns (number, estimated similarity) of the nearest record, None if below the threshold.

    Ties go to the first.
    """
    candidates = self._table.values(self._keys(signature))
    if not len(candidates):
      return None
    stored = np.stack([self._blocks[i // _BLOCK][i % _BLOCK] for i in candidates.tolist()])
    similarity = (stored == signature).mean(axis=1)
    best = int(similarity.argmax())
    if similarity[best] < self._threshold:
      return None
    return int(candidates[best]), float(similarity[best])

  def add(self, signature: np.ndarray | None) -> int:
    """Stores a signature under the next number. None takes a number and is near to nothing."""
    number = self._count
    if number % _BLOCK == 0:
      self._blocks.append(np.zeros((_BLOCK, NUM_PERM), np.uint32))
    if signature is not None:
      self._blocks[-1][number % _BLOCK] = signature
      self._table.add(self._keys(signature), number)
    self._count += 1
    return number


def run(job: PrepareJob, *, near: bool = True, threshold: float = THRESHOLD) -> None:
  """Writes the first record of each cluster. The fields of a record are compared together."""
  if not 0 < threshold <= 1:
    raise UsageError(f'--threshold must be a similarity above 0 and up to 1, got {threshold}')
  exact, index = hashes.Table(), NearIndex(threshold) if near else None
  # Locations of the kept records, as numbers to save memory.
  files, kept_files, kept_lines = {}, array.array('I'), array.array('Q')
  cluster_sizes = {}

  def location(number):
    return f'{list(files)[kept_files[number]]}:{kept_lines[number]}'

  job.counts['dropped'] = 0
  job.declare('exact', *(['near'] if near else []))
  with job.write() as write:
    for record in job.read():
      texts = job.texts(record)
      key = np.array([exact_key(texts)], np.uint64)

      # Look for the kept record that this one duplicates.
      signature = match = None
      if exact.contains(key)[0]:
        rule, match, relation = 'exact', int(exact.values(key)[0]), '='
      elif near:
        signature = index.signature(texts)
        nearest = index.find(signature) if signature is not None else None
        if nearest:
          rule, match, relation = 'near', nearest[0], f'{nearest[1]:.2f}'
      if match is not None:
        cluster_sizes[match] = cluster_sizes.get(match, 1) + 1
        job.counts['dropped'] += 1
        job.count(rule, record, f'{relation} {location(match)}: {" | ".join(texts)}')
        continue

      # Keep it.
      number = index.add(signature) if near else len(kept_files)
      exact.add(key, number)
      kept_files.append(files.setdefault(record.file, len(files)))
      kept_lines.append(record.line)
      write(record.fields)
    largest = heapq.nlargest(LARGEST, cluster_sizes.items(), key=lambda item: (item[1], -item[0]))
    job.extra['clusters'] = {
        'count': len(cluster_sizes), 'rows': sum(cluster_sizes.values()),
        'largest': [{'first': location(i), 'rows': size} for i, size in largest]}
