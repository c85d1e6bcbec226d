"""t5lab replay --workdir RUN --from S [--steps K] [--output DIR]

Does steps S + 1 … S + K of a run again, from its own config, its checkpoint of step S (0: the seed)
and its data, and compares every number with what the run wrote: each row of metrics.jsonl, and the
arrays of each checkpoint in the window, bit for bit. Nothing in the run's folder changes. With
--output the replay leaves a row of each step and its last state there.

Exit code 0: reproduced; 70: it differs, and the first step and number are named; 2: the run left
nothing to compare with. Bits are those of the same software on the same kind and number of devices.
"""

import argparse
from pathlib import Path
import sys

from t5lab import files
from t5lab.commands import Parser, use_compilation_cache
from t5lab.errors import NumericalError, UsageError


def main(argv: list[str] | None = None) -> int:
  parser = Parser('t5lab replay', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--from', dest='start', type=int, required=True, metavar='S',
                      help='a step with a checkpoint, or 0: from the beginning')
  parser.add_argument('--steps', type=int, metavar='K', help='default: to the next checkpoint')
  parser.add_argument('--output', metavar='DIR', help='a new folder for what the replay makes')
  parser.add_argument('--modules', default='', metavar='A,B',
                      help="modules of yours that register the run's tasks")
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)

  from t5lab.programs import replay as replaying
  from t5lab.runs import sentry
  use_compilation_cache()
  replay = replaying.Replay(args.workdir, tuple(filter(None, args.modules.split(','))))
  stop = _stop(replay, args.start, args.steps)
  rows, wanted = replay.rows(), range(args.start + 1, stop + 1)
  saved = [s for s in replay.checkpoints.steps() if s in wanted]
  known = [s for s in wanted if s in rows]
  if not known and not saved:
    near = sorted({s for s in [*rows, *replay.checkpoints.steps()] if s > args.start})[:1]
    raise UsageError(f'{args.workdir} has neither a row nor a checkpoint of steps {args.start + 1} '
                     f'to {stop}' + (f'; the next is of step {near[0]}' if near else ''))
  output = _open_output(args.output, replay)
  replay.go(args.start)
  print(f'{args.workdir}: steps {args.start + 1} to {stop}, from '
        f'{"the seed" if args.start == 0 else f"the checkpoint of step {args.start}"}, on '
        f'{replay.program.mesh.size} {_platform()} device{"s" * (replay.program.mesh.size > 1)}')
  print(f'{"step":>8}  {"loss":>12}  {"grad_norm":>12}  {"lr":>12}  recorded')
  arrays = 0
  for _ in wanted:
    done = replay.next()
    if output:
      output.add(done.row)
    theirs = rows.get(done.step)
    wrong = replaying.differing(done.row, theirs) if theirs else []
    said = '-' if theirs is None else f'differs in {wrong[0]}' if wrong else 'the same bits'
    said += ', skipped' * bool(done.row['skipped'])
    numbers = '  '.join(f'{done.row[k]:>12.7g}' for k in ('loss', 'grad_norm', 'lr'))
    print(f'{done.step:>8}  {numbers}  {said}', flush=True)
    if wrong:
      k = wrong[0]
      return _parted(replay, args.start, f'step {done.step}: {k} is {done.row[k]!r}, the run wrote '
                                         f'{theirs[k]!r}')
    if done.step in saved:
      count, differences = replaying.compare_checkpoint(replay, done.step)
      arrays += count
      print(f'{"":>8}  checkpoint of step {done.step}: '
            + (f'{len(differences)} of {count} arrays differ' if differences
               else f'{count} arrays, the same bits'), flush=True)
      if differences:
        first = differences[0]
        return _parted(replay, args.start, f'step {done.step}: {first.what} is not that of the '
                                           f'checkpoint: {first.text}')
    if done.halted:
      stop = done.step
      if stop not in (known_bad := {r['step'] for r in sentry.read_anomalies(args.workdir)}):
        return _parted(replay, args.start, f'step {stop} is bad, in the run it was none of '
                                           f'{sorted(known_bad)}')
      print(f'step {stop} is bad again, as it was in the run')
      break
  if output:
    output.close(replay)
  known, saved = (sum(s <= stop for s in x) for x in (known, saved))
  print(f'steps {args.start + 1} to {stop} are reproduced bit for bit: {known} rows of metrics, '
        f'{saved} checkpoints with {arrays} arrays' + f'; written to {args.output}' * bool(output))
  return 0


def _stop(replay, start, steps) -> int:
  if start < 0 or steps is not None and steps < 1:
    raise UsageError(f'--from {start} --steps {steps}: a step of 0 or more, and 1 step or more')
  if steps is None:
    return next((s for s in replay.checkpoints.steps() if s > start), replay.config.total_steps)
  return start + steps


def _platform() -> str:
  import jax
  return jax.devices()[0].platform


def _parted(replay, start, what) -> int:
  why = ''
  if replay.changed_since(start):
    why += '; the config was changed since the checkpoint of that start (total_steps, guard, …)'
  then = {} if start == 0 else replay.checkpoints.manifest(start).meta.get('mesh', {})
  now = dict(replay.program.mesh.shape)
  if then and then != now:
    show = lambda m: ' '.join(f'{k}={v}' for k, v in m.items() if v != 1) or 'one device'
    why += f'; the run had a mesh of {show(then)}, this is {show(now)}: sums are in another order'
  raise NumericalError(f'not reproduced: {what}{why}')


def _open_output(path, replay):
  if not path:
    return None
  where = Path(path).absolute()
  run = replay.workdir.absolute()
  if where == run or run in where.parents:
    raise UsageError(f'--output {path} lies in the run that is replayed, which stays as it is')
  if where.exists() and any(where.iterdir()):
    raise UsageError(f'--output {path} is not empty; name a new folder')
  return _Output(where)


class _Output:
  """config.json, metrics.jsonl with a row of each step, and a checkpoint of the last one."""

  def __init__(self, where: Path):
    where.mkdir(parents=True, exist_ok=True)
    self._where, self._rows = where, []

  def add(self, row):
    self._rows.append(row)

  def close(self, replay):
    import json

    from t5lab.data import vocab
    from t5lab.programs import loading
    from t5lab.runs import rundir
    from t5lab.runs.checkpoint import Checkpoints
    vocab.export(replay.config.data.vocab, self._where / loading.VOCABULARY)
    rundir.write_config(self._where, rundir.read_config(replay.workdir))
    files.write_text(self._where / 'metrics.jsonl', ''.join(
        json.dumps(row) + '\n' for row in self._rows))
    checkpoints = Checkpoints(self._where / 'checkpoints')
    checkpoints.save(replay.step, replay.state, meta=replay.meta())
    checkpoints.wait()

