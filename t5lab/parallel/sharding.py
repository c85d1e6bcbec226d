"""Meshes, the rules that map logical axes to mesh axes, and how model and step apply them.

Parameters carry logical axis names from their definition. `shardings` turns the names into
NamedShardings; `like_params` does so for optimizer state and the average. Activations are pinned by
`constrain`, which raises on an unknown name: flax's own constraint is silently ignored outside
`jax.set_mesh`, and a mistyped name silently means "replicate". Weights meet activations in
`product`, which pins where a weight is gathered and where its gradient is scattered.
"""

from collections.abc import Callable, Mapping
import contextlib
import contextvars
import functools
import math

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5lab import trees
from t5lab.errors import UsageError, did_you_mean

# From the slowest network to the fastest: dcn_ axes join slices, `model` communicates most.
MESH_AXES = ('dcn_data', 'dcn_fsdp', 'data', 'fsdp', 'expert', 'sequence', 'model')
BATCH_AXES = MESH_AXES[:5]     # outside the experts, the devices of `expert` share the batch too
FSDP_AXES = ('dcn_fsdp', 'fsdp')

LOGICAL_AXES = (
    # Parameters. heads is N * H joined, kv_heads K * H joined, norm the D of scales and biases.
    'vocab', 'embed', 'heads', 'kv_heads', 'mlp', 'norm', 'layers', 'buckets', 'rel_heads',
    'positions', 'expert',
    # Activations. kv_length is the length of the keys, which every query reads; length is any
    # other; capacity counts the token slots of an expert.
    'batch', 'length', 'kv_length', 'capacity', 'act_embed', 'act_heads', 'act_kv_heads', 'act_mlp',
    'act_vocab')

_DATA = {'batch': BATCH_AXES, 'expert': 'expert'}
_TENSOR = {'vocab': 'model', 'heads': 'model', 'kv_heads': 'model', 'mlp': 'model',
           'act_heads': 'model', 'act_kv_heads': 'model', 'act_mlp': 'model', 'act_vocab': 'model'}

# A logical axis that a rule set leaves out is replicated. A mesh axis of one device has no effect.
# `embed`, which every large parameter has, is sharded at rest and gathered for use (`product`).
RULES = {
    'dp': _DATA,
    'fsdp': {**_DATA, 'embed': FSDP_AXES},                    # ZeRO-3 [Rajbhandari et al. 2020]
    'tp': {**_DATA, **_TENSOR},                               # [Shoeybi et al. 2019]
    'fsdp_tp': {**_DATA, **_TENSOR, 'embed': FSDP_AXES},
    # Each row is split along its length; keys and values are gathered, which costs less than a ring
    # at T5's lengths and works with any mask. [Dubey et al. 2024 (Llama 3), 3.3.2]
    'sp': {**_DATA, **_TENSOR, 'length': 'sequence', 'capacity': 'sequence',
           'embed': (*FSDP_AXES, 'sequence')},
    # Outside the experts, their devices do FSDP, so no device holds a large array whole.
    'ep': {**_DATA, **_TENSOR, 'embed': (*FSDP_AXES, 'expert')},
}
# Without several devices on one of these mesh axes, the rule set would do nothing of its own.
_REQUIRED = {'fsdp': FSDP_AXES, 'fsdp_tp': FSDP_AXES, 'sp': ('sequence',)}

# Mesh axes over which gradients, optimizer state and average are split beyond their parameters
# (ZeRO-1). The dcn_ axes are not among them: between slices gradients are summed during the
# backward pass, but new parameters could only be gathered after it, with nothing to hide the slow
# network behind.
ZERO_AXES = ('data', 'fsdp', 'expert')
# Elements of one layer's leaf: below 64 KiB the latency of collectives outweighs the memory saved.
SMALL = 2 ** 14

_active = contextvars.ContextVar('active', default=None)      # (mesh, rule set) inside `use`


# --- meshes ------------------------------------------------------------------------------------


def make_mesh(data: int = -1, model: int = 1, expert: int = 1, fsdp: int = 1, sequence: int = 1,
              dcn_data: int = 1, dcn_fsdp: int = 1, devices=None) -> Mesh:
  """A mesh of MESH_AXES over `devices` (default: all). One size may be -1: the rest.

  Axes are Auto: the compiler propagates shardings from what we pin (jax.make_mesh's own default,
  Explicit, makes every operation state its sharding).
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(dcn_data=dcn_data, dcn_fsdp=dcn_fsdp, data=data, fsdp=fsdp, expert=expert,
               sequence=sequence, model=model)
  shape = tuple(mesh_sizes(sizes, len(devices)).values())
  return Mesh(_device_array(shape, devices, _as_flags(sizes)), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(shape))


def mesh_sizes(sizes: Mapping[str, int], n: int, machine: str = 'this machine') -> dict[str, int]:
  """Sizes of mesh axes with -1 resolved for n devices. UsageError if they do not multiply to n."""
  flags = _as_flags(sizes)
  fixed = [size for size in sizes.values() if size != -1]
  wildcards, known = len(sizes) - len(fixed), math.prod(fixed)
  if wildcards > 1 or min(fixed, default=1) < 1:
    raise UsageError(f'{flags}: a mesh axis must have 1 or more devices; one axis may be -1 '
                     '(the rest)')
  if n % known or (not wildcards and known != n):
    multiple = 'a multiple of ' if wildcards else ''
    raise UsageError(f'{flags} asks for {multiple}{known} devices, {machine} has {n}; the sizes '
                     f'must multiply to {n}, and one may be -1 (the rest)')
  return {axis: n // known if size == -1 else size for axis, size in sizes.items()}


def _as_flags(sizes: Mapping[str, int]) -> str:
  return ', '.join(f'mesh.{axis}={size}' for axis, size in sizes.items() if size != 1) or 'mesh'


def _device_array(shape: tuple[int, ...], devices, flags: str) -> np.ndarray:
  """The devices as an array of `shape` in which only the dcn_ axes cross slices.

  Devices that report no slice (CPUs; GPU hosts need not be slices) keep their order, which is by
  process, so the dcn_ axes, which are outermost, join processes.
  """
  dcn_shape, ici_shape = shape[:2], shape[2:]
  asked = math.prod(dcn_shape)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if devices[0].platform == 'tpu' and slices != asked:
    raise UsageError(f'{flags}: the devices are {slices} slices of {len(devices) // slices}, so '
                     f'mesh.dcn_data * mesh.dcn_fsdp must be {slices}, got {asked}')
  if slices == asked > 1:
    return mesh_utils.create_hybrid_device_mesh(
        (1, 1, *ici_shape), (*dcn_shape, *(1,) * len(ici_shape)), devices,
        allow_split_physical_axes=True)
  if asked > 1:
    return np.array(devices).reshape(shape)
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_mesh(mesh: Mesh, rules: str) -> None:
  """Raises UsageError if devices would repeat each other's work or the rules would do nothing."""
  used = _used_axes(rules)
  for axis, size in mesh.shape.items():
    if size > 1 and axis not in used:
      others = [name for name in RULES if axis in _used_axes(name)]
      raise UsageError(f'mesh.{axis}={size}: rules={rules!r} do not use this axis, so its devices '
                       f"would repeat each other's work; rules that do: {', '.join(others)}")
  required = _REQUIRED.get(rules, ())
  if required and mesh.size > 1 and all(mesh.shape[axis] == 1 for axis in required):
    raise UsageError(f'rules={rules!r} split by mesh.{required[-1]}, which is 1 of {mesh.size} '
                     f'devices: --config.mesh.data=1 --config.mesh.{required[-1]}=-1')


def check_heads(mesh: Mesh, rules: str, n_heads: int, kv_heads: int) -> None:
  """Raises UsageError if the rules would split a head."""
  axis = rule_set(rules).get('act_heads')
  for name, heads in (('n_heads', n_heads), ('n_kv_heads', kv_heads)):
    if axis and heads % mesh.shape[axis]:
      raise UsageError(f'model.{name}: {heads} heads do not divide over mesh.{axis}='
                       f'{mesh.shape[axis]}; choose a mesh.{axis} that divides them, or rules '
                       f'other than {rules!r}')


def batch_devices(mesh: Mesh) -> int:
  """The number of devices that the rows of a batch are split over."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_shards() -> int:
  """`batch_devices` of the mesh under `use`, 1 elsewhere."""
  return batch_devices(_active.get()[0]) if _active.get() else 1


# --- rules -------------------------------------------------------------------------------------


def rule_set(name: str) -> dict:
  """The entry of RULES. UsageError for an unknown name."""
  if name not in RULES:
    raise UsageError(f'rules={name!r} is unknown.{did_you_mean(name, RULES)}')
  return RULES[name]


def _used_axes(rules: str) -> set[str]:
  """The mesh axes that a rule set uses."""
  return {axis for target in rule_set(rules).values() for axis in mesh_axes(target)}


@contextlib.contextmanager
def use(mesh: Mesh, rules: str):
  """Inside the block, `constrain` and `product` pin arrays to `mesh` by the rule set `rules`."""
  token = _active.set((mesh, rule_set(rules)))
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _active.reset(token)


def mesh_axes(target) -> tuple[str, ...]:
  """The mesh axes in a value of a rule set or an entry of a PartitionSpec."""
  if target is None:
    return ()
  return target if isinstance(target, tuple) else (target,)


def num_shards(sizes: Mapping[str, int], target) -> int:
  """The number of shards that such a value or entry makes. sizes: a mesh's shape."""
  return math.prod(sizes[axis] for axis in mesh_axes(target))


def _entry(axes: tuple[str, ...]):
  """The inverse of `mesh_axes`."""
  if not axes:
    return None
  return axes if len(axes) > 1 else axes[0]


def spec(axes: tuple[str | None, ...], rules: dict) -> P:
  """Logical axes -> PartitionSpec. The first logical axis that maps to a mesh axis takes it."""
  taken, entries = set(), []
  for axis in axes:
    if axis is not None and axis not in LOGICAL_AXES:
      raise UsageError(f'logical axis {axis!r} is unknown.{did_you_mean(axis, LOGICAL_AXES)}')
    free = tuple(target for target in mesh_axes(rules.get(axis)) if target not in taken)
    taken.update(free)
    entries.append(_entry(free))
  return P(*entries)


# --- inside the model --------------------------------------------------------------------------


def constrain(x, *axes: str | None):
  """Pins x to its logical axes under `use`; elsewhere only checks the names and the rank.

  An axis of one element is replicated, e.g. the length of a decoding step.
  """
  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axes {axes} for an array of shape {x.shape}')
  mesh, rules = _active.get() or (None, {})
  s = spec(axes, rules)
  if mesh is None:
    return x
  entries = (entry if size > 1 else None for entry, size in zip(s, x.shape))
  return jax.lax.with_sharding_constraint(x, P(*entries))


def product(f: Callable, x, w, *axes: str | None, dtype=None):
  """Applies a weight: returns f(x, w cast to dtype), where f is linear in w. All layers use it.

  axes: the logical axes of w. The `embed` axis is gathered for f, in `dtype`, once in the forward
  and once in the backward pass; between them only shards are kept. The gradient is scattered to the
  sharding of optimizer state (`like_params`).

  Without these pins the compiler would guess from sizes whether to move weights or activations,
  all-reduce whole gradients, and keep the gathered weights of all layers. With a single position
  (decoding), activations are smaller than the weight, and the compiler may move them instead.
  """
  cast = lambda w: w.astype(dtype or w.dtype)
  lookup = np.issubdtype(x.dtype, np.integer)
  active = _active.get()
  if active is None or x.shape[-1 if lookup else -2] == 1:     # 1: a single position
    spec(axes, {})                                             # checks the names
    return f(x, cast(w))

  mesh, rules = active
  sharded = spec(axes, rules)
  gathered = spec([None if axis == 'embed' else axis for axis in axes], rules)
  # In two steps the TPU compiler makes two reduce-scatters, the first among neighbours, where one
  # step would all-reduce whole gradients over all devices. (If both are on one mesh axis it always
  # does that, even with psum_scatter; over both axes of a torus at once that takes as long as a
  # scatter along one, then the other.) The gradient of a lookup is gathered first: otherwise the
  # cotangents, which are split by rows, are all replicated in order to be split along D.
  gradient_specs = (sharded, _zero_spec(sharded, w.shape, axes, mesh))
  if lookup:
    gradient_specs = (gathered, *gradient_specs)
  pin = jax.lax.with_sharding_constraint

  @jax.custom_vjp
  def g(x, w):
    return f(x, pin(cast(w), gathered))

  def forward(x, w):
    # f and not g: a remat policy that saves products has to see one
    return f(x, pin(cast(w), gathered)), (x, w)

  def backward(saved, dy):
    x, w = saved
    _, pull = jax.vjp(f, x, pin(cast(w), gathered))
    dx, dw = pull(dy)
    return dx, functools.reduce(pin, gradient_specs, dw).astype(w.dtype)

  g.defvjp(forward, backward)
  return g(x, w)


# --- parameters and optimizer state ------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def boxes(boxed) -> dict[str, nn.LogicallyPartitioned]:
  """{path: box} of parameters with their logical axes."""
  leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)
  return {trees.path_name(keys): box for keys, box in leaves}


def _is_box(x) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


def shardings(boxed, mesh: Mesh, rules: str):
  """The NamedSharding of each parameter. UsageError for an axis that the mesh does not divide.

  boxed: abstract parameters with their logical axes, from eval_shape of init.
  """
  def sharding(keys, box):
    s = spec(box.names, rule_set(rules))
    for size, name, entry in zip(box.value.shape, box.names, s):
      devices = num_shards(mesh.shape, entry)
      if size % devices:
        raise UsageError(f'{trees.path_name(keys)}: axis {name!r} has size {size}, which the '
                         f'{devices} devices of mesh axis {entry!r} do not divide; change one of '
                         f'them, or choose rules other than {rules!r}')
    return NamedSharding(mesh, s)

  return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_box)


def like_params(tree, boxed, mesh: Mesh, rules: str):
  """The NamedShardings of a tree that mirrors the parameters: optimizer state or the average.

  boxed: abstract parameters with their logical axes. A leaf whose path ends in a parameter's path
  and that has its shape is sharded like it, and further over the devices of the batch (ZeRO-1)
  [Rajbhandari et al. 2020, 5.1]. Adafactor's v_row and v_col, which lack one of the last two axes,
  are sharded like such a leaf on the others. Any other leaf is replicated.
  """
  rule = rule_set(rules)
  param_boxes = boxes(boxed)

  def sharding(path, leaf):
    parts = path.split('/')
    for i, parent in enumerate((None, *parts[:-1])):
      box = param_boxes.get('/'.join(parts[i:]))
      if box is None:
        continue
      shape = box.value.shape
      entries = tuple(_zero_spec(spec(box.names, rule), shape, box.names, mesh))
      if leaf.shape == shape:
        return NamedSharding(mesh, P(*entries))
      axis = _factored_axis(parent, shape)
      if axis is not None and leaf.shape == _without(shape, axis):
        return NamedSharding(mesh, P(*_without(entries, axis)))
    return replicated(mesh)

  return trees.map_paths(sharding, tree)


def _without(values: tuple, i: int) -> tuple:
  return values[:i] + values[i + 1:]


def _zero_spec(s: P, shape, names, mesh: Mesh) -> P:
  """s, further split over the ZERO_AXES that it does not use, each on the first axis it divides.

  The `layers` axis is never split: a scan produces the gradient of one layer after the other.
  """
  splittable = [i for i, name in enumerate(names) if name != 'layers']
  if math.prod(shape[i] for i in splittable) < SMALL:
    return s
  entries = [mesh_axes(entry) for entry in s]
  used = {axis for entry in entries for axis in entry}
  for axis in ZERO_AXES:
    if axis in used or mesh.shape[axis] == 1:
      continue
    for i in splittable:
      if shape[i] % num_shards(mesh.shape, (*entries[i], axis)) == 0:
        entries[i] += (axis,)
        break
  return P(*map(_entry, entries))


def _factored_axis(name: str | None, shape) -> int | None:
  """The axis that Adafactor's v_row or v_col averages over, None for another name or a vector.

  v_row averages over the longer side of a matrix and v_col over the shorter one; of a square
  matrix v_row averages over the last axis. [optax, _factored_dims]
  """
  if name not in ('v_row', 'v_col') or len(shape) < 2:
    return None
  longer_is_last = shape[-1] >= shape[-2]
  return len(shape) - (1 if (name == 'v_row') == longer_is_last else 2)


# --- batches -----------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """The sharding of an array [B, …] of a batch: its rows over the axes of the batch."""
  return NamedSharding(mesh, P(BATCH_AXES, *(None,) * (ndim - 1)))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """int[n], ascending: the rows of a batch that this process's devices hold, so it must read them.

  Processes that share rows (over the sequence or model axis) each get all of them.
  """
  is_local = np.zeros(batch_size, bool)
  indices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,))
  for index in indices.values():
    is_local[index] = True
  return np.flatnonzero(is_local)


def put(batch: dict[str, np.ndarray], mesh: Mesh, rows: np.ndarray | None = None, *,
        size: int | None = None) -> dict[str, jax.Array]:
  """Numpy rows of a batch -> global arrays, sharded over the axes of the batch.

  rows: their numbers in the batch of `size` rows, as local_rows returns them; None for all rows.
  """
  def global_array(x):
    numbers = np.arange(len(x)) if rows is None else rows

    def local_shard(index):
      # the rows of one device are adjacent in the batch, and so in `numbers`
      start, stop = index[0].indices(shape[0])[:2]
      first = np.searchsorted(numbers, start)
      return x[first:first + stop - start]

    shape = (len(x) if rows is None else size, *x.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh, x.ndim), local_shard)

  return {name: global_array(x) for name, x in batch.items()}
