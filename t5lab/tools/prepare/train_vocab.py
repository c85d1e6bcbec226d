"""Trains a sentencepiece vocabulary on the embedded corpora, the same bytes each time.

  python -m t5lab.tools.prepare.train_vocab --size 2048 --out t5lab/data/files/t5lab_2048.model
  python -m t5lab.tools.prepare.train_vocab --measure 1024 2048 4096 8192 16384

Tokens for each word of the validation splits (size of the model file in brackets):

                        en      de      fr      es    docs      qa   books
  byte                6.46    7.87    7.00    6.21    6.61    3.92    5.94
  1024 (14 kB)        2.29    3.49    3.20    2.82    3.12    1.95    2.87
  2048 (31 kB)        1.85    2.70    2.55    2.15    2.47    1.58    2.43
  3072 (50 kB)        1.74    2.45    2.25    1.95    2.24    1.47    2.23
  4096 (68 kB)        1.66    2.32    2.12    1.82    2.13    1.40    2.08
  8192 (143 kB)       1.53    2.04    1.84    1.58    1.90    1.30    1.78
  16384 (290 kB)      1.43    1.81    1.69    1.44    1.72    1.23    1.53

A doubling saves some 15% of the tokens throughout, with no knee. So two ship: 2048, where a model
of width 128 spends 0.26 M parameters on its embedding, and 8192, for width 512 and more.
"""
import argparse
import io
import itertools

import sentencepiece

from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.data.tasks import prompts

CHARACTERS = 550_000  # of a source of share 1: a small one repeats, a large one is thinned out
# English has four sources, so three count half; German, with the longest words, counts twice.
SHARES = {'en': 1, 'de': 2, 'fr': 1, 'es': 1, 'docs': 0.5, 'qa': 0.5, 'books': 0.5}
LINE = 1000  # characters; sentencepiece drops lines over max_sentence_length bytes


def sources(split: str) -> dict[str, list[str]]:
  """Texts by source, as the tasks show them: with prompt and punctuation padding."""
  pairs = {'ende': 'ha_ende', 'enfr': 'ha_enfr', 'enes': 'ha_enes'}
  texts = {'en': [prompts.prompt(task, dict(row)) for corpus, task in pairs.items()
                  for row in corpora.load(corpus, split)]}
  for corpus in pairs:
    texts[corpus[2:]] = [row[corpus[2:]] for row in corpora.load(corpus, split)]
  rows = corpora.load('summarize', split)
  texts['docs'] = [t for row in rows
                   for t in (prompts.prompt('docs_summarize', dict(row)), row['summary'])]
  # Many questions share one context: each context counts once.
  contexts = {row['context']: row for row in corpora.load('qa', split)}
  texts['qa'] = [prompts.prompt('numpydoc_qa', dict(row)) for row in contexts.values()]
  texts['books'] = [row['text'] for row in corpora.load('books', split)]
  return texts


def balanced_lines(split: str = 'train') -> list[str]:
  """Lines of at most LINE characters, share * CHARACTERS of a source, taken evenly across it."""
  lines = []
  for source, texts in sources(split).items():
    cut = [text[i:i + LINE] for text in texts for i in range(0, len(text), LINE)]
    left = int(SHARES[source] * CHARACTERS)
    stride = max(1, sum(map(len, cut)) // left)
    spread = itertools.chain.from_iterable(cut[i::stride] for i in range(stride))
    for line in itertools.cycle(spread):
      if left <= 0:
        break
      lines.append(line)
      left -= len(line)
  return lines


def train(lines: list[str], size: int) -> bytes:
  """Model file of size - 100 pieces (the sentinels are not in the file)."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_writer=model, vocab_size=size - vocab.NUM_SENTINELS,
      model_type='unigram', pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=True,
      character_coverage=0.9999, split_digits=True, max_sentence_length=8 * LINE,
      shuffle_input_sentence=False, num_threads=4, minloglevel=2)
  return model.getvalue()


def tokens_per_word(vocabulary) -> dict[str, float]:
  """Tokens for each whitespace-separated word of the validation split, by source."""
  rates = {}
  for source, texts in sources('validation').items():
    texts = texts[:500]
    words = sum(len(text.split()) for text in texts)
    rates[source] = sum(len(vocabulary.encode(text)) for text in texts) / words
  return rates


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', type=int, default=2048, help='ids in all, 100 sentinels included')
  parser.add_argument('--out', help='the .model file to write')
  parser.add_argument('--measure', type=int, nargs='+', metavar='SIZE',
                      help='print tokens per word by source for these sizes instead')
  args = parser.parse_args(argv)
  lines = balanced_lines()
  if args.measure:
    rows = {'byte': tokens_per_word(vocab.load('byte'))}
    for size in args.measure:
      model = train(lines, size)
      rows[f'{size} ({len(model) / 1e3:.0f} kB)'] = tokens_per_word(
          vocab.sentencepiece_model(f'{size}', model))
    print(' ' * 16 + ''.join(f'{source:>8}' for source in rows['byte']))
    for name, rates in rows.items():
      print(f'{name:<16}' + ''.join(f'{rate:8.2f}' for rate in rates.values()))
    return
  if not args.out:
    parser.error('--out FILE.model is needed')
  with open(args.out, 'wb') as f:
    f.write(train(lines, args.size))
  print(vocab.load(args.out))


if __name__ == '__main__':
  main()
