"""Data of TFDS that is not on this machine: what its error says, and sizes."""
import pytest

from t5lab.data.sources import tfds as tfds_data
from t5lab.data.tasks.seqio_tf import seqio
from t5lab.errors import DataError


class Task:
  """As much of a seqio Task as tfds_data asks for."""
  name = 'users_task'

  def __init__(self, source):
    self.source = source
    self.num_input_examples = source.num_input_examples


@pytest.fixture
def missing(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  def message(tfds, **options):
    with pytest.raises(DataError) as e:
      tfds_data.splits(Task(seqio.TfdsDataSource(tfds, **options)))
    assert '\n' not in str(e.value)
    return str(e.value).replace(str(tmp_path), 'HERE')
  return message


@pytest.mark.parametrize('splits', [None, ['train'], {'train': 'train[:9]'}])
def test_the_exact_command(missing, splits):
  assert missing('glue/rte:2.0.0', splits=splits) == (
      "task 'users_task': the data of glue/rte:2.0.0 is not on this machine (looked in HERE): "
      'on a machine with a network run `tfds build glue/rte:2.0.0 --data_dir DIR`, then set '
      'TFDS_DATA_DIR=DIR')


@pytest.mark.parametrize('tfds, note', [
    ('c4/en:3.1.0', '; it reads terabytes of Common Crawl with Apache Beam: a job for a cluster'),
    ('c4/multilingual:3.1.0', '; it reads terabytes of Common Crawl with Apache Beam'),
    ('wikipedia/20230601.en:1.0.0', '; it runs on Apache Beam: first pip install apache-beam'),
    ('xsum:1.1.0', '; first put xsum-extracts-from-downloads.tar.gz'),
    ('wmt19_translate/cs-en:1.0.0', '; first put the CzEng files'),
    ('wmt15_translate/cs-en:1.0.0', '; first put the CzEng files')])
def test_what_the_command_does_not_do(missing, tfds, note):
  assert f'TFDS_DATA_DIR=DIR{note}' in missing(tfds)


@pytest.mark.parametrize('tfds', ['wmt19_translate/de-en:1.0.0', 'wmt14_translate/cs-en:1.0.0',
                                  'squad/v2.0:3.0.0'])
def test_nothing_special(missing, tfds):
  assert missing(tfds).endswith('TFDS_DATA_DIR=DIR')


@pytest.mark.parametrize('tfds, version, folder', [
    ('c4/en:2.2.0', '3.1.0', 'c4/en/2.2.0'), ('glue/rte:1.0.0', '2.0.0', 'glue/rte/1.0.0')])
def test_a_version_that_tfds_reads_and_does_not_make(missing, tfds, version, folder):
  assert missing(tfds).endswith(
      f'(looked in HERE): this TFDS builds only version {version}, so copy the folder '
      f'{folder} from a machine where an older TFDS built it to DIR, then set TFDS_DATA_DIR=DIR')


def test_a_name_that_tfds_does_not_know(missing):
  assert missing('glue/rtee:1.0.0').startswith(
      "task 'users_task': TFDS cannot open glue/rtee:1.0.0: ")


def source(sizes):
  return seqio.FunctionDataSource(lambda split, shuffle_files: None, ['train', 'validation'],
                                  num_input_examples=sizes)


def test_sizes():
  task = Task(source({'train': 7, 'validation': 2}))
  assert tfds_data.splits(task) == ['train', 'validation']
  assert tfds_data.num_examples(task) == 7 and tfds_data.num_examples(task, 'validation') == 2
  assert tfds_data.num_examples(task, 'test') == 0


@pytest.mark.parametrize('sizes', [None, {'train': float('inf')}])
def test_a_size_that_is_not_known(sizes):
  with pytest.raises(DataError, match="'users_task': the number of examples in split 'train' is "
                                      'unknown.* give the mixture a number'):
    tfds_data.num_examples(Task(source(sizes)))
