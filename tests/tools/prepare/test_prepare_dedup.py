import io
import json
import sys

import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.tools.prepare import dedup
from t5lab.tools.prepare.job import PrepareJob


def run(tmp_path, rows, fields=('text',), **options):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  job = PrepareJob('dedup', [str(source)], target, fields, overwrite=True, log=io.StringIO())
  dedup.run(job, **options)
  written = [json.loads(line)['n'] for line in target.read_text().splitlines()]
  return written, json.loads((tmp_path / 'out.jsonl.report.json').read_text())


def numbers(first, last):
  return ' '.join(map(str, range(first, last)))


def test_exact(tmp_path):
  texts = ['One  two', 'one\ttwo ', 'onetwo', 'one, two', '\uff4fne two', 'ONE two', 'one two x']
  kept, report = run(tmp_path, [{'text': t, 'n': n} for n, t in enumerate(texts)], near=False)
  assert kept == [0, 2, 3, 6]
  assert report['rows'] == {'read': 7, 'unreadable': 0, 'dropped': 3, 'written': 4}
  assert report['clusters'] == {'count': 1, 'rows': 4, 'largest': [
      {'first': f'{tmp_path}/in.jsonl:1', 'rows': 4}]}
  assert list(report['rules']) == ['exact']
  assert report['rules']['exact']['examples'][0] == {
      'row': f'{tmp_path}/in.jsonl:2', 'text': f'= {tmp_path}/in.jsonl:1: one\ttwo '}


def test_near(tmp_path):
  """100 numbers make 96 shingles: another last 2 share 94 of 98, another last 20 76 of 101."""
  rows = [numbers(0, 100), numbers(200, 300), numbers(0, 98) + ' x y', numbers(0, 80) + ' a' * 20,
          numbers(200, 295), numbers(0, 100) + ' ', numbers(0, 99) + '!']
  kept, report = run(tmp_path, [{'text': t, 'n': n} for n, t in enumerate(rows)])
  assert kept == [0, 1, 3]
  assert {rule: entry['count'] for rule, entry in report['rules'].items()} == {
      'exact': 1, 'near': 3}
  assert report['clusters'] == {'count': 2, 'rows': 6, 'largest': [
      {'first': f'{tmp_path}/in.jsonl:1', 'rows': 4},
      {'first': f'{tmp_path}/in.jsonl:2', 'rows': 2}]}
  kept, _ = run(tmp_path, [{'text': t, 'n': n} for n, t in enumerate(rows)], threshold=0.5)
  assert kept == [0, 1]
  kept, _ = run(tmp_path, [{'text': t, 'n': n} for n, t in enumerate(rows)], threshold=1.)
  assert kept == [0, 1, 2, 3, 4, 6]


def test_a_chain_is_not_a_cluster(tmp_path):
  """Each record is near to the one before it; the third is not near to the first, which is kept."""
  rows = [{'text': numbers(n * 9, n * 9 + 100), 'n': n} for n in range(3)]
  kept, report = run(tmp_path, rows, threshold=0.8)
  assert kept == [0, 2]
  assert report['rules']['near']['count'] == 1


def test_fields_are_compared_together(tmp_path):
  rows = [{'a': 'x y', 'b': 'z', 'n': 0}, {'a': 'x', 'b': 'y z', 'n': 1},
          {'a': 'X y', 'b': 'z', 'n': 2}]
  kept, _ = run(tmp_path, rows, ['a', 'b'])
  assert kept == [0, 1]


def test_texts_without_words_are_near_to_nothing(tmp_path):
  kept, _ = run(tmp_path, [{'text': t, 'n': n} for n, t in enumerate(['!?', '…', '!?', '-'])])
  assert kept == [0, 1, 3]


def test_shingles():
  five = dedup.shingles(['a b c d e'])
  assert len(five) == 1
  assert len(dedup.shingles(['a b c d e f', 'x'])) == 3
  assert len(dedup.shingles(['a b c d e a b c d e a'])) == 5     # seven, two of them repeated
  assert dedup.shingles(['A, b c d e']).tolist() == five.tolist()
  assert dedup.shingles(['e d c b a']).tolist() != five.tolist()
  assert len(dedup.shingles(['', '?'])) == 0


def test_bands():
  assert dedup.bands(0.8) == (18, 7)
  assert dedup.bands(0.5) == (42, 3)
  assert dedup.bands(1.) == (1, 128)
  with pytest.raises(UsageError, match='must be at least 0.03 for 128 MinHash values, got 0.02'):
    dedup.bands(0.02)
  assert dedup.bands(0.03) == (128, 1)


def test_estimates_and_recall(rng):
  """Similarity 0.9: estimates are within the error of 128 values, and 99.9 % are found."""
  index = dedup.NearIndex(0.8)
  estimates = []
  for _ in range(100):
    words = [f'w{i}' for i in rng.integers(0, 10**9, 100)]
    # One of 100 words changed, not at an end, leaves 91 of 101 shingles.
    changed = [*words[:50], 'x', *words[51:]]
    signature = index.signature([' '.join(words)])
    assert signature.shape == (128,) and signature.dtype == np.uint32
    assert index.find(signature) is None
    number = index.add(signature)
    nearest = index.find(index.signature([' '.join(changed)]))
    assert nearest is None or nearest[0] == number
    estimates += [nearest[1]] if nearest else []
  assert len(estimates) >= 97
  assert abs(np.mean(estimates) - 91 / 101) < 0.01


def test_the_nearest_is_found():
  """Two candidates have Jaccard similarity 82 / 110 and 90 / 102."""
  index = dedup.NearIndex(0.5)
  for first in (0, 20, 6, 40):
    index.add(index.signature([numbers(first + 14, first + 114)]))
  number, estimate = index.find(index.signature([numbers(14, 114).replace('70', 'x')]))
  assert number == 0 and 0.8 < estimate < 1
  number, estimate = index.find(index.signature([numbers(36, 136)]))
  assert number == 1 and abs(estimate - 94 / 98) < 0.06


def test_only_records_with_a_common_band_are_compared():
  index = dedup.NearIndex(0.8)
  keys = index._keys(np.arange(128, dtype=np.uint32))
  assert len(set(keys.tolist())) == 18
  other = index._keys(np.where(np.arange(128) // 7 == 2, np.arange(128), 0).astype(np.uint32))
  assert (keys == other).tolist() == [i == 2 for i in range(18)]
  assert index._keys(np.zeros(128, np.uint32))[0] != index._keys(np.zeros(128, np.uint32))[1]


def test_long_texts_are_hashed_in_blocks():
  index, words = dedup.NearIndex(), numbers(0, 1000)
  whole = index._empty.copy()
  whole.update_batch((dedup.shingles([words]) >> np.uint64(32)).astype(np.uint32))
  assert index.signature([words]).tolist() == whole.hashvalues.tolist()


def test_without_datasketch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasketch', None)
  assert run(tmp_path, [{'text': 'a', 'n': 0}], near=False)[0] == [0]
  with pytest.raises(UsageError, match='pip install datasketch, or use --exact'):
    run(tmp_path, [{'text': 'a', 'n': 0}])


def test_invalid_thresholds(tmp_path):
  for threshold in (0., 1.5):
    message = f'--threshold must be a similarity above 0 and up to 1, got {threshold}'
    with pytest.raises(UsageError, match=message):
      run(tmp_path, [{'text': 'a', 'n': 0}], threshold=threshold)
  assert not (tmp_path / 'out.jsonl').exists()
