"""Model FLOPs: the matrix products that a model needs, without those that a program adds.

One formula for all models: matrix products only, 2 x multiply-adds, training costs three forward
passes, causal self-attention counts half, recomputation and one-hot embeddings do not count, and of
the experts only the top_k of each token do. MFU is then comparable between programs.
"""

import dataclasses

from t5lab.models.families import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Flops:
  """The forward pass of one row. attention: the share of `layers` for scores and values; head: the
  softmax matrix and the layers before it."""
  layers: float
  attention: float
  head: float
  tokens: int                  # input and target positions of a row

  @property
  def forward(self) -> float:
    return self.layers + self.head

  @property
  def train(self) -> float:
    return 3. * self.forward

  def executed(self, remat: str, chunked: bool) -> float:
    """Training FLOPs with an estimate of recomputation in the backward pass.

    remat 'full' recomputes the layers, 'dots' their scores; a loss in chunks its logits.
    """
    recomputed = {'none': 0., 'dots': self.attention, 'full': self.layers}[remat]
    return self.train + recomputed + self.head * chunked


def projections(m: TransformerConfig) -> tuple[int, int]:
  """Numbers of weights of one attention: (query and output, key and value)."""
  return 2 * m.d_model * m.n_heads * m.d_head, 2 * m.d_model * m.kv_heads * m.d_head


def feed_forward(m: TransformerConfig, layers: int) -> float:
  """Number of feed-forward weights that multiply a token in a stack, routers included."""
  dense = (len(m.acts) + 1) * m.d_model * m.d_ff
  sparse = layers // m.moe_every if m.experts else 0
  return (layers - sparse) * dense + sparse * (
      m.expert_top_k * dense + m.d_model * m.experts)


def keys_per_query(m: TransformerConfig, length: int) -> float:
  """Number of keys that a query of the encoder attends to."""
  if m.enc_attention == 'full':
    return length
  near = min(length, 2 * m.local_radius + 1)
  return near + (length // m.global_block) * (m.enc_attention == 'transient_global')


def row_flops(m: TransformerConfig, enc: int, dec: int) -> Flops:
  """FLOPs of a row with enc encoder and dec decoder positions."""
  enc, dec = enc * bool(m.enc_layers), dec * bool(m.dec_layers)
  qo, kv = projections(m)
  width = m.n_heads * m.d_head

  # layers: products with weights, then attention scores and values
  weights = 2 * enc * (m.enc_layers * (qo + kv) + feed_forward(m, m.enc_layers))
  weights += 2 * dec * (m.dec_layers * (qo + kv) + feed_forward(m, m.dec_layers))
  attention = 4 * m.enc_layers * width * enc * keys_per_query(m, enc)
  attention += 4 * m.dec_layers * width * dec * dec / 2
  if enc and dec:                                       # cross-attention
    weights += 2 * m.dec_layers * (dec * qo + enc * kv)
    attention += 4 * m.dec_layers * width * dec * enc

  # head
  predicted = dec or enc
  head = 2 * m.d_model * m.vocab_size * predicted
  if m.classes:
    head = 2 * m.d_model * m.classes
  elif m.mlm_head:
    head += 2 * m.d_model ** 2 * predicted
  if m.pooler and (m.nsp or 'pooler' in m.pool):
    head += 2 * m.d_model ** 2
  return Flops(float(weights + attention), float(attention), float(head), enc + dec)


def decode_step_flops(m: TransformerConfig, rows: int, memory: int, length: int) -> float:
  """FLOPs of one token for each of `rows` rows, with full caches of `memory` and `length`."""
  qo, kv = projections(m)
  weights = m.dec_layers * (qo + kv + qo * bool(m.enc_layers)) + feed_forward(m, m.dec_layers)
  attention = 2 * m.n_heads * m.d_head * m.dec_layers * (length + memory * bool(m.enc_layers))
  return 2. * rows * (weights + attention + m.d_model * m.vocab_size)
