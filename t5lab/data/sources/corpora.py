"""The corpora inside the package: real text that trains and evaluates with no network.

Each file is gzipped JSON lines, one row a line, `split` train or validation. Splits are by group
(integration, function, document); no validation target stands in train. Origins, licences: NOTICE.

Two are subsets, made again from the full files by

  python -m t5lab.data.sources.corpora FULL.jsonl.gz t5lab/data/files/lm_public_domain.jsonl.gz
  python -m t5lab.data.sources.corpora us_gold.json t5lab/data/files/g2p_en_us.jsonl.gz
"""
import collections
import functools
import gzip
import hashlib
from importlib import resources
import json
import re
import sys
from types import MappingProxyType

from t5lab.errors import DataError, UsageError, did_you_mean

FILES = {
    'ende': 'translate_ha_en_de.jsonl.gz',  # group, en, de: interface strings of Home Assistant
    'enes': 'translate_ha_en_es.jsonl.gz',  # group, en, es: same
    'enfr': 'translate_ha_en_fr.jsonl.gz',  # group, en, fr: same
    'summarize': 'summarize_docs.jsonl.gz',  # group, document, summary: docstrings, first sentence
    'qa': 'qa_numpydoc.jsonl.gz',  # id, title, context, question, answers {text, answer_start}
    'books': 'lm_public_domain.jsonl.gz',  # id, text: Moby-Dick, State of the Union addresses
    'g2p': 'g2p_en_us.jsonl.gz',  # word, phonemes: American English, misaki's dictionary
}
BOOKS_TRAIN_SHARE = 0.33  # of the train documents of the full file; keeps the wheel under 6 MB
G2P_ROWS = {'train': 6000, 'validation': 300}
# misaki's phonemes that the characters of PeterReid/graphemes_to_phonemes_en_us cover. That model
# was trained on the whole dictionary: its scores on our validation split are not on unseen words.
G2P_PHONEMES = frozenset('AIOWYbdfhijklmnpstuvwzæðŋɑɔəɛɜɡɪɹɾʃʊʌʒʔʤʧˈˌθᵊᵻ')


def names() -> list[str]:
  return list(FILES)


@functools.cache
def _rows(name: str) -> dict[str, tuple]:
  if name == 'match':
    return {s: tuple(match_pairs(load('summarize', s))) for s in ('train', 'validation')}
  if name not in FILES:
    raise UsageError(f'no embedded corpus {name!r}.{did_you_mean(name, FILES)}')
  packed = resources.files('t5lab.data').joinpath('files', FILES[name]).read_bytes()
  splits = {'train': [], 'validation': []}
  for line in gzip.decompress(packed).decode('utf-8').split('\n')[:-1]:
    row = json.loads(line)
    splits[row.pop('split')].append(MappingProxyType(row))
  return {split: tuple(rows) for split, rows in splits.items()}


def load(name: str, split: str) -> list:
  """Rows of one split, in file order: read-only mappings, shared between callers.

  name: one of names(), or 'match', which match_pairs makes of 'summarize'.
  """
  rows = _rows(name)
  if split not in rows:
    raise DataError(f'corpus {name!r} has no split {split!r}.{did_you_mean(split, rows)}')
  return list(rows[split])


def num_rows(name: str, split: str) -> int:
  return len(load(name, split))


def _draw(text: str) -> float:
  """A number in [0, 1) from the SHA-256 of a text: the same on every machine."""
  return int.from_bytes(hashlib.sha256(text.encode('utf-8')).digest()[:8], 'big') / 2**64


def match_pairs(rows: list) -> list:
  """Rows {document, summary} -> {document, summary, match}: does the summary belong to it?

  Half keep their own summary (match 1). The other half pass theirs on among themselves (match 0),
  so every summary stands once and says nothing by itself. Who is in which half, and who gets
  whose, is a draw from the row's index.
  """
  order = sorted(range(len(rows)), key=lambda i: _draw(f'match {i}'))
  others = order[:len(order) // 2]
  summaries = [row['summary'] for row in rows]
  given = dict(zip(others, others[1:] + others[:1]))
  for k, i in enumerate(others):          # two documents may have one summary: trade with another
    for j in others[k + 1:] + others[:k]:
      if summaries[given[i]] != summaries[i]:
        break
      if summaries[given[j]] != summaries[i] and summaries[given[i]] != summaries[j]:
        given[i], given[j] = given[j], given[i]
  return [MappingProxyType({'document': row['document'],
                            'summary': summaries[given.get(i, i)], 'match': int(i not in given)})
          for i, row in enumerate(rows)]


def sample_g2p(entries: dict) -> list[dict]:
  """misaki's us_gold.json {word: phonemes, or a dict by part of speech} -> rows of G2P_ROWS.

  Plain letters, one pronunciation, known phonemes; no word twice in another case, and no
  pronunciation of validation stands in train. Drawn by the SHA-256 of the word.
  """
  spellings = collections.Counter(word.lower() for word in entries)
  words = [word for word, phonemes in entries.items()
           if isinstance(phonemes, str) and re.fullmatch('[A-Za-z]+', word)
           and spellings[word.lower()] == 1 and phonemes and set(phonemes) <= G2P_PHONEMES]
  words.sort(key=_draw)
  held_out = words[:G2P_ROWS['validation']]
  heard = {entries[word] for word in held_out}
  rest = [word for word in words[len(held_out):] if entries[word] not in heard]
  return [{'split': split, 'word': word, 'phonemes': entries[word]}
          for split, chosen in (('train', rest[:G2P_ROWS['train']]), ('validation', held_out))
          for word in sorted(chosen)]


def subset_books(lines: list[str]) -> list[str]:
  """Whole documents: every validation row, and train rows by a draw from the SHA-256 of the id."""
  keep = lambda row: row['split'] == 'validation' or _draw(row['id']) < BOOKS_TRAIN_SHARE
  return [line for line in lines if keep(json.loads(line))]


def main(argv):
  source, target = argv
  if source.endswith('.json'):
    with open(source, encoding='utf-8') as f:
      kept = [json.dumps(row, ensure_ascii=False) for row in sample_g2p(json.load(f))]
  else:
    with gzip.open(source, 'rt', encoding='utf-8', newline='\n') as f:
      kept = subset_books(f.read().split('\n')[:-1])
  text = ''.join(line + '\n' for line in kept)
  with open(target, 'wb') as f:
    f.write(gzip.compress(text.encode('utf-8'), compresslevel=9, mtime=0))
  print(f'{target}: {len(kept)} rows, {len(text)} characters')


if __name__ == '__main__':
  main(sys.argv[1:])
