"""Scores of a model on a Task or Mixture: validation loss, and decoding through seqio's Evaluator.

seqio supplies targets, postprocessors and metric functions; decoding is ours. Imports TensorFlow.
"""

import collections
from collections.abc import Callable
import contextlib
import dataclasses
import traceback

from absl import logging
import numpy as np

from t5lab.data import vocab
from t5lab.data.batches import features, pipeline
from t5lab.data.tasks import own_files, prompts
from t5lab.data.tasks import registry as tasks
from t5lab.data.tasks.seqio_tf import seqio, tf
from t5lab.errors import DataError, Failure


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One decoded example; `prediction` is the text before the task's postprocessor."""
  task: str
  index: int
  source: str       # the input's field without the prompt, where the task has one
  target: str
  prediction: str


@contextlib.contextmanager
def _without_advice():
  """seqio warns of lengths that it took from us and of a logger that we do not want."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


class _TaskFeatures(seqio.PassThroughFeatureConverter):
  """A task's features as they are: the decoding engine makes its own batches."""
  TASK_FEATURES = {name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
                   for name in ('inputs', 'targets')}
  pack = False


class Evaluation:
  """A split of a Task or Mixture, read once and scored as often as asked.

  lengths: tokens of each feature; longer inputs are cut, references never are. examples: the first
  so many of each task, 0 for all. kind: of model, one of features.KINDS; start: the decoder's first
  input token; files, modules: as tasks.register's.
  """

  def __init__(self, name: str, split: str, *, vocab_spec: str, lengths: dict[str, int],
               examples: int = 0, batch_size: int = 64, kind: str = 'encoder_decoder',
               start: int = features.BOS, files=None, modules=()):
    self.name, self.split, self._files = name, split, files
    self._vocab = vocab.load(vocab_spec)
    components = tasks.open_components(name, split, lengths, vocab_spec, files=files,
                                       modules=modules)
    if examples:
      components = [dataclasses.replace(c, examples=c.examples[:examples]) for c in components]
    self._rows = pipeline.Pipeline(
        components, lengths, batch_size=batch_size, seed=0, pack=True, kind=kind,
        eos=self._vocab.eos_id, start=start)
    scored = [c.name for c in components if seqio.get_mixture_or_task(c.name).metric_fns]
    with _without_advice():
      self._evaluators = {task: self._open(task, lengths, examples) for task in scored}

  def _open(self, task, lengths, examples):
    evaluator = seqio.Evaluator(
        task, feature_converter=_TaskFeatures(), eval_split=self.split,
        sequence_length={k: v for k, v in lengths.items() if v}, num_examples=examples or None,
        use_memory_cache=True)
    if not evaluator.eval_tasks:
      raise DataError(f'task {task!r} has nothing to evaluate in split {self.split!r}')
    return evaluator

  def loss(self, sums: Callable[[dict], dict]) -> dict[str, float]:
    """Mean cross-entropy and accuracy over all target tokens, or classes, of the split.

    Where texts are pairs, also those of 'does the second follow', which the loss then includes.
    sums(batch) -> {'loss', 'correct', 'weight', …} of one batch of model features.
    """
    total = collections.Counter()
    for batch in self._rows.epoch():
      total.update({k: float(v) for k, v in sums(batch).items()})
    tokens = max(total['weight'], 1.)
    scores = {'loss': total['loss'] / tokens, 'accuracy': total['correct'] / tokens}
    if pairs := total['nsp_weight']:
      scores['nsp_loss'] = total['nsp_loss'] / pairs
      scores['nsp_accuracy'] = total['nsp_correct'] / pairs
      scores['loss'] += scores['nsp_loss']
    return scores

  def decode(self, generate: Callable[[list[list[int]]], np.ndarray], step: int = 0,
             failed: dict[str, str] | None = None,
             ) -> tuple[dict[str, dict[str, float]], list[Prediction]]:
    """generate(requests) -> int[requests, length] -> ({task: metrics}, predictions).

    A task that cannot be scored (a target without text, a request without prediction, a metric that
    raises) is put into `failed`, {task: reason}, and the others are scored; without it, a Failure.
    What `generate` raises is not caught.
    """
    scores, predictions = {}, []
    for task, evaluator in self._evaluators.items():
      decoded = {}
      try:
        scores[task] = self._score(task, evaluator, generate, step, decoded)
      except Failure as e:
        if failed is None or e.code != Failure.code:
          raise
        failed[task] = str(e)
      predictions += [
          Prediction(task, i, self._source(task, _text(ex, 'inputs')), _text(ex, 'targets'),
                     decoded[i])
          for i, ex in enumerate(evaluator.cached_task_datasets[task].as_numpy_iterator())
          if i in decoded]
    return scores, predictions

  def _score(self, task, evaluator, generate, step, decoded) -> dict[str, float]:
    """The metrics of one task; fills `decoded`, {index: text}. Failure names what is wrong."""
    for i, ex in enumerate(evaluator.cached_task_datasets[task].as_numpy_iterator()):
      if 'targets_pretokenized' in ex and not _text(ex, 'targets').strip():
        raise Failure(f'task {task!r}: the target of example {i} of split {self.split!r} is empty, '
                      'there is nothing to compare with')

    def predict(dataset):
      rows = [(int(i), ex) for i, ex in dataset.as_numpy_iterator()]
      # seqio wants rows of one length: numpy 2 refuses ragged ones.
      tokens = generate([list(map(int, ex.get('inputs', ()))) for _, ex in rows])
      decoded.update((i, self._vocab.decode(row)) for (i, _), row in zip(rows, tokens))
      if missing := [i for i, _ in rows if i not in decoded]:
        raise Failure(f'task {task!r}: {len(missing)} of {len(rows)} examples have no prediction, '
                      f'first {missing[0]}')
      return [(i, row) for (i, _), row in zip(rows, tokens)]

    with _without_advice():
      # the metrics in a thread of seqio's: what they raise comes with the future alone
      future, _ = evaluator.evaluate(compute_metrics=True, step=step, predict_fn=predict)
      try:
        return {k: float(v) for k, v in future.result()[task].items()}
      except Exception as e:
        evaluator._metrics_future = None       # or seqio raises it again at every later evaluation
        raise Failure(f'task {task!r}: {_culprit(task, e)} raised {_reason(e)}') from e

  def _source(self, task, text) -> str:
    return self._files.source(text) if task == own_files.NAME else prompts.source(task, text)


def _text(example, feature) -> str:
  return example.get(f'{feature}_pretokenized', b'').decode('utf-8', 'replace')


def _culprit(task: str, error: Exception) -> str:
  """'metric bleu' of the metric functions of a task that is in the error's trace."""
  called = {frame.name for e in (error, error.__cause__) if e
            for frame in traceback.extract_tb(e.__traceback__)}
  names = [getattr(fn, '__name__', '') for fn in seqio.get_mixture_or_task(task).metric_fns]
  return 'metric ' + (' or '.join(n for n in names if n in called)
                      or ', '.join(filter(None, names)))


def _reason(error: Exception) -> str:
  error = error.__cause__ or error          # seqio's own says no more than which task it was
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
