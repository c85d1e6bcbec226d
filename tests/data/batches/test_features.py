"""Rows and packing: literal lists in, literal lists out."""

import numpy as np
import pytest

from t5lab.data.batches import features
from t5lab.errors import DataError

LENGTHS = {'inputs': 6, 'targets': 5}


def example(inputs, targets):
  return {'inputs': np.array(inputs, np.int32), 'targets': np.array(targets, np.int32)}


def lists(row):
  return {k: v.tolist() for k, v in row.items()}


def test_two_examples_in_a_row_with_real_id_0_and_an_empty_feature():
  row = features.build_row([example([7, 0, 5], [9, 1]), example([], [0, 1])], LENGTHS)
  assert lists(row) == {
      'encoder_input_tokens': [7, 0, 5, 0, 0, 0],
      'encoder_segment_ids': [1, 1, 1, 0, 0, 0],
      'encoder_positions': [0, 1, 2, 0, 0, 0],
      'decoder_input_tokens': [0, 9, 0, 0, 0],
      'decoder_target_tokens': [9, 1, 0, 1, 0],
      'decoder_loss_weights': [1, 1, 1, 1, 0],
      'decoder_segment_ids': [1, 1, 2, 2, 0],
      'decoder_positions': [0, 1, 0, 1, 0],
  }


def test_decoder_only_puts_inputs_before_targets_without_loss():
  row = features.build_row([example([7, 8], [9, 1]), example([6], [4, 1])], LENGTHS,
                           kind='decoder')
  assert lists(row) == {
      'decoder_input_tokens': [0, 7, 8, 9, 0, 6, 4, 0, 0, 0, 0],
      'decoder_target_tokens': [7, 8, 9, 1, 6, 4, 1, 0, 0, 0, 0],
      'decoder_loss_weights': [0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0],
      'decoder_segment_ids': [1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0],
      'decoder_positions': [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0],
  }


def test_start_and_end_ids_of_the_vocabulary():
  row = features.build_row([example([7], [9, 2]), example([6], [4])], {'inputs': 2, 'targets': 3},
                           start_id=50)
  assert row['decoder_input_tokens'].tolist() == [50, 9, 50]
  cut, _ = features.trim(example([5, 6, 1, 2], [3, 4, 5, 6, 1, 2]), {'inputs': 3, 'targets': 5},
                         eos=2)
  assert lists(cut) == {'inputs': [5, 6, 2], 'targets': [3, 4, 5, 6, 2]}


def test_encoder_alone_with_a_class():
  lengths = {'inputs': 8, 'targets': 1}
  row = features.build_row([example([101, 5, 102, 6, 7, 102], [1])], lengths, kind='encoder',
                           form='classes', eos=102)
  assert lists(row) == {
      'encoder_input_tokens': [101, 5, 102, 6, 7, 102, 0, 0],
      'encoder_segment_ids': [1, 1, 1, 1, 1, 1, 0, 0],
      'encoder_positions': [0, 1, 2, 3, 4, 5, 0, 0],
      'encoder_token_types': [0, 0, 0, 1, 1, 1, 0, 0],
      'encoder_target_tokens': [1], 'encoder_loss_weights': [1]}
  empty = features.build_row([], lengths, kind='encoder', form='classes')
  assert empty.keys() == row.keys() and not any(x.any() for x in empty.values())
  with pytest.raises(ValueError, match="a row of form 'classes' holds one example, got 2"):
    features.build_row([example([5], [0])] * 2, lengths, kind='encoder', form='classes')


def test_encoder_alone_without_classes_may_be_packed():
  rows = [{'inputs': np.array([5, 1, 6, 1], np.int32)}, {'inputs': np.array([7, 1], np.int32)}]
  row = features.build_row(rows, {'inputs': 7}, kind='encoder')
  assert lists(row) == {
      'encoder_input_tokens': [5, 1, 6, 1, 7, 1, 0], 'encoder_segment_ids': [1, 1, 1, 1, 2, 2, 0],
      'encoder_positions': [0, 1, 2, 3, 0, 1, 0], 'encoder_token_types': [0, 0, 1, 1, 0, 0, 0]}


def masked(inputs, targets, weights, **more):
  given = {'inputs': inputs, 'targets': targets, 'weights': weights, **more}
  return {k: np.array(v, np.int32) for k, v in given.items()}


# [CLS] = 101, [SEP] = 102, [MASK] = 103; 7 was masked, 8 became a random 50, 9 was kept.
PAIR = masked([101, 5, 103, 102, 50, 9, 102], [101, 5, 7, 102, 8, 9, 102], [0, 0, 1, 0, 1, 1, 0],
              types=[0, 0, 0, 0, 1, 1, 1], next=[1])


def test_a_pair_of_texts_with_masked_random_and_kept_tokens():
  row = features.build_row([PAIR], {'inputs': 9}, kind='encoder', form='nsp', eos=102)
  assert lists(row) == {
      'encoder_input_tokens': [101, 5, 103, 102, 50, 9, 102, 0, 0],
      'encoder_segment_ids': [1, 1, 1, 1, 1, 1, 1, 0, 0],
      'encoder_positions': [0, 1, 2, 3, 4, 5, 6, 0, 0],
      'encoder_token_types': [0, 0, 0, 0, 1, 1, 1, 0, 0],
      'encoder_target_tokens': [101, 5, 7, 102, 8, 9, 102, 0, 0],
      'encoder_loss_weights': [0, 0, 1, 0, 1, 1, 0, 0, 0],
      'encoder_next_labels': [1], 'encoder_next_weights': [1]}
  assert {x.dtype for x in row.values()} == {np.dtype(np.int32)}
  empty = features.build_row([], {'inputs': 9}, kind='encoder', form='nsp')
  assert {k: x.shape for k, x in empty.items()} == {k: x.shape for k, x in row.items()}
  assert not any(x.any() for x in empty.values())
  with pytest.raises(ValueError, match="a row of form 'nsp' holds one example, got 2"):
    features.build_row([PAIR] * 2, {'inputs': 20}, kind='encoder', form='nsp')


def test_masked_texts_without_pairs_share_a_row_and_a_random_end_changes_no_type():
  one, two = (masked([101, 102, 6, 102], [101, 5, 6, 102], [0, 1, 0, 0]),
              masked([101, 103, 102], [101, 8, 102], [0, 1, 0], types=[0, 1, 1]))
  row = features.build_row([one, two], {'inputs': 8, 'targets': 3}, kind='encoder', form='mlm',
                           eos=102)
  assert lists(row) == {
      'encoder_input_tokens': [101, 102, 6, 102, 101, 103, 102, 0],
      'encoder_segment_ids': [1, 1, 1, 1, 2, 2, 2, 0],
      'encoder_positions': [0, 1, 2, 3, 0, 1, 2, 0],
      'encoder_token_types': [0, 0, 0, 0, 0, 1, 1, 0],
      'encoder_target_tokens': [101, 5, 6, 102, 101, 8, 102, 0],
      'encoder_loss_weights': [0, 1, 0, 0, 0, 1, 0, 0]}
  assert features.build_row([], {'inputs': 8}, kind='encoder', form='mlm').keys() == row.keys()


def test_only_the_inputs_of_an_encoder_take_room():
  lengths = {'inputs': 128, 'targets': 7}
  assert features.row_lengths(lengths, 'encoder') == {'inputs': 128}
  sizes = {'inputs': 9, 'targets': 9, 'weights': 9, 'types': 9, 'next': 1}
  assert features.row_sizes(sizes, 'encoder') == {'inputs': 9}


def test_an_examples_features_say_its_form():
  assert features.form_of(PAIR) == 'nsp'
  assert features.form_of(['inputs', 'targets', 'weights']) == 'mlm'
  assert features.form_of(['inputs', 'targets']) == 'classes'
  assert features.form_of(['inputs']) == 'inputs'
  with pytest.raises(ValueError, match="inputs, targets, weights, types, next has the form 'nsp'"
                                       ", the row has 'mlm'"):
    features.build_row([PAIR], {'inputs': 9}, kind='encoder', form='mlm')
  with pytest.raises(ValueError, match="form must be one of inputs, classes, mlm, nsp, got 'mask'"):
    features.build_row([], {'inputs': 9}, kind='encoder', form='mask')


def test_trim_cuts_masked_texts_alike_and_predicts_no_closing_end():
  cut, lost = features.trim(PAIR, {'inputs': 5, 'targets': 2}, eos=102)
  assert lost == 2 and lists(cut) == {
      'inputs': [101, 5, 103, 102, 102], 'targets': [101, 5, 7, 102, 102],
      'weights': [0, 0, 1, 0, 0], 'types': [0, 0, 0, 0, 1], 'next': [1]}
  assert PAIR['weights'].tolist() == [0, 0, 1, 0, 1, 1, 0]              # the original is unchanged
  same, lost = features.trim(PAIR, {'inputs': 7}, eos=102)
  assert lost == 0 and lists(same) == lists(PAIR)
  # A text without an end of sequence: the ones in weights and types are not tokens.
  open_end = masked([2, 4, 6, 7], [2, 5, 6, 7], [0, 1, 1, 1], types=[0, 0, 1, 1])
  assert lists(features.trim(open_end, {'inputs': 3}, eos=1)[0]) == {
      'inputs': [2, 4, 6], 'targets': [2, 5, 6], 'weights': [0, 1, 1], 'types': [0, 0, 1]}


@pytest.mark.parametrize('form, broken, message', [
    ('classes', example([5, 6], [1, 1]), 'inputs 2, targets 2; .*one class index'),
    ('classes', {'targets': np.array([1])}, 'targets 1; .*needs inputs, and'),
    ('inputs', {'targets': np.array([1])}, 'targets 1; .*needs inputs$'),
    ('mlm', masked([5, 6], [5, 6], [1]), 'inputs, targets, weights, all of one length'),
    ('mlm', masked([5, 6], [5], [0, 1]), 'inputs 2, targets 1, weights 2;'),
    ('mlm', masked([5], [5], [1], types=[0, 1]), 'targets, weights, types, all of one length'),
    ('nsp', masked([5], [5], [1]), 'and next, 0 or 1'),
    ('nsp', masked([5], [5], [1], next=[2]), 'and next, 0 or 1'),
    ('nsp', masked([5], [5], [1], next=[0, 1]), 'and next, 0 or 1')])
def test_an_example_that_is_not_of_its_form(form, broken, message):
  with pytest.raises(DataError, match='^example t:3 has features of lengths .*?' + message):
    features.check_example(broken, 'example t:3', form)


def test_examples_that_are_of_their_form():
  features.check_example({'inputs': np.array([5])}, '', 'inputs')
  features.check_example(example([5, 6], [1]), '', 'classes')
  features.check_example(masked([5, 6], [5, 6], [1, 0]), '', 'mlm')
  features.check_example(PAIR, '', 'nsp')


def test_an_unknown_kind():
  message = "kind must be one of encoder_decoder, decoder, encoder, got 'both'"
  with pytest.raises(ValueError, match=message):
    features.build_row([], LENGTHS, kind='both')


def test_trim_keeps_the_end_of_sequence_and_counts():
  cut, lost = features.trim(example([2, 3, 4, 5, 6, 7, 8, 1], [3] * 7), LENGTHS)
  assert lists(cut) == {'inputs': [2, 3, 4, 5, 6, 1], 'targets': [3, 3, 3, 3, 3]}
  assert lost == 4


def test_a_row_that_does_not_fit_raises():
  with pytest.raises(ValueError, match='do not fit|could not broadcast'):
    features.build_row([example([1] * 4, [1]), example([1] * 4, [1])], LENGTHS)
  with pytest.raises(ValueError, match='7 input tokens do not fit a row of 6'):
    features.build_row([PAIR], {'inputs': 6}, kind='encoder', form='nsp')


def test_pack_is_first_fit_decreasing():
  sizes = np.array([[2, 1], [6, 5], [3, 3], [4, 1], [1, 1], [3, 2]])
  assert [r.tolist() for r in features.pack(sizes, np.array([6, 5]))] == [[1], [3, 0], [2, 5], [4]]


def test_pack_places_every_example_once_within_the_room_and_fills_it(rng):
  sizes = rng.integers(1, 30, (3000, 2))
  room = np.array([64, 64])
  rows = features.pack(sizes, room)
  assert sorted(np.concatenate(rows)) == list(range(3000))
  assert all((sizes[r].sum(0) <= room).all() for r in rows)
  assert sizes.sum() / (len(rows) * room.sum()) > 0.93
  shuffled = rng.permutation(3000)
  assert len(features.pack(sizes[shuffled], room)) == len(rows)


def test_pack_names_an_example_that_is_too_long():
  with pytest.raises(ValueError, match='does not fit'):
    features.pack(np.array([[7, 1]]), np.array([6, 5]))
