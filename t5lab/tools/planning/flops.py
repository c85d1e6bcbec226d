"""Model FLOPs: the matrix products that a model needs, without what a program adds.

One formula for all (PERFORMANCE 1.2): matrix products only, 2 x multiply-adds, training three times
the forward pass, causal self-attention at half, no recomputation, no one-hot embedding, of experts
the top_k that a token is meant for. So it measures waste, and MFU is comparable between programs.
E encoder and D decoder tokens a row, d width, L layers, N and K heads, H head, V vocabulary.
"""

import dataclasses

from t5lab.models.families import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Flops:
  """Forward, of one row of the batch. layers: in blocks, `attention` of it scores and values;
  head: softmax matrix and what is before it."""
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
    """With what the backward pass computes again, estimated: the layers' forward pass ('full') or
    their scores ('dots'); chunks of the loss their logits."""
    again = {'none': 0., 'dots': self.attention, 'full': self.layers}[remat]
    return self.train + again + self.head * chunked


def projections(m: TransformerConfig) -> tuple[int, int]:
  """Weights of (query and output, key and value) of one attention."""
  return 2 * m.d_model * m.n_heads * m.d_head, 2 * m.d_model * m.kv_heads * m.d_head


def feed_forward(m: TransformerConfig, layers: int) -> float:
  """Weights that a token meets in the feed-forward parts of a stack, routers included."""
  dense = (len(m.acts) + 1) * m.d_model * m.d_ff
  sparse = layers // m.moe_every if m.experts else 0
  return (layers - sparse) * dense + sparse * (
      m.expert_top_k * dense + m.d_model * m.experts)


def keys_met(m: TransformerConfig, length: int) -> float:
  """Keys that an encoder's query meets."""
  if m.enc_attention == 'full':
    return length
  near = min(length, 2 * m.local_radius + 1)
  return near + (length // m.global_block) * (m.enc_attention == 'transient_global')


def of_row(m: TransformerConfig, enc: int, dec: int) -> Flops:
  """Of a row with enc encoder and dec decoder positions."""
  enc, dec = enc * bool(m.enc_layers), dec * bool(m.dec_layers)
  qo, kv = projections(m)
  width = m.n_heads * m.d_head
  weights = 2 * enc * (m.enc_layers * (qo + kv) + feed_forward(m, m.enc_layers))
  weights += 2 * dec * (m.dec_layers * (qo + kv) + feed_forward(m, m.dec_layers))
  attention = 4 * m.enc_layers * width * enc * keys_met(m, enc)
  attention += 4 * m.dec_layers * width * dec * dec / 2
  if enc and dec:                                       # cross-attention
    weights += 2 * m.dec_layers * (dec * qo + enc * kv)
    attention += 4 * m.dec_layers * width * dec * enc
  predicted = dec or enc
  head = 2 * m.d_model * m.vocab_size * predicted
  if m.classes:
    head = 2 * m.d_model * m.classes
  elif m.mlm_head:
    head += 2 * m.d_model ** 2 * predicted
  if m.pooler and (m.nsp or m.pool == 'pooler'):
    head += 2 * m.d_model ** 2
  return Flops(float(weights + attention), float(attention), float(head), enc + dec)


def of_decode_step(m: TransformerConfig, rows: int, memory: int, length: int) -> float:
  """One token for each of `rows` rows, with full caches of `memory` and `length` positions."""
  qo, kv = projections(m)
  weights = m.dec_layers * (qo + kv + qo * bool(m.enc_layers)) + feed_forward(m, m.dec_layers)
  attention = 2 * m.n_heads * m.d_head * m.dec_layers * (length + memory * bool(m.enc_layers))
  return 2. * rows * (weights + attention + m.d_model * m.vocab_size)
