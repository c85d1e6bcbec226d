"""Rates and mixtures of the papers' tasks, as plain data. [Raffel et al. 2020, 3.5.2]

A rate is a number, or a function of a seqio Task that counts its examples when the mixture is
opened and raises a DataError if its data is missing.
"""
from collections.abc import Callable
from types import MappingProxyType

from t5lab.data.sources import tfds
from t5lab.data.tasks import papers


def rate(examples: float, limit: float | None = None, temperature: float = 1.) -> float:
  """min(examples, limit) ** (1 / temperature): the weight of a task in a mixture.

  limit: the paper's artificial limit K, which keeps large tasks from crowding out the rest.
  temperature: 1 is proportional to the size, infinite is equal; mT5's alpha is 1 / temperature.
  Example: 800 and 50 examples, limit 200 -> 4 : 1, and with temperature 2 -> 2 : 1.
  """
  return float(examples if limit is None else min(examples, limit)) ** (1. / temperature)


def by_examples(limit: float | None = None, temperature: float = 1.) -> Callable:
  """A rate for seqio: `rate` of a Task's training examples; 0 without a training split."""
  return lambda task: rate(tfds.num_examples(task), limit, temperature)


# Training examples as T5 counted them (of WSC, those labelled True). Tasks with 0 are only scored.
GLUE = MappingProxyType({
    'glue_cola_v002': 8_551, 'glue_sst2_v002': 67_349, 'glue_mrpc_v002': 3_668,
    'glue_qqp_v002': 363_849, 'glue_stsb_v002': 5_749, 'glue_mnli_v002': 392_702,
    'glue_qnli_v002': 104_743, 'glue_rte_v002': 2_490, 'glue_mnli_mismatched_v002': 0,
    'glue_mnli_matched_v002': 0, 'glue_ax_v002': 0})  # without WNLI, which WSC and DPR replace
SUPER_GLUE = MappingProxyType({
    'dpr_v001_simple': 1_322, 'super_glue_wsc_v102_simple_train': 259,
    'super_glue_wsc_v102_simple_eval': 0, 'super_glue_boolq_v102': 9_427,
    'super_glue_cb_v102': 250, 'super_glue_copa_v102': 400, 'super_glue_multirc_v102': 27_243,
    'super_glue_record_v102': 138_854, 'super_glue_rte_v102': 2_490, 'super_glue_wic_v102': 5_428,
    'super_glue_axb_v102': 0, 'super_glue_axg_v102': 0})
# How many examples C4 counts as in the multi-task mixture, by model size. [3.7]
VIRTUAL_EXAMPLES = MappingProxyType({
    'small': 710_000, 'base': 2_620_000, 'large': 8_660_000, '3b': 33_500_000, '11b': 133_000_000})
TRANSLATION_LIMIT = 1_000_000
MC4_TEMPERATURE = 1 / 0.3  # [Xue et al. 2021, 3.2]


def multitask(virtual_examples: int) -> list[tuple]:
  """(task, rate) of T5's multi-task pre-training: C4's span corruption and all supervised tasks.

  RTE is in both GLUE and SuperGLUE, and counts half in each.
  """
  halved = {name: examples / 2 if '_rte_' in name else examples
            for name, examples in {**GLUE, **SUPER_GLUE}.items()}
  return [('c4_v220_span_corruption', virtual_examples), *halved.items(),
          ('cnn_dailymail_v002', by_examples()), ('squad_v010_allanswers', by_examples()),
          ('wmt_t2t_ende_v003', by_examples(TRANSLATION_LIMIT)),
          ('wmt15_enfr_v003', by_examples(TRANSLATION_LIMIT)),
          ('wmt16_enro_v003', by_examples())]


MIXTURES = MappingProxyType({
    'glue_v002_proportional': tuple(GLUE.items()),
    'super_glue_v102_proportional': tuple(SUPER_GLUE.items()),
    'closed_book_qa': tuple(
        (name, by_examples())
        for name in ('natural_questions_open', 'trivia_qa_open', 'web_questions_open')),
    'mc4': tuple((papers.mc4_task(language), by_examples(temperature=MC4_TEMPERATURE))
                 for language in papers.MC4),
    **{f't5_multitask_{size}': tuple(multitask(examples))
       for size, examples in VIRTUAL_EXAMPLES.items()},
})
