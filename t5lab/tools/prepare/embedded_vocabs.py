"""Trains the embedded vocabularies on the embedded corpora, reproducibly byte for byte.

  python -m t5lab.tools.prepare.embedded_vocabs --size 2048 --out t5lab/data/files/t5lab_2048.model
  python -m t5lab.tools.prepare.embedded_vocabs --measure 1024 2048 4096 8192 16384

For your own files use `t5lab data vocab` (vocabulary.py), which has the same trainer.

Tokens per word of the validation splits (size of the model file in brackets):

                        en      de      fr      es    docs      qa   books
  byte                6.46    7.87    7.00    6.21    6.61    3.92    5.94
  1024 (14 kB)        2.29    3.49    3.20    2.82    3.12    1.95    2.87
  2048 (31 kB)        1.85    2.70    2.55    2.15    2.47    1.58    2.43
  3072 (50 kB)        1.74    2.45    2.25    1.95    2.24    1.47    2.23
  4096 (68 kB)        1.66    2.32    2.12    1.82    2.13    1.40    2.08
  8192 (143 kB)       1.53    2.04    1.84    1.58    1.90    1.30    1.78
  16384 (290 kB)      1.43    1.81    1.69    1.44    1.72    1.23    1.53

Each doubling saves about 15% of the tokens, with no knee. So two are embedded: 2048, where a model
of width 128 spends 0.26 M parameters on its embedding, and 8192, for width 512 and more.
"""
import argparse
import itertools

from t5lab import files
from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.data.tasks import prompts
from t5lab.tools.prepare import vocabulary

CHARACTERS = 550_000  # of a source of weight 1: a small one repeats, a large one is subsampled
# English has four sources, so three count half; German, with the longest words, counts twice.
WEIGHTS = {'en': 1, 'de': 2, 'fr': 1, 'es': 1, 'docs': 0.5, 'qa': 0.5, 'books': 0.5}
MEASURED = 500        # validation texts of a source


def sources(split: str) -> dict[str, list[str]]:
  """Returns {source: texts}, as the tasks present them: with prompts and spaced punctuation."""
  pairs = {'ende': 'ha_ende', 'enfr': 'ha_enfr', 'enes': 'ha_enes'}
  texts = {'en': [prompts.prompt(task, dict(row)) for corpus, task in pairs.items()
                  for row in corpora.load(corpus, split)]}
  for corpus in pairs:
    texts[corpus[2:]] = [row[corpus[2:]] for row in corpora.load(corpus, split)]
  rows = corpora.load('summarize', split)
  texts['docs'] = [text for row in rows
                   for text in (prompts.prompt('docs_summarize', dict(row)), row['summary'])]
  # Many questions share one context: each context counts once.
  contexts = {row['context']: row for row in corpora.load('qa', split)}
  texts['qa'] = [prompts.prompt('numpydoc_qa', dict(row)) for row in contexts.values()]
  texts['books'] = [row['text'] for row in corpora.load('books', split)]
  return texts


def balanced_lines(split: str = 'train') -> list[str]:
  """Returns weight * CHARACTERS characters of lines per source, taken evenly across the source."""
  balanced = []
  for source, texts in sources(split).items():
    lines = vocabulary.split_lines(texts)
    remaining = int(WEIGHTS[source] * CHARACTERS)
    stride = max(1, sum(map(len, lines)) // remaining)
    strided = itertools.chain.from_iterable(lines[i::stride] for i in range(stride))
    for line in itertools.cycle(strided):
      if remaining <= 0:
        break
      balanced.append(line)
      remaining -= len(line)
  return balanced


def tokens_per_word(model: vocab.Vocab) -> dict[str, float]:
  """Returns {source: tokens per word of its validation split}."""
  return {source: vocabulary.measure(model, texts[:MEASURED])['tokens_per_word']
          for source, texts in sources('validation').items()}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', type=int, default=2048,
                      help='number of ids, 100 sentinels included (default: 2048)')
  parser.add_argument('--out', help='the .model file to write')
  parser.add_argument('--measure', type=int, nargs='+', metavar='SIZE',
                      help='print tokens per word by source for these sizes instead')
  args = parser.parse_args(argv)
  lines = balanced_lines()
  if args.measure:
    rates = {'byte': tokens_per_word(vocab.load('byte'))}
    for size in args.measure:
      model = vocabulary.train(lines, size)
      rates[f'{size} ({len(model) / 1e3:.0f} kB)'] = tokens_per_word(
          vocab.sentencepiece_model(f'{size}', model))
    print(' ' * 16 + ''.join(f'{source:>8}' for source in rates['byte']))
    for name, by_source in rates.items():
      print(f'{name:<16}' + ''.join(f'{rate:8.2f}' for rate in by_source.values()))
    return
  if not args.out:
    parser.error('--out FILE.model is needed')
  with files.replacing(args.out) as f:
    f.write(vocabulary.train(lines, args.size))
  print(vocab.load(args.out))


if __name__ == '__main__':
  main()
