"""How Orbax writes and reads the arrays of a checkpoint: one folder of TensorStore files a part.

runs/checkpoint.py says when, and what counts.
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
  """Writes trees of arrays, a folder each, while their program goes on."""

  def __init__(self, copy: bool = True):
    """copy: False promises that arrays stay as they are until they are written."""
    self._loop: asyncio.AbstractEventLoop | None = None
    # float32 parameters shrink by 8 % under zstd, at the price of the cores that train
    self._orbax = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_compression=False, **({} if copy else _without_copies()))

  def start(self, folders: dict[Path, dict]) -> list:
    """Copies the arrays and has them written -> futures, whose result() raises what went wrong."""
    for x in jax.tree.leaves(list(folders.values())):   # all copies before the first is waited for
      if isinstance(x, jax.Array) and x.is_fully_addressable:
        x.copy_to_host_async()

    async def begin():
      return [write for folder, tree in folders.items() for write in await self._orbax.async_save(
          epath.Path(folder), args=ocp.args.PyTreeSave(jax.tree.map(_snapshot, tree))) or ()]

    _mute_late_writes()
    if not self._loop:       # a notebook's main thread has its own; TensorStore reports to it late
      self._loop = asyncio.new_event_loop()
      threading.Thread(target=self._loop.run_forever, name='saves', daemon=True).start()
    return asyncio.run_coroutine_threadsafe(begin(), self._loop).result()

  def finish(self, folder: Path) -> None:
    """Once all processes have written theirs, in one of them."""
    self._orbax.finalize(epath.Path(folder))


def reader(signatures):
  """read(folder, abstract tree) -> tree. signatures: (shape, dtype) of all arrays it will see."""
  # the largest array's bytes at once, and not a second copy of the model
  most = max((math.prod(shape) * 4 for shape, _ in signatures), default=0) // 10 ** 9 + 1
  orbax = ocp.PyTreeCheckpointHandler(use_ocdbt=True, restore_concurrent_gb=most)
  return lambda folder, tree: orbax.restore(epath.Path(folder), args=ocp.args.PyTreeRestore(
      item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)))


@functools.cache
def _mute_late_writes():
  """The first failed write ends a save, and Orbax's thread closes its loop; TensorStore's threads
  still report every other failed one to it, for each of which Python would print a trace."""
  hook = sys.unraisablehook

  def said(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed' or unraisable.object is not None:
      hook(unraisable)
  sys.unraisablehook = said


def _without_copies() -> dict:
  numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
  return dict(type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, numpy), (jax.Array, ocp.type_handlers.ArrayHandler())))


def _snapshot(x):
  """Array -> what Orbax saves: numpy if this host holds it all, else the shards of each process.

  Orbax copies either to the host before async_save returns, so `x` may then be donated. (On CPU
  np.asarray is a view; JAX does not reuse a donated buffer while a view of it lives.)
  """
  return x if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)
