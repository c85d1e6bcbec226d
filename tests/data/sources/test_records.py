import datetime
import gzip
import json
import os
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_files import ALL_BAD, arrow_stream, put, read, saved, table

from t5lab.data.sources import records
from t5lab.errors import DataError, UsageError

# ---- the limit ----

def planted(path, good, bad, last=0):
  return put(path, b'{}\n' * good + b'x\n' * bad + b'{}\n' * last)


def test_the_fraction_of_bad_records_at_the_end(tmp_path):
  reader = read(planted(tmp_path / 'a.jsonl', 50, 1, 49), bad_rows=0.01)[1]
  assert (reader.good, reader.bad) == (99, 1)
  path = str(tmp_path / 'a.jsonl')
  assert reader.summary() == (f'99 records; 1 bad ones skipped, 1 %: {path}:51: not valid JSON: '
                              'Expecting value: line 1 column 1 (char 0)')
  lines = []
  with pytest.raises(DataError) as e:
    for record in records.RecordReader(planted(tmp_path / 'b.jsonl', 50, 7, 43), bad_rows=0.06):
      lines.append(record.line)
  assert len(lines) == 93            # all were yielded: the fraction is of all records
  reason = 'not valid JSON: Expecting value: line 1 column 1 (char 0)'
  path = str(tmp_path / 'b.jsonl')
  assert str(e.value) == (
      '7 of 100 records are bad, 7 %; the limit is 6 % (raise it by --config.data.bad_rows=…): '
      + '; '.join(f'{path}:{line}: {reason}' for line in range(51, 56)) + '; and 2 more')


def test_a_fraction_far_over_the_limit_ends_early(tmp_path):
  path = planted(tmp_path / 'a.jsonl', 10, 5000, 10**5)
  reader = records.RecordReader(path, bad_rows=0.5)
  with pytest.raises(DataError, match='^101 of 111 records are bad, 91 %'):
    list(reader)
  assert len(reader.problems) == 20 and reader.problems[-1][1] == 30
  reader = records.RecordReader(planted(tmp_path / 'b.jsonl', 1000, 101, 100), bad_rows=0.1)
  assert len(list(reader)) == 1100 and reader.bad == 101     # 101 of 1101 was under a tenth


def test_no_bad_record_allowed(tmp_path):
  path = planted(tmp_path / 'a.jsonl', 2, 2, 5)
  reader, pairs = records.RecordReader(path, bad_rows=0), []
  with pytest.raises(DataError, match=f'^{path}:3: not valid JSON: .*bad_rows=0.01'):
    pairs.extend(record.line for record in reader)
  assert reader.bad == 1 and reader.good == 2


def test_reading_again_counts_again(tmp_path):
  reader = records.RecordReader(planted(tmp_path / 'a.jsonl', 3, 1), **ALL_BAD)
  assert len(list(reader)) == len(list(reader)) == 3
  assert (reader.good, reader.bad, len(reader.problems)) == (3, 1, 1)


@pytest.mark.parametrize('options, message', [
    (dict(bad_rows=-0.1), 'bad_rows must be a fraction between 0 and 1, got -0.1'),
    (dict(bad_rows=5), 'bad_rows must be a fraction between 0 and 1, got 5'),
    (dict(shard=(2, 2)), 'the shard must be 0 to 1, got shard 2 of 2'),
    (dict(shard=(-1, 2)), 'the shard must be 0 to 1, got shard -1 of 2'),
    (dict(max_line=0), 'max_line must be at least 1 byte, got 0')])
def test_options_out_of_range(tmp_path, options, message):
  with pytest.raises(UsageError, match=message):
    records.RecordReader(put(tmp_path / 'a.txt', b'one\n'), **options)


# ---- shards ----

def many(folder, name):
  """Two files of 20 and 11 records of which every fifth is bad; texts are '0' to '30'."""
  def plant(path, numbers):
    texts = [f'{i}\0' if i % 5 == 4 else str(i) for i in numbers]
    if 'parquet' in name:
      pq.write_table(table(text=texts), path, row_group_size=4)
    elif 'arrow' in name:
      arrow_stream(path, table(text=texts))
    elif 'csv' in name:
      put(path, b'n,text\r\n' + b''.join(b'"\n",%s\r\n' % text.encode() for text in texts))
    elif 'tsv' in name:
      put(path, b'text\n\n' + '\n'.join(texts).encode())
    elif 'txt' in name:
      put(path, '\n\n'.join(texts).encode())
    else:
      put(path, b''.join(json.dumps({'text': text}).encode() + b'\n' for text in texts))
  if name == 'set':
    texts = [f'{i}\0' if i % 5 == 4 else str(i) for i in range(31)]
    return saved(folder / 'set', table(text=texts), 20)
  plant(folder / f'a0.{name}', range(20))
  plant(folder / f'a1.{name}', range(20, 31))
  return str(folder / f'a?.{name}')


@pytest.mark.parametrize('name', ['jsonl', 'json.gz', 'csv', 'csv.zst', 'tsv', 'txt', 'txt.gz',
                                  'parquet', 'arrow', 'set'])
def test_shards_hold_every_record_once(tmp_path, name):
  pattern = many(tmp_path, name)
  for n in (1, 2, 7):
    for k in range(n):
      pairs, reader = read(pattern, shard=(k, n), **ALL_BAD)
      assert [int(fields['text']) for _, fields in pairs] == [
          i for i in range(k, 31, n) if i % 5 != 4]
      assert reader.bad == len([i for i in range(k, 31, n) if i % 5 == 4])


def test_records_of_other_shards_are_not_parsed(tmp_path, monkeypatch):
  path = put(tmp_path / 'a.jsonl', b'{}\n' * 30)
  parsed = []
  monkeypatch.setitem(records.record_formats.TEXT, 'jsonl', lambda text: parsed.append(text) or {})
  assert len(read(path, shard=(3, 10))[0]) == len(parsed) == 3


@pytest.mark.parametrize('name, expected', [
    ('csv', [2, 8, 4]), ('tsv', [3, 6, 4]), ('parquet', [1, 4, 2]), ('set', [1, 4, 2])])
def test_lines_do_not_depend_on_the_shard(tmp_path, name, expected):
  pattern = many(tmp_path, name)
  lines = {record.fields['text']: (record.file, record.line)
           for record in records.RecordReader(pattern, **ALL_BAD)}
  assert [lines[text][1] for text in ('0', '3', '21')] == expected
  for record in records.RecordReader(pattern, shard=(1, 3), **ALL_BAD):
    assert lines[record.fields['text']] == (record.file, record.line)


# ---- names ----

def test_expand(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('b.txt', 'a.txt', 'c,d.txt', '[x].txt', 'sub/e.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    put(tmp_path / name, b'one\n')
  assert records.expand('?.txt') == ['a.txt', 'b.txt']
  assert records.expand('b.txt, a.txt,*.txt') == ['b.txt', 'a.txt', '[x].txt', 'c,d.txt']
  assert records.expand(['c,d.txt', '[x].txt']) == ['c,d.txt', '[x].txt']
  assert records.expand('**') == ['[x].txt', 'a.txt', 'b.txt', 'c,d.txt', 'sub/e.txt']
  monkeypatch.setenv('HOME', str(tmp_path))
  assert records.expand('~/sub/*') == [str(tmp_path / 'sub/e.txt')]


@pytest.mark.parametrize('pattern, error, message', [
    ('trian.txt', DataError, "no file matches 'trian.txt'. Did you mean 'train.txt'?"),
    ('train.txt,x*', DataError, "no file matches 'x*'. Known: empty, sub, train.txt."),
    ('nix/train.txt', DataError, "no file matches 'nix/train.txt'. There is no folder 'nix'."),
    ('empty/a', DataError, "no file matches 'empty/a'. The folder 'empty' is empty."),
    ('*/nix', DataError, "no file matches '*/nix'."),
    ('sub', UsageError, 'sub is a folder; name its files, e.g. sub/*.jsonl'),
    ('', UsageError, 'no file is named'), (' , ', UsageError, 'no file is named'),
    ([], UsageError, 'no file is named'),
    ('gs://b/a.txt', UsageError, 'gs://b/a.txt: reading gs:// needs another package: pip install '
     'gcsfs'),
    ('nix://b/a.txt', UsageError, 'nix://b/a.txt: Protocol not known: nix')])
def test_patterns_without_a_match(tmp_path, monkeypatch, pattern, error, message):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'gcsfs', None)          # as if it were not installed
  for name in ('train.txt', '.hidden', 'sub/e.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    put(tmp_path / name, b'one\n')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(error) as e:
    records.expand(pattern)
  assert str(e.value).startswith(message) and '.hidden' not in str(e.value)


@pytest.mark.parametrize('name', ['a.xlsx', 'a', 'a.gz', 'a.parquet.gz', 'jsonl', 'a.json.part'])
def test_unknown_formats(tmp_path, name):
  put(tmp_path / name, b'one\n')
  with pytest.raises(UsageError, match=r'records are read from \.jsonl, .*\.parquet and \.arrow'):
    records.RecordReader(str(tmp_path / name))


def test_upper_case_names(tmp_path):
  assert read(put(tmp_path / 'A.TXT', b'one\n'))[0] == [(1, {'text': 'one'})]


def test_a_fifo_and_a_file_that_was_removed(tmp_path):
  os.mkfifo(tmp_path / 'a.txt')
  with pytest.raises(DataError, match='a.txt is not a regular file'):
    read(str(tmp_path / 'a.txt'))
  reader = records.RecordReader(put(tmp_path / 'b.txt', b'one\n'))
  os.remove(tmp_path / 'b.txt')
  with pytest.raises(DataError, match='b.txt cannot be read: No such file or directory'):
    list(reader)


def test_folders_of_save_to_disk(tmp_path):
  data = table(x=['a', 'b'])
  saved(tmp_path / 'd/train', data, 1)
  saved(tmp_path / 'd/test', data, 1)
  d = tmp_path / 'd'
  (d / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(UsageError, match=f'several splits; name one: {d}/test, {d}/train$'):
    records.expand(str(d))
  assert [record.fields['x'] for record in records.RecordReader(f'{d}/t*')] == ['a', 'b', 'a', 'b']
  assert records.expand(f'{d}/train/') == [f'{d}/train/data-0000{i}-of-00002.arrow' for i in (0, 1)]
  os.remove(d / 'train/data-00001-of-00002.arrow')
  with pytest.raises(DataError, match="lacks 'data-00001-of-00002.arrow', which its state.json"):
    records.expand(f'{d}/train')
  for text, message in (('{', 'state.json is not valid JSON'), ('{}', 'names no _data_files'),
                        ('{"_indices_data_files": [1]}', 'flatten_indices')):
    (d / 'test/state.json').write_text(text)
    with pytest.raises(DataError, match=message):
      records.expand(f'{d}/test')


def test_remote_files(tmp_path):
  fs = fsspec.filesystem('memory')
  fs.store.clear()
  saved(tmp_path / 'set', table(text=['x', 'y']), 1)
  for name, data in (('d/a.txt', b'one\n'), ('d/b.txt.gz', gzip.compress(b'two\n')),
                     *((f'set/{path.name}', path.read_bytes())
                       for path in (tmp_path / 'set').iterdir())):
    fs.pipe(f'/bucket/{name}', data)
  pq.write_table(table(text=['p']), tmp_path / 'c.parquet')
  fs.pipe('/bucket/c.parquet', (tmp_path / 'c.parquet').read_bytes())
  fs.pipe('/bucket/d/c.txt.zst', pa.Codec('zstd').compress(b'three\n', asbytes=True))
  reader = records.RecordReader('memory://bucket/d/*.txt*,memory://bucket/c.parquet,memory://bucket/set')
  assert [record.fields['text'] for record in reader] == ['one', 'two', 'three', 'p', 'x', 'y']
  assert reader.files[0] == 'memory:///bucket/d/a.txt'
  with pytest.raises(DataError, match="no file matches 'memory://bucket/d/a.tx'. Did you mean 'a"):
    records.expand('memory://bucket/d/a.tx')
  fs.store.clear()


# ---- writing ----

@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst'])
def test_write_and_read_back(tmp_path, name):
  values = [{'text': 'é\n\u2028"{', 'n': 1, 'a': ['x']}, {'text': 'b', 'when': '2024-02-01'}]
  with records.write(tmp_path / name) as write:
    write(values[0])
    write(values[1] | {'when': datetime.date(2024, 2, 1)})
    assert os.listdir(tmp_path) == [f'.{name}.tmp']
  first = (tmp_path / name).read_bytes()
  assert os.listdir(tmp_path) == [name]
  assert read(str(tmp_path / name))[0] == [(1, values[0]), (2, values[1])]
  with records.write(tmp_path / name) as write:
    for fields in values:
      write(fields)
  assert (tmp_path / name).read_bytes() == first
  assert name != 'a.jsonl.gz' or first[4:8] == b'\0\0\0\0'            # no time in its header
  assert name != 'a.jsonl' or first.startswith('{"text": "é\\n\u2028\\"{", "n": 1'.encode())


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst'])
def test_failed_writing_keeps_the_old_file(tmp_path, name):
  put(tmp_path / name, b'{"text": "old"}\n')
  with pytest.raises(KeyError):
    with records.write(tmp_path / name) as write:
      write({'text': 'new'})
      raise KeyError
  with pytest.raises(DataError, match='a record cannot be written as JSON: a value is bytes'):
    with records.write(tmp_path / name) as write:
      write({'text': b'new'})
  assert os.listdir(tmp_path) == [name]
  assert read(str(tmp_path / name))[0] == [(1, {'text': 'old'})]


def test_a_full_disk(tmp_path, monkeypatch):
  def full(fd):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(DataError, match='a.jsonl cannot be written: No space left on device'):
    with records.write(tmp_path / 'a.jsonl') as write:
      write({})
  assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path):
  with pytest.raises(UsageError, match=r'records are written as \.jsonl, \.jsonl\.gz or'):
    with records.write(tmp_path / 'a.csv'):
      pass
  with pytest.raises(DataError, match='cannot be written: No such file or directory'):
    with records.write(tmp_path / 'nix/a.jsonl'):
      pass
