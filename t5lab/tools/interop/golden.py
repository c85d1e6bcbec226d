"""Golden vectors: what Hugging Face's code computes from prescribed weights, per architecture.

Where torch is not installed a conversion is certified against them: tensors that are filled by a
rule over Hugging Face's names go through the same rows and the same Transformer as a checkpoint.
The numbers were computed in float64 by transformers 5.24 and torch 2.13 on 2026-11-24
(`python -m t5lab.tools.interop.golden` prints them again).
"""

import dataclasses

import jax
import numpy as np

from t5lab.models.families import TransformerConfig, row
from t5lab.models.transformer import Transformer
from t5lab.programs import shapes
from t5lab.tools.interop import hf, tensor_map

# Families at a small size; fields that are not listed have the family's value.
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


# logits[0, 5, :6], logits[1, 2, :6], and the sum of |logits| over positions without padding
VECTORS = {
    't5_1_0': (
        (-0.6242069, 0.6747333, 0.0298412, 0.5649623, 0.4832299, -0.0861895),
        (0.5374168, -0.7875904, -0.2004846, 0.5366490, -0.6856881, 0.0888326), 282.8034),
    't5_1_1': (
        (1.0647091, 0.8873924, 1.5253059, 0.8042328, -1.9690022, 1.2477039),
        (-0.6434274, 0.3415219, -0.2084342, 1.1826486, -2.3690821, 0.4672737), 602.0668),
    'umt5': (
        (1.0712913, 0.9853450, -1.9054590, 1.4263107, 2.3185087, 0.7577299),
        (-1.1416177, 2.0252084, -0.1375860, -0.8517562, 0.6446683, -1.2114561), 629.5312),
    'longt5_local': (
        (1.2093854, 1.4809513, 0.3775856, 2.0803578, -1.4055174, 0.5261300),
        (0.8973776, 1.7529771, 0.7083930, -1.6572594, -2.4771070, 0.4098964), 630.2989),
    'longt5_tglobal': (
        (1.5122050, -1.2400447, 0.3569023, 0.4478033, -1.5045291, 0.0683571),
        (2.3379146, 1.6653820, -0.8026504, -0.7241352, -1.3308918, -0.1872440), 627.1238),
    'bart': (
        (-0.0287471, 3.9585015, 3.5931406, -4.2356098, 0.9734365, 0.7776780),
        (-1.5702316, 2.9495112, 5.4324622, -3.6449278, 2.3402541, -0.6514470), 1437.347),
    'gpt2': (
        (-8.6078855, -0.1050384, 0.3220849, 0.4104371, 2.4638914, 2.6035305),
        (-2.3311695, -0.2634568, -2.6713051, -0.6783829, 6.7412327, -2.5042948), 1408.653),
    'llama': (
        (2.5809347, 0.1249140, 0.8526402, -0.2392265, 0.5302291, -0.6411299),
        (2.3689975, 0.6066314, 1.5727482, -0.1051265, 1.8156564, 0.7150733), 620.0725),
    'bert': (
        (-1.7037303, 2.6315635, 4.2379643, -1.5398396, -2.7962531, -0.6224763),
        (3.3165158, 3.5789787, 2.2495510, -1.1517922, 0.7030208, -6.1036028), 1594.423),
}


def config(name: str) -> TransformerConfig:
  family, changes = CONFIGS[name]
  return TransformerConfig(**{**row(family), **changes})


def matching_name(c: TransformerConfig) -> str | None:
  """Returns the golden architecture that c is another size of, or None."""
  sizes = {*_BOTH, *_START, 'max_length', 'n_kv_heads', 'rope_theta', 'rope_scaling', 'norm_eps',
           'local_radius', 'global_block', 'init_std', 'remat', 'dtype', 'logit_bias', 'mlm_head',
           'pooler', 'nsp', 'classes', 'pool', 'types', 'rel_buckets', 'rel_max_distance',
           'position_offset', 'embed_scale', 'tied'}
  formula = [field.name for field in dataclasses.fields(c) if field.name not in sizes]
  matches = lambda other: other.kind == c.kind and all(
      getattr(other, field) == getattr(c, field) for field in formula)
  return next((name for name in CONFIGS if matches(config(name))), None)


def filled_tensors(c: TransformerConfig) -> dict[str, np.ndarray]:
  """Returns Hugging Face's tensors of c, filled with prescribed float32 numbers.

  Element n of the i-th of the sorted names is sin(0.37 (n^2 mod 1009) + i), scaled by the kind of
  tensor that its name says, in float64 and then rounded. Without the square, matrices would have
  rank 2, and activations would hardly matter.
  """
  sizes = tensor_map.shapes(hf.format_for(c).tensor_rows(c), shapes.abstract_params(c))
  tensors = {}
  for i, name in enumerate(sorted(sizes)):
    n = np.arange(int(np.prod(sizes[name])))
    x = np.sin(n * n % 1009 * 0.37 + i).reshape(sizes[name])
    if name.endswith('bias') and 'relative' not in name:
      x = 0.1 * x
    elif 'norm' in name.lower() and 'embed' not in name or '.ln_' in name:
      x = 1 + 0.1 * x
    elif not any(part in name for part in ('shared', 'wte', 'wpe', 'embed', 'relative')):
      x = 0.5 * x
    tensors[name] = x.astype(np.float32)
  return tensors


def features(c: TransformerConfig) -> dict[str, np.ndarray]:
  encoder = {'encoder_input_tokens': ENCODER} if c.enc_layers else {}
  return {**encoder, 'decoder_input_tokens': DECODER} if c.dec_layers else encoder


def summarise(c: TransformerConfig, logits: np.ndarray) -> tuple:
  """Returns an entry of VECTORS."""
  real = ENCODER != c.pad_id if c.kind == 'encoder' else np.ones(DECODER.shape, bool)
  return (tuple(map(float, logits[0, 5, :6])), tuple(map(float, logits[1, 2, :6])),
          float(np.abs(logits[real]).sum()))


def relative_difference(name: str) -> float:
  """Returns the largest difference of our Transformer to the vector, relative to its largest."""
  c = config(name)
  reader = tensor_map.TensorReader(filled_tensors(c))
  params = tensor_map.read(hf.format_for(c).tensor_rows(c), reader, shapes.abstract_params(c))
  with jax.default_matmul_precision('highest'):
    logits = np.asarray(jax.jit(Transformer(c).apply)({'params': params}, features(c)))
  ours, stored = np.hstack(summarise(c, logits)), np.hstack(VECTORS[name])
  difference = np.abs(ours - stored)
  return float(max(difference[:-1].max() / np.abs(stored[:-1]).max(), difference[-1] / stored[-1]))


def main():
  from t5lab.tools.interop import reference
  for name in CONFIGS:
    c = config(name)
    model = reference.from_tensors(
        c, hf.format_for(c).config(c), filled_tensors(c).items(), 'float64')
    print(f'    {name!r}: {summarise(c, model.logits(features(c)))},')


if __name__ == '__main__':
  main()
