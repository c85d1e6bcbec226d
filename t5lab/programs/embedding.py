"""Model inputs of Lab.embed and Lab.encode: ids with special tokens, prompts, features.

Texts are tokenized and cut as sentence-transformers does it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from t5lab.data.vocab import Vocab
from t5lab.errors import UsageError, did_you_mean
from t5lab.models.families import TransformerConfig


def ends(vocabulary: Vocab, model: TransformerConfig) -> int:
  """The number of special tokens after a text."""
  if model.kind == 'decoder' and not vocabulary.ends_with_eos:
    return 0
  return 1 + len(vocabulary.suffix)


def text_ids(vocabulary: Vocab, text: str, model: TransformerConfig, *, start: bool,
             limit: int = 0) -> np.ndarray:
  """The ids of a text with the special ones of its tokenizer; with a limit, its end is cut off.

  start: whether a decoder-only model reads its start token first.
  """
  prefix, suffix = list(vocabulary.prefix), [vocabulary.eos_id, *vocabulary.suffix]
  if not ends(vocabulary, model):
    prefix, suffix = [model.start_id] * start, []
  ids = vocabulary.encode(text)
  if limit:
    ids = ids[:max(limit - len(prefix) - len(suffix), 0)]
  return np.array([*prefix, *ids, *suffix] or [model.start_id], np.int32)


def prompt_text(settings, prompt: str | None, name: str | None) -> str:
  """The text before every input: `prompt`, or the prompt of this name, or the default one.

  settings: the embed section of a config. Errors: UsageError for an unknown name.
  """
  if prompt is not None:
    return prompt
  name = settings.default_prompt if name is None else name
  known = {key: text for key, text in settings.prompts}
  if name and name not in known:
    raise UsageError(f'embed: no prompt {name!r}.{did_you_mean(name, known)}')
  return known[name] if name else ''


def pooling_features(batch: dict[str, np.ndarray], model: TransformerConfig,
                     pool_from: int = 0) -> dict[str, np.ndarray]:
  """The features of `Transformer.pooled`, from those of an encoder's inputs.

  pool_from: the number of tokens at the start that are not pooled.
  """
  if model.kind == 'decoder':
    batch = {name.replace('encoder_', 'decoder_'): x for name, x in batch.items()
             if name != 'encoder_token_types'}
  if pool_from:
    rows = len(next(iter(batch.values())))
    batch = {**batch, 'pool_from': np.full(rows, pool_from, np.int32)}
  return batch


def encode(run: Callable, rows: Sequence[np.ndarray], *, length: int, pad_id: int,
           attend_padding: bool) -> tuple[np.ndarray, np.ndarray]:
  """Ids of texts -> (hidden[n, T, D], mask bool[n, T]), see `Lab.encode`.

  run: [{'inputs': ids}, …] -> hidden[n, length of the longest or more, D].
  """
  longest = max(map(len, rows))
  if length and length < longest:
    raise UsageError(f'encode: length={length} is less than the special tokens of a text')
  length = length or longest
  mask = np.arange(length) < np.array([[len(row)] for row in rows])
  if attend_padding:
    rows = [np.pad(row, (0, length - len(row)), constant_values=pad_id) for row in rows]
  hidden = run([{'inputs': row} for row in rows])[:, :length]
  hidden = np.pad(hidden, ((0, 0), (0, length - hidden.shape[1]), (0, 0)))
  if not attend_padding:
    hidden[~mask] = 0
  return hidden, mask
