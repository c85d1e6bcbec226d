"""The data that a config describes: its vocabulary, the stream that trains, the evaluation.

Imports TensorFlow where it opens data, and not before.
"""
import dataclasses

from t5lab import config as configs
from t5lab.programs import loading


@dataclasses.dataclass(frozen=True)
class Stream:
  """vocabulary: a data.vocab_base.Vocab. components: a data.tasks.Component for each task.
  batches: the data.pipeline.Pipeline over them."""
  vocabulary: object
  components: list
  batches: object


def settle_vocabulary(c) -> str:
  """The vocabulary of init.path in place of 'init'; -> data.vocab."""
  if c.data.vocab == 'init':
    c.data.vocab = loading.read_config(c.init.path).data.vocab
  return c.data.vocab


def open_stream(c, rows=None) -> Stream:
  """What `c` trains on; of each batch these rows, or all. UsageError or DataError for data that it
  cannot be.

  That the evaluation's split exists, and that a person's own files of it can be read, is found out
  here too, and not after the training.
  """
  from t5lab.data import vocab
  from t5lab.data.batches import pipeline
  from t5lab.data.tasks import registry as tasks
  shape, lengths = configs.model_config(c), c.data.lengths.to_dict()
  words = vocab.load(settle_vocabulary(c))
  vocab.check_rows(words, c.model.vocab_size, 'this config (model.vocab_size)')
  components = tasks.open_components(
      c.data.mixture, c.data.split, lengths, c.data.vocab, files=configs.files(c),
      modules=tuple(c.data.modules), cached=c.data.cache, mixing=_mixing(c))
  for task, _ in tasks.select(c.eval.mixture or c.data.mixture, c.eval.split):
    if hasattr(task.source, 'read_through'):
      task.source.read_through(c.eval.split)
  batches = pipeline.Pipeline(
      components, lengths, batch_size=c.data.batch_size, seed=c.seed, pack=c.data.pack,
      kind=shape.kind, eos=words.eos_id, start=c.model.start_id, rows=rows)
  return Stream(words, components, batches)


def open_evaluation(c):
  """The evaluation that a config describes."""
  from t5lab.data import vocab
  from t5lab.programs.evaluators import Evaluation
  vocab.check_rows(vocab.load(c.data.vocab), c.model.vocab_size, 'this config (model.vocab_size)')
  return Evaluation(
      c.eval.mixture or c.data.mixture, c.eval.split, vocab_spec=c.data.vocab,
      lengths=c.data.lengths.to_dict(), examples=c.eval.examples, batch_size=c.eval.batch_size,
      kind=configs.model_config(c).kind, start=c.model.start_id, files=configs.files(c),
      modules=tuple(c.data.modules))


def _mixing(c):
  """How several tasks are mixed; None where a Mixture has rates of its own."""
  from t5lab.data.tasks import registry as tasks
  m = c.data.mixing
  if ',' in c.data.mixture or m.temperature != 1 or m.limit:
    return tasks.Mixing(m.temperature, m.limit)
  return None
