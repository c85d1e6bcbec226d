"""Hugging Face's tensor names, architecture by architecture, as rows of a tensor map.

torch's Linear.weight is [out, in], our kernels are [in, out]; GPT-2's Conv1D is [in, out] already.
Our layers are stacked: layer i is index i of the leading axis.
"""

from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.tensor_map import COPY, FLATTEN, TRANSPOSE, TensorRow

PROJECTIONS = ('q', 'k', 'v', 'o')


def _linear(path: str, name: str, layer, bias: bool = True, op=TRANSPOSE) -> list[TensorRow]:
  kernel = TensorRow(f'{path}/kernel', f'{name}.weight', layer, op)
  return [kernel, TensorRow(f'{path}/bias', f'{name}.bias', layer)] if bias else [kernel]


def _norm(path: str, name: str, layer=None, bias: bool = True) -> list[TensorRow]:
  scale = TensorRow(f'{path}/scale', f'{name}.weight', layer)
  return [scale, TensorRow(f'{path}/bias', f'{name}.bias', layer)] if bias else [scale]


def t5(c: TransformerConfig) -> list[TensorRow]:
  """T5 1.0, 1.1, mT5, umT5, ByT5, UL2, LongT5 and Switch.

  Each stack has one table of relative positions, in block 0; umT5 has one in every block.
  """
  rows = [TensorRow('embedding', 'shared.weight')]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    rows += _t5_stack(c, stack, layers)
  return rows


def _t5_stack(c, stack, layers):
  encoder = stack == 'encoder'
  has_global = encoder and c.enc_attention == 'transient_global'
  self_attention = 'SelfAttention' if not encoder else {
      'full': 'SelfAttention', 'local': 'LocalSelfAttention',
      'transient_global': 'TransientGlobalSelfAttention'}[c.enc_attention]
  sublayers = [('attn', self_attention)] + [('cross', 'EncDecAttention')] * (not encoder)

  rows = [TensorRow(f'{stack}/norm/scale', f'{stack}.final_layer_norm.weight')]
  in_block = f'{stack}.block.{{}}.layer.0.{self_attention}'
  if not c.per_layer_bias:
    rows.append(TensorRow(f'{stack}/relpos/table',
                          f'{in_block.format(0)}.relative_attention_bias.weight'))
  if has_global:
    rows.append(TensorRow('encoder/global_relpos/table',
                          f'{in_block.format(0)}.global_relative_attention_bias.weight'))

  for i in range(layers):
    path, layer = _layer_path(c, stack, layers, i)
    block = f'{stack}.block.{i}.layer'
    if c.per_layer_bias:
      rows.append(TensorRow(f'{path}/relpos/table',
                            f'{in_block.format(i)}.relative_attention_bias.weight', layer))
    for j, (sublayer, attention) in enumerate(sublayers):
      for p in PROJECTIONS:
        rows += _linear(f'{path}/{sublayer}/{p}', f'{block}.{j}.{attention}.{p}', layer, False)
      rows += _norm(f'{path}/{sublayer}_norm', f'{block}.{j}.layer_norm', layer, False)
    if has_global:
      rows.append(TensorRow(f'{path}/attn/global_norm/scale',
                            f'{in_block.format(i)}.global_input_layer_norm.weight', layer))
    j = len(sublayers)
    rows += _norm(f'{path}/mlp_norm', f'{block}.{j}.layer_norm', layer, False)
    rows += _t5_feed_forward(c, path, f'{block}.{j}', layer, i)
  return rows


def _layer_path(c, stack, layers, i):
  """Returns (our path, index on its leading axis) of layer i: see models/transformer.py, Stack."""
  every = c.moe_every if c.experts else 1
  if i >= layers // every * every:
    return f'{stack}/tail', i - layers // every * every
  return (f'{stack}/layers', i) if every == 1 else (f'{stack}/layers/{i % every}', i // every)


def _t5_feed_forward(c, path, name, layer, i):
  ups = ['wi'] if len(c.acts) == 1 else [f'wi_{n}' for n in range(len(c.acts))]
  pairs = [(f'wi_{n}', up) for n, up in enumerate(ups)] + [('wo', 'wo')]
  if c.experts and i % c.moe_every == c.moe_every - 1 and '/tail' not in path:
    rows = [TensorRow(f'{path}/moe/router', f'{name}.mlp.router.classifier.weight', layer,
                      TRANSPOSE)]
    for e in range(c.experts):
      rows += [TensorRow(f'{path}/moe/experts/{kernel}',
                         f'{name}.mlp.experts.expert_{e}.{linear}.weight', (layer, e), TRANSPOSE)
               for kernel, linear in pairs]
    return rows
  dense = 'mlp' if c.experts else 'DenseReluDense'
  return [row for kernel, linear in pairs
          for row in _linear(f'{path}/mlp/{kernel}', f'{name}.{dense}.{linear}', layer, False)]


def bart(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'model.shared.weight')]
  if c.logit_bias:
    rows.append(TensorRow('logit_bias', 'final_logits_bias', op=FLATTEN))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    rows.append(TensorRow(f'{stack}/positions', f'model.{stack}.embed_positions.weight'))
    rows += _norm(f'{stack}/embed_norm', f'model.{stack}.layernorm_embedding')
    sublayers = [('attn', 'self_attn')] + [('cross', 'encoder_attn')] * (stack == 'decoder')
    for i in range(layers):
      path, name = f'{stack}/layers', f'model.{stack}.layers.{i}'
      for sublayer, attention in sublayers:
        for p in PROJECTIONS:
          proj = 'out_proj' if p == 'o' else f'{p}_proj'
          rows += _linear(f'{path}/{sublayer}/{p}', f'{name}.{attention}.{proj}', i)
        rows += _norm(f'{path}/{sublayer}_norm', f'{name}.{attention}_layer_norm', i)
      rows += _linear(f'{path}/mlp/wi_0', f'{name}.fc1', i)
      rows += _linear(f'{path}/mlp/wo', f'{name}.fc2', i)
      rows += _norm(f'{path}/mlp_norm', f'{name}.final_layer_norm', i)
  return rows


def gpt2(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'transformer.wte.weight'),
          TensorRow('decoder/positions', 'transformer.wpe.weight'),
          *_norm('decoder/norm', 'transformer.ln_f')]
  for i in range(c.dec_layers):
    path, name = 'decoder/layers', f'transformer.h.{i}'
    for part, p in enumerate('qkv'):
      joined = f'{name}.attn.c_attn'
      rows += [
          TensorRow(f'{path}/attn/{p}/kernel', f'{joined}.weight', i, COPY, (1, part, 3)),
          TensorRow(f'{path}/attn/{p}/bias', f'{joined}.bias', i, COPY, (0, part, 3))]
    rows += _linear(f'{path}/attn/o', f'{name}.attn.c_proj', i, op=COPY)
    rows += _linear(f'{path}/mlp/wi_0', f'{name}.mlp.c_fc', i, op=COPY)
    rows += _linear(f'{path}/mlp/wo', f'{name}.mlp.c_proj', i, op=COPY)
    rows += _norm(f'{path}/attn_norm', f'{name}.ln_1', i)
    rows += _norm(f'{path}/mlp_norm', f'{name}.ln_2', i)
  return rows


def llama(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'model.embed_tokens.weight'),
          *_norm('decoder/norm', 'model.norm', bias=False)]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  for i in range(c.dec_layers):
    path, name = 'decoder/layers', f'model.layers.{i}'
    for p in PROJECTIONS:
      rows += _linear(f'{path}/attn/{p}', f'{name}.self_attn.{p}_proj', i, False)
    for kernel, linear in (('wi_0', 'gate'), ('wi_1', 'up'), ('wo', 'down')):
      rows += _linear(f'{path}/mlp/{kernel}', f'{name}.mlp.{linear}_proj', i, False)
    rows += _norm(f'{path}/attn_norm', f'{name}.input_layernorm', i, False)
    rows += _norm(f'{path}/mlp_norm', f'{name}.post_attention_layernorm', i, False)
  return rows


def bert(c: TransformerConfig) -> list[TensorRow]:
  embeddings = 'bert.embeddings'
  rows = [TensorRow('embedding', f'{embeddings}.word_embeddings.weight'),
          TensorRow('encoder/positions', f'{embeddings}.position_embeddings.weight'),
          TensorRow('encoder/types', f'{embeddings}.token_type_embeddings.weight'),
          *_norm('encoder/embed_norm', f'{embeddings}.LayerNorm')]
  for i in range(c.enc_layers):
    path, name = 'encoder/layers', f'bert.encoder.layer.{i}'
    for p, projection in zip('qkv', ('query', 'key', 'value')):
      rows += _linear(f'{path}/attn/{p}', f'{name}.attention.self.{projection}', i)
    rows += _linear(f'{path}/attn/o', f'{name}.attention.output.dense', i)
    rows += _norm(f'{path}/attn_norm', f'{name}.attention.output.LayerNorm', i)
    rows += _linear(f'{path}/mlp/wi_0', f'{name}.intermediate.dense', i)
    rows += _linear(f'{path}/mlp/wo', f'{name}.output.dense', i)
    rows += _norm(f'{path}/mlp_norm', f'{name}.output.LayerNorm', i)
  if c.pooler:
    rows += _linear('pooler', 'bert.pooler.dense', None)
  if c.mlm_head:
    rows += _linear('mlm_dense', 'cls.predictions.transform.dense', None)
    rows += _norm('mlm_norm', 'cls.predictions.transform.LayerNorm')
  if c.logit_bias:
    rows.append(TensorRow('logit_bias', 'cls.predictions.bias'))
  if c.nsp:
    rows += _linear('nsp', 'cls.seq_relationship', None)
  if c.classes:
    rows += _linear('classifier', 'classifier', None)
  return rows
