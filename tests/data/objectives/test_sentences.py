import pytest

from t5lab.data.objectives import sentences

END = '¦'   # where a sentence ends, in the texts below


@pytest.mark.parametrize('marked', [
    '', ' ', 'One', 'One.', ' One. ¦Two? ¦Three! ¦Four… ¦Five', 'One.  \n¦Two.\t¦Three. \n',
    'Wait... ¦What?! ¦No', 'He ran... and ran. ¦Then. ¦7 men. ¦Él vino.',
    '"One." ¦"Two!" ¦(Three.) ¦\'Four.\' ¦“Five?” ¦[Six.] ¦«Siete.» ¦Eight',
    '"Why?" asked he. ¦"No!" said she.',
    'Dr. Lee, Mr. Bo and Mrs. Po vs. Smith et al. (2019). ¦Then Jan. 5 came.',
    'See Fig. 3, p. 12 and No. 7. ¦He said no. ¦Then: a pig in a fig. ¦So.',
    'J. R. R. Tolkien. ¦It was I. ¦The U.S. Senate, e.g. Obama, i.e. him. ¦Part A. one',
    'The A.B.C.D. Efg',
    'My St. Louis—Dr. No—left "Prof. X". ¦End',
    '1. One. ¦2. Two. ¦3. Three is 3.5 m. ¦It was 1999. ¦Then 2000.',
    'The Title\n\n¦the text\nruns on. ¦On\n \t\n\n¦x', 'No. \n\n¦x', 'a\r\n\r\n¦b.\r\n¦C',
    'At www.example.com. ¦Done.now. ok', '. ¦.', '.....', 'The end." ¦"X', 'x. ("', 'Mr. ',
    'Is 3. ¦(4) and', 'Pages 1 and p. ¦X',
])
def test_sentences(marked):
  split = sentences.split(marked.replace(END, ''))
  assert split == [s for s in marked.split(END) if s]


def test_joined_sentences_are_the_text(rng):
  """Any text of the characters that matter, character by character, and no empty sentence."""
  count = 0
  for _ in range(500):
    text = ''.join(rng.choice(list('.?!…"”)(\n\n\r  \tAaI1Mr—é'), 60))
    split = sentences.split(text)
    assert ''.join(split) == text and all(split)
    count += len(split)
  assert count > 2000


def test_a_sentence_is_told_by_its_own_words():
  """A word before the last cut, or far before the dot, says nothing."""
  assert sentences.split('x' * 40 + 'Mr. X') == ['x' * 40 + 'Mr. ', 'X']
  assert sentences.split('Hm! 1. One') == ['Hm! ', '1. One']
