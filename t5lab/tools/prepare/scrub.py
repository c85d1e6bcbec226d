"""Masks e-mail addresses, IP addresses, card numbers and phone numbers.

Recognition is by form alone, so numbers that could be plain numbers are kept. A phone number needs
+ or 00 and a country code, or the North American form with separators or a bracketed area code.
Names and postal addresses are not masked.
"""
from collections.abc import Callable
import ipaddress
import re

from t5lab.tools.prepare.job import PrepareJob

# icon@2x.png is an image file, not an address.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w%+-][\w%+'-]{0,63}(?:\.[\w%+'-]{1,64}){0,8}@(?:[^\W_](?:[\w-]*[^\W_])?\.)+"
    r'(?!(?:png|jpe?g|gif|svg|webp|css|js)\b)[^\W\d_]{2,}(?![^\W_]|@|-\w)')
_IP = re.compile(
    r'(?:(?<![\w.:])|(?<=[g-z]:)|(?<=ipv6:))(?:[0-9a-f]{0,4}:){2,7}'
    r'(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4})(?:%\w+)?(?![\w:]|\.\d)'
    r'|(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)', re.IGNORECASE)
_VERSION = re.compile(r'(?:\bv(?:er(?:sion|\.)?)?|\brelease|\bbuild|\bsection|§)[\s:]*\Z', re.I)
_INDEX = re.compile(r'[\w)\]]\[[^\[\]]*\Z')           # inside x[…]: 1::2 is a slice
_CARD = re.compile(
    r'(?<![\w.,-])(?<!\d )[2-6](?:\d{12,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{1,7}|'
    r'\d{3}([ -])\d{6}\2\d{4,5})(?![\w-]|[.,]\d| \d)')
_INTERNATIONAL = re.compile(
    r'(?<![\w.+/-])(?:\+ ?|00(?=[1-9]\d{0,2}[ /.-]))(?!\d{1,3}\.\d{4,}-)'
    r'[1-9](?:[ ./-]?\(?\d\)?){6,14}(?![\w-]|\.\d)')
_AMERICAN = re.compile(
    r'(?<![\w.+/-])(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]\d{4}|'
    r'[2-9]\d\d([.-])[2-9]\d\d\1\d{4}|(?<=1 )[2-9]\d\d [2-9]\d\d \d{4})(?![\w-]|\.\d)')


def luhn(digits: str) -> bool:
  """Returns True if the last digit is the check digit of the others. [ISO/IEC 7812-1]"""
  doubled = (2 * int(d) - 9 * (int(d) > 4) for d in digits[-2::-2])
  return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_ip(match: re.Match) -> bool:
  text, before = match[0], match.string[max(0, match.start() - 40):match.start()]
  try:
    ipaddress.ip_address(text)
  except ValueError:
    return False
  if ':' not in text:
    return not _VERSION.search(before)         # version 1.2.3.4
  if '::' not in text:
    return True
  if _INDEX.search(before):
    return False
  # a::b is a name in C++ and 1::2 a slice, so one group must look like part of an address.
  groups = re.split('[:%]', text)
  return text == '::1' or any(len(group) > 2 and any(map(str.isdigit, group)) for group in groups)


def _digits(match: re.Match) -> str:
  return re.sub(r'\D', '', match[0])


def _is_international(match: re.Match) -> bool:
  """Accepts 8 to 15 digits [E.164], at least 10 without separators; +1 by North American rules."""
  digits = _digits(match).removeprefix('00')
  if not 8 <= len(digits) <= 15 or digits.endswith('000000'):
    return False
  if digits[0] == '1':
    return re.fullmatch(r'1[2-9]\d\d[2-9]\d{6}', digits) is not None
  return len(digits) >= 10 or re.search(r'\d[ ./()-]', match[0]) is not None


# The order matters: an address holds numbers, and a card number could pass for a phone number.
KINDS: tuple[tuple[str, re.Pattern, Callable[[re.Match], bool]], ...] = (
    ('email', _EMAIL, lambda match: True), ('ip', _IP, _is_ip),
    ('card', _CARD, lambda match: luhn(_digits(match))),
    ('phone', _INTERNATIONAL, _is_international), ('phone', _AMERICAN, lambda match: True))


def scrub(text: str, on_match: Callable[[str, str], None] = lambda kind, match: None) -> str:
  """Replaces what it recognises with <email>, <ip>, <card> and <phone>.

  on_match(kind, match) is called for each. Example: 'ann@x.org or (415) 555-2671' -> '<email> or
  <phone>'.
  """
  for kind, pattern, is_valid in KINDS:
    def mask(match, kind=kind, is_valid=is_valid):
      if not is_valid(match):
        return match[0]
      on_match(kind, match[0])
      return f'<{kind}>'
    text = pattern.sub(mask, text)
  return text


def run(job: PrepareJob) -> None:
  """Scrubs the job's fields and keeps every record.

  The examples in the report are masked too, so that the report holds no personal data.
  """
  job.declare(*(kind for kind, _, _ in KINDS))
  job.counts['changed'] = 0
  with job.write() as write:
    for record in job.read():
      before, after = job.texts(record), []
      for text in before:
        kinds = []
        after.append(scrub(text, lambda kind, _, kinds=kinds: kinds.append(kind)))
        for kind in kinds:
          job.count(kind, record, after[-1], after[-1].index(f'<{kind}>'))
      job.counts['changed'] += after != before
      write({**record.fields, **dict(zip(job.fields, after))})
