"""The first step and tensor at which two runs part.

What both wrote narrows it down: the last checkpoint that both have with the same arrays, the first
row or checkpoint that differs. From that checkpoint (or the seed) both are replayed, one after the
other, with a checksum of every array a step, and at the first step that differs everything is
looked at in the order in which it is computed: data, loss, gradients, update.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib

import jax
import numpy as np

from t5lab import config as configs
from t5lab import trees
from t5lab.errors import UsageError
from t5lab.programs import replay as replaying
from t5lab.programs.replay import PARTS, Replay
from t5lab.runs import rundir
from t5lab.training import digests, steps

NOT_COMPARED = ('checkpoint', 'eval', 'log', 'plan', 'guard.watchdog')    # change no number


@dataclasses.dataclass(frozen=True)
class Verdict:
  """parted: whether the runs differ. step: where. what: 'config', 'seed', 'data', 'loss',
  'gradients', 'update', or 'record': the replays agree, what was written does not."""
  parted: bool
  step: int
  what: str
  text: str


def bisect(a: Replay, b: Replay, say: Callable = print) -> Verdict:
  """Compares two runs, replays as much of them as it has to. `say` gets a line at a time."""
  for line in config_differences(a, b):
    say(f'config {line}')
  shapes = [{p: (x.shape, str(x.dtype)) for p, x in trees.flatten(r.program.abstract).items()}
            for r in (a, b)]
  if wrong := [p for p in {**shapes[0], **shapes[1]} if shapes[0].get(p) != shapes[1].get(p)]:
    shown = [f'{s[wrong[0]][1]}{list(s[wrong[0]][0])}' if wrong[0] in s else 'absent'
             for s in shapes]
    return Verdict(True, 0, 'config', 'the runs part before any training, they are of other models '
                   f'or optimizers: {wrong[0]} is {" and ".join(shown)} ({len(wrong)} arrays '
                   'differ)')
  start, end = narrow(a, b, say)
  if end is None:
    return Verdict(False, start, '', f'equal: everything that both runs wrote, up to step {start}')
  say(f'replaying both from {f"the checkpoint of step {start}" if start else "the seed"} to step '
      f'{end}')
  step = _first_difference(a, b, start, end, say)
  if step is None:
    return _records(a, b, start, end)
  return _look(a, b, start, step)


def config_differences(a: Replay, b: Replay) -> list[str]:
  """['optim.lr: 0.1 -> 0.2'] of keys that a run's numbers depend on."""
  read = lambda r: configs.to_dict(configs.from_dict(rundir.read_config(r.workdir)))
  return rundir.config_differences(read(a), read(b), NOT_COMPARED)


# --- what was written --------------------------------------------------------------------------


def narrow(a: Replay, b: Replay, say) -> tuple[int, int | None]:
  """(the last common start at which they are the same, the first step at which a row or checkpoint
  differs); (the last common step, None) if nothing differs."""
  rows_a, rows_b = a.rows(), b.rows()
  common = sorted(rows_a.keys() & rows_b.keys())
  wrong_row = next((s for s in common if replaying.differing(rows_a[s], rows_b[s])), None)
  say(f'{len(common)} common rows of metrics: ' + (
      'all the same bits' if wrong_row is None else f'the first that differs is of step '
      f'{wrong_row}, in {", ".join(replaying.differing(rows_a[wrong_row], rows_b[wrong_row]))}'))
  both = sorted(set(a.checkpoints.steps()) & set(b.checkpoints.steps()))
  same, wrong_save = 0, None
  for step in both:
    if _same_checkpoint(a, b, step):
      if wrong_row is None or step < wrong_row:
        same = step
      continue
    wrong_save = step
    break
  say(f'{len(both)} common checkpoints: ' + (
      'all the same bits' if wrong_save is None else
      f'the first that differs is of step {wrong_save}'))
  ends = [s for s in (wrong_row, wrong_save) if s is not None]
  if not ends:
    if not common and not both:
      raise UsageError(f'{a.workdir} and {b.workdir} have no step in common to compare: neither a '
                       'row of metrics nor a checkpoint')
    return max([*common, *both]), None
  return same, min(ends)


def _same_checkpoint(a, b, step) -> bool:
  # equal files are equal arrays; the opposite need not hold
  files = [{name: digest for name, (_, digest) in r.checkpoints.verify(step).files.items()}
           for r in (a, b)]
  if files[0] == files[1]:
    return True
  return not any(replaying.compare_trees(a.saved(step, part), b.saved(step, part))
                 for part in PARTS if trees.flatten(getattr(a.program.abstract, part)))


def _records(a, b, start, end) -> Verdict:
  """Both replays agree up to the step where the records differ: one of the records is wrong."""
  wrong = []
  for run in (a, b):
    run.go(start)
    rows = run.rows()
    found = ''
    while run.step < end and not found:
      done = run.next()
      if keys := replaying.differing(done.row, rows.get(done.step, {})):
        found = (f'step {done.step}, {keys[0]}: replayed {done.row[keys[0]]!r}, written '
                 f'{rows[done.step][keys[0]]!r}')
    if not found and end in run.checkpoints.steps():
      _, differences = replaying.compare_checkpoint(run, end)
      if differences:
        found = f'the checkpoint of step {end}, {differences[0].what}: {differences[0].text}'
    if found:
      wrong.append(f'{run.workdir} is not what its config, data and start make ({found})')
  return Verdict(True, end, 'record', f'the runs part at step {end} in what they wrote, not in '
                 'what they compute, for both replays agree; '
                 + ('; '.join(wrong) or 'neither record differs from its own replay')
                 + ': a fault of hardware or software, or an edited file')


# --- what is computed --------------------------------------------------------------------------


@jax.jit
def _checksums(state):
  """{path: uint32[]} of every array of a state."""
  return {path: digests.batch_digest({path: x}) for path, x in trees.flatten(state).items()}


def _trace(run: Replay, start: int, end: int):
  """Yields (step, {feature: SHA-256}, row, {path: checksum of the state after it})."""
  run.go(start)
  yield start, {}, {}, jax.device_get(_checksums(run.state))
  while run.step < end:
    done = run.next()
    features = {name: hashlib.sha256(f'{x.dtype}{x.shape}'.encode() + x.tobytes()).hexdigest()
                for name, x in done.batch.items()}
    row = {k: v for k, v in done.row.items() if k != 'data'}
    yield done.step, features, row, jax.device_get(_checksums(run.state))


def _first_difference(a, b, start, end, say) -> int | None:
  kept = list(_trace(a, start, end))
  a.state = None                          # one run in memory at a time
  for ours, theirs in zip(kept, _trace(b, start, end)):
    step, features, row, sums = theirs
    if ours[1] != features or ours[3] != sums or replaying.differing(ours[2], row):
      return step
    if step > start:
      say(f'step {step}: data, loss and {len(sums)} arrays are the same')
  return None


def _look(a: Replay, b: Replay, start: int, step: int) -> Verdict:
  """What differs first in `step`, everything before it being the same."""
  found = []
  for run in (a, b):
    run.go(start)
    while run.step < step - 1:
      run.next()
    if step > start:
      number, batch = run.batch()
      gradient = jax.device_get(_gradients(run, batch))
      row = run.next().row
    else:
      number, batch, gradient, row = 0, {}, {}, {}
    state = jax.device_get(trees.flatten(run.state))
    state = {path: state[path] for part in PARTS for path in state if path.split('/')[0] == part}
    found.append((number, batch, row, gradient, state))
    run.state = None
  (number, batch, row, gradient, state), (number_b, batch_b, row_b, gradient_b, state_b) = found
  at = f'the runs part at step {step}'
  if step == start:
    first, more = _first(replaying.compare_trees(state, state_b))
    return Verdict(True, step, 'seed', f'{at}, before any training: {first.what} differs, '
                   f'{first.text}{more}')
  if wrong := [name for name in {**batch, **batch_b}
               if name not in batch or name not in batch_b
               or replaying.compare(name, batch[name], batch_b[name])]:
    text = _data(a, b, number, number_b, wrong, batch, batch_b)
    return Verdict(True, step, 'data', f'{at}: {text}')
  forward = [k for k in ('loss', 'z_loss', 'accuracy', 'tokens') if replaying.differing(
      {k: row[k]}, row_b)]
  if forward:
    k = forward[0]
    return Verdict(True, step, 'loss', f'{at}: the data is the same, {k} is {row[k]!r} and '
                   f'{row_b[k]!r}')
  if differences := sorted(replaying.compare_trees(gradient, gradient_b), key=_from_the_loss):
    first, more = _first(differences)
    return Verdict(True, step, 'gradients', f'{at}: data and loss are the same, the gradient of '
                   f'{first.what} differs, {first.text}{more}')
  differences = replaying.compare_trees(state, state_b)
  if differences:
    first, more = _first(differences)
    return Verdict(True, step, 'update', f'{at}: data, loss and gradients are the same, the update '
                   f'makes {first.what} differ, {first.text}{more}')
  keys = replaying.differing(row, row_b)
  return Verdict(True, step, 'update', f'{at}: all arrays are the same, but ' + ', '.join(
      f'{k} is {row[k]!r} and {row_b[k]!r}' for k in keys[:3]))


def _first(differences):
  return differences[0], f' ({len(differences)} arrays differ)' * (len(differences) > 1)


def _from_the_loss(difference) -> int:
  """Gradients are computed from the heads back to the embedding, which all of them enter."""
  part = difference.what.split('/')[0]
  return {'decoder': 1, 'encoder': 2, 'embedding': 3}.get(part, 0)


def _data(a, b, number, number_b, wrong, batch, batch_b) -> str:
  name = wrong[0]
  if name not in batch or name not in batch_b:
    return f'only one of the batches has {name}'
  x, y = batch[name], batch_b[name]
  if x.shape != y.shape:
    return f'batch features {name} are of shapes {x.shape} and {y.shape}'
  rows = np.flatnonzero((x != y).reshape(len(x), -1).any(axis=1)).tolist()
  ids = [run.data.row_ids(n - 1)[rows[0]] for run, n in ((a, number), (b, number_b))]
  shown = ', '.join(map(str, rows[:8])) + ', …' * (len(rows) > 8)
  names = ' '.join(wrong[1:])
  return (f'batch features {name} differ (rows {shown})' + f', and {names}' * bool(names)
          + f'; row {rows[0]} holds {", ".join(ids[0][:3])} and {", ".join(ids[1][:3])}')


def _gradients(run: Replay, batch) -> dict:
  """{path: array}, before clipping, of the step that comes."""
  c = run.config
  with run.using():
    return _gradient(run.state.params, run.state.step, run.put(batch), run.base, run.program.model,
                     steps.Loss(**c.loss.to_dict()), c.seed, c.optim.microbatches,
                     replaying.loading.lora_scale(c))


@functools.partial(jax.jit, static_argnums=range(4, 9))
def _gradient(params, step, batch, base, model, loss, seed, microbatches, lora_scale):
  key = jax.random.fold_in(jax.random.key(seed), step)
  grads, _ = steps.gradients(model, params, batch, loss, key, microbatches, base=base,
                             lora_scale=lora_scale)
  return trees.flatten(grads)
