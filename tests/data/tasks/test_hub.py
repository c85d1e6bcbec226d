import pyarrow as pa
import pyarrow.parquet
import pytest

from t5lab.data.tasks import cache_build, registry
from t5lab.errors import DataError


@pytest.fixture(autouse=True)
def _registry(monkeypatch, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  registry._registered = 'none'        # sources look there when they are created
  yield
  monkeypatch.undo()
  registry._registered = 'none'
  registry.register()


def test_missing_files_name_the_command(tmp_path):
  with pytest.raises(DataError) as e:
    registry.open_components('wikitext_103_lm', 'train', {'targets': 8}, 'byte')
  assert (f'run `hf download Salesforce/wikitext --repo-type dataset --local-dir {tmp_path}/'
          'Salesforce--wikitext`') in str(e.value)


def test_lines_are_closed_and_joined(tmp_path):
  where = tmp_path / 'Salesforce--wikitext' / 'wikitext-2-raw-v1'
  where.mkdir(parents=True)
  for split, texts in (('train', ['', ' = A = \n', '', 'b']), ('validation', ['c'])):
    pa.parquet.write_table(pa.table({'text': texts}), where / f'{split}-00000-of-00001.parquet')
  component, = registry.open_components('wikitext_2_lm', 'train', {'targets': 7}, 'byte')
  ids = [3 + b for b in b' = A = \n'] + [1, 3 + ord('b'), 1]
  assert [e['targets'].tolist() for e in component.examples] == [ids[:7], ids[7:]]
  assert component.note == ''
  job = cache_build.CacheJob('wikitext_2_lm', 'train', {'targets': 7}, 'byte')
  assert cache_build.build(job, str(tmp_path / 'c'), shards=1, processes=1)['rows'] == 2
  cached, = registry.open_components('wikitext_2_lm', 'train', {'targets': 7}, 'byte',
                                  cached=str(tmp_path / 'c'))
  assert [e['targets'].tolist() for e in cached.examples] == [ids[:7], ids[7:]]
