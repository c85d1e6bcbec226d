"""Changes of logits, by hand. tests/tools/interop/test_generation.py compares with transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5lab.decoding import processors
from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding
from t5lab.decoding.processors import Read
from t5lab.errors import UsageError

V, EOS = 10, 1
LOGITS = np.array([1., -1., 2., -2., 3., -3., 4., -4., 5., -5.], np.float32)


def process(ids, new=0, left=5, *, stops=(EOS,), reads_start=True, padding=2, **options):
  """What is done to LOGITS after these ids: {id: new value}. Under jit, with ids that do not count.
  """
  run = processors.compose(Decoding(9, **options), stops, reads_start=reads_start)
  row = jnp.array([[*ids, *range(padding)]], jnp.int32)

  @jax.jit
  def go(count, new, left):
    return run(jnp.array(LOGITS)[None], Read(row, count, new, left))[0]
  out = np.asarray(go(len(ids), jnp.array([new]), jnp.array([left])))
  return {i: float(out[i]) for i in range(V) if out[i] != LOGITS[i]}


def banned(*args, **options):
  changed = process(*args, **options)
  assert set(changed.values()) <= {-np.inf}
  return set(changed)


def test_options_that_are_off_cost_nothing():
  assert processors.compose(Decoding(9, beams=3, temperature=1.), (EOS,), reads_start=True) is None
  assert processors.compose(Decoding(9, bad_words_ids=((EOS,),)), (EOS,), reads_start=True) is None
  assert processors.compose(Decoding(9, forced_first=3), (EOS,), reads_start=False) is None


@pytest.mark.parametrize('ids, n, expected', [
    ([5, 6, 7, 5, 6], 3, {7}), ([5, 6, 7, 5, 6, 8, 5, 6], 3, {7, 8}), ([5, 6, 7, 5], 3, set()),
    ([5, 6], 3, set()), ([5], 3, set()), ([5, 5], 2, {5}), ([5, 6, 7], 1, {5, 6, 7}),
    ([5, 6, 7], 40, set()), ([0, 1, 0], 2, {1})])
def test_no_n_ids_occur_twice(ids, n, expected):
  assert banned(ids, no_repeat_ngram_size=n) == expected


@pytest.mark.parametrize('ids, expected', [
    ([4, 5], {2, 6}), ([5], {2}), ([3, 4], {2, 8}), ([4, 4, 5, 3], {2}), ([7], {2})])
def test_sequences_that_are_never_written(ids, expected):
  """Those of one id always, others after what they start with; an end of the text is none."""
  words = [[2], [EOS], [4, 5, 6], [3, 4, 8], [4, 4, 5, 3, 9, 7]]
  assert banned(ids, bad_words_ids=words) == expected


def test_a_penalty_for_what_was_read():
  assert process([4, 5, 4], repetition_penalty=2.) == {4: 1.5, 5: -6.}
  assert process([4], repetition_penalty=0.5) == {4: 6.}


@pytest.mark.parametrize('options, count, new, expected', [
    (dict(min_length=4), 3, 0, {1, 3}), (dict(min_length=4), 4, 9, set()),
    (dict(min_new_tokens=2), 9, 1, {1, 3}), (dict(min_new_tokens=2), 2, 2, set()),
    (dict(suppress_tokens=[3, 5]), 2, 1, {3, 5}),
    (dict(begin_suppress_tokens=[3, 5]), 2, 0, {3, 5}),
    (dict(begin_suppress_tokens=[3, 5]), 2, 1, set()),
    (dict(begin_suppress_tokens=[3, 5], forced_first=2), 2, 1, {3, 5})])
def test_ids_that_may_not_come_yet(options, count, new, expected):
  assert banned([7] * count, new, stops=(1, 3), **options) == expected


def test_a_forced_id_has_log_p_0():
  others = {i: -np.inf for i in range(V)}
  assert process([7], 0, forced_first=4) == {**others, 4: 0.}
  assert process([7], 2, 1, forced_last=4) == {**others, 4: 0.}
  assert not process([7], 1, 2, forced_first=4, forced_last=4)


@pytest.mark.parametrize('options, message', [
    (dict(early_stopping='yes'), "early_stopping must be one of exact, false, .*, got 'yes'"),
    (dict(bad_words_ids=[[]]), 'bad_words_ids has an empty sequence'),
    (dict(bad_words_ids=[3]), 'bad_words_ids must be a list of lists of token ids'),
    (dict(suppress_tokens=3), 'suppress_tokens must be a list of token ids, got 3'),
    (dict(min_length=-1), 'min_length must be 0 or more, got -1'),
    (dict(repetition_penalty=0.), 'repetition_penalty must be a number above 0'),
    (dict(length_penalty=float('nan')), 'length_penalty must be a number, got nan'),
    (dict(min_p=1.5), 'min_p must be between 0'),
    (dict(forced_last=3, suppress_tokens=(3,)), 'forced_last=3 is among suppress_tokens')])
def test_bad_options_are_named(options, message):
  with pytest.raises(UsageError, match=message):
    Decoding(9, **options)


@pytest.mark.parametrize('options', [
    dict(stop_ids=(10,)), dict(start=10), dict(forced_first=-2), dict(forced_last=10),
    dict(suppress_tokens=(3, 10)), dict(begin_suppress_tokens=(-1,)),
    dict(bad_words_ids=((3, 10),))])
def test_an_id_that_the_model_does_not_have(options):
  Decoding(9, stop_ids=[3], start=9, bad_words_ids=[[9]]).check_ids(V)
  with pytest.raises(UsageError, match=f'{next(iter(options))} must be less than the vocab'):
    Decoding(9, **options).check_ids(V)


# -- in an engine ----------------------------------------------------------------------------------


@functools.cache
def counter(start_id):
  """A 'model' that counts up from its last token."""
  def start(params, inputs, segments, length):
    return {'self': jnp.zeros((1, inputs.shape[0], length))}

  def step(params, tokens, cache, index):
    return 9. * (jnp.arange(32) == (tokens + 1) % 32) - 0.1 * jnp.arange(32), cache
  prefill = None if start_id is not None else lambda params, tokens, cache: cache
  return Engine(start, step, prefill, eos=EOS, start_id=start_id, batch_size=2)


def test_prompts_count_however_they_are_read():
  """Each row by itself: 12 tokens are read at once, the rest one by one."""
  prompts = [list(range(5, 17)), [20, 9, 10] + [3] * 12 + [9], [8, 9, 20, 9, 8, 9]]
  for options, expected in ((dict(no_repeat_ngram_size=2), [17, 0, 10]),
                            (dict(bad_words_ids=((8, 9, 10),)), [17, 10, 0]),
                            (dict(min_length=14, stop_ids=(10, 17)), [0, EOS, 0])):
    out = counter(None).generate({}, prompts, Decoding(2, **options))
    assert out[:, 0].tolist() == expected, options


def test_a_total_of_prompt_and_output():
  """Each row has what its prompt leaves; EOS shows where it ends."""
  out = counter(None).generate({}, [[5], [5, 6, 7], [29, 30]], Decoding(6, max_total=5))
  assert out.tolist() == [[6, 7, 8, 9, EOS, 0], [8, 9, EOS, 0, 0, 0], [31, 0, EOS, 0, 0, 0]]
  last = Decoding(6, max_total=4, forced_last=20)
  assert counter(None).generate({}, [[5], [5, 6, 7]], last).tolist() == [
      [6, 7, 20, EOS, 0, 0], [20, EOS, 0, 0, 0, 0]]


@pytest.mark.parametrize('beams', [1, 2])
def test_padding_may_be_among_the_ends(beams):
  out = counter(7).generate({}, [[5]], Decoding(4, beams=beams, start=30, stop_ids=(0, 9)))
  assert out.tolist() == [[31, EOS, 0, 0]]


def test_another_start():
  run = lambda **options: counter(7).generate({}, [[5]], Decoding(3, **options))[0].tolist()
  assert run() == [8, 9, 10] and run(start=20) == [21, 22, 23]
  assert run(start=20, beams=2)[0] == 21
