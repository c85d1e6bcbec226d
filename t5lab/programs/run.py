"""The state of a run: where it starts, what a step changes, and what a checkpoint holds of it.

The training loop and `t5lab replay` take their steps through `Run`, and so compute the same.
"""

import dataclasses

from t5lab.parallel import multihost, sharding
from t5lab.programs import loading
from t5lab.runs import injected_faults
from t5lab.training import digests, guards


class Run:
  """A run between two steps: `begin` or `resume`, then `advance` and `account` for each step.

  state, guard: the TrainState and the Guard after `step`, on their devices.
  base: the frozen weights under adapters, or None.
  initial: the Loaded weights of init.path that this process read, without arrays, or None.
  offset: the number of batches that rewinds skipped. Step s reads batch s + offset of the stream,
    counted from 1.
  digest, updates: the digest of all batches and the number of updates up to the last `account`.
  """

  def __init__(self, c, program, data, workdir, rows=None):
    """rows: those of each batch that this process holds; None: all."""
    self.config, self.program, self.data, self.workdir = c, program, data, workdir
    self.rows, self.fault = rows, injected_faults.requested()
    self.state = self.guard = self.base = self.initial = None
    self.step = self.offset = self.updates = 0
    self.digest = ''

  def begin(self) -> None:
    """Step 0, from the seed or from the weights of init.path."""
    self.state = None                      # its memory is needed for the new one
    initial = self._load_initial() if self.config.init.path else None
    self._go_to(0, self.program.first_state(initial), {}, None)

  def resume(self, restored, *, check_data: bool = True) -> None:
    """The step of a checkpoint. restored: (TrainState, Manifest) of Checkpoints.restore.

    Errors: CheckpointError for adapters of other weights than init.path now has; DataError, if
    check_data, for data that is not that of the checkpoint.
    """
    state, manifest = restored
    meta = manifest.meta
    if self.config.lora.rank:
      initial = self._load_initial() if self.base is None else self.initial
      loading.check_base(initial, meta, self.config, self.workdir)
    if check_data:
      self.data.check_position(meta['data'])
    self._go_to(manifest.step, state, meta['data'], meta.get('guard'))

  def _load_initial(self) -> loading.Loaded:
    initial = self.program.load_initial()
    self.base = initial.params if self.config.lora.rank else None
    self.initial = dataclasses.replace(initial, params=None)
    return initial

  def _go_to(self, step, state, data, guard) -> None:
    """data, guard: what `meta` wrote into the checkpoint of this step."""
    self.step, self.state = step, state
    self.offset, self.digest = data.get('offset', 0), data.get('digest', '')
    self.guard = self.program.make_guard(guard)
    self.updates = int(state.step)  # skipped steps made none

  def inject(self, batch, number: int):
    """Batch `number` of the stream, from 1, with the fault that a test asked for."""
    if not self.fault:
      return batch
    return self.fault.inject(batch, number, rows=self.rows, process=multihost.index())

  def put(self, batch):
    """This process's rows of a batch -> global arrays."""
    return sharding.put(batch, self.program.mesh, self.rows, size=self.config.data.batch_size)

  def advance(self, batch) -> dict:
    """Dispatches the next step on a global batch and returns its metrics, still on the devices."""
    self.state, self.guard, metrics = self.program.step(self.state, batch, self.base, self.guard)
    self.step += 1
    return metrics

  def account(self, metrics: dict) -> float:
    """Counts a step whose metrics are on the host. Returns its learning rate.

    Takes the digest of the batch out of the metrics.
    """
    self.digest = digests.chain(self.digest, metrics.pop('batch'))
    learning_rate = float(self.program.schedule(self.updates))
    self.updates += not metrics['skipped']
    return learning_rate

  def meta(self) -> dict:
    """The metadata for a checkpoint of this step, which `resume` reads back."""
    position = self.data.position(self.step + self.offset)
    return {'data': {**position, 'offset': self.offset, 'digest': self.digest},
            'guard': guards.to_json(self.guard)}
