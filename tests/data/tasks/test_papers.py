"""The papers' tasks in seqio: names, TFDS's columns, tokens of handwritten records, scores."""
import numpy as np
import pytest

from t5lab.data.tasks import paper_mixtures, papers, registry, t5_text
from t5lab.data.tasks.seqio_tf import seqio, tf
from t5lab.errors import DataError
from t5lab.evaluation import metrics
from t5lab.programs import evaluators

pytestmark = pytest.mark.usefixtures('on_bytes', 'no_tfds_data')

LONG = {'inputs': 512, 'targets': 512}


def builder(name):
  return seqio.TfdsDataSource(row_of(name).tfds).tfds_dataset.builder


def row_of(name):
  return papers.SUPERVISED.get(name) or papers.TEXT[name]


def test_names():
  assert len(papers.NAMES) == len(set(papers.NAMES)) == 181
  for name in ('glue_cola_v002', 'glue_mnli_matched_v002', 'super_glue_boolq_v102',
               'super_glue_wsc_v102_simple_train', 'squad_v010_allanswers', 'squad_v2',
               'wmt_t2t_ende_v003', 'wmt14_ende_v003', 'wmt15_enfr_v003', 'wmt16_enro_v003',
               'wmt16_roen_v003', 'wmt19_deen_v003', 'wmt19_defr_v003', 'cnn_dailymail_v002',
               'c4_v220_span_corruption', 'c4_v220_full_lm', 'mc4.zh_Latn',
               'wikipedia_20230601.en_prefix_lm', 'lm1b_lm'):
    assert name in papers.NAMES
    assert name in seqio.TaskRegistry.names()


@pytest.mark.parametrize('name, tfds', [
    ('glue_ax_v002', 'glue/ax:2.0.0'), ('super_glue_cb_v102', 'super_glue/cb:1.0.2'),
    ('super_glue_wsc_v102_simple_eval', 'super_glue/wsc.fixed:1.0.2'),
    ('wmt_t2t_ende_v003', 'wmt_t2t_translate/de-en:1.0.0'),
    ('wmt15_enfr_v003', 'wmt15_translate/fr-en:1.0.0'), ('squad_v2', 'squad/v2.0:3.0.0'),
    ('cnn_dailymail_v002', 'cnn_dailymail:3.4.0'), ('xsum', 'xsum:1.1.0'),
    ('trivia_qa_open', 'trivia_qa/unfiltered.nocontext:1.1.0'),
    ('c4_v220_iid_denoising', 'c4/en:2.2.0'), ('c4_v310_full_lm', 'c4/en:3.1.0'),
    ('mc4.de', 'c4/multilingual:3.1.0')])
def test_versions(name, tfds):
  assert seqio.TaskRegistry.get(name).source.tfds_dataset.name == tfds


def test_tfds_has_every_data_set_column_and_class():
  for name in papers.NAMES:
    info = builder(name).info
    row = row_of(name)
    assert info.full_name == row.tfds.replace(':', '/'), name
    for column in ('text',) if isinstance(row, papers.Text) else row.text.columns:
      spec = info.features
      for key in column.split('/'):
        assert key in spec, (name, column)
        spec = spec[key]


@pytest.mark.parametrize('benchmark', sorted(t5_text.LABELS))
def test_class_names_are_in_tfds_order(benchmark):
  names = [name for name in papers.SUPERVISED if name.split('_v')[0] in (
      f'glue_{benchmark}', f'super_glue_{benchmark}')]
  for name in names or pytest.fail():
    assert tuple(builder(name).info.features['label'].names) == t5_text.LABELS[benchmark]


def test_mc4_languages_are_those_of_tfds():
  import sys
  module = sys.modules[type(builder('mc4.de')).__module__]
  assert sorted(module.MC4_LANGUAGES) == sorted(papers.MC4)


@pytest.mark.parametrize('name, inputs, targets', [
    ('wmt16_enro_v003', 'translate English to Romanian: EN', 'RO'),
    ('wmt16_roen_v003', 'translate Romanian to English: RO', 'EN'),
    ('wmt19_frde_v003', 'translate French to German: FR', 'DE'),
    ('wmt_t2t_ende_v003', 'translate English to German: EN', 'DE')])
def test_directions(name, inputs, targets):
  row = {language: language.upper() for language in ('en', 'ro', 'fr', 'de')}
  assert papers.SUPERVISED[name].text.fn(row) == [{'inputs': inputs, 'targets': targets}]


def test_metric_functions():
  names = lambda task: [f.__name__ for f in seqio.TaskRegistry.get(task).metric_fns]
  assert seqio.TaskRegistry.get('squad_v010_allanswers').metric_fns == [metrics.squad]
  assert names('glue_cola_v002') == ['matthews_corrcoef']
  assert names('glue_stsb_v002') == ['pearson_corrcoef', 'spearman_corrcoef']
  assert names('glue_mrpc_v002') == names('glue_qqp_v002') == ['f1_score_with_invalid', 'accuracy']
  assert names('super_glue_cb_v102') == ['mean_3class_f1', 'accuracy']
  assert names('super_glue_multirc_v102') == ['multirc_f1_over_all_answers', 'multirc_exact_match']
  assert names('super_glue_record_v102') == ['record']
  assert names('trivia_qa_open') == ['trivia_qa'] and names('squad_v2') == ['squad_v2']
  assert names('wmt_t2t_ende_v003') == ['bleu', 'chrf'] and names('xsum') == ['rouge']
  for name in papers.NAMES:
    if names(name) == ['accuracy']:
      assert name.startswith(('glue_', 'super_glue_', 'dpr_')), name
  unscored = [n for n in papers.SUPERVISED if not names(n)]
  assert unscored == ['glue_ax_v002', 'super_glue_axb_v102', 'super_glue_axg_v102',
                      'super_glue_wsc_v102_simple_train']


def test_unlabelled_test_sets_are_not_splits():
  splits = lambda name: tuple(papers.SUPERVISED[name].splits)
  assert splits('glue_mnli_v002') == ('train', 'validation_matched', 'validation_mismatched')
  assert splits('glue_mnli_mismatched_v002') == ('validation',)
  assert splits('super_glue_wsc_v102_simple_eval') == ('validation',)
  for name, task in papers.SUPERVISED.items():
    if 'glue' in name and task.metric_fns:
      assert 'test' not in splits(name), name
  assert papers.SUPERVISED['natural_questions_open'].splits == {
      'train': 'train[:79168]', 'validation': 'train[79168:]', 'test': 'validation'}
  assert papers.SUPERVISED['trivia_qa_open'].splits['validation'] == 'train[78785:]'
  assert papers.SUPERVISED['web_questions_open'].splits == {
      'train': 'train[:3417]', 'validation': 'train[3417:]', 'test': 'test'}
  assert papers.TEXT['mc4.zh_Latn'].splits == {
      'train': 'zh-Latn', 'validation': 'zh-Latn-validation'}


@pytest.mark.parametrize('name', [*papers.NAMES, *paper_mixtures.MIXTURES])
def test_missing_data_names_a_command(name):
  """Missing data is an error, whose command can be run."""
  how = (r'copy the folder c4/en/2\.2\.0 ' if name.startswith(('c4_v220', 't5_multitask'))
         else r'run `tfds build \1 --data_dir DIR`')
  with pytest.raises(DataError, match=r"task '\S+': the data of (\S+) is not on this machine .*"
                                      + how + '.*, then set TFDS_DATA_DIR=DIR'):
    registry.open_components(name, 'validation', {'inputs': 64, 'targets': 64}, 'byte')


def test_plain_seqio_downloads_nothing(monkeypatch):
  import tensorflow_datasets as tfds
  monkeypatch.setattr(tfds, 'load', lambda *a, **k: pytest.fail('tfds.load may download'))
  with pytest.raises(AssertionError, match='could not find data'):
    seqio.get_mixture_or_task('glue_cola_v002').get_dataset(LONG, 'train')


# --- whole tasks over handwritten records, in the structure of TFDS ------------------------------


@pytest.fixture
def with_records(monkeypatch):
  def give(name, rows):
    """Gives the task these records in all of its splits."""
    task = seqio.TaskRegistry.get(name)
    spec = builder(name).info.features.get_tensor_spec()
    def dataset(split, shuffle_files, seed=None):
      full = [{**{k: _blank(s) for k, s in spec.items()}, **row} for row in rows]
      return tf.data.Dataset.from_generator(lambda: full, output_signature=spec)
    source = seqio.FunctionDataSource(dataset, ['train', 'validation'],
                                      dict.fromkeys(('train', 'validation'), len(rows)))
    monkeypatch.setattr(task, '_source', source)
    return task
  return give


def _blank(spec):
  """The value of a column that the test does not name."""
  if isinstance(spec, dict):
    return {k: _blank(s) for k, s in spec.items()}
  value = '' if spec.dtype == tf.string else 0
  return value if spec.shape.rank == 0 else np.array([], spec.dtype.as_numpy_dtype)


class Opened:
  """The task's examples of the validation split, from plain seqio."""

  def __init__(self, task):
    self.task = task
    self.examples = list(
        task.get_dataset(LONG, 'validation', shuffle=False).as_numpy_iterator())

  def text(self):
    """[(inputs, targets)]; the tokens must encode the same texts."""
    pairs = []
    for x in self.examples:
      pair = tuple(x[f'{f}_pretokenized'].decode() for f in ('inputs', 'targets'))
      assert [x[f].tolist() for f in ('inputs', 'targets')] == [
          [3 + b for b in text.encode()] + [1] for text in pair]
      pairs.append(pair)
    return pairs

  def score(self, *predictions):
    """{metric: value} of predicted texts, by the calls that seqio's evaluator makes."""
    value = self.task.postprocessor or (lambda decoded, example, is_target: decoded)
    targets = [value(x['targets_pretokenized'].decode(), example=x, is_target=True)
               for x in self.examples]
    values = [value(p, example=x, is_target=False)
              for p, x in zip(predictions, self.examples, strict=True)]
    return {k: v for fn in self.task.metric_fns for k, v in fn(targets, values).items()}


def test_classes(with_records):
  task = Opened(with_records('glue_cola_v002', [{'sentence': 'Ü', 'label': 0, 'idx': 1},
                                           {'sentence': 'ok', 'label': 1, 'idx': 2}]))
  assert task.text() == [('cola sentence: Ü', 'unacceptable'), ('cola sentence: ok', 'acceptable')]
  assert [x['idx'] for x in task.examples] == [1, 2]
  assert task.score('unacceptable', 'acceptable') == {'matthews_corrcoef': 100.}
  assert task.score('acceptable', 'unacceptable') == {'matthews_corrcoef': -100.}


def test_stsb(with_records):
  """Targets 0, 2.4, 5 and predictions -1, 3, 7: from their means -37/15, -1/15, 38/15; -4, 0, 4."""
  row = {'sentence1': 'a', 'sentence2': 'b'}
  task = Opened(with_records('glue_stsb_v002', [{**row, 'label': x} for x in (0.1, 2.5, 5.)]))
  assert [target for _, target in task.text()] == ['0.0', '2.4', '5.0']
  assert task.score('x', '3', '7.') == pytest.approx({
      'pearson_corrcoef': 100 * 4 * 75 / 15 / (2814 / 225 * 32) ** .5, 'spearman_corrcoef': 100.})


def test_multirc(with_records):
  """Question (0, 1) is wrong; F1 of True: 2 right of 2 predicted and 3 there are."""
  row = {'paragraph': 'P<br>Q', 'question': 'q'}
  task = Opened(with_records('super_glue_multirc_v102', [
      {**row, 'answer': answer, 'label': label,
       'idx': {'paragraph': paragraph, 'question': question, 'answer': 0}}
      for answer, label, paragraph, question in [
          ('a', 1, 0, 0), ('b', 0, 0, 0), ('c', 1, 0, 1), ('d', 1, 1, 0)]]))
  assert task.text()[0] == ('multirc question: q answer: a paragraph: P Q', 'True')
  assert task.score('True', 'False', 'False', 'True') == pytest.approx(
      {'f1': 80., 'exact_match': 200 / 3})


WSC = {'text': 'Ada told Bo that she won', 'span2_index': 4, 'span2_text': 'she'}


def test_wsc_in_training(with_records):
  rows = [{**WSC, 'span1_text': 'Bo', 'label': 0}] * 300 + [
      {**WSC, 'span1_text': 'Ada', 'label': 1}]
  task = Opened(with_records('super_glue_wsc_v102_simple_train', rows))  # a batch becomes empty
  assert task.text() == [('wsc: Ada told Bo that *she* won', 'Ada')]


def test_wsc_in_evaluation(with_records):
  task = Opened(with_records('super_glue_wsc_v102_simple_eval', [
      {**WSC, 'span1_text': 'Ada', 'label': 1}, {**WSC, 'span1_text': 'Bo', 'label': 0}]))
  inputs = 'wsc: Ada told Bo that *she* won'
  assert task.text() == [(inputs, 'Ada'), (inputs, 'Bo')]
  assert task.score('the Ada', 'Ada') == {'accuracy': 100.}
  assert task.score('Bo', 'Bo') == {'accuracy': 0.}


def test_a_list_of_fixed_length(with_records):
  task = Opened(with_records('dpr_v001_simple', [{
      'sentence': 'Ada told Bo she won', 'pronoun': 'she', 'candidates': ['Ada', 'Bo'],
      'label': 1}]))
  assert task.text() == [('wsc: Ada told Bo *she* won', 'Bo')]
  assert task.score('Bo') == {'accuracy': 100.}


def test_squad_with_and_without_an_answer(with_records):
  task = Opened(with_records('squad_v2', [
      {'question': 'Who?', 'context': 'b (1-2).',
       'answers': {'text': ['1-2', 'b'], 'answer_start': [3, 0]}},
      {'question': 'x', 'context': 'y', 'answers': {'text': [], 'answer_start': []}}]))
  assert task.text() == [('question: Who ? context: b ( 1 - 2 ) . ', '1 - 2'),
                         ('question: x context: y', '')]
  assert task.score('b', '') == {'em': 100., 'f1': 100.}
  assert task.score('1 2 3', 'y') == {'em': 0., 'f1': pytest.approx(40.)}


def test_closed_book(with_records):
  task = Opened(with_records('trivia_qa_open', [{'question': 'Who?', 'answer': {
      'aliases': ['Lady-L', 'Ada'], 'value': 'Ada', 'normalized_aliases': [],
      'matched_wiki_entity_name': '', 'normalized_matched_wiki_entity_name': '',
      'normalized_value': '', 'type': ''}}]))
  assert task.text() == [('trivia_qa question: Who?', 'Ada')]
  assert task.score('lady l') == {'em': 100., 'f1': 100.}


def test_more_records_than_a_batch(with_records):
  rows = [{'document': f'd{i}', 'summary': str(i)} for i in range(600)]
  task = Opened(with_records('xsum', rows))
  assert task.text() == [(f'summarize: d{i}', str(i)) for i in range(600)]


def test_an_evaluation(with_records):
  """Through the evaluator of `t5lab eval`: both answers of one query count once."""
  row = {'query': '@placeholder', 'entities': ['x', 'y', 'z'], 'passage': 'p'}
  with_records('super_glue_record_v102', [
      {**row, 'answers': ['x', 'y'], 'idx': {'passage': 0, 'query': 0}},
      {**row, 'answers': ['z'], 'idx': {'passage': 0, 'query': 1}}])
  evaluation = evaluators.Evaluation('super_glue_record_v102', 'validation', vocab_spec='byte',
                                     lengths=LONG)
  answer_y = [3 + ord('y'), 1]
  scores, predictions = evaluation.decode(lambda requests: np.array([answer_y] * len(requests)))
  assert scores == {'super_glue_record_v102': {'em': 50., 'f1': 50.}}
  inputs = 'record query: @placeholder entities: x, y, z passage: p'
  assert [(p.source, p.target) for p in predictions] == [(inputs, x) for x in 'xyz']


def test_text_with_noise(with_records):
  """10 bytes: the last two are the noise; documents are joined."""
  with_records('c4_v220_span_corruption', [{'text': 'abcde'}, {'text': 'fghij'}])
  component, = registry.open_components('c4_v220_span_corruption', 'train',
                                     {'inputs': 10, 'targets': 4}, 'byte')
  features = component.objective.apply(component.examples[0], np.random.default_rng(0))
  assert features['inputs'].tolist() == [3 + b for b in b'abcdefgh'] + [358, 1]
  assert features['targets'].tolist() == [358] + [3 + b for b in b'ij'] + [1]


def test_text_without_noise(with_records):
  with_records('c4_v220_full_lm', [{'text': 'a'}, {'text': 'bcd'}])
  component, = registry.open_components('c4_v220_full_lm', 'train', {'targets': 4}, 'byte')
  assert component.objective is None
  assert [x['targets'].tolist() for x in component.examples] == [
      [100, 1, 101, 102], [103, 1]]
