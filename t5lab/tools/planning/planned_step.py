"""A train or decode step on described devices, before it is compiled."""

import dataclasses
import functools

import jax

from t5lab import config
from t5lab.models.families import TransformerConfig
from t5lab.parallel import sharding
from t5lab.programs import build
from t5lab.tools.planning import chips, decode, flops, memory


@dataclasses.dataclass(frozen=True)
class PlannedStep:
  """A step and its known sizes.

  rows, enc, dec: rows of the global batch, and the positions of each; steps: of the whole run, 0
  for decoding.
  """
  config: object
  topology: chips.Topology
  program: build.Program | decode.DecodeStep
  tensors: list[memory.Tensor]   # the arguments of the step
  rows: int
  enc: int
  dec: int
  steps: int
  flops: float                   # model FLOPs of one step, all chips

  @functools.cached_property
  def model(self) -> TransformerConfig:
    return config.model_config(self.config)

  @property
  def mesh(self):
    return self.program.mesh

  def shards(self, logical_axis: str) -> int:
    """The number of shards of a logical axis under the config's rules."""
    rules = sharding.rule_set(self.config.rules)
    return sharding.num_shards(self.mesh.shape, rules.get(logical_axis))

  @property
  def decodes(self) -> bool:
    return isinstance(self.program, decode.DecodeStep)

  @property
  def tokens(self) -> int:
    """Positions of inputs and targets in a step, or the new tokens of a decode step."""
    return self.rows if self.decodes else self.rows * (self.enc + self.dec)

  @property
  def chip_flops(self) -> float:
    return self.flops / self.topology.chips


def describe(c, topology: chips.Topology, decodes: bool = False) -> PlannedStep:
  """The step of config c. UsageError if something does not divide."""
  m, devices = config.model_config(c), _devices(topology)
  if decodes:
    step = decode.build(c, devices)
    tensors = memory.tensors(params=step.params, cache=step.cache)
    work = flops.decode_step_flops(m, step.rows, step.memory, step.length)
    return PlannedStep(c, topology, step, tensors, step.rows, step.memory, 1, 0, work)

  program = build.program(c, devices)
  state, batch, rows = program.abstract, program.batch, c.data.batch_size
  tensors = memory.tensors(params=state.params, opt_state=state.opt_state, ema=state.ema,
                           base=program.base, batch=batch)
  enc, dec = (batch[feature].shape[1] if feature in batch else 0
              for feature in ('encoder_input_tokens', 'decoder_input_tokens'))
  passes = 2. if c.lora.rank else 3.       # frozen weights have no gradients
  work = passes * flops.row_flops(m, enc, dec).forward * rows
  return PlannedStep(c, topology, program, tensors, rows, enc, dec, c.total_steps, work)


def _devices(topology: chips.Topology) -> list:
  """Described TPU devices, or as many virtual CPU devices if there is no TPU compiler."""
  if chips.has_compiler():
    return list(chips.devices(topology))
  devices = jax.devices('cpu')
  if len(devices) < topology.chips:
    raise RuntimeError(f'{topology.name} needs {topology.chips} CPU devices, got {len(devices)}: '
                       'set chips.environment before jax starts')
  return devices[:topology.chips]


def mesh_text(sizes) -> str:
  """{'data': 1, 'fsdp': 4} -> 'fsdp=4'."""
  return ' '.join(f'{axis}={n}' for axis, n in sizes.items() if n > 1) or 'one device'
