"""The examples of one task, as the pipeline reads them: in memory here, on disk in cache.py."""
from collections.abc import Callable, Iterable, Sequence
import functools

import numpy as np

Example = dict[str, np.ndarray]   # int32[any length] by feature


class Examples(Sequence):
  """Examples by number, all with the features of the first, and their lengths without reading them.

  fingerprint: of the contents of examples that are stored on disk; None for examples in memory.
  """
  fingerprint: str | None = None

  def __init__(self, examples: Iterable[Example]):
    self._examples = list(examples)

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, i):
    return self._examples[i]

  @functools.cached_property
  def lengths(self) -> dict[str, np.ndarray]:
    """{feature: int[n]}."""
    names = self._examples[0] if self._examples else ()
    return {name: np.array([len(example[name]) for example in self._examples]) for name in names}

  def many(self, ids: Iterable[int]) -> list[Example]:
    """The examples of these numbers, in order; from disk much faster than one by one."""
    return [self[i] for i in ids]

  def remember(self, name: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns make(), which may be stored with the examples: it depends on them and `key` alone."""
    del name, key
    return make()
