"""What Lab.embed and Lab.encode give to the model: ids with special tokens, prompts, features.

Texts are tokenized and cut as sentence-transformers does it.
"""

from collections.abc import Sequence

import numpy as np

from t5lab.data.vocab import Vocab
from t5lab.errors import UsageError, did_you_mean
from t5lab.models.families import TransformerConfig


def text_ids(vocabulary: Vocab, text: str, model: TransformerConfig, *, start: bool,
             limit: int = 0) -> list[int]:
  """The ids of a text with the special ones of its tokenizer; with a limit, its end is cut off.

  start: whether a decoder-only model reads its start token first.
  """
  prefix, suffix = list(vocabulary.prefix), [vocabulary.eos_id]
  if model.kind == 'decoder' and not vocabulary.ends_with_eos:
    prefix, suffix = [model.start_id] * start, []
  ids = vocabulary.encode(text)
  if limit:
    ids = ids[:max(limit - len(prefix) - len(suffix), 0)]
  return [*prefix, *ids, *suffix] or [model.start_id]


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


def padded(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> np.ndarray:
  """Lists of ids -> int32[n, length]. length: 0 is that of the longest list."""
  ids = np.full((len(rows), length or max(map(len, rows))), pad_id, np.int32)
  for row, tokens in zip(ids, rows):
    row[:len(tokens)] = tokens
  return ids
