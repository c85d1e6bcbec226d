"""Token lists -> one row of seqio's standard model features, several examples to a row if packed.

KINDS of model, from examples {'inputs', 'targets'}, or 'targets' or 'inputs' alone:
encoder_decoder:
  encoder_input_tokens, encoder_segment_ids, encoder_positions            int32[inputs length]
  decoder_input_tokens, decoder_target_tokens, decoder_segment_ids,
  decoder_positions, decoder_loss_weights                                 int32[targets length]
decoder: the decoder features alone; inputs stand before targets and carry no loss.
encoder:
  encoder_input_tokens, encoder_segment_ids, encoder_positions,
  encoder_token_types                                                     int32[inputs length]
  and what its FORM adds. `form_of` reads the form off an example's features; who builds rows passes
  it on, so that a row without examples has the features of any other:
  inputs   {'inputs'}: nothing. Token types are 0 up to the first end of sequence, then 1.
  classes  and {'targets'}, one class index:
           encoder_target_tokens, encoder_loss_weights                    int32[1]
  mlm      masked language modelling [Devlin et al. 2019, 3.1]: {'inputs', 'targets', 'weights'} and
           maybe 'types' stand position by position: what is read, what stood there, 1 where it is
           predicted, the token type (0 where not given: a random token may look like an end).
           Loss is where weights say and not, as in seqio's EncoderFeatureConverter, where a mask
           token stands: BERT predicts the random and the kept tokens too.
           encoder_target_tokens, encoder_loss_weights                    int32[inputs length]
  nsp      mlm and {'next'}: 0 where the second text follows the first, 1 where it is a random one:
           encoder_next_labels, encoder_next_weights (0 without example)  int32[1]
  A row of a form in ALONE holds one example: its head reads the first token of the row.

Segment ids start at 1, 0 is padding: they, and not the value of a token, say what is real, so a
vocabulary may use id 0, and an example may have an empty feature (seqio's packing breaks on both).
"""

from collections.abc import Collection, Sequence

import numpy as np

from t5lab.errors import DataError

Example = dict[str, np.ndarray]   # int32[any length] by feature
KINDS = ('encoder_decoder', 'decoder', 'encoder')
FORMS = ('inputs', 'classes', 'mlm', 'nsp')
ALONE = ('classes', 'nsp')
EOS, BOS = 1, 0                   # T5's: it starts the decoder with the padding id


def form_of(names: Collection[str]) -> str:
  """The form of an encoder's examples that have these features: one of FORMS.

  Example: form_of({'inputs', 'targets', 'weights'}) -> 'mlm'.
  """
  if 'next' in names:
    return 'nsp'
  if 'weights' in names:
    return 'mlm'
  return 'classes' if 'targets' in names else 'inputs'


def trim(example: Example, lengths: dict[str, int], eos: int = EOS) -> tuple[Example, int]:
  """Cuts features to `lengths` -> (example, tokens lost). A feature that ended in EOS still does.

  Features that stand position by position ('weights' among them) are cut as 'inputs' is; an EOS
  that then closes them is not predicted.
  Example: trim({'targets': [5, 6, 7, 1]}, {'targets': 3}) -> {'targets': [5, 6, 1]}, 1 lost.
  """
  if 'weights' in example:
    return _trim_masked(example, lengths['inputs'], eos)
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


def _trim_masked(example, limit, eos):
  lost = len(example['inputs']) - limit
  if lost <= 0:
    return example, 0
  out = {name: x[:limit].copy() for name, x in example.items()}      # of 'next' all, it is one
  if example['inputs'][-1] == eos:
    out['inputs'][-1] = out['targets'][-1] = eos
    out['weights'][-1] = 0
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


def build_row(examples: Sequence[Example], lengths: dict[str, int], *,
              kind: str = 'encoder_decoder', form: str = 'inputs', start: int = BOS,
              eos: int = EOS) -> dict[str, np.ndarray]:
  """One row of `row_lengths(lengths)`, the examples one after the other; they must fit.

  form: of an encoder's examples. start: the decoder's first input token of every example. eos:
  closes the texts of an encoder's input.
  """
  for name, value, known in (('kind', kind, KINDS), ('form', form, FORMS)):
    if value not in known:
      raise ValueError(f'{name} {value!r} is none of {", ".join(known)}')
  if kind == 'encoder':
    return _encoder_row(examples, lengths['inputs'], form, eos)
  sizes = row_lengths(lengths, kind)
  row = {f'decoder_{n}': np.zeros(sizes['targets'], np.int32)
         for n in ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids', 'positions')}
  if kind == 'encoder_decoder':
    row.update(_encoder_features(sizes['inputs']))
  e = d = 0
  for segment, example in enumerate(examples, start=1):
    inputs, targets = example.get('inputs', np.zeros(0, np.int32)), example['targets']
    weights = np.ones(len(targets), np.int32)
    if kind == 'encoder_decoder':
      e = _add_inputs(row, e, segment, inputs).stop
    else:
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
  if d > sizes['targets'] or e > sizes.get('inputs', 0):
    raise ValueError(f'{e} input and {d} target tokens do not fit a row of {sizes}')
  return row


def _encoder_features(length):
  return {f'encoder_{n}': np.zeros(length, np.int32)
          for n in ('input_tokens', 'segment_ids', 'positions')}


def _add_inputs(row, first, segment, inputs) -> slice:
  at = slice(first, first + len(inputs))
  row['encoder_input_tokens'][at] = inputs
  row['encoder_segment_ids'][at] = segment
  row['encoder_positions'][at] = np.arange(len(inputs))
  return at


def _encoder_row(examples, length, form, eos):
  """A row of an encoder-only model: one segment an example."""
  if len(examples) > 1 and form in ALONE:
    raise ValueError(f'{len(examples)} examples of the form {form!r} do not share a row')
  masked, total = form in ('mlm', 'nsp'), sum(len(x['inputs']) for x in examples)
  if total > length:
    raise ValueError(f'{total} input tokens do not fit a row of {length}')
  row = _encoder_features(length)
  row['encoder_token_types'] = np.zeros(length, np.int32)
  if form != 'inputs':
    for name in ('target_tokens', 'loss_weights'):
      row[f'encoder_{name}'] = np.zeros(length if masked else 1, np.int32)
  if form == 'nsp':
    row['encoder_next_labels'] = np.zeros(1, np.int32)
    row['encoder_next_weights'] = np.full(1, len(examples), np.int32)
  first = 0
  for segment, example in enumerate(examples, start=1):
    if form_of(example) != form:
      raise ValueError(f'an example with {", ".join(example)} is of the form {form_of(example)!r}, '
                       f'not {form!r}')
    inputs = example['inputs']
    at = _add_inputs(row, first, segment, inputs)
    ends = inputs == eos
    types = np.zeros(len(inputs)) if masked else np.cumsum(ends) - ends > 0
    row['encoder_token_types'][at] = example.get('types', types)
    if form != 'inputs':
      place = at if masked else slice(0, 1)
      row['encoder_target_tokens'][place] = example['targets']
      row['encoder_loss_weights'][place] = example.get('weights', 1)
    if form == 'nsp':
      row['encoder_next_labels'][:] = example['next']
    first = at.stop
  return row


def check_example(example: Example, what: str, form: str) -> None:
  """DataError unless an encoder-only model's example has what its form needs; `what` names it."""
  beside = ['targets', 'weights'] + ['types'] * ('types' in example)
  sizes = {name: len(tokens) for name, tokens in example.items()}
  good, needs = 'inputs' in example, 'inputs'
  if form == 'classes':
    good &= sizes.get('targets') == 1
    needs += ', and targets of one class index without an end of sequence, as docs_match has'
  elif form in ('mlm', 'nsp'):
    good &= all(sizes.get(name) == sizes.get('inputs') for name in beside)
    needs += f', {", ".join(beside)}, all of one length, to predict masked tokens'
  if form == 'nsp':
    good &= sizes.get('next') == 1 and example['next'][0] in (0, 1)
    needs += ', and next, 0 or 1, to predict whether the second text follows'
  if not good:
    found = ', '.join(f'{name} {n}' for name, n in sizes.items())
    raise DataError(f'{what} has features of lengths {found}; an encoder-only model needs {needs}')


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
