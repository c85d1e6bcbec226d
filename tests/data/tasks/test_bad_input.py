"""Bad input through the commands: every fault is counted and reported in one line, and none of it
is trained on."""
import gzip
import json

import numpy as np
import pytest

from t5lab import cli
from t5lab.data.batches import cache, pipeline, task_rows
from t5lab.data.tasks import cache_build, own_files, registry
from t5lab.errors import DataError

pytestmark = pytest.mark.usefixtures('plain_registry')

CONFIG = 'configs/quickstart.py:tiny'
SMALL = ['--config.total_steps=2', '--config.optim.ema=0', '--config.eval.beams=1',
         '--config.eval.examples=2', '--config.checkpoint.best=', '--config.eval.max_length=2',
         '--config.data.fields.inputs=q', '--config.data.fields.targets=a']
LENGTHS = {'inputs': 32, 'targets': 32}


def call(*argv, capsys):
  capsys.readouterr()
  code = cli.main([str(a) for a in argv])
  return code, *capsys.readouterr()


def good(i):
  return json.dumps({'q': f'question {i}', 'a': f'{{{i}}}\n'}).encode()


BAD = [
    (b'{"q": "x"}', "no field 'a'"),
    (b'{"q": null, "a": "x"}', "field 'q' is null"),
    (b'{"q": "", "a": "x"}', "field 'q' is empty"),
    (b'{"q": 3, "a": "x"}', "field 'q' is int, not text"),
    (b'{"q": "x", "a": {"b": 1}}', "field 'a' is dict, not text"),
    (b'{"q": "x", "a": ["y", 2]}', "field 'a' is a list that holds int, not only text"),
    (b'["q", "a"]', 'a JSON list, not an object'),
    (b'{"q": "x", "a": ', 'not valid JSON'),
    (b'{"q": "x\\u0000", "a": "y"}', "field 'q' holds NUL at character 1"),
    (b'{"q": "\\ud800", "a": "y"}', "field 'q' holds \\ud800, half of a surrogate pair"),
    (b'{"q": "\xff", "a": "y"}', 'not UTF-8: byte 0xff'),
    (b'{"q": "' + b'x' * (10 << 20) + b'", "a": "y"}', 'bytes'),
]


@pytest.fixture
def planted(tmp_path):
  """97 good records, and the bad ones from line 4 on, every third line."""
  lines = [good(i) for i in range(97)]
  for k, (line, _) in enumerate(BAD):
    lines.insert(3 + 3 * k, line)
  path = tmp_path / 'planted.jsonl'
  path.write_bytes(b'\n'.join(lines) + b'\n')
  return path


def test_each_kind_of_bad_record_is_counted_and_named(planted):
  own = own_files.OwnFiles({'train': str(planted)}, {'inputs': 'q', 'targets': 'a'}, bad_rows=0.5)
  component, = registry.open_components('files', 'train', LENGTHS, 'byte', files=own)
  assert len(component.examples) == 97
  assert f'97 records; {len(BAD)} bad ones skipped, 11 %: {planted}:4: ' in component.note
  problems = registry.get('files').source.readers['train'].problems
  assert [line for _, line, _ in problems] == [4 + 3 * k for k in range(len(BAD))]
  for (_, _, reason), (_, expected) in zip(problems, BAD, strict=True):
    assert expected in reason
  texts = [registry.vocab.load('byte').decode(e['targets']) for e in component.examples]
  assert texts == [f'{{{i}}}\n' for i in range(97)]        # braces and newlines are text


@pytest.mark.parametrize('limit, message', [
    ('0', "planted.jsonl:4: no field 'a'. Known: q. (no bad record is allowed; --"),
    ('0.1', f'{len(BAD)} of {97 + len(BAD)} records are bad, 11 %')],
    ids=['strict', 'share'])
def test_past_the_limit_nothing_is_trained(planted, tmp_path, capsys, limit, message):
  code, out, err = call('train', '--config', CONFIG, '--workdir', tmp_path / 'run', *SMALL,
                        f'--config.data.files.train={planted}', '--config.data.bad_rows=' + limit,
                        f'--config.data.files.validation={planted}', capsys=capsys)
  assert code == 3 and err.startswith('t5lab: ') and err.count('\n') == 1 and message in err
  assert 'step 1/' not in out and not list((tmp_path / 'run').glob('checkpoints/step_*'))


@pytest.mark.parametrize('name, data, message', [
    ('x.jsonl', b'', 'x.jsonl holds no records'),
    ('x.jsonl.gz', gzip.compress(good(0) * 50, mtime=0)[:-9], 'x.jsonl.gz'),
    ('x.jsonl.gz', b'no gzip at all', 'x.jsonl.gz'),
    ('x.parquet', b'PAR1 and then nothing', 'x.parquet'),
    ('x.tsv', b'q\ta\none\ttwo\tthree\n', 'x.tsv:2: expected 2 fields, got 3'),
    ('x.csv', b'q,a\n"one,two\n', 'x.csv:2: '),
    ('x.tsv', b'question\tanswer\none\ttwo\n', 'x.tsv'),
], ids=['empty', 'cut', 'no gzip', 'no parquet', 'fields', 'quote', 'header'])
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, capsys, name, data, message):
  path = tmp_path / name
  path.write_bytes(data)
  for command in ('train', 'cache'):
    where = ['--workdir', tmp_path / 'run'] if command == 'train' else [
        f'--config.data.cache={tmp_path / "c"}', '--processes=1', '--shards=1']
    code, _, err = call(command, '--config', CONFIG, *where, *SMALL, '--config.data.bad_rows=0',
                        f'--config.data.files.train={path}',
                        f'--config.data.files.validation={path}', capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith('t5lab: ')]
    assert code == 3 and len(lines) == 1 and message in lines[0], err
  assert not list(tmp_path.rglob('MANIFEST.json')) and not list(tmp_path.rglob('*.part'))


def test_over_long_examples_are_cut_counted_and_keep_their_eos(tmp_path):
  path = tmp_path / 'long.jsonl'
  path.write_text(''.join(json.dumps({'q': 'x' * n, 'a': 'y'}) + '\n' for n in (5, 31, 32, 500)))
  own = own_files.OwnFiles({'train': str(path)}, {'inputs': 'q', 'targets': 'a'})
  components = registry.open_components('files', 'train', LENGTHS, 'byte', files=own)
  p = pipeline.Pipeline(components, LENGTHS, batch_size=1, seed=0, pack=False)
  assert p.summary()[0].endswith(
      '; 2 longer than the limit (inputs 32, targets 32) were cut, EOS kept: files:2, files:3')
  ends = [int(row['encoder_input_tokens'][np.flatnonzero(row['encoder_segment_ids'])[-1]])
          for row in (p.rows[0].row(0, i) for i in range(4))]
  assert ends == [1, 1, 1, 1]


@pytest.mark.parametrize('flag, code, message', [
    ('--config.data.mixture=ha_ened', 2, "no task or mixture 'ha_ened'. Did you mean"),
    ('--config.data.metric=bleu', 2, "unknown config key 'data.metric'. Did you mean 'metrics'"),
    ('--config.data.fields.input=q', 2, "unknown config key 'data.fields.input'. Did you mean"),
    ('--config.data.split=trian', 3, "has no split 'trian'. Did you mean 'train'"),
    ('--config.data.vocab=t5lab_2084', 2, "Did you mean 't5lab_2048'"),
    ('--config.data.mixing.temperature=0', 2,
     'data.mixing.temperature must be greater than 0, got 0.0'),
    ('--config.data.cache=nowhere', 3, 'no cache in nowhere/ha_ende/train: run `t5lab cache'),
])
def test_unknown_names_are_reported_before_data_is_read(tmp_path, capsys, flag, code, message):
  actual_code, _, err = call('train', '--config', CONFIG, '--workdir', tmp_path / 'run', flag,
                     capsys=capsys)
  assert actual_code == code and err.count('\n') == 1 and message in err


def test_repeated_and_leaked_records_are_counted_exactly(tmp_path, capsys):
  text = 'the answer, says {0}, is that\nnobody knows what {0} is {{for}} or when it will come back'
  rows = [text.format(f'w{i} x{i}') for i in range(6)]
  train = [*rows, rows[0], rows[1].upper(), '  '.join(rows[2].split(' ')), rows[3] + ' again']
  dev = [rows[4].split(',', 1)[1], 'something else entirely that no one has ever said before here']
  for name, texts in (('train', train), ('dev', dev)):
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  code, _, err = call('data', 'dedup', tmp_path / 'train.jsonl', '--output',
                      tmp_path / 'unique.jsonl', capsys=capsys)
  assert code == 0, err
  report = json.loads((tmp_path / 'unique.jsonl.report.json').read_text())
  assert report['rows'] == {'read': 10, 'unreadable': 0, 'dropped': 4, 'written': 6}
  assert {k: v['count'] for k, v in report['rules'].items()} == {'exact': 3, 'near': 1}
  code, _, err = call('data', 'decontaminate', tmp_path / 'unique.jsonl', '--against',
                      f'dev={tmp_path / "dev.jsonl"}', '--output', tmp_path / 'clean.jsonl',
                      capsys=capsys)
  assert code == 0, err
  report = json.loads((tmp_path / 'clean.jsonl.report.json').read_text())
  assert report['rows']['dropped'] == 1 and report['evaluations']['dev']['found_in_training'] == 1
  kept = [json.loads(line)['text'] for line in (tmp_path / 'clean.jsonl').read_text().splitlines()]
  assert kept == rows[:4] + rows[5:]


def test_few_examples_and_a_file_that_changes_between_save_and_resume(tmp_path, capsys):
  """Two examples are repeated to fill a batch of eight."""
  path = tmp_path / 'train.jsonl'
  path.write_bytes(good(0) + b'\n' + good(1) + b'\n')
  train = ['train', '--config', CONFIG, '--workdir', tmp_path / 'run', *SMALL,
           f'--config.data.files.train={path}', f'--config.data.files.validation={path}']
  code, out, err = call(*train, capsys=capsys)
  assert code == 0 and 'files: 2 examples in' in out and 'step 2/2' in out, err

  path.write_bytes(path.read_bytes().replace(b'question 1"', b'question 8"'))
  more = [a for a in train if a != '--config.total_steps=2'] + ['--config.total_steps=3']
  code, out, err = call(*more, capsys=capsys)
  assert code == 3 and 'the data changed since step 2 was saved' in err and 'step 3/' not in out
  code, out, _ = call(*more, '--allow-data-change', capsys=capsys)
  assert code == 0 and 'step 3/3' in out


def process_rows(batch_size, i, n):
  """The rows of process i of n."""
  return range(batch_size)[i * batch_size // n:(i + 1) * batch_size // n]


@pytest.fixture(scope='module')
def two_tasks():
  return registry.open_components('ha_ende,numpydoc_qa', 'validation',
                                  {'inputs': 64, 'targets': 64}, 'byte')


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_a_stream_resumed_at_any_step_is_the_uninterrupted_one(two_tasks, processes):
  lengths = {'inputs': 64, 'targets': 64}
  def stream(i=0, n=1):
    return pipeline.Pipeline(two_tasks, lengths, batch_size=8, seed=1,
                             rows=process_rows(8, i, n))
  whole = stream()
  epoch = sum(rows.count for rows in whole.rows) // 8
  steps = np.random.default_rng(0).integers(0, 3 * epoch, 20)
  for step in steps:
    parts = [stream(i, processes) for i in range(processes)]
    parts[0].check_position(whole.position(int(step)))
    expected = whole.batch(int(step))
    resumed = [next(p.iterate(int(step), int(step) + 1)) for p in parts[:1]] + [
        p.batch(int(step)) for p in parts[1:]]
    for name, x in expected.items():
      np.testing.assert_array_equal(np.concatenate([r[name] for r in resumed]), x)
  rows = whole.rows[0]
  for e in range(2):
    ids = [x for i in range(rows.count) for x in rows.ids(e, i)]
    assert sorted(ids) == list(range(len(rows.examples)))


def test_a_split_without_usable_records(tmp_path):
  path = tmp_path / 'empty.jsonl'
  path.write_text('{"q": "", "a": ""}\n')
  own = own_files.OwnFiles({'train': str(path)}, {'inputs': 'q', 'targets': 'a'}, bad_rows=1.)
  with pytest.raises(DataError, match="task 'files' has no examples in split 'train'.*1 bad ones"):
    registry.open_components('files', 'train', LENGTHS, 'byte', files=own)


# -- caches ----------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path, capsys):
  """build(flags) -> (exit code, out, err) of `t5lab cache` of tmp_path/'train.jsonl', 4 shards."""
  path = tmp_path / 'train.jsonl'
  return lambda *flags: call(
      'cache', '--config', CONFIG, *SMALL, f'--config.data.cache={tmp_path / "c"}', *flags,
      f'--config.data.files.train={path}', f'--config.data.files.validation={path}',
      '--config.data.vocab=byte', '--processes=1', '--shards=4', capsys=capsys)


def opened(folder):
  """Opens the cache as another process would."""
  path = str(folder / 'train.jsonl')
  own = own_files.OwnFiles({'train': path, 'validation': path}, {'inputs': 'q', 'targets': 'a'})
  registry.register()
  return registry.open_components('files', 'train', LENGTHS, 'byte', files=own,
                                  cached=str(folder / 'c'))[0]


def test_the_bad_records_of_all_shards_count_together(tmp_path, build):
  """One of a shard's 50 records is 2 %, but half a percent of all 200."""
  path, lines = tmp_path / 'train.jsonl', [good(i) for i in range(200)]
  lines[5] = lines[10] = b'{}'
  path.write_bytes(b'\n'.join(lines) + b'\n')
  code, out, err = build()
  assert code == 0 and 'files: 198 examples of' in out, err
  note = ('files, train: 198 records; 2 bad ones skipped, 1 %: '
          f"{path}:6: no field 'q'.; {path}:11: no ")
  assert note in out and opened(tmp_path).note.startswith(note)
  where = cache.folder(str(tmp_path / 'c'), 'files', 'train')
  (where / 'MANIFEST.json').unlink()                # as if killed before the manifest was written
  shards = {p.name: p.stat().st_mtime_ns for p in where.glob('shard-*')}
  assert build()[0] == 0 and opened(tmp_path).note.startswith(note)
  assert shards == {p.name: p.stat().st_mtime_ns for p in where.glob('shard-*')}
  code, _, err = build('--config.data.bad_rows=0.009')
  assert code == 3 and '2 of 200 records are bad, 1 %; the limit is 0.9 %' in err

  lines[7] = b'{}'
  path.write_bytes(b'\n'.join(lines) + b'\n')
  code, _, err = build()
  assert code == 3 and err.splitlines()[-1].startswith(
      't5lab: 3 of 200 records are bad, 1.5 %; the limit is 1 % (raise it by '
      f"--config.data.bad_rows=…): {path}:6: no field 'q'.; {path}:8: ")
  assert not (where / 'MANIFEST.json').exists()
  assert build('--config.data.bad_rows=0.02')[0] == 0 and len(opened(tmp_path).examples) == 197


def numbers(component):
  """The identities of good(i), in the order of the shards."""
  decode = registry.vocab.load('byte').decode
  return [int(decode(e['targets']).strip('{}\n')) for e in component.examples]


def test_shards_of_a_file_that_changes_during_the_build_are_not_mixed(tmp_path, build, monkeypatch):
  path, real = tmp_path / 'train.jsonl', cache.write_shard
  path.write_bytes(b'\n'.join(good(i) for i in range(10)) + b'\n')

  def stopped(where, k, *args):
    if k == 2:
      raise KeyboardInterrupt
    return real(where, k, *args)
  monkeypatch.setattr(cache, 'write_shard', stopped)
  assert build()[0] == 75
  monkeypatch.setattr(cache, 'write_shard', real)
  path.write_bytes(b'\n'.join(good(i) for i in (99, *range(10))) + b'\n')   # each in another shard
  assert build()[0] == 0
  assert sorted(numbers(opened(tmp_path))) == [*range(10), 99]

  path.write_bytes(good(1) + b'\n')
  with pytest.raises(DataError, match=f'{path} has 34 bytes; it had 376 .*: run `t5lab cache'):
    opened(tmp_path)
  assert build()[0] == 0 and numbers(opened(tmp_path)) == [1]
  path.unlink()                             # the cache was copied to another machine without it
  assert numbers(opened(tmp_path)) == [1]


@pytest.mark.parametrize('text', ['', '{"identity": ', '{"identity": {}}', '[1]', '7', 'null'])
def test_a_damaged_manifest_is_one_line(tmp_path, text):
  (tmp_path / 'MANIFEST.json').write_text(text)
  with pytest.raises(DataError, match='MANIFEST.json is damaged or of an.*: run `t5lab cache`'):
    cache.Cached(tmp_path, {}, 't5lab cache')


@pytest.mark.parametrize('wrong', [-1, 2048, 2**32 + 5, -2**32 + 5])
def test_an_id_outside_the_vocabulary_is_neither_trained_on_nor_cached(tmp_path, capsys, wrong):
  from t5lab.data.tasks.seqio_tf import SeqioVocabulary, seqio, tf
  ids = {'inputs': [[3, 4], [5, 1], [6, 1]], 'targets': [[3, 1], [4, 1], [7, wrong]]}
  task = seqio.TaskRegistry.add(
      'users_ids', seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
              {name: tf.constant(rows, tf.int64) for name, rows in ids.items()}), ['train']),
      {name: seqio.Feature(SeqioVocabulary('t5lab_2048'), dtype=tf.int64) for name in ids},
      preprocessors=[])
  try:
    for argv in (['train', '--workdir', tmp_path / 'run'],
                 ['cache', f'--config.data.cache={tmp_path / "c"}', '--processes=1']):
      code, out, err = call(*argv, '--config', CONFIG, f'--config.data.mixture={task.name}',
                            '--config.eval.split=train', capsys=capsys)
      assert code == 3 and err.count('t5lab: ') == 1 and 'step 1/' not in out
      assert f'holds the id {wrong}; the ids of its vocabulary are 0 to 2047' in err
      number = 2 if argv[0] == 'train' else 0                    # of its shard
      assert f"task 'users_ids', example {number}: targets" in err
  finally:
    seqio.TaskRegistry.remove(task.name)
  assert not list(tmp_path.rglob('*.part')) and not list(tmp_path.rglob('MANIFEST.json'))


@pytest.fixture(scope='module')
def cached_and_memory(tmp_path_factory):
  """A folder with a cache of 50 examples, and a task in memory."""
  folder = tmp_path_factory.mktemp('cached')
  path = folder / 'train.jsonl'
  path.write_bytes(b'\n'.join(good(i) for i in range(50)) + b'\n')
  own = own_files.OwnFiles({'train': str(path), 'validation': str(path)},
                           {'inputs': 'q', 'targets': 'a'})
  job = cache_build.CacheJob('files', 'train', LENGTHS, 'byte', own)
  cache_build.build(job, str(folder / 'c'), shards=3, processes=1)
  memory, = registry.open_components('ha_ende', 'validation', LENGTHS, 'byte')
  return folder, memory


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_a_cached_stream_of_several_blocks_resumes_at_any_step(
    cached_and_memory, monkeypatch, processes):
  monkeypatch.setattr(task_rows, 'BLOCK', 16)
  folder, memory = cached_and_memory

  def stream(i=0, n=1):
    return pipeline.Pipeline([opened(folder), memory], LENGTHS, batch_size=4, seed=1,
                             rows=process_rows(4, i, n))
  whole = stream()
  assert whole.rows[0].blocks == 4 and whole.rows[1].blocks == 1
  order = [whole.example_ids(step) for step in range(400)]
  parts = [stream(i, processes) for i in range(processes)]
  for step in np.random.default_rng(0).integers(0, 400, 20):
    parts[0].check_position(whole.position(int(step)))
    assert parts[-1].example_ids(int(step)) == order[step]
    resumed = [next(p.iterate(int(step), int(step) + 1)) for p in parts]
    for name, x in whole.batch(int(step)).items():
      np.testing.assert_array_equal(np.concatenate([r[name] for r in resumed]), x)
  for name, count in (('files', 50), ('ha_ende', len(memory.examples))):
    ids = [x for batch in order for x in batch if x.startswith(name)]
    for epoch in range(len(ids) // count):
      assert sorted(ids[epoch * count:(epoch + 1) * count]) == sorted(
          f'{name}:{i}' for i in range(count))
    assert len(ids) >= (2 * count if name == 'files' else 1)
