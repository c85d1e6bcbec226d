"""What a family may differ in, and the papers as rows. No jax: reading a row touches no device.

A row is the difference to the row it names; `t5lab.config.base('t5_1_1/small')` reads it.
"""

import dataclasses

from t5lab.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """One Transformer. A field that no row sets does not belong here."""
  vocab_size: int = 32128             # V, rows of the embedding (may exceed the vocabulary's ids)
  d_model: int = 512                  # D
  d_ff: int = 2048                    # F
  n_heads: int = 8                    # N
  d_head: int = 64                    # H; N * H need not be D
  enc_layers: int = 6                 # L of the encoder; 0: decoder-only
  dec_layers: int = 6                 # L of the decoder
  acts: tuple[str, ...] = ('relu',)   # one activation an up-projection, multiplied
  tied: bool = True                   # the embedding is also the softmax matrix
  scale_logits: bool = True           # T5 1.0: hidden / sqrt(D) before a tied softmax matrix
  scale_attn: bool = False            # 1 / sqrt(H) on the scores; T5 folds it into query's init
  rel_buckets: int = 32               # relative positions, shared by all layers of a stack
  rel_max_distance: int = 128
  norm_eps: float = 1e-6
  dropout: float = 0.
  dtype: str = 'float32'              # of activations; parameters are always float32
  remat: str = 'none'                 # see REMAT

  def __post_init__(self):
    if self.remat not in REMAT:
      raise UsageError(f'model.remat={self.remat!r} is unknown.{did_you_mean(self.remat, REMAT)}')
    if self.dtype not in DTYPES:
      raise UsageError(f'model.dtype={self.dtype!r} is unknown.{did_you_mean(self.dtype, DTYPES)} '
                       'float16 is left out: T5 overflows in it.')
    for act in self.acts:
      if act not in ACTS:
        raise UsageError(f'model.acts has {act!r}.{did_you_mean(act, ACTS)}')
    if self.dec_layers < 1:
      raise UsageError(f'model.dec_layers={self.dec_layers}: it must be 1 or more')
    if not 0 <= self.dropout < 1:
      raise UsageError(f'model.dropout={self.dropout}: it must be in [0, 1)')


DTYPES = ('float32', 'bfloat16')
ACTS = ('relu', 'gelu', 'silu', 'linear')   # gelu is the tanh approximation, as T5 has it

# What the backward pass keeps of a layer: everything; matrix products without a batch axis
# (weights times activations, so attention scores are recomputed); nothing but the layer's input.
REMAT = ('none', 'dots', 'full')

_GATED = dict(acts=('gelu', 'linear'), tied=False, scale_logits=False)

# name: (row it starts from, differences). Raffel et al. 2020, table in section 3.7 and the
# released gin files; 1.1 is described in the T5 repository's released_checkpoints.md.
ROWS = {
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
    # For a CPU and minutes: the quickstart's model is chosen in configs/quickstart.py.
    'tiny': ('', dict(vocab_size=384, d_model=32, d_ff=64, n_heads=2, d_head=16,
                      enc_layers=2, dec_layers=2, **_GATED)),
}


def row(name: str) -> dict:
  """All fields of the row `name`, as a dict. UsageError for an unknown name."""
  if name not in ROWS:
    raise UsageError(f'no family row {name!r}.{did_you_mean(name, ROWS)}')
  start, changes = ROWS[name]
  fields = row(start) if start else dataclasses.asdict(TransformerConfig())
  return {**fields, **changes}
