"""Where a bad step went wrong: the layer, the parameters, the rows of its batch.

Runs the step's forward and backward pass again, with the same weights, batch and dropout, and looks
at the output of every module. Compiled only once something went wrong.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t5lab import trees
from t5lab.parallel import sharding
from t5lab.training import losses, optim, steps

SEEN = 'intermediates'      # the collection that models/transformer.py stacks by layer


@dataclasses.dataclass(frozen=True)
class Finding:
  """text: one clause. layer: the module's path with its layer number, or the parameter's, '' where
  none is to blame. rows: of the batch, worst first."""
  text: str
  layer: str
  rows: list[int]


class Diagnosis:
  """explain(state, batch, base) -> Finding. The options are train_step's."""

  def __init__(self, mesh, *, model, loss: steps.Loss, seed: int = 0, microbatches: int = 1,
               lora_scale: float = 1.):
    options = dict(model=model, loss=loss, seed=seed, microbatches=microbatches,
                   lora_scale=lora_scale)
    self._microbatches = microbatches
    self._order = []         # paths of modules as the forward pass ends them; filled by tracing
    # every process sees all of what comes out
    jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    self._look = jit(functools.partial(_look, order=self._order, **options))
    self._gradients = jit(functools.partial(_gradient_norms, **options))
    self._bad_rows, self._bad_layers = jit(_bad_rows), jit(_bad_layers)

  def explain(self, state, batch, base=None) -> Finding:
    """state: TrainState before the bad step. batch: as the step had it, on the devices.

    Looks in the order in which numbers are computed: the batch, the weights, the forward pass layer
    by layer, the loss, the gradients.
    """
    for name, bad in jax.device_get(self._bad_rows(batch)).items():
      if bad.any():
        return Finding(f'the batch itself is not finite, in {name}', '',
                       np.flatnonzero(bad).tolist())
    for tree in (state.params, base):
      for path, bad in jax.device_get(self._bad_layers(tree)).items():
        if bad.any():
          return Finding(f'the weights are not finite in {_at(path, bad)}', _at(path, bad), [])
    seen, row_losses = [], np.zeros(len(next(iter(batch.values()))))
    for i in range(self._microbatches):
      sown, row_losses[i::self._microbatches] = jax.device_get(self._look(
          state.params, state.step, batch, base, i))
      seen.append(_by_module(sown))
    rows = np.flatnonzero(~np.isfinite(row_losses)).tolist()
    for name, part in _forward_order(self._order, seen):
      if not math.isfinite(part):
        return Finding(f'the forward pass is finite up to {name}, whose output is not', name, rows)
    if rows:
      return Finding('every layer is finite, the loss is not', '', rows)
    return self._backward(state, batch, base, row_losses)

  def _backward(self, state, batch, base, row_losses):
    worst = np.argsort(-row_losses, kind='stable').tolist()
    norms = {path: tuple(map(np.atleast_1d, both)) for path, both in jax.device_get(
        self._gradients(state.params, state.step, batch, base)).items()}
    last = {name: i for i, name in enumerate(dict.fromkeys(self._order))}
    def late(path):                      # where in the forward pass a parameter is used
      parts = path.split('/')
      return next((last[name] for n in range(len(parts) - 1, 0, -1)
                   if (name := '/'.join(parts[:n])) in last), -1)
    if bad := sorted((p for p, (g, _) in norms.items() if not np.isfinite(g).all()), key=late):
      g = norms[bad[-1]][0]
      layers = np.flatnonzero(~np.isfinite(g))          # the last layer's gradient comes first
      name = bad[-1] + (f', layer {layers[-1]} of {len(g)}' if len(g) > 1 else '')
      return Finding(f'loss and layers are finite, the gradient is not in {len(bad)} of '
                     f'{len(norms)} parameters, nearest the loss {name}', name, worst)
    ratio = {(path, i): float(g[i] / max(w[i], 1e-12)) for path, (g, w) in norms.items()
             for i in range(len(g))}
    if not ratio:
      return Finding('', '', worst)
    (path, i), most = max(ratio.items(), key=lambda item: item[1])
    g, w = norms[path]
    name = path + (f', layer {i} of {len(g)}' if len(g) > 1 else '')
    return Finding(f'loss and gradient are finite; the gradient is largest beside the weights in '
                   f'{name}: norm {g[i]:.3g} of {w[i]:.3g}', name, worst)


# --- the forward pass, watched -----------------------------------------------------------------


def _look(params, step, batch, base, i, *, model, loss, seed, microbatches, lora_scale, order):
  """Microbatch i -> ({path/at: max |output|}, float32[rows] loss of each row)."""
  order.clear()
  key = jax.random.fold_in(jax.random.key(seed), step)
  if microbatches > 1:
    key = jax.random.fold_in(key, i)
    batch = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:])[:, i], batch)
  given = steps.variables(params, base, lora_scale)

  def watch(call: Callable, args, kwargs, context):
    out = call(*args, **kwargs)
    module, method = context.module, context.method_name
    if method == '__call__' and module.path or method == 'embed':
      arrays = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
      if arrays:
        order.append('/'.join(module.path) or 'embedding')
        # one NaN makes the largest a NaN, one inf an inf
        module.sow(SEEN, 'largest', jnp.max(jnp.abs(arrays[0])).astype(jnp.float32))
    return out

  with nn.intercept_methods(watch):
    hidden, sown = model.apply(given, batch, rngs={'dropout': key}, method='hidden',
                               mutable=['router', SEEN])
  side = 'decoder' if model.config.dec_layers else 'encoder'

  def row(x):
    h, target, weight = jax.tree.map(lambda leaf: leaf[None], x)
    logits = model.apply(given, h, method='unembed')
    sums = losses.cross_entropy(logits, target, weight, z_loss=loss.z_loss,
                                label_smoothing=loss.label_smoothing)
    return sums['loss'] / jnp.maximum(sums['weight'], 1.)
  rows = jax.lax.map(row, (hidden, batch[f'{side}_target_tokens'], batch[f'{side}_loss_weights']))
  return trees.flatten(sown[SEEN]), rows


def _by_module(sown):
  """{'encoder/layers/mlp/largest/0': x} -> {'encoder/layers/mlp': [x, …]}."""
  found = {}
  for path, x in sown.items():
    name = path.rpartition('/largest')[0] or 'embedding'
    found.setdefault(name, []).append(np.asarray(x))
  return found


def _forward_order(order, seen):
  """Yields (name with layer, number) in the order of the forward pass; of several microbatches the
  worst. Modules below a scan have a number a layer, and all of a layer come before the next."""
  order = list(dict.fromkeys(order))
  for start, names in _scans(order):
    values = {name: np.max([np.broadcast_arrays(*part.get(name, [0.])) for part in seen],
                           axis=(0, 1)) for name in names}
    if not start:
      yield from ((name, float(values[name])) for name in names)
      continue
    turns = max(np.size(v) for v in values.values())
    for turn in range(turns):
      for name in names:
        yield f'{name}, layer {turn} of {turns}', float(np.atleast_1d(values[name])[turn])


def _scans(order):
  """Runs of neighbours in the same scan: [(its path or '', names)]."""
  runs = []
  for name in order:
    found = [f'{stack}/{kind}' for stack in ('encoder', 'decoder') for kind in ('layers', 'tail')
             if f'{name}/'.startswith(f'{stack}/{kind}/')]
    scan = found[0] if found else ''
    if not runs or runs[-1][0] != scan:
      runs.append((scan, []))
    runs[-1][1].append(name)
  return runs


# --- weights and gradients ---------------------------------------------------------------------


def _gradient_norms(params, step, batch, base, *, model, loss, seed, microbatches, lora_scale):
  """{path: (norm of the gradient, norm of the weights)}, [L] each for stacked parameters."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  grads, sums = steps.gradients(model, params, batch, loss, key, microbatches, base=base,
                                lora_scale=lora_scale)
  tokens = jnp.maximum(sums['weight'], 1.)
  norm = lambda path, x: jnp.sqrt(jnp.sum(jnp.square(x), axis=_inner(path, x.ndim)))
  weights = trees.flatten(params)
  return {path: (norm(path, g / tokens), norm(path, weights[path]))
          for path, g in trees.flatten(grads).items()}


def _inner(path, ndim):
  return tuple(range(min(optim.stacked_axes(path), 1), ndim))


def _bad_rows(batch):            # -> {feature: bool[B]}
  return {name: ~jnp.isfinite(x.astype(jnp.float32)).reshape(x.shape[0], -1).all(axis=1)
          for name, x in batch.items()}


def _bad_layers(params):         # -> {path: bool[] or bool[L]}
  return {path: ~jnp.isfinite(x).all(axis=_inner(path, x.ndim))
          for path, x in trees.flatten(params).items()}


def _at(path, bad):
  layers = np.flatnonzero(bad)
  return path + (f', layer {layers[0]} of {len(bad)}' if bad.ndim else '')
