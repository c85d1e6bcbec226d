"""More rows of the rows there are: noise, and back-translation.

Each row stays, and its copies follow it. A copy's noise comes from the seed, the row's text and the
copy's number, so it is the same in any order of the rows and in any shard.
"""
from collections.abc import Callable, Iterable, Iterator
import itertools
import re

import numpy as np

from t5lab.data.objectives import spans as objectives
from t5lab.errors import UsageError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import Job

BATCH = 1024                   # rows handed to a model at a time
_WORD = re.compile(r'\s*\S+')  # a word goes with the space before it


def row_rng(seed: int, texts: Iterable[str], copy: int) -> np.random.Generator:
  """The randomness of one copy of a row."""
  return np.random.default_rng([seed, hashes.hash64('\x1f'.join(texts)), copy])


def word_dropout(text: str, rng: np.random.Generator, rate: float) -> str:
  """Each word goes with probability `rate`; one stays at least. [Iyyer et al. 2015]"""
  return _without(text, rng.random(len(_WORD.findall(text))) < rate, rng)


def span_deletion(text: str, rng: np.random.Generator, rate: float,
                  mean_span: float) -> str:
  """round(rate * words) words go, in spans of `mean_span` words on average; one stays at least.

  T5's noise spans without their sentinels [Raffel et al. 2020, 3.1.4], turned round by a random
  number of words, as otherwise the last word always went. A text of one word stays as it is.
  """
  count = len(_WORD.findall(text))
  if count < 2:
    return text
  mask = objectives.span_noise_mask(rng, count, rate, mean_span)
  return _without(text, np.roll(mask, rng.integers(count)), rng)


def _without(text, gone, rng):
  if not gone.any():
    return text
  if gone.all():
    gone[rng.integers(len(gone))] = False
  words = _WORD.findall(text)
  kept = [word for word, goes in zip(words, gone) if not goes]
  lead = text[:len(text) - len(text.lstrip())]
  return lead + ''.join(kept).lstrip() + text[len(text.rstrip()):]


def back_translate(rows: Iterable[dict], generate: Callable[[list[str]], list[str]], source: str,
                   target: str, *, tag: str = '', batch: int = BATCH) -> Iterator[dict]:
  """Rows with a true target and a made source. [Sennrich et al. 2016]

  generate: of a model from targets to sources, texts -> texts, in order. tag: put before the made
  source and a space, as '<BT>', so that the model can tell them [Caswell et al. 2019]. A row needs
  no source of its own; its other columns are carried along.
  """
  for part in batches(rows, batch):
    made = generate([row[target] for row in part])
    for row, text in zip(part, made, strict=True):
      yield {**row, source: f'{tag} {text}' if tag else text}


def batches(rows: Iterable, size: int) -> Iterator[list]:
  rows = iter(rows)
  while part := list(itertools.islice(rows, size)):
    yield part


NOISE = {'word_dropout': word_dropout, 'span_deletion': span_deletion}
DEFAULTS = {'word_dropout': {'rate': 0.1}, 'span_deletion': {'rate': 0.15, 'mean_span': 3.}}


def run_noise(job: Job, method: str, *, copies: int = 1, seed: int = 0, **options) -> None:
  """Noise on the job's fields; copies equal to their row are not written."""
  if copies < 1:
    raise UsageError(f'--copies {copies}: at least 1')
  if seed < 0:
    raise UsageError(f'--seed {seed}: at least 0')
  if not 0 < options['rate'] < 1:
    raise UsageError(f'--rate {options["rate"]}: a share between 0 and 1')
  if not options.get('mean_span', 1) >= 1:
    raise UsageError(f'--mean-span {options["mean_span"]}: at least 1 word')
  job.settings.update(options)
  job.count(method, by=0)
  job.count('unchanged', by=0)
  with job.write() as write:
    for row in job.read():
      texts = job.texts(row)
      write(row.fields)
      for copy in range(copies):
        rng = row_rng(seed, texts, copy)
        noisy = [NOISE[method](text, rng, **options) for text in texts]
        if noisy == texts:
          job.count('unchanged', row, texts[0])
          continue
        job.count(method, row, ' | '.join(noisy))
        write({**row.fields, **dict(zip(job.fields, noisy))})


def run_back_translation(job: Job, generate: Callable[[list[str]], list[str]], source: str, *,
                         tag: str = '') -> None:
  """Back-translation of the job's one field, the target; the source column is `source`.

  A row without a source of its own (monolingual text) is not written, only what is made of it.
  """
  target, = job.fields
  job.count('back_translation', by=0)
  job.count('empty', by=0)
  with job.write() as write:
    for part in batches(job.read(), BATCH):
      for row in part:
        job.texts(row)
        if row.fields.get(source):
          write(row.fields)
      made = back_translate((row.fields for row in part), generate, source, target, tag=tag)
      for row, fields in zip(part, made):
        text = fields[source].removeprefix(tag).strip()
        job.count('back_translation' if text else 'empty', row,
                  f'{fields[source]} | {fields[target]}')
        if text:
          write(fields)
