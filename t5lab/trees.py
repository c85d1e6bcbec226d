"""Pytrees by path, for example 'decoder/layers/attn/q/kernel'.

Parameters, optimizer state, sharding rules, checkpoints and name maps all spell paths this way.
"""

from collections.abc import Callable, Iterable
import re
from typing import Any

import jax

from t5lab.errors import UsageError

PyTree = Any
Rows = Iterable[tuple[str, Any]]


def path_name(keys) -> str:
  """A jax key path as 'a/b/c': dict keys, field names (NamedTuple, dataclass), tuple indices."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def flatten(tree: PyTree) -> dict[str, Any]:
  """{path: leaf}, in JAX's order of leaves. None and empty nodes have no leaves and so no path."""
  flat = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(keys)
    if name in flat:
      raise ValueError(f"two leaves share the path '{name}': a key must not contain '/'")
    flat[name] = leaf
  return flat


def unflatten(flat: dict[str, Any], like: PyTree | None = None) -> PyTree:
  """The inverse of `flatten`.

  like: a tree with the structure of the result, all of whose paths `flat` must have. Without it,
  the result is nested dicts, also where tuples and dataclasses were flattened.
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
  """True if any regex matches the whole path."""
  return any(re.fullmatch(p, path) for p in patterns)


def match(tree: PyTree, rows: Rows) -> PyTree:
  """A tree like `tree` whose leaves are the values of the first row whose regex matches their path.

  A regex must match the whole path (re.fullmatch, as in big_vision), so 'scale' is not 'scale_b'.
  A leaf without a row is a UsageError. A row without a leaf is not, because rows serve many models.
  Example: match(params, [('.*/bias', 0.), ('.*', 0.01)]).
  """
  rows = [(re.compile(pattern), value) for pattern, value in rows]

  def first(path, _):
    for pattern, value in rows:
      if pattern.fullmatch(path):
        return value
    shown = ', '.join(repr(pattern.pattern) for pattern, _ in rows) or 'there are none'
    raise UsageError(f"no row matches '{path}'. Rows (whole path, first wins): {shown}.")

  return map_paths(first, tree)
