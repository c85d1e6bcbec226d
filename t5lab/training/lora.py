"""LoRA: frozen kernels W[in, out] and trained pairs a[in, r], b[r, out]; W + alpha / r * a b.

Adapters are a pytree of their own, {path of a kernel: {'a', 'b'}}, which is all that a run with
adapters trains and saves. [Hu et al. 2022, 4.1: a normal, b zero, so training starts at W]
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

PyTree = Any


def _boxes(boxed: PyTree) -> dict[str, nn.LogicallyPartitioned]:
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return {trees.path_name(keys): box for keys, box in
          jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)}


def kernels(boxed: PyTree, patterns: Sequence[str]) -> list[str]:
  """Paths of the kernels that the regexes name (whole paths); UsageError if one names none.

  boxed: abstract parameters with their logical axes. Only dense layers have adapters: not the
  embedding, not experts.
  """
  dense = [path for path in _boxes(boxed) if path.endswith('/kernel')]
  for pattern in patterns:
    try:
      found = [path for path in dense if re.fullmatch(pattern, path)]
    except re.error as e:
      raise UsageError(f'lora.kernels has {pattern!r}, not a regular expression: {e}') from e
    if not found:
      raise UsageError(f'lora.kernels has {pattern!r}, which fits no kernel of this model; its '
                       f'kernels: {", ".join(dense)}')
  return [path for path in dense if trees.fits(path, patterns)]


def init(boxed: PyTree, patterns: Sequence[str], rank: int, seed: int) -> PyTree:
  """Boxed adapters for the kernels that `patterns` name; leading (layer) axes stay."""
  boxes, flat = _boxes(boxed), {}
  for path in kernels(boxed, patterns):
    box = boxes[path]
    *lead, fan_in, fan_out = box.value.shape
    *names, axis_in, axis_out = box.names
    if rank >= min(fan_in, fan_out):
      raise UsageError(f'lora.rank={rank}: {path} is {fan_in} x {fan_out}, a rank below '
                       f'{min(fan_in, fan_out)} saves something')
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    a = jax.random.normal(key, (*lead, fan_in, rank), jnp.float32) * fan_in ** -0.5
    b = jnp.zeros((*lead, rank, fan_out), jnp.float32)
    flat[f'{path}/a'] = nn.LogicallyPartitioned(a, (*names, axis_in, None))
    flat[f'{path}/b'] = nn.LogicallyPartitioned(b, (*names, None, axis_out))
  return trees.unflatten(flat)


def scaled(adapters: PyTree, scale: float) -> PyTree:
  """The adapters as the model's 'lora' collection takes them: the scale is put into b."""
  return trees.map_paths(lambda path, x: x * scale if path.endswith('/b') else x, adapters)


def merge(base: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """The weights with the adapters added: a model like any other."""
  pairs = trees.flatten(adapters)

  @jax.jit
  def add(kernel, a, b):
    return kernel + scale * jnp.einsum('...ir,...ro->...io', a, b,
                                       precision=jax.lax.Precision.HIGHEST)
  return trees.map_paths(
      lambda path, x: add(x, pairs[f'{path}/a'], pairs[f'{path}/b'])
      if f'{path}/a' in pairs else x, base)
