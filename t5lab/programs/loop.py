"""The training program. It reads top to bottom: fork it.

  t5lab train --config configs/quickstart.py --workdir runs/quickstart

Run the same command again to resume where the run was killed.
"""

import contextlib
import functools
import os
from pathlib import Path
import subprocess
import time

import jax

from t5lab import config
from t5lab.errors import DataError, NumericalError, Preempted, UsageError
from t5lab.parallel import multihost, sharding
from t5lab.programs import build, loading, scoring, streams
from t5lab.programs.run import Run
from t5lab.runs import rundir
from t5lab.runs.lock import RunLock
from t5lab.runs.profiler import Profiler
from t5lab.runs.report import NoReport, Report
from t5lab.runs.sentry import Rewind, Sentry
from t5lab.runs.signals import Signals
from t5lab.runs.watchdog import Watchdog

# What a resumed run may change: its length, and nothing else that the weights depend on. A cache of
# tokens may move, because its content is checked.
MAY_CHANGE = ('total_steps', 'log', 'checkpoint', 'eval', 'embed', 'mesh', 'rules', 'loss.chunks',
              'model.remat', 'data.cache', 'guard', 'plan')
STEPS_AHEAD = 2    # steps that may be running on the devices before the host waits for one


def train(c, workdir, *, resume: str = 'auto', allow_data_change: bool = False,
          ) -> scoring.EvalResult:
  """Trains the config `c` in `workdir` and returns the last evaluation.

  resume: 'auto' continues whatever workdir holds; 'never' refuses a workdir that has checkpoints,
  'must' one that has none. After SIGTERM or SIGINT the state is saved and Preempted is raised.
  """
  workdir = Path(workdir).absolute()
  config.check_trainable(c)
  multihost.initialize()
  # Only process 0 takes the run lock.
  lock = RunLock(workdir) if multihost.is_main() else contextlib.nullcontext()
  with Signals() as signals, multihost.CoordinatedStop(signals) as stop, lock:
    return _train(c, workdir, stop, resume, allow_data_change)


def _train(c, workdir, stop, resume, allow_data_change):
  log = functools.partial(print, flush=True) if multihost.is_main() else lambda line: None

  # -- Workdir ------------------------------------------------------------------------------------
  # Refuse a workdir of another experiment, then write this config, the same in all processes.
  checkpoints = loading.open_checkpoints(c, workdir, log=log)
  streams.settle_vocabulary(c)
  inherited = {f'eval.{key}': value for key, value in loading.inherit(c, workdir).items()}
  inherited.update(loading.inherit_embedding(c, workdir))
  _check_same_everywhere('config', config.digest(c), UsageError)
  multihost.broadcast(lambda: _prepare_workdir(c, workdir, resume, checkpoints))

  # -- Program ------------------------------------------------------------------------------------
  # Mesh, model, optimizer and the train step, as shapes: nothing is allocated yet.
  program = build.program(c)

  # -- Data ---------------------------------------------------------------------------------------
  # The stream of batches, of which this process builds the rows that its devices hold.
  rows = sharding.local_rows(program.mesh, c.data.batch_size)
  stream = streams.open_stream(c, rows)
  _check_same_everywhere('data', stream.batches.fingerprint, DataError)
  multihost.broadcast(lambda: loading.copy_vocabulary(c, workdir))

  # -- State --------------------------------------------------------------------------------------
  # The newest checkpoint that verifies, or else the weights of init.path or of the seed.
  run = Run(c, program, stream.batches, workdir, rows)
  restored = checkpoints.restore(program.abstract, quarantine=True)
  if restored:
    run.resume(restored, check_data=not allow_data_change)
    origin = f'resuming from step {run.step} in {workdir}: optimizer state restored'
  else:
    run.begin()
    origin = _origin(c, run)
  if inherited:
    settings = ', '.join(f'{key}={value}' for key, value in inherited.items())
    origin += f'; settings of {c.init.path}: {settings}'
  for line in (_model_line(c, program, run), origin, *stream.batches.summary()):
    log(line)

  # -- Training -----------------------------------------------------------------------------------
  report = NoReport()
  if multihost.is_main():
    report = Report(workdir, resume_step=run.step, total_steps=c.total_steps)
  watchdog = Watchdog(c.guard.watchdog, workdir, process=multihost.index(), leave=_abort)
  loop = _Loop(c, workdir, program, run, stream, checkpoints, report, watchdog, stop)
  with report, contextlib.ExitStack() as stack, watchdog, loop.profiler:
    stack.callback(checkpoints.wait)      # whatever ends the run, a save in progress is committed
    while True:
      try:
        with sharding.use(program.mesh, c.rules):
          result = loop.run_steps()
        break
      except Rewind as bad_step:
        loop.rewind(bad_step)
  return result or scoring.read_evaluation(workdir, c.total_steps)


class _Loop:
  """The steps of a run, and what happens between them: logs, checkpoints, evaluations, stops."""

  def __init__(self, c, workdir, program, run, stream, checkpoints, report, watchdog, stop):
    self.c, self.workdir, self.program = c, workdir, program
    self.run, self.data = run, stream.batches
    self.checkpoints, self.report, self.watchdog, self.stop = checkpoints, report, watchdog, stop
    self.saved = run.step                 # the step of the newest checkpoint
    self.evaluated = multihost.broadcast(lambda: sorted(report.evaluated))
    self.profiler = Profiler(workdir, c.log.profile if multihost.is_main() else 0)

    # Seconds that a save, an evaluation or a diagnosis may take, as each may have to compile.
    self.patience = max(600., 10 * c.guard.watchdog) if c.guard.watchdog else 0.

    # What every checkpoint of this process records.
    self.meta = dict(config=config.digest(c), revision=_revision(),
                     mesh=dict(program.mesh.shape), vocab=stream.vocabulary.sha256)
    if run.initial:
      self.meta['init'] = dict(path=c.init.path, step=run.initial.step, sha256=run.initial.sha256)

    self.evaluator = scoring.Evaluator(c, program.mesh, self.tick)
    self.diagnosis = program.diagnosis()
    self.sentry = Sentry(
        workdir, program.guard_settings, data=self.data, vocabulary=stream.vocabulary,
        explain=self.explain, newest=self.newest_checkpoint, step=run.step, offset=run.offset,
        log=report.log, write=multihost.is_main())
    self.steps = _StepLog(c, run, report, self.sentry, watchdog)

  def run_steps(self):
    """Trains from the step of the run to the last one. Returns the last evaluation, or None."""
    c, run = self.c, self.run
    result = None
    self.steps.start()

    # The run was killed between saving a step and evaluating it.
    if run.step and is_due(run.step, c.eval.every, c.total_steps):
      if run.step not in self.evaluated:
        result = self.evaluate()

    batches = self.data.iterate(run.step + run.offset, c.total_steps + run.offset)
    for step in range(run.step + 1, c.total_steps + 1):
      self.stop_if_requested()

      # The step. The host does not wait for it.
      self.watchdog.beat(f'step {step}')
      batch = self.steps.next_batch(batches)
      batch = run.put(run.inject(batch, step + run.offset))
      self.profiler.before(step)
      metrics = run.advance(batch)
      self.profiler.after(step, metrics)
      self.steps.add(step, metrics)

      # What is due after it. Metrics are fetched before a save: they say whether the step counts.
      evaluates = is_due(step, c.eval.every, c.total_steps)
      saves = evaluates or is_due(step, c.checkpoint.every, c.total_steps)
      logs = is_due(step, c.log.every, c.total_steps) or not self.watchdog.armed
      if saves or logs:
        self.steps.flush()
      if saves:
        self.save()
      if evaluates:
        result = self.evaluate()
    return result

  def save(self) -> None:
    """Saves the step of the run, unless it is saved already."""
    step = self.run.step
    if step > self.saved:
      with self.watchdog.paused(f'the checkpoint of step {step}', self.patience):
        meta = {**self.meta, **self.run.meta()}
        self.checkpoints.save(step, self.run.state, meta=meta)
      self.saved = step

  def evaluate(self):
    """Saves and evaluates the step of the run. Returns the EvalResult."""
    self.save()
    step, best = self.run.step, self.c.checkpoint.best
    with self.steps.paused(), self.watchdog.paused(f'the evaluation of step {step}', self.patience):
      result = self.evaluator.score_state(step, self.run.state, self.run.base)
      scoring.report_evaluation(self.c, self.workdir, step, result, self.report)
      if best and best not in result.scores:
        self.report.log(f'checkpoint.best={best!r} is not among the evaluation metrics, so no best '
                        f'checkpoint is kept; available: {", ".join(result.scores)}')
      self.checkpoints.annotate(step, result.scores)
      self.report.eval(step, result.scores)    # last: this row marks the evaluation as complete
    return result

  def stop_if_requested(self) -> None:
    """Saves and raises Preempted after a signal to any process."""
    if reason := self.stop.check():
      self.steps.flush()
      self.save()
      if not self.run.step:
        raise Preempted(f'{reason}: no step was completed, nothing to save')
      raise Preempted(f'{reason}: step {self.run.step} is saved; run the same command to resume')

  def tick(self, done, total) -> None:
    """Called during an evaluation: feeds the watchdog, and stops after a signal."""
    self.watchdog.tick()
    if reason := self.stop.check():
      raise Preempted(f'{reason} during evaluation: the step is saved; run the same command to '
                      'resume')

  def explain(self, state, number: int):
    """The Finding for batch `number` of the stream, which spoiled a step."""
    with self.watchdog.paused('the diagnosis of a bad step', self.patience):
      batch = self.run.inject(self.data.batch(number - 1), number)
      return self.diagnosis.explain(state, self.run.put(batch), self.run.base)

  def newest_checkpoint(self) -> int | None:
    self.checkpoints.wait()
    return self.checkpoints.newest()

  def rewind(self, bad_step: Rewind) -> None:
    """Returns to the newest checkpoint; the batches from there to the bad step are skipped."""
    self.report.log(str(bad_step))
    self.checkpoints.wait()
    restored = self.checkpoints.restore(self.program.abstract, quarantine=True)
    if not restored:
      raise NumericalError(f'{bad_step}; there is no checkpoint to rewind to yet') from bad_step
    self.run.resume(restored, check_data=False)
    self.run.offset = self.sentry.record_rewind(bad_step.step, self.run.step)
    self.saved = self.run.step
    self.report.rewind(self.run.step)


class _StepLog:
  """Metrics of steps, fetched several at a time so that the host rarely waits for the devices."""

  def __init__(self, c, run, report, sentry, watchdog):
    self._every, self._last = c.log.every, c.total_steps
    self._run, self._report, self._sentry, self._watchdog = run, report, sentry, watchdog

  def start(self) -> None:
    """Starts at the step of the run, forgetting metrics that were not fetched."""
    self._pending = []                    # [(step, metrics on the devices)]
    self._start_row()

  def _start_row(self):
    self._row_start, self._input_wait = time.perf_counter(), 0.
    self._steps, self._tokens = 0, 0.

  def next_batch(self, batches):
    """The next batch. The time spent here is the time that training waits for data."""
    start = time.perf_counter()
    batch = next(batches)
    self._input_wait += time.perf_counter() - start
    return batch

  def add(self, step: int, metrics) -> None:
    """Takes the metrics of a step, and waits until at most STEPS_AHEAD steps are running."""
    self._pending.append((step, metrics))
    if len(self._pending) > STEPS_AHEAD:
      _, running = self._pending[-1 - STEPS_AHEAD]
      jax.block_until_ready(running['loss'])

  def flush(self) -> None:
    """Fetches and checks the metrics of all pending steps, and reports the rows that are due."""
    pending = jax.device_get(self._pending)
    self._pending = []
    self._watchdog.synced()
    for step, metrics in self._sentry.check(pending, self._run.state):
      learning_rate = self._run.account(metrics)
      self._steps += 1
      self._tokens += float(metrics['tokens'])
      if is_due(step, self._every, self._last):
        self._report.step(step, {**metrics, 'lr': learning_rate}, self._timing(),
                          data=self._run.digest)
        self._start_row()

  def _timing(self) -> dict:
    seconds = max(time.perf_counter() - self._row_start, 1e-9)
    return {'steps_per_second': self._steps / seconds,
            'tokens_per_second': self._tokens / seconds,
            'input_wait': self._input_wait / seconds}

  @contextlib.contextmanager
  def paused(self):
    """A block whose time does not count as training time."""
    start = time.perf_counter()
    yield
    self._row_start += time.perf_counter() - start


def is_due(step: int, every: int, last: int) -> bool:
  """True at every multiple of `every` (0: never), and at the last step."""
  return step == last or (every > 0 and step % every == 0)


# --- starting and ending -----------------------------------------------------------------------


def _abort(code: int) -> None:
  """Ends this process and, since they would wait for it, the other processes of the run."""
  multihost.abort_all(code, f'its watchdog saw no step; the stacks are in watchdog_'
                      f'{multihost.index()}.txt')
  os._exit(code)


def _prepare_workdir(c, workdir, resume, checkpoints) -> None:
  """Refuses a workdir of another experiment, and writes config.json."""
  checkpoints.clean()
  new = config.to_dict(c)
  if not checkpoints.steps():
    if resume == 'must':
      raise UsageError(f'{workdir} has no checkpoint and --resume=must; use --resume=auto to start')
  elif resume == 'never':
    raise UsageError(f'{workdir} has checkpoints and --resume=never; use a new --workdir, or '
                     '--resume=auto to resume')
  else:
    # Read through today's code, so keys that are newer than the run have their defaults in both.
    saved = config.to_dict(config.from_dict(rundir.read_config(workdir)))
    differences = rundir.config_differences(saved, new, MAY_CHANGE)
    if differences:
      more = f' and {len(differences) - 6} more' if len(differences) > 6 else ''
      raise UsageError(
          f'{workdir} holds another experiment: {"; ".join(differences[:6])}{more}. A resumed run '
          f'may change only {", ".join(MAY_CHANGE)}; for anything else use a new --workdir')
  rundir.write_config(workdir, new)


def _check_same_everywhere(name: str, value: str, error) -> None:
  """Raises in each process whose value differs from that of process 0."""
  first = multihost.broadcast(lambda: value)
  if first != value:
    raise error(f'the {name} of process {multihost.index()} differs from that of process 0 '
                f'({value[:12]}, {first[:12]}): give every host the same; `t5lab doctor` compares '
                'the hosts')


def _origin(c, run: Run) -> str:
  """The origin of the state at step 0, in one line."""
  optimizer = 'restored' if c.init.optimizer == 'restore' else 'fresh'
  weights = f'weights from seed {c.seed}'
  if run.initial:
    weights = f'weights of {c.init.path}, step {run.initial.step}, {run.initial.weights}'
  return f'{weights}; optimizer state {optimizer}'


def _model_line(c, program, run: Run) -> str:
  """The family, its size and the devices, in one line."""
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  line = f'{c.family}: {size(program.abstract.params):,} parameters '
  if run.base is not None:
    line += f'adapt {size(run.base):,} frozen ones '
  devices = program.mesh.size
  line += f'on {devices} {jax.devices()[0].platform} device{"s" * (devices > 1)}'
  if multihost.count() > 1:
    line += f' of {multihost.count()} processes'
  return f'{line}, rules {c.rules}'


def _revision() -> str:
  """The git commit of the code; '' outside a checkout."""
  try:
    return subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
        timeout=5, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ''
