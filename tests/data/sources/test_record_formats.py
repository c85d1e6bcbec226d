import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_files import ALL_BAD, arrow_stream, put, read, saved, table

from t5lab.data.sources import records
from t5lab.errors import DataError


@pytest.mark.parametrize('packing', ['', '.gz', '.zst'])
@pytest.mark.parametrize('name, data, expected', [
    ('a.jsonl', b'{"en": "a", "n": 1}\n\n{"en": "{b}\\n\\u00e9", "de": null}',
     [(1, {'en': 'a', 'n': 1}), (3, {'en': '{b}\né', 'de': None})]),
    ('a.json', b'\xef\xbb\xbf{"en": "a"}\r\n \r\n{"en": "b\\r"}\r\n',
     [(1, {'en': 'a'}), (3, {'en': 'b\r'})]),
    ('a.csv', b'en,de\n"a, ""b""\nc",d\n\ne, f\n',
     [(2, {'en': 'a, "b"\nc', 'de': 'd'}), (5, {'en': 'e', 'de': ' f'})]),
    ('a.csv', b'\xef\xbb\xbfen,de\r\n"a\r\n\r\nb",\xc3\xa9\r\nc,d',
     [(2, {'en': 'a\n\nb', 'de': 'é'}), (5, {'en': 'c', 'de': 'd'})]),
    ('a.tsv', b'\xef\xbb\xbfen\tde\r\n"a\t{b}"\r\n\r\n\\n\tc, d\r\n',
     [(2, {'en': '"a', 'de': '{b}"'}), (4, {'en': '\\n', 'de': 'c, d'})]),
    ('a.txt', b'\xef\xbb\xbf one \r\n \n\xe2\x80\xa8two\x0cthree\n',
     [(1, {'text': ' one '}), (3, {'text': '\u2028two\x0cthree'})]),
])
def test_text_formats(tmp_path, name, data, expected, packing):
  pairs, reader = read(put(tmp_path / (name + packing), data), bad_rows=0)
  assert pairs == expected
  assert (reader.good, reader.bad, reader.summary()) == (2, 0, '2 records')


def test_packed_members_one_after_the_other(tmp_path):
  for name, pack in (('a.txt.gz', gzip.compress), ('a.txt.zst', pa.Codec('zstd').compress)):
    (tmp_path / name).write_bytes(bytes(pack(b'one\ntw')) + bytes(pack(b'o\n')))
    assert read(str(tmp_path / name))[0] == [(1, {'text': 'one'}), (2, {'text': 'two'})]


def test_parquet_and_arrow(tmp_path):
  data = table(q=['a', '{b}\n', 'c', 'é'], a=[['x'], ['y', 'z'], [], None], n=[1, 2, 3, 4])
  expected = [(1, {'q': 'a', 'a': ['x'], 'n': 1}), (2, {'q': '{b}\n', 'a': ['y', 'z'], 'n': 2}),
              (3, {'q': 'c', 'a': [], 'n': 3}), (4, {'q': 'é', 'a': None, 'n': 4})]
  pq.write_table(data, tmp_path / 'a.parquet', row_group_size=3)
  assert read(str(tmp_path / 'a.parquet'))[0] == expected
  assert read(arrow_stream(tmp_path / 'a.arrow', data))[0] == expected
  long = [str(i) for i in range(600)]
  pairs = read(arrow_stream(tmp_path / 'c.arrow', table(x=long), batch=600))[0]
  assert pairs == [(i + 1, {'x': text}) for i, text in enumerate(long)]
  with pa.ipc.new_file(tmp_path / 'b.arrow', data.schema) as out:
    out.write_table(data, max_chunksize=1)
  assert read(str(tmp_path / 'b.arrow'))[0] == expected
  folder = saved(tmp_path / 'set', data, 3)
  pairs = [(record.file[len(folder):], record.line, record.fields['q'])
           for record in records.RecordReader(folder)]
  assert pairs == [('/data-00000-of-00002.arrow', 1, 'a'), ('/data-00000-of-00002.arrow', 2,
                   '{b}\n'), ('/data-00000-of-00002.arrow', 3, 'c'),
                   ('/data-00001-of-00002.arrow', 1, 'é')]


# ---- bad records ----

@pytest.mark.parametrize('name, data, options, good, problems', [
    ('a.jsonl', b'{"x": 1}\n{"x": \n[1]\n"s"\n{"x": "a\x01"}\n{}\n' + b'[' * 100_000,
     {}, [1, 6],
     [(2, 'not valid JSON: Expecting value: line 1 column 7 (char 6)'),
      (3, 'a JSON list, not an object'), (4, 'a JSON str, not an object'),
      (5, 'not valid JSON: Invalid control character at: line 1 column 9 (char 8)'),
      (7, 'not valid JSON: nested too deeply')]),
    ('b.jsonl', b'{"x": "a\\u0000"}\n{"x": [{"y\\ud800": 1}]}\n{"x": "\\ud83d\\ude00"}\n'
     b'{"x": "\\udc00 \xc3\xa9"}\n{"x": "\xff"}\n{"x": "\xc3\xa9\xed\xa0\x80"}\n'
     b'{"x": [{"y": [1, {"z": "\\u0000"}]}]}\n{"x\\u0000": 1}\n',
     {}, [3],
     [(1, "field 'x' holds NUL at character 1"),
      (2, "field 'x' holds \\ud800, half of a surrogate pair"),
      (4, "field 'x' holds \\udc00, half of a surrogate pair"),
      (5, 'not UTF-8: byte 0xff at byte 7 of the line'),
      (6, 'not UTF-8: byte 0xed at byte 9 of the line'),
      (7, "field 'x' holds NUL at character 0"),
      (8, "field 'x\\x00' holds NUL at character 1")]),
    ('c.jsonl', b'{"text": "a"}\n{"txt": "b"}\n{}\n{"text": null}\n{"text": ""}\n{"text": " \\n"}\n'
     b'{"text": 7}\n{"text": true}\n{"text": ["a"]}\n{"text": {"a": "b"}}\n{"text": "c", "n": 1}\n',
     dict(required=['text']), [1, 11],
     [(2, "no field 'text'. Did you mean 'txt'?"), (3, "no field 'text'."),
      (4, "field 'text' is null"), (5, "field 'text' is empty"), (6, "field 'text' is empty"),
      (7, "field 'text' is int, not text"), (8, "field 'text' is bool, not text"),
      (9, "field 'text' is list, not text"), (10, "field 'text' is dict, not text")]),
    ('d.jsonl', b'{"a": ["x", "y"]}\n{"a": "x"}\n{"a": []}\n{"a": ["x", ""]}\n{"a": ["x", 3]}\n'
     b'{"a": [null]}\n{"a": 3}\n', dict(required=['a'], lists=['a']), [1, 2],
     [(3, "field 'a' is empty"), (4, "field 'a' is empty"),
      (5, "field 'a' is a list that holds int, not only text"),
      (6, "field 'a' is a list that holds NoneType, not only text"),
      (7, "field 'a' is int, not text")]),
    ('a.tsv', b'en\tde\na\tb\na\na\tb\tc\n"a\nb"\tc\nd\xff\te\nf\0\tg\n\tempty\n \t \n',
     dict(required=['en']), [2, 6],
     [(3, 'expected 2 fields, got 1'), (4, 'expected 2 fields, got 3'),
      (5, 'expected 2 fields, got 1'), (7, 'not UTF-8: byte 0xff at byte 1 of the line'),
      (8, "field 'en' holds NUL at character 1"), (9, "field 'en' is empty")]),
    ('a.csv', b'en,de\na,b\na\n"a\nb"\n"c"d,e\n"f\xff\ng",h\ni,\0\n"k\nl",m\n', {}, [2, 10],
     [(3, 'expected 2 fields, got 1'), (4, 'expected 2 fields, got 1'),
      (6, "not valid CSV: ',' expected after '\"'"),
      (7, 'not UTF-8: byte 0xff at byte 2 of the line'),
      (9, "field 'de' holds NUL at character 0")]),
    ('b.csv', b'en,de\na,b\n"c,d\ne,f\n\ng,h\n', {}, [2],
     [(3, 'unclosed quote')] + [(line, 'part of the record at line 3: unclosed quote')
                                for line in (4, 5, 6)]),
    ('c.csv', b'en,de\n"a,b\nc,"d"\ne,f\n', {}, [4],
     [(2, "not valid CSV: ',' expected after '\"'"),
      (3, "part of the record at line 2: not valid CSV: ',' expected after '\"'")]),
    ('a.txt', b'one\ntwo\0\n\xe9\nthree\n', {}, [1, 4],
     [(2, "field 'text' holds NUL at character 3"),
      (3, 'not UTF-8: byte 0xe9 at byte 0 of the line')]),
])
def test_bad_rows(tmp_path, name, data, options, good, problems):
  path = put(tmp_path / name, data)
  pairs, reader = read(path, **ALL_BAD, **options)
  assert [line for line, _ in pairs] == good
  assert reader.problems == [(path, line, reason) for line, reason in problems]
  assert (reader.good, reader.bad) == (len(good), len(problems))


def test_bad_records(tmp_path):
  text = pa.Array.from_buffers(pa.string(), 3, [
      None, pa.py_buffer(b'\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0'), pa.py_buffer(b'a\xc3\xffb')])
  data = pa.table({'x': text, 'y': pa.array([b'a', b'b', b'c']), 'z': ['p', 'q', 'r\0']})
  pq.write_table(data, tmp_path / 'a.parquet')
  arrow_stream(tmp_path / 'a.arrow', data, batch=2)
  for name in ('a.parquet', 'a.arrow'):
    path = str(tmp_path / name)
    pairs, reader = read(path, **ALL_BAD)
    assert pairs == [(1, {'x': 'a', 'y': b'a', 'z': 'p'})]
    assert reader.problems == [(path, 2, 'not UTF-8: byte 0xc3 at byte 0 of a field'),
                               (path, 3, "field 'z' holds NUL at character 1")]
    reader = records.RecordReader(path, **ALL_BAD, required=['y'])
    assert not list(reader) and reader.problems[0] == (path, 1, "field 'y' is bytes, not text")


def test_long_texts(tmp_path):
  limit = dict(max_line=9, **ALL_BAD)
  for name, head in (('a.txt', b''), ('a.tsv', b'x\n'), ('a.csv', b'x\n')):
    path = put(tmp_path / name, head + b'123456789\r\n1234567890\n123456789')
    pairs, reader = read(path, **limit)
    first = 1 + bool(head)
    assert [line for line, _ in pairs] == [first, first + 2]
    assert reader.problems == [(path, first + 1, 'the line has over 9 bytes, the limit')]
  path = put(tmp_path / 'b.txt', b'123456789\r0\n123456789\r\r\n')
  assert read(path, **limit)[1].bad == 2
  path = put(tmp_path / 'b.csv', b'x,y\n"a\n1234567890\n",b\nc,d\n')
  pairs, reader = read(path, **limit)
  assert pairs == [(5, {'x': 'c', 'y': 'd'})]
  assert reader.problems == [(path, 2, 'the line has over 9 bytes, the limit')]
  pq.write_table(table(x=['123456789', '1234567890']), tmp_path / 'a.parquet')
  path = str(tmp_path / 'a.parquet')
  assert read(path, **limit)[1].problems == [
      (path, 2, "field 'x' has 10 characters; the limit is 9")]


def test_csv_fields_over_the_modules_own_limit(tmp_path):
  path = put(tmp_path / 'a.csv', b'x,y\n' + b'a' * 140_000 + b',b\n')
  assert len(read(path)[0][0][1]['x']) == 140_000


@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv', 'a.tsv.gz', 'a.txt.zst'])
def test_memory_is_bounded(tmp_path, name):
  """Two lines of 10 MB, of which the reading never holds more than some buffers."""
  short = b'x\n' if name != 'a.jsonl' else b'{}\n'
  path = put(tmp_path / name, b'x\n' + b'y' * 10_000_000 + b'\n' + short * 2000
             + b'z' * 10_000_000)
  tracemalloc.start()
  try:
    reader = records.RecordReader(path, max_line=2**18, **ALL_BAD)
    good = sum(1 for _ in reader)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  heading = name.startswith(('a.csv', 'a.tsv'))
  assert good == 2000 + (name == 'a.txt.zst')
  assert reader.bad == 3 - heading - (name == 'a.txt.zst')
  assert peak < 5 * 2**20


@pytest.mark.parametrize('place', ['', 'file://'])
def test_parquet_is_streamed(tmp_path, place):
  """20 MB of text in one row group: the memory of Python and of Arrow stays far below."""
  path = str(tmp_path / 'a.parquet')
  big = [f'{i:04} ' + 'word ' * 2000 for i in range(2000)]
  pq.write_table(table(x=big), path, use_dictionary=False, row_group_size=2000, compression='none',
                 write_batch_size=64)           # of its pages, which Arrow reads whole: 1 MB each
  del big
  tracemalloc.start()
  before = arrow = pa.total_allocated_bytes()
  for record in records.RecordReader(place + path):
    if record.line % 100 == 0:
      arrow = max(arrow, pa.total_allocated_bytes())
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert record.fields['x'].startswith('1999 ')
  assert (peak < 6e6, arrow - before < 10e6) == (True, True), (peak, arrow - before)


# ---- unusable files ----

def test_nothing_in_a_file(tmp_path):
  for name, data in (('a.jsonl', b''), ('b.jsonl', b'\n \r\n'), ('a.txt.gz', b''), ('a.csv', b''),
                     ('b.csv', b'en,de\n'), ('a.tsv', b'\xef\xbb\xbf'), ('b.tsv', b'en\tde')):
    path = put(tmp_path / name, data)
    with pytest.raises(DataError, match=f'^{path} holds no records$'):
      read(path)
  (tmp_path / 'c.txt.gz').write_bytes(b'')
  with pytest.raises(DataError, match='c.txt.gz holds no records$'):
    read(str(tmp_path / 'c.txt.gz'))
  pq.write_table(table(x=pa.array([], pa.string())), tmp_path / 'a.parquet')
  with pytest.raises(DataError, match='a.parquet holds no records$'):
    read(str(tmp_path / 'a.parquet'))
  put(tmp_path / '0.txt', b'one\n')
  put(tmp_path / '1.txt', b'')
  with pytest.raises(DataError, match='1.txt holds no records$'):
    read(str(tmp_path / '[01].txt'))


def test_a_file_with_fewer_records_than_shards(tmp_path):
  assert read(put(tmp_path / 'a.txt', b'one\n'), shard=(1, 2))[0] == []


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.parquet', 'a.arrow'])
@pytest.mark.parametrize('fraction', [0.0, 0.5, 0.98])
def test_truncated_files(tmp_path, name, fraction):
  path = tmp_path / name
  data = [json.dumps({'x': f'{i * i % 9973} {i}'}) for i in range(3000)]
  if name == 'a.parquet':
    pq.write_table(table(x=data), path)
  elif name == 'a.arrow':
    arrow_stream(path, table(x=data), batch=100)
  else:
    put(path, '\n'.join(data).encode())
  whole = path.read_bytes()
  path.write_bytes(whole[:max(5, int(fraction * len(whole)))])
  with pytest.raises(DataError, match=f'^{path} is damaged or truncated: '):
    read(str(path), **ALL_BAD)


def test_an_arrow_stream_cut_between_its_batches(tmp_path):
  path = arrow_stream(tmp_path / 'a.arrow', table(x=['one', 'two']), batch=1)
  (tmp_path / 'a.arrow').write_bytes((tmp_path / 'a.arrow').read_bytes()[:-8])
  with pytest.raises(DataError, match='a.arrow is damaged or truncated: its last bytes'):
    read(path)


def test_broken_files(tmp_path):
  (tmp_path / 'c.txt.gz').write_bytes(gzip.compress(b'one')[:10] + b'\xff' * 20)
  packed = bytearray(gzip.compress(b'one\ntwo\n' * 1000))
  packed[-6] ^= 1                                             # its checksum
  (tmp_path / 'a.txt.gz').write_bytes(packed)
  for name in ('b.txt.gz', 'b.txt.zst', 'b.parquet'):
    (tmp_path / name).write_bytes(b'one\ntwo and three\n')
  arrow_stream(tmp_path / 'b.arrow', table(x=['one', 'two']))
  stream = (tmp_path / 'b.arrow').read_bytes()
  at = stream.index(b'\0\0\0\0\3\0\0\0\6\0\0\0')              # the offsets of the two texts
  (tmp_path / 'b.arrow').write_bytes(stream[:at + 8] + b'\xff\xff\xff\x7f' + stream[at + 12:])
  for name in ('a.txt.gz', 'b.txt.gz', 'c.txt.gz', 'b.txt.zst', 'b.parquet', 'b.arrow'):
    with pytest.raises(DataError, match=f'{name} is damaged or truncated: ') as e:
      read(str(tmp_path / name), **ALL_BAD)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, data, message', [
    ('a.csv', b'en,en\na,b\n', "a.csv:1: the header names 'en' twice"),
    ('a.csv', b'\nen,\na,b\n', 'a.csv:2: the header has no name for column 2 of 2'),
    ('a.csv', b'"en,de\na,b\n', 'a.csv:1: the header is bad: unclosed quote'),
    ('a.tsv', b'en\tde\xff\na\tb\n', 'a.tsv:1: the header is bad: not UTF-8: byte 0xff at byte 5'),
    ('a.tsv', b'eng\tde\na\tb\n', "a.tsv:1: the header has no column 'en'. Did you mean 'eng'"),
    ('a.csv', 'en,de\na,b\n'.encode('utf-16'), 'a.csv is UTF-16; convert it to UTF-8: iconv'),
])
def test_bad_headers(tmp_path, name, data, message):
  with pytest.raises(DataError) as e:
    read(put(tmp_path / name, data), required=['en'], **ALL_BAD)
  assert message in str(e.value)


def test_a_schema_without_the_column(tmp_path):
  pq.write_table(table(question=['a'], answer=['b']), tmp_path / 'a.parquet')
  with pytest.raises(DataError, match="a.parquet: has no column 'qestion'. Did you mean 'questi"):
    read(str(tmp_path / 'a.parquet'), required=['qestion'])
