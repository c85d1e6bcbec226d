"""Shared by the tools: records in and out, reports, hashes, and their memory."""
import gzip
import io
import itertools
import json
import random
import tracemalloc

import datasketch  # noqa: F401  (imported first: its own memory is not measured)
import numpy as np
import pytest

from t5lab import files
from t5lab.data import vocab
from t5lab.errors import DataError, UsageError
from t5lab.tools.prepare import (
  augment,
  clean,
  decontaminate,
  dedup,
  hashes,
  scrub,
  vocabulary,
)
from t5lab.tools.prepare.job import PrepareJob


def make(path, texts, **more):
  path.write_text(''.join(json.dumps({'text': text, **more}) + '\n' for text in texts))
  return str(path)


def make_job(tmp_path, *inputs, output='out.jsonl', **options):
  return PrepareJob('tool', list(inputs), tmp_path / output, log=io.StringIO(), **options)


def test_report_and_records(tmp_path):
  a, b = make(tmp_path / 'a.jsonl', ['one', 'two'], id=7), make(tmp_path / 'b.jsonl', ['three'])
  job = make_job(tmp_path, a, b, settings={'rate': 1})
  with job.write() as write:
    for record in job.read():
      job.count('long', record, record.fields['text'] * 100, at=150)
      if record.line == 1:
        write(record.fields)
  assert (tmp_path / 'out.jsonl').read_text() == (
      '{"text": "one", "id": 7}\n{"text": "three"}\n')
  report = json.loads((tmp_path / 'out.jsonl.report.json').read_text())
  assert report.pop('seconds') >= 0
  assert report == {
      'command': 'tool', 'inputs': [{'file': a, 'bytes': 50}, {'file': b, 'bytes': 18}],
      'output': str(tmp_path / 'out.jsonl'), 'fields': ['text'],
      'rows': {'read': 3, 'unreadable': 0, 'written': 2},
      'rules': {'long': {'count': 3, 'examples': [
          {'row': f'{a}:1', 'text': '…' + ('one' * 100)[50:250] + '…'},
          {'row': f'{a}:2', 'text': '…' + ('two' * 100)[50:250] + '…'},
          {'row': f'{b}:1', 'text': '…' + ('three' * 100)[50:250] + '…'}]}},
      'settings': {'rate': 1}}


def test_three_examples_of_a_rule(tmp_path):
  job = make_job(tmp_path, make(tmp_path / 'a.jsonl', 'abcde'))
  for record in job.read():
    job.count('rule', record, record.fields['text'])
  job.declare('rule', 'other')
  assert job.rules['rule'] == {'count': 5, 'examples': [
      {'row': f'{tmp_path}/a.jsonl:{n}', 'text': text} for n, text in enumerate('abc', start=1)]}
  assert job.rules['other'] == {'count': 0, 'examples': []}


def test_unreadable_records_are_reported(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a"}\n{"other": 1}\n{"text": "b"}\n')
  job = make_job(tmp_path, str(path), bad_rows=0.5)
  assert [record.fields['text'] for record in job.read()] == ['a', 'b']
  assert job.counts == {'read': 2, 'unreadable': 1}
  assert job.extra['unreadable'][0]['row'] == f'{path}:2'
  assert "'text'" in job.extra['unreadable'][0]['reason']


def test_an_existing_output_is_kept(tmp_path):
  a = make(tmp_path / 'a.jsonl', ['one'])
  (tmp_path / 'out.jsonl').write_text('old')
  with pytest.raises(UsageError, match=r'out\.jsonl exists; add --overwrite to replace it'):
    make_job(tmp_path, a)
  (tmp_path / 'out.jsonl').unlink()
  (tmp_path / 'out.jsonl.report.json').write_text('old')
  with pytest.raises(UsageError, match='report.json exists'):
    make_job(tmp_path, a)
  scrub.run(make_job(tmp_path, a, overwrite=True))
  assert json.loads((tmp_path / 'out.jsonl.report.json').read_text())['command'] == 'tool'


@pytest.mark.parametrize('output, message', [
    ('a.jsonl', 'is one of the inputs'), ('no/out.jsonl', 'folder does not exist'),
    ('out.csv', r'must end in \.jsonl or \.jsonl\.gz or \.jsonl\.zst, got .*out\.csv')])
def test_invalid_outputs(tmp_path, output, message):
  a = make(tmp_path / 'a.jsonl', ['one'])
  with pytest.raises(UsageError, match=message):
    make_job(tmp_path, a, output=output, overwrite=True)


def test_a_failed_run_leaves_the_old_files(tmp_path):
  a = make(tmp_path / 'a.jsonl', ['one', 'two'])
  (tmp_path / 'out.jsonl').write_text('old')
  (tmp_path / 'out.jsonl.report.json').write_text('old')
  job = make_job(tmp_path, a, overwrite=True)
  with pytest.raises(DataError, match='stop'), job.write() as write:
    write({'text': 'one'})
    raise DataError('stop')
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'a.jsonl', 'out.jsonl', 'out.jsonl.report.json']
  assert (tmp_path / 'out.jsonl').read_text() == 'old'
  assert (tmp_path / 'out.jsonl.report.json').read_text() == 'old'


def test_a_new_output_never_has_an_old_report(tmp_path, monkeypatch):
  report = tmp_path / 'out.jsonl.report.json'
  report.write_text('old')
  job = make_job(tmp_path, make(tmp_path / 'a.jsonl', ['one']), overwrite=True)
  monkeypatch.setattr(job, 'finish', lambda: None)      # killed before the new report
  with job.write() as write:
    write({'text': 'one'})
  assert (tmp_path / 'out.jsonl').exists() and not report.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
  def full(_):
    raise OSError(28, 'No space left on device')

  job = make_job(tmp_path, make(tmp_path / 'a.jsonl', ['one']))
  monkeypatch.setattr(files.os, 'fsync', full)
  with pytest.raises(DataError, match='cannot write .*out.jsonl.report.json: No space left on dev'):
    job.finish()
  with pytest.raises(DataError, match='cannot write .*out.jsonl: No space left on device'):
    job.write_bytes(b'model')
  assert [p.name for p in tmp_path.iterdir()] == ['a.jsonl']


@pytest.fixture
def clock(monkeypatch):
  """Every look at the clock takes a sixteenth of a second; a progress line is due every 5 s."""
  ticks = itertools.count()
  monkeypatch.setattr(files.time, 'monotonic', lambda: next(ticks) / 16)


def test_progress(tmp_path, clock):
  a = make(tmp_path / 'a.jsonl', ['x' * 85] * 200)             # 95 of 98 bytes are counted
  log = io.StringIO()
  job = PrepareJob('tool', [a], tmp_path / 'o.jsonl', log=log)
  list(job.read('first'))
  list(job.read('again', again=True))
  assert log.getvalue().splitlines() == [
      'tool first: 80 records · 16 records/s · ETA 0:07',
      'tool first: 160 records · 16 records/s · ETA 0:02',
      'tool first: 200 records · 16 records/s · done',
      'tool again: 80 of 200 records · 16 records/s · ETA 0:07',
      'tool again: 160 of 200 records · 16 records/s · ETA 0:02',
      'tool again: 200 of 200 records · 16 records/s · done']


def test_a_compressed_file_has_an_eta_only_in_a_second_pass(tmp_path, clock):
  with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as f:
    f.write('{"text": "x"}\n' * 100)
  log = io.StringIO()
  job = PrepareJob('tool', [str(tmp_path / 'a.jsonl.gz')], tmp_path / 'o.jsonl', log=log)
  list(job.read())
  list(job.read(again=True))
  assert log.getvalue().splitlines() == [
      'tool: 80 records · 16 records/s', 'tool: 100 records · 16 records/s · done',
      'tool: 80 of 100 records · 16 records/s · ETA 0:01',
      'tool: 100 of 100 records · 16 records/s · done']


# -- hashes ----------------------------------------------------------------------------------------

def test_words():
  assert hashes.words("It's 5 €, \ufb01ne STRASSE\nStraße_x! \uff34\uff15") == [
      'it', 's', '5', 'fine', 'strasse', 'strasse_x', 't5']


def test_hash64_is_the_same_everywhere():
  """The output of `b2sum -l 64`, with its bytes reversed."""
  assert hashes.hash64('') == 0xb4b2797457a0a6e4
  assert hashes.hash64('T5') == 0xff6f4c7df36583d8
  assert hashes.hash_all(['', 'T5']).tolist() == [0xb4b2797457a0a6e4, 0xff6f4c7df36583d8]


def test_ngrams():
  m = 0x9E3779B97F4A7C15
  assert hashes.ngrams(np.array([1, 2, 3], np.uint64), 2).tolist() == [
      (1 * m**2 + 2 * m) % 2**64, (2 * m**2 + 3 * m) % 2**64]
  assert hashes.ngrams(np.array([1, 2], np.uint64), 3).tolist() == []
  a, b = (hashes.ngrams(np.array(x, np.uint64), 2)[0] for x in ([5, 9], [9, 5]))
  assert a != b


def test_table_is_a_dict_of_sets():
  rng = random.Random(0)
  table, reference = hashes.Table(min_waiting=8), {}
  for value in range(300):
    keys = np.array([rng.randrange(200) * 2**55 for _ in range(3)], np.uint64)
    for key in keys.tolist():
      reference.setdefault(key, set()).add(value)
    table.add(keys, value)
    queries = np.array([rng.randrange(250) * 2**55 for _ in range(4)], np.uint64)
    assert table.contains(queries).tolist() == [key in reference for key in queries.tolist()]
    assert table.values(queries).tolist() == sorted(
        set().union(*(reference.get(key, ()) for key in queries.tolist())))
  assert len(table) == 900


# -- memory ----------------------------------------------------------------------------------------

RUNS = {
    'clean': lambda job: clean.run(job, clean.select(without=['repeated_spans'])),
    'dedup': lambda job: dedup.run(job),
    'exact': lambda job: dedup.run(job, near=False),
    'decontaminate': lambda job: decontaminate.run(job, {'x': job.files[1:]}),
    'scrub': scrub.run,
    'augment': lambda job: augment.run_noise(job, 'word_dropout', rate=0.1),
    'vocab': lambda job: vocabulary.run(job, 2048),
}


@pytest.mark.parametrize('name', RUNS)
def test_no_file_is_held_in_memory(tmp_path, name, monkeypatch):
  """Each record has 40 kB (as a str) that no tool needs: at most a few may be alive at once."""
  rng = np.random.default_rng(0)
  words = [f'word{i}' for i in range(500)]
  texts = [' '.join(rng.choice(words, 25)) + '.' for _ in range(101)]
  make(tmp_path / 'a.jsonl', texts[:100], more='é' * 20_000)
  make(tmp_path / 'b.jsonl', texts[100:])
  job = make_job(tmp_path, str(tmp_path / 'a.jsonl'), str(tmp_path / 'b.jsonl'))
  model = vocab.embedded_model('t5lab_2048')
  monkeypatch.setattr(vocabulary, 'train', lambda lines, size: (list(lines), model)[1])
  assert (tmp_path / 'a.jsonl').stat().st_size > 12_000_000
  if name == 'dedup':
    dedup.NearIndex()                # loads its imports
  tracemalloc.start()
  try:
    RUNS[name](job)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 1_500_000
