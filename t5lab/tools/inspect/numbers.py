"""What a model will see of its data, in numbers: lengths, cuts, repeats, and what a mixture draws.

Dictionaries of plain numbers, as JSON has them. A share is {'count', 'of', 'share'}. Whatever needs
the tokens is counted over a random sample of a task's examples, or all where there are no more:
'sampled' says how many. Repeats are those inside the sample, so of a large cache the least there
are. Lengths of stored examples are all of them; what an objective makes is measured on the sample,
as epoch 0 draws it. Nothing grows with the data but the lengths, 4 bytes a feature of an example.
"""
from collections.abc import Callable, Sequence
import hashlib

import numpy as np

from t5lab.data.batches import features
from t5lab.data.batches.pipeline import lengths_of

SAMPLE = 20_000                   # examples
ROWS = 500                        # packed rows that are built and counted
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BARS = 40                         # of a histogram
TOKENS = ('inputs', 'targets', 'first', 'second')    # stored features that hold a vocabulary's ids


def share(count, of) -> dict:
  """Example: share(1, 4) -> {'count': 1, 'of': 4, 'share': 0.25}. Of nothing it is 0."""
  return {'count': int(count), 'of': int(of), 'share': float(count) / float(of) if of else 0.}


def sample(count: int, most: int, rng: np.random.Generator) -> list[int]:
  """`most` of range(count) in order, each once and all equally likely; all if there are no more."""
  if count <= most:
    return list(range(count))
  return sorted(map(int, rng.choice(count, most, replace=False, shuffle=False)))


def token_features(example: features.Example, form: str) -> list[str]:
  """The features of a stored example that are ids of the vocabulary: a class is none."""
  return [name for name in TOKENS if name in example and (form, name) != ('classes', 'targets')]


def decodable(vocab, feature: str) -> bool:
  """False of inputs that are of another table than targets: Vocab.decode knows the targets'."""
  return vocab.target_encoder is None or feature == 'targets'


def unknown_id(vocab) -> int | None:
  """The id that says 'unknown'; None where there is none: GPT-2's files name its end as that."""
  marks = (vocab.eos_id, vocab.bos_id, vocab.cls_id, vocab.sep_id)
  return None if vocab.unk_id in marks else vocab.unk_id


def task_numbers(rows, vocab, rng: np.random.Generator, *, form: str = 'inputs',
                 most: int = SAMPLE, tick: Callable[[int, int], None] = lambda done, of: None
                 ) -> dict:
  """One task's numbers. rows: its part of Pipeline.rows; form: pipeline.form_of its examples.

  lengths {feature: see length_numbers}; truncated: the share of 'examples' that is over a limit
  and of 'tokens' beyond; unknown: of the stored tokens; duplicates: examples equal to an earlier
  one in all features; contradictions: examples whose inputs also stand with other targets, None
  where an objective makes them or there are no such pairs; slots: see slot_numbers.
  tick(done, of) is called after each example.
  """
  chosen = sample(len(rows.examples), most, rng)
  repeats, made, unknown, tokens, unk = _Repeats(), [], 0, 0, unknown_id(vocab)
  for done, i in enumerate(chosen, start=1):
    example = rows.examples[i]
    repeats.add(example)
    for name in token_features(example, form):
      tokens += len(example[name])
      if unk is not None:
        unknown += int(np.count_nonzero(np.asarray(example[name]) == unk))
    if rows.objective is not None:
      made.append({name: len(x) for name, x in rows.uncut(0, i).items()})
    tick(done, len(chosen))
  found = lengths_of(rows.examples) if rows.objective is None else {
      name: np.array([sizes[name] for sizes in made]) for name in made[0]}
  limits = {name: rows.lengths[name] for name in found
            if name in rows.lengths and (form, name) != ('classes', 'targets')}
  if 'weights' in found:           # features that stand position by position are cut as one
    limits = {'inputs': rows.lengths['inputs']}
  over = {name: np.maximum(found[name] - limit, 0) for name, limit in limits.items()}
  measured = len(next(iter(found.values())))
  pairs = rows.objective is None and {'inputs', 'targets'} <= set(found) and 'weights' not in found
  return {
      'examples': len(rows.examples), 'rows': rows.count, 'sampled': len(chosen),
      'objective': repr(rows.objective) if rows.objective is not None else None,
      'lengths': {name: length_numbers(found[name], limit) for name, limit in limits.items()},
      'truncated': {
          'examples': share(np.count_nonzero(np.any(list(over.values()), axis=0)), measured),
          'tokens': share(sum(x.sum() for x in over.values()),
                          sum(int(found[name].sum()) for name in limits))},
      'unknown': share(unknown, tokens),
      'duplicates': share(repeats.duplicates, len(chosen)),
      'contradictions': share(repeats.contradictions(), len(chosen)) if pairs else None,
      'slots': slot_numbers(rows, rng)}


class _Repeats:
  """Counts equal examples by 16 bytes of their hash, in memory that grows with the examples."""

  def __init__(self):
    self.duplicates = 0
    self._seen: set[bytes] = set()
    self._targets: dict[bytes, list] = {}     # inputs -> [targets of the first, examples, differ]

  def add(self, example):
    key = _digest(example, sorted(example))
    self.duplicates += key in self._seen
    self._seen.add(key)
    if 'inputs' in example and 'targets' in example:
      targets = _digest(example, ['targets'])
      entry = self._targets.setdefault(_digest(example, ['inputs']), [targets, 0, False])
      entry[1] += 1
      entry[2] |= entry[0] != targets

  def contradictions(self) -> int:
    return sum(count for _, count, differ in self._targets.values() if differ)


def _digest(example, names) -> bytes:
  digest = hashlib.blake2b(digest_size=16)
  for name in names:
    digest.update(f'{name} {len(example[name])} '.encode())
    digest.update(np.ascontiguousarray(example[name], np.int32))
  return digest.digest()


def length_numbers(lengths: np.ndarray, limit: int) -> dict:
  """int[n] lengths in tokens, not cut -> their percentiles, mean, sum and histogram.

  A percentile is the least length that so many hundredths do not exceed [Hyndman & Fan 1996, 1].
  histogram: {'first', 'width', 'counts', 'open'}: counts[k] have a length in [first + k width,
  first + (k + 1) width), and no bar spans the limit; the last bar also holds the longer ones where
  'open', so that a few do not squeeze the rest.
  """
  values = np.percentile(lengths, PERCENTILES, method='inverted_cdf')
  longest = int(lengths.max())
  shown = min(longest, int(1.25 * max(limit, values[-1])))
  width = shown // BARS + 1
  first = -(-(limit + 1) % width)
  last = (shown - first) // width
  counts = np.bincount(np.minimum((lengths - first) // width, last), minlength=last + 1)
  return {'limit': limit, 'measured': len(lengths), 'mean': float(np.mean(lengths)),
          'tokens': int(np.sum(lengths)),
          'percentiles': {**{str(p): int(v) for p, v in zip(PERCENTILES, values)}, 'max': longest},
          'histogram': {'first': first, 'width': width, 'counts': counts.tolist(),
                        'open': longest >= first + (last + 1) * width}}


def slot_numbers(rows, rng: np.random.Generator) -> dict:
  """What packed rows hold: 'a_row' slots, means of 'tokens' and of 'loss' (those that are
  predicted) a row, the share of slots 'filled', over so many 'measured' rows of epoch 0.

  Where no objective draws, tokens are of all rows. Of a cache in blocks, what is measured are the
  epoch's first rows, whose block is itself a sample.
  """
  if rows.blocks == 1:
    chosen = sample(rows.count, ROWS, rng)
  else:
    chosen = range(min(ROWS, rows.count))
  slots = tokens = loss = 0
  for i in chosen:
    row = rows.row(0, i)
    ids = [x for name, x in row.items() if name.endswith('_segment_ids')]
    slots += sum(len(x) for x in ids)
    tokens += sum(int(np.count_nonzero(x)) for x in ids)
    loss += sum(int(np.count_nonzero(x)) for name, x in row.items()
                if name.endswith('_loss_weights'))
  n = len(chosen)
  filled = tokens / slots if rows.objective is not None else float(rows.fill)
  return {'measured': n, 'a_row': slots // n, 'tokens': filled * slots / n, 'loss': loss / n,
          'filled': filled}


def mixture_numbers(rates: Sequence[float], tasks: dict[str, dict], *, batch_size: int,
                    total_steps: int) -> dict:
  """What a run draws of tasks {name: task_numbers}, in the order of their rates.

  tasks {name: rate, rows: share of the rows of a step, tokens: of its real tokens, epochs: of this
  task over the run, steps_an_epoch}; a_step {rows, slots, tokens, loss, padding: share of slots};
  run {steps, tokens, loss}. A rate counts examples, so a task whose rows hold more of them has
  fewer rows.
  """
  weights = np.array([rate * t['rows'] / t['examples'] for rate, t in zip(rates, tasks.values())])
  rows = weights / weights.sum()
  of = lambda key: np.array([t['slots'][key] for t in tasks.values()])
  tokens = rows * of('tokens')
  counts = np.array([t['rows'] for t in tasks.values()])
  slots = int(of('a_row')[0])                        # lengths are the mixture's: rows are alike
  a_step = {'rows': batch_size, 'slots': batch_size * slots,
            'tokens': batch_size * float(tokens.sum()),
            'loss': batch_size * float((rows * of('loss')).sum()),
            'padding': 1 - float(tokens.sum()) / slots}
  return {
      'tasks': {name: {'rate': float(rate / sum(rates)), 'rows': float(r), 'tokens': float(t),
                       'epochs': float(total_steps * batch_size * r / count),
                       'steps_an_epoch': float(count / (batch_size * r)) if r else None}
                for name, rate, r, t, count in zip(tasks, rates, rows, tokens / tokens.sum(),
                                                   counts)},
      'steps_an_epoch': float(counts.sum() / batch_size), 'a_step': a_step,
      'run': {'steps': total_steps, 'tokens': total_steps * a_step['tokens'],
              'loss': total_steps * a_step['loss']}}
