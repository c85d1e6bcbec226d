"""Hugging Face checkpoints: which architecture a config.json names, what it means in our
fields, and the way back. Names of tensors: hf_rows.py; files: files.py.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re

from t5lab.errors import UsageError, did_you_mean
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop import hf_rows
from t5lab.tools.interop.rows import Renamed, Row

ACTS = {'relu': 'relu', 'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf',
        'silu': 'silu', 'swish': 'silu'}


@dataclasses.dataclass(frozen=True)
class Format:
  """One architecture. fields(config, shapes) -> TransformerConfig's fields; config(c) -> theirs."""
  rows: Callable[[TransformerConfig], list[Row]]
  fields: Callable[[Mapping, Mapping], dict]
  config: Callable[[TransformerConfig], dict]
  canonical: Callable[[str], str] = lambda name: name
  aliases: Callable[[TransformerConfig], dict[str, str]] = lambda c: {}
  ignore: tuple[str, ...] = ()


def _act(name: str) -> str:
  if name not in ACTS:
    raise UsageError(f'config.json: activation {name!r} is unknown.{did_you_mean(name, ACTS)}')
  return ACTS[name]


def _name_of_act(act: str, gelu: str = 'gelu_new') -> str:
  return {'gelu': gelu, 'gelu_erf': 'gelu'}.get(act, act)


def _require(config: Mapping, **wanted) -> None:
  for key, value in wanted.items():
    if config.get(key, value) != value:
      raise UsageError(f'config.json: {key}={config[key]!r} is not supported, only {value!r}')


def _id(value, default: int) -> int:
  """A token id that config.json may give as None or as a list (several ends)."""
  value = value[0] if isinstance(value, list) and value else value
  return default if value is None else int(value)


# -- T5 and its descendants ---------------------------------------------------------------------


def _t5_fields(config, shapes):
  _require(config, is_encoder_decoder=True)
  kind = config['model_type']
  gates = kind in ('mt5', 'umt5')
  projection = config.get('feed_forward_proj') or ('gated-gelu' if gates else 'relu')
  *gated, act = projection.split('-')
  act = 'gelu' if projection == 'gated-gelu' else _act(act)
  says_tied = config.get('tie_word_embeddings', kind != 'mt5')
  scaled = config.get('scale_decoder_outputs', says_tied)
  fields = dict(
      vocab_size=config['vocab_size'], d_model=config['d_model'], d_ff=config['d_ff'],
      n_heads=config['num_heads'], d_head=config['d_kv'], enc_layers=config['num_layers'],
      dec_layers=_id(config.get('num_decoder_layers'), config['num_layers']),
      acts=(act, 'linear') if gated else (act,), norm_eps=config.get('layer_norm_epsilon', 1e-6),
      rel_buckets=config.get('relative_attention_num_buckets', 32),
      rel_max_distance=config.get('relative_attention_max_distance', 128),
      per_layer_bias=kind == 'umt5', tied='lm_head.weight' not in shapes or bool(
          says_tied and scaled),
      scale_logits=bool(scaled) and kind != 'mt5', dropout=config.get('dropout_rate', 0.1),
      pad_id=_id(config.get('pad_token_id'), 0),
      start_id=_id(config.get('decoder_start_token_id'), _id(config.get('pad_token_id'), 0)),
      eos_id=_id(config.get('eos_token_id'), 1))
  if kind == 'longt5':
    attention = config.get('encoder_attention_type', 'local').replace('-', '_')
    fields.update(enc_attention=attention, local_radius=config.get('local_radius', 127),
                  global_block=config.get('global_block_size', 16))
  if kind == 'switch_transformers':
    fields.update(experts=config['num_experts'], **_switch_layers(config, fields))
  return fields


def _switch_layers(config, fields):
  every = {fields[f'{side}_layers'] // max(config.get(f'num_sparse_{name}_layers', 3), 1)
           for side, name in (('enc', 'encoder'), ('dec', 'decoder'))}
  if len(every) > 1:
    raise UsageError('config.json: the encoder has experts in other layers than the decoder')
  # a capacity of `expert_capacity` tokens a row, whatever its length: never fewer than it asks for
  return {'moe_every': every.pop(), 'eval_capacity_factor': float(config['num_experts'])}


def _t5_config(c):
  if c.experts:
    raise UsageError('models with experts have no Hugging Face form here: its capacity counts '
                     'tokens, ours is a factor')
  act = _name_of_act(c.acts[0])
  act = 'gelu' if act == 'gelu_new' and len(c.acts) == 2 else act
  kind = 'umt5' if c.per_layer_bias else 'longt5' if c.enc_attention != 'full' else 't5'
  name = {'umt5': 'UMT5', 'longt5': 'LongT5', 't5': 'T5'}[kind]
  config = dict(
      model_type=kind, architectures=[f'{name}ForConditionalGeneration'], is_encoder_decoder=True,
      vocab_size=c.vocab_size, d_model=c.d_model, d_ff=c.d_ff, num_heads=c.n_heads, d_kv=c.d_head,
      num_layers=c.enc_layers, num_decoder_layers=c.dec_layers, layer_norm_epsilon=c.norm_eps,
      feed_forward_proj=f'gated-{act}' if len(c.acts) == 2 else act,
      relative_attention_num_buckets=c.rel_buckets, dropout_rate=c.dropout,
      relative_attention_max_distance=c.rel_max_distance, tie_word_embeddings=c.scale_logits,
      pad_token_id=c.pad_id, eos_token_id=c.eos_id, decoder_start_token_id=c.start_id)
  if kind == 'longt5':
    config.update(encoder_attention_type=c.enc_attention.replace('_', '-'),
                  local_radius=c.local_radius, global_block_size=c.global_block)
  return config


def _t5_aliases(c):
  copies = {f'{stack}.embed_tokens.weight': 'shared.weight' for stack in ('encoder', 'decoder')}
  return {**copies, 'lm_head.weight': 'shared.weight'} if c.tied else copies


T5 = Format(
    hf_rows.t5, _t5_fields, _t5_config, aliases=_t5_aliases,
    # a table that old exports of T5 hold and no code reads
    ignore=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',))


# -- BART ---------------------------------------------------------------------------------------


def _bart_fields(config, shapes):
  for key in ('attention_heads', 'ffn_dim'):
    if config[f'encoder_{key}'] != config[f'decoder_{key}']:
      raise UsageError(f'config.json: encoder_{key}={config[f"encoder_{key}"]} and decoder_{key}='
                       f'{config[f"decoder_{key}"]}; both stacks must be alike')
  d, heads = config['d_model'], config['encoder_attention_heads']
  return dict(
      vocab_size=config['vocab_size'], d_model=d, d_ff=config['encoder_ffn_dim'], n_heads=heads,
      d_head=d // heads, enc_layers=config['encoder_layers'], dec_layers=config['decoder_layers'],
      acts=(_act(config.get('activation_function', 'gelu')),), norm='layer', norm_eps=1e-5,
      post_norm=True, embed_norm=True, bias=True, positions='learned', position_offset=2,
      max_length=config['max_position_embeddings'], scale_attn=True, scale_logits=False,
      embed_scale=bool(config.get('scale_embedding', False)), init_std=config.get('init_std', 0.02),
      logit_bias='final_logits_bias' in shapes, final_dropout=False,
      dropout=config.get('dropout', 0.1), pad_id=_id(config.get('pad_token_id'), 1),
      start_id=_id(config.get('decoder_start_token_id'), 2),
      eos_id=_id(config.get('eos_token_id'), 2))


def _bart_config(c):
  return dict(
      model_type='bart', architectures=['BartForConditionalGeneration'], is_encoder_decoder=True,
      vocab_size=c.vocab_size, d_model=c.d_model, encoder_ffn_dim=c.d_ff, decoder_ffn_dim=c.d_ff,
      encoder_attention_heads=c.n_heads, decoder_attention_heads=c.n_heads,
      encoder_layers=c.enc_layers, decoder_layers=c.dec_layers,
      activation_function=_name_of_act(c.acts[0]), max_position_embeddings=c.max_length,
      scale_embedding=c.embed_scale, dropout=c.dropout, init_std=c.init_std, pad_token_id=c.pad_id,
      decoder_start_token_id=c.start_id, eos_token_id=c.eos_id, bos_token_id=0,
      forced_eos_token_id=None, tie_word_embeddings=True)


BART = Format(
    hf_rows.bart, _bart_fields, _bart_config,
    canonical=lambda name: name if name.startswith(('model.', 'final_', 'lm_head'))
    else f'model.{name}',
    aliases=lambda c: dict.fromkeys(
        ('model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight',
         'lm_head.weight'), 'model.shared.weight'))


# -- GPT-2, LLaMA -------------------------------------------------------------------------------


def _gpt2_fields(config, shapes):
  _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
           add_cross_attention=False)
  d, heads = config['n_embd'], config['n_head']
  return dict(
      vocab_size=config['vocab_size'], d_model=d, d_ff=_id(config.get('n_inner'), 4 * d),
      n_heads=heads, d_head=d // heads, enc_layers=0, dec_layers=config['n_layer'],
      acts=(_act(config.get('activation_function', 'gelu_new')),), norm='layer',
      norm_eps=config.get('layer_norm_epsilon', 1e-5), bias=True, positions='learned',
      max_length=config['n_positions'], scale_attn=True, scale_logits=False, final_dropout=False,
      dropout=config.get('resid_pdrop', 0.1), init_std=config.get('initializer_range', 0.02),
      start_id=_id(config.get('bos_token_id'), _id(config.get('eos_token_id'), 0)),
      eos_id=_id(config.get('eos_token_id'), 0))


def _gpt2_config(c):
  return dict(
      model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=c.vocab_size,
      n_embd=c.d_model, n_inner=c.d_ff, n_head=c.n_heads, n_layer=c.dec_layers,
      activation_function=_name_of_act(c.acts[0]), layer_norm_epsilon=c.norm_eps,
      n_positions=c.max_length, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
      initializer_range=c.init_std, bos_token_id=c.start_id, eos_token_id=c.eos_id,
      tie_word_embeddings=True)


GPT2 = Format(
    hf_rows.gpt2, _gpt2_fields, _gpt2_config,
    canonical=lambda n: n if n.startswith(('transformer.', 'lm_head')) else f'transformer.{n}',
    aliases=lambda c: {'lm_head.weight': 'transformer.wte.weight'},
    ignore=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',))


def _llama_fields(config, shapes):
  _require(config, attention_bias=False, mlp_bias=False, hidden_act='silu', pretraining_tp=1)
  heads = config['num_attention_heads']
  # transformers 5 has rope_parameters, 4 had rope_theta and rope_scaling
  rope = {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'llama3'):
    raise UsageError(f'config.json: rope_type={kind!r} is not supported, only default and llama3')
  scaling = () if kind == 'default' else tuple(float(rope[k]) for k in (
      'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'))
  return dict(
      vocab_size=config['vocab_size'], d_model=config['hidden_size'],
      d_ff=config['intermediate_size'], n_heads=heads,
      n_kv_heads=_id(config.get('num_key_value_heads'), heads),
      d_head=_id(config.get('head_dim'), config['hidden_size'] // heads), enc_layers=0,
      dec_layers=config['num_hidden_layers'], acts=('silu', 'linear'),
      norm_eps=config.get('rms_norm_eps', 1e-6), positions='rope',
      max_length=config.get('max_position_embeddings', 2048),
      rope_theta=float(rope.get('rope_theta', config.get('rope_theta', 10_000.))),
      rope_scaling=scaling, scale_attn=True, tied='lm_head.weight' not in shapes or bool(
          config.get('tie_word_embeddings', False)),
      scale_logits=False, final_dropout=False, init_std=config.get('initializer_range', 0.02),
      start_id=_id(config.get('bos_token_id'), 1),
      eos_id=_id(config.get('eos_token_id'), 2))


def _llama_config(c):
  rope = {'rope_theta': c.rope_theta, 'rope_type': 'default'}
  if c.rope_scaling:
    rope.update(rope_type='llama3', **dict(zip(
        ('factor', 'low_freq_factor', 'high_freq_factor'), c.rope_scaling)),
        original_max_position_embeddings=int(c.rope_scaling[3]))
  old = {'rope_scaling': None if not c.rope_scaling else {
      k: v for k, v in rope.items() if k != 'rope_theta'}, 'rope_theta': c.rope_theta}
  return dict(
      model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=c.vocab_size,
      hidden_size=c.d_model, intermediate_size=c.d_ff, num_attention_heads=c.n_heads,
      num_key_value_heads=c.kv_heads, head_dim=c.d_head, num_hidden_layers=c.dec_layers,
      hidden_act='silu', rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_length or 2048,
      rope_parameters=rope, **old, tie_word_embeddings=c.tied, initializer_range=c.init_std,
      bos_token_id=c.start_id, eos_token_id=c.eos_id, attention_bias=False, mlp_bias=False)


LLAMA = Format(
    hf_rows.llama, _llama_fields, _llama_config,
    canonical=lambda n: n if n.startswith(('model.', 'lm_head')) else f'model.{n}',
    aliases=lambda c: {'lm_head.weight': 'model.embed_tokens.weight'} if c.tied else {},
    ignore=(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',))


# -- BERT ---------------------------------------------------------------------------------------


def _bert_name(name: str) -> str:
  name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
  name = re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)
  return name if name.startswith(('bert.', 'cls.', 'classifier.')) else f'bert.{name}'


def _bert_fields(config, shapes):
  _require(config, position_embedding_type='absolute', is_decoder=False, add_cross_attention=False)
  names = {_bert_name(n) for n in shapes}
  d, heads = config['hidden_size'], config['num_attention_heads']
  mlm = 'cls.predictions.transform.dense.weight' in names
  classifier = next((s for n, s in shapes.items() if n == 'classifier.weight'), None)
  pooler = 'bert.pooler.dense.weight' in names
  return dict(
      vocab_size=config['vocab_size'], d_model=d, d_ff=config['intermediate_size'], n_heads=heads,
      d_head=d // heads, enc_layers=config['num_hidden_layers'], dec_layers=0,
      acts=(_act(config.get('hidden_act', 'gelu')),), norm='layer',
      norm_eps=config.get('layer_norm_eps', 1e-12), post_norm=True, embed_norm=True, bias=True,
      types=config.get('type_vocab_size', 2), positions='learned',
      max_length=config['max_position_embeddings'], scale_attn=True, scale_logits=False,
      logit_bias=mlm, mlm_head=mlm, pooler=pooler, nsp='cls.seq_relationship.weight' in names,
      classes=classifier[0] if classifier else 0, pool='pooler' if classifier else 'mean',
      final_dropout=False, dropout=config.get('hidden_dropout_prob', 0.1),
      init_std=config.get('initializer_range', 0.02), pad_id=_id(config.get('pad_token_id'), 0))


def _bert_config(c):
  if c.classes and c.pool != 'pooler':
    raise UsageError(f'BertForSequenceClassification pools by the pooler, this model by {c.pool!r}')
  name = ('BertForSequenceClassification' if c.classes else 'BertModel' if not c.mlm_head else
          'BertForPreTraining' if c.nsp else 'BertForMaskedLM')
  config = dict(
      model_type='bert', architectures=[name], vocab_size=c.vocab_size, hidden_size=c.d_model,
      intermediate_size=c.d_ff, num_attention_heads=c.n_heads, num_hidden_layers=c.enc_layers,
      hidden_act=_name_of_act(c.acts[0]), layer_norm_eps=c.norm_eps, type_vocab_size=c.types,
      max_position_embeddings=c.max_length, hidden_dropout_prob=c.dropout,
      attention_probs_dropout_prob=c.dropout, initializer_range=c.init_std, pad_token_id=c.pad_id,
      position_embedding_type='absolute')
  return {**config, 'num_labels': c.classes} if c.classes else config


BERT = Format(
    hf_rows.bert, _bert_fields, _bert_config, canonical=_bert_name,
    aliases=lambda c: {
        'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'} if c.mlm_head else {},
    ignore=(r'bert\.embeddings\.(position_ids|token_type_ids)',))


# -- choosing one -------------------------------------------------------------------------------

FORMATS = {'t5': T5, 'mt5': T5, 'umt5': T5, 'longt5': T5, 'switch_transformers': T5, 'bart': BART,
           'gpt2': GPT2, 'llama': LLAMA, 'bert': BERT}


def read_config(config: Mapping, reader) -> tuple[Format, TransformerConfig, Renamed]:
  """config.json and a Reader -> (format, our config, the reader under canonical names).

  UsageError for an architecture that is not in FORMATS, a missing key or a value that no field has.
  """
  kind = config.get('model_type')
  if kind not in FORMATS:
    raise UsageError(f'config.json: model_type {kind!r} is unknown.'
                     f'{did_you_mean(str(kind), FORMATS)}')
  format_ = FORMATS[kind]
  try:
    c = TransformerConfig(**format_.fields(config, reader.shapes()))
  except KeyError as e:
    raise UsageError(f'config.json: a {kind} config has {e}, this one lacks it') from e
  except (TypeError, ValueError, AttributeError) as e:
    raise UsageError(f'config.json: not a {kind} config: {e}') from e
  return format_, c, Renamed(reader, format_.canonical, format_.aliases(c), 'the checkpoint')


def for_config(c: TransformerConfig) -> Format:
  """The Hugging Face architecture that computes what c says; UsageError if there is none."""
  if c.positions == 'relative' and c.kind == 'encoder_decoder':
    format_ = T5
  elif c.positions == 'rope':
    format_ = LLAMA
  elif c.positions == 'learned':
    format_ = {'decoder': GPT2, 'encoder': BERT, 'encoder_decoder': BART}[c.kind]
  else:
    format_ = None
  if format_:
    # what the architecture cannot say must have the value that it implies
    theirs = format_.config(c)
    shapes = {row.name: (c.classes,) for row in format_.rows(c)}
    back = TransformerConfig(**format_.fields(theirs, shapes))
    free = {'remat', 'dtype', 'init_std', 'max_length', 'capacity_factor', 'eval_capacity_factor',
            'dropout', 'n_kv_heads', 'local_radius', 'global_block', 'start_id', 'eos_id',
            'pool'}
    differ = [f'{f.name}={getattr(c, f.name)!r}' for f in dataclasses.fields(c)
              if f.name not in free and getattr(back, f.name) != getattr(c, f.name)]
    if not differ and back.kv_heads == c.kv_heads:
      return format_
    raise UsageError(f'{theirs["architectures"][0]}, the nearest of Hugging Face, cannot say '
                     f'{", ".join(differ) or "n_kv_heads"}')
  raise UsageError(f'no Hugging Face architecture here is a {c.kind.replace("_", "-")} with '
                   f'{c.positions} positions; known: {", ".join(FORMATS)}')
