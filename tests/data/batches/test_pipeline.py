"""The stream: pure in the step, equal on any number of processes, each example once per epoch."""

import dataclasses

import numpy as np
import pytest

from t5lab.data.batches.pipeline import Pipeline
from t5lab.errors import DataError, UsageError

LENGTHS = {'inputs': 16, 'targets': 12}


@dataclasses.dataclass
class Component:
  name: str
  rate: float
  examples: list
  objective: object = None
  note: str = ''


class Half:
  """An objective: a random cut of the tokens."""

  def sizes(self, lengths):
    n = lengths['targets']
    return {'inputs': n, 'targets': n}

  def apply(self, example, rng):
    cut = int(rng.integers(1, len(example['targets'])))
    return {'inputs': example['targets'][:cut], 'targets': example['targets'][cut:]}

  def __repr__(self):
    return 'Half()'


def component(name, n, seed=0, rate=1., first=0):
  rng = np.random.default_rng(seed)
  def tokens(low, high, i):
    body = rng.integers(2, 90, rng.integers(low, high))
    return np.array([100 + first + i, *body, 1], np.int32)
  return Component(name, rate, [
      {'inputs': tokens(1, 9, i), 'targets': tokens(1, 7, i)} for i in range(n)])


def pipeline(components=None, **kwargs):
  settings = dict(batch_size=4, seed=3)
  return Pipeline(components or [component('a', 50)], LENGTHS, **{**settings, **kwargs})


def same(a, b):
  assert a.keys() == b.keys()
  for k in a:
    np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def test_a_batch_depends_on_nothing_but_the_step():
  p, q = pipeline(), pipeline()
  for step in (40, 3, 0, 17):
    same(p.batch(step), pipeline().batch(step))
  for step, batch in zip(range(5, 30), q.iterate(5, 30), strict=True):
    same(batch, p.batch(step))


def test_seeds_and_steps_differ():
  p = pipeline()
  assert (p.batch(0)['decoder_target_tokens'] != p.batch(1)['decoder_target_tokens']).any()
  other = pipeline(seed=4)
  assert (p.batch(0)['decoder_target_tokens'] != other.batch(0)['decoder_target_tokens']).any()


@pytest.mark.parametrize('processes', [2, 4])
def test_each_process_builds_its_rows_of_the_same_batch(processes):
  parts = [component('a', 50), component('b', 30, seed=1, rate=2., first=1000)]
  whole = pipeline(parts)
  each = 4 // processes
  split = [pipeline(parts, rows=range(i * each, (i + 1) * each)) for i in range(processes)]
  for step in (0, 9, 100):
    want = whole.batch(step)
    got = [p.batch(step) for p in split]
    same({k: np.concatenate([g[k] for g in got]) for k in want}, want)


@pytest.mark.parametrize('pack', [True, False])
def test_every_example_once_an_epoch_and_whole(pack):
  parts = component('a', 50)
  p = pipeline([parts], batch_size=1, pack=pack)
  rows = p.rows[0].count
  for epoch in range(3):
    seen = []
    for step in range(epoch * rows, (epoch + 1) * rows):
      batch = p.batch(step)
      tokens, segments = batch['encoder_input_tokens'][0], batch['encoder_segment_ids'][0]
      targets, of = batch['decoder_target_tokens'][0], batch['decoder_segment_ids'][0]
      for s in range(1, segments.max() + 1):
        i = tokens[segments == s][0] - 100
        seen.append(i)
        np.testing.assert_array_equal(tokens[segments == s], parts.examples[i]['inputs'])
        np.testing.assert_array_equal(targets[of == s], parts.examples[i]['targets'])
    assert sorted(seen) == list(range(50))
  assert rows == 50 or pack


def test_every_epoch_swaps_examples_and_shuffles_rows():
  p = pipeline(batch_size=1)
  rows = p.rows[0].count
  epochs = [[tuple(p.example_ids(e * rows + i)) for i in range(rows)] for e in range(3)]
  assert len({tuple(e) for e in epochs}) == 3
  assert set(epochs[0]) != set(epochs[1])                 # rows hold other examples, too


def test_a_mixture_keeps_its_rates_of_examples():
  parts = [component('short', 60, rate=3.), component('long', 40, seed=1, rate=1., first=500)]
  for example in parts[1].examples:
    example['targets'] = np.array([9] * 11 + [1], np.int32)   # one per row: a row is not an example
  p = pipeline(parts)
  names = [i.split(':')[0] for step in range(150) for i in p.example_ids(step)]
  assert names.count('short') / names.count('long') == pytest.approx(3., rel=0.05)


def test_an_objective_draws_again_each_epoch_and_repeats_for_the_same_step():
  parts = [Component('lm', 1., [{'targets': np.arange(2, 12, dtype=np.int32) + 20 * i}
                                for i in range(6)], Half())]
  p = pipeline(parts, batch_size=6)
  first, again, later = p.batch(0), pipeline(parts, batch_size=6).batch(0), p.batch(1)
  same(first, again)
  cuts = lambda b: sorted((b['encoder_segment_ids'] == 1).sum(1))
  tokens = lambda b: sorted(b['encoder_input_tokens'][:, 0])
  assert tokens(first) == tokens(later) and cuts(first) != cuts(later)


def test_over_long_examples_are_cut_counted_and_reported():
  parts = component('a', 5)
  parts.examples[2]['inputs'] = np.array([7] * 30 + [1], np.int32)
  p = pipeline([parts], batch_size=1)
  assert p.rows[0].cut == [2]
  assert '1 longer than the limit (inputs 16, targets 12) were cut' in p.summary()[0]
  rows = np.concatenate([p.batch(i)['encoder_input_tokens'] for i in range(p.rows[0].count)])
  assert [7] * 15 + [1] in rows.tolist()


def classes(n):
  rows = component('c', n)
  for i, example in enumerate(rows.examples):
    example['targets'] = np.array([i % 2], np.int32)
  return rows


def test_classes_are_never_packed_and_keep_their_example():
  parts = classes(10)
  p = Pipeline([parts], {'inputs': 40, 'targets': 1}, batch_size=4, seed=0, kind='encoder', eos=1)
  batches = list(p.epoch())
  assert [b['encoder_loss_weights'].sum() for b in batches] == [4, 4, 2]
  for b in batches:
    assert b['encoder_segment_ids'].max() == 1
    real = b['encoder_loss_weights'][:, 0] > 0
    first = b['encoder_input_tokens'][real, 0] - 100
    assert (b['encoder_target_tokens'][real, 0] == first % 2).all()


def test_a_class_that_is_a_text_is_refused():
  message = r'a:0 has features of lengths inputs \d+, targets \d+; an encoder-only model needs'
  with pytest.raises(DataError, match=message):
    pipeline(kind='encoder')


def test_end_and_start_reach_the_rows_and_the_fingerprint():
  parts = component('a', 5)
  parts.examples[2]['inputs'] = np.array([7] * 30 + [2], np.int32)
  p = pipeline([parts], batch_size=1, eos=2, start_id=9)
  rows = [p.batch(i) for i in range(p.rows[0].count)]
  assert [7] * 15 + [2] in np.concatenate([r['encoder_input_tokens'] for r in rows]).tolist()
  assert all(r['decoder_input_tokens'][0, 0] == 9 for r in rows)
  prints = [pipeline(**k).fingerprint for k in (
      {}, {'kind': 'encoder_decoder'}, {'eos': 1, 'start_id': 0},
      {'kind': 'decoder'}, {'start_id': 2}, {'eos': 2}, {'second_type': False})]
  assert len(set(prints[:3])) == 1 and len(set(prints)) == 5


@pytest.mark.parametrize('second_type', [True, False])
def test_the_second_of_two_texts_may_have_its_own_type(second_type):
  part = component('a', 1)
  part.examples[0].update(inputs=np.array([5, 2, 6, 2], np.int32), targets=np.array([1], np.int32))
  p = Pipeline([part], {'inputs': 5, 'targets': 1}, batch_size=1, seed=3, kind='encoder', eos=2,
               second_type=second_type)
  assert p.batch(0)['encoder_token_types'].tolist() == [[0, 0, *[int(second_type)] * 2, 0]]


def test_position_is_small_and_knows_its_data():
  p = pipeline()
  saved = p.position(1_000_000)
  assert saved['step'] == 1_000_000 and len(str(saved)) < 200
  p.check_position(saved)
  changed = component('a', 50)
  changed.examples[7]['targets'][0] += 1
  with pytest.raises(DataError, match='--allow-data-change'):
    pipeline([changed]).check_position(saved)
  with pytest.raises(DataError):
    pipeline(batch_size=8).check_position(saved)


def test_a_far_step_costs_what_a_near_one_does():
  """Counted, not timed: a jump to step 10^6 shuffles one epoch, not all before it."""
  p = pipeline()
  p.batch(1_000_000)
  assert p.rows[0]._ids_by_place.cache_info().misses <= 2


def test_any_rows_of_a_batch_equal_those_of_the_whole():
  """A mesh may give a process rows that are not adjacent."""
  want, got = pipeline().batch(5), pipeline(rows=[1, 3]).batch(5)
  same(got, {k: x[[1, 3]] for k, x in want.items()})


def test_a_feature_without_a_length_is_refused():
  with pytest.raises(UsageError, match='which have no length: set data.lengths.inputs'):
    Pipeline([component('a', 5)], {'inputs': 0, 'targets': 16}, batch_size=4, seed=3,
             kind='decoder')
