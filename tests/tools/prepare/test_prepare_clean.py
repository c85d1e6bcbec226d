import json
import sys

import numpy as np
import pytest

from t5lab.errors import DataError, UsageError
from t5lab.tools.prepare import clean
from t5lab.tools.prepare.job import PrepareJob

A, B, C, D, E = (f'This is the sentence number {name} of all.' for name in (
    'one', 'two', 'three', 'four', 'five'))


def cleaner(*only, bad_words=(), language=None):
  counted = []
  rules = clean.select(only, bad_words=bool(bad_words), language='xx' if language else '')
  return clean.Cleaner(rules, bad_words=bad_words, language=language,
                       count=lambda rule, text, at=0: counted.append((rule, text))), counted


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
def test_rules_for_lines(rule, line, kept):
  pages, counted = cleaner(rule)
  first, last = 'The first line of them.', 'And this is the last.'
  assert pages.page(f'{first}\n{line}\n\n{last}') == '\n'.join(
      [first, *([kept] if kept else []), last])
  assert counted.count((rule, line.strip())) == (kept != line.strip())


PAGES = [
    ('lorem_ipsum', 'fine\nLorem Ipsum dolor', 'lorem is fine'),
    ('curly_brace', 'fine\nif (x) { y', 'if (x) } y'),
    ('bad_words', 'fine\nSo darn, it!', 'darned undarn adarné'),
    ('bad_words', 'heck no', 'heckle'),
    ('bad_words', 'a heck of a day', 'what the-hecks'),
    ('few_sentences', 'Mr. X came. He left.', 'One. Two.\nThree.'),
]


@pytest.mark.parametrize('rule, dropped, kept', PAGES)
def test_rules_for_pages(rule, dropped, kept):
  bad_words = ['heck of', 'darn', 'heck'] if rule == 'bad_words' else ()
  pages, counted = cleaner(rule, bad_words=bad_words)
  assert pages.page(kept) == kept
  assert counted == []
  assert pages.page(dropped) is None
  assert [rule for rule, _ in counted] == [rule]


def test_all_rules_together_follow_the_code_of_c4():
  pages, counted = cleaner()
  text = '\n'.join(['menu { x }', f'  {A}  ', '', f'{B} {C} [2]', 'Too short.', f'{D}[3]'])
  assert pages.page(text) is None
  assert counted[:4] == [
      ('no_end_mark', 'menu { x }'), ('citations', B + ' ' + C + ' [2]'),
      ('no_end_mark', B + ' ' + C + ' '), ('short_line', 'Too short.')]
  pages, counted = cleaner()
  assert pages.page(f'menu {{\n{A}\n{B}\n{C}[3]') == f'{A}\n{B}\n{C}'
  assert counted == [('no_end_mark', 'menu {'), ('citations', f'{C}[3]')]


def test_a_repeated_span_is_kept_where_it_occurred_first():
  pages, counted = cleaner('repeated_spans')
  assert pages.page(f'{A} {B} {C} {D}') == f'{A} {B} {C} {D}'
  assert pages.page(f'{E}\n{A.upper()}  {B}\n{C} {E}') == f'{E}\n{E}'
  assert counted == [('repeated_spans', f'{A.upper()}  '), ('repeated_spans', B),
                  ('repeated_spans', f'{C} ')]
  assert pages.page(f'{A} {B} {D}') == f'{A} {B} {D}'        # two in a row, not three
  assert pages.page(f'{B} {C} {D}') is None                  # nothing is left
  assert counted[-1][0] == 'few_sentences'


def test_a_span_repeated_within_a_page():
  pages, _ = cleaner('repeated_spans')
  assert pages.page(' '.join([A] * 5)) == ' '.join([A] * 3)
  pages, _ = cleaner('repeated_spans')
  assert pages.page(f'{A} {B} {C} {D} {A} {B} {C} {E}') == f'{A} {B} {C} {D} {E}'


def test_spans_of_a_dropped_page_are_not_remembered():
  pages, _ = cleaner('repeated_spans', 'few_sentences', 'lorem_ipsum')
  assert pages.page(f'{A} {B} {C}\nlorem ipsum') is None
  assert pages.page(f'{A} {B} {C}') == f'{A} {B} {C}'
  assert pages.page(f'{A} {B} {C} {D} {E}') is None          # two are left
  assert pages.page(f'{C} {D} {E}') == f'{C} {D} {E}'        # and they were not remembered


def test_language():
  pages, counted = cleaner('language', language=lambda text: 0.99 if text == 'oui' else 0.98)
  assert pages.page('oui') == 'oui'
  assert pages.page('yes') is None
  assert counted == [('language', 'yes')]


def test_py3langid_distinguishes_languages():
  english = clean.language_probability('en')
  assert english('The ship sailed out of the harbour before the sun had risen.') > 0.99
  assert english('Das Schiff verließ den Hafen, noch bevor die Sonne aufgegangen war.') < 0.01
  with pytest.raises(UsageError, match='--language must be one of ace, af, .*en, .*; got english'):
    clean.language_probability('english')


def test_without_py3langid(monkeypatch):
  monkeypatch.setitem(sys.modules, 'py3langid', None)
  with pytest.raises(UsageError, match='--language needs py3langid: pip install py3langid'):
    clean.language_probability('en')


def test_select():
  assert clean.select() == set(clean.RULES) - {'bad_words', 'language'}
  assert clean.select(['policy', 'citations'], ['policy']) == {'citations'}
  assert clean.select(bad_words=True, language='en') == set(clean.RULES)
  with pytest.raises(UsageError, match="unknown rule 'polcy'. Did you mean 'policy'"):
    clean.select(without=['polcy'])
  with pytest.raises(UsageError, match='rule bad_words needs --bad-words FILE'):
    clean.select(['bad_words'])
  with pytest.raises(UsageError, match='--language CODE is given, but rule language is off'):
    clean.select(['policy'], language='en')


def test_bad_words_are_read(tmp_path):
  path = tmp_path / 'words'
  path.write_text('Darn\n\n a.b \n')
  assert clean.read_bad_words(path) == ['darn', 'a.b']
  pages, _ = cleaner('bad_words', bad_words=clean.read_bad_words(path))
  assert pages.page('a.b') is None
  assert pages.page('axb') == 'axb'
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
  job = PrepareJob('clean', [str(source)], tmp_path / 'out.jsonl', ['a', 'b'])
  clean.run(job, clean.select(['no_end_mark', 'curly_brace', 'policy']))
  written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert written == [{'a': '', 'b': B}, {'a': 'Hi.', 'b': B, 'n': 1}, {'a': 'Hi.', 'b': B}]
  assert job.counts == {'read': 3, 'unreadable': 0, 'dropped': 0, 'changed': 2, 'written': 3}
  assert {rule: entry['count'] for rule, entry in job.rules.items()} == {
      'no_end_mark': 2, 'policy': 0, 'curly_brace': 0}


def test_span_hashes_depend_on_the_order():
  pages, _ = cleaner('repeated_spans')
  span, reordered = pages._span_hashes([[A, B, C]]), pages._span_hashes([[A], [C, B]])
  assert len(span) == len(reordered) == 1 and not np.array_equal(span, reordered)
