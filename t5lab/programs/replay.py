"""A window of a run computed again, from what lies in its folder: config, checkpoint, position.

The program, the data and the seed are those of the run, so every number should be too, bit for bit,
on the same software and the same kind and number of devices. Nothing is written into the run's
folder and nothing that lies there is executed.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from t5lab import config as configs
from t5lab import trees
from t5lab.errors import CheckpointError, UsageError
from t5lab.parallel import sharding
from t5lab.programs import build as programs
from t5lab.programs import loading, streams
from t5lab.runs import injected_faults, jsonl, rundir, sentry
from t5lab.runs.position import Position, checkpoint_meta
from t5lab.training import digests


@dataclasses.dataclass(frozen=True)
class Step:
  """A step done again. batch: the numpy model features that it read, batch `number` of the stream.
  row: what metrics.jsonl has of a step, but the timing. halted: the guard ended the run here."""
  step: int
  number: int
  batch: dict[str, np.ndarray]
  row: dict
  halted: bool


class Replay:
  """A run at one of its steps: `go(S)`, then `next()` for each step after S.

  modules: the person's own, that register the tasks which the run names. UsageError for a folder
  that is no run, DataError where the data is not that of the run, CheckpointError for damage.
  state: the TrainState after `step`; the next step takes its buffers over.
  """

  def __init__(self, workdir, modules=(), say=functools.partial(print, flush=True)):
    self.workdir = Path(workdir)
    self.config = c = loading.read_config(workdir)
    theirs, c.data.modules = tuple(c.data.modules), tuple(modules)   # named by us, or not imported
    self.checkpoints = loading.open_checkpoints(c, workdir, log=say)
    self.program = programs.build(c)
    try:
      self.data = streams.open_stream(c).batches
    except UsageError as e:
      if theirs and not modules:
        raise UsageError(f'{e} The run imported {", ".join(theirs)}, and what lies in a folder is '
                         f'not imported: name it with --modules {",".join(theirs)}') from e
      raise
    for step in self.checkpoints.steps()[-1:]:
      self.data.check_position(self.checkpoints.manifest(step).meta['data'])
    self._fault = injected_faults.requested()
    self.base = self.state = self._guard = None
    self._jumps = []         # [(step, offset)]: from there on, after a rewind
    for record in sentry.read_anomalies(workdir):
      if 'rewound_to' in record:
        to, offset = int(record['rewound_to']), int(record['offset'])
        self._jumps = [jump for jump in self._jumps if jump[0] < to] + [(to, offset)]

  def starts(self) -> list[int]:
    """From where the run can be done again: the seed, and each checkpoint."""
    return [0, *self.checkpoints.steps()]

  def go(self, step: int) -> None:
    """To the state after `step`: of its checkpoint, or for 0 of the seed."""
    c, program = self.config, self.program
    self.state = None                     # before the next one is made
    if step == 0:
      initial = program.load_initial() if c.init.path else None
      self.base = initial.params if c.lora.rank else None
      self.state, at = program.first_state(initial), Position()
    else:
      if step not in self.checkpoints.steps():
        raise CheckpointError(f'{self.workdir} has no checkpoint of step {step} to start from; '
                              f'there are: {", ".join(map(str, self.starts()))} (0 is the seed)')
      self.state, manifest = self.checkpoints.restore(program.abstract, step)
      if c.lora.rank and self.base is None:
        initial = program.load_initial()
        loading.check_base(initial, manifest.meta, c, self.workdir)
        self.base = initial.params
      self.data.check_position(manifest.meta['data'])
      at = Position.from_manifest(manifest)
    self.step, self._start = step, step
    self._offset, self._digest = at.offset, at.digest
    self._guard = program.make_guard(at.guard)
    self._updates = int(self.state.step)

  @property
  def offset(self) -> int:
    """Batches that rewinds of the run left out up to here."""
    return next((offset for at, offset in reversed(self._jumps)
                 if self._start <= at <= self.step), self._offset)

  def batch(self) -> tuple[int, dict[str, np.ndarray]]:
    """(number in the stream, features) of the batch that the next step reads."""
    number = self.step + 1 + self.offset
    batch = self.data.batch(number - 1)
    return number, self._fault.inject(batch, number) if self._fault else batch

  def next(self) -> Step:
    number, batch = self.batch()
    with self.using():
      self.state, self._guard, metrics = self.program.step(
          self.state, self.put(batch), self.base, self._guard)
    metrics = jax.device_get(metrics)
    self.step += 1
    self._digest = digests.chain(self._digest, metrics.pop('batch'))
    halted = bool(metrics.pop('halted'))
    row = {'step': self.step, **{k: float(v) for k, v in metrics.items()},
           'lr': float(self.program.schedule(self._updates)), 'data': self._digest}
    self._updates += not metrics['skipped']
    return Step(self.step, number, batch, row, halted)

  def meta(self) -> dict:
    """What a checkpoint of this state has to hold besides its arrays."""
    return checkpoint_meta(self.step, self.offset, self._digest, self._guard, self.data)

  def put(self, batch):
    return sharding.put(batch, self.program.mesh)

  def using(self):
    return sharding.use(self.program.mesh, self.config.rules)

  def rows(self) -> dict[int, dict]:
    return read_rows(self.workdir)

  def saved(self, step: int, part: str) -> dict[str, np.ndarray]:
    """{path: array} of a part ('params', 'opt_state', …) of a checkpoint, verified."""
    abstract = {part: getattr(self.program.abstract, part)}
    tree, _ = self.checkpoints.restore(abstract, step, only=(part,))
    return trees.flatten(tree)

  def changed_since(self, step: int) -> bool:
    """Whether the config is another than when the checkpoint of `step` was written."""
    if step == 0:
      return False
    then = self.checkpoints.manifest(step).meta.get('config')
    return then != configs.digest(configs.from_dict(rundir.read_config(self.workdir)))


# --- comparing ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of two arrays called `what`: in how many elements, the largest |a - b|, all of it as text."""
  what: str
  count: int
  largest: float
  text: str


def read_rows(workdir) -> dict[int, dict]:
  """{step: training row of metrics.jsonl without its timing}."""
  return {row['step']: {k: v for k, v in row.items() if k != 'timing'}
          for row in jsonl.read(Path(workdir) / 'metrics.jsonl', 'step') if 'loss' in row}


def differing(a: dict, b: dict) -> list[str]:
  """Keys of two rows whose values are not the same bits, of those that both have; causes first."""
  bits = lambda x: x.hex() if isinstance(x, float) else x
  return sorted((k for k in a if k in b and bits(a[k]) != bits(b[k])),
                key=lambda k: ('data', 'loss').index(k) if k in ('data', 'loss') else 2)


def compare(name: str, a, b) -> Difference | None:
  """None if the arrays are the same bits (so NaN is NaN)."""
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape or a.dtype != b.dtype:
    show = lambda x: f'{x.dtype}[{",".join(map(str, x.shape))}]'
    return Difference(name, a.size, np.inf, f'{show(a)} and {show(b)}')
  kind = f'u{a.dtype.itemsize}'
  wrong = np.ascontiguousarray(a).view(kind) != np.ascontiguousarray(b).view(kind)
  if not wrong.any():
    return None
  where = tuple(int(i) for i in np.argwhere(wrong)[0])
  with np.errstate(invalid='ignore'):
    largest = float(np.max(np.abs(a[wrong].astype(np.float64) - b[wrong].astype(np.float64))))
  return Difference(name, int(wrong.sum()), largest,
                    f'{int(wrong.sum())} of {a.size} elements, max |difference| {largest:.3g}, '
                    f'first at {list(where)}: {a[where].item()!r} and {b[where].item()!r}')


def compare_trees(a: dict, b: dict) -> list[Difference]:
  """Of {path: array}, in the order of a."""
  found = []
  for path in [*a, *(p for p in b if p not in a)]:
    if path not in a or path not in b:
      found.append(Difference(path, 1, np.inf, 'only one of them has it'))
    elif difference := compare(path, a[path], b[path]):
      found.append(difference)
  return found


PARTS = ('params', 'opt_state', 'ema', 'step')


def compare_checkpoint(replay: Replay, step: int) -> tuple[int, list[Difference]]:
  """(arrays, what differs) between a replay's state and the run's checkpoint of `step`."""
  count, found = 0, []
  for part in PARTS:
    ours = trees.flatten({part: getattr(replay.state, part)})
    if ours:
      count += len(ours)
      found += compare_trees(ours, replay.saved(step, part))
  return count, found
