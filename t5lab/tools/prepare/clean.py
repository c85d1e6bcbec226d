"""Cleans web pages with the rules of C4; each can be turned off. [Raffel et al. 2020, 2.2]

Rules for lines, in the order and with the thresholds of the code that made the released C4
(tensorflow_datasets/text/c4_utils.py). The first version of the paper says 3 words and 5 sentences;
its last version and the code say 5 words and 3 sentences, as we do.

  citations       removes [1], [], [edit] and [citation needed] from the line
  long_word       drops a line with a word of more than 1000 characters (code only)
  no_end_mark     drops a line that does not end in . ! ? or ", or that ends in … or ...
  short_line      drops a line of fewer than 5 words
  javascript      drops a line that contains 'javascript'
  policy          drops a line that contains 'terms of use', 'privacy policy', 'cookie policy',
                  'uses cookies', 'use of cookies' or 'use cookies'

Rules for pages, applied to the lines that are left:

  lorem_ipsum     drops a page that contains 'lorem ipsum'
  curly_brace     drops a page that contains {
  bad_words       drops a page that contains a word or phrase of the --bad-words file as a whole
                  word (the code misses words at the ends of a line)
  few_sentences   drops a page of fewer than 3 sentences (we split with objectives/sentences.py, C4
                  did with nltk)
  repeated_spans  keeps only the first occurrence of any three consecutive sentences (the paper's
                  rule; the code drops repeated lines). Case and spaces are ignored
  language        drops a page to which py3langid gives a probability below 0.99 for --language (C4
                  used langdetect, which is no longer maintained)

lorem_ipsum, curly_brace and bad_words see only lines that the rules for lines kept: a brace in a
line that is dropped anyway does not drop the page.
"""
from collections.abc import Callable, Collection
import itertools
import re

import numpy as np

from t5lab.data.objectives import sentences
from t5lab.errors import DataError, UsageError, did_you_mean
from t5lab.tools.prepare import hashes
from t5lab.tools.prepare.job import PrepareJob

RULES = ('citations', 'long_word', 'no_end_mark', 'short_line', 'javascript', 'policy',
         'lorem_ipsum', 'curly_brace', 'bad_words', 'few_sentences', 'repeated_spans', 'language')
MIN_WORDS, MIN_SENTENCES, MAX_WORD_LENGTH, SPAN = 5, 3, 1000, 3
MIN_LANGUAGE_PROBABILITY = 0.99
END_MARKS = ('.', '!', '?', '"')
POLICIES = ('terms of use', 'privacy policy', 'cookie policy', 'uses cookies', 'use of cookies',
            'use cookies')
_CITATION = re.compile(r'\[\d*\]|\[edit\]|\[citation needed\]')


def select(only: Collection[str] = (), without: Collection[str] = (), *,
           bad_words: str | bool | None = None, language: str | None = None) -> frozenset[str]:
  """Returns the rules that apply: `only` (or all) less `without`.

  The rules bad_words and language need their argument and are off by default without it.
  """
  for name in (*only, *without):
    if name not in RULES:
      raise UsageError(f'unknown rule {name!r}.{did_you_mean(name, RULES)}')
  off = set(without)
  for name, given, flag in (('bad_words', bad_words, '--bad-words FILE'),
                            ('language', language, '--language CODE')):
    if name in only and not given:
      raise UsageError(f'rule {name} needs {flag}')
    if given and (name in without or only and name not in only):
      raise UsageError(f'{flag} is given, but rule {name} is off')
    if not given:
      off.add(name)
  return frozenset(only or RULES) - off


def read_bad_words(path: str) -> list[str]:
  """Reads one word or phrase per line. Raises DataError if the file is unreadable or empty."""
  try:
    with open(path, encoding='utf-8') as f:
      words = [line.strip().lower() for line in f if line.strip()]
  except OSError as e:
    raise DataError(f'cannot read {path}: {e.strerror}') from e
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: byte {e.start} is not UTF-8') from e
  if not words:
    raise DataError(f'{path} holds no words')
  return words


def language_probability(code: str) -> Callable[[str], float]:
  """Returns a function: text -> py3langid's probability that its language is `code`.

  Raises UsageError if py3langid is not installed or does not know the language.
  """
  try:
    from py3langid import langid
  except ImportError as e:
    raise UsageError('--language needs py3langid: pip install py3langid') from e
  identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
  known = sorted(set(map(str, identifier.nb_classes)))
  if code not in known:
    raise UsageError(f'--language must be one of {", ".join(known)}; got {code}')
  return lambda text: float(dict(identifier.rank(text))[code])


class Cleaner:
  """Applies rules to pages in turn.

  count(rule, text, at) is called with each text that was dropped, or changed at position `at`.
  """

  def __init__(self, rules: Collection[str], *, bad_words: Collection[str],
               language: Callable[[str], float] | None, count: Callable[..., None]):
    self._rules, self._language, self._count = frozenset(rules), language, count
    self._bad = re.compile(r'(?<!\w)(?:' + '|'.join(map(re.escape, bad_words)) + r')(?!\w)')
    self._seen_spans = hashes.Table()

  def page(self, text: str) -> str | None:
    """Returns the page without its dropped lines, or None if the page is dropped."""
    lines = []
    for line in text.splitlines():
      kept = self._line(line.strip())
      if not kept:
        continue
      if rule := self._page_rule(kept):
        return self._count(rule, kept)
      lines.append(kept)
    split = [sentences.split(line) for line in lines]
    if self._too_few(split):
      return self._count('few_sentences', text)
    if ('language' in self._rules
        and self._language('\n'.join(lines)) < MIN_LANGUAGE_PROBABILITY):
      return self._count('language', text)
    if 'repeated_spans' in self._rules:
      split = self._without_repeated(split)
      if not split or self._too_few(split):
        return self._count('few_sentences', text)
      # Only the spans of a page that is kept are remembered.
      self._seen_spans.add(np.unique(self._span_hashes(split)))
      lines = [''.join(line).strip() for line in split]
    return '\n'.join(lines)

  def _line(self, line):
    """Returns the line as it is kept, or None."""
    rules, lower = self._rules, line.lower()
    if not line:
      return None                    # an empty line is not counted
    if 'long_word' in rules and any(len(word) > MAX_WORD_LENGTH for word in line.split()):
      return self._count('long_word', line)
    if 'citations' in rules and (bare := _CITATION.sub('', line)) != line:
      self._count('citations', line, _CITATION.search(line).start())
      line = bare
    if 'no_end_mark' in rules and (not line.endswith(END_MARKS) or line.endswith('...')):
      return self._count('no_end_mark', line)
    if 'short_line' in rules and len(line.split()) < MIN_WORDS:
      return self._count('short_line', line)
    if 'javascript' in rules and 'javascript' in lower:
      return self._count('javascript', line)
    if 'policy' in rules and any(policy in lower for policy in POLICIES):
      return self._count('policy', line)
    return line

  def _page_rule(self, line):
    """Returns the rule by which this line drops the whole page, or None."""
    lower = line.lower()
    applies = {'lorem_ipsum': 'lorem ipsum' in lower, 'curly_brace': '{' in line,
               'bad_words': 'bad_words' in self._rules and self._bad.search(lower)}
    return next((rule for rule in applies if applies[rule] and rule in self._rules), None)

  def _too_few(self, split):
    return 'few_sentences' in self._rules and sum(map(len, split)) < MIN_SENTENCES

  def _span_hashes(self, split):
    """Returns uint64[sentences - 2]: a hash of every three consecutive sentences."""
    return hashes.ngrams(hashes.hash_all([
        ' '.join(sentence.lower().split()) for line in split for sentence in line]), SPAN)

  def _without_repeated(self, split):
    """Returns the sentences by line, without spans that occurred earlier in any page."""
    spans = self._span_hashes(split)
    seen = self._seen_spans.contains(spans)
    drop, first = set(), {}
    for i, span in enumerate(spans.tolist()):
      members = set(range(i, i + SPAN))
      if seen[i]:
        drop |= members
      elif span in first:               # keep the sentences that overlap its first occurrence
        drop |= members - set(range(first[span], first[span] + SPAN))
      else:
        first[span] = i
    if not drop:
      return split
    numbers = itertools.count()

    def is_kept(sentence):
      kept = next(numbers) not in drop
      if not kept:
        self._count('repeated_spans', sentence)
      return kept
    return [kept for line in split if (kept := list(filter(is_kept, line)))]


def run(job: PrepareJob, rules: Collection[str], *, bad_words: Collection[str] = (),
        language: Callable[[str], float] | None = None) -> None:
  """Cleans the job's fields; a record is dropped if one of its fields is.

  Memory: with repeated_spans, a hashes.Table with an entry per three consecutive sentences.
  """
  record = None
  cleaner = Cleaner(rules, bad_words=bad_words, language=language,
                    count=lambda rule, text, at=0: job.count(rule, record, text, at))
  job.declare(*(rule for rule in RULES if rule in rules))
  job.counts.update(dropped=0, changed=0)
  with job.write() as write:
    for record in job.read():
      texts = job.texts(record)
      pages = list(itertools.takewhile(lambda page: page is not None, map(cleaner.page, texts)))
      if len(pages) < len(texts):
        job.counts['dropped'] += 1
        continue
      job.counts['changed'] += pages != texts
      write({**record.fields, **dict(zip(job.fields, pages))})
