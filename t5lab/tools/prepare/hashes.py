"""Texts as 64-bit numbers, and a table of very many of them in little memory.

Of n different texts, two share a number with probability n**2 / 2**65: 3 % at a thousand million.
"""
from collections.abc import Sequence
import hashlib
import re
import unicodedata

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)     # odd, so that no bit of a word's number is lost
_WORD = re.compile(r'\w+')


def words(text: str) -> list[str]:
  """Letters and digits in runs, compatibility forms and case folded: "It's 5 €" -> it, s, 5.

  For languages that put spaces between words: elsewhere a clause is one word.
  """
  return _WORD.findall(unicodedata.normalize('NFKC', text).casefold())


def hash64(text: str) -> int:
  return int.from_bytes(hashlib.blake2b(
      text.encode('utf-8', 'surrogatepass'), digest_size=8).digest(), 'little')


def hash_all(texts: Sequence[str]) -> np.ndarray:
  """uint64[n]"""
  return np.fromiter(map(hash64, texts), np.uint64, len(texts))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
  """uint64[len - n + 1]: a number for each run of n numbers, order included; none if it is shorter.

  The sum of h[i + k] * m**(n - k) modulo 2**64, for m an odd number.
  """
  count = max(0, len(hashes) - n + 1)
  out = np.zeros(count, np.uint64)
  for k in range(n if count else 0):
    out = (out + hashes[k:k + count]) * _MULTIPLIER
  return out


class Table:
  """From uint64 keys to uint32 values, several to a key; only grows.

  12 bytes an entry in two sorted arrays, twice that for a moment while new ones are merged into
  them, and some 4 more for the new ones, which wait in a dict of up to 1/64 of the entries.
  """

  def __init__(self, fresh: int = 2**14):
    self._keys = np.zeros(0, np.uint64)
    self._values = np.zeros(0, np.uint32)
    self._fresh, self._waiting, self._least = {}, 0, fresh

  def __len__(self) -> int:
    return len(self._keys) + self._waiting

  def contains(self, keys: np.ndarray) -> np.ndarray:
    """bool[n]"""
    if not len(self._keys):
      found = np.zeros(len(keys), bool)
    else:
      at = np.searchsorted(self._keys, keys)
      found = self._keys[np.minimum(at, len(self._keys) - 1)] == keys
    if self._fresh:
      found |= np.fromiter((key in self._fresh for key in keys.tolist()), bool, len(keys))
    return found

  def values(self, keys: np.ndarray) -> np.ndarray:
    """uint32[m]: the values of any of the keys, each once, in order."""
    first = np.searchsorted(self._keys, keys, 'left')
    after = np.searchsorted(self._keys, keys, 'right')
    parts = [self._values[a:b] for a, b in zip(first, after) if b > a]
    parts += [np.array(self._fresh[key], np.uint32) for key in keys.tolist() if key in self._fresh]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint32)

  def add(self, keys: np.ndarray, value: int = 0) -> None:
    """Each of the keys gets the value as well."""
    for key in keys.tolist():
      self._fresh.setdefault(key, []).append(value)
    self._waiting += len(keys)
    if self._waiting > max(self._least, len(self._keys) // 64):
      self.settle()

  def settle(self) -> None:
    """Merges what is new into the sorted arrays: the least memory, the fastest look-up."""
    new = [(key, value) for key, values in self._fresh.items() for value in values]
    keys = np.array([key for key, _ in new], np.uint64)
    values = np.array([value for _, value in new], np.uint32)
    self._fresh, self._waiting = {}, 0
    order = np.argsort(keys, kind='stable')
    keys, values = keys[order], values[order]
    at = np.searchsorted(self._keys, keys, 'right')
    self._keys = np.insert(self._keys, at, keys)
    self._values = np.insert(self._values, at, values)
