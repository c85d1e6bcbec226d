"""Text without supervision -> a task: the preprocessors of each self-supervised objective, by name.

  span_corruption     T5's, density 0.15, spans of 3 [Raffel et al. 2020, 3.1.4]
  iid_denoising       each token dropped by itself, T5's baseline [3.1.4]
  prefix_lm           cut in two at a random point [3.2.3]
  lm                  documents, each closed, one after the other, cut to length
  document_lm         documents kept apart in their rows by segment ids
  ul2                 seven denoisers, each with its mode's tokens [Tay et al. 2022, 3.1]
  mlm                 masked words, one text an example [Liu et al. 2019, 4.1]
  bert                masked words, and does the second text follow [Devlin et al. 2019, 3.1]
  gap_sentences       PEGASUS [Zhang et al. 2020, 3.1]
  fill_in_the_middle  half of the segments moved [Bavarian et al. 2022, 3]

What they draw, they draw anew each epoch, but for bert's pairs of texts. Where a vocabulary has no
mask token, it is <extra_id_0>; the three marks of fill-in-the-middle are <extra_id_0> to
<extra_id_2>. A vocabulary without a token that opens BERT's input opens it with none, as in use.
"""
from collections.abc import Callable
import functools
import zlib

import numpy as np

from t5lab.data import vocab
from t5lab.data.objectives import bert, denoisers, gap_sentences, infilling, sentences
from t5lab.data.objectives import spans as objectives
from t5lab.data.tasks import parts
from t5lab.data.tasks.names import OBJECTIVES
from t5lab.data.tasks.seqio_tf import NumpyObjective, seqio, tf
from t5lab.errors import UsageError

BOTH, TARGETS = ('inputs', 'targets'), ('targets',)
MASKED = ('inputs', 'targets', 'weights', 'types')
UL2_MODES = ('[NLU] ', '[S2S] ', '[NLG] ')       # of R, S and X


def add(name: str, spec: str, source, objective: str, column: str = 'text', **options) -> None:
  """Registers a task of `objective` on the texts that the source has in `column`.

  options: of the objective's function, as density=0.5, mean_span=3.
  """
  features, preprocessors = _of(objective, name, vocab.load(spec), options)
  only = lambda dataset: dataset.map(lambda row: {'targets': row[column]})
  parts.add(name, spec, source, [only, *preprocessors], features, framed=False)


def _of(objective, task, v, options):
  """(features that the task makes, preprocessors of rows {'targets': text})."""
  # A vocabulary without sentinels in a row keeps the name: opening the task says what is missing.
  sentinels = v.num_sentinels if v.sentinel_step else 0
  sentinel = v.sentinel(0) if sentinels else None
  step = {'step': 1} if v.sentinel_step > 0 else {}
  tokens = parts.by_batch(parts.tokenize)
  spans = {k: options[k] for k in ('density', 'mean_span') if k in options}
  if objective == 'span_corruption':
    return BOTH, [tokens, segments(task, objectives.span_corruption_segment, 2,
                                   sentinels=sentinels, **spans),
                  NumpyObjective(objectives.span_corruption,
                                 functools.partial(objectives.span_corruption_sizes, **spans),
                                 sentinel=sentinel, eos=v.eos_id, **step, **options)]
  if objective == 'iid_denoising':
    return BOTH, [tokens, segments(task, denoisers.iid_segment, 1, sentinels=sentinels, **spans),
                  NumpyObjective(denoisers.iid_denoising,
                                 functools.partial(denoisers.iid_sizes, **spans),
                                 sentinel=sentinel, sentinels=sentinels, eos=v.eos_id, **step,
                                 **options)]
  if objective == 'prefix_lm':
    return BOTH, [tokens, segments(task, objectives.prefix_lm_segment, 2),
                  NumpyObjective(objectives.prefix_lm, objectives.prefix_lm_sizes, eos=v.eos_id)]
  if objective == 'lm':
    return TARGETS, [tokens, seqio.preprocessors.append_eos,
                     segments(task, objectives.lm_segment, 1)]
  if objective == 'document_lm':
    return TARGETS, [tokens, _document_pieces(task, v.eos_id)]
  if objective == 'ul2':
    modes = tuple(tuple(v.encode(mode)) for mode in UL2_MODES)
    return BOTH, [tokens, segments(task, denoisers.ul2_segment, 2, sentinels=sentinels,
                                   modes=modes),
                  NumpyObjective(denoisers.ul2, functools.partial(denoisers.ul2_sizes, modes=modes),
                                 sentinel=sentinel, eos=v.eos_id, modes=modes, **step, **options)]
  if objective in ('mlm', 'bert'):
    ids = dict(cls=v.cls_id, sep=v.eos_id if v.sep_id is None else v.sep_id,
               mask=_or_sentinel(v, v.mask_id, 0), vocab_size=v.size)
    needed = _needs(task, {'mask': ids['mask']})
    if objective == 'mlm':
      return MASKED, [needed, tokens, segments(task, bert.mlm_segment, 1),
                      NumpyObjective(_mask_alone, _alone_sizes, ('targets',), **ids, **options)]
    pair = ('first', 'second', 'next')
    return (*MASKED, 'next'), [needed, _text_pairs(task, v),
                               NumpyObjective(bert.mlm, bert.mlm_sizes, pair, **ids, **options)]
  if objective == 'gap_sentences':
    ids = dict(mask=_or_sentinel(v, v.mask_id, 0), eos=v.eos_id)
    return BOTH, [_needs(task, ids), _gap_pieces(task, v, options),
                  NumpyObjective(gap_sentences.gap_sentences, _gap_sizes, ('targets', 'sentences'),
                                 **ids, **options)]
  if objective == 'fill_in_the_middle':
    ids = {mark: _or_sentinel(v, None, i) for i, mark in enumerate(('prefix', 'suffix', 'middle'))}
    return TARGETS, [_needs(task, ids), tokens, segments(task, infilling.fim_segment, 1),
                     NumpyObjective(infilling.fim, infilling.fim_sizes, eos=v.eos_id, **ids,
                                    **options)]
  raise UsageError(f'task {task!r}: no objective {objective!r}; there are {", ".join(OBJECTIVES)}')


def _or_sentinel(v, token, i):
  return v.sentinel(i) if token is None and i < v.num_sentinels else token


def _needs(task, ids):
  """Preprocessor that lets rows pass, or says at start that the vocabulary has no such tokens."""
  def preprocess(dataset):
    missing = [name for name, token in ids.items() if token is None]
    if missing:
      raise UsageError(f'task {task!r} needs tokens for {", ".join(missing)}, and the vocabulary '
                       'has neither them nor sentinels: use another one, or books_lm')
    return dataset
  return preprocess


# Bounds on the sizes, from the lengths of an example's features; exact but for gap sentences.


def _mask_alone(tokens, rng, **options):
  return bert.mlm({'targets': tokens}, rng, **options)


def _alone_sizes(length):
  return bert.mlm_sizes({'targets': length})


def _gap_sizes(lengths):
  return dict.fromkeys(BOTH, lengths['targets'] + 1)


# Preprocessors that need the lengths of the features: they cut text to fit.


def _known(task, sequence_length):
  if sequence_length is None:
    raise UsageError(f'task {task!r} cuts text into segments and needs the feature lengths')
  return sequence_length


def segments(task: str, segment_length: Callable, least: int, **options):
  """Preprocessor: token lists -> their concatenation cut to segment_length(task, lengths), rest
  dropped if shorter than `least`. T5 concatenates 128 documents at a time, without a separator."""
  def preprocess(dataset, sequence_length):
    length = segment_length(task, _known(task, sequence_length), **options)
    tokens = dataset.map(lambda row: row['targets']).rebatch(length)
    tokens = tokens.filter(lambda segment: tf.size(segment) >= least)
    return tokens.map(lambda segment: {'targets': segment})
  return preprocess


def _many(dataset, fn, features):
  """fn(list of values) -> list of {feature: int[T]}, over batches of {'targets'} of the dataset."""
  def run(flat, lengths):
    values = np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
    made = fn(values)
    columns = [[np.asarray(example[name], np.int32) for example in made] for name in features]
    return [part for column in columns for part in (
        np.concatenate([np.zeros(0, np.int32), *column]),
        np.array([len(x) for x in column], np.int64))]

  def expand(rows):
    values = rows['targets']
    if not isinstance(values, tf.RaggedTensor):                     # texts
      values = tf.RaggedTensor.from_row_lengths(values, tf.ones_like(values, tf.int64))
    made = tf.numpy_function(run, [values.flat_values, values.row_lengths()],
                             [tf.int32, tf.int64] * len(features), stateful=False)
    return {name: tf.RaggedTensor.from_row_lengths(
        tf.ensure_shape(made[2 * i], [None]), tf.ensure_shape(made[2 * i + 1], [None]),
        validate=False) for i, name in enumerate(features)}

  batches = dataset.ragged_batch(parts.ROWS_A_CALL).map(expand)
  return batches.unbatch().map(lambda row: row)


def _document_pieces(task, eos):
  def preprocess(dataset, sequence_length):
    length = objectives.lm_segment(task, _known(task, sequence_length))
    return _many(dataset, lambda documents: [
        {'targets': piece} for tokens in documents
        for piece in objectives.pieces(tokens, length, eos)], TARGETS)
  return preprocess


def _sentence_ids(v, text) -> list[list[int]]:
  """bytes or str -> the ids of each sentence."""
  return [v.encode(sentence) for sentence in sentences.split(tf.compat.as_text(text))]


def _text_pairs(task, v):
  """Pairs within batches of documents. The draw is from the batch itself, so it is the same always.
  """
  def preprocess(dataset, sequence_length):
    length = objectives.length_of(task, _known(task, sequence_length), 'inputs')

    def pairs(texts):
      seed = zlib.crc32(b'\0'.join(text[0] for text in texts))
      return bert.pairs([_sentence_ids(v, text[0]) for text in texts],
                        np.random.default_rng(seed), length)
    return _many(dataset, pairs, ('first', 'second', 'next'))
  return preprocess


def _gap_pieces(task, v, options):
  def preprocess(dataset, sequence_length):
    lengths = _known(task, sequence_length)

    def cut(texts):
      made = []
      for text in texts:
        ids = [s for s in _sentence_ids(v, text[0]) if s]
        if ids:
          starts = np.cumsum([0, *map(len, ids[:-1])])
          made += gap_sentences.gap_sentences_pieces(
              task, {'targets': np.concatenate(ids), 'sentences': starts}, lengths, **options)
      return made
    return _many(dataset, cut, ('targets', 'sentences'))
  return preprocess
