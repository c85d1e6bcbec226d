"""HBM of a chip by kind.

The bytes of the state are exact: they come from shapes and shardings. Temporaries come from the
compiler (memory_analysis), or, without it, from a formula that is an estimate.
"""

import dataclasses
import math
import re

import jax

from t5lab import trees
from t5lab.models.families import TransformerConfig
from t5lab.tools.planning import hlo

LARGE = 64 * 2 ** 20           # bytes; larger tensors are reported if every chip holds all of them
KINDS = {'params': 'parameters', 'opt_state': 'optimizer', 'ema': 'average (EMA)',
         'base': 'frozen weights', 'batch': 'batch', 'cache': 'key-value cache'}
STATE = (KINDS['params'], KINDS['opt_state'], KINDS['ema'])    # the step replaces these


@dataclasses.dataclass(frozen=True)
class Tensor:
  """path, e.g. 'params/decoder/…'; bytes: on one device; whole: every device holds all of it."""
  path: str
  shape: tuple[int, ...]
  dtype: str
  bytes: int
  whole: bool

  def __str__(self):
    return f'{self.path} {self.dtype}[{",".join(map(str, self.shape))}]'

  @property
  def kind(self) -> str:
    return KINDS.get(self.path.partition('/')[0], 'other')


def tensors(**named_trees) -> list[Tensor]:
  """The leaves of trees of shapes with shardings, e.g. tensors(params=…, batch=…)."""
  leaves = []
  for name, tree in named_trees.items():
    for path, leaf in trees.flatten(tree or {}).items():
      shard = leaf.sharding.shard_shape(leaf.shape)
      size = math.prod(shard) * jax.numpy.dtype(leaf.dtype).itemsize
      devices = math.prod(leaf.sharding.mesh.shape.values())
      whole = shard == leaf.shape and devices > 1
      leaves.append(Tensor(f'{name}/{path}', leaf.shape, str(leaf.dtype), size, whole))
  return leaves


def bytes_by_kind(leaves: list[Tensor]) -> dict[str, int]:
  """{'parameters': bytes, …} of the kinds that occur."""
  total = {}
  for tensor in leaves:
    total[tensor.kind] = total.get(tensor.kind, 0) + tensor.bytes
  return total


def elements(leaves: list[Tensor], tree: str) -> int:
  """Number of elements in the tree of this name, over all devices."""
  return sum(math.prod(t.shape) for t in leaves if t.path.startswith(f'{tree}/'))


def large_replicated(leaves: list[Tensor], limit: int = LARGE) -> list[Tensor]:
  """State of more than `limit` bytes that every device holds whole, largest first."""
  replicated = [t for t in leaves if t.whole and t.bytes > limit and t.kind != KINDS['batch']]
  return sorted(replicated, key=lambda t: -t.bytes)


# --- from the program --------------------------------------------------------------------------


def not_aliased(module: hlo.Module) -> list[str]:
  """Donated arguments ('state.…') whose buffers the program does not reuse for a result."""
  reused = set(module.aliases.values())
  return [_argument_path(op.op_name) for number, op in sorted(module.entry.parameters.items())
          if number not in reused and re.match(r'state|cache', op.op_name)]


def _argument_path(op_name: str) -> str:
  """"state.params[\\'a\\'][\\'b\\']" -> params/a/b."""
  return re.sub(r"\[\\?'?|\.", '/', re.sub(r"\\?'?\]", '', op_name)).replace('state/', '', 1)


def stacked_buffers(module: hlo.Module) -> dict[str, float]:
  """Bytes in HBM of buffers that loops fill one layer at a time, by purpose.

  They need not all be alive at once, so their sum may exceed the peak.
  """
  saved, gradients = 'saved for the backward pass', 'gradients of stacked layers'
  total = {saved: 0., gradients: 0.}
  loops = {op.name: (op, computation) for computation, _, _ in module.executed()
           for op in computation.ops if op.kind == 'while'}
  for op, computation in loops.values():
    body, _ = module.loop(op, computation)
    purpose = gradients if 'transpose(' in op.op_name else saved
    elements = body.root.operands if body.root.kind == 'tuple' else ()
    for shape, element in zip(op.shapes, elements):
      in_hbm = shape.space == 0 and len(shape.dims) > 1
      if in_hbm and _is_filled(module, body.source(element)):
        total[purpose] += shape.padded
  return total


def _is_filled(module: hlo.Module, op: hlo.Op | None) -> bool:
  """True for a dynamic-update-slice, alone or as a result of a fusion."""
  inner = module.inside(op) if op is not None else None
  results = [op if inner is None else inner.root]
  if inner is not None and inner.root.kind == 'tuple':
    results = [inner.source(name) for name in inner.root.operands]
  return any(op is not None and op.kind == 'dynamic-update-slice' for op in results)


def largest_buffers(module: hlo.Module) -> list[dict]:
  """{bytes (with padding), shape, where} of the 8 largest buffers in HBM that a program allocates.

  Each pair of shape and origin appears once.
  """
  not_allocated = ('parameter', 'get-tuple-element', 'tuple', 'while', 'bitcast', 'constant')
  sizes = {}
  for computation, _, _ in module.executed():
    for op in computation.ops:
      if op.kind not in not_allocated:
        sizes |= {(str(shape), op.op_name or op.name): shape.padded
                  for shape in op.shapes if shape.space == 0}
  largest = sorted(((size, *origin) for origin, size in sizes.items()), reverse=True)[:8]
  return [dict(bytes=size, shape=shape, where=where) for size, shape, where in largest]


# --- by formula --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shards:
  """Numbers of shards: of the batch's rows, of a row's positions, of heads and widths."""
  batch: int = 1
  length: int = 1
  model: int = 1


def activation_bytes(m: TransformerConfig, rows: int, enc: int, dec: int, shards: Shards,
                     chunks: int) -> dict[str, float]:
  """Estimates bytes on a device for microbatches of `rows` rows over all devices.

  'saved': for the backward pass; 'layer': while the largest layer is computed; 'logits'. remat
  'full' saves the input of each layer; 'dots' also the outputs of its weight products; 'none' the
  scores too (twice in float32 and once in the compute dtype) and the intermediate values.
  """
  item = 2 if m.dtype == 'bfloat16' else 4
  local_rows = rows / shards.batch / shards.length
  width, kv = m.n_heads * m.d_head / shards.model, m.kv_heads * m.d_head / shards.model
  experts = max(1., m.expert_top_k * m.capacity_factor) if m.experts else 1.
  hidden = len(m.acts) * m.d_ff / shards.model * experts

  def layer(length, keys, memory):
    inputs = length * m.d_model
    products = length * (width + 2 * kv + 2 * m.d_model + hidden)
    scores = m.n_heads / shards.model * length * keys
    if memory:
      products += length * (width + m.d_model) + memory * 2 * kv
      scores += m.n_heads / shards.model * length * memory
    rest = length * (3 * m.d_model + 2 * hidden) * item + scores * (item + 8)
    return {'full': inputs * item, 'dots': (inputs + products) * item,
            'none': (inputs + products) * item + rest}

  stacks = []                              # (layers, bytes of one by remat policy)
  if m.enc_layers:
    keys = enc if m.enc_attention == 'full' else min(enc, 3 * (m.local_radius + 1))
    stacks.append((m.enc_layers, layer(enc, keys, 0)))
  if m.dec_layers:
    stacks.append((m.dec_layers, layer(dec, dec, enc)))
  predicted = 1 if m.classes else dec if m.dec_layers else enc
  vocab = m.classes or m.vocab_size / shards.model
  return {
      'saved': local_rows * sum(n * sizes[m.remat] for n, sizes in stacks),
      'layer': local_rows * max(sizes['none'] for _, sizes in stacks) * (m.remat != 'none'),
      'logits': local_rows * predicted * vocab * 4 * 2 / chunks,
  }
