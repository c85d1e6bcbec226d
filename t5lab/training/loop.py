"""The training program, top to bottom: fork me.

  t5lab train --config configs/quickstart.py --workdir runs/quickstart

The same command again goes on where the run was killed. TensorFlow is imported only where seqio
reads data, so `import t5lab.training.loop` stays light.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
import subprocess
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5lab import config as configs
from t5lab import streams, trees
from t5lab import weights as loading
from t5lab.data import vocab
from t5lab.errors import NumericalError, Preempted, UsageError
from t5lab.lab import Lab, make_engine
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.training import lora, optim, rundir
from t5lab.training import step as steps
from t5lab.training.report import Report

# What the command that resumes a run may change: nothing that the weights depend on, but how long.
# Where the tokens are cached is checked by what they are.
MAY_CHANGE = ('total_steps', 'log', 'checkpoint', 'eval', 'mesh', 'rules', 'loss.chunks',
              'model.remat', 'data.cache')
RESUME = ('auto', 'never', 'must')


def train(c, workdir, *, resume: str = 'auto', allow_data_change: bool = False) -> 'Result':
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

  # -- devices ------------------------------------------------------------------------------------
  mesh = sharding.make_mesh(**c.mesh.to_dict())
  micro = c.data.batch_size // c.optim.microbatches
  for name, size in (('data.batch_size', c.data.batch_size),
                     ('data.batch_size / optim.microbatches', micro)):
    if size % (spread := sharding.batch_devices(mesh)):
      raise UsageError(f'{name} = {size} is not a multiple of the {spread} devices of the data '
                       f'axis; the nearest that are: {_nearest(size, spread)}')
  shape = configs.model_config(c)
  sharding.check_heads(mesh, c.rules, shape.n_heads, shape.kv_heads)

  # -- data ---------------------------------------------------------------------------------------
  stream = streams.open_stream(c, jax.process_index(), jax.process_count())
  words, data = stream.vocabulary, stream.batches
  vocab.export(c.data.vocab, workdir / loading.VOCABULARY)     # the run's own copy, if it has files

  # -- model and optimizer: shapes first, then straight onto their devices ------------------------
  schedule = optim.schedule(c.optim.schedule, lr=c.optim.lr, warmup=c.optim.warmup,
                            total=c.total_steps, end=c.optim.lr * c.optim.end_lr,
                            decay_fraction=c.optim.decay_fraction)
  o = c.optim
  tx = optim.optimizer(o.name, schedule, clip=o.clip, weight_decay=o.weight_decay, b1=o.b1,
                       b2=o.b2, eps=o.eps)
  model = Transformer(shape, train=True)
  abstract, make_state = state_shapes(c, tx, mesh)
  step_fn = jax.jit(
      functools.partial(steps.train_step, model=model, tx=tx, loss=steps.Loss(**c.loss.to_dict()),
                        ema=o.ema, seed=c.seed, microbatches=o.microbatches,
                        lora_scale=loading.lora_scale(c)),
      donate_argnums=0)

  # -- start or resume ----------------------------------------------------------------------------
  restored = checkpoints.restore(abstract, quarantine=True)
  base = initial = None
  if c.init.path and (c.lora.rank or not restored):
    initial = loading.load_base(c, loading.boxed_params(c), mesh,
                                functools.partial(_fresh, c, mesh))
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
    state, start, origin = make_state(None if c.lora.rank or not initial else initial.params), 0, ''
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
  evaluate = _Evaluator(c, workdir, model, mesh, signals, base)
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
  result, log = None, _Log(c, report, schedule, data, checkpoints, workdir)
  with report, _joined(checkpoints), sharding.use(mesh, c.rules):
    if start and due(start, c.eval.every, c.total_steps) and start not in report.evaluated:
      result = evaluate_at(start)                          # killed between save and evaluation
    batches = data.iterate(start, c.total_steps)
    for step in range(start + 1, c.total_steps + 1):
      stop_if_asked(step - 1)
      batch = sharding.put(log.wait(batches), mesh)
      state, metrics = step_fn(state, batch, base)
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
  return result or read_evaluation(workdir, c.total_steps)


def _init_params(c):
  """Boxed parameters from the seed: of the whole model, or of the adapters."""
  if c.lora.rank:
    return lora.init(loading.boxed_params(c), c.lora.kernels, c.lora.rank, c.seed)
  batch = {k: jnp.zeros(s.shape, s.dtype) for k, s in loading.batch_shapes(c).items()}
  return steps.init_params(Transformer(configs.model_config(c)), c.seed, batch)


def _fresh(c, mesh, paths):
  """{path: array} of the whole model's parameters at these paths, from the seed."""
  with sharding.use(mesh, c.rules):
    return jax.jit(lambda: {path: x for path, x in trees.flatten(nn.unbox(_init_params(c))).items()
                            if path in paths})()


def state_shapes(c, tx, mesh):
  """(the TrainState as shapes with shardings, a function that makes the state of step 0: from
  parameters, which it takes over, or from the seed)."""
  boxed = jax.eval_shape(functools.partial(_init_params, c))
  params = nn.unbox(boxed)
  placed = sharding.shardings(boxed, mesh, c.rules)
  make = lambda p: steps.new_state(p, tx, c.optim.ema)
  abstract = jax.eval_shape(make, params)
  alone = sharding.replicated(mesh)
  shardings = steps.TrainState(
      step=alone, params=placed, ema=placed if c.optim.ema else {},
      opt_state=sharding.like_params(abstract.opt_state, params, placed, mesh))
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                          abstract, shardings)

  def make_state(params=None):
    with sharding.use(mesh, c.rules):
      if params is None:
        return jax.jit(lambda: make(nn.unbox(_init_params(c))), out_shardings=shardings)()
      return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)

  return abstract, make_state


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


class _Evaluator:
  """Scores the raw and the averaged weights, writes eval/<step>.json and the predictions."""

  def __init__(self, c, workdir, model, mesh, signals, base):
    self._c, self._workdir, self._mesh, self._signals = c, workdir, mesh, signals
    self._base = base
    self._engine = make_engine(c)
    plain = model.clone(train=False)
    self._sums = jax.jit(functools.partial(steps.eval_step, model=plain))

  @functools.cached_property
  def _evaluation(self):
    return streams.open_evaluation(self._c)

  def __call__(self, step, state, report) -> 'Result':
    weights = {'raw': state.params} | ({'ema': state.ema} if self._c.optim.ema else {})
    if self._base is not None:
      scale = loading.lora_scale(self._c)
      weights = {k: lora.merge(self._base, x, scale) for k, x in weights.items()}
    labs = {name: Lab(self._c, params, step=step, weights=name, engine=self._engine)
            for name, params in weights.items()}
    result = evaluate(self._evaluation, labs, self._sums, self._mesh, tick=self._tick)
    write_evaluation(self._workdir, step, result)
    name, predictions = list(result.predictions.items())[-1]
    for p in predictions[:self._c.eval.samples]:
      report.text(step, f'{p.task}/{name}/{p.index}',
                  f'**source** {p.source}  \n**target** {p.target}  \n**output** {p.prediction}')
    return result

  def _tick(self, done, total):
    if self._signals.requested:
      raise Preempted(f'{self._signals.requested} during evaluation: the step is saved, the same '
                      'command goes on')


@dataclasses.dataclass(frozen=True)
class Result:
  """scores: {'task/weights/metric': value}; predictions: {weights: list of Prediction}."""
  scores: dict[str, float]
  predictions: dict[str, list]


def evaluate(evaluation, labs: dict[str, Lab], sums, mesh, tick=lambda done, total: None,
             **decoding) -> Result:
  """Scores each Lab's weights: loss and accuracy of the split, then each task's own metrics."""
  scores, predictions = {}, {}
  for name, lab in labs.items():
    run = lambda batch, lab=lab: jax.device_get(sums(lab.params, sharding.put(batch, mesh)))
    for metric, value in evaluation.loss(run).items():
      scores[f'{evaluation.name}/{name}/{metric}'] = value
    generate = functools.partial(lab.generate_tokens, tick=tick, **decoding)
    by_task, predictions[name] = evaluation.decode(generate, lab.step)
    for task, values in by_task.items():
      scores.update({f'{task}/{name}/{metric}': value for metric, value in values.items()})
  return Result(scores, predictions)


def write_evaluation(workdir, step: int, result: Result, name: str = '') -> Path:
  """eval/<step>.json (scores) and eval/<step>.<weights>.jsonl (predictions); -> the former."""
  folder = Path(workdir) / 'eval'
  folder.mkdir(parents=True, exist_ok=True)
  stem = f'{step}{name}'
  for weights, rows in result.predictions.items():
    rundir.atomic_write_text(folder / f'{stem}.{weights}.jsonl', ''.join(
        json.dumps(dataclasses.asdict(p), ensure_ascii=False) + '\n' for p in rows))
  path = folder / f'{stem}.json'
  rundir.atomic_write_text(path, json.dumps({'step': step, **result.scores}, indent=1) + '\n')
  return path


def read_evaluation(workdir, step: int) -> Result:
  """What write_evaluation wrote for a step; an empty Result if it is gone."""
  from t5lab.evaluation.evaluators import Prediction
  folder = Path(workdir) / 'eval'
  try:
    scores = json.loads((folder / f'{step}.json').read_text())
  except FileNotFoundError:
    return Result({}, {})
  scores.pop('step')
  predictions = {}
  for path in sorted(folder.glob(f'{step}.*.jsonl'), reverse=True):    # raw, then ema
    rows = path.read_text(encoding='utf-8').split('\n')[:-1]
    predictions[path.name.split('.')[1]] = [Prediction(**json.loads(row)) for row in rows]
  return Result(scores, predictions)


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


def _nearest(size, divisor) -> str:
  low = size // divisor * divisor
  return f'{low} and {low + divisor}' if low else str(divisor)
