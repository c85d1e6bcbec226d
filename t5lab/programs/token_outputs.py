"""Outputs of an encoder for single tokens: filled masks, classes, the span of an answer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5lab.errors import UsageError

LONGEST_ANSWER = 30       # tokens, as in BERT's run_squad.py


def as_list(texts, use: str) -> list:
  """A list of texts; UsageError for a single string. use: the method, for the message."""
  if isinstance(texts, str):
    raise UsageError(f"{use} takes a list of texts: {use}(['…'])")
  return list(texts)


def strings(texts, use: str) -> list[str]:
  """A list of strings; UsageError for other values in it."""
  texts = as_list(texts, use)
  for text in texts:
    if not isinstance(text, str):
      raise UsageError(f'{use} takes strings, got {type(text).__name__} {str(text)[:60]}')
  return texts


class TokenOutputs:
  """The methods of a Lab that are about tokens."""
  config: Any
  model: Any
  vocab: Any
  _row: Any
  _map: Any
  _apply: Any

  @property
  def name(self) -> str:
    """The subject of a message about the model: its family, if it is a row of the table."""
    return 'this model' if self.config.family == 'converted' else self.config.family

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of a classifier's classes; LABEL_0, LABEL_1, … if it came without names."""
    return tuple(self.config.eval.labels) or tuple(
        f'LABEL_{i}' for i in range(self.model.classes))

  def fill_mask(self, texts, k: int = 5) -> list[list[list[tuple[str, float]]]]:
    """For each mask of each text, the k most probable (piece, probability), best first.

    A mask is the mask token of the vocabulary, for example '[MASK]', or else '<extra_id_0>'.
    """
    mask, m = self.vocab.mask_id, self.model
    if mask is None and self.vocab.num_sentinels:
      mask = self.vocab.sentinel(0)
    if mask is None or not m.mlm_head or m.classes:
      raise UsageError(f'{self.name} has no masked-token head: fill_mask needs a BERT '
                       'with its MLM head and a vocabulary with a mask')
    if not 1 <= k <= m.vocab_size:
      raise UsageError(f'fill_mask: k must be between 1 and the vocabulary size, {m.vocab_size}, '
                       f'got {k}')
    texts = strings(texts, 'fill_mask')
    if not texts:
      return []
    rows = [self._row(text) for text in texts]
    positions = [np.flatnonzero(row['inputs'] == mask) for row in rows]
    for i, masks in enumerate(positions):
      if not len(masks):
        raise UsageError(f'text {i + 1} of {len(texts)} has no {self.vocab.pieces([mask])[0]}: '
                         f'{texts[i]!r}')
    probs, ids = self._most_probable(rows, k)
    choices = lambda i, j: list(zip(self.vocab.pieces(ids[i, j]), map(float, probs[i, j])))
    return [[choices(i, j) for j in masks] for i, masks in enumerate(positions)]

  def _most_probable(self, rows, k: int):
    """(probabilities, indices), each [n, T, k], of the k best outputs at every token."""
    best = lambda batch: jax.lax.top_k(jax.nn.softmax(self._apply('__call__', batch)), k)
    return self._map(rows, best)

  def tag(self, texts) -> list[list[tuple[str, str, float]]]:
    """For each text, (piece, label, probability) of each of its tokens: the most probable label.

    Needs a token classifier, e.g. of named entities. Special tokens are left out.
    """
    if not self.model.classes or self.model.class_of != 'token':
      raise UsageError(f'{self.name} has no classifier of tokens (model.class_of='
                       f'{self.model.class_of})')
    texts = strings(texts, 'tag')
    if not texts:
      return []
    rows = [self._row(text) for text in texts]
    probs, classes = self._most_probable(rows, 1)
    start, end = len(self.vocab.prefix), 1 + len(self.vocab.suffix)
    out = []
    for i, row in enumerate(rows):
      places = range(start, len(row['inputs']) - end)
      pieces = self.vocab.pieces(row['inputs'][start:len(row['inputs']) - end])
      out.append([(piece, self.labels[classes[i, j, 0]], float(probs[i, j, 0]))
                  for piece, j in zip(pieces, places)])
    return out

  def answer(self, questions, contexts) -> list[tuple[str, float]]:
    """For each question, (the span of its context that answers it best, its probability).

    Needs an extractive question-answering head. The probability is that of the start times that of
    the end, among the tokens of the context; a span has up to 30 tokens. [Devlin et al. 2019, 4.2]
    The span is decoded from its tokens: an uncased model gives it in lower case.
    """
    if self.model.class_of != 'span':
      raise UsageError(f'{self.name} has no head that finds answers (model.class_of='
                       f'{self.model.class_of})')
    questions, contexts = strings(questions, 'answer'), strings(contexts, 'answer')
    if len(questions) != len(contexts):
      raise UsageError(f'answer needs a context for each question, got {len(questions)} questions '
                       f'and {len(contexts)} contexts')
    if not questions:
      return []
    rows = [self._row(*pair) for pair in zip(questions, contexts)]
    logits = self._map(rows, lambda batch: self._apply('__call__', batch))
    return [self._best_span(row['inputs'], context, np.asarray(logits[i]))
            for i, (row, context) in enumerate(zip(rows, contexts))]

  def _best_span(self, ids, context, logits) -> tuple[str, float]:
    end = len(ids) - 1 - len(self.vocab.suffix)
    start = end - len(self.vocab.encode(context))
    if start == end:
      return '', 0.
    log_p = jax.nn.log_softmax(jnp.asarray(logits[start:end], jnp.float32), axis=0)
    scores = np.array(log_p[:, None, 0] + log_p[None, :, 1])       # [first token, last token]
    first, last = np.indices(scores.shape)
    scores[(last < first) | (last >= first + LONGEST_ANSWER)] = -np.inf
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return self.vocab.decode(ids[start + i:start + j + 1]).strip(), float(np.exp(scores[i, j]))
