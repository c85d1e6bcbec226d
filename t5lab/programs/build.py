"""The program that a config describes: mesh, model, optimizer, and the train step, uncompiled.

Shapes only: nothing is allocated before `make_state`, so it may describe a model that no machine
here could hold, on devices that are not there (tools/planning/topology.py).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from t5lab import config as configs
from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.programs import loading
from t5lab.training import digests, guards, lora, optim, steps
from t5lab.training.diagnosis import Diagnosis

# Of the TPU's compiler. Products whose result is scattered over fsdp would become loops of partial
# products and sends (collective matmul), each of which libtpu 0.0.42 computes twice, once for each
# of two fusions that use half of it: 1.37 times the FLOPs and 1.3 times the estimated time of the
# step of T5 1.1 base on v5e:4x4 with remat=dots. Nothing is larger than this many MiB.
TPU_OPTIONS = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


@dataclasses.dataclass(frozen=True)
class Program:
  """What runs. step(state, batch, base, guard) -> (state, guard, metrics), jitted; the new state
  and guard take the buffers of the old ones.

  abstract: the TrainState as shapes with shardings. base: frozen weights likewise, None without
  adapters. batch, guard: the global batch and training/guards.py's Guard likewise.
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
  judged_by: guards.Settings
  step: Any

  def make_state(self, params=None) -> steps.TrainState:
    """The state of step 0, on its devices: from parameters, which it takes over, or the seed."""
    c = self.config
    make = lambda p: steps.new_state(p, self.tx, c.optim.ema)
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    with sharding.use(self.mesh, c.rules):
      if params is None:
        return jax.jit(lambda: make(nn.unbox(init_params(c))), out_shardings=shardings)()
      return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)

  def load_initial(self) -> loading.Loaded:
    """The weights of init.path; what it lacks and may lack comes from the seed."""
    c = self.config
    return loading.load_base(c, loading.boxed_params(c), self.mesh,
                             functools.partial(fresh, c, self.mesh))

  def first_state(self, initial: loading.Loaded | None) -> steps.TrainState:
    """The state of step 0: from the seed, or from weights, which it takes over unless adapters are
    trained on them."""
    c = self.config
    state = self.make_state(None if c.lora.rank or not initial else initial.params)
    if c.init.optimizer == 'restore' and initial:
      state = state.replace(opt_state=loading.load_optimizer(
          c, self.abstract.opt_state, initial.step))
    return state

  def make_guard(self, saved: dict | None = None) -> guards.Guard:
    """That of step 0, or what a checkpoint's meta holds of one."""
    return guards.place(guards.from_json(saved), sharding.replicated(self.mesh))

  def diagnosis(self) -> Diagnosis:
    return Diagnosis(self.mesh, model=self.model, **_step_options(self.config))

  def lower(self) -> jax.stages.Lowered:
    """The step for `mesh`, ready to compile; also for a mesh of devices that are only described."""
    with sharding.use(self.mesh, self.config.rules):
      return self.step.lower(self.abstract, self.batch, self.base, self.guard)


def build(c, devices=None) -> Program:
  """The program of config c on `devices` (all there are). UsageError for what does not divide."""
  mesh = sharding.make_mesh(**c.mesh.to_dict(), devices=devices)
  sharding.check_mesh(mesh, c.rules)
  _check_batch(c, mesh)
  shape = configs.model_config(c)
  sharding.check_heads(mesh, c.rules, shape.n_heads, shape.kv_heads)
  o = c.optim
  schedule = optim.schedule(o.schedule, lr=o.lr, warmup=o.warmup, total=c.total_steps,
                            end=o.lr * o.end_lr, decay_fraction=o.decay_fraction)
  tx = optim.optimizer(o.name, schedule, clip=o.clip, weight_decay=o.weight_decay, b1=o.b1,
                       b2=o.b2, eps=o.eps)
  model = Transformer(shape, train=True)
  abstract = state_shapes(c, tx, mesh)
  alone = sharding.replicated(mesh)
  judged_by = guards.Settings(c.guard.policy, c.guard.patience, c.guard.spike)
  guarded = functools.partial(steps.guarded_step, settings=judged_by, model=model, tx=tx,
                              ema=o.ema, **_step_options(c))

  def train_step(state, batch, base, guard):
    state, guard, metrics = guarded(state, batch, base, guard)
    return state, guard, {**metrics, 'batch': digests.batch_digest(batch)}

  step = jax.jit(train_step, donate_argnums=(0, 3), compiler_options=compiler_options(mesh),
                 out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), alone, alone))
  batch = {k: jax.ShapeDtypeStruct((c.data.batch_size, *x.shape[1:]), x.dtype,
                                   sharding=sharding.batch_sharding(mesh, len(x.shape)))
           for k, x in loading.batch_shapes(c).items()}
  base = loading.placed(loading.boxed_params(c), mesh, c.rules) if c.lora.rank else None
  guard = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone),
                       guards.initial())
  return Program(c, mesh, model, schedule, tx, abstract, batch, base, guard, judged_by, step)


def compiler_options(mesh) -> dict | None:
  """Of a training step on these devices, for jax.jit."""
  return TPU_OPTIONS if mesh.devices.flat[0].platform == 'tpu' else None


def _step_options(c) -> dict:
  return dict(loss=steps.Loss(**c.loss.to_dict()), seed=c.seed,
              microbatches=c.optim.microbatches, lora_scale=loading.lora_scale(c))


def init_params(c):
  """Boxed parameters from the seed: of the whole model, or of the adapters."""
  if c.lora.rank:
    return lora.init(loading.boxed_params(c), c.lora.kernels, c.lora.rank, c.seed)
  batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in loading.batch_shapes(c).items()}
  return steps.init_params(Transformer(configs.model_config(c)), c.seed, batch)


def fresh(c, mesh, paths):
  """{path: array} of the whole model's parameters at these paths, from the seed."""
  with sharding.use(mesh, c.rules):
    return jax.jit(lambda: {path: x for path, x in trees.flatten(nn.unbox(init_params(c))).items()
                            if path in paths})()


def state_shapes(c, tx, mesh) -> steps.TrainState:
  """The TrainState as shapes with shardings; optimizer state and average lie as the parameters, or
  better (sharding.like_params)."""
  boxed = jax.eval_shape(functools.partial(init_params, c))
  params = nn.unbox(boxed)
  placed = sharding.shardings(boxed, mesh, c.rules)
  abstract = jax.eval_shape(lambda p: steps.new_state(p, tx, c.optim.ema), params)
  spread = functools.partial(sharding.like_params, boxed=boxed, mesh=mesh, rules=c.rules)
  shardings = steps.TrainState(step=sharding.replicated(mesh), params=placed,
                               ema=spread(abstract.ema), opt_state=spread(abstract.opt_state))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      abstract, shardings)


def _check_batch(c, mesh):
  micro = c.data.batch_size // c.optim.microbatches
  for name, size in (('data.batch_size', c.data.batch_size),
                     ('data.batch_size / optim.microbatches', micro)):
    if size % (spread := sharding.batch_devices(mesh)):
      raise UsageError(f'{name} = {size} is not a multiple of the {spread} devices of the data '
                       f'axis; the nearest that are: {_nearest(size, spread)}')


def _nearest(size, divisor) -> str:
  low = size // divisor * divisor
  return f'{low} and {low + divisor}' if low else str(divisor)
