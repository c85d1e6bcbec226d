"""Meshes, the rows that map logical axes to mesh axes, and the two ways to use them.

Parameters carry logical axis names from their definition; `shardings` turns those into
NamedShardings. Activations are pinned by `constrain`, which knows every name and raises on others:
flax's own constraint is silently ignored outside `jax.set_mesh`, and a mistyped name silently
means "replicated".
"""

import contextlib
import contextvars
import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5lab import trees
from t5lab.errors import UsageError, did_you_mean

# From the slowest network to the fastest: dcn_ axes join slices, neighbours on `model` talk most.
MESH_AXES = ('dcn_data', 'dcn_fsdp', 'data', 'fsdp', 'expert', 'sequence', 'model')
BATCH = MESH_AXES[:5]          # outside of the experts their devices share the batch

# Every logical axis name. Parameters: vocab, embed, heads (N * H joined), kv_heads (K * H), mlp,
# norm (scales and biases along D), layers, buckets, rel_heads, positions, expert.
# Activations: batch, length, act_embed, act_heads, act_kv_heads, act_mlp, act_vocab.
AXES = ('vocab', 'embed', 'heads', 'kv_heads', 'mlp', 'norm', 'layers', 'buckets', 'rel_heads',
        'positions', 'expert', 'batch', 'length', 'act_embed', 'act_heads', 'act_kv_heads',
        'act_mlp', 'act_vocab')

FSDP = ('dcn_fsdp', 'fsdp')
_DATA = {'batch': BATCH, 'expert': 'expert'}
_TENSOR = {'vocab': 'model', 'heads': 'model', 'kv_heads': 'model', 'mlp': 'model',
           'act_heads': 'model', 'act_kv_heads': 'model', 'act_mlp': 'model', 'act_vocab': 'model'}

# A name that a row leaves out is replicated.
RULES = {
    'dp': _DATA,
    'fsdp': {**_DATA, 'embed': FSDP},
    'tp': {**_DATA, **_TENSOR},
    'fsdp_tp': {**_DATA, **_TENSOR, 'embed': FSDP},
}

_rules = contextvars.ContextVar('rules', default=None)


def make_mesh(data: int = -1, model: int = 1, expert: int = 1, fsdp: int = 1, sequence: int = 1,
              dcn_data: int = 1, dcn_fsdp: int = 1, devices=None) -> Mesh:
  """A mesh of MESH_AXES over all devices (or these); one -1 takes what is left.

  Axes are Auto: the compiler propagates shardings from what we pin (jax.make_mesh's own default,
  Explicit, makes every operation state its sharding).
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  sizes = dict(dcn_data=dcn_data, dcn_fsdp=dcn_fsdp, data=data, fsdp=fsdp, expert=expert,
               sequence=sequence, model=model)
  asked = ', '.join(f'mesh.{axis}={size}' for axis, size in sizes.items() if size != 1) or 'mesh'
  if list(sizes.values()).count(-1) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
    raise UsageError(f'{asked}: sizes are 1 or more, or one -1 for what is left')
  known = math.prod(s for s in sizes.values() if s != -1)
  left = -1 in sizes.values()
  if n % known or (not left and known != n):
    raise UsageError(f'{asked} asks for {"a multiple of " * left}{known} devices, this '
                     f'machine has {n}; sizes that fit multiply to {n}, or use one -1')
  shape = [n // known if s == -1 else s for s in sizes.values()]
  return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape),
                       devices=devices)


def batch_devices(mesh: Mesh) -> int:
  """Over how many devices the rows of a batch are spread."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def check_heads(mesh: Mesh, rules: str, n_heads: int, kv_heads: int) -> None:
  """UsageError unless the heads can be spread as the rules say."""
  for name, heads in (('n_heads', n_heads), ('n_kv_heads', kv_heads)):
    axis = rules_row(rules).get('act_heads')
    if axis and heads % mesh.shape[axis]:
      raise UsageError(f'model.{name}: {heads} heads do not divide over mesh.{axis}='
                       f'{mesh.shape[axis]}; choose a mesh.{axis} that divides them, or other '
                       f'rules than {rules!r}')


def rules_row(name: str) -> dict:
  if name not in RULES:
    raise UsageError(f'rules={name!r} is unknown.{did_you_mean(name, RULES)}')
  return RULES[name]


@contextlib.contextmanager
def use(mesh: Mesh, rules: str):
  """Inside, `constrain` pins activations by the row `rules` on `mesh`."""
  token = _rules.set(rules_row(rules))
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _rules.reset(token)


def spec(axes: tuple[str | None, ...], rules: dict) -> P:
  """Logical axes -> PartitionSpec. A mesh axis is used once: the first axis that asks has it."""
  taken, parts = set(), []
  for axis in axes:
    if axis is not None and axis not in AXES:
      raise UsageError(f'no logical axis {axis!r}.{did_you_mean(axis, AXES)}')
    target = rules.get(axis)
    free = tuple(t for t in (target if isinstance(target, tuple) else (target,))
                 if t is not None and t not in taken)
    taken.update(free)
    parts.append(free if len(free) > 1 else free[0] if free else None)
  return P(*parts)


def constrain(x, *axes: str | None):
  """Pins x to its logical axes under `use`; elsewhere only checks the names and the rank."""
  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axes {axes} for an array of shape {x.shape}')
  rules = _rules.get()
  s = spec(axes, rules or {})
  return x if rules is None else jax.lax.with_sharding_constraint(x, s)


def shardings(boxed, mesh: Mesh, rules: str):
  """Boxed abstract parameters (from eval_shape of init) -> NamedSharding for each leaf.

  An axis whose length the mesh axis does not divide is an error that names the parameter.
  """
  row = rules_row(rules)
  def one(path, box):
    s = spec(box.names, row)
    for size, name, axis in zip(box.value.shape, box.names, s):
      axes = axis if isinstance(axis, tuple) else (axis,) * (axis is not None)
      devices = math.prod(mesh.shape[a] for a in axes)
      if size % devices:
        raise UsageError(f"{path}: axis {name!r} has {size} rows, the mesh's {axis!r} axis has "
                         f'{devices} devices; one must divide the other, or choose '
                         f'other rules than {rules!r}')
    return NamedSharding(mesh, s)
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree_util.tree_map_with_path(
      lambda p, x: one(trees.path_name(p), x), boxed, is_leaf=is_box)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def like_params(tree, params, param_shardings, mesh: Mesh):
  """Shardings for a tree that mirrors parameters (optimizer state): a leaf whose path ends in a
  parameter's path and has its shape is sharded like it, any other is replicated."""
  by_path = {path: (leaf.shape, sharding) for (path, leaf), sharding in zip(
      trees.flatten(params).items(), jax.tree.leaves(param_shardings))}
  elsewhere = replicated(mesh)
  def one(path, leaf):
    parts = trees.path_name(path).split('/')
    for i in range(len(parts)):
      found = by_path.get('/'.join(parts[i:]))
      if found and found[0] == leaf.shape:
        return found[1]
    return elsewhere
  return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Of a batch's array [B, …]: rows over the batch's axes."""
  return NamedSharding(mesh, P(BATCH, *(None,) * (ndim - 1)))


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a numpy batch -> global arrays, sharded over the data axis."""
  return {k: jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim), x)
          for k, x in batch.items()}
