"""Runs a plan: one command after the other, their output as it comes; the first failure ends it.

The environment of the commands is the person's own (gcloud and kubectl find their accounts there);
none of it is printed, and none of it reaches a host.
"""

import os
from pathlib import Path
import re
import shlex
import subprocess
import sys
import tempfile
import time

from t5lab.errors import Failure, Preempted, UsageError
from t5lab.tools.launching.job import again, worst
from t5lab.tools.launching.plan import Plan, Step, fill

EXIT = re.compile(r't5lab-exit=(-?\d+)\s*$', re.MULTILINE)
PATIENCE = 30              # failed questions in a row
PAUSE = 10.                # seconds between looks at a job whose log cannot be followed


def run(plan: Plan, *, restarts: int = 0, keep: bool = False, attach: bool = False,
        make_bundle=None, pause: float | None = None) -> int:
  """Does it -> the exit code of the job; 0 where it was only submitted.

  keep: leave the machines. attach: they are there and work; only follow. make_bundle(path) writes
  the archive. Failure names the step; what was created is deleted, unless `keep`.
  """
  for note in plan.notes:
    print(f'# {note}', flush=True)
  with tempfile.TemporaryDirectory(prefix='t5lab-launch-') as files:
    for name, text in plan.files.items():
      (Path(files) / name).write_text(text)
    if plan.bundle and not attach:
      make_bundle(os.path.join(files, 'bundle.tar.gz'))
    for attempt in range(restarts + 1):
      code = _once(plan, files, keep, attach, PAUSE if pause is None else pause)
      if code is not None or attempt == restarts or not plan.recreate:
        return 75 if code is None else code
      attach = False
      print(f'# preempted; starting again, {restarts - attempt} times left', flush=True)


def _once(plan, files, keep, attach, pause) -> int | None:
  """-> the job's exit code, None where its machines went away."""
  if not attach:
    for step in plan.prepare:
      _do(step, files)
    created = False
    try:
      for step in plan.create:
        _do(step, files)
        created = True               # before that it may be another's of the same name: not ours
      for step in plan.start:
        _do(step, files)
    except BaseException as e:
      if created and not keep:
        _delete(plan, files)
      elif isinstance(e, KeyboardInterrupt) and plan.delete:
        raise Preempted('interrupted while it was created; it may be there, and cost. '
                        + _by_hand(plan, files)) from None
      raise
  if plan.follow is None:
    return 0
  try:
    code = _follow(plan, files, pause)
  except KeyboardInterrupt:
    raise Preempted('no longer following; the job goes on. The same command with --attach follows '
                    'it again. ' + _by_hand(plan, files)) from None
  if not keep or (code is None and plan.recreate):
    _delete(plan, files)
  return code


def _follow(plan, files, pause) -> int | None:
  ended, unknown = False, 0
  while True:
    if not ended:
      print(f'# {plan.follow.say}', flush=True)
      ended = not _call(fill(plan.follow.argv, files))
    said, failed = _read(plan.state, files)
    what = plan.states.get(said, 'running')
    unknown = unknown + 1 if failed else 0
    if unknown > PATIENCE:
      raise Failure(f'{plan.state.say} No answer in {unknown} tries: {said[:200]}. The job may go '
                    'on: --attach follows it. ' + _by_hand(plan, files))
    if what == 'gone' or failed and 'NOT_FOUND' in said:
      return None
    if what in ('ask', 'done'):
      said, failed = _read(plan.codes, files)
      codes = [int(n) for n in EXIT.findall(said)]
      if codes and (what == 'done' or not failed):
        return worst(codes)
      if what == 'done':
        raise Failure(f'the job has ended, but not said how: {said[-300:]}')
    time.sleep(pause)


def _do(step: Step, files, check=True):
  argv = fill(step.argv, files)
  print(f'# {step.say}\n{shlex.join(argv)}', flush=True)
  if step.until:
    return _wait(step, argv)
  code = _call(argv)
  if check and code:
    raise Failure(f'{step.say}: {argv[0]} ended with {code}: {shlex.join(argv)[:300]}')


def _wait(step, argv):
  while True:
    said, failed = _read(step, None, argv)
    if said in step.until:
      return
    if said in step.unless or failed and 'NOT_FOUND' in said:
      raise Failure(f'{step.say}: {said[:300]}')
    time.sleep(step.every)


def _read(step, files, argv=None) -> tuple[str, bool]:
  """-> (what it prints, whether it failed)."""
  argv = argv or fill(step.argv, files)
  try:
    done = subprocess.run(argv, capture_output=True, text=True)
  except OSError as e:
    raise UsageError(f'{argv[0]}: {e.strerror}; install it and put it on the PATH') from None
  return (done.stderr if done.returncode and not done.stdout else done.stdout).strip(), \
      bool(done.returncode)


def _call(argv) -> int:
  try:
    return subprocess.run(argv, stdin=subprocess.DEVNULL).returncode
  except OSError as e:
    raise UsageError(f'{argv[0]}: {e.strerror}; install it and put it on the PATH') from None


def _delete(plan, files):
  for step in plan.delete:
    try:
      _do(step, files)
    except Failure as e:           # money: say it, and go on with the rest
      print(f't5lab: {e}; look whether it is still there', file=sys.stderr, flush=True)


def _by_hand(plan, files) -> str:
  return 'End and delete it with: ' + '; '.join(
      shlex.join(fill(step.argv, files)) for step in plan.delete)


def code_says(code: int) -> str:
  """One line on a job's exit code."""
  if code == 0:
    return 'the job is done'
  return (f'the job ended with {code}' +
          ('; the same command goes on' if again(code) else '; see its log'))
