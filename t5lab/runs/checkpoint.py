"""Checkpoints that are whole or do not exist: Orbax arrays under our manifest and commit protocol.

  checkpoints/step_00000020/MANIFEST.json     see runs/manifest.py
  checkpoints/step_00000020/state/params/…    one Orbax tree (OCDBT) per top-level key of the state,
  checkpoints/step_00000020/state/opt_state/… so that inference reads and verifies params alone
  checkpoints/annotations.json                {step: metrics measured after the step was committed}
  checkpoints/step_00000030.tmp-1f…           a save in progress, or killed: clean() removes it
  checkpoints/step_00000010.corrupt           did not verify; kept for you to look at

A save copies the state to the host and returns; a thread writes the arrays to the .tmp directory,
flushes and hashes them, writes the manifest, renames, flushes the parent and prunes. A committed
step is never written to again.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
import re
import shutil
import signal
import threading
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from t5lab import files, trees
from t5lab.errors import CheckpointError, NumericalError
from t5lab.parallel import multihost
from t5lab.runs import array_files, manifests, rundir

STEP = re.compile(r'step_(\d{8,})')
ANNOTATIONS = 'annotations.json'
FINITE = ('params', 'ema')  # optimizer states may hold an honest inf ("best loss so far")
BARRIER_SECONDS = 600


class Checkpoints:
  """The steps in `directory`: the newest `keep` (0: all) and the best one by `best_metric`.

  One trainer writes (under RunLock), any number of programs read. In a run of several
  processes all of them call save, wait and restore alike, on a shared file system; process 0
  writes the manifest, renames, prunes and quarantines.
  """

  def __init__(self, directory, *, keep: int = 3, best_metric: str = '', best_mode: str = 'max',
               copy: bool = True, log=print):
    """copy: False promises that arrays stay as they are until wait(), and saves no copy of them."""
    if best_mode not in ('max', 'min'):
      raise ValueError(f"best_mode is 'max' or 'min', not {best_mode!r}")
    self.directory = Path(os.path.abspath(directory))  # Orbax refuses relative paths, too late
    self._keep = keep
    self.best_metric, self._best_mode = best_metric, best_mode
    self._log = log
    self._main = multihost.is_main()
    self._thread: threading.Thread | None = None
    self._error: CheckpointError | None = None
    self._writer = array_files.Writer(copy)

  # --- listing ---------------------------------------------------------------------------------

  def steps(self) -> list[int]:
    """Committed steps, oldest first, from the disk alone; they need not verify."""
    return sorted(int(m[1]) for name in self._names() if (m := STEP.fullmatch(name)))

  def path(self, step: int) -> Path:
    return self.directory / f'step_{step:08d}'

  def manifest(self, step: int) -> manifests.Manifest:
    """Manifest of a step, annotations merged into its metrics; reads no arrays."""
    self._require(step)
    found = manifests.read(self.path(step))
    found.metrics.update(self._annotations().get(step, {}))
    return found

  def verify(self, step: int, full: bool = True) -> manifests.Manifest:
    """Checks names, kinds and sizes of a step's files, and SHA-256 if `full`; CheckpointError."""
    self._require(step)
    found = self._verified(step, full)
    if isinstance(found, CheckpointError):
      raise found
    return found

  def best_step(self) -> int | None:
    """The step with the best finite `best_metric`, the newest among equals; None if none has it."""
    best = None
    for step in self.steps():
      try:
        value = self.manifest(step).metrics.get(self.best_metric)
      except manifests.Invalid:
        continue
      if not isinstance(value, (int, float)) or not math.isfinite(value):
        continue
      value = value if self._best_mode == 'max' else -value
      if best is None or value >= best[0]:
        best = value, step
    return best and best[1]

  def annotate(self, step: int, metrics: Mapping) -> None:
    """Attaches metrics measured later to a committed step; waits for a save in progress.

    They lie beside the steps, so what was committed and hashed stays as it is.
    """
    self.wait()
    self._require(step)
    if not self._main:
      return
    notes = self._annotations()
    notes[step] = notes.get(step, {}) | {k: float(v) for k, v in metrics.items()}
    kept = set(self.steps())
    files.write_text(self.directory / ANNOTATIONS, json.dumps(
        {str(s): m for s, m in sorted(notes.items()) if s in kept}, indent=1) + '\n')

  def clean(self) -> list[str]:
    """Removes what killed saves left -> the names. For the trainer at its start, under the lock."""
    stale = [name for name in self._names() if re.fullmatch(r'step_\d+\.tmp-\w+', name)]
    for name in stale if self._main else ():
      shutil.rmtree(self.directory / name)  # refuses a symlink
    return stale

  # --- saving ----------------------------------------------------------------------------------

  def save(self, step: int, state, *, meta: Mapping, metrics: Mapping | None = None) -> bool:
    """Starts to save `state`, a pytree of arrays, and returns; the caller may donate it at once.

    First joins the save before, so its failure is raised here. meta: JSON of the caller's (config
    hash, git revision, mesh, data position). False if the step exists already and is whole.
    NumericalError, and nothing is written, if params or ema are not finite.
    """
    self.wait()
    if multihost.broadcast(lambda: self._exists(step)):
      self._log(f'checkpoint of step {step} exists already, not written again')
      return False
    self._check_finite(step, state)
    json.dumps(meta := dict(meta))  # a TypeError now rather than in the thread
    metrics = {k: float(v) for k, v in (metrics or {}).items()}
    if self._main and not self.directory.parent.is_dir():   # mkdir would make another, of one file
      raise CheckpointError(f'{self.directory.parent} is gone, removed or unmounted during the '
                            f'run: step {step} is not saved')
    token = multihost.broadcast(lambda: uuid.uuid4().int >> 98)
    temporary = self.directory / f'step_{step:08d}.tmp-{token:08x}'
    try:
      # plain nested dicts: a file depends on paths, not on the classes of a library's version
      parts = {part: trees.unflatten(flat) for part, flat in _by_part(trees.flatten(state)).items()}
      for part in parts if self._main else ():
        (temporary / 'state' / part).mkdir(parents=True)
      self._barrier(f'{temporary.name}_made')
      writes = self._writer.start(
          {temporary / 'state' / part: tree for part, tree in parts.items()})
    except BaseException as e:
      if self._main:
        shutil.rmtree(temporary, ignore_errors=True)
      if isinstance(e, OSError):
        raise CheckpointError(f'cannot write {temporary}: {e.strerror}') from e
      raise
    manifest = manifests.Manifest(step, {}, manifests.signatures(state), meta, metrics)
    self._thread = threading.Thread(
        target=self._commit, args=(manifest, temporary, list(parts), writes), name='checkpoint')
    self._thread.start()
    return True

  def wait(self, timeout: float | None = None) -> None:
    """Joins the save in progress; CheckpointError if it failed or took over `timeout` seconds."""
    if self._thread:
      self._thread.join(timeout)
      if self._thread.is_alive():
        raise CheckpointError(f'saving to {self.directory} has not ended after {timeout} s')
      self._thread = None
    if self._error:
      error, self._error = self._error, None
      raise error

  def _commit(self, manifest, temporary, parts, writes):
    step = manifest.step
    try:
      failures = []
      for write in writes:  # all of them: a writer still at work would outlive the clean-up
        try:
          write.result()
        except Exception as e:
          failures.append(e)
      if failures:
        raise failures[0]
      self._barrier(temporary.name + '_written')
      if self._main:
        for part in parts:
          self._writer.finish(temporary / 'state' / part)
        sealed = manifests.seal(temporary)
        failpoint('before_manifest', step)
        manifests.write(temporary, dataclasses.replace(manifest, files=sealed))
        failpoint('before_rename', step)
        os.rename(temporary, self.path(step))
        failpoint('after_rename', step)
        files.fsync_directory(self.directory)
        self._prune()
      self._barrier(temporary.name + '_committed')
    except Exception as e:
      if self._main:
        shutil.rmtree(temporary, ignore_errors=True)
      reason = str(e).splitlines()[0][:300] if str(e) else type(e).__name__
      newest = max(self.steps(), default=None)
      self._error = CheckpointError(
          f'saving step {step} to {self.directory} failed: {reason} ' +
          ('(no step is committed)' if newest is None else f'(newest committed step: {newest})'))
      self._error.__cause__ = e

  def _prune(self):
    """Removes all but the newest `keep` steps that look whole, the best, and the damaged.

    A damaged step takes no place, so it cannot push out the last good one.
    """
    if not self._keep:
      return
    best, whole = self.best_step() if self.best_metric else None, 0
    for step in reversed(self.steps()):
      if isinstance(self._verified(step, full=False), CheckpointError):
        continue
      whole += 1
      if whole > self._keep and step != best:
        doomed = self.path(step).with_name(f'step_{step:08d}.tmp-pruned')
        try:
          os.rename(self.path(step), doomed)  # a kill half-way leaves no half step
          shutil.rmtree(doomed)
        except OSError as e:  # the new step is committed all the same
          self._log(f'cannot remove {self.path(step)}: {e.strerror}')

  def _exists(self, step) -> bool:
    if step not in self.steps():
      return False
    found = self._verified(step, full=True)
    if isinstance(found, CheckpointError):
      self._quarantine(step, found)
      return False
    return True

  def _check_finite(self, step, state):
    flat = {path: x for path, x in trees.flatten(state).items()
            if path.split('/')[0] in FINITE and jnp.issubdtype(x.dtype, jnp.inexact)}
    # a float64 sum of float32 numbers is finite if they all are, and needs no memory
    bad = [path for path, x in flat.items() if isinstance(x, np.ndarray)
           and not np.isfinite(x.sum(dtype=np.float64))]
    if there := {path: x for path, x in flat.items() if not isinstance(x, np.ndarray)}:
      finite = multihost.fetch(_finite(list(there.values())))
      bad += [path for path, ok in zip(there, finite) if not ok]
    if bad:
      raise NumericalError(f'step {step} is not saved: {len(bad)} of {len(flat)} arrays of params '
                           f'and ema are not finite, first {bad[0]}; newest committed step: '
                           f'{max(self.steps(), default=None)}')

  # --- restoring -------------------------------------------------------------------------------

  def restore(self, abstract_state, step: int | None = None, *, only=(), quarantine: bool = False):
    """-> (state, manifest), or None if nothing was ever saved here.

    abstract_state: the state with a jax.ShapeDtypeStruct for each array; arrays go straight to its
    shardings (numpy arrays where it names none). Its paths, shapes and dtypes must equal the
    checkpoint's: nothing is cast, padded or filled, and CheckpointError lists what differs.
    step: None is the newest that verifies. `quarantine`, for the trainer, renames those that do
    not to step_N.corrupt. CheckpointError if there were steps and none verifies.
    only: top-level keys such as ('params',); then state is {key: subtree}, nothing else is read.
    """
    abstract = _select(abstract_state, only)
    rundir.warn_if_others_write(self.directory, self._log)
    chosen = multihost.broadcast(lambda: self._choose(step, only, quarantine))
    if chosen is None:
      return None
    manifest = self.manifest(chosen)
    wanted = manifests.signatures(abstract)
    found = {path: leaf for path, leaf in manifest.leaves.items()
             if not only or path.split('/')[0] in only}
    if lines := manifests.differences(wanted, found):
      more = f'\n  … and {len(lines) - 10} more' if len(lines) > 10 else ''
      raise CheckpointError(f'{self.path(chosen)} holds another model: {len(lines)} of '
                            f'{len(wanted.keys() | found.keys())} arrays differ' +
                            ''.join('\n  ' + line for line in lines[:10]) + more)
    values = {}
    read = array_files.reader(wanted.values())
    for part, flat in _by_part(trees.flatten(abstract)).items():
      tree = trees.unflatten(flat)
      try:
        tree = read(self.path(chosen) / 'state' / part, tree)
      except Exception as e:
        # The bytes are those that were saved: no fall-back would help, and none is tried.
        reason = str(e).splitlines()[0][:300] if str(e) else type(e).__name__
        raise CheckpointError(f'{self.path(chosen)}: cannot read {part}: {reason}') from e
      values |= trees.flatten(tree)
    if manifests.signatures(values) != wanted:
      raise CheckpointError(f'{self.path(chosen)}: arrays differ from {manifests.NAME}')
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[p] for p in wanted]), manifest

  def _choose(self, step, only, quarantine) -> int | None:
    """The step to read, verified; None if nothing was ever saved."""
    parts = only or None
    if step is not None:
      self._require(step)
      found = self._verified(step, True, parts)
      if isinstance(found, CheckpointError):
        raise found
      return step
    reasons = []
    for candidate in reversed(self.steps()):
      found = self._verified(candidate, True, parts)
      if isinstance(found, manifests.Manifest):
        return candidate
      if not isinstance(found, manifests.Invalid):
        raise found  # unreadable or of a newer format: not ours to rename or to skip
      reasons.append(str(found))
      if quarantine:
        self._quarantine(candidate, found)
      else:
        self._log(f'checkpoint of step {candidate} skipped, it is damaged: {found}')
    corrupt = [name for name in self._names() if re.fullmatch(r'step_\d+\.corrupt.*', name)]
    if not reasons and not corrupt:
      return None
    raise CheckpointError(
        f'{self.directory}: no checkpoint is valid ({len(reasons) or len(corrupt)} damaged' +
        (f', newest: {reasons[0]}' if reasons else f': {", ".join(sorted(corrupt)[:5])}') +
        '); not starting from scratch: repair one, or choose another --workdir')

  def _verified(self, step, full, parts=None):
    """-> the manifest, or the CheckpointError that says what is wrong."""
    try:
      found = manifests.verify(self.path(step), full=full, parts=parts)
      if found.step != step:
        raise manifests.Invalid(f'{self.path(step)}: its manifest is of step {found.step}')
      return found
    except CheckpointError as e:
      return e
    except OSError as e:
      return CheckpointError(f'cannot read {e.filename or self.path(step)}: {e.strerror}')

  def _quarantine(self, step, reason):
    target = self.path(step).with_name(f'step_{step:08d}.corrupt')
    if os.path.lexists(target):
      target = target.with_name(f'{target.name}-{uuid.uuid4().hex[:8]}')
    try:
      os.rename(self.path(step), target)
    except OSError as e:
      raise CheckpointError(f'cannot rename the damaged {self.path(step)}: {e.strerror}') from e
    files.fsync_directory(self.directory)
    self._log(f'checkpoint of step {step} is damaged, renamed to {target.name}: {reason}')

  # --- small parts -----------------------------------------------------------------------------

  def _names(self) -> list[str]:
    try:
      return os.listdir(self.directory)
    except FileNotFoundError:
      return []
    except OSError as e:
      raise CheckpointError(f'cannot read {self.directory}: {e.strerror}') from None

  def _require(self, step):
    if step not in (known := self.steps()):
      raise CheckpointError(f'no checkpoint of step {step} in {self.directory}; there are: ' +
                            (', '.join(map(str, known)) or 'none'))

  def _annotations(self) -> dict[int, dict]:
    try:
      text = (self.directory / ANNOTATIONS).read_text()
      return {int(step): dict(metrics) for step, metrics in json.loads(text).items()}
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, TypeError, AttributeError) as e:
      self._log(f'{self.directory / ANNOTATIONS} ignored: {e}')
      return {}

  def _barrier(self, key):
    # not through devices: in a thread, a collective would meet those of train_step
    multihost.barrier(key, BARRIER_SECONDS)


def failpoint(name: str, step: int) -> None:
  """Kills this process here if T5LAB_FAILPOINT is `name` or `name@step`. For tests of F2 and F3."""
  if os.environ.get('T5LAB_FAILPOINT', '') in (name, f'{name}@{step}'):
    os.kill(os.getpid(), signal.SIGKILL)


@jax.jit
def _finite(leaves):  # -> bool[len(leaves)]
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
  return {k: state[k] if isinstance(state, Mapping) else getattr(state, k) for k in only}
