"""TPU chips: their speeds and sizes, and described devices for ahead-of-time compilation.

`Topology` is arithmetic. `devices` needs libtpu (the [tpu] extra), which describes chips that this
machine does not have.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os

from t5lab.errors import UsageError
from t5lab.tools.launching import topologies

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip. Bandwidths in bytes a second, memory in bytes.

  ici: of one physical axis, both directions together. dcn: a chip's share of its host's network.
  usable: the memory that the compiler gives to a program; the runtime has the rest.
  ring: the length from which an axis of a slice is closed to a ring.
  """
  name: str
  clock: float                 # Hz of the matrix unit, peak / (2 * its multipliers)
  peak: float                  # bfloat16 FLOP/s
  hbm: float
  usable: float
  hbm_bandwidth: float
  ici: float
  dcn: float
  ring: int


# Peaks, memory, bandwidths of HBM and ICI: the JAX scaling book, tpus.md (v4, v5e, v5p), and
# cloud.google.com/tpu/docs/v6e. Clock: peak / (2 * multipliers), v5e 4 units of 128 x 128, v4 and
# v5p 8, v6e 4 of 256 x 256. DCN: 25 GB/s a host of 4 (v4, v5p) or 8 chips (v5e), v6e 25.6 Tbit/s
# for 256 chips. Usable: the limit that libtpu 0.0.42 reports.
CHIPS = {chip.name: chip for chip in (
    Chip('v4', 1.05e9, 275e12, 32 * GIB, 30.75 * GIB, 1.2e12, 9e10, 6.25e9, ring=4),
    Chip('v5e', 1.503e9, 197e12, 16 * GIB, 15.75 * GIB, 8.1e11, 9e10, 3.125e9, ring=16),
    Chip('v5p', 1.75e9, 459e12, 96 * GIB, 95.74 * GIB, 2.8e12, 1.8e11, 6.25e9, ring=4),
    Chip('v6e', 1.75e9, 918e12, 32 * GIB, 31.25 * GIB, 1.6e12, 1.8e11, 1.25e10, ring=16),
)}
HOP = 1e-6                     # the least seconds of one step of a collective around its ring


@dataclasses.dataclass(frozen=True)
class Topology(topologies.Machine):
  """Slices together with the speeds of their chips."""

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  def is_ring(self, axis: int) -> bool:
    """True if the slice's physical axis is closed to a ring.

    On v5e and v6e an axis of 16 is. v4 and v5p join cubes of 4 by optical links: all axes are rings
    if each is a multiple of 4.
    """
    if len(self.shape) == 2:
      return self.shape[axis] >= self.chip.ring
    return all(n % self.chip.ring == 0 for n in self.shape)


parse = functools.partial(topologies.parse, cls=Topology)    # 'v5e:4x4', 'v5e:16x16*2' (two slices)


def versions() -> dict[str, str]:
  """Versions of the packages that determine the compiled program; '' if libtpu is missing."""
  versions = dict.fromkeys(('jax', 'jaxlib', 'flax', 'optax', 'libtpu'), '')
  for name in versions:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def has_compiler() -> bool:
  """True if libtpu is installed and T5LAB_NO_LIBTPU=1 does not hide it."""
  return (os.environ.get('T5LAB_NO_LIBTPU') != '1'
          and importlib.util.find_spec('libtpu') is not None)


def environment(topology: Topology) -> dict[str, str]:
  """Environment variables that a planning process has to set before jax starts."""
  flag = f'--xla_force_host_platform_device_count={topology.chips}'
  virtual = {} if has_compiler() else {
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()}
  return {
      **virtual,
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',                     # do not query the metadata server
      'TPU_ACCELERATOR_TYPE': topology.accelerator,
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',             # two planners may run at the same time
      # We read the partitioner's warnings, which libtpu prints only at this log level.
      'TF_CPP_MIN_LOG_LEVEL': '1', 'TPU_MIN_LOG_LEVEL': '1', 'TPU_STDERR_LOG_LEVEL': '1',
      'TPU_LOG_DIR': 'disabled',
  }


@functools.lru_cache
def devices(topology: Topology) -> tuple:
  """The described devices of a slice; UsageError for a shape that does not exist."""
  from jax.experimental.topologies import get_topology_desc
  options = {}
  if topology.kind == 'v4':
    options['chip_config_name'] = 'megacore'         # both cores as one device, as JAX runs it
  if topology.slices > 1:
    options['num_slices'] = topology.slices
  if topology.chips == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  name = f'{topology.kind}:{topology.topology}'
  try:
    return tuple(get_topology_desc(name, platform='tpu', **options).devices)
  except Exception as e:                             # jaxlib's own class is not public
    raise UsageError(f'--topology {topology.name}: the TPU compiler does not know this slice '
                     f'({" ".join(str(e).split())[:160]})') from e
