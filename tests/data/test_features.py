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
