import gzip
from importlib import resources
import json

import pytest

from t5lab.data.sources import corpora
from t5lab.errors import DataError, UsageError


def test_the_size_of_each_corpus():
  assert {name: (len(corpora.load(name, 'train')), len(corpora.load(name, 'validation')))
          for name in corpora.FILES} == {
              'ende': (8901, 272), 'enes': (8880, 274), 'enfr': (3692, 126),
              'summarize': (6174, 218), 'qa': (8215, 300), 'books': (126, 17),
              'g2p': (6000, 300)}


def test_the_first_record():
  assert dict(corpora.load('ende', 'train')[0]) == {
      'group': 'abode', 'en': 'Enter your MFA code for Abode',
      'de': 'Gib deinen MFA-Code für Abode ein'}


def test_records_are_read_only_and_the_list_is_a_copy():
  rows = corpora.load('ende', 'train')
  with pytest.raises(TypeError):
    rows[0]['en'] = 'x'
  rows.clear()
  assert len(corpora.load('ende', 'train')) == 8901


@pytest.mark.parametrize('name, target', [
    ('ende', 'de'), ('enfr', 'fr'), ('summarize', 'summary'), ('g2p', 'phonemes'), ('g2p', 'word')])
def test_no_validation_target_occurs_in_train(name, target):
  train = {row[target] for row in corpora.load(name, 'train')}
  assert not train & {row[target] for row in corpora.load(name, 'validation')}


def test_answers_start_at_their_offset():
  for row in corpora.load('qa', 'validation'):
    for text, start in zip(row['answers']['text'], row['answers']['answer_start']):
      assert row['context'][start:start + len(text)] == text


def test_unknown_names():
  with pytest.raises(UsageError, match="no embedded corpus 'endee'. Did you mean 'ende'"):
    corpora.load('endee', 'train')
  with pytest.raises(DataError, match="has no split 'test'. Known: train, validation"):
    corpora.load('ende', 'test')


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_match_gives_each_summary_once_half_of_them_to_another_document(split):
  rows, own = corpora.load('match', split), corpora.load('summarize', split)
  assert [row['document'] for row in rows] == [row['document'] for row in own]
  assert [row['match'] for row in rows] == [int(a['summary'] == b['summary'])
                                            for a, b in zip(rows, own)]
  assert sum(row['match'] for row in rows) * 2 == len(rows)
  assert sorted(row['summary'] for row in rows) == sorted(row['summary'] for row in own)
  classes = [row['match'] for row in rows]
  assert 0.4 < sum(a == b for a, b in zip(classes, classes[1:])) / len(rows) < 0.6


def test_match_swaps_until_no_document_has_its_own_words():
  rows = [{'document': str(i), 'summary': 'same' if i % 4 == 0 else str(i)} for i in range(60)]
  for n in range(20, 61):
    pairs = corpora.match_pairs(rows[:n])
    assert all((a['summary'] == b['summary']) == a['match'] for a, b in zip(pairs, rows))
    assert sorted(pair['summary'] for pair in pairs) == sorted(r['summary'] for r in rows[:n])


def test_sample_of_a_pronouncing_dictionary(monkeypatch):
  monkeypatch.setattr(corpora, 'G2P_RECORDS', {'train': 3, 'validation': 1})
  good = {'see': 'si', 'sea': 'si', 'bee': 'bi', 'Kay': 'kA', 'oak': 'Ok', 'knee': 'ni'}
  bad = {'read': {'DEFAULT': 'ɹid'}, "it's": 'ɪts', 'Polish': 'pˈOlɪʃ', 'polish': 'pˈɑlɪʃ',
         'x': '', 'loch': 'lɑx', 'naïve': 'nIˈiv'}
  rows = corpora.sample_g2p({**good, **bad})
  assert [row['split'] for row in rows] == ['train'] * 3 + ['validation']
  assert all(good[row['word']] == row['phonemes'] for row in rows)
  assert rows[-1]['phonemes'] not in {row['phonemes'] for row in rows[:-1]}
  assert rows == corpora.sample_g2p(dict(reversed({**good, **bad}.items())))


def test_subset_keeps_validation_and_about_a_third_of_train():
  lines = [json.dumps({'split': split, 'id': f'{split}{i}', 'text': ''})
           for split in ('train', 'validation') for i in range(1000)]
  subset = corpora.subset_books(lines)
  assert subset[-1000:] == lines[1000:]
  assert 290 < len(subset) - 1000 < 370  # 330, standard deviation 15
  assert corpora.subset_books(subset) == subset
  assert corpora.subset_books(lines[::-1]) == subset[::-1]


def test_the_subset_of_the_shipped_file_is_itself(tmp_path):
  shipped = resources.files('t5lab.data').joinpath('files', corpora.FILES['books'])
  with resources.as_file(shipped) as path:
    corpora.main([str(path), str(tmp_path / 'again.gz')])
  assert (gzip.decompress((tmp_path / 'again.gz').read_bytes())
          == gzip.decompress(shipped.read_bytes()))


def test_the_files_fit_a_wheel_of_six_megabytes():
  files = resources.files('t5lab.data').joinpath('files').iterdir()
  sizes = {f.name: len(f.read_bytes()) for f in files}
  assert max(sizes.values()) < 2_000_000 and sum(sizes.values()) < 5_500_000
