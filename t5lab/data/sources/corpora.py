"""The corpora in the package: real text that trains and evaluates without a network.

Each file is gzipped JSON lines with one record per line; `split` is train or validation. Splits are
by group (integration, function, document), and no validation target occurs in train. Origins and
licences: NOTICE.

Two are subsets, made from the full files by

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
G2P_RECORDS = {'train': 6000, 'validation': 300}
# misaki's phonemes that the characters of PeterReid/graphemes_to_phonemes_en_us cover. That model
# was trained on the whole dictionary: its scores on our validation split are not on unseen words.
G2P_PHONEMES = frozenset('AIOWYbdfhijklmnpstuvwzæðŋɑɔəɛɜɡɪɹɾʃʊʌʒʔʤʧˈˌθᵊᵻ')


@functools.cache
def _splits(name: str) -> dict[str, tuple]:
  """{split: records} of a corpus."""
  if name == 'match':
    return {split: tuple(match_pairs(load('summarize', split)))
            for split in ('train', 'validation')}
  if name not in FILES:
    raise UsageError(f'no embedded corpus {name!r}.{did_you_mean(name, FILES)}')
  packed = resources.files('t5lab.data').joinpath('files', FILES[name]).read_bytes()
  splits = {'train': [], 'validation': []}
  for line in gzip.decompress(packed).decode('utf-8').split('\n')[:-1]:
    record = json.loads(line)
    splits[record.pop('split')].append(MappingProxyType(record))
  return {split: tuple(records) for split, records in splits.items()}


def load(name: str, split: str) -> list:
  """Records of one split, in file order: read-only mappings, shared between callers.

  name: one of FILES, or 'match', which match_pairs makes from 'summarize'.
  """
  splits = _splits(name)
  if split not in splits:
    raise DataError(f'corpus {name!r} has no split {split!r}.{did_you_mean(split, splits)}')
  return list(splits[split])


def _draw(text: str) -> float:
  """A number in [0, 1) from the SHA-256 of a text: the same on every machine."""
  return int.from_bytes(hashlib.sha256(text.encode('utf-8')).digest()[:8], 'big') / 2**64


def match_pairs(records: list) -> list:
  """Records {document, summary} -> {document, summary, match}: does the summary fit the document?

  Half of the documents keep their own summary (match 1). The other half exchange theirs (match 0),
  so every summary occurs once and is no evidence by itself. The halves and the exchange are drawn
  from the record's index.
  """
  order = sorted(range(len(records)), key=lambda i: _draw(f'match {i}'))
  others = order[:len(order) // 2]
  summaries = [record['summary'] for record in records]

  # Each of the other half receives the next one's summary.
  source = dict(zip(others, others[1:] + others[:1]))

  # Two documents may have the same summary: a document that received its own words swaps.
  for k, i in enumerate(others):
    for j in others[k + 1:] + others[:k]:
      if summaries[source[i]] != summaries[i]:
        break
      if summaries[source[j]] != summaries[i] and summaries[source[i]] != summaries[j]:
        source[i], source[j] = source[j], source[i]

  return [MappingProxyType({'document': record['document'],
                            'summary': summaries[source.get(i, i)],
                            'match': int(i not in source)})
          for i, record in enumerate(records)]


def sample_g2p(entries: dict) -> list[dict]:
  """Samples G2P_RECORDS from misaki's us_gold.json: {word: phonemes, or a dict by part of speech}.

  The words have plain letters, one pronunciation, known phonemes, and one spelling up to case. No
  pronunciation of validation occurs in train. Drawn by the SHA-256 of the word.
  """
  spellings = collections.Counter(word.lower() for word in entries)

  def is_usable(word, phonemes):
    return (isinstance(phonemes, str) and phonemes and set(phonemes) <= G2P_PHONEMES
            and re.fullmatch('[A-Za-z]+', word) and spellings[word.lower()] == 1)

  words = sorted((word for word, phonemes in entries.items() if is_usable(word, phonemes)),
                 key=_draw)
  held_out = words[:G2P_RECORDS['validation']]
  pronunciations = {entries[word] for word in held_out}
  rest = [word for word in words[len(held_out):] if entries[word] not in pronunciations]
  return [{'split': split, 'word': word, 'phonemes': entries[word]}
          for split, chosen in (('train', rest[:G2P_RECORDS['train']]), ('validation', held_out))
          for word in sorted(chosen)]


def subset_books(lines: list[str]) -> list[str]:
  """Keeps whole documents: all of validation; of train, a draw from the SHA-256 of the id."""
  def is_kept(record):
    return record['split'] == 'validation' or _draw(record['id']) < BOOKS_TRAIN_SHARE

  return [line for line in lines if is_kept(json.loads(line))]


def main(argv):
  source, target = argv
  if source.endswith('.json'):
    with open(source, encoding='utf-8') as f:
      lines = [json.dumps(record, ensure_ascii=False) for record in sample_g2p(json.load(f))]
  else:
    with gzip.open(source, 'rt', encoding='utf-8', newline='\n') as f:
      lines = subset_books(f.read().split('\n')[:-1])
  text = ''.join(line + '\n' for line in lines)
  with open(target, 'wb') as f:
    f.write(gzip.compress(text.encode('utf-8'), compresslevel=9, mtime=0))
  print(f'{target}: {len(lines)} records, {len(text)} characters')


if __name__ == '__main__':
  main(sys.argv[1:])
