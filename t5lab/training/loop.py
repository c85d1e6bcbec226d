"""The training program, top to bottom: fork me.

  t5lab train --config configs/quickstart.py --workdir runs/quickstart

The same command again goes on where the run was killed. TensorFlow is imported only where seqio
reads data, so `import t5lab.training.loop` stays light.
"""

import contextlib
import functools
import hashlib
import json
import math
from pathlib import Path
import subprocess
import time

import jax

from t5lab import config as configs
from t5lab import program as programs
from t5lab import scoring, streams
from t5lab import weights as loading
from t5lab.data import vocab
from t5lab.errors import NumericalError, Preempted, UsageError
from t5lab.parallel import sharding
from t5lab.training import rundir
from t5lab.training.report import Report

# What the command that resumes a run may change: nothing that the weights depend on, but how long.
# Where the tokens are cached is checked by what they are.
MAY_CHANGE = ('total_steps', 'log', 'checkpoint', 'eval', 'mesh', 'rules', 'loss.chunks',
              'model.remat', 'data.cache')
RESUME = ('auto', 'never', 'must')


def train(c, workdir, *, resume: str = 'auto', allow_data_change: bool = False) -> scoring.Result:
  """Trains the config c in workdir -> the last evaluation.

  resume: 'auto' goes on with what workdir holds, 'never' refuses a workdir that has steps, 'must'
  one that has none. Ends with Preempted, the state saved, after SIGTERM or SIGINT.
  """
  workdir = Path(workdir).absolute()
  configs.check_trainable(c)
  with rundir.Signals() as signals, rundir.RunLock(workdir):
    return _train(c, workdir, signals, resume, allow_data_change)


def _train(c, workdir, signals, resume, allow_data_change):
  # -- the run's directory ------------------------------------------------------------------------
  checkpoints = loading.open_checkpoints(c, workdir)
  checkpoints.clean()
  streams.settle_vocabulary(c)
  _settle_config(c, workdir, resume, bool(checkpoints.steps()))

  # -- what runs: shapes first, then straight onto the devices ------------------------------------
  program = programs.build(c)
  mesh, abstract = program.mesh, program.abstract

  # -- data ---------------------------------------------------------------------------------------
  stream = streams.open_stream(c, jax.process_index(), jax.process_count())
  words, data = stream.vocabulary, stream.batches
  vocab.export(c.data.vocab, workdir / loading.VOCABULARY)     # the run's own copy, if it has files

  # -- start or resume ----------------------------------------------------------------------------
  restored = checkpoints.restore(abstract, quarantine=True)
  base = initial = None
  if c.init.path and (c.lora.rank or not restored):
    initial = loading.load_base(c, loading.boxed_params(c), mesh,
                                functools.partial(programs.fresh, c, mesh))
    base = initial.params if c.lora.rank else None
  if restored:
    state, manifest = restored
    if base is not None:
      loading.check_base(initial, manifest.meta, c, workdir)
    if not allow_data_change:
      data.check_position(manifest.meta['data'])
    start = manifest.step
    origin = f'resuming from step {start} in {workdir}: optimizer state restored'
  else:
    state, start, origin = program.make_state(
        None if c.lora.rank or not initial else initial.params), 0, ''
    if c.init.optimizer == 'restore' and initial:
      state = state.replace(opt_state=loading.load_optimizer(c, abstract.opt_state, initial.step))
    origin = (f'weights of {c.init.path}, step {initial.step}, {initial.weights}' if initial else
              f'weights from seed {c.seed}')
    origin += '; optimizer state ' + {'restore': 'restored'}.get(c.init.optimizer, 'fresh')
  count = sum(x.size for x in jax.tree.leaves(abstract.params))
  frozen = sum(x.size for x in jax.tree.leaves(base))
  for line in (f'{c.family}: {count:,} parameters '
               + f'adapt {frozen:,} frozen ones ' * bool(frozen)
               + f'on {mesh.size} {jax.devices()[0].platform} device{"s" * (mesh.size > 1)}, '
               f'rules {c.rules}', origin, *data.summary()):
    print(line, flush=True)

  # -- what a step leaves behind ------------------------------------------------------------------
  report = Report(workdir, resume_step=start, total_steps=c.total_steps)
  evaluate = scoring.Evaluator(c, workdir, program.model, mesh, signals, base)
  meta = dict(config=config_hash(c), revision=_revision(), mesh=dict(mesh.shape),
              vocab=words.sha256)
  if initial:
    meta['init'] = dict(path=c.init.path, step=initial.step, sha256=initial.sha256)
  saved = start

  def save(step):
    nonlocal saved
    if step > saved:
      checkpoints.save(step, state, meta={**meta, 'data': data.position(step)})
      saved = step

  def evaluate_at(step):
    save(step)
    result = evaluate(step, state, report)
    if c.checkpoint.best and c.checkpoint.best not in result.scores:
      report.log(f'checkpoint.best={c.checkpoint.best!r} is not measured here, so no checkpoint is '
                 f'the best; measured: {", ".join(result.scores)}')
    checkpoints.annotate(step, result.scores)
    report.eval(step, result.scores)      # last: a resumed run takes this row for the end of it
    return result

  def stop_if_asked(step):
    if signals.requested:
      log.flush()
      save(step)
      raise Preempted(f'{signals.requested}: ' + (
          f'step {step} is saved, the same command goes on' if step else 'nothing to save yet'))

  # -- train --------------------------------------------------------------------------------------
  result, log = None, _Log(c, report, program.schedule, data, checkpoints, workdir)
  with report, _joined(checkpoints), sharding.use(mesh, c.rules):
    if start and due(start, c.eval.every, c.total_steps) and start not in report.evaluated:
      result = evaluate_at(start)                          # killed between save and evaluation
    batches = data.iterate(start, c.total_steps)
    for step in range(start + 1, c.total_steps + 1):
      stop_if_asked(step - 1)
      batch = sharding.put(log.wait(batches), mesh)
      state, metrics = program.step(state, batch, base)
      log.add(step, metrics)
      evaluates = due(step, c.eval.every, c.total_steps)
      saves = due(step, c.checkpoint.every, c.total_steps) or evaluates
      if saves or due(step, c.log.every, c.total_steps):
        log.flush()
      if saves:
        save(step)
      if evaluates:
        with log.paused():
          result = evaluate_at(step)
  return result or scoring.read_evaluation(workdir, c.total_steps)


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

  def __init__(self, c, report, schedule, data, checkpoints, workdir):
    self._every, self._last = c.log.every, c.total_steps
    self._report, self._schedule, self._data = report, schedule, data
    self._checkpoints, self._workdir = checkpoints, workdir
    self._pending = []
    self._restart()

  def _restart(self):
    self._since, self._waited, self._steps, self._tokens = time.perf_counter(), 0., 0, 0.

  def wait(self, batches):
    """The next batch; the time spent here is what training waited for data."""
    before = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - before
    return batch

  def add(self, step, metrics):
    self._pending.append((step, metrics))

  def flush(self):
    """Checks every pending step, writes the rows that are due."""
    pending = [(s, m) for s, m in jax.device_get(self._pending)]
    self._pending = []
    for step, metrics in pending:
      if not math.isfinite(metrics['loss']) or not math.isfinite(metrics['grad_norm']):
        self._stop(step, metrics)
      self._steps += 1
      self._tokens += float(metrics['tokens'])
      if due(step, self._every, self._last):
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._report.step(
            step, {**metrics, 'lr': self._schedule(step - 1)},
            {'steps_per_second': self._steps / seconds,
             'tokens_per_second': self._tokens / seconds,
             'input_wait': self._waited / seconds})
        self._restart()

  def _stop(self, step, metrics):
    """A number that is not one: nothing after it is worth computing."""
    ids = self._data.example_ids(step - 1)
    path = self._workdir / f'nonfinite_step_{step}.json'
    rundir.atomic_write_text(path, json.dumps(
        {'step': step, **{k: float(v) for k, v in metrics.items()}, 'examples': ids}) + '\n')
    self._checkpoints.wait()
    kept = self._checkpoints.steps()
    raise NumericalError(
        f'step {step}: loss is {float(metrics["loss"])}, gradient norm '
        f'{float(metrics["grad_norm"])}; the batch held {len(ids)} examples ({", ".join(ids[:4])}, '
        f'…; all in {path}); last good checkpoint: {f"step {kept[-1]}" if kept else "none yet"}; '
        'lower optim.lr or set optim.clip')

  @contextlib.contextmanager
  def paused(self):
    """A block whose time belongs to no step."""
    start = time.perf_counter()
    yield
    self._since += time.perf_counter() - start


def _settle_config(c, workdir, resume, has_steps):
  """Refuses a workdir of another experiment; else leaves this config in it."""
  new = configs.to_dict(c)
  if resume == 'never' and has_steps:
    raise UsageError(f'{workdir} has checkpoints and --resume=never; use a new --workdir, or '
                     '--resume=auto to go on')
  if resume == 'must' and not has_steps:
    raise UsageError(f'{workdir} has no checkpoint and --resume=must; use --resume=auto to start')
  if has_steps:
    # through our own reading: keys that are newer than the run have their defaults in both
    saved = configs.to_dict(configs.from_dict(rundir.read_config(workdir)))
    differ = rundir.check_same_config(saved, new, MAY_CHANGE)
    if differ:
      more = f' and {len(differ) - 6} more' if len(differ) > 6 else ''
      raise UsageError(
          f'{workdir} holds another experiment: {"; ".join(differ[:6])}{more}. A resumed run may '
          f'change only {", ".join(MAY_CHANGE)}; for the rest use a new --workdir')
  rundir.write_config(workdir, new)


def config_hash(c) -> str:
  return hashlib.sha256(json.dumps(configs.to_dict(c), sort_keys=True).encode()).hexdigest()


def _revision() -> str:
  """The git commit of the code, '' outside a checkout."""
  try:
    return subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
        timeout=5, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ''

