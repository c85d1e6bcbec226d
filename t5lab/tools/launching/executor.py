"""Runs a plan: one command after the other, with their output; the first failure ends it.

The commands get the caller's own environment, in which gcloud and kubectl find their accounts. None
of it is printed, and none of it reaches a host.
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
from t5lab.tools.launching.job import worst
from t5lab.tools.launching.plan import LaunchStep, Plan

EXIT = re.compile(r't5lab-exit=(-?\d+)\s*$', re.MULTILINE)
MAX_FAILURES = 30          # queries of the state that may fail in a row
PAUSE = 10.                # seconds between queries of a job whose log cannot be followed


def run(plan: Plan, *, restarts: int = 0, keep: bool = False, attach: bool = False,
        make_bundle=None) -> int:
  """Runs the plan -> the exit code of the job, or 0 if it was only submitted.

  keep: do not delete the machines. attach: the job runs already, only follow it. make_bundle(path)
  writes the archive of the checkout.
  Errors: Failure, which names the step; machines that were created are deleted, unless `keep`.
  """
  for note in plan.notes:
    print(f'# {note}', flush=True)
  with tempfile.TemporaryDirectory(prefix='t5lab-launch-') as files:
    plan = plan.with_folder(files)
    for name, text in plan.files.items():
      (Path(files) / name).write_text(text)
    if plan.bundle and not attach:
      make_bundle(os.path.join(files, 'bundle.tar.gz'))
    for attempt in range(restarts + 1):
      code = _run_once(plan, keep, attach)
      if code is not None or attempt == restarts or not plan.recreate:
        return Preempted.code if code is None else code
      attach = False
      print(f'# preempted; starting again ({restarts - attempt} restarts left)', flush=True)


def _run_once(plan, keep, attach) -> int | None:
  """-> the exit code of the job, or None if its machines were preempted."""
  if not attach:
    _start(plan, keep)
  if plan.follow is None:
    return 0
  try:
    code = _follow(plan)
  except KeyboardInterrupt:
    raise Preempted('stopped following; the job continues. Run the same command with --attach to '
                    'follow it again. ' + _manual_deletion(plan)) from None
  if not keep or (code is None and plan.recreate):
    _delete(plan)
  return code


def _start(plan, keep) -> None:
  for step in plan.prepare:
    _run_step(step)
  created = False
  try:
    for step in (*plan.create, *plan.start):
      _run_step(step)
      created = True        # until now, machines of this name may belong to another job
  except BaseException as e:
    if created and not keep:
      _delete(plan)
    elif isinstance(e, KeyboardInterrupt) and plan.delete:
      raise Preempted('interrupted during creation; machines may exist and cost money. '
                      + _manual_deletion(plan)) from None
    raise


def _follow(plan) -> int | None:
  """Shows the log until the job ends -> its exit code, or None if its machines were preempted."""
  log_ended, failures = False, 0
  while True:
    if not log_ended:
      print(f'# {plan.follow.title}', flush=True)
      log_ended = _run(plan.follow, stdin=subprocess.DEVNULL).returncode == 0

    state, failed = _query(plan.state)
    meaning = plan.states.get(state, 'running')
    failures = failures + 1 if failed else 0
    if failures > MAX_FAILURES:
      raise Failure(f'{plan.state.title}: {failures} queries in a row failed: {state[:200]}. The '
                    'job may still run; --attach follows it. ' + _manual_deletion(plan))
    if meaning == 'gone' or failed and 'NOT_FOUND' in state:
      return None

    if meaning in ('ask', 'done'):
      output, failed = _query(plan.codes)
      codes = [int(n) for n in EXIT.findall(output)]
      if codes and (meaning == 'done' or not failed):
        return worst(codes)
      if meaning == 'done':
        raise Failure(f'the job has ended without an exit code: {output[-300:]}')
    time.sleep(PAUSE)


def _run_step(step: LaunchStep) -> None:
  command = shlex.join(step.argv)
  print(f'# {step.title}\n{command}', flush=True)
  if not step.until:
    if code := _run(step, stdin=subprocess.DEVNULL).returncode:
      raise Failure(f'{step.title}: {step.argv[0]} exited with {code}: {command[:300]}')
    return
  while True:
    output, failed = _query(step)
    if output in step.until:
      return
    if output in step.unless or failed and 'NOT_FOUND' in output:
      raise Failure(f'{step.title}: {output[:300]}')
    time.sleep(step.every)


def _query(step) -> tuple[str, bool]:
  """-> (its output, or its errors if there is none; whether it failed)."""
  process = _run(step, capture_output=True, text=True)
  failed = process.returncode != 0
  output = process.stderr if failed and not process.stdout else process.stdout
  return output.strip(), failed


def _run(step, **options) -> subprocess.CompletedProcess:
  try:
    return subprocess.run(step.argv, **options)
  except OSError as e:
    raise UsageError(f'{step.argv[0]}: {e.strerror}; install it and put it on the PATH') from None


def _delete(plan) -> None:
  for step in plan.delete:
    try:
      _run_step(step)
    except Failure as e:           # machines cost money: report it, and delete the others
      print(f't5lab: {e}; check whether it still exists', file=sys.stderr, flush=True)


def _manual_deletion(plan) -> str:
  return 'To end and delete it, run: ' + '; '.join(shlex.join(step.argv) for step in plan.delete)
