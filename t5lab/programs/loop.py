"""The training program, top to bottom: fork me.

  t5lab train --config configs/quickstart.py --workdir runs/quickstart

The same command again goes on where the run was killed. TensorFlow is imported only where seqio
reads data, so `import t5lab.programs.loop` stays light.
"""

import contextlib
import dataclasses
import functools
import os
from pathlib import Path
import subprocess
import time

import jax

from t5lab import config as configs
from t5lab.data import vocab
from t5lab.errors import DataError, NumericalError, Preempted, UsageError
from t5lab.parallel import multihost, sharding
from t5lab.programs import build as programs
from t5lab.programs import loading, scoring, streams
from t5lab.runs import injected_faults, rundir
from t5lab.runs.lock import RunLock
from t5lab.runs.position import Position, checkpoint_meta
from t5lab.runs.report import NoReport, Report
from t5lab.runs.sentry import Rewind, Sentry
from t5lab.runs.signals import Signals
from t5lab.runs.watchdog import Watchdog
from t5lab.training import digests

# What the command that resumes a run may change: nothing that the weights depend on, but how long.
# Where the tokens are cached is checked by what they are.
MAY_CHANGE = ('total_steps', 'log', 'checkpoint', 'eval', 'mesh', 'rules', 'loss.chunks',
              'model.remat', 'data.cache', 'guard', 'plan')
AHEAD = 2          # steps that may be under way


def train(c, workdir, *, resume: str = 'auto', allow_data_change: bool = False) -> scoring.Result:
  """Trains the config c in workdir -> the last evaluation.

  resume: 'auto' goes on with what workdir holds, 'never' refuses a workdir that has steps, 'must'
  one that has none. Ends with Preempted, the state saved, after SIGTERM or SIGINT.
  """
  workdir = Path(workdir).absolute()
  configs.check_trainable(c)
  multihost.initialize()
  with Signals() as signals, multihost.CoordinatedStop(signals) as stop, _locked(workdir):
    return _train(c, workdir, stop, resume, allow_data_change)


@contextlib.contextmanager
def _locked(workdir):
  """Process 0 holds the directory for all."""
  with RunLock(workdir) if multihost.is_main() else contextlib.nullcontext():
    yield


def _train(c, workdir, stop, resume, allow_data_change):
  say = functools.partial(print, flush=True) if multihost.is_main() else lambda *_: None

  # -- the run's directory ------------------------------------------------------------------------
  checkpoints = loading.open_checkpoints(c, workdir, log=say)
  streams.settle_vocabulary(c)
  _same_everywhere('config', configs.digest(c), UsageError)
  multihost.broadcast(lambda: _settle_directory(c, workdir, resume, checkpoints))

  # -- what runs: shapes first, then straight onto the devices ------------------------------------
  program = programs.build(c)
  mesh, abstract = program.mesh, program.abstract

  # -- data ---------------------------------------------------------------------------------------
  rows = sharding.local_rows(mesh, c.data.batch_size)
  stream = streams.open_stream(c, rows)
  words, data = stream.vocabulary, stream.batches
  _same_everywhere('data', data.fingerprint, DataError)
  multihost.broadcast(lambda: vocab.export(c.data.vocab, workdir / loading.VOCABULARY))

  # -- start or resume ----------------------------------------------------------------------------
  restored = checkpoints.restore(abstract, quarantine=True)
  initial = program.load_initial() if c.init.path and (c.lora.rank or not restored) else None
  base = initial.params if c.lora.rank else None
  if restored:
    state, manifest = restored
    if base is not None:
      loading.check_base(initial, manifest.meta, c, workdir)
    if not allow_data_change:
      data.check_position(manifest.meta['data'])
    at = Position.from_manifest(manifest)
    origin = f'resuming from step {at.step} in {workdir}: optimizer state restored'
  else:
    state, at = program.first_state(initial), Position()
    origin = (f'weights of {c.init.path}, step {initial.step}, {initial.weights}' if initial else
              f'weights from seed {c.seed}')
    origin += '; optimizer state ' + {'restore': 'restored'}.get(c.init.optimizer, 'fresh')
  count = sum(x.size for x in jax.tree.leaves(abstract.params))
  frozen = sum(x.size for x in jax.tree.leaves(base))
  for line in (f'{c.family}: {count:,} parameters '
               + f'adapt {frozen:,} frozen ones ' * bool(frozen)
               + f'on {mesh.size} {jax.devices()[0].platform} device{"s" * (mesh.size > 1)}'
               + f' of {multihost.count()} processes' * (multihost.count() > 1)
               + f', rules {c.rules}', origin, *data.summary()):
    say(line)

  # -- what a step leaves behind ------------------------------------------------------------------
  report = Report(workdir, resume_step=at.step, total_steps=c.total_steps) if (
      multihost.is_main()) else NoReport()
  evaluated = multihost.broadcast(lambda: sorted(report.evaluated))
  dog = Watchdog(c.guard.watchdog, workdir, process=multihost.index(), leave=_leave)
  patience = max(600., 10 * c.guard.watchdog) * bool(c.guard.watchdog)   # of what may compile

  def tick(done, total):
    dog.tick()
    if why := stop.check():
      raise Preempted(f'{why} during evaluation: the step is saved, the same command goes on')

  evaluate = scoring.Evaluator(c, workdir, program.model, mesh, base, tick)
  meta = dict(config=configs.digest(c), revision=_revision(), mesh=dict(mesh.shape),
              vocab=words.sha256)
  if initial:
    meta['init'] = dict(path=c.init.path, step=initial.step, sha256=initial.sha256)
  saved, guard = at.step, program.make_guard(at.guard)
  fault, diagnosis = injected_faults.requested(), program.diagnosis()

  def on_devices(batch, number):
    """Batch `number` of the stream, from 1: this process's rows -> global arrays."""
    if fault:
      batch = fault.inject(batch, number, rows=rows, process=multihost.index())
    return sharding.put(batch, mesh, rows, size=c.data.batch_size)

  def explain(state, number):
    with dog.paused('the diagnosis of a bad step', patience):
      return diagnosis.explain(state, on_devices(data.batch(number - 1), number), base)

  def newest():
    checkpoints.wait()
    return max(checkpoints.steps(), default=None)

  sentry = Sentry(workdir, program.judged_by, data=data, vocabulary=words, explain=explain,
                  newest=newest, step=at.step, offset=at.offset, log=report.log,
                  write=multihost.is_main())
  log = _Log(c, report, program.schedule, sentry, dog)

  def save(step):
    nonlocal saved
    if step > saved:
      with dog.paused(f'the checkpoint of step {step}', patience):
        checkpoints.save(step, state, meta={
            **meta, **checkpoint_meta(step, at.offset, log.digest, guard, data)})
      saved = step

  def evaluate_at(step):
    save(step)
    with log.paused(), dog.paused(f'the evaluation of step {step}', patience):
      result = evaluate(step, state, report)
      if c.checkpoint.best and c.checkpoint.best not in result.scores:
        report.log(f'checkpoint.best={c.checkpoint.best!r} is not measured here, so no checkpoint '
                   f'is the best; measured: {", ".join(result.scores)}')
      checkpoints.annotate(step, result.scores)
      report.eval(step, result.scores)    # last: a resumed run takes this row for the end of it
    return result

  def stop_if_asked(step):
    if why := stop.check():
      log.flush(state)
      save(step)
      raise Preempted(f'{why}: ' + (
          f'step {step} is saved, the same command goes on' if step else 'nothing to save yet'))

  def run():
    """The steps from `at` to the last -> the last evaluation, if there was one."""
    nonlocal state, guard
    result = None
    if at.step and due(at.step, c.eval.every, c.total_steps) and at.step not in evaluated:
      result = evaluate_at(at.step)                        # killed between save and evaluation
    batches = data.iterate(at.step + at.offset, c.total_steps + at.offset)
    for step in range(at.step + 1, c.total_steps + 1):
      stop_if_asked(step - 1)
      dog.beat(f'step {step}')
      batch = on_devices(log.wait(batches), step + at.offset)
      state, guard, metrics = program.step(state, batch, base, guard)
      log.add(step, metrics)
      evaluates = due(step, c.eval.every, c.total_steps)
      saves = due(step, c.checkpoint.every, c.total_steps) or evaluates
      if saves or due(step, c.log.every, c.total_steps) or not dog.armed:
        log.flush(state)
      if saves:
        save(step)
      if evaluates:
        result = evaluate_at(step)
    return result

  # -- train --------------------------------------------------------------------------------------
  with report, _joined(checkpoints), dog:
    while True:
      log.restart(at, int(state.step))
      try:
        with sharding.use(mesh, c.rules):
          result = run()
        break
      except Rewind as e:                 # a bad step: its batches are left out
        report.log(str(e))
        checkpoints.wait()
        if not (found := checkpoints.restore(abstract, quarantine=True)):
          raise NumericalError(f'{e}; there is no checkpoint to rewind to yet') from e
        state, manifest = found
        offset = sentry.record_rewind(e.step, manifest.step)
        at = dataclasses.replace(Position.from_manifest(manifest), offset=offset)
        guard, saved = program.make_guard(at.guard), at.step
        report.rewind(at.step)
  return result or scoring.read_evaluation(workdir, c.total_steps)


def _leave(code: int) -> None:
  """What the watchdog does last: the other processes, which wait for this one, end with it."""
  multihost.abort_all(code, 'its watchdog saw no step; its stacks are in watchdog_'
                    f'{multihost.index()}.txt')
  os._exit(code)


@contextlib.contextmanager
def _joined(checkpoints):
  """Whatever ends the block, a save in progress is committed or its failure raised."""
  try:
    yield
  finally:
    checkpoints.wait()


def due(step: int, every: int, last: int) -> bool:
  """Every so many steps (0: never) and at the last one."""
  return step == last or bool(every) and step % every == 0


class _Log:
  """Metrics of the steps since the last row, fetched together so the device is not asked often."""

  def __init__(self, c, report, schedule, sentry, dog):
    self._every, self._last = c.log.every, c.total_steps
    self._report, self._schedule, self._sentry, self._dog = report, schedule, sentry, dog

  def restart(self, at: Position, updates: int):
    """From the place `at`, where the state has seen so many updates: skipped steps are none."""
    self.digest, self._updates = at.digest, updates       # of all batches up to the last flush
    self._pending = []
    self._start_row()

  def _start_row(self):
    self._since, self._waited, self._steps, self._tokens = time.perf_counter(), 0., 0, 0.

  def wait(self, batches):
    """The next batch; the time spent here is what training waited for data."""
    before = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - before
    return batch

  def add(self, step, metrics):
    """Lets the host run a step or two ahead of the devices, no more: what hangs is seen soon."""
    self._pending.append((step, metrics))
    if len(self._pending) > AHEAD:
      jax.block_until_ready(self._pending[-1 - AHEAD][1]['loss'])

  def flush(self, state):
    """Has the sentry look at every pending step, of which `state` is the last; writes due rows."""
    pending = jax.device_get(self._pending)
    self._pending = []
    self._dog.synced()
    for step, metrics in self._sentry.check(pending, state):
      self.digest = digests.chain(self.digest, metrics.pop('batch'))
      lr = self._schedule(self._updates)
      self._updates += not metrics['skipped']
      self._steps += 1
      self._tokens += float(metrics['tokens'])
      if due(step, self._every, self._last):
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._report.step(
            step, {**metrics, 'lr': lr},
            {'steps_per_second': self._steps / seconds,
             'tokens_per_second': self._tokens / seconds,
             'input_wait': self._waited / seconds}, data=self.digest)
        self._start_row()

  @contextlib.contextmanager
  def paused(self):
    """A block whose time belongs to no step."""
    start = time.perf_counter()
    yield
    self._since += time.perf_counter() - start


def _settle_directory(c, workdir, resume, checkpoints) -> None:
  """Refuses a workdir of another experiment; else leaves this config in it."""
  checkpoints.clean()
  has_steps, new = bool(checkpoints.steps()), configs.to_dict(c)
  if resume == 'never' and has_steps:
    raise UsageError(f'{workdir} has checkpoints and --resume=never; use a new --workdir, or '
                     '--resume=auto to go on')
  if resume == 'must' and not has_steps:
    raise UsageError(f'{workdir} has no checkpoint and --resume=must; use --resume=auto to start')
  if has_steps:
    # through our own reading: keys that are newer than the run have their defaults in both
    saved = configs.to_dict(configs.from_dict(rundir.read_config(workdir)))
    differ = rundir.config_differences(saved, new, MAY_CHANGE)
    if differ:
      more = f' and {len(differ) - 6} more' if len(differ) > 6 else ''
      raise UsageError(
          f'{workdir} holds another experiment: {"; ".join(differ[:6])}{more}. A resumed run may '
          f'change only {", ".join(MAY_CHANGE)}; for the rest use a new --workdir')
  rundir.write_config(workdir, new)


def _same_everywhere(what: str, value: str, error) -> None:
  """Raises on the processes that differ from process 0 (and `t5lab` then ends the others)."""
  if (first := multihost.broadcast(lambda: value)) != value:
    raise error(f'the {what} of process {multihost.index()} is not that of process 0 '
                f'({value[:12]}, {first[:12]}): give every host the same; `t5lab doctor` compares')


def _revision() -> str:
  """The git commit of the code, '' outside a checkout."""
  try:
    return subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
        timeout=5, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ''

