"""T5X's Adafactor, one layer of a stacked parameter at a time. [Shazeer and Stern 2018]"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5lab import trees

PyTree = Any


def stacked_axes(path: str) -> int:
  """Counts the leading axes that hold independent matrices: layers of `nn.scan`, then experts."""
  return trees.fits(path, [r'(.*/)?(layers|tail)/.*']) + trees.fits(path, [r'.*/experts/.*'])


class AdafactorState(NamedTuple):
  """Second moments: v_row and v_col of factored leaves, v of the others; unused ones are [1]."""
  count: jax.Array  # int32[], updates so far
  v_row: PyTree
  v_col: PyTree
  v: PyTree


def scale_by_adafactor(*, min_factored: int = 128) -> optax.GradientTransformation:
  """T5X's Adafactor before learning rate, momentum and weight decay. [Shazeer and Stern 2018]

  The gradient / sqrt(factored second moment), its RMS clipped to 1, times
  max(RMS(parameter), 1e-3). optax does this as T5X does for matrices, but over all layers of a
  stacked leaf at once; here its transformations run under `vmap`, one layer at a time.

  min_factored: both sides of a matrix must be at least this long for it to be factored.
  """
  factored_rms = optax.scale_by_factored_rms(
      decay_rate=0.8, min_dim_size_to_factor=min_factored, epsilon=1e-30)
  rescale = optax.chain(optax.clip_by_block_rms(1.), optax.scale_by_param_block_rms(1e-3))

  def by_layer(f, path):
    for _ in range(stacked_axes(path)):
      f = jax.vmap(f)
    return f

  def init(params):
    def init_one(param):
      state = factored_rms.init(param)
      return state.v_row, state.v_col, state.v
    moments = trees.map_paths(lambda path, p: by_layer(init_one, path)(p), params)
    v_row, v_col, v = jax.tree.transpose(jax.tree.structure(params), None, moments)
    return AdafactorState(jnp.zeros((), jnp.int32), v_row, v_col, v)

  def update(grads, state, params=None):
    if params is None:
      raise ValueError('Adafactor needs the parameters: tx.update(grads, state, params)')

    def update_one(grad, v_row, v_col, v, param):
      moments = optax.FactoredState(state.count, v_row, v_col, v)
      u, moments = factored_rms.update(grad.astype(jnp.float32), moments, param)
      u, _ = rescale.update(u, rescale.init(param), param)
      return u, moments.v_row, moments.v_col, moments.v

    out = trees.map_paths(lambda path, *leaves: by_layer(update_one, path)(*leaves),
                          grads, state.v_row, state.v_col, state.v, params)
    u, v_row, v_col, v = jax.tree.transpose(jax.tree.structure(grads), None, out)
    return u, AdafactorState(optax.safe_increment(state.count), v_row, v_col, v)

  return optax.GradientTransformation(init, update)
