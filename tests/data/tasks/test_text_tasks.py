"""Each objective as a task: plain seqio and the pipeline return the same."""
import numpy as np
import pytest

from t5lab.data import vocab
from t5lab.data.batches import features, pipeline
from t5lab.data.objectives import table
from t5lab.data.sources import corpora
from t5lab.data.tasks import identity, registry, seqio_tf, text
from t5lab.errors import UsageError

pytestmark = pytest.mark.usefixtures('plain_registry')

BYTE = vocab.load('byte')
DOCUMENTS = ['One two. Three four! Five six? Seven.', 'Eight nine ten. Eleven.'] * 3
LENGTHS = {'inputs': 24, 'targets': 24}
KIND = {'lm': 'decoder', 'document_lm': 'decoder', 'fill_in_the_middle': 'decoder',
        'mlm': 'encoder', 'bert': 'encoder'}
FORM = {'mlm': 'mlm', 'bert': 'nsp'}


@pytest.fixture
def small(monkeypatch):
  rows = [{'id': str(i), 'text': text} for i, text in enumerate(DOCUMENTS)]
  load = corpora.load
  monkeypatch.setattr(corpora, 'load', lambda name, split: (
      rows if name == 'books' else load(name, split)))
  yield
  registry._registered = 'none'


def opened(objective, lengths=LENGTHS, spec='byte'):
  component, = registry.open_components(f'books_{objective}', 'train', lengths, spec)
  return component


@pytest.mark.parametrize('objective', table.TABLE)
def test_seqio_and_the_pipeline_make_the_same_features(objective, small):
  component = opened(objective)
  check_features(objective, component)
  check_rows(objective, component)


def check_features(objective, component):
  task = registry.get(f'books_{objective}')
  plain = list(task.get_dataset(LENGTHS, 'train', shuffle=False, seed=0).as_numpy_iterator())
  assert len(plain) == len(component.examples) > 0
  for from_seqio, stored in zip(plain, component.examples):
    drawn = stored
    if component.objective is not None:
      drawn = component.objective.apply(stored, np.random.default_rng(0))
      bounds = component.objective.sizes({k: len(v) for k, v in stored.items()})
      assert set(bounds) == set(drawn)
      assert all(len(drawn[name]) <= size for name, size in bounds.items())
    assert set(drawn) == set(task.output_features) <= set(from_seqio)
    for name, x in drawn.items():
      assert from_seqio[name].dtype == np.int32 and x.dtype == np.int32
      assert len(from_seqio[name]) <= LENGTHS.get(name, LENGTHS['inputs'])


def check_rows(objective, component):
  """A row has the features of its kind of model, and the rows of other steps differ."""
  kind = KIND.get(objective, 'encoder_decoder')
  assert kind == table.TABLE[objective].kind
  p = pipeline.Pipeline([component], LENGTHS, batch_size=2, seed=0, kind=kind)
  batch = p.batch(0)
  empty = features.build_row([], LENGTHS, kind=kind, form=FORM.get(objective, 'inputs'))
  assert {k: v.shape[1:] for k, v in batch.items()} == {k: v.shape for k, v in empty.items()}
  side = 'encoder' if kind == 'encoder' else 'decoder'
  assert batch[f'{side}_loss_weights'].sum() > 0
  again = p.batch(0)
  assert all(np.array_equal(batch[k], again[k]) for k in batch)
  assert any(not np.array_equal(batch[k], p.batch(step)[k]) for k in batch for step in range(1, 9))


def test_documents_are_kept_apart(small):
  examples = opened('document_lm', {'targets': 100}).examples
  assert [BYTE.decode(e['targets']) for e in examples] == DOCUMENTS
  assert all(e['targets'][-1] == BYTE.eos_id for e in examples)


def test_modes_of_ul2_open_the_inputs(small):
  component = opened('ul2')
  rng = np.random.default_rng(0)
  modes = {BYTE.decode(component.objective.apply(component.examples[0], rng)['inputs'])[:6]
           for _ in range(60)}
  assert modes == {'[NLU] ', '[S2S] ', '[NLG] '}


def test_pairs_are_the_same_every_time_and_half_of_them_follow():
  first, second = (registry.open_components('books_bert', 'validation', {'inputs': 256})[0].examples
                   for _ in range(2))
  assert all(np.array_equal(a[k], b[k]) for a, b in zip(first, second) for k in a)
  share = np.mean([e['next'][0] for e in first])
  assert 0.45 < share < 0.6 and len(first) > 500        # a long sentence fills a pair alone


def test_marks_are_the_vocabularys_own_or_sentinels():
  def marks(objective):
    options = registry.get(f'books_{objective}').preprocessors[-1]._options
    return {k: v for k, v in options.items() if k in ('cls', 'sep', 'mask', 'prefix', 'middle')}
  registry.register('byte')
  assert marks('mlm') == {
      'cls': None, 'sep': BYTE.eos_id, 'mask': BYTE.sentinel(0)}
  assert marks('fill_in_the_middle') == {
      'prefix': BYTE.sentinel(0), 'middle': BYTE.sentinel(2)}


def test_a_vocabulary_without_marks_is_reported_at_the_start(tmp_path):
  words = tmp_path / 'vocab.txt'
  words.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'one', '##two']))
  registry.register(str(words))
  bert = registry.get('books_bert').preprocessors[-1]._options
  assert (bert['cls'], bert['sep'], bert['mask'], bert['vocab_size']) == (2, 3, 4, 7)
  with pytest.raises(UsageError, match="'books_fill_in_the_middle' needs tokens for prefix, suff"):
    opened('fill_in_the_middle', spec=str(words))
  with pytest.raises(UsageError, match='needs sentinels'):
    opened('ul2', spec=str(words))


def test_lengths_are_needed(small):
  for objective in ('lm', 'document_lm', 'bert', 'gap_sentences'):
    task = registry.get(f'books_{objective}')
    with pytest.raises(UsageError, match='needs the feature lengths'):
      task.get_dataset(None, 'train', shuffle=False)


def test_an_unknown_objective():
  with pytest.raises(UsageError, match="no objective 'spam_corruption'; there are span_corruption"):
    text.add('x', 'byte', None, 'spam_corruption')


def test_options_reach_the_objective_and_the_identity_of_a_cache(small):
  source = registry.get('books_span_corruption').source

  def added(**options):
    """The objective, and what the cache would be identified by."""
    text.add('dense', 'byte', source, 'span_corruption', **options)
    task = registry.get('dense')
    seqio_tf.seqio.TaskRegistry.remove('dense')
    preprocessors = identity.identity(task, 'train', LENGTHS, 'byte')['preprocessors']
    return registry.objective_of(task), preprocessors

  objective, dense = added(density=0.5, mean_span=2.)
  assert objective.sizes({'targets': 20}) == {'inputs': 16, 'targets': 16}
  example = objective.apply({'targets': np.arange(5, 25)}, np.random.default_rng(0))
  assert len(example['inputs']) == len(example['targets']) == 16
  assert dense == added(density=0.5, mean_span=2.)[1] != added(density=0.5, mean_span=3.)[1]


@pytest.mark.parametrize('name, lengths, least', [
    ('books_span_corruption', {'inputs': 512, 'targets': 114}, 0.95),
    ('ha_ende', {'inputs': 64, 'targets': 64}, 0.90)])
def test_rows_are_full(name, lengths, least):
  rows, = pipeline.Pipeline(registry.open_components(name, 'train', lengths), lengths, batch_size=8,
                            seed=0).rows
  real = rows.build([(0, i) for i in range(0, rows.count, 7)])
  used = np.mean([np.mean(np.concatenate([row['encoder_segment_ids'] > 0,
                                          row['decoder_segment_ids'] > 0])) for row in real])
  assert rows.fill >= least and used >= least, (rows.fill, used)
