"""Hugging Face's tensor names, architecture by architecture, as rows of a tensor map.

torch's Linear.weight is [out, in], our kernels are [in, out]; GPT-2's Conv1D is [in, out] already.
Our layers are stacked: layer i is index i of the leading axis.
"""

from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.tensor_map import COPY, FLATTEN, TRANSPOSE, TensorRow, module_rows


def t5(c: TransformerConfig) -> list[TensorRow]:
  """T5 1.0, 1.1, mT5, umT5, ByT5, UL2, LongT5 and Switch.

  Each stack has one table of relative positions, in block 0; umT5 has one in every block.
  """
  rows = [TensorRow('embedding', 'shared.weight')]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    kind = c.enc_attention if stack == 'encoder' else 'full'
    prefix = {'full': '', 'local': 'Local', 'transient_global': 'TransientGlobal'}[kind]
    sublayers = {'attn': f'{prefix}SelfAttention'}
    if stack == 'decoder':
      sublayers['cross'] = 'EncDecAttention'

    rows.append(TensorRow(f'{stack}/norm/scale', f'{stack}.final_layer_norm.weight'))
    in_block = f'{stack}.block.{{}}.layer.0.{sublayers["attn"]}'
    if not c.per_layer_bias:
      rows.append(TensorRow(f'{stack}/relpos/table',
                            f'{in_block.format(0)}.relative_attention_bias.weight'))
    if kind == 'transient_global':
      rows.append(TensorRow('encoder/global_relpos/table',
                            f'{in_block.format(0)}.global_relative_attention_bias.weight'))

    for i in range(layers):
      path, layer = _layer_path(c, stack, layers, i)
      block = f'{stack}.block.{i}.layer'
      if c.per_layer_bias:
        rows.append(TensorRow(f'{path}/relpos/table',
                              f'{in_block.format(i)}.relative_attention_bias.weight', layer))
      for j, (sublayer, attention) in enumerate(sublayers.items()):
        modules = {f'{sublayer}/{p}': f'{attention}.{p}' for p in 'qkvo'}
        modules[f'{sublayer}_norm'] = 'layer_norm'
        rows += module_rows(f'{path}/', f'{block}.{j}.', modules, layer, bias=False)
      if kind == 'transient_global':
        rows.append(TensorRow(f'{path}/attn/global_norm/scale',
                              f'{in_block.format(i)}.global_input_layer_norm.weight', layer))
      rows += _t5_feed_forward(c, path, f'{block}.{len(sublayers)}', layer, i)
  return rows


def _layer_path(c, stack, layers, i):
  """Returns (our path, index on its leading axis) of layer i: see models/transformer.py, Stack."""
  every = c.moe_every if c.experts else 1
  if i >= layers // every * every:
    return f'{stack}/tail', i - layers // every * every
  return (f'{stack}/layers', i) if every == 1 else (f'{stack}/layers/{i % every}', i // every)


def _t5_feed_forward(c, path, name, layer, i):
  gated = len(c.acts) > 1
  kernels = {f'wi_{n}': f'wi_{n}' if gated else 'wi' for n in range(len(c.acts))} | {'wo': 'wo'}
  rows = module_rows(f'{path}/', f'{name}.', {'mlp_norm': 'layer_norm'}, layer, bias=False)
  if c.experts and i % c.moe_every == c.moe_every - 1 and '/tail' not in path:
    rows.append(TensorRow(f'{path}/moe/router', f'{name}.mlp.router.classifier.weight', layer,
                          TRANSPOSE))
    return rows + [TensorRow(f'{path}/moe/experts/{kernel}',
                             f'{name}.mlp.experts.expert_{e}.{linear}.weight', (layer, e),
                             TRANSPOSE)
                   for e in range(c.experts) for kernel, linear in kernels.items()]
  dense = 'mlp' if c.experts else 'DenseReluDense'
  return rows + module_rows(f'{path}/mlp/', f'{name}.{dense}.', kernels, layer, bias=False)


def bart(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'model.shared.weight')]
  if c.logit_bias:
    rows.append(TensorRow('logit_bias', 'final_logits_bias', op=FLATTEN))
  attentions = {'attn': 'self_attn'}
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    rows.append(TensorRow(f'{stack}/positions', f'model.{stack}.embed_positions.weight'))
    rows += module_rows(f'{stack}/', f'model.{stack}.', {'embed_norm': 'layernorm_embedding'})
    if stack == 'decoder':
      attentions['cross'] = 'encoder_attn'
    modules = {}
    for ours, theirs in attentions.items():
      modules |= {f'{ours}/{p}': f'{theirs}.{p}_proj' for p in 'qkv'}
      modules |= {f'{ours}/o': f'{theirs}.out_proj', f'{ours}_norm': f'{theirs}_layer_norm'}
    modules |= {'mlp/wi_0': 'fc1', 'mlp/wo': 'fc2', 'mlp_norm': 'final_layer_norm'}
    for i in range(layers):
      rows += module_rows(f'{stack}/layers/', f'model.{stack}.layers.{i}.', modules, i)
  return rows


def gpt2(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'transformer.wte.weight'),
          TensorRow('decoder/positions', 'transformer.wpe.weight'),
          *module_rows('decoder/', 'transformer.', {'norm': 'ln_f'})]
  modules = {'attn/o': 'attn.c_proj', 'mlp/wi_0': 'mlp.c_fc', 'mlp/wo': 'mlp.c_proj',
             'attn_norm': 'ln_1', 'mlp_norm': 'ln_2'}
  for i in range(c.dec_layers):
    path, name = 'decoder/layers', f'transformer.h.{i}'
    for part, p in enumerate('qkv'):
      joined = f'{name}.attn.c_attn'
      rows += [
          TensorRow(f'{path}/attn/{p}/kernel', f'{joined}.weight', i, COPY, (1, part, 3)),
          TensorRow(f'{path}/attn/{p}/bias', f'{joined}.bias', i, COPY, (0, part, 3))]
    rows += module_rows(f'{path}/', f'{name}.', modules, i, op=COPY)
  return rows


def llama(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'model.embed_tokens.weight'),
          TensorRow('decoder/norm/scale', 'model.norm.weight')]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  modules = {f'attn/{p}': f'self_attn.{p}_proj' for p in 'qkvo'} | {
      'mlp/wi_0': 'mlp.gate_proj', 'mlp/wi_1': 'mlp.up_proj', 'mlp/wo': 'mlp.down_proj',
      'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
  for i in range(c.dec_layers):
    rows += module_rows('decoder/layers/', f'model.layers.{i}.', modules, i, bias=False)
  return rows


def bert(c: TransformerConfig) -> list[TensorRow]:
  embeddings = 'bert.embeddings'
  rows = [TensorRow('embedding', f'{embeddings}.word_embeddings.weight'),
          TensorRow('encoder/positions', f'{embeddings}.position_embeddings.weight'),
          TensorRow('encoder/types', f'{embeddings}.token_type_embeddings.weight'),
          *module_rows('encoder/', f'{embeddings}.', {'embed_norm': 'LayerNorm'})]
  modules = {
      'attn/q': 'attention.self.query', 'attn/k': 'attention.self.key',
      'attn/v': 'attention.self.value', 'attn/o': 'attention.output.dense',
      'attn_norm': 'attention.output.LayerNorm', 'mlp/wi_0': 'intermediate.dense',
      'mlp/wo': 'output.dense', 'mlp_norm': 'output.LayerNorm'}
  for i in range(c.enc_layers):
    rows += module_rows('encoder/layers/', f'bert.encoder.layer.{i}.', modules, i)
  if c.pooler:
    rows += module_rows('', '', {'pooler': 'bert.pooler.dense'})
  if c.mlm_head:
    rows += module_rows('', 'cls.predictions.transform.',
                     {'mlm_dense': 'dense', 'mlm_norm': 'LayerNorm'})
  if c.logit_bias:
    rows.append(TensorRow('logit_bias', 'cls.predictions.bias'))
  if c.nsp:
    rows += module_rows('', '', {'nsp': 'cls.seq_relationship'})
  if c.classes:
    rows += module_rows('', '', {'classifier': 'classifier'})
  return rows
