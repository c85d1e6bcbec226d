"""Rows and packing: literal lists in, literal lists out."""

import numpy as np
import pytest

from t5lab.data import features

LENGTHS = {'inputs': 6, 'targets': 5}


def example(inputs, targets):
  return {'inputs': np.array(inputs, np.int32), 'targets': np.array(targets, np.int32)}


def lists(row):
  return {k: v.tolist() for k, v in row.items()}


def test_two_examples_in_a_row_with_real_id_0_and_an_empty_feature():
  row = features.build_row([example([7, 0, 5], [9, 1]), example([], [0, 1])], LENGTHS,
                           decoder_only=False)
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
                           decoder_only=True)
  assert lists(row) == {
      'decoder_input_tokens': [0, 7, 8, 9, 0, 6, 4, 0, 0, 0, 0],
      'decoder_target_tokens': [7, 8, 9, 1, 6, 4, 1, 0, 0, 0, 0],
      'decoder_loss_weights': [0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0],
      'decoder_segment_ids': [1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0],
      'decoder_positions': [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0],
  }


def test_start_and_end_are_the_vocabularys():
  row = features.build_row([example([7], [9, 2]), example([6], [4])], {'inputs': 2, 'targets': 3},
                           kind='encoder_decoder', start=50)
  assert row['decoder_input_tokens'].tolist() == [50, 9, 50]
  cut, _ = features.trim(example([5, 6, 1, 2], [3, 4, 5, 6, 1, 2]), {'inputs': 3, 'targets': 5},
                         eos=2)
  assert lists(cut) == {'inputs': [5, 6, 2], 'targets': [3, 4, 5, 6, 2]}


def test_encoder_alone_with_a_class():
  lengths = {'inputs': 8, 'targets': 1}
  row = features.build_row([example([101, 5, 102, 6, 7, 102], [1])], lengths, kind='encoder',
                           eos=102)
  assert lists(row) == {
      'encoder_input_tokens': [101, 5, 102, 6, 7, 102, 0, 0],
      'encoder_segment_ids': [1, 1, 1, 1, 1, 1, 0, 0],
      'encoder_positions': [0, 1, 2, 3, 4, 5, 0, 0],
      'encoder_token_types': [0, 0, 0, 1, 1, 1, 0, 0],
      'encoder_target_tokens': [1], 'encoder_loss_weights': [1]}
  empty = features.build_row([], lengths, kind='encoder')
  assert empty.keys() == row.keys() and not any(x.any() for x in empty.values())
  with pytest.raises(ValueError, match='do not share a row'):
    features.build_row([example([5], [0])] * 2, lengths, kind='encoder')


def test_encoder_alone_without_classes_may_be_packed():
  rows = [{'inputs': np.array([5, 1, 6, 1], np.int32)}, {'inputs': np.array([7, 1], np.int32)}]
  row = features.build_row(rows, {'inputs': 7}, kind='encoder')
  assert lists(row) == {
      'encoder_input_tokens': [5, 1, 6, 1, 7, 1, 0], 'encoder_segment_ids': [1, 1, 1, 1, 2, 2, 0],
      'encoder_positions': [0, 1, 2, 3, 0, 1, 0], 'encoder_token_types': [0, 0, 1, 1, 0, 0, 0]}


def test_kinds_by_name_or_by_the_older_flag():
  one = [example([7], [9, 1])]
  for flag, kind in ((True, 'decoder'), (False, 'encoder_decoder')):
    assert lists(features.build_row(one, LENGTHS, decoder_only=flag)) == lists(
        features.build_row(one, LENGTHS, kind=kind))
  with pytest.raises(ValueError, match="'both' is none of encoder_decoder, decoder, encoder"):
    features.build_row(one, LENGTHS, kind='both')


def test_trim_keeps_the_end_of_sequence_and_counts():
  cut, lost = features.trim(example([2, 3, 4, 5, 6, 7, 8, 1], [3] * 7), LENGTHS)
  assert lists(cut) == {'inputs': [2, 3, 4, 5, 6, 1], 'targets': [3, 3, 3, 3, 3]}
  assert lost == 4


def test_a_row_that_does_not_fit_raises():
  with pytest.raises(ValueError, match='do not fit|could not broadcast'):
    features.build_row([example([1] * 4, [1]), example([1] * 4, [1])], LENGTHS, decoder_only=False)


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
