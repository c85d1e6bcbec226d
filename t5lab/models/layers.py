"""Norm, dense, dropout and feed-forward: the parts that are not attention.

B batch, T length, D model, F feed-forward. Parameters are float32, activations `dtype`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.parallel.sharding import constrain

ACTIVATIONS = {
    'relu': jax.nn.relu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=True),
    'silu': jax.nn.silu,
    'linear': lambda x: x,
}


class RMSNorm(nn.Module):
  """x / rms(x) * scale; statistics in float32, no mean, no bias. [Zhang & Sennrich 2019]

  As T5X does, the normalised value is cast to the compute dtype before it meets the scale: in
  bfloat16 the other order differs in the last bit.
  """
  config: TransformerConfig

  @nn.compact
  def __call__(self, x):                                       # [B, T, D]
    c = self.config
    init = nn.with_logical_partitioning(nn.initializers.ones, ('norm',))
    scale = self.param('scale', init, (x.shape[-1],), jnp.float32)
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + c.norm_eps)
    return x.astype(c.dtype) * scale.astype(c.dtype)


class Dense(nn.Module):
  """x[..., in] @ kernel[in, out], no bias. Kernels stay 2-D: Adafactor factors them as T5X does."""
  features: int
  axes: tuple[str, str]
  kernel_init: nn.initializers.Initializer
  dtype: str

  @nn.compact
  def __call__(self, x):
    init = nn.with_logical_partitioning(self.kernel_init, self.axes)
    kernel = self.param('kernel', init, (x.shape[-1], self.features), jnp.float32)
    return x.astype(self.dtype) @ kernel.astype(self.dtype)


def dropout(module: nn.Module, x, rate: float, train: bool, axis: int = -2):
  """Zeroes x with probability `rate` and rescales; one mask for the whole `axis` (length), as in
  Mesh-TF and T5X: the noise is then [B, D], so making it costs next to nothing."""
  if not train or rate == 0.:
    return x
  shape = list(x.shape)
  shape[axis] = 1
  keep = jax.random.bernoulli(module.make_rng('dropout'), 1. - rate, shape)
  return jnp.where(keep, x / (1. - rate), 0.).astype(x.dtype)


class Mlp(nn.Module):
  """wo(drop(act_0(wi_0 x) * act_1(wi_1 x) * …)). One act: T5 1.0; ('gelu', 'linear'): GEGLU.

  [Raffel et al. 2020, 2.1; Shazeer 2020]
  """
  config: TransformerConfig
  train: bool

  @nn.compact
  def __call__(self, x):                                       # [B, T, D]
    c = self.config
    init = nn.initializers.variance_scaling(1., 'fan_in', 'truncated_normal')
    h = None                                                   # [B, T, F]
    for i, act in enumerate(c.acts):
      up = Dense(c.d_ff, ('embed', 'mlp'), init, c.dtype, name=f'wi_{i}')(x)
      h = ACTIVATIONS[act](up) if h is None else h * ACTIVATIONS[act](up)
    h = constrain(h, 'batch', 'length', 'act_mlp')
    h = dropout(self, h, c.dropout, self.train)
    return Dense(c.d_model, ('mlp', 'embed'), init, c.dtype, name='wo')(h)
