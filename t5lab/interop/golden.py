"""Golden vectors of every Hugging Face architecture: what its own code computes from stated weights.

Where torch is not installed they are the reference that a conversion is certified against: tensors
filled by a rule over Hugging Face's names go through the same rows and the same Transformer as the
checkpoint does. The numbers were computed in float64 by transformers 5.24 and torch 2.13 on
2026-11-24 (`python -m t5lab.interop.golden` prints them again).
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from t5lab.interop import hf, rows
from t5lab.models.families import TransformerConfig, row
from t5lab.models.transformer import Transformer

# Rows of families.py at a size of their own: what is left out is the family's.
_SIZE = dict(vocab_size=40, d_model=16, d_ff=32, n_heads=2, d_head=8, dropout=0.)
_BOTH = dict(_SIZE, enc_layers=2, dec_layers=2)
_START = dict(pad_id=0, start_id=0, eos_id=1)
CONFIGS = {
    't5_1_0': ('t5_1_0/small', _BOTH),
    't5_1_1': ('t5_1_1/small', _BOTH),
    'umt5': ('umt5/small', _BOTH),
    'longt5_local': ('longt5_local/base', dict(_BOTH, local_radius=2)),
    'longt5_tglobal': ('longt5_tglobal/base', dict(_BOTH, local_radius=2, global_block=4)),
    'bart': ('bart/base', dict(_BOTH, max_length=16, **_START)),
    'gpt2': ('gpt2/small', dict(_SIZE, dec_layers=2, max_length=16, **_START)),
    'llama': ('llama3_1/8b', dict(_SIZE, dec_layers=2, n_heads=4, n_kv_heads=2, d_head=4,
                                  rope_theta=100., rope_scaling=(8., 1., 4., 16.), **_START)),
    'bert': ('bert/base', dict(_SIZE, enc_layers=2, max_length=16, eos_id=1)),
}

ENCODER = np.array([[5, 7, 9, 11, 13, 6, 8, 17, 2, 3, 1], [6, 8, 10, 4, 12, 1, 0, 0, 0, 0, 0]],
                   np.int32)
DECODER = np.array([[0, 20, 21, 22, 1, 9, 14], [0, 30, 31, 7, 5, 11, 39]], np.int32)


class Golden(NamedTuple):
  first: tuple[float, ...]    # logits[0, 5, :6]
  second: tuple[float, ...]   # logits[1, 2, :6]
  total: float                # sum |logits| over positions that are not padding


VECTORS = {
    't5_1_0': Golden(
        (-0.4895676, -0.3312710, -0.1297567, 0.0886856, 0.2955580, 0.4638718),
        (-1.0614777, -1.3340481, -1.4325786, -1.3442147, -1.0804845, -0.6757943), 464.0036),
    't5_1_1': Golden(
        (-0.5116721, 0.4251922, 1.3065861, 2.0175226, 2.4652529, 2.5913663),
        (1.0459963, 1.7010756, 2.1342327, 2.2889575, 2.1450648, 1.7213269), 854.1139),
    'umt5': Golden(
        (-0.3702173, 0.1531815, 0.6565963, 1.0743515, 1.3519467, 1.4531670),
        (0.5269040, 1.0123204, 1.3656695, 1.5408533, 1.5150173, 1.2915321), 648.8438),
    'longt5_local': Golden(
        (0.5515029, 1.3899810, 2.0471222, 2.4371957, 2.5093125, 2.2540642),
        (1.0421194, 1.6810208, 2.1006163, 2.2461652, 2.0986792, 1.6773995), 812.6886),
    'longt5_tglobal': Golden(
        (0.2223398, 0.8694245, 1.4030840, 1.7536971, 1.8755228, 1.7526677),
        (0.9471227, 1.5348175, 1.9222800, 2.0589618, 1.9270313, 1.5437003), 840.4084),
    'bart': Golden(
        (1.0875647, 0.6184914, 0.0685528, -0.4906584, -0.9862959, -1.3537477),
        (-2.2046974, -1.7090974, -0.9907052, -0.1433949, 0.7221852, 1.4930624), 683.1467),
    'gpt2': Golden(
        (-6.0243905, -1.9942922, 2.2959816, 6.2867214, 9.4572954, 11.3940702),
        (-2.6587684, 1.6183272, 5.6842959, 9.0086909, 11.1578118, 11.8512841), 4127.74),
    'llama': Golden(
        (1.0094306, 1.0361435, 0.9276810, 0.6981932, 0.3776190, 0.0077807),
        (-0.6143782, -0.5614934, -0.4353562, -0.2524223, -0.0365574, 0.1840767), 343.2786),
    'bert': Golden(
        (9.4989534, 11.5132694, 12.0250779, 10.9676584, 8.4790717, 4.8841325),
        (9.2960717, 11.4240744, 12.0612059, 11.1243962, 8.7359713, 5.2076787), 5449.24),
}


def config(name: str) -> TransformerConfig:
  family, changes = CONFIGS[name]
  return TransformerConfig(**{**row(family), **changes})


def name_of(c: TransformerConfig) -> str | None:
  """The golden architecture that c is a size of; None if there is none."""
  sizes = {*_BOTH, *_START, 'max_length', 'n_kv_heads', 'rope_theta', 'rope_scaling', 'norm_eps',
           'local_radius', 'global_block', 'init_std', 'remat', 'dtype', 'logit_bias', 'mlm_head',
           'pooler', 'nsp', 'classes', 'pool', 'types', 'rel_buckets', 'rel_max_distance',
           'position_offset', 'embed_scale'}
  differ = lambda a: [f.name for f in dataclasses.fields(c) if f.name not in sizes
                      and getattr(a, f.name) != getattr(c, f.name)]
  return next((name for name in CONFIGS if config(name).kind == c.kind
               and not differ(config(name))), None)


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """{name: shape} -> float32 arrays: the i-th of the sorted names is sin(0.37 n + i), scaled by what
  its name says it is, in float64 and then rounded."""
  out = {}
  for i, name in enumerate(sorted(shapes)):
    x = np.sin(np.arange(int(np.prod(shapes[name]))) * 0.37 + i).reshape(shapes[name])
    if name.endswith('bias') and 'relative' not in name:
      x = 0.1 * x
    elif 'norm' in name.lower() and 'embed' not in name or '.ln_' in name:
      x = 1 + 0.1 * x
    elif not any(part in name for part in ('shared', 'wte', 'wpe', 'embed', 'relative')):
      x = 0.3 * x
    out[name] = x.astype(np.float32)
  return out


def features(c: TransformerConfig) -> dict[str, np.ndarray]:
  encoder = {'encoder_input_tokens': ENCODER} if c.enc_layers else {}
  return {**encoder, 'decoder_input_tokens': DECODER} if c.dec_layers else encoder


class _Filled:
  def __init__(self, tensors):
    self._tensors = tensors

  def shapes(self):
    return {name: x.shape for name, x in self._tensors.items()}

  def read(self, name):
    return self._tensors[name]


def tensors(c: TransformerConfig) -> dict[str, np.ndarray]:
  return fill(rows.specs(hf.for_config(c).rows(c), abstract(c)))


def abstract(c: TransformerConfig):
  import flax.linen as nn
  batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in features(c).items()}
  return nn.unbox(jax.eval_shape(Transformer(c).init, jax.random.key(0), batch))['params']


def ours(name: str) -> np.ndarray:
  """float32[B, T, V] of our Transformer on the filled tensors, read through our rows."""
  c = config(name)
  params = rows.read(hf.for_config(c).rows(c), _Filled(tensors(c)), abstract(c))
  with jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(Transformer(c).apply)({'params': params}, features(c)))


def measure(c: TransformerConfig, logits: np.ndarray) -> Golden:
  real = ENCODER != c.pad_id if c.kind == 'encoder' else np.ones(DECODER.shape, bool)
  return Golden(tuple(map(float, logits[0, 5, :6])), tuple(map(float, logits[1, 2, :6])),
                float(np.abs(logits[real]).sum()))


def difference(name: str) -> float:
  """The largest difference of ours to the stored vector, relative to its largest number."""
  found, wanted = measure(config(name), ours(name)), VECTORS[name]
  flat = lambda g: np.array([*g.first, *g.second])
  scale = np.abs(flat(wanted)).max()
  return float(max(np.abs(flat(found) - flat(wanted)).max() / scale,
                   abs(found.total - wanted.total) / wanted.total))


def main():
  from t5lab.interop import reference
  for name in CONFIGS:
    c = config(name)
    logits = reference.from_tensors(c, tensors(c), dtype='float64').logits(features(c))
    print(f'    {name!r}: {measure(c, logits)},')


if __name__ == '__main__':
  main()
