"""Rows of families.py at a size that compiles in a second, with parameters from numpy streams."""

import flax.linen as nn
import jax
import numpy as np

from t5lab import trees
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer

# One row of each kind: every row of families.py shrinks to one of these (test_families.py).
KINDS = {
    't5_1_0': 't5_1_0/small', 't5_1_1': 't5_1_1/small', 'decoder': 'decoder/small',
    'umt5': 'umt5/small', 'ul2': 'ul2/20b', 'longt5_local': 'longt5_local/base',
    'longt5_tglobal': 'longt5_tglobal/base', 'switch': 'switch/base', 'st_moe': 'st_moe/large',
    't5gemma': 't5gemma/2b_2b', '2017': 'transformer_2017/base', 'bart': 'bart/base',
    'gpt2': 'gpt2/small', 'llama1': 'llama1/7b', 'llama2_70b': 'llama2/70b',
    'llama3_1': 'llama3_1/8b', 'smollm2': 'smollm2/135m', 'bert': 'bert/base',
    'minilm': 'minilm/l6', 'mbart': 'mbart/large', 'blenderbot': 'blenderbot/400m',
    'marian': 'marian/base', 'marian_big': 'marian/big', 'pegasus': 'pegasus/large',
    'm2m100': 'm2m100/418m', 'roberta': 'roberta/base', 'distilbert': 'distilbert/base',
    'mistral': 'mistral/7b', 'qwen2': 'qwen2/0_5b', 'qwen2_7b': 'qwen2/7b',
    'qwen3': 'qwen3/0_6b', 'qwen3_8b': 'qwen3/8b', 'gemma': 'gemma/2b', 'gemma2': 'gemma2/2b',
    'gemma3': 'gemma3/1b', 't5gemma2': 't5gemma2/1b_1b'}


def shrink(row: str) -> TransformerConfig:
  """The row with two layers of 16: all that is left of it is what is not a size."""
  c = families.row(row)
  c.update(vocab_size=48, d_model=16, d_ff=32, n_heads=4, d_head=4, n_kv_heads=2 * bool(
      c['n_kv_heads']), enc_layers=2 * bool(c['enc_layers']), dec_layers=2 * bool(c['dec_layers']),
           max_length=16 * bool(c['max_length']), dropout=0., local_radius=2, global_block=2,
           pad_id=0, start_id=0, eos_id=1, norm_eps=1e-6, rope_theta=100.)
  if c['rope_scaling']:
    c['rope_scaling'] = (8., 1., 4., 16.)
  if c['window']:
    c.update(window=3, window_pattern=c['window_pattern'][-2:])
  if c['attn_scalar']:
    c['attn_scalar'] = 10.
  if c['rope_local_theta']:
    c['rope_local_theta'] = 10.
  if c['experts']:       # of 3 layers the last one is left over where every second has experts
    c.update(experts=4, moe_every=2, enc_layers=3, dec_layers=3, eval_capacity_factor=4.,
             capacity_factor=4.)
  return TransformerConfig(**c)


CONFIGS = {name: shrink(row) for name, row in KINDS.items()}

BATCH = {
    'encoder_input_tokens': np.array([[5, 7, 9, 11, 13, 1, 0, 0], [6, 8, 10, 1, 0, 0, 0, 0]]),
    'decoder_input_tokens': np.array([[0, 20, 21, 22, 1], [0, 30, 31, 1, 0]]),
}


def random_params(c, seed=0):
  """Every leaf normal / sqrt(fan-in) from a numpy stream of its own path."""
  abstract = jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)
  flat = {}
  for path, leaf in trees.flatten(nn.unbox(abstract)['params']).items():
    stream = np.random.RandomState(sum(map(ord, path)) + seed)
    fan = leaf.shape[-2] if leaf.ndim > 1 else 1
    x = stream.randn(*leaf.shape) / np.sqrt(fan)
    flat[path] = (1 + 0.1 * x if path.endswith('scale') else x).astype(np.float32)
  return trees.unflatten(flat)


def next_sentence(model, batch):
  """The next-sentence logits of a batch, for `apply(..., method=next_sentence)`."""
  return model.next_logits(model._encode(batch)[0])
