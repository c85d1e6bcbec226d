"""What the tools share: rows in and out, reports, hashes, and their memory."""
import gzip
import io
import json
import random
import tracemalloc

import datasketch  # noqa: F401  (its own memory is not what is measured)
import numpy as np
import pytest

from t5lab.data import vocab
from t5lab.errors import DataError, UsageError
from t5lab.tools.prepare import (
  augment,
  clean,
  decontaminate,
  dedup,
  hashes,
  scrub,
  train_vocab,
  vocabulary,
)
from t5lab.tools.prepare import job as jobs


def make(path, texts, **more):
  path.write_text(''.join(json.dumps({'text': text, **more}) + '\n' for text in texts))
  return str(path)


def job(tmp_path, *inputs, output='out.jsonl', **options):
  return jobs.Job('tool', list(inputs), tmp_path / output, says=io.StringIO(), **options)


def test_report_and_rows(tmp_path):
  a, b = make(tmp_path / 'a.jsonl', ['one', 'two'], id=7), make(tmp_path / 'b.jsonl', ['three'])
  j = job(tmp_path, a, b, settings={'rate': 1})
  with j.write() as write:
    for row in j.read():
      j.count('long', row, row.fields['text'] * 100, at=150)
      if row.line == 1:
        write(row.fields)
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
  j = job(tmp_path, make(tmp_path / 'a.jsonl', 'abcde'))
  for row in j.read():
    j.count('rule', row, row.fields['text'])
  j.count('other', by=0)
  assert j.rules['rule'] == {'count': 5, 'examples': [
      {'row': f'{tmp_path}/a.jsonl:{n}', 'text': text} for n, text in enumerate('abc', start=1)]}
  assert j.rules['other'] == {'count': 0, 'examples': []}


def test_unreadable_rows_are_told(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a"}\n{"other": 1}\n{"text": "b"}\n')
  j = job(tmp_path, str(path), bad_rows=0.5)
  assert [row.fields['text'] for row in j.read()] == ['a', 'b']
  assert j.counts == {'read': 2, 'unreadable': 1}
  assert j.more['unreadable'][0]['row'] == f'{path}:2'
  assert "'text'" in j.more['unreadable'][0]['reason']


def test_an_output_that_exists_is_kept(tmp_path):
  a = make(tmp_path / 'a.jsonl', ['one'])
  (tmp_path / 'out.jsonl').write_text('mine')
  with pytest.raises(UsageError, match=r'out\.jsonl exists; --overwrite replaces it'):
    job(tmp_path, a)
  (tmp_path / 'out.jsonl').unlink()
  (tmp_path / 'out.jsonl.report.json').write_text('mine')
  with pytest.raises(UsageError, match='report.json exists'):
    job(tmp_path, a)
  scrub.run(job(tmp_path, a, overwrite=True))
  assert json.loads((tmp_path / 'out.jsonl.report.json').read_text())['command'] == 'tool'


@pytest.mark.parametrize('output, said', [
    ('a.jsonl', 'is one of the inputs'), ('no/out.jsonl', 'folder does not exist'),
    ('out.csv', r'must end in \.jsonl or \.jsonl\.gz or \.jsonl\.zst')])
def test_outputs_that_cannot_be(tmp_path, output, said):
  a = make(tmp_path / 'a.jsonl', ['one'])
  with pytest.raises(UsageError, match=said):
    job(tmp_path, a, output=output, overwrite=True)


def test_nothing_half_written(tmp_path):
  a = make(tmp_path / 'a.jsonl', ['one', 'two'])
  (tmp_path / 'out.jsonl').write_text('old')
  (tmp_path / 'out.jsonl.report.json').write_text('old')
  j = job(tmp_path, a, overwrite=True)
  with pytest.raises(DataError), j.write() as write:
    write({'text': 'one'})
    raise DataError('stop')
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'a.jsonl', 'out.jsonl', 'out.jsonl.report.json']
  assert (tmp_path / 'out.jsonl').read_text() == 'old'
  assert (tmp_path / 'out.jsonl.report.json').read_text() == 'old'


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(jobs.os, 'fsync', full)
  with pytest.raises(DataError, match='cannot write .*r.json: No space left on device'):
    jobs.replace(str(tmp_path / 'r.json'), b'{}')
  assert list(tmp_path.iterdir()) == []


def test_progress(tmp_path, monkeypatch):
  now = iter(range(0, 10_000, 3))
  monkeypatch.setattr(jobs.time, 'perf_counter', lambda: float(next(now)))
  a = make(tmp_path / 'a.jsonl', ['x' * 85] * 192)             # 99 bytes a row of 97 told by texts
  says = io.StringIO()
  j = jobs.Job('tool', [a], tmp_path / 'o.jsonl', says=says)
  list(j.read('first'))
  list(j.read('again', again=True))
  assert says.getvalue().splitlines() == [
      'tool first: 128 rows · 21 rows/s · ETA 0:03',
      'tool first: 192 rows · 16 rows/s · done',
      'tool again: 128 rows · 21 rows/s · ETA 0:03',
      'tool again: 192 rows · 16 rows/s · done']


def test_progress_of_a_packed_file_has_no_eta_before_a_pass_ended(tmp_path, monkeypatch):
  now = iter(range(0, 10_000, 9))
  monkeypatch.setattr(jobs.time, 'perf_counter', lambda: float(next(now)))
  with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as f:
    f.write('{"text": "x"}\n' * 100)
  says = io.StringIO()
  j = jobs.Job('tool', [str(tmp_path / 'a.jsonl.gz')], tmp_path / 'o.jsonl', says=says)
  list(j.read())
  list(j.read(again=True))
  assert says.getvalue().splitlines() == [
      'tool: 64 rows · 7 rows/s', 'tool: 100 rows · 6 rows/s · done',
      'tool: 64 rows · 7 rows/s · ETA 0:05', 'tool: 100 rows · 6 rows/s · done']


# -- hashes ----------------------------------------------------------------------------------------

def test_words():
  assert hashes.words("It's 5 €, \ufb01ne STRASSE\nStraße_x! \uff34\uff15") == [
      'it', 's', '5', 'fine', 'strasse', 'strasse_x', 't5']


def test_hash64_is_the_same_everywhere():
  """What `b2sum -l 64` prints, its bytes from the last to the first."""
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


def test_table_is_a_dict_of_lists():
  rng = random.Random(0)
  table, plain = hashes.Table(fresh=8), {}
  for value in range(300):
    keys = np.array([rng.randrange(200) * 2**55 for _ in range(3)], np.uint64)
    for key in keys.tolist():
      plain.setdefault(key, set()).add(value)
    table.add(keys, value)
    asked = np.array([rng.randrange(250) * 2**55 for _ in range(4)], np.uint64)
    assert table.contains(asked).tolist() == [key in plain for key in asked.tolist()]
    assert table.values(asked).tolist() == sorted(
        set().union(*(plain.get(key, ()) for key in asked.tolist())))
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
  """Each row brings 120 kB that no tool has a use for, and may be held no longer than its turn."""
  rng = np.random.default_rng(0)
  words = [f'word{i}' for i in range(500)]
  texts = [' '.join(rng.choice(words, 25)) + '.' for _ in range(101)]
  make(tmp_path / 'a.jsonl', texts[:100], more='é' * 20_000)
  make(tmp_path / 'b.jsonl', texts[100:])
  j = job(tmp_path, str(tmp_path / 'a.jsonl'), str(tmp_path / 'b.jsonl'))
  model = vocab.embedded_model('t5lab_2048')
  monkeypatch.setattr(train_vocab, 'train', lambda lines, size: (list(lines), model)[1])
  assert (tmp_path / 'a.jsonl').stat().st_size > 12_000_000
  if name == 'dedup':
    dedup.Near()                     # its imports
  tracemalloc.start()
  try:
    RUNS[name](j)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 1_500_000
