"""Trees by path."""

import flax
import jax.numpy as jnp
import optax
import pytest

from t5lab import trees
from t5lab.errors import UsageError


@flax.struct.dataclass
class State:
  step: int
  params: dict


PARAMS = {'enc': {'w': 1, 'scale': 2}, 'b': [3, 4]}


def test_flatten_dicts_lists_dataclasses_and_optax_state():
  assert trees.flatten(PARAMS) == {'b/0': 3, 'b/1': 4, 'enc/scale': 2, 'enc/w': 1}
  assert trees.flatten(State(7, {'a': 1})) == {'step': 7, 'params/a': 1}
  state = optax.adamw(1.).init({'a': {'w': jnp.ones(2)}})
  assert list(trees.flatten(state)) == ['0/count', '0/mu/a/w', '0/nu/a/w']
  assert trees.flatten({'a': None, 'b': {}, 'c': 1}) == {'c': 1}


def test_unflatten_inverts_flatten():
  nested = {'enc': {'w': 1, 'scale': 2}, 'b': 3}
  assert trees.unflatten(trees.flatten(nested)) == nested
  for tree in (PARAMS, State(7, {'a': 1}), optax.EmptyState(), {'a': None}):
    assert trees.unflatten(trees.flatten(tree), like=tree) == tree


def test_unflatten_follows_names_not_order():
  assert trees.unflatten({'b': 1, 'a': 2}, like={'a': 0, 'b': 0}) == {'a': 2, 'b': 1}


def test_ambiguous_path_is_refused():
  with pytest.raises(ValueError, match="'a/b'"):
    trees.flatten({'a/b': 1, 'a': {'b': 2}})


def test_match_first_row_wins_on_the_whole_path():
  rows = [('scale', 'never'), ('.*/scale', 'norm'), ('enc/.*', 'enc'), ('.*', 'rest')]
  assert trees.match(PARAMS, rows) == {'enc': {'w': 'enc', 'scale': 'norm'}, 'b': ['rest', 'rest']}


def test_match_keeps_tuple_and_none_values():
  assert trees.match({'a': 1, 'b': 2}, [('a', ('x', None)), ('b', None)]) == {
      'a': ('x', None), 'b': None}


def test_match_names_the_leaf_that_no_row_fits():
  with pytest.raises(UsageError, match=r"no row matches 'b/0'.*'enc/\.\*'"):
    trees.match(PARAMS, [('enc/.*', 1)])


def test_fits():
  assert trees.fits('a/scale', ['bias', '.*/scale'])
  assert not trees.fits('a/scale', ['scale', 'a'])


def test_map_paths():
  assert trees.map_paths(lambda path, x, y: f'{path}:{x}{y}', {'a': {'b': 1}}, {'a': {'b': 2}}) == {
      'a': {'b': 'a/b:12'}}
