"""The papers' supervised tasks as text: from a record to examples, and from an answer to its value.

Pure Python without TensorFlow. TEXTS has an entry per data set: its columns, named as in TFDS with
'a/b' for a field b inside a, and fn(record) -> [example, …], where an example has 'inputs',
'targets' and anything else that the metric needs.
[Raffel et al. 2020, 2.4, appendix D; t5/data/preprocessors.py]
"""
from collections.abc import Callable
import dataclasses
import re
from types import MappingProxyType

import numpy as np

from t5lab.data.tasks import prompts

MISSING = '<unk>'  # the target of a record without a label, in test sets


@dataclasses.dataclass(frozen=True)
class Text:
  """How records become examples, and answers become values.

  extra: the other features that fn returns, int or list of str. value: seqio's postprocessor.
  """
  columns: tuple[str, ...]
  fn: Callable[[dict], list[dict]]
  extra: dict[str, type] = dataclasses.field(default_factory=dict)
  value: Callable | None = None


LABELS = MappingProxyType({  # classes in TFDS's order
    'cola': ('unacceptable', 'acceptable'),
    'sst2': ('negative', 'positive'),
    'mrpc': ('not_equivalent', 'equivalent'),
    'qqp': ('not_duplicate', 'duplicate'),
    'mnli': ('entailment', 'neutral', 'contradiction'),
    'qnli': ('entailment', 'not_entailment'),
    'rte': ('entailment', 'not_entailment'),
    'wnli': ('not_entailment', 'entailment'),
    'boolq': ('False', 'True'),
    'cb': ('entailment', 'contradiction', 'neutral'),
    'copa': ('choice1', 'choice2'),
    'multirc': ('False', 'True'),
    'wic': ('False', 'True'),
})


# --- from text back to a value, for the metrics --------------------------------------------------
#
# seqio calls a postprocessor with the decoded text and, by name, the example (numpy values, bytes
# for text) and whether the text is the target.


def to_score(decoded, example=None, is_target=False) -> float:
  """STS-B's score; -1 for text that is not a finite number."""
  del example, is_target
  try:
    score = float(decoded)
  except ValueError:
    return -1.
  return score if np.isfinite(score) else -1.


def to_class(benchmark: str):
  """Returns a postprocessor: text -> the index of its class, -1 for any other text."""
  def postprocess(decoded, example=None, is_target=False) -> int:
    del example, is_target
    return LABELS[benchmark].index(decoded) if decoded in LABELS[benchmark] else -1
  return postprocess


def answers(decoded, example=None, is_target=False):
  """The text itself; for a target, the list of its gold answers."""
  if not is_target:
    return decoded
  return [answer.decode('utf-8') for answer in example['answers']]


def _grouped(value, example, is_target, *keys):
  group = {'group': tuple(int(example[key]) for key in keys)} if is_target else {}
  return {'value': value, **group}


def multirc_value(decoded, example=None, is_target=False) -> dict:
  """{'value': class}; for a target also 'group': (paragraph, question)."""
  return _grouped(to_class('multirc')(decoded), example, is_target, 'idx/paragraph', 'idx/question')


def record_value(decoded, example=None, is_target=False) -> dict:
  """{'value': text}; for a target, all answers and 'group': (passage, query)."""
  value = answers(decoded, example, is_target)
  return _grouped(value, example, is_target, 'idx/passage', 'idx/query')


_DETERMINERS = frozenset(
    'a an few her his each every many much my our some that the their these this those which whose '
    'your'.split())


def _referent_words(text):
  # An empty text has one empty word, which is in no answer.
  words = [w for w in text.strip().lower().split(' ') if w not in _DETERMINERS]
  return set(words or [''])


def same_referent(referent: str, prediction: str) -> bool:
  """True if all words of one text are in the other: 'the cat' and 'black cat', but not 'dog'.

  Case and determiners are ignored. Bob and Bob's hat differ, because only one has an apostrophe.
  """
  if ("'" in referent) != ("'" in prediction):
    return False
  referent, prediction = _referent_words(referent), _referent_words(prediction)
  return referent <= prediction or prediction <= referent


def wsc_value(decoded, example=None, is_target=False) -> int:
  """1 if the pronoun refers to the noun: by the label, or because the model answers that noun."""
  if is_target:
    return int(example['label'])
  return int(same_referent(example['targets_pretokenized'].decode('utf-8'), decoded))


# --- classification: 'benchmark field: text field: text' -> the name of the class ----------------


def _fields(benchmark, fields, extra=('idx',), target=None, value=None, clean=str, **renamed):
  """'cola sentence: It rains.' A field's column has the field's name, unless it is renamed.

  target: of a label, by default its class. value: by default the index of the class.
  """
  columns = {field: renamed.get(field, field) for field in fields.split()}
  target = target or (lambda label: LABELS[benchmark][label] if label >= 0 else MISSING)

  def fn(record):
    texts = (f'{field}: {record[column]}' for field, column in columns.items())
    return [{'inputs': clean(' '.join([benchmark, *texts])), 'targets': target(record['label']),
             **{name: record[name] for name in extra}}]
  return Text((*columns.values(), 'label', *extra), fn, dict.fromkeys(extra, int),
              value or to_class(benchmark))


def _score(label):
  """Rounded to a multiple of 0.2, in float32 and half to even as TensorFlow does."""
  return f'{np.round(np.float32(label) * np.float32(5)) / np.float32(5):.1f}'


def _without_markup(text):
  return re.sub('</?b>', '', text.replace('<br>', ' '))


# --- ReCoRD: the entity that replaces @placeholder -----------------------------------------------

_AFTER_STOP = re.compile(r'([.?!"\'])\n@highlight\n')


def _record_query(record):
  """One example per correct answer, so that all are trained on; the metric scores one of them."""
  passage = _AFTER_STOP.sub(r'\1 ', record['passage']).replace('\n@highlight\n', '. ')
  inputs = (f'record query: {record["query"]} entities: {", ".join(record["entities"])} '
            f'passage: {passage}')
  rest = {name: record[name] for name in ('answers', 'idx/passage', 'idx/query')}
  answers = record['answers'] or [MISSING]
  return [{'inputs': inputs, 'targets': answer, **rest} for answer in answers]


# --- Winograd schemas: the noun that the pronoun between * * refers to ---------------------------


def mark_pronoun(text: str, index: int, pronoun: str) -> str:
  """Marks word number `index` of the text as *pronoun*; words are split at single spaces.

  Two records of SuperGLUE's wsc.fixed have another word there: the nearest word that is the
  pronoun, apart from punctuation, is marked. The results equal T5's, which lists both texts.
  ValueError if no word is the pronoun.
  """
  words = text.split(' ')
  is_pronoun = re.compile(f'({re.escape(pronoun)})(\\W*)')
  places = [i for i, word in enumerate(words) if is_pronoun.fullmatch(word)]
  if not places:
    raise ValueError(f'no word is the pronoun {pronoun!r} in: {text}')
  place = min(places, key=lambda i: abs(i - index))
  marked = [f'*{pronoun}*']
  punctuation = words[place][len(pronoun):]
  if punctuation:
    words = text.rstrip().split(' ')      # like T5
    marked.append(punctuation)
  return ' '.join([*words[:place], *marked, *words[place + 1:]])


def _wsc(record):
  marked = mark_pronoun(record['text'], record['span2_index'], record['span2_text'])
  return [{'inputs': f'wsc: {marked}', 'targets': record['span1_text'],
           'label': record['label'], 'idx': record['idx']}]


def _wsc_train(record):
  """Only records whose noun is the referent of the pronoun have a target."""
  return _wsc(record) if record['label'] > 0 else []


def _dpr(record):
  """The question is about the first occurrence of the pronoun."""
  pronoun = re.compile(f' ({re.escape(record["pronoun"])})([ .,])')
  return [{'inputs': 'wsc: ' + pronoun.sub(r' *\1*\2', record['sentence'], count=1),
           'targets': record['candidates'][record['label']]}]


_WSC = ('text', 'span1_text', 'span2_index', 'span2_text', 'label', 'idx')


# --- translation and summarization ---------------------------------------------------------------

LANGUAGES = MappingProxyType({
    'cs': 'Czech', 'de': 'German', 'en': 'English', 'fi': 'Finnish', 'fr': 'French',
    'gu': 'Gujarati', 'kk': 'Kazakh', 'lt': 'Lithuanian', 'ro': 'Romanian', 'ru': 'Russian',
    'zh': 'Chinese'})


def translate(source: str, target: str) -> Text:
  """'translate English to German: It rains.' The language codes are the columns too."""
  return _prefixed(f'translate {LANGUAGES[source]} to {LANGUAGES[target]}: ', source, target)


def _prefixed(prefix, source, target):
  def fn(record):
    return [{'inputs': prefix + record[source], 'targets': record[target]}]
  return Text((source, target), fn)


# --- question answering --------------------------------------------------------------------------


def _squad(record):
  """Pads question, context and answers. The target is the first answer, '' if there is none."""
  correct = [prompts.pad_punctuation(a) for a in record['answers/text']]
  inputs = f'question: {prompts.pad_punctuation(record["question"])}'
  if 'context' in record:
    inputs += f' context: {prompts.pad_punctuation(record["context"])}'
  else:
    inputs = f'squad trivia {inputs}'
  return [{'inputs': inputs.replace('  ', ' '), 'targets': correct[0] if correct else '',
           'answers': correct}]


def _closed_book(name, all_column, target_column=None):
  """A question without context. The target is the first correct answer. [Roberts et al. 2020]"""
  def fn(record):
    correct = record[all_column]
    target = correct[0] if correct else MISSING
    if target_column:
      target = record[target_column]
    return [{'inputs': f'{name} question: {record["question"]}', 'answers': correct,
             'targets': target}]
  columns = ('question', all_column, target_column) if target_column else ('question', all_column)
  return Text(columns, fn, {'answers': list}, answers)


TEXTS = MappingProxyType({
    'glue/cola': _fields('cola', 'sentence'),
    'glue/sst2': _fields('sst2', 'sentence'),
    'glue/mrpc': _fields('mrpc', 'sentence1 sentence2'),
    'glue/stsb': _fields('stsb', 'sentence1 sentence2', target=_score, value=to_score),
    'glue/qqp': _fields('qqp', 'question1 question2'),
    **{f'glue/{name}': _fields('mnli', 'hypothesis premise')
       for name in ('mnli', 'mnli_matched', 'mnli_mismatched', 'ax')},
    'glue/qnli': _fields('qnli', 'question sentence'),
    'glue/rte': _fields('rte', 'sentence1 sentence2'),
    'glue/wnli': _fields('wnli', 'sentence1 sentence2'),
    'super_glue/boolq': _fields('boolq', 'passage question'),
    'super_glue/cb': _fields('cb', 'hypothesis premise'),
    'super_glue/copa': _fields('copa', 'choice1 choice2 premise question'),
    'super_glue/multirc': _fields(
        'multirc', 'question answer paragraph', ('idx/paragraph', 'idx/question'),
        value=multirc_value, clean=_without_markup),
    'super_glue/record': Text(
        ('query', 'entities', 'passage', 'answers', 'idx/passage', 'idx/query'), _record_query,
        {'answers': list, 'idx/passage': int, 'idx/query': int}, record_value),
    'super_glue/rte': _fields('rte', 'hypothesis premise'),
    'super_glue/wic': _fields('wic', 'sentence1 sentence2 word'),
    'super_glue/axb': _fields(
        'rte', 'hypothesis premise', hypothesis='sentence2', premise='sentence1'),
    'super_glue/axg': _fields('rte', 'hypothesis premise'),
    'super_glue/wsc.fixed/train': Text(_WSC, _wsc_train, {'label': int, 'idx': int}),
    'super_glue/wsc.fixed': Text(_WSC, _wsc, {'label': int, 'idx': int}, wsc_value),
    'definite_pronoun_resolution': Text(('sentence', 'pronoun', 'candidates', 'label'), _dpr),
    'cnn_dailymail': _prefixed('summarize: ', 'article', 'highlights'),
    'xsum': _prefixed('summarize: ', 'document', 'summary'),
    'gigaword': _prefixed('summarize: ', 'document', 'summary'),
    'squad': Text(('question', 'context', 'answers/text'), _squad, {'answers': list}, answers),
    'squad/context_free': Text(('question', 'answers/text'), _squad, {'answers': list}, answers),
    'natural_questions_open': _closed_book('nq', 'answer'),
    'trivia_qa': _closed_book('trivia_qa', 'answer/aliases', 'answer/value'),
    'web_questions': _closed_book('wq', 'answers'),
})
