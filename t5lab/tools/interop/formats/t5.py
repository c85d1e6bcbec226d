"""T5 1.0, 1.1, mT5, umT5, ByT5, UL2, LongT5 and Switch, with a decoder or without."""

import dataclasses

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.formats.format import (
  THEIR_ACTS,
  Format,
  integer,
  our_act,
)
from t5lab.tools.interop.tensor_map import TRANSPOSE, TensorRow, module_rows


def tensor_rows(c: TransformerConfig) -> list[TensorRow]:
  """T5 1.0, 1.1, mT5, umT5, ByT5, UL2, LongT5 and Switch.

  Each stack has one table of relative positions, in block 0; umT5 has one in every block.
  """
  if c.classes:          # T5ForTokenClassification has the encoder below a name of its own
    bare = tensor_rows(dataclasses.replace(c, classes=0))
    return [dataclasses.replace(row, name=f'transformer.{row.name}') for row in bare] + module_rows(
        '', '', {'classifier': 'classifier'})
  rows = [TensorRow('embedding', 'shared.weight')]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    if not layers:
      continue
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
      rows += _feed_forward(c, path, f'{block}.{len(sublayers)}', layer, i)
  return rows


def _layer_path(c, stack, layers, i):
  """Returns (our path, index on its leading axis) of layer i: see models/stack.py."""
  every = c.moe_every if c.experts else 1
  if i >= layers // every * every:
    return f'{stack}/tail', i - layers // every * every
  return (f'{stack}/layers', i) if every == 1 else (f'{stack}/layers/{i % every}', i // every)


def _feed_forward(c, path, name, layer, i):
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


def _fields(config, shapes):
  kind = config['model_type']
  has_decoder = config.get('is_encoder_decoder') is not False and not any(
      str(name).endswith(('EncoderModel', 'ForTokenClassification'))
      for name in config.get('architectures') or ())
  classes = 0 if has_decoder else shapes.get('classifier.weight', (0,))[0]
  default = 'gated-gelu' if kind in ('mt5', 'umt5') else 'relu'
  projection = config.get('feed_forward_proj') or default
  *gated, act = projection.split('-')
  act = 'gelu' if projection == 'gated-gelu' else our_act(act)
  # transformers 4 means by tie_word_embeddings=False that the output is not scaled and lm_head is
  # separate. Version 5 always writes True and has scale_decoder_outputs. mT5 is never scaled.
  # In both, a model without lm_head.weight is tied.
  declared_tied = bool(config.get('tie_word_embeddings', True))
  scaled = kind != 'mt5' and bool(config.get('scale_decoder_outputs', declared_tied))
  layers = {'encoder': config['num_layers'],
            'decoder': integer(config, 'num_decoder_layers', config['num_layers'])}
  if not has_decoder:
    layers['decoder'] = 0
  fields = dict(
      dec_layers=layers['decoder'], acts=(act, 'linear') if gated else (act,),
      classes=classes, class_of='token' if classes else 'input',
      per_layer_bias=kind == 'umt5', scale_logits=scaled or not has_decoder,
      tied='lm_head.weight' not in shapes or (declared_tied and scaled),
      start_id=integer(config, 'decoder_start_token_id', integer(config, 'pad_token_id', 0)))
  if kind == 'longt5':
    attention = config.get('encoder_attention_type', 'local').replace('-', '_')
    fields.update(enc_attention=attention, local_radius=config.get('local_radius', 127),
                  global_block=config.get('global_block_size', 16))
  if kind == 'switch_transformers':
    intervals = {n // max(config.get(f'num_sparse_{stack}_layers', 3), 1)
                 for stack, n in layers.items()}
    if len(intervals) > 1:
      raise UsageError('config.json: the encoder has experts in other layers than the decoder')
    # Their capacity is a number of tokens per row, whatever its length; with this factor ours is
    # never smaller than what a row asks for.
    fields.update(experts=config['num_experts'], moe_every=intervals.pop(),
                  eval_capacity_factor=float(config['num_experts']))
  return fields


def _keys(c):
  if c.experts:
    raise UsageError('models with experts cannot be written for Hugging Face: its capacity is a '
                     'number of tokens, ours a factor')
  act = THEIR_ACTS.get(c.acts[0], c.acts[0])
  if len(c.acts) == 2:
    act = 'gated-gelu' if act == 'gelu_new' else f'gated-{act}'
  kind = 't5' if c.enc_attention == 'full' else 'longt5'
  kind = 'umt5' if c.per_layer_bias else kind
  keys = dict(model_type=kind, feed_forward_proj=act)
  keys['is_encoder_decoder'] = c.dec_layers > 0
  if c.classes:
    if c.class_of != 'token' or kind == 'longt5':
      raise UsageError('of the T5 classifiers of Hugging Face only T5ForTokenClassification is an '
                       f'encoder; this {kind} has model.class_of={c.class_of!r}')
    keys['num_labels'] = c.classes
  if not c.dec_layers:
    keys['num_decoder_layers'] = None       # transformers fills in num_layers
  if kind == 'longt5':
    keys.update(encoder_attention_type=c.enc_attention.replace('_', '-'),
                local_radius=c.local_radius, global_block_size=c.global_block)
  return keys


NAMES = {'t5': 'T5', 'mt5': 'MT5', 'umt5': 'UMT5', 'longt5': 'LongT5',
         'switch_transformers': 'SwitchTransformers'}


def _class_name(c, model_type):
  head = 'ForConditionalGeneration' if c.dec_layers else 'EncoderModel'
  return NAMES[model_type] + ('ForTokenClassification' if c.classes else head)


def _aliases(c):
  if c.classes:
    return {'transformer.encoder.embed_tokens.weight': 'transformer.shared.weight'}
  names = ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight']
  return dict.fromkeys(names + ['lm_head.weight'] * c.tied, 'shared.weight')


T5 = Format(
    tensor_rows, 't5_1_0/small',
    dict(vocab_size='vocab_size', d_model='d_model', d_ff='d_ff', num_heads='n_heads',
         d_kv='d_head', num_layers='enc_layers', num_decoder_layers='dec_layers',
         layer_norm_epsilon='norm_eps', relative_attention_num_buckets='rel_buckets',
         relative_attention_max_distance='rel_max_distance', dropout_rate='dropout',
         tie_word_embeddings='scale_logits', pad_token_id='pad_id',
         decoder_start_token_id='start_id', eos_token_id='eos_id'),
    _fields, {}, _class_name, other_keys=_keys,
    aliases=_aliases,
    # Old exports of T5 hold this table, which no code reads.
    ignore=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',))
