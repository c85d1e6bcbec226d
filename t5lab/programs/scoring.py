"""Scores weights on the evaluation of a config; writes losses, metrics and predictions to files."""

import dataclasses
import functools
import json
from pathlib import Path

import jax

from t5lab import config, files
from t5lab.errors import Failure, UsageError
from t5lab.models.transformer import Transformer
from t5lab.parallel import multihost, sharding
from t5lab.programs import loading, streams
from t5lab.programs.lab import Lab, make_engine
from t5lab.training import lora, steps


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """scores: {'task/weights/metric': value}. predictions: {weights: list of Prediction}.
  failed: {'task/weights': the reason why it has no scores}."""
  scores: dict[str, float]
  predictions: dict[str, list]
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  def check(self) -> None:
    """Raises a Failure that names what was not scored. For the end, when the rest is written."""
    if self.failed:
      reason = list(self.failed.values())[0]
      raise Failure(f'not scored: {", ".join(self.failed)}; {reason}. Everything else is scored '
                    'and written, and the checkpoints are complete: fix the cause and run '
                    '`t5lab eval`')


class Evaluator:
  """Scores weights on the evaluation of a config. Opens its data at the first use, or with `open`.

  engine: the decoding engine, which all weights share and with it what it compiled.
  """

  def __init__(self, c, mesh, tick=lambda done, total: None):
    """tick(done, total) is called now and then; an exception that it raises ends the evaluation."""
    self._c, self._mesh, self._tick = c, mesh, tick
    self.engine = make_engine(c)
    model = Transformer(config.model_config(c))
    self._eval_step = jax.jit(functools.partial(steps.eval_step, model=model))

  @functools.cached_property
  def evaluation(self):
    return streams.open_evaluation(self._c)

  def open(self) -> None:
    """Opens the data now, so that its errors come before any weights are loaded."""
    _ = self.evaluation

  def score_state(self, step: int, state, base=None) -> EvalResult:
    """Scores the raw and the averaged weights of a TrainState.

    base: the frozen weights, if the state is that of adapters.
    """
    all_weights = eval_weights(state)
    if base is not None:
      scale = loading.lora_scale(self._c)
      all_weights = {name: lora.merge(base, adapters, scale)
                     for name, adapters in all_weights.items()}
    labs = {name: Lab(self._c, params, step=step, weights=name, engine=self.engine)
            for name, params in all_weights.items()}
    return self.score(labs)

  def score(self, labs: dict[str, Lab]) -> EvalResult:
    """Scores the weights of each Lab: loss and accuracy of the split, then each task's metrics."""
    scores, predictions, failed = {}, {}, {}
    for weights, lab in labs.items():
      losses, reasons = self._loss(lab), {}
      generate = functools.partial(lab.generate_tokens, tick=self._tick)
      by_task, predictions[weights] = self.evaluation.decode(generate, lab.step, reasons)
      for task, metrics in ((self.evaluation.name, losses), *by_task.items()):
        for metric, value in metrics.items():
          scores[f'{task}/{weights}/{metric}'] = value
      failed.update({f'{task}/{weights}': reason for task, reason in reasons.items()})
    return EvalResult(scores, predictions, failed)

  def _loss(self, lab) -> dict[str, float]:
    def run_batch(batch):
      self._tick(0, 0)
      return jax.device_get(self._eval_step(lab.params, sharding.put(batch, self._mesh)))
    return self.evaluation.loss(run_batch)


def eval_weights(state) -> dict:
  """{'raw': parameters, 'ema': their average, if the state has one}.

  Both are sharded like the parameters: the average is split further in a TrainState, and decoding
  would gather it again for every token.
  """
  if not state.ema:
    return {'raw': state.params}
  shardings = jax.tree.map(lambda x: x.sharding, state.params)
  return {'raw': state.params, 'ema': jax.device_put(state.ema, shardings)}


# --- files -------------------------------------------------------------------------------------


def report_evaluation(c, workdir, step: int, result: EvalResult, report) -> None:
  """Writes the files of an evaluation during training, and shows some predictions."""
  if multihost.is_main():
    write_evaluation(workdir, step, result)
  for reason in result.failed.values():
    report.log(f'step {step} evaluation: {reason}')
  weights, predictions = list(result.predictions.items())[-1]
  for p in predictions[:c.eval.samples]:
    report.text(step, f'{p.task}/{weights}/{p.index}',
                f'**source** {p.source}  \n**target** {p.target}  \n**output** {p.prediction}')


def write_evaluation(workdir, step: int, result: EvalResult, suffix: str = '') -> Path:
  """Writes eval/<step><suffix>.json (scores) and eval/<step><suffix>.<weights>.jsonl (predictions).

  Returns the path of the scores. Errors: UsageError if the folder cannot be written.
  """
  folder, stem = Path(workdir) / 'eval', f'{step}{suffix}'
  failed = {'failed': result.failed} if result.failed else {}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for weights, predictions in result.predictions.items():
      lines = [json.dumps(dataclasses.asdict(p), ensure_ascii=False) + '\n' for p in predictions]
      files.write_text(folder / f'{stem}.{weights}.jsonl', ''.join(lines))
    path = folder / f'{stem}.json'
    files.write_text(path, json.dumps({'step': step, **result.scores, **failed}, indent=1) + '\n')
  except OSError as e:
    raise UsageError(f'cannot write the evaluation of step {step} into {folder}: {e.strerror}'
                     ) from e
  return path


def read_evaluation(workdir, step: int) -> EvalResult:
  """Reads what write_evaluation wrote for a step; an empty EvalResult if it is gone."""
  from t5lab.programs.evaluators import Prediction
  folder = Path(workdir) / 'eval'
  try:
    scores = json.loads((folder / f'{step}.json').read_text())
  except FileNotFoundError:
    return EvalResult({}, {})
  scores.pop('step')
  failed = scores.pop('failed', {})
  predictions = {}
  for path in sorted(folder.glob(f'{step}.*.jsonl'), reverse=True):    # raw, then ema
    lines = path.read_text(encoding='utf-8').split('\n')[:-1]
    predictions[path.name.split('.')[1]] = [Prediction(**json.loads(line)) for line in lines]
  return EvalResult(scores, predictions, failed)
