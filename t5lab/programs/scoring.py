"""Scores of weights on what a config evaluates: loss, decoded metrics, predictions, as files."""

import dataclasses
import functools
import json
from pathlib import Path

import jax

from t5lab import files
from t5lab.errors import Failure, UsageError
from t5lab.parallel import multihost, sharding
from t5lab.programs import loading, streams
from t5lab.programs.lab import Lab, make_engine
from t5lab.training import lora, steps


class Evaluator:
  """Scores the raw and the averaged weights, writes eval/<step>.json and the predictions."""

  def __init__(self, c, workdir, model, mesh, base, tick):
    """tick(done, total): called now and then; what it raises ends the evaluation."""
    self._c, self._workdir, self._mesh, self._tick = c, workdir, mesh, tick
    self._base = base
    self._engine = make_engine(c)
    plain = model.clone(train=False)
    self._sums = jax.jit(functools.partial(steps.eval_step, model=plain))

  @functools.cached_property
  def _evaluation(self):
    return streams.open_evaluation(self._c)

  def __call__(self, step, state, report) -> 'Result':
    weights = weights_of(state)
    if self._base is not None:
      scale = loading.lora_scale(self._c)
      weights = {k: lora.merge(self._base, x, scale) for k, x in weights.items()}
    labs = {name: Lab(self._c, params, step=step, weights=name, engine=self._engine)
            for name, params in weights.items()}
    result = evaluate(self._evaluation, labs, self._sums, self._mesh, tick=self._tick)
    if multihost.is_main():
      write_evaluation(self._workdir, step, result)
    for reason in result.failed.values():
      report.log(f'step {step} evaluation: {reason}')
    name, predictions = list(result.predictions.items())[-1]
    for p in predictions[:self._c.eval.samples]:
      report.text(step, f'{p.task}/{name}/{p.index}',
                  f'**source** {p.source}  \n**target** {p.target}  \n**output** {p.prediction}')
    return result


def weights_of(state) -> dict:
  """{'raw': parameters, 'ema': their average, where there is one}, both lying as parameters do: the
  average is split further, and decoding would gather it anew for each token."""
  if not state.ema:
    return {'raw': state.params}
  lie = jax.tree.map(lambda x: x.sharding, state.params)
  return {'raw': state.params, 'ema': jax.device_put(state.ema, lie)}


@dataclasses.dataclass(frozen=True)
class Result:
  """scores: {'task/weights/metric': value}; predictions: {weights: list of Prediction}; failed:
  {'task/weights': why it has no scores}."""
  scores: dict[str, float]
  predictions: dict[str, list]
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  def check(self) -> None:
    """Failure that names what could not be scored. For a command's end: the rest is written."""
    if self.failed:
      raise Failure(f'not scored: {", ".join(self.failed)}; {list(self.failed.values())[0]}. All '
                    'else is scored and written, the checkpoints are whole: repair that and run '
                    '`t5lab eval`')


def evaluate(evaluation, labs: dict[str, Lab], sums, mesh, tick=lambda done, total: None,
             **decoding) -> Result:
  """Scores each Lab's weights: loss and accuracy of the split, then each task's own metrics."""
  scores, predictions, failed = {}, {}, {}
  for name, lab in labs.items():
    def run(batch, lab=lab):
      tick(0, 0)
      return jax.device_get(sums(lab.params, sharding.put(batch, mesh)))
    for metric, value in evaluation.loss(run).items():
      scores[f'{evaluation.name}/{name}/{metric}'] = value
    generate = functools.partial(lab.generate_tokens, tick=tick, **decoding)
    reasons = {}
    by_task, predictions[name] = evaluation.decode(generate, lab.step, reasons)
    failed |= {f'{task}/{name}': reason for task, reason in reasons.items()}
    for task, values in by_task.items():
      scores.update({f'{task}/{name}/{metric}': value for metric, value in values.items()})
  return Result(scores, predictions, failed)


def write_evaluation(workdir, step: int, result: Result, name: str = '') -> Path:
  """eval/<step>.json (scores) and eval/<step>.<weights>.jsonl (predictions); -> the former."""
  folder = Path(workdir) / 'eval'
  try:
    return _write_evaluation(folder, step, result, f'{step}{name}')
  except OSError as e:
    raise UsageError(f'cannot write the evaluation of step {step} into {folder}: {e.strerror}'
                     ) from e


def _write_evaluation(folder, step, result, stem) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  for weights, rows in result.predictions.items():
    files.write_text(folder / f'{stem}.{weights}.jsonl', ''.join(
        json.dumps(dataclasses.asdict(p), ensure_ascii=False) + '\n' for p in rows))
  path = folder / f'{stem}.json'
  files.write_text(path, json.dumps(
      {'step': step, **result.scores} | ({'failed': result.failed} if result.failed else {}),
      indent=1) + '\n')
  return path


def read_evaluation(workdir, step: int) -> Result:
  """What write_evaluation wrote for a step; an empty Result if it is gone."""
  from t5lab.programs.evaluators import Prediction
  folder = Path(workdir) / 'eval'
  try:
    scores = json.loads((folder / f'{step}.json').read_text())
  except FileNotFoundError:
    return Result({}, {})
  scores.pop('step')
  failed = scores.pop('failed', {})
  predictions = {}
  for path in sorted(folder.glob(f'{step}.*.jsonl'), reverse=True):    # raw, then ema
    rows = path.read_text(encoding='utf-8').split('\n')[:-1]
    predictions[path.name.split('.')[1]] = [Prediction(**json.loads(row)) for row in rows]
  return Result(scores, predictions, failed)
