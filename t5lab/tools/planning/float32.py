"""Float32 matrix products in a bfloat16 model, found in the program as lowered by JAX."""

import dataclasses
import re

from t5lab.tools.planning import hlo

# Op names that are float32 by design: logits and their gradients, routers and their statistics,
# heads of a few classes, and gradients of attention scores, which come out of a float32 softmax.
EXPECTED = (r'unembed', r'/logits/', r'/moe/(?:dot_general|transpose|moe\._sow)', r'moe\._sow',
            r'classifier', r'\bnsp\b|next_logits', r'->BKGTS/', r'->BnNqk/', r'->BnNqP/')


@dataclasses.dataclass(frozen=True)
class Product:
  op_name: str
  shapes: tuple[str, ...]
  where: str                   # e.g. 'models/layers.py:65', in this package; '' if unknown

  def __str__(self):
    where = f' ({self.where})' if self.where else ''
    return f'{self.op_name} {" x ".join(self.shapes)}{where}'


def unexpected_products(text: str, allowed: tuple[str, ...] = ()) -> list[Product]:
  """Finds products of two float32 operands in a lowered program's HLO text with debug information.

  Leaves out op names that match EXPECTED or a pattern of `allowed`.
  """
  products = {}                            # as an ordered set
  frames = _parse_frames(text)
  for computation in hlo.parse(text).computations.values():
    for op in computation.ops:
      if op.kind not in ('dot', 'convolution'):
        continue
      shapes = [computation.by_name[name].shapes[0] for name in op.operands[:2]]
      expected = any(re.search(pattern, op.op_name) for pattern in (*EXPECTED, *allowed))
      if expected or any(shape.dtype != 'f32' for shape in shapes):
        continue
      where = _source_line(frames, hlo.find(r'stack_frame_id=(\d+)', op.attributes))
      products[Product(op.op_name, tuple(map(str, shapes)), where)] = True
  return list(products)


def _parse_frames(text: str) -> dict[str, tuple[str, str, str]]:
  """{stack frame: (file, line, parent frame)} from the tables at the start of the text."""
  def table(name: str) -> list[tuple[str, str]]:
    return re.findall(r'^(\d+) (.*)$', hlo.find(rf'(?m)^{name}\n((?:\d+ .*\n)*)', text), re.M)

  files = dict(table('FileNames'))
  locations = {number: (files.get(hlo.find(r'file_name_id=(\d+)', location), '').strip('"'),
                        hlo.find(r'line=(\d+)', location))
               for number, location in table('FileLocations')}
  return {number: (*locations.get(hlo.find(r'file_location_id=(\d+)', frame), ('', '')),
                   hlo.find(r'parent_frame_id=(\d+)', frame))
          for number, frame in table('StackFrames')}


def _source_line(frames, number: str) -> str:
  """The innermost frame in this package outside the sharding helpers, as 'file:line'."""
  innermost = ''
  for _ in range(100):
    file, line, parent = frames.get(number, ('', '', ''))
    if '/t5lab/' in file:
      innermost = f'{file.rpartition("/t5lab/")[2]}:{line}'
      if not innermost.startswith('parallel/sharding.py'):
        return innermost
    if not file or parent == number:
      break
    number = parent
  return innermost
