"""LoRA adapters: a frozen kernel W[in, out] plus alpha / r * a[in, r] b[r, out], which are trained.

Adapters are a pytree of their own, {path of a kernel: {'a', 'b'}}; a run with adapters trains and
saves nothing else. [Hu et al. 2022, 4.1: a normal, b zero, so training starts at W]
"""

from collections.abc import Sequence
import re
from typing import Any
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.parallel import sharding

PyTree = Any


def kernels(boxed: PyTree, patterns: Sequence[str]) -> list[str]:
  """Lists the kernels whose whole path one of the regexes matches.

  boxed: abstract parameters with their logical axes. Only dense layers can have adapters, not the
  embedding and not experts.
  Errors: UsageError for a pattern that matches no kernel.
  """
  dense = [path for path in sharding.boxes(boxed) if path.endswith('/kernel')]
  for pattern in patterns:
    try:
      is_used = any(re.fullmatch(pattern, path) for path in dense)
    except re.error as e:
      raise UsageError(f'lora.kernels: {pattern!r} is not a regular expression: {e}') from e
    if not is_used:
      raise UsageError(f'lora.kernels: {pattern!r} matches no kernel of this model; its kernels: '
                       + ', '.join(dense))
  return [path for path in dense if trees.fits(path, patterns)]


def init(boxed: PyTree, patterns: Sequence[str], rank: int, seed: int) -> PyTree:
  """Boxed adapters for the kernels that `patterns` match; they keep leading (layer) axes."""
  boxes, adapters = sharding.boxes(boxed), {}
  for path in kernels(boxed, patterns):
    box = boxes[path]
    *lead, fan_in, fan_out = box.value.shape
    *names, axis_in, axis_out = box.names
    if rank >= min(fan_in, fan_out):
      raise UsageError(f'lora.rank must be below {min(fan_in, fan_out)} to save anything, because '
                       f'{path} is {fan_in} x {fan_out}, got {rank}')
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    a = jax.random.normal(key, (*lead, fan_in, rank), jnp.float32) * fan_in ** -0.5
    b = jnp.zeros((*lead, rank, fan_out), jnp.float32)
    adapters[f'{path}/a'] = nn.LogicallyPartitioned(a, (*names, axis_in, None))
    adapters[f'{path}/b'] = nn.LogicallyPartitioned(b, (*names, None, axis_out))
  return trees.unflatten(adapters)


def scaled(adapters: PyTree, scale: float) -> PyTree:
  """The adapters as the model's 'lora' collection expects them: b times the scale."""
  return trees.map_paths(lambda path, x: x * scale if path.endswith('/b') else x, adapters)


def merge(base: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """Adds the adapters to the base weights, which gives an ordinary model."""
  pairs = trees.flatten(adapters)

  @jax.jit
  def add(kernel, a, b):
    product = jnp.einsum('...ir,...ro->...io', a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel + scale * product

  def merge_one(path, x):
    has_adapter = f'{path}/a' in pairs
    return add(x, pairs[f'{path}/a'], pairs[f'{path}/b']) if has_adapter else x

  return trees.map_paths(merge_one, base)
