import json
import os
import subprocess
import sys

import numpy as np
import pytest
import seqio

from t5lab.data import vocab
from t5lab.data.objectives import spans, table
from t5lab.data.sources import corpora
from t5lab.data.tasks import embedded, names, prompts, registry, seqio_tf
from t5lab.errors import DataError, UsageError
from t5lab.evaluation import metrics

pytestmark = pytest.mark.usefixtures('plain_registry')

BYTE = vocab.load('byte')
LONG = {'inputs': 4096, 'targets': 4096}


@pytest.fixture
def tiny(monkeypatch):
  """Two records per split in each corpus, small enough to write the tokens down."""
  rows = {
      'ende': [{'en': 'Hi', 'de': 'Ja'}, {'en': 'No', 'de': 'Ö'}],
      'enfr': [{'en': 'Hi', 'fr': 'Oui'}] * 2, 'enes': [{'en': 'Hi', 'es': 'Sí'}] * 2,
      'summarize': [{'document': 'A b.', 'summary': 'B'}] * 2,
      'qa': [{'id': 'q1', 'question': "Who's x?", 'context': 'a (1-2).',
              'answers': {'text': ['1-2', 'a'], 'answer_start': [3, 0]}}] * 2,
      'match': [{'document': 'A b.', 'summary': 'B', 'match': 1},
                {'document': 'C d.', 'summary': 'C', 'match': 0}],
      'g2p': [{'word': 'See', 'phonemes': 'si'}] * 2,
      'books': [{'id': 'b1', 'text': 'abcdef'}, {'id': 'b2', 'text': 'ghij'}]}
  monkeypatch.setattr(corpora, 'load', lambda name, split: rows[name])
  registry._registered = 'none'  # the sources count their records when they are created
  registry.register('byte')
  yield
  registry._registered = 'none'


def bounds(component):
  """Upper bounds of the objective's features for the first example."""
  return component.objective.sizes({'targets': len(component.examples[0]['targets'])})


def ids(text, eos=True):
  return [3 + b for b in text.encode('utf-8')] + [1] * eos


def both_ways(name, lengths=LONG, **kwargs):
  """The examples of seqio's get_dataset, and the component of open_components."""
  dataset = seqio.get_mixture_or_task(name).get_dataset(
      lengths, 'train', shuffle=False, **kwargs)
  plain = list(dataset.as_numpy_iterator())
  component, = registry.open_components(name, 'train', lengths, 'byte')
  return plain, component


@pytest.mark.parametrize('name, inputs, targets', [
    ('ha_ende', 'translate English to German: Hi', 'Ja'),
    ('ha_enfr', 'translate English to French: Hi', 'Oui'),
    ('ha_enes', 'translate English to Spanish: Hi', 'Sí'),
    ('docs_summarize', 'summarize: A b.', 'B'),
    ('g2p_en_us', 'See', 'si'),
    ('numpydoc_qa', "question: Who ' s x ? context: a ( 1 - 2 ) . ", '1 - 2'),
])
def test_supervised_tokens(tiny, name, inputs, targets):
  plain, component = both_ways(name)
  assert component.objective is None and component.name == name and component.rate == 1
  assert len(plain) == len(component.examples) == 2
  for example in (plain[0], component.examples[0]):
    assert example['inputs'].tolist() == ids(inputs)
    assert example['targets'].tolist() == ids(targets)
    assert example['inputs'].dtype == np.int32
  assert plain[0]['inputs_pretokenized'].decode() == inputs
  assert plain[0]['targets_pretokenized'].decode() == targets


def test_second_record_and_literal_ids(tiny):
  _, component = both_ways('ha_ende')
  assert component.examples[0]['targets'].tolist() == [77, 100, 1]
  assert component.examples[1]['targets'].tolist() == [198, 153, 1]
  assert component.examples[1]['inputs'].tolist()[-3:] == [81, 114, 1]


def test_seqio_trims_and_components_stay_whole(tiny):
  plain, component = both_ways('ha_ende', {'inputs': 5, 'targets': 2})
  assert plain[0]['inputs'].tolist() == ids('tran') and plain[0]['targets'].tolist() == ids('J')
  assert component.examples[0]['inputs'].tolist() == ids('translate English to German: Hi')


def test_answers_are_padded_lists_for_the_metric(tiny):
  task = seqio.TaskRegistry.get('numpydoc_qa')
  example = next(task.get_dataset(LONG, 'train', shuffle=False).as_numpy_iterator())
  assert task.postprocessor('1 - 2', example=example, is_target=True) == ['1 - 2', 'a']
  assert task.postprocessor('1 - 2', example=example, is_target=False) == '1 - 2'
  assert task.metric_fns == [metrics.squad]


def test_metric_functions_are_the_tasks_own():
  fns = {name: seqio.TaskRegistry.get(name).metric_fns for name in embedded.NAMES}
  assert fns == {
      'ha_ende': [metrics.bleu, metrics.chrf], 'ha_enfr': [metrics.bleu, metrics.chrf],
      'ha_enes': [metrics.bleu, metrics.chrf], 'docs_summarize': [metrics.rouge],
      'numpydoc_qa': [metrics.squad], 'docs_match': [],
      'g2p_en_us': [metrics.exact_match, metrics.phoneme_error_rate],
      **{f'books_{objective}': [] for objective in table.TABLE}}


def test_match_is_two_closed_texts_and_a_class(tiny):
  plain, component = both_ways('docs_match')
  for examples in (plain, component.examples):
    assert [x['inputs'].tolist() for x in examples] == [ids('B') + ids('A b.'),
                                                        ids('C') + ids('C d.')]
    assert [x['targets'].tolist() for x in examples] == [[1], [0]]
  cut, _ = both_ways('docs_match', {'inputs': 5, 'targets': 1})
  assert cut[0]['inputs'].tolist() == ids('B') + ids('A ')


def test_a_word_alone_is_in_no_mixture(tiny):
  assert 'g2p_en_us' in embedded.SUPERVISED and 'g2p_en_us' not in embedded.MIXED
  assert prompts.prompt('g2p_en_us', 'See') == prompts.prompt('g2p_en_us', {'word': 'See'}) == 'See'
  assert prompts.without_prompt('g2p_en_us', 'See') == 'See'


def test_prefix_and_end_of_another_vocabulary(tmp_path):
  """BERT's frame: [CLS] summary [SEP] document [SEP]; targets are framed too."""
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz',
           *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz')]
  (tmp_path / 'vocab.txt').write_text('\n'.join(words) + '\n')
  spec = str(tmp_path / 'vocab.txt')
  v = vocab.load(spec)
  inputs, targets = (seqio_tf.SeqioVocabulary(spec, f) for f in ('inputs', 'targets'))
  assert (inputs.eos_id, inputs.unk_id, inputs.pad_id, inputs.bos_id) == (3, 1, 0, None)
  assert inputs.encode('ab') == [2, 5, 32] == inputs.encode_tf('ab').numpy().tolist()
  assert targets.encode('ab') == [2, 5, 32] and inputs == targets
  plain = seqio_tf.SeqioVocabulary(spec)
  assert plain.encode('ab') == [5, 32] and inputs != plain
  match, = registry.open_components('docs_match', 'validation', {'inputs': 64, 'targets': 1}, spec)
  row = corpora.load('match', 'validation')[0]
  assert match.examples[0]['inputs'].tolist() == v.frame(row['summary'], row['document'])
  pairs, = registry.open_components('ha_ende', 'validation', LONG, spec)
  example = pairs.examples[0]
  assert example['inputs'][0] == example['targets'][0] == 2
  assert example['inputs'][-1] == example['targets'][-1] == 3
  with pytest.raises(UsageError, match='books_span_corruption. needs sentinels'):
    registry.open_components('books_span_corruption', 'train', {'inputs': 64, 'targets': 64}, spec)


def test_two_tables_of_characters(tmp_path):
  (tmp_path / 'characters.json').write_text(json.dumps(
      {'inputs': '____abc', 'targets': '____ABCD', 'pad_id': 0, 'bos_id': 1, 'eos_id': 2,
       'unk_id': 3}))
  spec = str(tmp_path / 'characters.json')
  inputs, targets = (seqio_tf.SeqioVocabulary(spec, f) for f in ('inputs', 'targets'))
  assert inputs.encode('ab') == [1, 4, 5] and targets.encode('AB') == [1, 4, 5]
  assert targets.decode([4, 7, 2, 4]) == 'AD'


def test_lm_joins_documents_with_eos_and_cuts(tiny):
  plain, component = both_ways('books_lm', {'targets': 5})
  expected = [ids('abcde', eos=False), ids('f') + ids('ghi', eos=False), ids('j')]
  assert [x['targets'].tolist() for x in plain] == expected
  assert [x['targets'].tolist() for x in component.examples] == expected
  assert component.objective is None


def test_prefix_lm_segments_and_cuts(tiny):
  lengths = {'inputs': 4, 'targets': 6}
  plain, component = both_ways('books_prefix_lm', lengths, seed=3)
  segments = ['abcd', 'efgh', 'ij']
  assert [x['targets'].tolist() for x in component.examples] == [ids(s, False) for s in segments]
  drawn = [component.objective.apply(x, np.random.default_rng(0)) for x in component.examples]
  for segment, *both in zip(segments, plain, drawn):
    for x in both:
      assert x['inputs'][-1] == x['targets'][-1] == 1
      assert x['inputs'][:-1].tolist() + x['targets'][:-1].tolist() == ids(segment, False)
  assert bounds(component) == {'inputs': 4, 'targets': 4}


def test_span_corruption_tokens(tiny):
  """10 bytes: 2 are noise in one span, so always the last two; the vocabulary has 359 ids."""
  plain, component = both_ways('books_span_corruption', {'inputs': 10, 'targets': 4}, seed=0)
  assert component.examples[0]['targets'].tolist() == ids('abcdefghij', eos=False)
  assert bounds(component) == {'inputs': 10, 'targets': 4}
  drawn = component.objective.apply(component.examples[0], np.random.default_rng(0))
  for example in (plain[0], drawn):
    assert example['inputs'].tolist() == ids('abcdefgh', eos=False) + [358, 1]
    assert example['targets'].tolist() == [358] + ids('ij')


def test_last_segment_of_one_token_is_dropped(tiny):
  """Nine of the ten tokens make a segment; the tenth alone has nothing to cut or corrupt."""
  component, = registry.open_components('books_prefix_lm', 'train', {'inputs': 9, 'targets': 9},
                                     'byte')
  assert [len(x['targets']) for x in component.examples] == [9]


def test_stochastic_task_in_plain_seqio_follows_the_seed():
  lengths = {'inputs': 256, 'targets': 64}
  def first(seed):
    dataset = seqio.get_mixture_or_task('books_span_corruption').get_dataset(
        lengths, 'validation', shuffle=False, seed=seed)
    return [x['inputs'].tolist() for x in dataset.take(3).as_numpy_iterator()]
  inputs = first(1)
  assert inputs == first(1) != first(2)
  assert len({x.index(vocab.load().sentinel(0)) for x in inputs}) > 1  # one seed per example


def test_real_text_fills_t5s_lengths():
  component, = registry.open_components('books_span_corruption', 'validation',
                                     {'inputs': 512, 'targets': 114})
  lengths = [len(x['targets']) for x in component.examples]
  assert set(lengths[:-1]) == {568} and lengths[-1] <= 568
  tokens = [i for row in corpora.load('books', 'validation')
            for i in vocab.load().encode(row['text'])]
  assert np.concatenate([x['targets'] for x in component.examples]).tolist() == tokens
  assert bounds(component) == {'inputs': 512, 'targets': 114}


def test_objective_has_a_stable_name_for_the_fingerprint(tiny):
  _, component = both_ways('books_span_corruption', {'inputs': 10, 'targets': 4})
  assert repr(component.objective) == 'span_corruption(eos=1, sentinel=358)'


@pytest.mark.parametrize('lengths, message', [
    ({'inputs': 512, 'targets': 113}, 'makes targets of 114 tokens, the limit is 113'),
    ({'inputs': 512}, "needs a length for 'targets', got {'inputs': 512}"),
    ({'inputs': 512, 'targets': 0}, "needs a length for 'targets', got {'inputs': 512}"),
    ({'inputs': 2, 'targets': 9}, 'the minimum is 3 and 3'),
    ({'inputs': 2048, 'targets': 2048}, 'makes 114 spans, the vocabulary has 100 sentinels'),
])
def test_span_corruption_lengths_that_cannot_be(lengths, message):
  with pytest.raises(UsageError, match=message):
    registry.open_components('books_span_corruption', 'train', lengths)


def test_span_corruption_segments_always_fit():
  for inputs in range(3, 300):
    targets = max(3, spans.span_corruption_lengths(inputs)[1])
    tokens = spans.span_corruption_segment(
        'books_span_corruption', {'inputs': inputs, 'targets': targets}, 100)
    sizes = [spans.span_corruption_sizes(length) for length in range(2, tokens + 1)]
    assert max(x['inputs'] for x in sizes) <= inputs
    assert max(x['targets'] for x in sizes) <= targets


def test_mixture_rates_are_train_examples():
  mixture = registry.open_components('embedded_supervised', 'validation', LONG, 'byte')
  assert {c.name: (c.rate, len(c.examples)) for c in mixture} == {
      'docs_summarize': (6174, 218), 'ha_ende': (8901, 272), 'ha_enes': (8880, 274),
      'ha_enfr': (3692, 126), 'numpydoc_qa': (8215, 300)}


def test_register_moves_names_and_every_mixture_to_a_vocabulary():
  registry.register('t5lab_2048')
  seqio.MixtureRegistry.add('users_mix', [('ha_ende', 3.), ('ha_enfr', 1.)])
  try:
    before = seqio.TaskRegistry.get('ha_ende')
    registry.register('t5lab_2048')
    assert seqio.TaskRegistry.get('ha_ende') is before
    registry.register('byte')
    for name in ('ha_ende', 'embedded_supervised', 'users_mix'):
      task = seqio.get_mixture_or_task(name)
      assert task.output_features['inputs'].vocabulary.vocab_size == 359
    opened = registry.open_components('users_mix', 'validation', LONG, 't5lab_2048')
    assert [(c.name, c.rate) for c in opened] == [('ha_ende', 3.), ('ha_enfr', 1.)]
    v = vocab.load('t5lab_2048')
    row = corpora.load('ende', 'validation')[0]
    assert opened[0].examples[0]['targets'].tolist() == v.encode(row['de']) + [1]
  finally:
    seqio.MixtureRegistry.remove('users_mix')


@pytest.mark.parametrize('spec', ['byte', 't5lab_2048'])
def test_seqio_vocabulary_has_the_same_ids(spec):
  v, s = vocab.load(spec), seqio_tf.SeqioVocabulary(spec)
  text = 'a\n \u2581é <extra_id_3>'
  assert (s.vocab_size, s.pad_id, s.eos_id, s.unk_id) == (v.size, 0, 1, 2)
  assert s.encode(text) == s.encode_tf(text).numpy().tolist() == v.encode(text)
  assert s.encode_tf('').numpy().tolist() == []
  tokens = v.encode(text)
  assert s.decode(tokens + [1, 70]) == text
  assert s.decode_tf(np.array(tokens)).numpy().decode() == text
  assert [t.decode() for t in s.decode_tf(np.array([tokens, tokens])).numpy()] == [text, text]
  assert s == seqio_tf.SeqioVocabulary(spec) != seqio_tf.SeqioVocabulary('t5lab_8192')


# --- tasks of the user ---------------------------------------------------------------------------


def _user_task(name, preprocessors=(), source=None, vocabulary=None):
  import tensorflow as tf
  features = {f: seqio.Feature(vocabulary or seqio_tf.SeqioVocabulary('byte'), add_eos=True)
              for f in ('inputs', 'targets')}
  source = source or seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
          {'inputs': ['ab', 'c'] if split == 'train' else tf.constant([], tf.string),
           'targets': ['d', 'ef'] if split == 'train' else tf.constant([], tf.string)}),
      splits=['train', 'empty'])
  return seqio.TaskRegistry.add(name, source=source, preprocessors=[
      seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim, *preprocessors], output_features=features)


@pytest.fixture
def user_task():
  added = []
  def add(*args, **kwargs):
    added.append('users_task')
    return _user_task('users_task', *args, **kwargs)
  yield add
  for name in added:
    seqio.TaskRegistry.remove(name)


def test_a_users_task_opens_whole(user_task):
  user_task()
  component, = registry.open_components('users_task', 'train', {'inputs': 2, 'targets': 2}, 'byte')
  assert [{k: v.tolist() for k, v in x.items()} for x in component.examples] == [
      {'inputs': ids('ab'), 'targets': ids('d')}, {'inputs': ids('c'), 'targets': ids('ef')}]


def test_an_empty_split(user_task):
  user_task()
  with pytest.raises(DataError, match="task 'users_task' has no examples in split 'empty'"):
    registry.open_components('users_task', 'empty', LONG, 'byte')


@pytest.mark.parametrize('wrong', [BYTE.size, -1])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(user_task, wrong):
  import tensorflow as tf
  spoil = lambda dataset: dataset.map(lambda row: {
      **row, 'targets': tf.where(row['targets'] == 3 + ord('f'), wrong, row['targets'])})
  user_task([spoil])
  with pytest.raises(DataError, match=f"'users_task', example 1: targets holds the id {wrong}; the "
                                      f'ids of its vocabulary are 0 to {BYTE.size - 1}'):
    registry.open_components('users_task', 'train', LONG, 'byte')


def test_a_task_with_a_larger_vocabulary(user_task):
  user_task(vocabulary=seqio_tf.SeqioVocabulary('t5lab_2048'))
  with pytest.raises(UsageError, match="own vocabulary of 2048 ids .* data.vocab='byte' has 359"):
    registry.open_components('users_task', 'train', LONG, 'byte')


def test_an_objective_that_is_not_last(user_task):
  objective = seqio_tf.NumpyObjective(spans.prefix_lm, spans.prefix_lm_sizes, eos=1)
  user_task(preprocessors=[objective, seqio.preprocessors.append_eos])
  with pytest.raises(UsageError, match='NumpyObjective must be the last preprocessor'):
    registry.open_components('users_task', 'train', LONG, 'byte')


@pytest.mark.parametrize('splits', [None, {'train': 'train[:9]', 'validation': 'validation'}])
def test_missing_tfds_data(user_task, splits, monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  user_task(source=seqio.TfdsDataSource('wmt14_translate/de-en:1.0.0', splits=splits))
  with pytest.raises(DataError, match=r'data of wmt14_translate/de-en:1.0.0 is not on this machine'
                                      r'.*tfds build wmt14_translate/de-en.*TFDS_DATA_DIR=DIR'):
    registry.open_components('users_task', 'train', LONG, 'byte')


def test_the_tables_name_everything_that_is_registered():
  for name in names.NAMES:
    provider = seqio.get_mixture_or_task(name)
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    from_corpora = all(type(task.source) is seqio.FunctionDataSource for task in tasks)
    assert from_corpora == (name in names.EMBEDDED), name
    if name in names.OBJECTIVE_OF:
      objective = registry.objective_of(provider)
      function = {'lm': None, 'document_lm': None, 'mlm': '_mask_alone', 'bert': 'mlm',
                  'fill_in_the_middle': 'fim'}
      expected = function.get(names.OBJECTIVE_OF[name], names.OBJECTIVE_OF[name])
      assert (objective and repr(objective).split('(')[0]) == expected, name
  ours = {name for name in [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
          if not name.startswith('users_')}
  assert ours == set(names.NAMES)
  assert len(names.NAMES) == 210 and list(names.NAMES) == sorted(names.NAMES)
  assert names.METRICS == ('bleu', 'chrf', 'squad', 'trivia_qa', 'rouge', 'exact_match')


def test_unknown_names():
  with pytest.raises(UsageError, match="no task or mixture 'ha_endee'. Did you mean 'ha_ende'"):
    registry.open_components('ha_endee', 'train', LONG)
  for name in ('ha_ende', 'embedded_supervised'):
    with pytest.raises(DataError, match=f"'{name}' has no split 'test'. Known: train, validation"):
      registry.open_components(name, 'test', LONG)
  with pytest.raises(UsageError, match="no vocabulary 'bytes'"):
    registry.open_components('ha_ende', 'train', LONG, 'bytes')


# --- prompts -------------------------------------------------------------------------------------


def test_pad_punctuation_of_the_reference_example():
  question = prompts.pad_punctuation("Who's the U.S. president (1961)?")
  context = prompts.pad_punctuation('John F. Kennedy, "JFK", 1961-63.')
  assert question == "Who ' s the U . S . president ( 1961 ) ? "
  assert context == 'John F . Kennedy , " JFK " , 1961 - 63 . '
  assert prompts.prompt('numpydoc_qa', {'question': "Who's the U.S. president (1961)?",
                                        'context': 'John F. Kennedy, "JFK", 1961-63.'}) == (
      "question: Who ' s the U . S . president ( 1961 ) ? context: "
      'John F . Kennedy , " JFK " , 1961 - 63 . ')


def test_prompt_of_bare_text_and_of_rows():
  assert prompts.prompt('ha_ende', 'Hi {x}') == 'translate English to German: Hi {x}'
  assert prompts.prompt('ha_ende', {'en': 'Hi', 'id': 3}) == 'translate English to German: Hi'
  assert prompts.fields('numpydoc_qa') == ['question', 'context']


def test_source_undoes_a_one_field_prompt():
  assert prompts.without_prompt('ha_ende', 'translate English to German: Hi') == 'Hi'
  assert prompts.without_prompt('numpydoc_qa', 'question: a context: b') == 'question: a context: b'
  assert prompts.without_prompt('users_task', 'a: b') == 'a: b'


@pytest.mark.parametrize('task, row, message', [
    ('numpydoc_qa', 'text', 'needs the fields question, context'),
    ('numpydoc_qa', {'question': 'q'}, 'missing: context; the record has: question'),
    ('ha_ende', {}, 'missing: en; the record has: none'),
    ('ha_ende', {'en': 3}, 'missing: en'),
    ('ha_de', 'x', "task 'ha_de' has no prompt. Did you mean 'ha_ende'"),
])
def test_prompt_errors(task, row, message):
  with pytest.raises(UsageError, match=message):
    prompts.prompt(task, row)


def test_text_modules_do_not_import_tensorflow():
  code = ('import sys; from t5lab.data import vocab; '
          'from t5lab.data.tasks import names, own_files, prompts; '
          'from t5lab.data.sources import corpora; '
          'slow = {"tensorflow", "seqio", "jax", "sacrebleu", "rouge_score", "nltk", "pyarrow"}; '
          'sys.exit(bool(slow & set(sys.modules)))')
  assert subprocess.run([sys.executable, '-c', code], env=os.environ).returncode == 0
