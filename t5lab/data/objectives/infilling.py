"""Fill in the middle: a text's middle moves to its end, so that a left-to-right model sees what
comes before and after the text that it writes. In numpy. [Bavarian et al. 2022, 3]
"""
import numpy as np

from t5lab.data.objectives import spans
from t5lab.errors import UsageError


def fim(tokens, rng, *, prefix: int, suffix: int, middle: int, eos: int,
        rate: float = 0.5) -> spans.Features:
  """int[T] -> int32 {'targets'}, ending in EOS; reordered with probability `rate`.

  The text is cut at two uniform points of [0, T]. Half of the reordered texts have either order:
    PSM    prefix-id, before, suffix-id, after, middle-id, between, EOS
    SPM    prefix-id, suffix-id, after, middle-id, before, between, EOS   (the paper's variant 2)
  A text that contains one of the three ids is never reordered: it could not be restored.
  """
  tokens, end = np.asarray(tokens, np.int32), [eos]
  if rng.random() >= rate or np.isin(tokens, (prefix, suffix, middle)).any():
    return {'targets': np.append(tokens, np.int32(eos))}
  first, last = np.sort(rng.integers(0, len(tokens) + 1, 2))
  before, between, after = np.split(tokens, [first, last])
  if rng.random() < 0.5:
    pieces = [prefix], before, [suffix], after, [middle], between, end
  else:
    pieces = [prefix], [suffix], after, [middle], before, between, end
  return {'targets': np.concatenate(pieces).astype(np.int32)}


def fim_sizes(length: int) -> dict[str, int]:
  """Upper bound, EOS and the three ids included."""
  return {'targets': length + 4}


def fim_segment(task: str, lengths) -> int:
  targets = spans.feature_length(task, lengths, 'targets')
  if targets < 5:
    raise UsageError(f'task {task!r} cannot reorder text in {targets} targets: the minimum is 5')
  return targets - 4
