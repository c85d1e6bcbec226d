"""The checkpoint directory of a run as it is on disk: its committed steps and their metrics.

  step_00000020/               a committed step, see runs/manifests.py; never written to again
  step_00000030.tmp-1f02ab34/  a save in progress, or one that was killed; clean() removes it
  step_00000010.corrupt/       a step that failed verification, kept for inspection
  annotations.json             {step: metrics measured after the step was committed}
"""

from collections.abc import Mapping
import contextlib
import json
import math
import os
from pathlib import Path
import re
import shutil
import uuid

from t5lab import files
from t5lab.errors import CheckpointError
from t5lab.parallel import multihost
from t5lab.runs import manifests

COMMITTED = re.compile(r'step_(\d{8,})')
TEMPORARY = re.compile(r'step_\d+\.tmp-\w+')
CORRUPT = re.compile(r'step_\d+\.corrupt.*')
ANNOTATIONS = 'annotations.json'


class StepDirectory:
  """Lists, verifies, annotates and quarantines the steps in `directory`."""

  def __init__(self, directory, *, best_metric: str = '', best_mode: str = 'max', log=print):
    if best_mode not in ('max', 'min'):
      raise ValueError(f"best_mode must be 'max' or 'min', got {best_mode!r}")
    self.directory = Path(os.path.abspath(directory))  # Orbax refuses relative paths, too late
    self.best_metric, self._best_mode = best_metric, best_mode
    self._log = log

  def steps(self) -> list[int]:
    """Committed steps, oldest first. Lists the directory only; the steps need not verify."""
    matches = map(COMMITTED.fullmatch, self._names())
    return sorted(int(match[1]) for match in matches if match)

  def newest(self) -> int | None:
    return max(self.steps(), default=None)

  def path(self, step: int) -> Path:
    return self.directory / f'step_{step:08d}'

  def manifest(self, step: int) -> manifests.Manifest:
    """Returns the manifest of a step with its annotations merged into its metrics."""
    self._require(step)
    manifest = manifests.read(self.path(step))
    manifest.metrics.update(self._annotations().get(step, {}))
    return manifest

  def verify(self, step: int, full: bool = True, parts=None) -> manifests.Manifest:
    """Checks names, kinds and sizes of a step's files, and SHA-256 if `full`.

    parts: hash only these top-level keys.
    Errors: CheckpointError; its subclass manifests.Invalid if the step is damaged.
    """
    self._require(step)
    return self._verify(step, full, parts)

  def best_step(self) -> int | None:
    """Returns the step with the best finite `best_metric`, the newest among equals, or None."""
    sign = 1 if self._best_mode == 'max' else -1
    values = {}
    for step in self.steps():
      with contextlib.suppress(manifests.Invalid):
        value = self.manifest(step).metrics.get(self.best_metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
          values[step] = sign * value
    return max(reversed(values), key=values.get, default=None)

  def annotate(self, step: int, metrics: Mapping) -> None:
    """Adds metrics that were measured after `step` was committed.

    They are stored beside the steps, so the files that were hashed stay as they are.
    """
    self._require(step)
    if not multihost.is_main():
      return
    annotations = self._annotations()
    new = {name: float(value) for name, value in metrics.items()}
    annotations[step] = annotations.get(step, {}) | new
    steps = self.steps()
    remaining = {str(s): annotations[s] for s in sorted(annotations) if s in steps}
    files.write_text(self.directory / ANNOTATIONS, json.dumps(remaining, indent=1) + '\n')

  def clean(self) -> list[str]:
    """Removes the directories that killed saves left and returns their names.

    For the trainer at its start, while it holds the run's lock.
    """
    stale = list(filter(TEMPORARY.fullmatch, self._names()))
    if multihost.is_main():
      for name in stale:
        shutil.rmtree(self.directory / name)  # refuses a symlink
    return stale

  # --- for Checkpoints -------------------------------------------------------------------------

  def _names(self) -> list[str]:
    try:
      return os.listdir(self.directory)
    except FileNotFoundError:
      return []
    except OSError as e:
      raise CheckpointError(f'cannot read {self.directory}: {e.strerror}') from None

  def _require(self, step):
    steps = self.steps()
    if step not in steps:
      available = ', '.join(map(str, steps)) or 'none'
      raise CheckpointError(
          f'no checkpoint of step {step} in {self.directory}; available steps: {available}')

  def _verify(self, step, full, parts=None) -> manifests.Manifest:
    """`verify` for a step that was listed, but may disappear meanwhile."""
    path = self.path(step)
    try:
      manifest = manifests.verify(path, full=full, parts=parts)
    except OSError as e:
      raise CheckpointError(f'cannot read {e.filename or path}: {e.strerror}') from e
    if manifest.step != step:
      raise manifests.Invalid(f'{path}: its manifest is of step {manifest.step}')
    return manifest

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

  def _remove(self, step):
    """Removes a committed step. It is renamed first: a kill half-way must not leave half a step."""
    doomed = self.path(step).with_name(f'step_{step:08d}.tmp-pruned')
    try:
      os.rename(self.path(step), doomed)
      shutil.rmtree(doomed)
    except OSError as e:  # not worth ending the run: the new step is committed already
      self._log(f'cannot remove {self.path(step)}: {e.strerror}')

  def _annotations(self) -> dict[int, dict]:
    path = self.directory / ANNOTATIONS
    try:
      text = path.read_text()
      return {int(step): dict(metrics) for step, metrics in json.loads(text).items()}
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, TypeError, AttributeError) as e:
      self._log(f'{path} ignored: {e}')
      return {}
