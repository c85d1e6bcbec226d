"""HBM of a chip by kind: exact for what a step keeps, from the program for what it needs between.

The state's bytes come from shapes and shardings; temporaries from the compiler (memory_analysis),
or, without it, from a formula that is an estimate.
"""

import dataclasses
import math
import re

import jax

from t5lab import trees
from t5lab.models.families import TransformerConfig
from t5lab.tools.planning import hlo

REPLICATED = 64 * 2 ** 20      # bytes above which a tensor that every chip holds whole is named
KINDS = {'params': 'parameters', 'opt_state': 'optimizer', 'ema': 'average (EMA)',
         'base': 'frozen weights', 'batch': 'batch', 'cache': 'key-value cache'}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """path as in 'params/decoder/…'; bytes: on one device; whole: every device holds all of it."""
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


def tensors(**trees_) -> list[Tensor]:
  """Of trees of shapes with shardings, each leaf's part on a device: tensors(params=…, batch=…)."""
  found = []
  for name, tree in trees_.items():
    for path, leaf in trees.flatten(tree or {}).items():
      part = leaf.sharding.shard_shape(leaf.shape)
      size = math.prod(part) * jax.numpy.dtype(leaf.dtype).itemsize
      whole = part == leaf.shape and math.prod(leaf.sharding.mesh.shape.values()) > 1
      found.append(Tensor(f'{name}/{path}', leaf.shape, str(leaf.dtype), size, whole))
  return found


def of_program(program) -> list[Tensor]:
  """The arguments of a train step."""
  s = program.abstract
  return tensors(params=s.params, opt_state=s.opt_state, ema=s.ema, base=program.base,
                 batch=program.batch)


def by_kind(found: list[Tensor]) -> dict[str, int]:
  """{'parameters': bytes, …}, kinds that there are."""
  total = {}
  for tensor in found:
    total[tensor.kind] = total.get(tensor.kind, 0) + tensor.bytes
  return total


def replicated(found: list[Tensor], limit: int = REPLICATED) -> list[Tensor]:
  """State that every device holds whole although it is large, largest first."""
  return sorted((t for t in found if t.whole and t.bytes > limit and t.kind != 'batch'),
                key=lambda t: -t.bytes)


# -- from the program ---------------------------------------------------------------------------


def not_aliased(module: hlo.Module) -> list[str]:
  """Donated arguments ('state.…') whose buffers the program does not give to a result."""
  given = set(module.aliases.values())
  return [_argument(op.op_name) for number, op in sorted(module.entry.parameters.items())
          if number not in given and re.match(r'state|cache', op.op_name)]


def _argument(op_name: str) -> str:
  """"state.params[\\'a\\'][\\'b\\']" -> params/a/b."""
  return re.sub(r"\[\\?'?|\.", '/', re.sub(r"\\?'?\]", '', op_name)).replace('state/', '', 1)


def saved(module: hlo.Module) -> dict[str, float]:
  """Bytes in HBM of buffers that loops fill a layer at a time: {'saved for the backward pass': …,
  'stacked gradients': …}. They need not all be alive at once, so their sum may exceed the peak."""
  found = {'saved for the backward pass': 0., 'gradients of stacked layers': 0.}
  seen = set()
  for computation, _, _ in module.executed():
    for op in computation.ops:
      if op.kind != 'while' or op.name in seen:
        continue
      seen.add(op.name)
      body, _ = module.loop(op, computation)
      backward = 'transpose(' in op.op_name
      kind = 'gradients of stacked layers' if backward else 'saved for the backward pass'
      for number in _filled(module, body):
        shape = op.shapes[number] if number < len(op.shapes) else None
        if shape is not None and shape.space == 0 and len(shape.dims) > 1:
          found[kind] += shape.padded
  return found


def _filled(module, body) -> list[int]:
  """Elements of a loop's state that its body writes with dynamic-update-slice."""
  root = body.root
  if root.kind != 'tuple':
    return []
  return [i for i, name in enumerate(root.operands)
          if (made := body.source(name)) is not None and _updates(module, made)]


def _updates(module, op) -> bool:
  if op.kind == 'dynamic-update-slice':
    return True
  inner = module.inside(op)
  if inner is None:
    return False
  roots = [inner.root] if inner.root.kind != 'tuple' else [
      inner.source(name) for name in inner.root.operands]
  return any(r is not None and r.kind == 'dynamic-update-slice' for r in roots)


def largest(module: hlo.Module, count: int = 8) -> list[tuple[float, str, str]]:
  """(bytes with padding, shape, where it is made) of the largest buffers in HBM that the program
  makes, each shape and place once."""
  found = {}
  for computation, _, _ in module.executed():
    for op in computation.ops:
      if op.kind in ('parameter', 'get-tuple-element', 'tuple', 'while', 'bitcast', 'constant'):
        continue
      for shape in op.shapes:
        if shape.space == 0:
          found[str(shape), op.op_name or op.name] = shape.padded
  rows = sorted(((size, shape, where) for (shape, where), size in found.items()), reverse=True)
  return rows[:count]


# -- by formula ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shards:
  """Over how many devices the batch's rows, a row's positions, and heads and widths are spread."""
  batch: int = 1
  length: int = 1
  model: int = 1


def activations(m: TransformerConfig, rows: int, enc: int, dec: int, shards: Shards,
                chunks: int) -> dict[str, float]:
  """Bytes on a device, estimated, for `rows` rows a microbatch over all devices: 'saved' for the
  backward pass, 'layer' while the largest one is computed, and 'logits'.

  remat full keeps each layer's input; dots also the outputs of its weight products; none the
  scores too (twice in float32 and once in the compute dtype) and what is between.
  """
  item = 2 if m.dtype == 'bfloat16' else 4
  mine = rows / shards.batch / shards.length
  width, kv = m.n_heads * m.d_head / shards.model, m.kv_heads * m.d_head / shards.model
  hidden = len(m.acts) * m.d_ff / shards.model * (
      1. if not m.experts else max(1., m.expert_top_k * m.capacity_factor))
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
  found = [(m.enc_layers, layer(enc, enc if m.enc_attention == 'full' else min(
      enc, 3 * (m.local_radius + 1)), 0)), (m.dec_layers, layer(dec, dec, enc))]
  found = [(n, sizes) for n, sizes in found if n]
  predicted = dec if m.dec_layers else enc
  vocab = m.classes or m.vocab_size / shards.model
  return {
      'saved': mine * sum(n * sizes[m.remat] for n, sizes in found),
      'layer': mine * max(sizes['none'] for _, sizes in found) * (m.remat != 'none'),
      'logits': mine * (1 if m.classes else predicted) * vocab * 4 * 2 / chunks,
  }
