"""Arrays of a checkpoint, written and read by Orbax: one folder of TensorStore files per tree.

runs/checkpoint.py decides when to write and what counts as saved.
"""

import asyncio
import functools
import math
from pathlib import Path
import sys
import threading

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp


class Writer:
  """Writes trees of arrays, each into its own folder, in the background."""

  def __init__(self, copy: bool = True):
    """copy: False saves a copy on the host; the arrays must then not change until written."""
    self._loop: asyncio.AbstractEventLoop | None = None
    # No compression: zstd shrinks float32 parameters by 8 % only, and takes the cores that train.
    options = {}
    if not copy:
      options['type_handler_registry'] = ocp.type_handlers.create_type_handler_registry(
          (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
          (jax.Array, ocp.type_handlers.ArrayHandler()))
    self._orbax = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False, **options)

  def start(self, folders: dict[Path, dict]) -> list:
    """Copies the arrays and starts to write them.

    Returns futures, whose result() raises what went wrong.
    """
    # Start all copies from the devices before waiting for the first.
    for x in jax.tree.leaves(list(folders.values())):
      if isinstance(x, jax.Array) and x.is_fully_addressable:
        x.copy_to_host_async()

    async def save_all():
      futures = []
      for folder, tree in folders.items():
        args = ocp.args.PyTreeSave(jax.tree.map(_snapshot, tree))
        futures += await self._orbax.async_save(epath.Path(folder), args=args) or ()
      return futures

    # In an event loop of our own: a notebook's main thread runs one already, and TensorStore
    # reports to the loop after async_save has returned.
    _mute_late_failures()
    if not self._loop:
      self._loop = asyncio.new_event_loop()
      threading.Thread(target=self._loop.run_forever, name='saves', daemon=True).start()
    return asyncio.run_coroutine_threadsafe(save_all(), self._loop).result()

  def finish(self, folder: Path) -> None:
    """Completes a folder, in one process, once all processes have written their arrays."""
    self._orbax.finalize(epath.Path(folder))


def reader(signatures):
  """Returns read(folder, abstract tree) -> tree.

  signatures: (shape, dtype) of all arrays that it will read.
  """
  # As much at once as the largest array needs: reading takes no second copy of the model.
  largest = max((math.prod(shape) * 4 for shape, _ in signatures), default=0)
  orbax = ocp.PyTreeCheckpointHandler(
      use_ocdbt=True, restore_concurrent_gb=largest // 10 ** 9 + 1)

  def read(folder, tree):
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    return orbax.restore(
        epath.Path(folder), args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))
  return read


@functools.cache
def _mute_late_failures():
  """Silences failed writes that TensorStore reports after the first has ended the save.

  They go to the event loop, which is closed by then, and Python would print a trace for each.
  """
  default_hook = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed' or unraisable.object is not None:
      default_hook(unraisable)
  sys.unraisablehook = hook


def _snapshot(x):
  """Returns numpy if this host holds the whole array, else the array, saved shard by shard.

  Orbax copies either to the host before async_save returns, so `x` may then be donated. (On CPU
  np.asarray is a view; JAX does not reuse a donated buffer while a view of it lives.)
  """
  is_global = isinstance(x, jax.Array) and not x.is_fully_addressable
  return x if is_global else np.asarray(x)
