"""Mixing rates by hand, and the mixtures that T5 trained on. [Raffel et al. 2020, 3.5.2 and 3.7]"""
import pytest

from t5lab.data.tasks import paper_mixtures, registry
from t5lab.data.tasks.seqio_tf import seqio
from t5lab.errors import DataError

pytestmark = pytest.mark.usefixtures('on_bytes', 'no_tfds_data')

OWN = {  # tasks whose rate is a count of their rows, and how many they have here
    'cnn_dailymail_v002': 287_113, 'squad_v010_allanswers': 87_599, 'wmt16_enro_v003': 610_320,
    'wmt_t2t_ende_v003': 4_592_289, 'wmt15_enfr_v003': 40_853_298}


def rates(name):
  mixture = seqio.MixtureRegistry.get(name)
  return {task.name: mixture.get_rate(task) for task in mixture.tasks}


@pytest.fixture
def counted(monkeypatch):
  for name, rows in OWN.items():
    monkeypatch.setattr(seqio.TaskRegistry.get(name), '_source', seqio.FunctionDataSource(
        lambda split, shuffle_files: None, ['train'], num_input_examples={'train': rows}))


@pytest.mark.parametrize('examples, limit, temperature, expected', [
    (800, None, 1, 800.), (800, 200, 1, 200.), (50, 200, 1, 50.),
    (900, None, 2, 30.), (900, 400, 2, 20.), (512, None, 3, 8.), (5, None, float('inf'), 1.),
    (0, 200, 2, 0.)])
def test_rates_by_hand(examples, limit, temperature, expected):
  assert paper_mixtures.rate(examples, limit, temperature) == pytest.approx(expected, rel=1e-12)


def test_temperature_of_the_normalised_rates():
  """The paper raises normalised rates to 1 / T and normalises again: the same shares."""
  sizes, limit, temperature = (100, 900, 5000), 1600, 2.
  paper = [(min(n, limit) / 2600) ** (1 / temperature) for n in sizes]
  ours = [paper_mixtures.rate(n, limit, temperature) for n in sizes]
  assert [x / sum(ours) for x in ours] == pytest.approx([x / sum(paper) for x in paper])
  assert [x / sum(ours) for x in ours] == pytest.approx([1 / 8, 3 / 8, 4 / 8])


def test_rates_of_rows(counted):
  task = seqio.TaskRegistry.get('squad_v010_allanswers')
  assert paper_mixtures.by_examples()(task) == 87_599
  assert paper_mixtures.by_examples(limit=40_000)(task) == 40_000
  assert paper_mixtures.by_examples(limit=40_000, temperature=2)(task) == pytest.approx(200)


def test_glue_and_super_glue():
  assert rates('glue_v002_proportional') == {
      'glue_cola_v002': 8551, 'glue_sst2_v002': 67349, 'glue_mrpc_v002': 3668,
      'glue_qqp_v002': 363849, 'glue_stsb_v002': 5749, 'glue_mnli_v002': 392702,
      'glue_qnli_v002': 104743, 'glue_rte_v002': 2490, 'glue_mnli_mismatched_v002': 0,
      'glue_mnli_matched_v002': 0, 'glue_ax_v002': 0}
  assert rates('super_glue_v102_proportional') == {
      'dpr_v001_simple': 1322, 'super_glue_wsc_v102_simple_train': 259,
      'super_glue_wsc_v102_simple_eval': 0, 'super_glue_boolq_v102': 9427,
      'super_glue_cb_v102': 250, 'super_glue_copa_v102': 400, 'super_glue_multirc_v102': 27243,
      'super_glue_record_v102': 138854, 'super_glue_rte_v102': 2490, 'super_glue_wic_v102': 5428,
      'super_glue_axb_v102': 0, 'super_glue_axg_v102': 0}


@pytest.mark.parametrize('size, virtual', [
    ('small', 710e3), ('base', 2.62e6), ('large', 8.66e6), ('3b', 33.5e6), ('11b', 133e6)])
def test_t5s_multitask_mixture(counted, size, virtual):
  task_rates = rates(f't5_multitask_{size}')
  assert task_rates['c4_v220_span_corruption'] == virtual
  assert {name: task_rates[name] for name in OWN} == {
      'cnn_dailymail_v002': 287_113, 'squad_v010_allanswers': 87_599, 'wmt16_enro_v003': 610_320,
      'wmt_t2t_ende_v003': 1_000_000, 'wmt15_enfr_v003': 1_000_000}
  assert task_rates['glue_rte_v002'] == task_rates['super_glue_rte_v102'] == 1245
  assert task_rates['glue_mnli_v002'] == 392_702 and task_rates['super_glue_record_v102'] == 138_854
  assert len(task_rates) == 11 + 12 + 1 + 5


def test_mc4_has_mt5s_temperature(monkeypatch):
  monkeypatch.setattr(seqio.TaskRegistry.get('mc4.de'), '_source', seqio.FunctionDataSource(
      lambda split, shuffle_files: None, ['train'], num_input_examples={'train': 10 ** 10}))
  mixture = seqio.MixtureRegistry.get('mc4')
  assert mixture.get_rate(seqio.TaskRegistry.get('mc4.de')) == pytest.approx(1000.)
  assert len(mixture.tasks) == 107


@pytest.mark.parametrize('name, task', [
    ('closed_book_qa', 'web_questions_open'), ('mc4', 'mc4.cy'),
    ('t5_multitask_small', 'wmt16_enro_v003')])
def test_a_rate_of_data_that_is_not_here(name, task):
  mixture = seqio.MixtureRegistry.get(name)
  with pytest.raises(DataError, match=f"'{task}': the data of .* run `tfds build"):
    mixture.get_rate(seqio.TaskRegistry.get(task))


def test_mixtures_move_to_another_vocabulary():
  """A seqio Mixture holds the Task objects that it was made with."""
  registry.register('t5lab_2048')
  try:
    for name in paper_mixtures.MIXTURES:
      features = seqio.MixtureRegistry.get(name).output_features
      assert features['targets'].vocabulary.vocab_size == 2048, name
  finally:
    registry.register('byte')
