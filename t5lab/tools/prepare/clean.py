"""C4's heuristics for web pages, each a rule that can be left out. [Raffel et al. 2020, 2.2]

Rules of lines, in this order, as in TFDS (tensorflow_datasets/text/c4_utils.py), whose order and
numbers made the C4 that was released; the paper's first version says 3 words and 5 sentences, its
last one and the code 5 words and 3 sentences, which are ours:

  citations       takes [1], [], [edit] and [citation needed] out of the line
  long_word       a line with a word over 1000 characters goes (code only)
  no_end_mark     a line that does not end in . ! ? or ", or ends in … or ... goes
  short_line      a line under 5 words goes
  javascript      a line that says javascript goes
  policy          a line with 'terms of use', 'privacy policy', 'cookie policy', 'uses cookies',
                  'use of cookies' or 'use cookies' goes

and of pages, by what the rules of lines left:

  lorem_ipsum     a page that says lorem ipsum goes
  curly_brace     a page with a { goes
  bad_words       a page with a word of the list goes, as a word of its own (the code misses it at
                  the ends of a line); the list is the person's
  few_sentences   a page under 3 sentences goes (objectives/sentences.py splits; C4 used nltk)
  repeated_spans  all but the first of three sentences in a row that come again anywhere, go (the
                  paper's rule; the code drops lines that come again). Case and spaces do not count
  language        a page that py3langid gives less than 0.99 for the language goes (C4 asked
                  langdetect, which is no longer kept up)

lorem_ipsum, curly_brace and bad_words look at a line after no_end_mark and short_line, as in the
code: where those rules are on, a brace in a line that goes anyway condemns no page.
"""
from collections.abc import Callable, Collection
import re

import numpy as np

from t5lab.data.objectives import sentences
from t5lab.errors import DataError, UsageError, did_you_mean
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import Job

RULES = ('citations', 'long_word', 'no_end_mark', 'short_line', 'javascript', 'policy',
         'lorem_ipsum', 'curly_brace', 'bad_words', 'few_sentences', 'repeated_spans', 'language')
OF_LINES = RULES[:6]
MIN_WORDS, MIN_SENTENCES, LONGEST_WORD, SPAN = 5, 3, 1000, 3
PROBABILITY = 0.99
END_MARKS = ('.', '!', '?', '"')
POLICIES = ('terms of use', 'privacy policy', 'cookie policy', 'uses cookies', 'use of cookies',
            'use cookies')
_CITATION = re.compile(r'\[\d*\]|\[edit\]|\[citation needed\]')


def select(only: Collection[str] = (), without: Collection[str] = (), *,
           bad_words: bool = False, language: str = '') -> frozenset[str]:
  """The rules that apply: `only` or all, less `without`. Two need something: bad_words a list,
  language a language; unless named, they are off where that is missing."""
  for name in (*only, *without):
    if name not in RULES:
      raise UsageError(f'no rule {name!r}.{did_you_mean(name, RULES)}')
  for name, given, flag in (('bad_words', bad_words, '--bad-words FILE'),
                            ('language', language, '--language CODE')):
    if name in only and not given:
      raise UsageError(f'rule {name} needs {flag}')
    if given and (name in without or only and name not in only):
      raise UsageError(f'{flag} is given, but rule {name} is off')
  off = {name for name, given in (('bad_words', bad_words), ('language', language)) if not given}
  return frozenset(only or RULES) - frozenset(without) - off


def read_bad_words(path: str) -> list[str]:
  """One word or phrase a line. DataError if the file cannot be read or has none."""
  try:
    with open(path, encoding='utf-8') as f:
      found = [line.strip().lower() for line in f if line.strip()]
  except OSError as e:
    raise DataError(f'cannot read {path}: {e.strerror}') from e
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: byte {e.start} is not UTF-8') from e
  if not found:
    raise DataError(f'{path} holds no words')
  return found


def language_probability(code: str) -> Callable[[str], float]:
  """text -> the share that py3langid gives the language. UsageError for one that it does not know,
  or if it is not installed."""
  try:
    from py3langid import langid
  except ImportError as e:
    raise UsageError('--language needs py3langid: pip install py3langid') from e
  identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
  known = sorted(set(map(str, identifier.nb_classes)))
  if code not in known:
    raise UsageError(f'--language {code}: not one of {", ".join(known)}')
  return lambda text: float(dict(identifier.rank(text))[code])


class Cleaner:
  """Applies rules to pages, one after another. count(rule, text, at): told of each text
  that went, or that changed at `at`."""

  def __init__(self, rules: Collection[str], *, bad_words: Collection[str] = (), language=None,
               count: Callable[..., None] = lambda rule, text, at=0: None):
    self._rules, self._language, self._count = frozenset(rules), language, count
    self._bad = re.compile(r'(?<!\w)(?:' + '|'.join(map(re.escape, bad_words)) + r')(?!\w)')
    self._spans = hashes.Table()

  def page(self, text: str) -> str | None:
    """The page without the lines that went, or None if it went."""
    lines = []
    for line in text.splitlines():
      kept = self._line(line.strip())
      if not kept:
        continue
      if rule := self._condemned(kept):
        return self._gone(rule, kept)
      lines.append(kept)
    parts = [sentences.split(line) for line in lines]
    if self._few(parts):
      return self._gone('few_sentences', text)
    if 'language' in self._rules and self._language('\n'.join(lines)) < PROBABILITY:
      return self._gone('language', text)
    if 'repeated_spans' in self._rules:
      parts = self._without_repeated(parts)
      if not parts or self._few(parts):
        return self._gone('few_sentences', text)
      self._spans.add(np.unique(self._numbers(parts)))
      lines = [''.join(line).strip() for line in parts]
    return '\n'.join(lines)

  def _gone(self, rule, text):
    self._count(rule, text)

  def _line(self, line):
    """The line as it stays, or None."""
    on, lower = self._rules, line.lower()
    if not line:
      return None                    # no rule took it
    if 'long_word' in on and any(len(word) > LONGEST_WORD for word in line.split()):
      return self._gone('long_word', line)
    if 'citations' in on and (bare := _CITATION.sub('', line)) != line:
      self._count('citations', line, _CITATION.search(line).start())
      line = bare
    if 'no_end_mark' in on and (not line.endswith(END_MARKS) or line.endswith('...')):
      return self._gone('no_end_mark', line)
    if 'short_line' in on and len(line.split()) < MIN_WORDS:
      return self._gone('short_line', line)
    if 'javascript' in on and 'javascript' in lower:
      return self._gone('javascript', line)
    if 'policy' in on and any(policy in lower for policy in POLICIES):
      return self._gone('policy', line)
    return line

  def _condemned(self, line):
    """The rule by which this line costs the page, if any."""
    lower = line.lower()
    if 'lorem_ipsum' in self._rules and 'lorem ipsum' in lower:
      return 'lorem_ipsum'
    if 'curly_brace' in self._rules and '{' in line:
      return 'curly_brace'
    if 'bad_words' in self._rules and self._bad.search(lower):
      return 'bad_words'
    return None

  def _few(self, parts):
    return 'few_sentences' in self._rules and sum(map(len, parts)) < MIN_SENTENCES

  def _numbers(self, parts):
    """uint64[sentences - 2]: of every three sentences in a row."""
    return hashes.ngrams(hashes.hash_all([
        ' '.join(sentence.lower().split()) for line in parts for sentence in line]), SPAN)

  def _without_repeated(self, parts):
    """Sentences by line, without spans that an earlier page, or this one, had.

    Only the spans of a page that stays are remembered: what comes again keeps its first place.
    """
    spans = self._numbers(parts)
    seen = self._spans.contains(spans)
    gone, first = set(), {}
    for i, span in enumerate(spans.tolist()):
      here = set(range(i, i + SPAN))
      if seen[i]:
        gone |= here
      elif span in first:               # not what it shares with its own first place
        gone |= here - set(range(first[span], first[span] + SPAN))
      else:
        first[span] = i
    if not gone:
      return parts
    left, at = [], 0
    for line in parts:
      kept = []
      for sentence in line:
        if at in gone:
          self._count('repeated_spans', sentence)
        else:
          kept.append(sentence)
        at += 1
      left.append(kept)
    return [line for line in left if line]


def run(job: Job, rules: Collection[str], *, bad_words: Collection[str] = (),
        language: Callable[[str], float] | None = None) -> None:
  """Cleans the job's fields; a row goes when one of them does.

  Memory: with repeated_spans, a hashes.Table with an entry for each three sentences in a row.
  """
  row = None
  cleaner = Cleaner(rules, bad_words=bad_words, language=language,
                    count=lambda rule, text, at=0: job.count(rule, row, text, at))
  for rule in RULES:
    if rule in rules:
      job.count(rule, by=0)
  job.counts.update(dropped=0, changed=0)
  with job.write() as write:
    for row in job.read():
      before = job.texts(row)
      after = []
      for text in before:
        page = cleaner.page(text)
        if page is None:
          break
        after.append(page)
      if len(after) < len(before):
        job.counts['dropped'] += 1
        continue
      job.counts['changed'] += after != before
      write({**row.fields, **dict(zip(job.fields, after))})
