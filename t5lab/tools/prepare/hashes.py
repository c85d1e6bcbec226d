"""64-bit hashes of texts, and a compact table for very many of them.

Two of n different texts share a hash with probability n**2 / 2**65: 3 % at a billion texts.
"""
from collections.abc import Sequence
import hashlib
import re
import unicodedata

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)     # odd, so that no bit of a word's hash is lost
_WORD = re.compile(r'\w+')


def words(text: str) -> list[str]:
  """Splits a text into runs of letters and digits, normalized and case folded.

  Example: "It's 5 €" -> it, s, 5. In a language without spaces, a clause counts as one word.
  """
  return _WORD.findall(unicodedata.normalize('NFKC', text).casefold())


def hash64(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(
      text.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'little')


def hash_all(texts: Sequence[str]) -> np.ndarray:
  """Returns uint64[n]."""
  return np.fromiter(map(hash64, texts), np.uint64, len(texts))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
  """Returns uint64[max(0, len - n + 1)]: an order-dependent hash of each run of n hashes.

  It is the sum of h[i + k] * m**(n - k) modulo 2**64, with an odd number m.
  """
  count = max(0, len(hashes) - n + 1)
  out = np.zeros(count, np.uint64)
  for k in range(n if count else 0):
    out = (out + hashes[k:k + count]) * _MULTIPLIER
  return out


class Table:
  """A multimap from uint64 keys to uint32 values that only grows.

  Memory: 12 bytes per entry in two sorted arrays, twice that while new entries are merged, and
  about 4 more for the new entries, which wait in a dict of up to 1/64 of the entries.
  """

  def __init__(self, min_waiting: int = 2**14):
    self._keys = np.zeros(0, np.uint64)
    self._values = np.zeros(0, np.uint32)
    self._new, self._waiting, self._min_waiting = {}, 0, min_waiting

  def __len__(self) -> int:
    return len(self._keys) + self._waiting

  def contains(self, keys: np.ndarray) -> np.ndarray:
    """Returns bool[n]."""
    if len(self._keys):
      at = np.searchsorted(self._keys, keys)
      present = self._keys[np.minimum(at, len(self._keys) - 1)] == keys
    else:
      present = np.zeros(len(keys), bool)
    if self._new:
      present |= np.fromiter((key in self._new for key in keys.tolist()), bool, len(keys))
    return present

  def values(self, keys: np.ndarray) -> np.ndarray:
    """Returns uint32[m]: the values of all the keys, sorted and unique."""
    first = np.searchsorted(self._keys, keys, 'left')
    end = np.searchsorted(self._keys, keys, 'right')
    values = [self._values[a:b] for a, b in zip(first, end) if b > a]
    values += [np.array(self._new[key], np.uint32) for key in keys.tolist() if key in self._new]
    return np.unique(np.concatenate(values)) if values else np.zeros(0, np.uint32)

  def add(self, keys: np.ndarray, value: int = 0) -> None:
    """Adds the value to each of the keys."""
    for key in keys.tolist():
      self._new.setdefault(key, []).append(value)
    self._waiting += len(keys)
    if self._waiting > max(self._min_waiting, len(self._keys) // 64):
      self.settle()

  def settle(self) -> None:
    """Merges new entries into the sorted arrays: the least memory and the fastest look-up."""
    entries = [(key, value) for key, values in self._new.items() for value in values]
    keys = np.array([key for key, _ in entries], np.uint64)
    values = np.array([value for _, value in entries], np.uint32)
    self._new, self._waiting = {}, 0
    order = np.argsort(keys, kind='stable')
    keys, values = keys[order], values[order]
    at = np.searchsorted(self._keys, keys, 'right')
    self._keys = np.insert(self._keys, at, keys)
    self._values = np.insert(self._values, at, values)
