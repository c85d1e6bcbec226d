"""Token lists -> one row of seqio's standard model features, several examples to a row if packed.

Encoder-decoder, from {'inputs', 'targets'}:
  encoder_input_tokens, encoder_segment_ids, encoder_positions            int32[inputs length]
  decoder_input_tokens, decoder_target_tokens, decoder_segment_ids,
  decoder_positions, decoder_loss_weights                                 int32[targets length]
Decoder-only: the decoder features alone; inputs stand before targets and carry no loss.

Segment ids start at 1, 0 is padding: they, and not the value of a token, say what is real, so a
vocabulary may use id 0, and an example may have an empty feature (seqio's packing breaks on both).
"""

from collections.abc import Sequence

import numpy as np

from t5lab.data.vocab import EOS

Example = dict[str, np.ndarray]   # 'inputs' and 'targets', or 'targets' alone; int32[any length]
BOS = 0                           # T5 starts the decoder with the padding id


def trim(example: Example, lengths: dict[str, int]) -> tuple[Example, int]:
  """Cuts features to `lengths` -> (example, tokens lost). A feature that ended in EOS still does.

  Example: trim({'targets': [5, 6, 7, 1]}, {'targets': 3}) -> {'targets': [5, 6, 1]}, 1 lost.
  """
  lost, out = 0, {}
  for name, tokens in example.items():
    limit = lengths[name]
    if len(tokens) > limit:
      lost += len(tokens) - limit
      ended = tokens[-1] == EOS
      tokens = tokens[:limit]
      if ended:
        tokens = np.concatenate([tokens[:-1], np.array([EOS], tokens.dtype)])
    out[name] = tokens
  return out, lost


def row_lengths(lengths: dict[str, int], decoder_only: bool) -> dict[str, int]:
  """Features of a row -> how many tokens it holds of each; decoder-only has one sequence."""
  if decoder_only:
    return {'targets': lengths.get('inputs', 0) + lengths['targets']}
  return {'inputs': lengths['inputs'], 'targets': lengths['targets']}


def row_sizes(sizes: dict[str, int], decoder_only: bool) -> dict[str, int]:
  """Tokens of an example's features -> the tokens that it takes of a row's sequences."""
  if decoder_only:
    return {'targets': sum(sizes.values())}
  return {'inputs': sizes.get('inputs', 0), 'targets': sizes['targets']}


def build_row(examples: Sequence[Example], lengths: dict[str, int], *,
              decoder_only: bool) -> dict[str, np.ndarray]:
  """One row of `row_lengths(lengths)`, the examples one after the other; they must fit."""
  sizes = row_lengths(lengths, decoder_only)
  names = [f'decoder_{n}' for n in ('input_tokens', 'target_tokens', 'loss_weights',
                                    'segment_ids', 'positions')]
  row = {name: np.zeros(sizes['targets'], np.int32) for name in names}
  if not decoder_only:
    row.update({f'encoder_{n}': np.zeros(sizes['inputs'], np.int32)
                for n in ('input_tokens', 'segment_ids', 'positions')})
  e = d = 0
  for segment, example in enumerate(examples, start=1):
    targets, weights = example['targets'], np.ones(len(example['targets']), np.int32)
    inputs = example.get('inputs', targets[:0])
    if decoder_only:
      targets = np.concatenate([inputs, targets])
      weights = np.concatenate([np.zeros(len(inputs), np.int32), weights])
    else:
      at = slice(e, e + len(inputs))
      row['encoder_input_tokens'][at] = inputs
      row['encoder_segment_ids'][at] = segment
      row['encoder_positions'][at] = np.arange(len(inputs))
      e = at.stop
    at = slice(d, d + len(targets))
    row['decoder_target_tokens'][at] = targets
    row['decoder_input_tokens'][at][:1] = BOS
    row['decoder_input_tokens'][at][1:] = targets[:-1]
    row['decoder_loss_weights'][at] = weights
    row['decoder_segment_ids'][at] = segment
    row['decoder_positions'][at] = np.arange(len(targets))
    d = at.stop
  if d > sizes['targets'] or e > sizes.get('inputs', 0):
    raise ValueError(f'{e} input and {d} target tokens do not fit a row of {sizes}')
  return row


def pack(sizes: np.ndarray, room: np.ndarray) -> list[np.ndarray]:
  """int[n, features] sizes, int[features] room -> for each row, the indices of its examples.

  First-fit decreasing. Every index stands in exactly one row, and the layout depends only on the
  multiset of sizes: examples of equal size can trade places from epoch to epoch, and the number of
  rows stays. Vectorised over equal sizes, so a corpus of 10^5 sentences takes a second.
  """
  kinds, kind_of = np.unique(sizes, axis=0, return_inverse=True)
  members = [np.flatnonzero(kind_of == k) for k in range(len(kinds))]
  by_need = np.argsort(-(kinds / room).max(axis=1), kind='stable')
  free = np.zeros((0, len(room)), np.int64)
  rows: list[list[int]] = []
  for k in by_need:
    left, size = members[k], np.maximum(kinds[k], 0)
    used = size > 0
    if not used.any():
      raise ValueError('an example without tokens cannot be packed')
    fits = (free[:, used] // size[used]).min(axis=1)
    take = np.diff(np.minimum(np.cumsum(fits), len(left)), prepend=0)
    for r in np.flatnonzero(take):
      rows[r].extend(left[:take[r]])
      left = left[take[r]:]
    free -= take[:, None] * size
    a_row = int((room[used] // size[used]).min())
    if a_row < 1:
      raise ValueError(f'an example of size {size} does not fit a row of {room}')
    new = [left[i:i + a_row] for i in range(0, len(left), a_row)]
    rows.extend(list(x) for x in new)
    free = np.concatenate([free, [room - len(x) * size for x in new]]) if new else free
  return [np.array(r) for r in rows]
