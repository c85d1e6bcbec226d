"""BART and the models with its tensors: mBART, Marian, Pegasus, M2M100, Blenderbot.

They differ in the place of the norms, in the positions, and in the norm of the embeddings.
"""

import itertools

import numpy as np

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.models.positions import sinusoids
from t5lab.tools.interop.formats.format import Format, integer, prefixed
from t5lab.tools.interop.tensor_map import FLATTEN, TensorRow, module_rows


def tensor_rows(c: TransformerConfig) -> list[TensorRow]:
  if c.shared_embedding:
    rows = [TensorRow('embedding', 'model.shared.weight')]
  else:
    rows = [TensorRow('embedding', 'model.encoder.embed_tokens.weight'),
            TensorRow('target_embedding', 'model.decoder.embed_tokens.weight')]
  if c.logit_bias:
    rows.append(TensorRow('logit_bias', 'final_logits_bias', op=FLATTEN))
  attentions = {'attn': 'self_attn'}
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    if c.positions == 'learned':
      rows.append(TensorRow(f'{stack}/positions', f'model.{stack}.embed_positions.weight'))
    if c.embed_norm:
      rows += module_rows(f'{stack}/', f'model.{stack}.', {'embed_norm': 'layernorm_embedding'})
    if not c.post_norm:
      rows += module_rows(f'{stack}/', f'model.{stack}.', {'norm': 'layer_norm'})
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


def _fields(config, shapes):
  for key in ('attention_heads', 'ffn_dim'):
    if config[f'encoder_{key}'] != config[f'decoder_{key}']:
      raise UsageError(f'config.json: encoder_{key}={config[f"encoder_{key}"]!r} and decoder_{key}='
                       f'{config[f"decoder_{key}"]!r}; both stacks must be equal')
  size, target_size = config['vocab_size'], config.get('decoder_vocab_size')
  is_shared = config.get('share_encoder_decoder_embeddings') is not False
  if not is_shared and target_size not in (None, size):
    raise UsageError(f'config.json: vocab_size={size!r} and decoder_vocab_size={target_size!r}; '
                     'both vocabularies must have one size')
  fields = dict(shared_embedding=is_shared, logit_bias='final_logits_bias' in shapes)
  if config['model_type'] == 'm2m_100':     # padding has the row before the first position
    fields['position_offset'] = integer(config, 'pad_token_id', 1) + 1
  if config.get('tie_word_embeddings') is False:
    raise UsageError('config.json: tie_word_embeddings=False is not supported for '
                     f'{config["model_type"]}, only True')
  return fields


def _check_sinusoids(c, reader):
  """UsageError if the file has a table of positions that is not the one we compute.

  Float16 files have rounded tables, so equality is to 1e-3.
  """
  for stack, leaf in itertools.product(('encoder', 'decoder'), ('weight', 'weights')):
    name = f'model.{stack}.embed_positions.{leaf}'
    if c.positions != 'sinusoid' or name not in reader.shapes():
      continue
    table = reader.read(name).astype(np.float32)
    expected = np.asarray(sinusoids(np.arange(len(table)), c.d_model, c.sinusoids))
    if c.sinusoids == 'fairseq':              # its row of the padding is zero
      table, expected = table[c.position_offset:], expected[c.position_offset:]
    if table.shape != expected.shape or not np.allclose(table, expected, atol=1e-3):
      raise UsageError(f'{name} is not the table of sinusoids that a {c.sinusoids} model computes: '
                       'trained positions are supported for BART and mBART only')


def _tables(c) -> dict[str, np.ndarray]:
  """Returns the tables of sinusoids, {name: float32[max_length, D]}."""
  table = np.asarray(sinusoids(np.arange(c.max_length), c.d_model, c.sinusoids), np.float32)
  return {f'model.{stack}.embed_positions.weight': table for stack in ('encoder', 'decoder')}


def _format(model_type: str, family: str, cls: str, ignore=(), computed=lambda c: {},
            defaults=None, **constants) -> Format:
  """Returns the Format of one of the architectures."""
  def aliases(c):
    names = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
    if c.shared_embedding:
      return dict.fromkeys((*(f'model.{name}' for name in names), 'lm_head.weight'),
                           'model.shared.weight')
    return {'lm_head.weight': 'model.decoder.embed_tokens.weight'}

  def other_keys(c):
    keys = {} if c.shared_embedding else {'share_encoder_decoder_embeddings': False}
    return keys | {'forced_eos_token_id': None}

  return Format(
      tensor_rows, family,
      dict(vocab_size='vocab_size', d_model='d_model', encoder_ffn_dim='d_ff',
           decoder_ffn_dim='d_ff', encoder_attention_heads='n_heads',
           decoder_attention_heads='n_heads', encoder_layers='enc_layers',
           decoder_layers='dec_layers', max_position_embeddings='max_length',
           scale_embedding='embed_scale', init_std='init_std', dropout='dropout',
           pad_token_id='pad_id', decoder_start_token_id='start_id', eos_token_id='eos_id'),
      _fields,
      dict(model_type=model_type, is_encoder_decoder=True, tie_word_embeddings=True, **constants),
      lambda c, kind: cls, act='activation_function', other_keys=other_keys,
      canonical=prefixed('model.', 'final_', 'lm_head'), aliases=aliases,
      ignore=(r'model\.(en|de)coder\.version', *ignore),
      check=_check_sinusoids, computed=computed, defaults=defaults or {})


SINUSOIDS = (r'model\.(en|de)coder\.embed_positions\.weights?',)     # compared by `check`
BART = _format('bart', 'bart/base', 'BartForConditionalGeneration', bos_token_id=0)
MBART = _format('mbart', 'mbart/large', 'MBartForConditionalGeneration', bos_token_id=0,
                defaults={'embed_scale': False})
BLENDERBOT = _format('blenderbot', 'blenderbot/400m', 'BlenderbotForConditionalGeneration',
                     defaults={'embed_scale': False})
UNSCALED_GELU = {'embed_scale': False, 'acts': ('gelu_erf',)}
MARIAN = _format('marian', 'marian/base', 'MarianMTModel', SINUSOIDS, defaults=UNSCALED_GELU)
PEGASUS = _format('pegasus', 'pegasus/large', 'PegasusForConditionalGeneration', SINUSOIDS,
                  _tables, defaults=UNSCALED_GELU)
M2M100 = _format('m2m_100', 'm2m100/418m', 'M2M100ForConditionalGeneration', SINUSOIDS,
                 bos_token_id=0)
