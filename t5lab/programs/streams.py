"""The data that a config describes: its vocabulary, the training stream, the evaluation.

TensorFlow is imported where data is opened, not before.
"""
import dataclasses

from t5lab import config
from t5lab.errors import UsageError
from t5lab.programs import loading


@dataclasses.dataclass(frozen=True)
class Stream:
  """vocabulary: a data.vocab.base.Vocab. components: a data.tasks.registry.Component for each task.
  batches: the data.batches.pipeline.Pipeline over them."""
  vocabulary: object
  components: list
  batches: object


def settle_vocabulary(c) -> str:
  """Replaces data.vocab='init' by the vocabulary of init.path, and returns data.vocab."""
  if c.data.vocab == 'init':
    c.data.vocab = loading.read_config(c.init.path).data.vocab
  return c.data.vocab


def open_stream(c, rows=None) -> Stream:
  """Opens the data that `c` trains on.

  rows: the rows of each batch that this process builds; None builds all.
  Errors: UsageError or DataError for data that cannot be used. That includes the split of the
  evaluation, so that a missing split or a bad file of it is found before training, not after it.
  """
  from t5lab.data import vocab
  from t5lab.data.batches import pipeline
  from t5lab.data.tasks import paper_mixtures, registry
  from t5lab.data.tasks.record_sources import FileSource
  vocabulary = vocab.load(settle_vocabulary(c))
  vocab.check_embedding_size(vocabulary, c.model.vocab_size, 'this config (model.vocab_size)')
  model = config.model_config(c)
  if model.kind != 'encoder' and not 0 <= model.start_id < model.vocab_size:
    raise UsageError(f'model.start_id={model.start_id}, the first token that a decoder reads, must '
                     f'be from 0 to model.vocab_size - 1 = {model.vocab_size - 1}')

  mixing = None           # a Mixture brings its own rates
  temperature, limit = c.data.mixing.temperature, c.data.mixing.limit
  if ',' in c.data.mixture or temperature != 1 or limit:
    mixing = lambda size: paper_mixtures.rate(size, limit or None, temperature)

  lengths = c.data.lengths.to_dict()
  components = registry.open_components(
      c.data.mixture, c.data.split, lengths, c.data.vocab, files=config.files(c),
      modules=tuple(c.data.modules), cached=c.data.cache, mixing=mixing)
  for task, _ in registry.select(c.eval.mixture or c.data.mixture, c.eval.split):
    if isinstance(task.source, FileSource):
      task.source.read_through(c.eval.split)

  batches = pipeline.Pipeline(
      components, lengths, batch_size=c.data.batch_size, seed=c.seed, pack=c.data.pack,
      kind=model.kind, eos=vocabulary.eos_id, second_type=vocabulary.second_type,
      start_id=c.model.start_id, rows=rows)
  return Stream(vocabulary, components, batches)


def open_evaluation(c):
  """Opens the evaluation that a config describes, an evaluators.Evaluation."""
  from t5lab.data import vocab
  from t5lab.programs.evaluators import Evaluation
  vocab.check_embedding_size(vocab.load(c.data.vocab), c.model.vocab_size,
                             'this config (model.vocab_size)')
  return Evaluation(
      c.eval.mixture or c.data.mixture, c.eval.split, vocab_spec=c.data.vocab,
      lengths=c.data.lengths.to_dict(), examples=c.eval.examples, batch_size=c.eval.batch_size,
      kind=config.model_config(c).kind, start_id=c.model.start_id, files=config.files(c),
      modules=tuple(c.data.modules))
