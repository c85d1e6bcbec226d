"""t5lab replay --workdir RUN --from S [--steps K] [--output DIR]

Computes steps S + 1 to S + K of a run again, from its own config, its checkpoint of step S (0: the
seed) and its data, and compares every number with what the run wrote: each row of metrics.jsonl and
the arrays of each checkpoint in the window, bit for bit. Nothing in the run's folder changes. With
--output, the rows of the replay and its last state are written to a new folder.

Exit codes: 0 reproduced; 70 not reproduced (the first step and number that differ are named);
2 the run left nothing to compare with. The bits agree on the same software and the same kind and
number of devices.
"""

import json
from pathlib import Path

from t5lab import files
from t5lab.commands import Parser, use_compilation_cache
from t5lab.errors import NumericalError, UsageError


def main(argv: list[str]) -> int:
  parser = Parser('t5lab replay', description=__doc__)
  add = parser.add_argument
  add('--workdir', required=True, help='the folder of the run')
  add('--from', dest='start', type=int, required=True, metavar='S',
      help='a step with a checkpoint, or 0 for the seed')
  add('--steps', type=int, metavar='K',
      help='how many steps to replay (default: to the next checkpoint)')
  add('--output', metavar='DIR', help='a new folder for the rows and the last state')
  add('--modules', default='', metavar='A,B',
      help="modules of yours that register the run's tasks")
  args = parser.parse_args(argv)

  from t5lab.programs.replay import Replay, compare_checkpoint, differing_keys, read_rows
  from t5lab.runs import sentry
  use_compilation_cache()

  # The window, and what the run wrote in it.
  replay = Replay(args.workdir, tuple(filter(None, args.modules.split(','))))
  stop = _last_step(replay, args.start, args.steps)
  window = range(args.start + 1, stop + 1)
  rows = read_rows(args.workdir)
  row_steps = [step for step in window if step in rows]
  checkpoint_steps = [step for step in replay.checkpoints.steps() if step in window]
  if not row_steps and not checkpoint_steps:
    later = [step for step in [*rows, *replay.checkpoints.steps()] if step > args.start]
    hint = f'; the next is at step {min(later)}' if later else ''
    raise UsageError(f'{args.workdir} has neither a row nor a checkpoint of steps '
                     f'{args.start + 1} to {stop}{hint}')
  output = _new_folder(args.output, replay) if args.output else None

  replay.start_at(args.start)
  origin = f'the checkpoint of step {args.start}' if args.start else 'the seed'
  devices = replay.program.mesh.devices
  print(f'{args.workdir}: steps {args.start + 1} to {stop}, from {origin}, on {devices.size} '
        f'{devices.flat[0].platform} device{"s" * (devices.size > 1)}')
  print(f'{"step":>8}  {"loss":>12}  {"grad_norm":>12}  {"lr":>12}  recorded')

  arrays, replayed_rows = 0, []
  for _ in window:
    # A step and its row.
    replayed = replay.next_step()
    step, row = replayed.step, rows.get(replayed.step)
    if output:
      replayed_rows.append(replayed.row)
    differing = differing_keys(replayed.row, row) if row else []
    verdict = '-' if row is None else 'bit-equal'
    if differing:
      verdict = f'differs in {differing[0]}'
    if replayed.row['skipped']:
      verdict += ', skipped'
    numbers = '  '.join(f'{replayed.row[k]:>12.7g}' for k in ('loss', 'grad_norm', 'lr'))
    print(f'{step:>8}  {numbers}  {verdict}', flush=True)
    if differing:
      key = differing[0]
      raise _not_reproduced(replay, args.start, f'step {step}: {key} is {replayed.row[key]!r}, '
                                                f'the run wrote {row[key]!r}')

    # Its checkpoint.
    if step in checkpoint_steps:
      count, differences = compare_checkpoint(replay, step)
      arrays += count
      verdict = f'{len(differences)} of {count} arrays differ' if differences else (
          f'{count} arrays bit-equal')
      print(f'{"":>8}  checkpoint of step {step}: {verdict}', flush=True)
      if differences:
        first = differences[0]
        raise _not_reproduced(replay, args.start, f'step {step}: {first.name} differs from the '
                                                  f'checkpoint: {first.text}')

    # A step at which the guard ended the run.
    if replayed.halted:
      stop = step
      bad_steps = {record['step'] for record in sentry.read_anomalies(args.workdir)}
      if step not in bad_steps:
        raise _not_reproduced(replay, args.start, f'step {step} is bad in the replay; the bad '
                                                  f'steps of the run were {sorted(bad_steps)}')
      print(f'step {step} is bad again, as it was in the run')
      break

  if output:
    _write_output(output, replay, replayed_rows)
  row_count = sum(step <= stop for step in row_steps)
  checkpoint_count = sum(step <= stop for step in checkpoint_steps)
  written = f'; written to {args.output}' if output else ''
  print(f'steps {args.start + 1} to {stop} are reproduced bit for bit: {row_count} rows of '
        f'metrics, {checkpoint_count} checkpoints with {arrays} arrays{written}')
  return 0


def _last_step(replay, start, steps) -> int:
  if start < 0 or (steps is not None and steps < 1):
    raise UsageError(f'--from must be 0 or more and --steps 1 or more, got --from {start} --steps '
                     f'{steps}')
  if steps is not None:
    return start + steps
  return next((step for step in replay.checkpoints.steps() if step > start),
              replay.config.total_steps)


def _not_reproduced(replay, start, difference) -> NumericalError:
  reason = ''
  if replay.config_changed_since(start):
    reason += '; the config was changed after that checkpoint (total_steps, guard, …)'
  then = {} if start == 0 else replay.checkpoints.manifest(start).meta.get('mesh', {})
  now = dict(replay.program.mesh.shape)
  if then and then != now:
    show = lambda m: ' '.join(f'{k}={v}' for k, v in m.items() if v != 1) or 'one device'
    reason += f'; the run had a mesh of {show(then)}, this one is {show(now)}, which sums in ' \
              'another order'
  return NumericalError(f'not reproduced: {difference}{reason}')


def _new_folder(path: str, replay) -> Path:
  folder, run = Path(path).absolute(), replay.workdir.absolute()
  if folder == run or run in folder.parents:
    raise UsageError(f'--output {path} is inside the replayed run, which must not change')
  if folder.exists() and any(folder.iterdir()):
    raise UsageError(f'--output {path} is not empty; name a new folder')
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def _write_output(folder: Path, replay, rows: list[dict]) -> None:
  """Writes config.json, metrics.jsonl with a row for each step, and its last checkpoint."""
  from t5lab.data import vocab
  from t5lab.programs import loading
  from t5lab.runs import rundir
  from t5lab.runs.checkpoint import Checkpoints
  vocab.export(replay.config.data.vocab, folder / loading.VOCABULARY)
  rundir.write_config(folder, rundir.read_config(replay.workdir))
  files.write_text(folder / 'metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
  checkpoints = Checkpoints(folder / 'checkpoints')
  checkpoints.save(replay.step, replay.state, meta=replay.meta())
  checkpoints.wait()
