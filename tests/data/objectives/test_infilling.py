import numpy as np
import pytest

from t5lab.data.objectives import infilling
from t5lab.errors import UsageError

IDS = dict(prefix=90, suffix=91, middle=92)


class Drawn:
  """A generator whose draws are given."""

  def __init__(self, *draws):
    self.draws = list(draws)

  def random(self):
    return self.draws.pop(0)

  def integers(self, low, high, size):
    drawn = np.array(self.draws.pop(0))
    assert size == len(drawn) and low == 0 and (drawn < high).all() and high == self.room
    return drawn


def unfim(targets, *, prefix, suffix, middle):
  """The text int32[T] without its EOS, from either order."""
  text = np.asarray(targets, np.int32)[:-1]
  places = [np.flatnonzero(text == special) for special in (prefix, suffix, middle)]
  once = [len(place) for place in places] == [1, 1, 1]
  if not once or not 0 == places[0][0] < places[1][0] < places[2][0]:
    return text
  s, m = places[1][0], places[2][0]
  return np.concatenate([text[1:s], text[m + 1:], text[s + 1:m]])   # in SPM, text[1:s] is empty


def fim(tokens, *draws):
  rng = Drawn(*draws)
  rng.room = len(tokens) + 1
  output = infilling.fim(tokens, rng, eos=1, **IDS)
  assert list(output) == ['targets'] and output['targets'].dtype == np.int32 and not rng.draws
  return output['targets'].tolist()


def test_orders_of_five_tokens():
  assert fim([5, 6, 7, 8, 9], .49, [3, 1], .49) == [90, 5, 91, 8, 9, 92, 6, 7, 1]       # PSM
  assert fim([5, 6, 7, 8, 9], .49, [1, 3], .5) == [90, 91, 8, 9, 92, 5, 6, 7, 1]        # SPM
  assert fim([5, 6, 7, 8, 9], .5) == [5, 6, 7, 8, 9, 1]
  assert fim([5, 6], .0, [0, 2], .0) == [90, 91, 92, 5, 6, 1]
  assert fim([5, 6], .0, [2, 2], .0) == [90, 5, 6, 91, 92, 1]
  assert fim([5], .0, [0, 0], .9) == [90, 91, 5, 92, 1]
  assert fim([], .0, [0, 0], .0) == [90, 91, 92, 1]


def test_a_text_with_one_of_the_ids_stays():
  for special in (90, 91, 92):
    assert fim([5, special], .0) == [5, special, 1]
  assert unfim([5, 91, 92, 1], **IDS).tolist() == [5, 91, 92]
  assert unfim([90, 92, 91, 1], **IDS).tolist() == [90, 92, 91]
  assert unfim([5, 90, 91, 92, 1], **IDS).tolist() == [5, 90, 91, 92]


def test_unfim_of_the_example():
  assert unfim([90, 5, 91, 8, 9, 92, 6, 7, 1], **IDS).tolist() == [5, 6, 7, 8, 9]
  assert unfim([90, 91, 8, 9, 92, 5, 6, 7, 1], **IDS).tolist() == [5, 6, 7, 8, 9]
  assert unfim([90, 90, 91, 92, 1], **IDS).tolist() == [90, 90, 91, 92]


@pytest.mark.parametrize('length', [0, 1, 2, 7, 50])
def test_fim_is_invertible_and_within_its_bound(rng, length):
  tokens = rng.integers(2, 90, length)
  for _ in range(100):
    output = infilling.fim(tokens, rng, eos=1, **IDS)['targets']
    assert unfim(output, **IDS).tolist() == tokens.tolist()
    assert len(output) in (length + 1, infilling.fim_sizes(length)['targets'])


def test_shares_and_cuts(rng):
  """Half stay. Of the rest, half either order, of two tokens and two cuts of 0, 1 and 2 each."""
  eighteenths = {'90 91 5 6 92 1': 2, '90 5 91 6 92 1': 1, '90 5 6 91 92 1': 1,
                 '90 91 6 92 5 1': 5, '90 91 92 5 6 1': 7, '90 5 91 92 6 1': 2}
  output = [' '.join(map(str, infilling.fim([5, 6], rng, eos=1, **IDS)['targets'].tolist()))
          for _ in range(7200)]
  assert abs(output.count('5 6 1') - 3600) < 5 * 43
  assert {*eighteenths, '5 6 1'} == set(output)
  for text, parts in eighteenths.items():
    assert abs(output.count(text) - 200 * parts) < 5 * (200 * parts)**0.5
  output = [infilling.fim([5, 6], rng, eos=1, rate=1., **IDS)['targets'] for _ in range(50)]
  assert all(m[0] == 90 for m in output)


def test_segments():
  assert infilling.fim_segment('x', {'targets': 64}) == 60
  assert infilling.fim_segment('x', {'targets': 5}) == 1
  with pytest.raises(UsageError, match="'x' cannot reorder text in 4 targets: the minimum is 5"):
    infilling.fim_segment('x', {'targets': 4})
