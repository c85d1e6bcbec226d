"""A window of a run computed again from what its folder holds: config, checkpoint, data position.

Program, data and seed are those of the run, so every number is too, bit for bit, on the same
software and the same kind and number of devices. Nothing is written into the run's folder, and
nothing stored there is executed.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from t5lab import config, trees
from t5lab.errors import CheckpointError, UsageError
from t5lab.parallel import sharding
from t5lab.programs import build, loading, streams
from t5lab.programs.run import Run
from t5lab.runs import jsonl, rundir, sentry

PARTS = ('params', 'opt_state', 'ema', 'step')      # of a TrainState


@dataclasses.dataclass(frozen=True)
class ReplayedStep:
  """A step taken again.

  number, batch: the number of the batch in the stream, from 1, and its numpy model features.
  row: what metrics.jsonl has for a step, except its timing. halted: the guard ended the run here.
  """
  step: int
  number: int
  batch: dict[str, np.ndarray]
  row: dict
  halted: bool


class Replay(Run):
  """A run at one of its steps: `start_at(S)`, then `next_step()` for each step after S.

  modules: modules that register the tasks of the run; the ones that the run names are not imported.
  state: the TrainState after `step`; the next step takes over its buffers.
  Errors: UsageError if it is not a run, DataError if the data has changed, CheckpointError if no
  checkpoint is intact.
  """

  def __init__(self, workdir, modules=(), log=functools.partial(print, flush=True)):
    c = loading.read_config(workdir)
    modules_of_run, c.data.modules = tuple(c.data.modules), tuple(modules)
    self.checkpoints = loading.open_checkpoints(c, workdir, log=log)
    program = build.program(c)
    try:
      data = streams.open_stream(c).batches
    except UsageError as e:
      if not modules_of_run or modules:
        raise
      names = ','.join(modules_of_run)
      raise UsageError(f'{e} The run imported {names}; modules that a saved config names are '
                       f'imported only if you add --modules {names}') from e
    super().__init__(c, program, data, Path(workdir))
    for step in self.checkpoints.steps()[-1:]:
      data.check_position(self.checkpoints.manifest(step).meta['data'])
    self._rewinds = _read_rewinds(workdir)

  def free_state(self) -> None:
    """Frees the memory of the state; `start_at` makes another."""
    self.state = None

  def start_at(self, step: int) -> None:
    """Goes to the state after `step`: that of its checkpoint, or for 0 that of the seed."""
    self.free_state()
    steps = [0, *self.checkpoints.steps()]
    if step not in steps:
      raise CheckpointError(f'{self.workdir} has no checkpoint of step {step} to start from; '
                            f'available: {", ".join(map(str, steps))} (0 is the seed)')
    if step == 0:
      self.begin()
    else:
      self.resume(self.checkpoints.restore(self.program.abstract, step))
    self._start = step
    self._apply_rewinds()

  def _apply_rewinds(self) -> None:
    for step, offset in self._rewinds:    # the last one that applies
      if self._start <= step <= self.step:
        self.offset = offset

  def next_batch(self) -> tuple[int, dict[str, np.ndarray]]:
    """(number in the stream, features) of the batch that the next step reads."""
    number = self.step + 1 + self.offset
    return number, self.inject(self.data.batch(number - 1), number)

  def next_step(self) -> ReplayedStep:
    number, batch = self.next_batch()
    with self.using_mesh():
      metrics = jax.device_get(self.advance(self.put(batch)))
    halted = bool(metrics.pop('halted'))
    learning_rate = self.account(metrics)
    self._apply_rewinds()
    row = {'step': self.step, **{name: float(x) for name, x in metrics.items()},
           'lr': learning_rate, 'data': self.digest}
    return ReplayedStep(self.step, number, batch, row, halted)

  def using_mesh(self):
    return sharding.use(self.program.mesh, self.config.rules)

  def saved(self, step: int, part: str) -> dict[str, np.ndarray]:
    """{path: array} of a part of a checkpoint ('params', 'opt_state', …), verified."""
    state, _ = self.checkpoints.restore(self.program.abstract, step, only=(part,))
    return trees.flatten(state)

  def config_changed_since(self, step: int) -> bool:
    """True if config.json was changed after the checkpoint of `step` was written."""
    if step == 0:
      return False
    then = self.checkpoints.manifest(step).meta.get('config')
    return then != config.digest(config.from_dict(rundir.read_config(self.workdir)))


def _read_rewinds(workdir) -> list[tuple[int, int]]:
  """[(step, offset)]: from that step on, batches come `offset` later."""
  rewinds = []
  for record in sentry.read_anomalies(workdir):
    if 'rewound_to' in record:
      step = int(record['rewound_to'])
      rewinds = [rewind for rewind in rewinds if rewind[0] < step]
      rewinds.append((step, int(record['offset'])))
  return rewinds


# --- comparing ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
  """count: of the elements that differ. largest: of |a - b|. text: says all of it."""
  name: str
  count: int
  largest: float
  text: str


def read_rows(workdir) -> dict[int, dict]:
  """{step: training row of metrics.jsonl without its timing}."""
  rows = {}
  for row in jsonl.read(Path(workdir) / 'metrics.jsonl', 'step'):
    if 'loss' in row:
      rows[row['step']] = {name: value for name, value in row.items() if name != 'timing'}
  return rows


def differing_keys(a: dict, b: dict) -> list[str]:
  """Keys that both rows have with values of different bits; causes before effects."""
  bits = lambda x: x.hex() if isinstance(x, float) else x
  causes_first = {'data': 0, 'loss': 1}
  differing = [k for k in a if k in b and bits(a[k]) != bits(b[k])]
  return sorted(differing, key=lambda k: causes_first.get(k, 2))


def compare(name: str, a, b) -> Difference | None:
  """None if the arrays have the same bits (so NaN equals NaN)."""
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape or a.dtype != b.dtype:
    show = lambda x: f'{x.dtype}[{",".join(map(str, x.shape))}]'
    return Difference(name, a.size, np.inf, f'{show(a)} and {show(b)}')
  as_bits = lambda x: np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}')
  differs = as_bits(a) != as_bits(b)
  if not differs.any():
    return None
  count = int(differs.sum())
  first = np.argwhere(differs)[0].tolist()
  with np.errstate(invalid='ignore'):
    distance = np.abs(a[differs].astype(np.float64) - b[differs].astype(np.float64))
  largest = float(np.max(distance))
  values = [x[tuple(first)].item() for x in (a, b)]
  return Difference(name, count, largest,
                    f'{count} of {a.size} elements, max |difference| {largest:.3g}, '
                    f'first at {first}: {values[0]!r} and {values[1]!r}')


def compare_trees(a: dict, b: dict) -> list[Difference]:
  """The differences of {path: array}, in the order of a."""
  differences = []
  for path in {**a, **b}:
    if path not in a or path not in b:
      differences.append(Difference(path, 1, np.inf, 'only one of them has it'))
    elif difference := compare(path, a[path], b[path]):
      differences.append(difference)
  return differences


def compare_checkpoint(replay: Replay, step: int) -> tuple[int, list[Difference]]:
  """(number of arrays, differences) between the replay's state and the checkpoint of `step`."""
  count, differences = 0, []
  for part in PARTS:
    ours = trees.flatten({part: getattr(replay.state, part)})
    if ours:
      count += len(ours)
      differences += compare_trees(ours, replay.saved(step, part))
  return count, differences
