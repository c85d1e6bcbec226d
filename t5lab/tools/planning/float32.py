"""Matrix products in float32 where a config says bfloat16, before the compiler changes them."""

import dataclasses
import re

from t5lab.tools.planning import hlo

# What the design computes in float32: logits and their gradients, routers and their statistics,
# heads of a few classes, and gradients of attention scores, which come out of a float32 softmax.
MEANT = (r'unembed', r'/logits/', r'/moe/(?:dot_general|transpose|moe\._sow)', r'moe\._sow',
         r'classifier', r'\bnsp\b|next_logits', r'->BKGTS/', r'->BnNqk/', r'->BnNqP/')


@dataclasses.dataclass(frozen=True)
class Product:
  op_name: str
  shapes: tuple[str, ...]
  where: str                   # 'models/layers.py:65' of this package; '' where unknown

  def __str__(self):
    return f'{self.op_name} {" x ".join(self.shapes)}' + f' ({self.where})' * bool(self.where)


def find(text: str, allowed: tuple[str, ...] = ()) -> list[Product]:
  """Products with two float32 operands in a lowered program's HLO text with debug information, but
  for those that are meant and those whose op name one of `allowed` matches."""
  module, frames = hlo.parse(text), _frames(text)
  found = {}
  for computation in module.computations.values():
    for op in computation.ops:
      if op.kind not in ('dot', 'convolution'):
        continue
      shapes = [computation.by_name[name].shapes[0] for name in op.operands[:2]]
      if any(s.dtype != 'f32' for s in shapes):
        continue
      if any(re.search(pattern, op.op_name) for pattern in (*MEANT, *allowed)):
        continue
      frame = re.search(r'stack_frame_id=(\d+)', op.attributes)
      product = Product(op.op_name, tuple(map(str, shapes)),
                        _place(frames, int(frame.group(1)) if frame else 0))
      found[product] = True
  return list(found)


def _frames(text: str) -> dict[int, tuple[str, int, int]]:
  """{stack frame: (file, line, parent frame)} from the tables at the head of the text."""
  part = lambda name: re.search(rf'^{name}\n((?:\d+ .*\n)*)', text, re.M)
  table = lambda name: dict(re.findall(r'^(\d+) (.*)$', part(name).group(1), re.M)) if part(
      name) else {}
  files, places, frames = table('FileNames'), table('FileLocations'), table('StackFrames')
  field = lambda row, name: int((re.search(rf'{name}=(\d+)', row) or [0, 0])[1])
  found = {}
  for number, row in frames.items():
    place = places.get(str(field(row, 'file_location_id')), '')
    found[int(number)] = (files.get(str(field(place, 'file_name_id')), '').strip('"'),
                          field(place, 'line'), field(row, 'parent_frame_id'))
  return found


def _place(frames, number: int) -> str:
  """The innermost frame inside this package that is no helper of sharding."""
  last = ''
  for _ in range(100):
    file, line, parent = frames.get(number, ('', 0, 0))
    if '/t5lab/' in file:
      last = f'{file.rpartition("/t5lab/")[2]}:{line}'
      if not last.startswith('parallel/sharding.py'):
        return last
    if not file or parent == number or not parent:
      break
    number = parent
  return last
