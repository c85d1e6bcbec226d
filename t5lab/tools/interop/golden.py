"""Golden vectors: what Hugging Face's code computes from prescribed weights, per architecture.

Where torch is not installed a conversion is certified against them: tensors that are filled by a
rule over Hugging Face's names go through the same rows and the same Transformer as a checkpoint.
The numbers were computed in float64 by transformers 5.24 and torch 2.13 in November 2026
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
_DECODER = dict(_SIZE, dec_layers=2, n_heads=4, n_kv_heads=2, d_head=4, rope_theta=100., **_START)
CONFIGS = {
    't5_1_0': ('t5_1_0/small', _BOTH),
    't5_1_1': ('t5_1_1/small', _BOTH),
    'umt5': ('umt5/small', _BOTH),
    'longt5_local': ('longt5_local/base', dict(_BOTH, local_radius=2)),
    'longt5_tglobal': ('longt5_tglobal/base', dict(_BOTH, local_radius=2, global_block=4)),
    'bart': ('bart/base', dict(_BOTH, max_length=16, **_START)),
    'gpt2': ('gpt2/small', dict(_SIZE, dec_layers=2, max_length=16, **_START)),
    'llama': ('llama3_1/8b', dict(_DECODER, rope_scaling=(8., 1., 4., 16.))),
    'bert': ('bert/base', dict(_SIZE, enc_layers=2, max_length=16, eos_id=1)),
    'mbart': ('mbart/large', dict(_BOTH, max_length=16, **_START)),
    'blenderbot': ('blenderbot/400m', dict(_BOTH, max_length=16, **_START)),
    'marian': ('marian/base', dict(_BOTH, max_length=16, **_START)),
    'marian_big': ('marian/big', dict(_BOTH, max_length=16, **_START)),
    'pegasus': ('pegasus/large', dict(_BOTH, max_length=16, **_START)),
    'm2m100': ('m2m100/418m', dict(_BOTH, max_length=64, pad_id=38, position_offset=39, start_id=0,
                                   eos_id=1)),
    'llama_linear': ('llama2/7b', dict(_DECODER, rope_type='linear', rope_scaling=(4.,))),
    'llama_dynamic': ('llama2/7b', dict(_DECODER, rope_type='dynamic', rope_scaling=(4., 4.))),
    'llama_yarn': ('llama2/7b', dict(_DECODER, rope_type='yarn',
                                     rope_scaling=(4., 32., 1., 16., 1.25))),
    'llama_bias': ('llama2/7b', dict(_DECODER, attn_bias='qkvo')),
    'mistral': ('mistral/7b', dict(_DECODER, window=3)),
    'qwen2': ('qwen2/0_5b', _DECODER),
    'qwen3': ('qwen3/0_6b', _DECODER),
    'gemma': ('gemma/2b', _DECODER),
    'gemma2': ('gemma2/2b', dict(_DECODER, window=3, attn_scalar=10.)),
    'gemma3': ('gemma3/1b', dict(_DECODER, window=3, window_pattern=(True, False), attn_scalar=10.,
                                 rope_local_theta=10.)),
    # In a smaller window the last padding sees only padding, which is NaN in float64 there.
    't5gemma': ('t5gemma/2b_2b', dict(_DECODER, enc_layers=2, window=5, attn_scalar=10.)),
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
    'mbart': (
        (-1.6758587, -0.2840748, 2.0065636, 2.7458336, -7.9813535, -2.1672216),
        (-3.4387925, -0.7382286, -1.7014745, 4.8883819, -7.8339422, -1.6382525), 1341.118),
    'blenderbot': (
        (2.1281299, 0.1449345, 8.6666245, 0.3228741, 1.5643480, 0.7015343),
        (4.1261636, 1.5052897, 1.2665823, -5.3918360, -6.8056541, 3.4949531), 1385.06),
    'marian': (
        (1.3098190, -1.5373703, -4.6969836, -0.2742933, -0.7905780, 1.2749048),
        (-0.2668484, -3.0605742, -2.7794545, -0.6538403, 1.8712307, 2.1869306), 1254.483),
    'marian_big': (
        (-0.9745482, -1.3345299, -6.3092482, -0.7373789, 1.4442508, 0.6353143),
        (-0.5287486, -3.2456994, -3.9438346, -0.7002353, 1.5136101, 1.3287377), 1291.643),
    'pegasus': (
        (-4.1119768, 2.6735343, -1.5319417, -1.7821234, -1.0435058, 4.6126351),
        (1.7661864, 2.5130231, -3.1046598, -3.6275356, 1.8789443, -0.6950180), 1344.704),
    'm2m100': (
        (4.2800800, 1.9983970, 5.3884920, 1.4547837, 0.1039354, 1.3888841),
        (6.4198601, 5.6755205, -2.1991153, -2.3205135, 0.1118012, 2.2729536), 1363.046),
    'llama_linear': (
        (2.0546716, -0.0571699, 0.4012639, -1.3278531, 1.4080132, -0.4238127),
        (2.2769765, 0.6608673, 1.1818750, -0.2801642, 2.3730856, 1.1782464), 623.3635),
    'llama_dynamic': (
        (2.4937191, 0.3097552, 1.4300700, 0.0260171, 1.0683956, -0.8069774),
        (0.8136376, 0.3170262, 3.5571868, -2.0098310, 2.6410170, -0.5476370), 582.6748),
    'llama_yarn': (
        (2.5565714, 0.5467522, 1.1163624, 0.1965984, 0.9479258, -1.0772205),
        (0.4785672, 0.3214552, 3.3895911, -1.7762279, 2.4287714, -0.5787882), 594.3155),
    'llama_bias': (
        (-1.6345007, 1.4397351, -0.3743579, 1.1574087, 1.7739965, -2.3669235),
        (0.7059979, -0.8921429, 1.0435579, 0.8701597, 3.7318346, 0.6704087), 628.9951),
    'mistral': (
        (2.6038271, 0.3879495, 0.7769580, -0.7238287, 0.9202149, -0.7208629),
        (0.8514295, 0.3298674, 3.5651211, -1.9991594, 2.6401962, -0.5470183), 616.0903),
    'qwen2': (
        (-3.5774881, -2.4317040, 1.5094844, 0.9686527, -4.1260620, -2.1298904),
        (0.5676009, 3.5934920, 2.6925800, 1.6819001, 1.8818275, 3.8979516), 1367.199),
    'qwen3': (
        (0.5131788, -1.4660951, -1.3685818, -0.0561867, 0.0869101, 4.5243412),
        (1.3846067, 1.2447847, -1.3369746, -2.1016909, 1.9731530, 3.4431443), 1147.082),
    'gemma': (
        (1.3940234, 2.9617858, -9.8432600, 4.3674181, -6.5168186, 12.5892042),
        (5.0795661, 8.6063619, 1.7940225, 10.5261405, -5.2624585, 3.6250767), 2771.508),
    'gemma2': (
        (5.0002560, -5.3290351, 10.1561408, 2.0226312, -3.0150753, 1.8245277),
        (4.5052433, 6.4038411, -2.8459591, 4.5258585, -9.6214286, 10.4682114), 2594.336),
    'gemma3': (
        (6.4336404, 0.7174399, 5.9779166, 3.4676554, -7.4330744, 12.6957545),
        (5.8486988, 6.1094471, 4.3470341, 4.3318100, -9.3852453, 8.4873087), 2673.667),
    't5gemma': (
        (-2.9220581, -0.4335723, -3.4739731, -2.1649027, 4.1399159, 1.1071833),
        (4.6134304, 3.2524940, -6.0573751, 7.7759975, -8.5393522, 1.6281223), 2587.179),
}


def config(name: str) -> TransformerConfig:
  family, changes = CONFIGS[name]
  return TransformerConfig(**{**row(family), **changes})


# Fields that are sizes, whatever their value; and those that are sizes unless they are 0 or ().
_SIZES = {*_BOTH, *_START, 'max_length', 'n_kv_heads', 'rope_theta', 'norm_eps', 'local_radius',
          'global_block', 'init_std', 'remat', 'dtype', 'logit_bias', 'mlm_head', 'pooler', 'nsp',
          'pooler_act', 'classes', 'class_of', 'pool', 'dense', 'dense_acts', 'dense_bias', 'types',
          'rel_buckets', 'rel_max_distance',
          'position_offset', 'embed_scale', 'tied', 'window_pattern', 'rope_type', 'rope_scaling',
          'shared_embedding'}
_SWITCHES = ('window', 'attn_scalar', 'attn_softcap', 'logit_softcap', 'rope_local_theta')


def _formula(c: TransformerConfig) -> dict:
  """Returns what c computes, whatever its sizes."""
  out = {field.name: getattr(c, field.name) for field in dataclasses.fields(c)
         if field.name not in _SIZES}
  out.update({name: bool(out[name]) for name in _SWITCHES})
  # Rotations without scaling are those of every vector with them.
  out['rope_type'] = c.rope_type if c.rope_scaling else 'llama3'
  out['mixed windows'] = c.window > 0 and len(set(c.window_pattern)) > 1
  if c.kind == 'encoder':
    del out['scale_logits']
  return out


def matching_name(c: TransformerConfig) -> str | None:
  """Returns the golden architecture that c is another size of, or None.

  An encoder of T5 without a decoder is a part of the one with it.
  """
  def matches(other):
    if c.kind == 'encoder' and c.positions == other.positions == 'relative':
      other = dataclasses.replace(other, dec_layers=0)
    return other.kind == c.kind and _formula(other) == _formula(c)
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
