"""TPU slices: 'v5e:4x4' -> what Cloud TPU and GKE call it.

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


@dataclasses.dataclass(frozen=True)
class Slice:
  generation: Generation
  topology: str        # '4x4'
  chips: int

  @property
  def accelerator(self) -> str:
    """As `gcloud --accelerator-type` wants it."""
    return f'{self.generation.prefix}-{self.chips * self.generation.cores}'

  @property
  def chips_a_node(self) -> int:
    """On GKE."""
    flat = self.generation.dimensions == 2
    return self.chips if self.chips <= (LARGEST_NODE if flat else CHIPS_A_NODE) else CHIPS_A_NODE

  @property
  def nodes(self) -> int:
    """On GKE."""
    return self.chips // self.chips_a_node


def parse(text: str) -> Slice:
  """'v5e:4x4' -> Slice; UsageError names the known ones."""
  name, _, topology = text.partition(':')
  if name not in GENERATIONS:
    raise UsageError(f'--topology {text!r}: no TPU {name!r}.{did_you_mean(name, GENERATIONS)}')
  generation = GENERATIONS[name]
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)+', topology) or \
      topology.count('x') + 1 != generation.dimensions:
    example = 'x'.join(['2'] * generation.dimensions)
    raise UsageError(f'--topology {text!r}: a slice of {name} has {generation.dimensions} '
                     f'dimensions, as {name}:{example}')
  chips = math.prod(int(n) for n in topology.split('x'))
  if chips > CHIPS_A_NODE and chips % CHIPS_A_NODE or chips in (2, 3):
    raise UsageError(f'--topology {text!r}: {chips} chips; hosts have 1, 4 or 8')
  return Slice(generation, topology, chips)
