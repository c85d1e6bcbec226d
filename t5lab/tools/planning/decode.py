"""The decode step as a program to compile: one token for each row, with full caches."""

import dataclasses

import jax
import jax.numpy as jnp

from t5lab import config
from t5lab.errors import UsageError
from t5lab.models.cache import decoding
from t5lab.parallel import sharding
from t5lab.programs import shapes


@dataclasses.dataclass(frozen=True)
class DecodeStep:
  """rows: of the global batch; length, memory: positions of the decoder and of the encoder."""
  mesh: jax.sharding.Mesh
  rules: str
  params: dict
  cache: dict
  rows: int
  length: int
  memory: int
  step: object

  def lower(self) -> jax.stages.Lowered:
    tokens = jax.ShapeDtypeStruct((self.rows, 1), jnp.int32,
                                  sharding=sharding.batch_sharding(self.mesh, 2))
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self.mesh))
    with sharding.use(self.mesh, self.rules):
      return self.step.lower(self.params, tokens, self.cache, index)


def build(c, devices) -> DecodeStep:
  """Builds the decode step of config c: eval.batch_size rows, eval.max_length tokens.

  Weights are float32, as in checkpoints. The cache is the one of every step except the first: it
  contains the keys and values of the encoder's output.
  """
  model = config.model_config(c)
  if not model.dec_layers:
    raise UsageError(f'--decode: {c.family} has no decoder')
  mesh = sharding.make_mesh(**c.mesh.to_dict(), devices=devices)
  rows, shards = c.eval.batch_size, sharding.batch_devices(mesh)
  if rows % shards:
    raise UsageError(f'--decode: eval.batch_size must be a multiple of {shards}, the devices that '
                     f'share the batch, got {rows}')
  sharding.check_heads(mesh, c.rules, model.n_heads, model.kv_heads)
  memory = c.data.lengths.inputs
  length = c.eval.max_length or c.data.lengths.targets
  length += memory * (not model.enc_layers)
  boxed = shapes.boxed_params(c)
  params = shapes.with_shardings(boxed, mesh, c.rules)
  start, step, _ = decoding(model)

  def first_step(params, inputs):                # fills the cache with the encoder's output
    cache = start(params, inputs, jnp.ones_like(inputs), length)
    return step(params, inputs[:, :1], cache, 0)[1]

  whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  inputs = jax.ShapeDtypeStruct((rows, max(1, memory)), jnp.int32)
  cache = jax.eval_shape(first_step, whole, inputs)

  # Logical axes by rank: keys and values [layers, rows, heads, length, head], masks [rows, length].
  axes = {5: ('layers', 'batch', 'act_kv_heads', None, None), 2: ('batch', None)}
  rules = sharding.rule_set(c.rules)

  def with_sharding(x):
    spec = sharding.spec(axes[x.ndim], rules)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  return DecodeStep(mesh, c.rules, params, jax.tree.map(with_sharding, cache), rows, length, memory,
                    jax.jit(step, donate_argnums=2))
