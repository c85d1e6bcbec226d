"""Splits text into sentences by one plain rule, for objectives that need whole sentences.

A sentence ends
- at . ! ? or … (or several, e.g. ?! and ...) and the closing quotes and brackets that follow,
  before white space; but not if the next word starts in lower case, or if a single dot belongs to
  an abbreviation of the lists below, to initials (J., U.S., e.g.), or to a number that starts the
  sentence (1.)
- at an empty line.
White space belongs to the sentence before it. For languages that put spaces between sentences.
"""
import re

ABBREVIATIONS = frozenset(
    'mr mrs ms dr prof st sr jr rev hon gen col maj capt lt sgt cmdr gov sen rep pres messrs '
    'vs cf al viz inc ltd co corp dept jan feb mar apr jun jul aug sep sept oct nov dec'.split())
BEFORE_NUMBERS = frozenset(
    'no nos vol vols p pp fig figs eq sec ch art ca c approx'.split())   # no. 5, but: He said no.
_LONGEST_WORD = 32   # characters before a dot that are examined

# The lookbehind and the possessive ++ keep a page full of dots linear in time.
_END = re.compile(r"""(?P<mark>(?<![.!?…])[.!?…]++)["'”’»)\]]*+\s++|\n[^\S\n]*+\n\s*+""")
_EMPTY_LINE = re.compile(r'\n[^\S\n]*+\n')
_NEXT = re.compile(r"""["'“‘«(\[]*+(.)""")
_WORD = re.compile(r"""[^\s"'“‘«(\[—-]*+\Z""")
_INITIALS = re.compile(r'[^\W\d_](?:\.[^\W\d_])+|[A-HJ-Z]')   # I is rather the pronoun


def _abbreviates(before: str, following: str) -> bool:
  """True if the dot after `before` marks an abbreviation. following: the character after it."""
  word = _WORD.search(before)[0]
  return (word.lower() in ABBREVIATIONS
          or word.lower() in BEFORE_NUMBERS and following.isdigit()
          or bool(_INITIALS.fullmatch(word))
          or word.isdigit() and word == before.strip())


def split(text: str) -> list[str]:
  """The sentences of a text. Joined, they are the text again, character by character.

  Example: 'Dr. A. Lee left. "Why?" No one knew.' -> 'Dr. A. Lee left. ', '"Why?" ', 'No one knew.'
  """
  cuts = [0]
  for end in _END.finditer(text):
    following = _NEXT.match(text, end.end())
    if not following:
      continue   # white space at the end of the text
    if not _EMPTY_LINE.search(end[0]):
      before = text[max(cuts[-1], end.start() - _LONGEST_WORD):end.start()]
      if following[1].islower() or end['mark'] == '.' and _abbreviates(before, following[1]):
        continue
    cuts.append(end.end())
  return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)]) if a < b]
