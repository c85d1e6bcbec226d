"""Hugging Face's tensor names, architecture by architecture, as tables of rows.

torch's Linear.weight is [out, in], our kernels are [in, out]; GPT-2's Conv1D is [in, out] already.
Our layers are stacked: row i of a layer is index i of our leading axis.
"""

from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.rows import COPY, FLAT, TRANSPOSE, Row

PROJECTIONS = ('q', 'k', 'v', 'o')


def _linear(path: str, name: str, layer, bias: bool = True, op=TRANSPOSE) -> list[Row]:
  rows = [Row(f'{path}/kernel', f'{name}.weight', layer, op)]
  return rows + [Row(f'{path}/bias', f'{name}.bias', layer)] if bias else rows


def _norm(path: str, name: str, layer=None, bias: bool = True) -> list[Row]:
  rows = [Row(f'{path}/scale', f'{name}.weight', layer)]
  return rows + [Row(f'{path}/bias', f'{name}.bias', layer)] if bias else rows


def t5(c: TransformerConfig) -> list[Row]:
  """T5 1.0, 1.1, mT5, umT5, ByT5, UL2, LongT5, Switch. One relative table a stack, in block 0; umT5
  has one in every block."""
  attention = {'full': 'SelfAttention', 'local': 'LocalSelfAttention',
               'transient_global': 'TransientGlobalSelfAttention'}[c.enc_attention]
  rows = [Row('embedding', 'shared.weight')]
  if not c.tied:
    rows.append(Row('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    own = attention if stack == 'encoder' else 'SelfAttention'
    rows.append(Row(f'{stack}/norm/scale', f'{stack}.final_layer_norm.weight'))
    table = f'{stack}.block.{{}}.layer.0.{own}.relative_attention_bias.weight'
    if not c.per_layer_bias:
      rows.append(Row(f'{stack}/relpos/table', table.format(0)))
    if stack == 'encoder' and c.enc_attention == 'transient_global':
      rows.append(Row('encoder/global_relpos/table', table.format(0).replace(
          'relative_attention_bias', 'global_relative_attention_bias')))
    for i in range(layers):
      ours, layer = _layer(c, stack, layers, i)
      block = f'{stack}.block.{i}.layer'
      if c.per_layer_bias:
        rows.append(Row(f'{ours}/relpos/table', table.format(i), layer))
      sublayers = [('attn', own)] + [('cross', 'EncDecAttention')] * (stack == 'decoder')
      for j, (mine, theirs) in enumerate(sublayers):
        for p in PROJECTIONS:
          rows += _linear(f'{ours}/{mine}/{p}', f'{block}.{j}.{theirs}.{p}', layer, False)
        rows += _norm(f'{ours}/{mine}_norm', f'{block}.{j}.layer_norm', layer, False)
      if stack == 'encoder' and c.enc_attention == 'transient_global':
        rows.append(Row(f'{ours}/attn/global_norm/scale',
                        f'{block}.0.{own}.global_input_layer_norm.weight', layer))
      j = len(sublayers)
      rows += _norm(f'{ours}/mlp_norm', f'{block}.{j}.layer_norm', layer, False)
      rows += _t5_feed_forward(c, ours, f'{block}.{j}', layer, i)
  return rows


def _layer(c, stack, layers, i):
  """(our path, index) of layer i: see Stack._blocks in models/transformer.py."""
  every = c.moe_every if c.experts else 1
  if i >= layers // every * every:
    return f'{stack}/tail', i - layers // every * every
  return (f'{stack}/layers', i) if every == 1 else (f'{stack}/layers/{i % every}', i // every)


def _t5_feed_forward(c, ours, name, layer, i):
  ups = ['wi'] if len(c.acts) == 1 else [f'wi_{n}' for n in range(len(c.acts))]
  pairs = [(f'wi_{n}', up) for n, up in enumerate(ups)] + [('wo', 'wo')]
  if c.experts and i % c.moe_every == c.moe_every - 1 and '/tail' not in ours:
    rows = [Row(f'{ours}/moe/router', f'{name}.mlp.router.classifier.weight', layer, TRANSPOSE)]
    expert = f'{name}.mlp.experts.expert_'
    return rows + [Row(f'{ours}/moe/experts/{mine}', f'{expert}{e}.{theirs}.weight', (layer, e),
                       TRANSPOSE)
                   for e in range(c.experts) for mine, theirs in pairs]
  dense = 'mlp' if c.experts else 'DenseReluDense'
  return [row for mine, theirs in pairs
          for row in _linear(f'{ours}/mlp/{mine}', f'{name}.{dense}.{theirs}', layer, False)]


def bart(c: TransformerConfig) -> list[Row]:
  rows = [Row('embedding', 'model.shared.weight')]
  if c.logit_bias:
    rows.append(Row('logit_bias', 'final_logits_bias', op=FLAT))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    rows.append(Row(f'{stack}/positions', f'model.{stack}.embed_positions.weight'))
    rows += _norm(f'{stack}/embed_norm', f'model.{stack}.layernorm_embedding')
    sublayers = [('attn', 'self_attn')] + [('cross', 'encoder_attn')] * (stack == 'decoder')
    for i in range(layers):
      ours, name = f'{stack}/layers', f'model.{stack}.layers.{i}'
      for mine, theirs in sublayers:
        for p in PROJECTIONS:
          proj = 'out_proj' if p == 'o' else f'{p}_proj'
          rows += _linear(f'{ours}/{mine}/{p}', f'{name}.{theirs}.{proj}', i)
        rows += _norm(f'{ours}/{mine}_norm', f'{name}.{theirs}_layer_norm', i)
      rows += _linear(f'{ours}/mlp/wi_0', f'{name}.fc1', i)
      rows += _linear(f'{ours}/mlp/wo', f'{name}.fc2', i)
      rows += _norm(f'{ours}/mlp_norm', f'{name}.final_layer_norm', i)
  return rows


def gpt2(c: TransformerConfig) -> list[Row]:
  rows = [Row('embedding', 'transformer.wte.weight'),
          Row('decoder/positions', 'transformer.wpe.weight'),
          *_norm('decoder/norm', 'transformer.ln_f')]
  for i in range(c.dec_layers):
    ours, name = 'decoder/layers', f'transformer.h.{i}'
    for part, p in enumerate('qkv'):
      rows += [Row(f'{ours}/attn/{p}/kernel', f'{name}.attn.c_attn.weight', i, COPY, (1, part, 3)),
               Row(f'{ours}/attn/{p}/bias', f'{name}.attn.c_attn.bias', i, COPY, (0, part, 3))]
    rows += _linear(f'{ours}/attn/o', f'{name}.attn.c_proj', i, op=COPY)
    rows += _linear(f'{ours}/mlp/wi_0', f'{name}.mlp.c_fc', i, op=COPY)
    rows += _linear(f'{ours}/mlp/wo', f'{name}.mlp.c_proj', i, op=COPY)
    rows += _norm(f'{ours}/attn_norm', f'{name}.ln_1', i)
    rows += _norm(f'{ours}/mlp_norm', f'{name}.ln_2', i)
  return rows


def llama(c: TransformerConfig) -> list[Row]:
  rows = [Row('embedding', 'model.embed_tokens.weight'),
          *_norm('decoder/norm', 'model.norm', bias=False)]
  if not c.tied:
    rows.append(Row('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  for i in range(c.dec_layers):
    ours, name = 'decoder/layers', f'model.layers.{i}'
    for p in PROJECTIONS:
      rows += _linear(f'{ours}/attn/{p}', f'{name}.self_attn.{p}_proj', i, False)
    for mine, theirs in (('wi_0', 'gate'), ('wi_1', 'up'), ('wo', 'down')):
      rows += _linear(f'{ours}/mlp/{mine}', f'{name}.mlp.{theirs}_proj', i, False)
    rows += _norm(f'{ours}/attn_norm', f'{name}.input_layernorm', i, False)
    rows += _norm(f'{ours}/mlp_norm', f'{name}.post_attention_layernorm', i, False)
  return rows


def bert(c: TransformerConfig) -> list[Row]:
  embeddings = 'bert.embeddings'
  rows = [Row('embedding', f'{embeddings}.word_embeddings.weight'),
          Row('encoder/positions', f'{embeddings}.position_embeddings.weight'),
          Row('encoder/types', f'{embeddings}.token_type_embeddings.weight'),
          *_norm('encoder/embed_norm', f'{embeddings}.LayerNorm')]
  for i in range(c.enc_layers):
    ours, name = 'encoder/layers', f'bert.encoder.layer.{i}'
    for p, theirs in zip('qkv', ('query', 'key', 'value')):
      rows += _linear(f'{ours}/attn/{p}', f'{name}.attention.self.{theirs}', i)
    rows += _linear(f'{ours}/attn/o', f'{name}.attention.output.dense', i)
    rows += _norm(f'{ours}/attn_norm', f'{name}.attention.output.LayerNorm', i)
    rows += _linear(f'{ours}/mlp/wi_0', f'{name}.intermediate.dense', i)
    rows += _linear(f'{ours}/mlp/wo', f'{name}.output.dense', i)
    rows += _norm(f'{ours}/mlp_norm', f'{name}.output.LayerNorm', i)
  if c.pooler:
    rows += _linear('pooler', 'bert.pooler.dense', None)
  if c.mlm_head:
    rows += _linear('mlm_dense', 'cls.predictions.transform.dense', None)
    rows += _norm('mlm_norm', 'cls.predictions.transform.LayerNorm')
  if c.logit_bias:
    rows.append(Row('logit_bias', 'cls.predictions.bias'))
  if c.nsp:
    rows += _linear('nsp', 'cls.seq_relationship', None)
  if c.classes:
    rows += _linear('classifier', 'classifier', None)
  return rows
