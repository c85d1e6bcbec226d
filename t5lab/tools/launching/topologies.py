"""TPU slices: 'v5e:4x4', or two of them, 'v5e:4x4*2' -> what Cloud TPU and GKE call it.

Accelerator types count chips for v5e and v6e and TensorCores, two a chip, for v4 and v5p
[cloud.google.com/tpu/docs/v4, v5e, v5p, v6e]. Runtime versions are those for JAX
[cloud.google.com/tpu/docs/runtimes]. GKE's labels and chips a node
[cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus]. Read 2026-11. TPU7x is not in the
Cloud TPU API.
"""

import dataclasses
import math
import re

from t5lab.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Generation:
  prefix: str          # of accelerator types
  cores: int           # that a type counts, a chip
  dimensions: int      # of a topology
  runtime: str
  label: str           # cloud.google.com/gke-tpu-accelerator


GENERATIONS = {
    'v4': Generation('v4', 2, 3, 'tpu-ubuntu2204-base', 'tpu-v4-podslice'),
    'v5e': Generation('v5litepod', 1, 2, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice'),
    'v5p': Generation('v5p', 2, 3, 'v2-alpha-tpuv5', 'tpu-v5p-slice'),
    'v6e': Generation('v6e', 1, 2, 'v2-alpha-tpuv6e', 'tpu-v6e-slice'),
}
LARGEST_NODE = 8       # chips; the single-host machines of v5e and v6e have 1, 4 or 8
CHIPS_A_NODE = 4       # of a slice of several hosts
POD = 16               # the largest side of a slice of v5e and v6e


@dataclasses.dataclass(frozen=True)
class Machine:
  """`slices` slices of `shape` chips each, of a generation."""
  kind: str            # a key of GENERATIONS
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f'{self.kind}:{self.topology}' + f'*{self.slices}' * (self.slices > 1)

  @property
  def topology(self) -> str:
    """Of one slice, as '4x4'."""
    return 'x'.join(map(str, self.shape))

  @property
  def generation(self) -> Generation:
    return GENERATIONS[self.kind]

  @property
  def chips(self) -> int:
    return self.slice_chips * self.slices

  @property
  def slice_chips(self) -> int:
    return math.prod(self.shape)

  @property
  def accelerator(self) -> str:
    """A slice, as `gcloud --accelerator-type` wants it."""
    return f'{self.generation.prefix}-{self.slice_chips * self.generation.cores}'

  @property
  def chips_a_node(self) -> int:
    """On GKE."""
    flat = self.generation.dimensions == 2
    largest = LARGEST_NODE if flat else CHIPS_A_NODE
    return self.slice_chips if self.slice_chips <= largest else CHIPS_A_NODE

  @property
  def nodes(self) -> int:
    """Of one slice, on GKE."""
    return self.slice_chips // self.chips_a_node


def parse(text: str, made=Machine):
  """'v5e:4x4', 'v5p:2x2x2', 'v5e:16x16*2' (two slices) -> Machine; UsageError says what there
  is."""
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)+)(?:\*([1-9]\d*))?', text.strip())
  if not found:
    raise UsageError(f'--topology {text!r}: a chip, the sizes of a slice and, for several, how '
                     'many: v5e:4x4, v5p:2x2x2, v6e:16x16, v5e:16x16*2')
  name, sizes, slices = found.groups()
  if name not in GENERATIONS:
    raise UsageError(f'--topology {text!r}: no chip {name!r}.{did_you_mean(name, GENERATIONS)}')
  machine = made(name, tuple(map(int, sizes.split('x'))), int(slices or 1))
  dimensions, chips = machine.generation.dimensions, machine.slice_chips
  if len(machine.shape) != dimensions or 0 in machine.shape:
    raise UsageError(f'--topology {text!r}: slices of {name} have {dimensions} sizes, as '
                     + {2: f'{name}:4x4', 3: f'{name}:2x2x2'}[dimensions])
  if dimensions == 2 and max(machine.shape) > POD:
    raise UsageError(f'--topology {text!r}: a pod of {name} is {POD}x{POD}; more chips are more '
                     f'slices, {name}:{POD}x{POD}*2')
  if chips > CHIPS_A_NODE and chips % CHIPS_A_NODE or chips in (2, 3):
    raise UsageError(f'--topology {text!r}: {chips} chips; hosts have 1, 4 or 8')
  return machine
