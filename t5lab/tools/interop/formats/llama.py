"""Decoders with rotary positions: LLaMA, Mistral, Qwen 2 and 3, Gemma 1 to 3."""

from collections.abc import Callable, Mapping
import itertools
import math

from t5lab.errors import UsageError, did_you_mean
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.formats.format import (
  THEIR_ACTS,
  Format,
  integer,
  our_act,
  prefixed,
  require,
)
from t5lab.tools.interop.tensor_map import TRANSPOSE, TensorRow, module_rows

ATTENTION = {f'attn/{p}': f'self_attn.{p}_proj' for p in 'qkvo'}
GATED_MLP = {'mlp/wi_0': 'mlp.gate_proj', 'mlp/wi_1': 'mlp.up_proj', 'mlp/wo': 'mlp.down_proj'}


def tensor_rows(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'model.embed_tokens.weight'),
          TensorRow('decoder/norm/scale', 'model.norm.weight')]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
  norms = {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
  if c.sandwich_norm:
    norms |= {'attn_output_norm': 'post_attention_layernorm',
              'mlp_norm': 'pre_feedforward_layernorm',
              'mlp_output_norm': 'post_feedforward_layernorm'}
  for i in range(c.dec_layers):
    rows += layer_rows(c, 'decoder/layers/', f'model.layers.{i}.', norms, i)
  return rows


def layer_rows(c, path, name, norms, i):
  biased = '' if c.attn_bias == 'none' else c.attn_bias
  rows = module_rows(path, name, {**ATTENTION, **GATED_MLP, **norms}, i, bias=False)
  if c.qk_norm:
    rows += module_rows(path, name, {'attn/q_norm': 'self_attn.q_norm',
                                     'attn/k_norm': 'self_attn.k_norm'}, i, bias=False)
  return rows + [TensorRow(f'{path}attn/{p}/bias', f'{name}self_attn.{p}_proj.bias', i)
                 for p in biased]


# -- rotary positions ---------------------------------------------------------------------------

LLAMA3 = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


def rope_fields(config: Mapping, max_length: int, *, theta=10_000., local_theta=0.) -> dict:
  """Returns our fields of rope_parameters (transformers 5), or rope_theta and rope_scaling (4).

  theta, local_theta: the defaults of the class. With a local_theta, the parameters are nested by
  the type of the layer.
  """
  given = config.get('rope_parameters') or {}
  rope, local = given, {}
  if 'full_attention' in given or 'sliding_attention' in given:
    rope, local = given.get('full_attention') or {}, given.get('sliding_attention') or {}
  rope = {**(config.get('rope_scaling') or {}), **rope}
  theta = float(rope.get('rope_theta', config.get('rope_theta', theta)))
  local_theta = local.get('rope_theta', config.get('rope_local_base_freq', local_theta))
  require(config, partial_rotary_factor=1.)
  for parameters in (rope, local):
    require(parameters, partial_rotary_factor=1.)
  if local.get('rope_type', 'default') != 'default':
    raise UsageError(f'config.json: rope_type={local["rope_type"]!r} of sliding_attention is not '
                     "supported, only 'default'")
  numbers = {key: rope[key] for key in (*LLAMA3, 'beta_fast', 'beta_slow', 'attention_factor')
             if rope.get(key) is not None}
  for key, value in [('rope_theta', theta), ('rope_theta', local_theta or 1), *numbers.items()]:
    if not 0 < float(value) < math.inf:
      raise UsageError(f'config.json: {key} of the rotary positions must be more than 0, got '
                       f'{value!r}')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  fields = dict(rope_theta=theta, rope_local_theta=float(local_theta))
  if kind == 'default':
    return fields
  if kind not in SCALINGS:
    raise UsageError(f'config.json: rope_type={kind!r} is not supported.'
                     f'{did_you_mean(str(kind), ["default", *SCALINGS])}')
  return dict(fields, rope_type=kind, rope_scaling=SCALINGS[kind](rope, max_length))


def _yarn(rope, max_length):
  require(rope, truncate=True)
  original = rope.get('original_max_position_embeddings') or max_length
  factor = rope.get('factor') or max_length / original

  def mscale(weight):
    return 1. if factor <= 1 else 0.1 * weight * math.log(factor) + 1.

  attention = rope.get('attention_factor')
  if attention is None:
    whole, all_dims = rope.get('mscale'), rope.get('mscale_all_dim')
    attention = mscale(whole) / mscale(all_dims) if whole and all_dims else mscale(1)
  return (float(factor), float(rope.get('beta_fast') or 32), float(rope.get('beta_slow') or 1),
          float(original), float(attention))


SCALINGS = {
    'linear': lambda rope, max_length: (float(rope['factor']),),
    'dynamic': lambda rope, max_length: (float(rope['factor']), float(max_length)),
    'llama3': lambda rope, max_length: tuple(
        float(rope.get(key, max_length) if key == LLAMA3[3] else rope[key]) for key in LLAMA3),
    'yarn': _yarn,
}


def rope_keys(c: TransformerConfig) -> dict:
  """Returns rope_parameters of transformers 5 and the keys of transformers 4."""
  scaling, values = None, c.rope_scaling
  if values:
    scaling = {'rope_type': c.rope_type, 'factor': values[0]}
  if values and c.rope_type == 'llama3':
    scaling |= dict(zip(LLAMA3, values), original_max_position_embeddings=int(values[3]))
  if values and c.rope_type == 'yarn':
    scaling |= dict(beta_fast=values[1], beta_slow=values[2], attention_factor=values[4],
                    original_max_position_embeddings=int(values[3]))
  rope = {'rope_theta': c.rope_theta, 'rope_type': 'default', **(scaling or {})}
  keys = dict(rope_parameters=rope, rope_scaling=scaling, rope_theta=c.rope_theta)
  if c.rope_local_theta:
    local = {'rope_theta': c.rope_local_theta, 'rope_type': 'default'}
    keys.update(rope_parameters={'full_attention': rope, 'sliding_attention': local},
                rope_local_base_freq=c.rope_local_theta)
  if c.rope_type == 'dynamic' and values:
    keys['max_position_embeddings'] = int(values[1])      # transformers scales beyond this length
  return keys


# -- windows ------------------------------------------------------------------------------------

KINDS = {'sliding_attention': True, 'full_attention': False}


def window_fields(config: Mapping, layers: int, is_sliding: Callable[[int], bool],
                  window: int | None) -> dict:
  """Returns our fields of layer_types, or of the class's own rule is_sliding(layer) without it."""
  kinds = config.get('layer_types')
  if kinds is None:
    sliding = [is_sliding(i) for i in range(layers)]
  else:
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS):
      raise UsageError(f'config.json: layer_types must name {layers} layers, each one of '
                       f'{", ".join(KINDS)}; got {str(kinds)[:200]}')
    sliding = [KINDS[kind] for kind in kinds]
  if not window or not any(sliding):
    return dict(window=0, window_pattern=(True,))
  period = next(p for p in range(1, layers + 1)
                if all(sliding[i] == sliding[i % p] for i in range(layers)))
  return dict(window=int(window), window_pattern=tuple(sliding[:period]))


def layer_types(c: TransformerConfig, layers: int) -> list[str]:
  pattern = c.window_pattern if c.window else (False,)
  names = {is_sliding: name for name, is_sliding in KINDS.items()}
  return [names[is_sliding] for is_sliding in itertools.islice(itertools.cycle(pattern), layers)]


# -- the architectures --------------------------------------------------------------------------


def _format(model_type: str, family: str, cls: str, *, kv_heads=None, d_head=None, tied=False,
            act='hidden_act', pattern=None, defaults=None, **rope) -> Format:
  """Returns the Format of one of the decoders.

  kv_heads, d_head: the class's own defaults; None: as many as heads, and D / N. tied: whether
  tie_word_embeddings is True without the key. pattern(config, layer): whether a layer has a window.
  """
  is_gemma = model_type.startswith('gemma')
  second_norms = is_gemma and model_type != 'gemma'
  default_act = 'gelu_pytorch_tanh' if is_gemma else 'silu'

  def fields(config, shapes):
    require(config, mlp_bias=False, pretraining_tp=1, use_bidirectional_attention=False)
    heads, layers = config['num_attention_heads'], config['num_hidden_layers']
    length = integer(config, 'max_position_embeddings', 2048)
    width = config['hidden_size'] // heads
    declared_tied = bool(config.get('tie_word_embeddings', tied))
    activation = config.get(act) or default_act
    if model_type == 'gemma' and activation == 'gelu':    # the first releases say so and mean tanh
      activation = default_act
    biased = {True: 'qkvo', False: 'none', None: 'none'}[config.get('attention_bias')]
    out = dict(
        n_kv_heads=integer(config, 'num_key_value_heads', kv_heads or heads),
        d_head=integer(config, 'head_dim', d_head or width), max_length=length,
        acts=(our_act(activation), 'linear'), tied=declared_tied, dropout=0.,
        attn_bias='qkv' if model_type == 'qwen2' else biased,
        **rope_fields(config, length, **rope))
    if pattern:
      _check_qwen_window(config, model_type)
      window = config.get('sliding_window', 4096)
      out |= window_fields(config, layers, lambda i: pattern(config, i), window)
    if second_norms:
      out.update(attn_scalar=float(config.get('query_pre_attn_scalar', 256)),
                 attn_softcap=_cap(config, 'attn_logit_softcapping', model_type),
                 logit_softcap=_cap(config, 'final_logit_softcapping', model_type))
    return out

  def other_keys(c):
    keys = dict(num_key_value_heads=c.kv_heads, max_position_embeddings=c.max_length or 2048,
                attention_bias=c.attn_bias == 'qkvo') | rope_keys(c)
    keys[act] = 'gelu_pytorch_tanh' if c.acts[0] == 'gelu' else THEIR_ACTS.get(c.acts[0], c.acts[0])
    if model_type == 'mistral':
      keys['sliding_window'] = c.window or None
    if model_type.startswith('qwen'):
      keys.update(use_sliding_window=c.window > 0)
    if pattern and model_type != 'mistral':
      keys['layer_types'] = layer_types(c, c.dec_layers)
      keys['sliding_window'] = c.window or 4096      # transformers wants a number
    if second_norms:
      scalar = c.attn_scalar or c.d_head
      keys.update(query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
                  attn_logit_softcapping=c.attn_softcap or None,
                  final_logit_softcapping=c.logit_softcap or None)
    return keys

  return Format(
      tensor_rows, family,
      dict(vocab_size='vocab_size', hidden_size='d_model', intermediate_size='d_ff',
           num_attention_heads='n_heads', head_dim='d_head', num_hidden_layers='dec_layers',
           rms_norm_eps='norm_eps', max_position_embeddings='max_length',
           tie_word_embeddings='tied', initializer_range='init_std',
           bos_token_id='start_id', eos_token_id='eos_id'),
      fields, dict(model_type=model_type, **({'mlp_bias': False} if model_type == 'llama' else {})),
      lambda c, kind: cls, other_keys=other_keys, canonical=prefixed('model.', 'lm_head'),
      defaults=defaults or {},
      aliases=lambda c: {'lm_head.weight': 'model.embed_tokens.weight'} if c.tied else {},
      ignore=(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',))


def _cap(config, key, model_type) -> float:
  """Returns the cap, or 0. The class of Gemma 3 has that of attention but does not apply it."""
  if model_type == 'gemma3_text' and key.startswith('attn'):
    return 0.
  default = {'gemma2': {'attn_logit_softcapping': 50., 'final_logit_softcapping': 30.}}
  value = config.get(key, default.get(model_type, {}).get(key))
  return float(value or 0.)


def _check_qwen_window(config, model_type) -> None:
  """UsageError if Qwen layers have a window that use_sliding_window, False by default, removes."""
  kinds = config.get('layer_types') or []
  if (model_type.startswith('qwen') and 'sliding_attention' in kinds
      and not config.get('use_sliding_window')):
    raise UsageError("config.json: layer_types has 'sliding_attention', but use_sliding_window="
                     f'{config.get("use_sliding_window")!r}: set it to true, or make every layer '
                     "'full_attention'")


def _qwen_window(config, layer):
  return bool(config.get('use_sliding_window')) and layer >= config.get('max_window_layers', 28)


LLAMA = _format('llama', 'llama1/7b', 'LlamaForCausalLM')
MISTRAL = _format('mistral', 'mistral/7b', 'MistralForCausalLM', kv_heads=8,
                  pattern=lambda config, layer: True, defaults={'norm_eps': 1e-6})
QWEN2 = _format('qwen2', 'qwen2/0_5b', 'Qwen2ForCausalLM', pattern=_qwen_window)
QWEN3 = _format('qwen3', 'qwen3/0_6b', 'Qwen3ForCausalLM', d_head=128, pattern=_qwen_window)
GEMMA = _format('gemma', 'gemma/2b', 'GemmaForCausalLM', kv_heads=16, d_head=256, tied=True)
GEMMA2 = _format('gemma2', 'gemma2/2b', 'Gemma2ForCausalLM', kv_heads=4, d_head=256, tied=True,
                 act='hidden_activation', pattern=lambda config, layer: layer % 2 == 0)
GEMMA3 = _format(
    'gemma3_text', 'gemma3/1b', 'Gemma3ForCausalLM', kv_heads=4, d_head=256, tied=True,
    act='hidden_activation', theta=1e6, local_theta=1e4,
    pattern=lambda config, layer: (layer + 1) % config.get('sliding_window_pattern', 6) != 0)
