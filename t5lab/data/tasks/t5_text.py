"""The papers' supervised tasks as text: row of a data set -> examples, and an answer -> its value.

Pure Python, no TensorFlow. TEXTS has a row for every data set: its columns, named as in TFDS with
'a/b' for a field b inside a, and fn(row) -> [example, …] where an example has 'inputs', 'targets'
and what the metric needs besides. [Raffel et al. 2020, 2.4, appendix D; t5/data/preprocessors.py]
"""
from collections.abc import Callable
import dataclasses
import re
from types import MappingProxyType

import numpy as np

from t5lab.data.tasks import prompts

MISSING = '<unk>'  # the target of a row without a label: rows of a test set


@dataclasses.dataclass(frozen=True)
class Text:
  """How rows become examples. extra: what fn makes besides inputs and targets, int or list of str.
  """
  columns: tuple[str, ...]
  fn: Callable[[dict], list[dict]]
  extra: tuple[tuple[str, type], ...] = ()


def _extra(**kinds):
  return tuple((name.replace('__', '/'), kind) for name, kind in kinds.items())


# Classification: 'benchmark field: text field: text' -> the name of the class


LABELS = MappingProxyType({  # in TFDS's order
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


def fields_text(benchmark: str, fields, row) -> str:
  """'cola sentence: It rains.' fields: (name in the text, column) in order."""
  return ' '.join([benchmark, *(f'{name}: {row[column]}' for name, column in fields)])


def label_text(benchmark: str, label: int) -> str:
  return LABELS[benchmark][label] if label >= 0 else MISSING


def _classes(benchmark, *fields, **renamed):
  """fields: columns in the order of the text, which is by name unless T5 says otherwise."""
  pairs = [(f, f) for f in fields] + list(renamed.items())

  def fn(row):
    return [{'inputs': fields_text(benchmark, pairs, row),
             'targets': label_text(benchmark, row['label']), 'idx': row['idx']}]
  return Text((*(column for _, column in pairs), 'label', 'idx'), fn, _extra(idx=int))


def _stsb(row):
  """The score rounded to a multiple of 0.2, in float32 and half to even as TensorFlow does."""
  score = np.round(np.float32(row['label']) * np.float32(5)) / np.float32(5)
  pairs = [('sentence1', 'sentence1'), ('sentence2', 'sentence2')]
  return [{'inputs': fields_text('stsb', pairs, row), 'targets': f'{score:.1f}',
           'idx': row['idx']}]


_MULTIRC = [(f, f) for f in ('question', 'answer', 'paragraph')]
_MARKUP = re.compile('</?b>')


def _multirc(row):
  text = fields_text('multirc', _MULTIRC, row).replace('<br>', ' ')
  return [{'inputs': _MARKUP.sub('', text), 'targets': label_text('multirc', row['label']),
           'idx/paragraph': row['idx/paragraph'], 'idx/question': row['idx/question']}]


# ReCoRD: which entity stands at @placeholder


_AFTER_STOP = re.compile(r'([.?!"\'])\n@highlight\n')


def _record(row):
  """An example for each right answer, so that all are trained on; the metric scores one of them."""
  passage = _AFTER_STOP.sub(r'\1 ', row['passage']).replace('\n@highlight\n', '. ')
  inputs = (f'record query: {row["query"]} entities: {", ".join(row["entities"])} '
            f'passage: {passage}')
  rest = {name: row[name] for name in ('answers', 'idx/passage', 'idx/query')}
  return [{'inputs': inputs, 'targets': answer, **rest} for answer in row['answers'] or [MISSING]]


# Winograd schemas: what does the pronoun between * * stand for


def mark_pronoun(text: str, index: int, pronoun: str) -> str:
  """text with *pronoun* for its word number `index`, words split at single spaces.

  Two rows of SuperGLUE's wsc.fixed have another word there: the nearest that is the pronoun, stops
  aside, is taken. They come out as T5, which lists their texts, has them.
  ValueError where no word is the pronoun.
  """
  words = text.split(' ')
  one = re.compile(f'({re.escape(pronoun)})(\\W*)')
  found = [i for i, word in enumerate(words) if one.fullmatch(word)]
  if not found:
    raise ValueError(f'no word is the pronoun {pronoun!r} in: {text}')
  at = min(found, key=lambda i: abs(i - index))
  stop = words[at][len(pronoun):]
  if stop:
    words = text.rstrip().split(' ')  # as T5 has it
  return ' '.join([*words[:at], f'*{pronoun}*', *([stop] if stop else []), *words[at + 1:]])


def _wsc(row):
  marked = mark_pronoun(row['text'], row['span2_index'], row['span2_text'])
  return [{'inputs': f'wsc: {marked}', 'targets': row['span1_text'],
           'label': row['label'], 'idx': row['idx']}]


def _wsc_train(row):
  """Only rows whose noun is what the pronoun stands for have something to say."""
  return _wsc(row) if row['label'] > 0 else []


def _dpr(row):
  """The first time the pronoun occurs is the one in question."""
  pronoun = re.compile(f' ({re.escape(row["pronoun"])})([ .,])')
  return [{'inputs': 'wsc: ' + pronoun.sub(r' *\1*\2', row['sentence'], count=1),
           'targets': row['candidates'][row['label']]}]


_WSC = ('text', 'span1_text', 'span2_index', 'span2_text', 'label', 'idx')


# Translation and summarization


LANGUAGES = MappingProxyType({
    'cs': 'Czech', 'de': 'German', 'en': 'English', 'fi': 'Finnish', 'fr': 'French',
    'gu': 'Gujarati', 'kk': 'Kazakh', 'lt': 'Lithuanian', 'ro': 'Romanian', 'ru': 'Russian',
    'zh': 'Chinese'})


def translate(source: str, target: str) -> Text:
  """Language codes, which are the columns too: 'translate English to German: It rains.'"""
  before = f'translate {LANGUAGES[source]} to {LANGUAGES[target]}: '
  return Text((source, target),
              lambda row: [{'inputs': before + row[source], 'targets': row[target]}])


def _summarize(document, summary):
  return Text((document, summary),
              lambda row: [{'inputs': f'summarize: {row[document]}', 'targets': row[summary]}])


# Question answering


def _squad(row):
  """Question, context and answers padded; the target is the first answer, '' if there is none."""
  answers = [prompts.pad_punctuation(a) for a in row['answers/text']]
  inputs = f'question: {prompts.pad_punctuation(row["question"])}'
  if 'context' in row:
    inputs += f' context: {prompts.pad_punctuation(row["context"])}'
  else:
    inputs = f'squad trivia {inputs}'
  return [{'inputs': inputs.replace('  ', ' '), 'targets': answers[0] if answers else '',
           'answers': answers}]


def _closed_book(before, answer, answers):
  """No context: the model must know. [Roberts et al. 2020] answer: '' for the first of answers."""
  def fn(row):
    found = row[answers]
    return [{'inputs': f'{before} question: {row["question"]}', 'answers': found,
             'targets': row[answer] if answer else found[0] if found else MISSING}]
  return Text(('question', answers, *([answer] if answer else [])), fn, _extra(answers=list))


_ANSWERS = _extra(answers=list)
TEXTS = MappingProxyType({
    'glue/cola': _classes('cola', 'sentence'),
    'glue/sst2': _classes('sst2', 'sentence'),
    'glue/mrpc': _classes('mrpc', 'sentence1', 'sentence2'),
    'glue/stsb': Text(('sentence1', 'sentence2', 'label', 'idx'), _stsb, _extra(idx=int)),
    'glue/qqp': _classes('qqp', 'question1', 'question2'),
    'glue/mnli': _classes('mnli', 'hypothesis', 'premise'),
    'glue/mnli_matched': _classes('mnli', 'hypothesis', 'premise'),
    'glue/mnli_mismatched': _classes('mnli', 'hypothesis', 'premise'),
    'glue/ax': _classes('mnli', 'hypothesis', 'premise'),
    'glue/qnli': _classes('qnli', 'question', 'sentence'),
    'glue/rte': _classes('rte', 'sentence1', 'sentence2'),
    'glue/wnli': _classes('wnli', 'sentence1', 'sentence2'),
    'super_glue/boolq': _classes('boolq', 'passage', 'question'),
    'super_glue/cb': _classes('cb', 'hypothesis', 'premise'),
    'super_glue/copa': _classes('copa', 'choice1', 'choice2', 'premise', 'question'),
    'super_glue/multirc': Text(
        ('question', 'answer', 'paragraph', 'label', 'idx/paragraph', 'idx/question'), _multirc,
        _extra(idx__paragraph=int, idx__question=int)),
    'super_glue/record': Text(
        ('query', 'entities', 'passage', 'answers', 'idx/passage', 'idx/query'), _record,
        _extra(answers=list, idx__passage=int, idx__query=int)),
    'super_glue/rte': _classes('rte', 'hypothesis', 'premise'),
    'super_glue/wic': _classes('wic', 'sentence1', 'sentence2', 'word'),
    'super_glue/axb': _classes('rte', hypothesis='sentence2', premise='sentence1'),
    'super_glue/axg': _classes('rte', 'hypothesis', 'premise'),
    'super_glue/wsc.fixed/train': Text(_WSC, _wsc_train, _extra(label=int, idx=int)),
    'super_glue/wsc.fixed': Text(_WSC, _wsc, _extra(label=int, idx=int)),
    'definite_pronoun_resolution': Text(('sentence', 'pronoun', 'candidates', 'label'), _dpr),
    'cnn_dailymail': _summarize('article', 'highlights'),
    'xsum': _summarize('document', 'summary'),
    'gigaword': _summarize('document', 'summary'),
    'squad': Text(('question', 'context', 'answers/text'), _squad, _ANSWERS),
    'squad/context_free': Text(('question', 'answers/text'), _squad, _ANSWERS),
    'natural_questions_open': _closed_book('nq', '', 'answer'),
    'trivia_qa': _closed_book('trivia_qa', 'answer/value', 'answer/aliases'),
    'web_questions': _closed_book('wq', '', 'answers'),
})


# From text back to a value, for the metrics. seqio calls a postprocessor with the decoded text and,
# by name, the example (numpy values, bytes for text) and whether the text is the target.


def to_score(decoded, example=None, is_target=False) -> float:
  """STS-B's number, -1 for text that is none; 'nan' and 'inf', which Python reads, are none."""
  del example, is_target
  try:
    score = float(decoded)
  except ValueError:
    return -1.
  return score if np.isfinite(score) else -1.


def to_class(benchmark: str):
  """Postprocessor: text -> index of its class, -1 for any other text."""
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
  """{'value': class}, with 'group': (paragraph, question) for a target."""
  return _grouped(to_class('multirc')(decoded), example, is_target, 'idx/paragraph', 'idx/question')


def record_value(decoded, example=None, is_target=False) -> dict:
  """{'value': text}, for a target all the answers and 'group': (passage, query)."""
  value = answers(decoded, example, is_target)
  return _grouped(value, example, is_target, 'idx/passage', 'idx/query')


_DETERMINERS = frozenset(
    'a an few her his each every many much my our some that the their these this those which whose '
    'your'.split())


def _referent_words(text):
  # Split at single spaces: of nothing there is one empty word, which is part of no answer.
  words = [w for w in text.strip().lower().split(' ') if w not in _DETERMINERS]
  return set(words or [''])


def same_referent(referent: str, prediction: str) -> bool:
  """Whether all words of one are words of the other: 'the cat' and 'black cat', not 'dog'.

  Case and determiners do not count. Bob and Bob's hat are not the same: an apostrophe in only one
  of the two parts them.
  """
  if ("'" in referent) != ("'" in prediction):
    return False
  referent, prediction = _referent_words(referent), _referent_words(prediction)
  return referent <= prediction or prediction <= referent


def wsc_value(decoded, example=None, is_target=False) -> int:
  """1 if the noun asked about is meant: the label, or whether the model's answer is that noun."""
  if is_target:
    return int(example['label'])
  return int(same_referent(example['targets_pretokenized'].decode('utf-8'), decoded))
