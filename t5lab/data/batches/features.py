"""Token lists -> one row of seqio's standard model features; a packed row holds several examples.

KINDS of model, from examples {'inputs', 'targets'}, or 'targets' or 'inputs' alone:
encoder_decoder:
  encoder_input_tokens, encoder_segment_ids, encoder_positions            int32[inputs length]
  decoder_input_tokens, decoder_target_tokens, decoder_segment_ids,
  decoder_positions, decoder_loss_weights                                 int32[targets length]
decoder: the decoder features alone; inputs precede targets and carry no loss.
encoder:
  encoder_input_tokens, encoder_segment_ids, encoder_positions,
  encoder_token_types                                                     int32[inputs length]
  and the features of its FORM. `form_of` derives the form from an example's features; callers pass
  it to `build_row`, so that a row without examples has the features of any other:
  inputs   {'inputs'}: no more. Token types are 0 up to the first end of sequence, then 1.
  classes  and {'targets'}, one class index:
           encoder_target_tokens, encoder_loss_weights                    int32[1]
  mlm      masked language modelling [Devlin et al. 2019, 3.1]: {'inputs', 'targets', 'weights'} and
           optionally 'types', aligned by position: the corrupted token, the original token, 1 where
           it is predicted, the token type (0 if not given: a random token may look like an end).
           The weights decide the loss, not the mask tokens as in seqio's EncoderFeatureConverter:
           BERT predicts the random and the kept tokens too.
           encoder_target_tokens, encoder_loss_weights                    int32[inputs length]
  nsp      mlm and {'next'}: 0 if the second text follows the first, 1 if it is a random one:
           encoder_next_labels, encoder_next_weights (0 without example)  int32[1]
  A row of a form in ALONE holds one example: its head reads the first token of the row.

Segment ids start at 1 and 0 is padding: they decide which tokens are real, not the token ids, so a
vocabulary may use id 0, and an example may have an empty feature (seqio's packing breaks on both).
"""

from collections.abc import Collection, Sequence

import numpy as np

from t5lab.data.batches.examples import Example
from t5lab.errors import DataError

KINDS = ('encoder_decoder', 'decoder', 'encoder')
FORMS = ('inputs', 'classes', 'mlm', 'nsp')
ALONE = ('classes', 'nsp')
INPUTS = ('input_tokens', 'segment_ids', 'positions')    # of every encoder
EOS, START = 1, 0                 # T5's token ids: its decoder starts with the padding id

Row = dict[str, np.ndarray]       # int32[length of its sequence] by model feature


def form_of(names: Collection[str]) -> str:
  """One of FORMS, of an encoder's examples with these features."""
  if 'next' in names:
    return 'nsp'
  if 'weights' in names:
    return 'mlm'
  return 'classes' if 'targets' in names else 'inputs'


def trim(example: Example, lengths: dict[str, int], eos: int = EOS) -> tuple[Example, int]:
  """Cuts features to `lengths` -> (example, tokens lost). A feature that ended in EOS still does.

  Features aligned by position (with 'weights') are all cut to the length of 'inputs'; an EOS that
  then closes them is not predicted.
  Example: trim({'targets': [5, 6, 7, 1]}, {'targets': 3}) -> {'targets': [5, 6, 1]}, 1 lost.
  """
  if 'weights' in example:
    return _trim_masked(example, lengths['inputs'], eos)
  lost, trimmed = 0, {}
  for name, tokens in example.items():
    limit = lengths[name]
    if len(tokens) > limit:
      lost += len(tokens) - limit
      closed = tokens[-1] == eos
      tokens = tokens[:limit]
      if closed:
        tokens = np.concatenate([tokens[:-1], np.array([eos], tokens.dtype)])
    trimmed[name] = tokens
  return trimmed, lost


def _trim_masked(example, limit, eos):
  lost = len(example['inputs']) - limit
  if lost <= 0:
    return example, 0
  trimmed = {name: x[:limit].copy() for name, x in example.items()}  # 'next' has one element
  if example['inputs'][-1] == eos:
    trimmed['inputs'][-1] = trimmed['targets'][-1] = eos
    trimmed['weights'][-1] = 0
  return trimmed, lost


def row_lengths(lengths: dict[str, int], kind: str) -> dict[str, int]:
  """The sequences of a row, and the tokens that each can hold. A class is not a sequence."""
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


def build_row(examples: Sequence[Example], lengths: dict[str, int], *,
              kind: str = 'encoder_decoder', form: str = 'inputs', start_id: int = START,
              eos: int = EOS) -> Row:
  """One row of `row_lengths(lengths)` with the examples in order; they must fit.

  form: of an encoder's examples. start_id: the decoder's first input token of every example. eos:
  closes the texts of an encoder's input; with -1 all of its token types are 0.
  """
  for name, value, known in (('kind', kind, KINDS), ('form', form, FORMS)):
    if value not in known:
      raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')
  if kind == 'encoder':
    return _encoder_row(examples, lengths['inputs'], form, eos)

  sizes = row_lengths(lengths, kind)
  row = _zeros('decoder', ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids',
                           'positions'), sizes['targets'])
  if kind == 'encoder_decoder':
    row |= _zeros('encoder', INPUTS, sizes['inputs'])

  encoder_end = decoder_end = 0
  for segment, example in enumerate(examples, start=1):
    inputs, targets = example.get('inputs', np.zeros(0, np.int32)), example['targets']
    weights = np.ones(len(targets), np.int32)
    if kind == 'encoder_decoder':
      encoder_end = _write(row, 'encoder', encoder_end, segment, input_tokens=inputs).stop
    else:
      targets = np.concatenate([inputs, targets])
      weights = np.concatenate([np.zeros(len(inputs), np.int32), weights])

    # The decoder reads its targets one position later, after the start token.
    decoder_end = _write(
        row, 'decoder', decoder_end, segment, target_tokens=targets, loss_weights=weights,
        input_tokens=np.concatenate([[start_id], targets])[:-1]).stop

  if decoder_end > sizes['targets'] or encoder_end > sizes.get('inputs', 0):
    raise ValueError(f'{encoder_end} input and {decoder_end} target tokens do not fit a row of '
                     f'{sizes}')
  return row


def _zeros(prefix: str, names: Sequence[str], length: int) -> Row:
  return {f'{prefix}_{name}': np.zeros(length, np.int32) for name in names}


def _write(row, prefix, first, segment, *, input_tokens, **values) -> slice:
  """Writes an example into a row, from position `first` -> the positions that it takes."""
  length = len(input_tokens)
  at = slice(first, first + length)
  values |= {'input_tokens': input_tokens, 'segment_ids': segment, 'positions': np.arange(length)}
  for name, value in values.items():
    row[f'{prefix}_{name}'][at] = value
  return at


def _encoder_row(examples, length, form, eos):
  """A row of an encoder-only model; each example is one segment."""
  if len(examples) > 1 and form in ALONE:
    raise ValueError(f'a row of form {form!r} holds one example, got {len(examples)}')
  total = sum(len(example['inputs']) for example in examples)
  if total > length:
    raise ValueError(f'{total} input tokens do not fit a row of {length}')

  masked = form in ('mlm', 'nsp')
  row = _zeros('encoder', (*INPUTS, 'token_types'), length)
  if form != 'inputs':
    row |= _zeros('encoder', ('target_tokens', 'loss_weights'), length if masked else 1)
  if form == 'nsp':
    row |= _zeros('encoder', ('next_labels', 'next_weights'), 1)
    row['encoder_next_weights'][:] = len(examples)

  first = 0
  for segment, example in enumerate(examples, start=1):
    if form_of(example) != form:
      raise ValueError(f'an example with {", ".join(example)} has the form {form_of(example)!r}, '
                       f'the row has {form!r}')
    # Without given types, tokens after the first end of sequence have type 1.
    ends = example['inputs'] == eos
    types = example.get('types', 0 if masked else np.cumsum(ends) - ends > 0)
    at = _write(row, 'encoder', first, segment, input_tokens=example['inputs'], token_types=types)
    if form != 'inputs':
      where = at if masked else slice(0, 1)
      row['encoder_target_tokens'][where] = example['targets']
      row['encoder_loss_weights'][where] = example.get('weights', 1)
    if form == 'nsp':
      row['encoder_next_labels'][:] = example['next']
    first = at.stop
  return row


def check_example(example: Example, what: str, form: str) -> None:
  """DataError unless an example, called `what`, has the features that its form needs."""
  sizes = {name: len(tokens) for name, tokens in example.items()}
  valid, needs = 'inputs' in example, 'inputs'
  if form == 'classes':
    valid &= sizes.get('targets') == 1
    needs += ', and targets of one class index without an end of sequence (e.g. docs_match)'
  elif form in ('mlm', 'nsp'):
    aligned = ['targets', 'weights'] + ['types'] * ('types' in example)
    valid &= all(sizes.get(name) == sizes.get('inputs') for name in aligned)
    needs += f', {", ".join(aligned)}, all of one length, to predict masked tokens'
  if form == 'nsp':
    valid &= sizes.get('next') == 1 and example['next'][0] in (0, 1)
    needs += ', and next, 0 or 1, to predict whether the second text follows'
  if not valid:
    actual = ', '.join(f'{name} {size}' for name, size in sizes.items())
    raise DataError(f'{what} has features of lengths {actual}; an encoder-only model needs {needs}')


def pack(sizes: np.ndarray, room: np.ndarray) -> list[np.ndarray]:
  """int[n, features] sizes, int[features] room -> for each row, the indices of its examples.

  First-fit decreasing. Every index occurs in exactly one row, and the layout depends only on the
  multiset of sizes: examples of equal size can swap places from epoch to epoch, and the number of
  rows does not change. Vectorised over equal sizes: 10^5 sentences take a second.
  """
  distinct, class_of = np.unique(sizes, axis=0, return_inverse=True)
  members = [np.flatnonzero(class_of == k) for k in range(len(distinct))]
  largest_first = np.argsort(-(distinct / room).max(axis=1), kind='stable')

  free = np.zeros((0, len(room)), np.int64)      # of each row
  rows: list[list[int]] = []
  for k in largest_first:
    waiting, size = members[k], np.maximum(distinct[k], 0)
    used = size > 0
    if not used.any():
      raise ValueError('an example without tokens cannot be packed')

    # Fill the rows that exist, from the first on.
    fits = (free[:, used] // size[used]).min(axis=1)
    taken = np.diff(np.minimum(np.cumsum(fits), len(waiting)), prepend=0)
    for r in np.flatnonzero(taken):
      rows[r].extend(waiting[:taken[r]])
      waiting = waiting[taken[r]:]
    free -= taken[:, None] * size

    # Open new rows for the others.
    per_row = int((room[used] // size[used]).min())
    if per_row < 1:
      raise ValueError(f'an example of size {size} does not fit a row of {room}')
    new = [waiting[i:i + per_row] for i in range(0, len(waiting), per_row)]
    if new:
      rows.extend(list(row) for row in new)
      free = np.concatenate([free, [room - len(row) * size for row in new]])
  return [np.array(row) for row in rows]
