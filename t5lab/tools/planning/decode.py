"""The decode step as a program to compile: one token for each row, with full caches.

B rows, S memory length, L layers, K key heads, H head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5lab import config as configs
from t5lab.errors import UsageError
from t5lab.models.cache import decoding
from t5lab.parallel import sharding
from t5lab.programs import loading


@dataclasses.dataclass(frozen=True)
class DecodeStep:
  """rows: of the global batch; length, memory: positions of the decoder and the encoder."""
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
  """Of config c: eval.batch_size rows, eval.max_length tokens; weights float32, as runs save them.

  The cache is that of every step but the first: keys and values of the encoder's output are in it.
  """
  model = configs.model_config(c)
  if not model.dec_layers:
    raise UsageError(f'--decode: {c.family} has no decoder')
  mesh = sharding.make_mesh(**c.mesh.to_dict(), devices=devices)
  rows, spread = c.eval.batch_size, sharding.batch_devices(mesh)
  if rows % spread:
    raise UsageError(f'--decode: eval.batch_size={rows} is not a multiple of the {spread} devices '
                     'that share the batch')
  sharding.check_heads(mesh, c.rules, model.n_heads, model.kv_heads)
  memory = c.data.lengths.inputs
  length = c.eval.max_length or c.data.lengths.targets
  length += memory * (not model.enc_layers)
  boxed = loading.boxed_params(c)
  params = loading.placed(boxed, mesh, c.rules)
  start, step, _ = decoding(model)

  def first(params, inputs):                     # fills the cache, as the first step does
    cache = start(params, inputs, jnp.ones_like(inputs), length)
    return step(params, inputs[:, :1], cache, 0)[1]

  bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  inputs = jax.ShapeDtypeStruct((rows, max(1, memory)), jnp.int32)
  row = sharding.rules_row(c.rules)
  axes = {5: ('layers', 'batch', 'act_kv_heads', None, None), 2: ('batch', None)}
  cache = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(
          mesh, sharding.spec(axes[x.ndim], row))), jax.eval_shape(first, bare, inputs))
  return DecodeStep(mesh, c.rules, params, cache, rows, length, memory,
                    jax.jit(step, donate_argnums=2))
