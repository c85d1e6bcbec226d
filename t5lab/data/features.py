"""Token lists -> one row of seqio's standard model features, several examples to a row if packed.

KINDS of model, from examples {'inputs', 'targets'}, or 'targets' or 'inputs' alone:
encoder_decoder:
  encoder_input_tokens, encoder_segment_ids, encoder_positions            int32[inputs length]
  decoder_input_tokens, decoder_target_tokens, decoder_segment_ids,
  decoder_positions, decoder_loss_weights                                 int32[targets length]
decoder: the decoder features alone; inputs stand before targets and carry no loss.
encoder:
  encoder_input_tokens, encoder_segment_ids, encoder_positions,
  encoder_token_types (0 up to the first end of sequence, then 1)         int32[inputs length]
  where targets have a length, they are one class index, never packed:
  encoder_target_tokens, encoder_loss_weights                             int32[1]

Segment ids start at 1, 0 is padding: they, and not the value of a token, say what is real, so a
vocabulary may use id 0, and an example may have an empty feature (seqio's packing breaks on both).
"""

from collections.abc import Sequence

import numpy as np

from t5lab.errors import DataError

Example = dict[str, np.ndarray]   # int32[any length] by feature
KINDS = ('encoder_decoder', 'decoder', 'encoder')
EOS, BOS = 1, 0                   # T5's: it starts the decoder with the padding id


def kind_of(kind: str | None, decoder_only: bool = False) -> str:
  """The kind that a caller names, by itself or by the older flag."""
  if kind is None:
    return 'decoder' if decoder_only else 'encoder_decoder'
  if kind not in KINDS:
    raise ValueError(f'kind {kind!r} is none of {", ".join(KINDS)}')
  return kind


def trim(example: Example, lengths: dict[str, int], eos: int = EOS) -> tuple[Example, int]:
  """Cuts features to `lengths` -> (example, tokens lost). A feature that ended in EOS still does.

  Example: trim({'targets': [5, 6, 7, 1]}, {'targets': 3}) -> {'targets': [5, 6, 1]}, 1 lost.
  """
  lost, out = 0, {}
  for name, tokens in example.items():
    limit = lengths[name]
    if len(tokens) > limit:
      lost += len(tokens) - limit
      ended = tokens[-1] == eos
      tokens = tokens[:limit]
      if ended:
        tokens = np.concatenate([tokens[:-1], np.array([eos], tokens.dtype)])
    out[name] = tokens
  return out, lost


def row_lengths(lengths: dict[str, int], kind: str) -> dict[str, int]:
  """Features of a row -> how many tokens it holds of each sequence. A class is no sequence."""
  if kind == 'decoder':
    return {'targets': lengths.get('inputs', 0) + lengths['targets']}
  if kind == 'encoder':
    return {'inputs': lengths['inputs']}
  return {'inputs': lengths['inputs'], 'targets': lengths['targets']}


def row_sizes(sizes: dict[str, int], kind: str) -> dict[str, int]:
  """Tokens of an example's features -> the tokens that it takes of a row's sequences."""
  if kind == 'decoder':
    return {'targets': sum(sizes.values())}
  if kind == 'encoder':
    return {'inputs': sizes['inputs']}
  return {'inputs': sizes.get('inputs', 0), 'targets': sizes['targets']}


def build_row(examples: Sequence[Example], lengths: dict[str, int], *, kind: str | None = None,
              decoder_only: bool = False, start: int = BOS, eos: int = EOS,
              ) -> dict[str, np.ndarray]:
  """One row of `row_lengths(lengths)`, the examples one after the other; they must fit.

  start: the decoder's first input token of every example. eos: closes the texts of an encoder's
  input. decoder_only: the older way to say kind='decoder'.
  """
  kind = kind_of(kind, decoder_only)
  sizes = row_lengths(lengths, kind)
  row = {}
  if kind != 'encoder':
    row = {f'decoder_{n}': np.zeros(sizes['targets'], np.int32)
           for n in ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids', 'positions')}
  if kind != 'decoder':
    row.update({f'encoder_{n}': np.zeros(sizes['inputs'], np.int32)
                for n in ('input_tokens', 'segment_ids', 'positions')})
  if kind == 'encoder':
    row['encoder_token_types'] = np.zeros(sizes['inputs'], np.int32)
    if lengths.get('targets'):
      _add_class(row, examples)
  e = d = 0
  for segment, example in enumerate(examples, start=1):
    inputs = example.get('inputs', np.zeros(0, np.int32))
    if kind != 'decoder':
      at = slice(e, e + len(inputs))
      row['encoder_input_tokens'][at] = inputs
      row['encoder_segment_ids'][at] = segment
      row['encoder_positions'][at] = np.arange(len(inputs))
      if kind == 'encoder':
        row['encoder_token_types'][at] = np.cumsum(inputs == eos) - (inputs == eos) > 0
      e = at.stop
    if kind != 'encoder':
      targets, weights = example['targets'], np.ones(len(example['targets']), np.int32)
      if kind == 'decoder':
        targets = np.concatenate([inputs, targets])
        weights = np.concatenate([np.zeros(len(inputs), np.int32), weights])
      at = slice(d, d + len(targets))
      row['decoder_target_tokens'][at] = targets
      row['decoder_input_tokens'][at][:1] = start
      row['decoder_input_tokens'][at][1:] = targets[:-1]
      row['decoder_loss_weights'][at] = weights
      row['decoder_segment_ids'][at] = segment
      row['decoder_positions'][at] = np.arange(len(targets))
      d = at.stop
  if d > sizes.get('targets', 0) or e > sizes.get('inputs', 0):
    raise ValueError(f'{e} input and {d} target tokens do not fit a row of {sizes}')
  return row


def _add_class(row, examples):
  """The class index of the row's only example; a row without one has no loss."""
  if len(examples) > 1:
    raise ValueError(f'{len(examples)} examples with a class each do not share a row')
  row['encoder_target_tokens'] = np.zeros(1, np.int32)
  row['encoder_loss_weights'] = np.full(1, len(examples), np.int32)
  for example in examples:
    row['encoder_target_tokens'][:] = example['targets']


def check_class(example: Example, what: str) -> None:
  """DataError unless an encoder-only model's example has inputs and one class index."""
  if 'inputs' not in example or len(example.get('targets', ())) != 1:
    sizes = ', '.join(f'{name} {len(tokens)}' for name, tokens in example.items())
    raise DataError(f'{what} has features of lengths {sizes}; an encoder-only model needs inputs, '
                    'and targets of one class index without an end of sequence, as docs_match has')


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
