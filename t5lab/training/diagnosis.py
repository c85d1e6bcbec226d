"""Diagnosis of a bad step: the layer, the parameters or the rows of the batch where it went wrong.

Runs the step's forward and backward pass again, with the same weights, batch and dropout, and
inspects the output of every module. Compiled only when a step is bad.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5lab import trees
from t5lab.parallel import sharding
from t5lab.training import adafactor, losses, steps

COLLECTION = 'intermediates'      # models/stack.py stacks it by layer


@dataclasses.dataclass(frozen=True)
class Finding:
  text: str           # one clause
  layer: str          # path of the module or parameter, with its layer number; '' if unknown
  rows: list[int]     # of the batch, worst first


class Diagnosis:
  """`explain(state, batch, base)` says where a step went wrong. Options: as for step_gradients."""

  def __init__(self, mesh, *, microbatches: int = 1, **options):
    options['microbatches'] = self._microbatches = microbatches
    self._order = []     # paths of modules in the order in which they finish; filled by tracing
    # Replicated results: every process needs all of them.
    jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    self._forward = jit(functools.partial(_watched_forward, order=self._order, **options))
    self._gradient_norms = jit(functools.partial(_gradient_norms, **options))
    self._bad_rows, self._bad_layers = jit(_bad_rows), jit(_bad_layers)

  def explain(self, state, batch, base=None) -> Finding:
    """Finds the first non-finite number in the order in which the step computes them.

    state: TrainState before the bad step. batch: the step's, on the devices.
    """
    for name, bad in jax.device_get(self._bad_rows(batch)).items():
      if bad.any():
        return Finding(f'the batch itself is not finite, in {name}', '',
                       np.flatnonzero(bad).tolist())
    for tree in (state.params, base):
      for path, bad in jax.device_get(self._bad_layers(tree)).items():
        if bad.any():
          if bad.ndim:
            path += f', layer {np.flatnonzero(bad)[0]} of {len(bad)}'
          return Finding(f'the weights are not finite in {path}', path, [])

    # The forward pass, microbatch by microbatch. Microbatch i has every k-th row.
    outputs = []
    row_losses = np.zeros(len(next(iter(batch.values()))))
    for i in range(self._microbatches):
      largest, row_losses[i::self._microbatches] = jax.device_get(
          self._forward(state.params, state.step, batch, base, i))
      outputs.append(_by_module(largest))
    rows = np.flatnonzero(~np.isfinite(row_losses)).tolist()
    for name, largest in _in_forward_order(self._order, outputs):
      if not math.isfinite(largest):
        return Finding(f'the forward pass is finite up to {name}, whose output is not', name, rows)
    if rows:
      return Finding('every layer is finite, the loss is not', '', rows)
    return self._explain_backward(state, batch, base, row_losses)

  def _explain_backward(self, state, batch, base, row_losses):
    rows = np.argsort(-row_losses, kind='stable').tolist()
    norms = jax.device_get(self._gradient_norms(state.params, state.step, batch, base))
    norms = {path: (np.atleast_1d(gradient), np.atleast_1d(weights))
             for path, (gradient, weights) in norms.items()}

    # A non-finite gradient comes from the loss side: blame the parameter that is used last.
    bad = [path for path, (gradient, _) in norms.items() if not np.isfinite(gradient).all()]
    if bad:
      path = max(reversed(bad), key=self._use)
      gradient, _ = norms[path]
      layer = np.flatnonzero(~np.isfinite(gradient))[-1]
      name = _numbered(path, layer, len(gradient))
      return Finding(f'loss and layers are finite, the gradient is not in {len(bad)} of '
                     f'{len(norms)} parameters, nearest the loss {name}', name, rows)

    # Everything is finite: the layer whose gradient is largest relative to its weights.
    ratios = {(path, i): float(gradient[i] / max(weights[i], 1e-12))
              for path, (gradient, weights) in norms.items() for i in range(len(gradient))}
    if not ratios:
      return Finding('', '', rows)
    path, i = max(ratios, key=ratios.get)
    gradient, weights = norms[path]
    name = _numbered(path, i, len(gradient))
    return Finding('loss and gradient are finite; the gradient is largest relative to the weights '
                   f'in {name}: norm {gradient[i]:.3g}, weights {weights[i]:.3g}', name, rows)

  def _use(self, path) -> int:
    """Position in the forward pass of the innermost module that uses a parameter; -1: unknown."""
    positions = {name: i for i, name in enumerate(dict.fromkeys(self._order))}
    while '/' in path:
      path = path.rpartition('/')[0]
      if path in positions:
        return positions[path]
    return -1


# --- the forward pass --------------------------------------------------------------------------


def _watched_forward(params, step, batch, base, i, *, model, loss, seed=0, microbatches,
                     lora_scale=1., order):
  """Runs microbatch i; returns ({path: max |output|}, float32[rows] loss of each row)."""
  order.clear()
  key = jax.random.fold_in(jax.random.key(seed), step)
  if microbatches > 1:
    key = jax.random.fold_in(key, i)
    batch = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:])[:, i], batch)
  variables = steps.variables(params, base, lora_scale)

  def watch(call: Callable, args, kwargs, context):
    out = call(*args, **kwargs)
    module, method = context.module, context.method_name
    if method == 'embed' or (method == '__call__' and module.path):
      arrays = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
      if arrays:
        order.append('/'.join(module.path) or 'embedding')
        # One NaN makes the maximum a NaN, one inf makes it inf.
        module.sow(COLLECTION, 'largest', jnp.max(jnp.abs(arrays[0])).astype(jnp.float32))
    return out

  with nn.intercept_methods(watch):
    hidden, collected = model.apply(variables, batch, rngs={'dropout': key}, method='hidden',
                                    mutable=['router', COLLECTION])

  # Row by row, so that the logits of one row at a time are in memory.
  def row_loss(row):
    hidden, target, weight = jax.tree.map(lambda leaf: leaf[None], row)
    logits = model.apply(variables, hidden, method='unembed')
    sums = losses.cross_entropy(logits, target, weight, z_loss=loss.z_loss,
                                label_smoothing=loss.label_smoothing)
    return sums['loss'] / jnp.maximum(sums['weight'], 1.)

  side = 'decoder' if model.config.dec_layers else 'encoder'
  row_losses = jax.lax.map(
      row_loss, (hidden, batch[f'{side}_target_tokens'], batch[f'{side}_loss_weights']))
  return trees.flatten(collected[COLLECTION]), row_losses


def _by_module(largest):
  """{'encoder/layers/mlp/largest/0': x} -> {'encoder/layers/mlp': [x, …]}."""
  modules = {}
  for path, x in largest.items():
    name = path.rpartition('/largest')[0] or 'embedding'
    modules.setdefault(name, []).append(np.asarray(x))
  return modules


def _in_forward_order(order, outputs):
  """Yields (module with its layer, max |output|), all modules of a layer before the next layer.

  outputs: _by_module of each microbatch; the largest counts.
  """
  for scan, names in itertools.groupby(dict.fromkeys(order), key=_scan):
    values = {}
    for name in names:
      calls = [np.broadcast_arrays(*modules.get(name, [0.])) for modules in outputs]
      values[name] = np.max(calls, axis=(0, 1))
    if not scan:
      yield from ((name, float(x)) for name, x in values.items())
      continue
    n_layers = max(map(np.size, values.values()))
    for layer in range(n_layers):
      for name, x in values.items():
        yield f'{name}, layer {layer} of {n_layers}', float(np.atleast_1d(x)[layer])


def _scan(name) -> str:
  """The path of the scan over layers that a module is in; '' if it is in none."""
  in_scan = re.match('(encoder|decoder)/(layers|tail)/', f'{name}/')
  return in_scan[0] if in_scan else ''


# --- weights and gradients ---------------------------------------------------------------------


def _gradient_norms(params, step, batch, base, **options):
  """{path: (norm of the gradient, norm of the weights)}, [L] each for stacked parameters."""
  grads, sums = steps.step_gradients(params, step, batch, base, **options)
  tokens = jnp.maximum(sums['weight'], 1.)
  norm = lambda path, x: jnp.sqrt(jnp.sum(jnp.square(x), axis=_axes_of_a_layer(path, x.ndim)))
  weights = trees.flatten(params)
  return {path: (norm(path, g / tokens), norm(path, weights[path]))
          for path, g in trees.flatten(grads).items()}


def _bad_rows(batch):
  """{feature: bool[B], whether the row has a non-finite number}."""
  is_finite = {name: jnp.isfinite(x.astype(jnp.float32)) for name, x in batch.items()}
  return {name: ~x.reshape(x.shape[0], -1).all(axis=1) for name, x in is_finite.items()}


def _bad_layers(params):
  """{path: bool[] or, for stacked parameters, bool[L]}."""
  return {path: ~jnp.isfinite(x).all(axis=_axes_of_a_layer(path, x.ndim))
          for path, x in trees.flatten(params).items()}


def _axes_of_a_layer(path, ndim):
  return tuple(range(min(adafactor.stacked_axes(path), 1), ndim))


def _numbered(path, layer, n_layers):
  """'path, layer 1 of 2'; the path alone if it is not stacked."""
  return f'{path}, layer {layer} of {n_layers}' if n_layers > 1 else path
