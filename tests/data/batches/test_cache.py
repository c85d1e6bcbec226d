"""The cache on disk: every record once, however it was built, and no other data is ever read."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

from array_record.python import array_record_module  # ty: ignore[missing-module-member]
import numpy as np
import pytest
import tensorflow as tf

from t5lab.commands import cache as command
from t5lab.data import vocab
from t5lab.data.batches import cache, pipeline, task_rows
from t5lab.data.sources import record_formats
from t5lab.data.tasks import cache_build, identity, own_files, registry
from t5lab.data.tasks.seqio_tf import SeqioVocabulary, seqio
from t5lab.errors import DataError, UsageError
from t5lab.runs.lock import RunLock

pytestmark = pytest.mark.usefixtures('plain_registry')

LENGTHS = {'inputs': 16, 'targets': 16}
QUICKSTART = 'configs/quickstart.py'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """23 records of different lengths, each with its number."""
  path = tmp_path_factory.mktemp('records') / 'train.jsonl'
  path.write_text(''.join(json.dumps({'q': f'{i} ' + 'x' * (i % 7), 'a': f'{i}'}) + '\n'
                          for i in range(23)))
  return own_files.OwnFiles({'train': str(path)}, {'inputs': 'q', 'targets': 'a'})


def job(files, spec='byte', lengths=LENGTHS):
  return cache_build.CacheJob('files', 'train', lengths, spec, files)


def build(root, files, shards=4, **kwargs):
  return cache_build.build(job(files), str(root), shards=shards, processes=1, **kwargs)


@pytest.fixture(scope='module')
def whole(files, tmp_path_factory):
  """A finished cache of 4 shards."""
  root = tmp_path_factory.mktemp('whole')
  build(root, files)
  return root


@pytest.fixture
def built(whole, tmp_path):
  """A copy of it, with the same modification times."""
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  return tmp_path


def numbers(examples):
  return [vocab.load('byte').decode(e['targets']) for e in examples]


def open_cached(root, files, spec='byte', lengths=LENGTHS):
  return registry.open_components('files', 'train', lengths, spec, files=files, cached=str(root))


def test_every_record_once_and_unchanged(tmp_path, files):
  ticks = []
  manifest = build(tmp_path / 'c', files, tick=ticks.append)
  assert manifest['rows'] == 23 == sum(ticks)
  assert [s['rows'] for s in manifest['shards']] == [6, 6, 6, 5]
  component, = open_cached(tmp_path / 'c', files)
  assert numbers(component.examples) == [str(i) for k in range(4) for i in range(k, 23, 4)]
  plain, = registry.open_components('files', 'train', LENGTHS, 'byte', files=files)
  expected = dict(zip(numbers(plain.examples), plain.examples))
  for number, example in zip(numbers(component.examples), component.examples):
    assert example.keys() == expected[number].keys()
    for name, tokens in example.items():
      np.testing.assert_array_equal(tokens, expected[number][name])
      assert tokens.dtype == np.int32
  lengths = component.examples.lengths
  assert lengths['inputs'].tolist() == [len(e['inputs']) for e in component.examples]


def test_records_hold_empty_features():
  example = {'inputs': np.array([], np.int32), 'targets': np.array([7, -1, 2**31 - 1], np.int32)}
  back = cache._decode(cache._encode(example, ['inputs', 'targets']), ['inputs', 'targets'])
  assert back['inputs'].tolist() == [] and back['targets'].tolist() == [7, -1, 2**31 - 1]


def test_a_build_that_was_stopped_resumes_with_the_missing_shards(tmp_path, files, monkeypatch):
  written = []
  real = cache.write_shard

  def counted(where, k, *args):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(k)
    return real(where, k, *args)

  monkeypatch.setattr(cache, 'write_shard', counted)
  with pytest.raises(KeyboardInterrupt):
    build(tmp_path, files)
  where = cache.folder(str(tmp_path), 'files', 'train')
  with pytest.raises(DataError, match='a build was started and not finished.*run `t5lab cache'):
    open_cached(tmp_path, files)
  for name in ('shard-00003-of-00004.99.part', '.shard-00003-of-00004.npy.tmp'):
    (where / name).write_bytes(b'half')
  monkeypatch.setattr(cache, 'write_shard', lambda where, k, *args: (
      written.append(k), real(where, k, *args))[1])
  build(tmp_path, files)
  assert written == [0, 1, 2, 3]
  assert sorted(map(int, numbers(open_cached(tmp_path, files)[0].examples))) == list(range(23))
  assert not list(where.glob('*.part')) and not list(where.glob('.*'))
  build(tmp_path, files)                       # finished: nothing is written
  assert written == [0, 1, 2, 3]


def test_a_build_with_other_shards_starts_over(built, files):
  assert len(build(built, files, shards=2)['shards']) == 2
  where = cache.folder(str(built), 'files', 'train')
  assert sorted(p.name for p in where.glob('*.array_record')) == [
      'shard-00000-of-00002.array_record', 'shard-00001-of-00002.array_record']
  assert len(open_cached(built, files)[0].examples) == 23


def test_a_cache_of_other_data_is_refused(built, tmp_path, files):
  with pytest.raises(DataError, match='vocabulary: cached .*Rebuild it with `t5lab cache'):
    open_cached(built, files, 't5lab_2048')
  prompted = own_files.OwnFiles(files.files, files.fields, 'ask: {q}')
  with pytest.raises(DataError, match='source: cached'):
    open_cached(built, prompted)
  open_cached(built, files, lengths={'inputs': 99, 'targets': 99})   # nothing is cut to lengths
  text = own_files.OwnFiles(files.files, {'inputs': '', 'targets': 'q'}, objective='lm')
  short, long = {'targets': 4}, {'targets': 5}
  cache_build.build(job(text, lengths=short), str(tmp_path / 'text'), shards=1, processes=1)
  open_cached(tmp_path / 'text', text, lengths=short)
  with pytest.raises(DataError, match='lengths: cached targets 4, now targets 5'):
    open_cached(tmp_path / 'text', text, lengths=long)


def helper(text):
  return text


def test_a_preprocessor_is_identified_by_its_code_and_its_settings():
  def preprocessor(word):
    def preprocess(dataset):
      return dataset.map(lambda row: {**row, 'x': helper(word)})
    return preprocess
  describe = identity.describe
  assert describe(preprocessor('a')) == describe(preprocessor('a')) != describe(preprocessor('b'))
  assert describe(lambda x: x + 1) != describe(lambda x: x + 2)
  before = describe(preprocessor('a'))
  original = helper.__code__
  helper.__code__ = (lambda text: text + '!').__code__
  try:
    assert describe(preprocessor('a')) != before
  finally:
    helper.__code__ = original


def test_a_shard_that_is_gone_or_changed_is_named(built, files):
  where = cache.folder(str(built), 'files', 'train')
  shard = where / 'shard-00002-of-00004.array_record'
  whole, when = shard.read_bytes(), shard.stat().st_mtime_ns
  os.utime(shard, ns=(when + 5, when + 5))         # as after a copy: hashed, and the same
  open_cached(built, files)
  shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(DataError, match=r'shard-00002.*is not the shard that the manifest lists'):
    open_cached(built, files)
  shard.write_bytes(whole[:1000])
  with pytest.raises(DataError, match='shard-00002'):
    open_cached(built, files)
  shard.unlink()
  with pytest.raises(DataError, match='shard-00002.*is in the manifest but not on disk'):
    open_cached(built, files)
  shard.write_bytes(whole)
  lengths = shard.with_suffix('.npy')
  lengths.write_bytes(lengths.read_bytes()[:-1] + b'\x09')
  with pytest.raises(DataError, match='shard-00002'):
    open_cached(built, files)
  (where / cache.MANIFEST).write_text('{')
  with pytest.raises(DataError, match='is damaged'):
    open_cached(built, files)


def test_two_builders_of_one_folder(tmp_path, files):
  with RunLock(tmp_path / 'c'):
    with pytest.raises(UsageError, match=f'pid {os.getpid()}'):
      command.main(['--config', QUICKSTART + ':tiny', f'--config.data.cache={tmp_path / "c"}',
                    f'--config.data.files.train={files.files["train"]}',
                    f'--config.data.files.validation={files.files["train"]}',
                    '--config.data.fields.inputs=q', '--config.data.fields.targets=a'])
  assert not (tmp_path / 'c' / 'files').exists()


def test_the_command_builds_and_reports_what_was_skipped(tmp_path, files, capsys):
  train = tmp_path / 'train.jsonl'
  train.write_text(pathlib.Path(files.files['train']).read_text() + '{"q": 3, "a": "b"}\n')
  args = ['--config', QUICKSTART + ':tiny', f'--config.data.cache={tmp_path / "c"}',
          f'--config.data.files.train={train}', '--config.data.vocab=byte',
          f'--config.data.files.validation={train}', '--config.data.bad_rows=0.2',
          '--config.data.fields.inputs=q', '--config.data.fields.targets=a', '--processes=1',
          '--shards=2']
  assert command.main(args) == 0
  printed = capsys.readouterr().out
  assert 'files: 23 examples of' in printed
  assert "train.jsonl:24: field 'q' is int, not text" in printed
  with pytest.raises(UsageError, match='--config.data.cache=DIR'):
    command.main(args[:2])


def test_a_full_disk_is_one_line_and_leaves_no_shard(tmp_path):
  """A real limit on the size of files, in a process of its own."""
  code = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from t5lab.data.batches import cache
from t5lab.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
where = Path(sys.argv[1])
noise = np.random.default_rng(0).integers(0, 2**31 - 1, (400, 500), np.int32)
try:
  cache.write_shard(where, 0, 1, ({'targets': row} for row in noise), ['targets'])
except DataError as e:
  print(e)
print(sorted(path.name for path in where.iterdir()))
"""
  out = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True,
                       timeout=60)
  lines = out.stdout.splitlines()
  assert lines[0].startswith(f'cannot write the cache in {tmp_path}: ') and 'MiB free' in lines[0]
  assert 'run the same command' in lines[0] and lines[1:] == ['[]'], out.stderr


def test_records_that_were_not_written_are_noticed(tmp_path, monkeypatch):
  class Deaf(array_record_module.ArrayRecordWriter):
    def write(self, record):
      return True
  monkeypatch.setattr(array_record_module, 'ArrayRecordWriter', Deaf)
  with pytest.raises(DataError, match='0 of 1 records were written'):
    cache.write_shard(tmp_path, 0, 1, [{'targets': np.arange(3)}], ['targets'])


def test_no_more_records_are_read_than_soon_written(tmp_path, monkeypatch):
  """Only the batches that the steps of the pipeline hold are read and not yet written."""
  path, taken, written, ahead = tmp_path / 'x.jsonl', [], [], []
  path.write_text('{"q": "a", "a": "b"}\n' * 16_000)
  take = record_formats.Turns.take
  monkeypatch.setattr(record_formats.Turns, 'take',
                      lambda turns, *count: taken.append(1) or take(turns, *count))

  def tick(rows):
    written.append(rows)
    ahead.append(len(taken) - sum(written))
  own = own_files.OwnFiles({'train': str(path)}, {'inputs': 'q', 'targets': 'a'})
  build(tmp_path, own, shards=1, tick=tick)
  assert len(taken) == sum(written) == 16_000
  assert max(ahead) <= 20 * registry.EXAMPLES_PER_CALL < 10_000, ahead


@pytest.mark.slow
def test_memory_stays_bounded_on_a_larger_file(tmp_path):
  """In a process of its own, whose memory no other test has stretched."""
  row = json.dumps({'text': 'a few words ' * 40}) + '\n'
  for name, rows in (('small', 6_000), ('large', 90_000)):
    with open(tmp_path / f'{name}.jsonl', 'w') as f:
      for _ in range(rows):
        f.write(row)
  code = """
import sys
from t5lab.data.tasks import cache_build, own_files
def status(key):
  with open('/proc/self/status') as f:
    return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024
def build(name):
  files = own_files.OwnFiles({'train': f'{sys.argv[1]}/{name}.jsonl'},
                             {'inputs': '', 'targets': 'text'}, objective='document_lm')
  cache_build.build(cache_build.CacheJob('files', 'train', {'targets': 500}, 'byte', files),
                    f'{sys.argv[1]}/{name}', shards=1, processes=1)
build('small')                                         # TensorFlow's own memory
with open('/proc/self/clear_refs', 'w') as f:
  f.write('5')                                         # the peak starts from here
before = status('VmRSS')
build('large')
print(status('VmHWM') - before)
"""
  out = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True,
                       timeout=200, env={**os.environ, 'GLIBC_TUNABLES': ''})
  size = (tmp_path / 'large.jsonl').stat().st_size / 2**20
  assert float(out.stdout) < 32 < 42 < size, (out.stdout, size, out.stderr)


# -- batches from a cache -------------------------------------------------------------------------


def test_blocks_visit_every_example_once_an_epoch_in_a_new_order(built, files, monkeypatch):
  components = open_cached(built, files)
  monkeypatch.setattr(task_rows, 'BLOCK', 6)
  p = pipeline.Pipeline(components, LENGTHS, batch_size=1, seed=3)
  rows = p.rows[0]
  assert rows.blocks == 4 and rows.count == sum(rows._counts) < 23
  epochs = [[x for i in range(rows.count) for x in rows.ids(e, i)] for e in range(3)]
  assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  for b in range(4):                    # each block packs its own sizes: every row fits
    sizes = rows._sizes[b::4]
    assert all((sizes[row].sum(axis=0) <= 16).all() for row in rows._block(b).layout)
  order = [p.example_ids(step) for step in range(rows.count)]
  assert sorted(sum(order, [])) == sorted(f'files:{i}' for i in range(23))
  again = pipeline.Pipeline(open_cached(built, files), LENGTHS, batch_size=1, seed=3)
  assert again.fingerprint == p.fingerprint
  for step in (0, 7, 1_000_000):
    for name, x in p.batch(step).items():
      np.testing.assert_array_equal(x, again.batch(step)[name])


def test_a_far_step_packs_two_blocks_at_most(built, files, monkeypatch):
  monkeypatch.setattr(task_rows, 'BLOCK', 6)
  pipeline.Pipeline(open_cached(built, files), LENGTHS, batch_size=2, seed=3)
  assert list(cache.folder(str(built), 'files', 'train').glob('rows-*.npy'))
  p = pipeline.Pipeline(open_cached(built, files), LENGTHS, batch_size=2, seed=3)
  assert p.rows[0]._block.cache_info().misses == 0         # the counts are remembered
  p.batch(1_000_000)
  assert p.rows[0]._block.cache_info().misses <= 2


def test_one_block_of_a_cache_equals_memory(tmp_path, files):
  build(tmp_path, files, shards=1)
  cached = pipeline.Pipeline(open_cached(tmp_path, files), LENGTHS, batch_size=4, seed=3)
  memory = pipeline.Pipeline(
      registry.open_components('files', 'train', LENGTHS, 'byte', files=files), LENGTHS,
      batch_size=4, seed=3)
  for step in (0, 5):
    for name, x in memory.batch(step).items():
      np.testing.assert_array_equal(x, cached.batch(step)[name])


# -- seqio's own cached format ---------------------------------------------------------------------


def test_seqios_own_cache_is_read(tmp_path):
  vocabulary = SeqioVocabulary('byte')
  features = {f: seqio.Feature(vocabulary, add_eos=True) for f in ('inputs', 'targets')}
  source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: 1 / 0, ['train'])
  preprocessors = [seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
                   seqio.preprocessors.append_eos_after_trim]
  seqio.TaskRegistry.add('cached_task', source, features, preprocessors=preprocessors)
  seqio.TaskRegistry.add('plain_task', source, features, preprocessors=preprocessors[:1])
  for name in ('cached_task', 'plain_task'):
    where = tmp_path / name
    where.mkdir()
    shape = {'shape': [None], 'dtype': 'int32'}
    (where / 'info.train.json').write_text(json.dumps(
        {'num_shards': 1, 'features': {'inputs': shape, 'targets': shape},
         'seqio_version': seqio.__version__}))
    (where / 'stats.train.json').write_text('{"examples": 2}')
    with tf.io.TFRecordWriter(str(where / 'train.tfrecord-00000-of-00001')) as w:
      for i in (5, 6):
        w.write(seqio.utils.dict_to_tfexample(
            {'inputs': np.array([i, i]), 'targets': np.array([i])}).SerializeToString())
    (where / 'COMPLETED').write_text('')
  try:
    component, = registry.open_components('cached_task', 'train', LENGTHS, 'byte',
                                       cached=str(tmp_path))
    assert [{k: v.tolist() for k, v in e.items()} for e in component.examples] == [
        {'inputs': [5, 5, 1], 'targets': [5, 1]}, {'inputs': [6, 6, 1], 'targets': [6, 1]}]
    with pytest.raises(UsageError, match='has no CacheDatasetPlaceholder'):
      registry.open_components('plain_task', 'train', LENGTHS, 'byte', cached=str(tmp_path))
  finally:
    for name in ('cached_task', 'plain_task'):
      seqio.TaskRegistry.remove(name)
