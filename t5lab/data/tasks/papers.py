"""The papers' tasks over TFDS, under T5's names, as plain data; builtin.py registers them.

A row of SUPERVISED is a supervised task, whose text t5_text.py makes; a row of TEXT is an objective
on unlabelled text.
[Raffel et al. 2020; Roberts et al. 2020 for closed-book QA; Xue et al. 2021 for mC4]
"""
from collections.abc import Callable
import dataclasses
import itertools
from types import MappingProxyType

from t5lab.data.tasks import t5_text
from t5lab.evaluation import metrics

Splits = tuple[str, ...] | dict[str, str] | None     # dict: to slices of TFDS's; None: all of them


@dataclasses.dataclass(frozen=True)
class Supervised:
  """tfds: 'data_set/config:version'."""
  tfds: str
  text: t5_text.Text
  metric_fns: tuple[Callable, ...] = ()
  splits: Splits = None


_ACCURACY = (metrics.accuracy,)
_F1 = (metrics.f1_score_with_invalid, metrics.accuracy)
_LABELLED = ('train', 'validation')  # the test sets of GLUE and SuperGLUE have no labels
_GLUE = (  # name, metrics, splits; ax has no labels
    ('cola', (metrics.matthews_corrcoef,), _LABELLED),
    ('sst2', _ACCURACY, _LABELLED),
    ('mrpc', _F1, _LABELLED),
    ('stsb', (metrics.pearson_corrcoef, metrics.spearman_corrcoef), _LABELLED),
    ('qqp', _F1, _LABELLED),
    ('mnli', _ACCURACY, ('train', 'validation_matched', 'validation_mismatched')),
    ('mnli_matched', _ACCURACY, ('validation',)),
    ('mnli_mismatched', _ACCURACY, ('validation',)),
    ('qnli', _ACCURACY, _LABELLED),
    ('rte', _ACCURACY, _LABELLED),
    ('wnli', _ACCURACY, _LABELLED),
    ('ax', (), ('test',)))
_SUPER_GLUE = (
    ('boolq', _ACCURACY, _LABELLED),
    ('cb', (metrics.mean_3class_f1, metrics.accuracy), _LABELLED),
    ('copa', _ACCURACY, _LABELLED),
    ('rte', _ACCURACY, _LABELLED),
    ('wic', _ACCURACY, _LABELLED),
    ('axb', (), ('test',)),
    ('axg', (), ('test',)),
    ('multirc', (metrics.multirc_f1_over_all_answers, metrics.multirc_exact_match), _LABELLED),
    ('record', (metrics.record,), _LABELLED))
_WMT = (  # TFDS name, our name, pairs; each is a task in both directions
    ('wmt_t2t_translate', 'wmt_t2t', ('de-en',)),
    ('wmt14_translate', 'wmt14', ('de-en', 'fr-en')),
    ('wmt15_translate', 'wmt15', ('fr-en',)),
    ('wmt16_translate', 'wmt16', ('ro-en',)),
    ('wmt19_translate', 'wmt19', ('cs-en', 'de-en', 'fi-en', 'gu-en', 'kk-en', 'lt-en', 'ru-en',
                                  'zh-en', 'fr-de')))


def _glue():
  for name, metric_fns, splits in _GLUE:
    yield f'glue_{name}_v002', Supervised(
        f'glue/{name}:2.0.0', t5_text.TEXTS[f'glue/{name}'], metric_fns, splits)
  for name, metric_fns, splits in _SUPER_GLUE:
    yield f'super_glue_{name}_v102', Supervised(
        f'super_glue/{name}:1.0.2', t5_text.TEXTS[f'super_glue/{name}'], metric_fns, splits)
  # The target of WSC is the noun, which SuperGLUE gives only in examples labelled True. T5 trains
  # on those and on DPR, and scores all.
  wsc = 'super_glue/wsc.fixed'
  yield 'super_glue_wsc_v102_simple_train', Supervised(
      f'{wsc}:1.0.2', t5_text.TEXTS[f'{wsc}/train'], splits=('train',))
  yield 'super_glue_wsc_v102_simple_eval', Supervised(
      f'{wsc}:1.0.2', t5_text.TEXTS[wsc], _ACCURACY, ('validation',))
  yield 'dpr_v001_simple', Supervised(
      'definite_pronoun_resolution:1.1.0', t5_text.TEXTS['definite_pronoun_resolution'],
      _ACCURACY)


def _wmt():
  for tfds_name, name, pairs in _WMT:
    for pair in pairs:
      for source, target in itertools.permutations(pair.split('-')):
        yield f'{name}_{source}{target}_v003', Supervised(
            f'{tfds_name}/{pair}:1.0.0', t5_text.translate(source, target),
            (metrics.bleu, metrics.chrf))


def _summaries():
  for name, tfds_name in (('cnn_dailymail_v002', 'cnn_dailymail:3.4.0'), ('xsum', 'xsum:1.1.0'),
                          ('gigaword', 'gigaword:1.2.0')):
    yield name, Supervised(tfds_name, t5_text.TEXTS[tfds_name.split(':')[0]], (metrics.rouge,))


def _answers():
  row = lambda tfds_name, text, metric, splits=None: Supervised(
      tfds_name, t5_text.TEXTS[text], (metric,), splits)
  # A tenth of the training examples validates, and TFDS's validation split is the test set.
  held_out = lambda count, test: {
      'train': f'train[:{count}]', 'validation': f'train[{count}:]', 'test': test}
  yield 'squad_v010_allanswers', row('squad/v1.1:3.0.0', 'squad', metrics.squad)
  yield 'squad_v010_context_free', row('squad/v1.1:3.0.0', 'squad/context_free', metrics.squad)
  yield 'squad_v2', row('squad/v2.0:3.0.0', 'squad', metrics.squad_v2)
  yield 'natural_questions_open', row(
      'natural_questions_open:1.0.0', 'natural_questions_open', metrics.squad,
      held_out(79168, 'validation'))
  yield 'trivia_qa_open', row('trivia_qa/unfiltered.nocontext:1.1.0', 'trivia_qa',
                              metrics.trivia_qa, held_out(78785, 'validation'))
  yield 'web_questions_open', row('web_questions:1.0.0', 'web_questions', metrics.squad,
                                  held_out(3417, 'test'))


SUPERVISED = MappingProxyType(
    dict([*_glue(), *_wmt(), *_summaries(), *_answers()]))


@dataclasses.dataclass(frozen=True)
class Text:
  """tfds: 'data_set/config:version'. objective: a row of objectives/table.py."""
  tfds: str
  objective: str
  splits: Splits = None


# The languages of mC4 in TFDS.
MC4 = tuple(
    'af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy '
    'ga gd gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky '
    'la lb lo lt lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl '
    'sm sn so sq sr st su sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu'.split())


def mc4_task(language: str) -> str:
  return f'mc4.{language.replace("-", "_")}'


def _mc4(language: str) -> Text:
  splits = {'train': language, 'validation': f'{language}-validation'}
  return Text('c4/multilingual:3.1.0', 'span_corruption', splits)


# T5's C4 is 2.2.0, which today's TFDS can read but not build; it builds 3.1.0.
_LARGE = (('c4_v220', 'c4/en:2.2.0', 'full_lm'), ('c4_v310', 'c4/en:3.1.0', 'full_lm'),
          ('wikipedia_20230601.en', 'wikipedia/20230601.en:1.0.0', 'lm'))
TEXT = MappingProxyType({
    **{f'{name}_{objective}': Text(tfds, objective) for name, tfds, _ in _LARGE
       for objective in ('span_corruption', 'iid_denoising', 'prefix_lm')},
    **{f'{name}_{lm}': Text(tfds, 'lm') for name, tfds, lm in _LARGE},
    'lm1b_lm': Text('lm1b:1.1.0', 'lm'),
    **{mc4_task(language): _mc4(language) for language in MC4},
})
NAMES = (*SUPERVISED, *TEXT)

# Language modeling on text that TFDS lacks: (repository of the Hugging Face hub, folder of Parquet
# files). [Merity et al. 2016]
HUB = MappingProxyType({f'wikitext_{size}_lm': ('Salesforce/wikitext', f'wikitext-{size}-raw-v1')
                        for size in (2, 103)})
