"""Adds records: noisy copies, or back-translations.

Every record is kept and its copies follow it. The noise of a copy is drawn from the seed, the
record's text and the number of the copy, so it depends neither on the order of the records nor on
how they are sharded.
"""
from collections.abc import Callable
import itertools
import re

import numpy as np

from t5lab.data.objectives import spans
from t5lab.errors import UsageError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import PrepareJob

CHUNK = 1024                   # records handed to a model at a time
_WORD = re.compile(r'\s*\S+')  # a word is dropped together with the space before it


def word_dropout(text: str, rng: np.random.Generator, rate: float) -> str:
  """Drops each word with probability `rate`, but keeps at least one. [Iyyer et al. 2015]"""
  return _without_words(text, rng.random(len(_WORD.findall(text))) < rate, rng)


def span_deletion(text: str, rng: np.random.Generator, rate: float,
                  mean_span: float) -> str:
  """Deletes round(rate * words) words in spans of `mean_span` words on average; keeps at least one.

  The spans are T5's noise spans without their sentinels [Raffel et al. 2020, 3.1.4], rotated by a
  random number of words, because T5's mask always ends in noise. A single word is left as it is.
  """
  count = len(_WORD.findall(text))
  if count < 2:
    return text
  mask = spans.span_noise_mask(rng, count, rate, mean_span)
  return _without_words(text, np.roll(mask, rng.integers(count)), rng)


def _without_words(text, drop, rng):
  if not drop.any():
    return text
  if drop.all():
    drop[rng.integers(len(drop))] = False
  kept = itertools.compress(_WORD.findall(text), ~drop)
  leading = text[:len(text) - len(text.lstrip())]
  trailing = text[len(text.rstrip()):]
  return leading + ''.join(kept).lstrip() + trailing


def back_translate(records: list[dict], generate: Callable[[list[str]], list[str]], source: str,
                   target: str, *, tag: str = '') -> list[dict]:
  """Returns records with a real target and a generated source. [Sennrich et al. 2016]

  generate: maps a list of targets to a list of sources, in order. tag: put before each generated
  source with a space, e.g. '<BT>', so that a model can tell them apart [Caswell et al. 2019]. A
  record needs no source of its own; other columns are kept.
  """
  texts = generate([record[target] for record in records])
  return [{**record, source: f'{tag} {text}' if tag else text}
          for record, text in zip(records, texts, strict=True)]


NOISE = {'word_dropout': word_dropout, 'span_deletion': span_deletion}
DEFAULTS = {'word_dropout': {'rate': 0.1}, 'span_deletion': {'rate': 0.15, 'mean_span': 3.}}


def run_noise(job: PrepareJob, method: str, *, copies: int = 1, seed: int = 0, **options) -> None:
  """Writes each record and its noisy copies; copies that equal their record are left out."""
  if copies < 1:
    raise UsageError(f'--copies must be at least 1, got {copies}')
  if seed < 0:
    raise UsageError(f'--seed must be at least 0, got {seed}')
  if not 0 < options['rate'] < 1:
    raise UsageError(f'--rate must be a fraction between 0 and 1, got {options["rate"]}')
  if not options.get('mean_span', 1) >= 1:
    raise UsageError(f'--mean-span must be at least 1 word, got {options["mean_span"]}')
  job.settings.update(options)
  job.declare(method, 'unchanged')
  with job.write() as write:
    for record in job.read():
      texts = job.texts(record)
      write(record.fields)
      for copy in range(copies):
        rng = np.random.default_rng([seed, hashes.hash64('\x1f'.join(texts)), copy])
        noisy = [NOISE[method](text, rng, **options) for text in texts]
        if noisy == texts:
          job.count('unchanged', record, texts[0])
          continue
        job.count(method, record, ' | '.join(noisy))
        write({**record.fields, **dict(zip(job.fields, noisy))})


def run_back_translation(job: PrepareJob, generate: Callable[[list[str]], list[str]], source: str,
                         *, tag: str = '') -> None:
  """Back-translates the job's only field, the target, into the column `source`.

  A record that has no source of its own (monolingual text) is not written itself.
  """
  target, = job.fields
  job.declare('back_translation', 'empty')
  with job.write() as write:
    records = job.read()
    while group := list(itertools.islice(records, CHUNK)):
      for record in group:
        if record.fields.get(source):
          write(record.fields)
      translated = back_translate(
          [record.fields for record in group], generate, source, target, tag=tag)
      for record, fields in zip(group, translated):
        text = fields[source].removeprefix(tag).strip()
        rule = 'back_translation' if text else 'empty'
        job.count(rule, record, f'{fields[source]} | {fields[target]}')
        if text:
          write(fields)
