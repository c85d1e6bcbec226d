"""Pytrees by path: 'decoder/layers/attn/q/kernel' -> leaf, rows of (regex, value), merging by name.

One path spelling for parameters, optimizer state, sharding rules, checkpoints and name maps.
"""

from collections.abc import Callable, Iterable
import re
from typing import Any

import jax
import numpy as np

from t5lab.errors import CheckpointError, UsageError

PyTree = Any
Rows = Iterable[tuple[str, Any]]


def path_name(keys) -> str:
  """A jax key path as 'a/b/c': dict keys, field names (NamedTuple, dataclass), tuple indices."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def flatten(tree: PyTree) -> dict[str, Any]:
  """{path: leaf}, in jax's leaf order. None and empty nodes have no leaves, so no path."""
  flat = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(keys)
    if name in flat:
      raise ValueError(f"two leaves share the path '{name}': a key must not contain '/'")
    flat[name] = leaf
  return flat


def unflatten(flat: dict[str, Any], like: PyTree | None = None) -> PyTree:
  """The tree of {path: leaf}: nested dicts, or the structure of `like`, whose paths flat must have.

  Without `like`, tuples and dataclasses come back as dicts of their field names and indices.
  """
  if like is not None:
    return map_paths(lambda path, _: flat[path], like)
  tree = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def map_paths(f: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
  """jax.tree.map of f(path, leaf, *leaves of rest)."""
  return jax.tree_util.tree_map_with_path(lambda keys, *x: f(path_name(keys), *x), tree, *rest)


def fits(path: str, patterns: Iterable[str]) -> bool:
  """Whether any regex matches the whole path."""
  return any(re.fullmatch(p, path) for p in patterns)


def match(tree: PyTree, rows: Rows) -> PyTree:
  """A tree like `tree` with, at each leaf, the value of the first row whose regex fits its path.

  A regex must match the whole path (re.fullmatch, as in big_vision), so 'scale' is not 'scale_b'.
  A leaf that no row fits is an error; a row that fits no leaf is not, since rows serve many models.
  Example: match(params, [('.*/bias', 0.), ('.*', 0.01)]).
  """
  rows = [(re.compile(pattern), value) for pattern, value in rows]

  def first(path, _):
    for pattern, value in rows:
      if pattern.fullmatch(path):
        return value
    shown = ', '.join(repr(pattern.pattern) for pattern, _ in rows) or 'there are none'
    raise UsageError(f"no row fits '{path}'. Rows (whole path, first wins): {shown}.")

  return map_paths(first, tree)


def merge(ours: PyTree, theirs: PyTree, what: str = 'the saved tree') -> PyTree:
  """Our structure with their leaves. Paths and shapes must agree.

  CheckpointError: one line with each path that they lack (-), have beside ours (+), or have in
  another shape (~), 20 at most.
  """
  a, b = flatten(ours), flatten(theirs)
  report = [f'- {path}' for path in a if path not in b]
  report += [f'+ {path}' for path in b if path not in a]
  report += [f'~ {path} {np.shape(b[path])} for {np.shape(a[path])}'
             for path in a if path in b and np.shape(a[path]) != np.shape(b[path])]
  if report:
    more = f', … ({len(report)} in all)' if len(report) > 20 else ''
    raise CheckpointError(f'{what} does not fit (- missing, + extra, ~ other shape): '
                          + ', '.join(report[:20]) + more)
  return unflatten(b, like=ours)
