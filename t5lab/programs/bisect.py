"""Finds the first step and tensor at which two runs differ.

What both runs wrote narrows it down: the last checkpoint that both have with the same arrays, and
the first row or checkpoint that differs. From that checkpoint, or from the seed, both are replayed
one after the other with a checksum of every array after each step. The first step that differs is
then examined in the order of its computation: data, loss, gradients, update.
"""

from collections.abc import Callable
import dataclasses
import hashlib

import jax
import numpy as np

from t5lab import config, trees
from t5lab.errors import UsageError
from t5lab.programs import build
from t5lab.programs.replay import (
  PARTS,
  Difference,
  Replay,
  compare_checkpoint,
  compare_trees,
  differing_keys,
  read_rows,
)
from t5lab.runs import manifests, rundir
from t5lab.training import digests, steps

NOT_COMPARED = ('checkpoint', 'eval', 'log', 'plan', 'guard.watchdog')    # they change no number


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The result of a bisection.

  cause: 'config', 'seed', 'data', 'loss', 'gradients', 'update', or 'record' if the replays agree
  and only what was written differs; '' if the runs are equal.
  """
  differ: bool
  step: int
  cause: str
  text: str


def bisect(a: Replay, b: Replay, log: Callable = print) -> Verdict:
  """Compares two runs, and replays as much of them as is needed. log(line) reports progress."""
  for line in config_differences(a, b):
    log(f'config {line}')
  if text := _shape_difference(a, b):
    return Verdict(True, 0, 'config', text)

  start, end = narrow(a, b, log)
  if end is None:
    return Verdict(False, start, '', f'equal: everything that both runs wrote, up to step {start}')
  origin = f'the checkpoint of step {start}' if start else 'the seed'
  log(f'replaying both from {origin} to step {end}')
  step = _first_difference(a, b, start, end, log)
  if step is None:
    return _compare_records(a, b, start, end)
  return _examine(a, b, start, step)


def config_differences(a: Replay, b: Replay) -> list[str]:
  """['optim.lr: 0.1 -> 0.2'], of the keys that the numbers of a run depend on."""
  read = lambda run: config.to_dict(config.from_dict(rundir.read_config(run.workdir)))
  return rundir.config_differences(read(a), read(b), NOT_COMPARED)


def _shape_difference(a: Replay, b: Replay) -> str:
  """The first array that only one of the runs has in its shape and dtype, as a text; '' if none."""
  in_a, in_b = (manifests.signatures(run.program.abstract) for run in (a, b))
  differing = [path for path in {**in_a, **in_b} if in_a.get(path) != in_b.get(path)]
  if not differing:
    return ''
  first = differing[0]
  show = lambda leaf: f'{leaf[1]}{list(leaf[0])}' if leaf else 'absent'
  return ('the runs cannot be compared: their models or optimizers differ; '
          f'{first} is {show(in_a.get(first))} and {show(in_b.get(first))} '
          f'({len(differing)} arrays differ)')


# --- what was written --------------------------------------------------------------------------


def narrow(a: Replay, b: Replay, log) -> tuple[int, int | None]:
  """(the last common start before any difference, the first step whose row or checkpoint differs);
  (the last common step, None) if nothing differs."""
  # Rows of metrics.
  rows_a, rows_b = read_rows(a.workdir), read_rows(b.workdir)
  common = sorted(rows_a.keys() & rows_b.keys())
  keys = {step: differing_keys(rows_a[step], rows_b[step]) for step in common}
  first_row = next((step for step in common if keys[step]), None)
  if first_row is None:
    log(f'{len(common)} common rows of metrics: bit-equal')
  else:
    log(f'{len(common)} common rows of metrics: the first that differs is step {first_row}, '
        f'in {", ".join(keys[first_row])}')

  # Checkpoints.
  both = sorted(set(a.checkpoints.steps()) & set(b.checkpoints.steps()))
  first_checkpoint = next((step for step in both if not _same_checkpoint(a, b, step)), None)
  if first_checkpoint is None:
    log(f'{len(both)} common checkpoints: bit-equal')
  else:
    log(f'{len(both)} common checkpoints: the first that differs is step {first_checkpoint}')

  ends = [step for step in (first_row, first_checkpoint) if step is not None]
  if ends:
    end = min(ends)
    return max((step for step in both if step < end), default=0), end
  if not common and not both:
    raise UsageError(f'{a.workdir} and {b.workdir} have no step in common to compare: neither a '
                     'row of metrics nor a checkpoint')
  return max([*common, *both]), None


def _same_checkpoint(a, b, step) -> bool:
  # Equal files hold equal arrays; different files may too.
  if a.checkpoints.verify(step).files == b.checkpoints.verify(step).files:
    return True
  parts = [part for part in PARTS if trees.flatten(getattr(a.program.abstract, part))]
  return not any(compare_trees(a.saved(step, part), b.saved(step, part)) for part in parts)


def _compare_records(a, b, start, end) -> Verdict:
  """Both replays agree up to the step where the records differ: finds the record that is wrong."""
  wrong = []
  for run in (a, b):
    if error := _record_error(run, start, end):
      wrong.append(f'{run.workdir} is not what its config, data and start produce ({error})')
  return Verdict(True, end, 'record', f'the runs differ at step {end} in what they wrote, not in '
                 'what they compute, because both replays agree; '
                 + ('; '.join(wrong) or 'neither record differs from its own replay')
                 + ': a fault of hardware or software, or an edited file')


def _record_error(run, start, end) -> str:
  """The first number that the run wrote and its replay does not reproduce; '' if there is none."""
  run.start_at(start)
  rows = read_rows(run.workdir)
  while run.step < end:
    replayed = run.next_step()
    keys = differing_keys(replayed.row, rows.get(replayed.step, {}))
    if keys:
      return (f'step {replayed.step}, {keys[0]}: replayed {replayed.row[keys[0]]!r}, written '
              f'{rows[replayed.step][keys[0]]!r}')
  if end in run.checkpoints.steps():
    _, differences = compare_checkpoint(run, end)
    if differences:
      return f'the checkpoint of step {end}, {differences[0].name}: {differences[0].text}'
  return ''


# --- what is computed --------------------------------------------------------------------------


@jax.jit
def _checksums(state):
  """{path: uint32[]} of every array of a state."""
  return {path: digests.batch_digest({path: x}) for path, x in trees.flatten(state).items()}


def _trace(run: Replay, start: int, end: int):
  """Yields (step, {feature: SHA-256}, row, {path: checksum of the state after the step})."""
  run.start_at(start)
  yield start, {}, {}, jax.device_get(_checksums(run.state))
  while run.step < end:
    replayed = run.next_step()
    features = {name: hashlib.sha256(f'{x.dtype}{x.shape}'.encode() + x.tobytes()).hexdigest()
                for name, x in replayed.batch.items()}
    row = {name: value for name, value in replayed.row.items() if name != 'data'}
    yield replayed.step, features, row, jax.device_get(_checksums(run.state))


def _first_difference(a, b, start, end, log) -> int | None:
  trace_a = list(_trace(a, start, end))
  a.free_state()                          # only one run is in memory at a time
  for (_, features_a, row_a, sums_a), (step, features_b, row_b, sums_b) in zip(
      trace_a, _trace(b, start, end)):
    if features_a != features_b or sums_a != sums_b or differing_keys(row_a, row_b):
      return step
    if step > start:
      log(f'step {step}: data, loss and {len(sums_b)} arrays are the same')
  return None


@dataclasses.dataclass(frozen=True)
class _Evidence:
  """All of a step, on the host: the batch and its number in the stream, and {path: array}."""
  number: int
  batch: dict
  row: dict
  gradient: dict
  state: dict


def _collect(run: Replay, start: int, step: int) -> _Evidence:
  """Replays a run up to `step` and keeps what that step computes."""
  run.start_at(start)
  while run.step < step - 1:
    run.next_step()
  number, batch, gradient, row = 0, {}, {}, {}
  if step > start:
    number, batch = run.next_batch()
    gradient = _gradients(run, batch)
    row = run.next_step().row
  state = jax.device_get(trees.flatten(run.state))
  run.free_state()
  in_order = sorted(state, key=lambda path: PARTS.index(path.split('/')[0]))
  return _Evidence(number, batch, row, gradient, {path: state[path] for path in in_order})


def _examine(a: Replay, b: Replay, start: int, step: int) -> Verdict:
  """Finds what differs first in `step`, given that everything before it is the same."""
  x, y = (_collect(run, start, step) for run in (a, b))
  verdict = lambda cause, text: Verdict(True, step, cause, f'the runs differ at step {step}{text}')

  if step == start:
    name, how = _first(compare_trees(x.state, y.state))
    return verdict('seed', f', before any training: {name} differs, {how}')

  features = [difference.name for difference in compare_trees(x.batch, y.batch)]
  if features:
    return verdict('data', f': {_describe_data(a, b, x, y, features)}')

  # Metrics of the forward pass; the others depend on the gradients.
  differing = differing_keys(x.row, y.row)
  for name in ('loss', 'z_loss', 'accuracy', 'tokens'):
    if name in differing:
      return verdict('loss', f': the data is the same, {name} is {x.row[name]!r} and '
                     f'{y.row[name]!r}')

  differences = sorted(compare_trees(x.gradient, y.gradient), key=_backward_order)
  if differences:
    name, how = _first(differences)
    return verdict('gradients', ': data and loss are the same, the gradient of '
                   f'{name} differs, {how}')

  differences = compare_trees(x.state, y.state)
  if differences:
    name, how = _first(differences)
    return verdict('update', ': data, loss and gradients are the same, the '
                   f'update makes {name} differ, {how}')

  shown = [f'{k} is {x.row[k]!r} and {y.row[k]!r}' for k in differing[:3]]
  return verdict('update', ': all arrays are the same, but ' + ', '.join(shown))


def _first(differences: list[Difference]) -> tuple[str, str]:
  """The name of the first array that differs, and how it differs."""
  first, count = differences[0], len(differences)
  return first.name, first.text + f' ({count} arrays differ)' * (count > 1)


def _backward_order(difference: Difference) -> int:
  """Gradients are computed from the heads back to the embedding, which all of them enter."""
  module = difference.name.split('/')[0]
  return {'decoder': 1, 'encoder': 2, 'embedding': 3}.get(module, 0)


def _describe_data(a, b, x: _Evidence, y: _Evidence, features: list[str]) -> str:
  name = features[0]
  if name not in x.batch or name not in y.batch:
    return f'only one of the batches has {name}'
  values_a, values_b = x.batch[name], y.batch[name]
  if values_a.shape != values_b.shape:
    return f'batch features {name} have shapes {values_a.shape} and {values_b.shape}'
  differs = (values_a != values_b).reshape(len(values_a), -1).any(axis=1)
  rows = np.flatnonzero(differs).tolist()
  shown = ', '.join(map(str, rows[:8])) + ', …' * (len(rows) > 8)
  others = f', and {" ".join(features[1:])}' if len(features) > 1 else ''
  ids_a, ids_b = (', '.join(run.data.row_ids(evidence.number - 1)[rows[0]][:3])
                  for run, evidence in ((a, x), (b, y)))
  return (f'batch features {name} differ (rows {shown}){others}; '
          f'row {rows[0]} holds {ids_a} and {ids_b}')


def _gradients(run: Replay, batch) -> dict:
  """{path: array} of the next step, before clipping."""
  with run.using_mesh():
    grads, _ = _step_gradients(run.state.params, run.state.step, run.put(batch), run.base,
                               model=run.program.model, **build.step_options(run.config))
  return jax.device_get(trees.flatten(grads))


# One compilation serves both runs.
_step_gradients = jax.jit(steps.step_gradients, static_argnames=(
    'model', 'loss', 'seed', 'microbatches', 'lora_scale'))
