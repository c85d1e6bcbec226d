"""The state of a run: where it starts, what a step changes, and what a checkpoint holds of it.

The training loop and `t5lab replay` take their steps through the same `Run`, so a replay computes
what the run computed.
"""

import dataclasses

from t5lab.programs import loading
from t5lab.runs.position import Position, checkpoint_meta
from t5lab.training import digests


class Run:
  """A run between two steps: `begin` or `resume`, then `advance` and `account` for each step.

  state, guard: the TrainState and the Guard after `step`, on their devices.
  base: the frozen weights under adapters, or None.
  initial: the Loaded weights of init.path that this process read, without arrays, or None.
  offset: the number of batches that rewinds skipped. Step s reads batch s + offset of the stream,
    counted from 1.
  digest, updates: the digest of all batches and the number of updates up to the last `account`.
  """

  def __init__(self, c, program, data, workdir):
    self._c, self._program, self._data, self._workdir = c, program, data, workdir
    self.state = self.guard = self.base = self.initial = None
    self._set_position(Position())

  def begin(self) -> None:
    """Step 0, from the seed or from the weights of init.path."""
    self.state = None                      # its memory is needed for the new one
    initial = self._load_initial() if self._c.init.path else None
    self.state = self._program.first_state(initial)
    self._set_position(Position())

  def resume(self, restored, *, check_data: bool = True) -> None:
    """The step of a checkpoint. restored: (TrainState, Manifest) of Checkpoints.restore.

    Errors: CheckpointError for adapters of other weights than init.path now has; DataError, if
    check_data, for data that is not that of the checkpoint.
    """
    state, manifest = restored
    if self._c.lora.rank:
      initial = self._load_initial() if self.base is None else self.initial
      loading.check_base(initial, manifest.meta, self._c, self._workdir)
    if check_data:
      self._data.check_position(manifest.meta['data'])
    self.state = state
    self._set_position(Position.from_manifest(manifest))

  def _load_initial(self) -> loading.Loaded:
    initial = self._program.load_initial()
    self.base = initial.params if self._c.lora.rank else None
    self.initial = dataclasses.replace(initial, params=None)
    return initial

  def _set_position(self, position: Position) -> None:
    self.step, self.offset, self.digest = position.step, position.offset, position.digest
    if self.state is not None:
      self.guard = self._program.make_guard(position.guard)
      self.updates = int(self.state.step)  # skipped steps made none

  def advance(self, batch) -> dict:
    """Dispatches the next step on a global batch and returns its metrics, still on the devices."""
    self.state, self.guard, metrics = self._program.step(
        self.state, batch, self.base, self.guard)
    self.step += 1
    return metrics

  def account(self, metrics: dict) -> float:
    """Counts a step whose metrics are on the host. Returns its learning rate.

    Takes the digest of the batch out of the metrics.
    """
    self.digest = digests.chain(self.digest, metrics.pop('batch'))
    learning_rate = float(self._program.schedule(self.updates))
    self.updates += not metrics['skipped']
    return learning_rate

  def meta(self) -> dict:
    """The metadata for a checkpoint of this step."""
    return checkpoint_meta(self.step, self.offset, self.digest, self.guard, self._data)
