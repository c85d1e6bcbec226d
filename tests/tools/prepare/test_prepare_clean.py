import json
import sys

import numpy as np
import pytest

from t5lab.errors import DataError, UsageError
from t5lab.tools.prepare import clean, job

A, B, C, D, E = (f'This is the sentence number {name} of all.' for name in (
    'one', 'two', 'three', 'four', 'five'))


def cleaner(*only, bad_words=(), language=None):
  said = []
  rules = clean.select(only, bad_words=bool(bad_words), language='xx' if language else '')
  return clean.Cleaner(rules, bad_words=bad_words, language=language,
                       count=lambda rule, text, at=0: said.append((rule, text))), said


LINES = [
    ('citations', 'Whales [1] sing[23][citation needed] low[edit] [].', 'Whales  sing low .'),
    ('citations', 'See [a] and [1a].', 'See [a] and [1a].'),
    ('no_end_mark', 'A menu of things', None),
    ('no_end_mark', 'It goes on and on...', None),
    ('no_end_mark', 'It goes on and on…', None),
    ('no_end_mark', 'He said: "so."', 'He said: "so."'),
    ('no_end_mark', 'Why? Oh!', 'Why? Oh!'),
    ('no_end_mark', 'Why?  ', 'Why?'),
    ('no_end_mark', 'The end (really.)', None),
    ('short_line', 'Only four words here.', None),
    ('short_line', 'There are five words here.', 'There are five words here.'),
    ('long_word', 'x' * 1001, None),
    ('long_word', 'x' * 1000, 'x' * 1000),
    ('javascript', 'Please enable JavaScript now.', None),
    ('javascript', 'Please enable Java now.', 'Please enable Java now.'),
    ('policy', 'Read our Privacy Policy today.', None),
    ('policy', 'We honour these Terms of Use.', None),
    ('policy', 'Our cookie policy is short.', None),
    ('policy', 'This site uses cookies.', None),
    ('policy', 'About the use of cookies.', None),
    ('policy', 'We use cookies.', None),
    ('policy', 'We bake cookies.', 'We bake cookies.'),
]


@pytest.mark.parametrize('rule, line, kept', LINES)
def test_rules_of_lines(rule, line, kept):
  page, said = cleaner(rule)
  first, last = 'The first line of them.', 'And this is the last.'
  assert page.page(f'{first}\n{line}\n\n{last}') == '\n'.join(
      [first, *([kept] if kept else []), last])
  assert said.count((rule, line.strip())) == (kept != line.strip())


PAGES = [
    ('lorem_ipsum', 'fine\nLorem Ipsum dolor', 'lorem is fine'),
    ('curly_brace', 'fine\nif (x) { y', 'if (x) } y'),
    ('bad_words', 'fine\nSo darn, it!', 'darned undarn adarné'),
    ('bad_words', 'heck no', 'heckle'),
    ('bad_words', 'a heck of a day', 'what the-hecks'),
    ('few_sentences', 'Mr. X came. He left.', 'One. Two.\nThree.'),
]


@pytest.mark.parametrize('rule, goes, stays', PAGES)
def test_rules_of_pages(rule, goes, stays):
  page, said = cleaner(rule, bad_words=['heck of', 'darn', 'heck'] if rule == 'bad_words' else ())
  assert page.page(stays) == stays
  assert said == []
  assert page.page(goes) is None
  assert [rule for rule, _ in said] == [rule]


def test_the_rules_together_as_in_the_code_of_c4():
  page, said = cleaner()
  text = '\n'.join(['menu { x }', f'  {A}  ', '', f'{B} {C} [2]', 'Too short.', f'{D}[3]'])
  assert page.page(text) is None
  assert said[:4] == [
      ('no_end_mark', 'menu { x }'), ('citations', B + ' ' + C + ' [2]'),
      ('no_end_mark', B + ' ' + C + ' '), ('short_line', 'Too short.')]
  page, said = cleaner()
  assert page.page(f'menu {{\n{A}\n{B}\n{C}[3]') == f'{A}\n{B}\n{C}'
  assert said == [('no_end_mark', 'menu {'), ('citations', f'{C}[3]')]


def test_a_span_that_comes_again_stays_where_it_was_first():
  page, said = cleaner('repeated_spans')
  assert page.page(f'{A} {B} {C} {D}') == f'{A} {B} {C} {D}'
  assert page.page(f'{E}\n{A.upper()}  {B}\n{C} {E}') == f'{E}\n{E}'
  assert said == [('repeated_spans', f'{A.upper()}  '), ('repeated_spans', B),
                  ('repeated_spans', f'{C} ')]
  assert page.page(f'{A} {B} {D}') == f'{A} {B} {D}'        # two in a row, not three
  assert page.page(f'{B} {C} {D}') is None                  # nothing is left
  assert said[-1][0] == 'few_sentences'


def test_a_span_that_comes_again_in_its_page():
  page, _ = cleaner('repeated_spans')
  assert page.page(' '.join([A] * 5)) == ' '.join([A] * 3)
  page, _ = cleaner('repeated_spans')
  assert page.page(f'{A} {B} {C} {D} {A} {B} {C} {E}') == f'{A} {B} {C} {D} {E}'


def test_spans_of_a_page_that_goes_are_not_remembered():
  page, _ = cleaner('repeated_spans', 'few_sentences', 'lorem_ipsum')
  assert page.page(f'{A} {B} {C}\nlorem ipsum') is None
  assert page.page(f'{A} {B} {C}') == f'{A} {B} {C}'
  assert page.page(f'{A} {B} {C} {D} {E}') is None          # two are left
  assert page.page(f'{C} {D} {E}') == f'{C} {D} {E}'        # and they were not remembered


def test_language():
  page, said = cleaner('language', language=lambda text: 0.99 if text == 'oui' else 0.98)
  assert page.page('oui') == 'oui'
  assert page.page('yes') is None
  assert said == [('language', 'yes')]


def test_py3langid_tells_languages():
  english = clean.language_probability('en')
  assert english('The ship sailed out of the harbour before the sun had risen.') > 0.99
  assert english('Das Schiff verließ den Hafen, noch bevor die Sonne aufgegangen war.') < 0.01
  with pytest.raises(UsageError, match='--language english: not one of ace, af, .*, en, '):
    clean.language_probability('english')


def test_without_py3langid(monkeypatch):
  monkeypatch.setitem(sys.modules, 'py3langid', None)
  with pytest.raises(UsageError, match='--language needs py3langid: pip install py3langid'):
    clean.language_probability('en')


def test_select():
  assert clean.select() == set(clean.RULES) - {'bad_words', 'language'}
  assert clean.select(['policy', 'citations'], ['policy']) == {'citations'}
  assert clean.select(bad_words=True, language='en') == set(clean.RULES)
  with pytest.raises(UsageError, match="no rule 'polcy'. Did you mean 'policy'"):
    clean.select(without=['polcy'])
  with pytest.raises(UsageError, match='rule bad_words needs --bad-words FILE'):
    clean.select(['bad_words'])
  with pytest.raises(UsageError, match='--language CODE is given, but rule language is off'):
    clean.select(['policy'], language='en')


def test_bad_words_are_read(tmp_path):
  path = tmp_path / 'words'
  path.write_text('Darn\n\n a.b \n')
  assert clean.read_bad_words(path) == ['darn', 'a.b']
  page, _ = cleaner('bad_words', bad_words=clean.read_bad_words(path))
  assert page.page('a.b') is None
  assert page.page('axb') == 'axb'
  path.write_text('\n')
  with pytest.raises(DataError, match='holds no words'):
    clean.read_bad_words(path)
  path.write_bytes(b'd\xe9j\xe0')
  with pytest.raises(DataError, match='byte 1 is not UTF-8'):
    clean.read_bad_words(path)
  with pytest.raises(DataError, match='cannot read .*: No such file'):
    clean.read_bad_words(tmp_path / 'none')


def test_run(tmp_path):
  rows = [{'a': f'{A} {{', 'b': B}, {'a': 'Hi.', 'b': f'{B}\nmenu', 'n': 1}, {'a': 'Hi.', 'b': B}]
  source = tmp_path / 'in.jsonl'
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  j = job.Job('clean', [str(source)], tmp_path / 'out.jsonl', ['a', 'b'])
  clean.run(j, clean.select(['no_end_mark', 'curly_brace', 'policy']))
  written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert written == [{'a': '', 'b': B}, {'a': 'Hi.', 'b': B, 'n': 1}, {'a': 'Hi.', 'b': B}]
  assert j.counts == {'read': 3, 'unreadable': 0, 'dropped': 0, 'changed': 2, 'written': 3}
  assert {rule: found['count'] for rule, found in j.rules.items()} == {
      'no_end_mark': 2, 'policy': 0, 'curly_brace': 0}


def test_numbers_of_spans_are_not_of_their_order():
  page, _ = cleaner('repeated_spans')
  one, other = page._numbers([[A, B, C]]), page._numbers([[A], [C, B]])
  assert len(one) == len(other) == 1 and not np.array_equal(one, other)
