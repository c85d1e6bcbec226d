"""Data sets of TFDS that are not on this machine: instructions, and sizes."""
import pytest

from t5lab.data.sources import tfds
from t5lab.data.tasks.seqio_tf import seqio
from t5lab.errors import DataError


class Task:
  """The attributes of a seqio Task that tfds uses."""
  name = 'users_task'

  def __init__(self, source):
    self.source = source
    self.num_input_examples = source.num_input_examples


@pytest.fixture
def missing(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  def message(name, **options):
    with pytest.raises(DataError) as e:
      tfds.splits(Task(seqio.TfdsDataSource(name, **options)))
    assert '\n' not in str(e.value)
    return str(e.value).replace(str(tmp_path), 'HERE')
  return message


@pytest.mark.parametrize('splits', [None, ['train'], {'train': 'train[:9]'}])
def test_the_exact_command(missing, splits):
  assert missing('glue/rte:2.0.0', splits=splits) == (
      "task 'users_task': the data of glue/rte:2.0.0 is not on this machine (looked in HERE): "
      'on a machine with a network run `tfds build glue/rte:2.0.0 --data_dir DIR`, then set '
      'TFDS_DATA_DIR=DIR')


@pytest.mark.parametrize('name, note', [
    ('c4/en:3.1.0', '; it reads terabytes of Common Crawl with Apache Beam: a job for a cluster'),
    ('c4/multilingual:3.1.0', '; it reads terabytes of Common Crawl with Apache Beam'),
    ('wikipedia/20230601.en:1.0.0', '; it runs on Apache Beam: first pip install apache-beam'),
    ('xsum:1.1.0', '; first put xsum-extracts-from-downloads.tar.gz'),
    ('wmt19_translate/cs-en:1.0.0', '; first put the CzEng files'),
    ('wmt15_translate/cs-en:1.0.0', '; first put the CzEng files')])
def test_steps_beyond_the_command(missing, name, note):
  assert f'TFDS_DATA_DIR=DIR{note}' in missing(name)


@pytest.mark.parametrize('name', ['wmt19_translate/de-en:1.0.0', 'wmt14_translate/cs-en:1.0.0',
                                  'squad/v2.0:3.0.0'])
def test_no_further_steps(missing, name):
  assert missing(name).endswith('TFDS_DATA_DIR=DIR')


@pytest.mark.parametrize('name, version, folder', [
    ('c4/en:2.2.0', '3.1.0', 'c4/en/2.2.0'), ('glue/rte:1.0.0', '2.0.0', 'glue/rte/1.0.0')])
def test_a_version_that_tfds_reads_but_cannot_build(missing, name, version, folder):
  assert missing(name).endswith(
      f'(looked in HERE): this TFDS builds only version {version}, so copy the folder '
      f'{folder} from a machine where an older TFDS built it to DIR, then set TFDS_DATA_DIR=DIR')


def test_an_unknown_name(missing):
  assert missing('glue/rtee:1.0.0').startswith(
      "task 'users_task': TFDS cannot open glue/rtee:1.0.0: ")


def source(sizes):
  return seqio.FunctionDataSource(lambda split, shuffle_files: None, ['train', 'validation'],
                                  num_input_examples=sizes)


def test_sizes():
  task = Task(source({'train': 7, 'validation': 2}))
  assert tfds.splits(task) == ['train', 'validation']
  assert tfds.num_examples(task) == 7 and tfds.num_examples(task, 'validation') == 2
  assert tfds.num_examples(task, 'test') == 0


@pytest.mark.parametrize('sizes', [None, {'train': float('inf')}])
def test_an_unknown_size(sizes):
  with pytest.raises(DataError, match="'users_task': the number of examples in split 'train' is "
                                      'unknown.* give the mixture a number'):
    tfds.num_examples(Task(source(sizes)))
