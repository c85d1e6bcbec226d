"""Norm, dense, dropout and feed-forward layers.

B batch, T length, D model, F feed-forward. Parameters are float32, activations `dtype`.
"""

from collections.abc import Callable
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab.models.families import TransformerConfig
from t5lab.parallel.sharding import constrain, product

ACTIVATIONS = {
    'relu': jax.nn.relu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu_erf': lambda x: jax.nn.gelu(x, approximate=False),
    'silu': jax.nn.silu,
    'tanh': jnp.tanh,
    'linear': lambda x: x,
}


class Norm(nn.Module):
  """RMSNorm, x / rms(x) * scale [Zhang & Sennrich 2019], or LayerNorm with a bias [Ba et al. 2016].

  Gemma's scale is stored minus 1.

  Statistics are computed in float32. As in T5X, the normalized value is cast to the compute dtype
  before it is scaled; in bfloat16 the other order differs in the last bit.
  """
  config: TransformerConfig

  @nn.compact
  def __call__(self, x):                                       # [B, T, D]
    c = self.config
    param = lambda name, init: self.param(
        name, nn.with_logical_partitioning(init, ('norm',)), (x.shape[-1],), jnp.float32
    ).astype(c.dtype)
    x = x.astype(jnp.float32)
    if c.norm == 'layer':
      x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + c.norm_eps)
    if c.zero_centered_norm:
      y = x.astype(c.dtype) * (1 + param('scale', nn.initializers.zeros))
    else:
      y = x.astype(c.dtype) * param('scale', nn.initializers.ones)
    return y + param('bias', nn.initializers.zeros) if c.norm == 'layer' else y


class Dense(nn.Module):
  """x[..., in] @ kernel[in, out] (+ bias[out]). Kernels are 2-D, so Adafactor factors them as T5X.

  If the collection 'lora' holds a[in, r] and b[r, out] for this kernel, adds (x @ a) @ b.
  [Hu et al. 2022; training/lora.py makes them, with the scale inside b]
  """
  features: int
  axes: tuple[str, str]
  kernel_init: nn.initializers.Initializer
  dtype: str
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.with_logical_partitioning(self.kernel_init, self.axes)
    kernel = self.param('kernel', init, (x.shape[-1], self.features), jnp.float32)
    x = x.astype(self.dtype)
    matmul = functools.partial(product, jnp.matmul, dtype=self.dtype)
    y = matmul(x, kernel, *self.axes)
    if self.has_variable('lora', 'kernel'):
      adapter = self.get_variable('lora', 'kernel')
      low_rank = matmul(x, adapter['a'], self.axes[0], None)
      y += matmul(low_rank, adapter['b'], None, self.axes[1])
    if self.bias:
      # A bias along D has the axis of the norms: sharding so few numbers costs more than it saves.
      axis = 'norm' if self.axes[1] == 'embed' else self.axes[1]
      init = nn.with_logical_partitioning(nn.initializers.zeros, (axis,))
      y += self.param('bias', init, (self.features,), jnp.float32).astype(self.dtype)
    return y


def lookup(table, indices, axis: str, dtype):
  """table[axis, D], int[...] -> [..., D] of dtype.

  A gather, because T5X's product with one-hot rows costs 40 % more FLOPs in small T5.
  """
  take = lambda i, t: jnp.take(t, i, axis=0, mode='clip')
  return product(take, indices, table, axis, 'embed', dtype=dtype)


def kernel_init(c: TransformerConfig, std: float) -> nn.initializers.Initializer:
  """Normal, with the family's single std if it has one, or else with `std`."""
  return nn.initializers.normal(c.init_std or std)


def up_init(c: TransformerConfig, batch_axis=()) -> nn.initializers.Initializer:
  """T5's truncated normal by fan-in, or normal with the family's single std."""
  if c.init_std:
    return nn.initializers.normal(c.init_std)
  return nn.initializers.variance_scaling(1., 'fan_in', 'truncated_normal', batch_axis=batch_axis)


def gated(c: TransformerConfig, up: Callable):
  """act_0(up(0)) * act_1(up(1)) * …, with an up-projection for each activation."""
  return functools.reduce(operator.mul, [ACTIVATIONS[act](up(i)) for i, act in enumerate(c.acts)])


def dropout(module: nn.Module, x, rate: float, train: bool, axis: int = -2):
  """Zeroes x with probability `rate` and rescales.

  As in Mesh-TF and T5X, the mask is broadcast along `axis` (length): noise [B, D] is almost free.
  """
  if not train or rate == 0.:
    return x
  shape = list(x.shape)
  shape[axis] = 1
  keep = jax.random.bernoulli(module.make_rng('dropout'), 1. - rate, shape)
  return jnp.where(keep, x / (1. - rate), 0.).astype(x.dtype)


class Mlp(nn.Module):
  """wo(drop(act_0(wi_0 x) * act_1(wi_1 x) * …)). T5 1.0 has one act; ('gelu', 'linear') is GEGLU.

  [Raffel et al. 2020, 2.1; Shazeer 2020]
  """
  config: TransformerConfig
  train: bool

  @nn.compact
  def __call__(self, x):                                       # [B, T, D]
    c = self.config

    def dense(name, x, features, axes):
      return Dense(features, axes, up_init(c), c.dtype, c.bias, name=name)(x)

    h = gated(c, lambda i: dense(f'wi_{i}', x, c.d_ff, ('embed', 'mlp')))  # [B, T, F]
    h = constrain(h, 'batch', 'length', 'act_mlp')
    h = dropout(self, h, c.dropout, self.train)
    return dense('wo', h, c.d_model, ('mlp', 'embed'))
