"""The objectives on unlabelled text, by name. A new objective is one row of TABLE and one test.

  span_corruption     T5's: density 0.15, mean span 3 [Raffel et al. 2020, 3.1.4]
  iid_denoising       every token is dropped independently, T5's baseline [3.1.4]
  prefix_lm           a segment is cut in two at a random point [3.2.3]
  lm                  documents, each closed with EOS, are joined and cut to length
  document_lm         documents stay apart in their rows, by segment ids
  ul2                 seven denoisers, each with its mode tokens [Tay et al. 2022, 3.1]
  mlm                 masked words, one text per example [Liu et al. 2019, 4.1]
  bert                masked words and next-sentence prediction [Devlin et al. 2019, 3.1]
  gap_sentences       PEGASUS [Zhang et al. 2020, 3.1]
  fill_in_the_middle  half of the segments are reordered [Bavarian et al. 2022, 3]

Random choices are drawn again each epoch, except for bert's pairs of texts. If the vocabulary has
no mask token, <extra_id_0> is the mask; if it has no [CLS], BERT's input opens without one. The
three marks of fill-in-the-middle are <extra_id_0> to <extra_id_2>.

This module needs no TensorFlow: tasks/text.py turns a recipe into seqio preprocessors.
"""
from collections.abc import Callable, Mapping
import dataclasses
import functools
from types import MappingProxyType
import zlib

import numpy as np

from t5lab.data.objectives import bert, denoisers, gap_sentences, infilling, sentences, spans

BOTH, TARGETS = ('inputs', 'targets'), ('targets',)
MASKED = ('inputs', 'targets', 'weights', 'types')
UL2_MODES = ('[NLU] ', '[S2S] ', '[NLG] ')       # of R, S and X


@dataclasses.dataclass(frozen=True)
class Segments:
  """Joins the tokens of all texts and cuts them into segments of one length.

  length(task, lengths) -> tokens of a segment, given the lengths of the features.
  least: a shorter segment is dropped. closed: whether every text first gets an EOS.
  """
  length: Callable[[str, Mapping], int]
  least: int = 1
  closed: bool = False
  features = TARGETS


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Makes stored examples of whole texts.

  prepare(task, lengths) -> a function of a batch of texts that returns [{feature: int[T]}, …].
  features: of these examples. tokenized: whether the function takes token ids instead of str.
  """
  prepare: Callable[[str, Mapping], Callable]
  features: tuple[str, ...] = TARGETS
  tokenized: bool = False


@dataclasses.dataclass(frozen=True)
class Draw:
  """The random step, from a stored example to the features of a training example.

  fn(example, rng, **options) -> {feature: int[T]}; sizes(lengths) -> an upper bound per feature.
  Where 'targets' is the only stored feature, fn gets its tokens and sizes its length, not a dict.
  The name of fn and the options are part of a run's data fingerprint: do not rename them.
  """
  fn: Callable
  sizes: Callable
  options: Mapping


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How text becomes examples: `cut` once, then `draw` in every epoch (None: nothing is random).

  marks: {name: id} of the tokens that the vocabulary must have; None marks a missing one.
  """
  cut: Segments | Pieces
  draw: Draw | None = None
  marks: Mapping = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Objective:
  """features: of a training example. recipe(vocabulary, options) -> Recipe."""
  features: tuple[str, ...]
  recipe: Callable[..., Recipe]

  @property
  def kind(self) -> str:
    """The kind of model that learns it: encoder_decoder, decoder or encoder."""
    if 'weights' in self.features:
      return 'encoder'
    return 'encoder_decoder' if 'inputs' in self.features else 'decoder'


# --- sentinels and marks of a vocabulary ---------------------------------------------------------


def _num_sentinels(v) -> int:
  """0 where the ids are not in a row. The task still exists: opening it reports what is missing."""
  return v.num_sentinels if v.sentinel_step else 0


def _or_sentinel(v, token, i: int):
  """`token`, or sentinel number i where the vocabulary lacks the token; None if it lacks both."""
  if token is None and i < v.num_sentinels:
    return v.sentinel(i)
  return token


# --- the recipes ---------------------------------------------------------------------------------


def _denoising(v, options, fn, segment, sizes, least=2):
  """The recipe of an objective that puts sentinels in the place of spans."""
  shape = {k: options[k] for k in ('density', 'mean_span', 'modes') if k in options}
  length = functools.partial(segment, sentinels=_num_sentinels(v), **shape)
  step = {'step': 1} if v.sentinel_step > 0 else {}
  drawn = {'sentinel': v.sentinel(0) if _num_sentinels(v) else None, **step, 'eos': v.eos_id,
           **options}
  return Recipe(Segments(length, least), Draw(fn, functools.partial(sizes, **shape), drawn))


def _span_corruption(v, options):
  return _denoising(v, options, spans.span_corruption, spans.span_corruption_segment,
                    spans.span_corruption_sizes)


def _iid_denoising(v, options):
  options = {'sentinels': _num_sentinels(v), **options}
  return _denoising(v, options, denoisers.iid_denoising, denoisers.iid_segment,
                    denoisers.iid_sizes, least=1)


def _prefix_lm(v, options):
  cut = Segments(spans.prefix_lm_segment, least=2)
  return Recipe(cut, Draw(spans.prefix_lm, spans.prefix_lm_sizes, {'eos': v.eos_id}))


def _lm(v, options):
  return Recipe(Segments(spans.lm_segment, closed=True))


def _document_lm(v, options):
  def prepare(task, lengths):
    length = spans.lm_segment(task, lengths)
    return lambda documents: [{'targets': piece} for tokens in documents
                              for piece in spans.document_pieces(tokens, length, v.eos_id)]
  return Recipe(Pieces(prepare, tokenized=True))


def _ul2(v, options):
  options = {'modes': tuple(tuple(v.encode(mode)) for mode in UL2_MODES), **options}
  return _denoising(v, options, denoisers.ul2, denoisers.ul2_segment, denoisers.ul2_sizes)


def _mask_ids(v) -> dict:
  return {'cls': v.cls_id, 'sep': v.eos_id if v.sep_id is None else v.sep_id,
          'mask': _or_sentinel(v, v.mask_id, 0), 'vocab_size': v.size}


def _mask_alone(tokens, rng, **options):
  return bert.mlm({'targets': tokens}, rng, **options)


def _mlm(v, options):
  ids = _mask_ids(v)
  draw = Draw(_mask_alone, lambda length: bert.mlm_sizes({'targets': length}),
              {**ids, **options})
  return Recipe(Segments(bert.mlm_segment), draw, marks={'mask': ids['mask']})


def _bert(v, options):
  def prepare(task, lengths):
    length = spans.feature_length(task, lengths, 'inputs')

    def pairs(texts):
      # Seeded by the batch itself, so that the pairs are the same every time.
      seed = zlib.crc32(b'\0'.join(text.encode('utf-8') for text in texts))
      documents = [list(map(v.encode, sentences.split(text))) for text in texts]
      return bert.pairs(documents, np.random.default_rng(seed), length)
    return pairs

  ids = _mask_ids(v)
  draw = Draw(bert.mlm, bert.mlm_sizes, {**ids, **options})
  return Recipe(Pieces(prepare, ('first', 'second', 'next')), draw, marks={'mask': ids['mask']})


def _gap_sentences(v, options):
  def prepare(task, lengths):
    def pieces(text):
      ids = [ids for ids in map(v.encode, sentences.split(text)) if ids]
      if not ids:
        return []
      starts = np.cumsum([0, *map(len, ids[:-1])])
      document = {'targets': np.concatenate(ids), 'sentences': starts}
      return gap_sentences.gap_sentences_pieces(task, document, lengths, **options)
    return lambda texts: [piece for text in texts for piece in pieces(text)]

  ids = {'mask': _or_sentinel(v, v.mask_id, 0), 'eos': v.eos_id}
  draw = Draw(gap_sentences.gap_sentences,
              lambda lengths: dict.fromkeys(BOTH, lengths['targets'] + 1), {**ids, **options})
  return Recipe(Pieces(prepare, ('targets', 'sentences')), draw, marks=ids)


def _fill_in_the_middle(v, options):
  ids = {mark: _or_sentinel(v, None, i) for i, mark in enumerate(('prefix', 'suffix', 'middle'))}
  draw = Draw(infilling.fim, infilling.fim_sizes, {'eos': v.eos_id, **ids, **options})
  return Recipe(Segments(infilling.fim_segment), draw, marks=ids)


TABLE = MappingProxyType({
    'span_corruption': Objective(BOTH, _span_corruption),
    'iid_denoising': Objective(BOTH, _iid_denoising),
    'prefix_lm': Objective(BOTH, _prefix_lm),
    'lm': Objective(TARGETS, _lm),
    'document_lm': Objective(TARGETS, _document_lm),
    'ul2': Objective(BOTH, _ul2),
    'mlm': Objective(MASKED, _mlm),
    'bert': Objective((*MASKED, 'next'), _bert),
    'gap_sentences': Objective(BOTH, _gap_sentences),
    'fill_in_the_middle': Objective(TARGETS, _fill_in_the_middle),
})
