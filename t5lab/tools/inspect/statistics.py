"""Statistics of the data that a model will see: lengths, cuts, repeats, and what a mixture draws.

Everything is a dict of plain numbers, ready for JSON. A share is {'count', 'of', 'share'}. Counts
that need the tokens are taken over a random sample of a task's examples, whose size is 'sampled';
repeats are those within the sample, so for a large cache they are a lower bound. Lengths of stored
examples cover all of them; the output of an objective is measured on the sample, as epoch 0 draws
it. Memory grows with the data only by 4 bytes per length.
"""
import collections
from collections.abc import Callable, Sequence
import hashlib

import numpy as np

from t5lab.data.batches import features

SAMPLE = 20_000                   # examples
ROWS = 500                        # packed rows that are built and counted
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BARS = 40                         # of a histogram
TOKENS = ('inputs', 'targets', 'first', 'second')    # stored features that hold token ids


def share(count, of) -> dict:
  """Example: share(1, 4) -> {'count': 1, 'of': 4, 'share': 0.25}; the share is 0 if `of` is 0."""
  return {'count': int(count), 'of': int(of), 'share': float(count) / float(of) if of else 0.}


def sample(count: int, size: int, rng: np.random.Generator) -> list[int]:
  """Returns `size` members of range(count), sorted, without replacement; at most all of them."""
  if count <= size:
    return list(range(count))
  return sorted(map(int, rng.choice(count, size, replace=False, shuffle=False)))


def token_features(example: features.Example, form: str) -> list[str]:
  """Returns the features of a stored example that hold token ids (a class is not one)."""
  return [name for name in TOKENS if name in example and (form, name) != ('classes', 'targets')]


def decodable(vocab, feature: str) -> bool:
  """Returns False for inputs with a table of their own: Vocab.decode uses the targets' table."""
  return vocab.target_encoder is None or feature == 'targets'


def unknown_id(vocab) -> int | None:
  """Returns the id of unknown text, or None. GPT-2's files give the end of text as unknown."""
  special = (vocab.eos_id, vocab.bos_id, vocab.cls_id, vocab.sep_id)
  return None if vocab.unk_id in special else vocab.unk_id


def task_statistics(rows, vocab, rng: np.random.Generator, *, form: str = 'inputs',
                    size: int = SAMPLE, tick: Callable[[int], None] = lambda count: None) -> dict:
  """Returns the statistics of one task.

  rows: the task's member of Pipeline.rows. form: task_rows.form_of its examples. size: of the
  sample. tick(count) is called with 1 after each example.

  lengths: {feature: length_statistics}; truncated: the shares of 'examples' over a limit and of
  'tokens' beyond it; unknown: a share of the stored tokens; duplicates: examples equal to an
  earlier one in all features; contradictions: examples whose inputs also occur with other targets,
  None if an objective makes them or there are no such pairs; slots: see slot_statistics.
  """
  # Look at each sampled example once.
  chosen = sample(len(rows.examples), size, rng)
  drawn_lengths = collections.defaultdict(list)
  digests = set()
  targets_of = collections.defaultdict(list)       # digests, of the inputs
  tokens = unknown = 0
  unk_id = unknown_id(vocab)
  for i in chosen:
    example = rows.examples[i]
    digests.add(_digest(example, sorted(example)))
    if 'inputs' in example and 'targets' in example:
      targets_of[_digest(example, ['inputs'])].append(_digest(example, ['targets']))
    for name in token_features(example, form):
      tokens += len(example[name])
      if unk_id is not None:
        unknown += int(np.count_nonzero(np.asarray(example[name]) == unk_id))
    if rows.objective is not None:
      for name, x in rows.uncut(0, i).items():
        drawn_lengths[name].append(len(x))
    tick(1)

  # Lengths of each feature, and the limits that cut them.
  if rows.objective is None:
    lengths = rows.examples.lengths
  else:
    lengths = {name: np.array(drawn) for name, drawn in drawn_lengths.items()}
  if 'weights' in lengths:         # features aligned by position are cut as one
    limits = {'inputs': rows.lengths['inputs']}
  else:
    limits = {name: rows.lengths[name] for name in lengths
              if name in rows.lengths and (form, name) != ('classes', 'targets')}
  excess = {name: np.maximum(lengths[name] - limit, 0) for name, limit in limits.items()}
  measured = len(next(iter(lengths.values())))

  contradictions = None
  if rows.objective is None and 'weights' not in lengths and {'inputs', 'targets'} <= set(lengths):
    contradictions = share(
        sum(len(targets) for targets in targets_of.values() if len(set(targets)) > 1), len(chosen))
  return {
      'examples': len(rows.examples), 'rows': rows.count, 'sampled': len(chosen),
      'objective': repr(rows.objective) if rows.objective is not None else None,
      'lengths': {name: length_statistics(lengths[name], limit) for name, limit in limits.items()},
      'truncated': {
          'examples': share(np.count_nonzero(np.any(list(excess.values()), axis=0)), measured),
          'tokens': share(sum(x.sum() for x in excess.values()),
                          sum(int(lengths[name].sum()) for name in limits))},
      'unknown': share(unknown, tokens),
      'duplicates': share(len(chosen) - len(digests), len(chosen)),
      'contradictions': contradictions,
      'slots': slot_statistics(rows, rng)}


def _digest(example, names) -> bytes:
  """16 bytes that stand for these features of an example."""
  digest = hashlib.blake2b(digest_size=16)
  for name in names:
    digest.update(f'{name} {len(example[name])} '.encode())
    digest.update(np.ascontiguousarray(example[name], np.int32))
  return digest.digest()


def length_statistics(lengths: np.ndarray, limit: int) -> dict:
  """Returns percentiles, mean, sum and histogram of int[n] lengths in tokens before cutting.

  A percentile p is the smallest length that at least p % do not exceed [Hyndman & Fan 1996, 1].
  histogram: {'first', 'width', 'counts', 'open'}. counts[k] is the number of lengths in [first +
  k width, first + (k + 1) width), and no bar straddles the limit. If 'open', the last bar also
  holds all longer lengths, so that a few outliers do not squeeze the rest.
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


def slot_statistics(rows, rng: np.random.Generator) -> dict:
  """Returns what packed rows hold, over 'measured' rows of epoch 0.

  'a_row': slots per row; 'tokens' and 'loss': mean tokens and mean predicted tokens per row;
  'filled': share of slots that hold tokens. Without an objective, tokens are counted over all rows.
  For a cache in blocks the epoch's first rows are measured, whose block is a sample itself.
  """
  if rows.blocks == 1:
    chosen = sample(rows.count, ROWS, rng)
  else:
    chosen = range(min(ROWS, rows.count))
  slots = tokens = loss = 0
  for i in chosen:
    for name, values in rows.row(0, i).items():
      if name.endswith('_segment_ids'):
        slots += len(values)
        tokens += int(np.count_nonzero(values))
      elif name.endswith('_loss_weights'):
        loss += int(np.count_nonzero(values))
  n = len(chosen)
  filled = tokens / slots if rows.objective is not None else float(rows.fill)
  return {'measured': n, 'a_row': slots // n, 'tokens': filled * slots / n, 'loss': loss / n,
          'filled': filled}


def mixture_statistics(rates: Sequence[float], tasks: dict[str, dict], *, batch_size: int,
                       total_steps: int) -> dict:
  """Returns what a run draws from tasks {name: task_statistics}, in the order of their rates.

  tasks: {name: {rate, rows: share of the rows of a step, tokens: share of its tokens, epochs: of
  this task in the run, steps_an_epoch}}; a_step: {rows, slots, tokens, loss, padding: share of
  slots}; run: {steps, tokens, loss}. A rate counts examples, so a task with more examples per row
  has fewer rows.
  """
  def per_row(key):
    return np.array([task['slots'][key] for task in tasks.values()])

  weights = np.array([rate * task['rows'] / task['examples']
                      for rate, task in zip(rates, tasks.values())])
  rows = weights / weights.sum()
  tokens = rows * per_row('tokens')
  slots = int(per_row('a_row')[0])         # the lengths are the mixture's: all rows are equal
  a_step = {'rows': batch_size, 'slots': batch_size * slots,
            'tokens': batch_size * float(tokens.sum()),
            'loss': batch_size * float((rows * per_row('loss')).sum()),
            'padding': 1 - float(tokens.sum()) / slots}
  by_task = {}
  for (name, task), rate, row_share, token_share in zip(
      tasks.items(), rates, rows.tolist(), (tokens / tokens.sum()).tolist()):
    by_task[name] = {
        'rate': float(rate / sum(rates)), 'rows': row_share, 'tokens': token_share,
        'epochs': total_steps * batch_size * row_share / task['rows'],
        'steps_an_epoch': task['rows'] / (batch_size * row_share) if row_share else None}
  return {
      'tasks': by_task,
      'steps_an_epoch': float(sum(task['rows'] for task in tasks.values()) / batch_size),
      'a_step': a_step,
      'run': {'steps': total_steps, 'tokens': total_steps * a_step['tokens'],
              'loss': total_steps * a_step['loss']}}
