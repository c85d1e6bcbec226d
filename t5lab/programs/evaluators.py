"""Scores of a model on a Task or Mixture: validation loss, and decoding through seqio's Evaluator.

seqio supplies targets, postprocessors and metric functions; the decoding is our own. Importing
this module imports TensorFlow.
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
from t5lab.data.tasks import own_files, prompts, registry
from t5lab.data.tasks.seqio_tf import seqio, tf
from t5lab.errors import DataError, Failure


@dataclasses.dataclass(frozen=True)
class Prediction:
  """One decoded example; `prediction` is the text before the task's postprocessor."""
  task: str
  index: int
  source: str       # the input field without the prompt, if the task has one
  target: str
  prediction: str


@contextlib.contextmanager
def _without_warnings():
  """seqio warns about the lengths we give it, and about a logger that we do not want."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


class _TaskFeatures(seqio.PassThroughFeatureConverter):
  """Leaves a task's features unchanged: the decoding engine makes its own batches."""
  TASK_FEATURES = {name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
                   for name in ('inputs', 'targets')}
  pack = False


class Evaluation:
  """A split of a Task or Mixture, read once and scored any number of times.

  lengths: tokens of each feature; longer inputs are cut, references are not. examples: how many of
  each task are used, from the start of the split; 0 for all. kind: of the model, one of
  features.KINDS. start_id: the decoder's first input token. files, modules: see registry.register.
  """

  def __init__(self, name: str, split: str, *, vocab_spec: str, lengths: dict[str, int],
               examples: int = 0, batch_size: int = 64, kind: str = 'encoder_decoder',
               start_id: int = features.START, files=None, modules=()):
    self.name, self.split, self._files = name, split, files
    self._vocab = vocab.load(vocab_spec)
    components = registry.open_components(name, split, lengths, vocab_spec, files=files,
                                          modules=modules)
    if examples:
      components = [dataclasses.replace(c, examples=c.examples[:examples]) for c in components]
    self._rows = pipeline.Pipeline(
        components, lengths, batch_size=batch_size, seed=0, pack=True, kind=kind,
        eos=self._vocab.eos_id, second_type=self._vocab.second_type, start_id=start_id)
    scored = [c.name for c in components if seqio.get_mixture_or_task(c.name).metric_fns]
    with _without_warnings():
      self._evaluators = {task: self._open(task, lengths, examples) for task in scored}

  def _open(self, task, lengths, examples):
    evaluator = seqio.Evaluator(
        task, feature_converter=_TaskFeatures(), eval_split=self.split,
        sequence_length={k: v for k, v in lengths.items() if v}, num_examples=examples or None,
        use_memory_cache=True)
    if not evaluator.eval_tasks:
      raise DataError(f'task {task!r} has no examples to evaluate in split {self.split!r}')
    return evaluator

  def loss(self, sums: Callable[[dict], dict]) -> dict[str, float]:
    """Mean cross-entropy and accuracy over all target tokens, or classes, of the split.

    For pairs of texts, also those of next-sentence prediction, which the loss then includes.
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
    """Decodes and scores every task -> ({task: metrics}, predictions).

    generate(requests) -> int[requests, length].
    A task that cannot be scored (a target without text, a request without prediction, a metric that
    raises) is added to `failed`, {task: reason}, and the other tasks are scored. Without `failed`,
    it is a Failure. Exceptions of `generate` are not caught.
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
      for i, example in enumerate(evaluator.cached_task_datasets[task].as_numpy_iterator()):
        if i in decoded:
          source = self._source(task, _text(example, 'inputs'))
          predictions.append(Prediction(task, i, source, _text(example, 'targets'), decoded[i]))
    return scores, predictions

  def _score(self, task, evaluator, generate, step, decoded) -> dict[str, float]:
    """The metrics of one task. Fills `decoded`, {index: text}."""
    for i, example in enumerate(evaluator.cached_task_datasets[task].as_numpy_iterator()):
      if 'targets_pretokenized' in example and not _text(example, 'targets').strip():
        raise Failure(f'task {task!r}: the target of example {i} of split {self.split!r} is empty, '
                      'so there is nothing to compare with')

    def predict(dataset):
      examples = [(int(i), example) for i, example in dataset.as_numpy_iterator()]
      # One array for all outputs: seqio stacks them, and numpy 2 refuses ragged lists.
      requests = [example.get('inputs', ()) for _, example in examples]
      outputs = generate([list(map(int, request)) for request in requests])
      numbered = [(i, ids) for (i, _), ids in zip(examples, outputs)]
      decoded.update({i: self._vocab.decode(ids) for i, ids in numbered})
      if missing := [i for i, _ in examples if i not in decoded]:
        raise Failure(f'task {task!r}: {len(missing)} of {len(examples)} examples have no '
                      f'prediction, first {missing[0]}')
      return numbered

    with _without_warnings():
      # seqio computes metrics in a thread: their exceptions are raised by the future alone.
      future, _ = evaluator.evaluate(compute_metrics=True, step=step, predict_fn=predict)
      try:
        return {k: float(v) for k, v in future.result()[task].items()}
      except Exception as e:
        evaluator._metrics_future = None       # or seqio raises it again in every later evaluation
        raise Failure(f'task {task!r}: {_failed_metric(task, e)} raised {_reason(e)}') from e

  def _source(self, task, text) -> str:
    if task == own_files.NAME:
      return self._files.without_prompt(text)
    return prompts.without_prompt(task, text)


def _text(example, feature) -> str:
  return example.get(f'{feature}_pretokenized', b'').decode('utf-8', 'replace')


def _failed_metric(task: str, error: Exception) -> str:
  """'metric bleu': the metric function of the task that appears in the traceback."""
  called = set()
  for e in filter(None, (error, error.__cause__)):
    called.update(frame.name for frame in traceback.extract_tb(e.__traceback__))
  metric_fns = seqio.get_mixture_or_task(task).metric_fns
  names = list(filter(None, (getattr(fn, '__name__', '') for fn in metric_fns)))
  return 'metric ' + (' or '.join(n for n in names if n in called) or ', '.join(names))


def _reason(error: Exception) -> str:
  error = error.__cause__ or error          # seqio's own message only names the task
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
