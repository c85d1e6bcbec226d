"""Finds training records that overlap with evaluation data. [Brown et al. 2020, appendix C]

Two texts overlap if they share 13 consecutive words (letters and digits only, case folded). For an
evaluation text of 8 to 12 words, 8 consecutive words are enough; a shorter one must be equal to the
whole training text. Brown et al. choose one length of 8 to 13 words per evaluation and ignore
overlaps with more than 10 training documents; here all are reported.

Memory: 12 bytes per word of the evaluations, nothing for the training records.
"""
from collections.abc import Sequence
import contextlib

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import PrepareJob, excerpt, location

NGRAM, SHORT = 13, 8
LISTED = 1000                  # records of each kind in the report; the counts are of all
SHOWN_MATCHES = 5              # evaluation records listed for one training record


class EvalSet:
  """An evaluation split, indexed by n-grams.

  size: records added so far. hit: bool[size], the records that overlapped with a text so far.
  """

  def __init__(self, ngram: int = NGRAM, short: int = SHORT):
    self.short = short
    self._tables = {n: hashes.Table() for n in (ngram, short, 0)}      # 0: of whole texts
    self.size, self._locations, self._hit = 0, [], bytearray()

  @property
  def hit(self) -> np.ndarray:
    return np.frombuffer(self._hit, bool)

  def add(self, texts: Sequence[str], location: str | None = None) -> None:
    """Adds one record."""
    for text in texts:
      words = hashes.hash_all(hashes.words(text))
      if len(words):
        n = next(n for n in self._tables if n <= len(words))
        self._tables[n].add(hashes.ngrams(words, n or len(words)), self.size)
    self.size += 1
    self._hit.append(False)
    if location and self.size <= LISTED * 100:
      self._locations.append(location)

  def settle(self) -> None:
    """Makes look-ups fast, once all records are added."""
    for table in self._tables.values():
      table.settle()

  def overlap(self, text: str) -> tuple[list[int], str] | None:
    """Returns (numbers of the overlapping records, the first shared words), or None."""
    words = hashes.words(text)
    word_hashes = hashes.hash_all(words)
    sizes = [0] if 0 < len(words) < self.short else [n for n in self._tables if n]
    numbers, shared = set(), None
    for size in sizes:
      n, table = size or len(words), self._tables[size]
      keys = hashes.ngrams(word_hashes, n)
      matches = np.flatnonzero(table.contains(keys))
      if not len(matches):
        continue
      numbers.update(table.values(keys[matches]).tolist())
      if shared is None:
        shared = ' '.join(words[matches[0]:matches[0] + n])
    for i in numbers:
      self._hit[i] = True
    return (sorted(numbers), shared) if numbers else None

  def location(self, number: int) -> str:
    if number < len(self._locations):
      return self._locations[number]
    return f'row {number + 1}'

  def summary(self) -> dict:
    return {'rows': self.size, 'found_in_training': int(self.hit.sum()),
            'share': round(float(self.hit.mean()), 6) if self.size else 0.,
            'rows_found': list(map(self.location, np.flatnonzero(self.hit)[:LISTED].tolist()))}


def run(job: PrepareJob, against: dict[str, Sequence[str]], *, fields: Sequence[str] = (),
        drop: bool = True, ngram: int = NGRAM, short: int = SHORT) -> None:
  """Looks up every text of the job's records in every evaluation.

  against: name -> files. fields: columns of the evaluations that hold text or lists of texts;
  default: the job's. Every field is compared with all fields of an evaluation: an input also with
  its targets. drop: write the records without overlap; otherwise only the report is written.
  """
  if not 1 <= short <= ngram:
    raise UsageError(f'--short must be between 1 and the {ngram} words of --ngram, got {short}')
  fields = tuple(fields) or job.fields
  eval_sets = {}
  for name, files in against.items():
    eval_set = eval_sets[name] = EvalSet(ngram, short)
    for record in job.read_others(f'reading {name}', files, fields):
      texts = []
      for field in fields:
        value = record.fields[field]
        texts += [value] if isinstance(value, str) else value
      eval_set.add(texts, location(record))
    eval_set.settle()

  job.declare(*eval_sets)
  listed = {name: [] for name in eval_sets}
  job.counts['contaminated'] = 0
  if drop:
    job.counts['dropped'] = 0
  with job.write() if drop else contextlib.nullcontext() as write:
    for record in job.read():
      overlaps = False
      for name, eval_set in eval_sets.items():
        matches = [match for text in job.texts(record) if (match := eval_set.overlap(text))]
        if not matches:
          continue
        overlaps = True
        shared = matches[0][1]
        job.count(name, record, shared)
        if len(listed[name]) < LISTED:
          numbers = sorted({number for numbers, _ in matches for number in numbers})
          listed[name].append({
              'row': location(record),
              'evaluation': list(map(eval_set.location, numbers[:SHOWN_MATCHES])),
              'words': excerpt(shared)})
      job.counts['contaminated'] += overlaps
      if drop and not overlaps:
        write(record.fields)
    if drop:
      job.counts['dropped'] = job.counts['contaminated']
    job.extra['evaluations'] = {
        name: {**eval_set.summary(), 'training_rows': job.rules[name]['count'],
               'listed': listed[name]}
        for name, eval_set in eval_sets.items()}
  if not drop:
    job.finish()
