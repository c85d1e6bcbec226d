"""Scheduled HLO text, read: computations, trip counts of loops, costs, FLOPs and bytes.

The compiler's text is the only place where its own estimate of each fusion is found
("estimated_cycles"). Its FLOP counter takes a loop's body once; here loops are multiplied.
"""

import dataclasses
import functools
import math
import re

BYTES = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2,
         'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8,
         'f64': 8, 'c64': 8, 'c128': 16}
_SHAPE = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_OP = re.compile(r'\s+(ROOT )?%?([\w.-]+) = (.*)$')
_HEAD = re.compile(r'(ENTRY )?%?([\w.-]+) (?:.*)\{\s*$')
_NAME = re.compile(r'%([\w.-]+)')
# {a={b}}, [2,8]<=[4,4]T(1,0), or anything up to a comma
_VALUE = r'\{(?:[^{}]|\{[^{}]*\})*\}|\[[\d,]+\](?:<=\[[\d,]+\](?:T\([\d,]+\))?)?|[^\s,]+'


@dataclasses.dataclass(frozen=True)
class Shape:
  """dtype[dims] in a layout. tile: of the last two dimensions of the layout; space: 0 is HBM."""
  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...] = ()            # dimensions from minor to major
  tile: tuple[int, ...] = ()
  space: int = 0

  @property
  def bytes(self) -> float:
    return BYTES.get(self.dtype, 0) * math.prod(self.dims)

  @property
  def padded(self) -> float:
    """Bytes with the last dimensions filled up to whole tiles: what the buffer takes."""
    dims = list(self.dims)
    for size, axis in zip(reversed(self.tile), self.order):
      dims[axis] = -(-dims[axis] // size) * size
    return BYTES.get(self.dtype, 0) * math.prod(dims)

  def __str__(self):
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Op:
  name: str
  kind: str                              # the opcode
  shapes: tuple[Shape, ...]              # of a tuple: its leaves
  operands: tuple[str, ...]
  attributes: str                        # the rest of the line
  root: bool

  @functools.cached_property
  def cycles(self) -> int | None:
    """The compiler's estimate, None where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found.group(1)) if found else None

  @functools.cached_property
  def op_name(self) -> str:
    """Where the operation comes from, as jit(train_step)/…/mlp/wi_0/dot_general."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ''

  @functools.cached_property
  def calls(self) -> tuple[str, ...]:
    """Computations that a fusion, call or async operation runs once."""
    found = re.search(r'(?:calls|to_apply)=%?([\w.-]+)', self.attributes)
    return (found.group(1),) if found else ()

  def attribute(self, name: str) -> str:
    """The text of `name=…`, braces included; '' where there is none."""
    found = re.search(rf'[ ,]{name}=({_VALUE})', self.attributes)
    return found.group(1) if found else ''

  @property
  def bytes(self) -> float:
    return sum(s.bytes for s in self.shapes)

  @property
  def hbm_bytes(self) -> float:
    return sum(s.bytes for s in self.shapes if s.space == 0)


@dataclasses.dataclass
class Computation:
  name: str
  ops: list[Op]                          # in the order of the schedule

  @functools.cached_property
  def by_name(self) -> dict[str, Op]:
    return {op.name: op for op in self.ops}

  @functools.cached_property
  def root(self) -> Op:
    return next((op for op in self.ops if op.root), self.ops[-1])

  @functools.cached_property
  def parameters(self) -> dict[int, Op]:
    return {int(op.attributes.partition(')')[0]): op for op in self.ops if op.kind == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Op]]:
    found = {}
    for op in self.ops:
      for name in op.operands:
        found.setdefault(name, []).append(op)
    return found

  def source(self, name: str, through=('copy', 'bitcast', 'convert', 'copy-done', 'copy-start'),
             ) -> Op | None:
    """The operation that makes a value, through these and through tuples taken apart again."""
    op = self.by_name.get(name)
    while op is not None:
      if op.kind in through:
        op = self.by_name.get(op.operands[0])
      elif op.kind == 'get-tuple-element':
        inner = self.source(op.operands[0])
        if inner is None or inner.kind != 'tuple':
          return op
        op = self.by_name.get(inner.operands[int(op.attribute('index'))])
      else:
        return op
    return None


@dataclasses.dataclass
class Module:
  """computations by name; aliases: {output number: parameter number} of donated buffers."""
  computations: dict[str, Computation]
  entry: Computation
  aliases: dict[int, int]

  def called(self, op: Op) -> list[Computation]:
    return [self.computations[name] for name in op.calls if name in self.computations]

  def inside(self, op: Op) -> Computation | None:
    """Of a fusion; None for any other operation."""
    return next(iter(self.called(op)), None) if op.kind == 'fusion' else None

  def loop(self, op: Op, parent: Computation) -> tuple[Computation, int | None]:
    """A while: its body and how often it runs, None if the condition does not say."""
    body = self.computations[op.attribute('body').lstrip('%')]
    condition = self.computations[op.attribute('condition').lstrip('%')]
    return body, trip_count(self, condition, op, parent)

  def branches(self, op: Op) -> list[Computation]:
    """Of a conditional."""
    names = _NAME.findall(op.attribute('branch_computations')) or [
        op.attribute(f'{side}_computation').lstrip('%') for side in ('true', 'false')]
    return [self.computations[n] for n in names if n in self.computations]

  def executed(self):
    """(computation, how often a step runs it, the loops around it) of everything that is scheduled:
    the entry, bodies of loops, calls, branches. Insides of fusions are not."""
    def visit(computation, times, loops):
      yield computation, times, loops
      for op in computation.ops:
        if op.kind == 'while':
          body, trips = self.loop(op, computation)
          yield from visit(body, times * (trips or 1), (*loops, op))
        elif op.kind == 'call':
          for inner in self.called(op):
            yield from visit(inner, times, loops)
        elif op.kind == 'conditional':
          for inner in self.branches(op):          # one of them runs: an upper bound
            yield from visit(inner, times, loops)
    yield from visit(self.entry, 1, ())


# -- text ---------------------------------------------------------------------------------------


def parse(text: str) -> Module:
  """HLO text -> Module. ValueError if it has no entry computation."""
  computations, ops, name, entry = {}, None, None, None
  header = text[:text.find('\n')]
  for line in text.split('\n'):
    if ops is None:
      if found := _HEAD.match(line):
        name, ops = found.group(2), []
        entry = name if found.group(1) else entry
    elif line.startswith('}'):
      computations[name] = Computation(name, ops)
      ops = None
    elif op := _operation(line):
      ops.append(op)
  if entry is None:
    raise ValueError('HLO text without an ENTRY computation')
  return Module(computations, computations[entry], _aliases(header))


def _operation(line: str) -> Op | None:
  found = _OP.match(line)
  if not found:
    return None
  root, name, rest = found.groups()
  end = _close(rest, 0) + 1 if rest.startswith('(') else rest.find(' ')
  shapes = shapes_of(rest[:end])
  kind, _, tail = rest[end:].strip().partition('(')
  last = _close('(' + tail, 0) - 1
  operands = () if kind in ('parameter', 'constant') else _names(tail[:last])
  attributes = tail if kind in ('parameter', 'constant') else tail[last + 1:]
  return Op(name, kind, shapes, operands, attributes, bool(root))


def _names(text: str) -> tuple[str, ...]:
  """Operands; before the compiler's passes they have no %."""
  if '%' in text:
    return tuple(_NAME.findall(text))
  return tuple(re.findall(r'([\w.-]+)(?:,|$)', re.sub(r'\{[^}]*\}|/\*.*?\*/', '', text)))


def _close(text: str, start: int) -> int:
  """The index of the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.finditer(r'[()]', text[start:]):
    depth += 1 if found.group() == '(' else -1
    if depth == 0:
      return start + found.start()
  return len(text)


def shapes_of(text: str) -> tuple[Shape, ...]:
  """'(f32[2,3]{1,0:T(8,128)S(1)}, s32[])' -> its Shapes."""
  shapes = []
  for dtype, dims, layout in _SHAPE.findall(text):
    if dtype not in BYTES and dtype not in ('token', 'opaque', 'tuple'):
      continue
    order, _, rest = layout.partition(':')
    tile = re.match(r'T\(([\d,]+)\)', rest)
    space = re.search(r'S\((\d+)\)', rest)
    shapes.append(Shape(
        dtype, tuple(int(d.lstrip('<=')) for d in dims.split(',') if d),
        tuple(int(d) for d in order.split(',') if d.strip().isdigit()),
        tuple(int(d) for d in tile.group(1).split(',')) if tile else (),
        int(space.group(1)) if space else 0))
  return tuple(shapes)


def _aliases(header: str) -> dict[int, int]:
  pairs = re.findall(r'\{([\d, ]*)\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)', header)
  return {int(out.split(',')[0] or 0): int(parameter) for out, parameter in pairs}


# -- loops --------------------------------------------------------------------------------------


def trip_count(module: Module, condition: Computation, op: Op, parent: Computation) -> int | None:
  """How often the body of a while runs: `i < N`, i from its first value in steps of 1, as lax.scan
  and fori_loop write it. TPU text has no known_trip_count, text of other compilers may."""
  if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes):
    return int(found.group(1))
  compare, where = condition.root, condition
  arguments = {}
  if compare.kind == 'fusion' and module.called(compare):
    where = module.called(compare)[0]
    arguments = {p.name: condition.source(compare.operands[i])
                 for i, p in where.parameters.items()}
    compare = where.root
  if compare.kind != 'compare':
    return None
  bounds = []
  for name in compare.operands:
    value = where.source(name)
    value = arguments.get(value.name, value) if value is not None else None
    bounds.append(_first_value(value, op, parent))
  start, limit = bounds
  direction = compare.attribute('direction')
  if limit is None or direction not in ('LT', 'LE', 'GT', 'GE', 'NE'):
    return None
  start = start or 0
  if direction in ('GT', 'GE'):
    start, limit = limit, start
  return max(0, limit - start + (direction in ('LE', 'GE')))


def _first_value(value: Op | None, op: Op, parent: Computation) -> int | None:
  """The integer that a constant, or an element of the loop's first state, has."""
  if value is not None and value.kind == 'get-tuple-element':
    state = parent.source(op.operands[0])
    if state is None or state.kind != 'tuple':
      return None
    value = parent.source(state.operands[int(value.attribute('index'))])
  if value is None or value.kind != 'constant':
    return None
  found = re.match(r'(-?\d+)\)', value.attributes)
  return int(found.group(1)) if found else None


# -- FLOPs --------------------------------------------------------------------------------------


def products(module: Module, computation: Computation):
  """(op, its computation, how often) of each matrix product that one run of a computation does,
  insides of its fusions included, loops and calls not."""
  for op in computation.ops:
    if op.kind in ('convolution', 'dot'):
      yield op, computation
    elif op.kind in ('fusion', 'async-start'):
      for inner in module.called(op):
        yield from products(module, inner)


def product_flops(op: Op, computation: Computation) -> float:
  """2 x multiply-adds of a dot or convolution. Positions in padding or between dilated elements are
  not counted, as XLA's own HloCostAnalysis does it."""
  left, right = (computation.by_name[name].shapes[0] for name in op.operands[:2])
  out = op.shapes[0]
  if op.kind == 'dot':
    contracted = _numbers(op.attribute('lhs_contracting_dims'))
    return 2. * math.prod(out.dims) * math.prod(left.dims[i] for i in contracted)
  labels = op.attribute('dim_labels')
  lhs, _, rest = labels.partition('_')
  rhs, _, result = rest.partition('->')
  spatial = [c for c in result if c.isdigit()]
  window = _window(op.attribute('window'), len(spatial))
  positions = 1
  for i, axis in enumerate(spatial):
    positions *= _valid(left.dims[lhs.index(axis)], right.dims[rhs.index(axis)],
                        out.dims[result.index(axis)], *(window[k][i] for k in _WINDOW[1:]))
  groups = int(op.attribute('batch_group_count') or 1)
  features = right.dims[rhs.index('i')]              # already divided by feature_group_count
  return 2. * (left.dims[lhs.index('b')] // groups * out.dims[result.index('f')] * features
               * positions)


_WINDOW = ('size', 'stride', 'pad', 'lhs_dilate', 'rhs_dilate')


def _window(text: str, rank: int) -> dict[str, list]:
  """'{size=3x3 pad=1_1x1_1}' -> a value for each spatial axis of each field; pad: the low one."""
  found = {'size': [1] * rank, 'stride': [1] * rank, 'pad': [0] * rank,
           'lhs_dilate': [1] * rank, 'rhs_dilate': [1] * rank}
  for name, values in re.findall(r'(\w+)=([\d_x-]+)', text):
    if name in found:
      found[name] = [int(v.split('_')[0]) for v in values.split('x')]
  return found


@functools.lru_cache(maxsize=4096)
def _valid(n: int, kernel: int, out: int, stride: int, pad: int, dilate: int,
           spread: int) -> int:
  """Pairs of output position and kernel element that meet a real input element."""
  if n == kernel == out == 1:
    return 1
  last = (n - 1) * dilate
  count = 0
  for k in range(kernel):
    for o in range(out):
      at = o * stride + k * spread - pad
      count += 0 <= at <= last and at % dilate == 0
  return count


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]


# -- bytes --------------------------------------------------------------------------------------

_FREE = ('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional',
         'call', 'after-all', 'partition-id', 'replica-id', 'optimization-barrier')


def hbm_bytes(module: Module, op: Op, computation: Computation) -> float:
  """Bytes that a scheduled operation reads from and writes to HBM: what lies in VMEM is free, and
  of a buffer that a fusion slices or updates in place only that part counts."""
  if op.kind in _FREE or op.kind.endswith('-done'):
    return 0.
  if op.kind in ('copy-start', 'slice-start'):     # (result, source, …), ((source), result, …)
    ends = op.shapes[:2]
    return min(s.bytes for s in ends) * sum(s.space == 0 for s in ends)
  inner = module.inside(op)
  total = 0.
  for i, name in enumerate(op.operands):
    made = computation.by_name.get(name)
    if made is not None:
      total += _read(module, inner, i, made.hbm_bytes)
  if op.kind == 'dynamic-update-slice':
    update = computation.by_name.get(op.operands[1])
    return total + (update.bytes if update is not None and op.hbm_bytes else 0.)
  if inner is None or not op.hbm_bytes:
    return total + op.hbm_bytes
  roots = [inner.root.name]
  if inner.root.kind == 'tuple':
    roots = list(inner.root.operands)
  if len(roots) != len(op.shapes):
    return total + op.hbm_bytes
  return total + sum(_written(module, inner, root, shape.bytes)
                     for root, shape in zip(roots, op.shapes) if not shape.space)


def _read(module: Module, inner: Computation | None, number: int, whole: float) -> float:
  """Bytes of its operand `number`, of `whole` bytes, that a fusion with this inside reads."""
  if inner is None or number not in inner.parameters:
    return whole

  def by_users(name) -> float:
    total = 0.
    for user in inner.users.get(name, []):
      if user.kind in ('dynamic-slice', 'slice', 'gather'):
        total += user.bytes
      elif user.kind == 'dynamic-update-slice' and user.operands[0] == name:
        continue                                    # in place: only the update is written
      elif user.kind == 'tuple' and user.root:
        continue                                    # handed on as it is
      elif user.kind == 'bitcast':
        total += by_users(user.name)
      elif (nested := module.inside(user)) is not None:
        total += sum(_read(module, nested, i, whole)
                     for i, operand in enumerate(user.operands) if operand == name)
      else:
        return whole
    return total
  return min(whole, by_users(inner.parameters[number].name))


def _written(module: Module, inner: Computation, name: str, whole: float) -> float:
  """Bytes that a fusion writes of its result `name`, of `whole` bytes."""
  made = inner.source(name, through=('bitcast',))
  if made is None:
    return whole
  if made.kind == 'parameter':
    return 0.                                       # handed on as it is
  if made.kind == 'dynamic-update-slice':
    update = inner.by_name.get(made.operands[1])
    return update.bytes if update is not None else whole
  nested = module.inside(made)
  if nested is None or nested.root.kind == 'tuple':
    return whole
  return _written(module, nested, nested.root.name, whole)
