"""The corpora inside the package: real text that trains and evaluates with no network.

Each file is gzipped JSON lines, one row a line, `split` train or validation. Splits are by group
(integration, function, document); no validation target stands in train. Origins, licences: NOTICE.

`lm_public_domain.jsonl.gz` is a subset, made again from the full file by

  python -m t5lab.data.corpora FULL.jsonl.gz t5lab/data/files/lm_public_domain.jsonl.gz
"""
import functools
import gzip
import hashlib
from importlib import resources
import json
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
}
BOOKS_TRAIN_SHARE = 0.33  # of the train documents of the full file; keeps the wheel under 6 MB


def names() -> list[str]:
  return list(FILES)


@functools.cache
def _rows(name: str) -> dict[str, tuple]:
  if name not in FILES:
    raise UsageError(f'no embedded corpus {name!r}.{did_you_mean(name, FILES)}')
  packed = resources.files('t5lab.data').joinpath('files', FILES[name]).read_bytes()
  splits = {'train': [], 'validation': []}
  for line in gzip.decompress(packed).decode('utf-8').split('\n')[:-1]:
    row = json.loads(line)
    splits[row.pop('split')].append(MappingProxyType(row))
  return {split: tuple(rows) for split, rows in splits.items()}


def load(name: str, split: str) -> list:
  """Rows of one split, in file order: read-only mappings, shared between callers."""
  rows = _rows(name)
  if split not in rows:
    raise DataError(f'corpus {name!r} has no split {split!r}.{did_you_mean(split, rows)}')
  return list(rows[split])


def num_rows(name: str, split: str) -> int:
  return len(load(name, split))


def subset_books(lines: list[str]) -> list[str]:
  """Whole documents: every validation row, and train rows by a draw from the SHA-256 of the id."""
  def keep(row):
    draw = int.from_bytes(hashlib.sha256(row['id'].encode('utf-8')).digest()[:8], 'big') / 2**64
    return row['split'] == 'validation' or draw < BOOKS_TRAIN_SHARE
  return [line for line in lines if keep(json.loads(line))]


def main(argv):
  source, target = argv
  with gzip.open(source, 'rt', encoding='utf-8', newline='\n') as f:
    kept = subset_books(f.read().split('\n')[:-1])
  text = ''.join(line + '\n' for line in kept)
  with open(target, 'wb') as f:
    f.write(gzip.compress(text.encode('utf-8'), compresslevel=9, mtime=0))
  print(f'{target}: {len(kept)} documents, {len(text)} characters')


if __name__ == '__main__':
  main(sys.argv[1:])
