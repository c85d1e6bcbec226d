"""Fill in the middle: the text's middle moves to its end, so that a left-to-right model sees both
sides of what it writes. In numpy. [Bavarian et al. 2022, 3]
"""
import numpy as np

from t5lab.data.objectives import spans as objectives
from t5lab.errors import UsageError


def fim(tokens, rng, *, prefix: int, suffix: int, middle: int, eos: int,
        rate: float = 0.5) -> dict[str, np.ndarray]:
  """int[T] -> int32 {'targets'}, ending in EOS; with probability `rate` its parts are moved.

  Half of those in either order of the paper, cut at two uniform points of [0, T] between tokens:
    PSM    prefix-id, before, suffix-id, after, middle-id, between, EOS
    SPM    prefix-id, suffix-id, after, middle-id, before, between, EOS   (its variant 2)
  A text that itself contains one of the three ids stays as it is: it could not be read back.
  """
  tokens, end = np.asarray(tokens, np.int32), [eos]
  if rng.random() >= rate or np.isin(tokens, (prefix, suffix, middle)).any():
    return {'targets': np.append(tokens, np.int32(eos))}
  first, last = np.sort(rng.integers(0, len(tokens) + 1, 2))
  before, between, after = np.split(tokens, [first, last])
  if rng.random() < 0.5:
    parts = [prefix], before, [suffix], after, [middle], between, end
  else:
    parts = [prefix], [suffix], after, [middle], before, between, end
  return {'targets': np.concatenate(parts).astype(np.int32)}


def unfim(targets, *, prefix: int, suffix: int, middle: int) -> np.ndarray:
  """What fim made, of either order -> the text int32[T] without its EOS.

  Example (prefix 90, suffix 91, middle 92): 90 5 91 8 9 92 6 7 1 -> 5 6 7 8 9
  """
  text = np.asarray(targets, np.int32)[:-1]
  at = [np.flatnonzero(text == special) for special in (prefix, suffix, middle)]
  if [len(found) for found in at] != [1, 1, 1] or not 0 == at[0][0] < at[1][0] < at[2][0]:
    return text
  s, m = at[1][0], at[2][0]
  return np.concatenate([text[1:s], text[m + 1:], text[s + 1:m]])   # in SPM, text[1:s] is empty


def fim_sizes(length: int) -> dict[str, int]:
  """Upper bound, EOS and the three ids included."""
  return {'targets': length + 4}


def fim_segment(task: str, lengths) -> int:
  targets = objectives.length_of(task, lengths, 'targets')
  if targets < 5:
    raise UsageError(f'task {task!r} cannot move text in {targets} targets: the least are 5')
  return targets - 4
