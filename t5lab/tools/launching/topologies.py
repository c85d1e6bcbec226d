"""TPU slices: parses 'v5e:4x4' or 'v5e:4x4*2' (two slices) into the names of Cloud TPU and GKE.

Accelerator types count chips for v5e and v6e, and TensorCores (two per chip) for v4 and v5p
[cloud.google.com/tpu/docs/v4, v5e, v5p, v6e]. Runtime versions are those for JAX
[cloud.google.com/tpu/docs/runtimes]. GKE's labels and chips per node
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
  cores: int           # per chip, as accelerator types count them
  dimensions: int      # of a topology
  runtime: str
  label: str           # cloud.google.com/gke-tpu-accelerator


GENERATIONS = {
    'v4': Generation('v4', 2, 3, 'tpu-ubuntu2204-base', 'tpu-v4-podslice'),
    'v5e': Generation('v5litepod', 1, 2, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice'),
    'v5p': Generation('v5p', 2, 3, 'v2-alpha-tpuv5', 'tpu-v5p-slice'),
    'v6e': Generation('v6e', 1, 2, 'v2-alpha-tpuv6e', 'tpu-v6e-slice'),
}
LARGEST_NODE = 8       # chips; single-host slices of v5e and v6e have 1, 4 or 8
CHIPS_PER_NODE = 4     # in a slice of several hosts
POD = 16               # the longest side of a slice of v5e or v6e


@dataclasses.dataclass(frozen=True)
class Machine:
  """`slices` slices of `shape` chips each."""
  kind: str            # a key of GENERATIONS
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    return f'{self.kind}:{self.topology}' + f'*{self.slices}' * (self.slices > 1)

  @property
  def topology(self) -> str:
    """The shape of one slice, e.g. '4x4'."""
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
    """The accelerator type of one slice, for `gcloud --accelerator-type`."""
    return f'{self.generation.prefix}-{self.slice_chips * self.generation.cores}'

  @property
  def chips_per_node(self) -> int:
    """The number of chips in each node of GKE."""
    largest = LARGEST_NODE if self.generation.dimensions == 2 else CHIPS_PER_NODE
    return self.slice_chips if self.slice_chips <= largest else CHIPS_PER_NODE

  @property
  def nodes(self) -> int:
    """The number of nodes of one slice on GKE."""
    return self.slice_chips // self.chips_per_node


def parse(text: str, cls=Machine):
  """Parses 'v5e:4x4', 'v5p:2x2x2' or 'v5e:16x16*2' (two slices) -> an instance of `cls`.

  Errors: UsageError, which lists the possible values.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)+)(?:\*([1-9]\d*))?', text.strip())
  if not match:
    raise UsageError(f'--topology {text!r} must be a chip, the shape of a slice and, for several '
                     'slices, their number, e.g. v5e:4x4, v5p:2x2x2, v6e:16x16, v5e:16x16*2')
  name, sizes, slices = match.groups()
  if name not in GENERATIONS:
    raise UsageError(f'--topology {text!r}: chip {name!r} is unknown.'
                     f'{did_you_mean(name, GENERATIONS)}')
  machine = cls(name, tuple(map(int, sizes.split('x'))), int(slices or 1))
  dimensions, chips = machine.generation.dimensions, machine.slice_chips
  if len(machine.shape) != dimensions or 0 in machine.shape:
    raise UsageError(f'--topology {text!r}: the shape of a {name} slice has {dimensions} sizes, '
                     f'e.g. {name}:{"4x4" if dimensions == 2 else "2x2x2"}')
  if dimensions == 2 and max(machine.shape) > POD:
    raise UsageError(f'--topology {text!r}: a pod of {name} has {POD}x{POD} chips; for more, use '
                     f'several slices, e.g. {name}:{POD}x{POD}*2')
  if chips > CHIPS_PER_NODE and chips % CHIPS_PER_NODE or chips in (2, 3):
    raise UsageError(f'--topology {text!r}: {chips} chips do not fit hosts of 1, 4 or 8 chips')
  return machine
