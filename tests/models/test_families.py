"""Every row: its parameter count as published, and the kind that it is a size of."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_models import CONFIGS, shrink

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer

T5 = {
    'small': 60_506_624, 'base': 222_903_552, 'large': 737_668_096, '3b': 2_851_598_336,
    '11b': 11_307_321_344}
T5_1_1 = {
    'small': 76_961_152, 'base': 247_577_856, 'large': 783_150_080, 'xl': 2_849_757_184,
    'xxl': 11_135_332_352}
MT5 = {
    'small': 300_176_768, 'base': 582_401_280, 'large': 1_229_581_312, 'xl': 3_742_619_648,
    'xxl': 12_921_057_280}
BYT5 = {
    'small': 299_637_760, 'base': 581_653_248, 'large': 1_228_183_552, 'xl': 3_737_801_728,
    'xxl': 12_906_899_328}
GPT2 = {'small': 124_439_808, 'medium': 354_823_168, 'large': 774_030_080, 'xl': 1_557_611_200}
LLAMA = {
    'llama1/7b': 6_738_415_616, 'llama1/13b': 13_015_864_320, 'llama1/30b': 32_528_943_616,
    'llama1/65b': 65_285_660_672, 'llama2/70b': 68_976_648_192, 'llama3/8b': 8_030_261_248,
    'llama3/70b': 70_553_706_496}


def t5_size(V, D, F, A, N, encoder, decoder, matrices=3, embeddings=2, tables=2):
  """Parameters of a T5: A = N * H; tables of relative positions have 32 rows."""
  attention, feed_forward = 4 * D * A, matrices * D * F
  return (embeddings * V * D + encoder * (attention + feed_forward + 2 * D)
          + decoder * (2 * attention + feed_forward + 3 * D) + 2 * D + tables * 32 * N)


def moe_size(size, D, F, experts, layers):
  """`size` of the dense model, of which so many layers have experts and a router instead."""
  return size + layers * ((experts - 1) * 3 * D * F + D * experts)


def gpt_size(layers, D, A, V=50257, length=2048):
  """Biases on every dense layer, norms with a bias, tied, learned positions."""
  attention = 4 * D * A + 3 * A + D
  return V * D + length * D + 2 * D + layers * (attention + 8 * D * D + 5 * D + 4 * D)


def transformer_2017_size(V, D, F, layers):
  """Post-norm: no norm ends a stack. Biases everywhere, one shared embedding, no position table."""
  norm, attention, feed_forward = 2 * D, 4 * (D * D + D), 2 * D * F + F + D
  return V * D + layers * (3 * attention + 2 * feed_forward + 5 * norm)


def t5gemma_size(V, D, F, heads, kv_heads, layers):
  """Two tables, norms before and after each sublayer; heads of 256."""
  attention = 2 * D * heads * 256 + 2 * D * kv_heads * 256
  block = attention + 3 * D * F + 4 * D
  return 2 * V * D + 2 * D + layers * (2 * block + attention + 2 * D)


COUNTS = {
    **{f't5_1_0/{k}': n for k, n in T5.items()},
    **{f'{family}/{k}': n for family in ('t5_1_1', 't5_1_1_lm', 'flan_t5')
       for k, n in T5_1_1.items()},
    **{f'mt5/{k}': n for k, n in MT5.items()}, **{f'byt5/{k}': n for k, n in BYT5.items()},
    # mT5 with 6272 more rows in both embeddings and a table for each layer but the first
    **{f'umt5/{k}': MT5[k] + 2 * 6272 * D + 32 * N * (2 * layers - 2) for k, D, N, layers in (
        ('small', 512, 6, 8), ('base', 768, 12, 12), ('xl', 2048, 32, 24), ('xxl', 4096, 64, 24))},
    'decoder/small': t5_size(32128, 512, 1024, 384, 6, 8, 0, embeddings=1, tables=1) - 512,
    'decoder/base': t5_size(32128, 768, 2048, 768, 12, 12, 0, embeddings=1, tables=1) - 768,
    'tiny': t5_size(384, 32, 64, 32, 2, 2, 2),
    'ul2/20b': t5_size(32128, 4096, 16384, 4096, 16, 32, 32),
    # transient global attention has one more table and a norm a layer
    **{f'longt5_local/{k}': T5_1_1[k] for k in ('base', 'large', 'xl', 'xxl')},
    **{f'longt5_tglobal/{k}': T5_1_1[k] + layers * D + 32 * N for k, D, N, layers in (
        ('base', 768, 12, 12), ('large', 1024, 16, 24), ('xl', 2048, 32, 24),
        ('xxl', 4096, 64, 24))},
    'switch/base': moe_size(T5_1_1['base'], 768, 2048, 128, 12),
    'switch/large': moe_size(T5_1_1['large'], 1024, 2816, 128, 24),
    'st_moe/large': moe_size(t5_size(32128, 1024, 2816, 1024, 16, 27, 27), 1024, 2816, 32, 12),
    't5gemma/2b_2b': t5gemma_size(256_000, 2304, 9216, 8, 4, 26),
    # one table, and the layers of Gemma 3 twice
    **{f't5gemma2/{name}_{name}': 2 * n - 262144 * D for name, n, D in (
        ('270m', 268_098_176, 640), ('1b', 999_885_952, 1152))},
    't5gemma/9b_9b': t5gemma_size(256_000, 3584, 14336, 16, 8, 42),
    'transformer_2017/base': transformer_2017_size(37000, 512, 2048, 6),
    'transformer_2017/big': transformer_2017_size(37000, 1024, 4096, 6),
    # Hugging Face counts final_logits_bias as a buffer
    'bart/base': 139_420_416 + 50265, 'bart/large': 406_291_456 + 50265, 'bart/g2p': 751_551,
    'mbart/large': 610_851_840 + 250027, 'mbart50/large': 610_879_488 + 250054,
    'blenderbot/400m': 364_802_560 + 8008, 'pegasus/large': 568_699_904 + 96103,
    # without its two tables of sinusoids, which are parameters there
    'marian/base': 74_410_496 - 2 * 512 * 512 + 58101,
    'marian/big': 235_910_901,
    'm2m100/418m': 483_905_536, 'm2m100/1_2b': 1_239_470_080, 'nllb/600m': 615_073_792,
    'nllb/1_3b': 1_370_638_336, 'nllb/3_3b': 3_344_863_232,
    'mistral/7b': 7_241_732_096, 'qwen2/0_5b': 494_032_768, 'qwen2/1_5b': 1_543_714_304,
    'qwen2/7b': 7_615_616_512, 'qwen3/0_6b': 596_049_920, 'qwen3/1_7b': 1_720_574_976,
    'qwen3/4b': 4_022_468_096, 'qwen3/8b': 8_190_735_360, 'gemma/2b': 2_506_172_416,
    'gemma/7b': 8_537_680_896, 'gemma2/2b': 2_614_341_888, 'gemma2/9b': 9_241_705_984,
    'gemma2/27b': 27_227_128_320, 'gemma3/270m': 268_098_176, 'gemma3/1b': 999_885_952,
    # without the masked-token head: dense, norm and a bias for each token
    **{name: n - D * (D + 3) - V for name, n, D, V in (
        ('roberta/base', 124_697_433, 768, 50265), ('roberta/large', 355_412_057, 1024, 50265),
        ('xlm_roberta/base', 278_295_186, 768, 250002),
        ('xlm_roberta/large', 560_142_482, 1024, 250002),
        ('distilbert/base', 66_985_530, 768, 30522))},
    # with the pooler and without the pre-training heads
    'bert/base': 109_482_240, 'bert/base_cased': 108_310_272, 'bert/large': 335_141_888,
    'minilm/l6': 22_713_216,
    **{f'gpt2/{k}': n for k, n in GPT2.items()},
    **{f'gpt3/{k}': gpt_size(layers, D, A) for k, layers, D, A in (
        ('small', 12, 768, 768), ('medium', 24, 1024, 1024), ('large', 24, 1536, 1536),
        ('xl', 24, 2048, 2048), ('2.7b', 32, 2560, 2560), ('6.7b', 32, 4096, 4096),
        ('13b', 40, 5140, 5120), ('175b', 96, 12288, 12288))},
    **LLAMA, 'llama2/7b': LLAMA['llama1/7b'], 'llama2/13b': LLAMA['llama1/13b'],
    'llama3_1/8b': LLAMA['llama3/8b'], 'llama3_1/70b': LLAMA['llama3/70b'],
    'smollm2/135m': 134_515_008,
}

# What the papers say in words, and how near our count is.
PUBLISHED = {
    'ul2/20b': (19.59e9, 5e-4), 'switch/base': (7.4e9, 0.01), 'switch/large': (26e9, 0.05),
    'st_moe/large': (4.1e9, 0.05), 'transformer_2017/base': (63.0e6, 2e-3),
    'transformer_2017/big': (214.2e6, 1e-3), 'bart/base': (139.4e6, 1e-3),
    'bart/large': (406.3e6, 1e-3), 'gpt3/small': (125e6, 0.03), 'gpt3/medium': (350e6, 0.03),
    'gpt3/large': (760e6, 0.03), 'gpt3/xl': (1.3e9, 0.03), 'gpt3/2.7b': (2.7e9, 0.03),
    'gpt3/6.7b': (6.7e9, 0.03), 'gpt3/13b': (13e9, 0.03), 'gpt3/175b': (175e9, 0.03)}


@functools.cache
def shapes(c):
  batch = {f'{side}_input_tokens': np.ones((1, 2), np.int32) for side in ('encoder', 'decoder')}
  abstract = jax.eval_shape(Transformer(c).init, jax.random.key(0), batch)['params']
  return {path: x.size for path, x in trees.flatten(abstract).items()}


@pytest.mark.parametrize('name', families.ROWS)
def test_parameter_count(name):
  c = TransformerConfig(**families.row(name))
  same = dict(start_id=0, eos_id=1, norm_eps=1e-6, rope_scaling=(), rope_theta=1e4)
  sizes = shapes(dataclasses.replace(c, **same))
  heads = ('mlm_', 'nsp', 'logit_bias') if c.kind == 'encoder' else ('no head',)
  count = sum(n for path, n in sizes.items() if not path.startswith(heads))
  assert count == COUNTS[name]
  if name in PUBLISHED:
    published, tolerance = PUBLISHED[name]
    assert abs(count / published - 1) < tolerance


def test_every_row_is_a_size_of_a_kind_that_the_laws_test():
  kinds = {c: name for name, c in CONFIGS.items()}
  assert len(kinds) == len(CONFIGS)
  assert {name for name in families.ROWS if shrink(name) not in kinds} == set()


@pytest.mark.parametrize('changes, message', [
    (dict(acts=('gelu', 'linaer')), "'linaer'. Did you mean 'linear'"),
    (dict(dtype='float16'), 'overflows'),
    (dict(positions='rotary'), "positions='rotary'"),
    (dict(enc_layers=0, dec_layers=0), 'at least one stack'),
    (dict(dropout=1.), r'in \[0, 1\)'),
    (dict(n_heads=8, n_kv_heads=3), 'n_heads=8 is not a multiple of model.n_kv_heads=3'),
    (dict(positions='learned'), 'needs model.max_length'),
    (dict(positions='rope', d_head=7), 'd_head=7 is odd'),
    (dict(rope_scaling=(8., 1.)), 'original length'),
    (dict(experts=4, expert_top_k=3), '1 or 2'),
    (dict(experts=4, moe_every=3, enc_layers=2, dec_layers=3), 'enc_layers=2 would have no layer'),
    (dict(experts=4, moe_every=3, enc_layers=0, dec_layers=2), 'dec_layers=2 would have no layer'),
    (dict(rel_max_distance=16), 'less than twice model.rel_max_distance=16, got 32'),
    (dict(rel_buckets=3), 'rel_buckets must be 4 or more .* got 3'),
    (dict(experts=4, moe_every=0), 'moe_every must be 1 or more, got 0'),
    (dict(pool='pooler'), 'pooler=True'), (dict(nsp=True), 'pooler=True'),
    (dict(classes=2), 'dec_layers=0'),
    (dict(enc_attention='local', positions='rope'), 'enc_attention=local needs relative'),
    (dict(enc_attention='local', per_layer_bias=True), 'that the layers share'),
    (dict(enc_attention='transient_global', n_kv_heads=4), 'as many key heads as query heads')])
def test_a_config_that_is_no_model_says_why(changes, message):
  with pytest.raises(UsageError, match=message):
    TransformerConfig(**changes)


def test_an_unknown_row_names_its_neighbours():
  with pytest.raises(UsageError, match="t5_1_1/smal.*Did you mean 't5_1_1/small'"):
    families.row('t5_1_1/smal')
