"""A parser for scheduled HLO text: computations, operations, shapes, and trip counts of loops.

The text is the only place that has the compiler's own estimate of each fusion
("estimated_cycles"). XLA's FLOP counter counts the body of a loop once; `Module.executed` tells how
often each computation runs.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

BYTES = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2,
         'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8,
         'f64': 8, 'c64': 8, 'c128': 16}
# Operations that return their operand's value, perhaps in another layout, type or memory.
_SAME_VALUE = ('copy', 'bitcast', 'convert', 'copy-done', 'copy-start')


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
    """Bytes of the buffer, whose last dimensions are padded to whole tiles."""
    dims = list(self.dims)
    for size, axis in zip(reversed(self.tile), self.order):
      dims[axis] = -(-dims[axis] // size) * size
    return BYTES.get(self.dtype, 0) * math.prod(dims)

  def __str__(self):
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation. shapes: its result, or the leaves of a tuple."""
  name: str
  kind: str                              # the opcode
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str                        # the rest of the line
  root: bool

  @functools.cached_property
  def cycles(self) -> int | None:
    """The compiler's estimate, or None."""
    cycles = find(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(cycles) if cycles else None

  @functools.cached_property
  def op_name(self) -> str:
    """The origin of the operation, e.g. jit(train_step)/…/mlp/wi_0/dot_general."""
    return find(r'op_name="([^"]*)"', self.attributes)

  @functools.cached_property
  def calls(self) -> str:
    """The name of the computation that a fusion, call or async operation runs once, or ''."""
    return find(r'(?:calls|to_apply)=%?([\w.-]+)', self.attributes)

  def attribute(self, name: str) -> str:
    """The text of `name=…`, braces included; '' if the operation does not have it."""
    return find(rf'[ ,]{name}=({_VALUE})', self.attributes)

  @property
  def bytes(self) -> float:
    return sum(shape.bytes for shape in self.shapes)

  @property
  def hbm_bytes(self) -> float:
    return sum(shape.bytes for shape in self.shapes if shape.space == 0)


@dataclasses.dataclass
class Computation:
  name: str
  ops: list[Op]                          # in scheduled order

  @functools.cached_property
  def by_name(self) -> dict[str, Op]:
    return {op.name: op for op in self.ops}

  @functools.cached_property
  def root(self) -> Op:
    return next((op for op in self.ops if op.root), self.ops[-1])

  @functools.cached_property
  def results(self) -> tuple[str, ...]:
    """Names of the results: the operands of a root tuple, otherwise the root."""
    return self.root.operands if self.root.kind == 'tuple' else (self.root.name,)

  @functools.cached_property
  def parameters(self) -> dict[int, Op]:
    return {int(op.attributes.partition(')')[0]): op for op in self.ops if op.kind == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Op]]:
    users = {}
    for op in self.ops:
      for operand in op.operands:
        users.setdefault(operand, []).append(op)
    return users

  def source(self, name: str, through=_SAME_VALUE) -> Op | None:
    """The operation that computes a value, skipping the kinds in `through` and tuple elements."""
    op = self.by_name.get(name)
    while op is not None and op.kind in (*through, 'get-tuple-element'):
      name = op.operands[0]
      if op.kind == 'get-tuple-element':
        name = self.element(name, op)
        if name is None:
          return op
      op = self.by_name.get(name)
    return op

  def element(self, name: str, get: Op) -> str | None:
    """The element of the tuple `name` that a get-tuple-element takes; None if it is not known."""
    source = self.source(name)
    if source is None or source.kind != 'tuple':
      return None
    return source.operands[int(get.attribute('index'))]


@dataclasses.dataclass
class Module:
  """computations by name; aliases: {output number: parameter number} of donated buffers."""
  computations: dict[str, Computation]
  entry: Computation
  aliases: dict[int, int]

  def called(self, op: Op) -> list[Computation]:
    """The computation of a fusion, call or async operation, or the branches of a conditional."""
    names = [op.calls]
    if op.kind == 'conditional':
      names = _NAME.findall(op.attribute('branch_computations')) or [
          op.attribute(f'{side}_computation').lstrip('%') for side in ('true', 'false')]
    return [self.computations[name] for name in names if name in self.computations]

  def inside(self, op: Op) -> Computation | None:
    """The computation of a fusion; None for any other operation."""
    return next(iter(self.called(op)), None) if op.kind == 'fusion' else None

  def loop(self, op: Op, parent: Computation) -> tuple[Computation, int | None]:
    """The body of a while and its trip count, None if the condition does not give one."""
    body = self.computations[op.attribute('body').lstrip('%')]
    condition = self.computations[op.attribute('condition').lstrip('%')]
    return body, _trip_count(self, condition, op, parent)

  def executed(self) -> Iterator[tuple[Computation, int, tuple[Op, ...]]]:
    """Yields (computation, runs in a step, enclosing loops) for each scheduled computation.

    These are the entry, loop bodies, calls and branches, but not the insides of fusions.
    """
    def visit(computation, times, loops):
      yield computation, times, loops
      for op in computation.ops:
        if op.kind == 'while':
          body, trips = self.loop(op, computation)
          yield from visit(body, times * (trips or 1), (*loops, op))
        elif op.kind in ('call', 'conditional'):   # only one branch runs: an upper bound
          for called in self.called(op):
            yield from visit(called, times, loops)
    yield from visit(self.entry, 1, ())


# --- parsing -----------------------------------------------------------------------------------

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{\s*$', re.M)
_OP = re.compile(r'\s+(ROOT )?%?([\w.-]+) = (.*)$')
_NAME = re.compile(r'%([\w.-]+)')
_SHAPE = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?')
# The value of an attribute: {a={b}}, [2,8]<=[4,4]T(1,0), or anything up to a comma.
_VALUE = r'\{(?:[^{}]|\{[^{}]*\})*\}|\[[\d,]+\](?:<=\[[\d,]+\](?:T\([\d,]+\))?)?|[^\s,]+'


def parse(text: str) -> Module:
  """HLO text -> Module. ValueError if it has no entry computation."""
  computations, entry = {}, None
  for block in text.split('\n}'):
    if match := _COMPUTATION.search(block):
      is_entry, name = match.groups()
      ops = map(_parse_op, block[match.end():].split('\n'))
      computations[name] = Computation(name, [op for op in ops if op])
      entry = computations[name] if is_entry else entry
  if entry is None:
    raise ValueError('HLO text without an ENTRY computation')
  header = text.partition('\n')[0]
  pairs = re.findall(r'\{([\d, ]*)\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)', header)
  aliases = {int(output.split(',')[0] or 0): int(parameter) for output, parameter in pairs}
  return Module(computations, entry, aliases)


def _parse_op(line: str) -> Op | None:
  """'  ROOT %name = f32[2]{0} add(%a, %b), metadata={…}' -> Op."""
  match = _OP.match(line)
  if not match:
    return None
  root, name, rest = match.groups()
  end = _closing(rest) + 1 if rest.startswith('(') else rest.find(' ')
  shapes = parse_shapes(rest[:end])
  kind, _, arguments = rest[end:].strip().partition('(')
  if kind in ('parameter', 'constant'):    # the argument is a number or a value
    return Op(name, kind, shapes, (), arguments, bool(root))
  close = _closing('(' + arguments) - 1
  inside = arguments[:close]
  operands = _NAME.findall(inside)
  if '%' not in inside:                    # before the compiler's passes names have no %
    operands = re.findall(r'([\w.-]+)(?:,|$)', re.sub(r'\{[^}]*\}|/\*.*?\*/', '', inside))
  return Op(name, kind, shapes, tuple(operands), arguments[close + 1:], bool(root))


def _closing(text: str) -> int:
  """The index of the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match.group() == '(' else -1
    if depth == 0:
      return match.start()
  return len(text)


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """'(f32[2,3]{1,0:T(8,128)S(1)}, s32[])' -> its Shapes."""
  shapes = []
  for dtype, dims, layout in _SHAPE.findall(text):
    if dtype not in BYTES and dtype not in ('token', 'opaque', 'tuple'):
      continue
    order, _, rest = layout.partition(':')
    tile, space = find(r'^T\(([\d,]+)\)', rest), find(r'S\((\d+)\)', rest)
    shapes.append(Shape(dtype, ints(dims), ints(order), ints(tile), int(space or 0)))
  return tuple(shapes)


def find(pattern: str, text: str) -> str:
  """The first group of the first match of a regex; '' without a match."""
  match = re.search(pattern, text)
  return match.group(1) if match else ''


def ints(text: str) -> tuple[int, ...]:
  """'8,128' -> (8, 128)."""
  return tuple(map(int, re.findall(r'\d+', text)))


# --- trip counts -------------------------------------------------------------------------------


def _trip_count(module: Module, condition: Computation, op: Op, parent: Computation) -> int | None:
  """How often the body of a while runs, None if the condition is not recognized.

  Recognizes `i < N`, with i counted up by 1 from its initial value, which is what lax.scan and
  fori_loop generate. Text of compilers other than the TPU's may have known_trip_count.
  """
  if trips := find(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes):
    return int(trips)

  # The comparison may be fused; its parameters are then operands of the fusion.
  compare, inner = condition.root, condition
  arguments = {}
  if fused := module.inside(compare):
    inner = fused
    arguments = {parameter.name: condition.source(compare.operands[i])
                 for i, parameter in inner.parameters.items()}
    compare = inner.root
  if compare.kind != 'compare':
    return None

  bounds = []
  for name in compare.operands:
    value = inner.source(name)
    if value is not None:
      value = arguments.get(value.name, value)
    bounds.append(_initial_value(value, op, parent))
  start, limit = bounds
  direction = compare.attribute('direction')
  if limit is None or direction not in ('LT', 'LE', 'GT', 'GE', 'NE'):
    return None
  start = start or 0
  if direction in ('GT', 'GE'):
    start, limit = limit, start
  return max(0, limit - start + (direction in ('LE', 'GE')))


def _initial_value(value: Op | None, loop: Op, parent: Computation) -> int | None:
  """The integer of a constant, or of an element of the loop's initial state."""
  if value is not None and value.kind == 'get-tuple-element':
    value = parent.source(parent.element(loop.operands[0], value) or '')
  if value is None or value.kind != 'constant':
    return None
  number = find(r'^(-?\d+)\)', value.attributes)
  return int(number) if number else None
