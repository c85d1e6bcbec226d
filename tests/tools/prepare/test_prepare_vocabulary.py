import io
import json

import pytest

from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.errors import DataError
from t5lab.tools.prepare import vocabulary
from t5lab.tools.prepare.job import PrepareJob


def make(tmp_path, texts, name='v.model'):
  source = tmp_path / f'{name}.jsonl'
  source.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return PrepareJob('vocab', [str(source)], tmp_path / name, suffixes=('.model',),
                    log=io.StringIO())


def test_smallest_hashes():
  small = vocabulary.SmallestHashes(3)
  assert small.limit() == -1
  for number in (9, 5, 9, 2**64 - 1, 7, 5, 1):
    small.add(number)
  assert small.limit() == 7 and small.limit(1) == 1 and small.limit(2) == 5
  small.add(8)
  assert small.limit() == 7
  few = vocabulary.SmallestHashes(10)
  few.add(2**64 - 1)
  assert few.limit() == 2**64 - 1
  many = vocabulary.SmallestHashes(100)
  for number in range(200_000, 0, -1):
    many.add(number)
  assert many.limit() == 100 and len(many._new) < 2**16


def test_measure():
  """The byte vocabulary has one id per byte; `lossy` knows only a and b and loses capitals."""
  assert vocabulary.measure(vocab.load('byte'), ['ab c', 'é']) == {
      'texts': 2, 'texts_lost': 0., 'characters_lost': 0., 'unknown_rate': 0.,
      'tokens_per_word': 2., 'tokens_per_byte': 1.}
  table = {'a': 3, 'b': 4}
  lossy = vocab.Vocab('x', '', 5, 1, lambda t: [table.get(c.lower(), 2) for c in t],
                      lambda ids: ''.join(['', '', '', 'a', 'b'][i] for i in ids), str, unk_id=2)
  assert vocabulary.measure(lossy, ['ab', 'aB', 'abcc']) == {
      'texts': 3, 'texts_lost': 2 / 3, 'characters_lost': 3 / 8, 'unknown_rate': 2 / 8,
      'tokens_per_word': 8 / 3, 'tokens_per_byte': 1.}
  assert vocabulary.measure(lossy, [])['tokens_per_word'] == 0


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('vocab')
  texts = [text[i:i + 1500] for text in (row['text'] for row in corpora.load('books', 'train')[:4])
           for i in range(0, 60_000, 1500)]
  job = make(folder, [text for text in texts if text.strip()])
  vocabulary.run(job, 600)
  return folder / 'v.model', json.loads((folder / 'v.model.report.json').read_text())


def test_ids_are_those_of_t5(trained):
  v = vocab.load(str(trained[0]))
  assert (v.size, v.pad_id, v.eos_id, v.unk_id, v.bos_id) == (600, 0, 1, 2, None)
  assert v.sentinels[:2] == (599, 598) and v.num_sentinels == 100
  assert v.encode('<extra_id_0>')[-1] == 599


@pytest.mark.parametrize('text', [
    'The whale', '  two  spaces\n\tand\r\n', '\u2581x', '日本語 🐋', 'ＡＢＣ ﬁne e\u0301', '', ' '])
def test_every_text_round_trips(trained, text):
  v = vocab.load(str(trained[0]))
  assert v.decode(v.encode(text)) == text


def test_report(trained):
  path, report = trained
  assert report['vocabulary']['size'] == 600
  assert report['vocabulary']['bytes'] == path.stat().st_size
  assert report['held_out']['texts'] == 1
  assert report['vocabulary']['trained_on']['lines'] == 56
  assert report['held_out']['texts_lost'] == report['held_out']['unknown_rate'] == 0
  assert 2 < report['held_out']['tokens_per_word'] < 3.5
  assert sorted(p.name for p in path.parent.iterdir()) == [
      'v.model', 'v.model.jsonl', 'v.model.report.json']


def sample(tmp_path, monkeypatch, texts, name, max_sentences=vocabulary.MAX_SENTENCES):
  """Returns (the lines that sentencepiece gets, the report)."""
  lines = []

  def train(iterator, size):
    lines.extend(iterator)
    return vocab.embedded_model('t5lab_2048')

  monkeypatch.setattr(vocabulary, 'train', train)
  vocabulary.run(make(tmp_path, texts, name), 2048, max_sentences)
  return lines, json.loads((tmp_path / f'{name}.report.json').read_text())


def test_the_sample_does_not_depend_on_the_order(tmp_path, monkeypatch):
  texts = [f'text number {i}' for i in range(500)]
  a, report = sample(tmp_path, monkeypatch, texts, 'a.model', max_sentences=50)
  b, reversed_report = sample(tmp_path, monkeypatch, texts[::-1], 'b.model', max_sentences=50)
  assert a == b[::-1] and len(a) == 48
  assert set(a) <= set(sorted(texts, key=vocabulary.hashes.hash64)[:50])
  assert report['held_out'] == reversed_report['held_out'] and report['held_out']['texts'] == 5
  all_lines, _ = sample(tmp_path, monkeypatch, texts, 'c.model')
  assert len(all_lines) == 495
  assert set(a) <= set(all_lines)               # no held-out lines


def test_long_texts_are_split_and_a_single_record_is_used(tmp_path, monkeypatch):
  lines, report = sample(tmp_path, monkeypatch, ['a' * 999 + 'b' * 1001 + 'c'], 'a.model')
  assert lines == ['a' * 999 + 'b', 'b' * 1000, 'c']
  assert report['held_out']['texts'] == 0
  assert report['vocabulary']['trained_on'] == {'lines': 3, 'characters': 2001}
  lines, report = sample(tmp_path, monkeypatch, ['one', 'two'], 'b.model')
  assert len(lines) == 1 and report['held_out']['texts'] == 1
  lines, report = sample(tmp_path, monkeypatch, ['one', 'one'], 'c.model')
  assert lines == ['one', 'one'] and report['held_out']['texts'] == 0


def test_too_many_pieces(tmp_path):
  with pytest.raises(DataError, match=r'--size 5000, less 100 sentinels, .* too high \(4900\)'):
    vocabulary.run(make(tmp_path, ['one two three'] * 5), 5000)
  assert not (tmp_path / 'v.model').exists()
