"""Meshes, the rows that map logical axes to mesh axes, and how model and step use them.

Parameters carry logical axis names from their definition; `shardings` turns those into
NamedShardings, `like_params` those of optimizer state and average. Activations are pinned by
`constrain`, which knows every name and raises on others: flax's own constraint is silently ignored
outside `jax.set_mesh`, and a mistyped name silently means "replicated". Weights meet activations in
`product`, which pins where a weight is gathered and its gradient scattered.
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

# From the slowest network to the fastest: dcn_ axes join slices, neighbours on `model` talk most.
MESH_AXES = ('dcn_data', 'dcn_fsdp', 'data', 'fsdp', 'expert', 'sequence', 'model')
BATCH = MESH_AXES[:5]          # outside of the experts their devices share the batch

# Every logical axis name. Parameters: vocab, embed, heads (N * H joined), kv_heads (K * H), mlp,
# norm (scales and biases along D), layers, buckets, rel_heads, positions, expert.
# Activations: batch, length (of queries and of all else), kv_length (of keys, which every query
# reads), capacity (places of an expert), act_embed, act_heads, act_kv_heads, act_mlp, act_vocab.
AXES = ('vocab', 'embed', 'heads', 'kv_heads', 'mlp', 'norm', 'layers', 'buckets', 'rel_heads',
        'positions', 'expert', 'batch', 'length', 'kv_length', 'capacity', 'act_embed', 'act_heads',
        'act_kv_heads', 'act_mlp', 'act_vocab')

FSDP = ('dcn_fsdp', 'fsdp')
_DATA = {'batch': BATCH, 'expert': 'expert'}
_TENSOR = {'vocab': 'model', 'heads': 'model', 'kv_heads': 'model', 'mlp': 'model',
           'act_heads': 'model', 'act_kv_heads': 'model', 'act_mlp': 'model', 'act_vocab': 'model'}

# A name that a row leaves out is replicated, a mesh axis of one device changes nothing. `embed`,
# which every large parameter has, is split while it rests and whole while it is used (`product`).
RULES = {
    'dp': _DATA,
    'fsdp': {**_DATA, 'embed': FSDP},                         # ZeRO-3 [Rajbhandari et al. 2020]
    'tp': {**_DATA, **_TENSOR},                               # [Shoeybi et al. 2019]
    'fsdp_tp': {**_DATA, **_TENSOR, 'embed': FSDP},
    # A row of the batch is cut along its length; keys and values are gathered, which costs less
    # than a ring where lengths are T5's, and any mask works. [Dubey et al. 2024 (Llama 3), 3.3.2]
    'sp': {**_DATA, **_TENSOR, 'length': 'sequence', 'capacity': 'sequence',
           'embed': (*FSDP, 'sequence')},
    # Outside of the experts their devices are more of fsdp, so nothing large is whole on each.
    'ep': {**_DATA, **_TENSOR, 'embed': (*FSDP, 'expert')},
}
# The axes that a row is chosen for: one of them must have several devices, where there are several.
_MEANT = {'fsdp': FSDP, 'fsdp_tp': FSDP, 'sp': ('sequence',)}

# Mesh axes over which gradients, optimizer state and average are split beyond their parameters
# (ZeRO-1). Not over dcn_ axes: between slices gradients are summed while the backward pass runs,
# but new parameters could only be gathered after it, with nothing to hide the slow network behind.
ZERO = ('data', 'fsdp', 'expert')
# Elements of a layer's leaf. Fewer, 64 KiB, save no memory worth the latency of their collectives.
SMALL = 2 ** 14

_active = contextvars.ContextVar('active', default=None)      # (mesh, row) inside of `use`


def make_mesh(data: int = -1, model: int = 1, expert: int = 1, fsdp: int = 1, sequence: int = 1,
              dcn_data: int = 1, dcn_fsdp: int = 1, devices=None) -> Mesh:
  """A mesh of MESH_AXES over all devices (or these); one -1 takes what is left.

  Axes are Auto: the compiler propagates shardings from what we pin (jax.make_mesh's own default,
  Explicit, makes every operation state its sharding).
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(dcn_data=dcn_data, dcn_fsdp=dcn_fsdp, data=data, fsdp=fsdp, expert=expert,
               sequence=sequence, model=model)
  shape = tuple(mesh_sizes(sizes, len(devices)).values())
  return Mesh(_arranged(shape, devices, _asked(sizes)), MESH_AXES,
              axis_types=(AxisType.Auto,) * len(shape))


def _asked(sizes: Mapping[str, int]) -> str:
  return ', '.join(f'mesh.{axis}={size}' for axis, size in sizes.items() if size != 1) or 'mesh'


def mesh_sizes(sizes: Mapping[str, int], n: int, machine: str = 'this machine') -> dict[str, int]:
  """Sizes of mesh axes with the -1 resolved for n devices; UsageError if they do not come out."""
  asked = _asked(sizes)
  if list(sizes.values()).count(-1) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
    raise UsageError(f'{asked}: sizes are 1 or more, or one -1 for what is left')
  known = math.prod(s for s in sizes.values() if s != -1)
  left = -1 in sizes.values()
  if n % known or (not left and known != n):
    raise UsageError(f'{asked} asks for {"a multiple of " * left}{known} devices, {machine} '
                     f'has {n}; sizes that fit multiply to {n}, or use one -1')
  return {axis: n // known if s == -1 else s for axis, s in sizes.items()}


def _arranged(shape: tuple[int, ...], devices, asked: str) -> np.ndarray:
  """The devices as an array of `shape`: a slice's are neighbours on the axes that are not dcn_.

  Devices that know no slice (CPU; hosts of GPUs need not be slices) keep their order, which is by
  process: the dcn_ axes, the outermost, then join processes.
  """
  asked_slices = math.prod(shape[:2])
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if devices[0].platform == 'tpu' and slices != asked_slices:
    raise UsageError(f'{asked}: the devices are {slices} slices of {len(devices) // slices}, so '
                     f'mesh.dcn_data * mesh.dcn_fsdp must be {slices}, not {asked_slices}')
  if slices == asked_slices > 1:
    return mesh_utils.create_hybrid_device_mesh(
        (1, 1, *shape[2:]), (*shape[:2], *(1,) * len(shape[2:])), devices,
        allow_split_physical_axes=True)
  if asked_slices > 1:
    return np.array(devices).reshape(shape)
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_mesh(mesh: Mesh, rules: str) -> None:
  """UsageError where devices would repeat each other's work, or the row could not do its own."""
  uses = {name: {axis for target in row.values() for axis in mesh_axes(target)}
          for name, row in RULES.items()}
  rules_row(rules)
  for axis, size in mesh.shape.items():
    if size > 1 and axis not in uses[rules]:
      raise UsageError(f'mesh.{axis}={size}: rules={rules!r} do not use this axis, so its devices '
                       "would repeat each other's work; rules that do: "
                       + ', '.join(name for name in RULES if axis in uses[name]))
  meant = _MEANT.get(rules, ())
  if meant and mesh.size > 1 and all(mesh.shape[axis] == 1 for axis in meant):
    raise UsageError(f'rules={rules!r} split by mesh.{meant[-1]}, which is 1 of {mesh.size} '
                     f'devices: --config.mesh.data=1 --config.mesh.{meant[-1]}=-1')


def batch_devices(mesh: Mesh) -> int:
  """Over how many devices the rows of a batch are spread."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_shards() -> int:
  """`batch_devices` of the mesh under `use`, 1 elsewhere."""
  return batch_devices(_active.get()[0]) if _active.get() else 1


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
  """Inside, `constrain` and `product` pin by the row `rules` on `mesh`."""
  token = _active.set((mesh, rules_row(rules)))
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _active.reset(token)


def mesh_axes(target) -> tuple[str, ...]:
  """A part of a PartitionSpec, or a row's value, as mesh axes."""
  return target if isinstance(target, tuple) else () if target is None else (target,)


def spread(sizes: Mapping[str, int], target) -> int:
  """Over how many devices such a part, or value, spreads. sizes: a mesh's shape."""
  return math.prod(sizes[axis] for axis in mesh_axes(target))


def _part(axes: tuple[str, ...]):
  return axes if len(axes) > 1 else axes[0] if axes else None


def spec(axes: tuple[str | None, ...], rules: dict) -> P:
  """Logical axes -> PartitionSpec. A mesh axis is used once: the first axis that asks has it."""
  taken, parts = set(), []
  for axis in axes:
    if axis is not None and axis not in AXES:
      raise UsageError(f'no logical axis {axis!r}.{did_you_mean(axis, AXES)}')
    free = tuple(t for t in mesh_axes(rules.get(axis)) if t not in taken)
    taken.update(free)
    parts.append(_part(free))
  return P(*parts)


def constrain(x, *axes: str | None):
  """Pins x to its logical axes under `use`; elsewhere only checks the names and the rank.

  An axis of one element stays whole: the token of a decoding step is not cut along its length.
  """
  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axes {axes} for an array of shape {x.shape}')
  mesh, rules = _active.get() or (None, {})
  s = spec(axes, rules)
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(
      x, P(*(part if size > 1 else None for part, size in zip(s, x.shape))))


def product(f: Callable, x, w, *axes: str | None, dtype=None):
  """f(x, w as dtype), linear in the weight w of these logical axes: how a layer uses its weight.

  The weight's `embed` axis is whole while f runs: gathered as dtype, once for the forward and once
  for the backward pass, which keeps only what rests. Its gradient is born as `like_params` splits
  optimizer state. Left alone, the compiler would guess from sizes whether to move weights or
  activations, sum gradients whole, and keep the gathered weights of all layers.
  One position alone (decoding) is less than a weight: there the compiler may move it.
  """
  cast = lambda w: w.astype(dtype or w.dtype)
  lookup = np.issubdtype(x.dtype, np.integer)
  if _active.get() is None or x.shape[-1 if lookup else -2] == 1:
    spec(axes, {})                                             # only checks the names
    return f(x, cast(w))
  mesh, rules = _active.get()
  rest = spec(axes, rules)
  whole = spec([None if axis == 'embed' else axis for axis in axes], rules)
  # In two steps the TPU's compiler makes two reduce-scatters, the first among neighbours, where it
  # would sum whole gradients over all devices in one. (Where these are one axis it does so whatever
  # it is told, psum_scatter included: on both axes of a torus at once that takes as long as a
  # scatter along one, then the other.) A scattered sum of rows is first made whole: else their
  # cotangents, cut by rows, are all replicated to be cut along D.
  steps = (whole,) * lookup + (rest, _zero(rest, w.shape, axes, mesh))
  pin = jax.lax.with_sharding_constraint

  @jax.custom_vjp
  def g(x, w):
    return f(x, pin(cast(w), whole))

  def backward(saved, dy):
    x, w = saved
    _, pull = jax.vjp(f, x, pin(cast(w), whole))
    dx, dw = pull(dy)
    return dx, functools.reduce(pin, steps, dw).astype(w.dtype)

  # f and not g: a remat policy that saves products has to see one
  g.defvjp(lambda x, w: (f(x, pin(cast(w), whole)), (x, w)), backward)
  return g(x, w)


def shardings(boxed, mesh: Mesh, rules: str):
  """Boxed abstract parameters (from eval_shape of init) -> NamedSharding for each leaf.

  An axis whose length the mesh axis does not divide is an error that names the parameter.
  """
  row = rules_row(rules)
  def one(path, box):
    s = spec(box.names, row)
    for size, name, axis in zip(box.value.shape, box.names, s):
      devices = spread(mesh.shape, axis)
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


def _zero(s: P, shape, names, mesh: Mesh) -> P:
  """s, further split over the axes of ZERO that it leaves: each on the first axis that it divides.

  Not along `layers`: a scan makes the gradient of one layer after the other.
  """
  rest = [axis for axis in ZERO if axis not in {a for part in s for a in mesh_axes(part)}]
  if math.prod(n for n, name in zip(shape, names) if name != 'layers') < SMALL:
    return s
  parts = list(map(mesh_axes, s))
  for axis in rest:
    for i, (n, name) in enumerate(zip(shape, names)):
      if name != 'layers' and n % math.prod(mesh.shape[a] for a in (*parts[i], axis)) == 0:
        parts[i] += (axis,) * (mesh.shape[axis] > 1)
        break
  return P(*map(_part, parts))


def like_params(tree, boxed, mesh: Mesh, rules: str):
  """Shardings for a tree that mirrors parameters (optimizer state, average).

  boxed: abstract parameters with their logical axes. A leaf whose path ends in a parameter's and
  has its shape lies like it, and is further split over the batch's devices (ZeRO-1) [Rajbhandari et
  al. 2020, 5.1]. Adafactor's v_row and v_col, which lack one of the last two axes, lie as the
  others of such a leaf. Any other leaf is replicated.
  """
  row, is_box = rules_row(rules), lambda x: isinstance(x, nn.LogicallyPartitioned)
  boxes = {trees.path_name(keys): box for keys, box in
           jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)}

  def one(path, leaf):
    parts = path.split('/')
    for i in range(len(parts)):
      if box := boxes.get('/'.join(parts[i:])):
        shape = box.value.shape
        split = tuple(_zero(spec(box.names, row), shape, box.names, mesh))
        if leaf.shape == shape:
          return NamedSharding(mesh, P(*split))
        lacks = _factored_axis(parts[i - 1], shape)
        if lacks is not None and leaf.shape == shape[:lacks] + shape[lacks:][1:]:
          return NamedSharding(mesh, P(*split[:lacks], *split[lacks:][1:]))
    return replicated(mesh)
  return trees.map_paths(one, tree)


def _factored_axis(name: str, shape) -> int | None:
  """The axis over which Adafactor's v_row or v_col is a mean: of a matrix the longer side for v_row
  and the shorter one for v_col; of a square one the last for v_row. [optax, _factored_dims]"""
  if name not in ('v_row', 'v_col') or len(shape) < 2:
    return None
  longer_is_last = shape[-1] >= shape[-2]
  return len(shape) - (1 if (name == 'v_row') == longer_is_last else 2)


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Of a batch's array [B, …]: rows over the batch's axes."""
  return NamedSharding(mesh, P(BATCH, *(None,) * (ndim - 1)))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """int[n], ascending: the rows of a batch that this process's devices hold, which it has to read.

  Processes that share rows (over the sequence or model axis) each get all of them.
  """
  rows = np.zeros(batch_size, bool)
  for index in batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values():
    rows[index] = True
  return np.flatnonzero(rows)


def put(batch: dict[str, np.ndarray], mesh: Mesh, rows: np.ndarray | None = None, *,
        size: int | None = None) -> dict[str, jax.Array]:
  """Numpy rows of a batch -> global arrays, sharded over the batch's axes.

  rows: their numbers in the batch of `size`, as local_rows gives; None: all of them are here.
  """
  def one(x):
    where = batch_sharding(mesh, x.ndim)
    if rows is None or len(rows) == size:
      return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    def local(index):                     # a device's rows are neighbours, here as in the batch
      first, last, _ = index[0].indices(size)
      at = np.searchsorted(rows, first)
      return x[at:at + last - first]
    return jax.make_array_from_callback((size, *x.shape[1:]), where, local)
  return {k: one(x) for k, x in batch.items()}
