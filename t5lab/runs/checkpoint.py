"""Checkpoints that are whole or absent: Orbax writes the arrays, this module commits them.

  checkpoints/step_00000020/MANIFEST.json     see runs/manifests.py
  checkpoints/step_00000020/state/params/…    one Orbax tree (OCDBT) per top-level key of the state,
  checkpoints/step_00000020/state/opt_state/… so that inference reads and verifies params alone

A save copies the state to the host and returns. A thread then writes the arrays to a temporary
directory, flushes and hashes them, writes the manifest, renames the directory, flushes the parent
and removes old steps. A committed step is never written to again.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import os
import shutil
import threading
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from t5lab import files, trees
from t5lab.errors import CheckpointError, NumericalError, first_line
from t5lab.parallel import multihost
from t5lab.runs import array_files, injected_faults, manifests, rundir
from t5lab.runs.step_directory import CORRUPT, StepDirectory

MUST_BE_FINITE = ('params', 'ema')  # an optimizer state may hold an inf ("best loss so far")
LISTED = 10  # arrays that differ, in an error

# Not through devices: a collective in a save's thread would meet those of the train step.
_barrier = functools.partial(multihost.barrier, seconds=600)


class Checkpoints(StepDirectory):
  """Saves and restores the steps in `directory`.

  Keeps the newest `keep` steps (0: all) and the best one by `best_metric`. One trainer writes,
  under runs/lock.py; any number of programs read. In a run of several processes all of them call
  save, wait and restore in the same order, on a shared file system; process 0 writes the manifest,
  renames, prunes and quarantines.
  """

  def __init__(self, directory, *, keep: int = 3, best_metric: str = '', best_mode: str = 'max',
               copy: bool = True, log=print):
    """copy: False saves a copy on the host; the arrays must then not change until wait()."""
    super().__init__(directory, best_metric=best_metric, best_mode=best_mode, log=log)
    self._keep = keep
    self._is_main = multihost.is_main()
    self._writer = array_files.Writer(copy)
    self._thread: threading.Thread | None = None   # the save in progress
    self._error: CheckpointError | None = None     # of the save before

  # --- saving ----------------------------------------------------------------------------------

  def save(self, step: int, state, *, meta: Mapping, metrics: Mapping | None = None) -> bool:
    """Starts to save `state`, a pytree of arrays, and returns; the caller may donate it at once.

    Joins the previous save first, so a failure of that one is raised here. Returns False if the
    step exists already and is whole.

    meta: JSON of the caller's choice, e.g. config hash, git revision, mesh, data position.
    Errors: NumericalError, and nothing is written, if params or ema are not finite.
    """
    self.wait()
    if multihost.broadcast(lambda: self._is_saved(step)):
      self._log(f'checkpoint of step {step} exists already, not written again')
      return False
    self._check_finite(step, state)
    meta = dict(meta)
    json.dumps(meta)  # raises a TypeError now rather than in the thread
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    manifest = manifests.Manifest(step, {}, manifests.signatures(state), meta, metrics)

    # If the run's directory disappeared, mkdir would make a new one that holds this step alone.
    if self._is_main and not self.directory.parent.is_dir():
      raise CheckpointError(f'{self.directory.parent} was removed or unmounted during the run: '
                            f'step {step} is not saved')
    token = multihost.broadcast(lambda: uuid.uuid4().int >> 98)
    temporary = self.directory / f'step_{step:08d}.tmp-{token:08x}'

    # Plain nested dicts: the files depend on paths, not on the classes of a library's version.
    by_folder = {temporary / 'state' / part: trees.unflatten(flat)
                 for part, flat in _by_part(trees.flatten(state)).items()}
    try:
      if self._is_main:
        for folder in by_folder:
          folder.mkdir(parents=True)
      _barrier(f'{temporary.name}_made')
      writes = self._writer.start(by_folder)
    except BaseException as e:
      self._discard(temporary)
      if isinstance(e, OSError):
        raise CheckpointError(f'cannot write {temporary}: {e.strerror}') from e
      raise

    self._thread = threading.Thread(
        target=self._finish_save, args=(manifest, temporary, list(by_folder), writes),
        name='checkpoint')
    self._thread.start()
    return True

  def wait(self, timeout: float | None = None) -> None:
    """Joins the save in progress.

    Errors: CheckpointError if it failed or took more than `timeout` seconds.
    """
    if self._thread:
      self._thread.join(timeout)
      if self._thread.is_alive():
        raise CheckpointError(f'saving to {self.directory} has not ended after {timeout} s')
      self._thread = None
    if self._error:
      error, self._error = self._error, None
      raise error

  def annotate(self, step: int, metrics: Mapping) -> None:
    """Annotates like StepDirectory; joins the save in progress first."""
    self.wait()
    super().annotate(step, metrics)

  def _finish_save(self, manifest, temporary, folders, writes):
    """The thread of a save: commits it, or leaves the error for `wait`."""
    try:
      _join(writes)
      _barrier(f'{temporary.name}_written')
      if self._is_main:
        self._commit(manifest, temporary, folders)
        self._prune()
      _barrier(f'{temporary.name}_committed')
    except Exception as e:
      self._discard(temporary)
      newest = self.newest()
      committed = 'no step is committed' if newest is None else f'newest committed step: {newest}'
      self._error = CheckpointError(f'saving step {manifest.step} to {self.directory} failed: '
                                    f'{first_line(e, 300)} ({committed})')
      self._error.__cause__ = e

  def _commit(self, manifest, temporary, folders):
    step = manifest.step
    for folder in folders:
      self._writer.finish(folder)
    manifest = dataclasses.replace(manifest, files=manifests.seal(temporary))
    injected_faults.failpoint('before_manifest', step)
    manifests.write(temporary, manifest)
    injected_faults.failpoint('before_rename', step)
    os.rename(temporary, self.path(step))
    injected_faults.failpoint('after_rename', step)
    files.fsync_directory(self.directory)

  def _prune(self):
    """Removes all but the newest `keep` steps that look whole, the best step and damaged steps.

    A damaged step is not counted, so it cannot push out the last good one.
    """
    if not self._keep:
      return
    best = self.best_step() if self.best_metric else None
    whole = 0
    for step in reversed(self.steps()):
      try:
        self._verify(step, full=False)
      except CheckpointError:
        continue
      whole += 1
      if whole > self._keep and step != best:
        self._remove(step)

  def _is_saved(self, step) -> bool:
    """True if the step is committed and whole; quarantines it if it is damaged."""
    if step not in self.steps():
      return False
    try:
      self._verify(step, full=True)
      return True
    except CheckpointError as e:
      self._quarantine(step, e)
      return False

  def _check_finite(self, step, state):
    arrays = {path: x for path, x in trees.flatten(state).items()
              if path.split('/')[0] in MUST_BE_FINITE and jnp.issubdtype(x.dtype, jnp.inexact)}
    on_host = {path: x for path, x in arrays.items() if isinstance(x, np.ndarray)}
    on_devices = {path: x for path, x in arrays.items() if path not in on_host}

    # A float64 sum of float32 numbers is finite iff they all are, and needs no memory.
    bad = [path for path, x in on_host.items() if not np.isfinite(x.sum(dtype=np.float64))]
    if on_devices:
      are_finite = multihost.fetch(_are_finite(list(on_devices.values())))
      bad += [path for path, is_finite in zip(on_devices, are_finite) if not is_finite]
    if bad:
      raise NumericalError(
          f'step {step} is not saved: {len(bad)} of {len(arrays)} arrays of params and ema are not '
          f'finite, first {bad[0]}; newest committed step: {self.newest()}')

  def _discard(self, temporary):
    if self._is_main:
      shutil.rmtree(temporary, ignore_errors=True)

  # --- restoring -------------------------------------------------------------------------------

  def restore(self, abstract_state, step: int | None = None, *, only=(), quarantine: bool = False):
    """Returns (state, manifest), or None if nothing was ever saved here.

    abstract_state: the state with a jax.ShapeDtypeStruct for each array. Arrays are read straight
    into its shardings, or as numpy arrays where it names none. Its paths, shapes and dtypes must
    equal the checkpoint's: nothing is cast, padded or filled.
    step: None is the newest step that verifies. `quarantine`, for the trainer, renames steps that
    do not verify to step_N.corrupt.
    only: top-level keys, e.g. ('params',). The state is then {key: subtree}, and nothing else is
    read.
    Errors: CheckpointError if no step verifies, or that lists the arrays that differ.
    """
    abstract = _select(abstract_state, only)
    rundir.warn_if_others_write(self.directory, self._log)
    chosen = multihost.broadcast(lambda: self._choose_step(step, only, quarantine))
    if chosen is None:
      return None

    # The manifest says what arrays there are, before any of them is read.
    path, manifest = self.path(chosen), self.manifest(chosen)
    expected = manifests.signatures(abstract)
    saved = {name: leaf for name, leaf in manifest.leaves.items()
             if not only or name.split('/')[0] in only}
    _check_same_arrays(path, expected, saved)

    # The largest signature bounds the memory that reading needs at once.
    read = array_files.reader(expected.values())
    arrays = {}
    for part, flat in _by_part(trees.flatten(abstract)).items():
      try:
        tree = read(path / 'state' / part, trees.unflatten(flat))
      except Exception as e:
        # The bytes are those that were saved, so an older step would not help.
        raise CheckpointError(f'{path}: cannot read {part}: {first_line(e, 300)}') from e
      arrays |= trees.flatten(tree)
    if manifests.signatures(arrays) != expected:
      raise CheckpointError(f'{path}: arrays differ from {manifests.NAME}')
    return trees.unflatten(arrays, like=abstract), manifest

  def _choose_step(self, step, only, quarantine) -> int | None:
    """Returns the step to read, verified, or None if nothing was ever saved."""
    parts = only or None
    if step is not None:
      self.verify(step, parts=parts)
      return step

    # The newest step that verifies. Steps that are unreadable or of a newer format are not ours to
    # rename or to skip: their errors, which are not Invalid, end the search.
    damaged = []
    for candidate in reversed(self.steps()):
      try:
        self._verify(candidate, full=True, parts=parts)
        return candidate
      except manifests.Invalid as e:
        damaged.append(str(e))
        if quarantine:
          self._quarantine(candidate, e)
        else:
          self._log(f'checkpoint of step {candidate} skipped, it is damaged: {e}')

    # Starting from scratch is for directories that never held a step.
    quarantined = sorted(filter(CORRUPT.fullmatch, self._names()))
    if not damaged and not quarantined:
      return None
    if damaged:
      what = f'{len(damaged)} damaged, newest: {damaged[0]}'
    else:
      what = f'{len(quarantined)} damaged: {", ".join(quarantined[:5])}'
    raise CheckpointError(f'{self.directory}: no checkpoint is valid ({what}); not starting from '
                          'scratch: repair one, or choose another --workdir')


def _join(writes):
  """Waits for all writes, also after a failure: a running one would outlive the clean-up."""
  failures = []
  for write in writes:
    try:
      write.result()
    except Exception as e:
      failures.append(e)
  if failures:
    raise failures[0]


@jax.jit
def _are_finite(leaves):  # -> bool[len(leaves)]
  return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def _by_part(flat: dict) -> dict[str, dict]:
  """{'params/a': x, 'step': y} -> {'params': {'params/a': x}, 'step': {'step': y}}."""
  parts = {}
  for path, leaf in flat.items():
    parts.setdefault(path.split('/')[0], {})[path] = leaf
  return parts


def _select(state, only):
  if not only:
    return state
  return {key: state[key] if isinstance(state, Mapping) else getattr(state, key) for key in only}


def _check_same_arrays(path, expected, saved):
  lines = [f'\n  {line}' for line in manifests.differences(expected, saved)]
  if not lines:
    return
  total = len(expected.keys() | saved.keys())
  listed = ''.join(lines[:LISTED])
  if len(lines) > LISTED:
    listed += f'\n  … and {len(lines) - LISTED} more'
  raise CheckpointError(
      f'{path} holds another model: {len(lines)} of {total} arrays differ{listed}')
