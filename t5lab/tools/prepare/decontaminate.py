"""Training rows that hold what an evaluation asks. [Brown et al. 2020, appendix C]

Two texts overlap when they have 13 words in a row in common, letters and digits only, case folded.
An evaluation text of 8 to 12 words is found by any 8 of its words in a row; a shorter one only by a
training text of the same words and no others. Brown et al. choose one length of 8 to 13 for each
evaluation, and pass over what over 10 training documents have; we report all.

Memory: 12 bytes for each word of the evaluations, nothing for the training rows.
"""
from collections.abc import Sequence

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import Job, shorten, where

NGRAM, SHORT = 13, 8
LISTED = 1000                  # rows of each kind in the report; the counts are of all


class Evaluation:
  """One evaluation split, to be looked up in. rows: as many as were added; hit: bool[rows]."""

  def __init__(self, ngram: int = NGRAM, short: int = SHORT):
    self.ngram, self.short = ngram, short
    self._grams, self._texts = {n: hashes.Table() for n in {ngram, short}}, hashes.Table()
    self.rows, self.places, self._hit = 0, [], bytearray()

  @property
  def hit(self) -> np.ndarray:
    return np.frombuffer(self._hit, bool)

  def add(self, texts: Sequence[str]) -> None:
    for text in texts:
      numbers = hashes.hash_all(hashes.words(text))
      if len(numbers) >= self.short:
        n = self.ngram if len(numbers) >= self.ngram else self.short
        self._grams[n].add(hashes.ngrams(numbers, n), self.rows)
      elif len(numbers):
        self._texts.add(hashes.ngrams(numbers, len(numbers)), self.rows)
    self.rows += 1
    self._hit.append(False)

  def settle(self) -> None:
    for table in (*self._grams.values(), self._texts):
      table.settle()

  def overlap(self, text: str) -> tuple[list[int], str] | None:
    """(numbers of the evaluation rows, the words in common that stand first), or None."""
    words = hashes.words(text)
    numbers = hashes.hash_all(words)
    found, common = set(), None
    looked_up = [(n, self._grams[n]) for n in sorted(self._grams, reverse=True)]
    if 0 < len(words) < self.short:
      looked_up = [(len(words), self._texts)]
    for n, table in looked_up:
      keys = hashes.ngrams(numbers, n)
      at = np.flatnonzero(table.contains(keys))
      if len(at):
        found.update(table.values(keys[at]).tolist())
        if common is None:
          common = ' '.join(words[at[0]:at[0] + n])
    for i in found:
      self._hit[i] = True
    return (sorted(found), common) if found else None


def run(job: Job, against: dict[str, Sequence[str]], *, fields: Sequence[str] = (),
        drop: bool = True, ngram: int = NGRAM, short: int = SHORT) -> None:
  """Looks every text of the job's rows up in every evaluation.

  against: name -> files. fields: their columns, of text or lists of texts; else the job's. drop:
  writes the rows that overlap with none; otherwise the report is all that is written. Each field by
  itself is looked up in all fields: an input in the evaluation's targets too.
  """
  if not 1 <= short <= ngram:
    raise UsageError(f'--short {short}: at least 1, at most the {ngram} words of --ngram')
  fields = tuple(fields) or job.fields
  evaluations = {}
  for name, files in against.items():
    evaluations[name] = Evaluation(ngram, short)
    for row in job.read_others(f'reading {name}', files, fields):
      evaluations[name].add([text for field in fields for text in several(row.fields[field])])
      if evaluations[name].rows <= LISTED * 100:
        evaluations[name].places.append((row.file, row.line))
    evaluations[name].settle()
    job.count(name, by=0)
  listed = {name: [] for name in evaluations}
  job.counts['contaminated'] = 0

  def clean_rows():
    for row in job.read():
      contaminated = False
      for name, evaluation in evaluations.items():
        found = [hit for text in job.texts(row) if (hit := evaluation.overlap(text))]
        if not found:
          continue
        contaminated = True
        job.count(name, row, found[0][1])
        if len(listed[name]) < LISTED:
          places = [place(evaluation, i) for i in sorted({i for hit in found for i in hit[0]})]
          listed[name].append({'row': where(row), 'evaluation': places[:5],
                               'words': shorten(found[0][1])})
      job.counts['contaminated'] += contaminated
      if not contaminated:
        yield row

  def summary():
    job.more['evaluations'] = {
        name: {'rows': e.rows, 'found_in_training': int(e.hit.sum()),
               'share': round(float(e.hit.mean()), 6) if e.rows else 0.,
               'rows_found': [place(e, i) for i in np.flatnonzero(e.hit)[:LISTED].tolist()],
               'training_rows': job.rules[name]['count'], 'listed': listed[name]}
        for name, e in evaluations.items()}

  if not drop:
    for _ in clean_rows():
      pass
    summary()
    job.finish()
    return
  job.counts['dropped'] = 0
  with job.write() as write:
    for row in clean_rows():
      write(row.fields)
    job.counts['dropped'] = job.counts['contaminated']
    summary()


def several(value: str | list[str]) -> list[str]:
  return [value] if isinstance(value, str) else value


def place(evaluation: Evaluation, number: int) -> str:
  if number < len(evaluation.places):
    return '{}:{}'.format(*evaluation.places[number])
  return f'row {number + 1}'
