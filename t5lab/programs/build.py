"""The program that a config describes: mesh, model, optimizer and the train step, not yet compiled.

Everything here is shapes. Nothing is allocated before `Program.make_state`, so a Program may
describe a model that this machine could not hold, on devices that it does not have
(tools/planning/chips.py).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from t5lab import config, trees
from t5lab.errors import UsageError
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.programs import loading, shapes
from t5lab.training import digests, guards, lora, optim, steps
from t5lab.training.diagnosis import Diagnosis

# Options of the TPU compiler. This one turns collective matmul off: products whose result is
# scattered over fsdp would become loops of partial products and sends, and libtpu 0.0.42 computes
# each partial product twice, once in each of the two fusions that use half of it. That is 1.37
# times the FLOPs and 1.3 times the estimated time of a step of T5 1.1 base on v5e:4x4 with
# remat=dots. The value is a threshold in MiB that no array reaches.
TPU_OPTIONS = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


@dataclasses.dataclass(frozen=True)
class Program:
  """A training program.

  step(state, batch, base, guard) -> (state, guard, metrics), jitted. The new state and guard reuse
  the buffers of the old ones.
  abstract: the TrainState as ShapeDtypeStructs with shardings.
  batch, guard: the global batch and the Guard, likewise.
  base: the frozen weights under adapters, likewise; None without adapters.
  """
  config: Any
  mesh: jax.sharding.Mesh
  model: Transformer
  schedule: optax.Schedule
  tx: optax.GradientTransformation
  abstract: steps.TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  base: Any
  guard: guards.Guard
  guard_settings: guards.Settings
  step: Any

  def make_state(self, params=None) -> steps.TrainState:
    """The state at step 0, on its devices. Takes over `params`; None initializes from the seed."""
    c = self.config
    make = lambda p: steps.new_state(p, self.tx, c.optim.ema)
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    with sharding.use(self.mesh, c.rules):
      if params is None:
        return jax.jit(lambda: make(nn.unbox(init_params(c))), out_shardings=shardings)()
      return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)

  def load_initial(self) -> loading.Loaded:
    """The weights of init.path. Leaves that init.fresh allows to be missing come from the seed."""
    c = self.config
    return loading.load_base(c, shapes.boxed_params(c), self.mesh, self._fresh)

  def _fresh(self, paths) -> dict:
    """{path: array} of the model's parameters at these paths, from the seed."""
    def init():
      params = trees.flatten(nn.unbox(init_params(self.config)))
      return {path: params[path] for path in paths}
    with sharding.use(self.mesh, self.config.rules):
      return jax.jit(init)()

  def first_state(self, initial: loading.Loaded | None) -> steps.TrainState:
    """The state at step 0, from the seed or from the weights `initial`.

    The state takes `initial.params` over, unless adapters are trained on top of them.
    """
    c = self.config
    state = self.make_state(None if c.lora.rank or not initial else initial.params)
    if c.init.optimizer == 'restore' and initial:
      opt_state = loading.load_optimizer(c, self.abstract.opt_state, initial.step)
      state = state.replace(opt_state=opt_state)
    return state

  def make_guard(self, saved: dict | None = None) -> guards.Guard:
    """A Guard on the devices: a new one, or the one saved in a checkpoint's metadata."""
    return guards.place(guards.from_json(saved), sharding.replicated(self.mesh))

  def diagnosis(self) -> Diagnosis:
    return Diagnosis(self.mesh, model=self.model, **step_options(self.config))

  def lower(self) -> jax.stages.Lowered:
    """The lowered step, ready to compile, also for a mesh of devices that are only described."""
    with sharding.use(self.mesh, self.config.rules):
      return self.step.lower(self.abstract, self.batch, self.base, self.guard)


def program(c, devices=None) -> Program:
  """The Program of config `c` on `devices`, by default all of them.

  Errors: UsageError for sizes that do not divide over the mesh.
  """
  # Mesh and model.
  mesh = sharding.make_mesh(**c.mesh.to_dict(), devices=devices)
  model = Transformer(config.model_config(c), train=True)
  sharding.check_mesh(mesh, c.rules)
  _check_batch(c, mesh)
  sharding.check_heads(mesh, c.rules, model.config.n_heads, model.config.kv_heads)

  # Optimizer, and the state as shapes.
  o = c.optim
  schedule = optim.schedule(
      o.schedule,
      lr=o.lr,
      warmup=o.warmup,
      total=c.total_steps,
      end=o.lr * o.end_lr,
      decay_fraction=o.decay_fraction)
  tx = optim.optimizer(
      o.name, schedule, clip=o.clip, weight_decay=o.weight_decay, b1=o.b1, b2=o.b2, eps=o.eps)
  abstract = abstract_state(c, tx, mesh)

  # The step. Its metrics carry a digest of the batch, computed after the batch was placed.
  settings = guards.Settings(c.guard.policy, c.guard.patience, c.guard.spike)
  options = dict(settings=settings, model=model, tx=tx, ema=o.ema, **step_options(c))

  def train_step(state, batch, base, guard):
    state, guard, metrics = steps.guarded_step(state, batch, base, guard, **options)
    return state, guard, {**metrics, 'batch': digests.batch_digest(batch)}

  replicated = sharding.replicated(mesh)
  state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
  step = jax.jit(train_step, donate_argnums=(0, 3), compiler_options=compiler_options(mesh),
                 out_shardings=(state_shardings, replicated, replicated))

  # The shapes of its other arguments.
  batch = {}
  for name, x in shapes.batch_shapes(c).items():
    shape = (c.data.batch_size, *x.shape[1:])
    placed = sharding.batch_sharding(mesh, len(shape))
    batch[name] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=placed)
  base = None
  if c.lora.rank:
    base = shapes.with_shardings(shapes.boxed_params(c), mesh, c.rules)
  guard = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), guards.initial())

  return Program(
      config=c,
      mesh=mesh,
      model=model,
      schedule=schedule,
      tx=tx,
      abstract=abstract,
      batch=batch,
      base=base,
      guard=guard,
      guard_settings=settings,
      step=step)


def compiler_options(mesh) -> dict | None:
  """jax.jit's compiler_options for a train step on these devices."""
  return TPU_OPTIONS if mesh.devices.flat[0].platform == 'tpu' else None


def step_options(c) -> dict:
  """The options of steps.step_gradients, apart from the model."""
  return dict(
      loss=steps.Loss(**c.loss.to_dict()),
      seed=c.seed,
      microbatches=c.optim.microbatches,
      lora_scale=loading.lora_scale(c))


def init_params(c):
  """Boxed parameters from the seed: those of the whole model, or of the adapters alone."""
  if c.lora.rank:
    return lora.init(shapes.boxed_params(c), c.lora.kernels, c.lora.rank, c.seed)
  batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.batch_shapes(c).items()}
  return steps.init_params(Transformer(config.model_config(c)), c.seed, batch)


def parameter_rows(c) -> list[dict]:
  """The parameters (or adapters) of a config, one dict for each.

  path, shape, dtype, count; axes: the logical axes, one for each dimension; mesh_axes: for each
  dimension the mesh axes that the config's rules split it over.
  """
  rules = sharding.rule_set(c.rules)
  boxed = jax.eval_shape(functools.partial(init_params, c))
  rows = []
  for path, box in sharding.boxes(boxed).items():
    x = box.value
    spec = sharding.spec(box.names, rules)
    rows.append(dict(
        path=path,
        shape=list(x.shape),
        dtype=str(x.dtype),
        axes=list(box.names),
        count=x.size,
        mesh_axes=[list(sharding.mesh_axes(entry)) for entry in spec]))
  return rows


def abstract_state(c, tx, mesh) -> steps.TrainState:
  """The TrainState as ShapeDtypeStructs with shardings.

  The optimizer state and the average are sharded as sharding.like_params says.
  """
  boxed = jax.eval_shape(functools.partial(init_params, c))
  abstract = jax.eval_shape(lambda p: steps.new_state(p, tx, c.optim.ema), nn.unbox(boxed))
  like_params = functools.partial(sharding.like_params, boxed=boxed, mesh=mesh, rules=c.rules)
  shardings = steps.TrainState(
      step=sharding.replicated(mesh),
      params=sharding.shardings(boxed, mesh, c.rules),
      ema=like_params(abstract.ema),
      opt_state=like_params(abstract.opt_state))
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, abstract, shardings)


def _check_batch(c, mesh):
  devices = sharding.batch_devices(mesh)
  microbatch = c.data.batch_size // c.optim.microbatches
  for name, size in (('data.batch_size', c.data.batch_size),
                     ('data.batch_size / optim.microbatches', microbatch)):
    if size % devices:
      low = size // devices * devices
      nearest = f'{low} and {low + devices}' if low else devices
      raise UsageError(f'{name} = {size} is not a multiple of the {devices} devices that share the '
                       f'batch; the nearest that are: {nearest}')
