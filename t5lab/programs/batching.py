"""Runs a function over rows of any length in few batch shapes, to compile few programs."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from t5lab.decoding.engine import SHORTEST, buckets
from t5lab.errors import DataError

Row = dict[str, np.ndarray]


def map_rows(rows: Sequence[Row], f: Callable, *, build: Callable[[Row, dict], Row],
             batch_size: int):
  """f(model features of a batch) of one row or more of any length, in order.

  build(row, widths): the model features of a row, padded to these widths. As in the engine, rows
  are sorted by length and padded to a few shapes. Outputs of different lengths are padded with 0.
  """
  order = sorted(range(len(rows)), key=lambda i: max(map(len, rows[i].values())))
  results = [None] * len(rows)
  for first in range(0, len(order), batch_size):
    chosen = order[first:first + batch_size]
    widths = {name: buckets(max(len(rows[i][name]) for i in chosen), SHORTEST)
              for name in rows[chosen[0]]}

    # Fill the batch up with copies of its first row.
    built = [build(rows[i], widths) for i in chosen]
    size = min(buckets(len(built), 1, 4), batch_size)
    built += built[:1] * (size - len(built))
    batch = {name: np.stack([row[name] for row in built]) for name in built[0]}
    outputs = jax.tree.map(np.asarray, f(batch))
    for j, i in enumerate(chosen):
      results[i] = jax.tree.map(lambda x, j=j: x[j], outputs)
  return jax.tree.map(_stack_padded, *results)


def _stack_padded(*xs: np.ndarray) -> np.ndarray:
  """Stacks arrays whose first axes differ, padded with zeros to the longest."""
  if not xs[0].ndim:
    return np.stack(xs)
  stacked = np.zeros((len(xs), max(map(len, xs)), *xs[0].shape[1:]), xs[0].dtype)
  for row, x in zip(stacked, xs):
    row[:len(x)] = x
  return stacked


def check_ids(ids, size: int, name: str) -> None:
  """DataError for an invalid token id, which a gather in JAX would silently clamp or fill."""
  ids = np.asarray(ids)
  if len(invalid := ids[(ids < 0) | (ids >= size)]):
    raise DataError(f'{name} holds the token id {invalid[0]}; the ids of this model are 0 to '
                    f'{size - 1:,}')
