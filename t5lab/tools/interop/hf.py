"""Hugging Face configs: from config.json to our fields and back, one Format per architecture.

The names of tensors are in hf_tensors.py, the files in tensor_files.py.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re

from t5lab.errors import UsageError, did_you_mean
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop import hf_tensors
from t5lab.tools.interop.tensor_map import RenamedReader, TensorRow

ACTS = {'relu': 'relu', 'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf',
        'silu': 'silu', 'swish': 'silu'}


@dataclasses.dataclass(frozen=True)
class Format:
  """One architecture.

  fields(config, shapes): the fields of a TransformerConfig from config.json and tensor shapes.
  config(c): the config.json of a TransformerConfig. canonical, aliases: see RenamedReader.
  ignore: regexes of tensors that may stay unread.
  """
  tensor_rows: Callable[[TransformerConfig], list[TensorRow]]
  fields: Callable[[Mapping, Mapping], dict]
  config: Callable[[TransformerConfig], dict]
  canonical: Callable[[str], str] = lambda name: name
  aliases: Callable[[TransformerConfig], dict[str, str]] = lambda c: {}
  ignore: tuple[str, ...] = ()


def _our_act(name: str) -> str:
  if name not in ACTS:
    raise UsageError(f'config.json: activation {name!r} is unknown.{did_you_mean(name, ACTS)}')
  return ACTS[name]


def _their_act(act: str) -> str:
  return {'gelu': 'gelu_new', 'gelu_erf': 'gelu'}.get(act, act)


def _require(config: Mapping, **supported) -> None:
  for key, value in supported.items():
    if config.get(key, value) != value:
      raise UsageError(f'config.json: {key}={config[key]!r} is not supported, only {value!r}')


def _int(config: Mapping, key: str, default: int) -> int:
  """Returns config[key], or `default` for None; of a list (several end tokens) the first."""
  value = config.get(key)
  if isinstance(value, list) and value:
    value = value[0]
  return default if value is None else int(value)


# -- T5 and its descendants ---------------------------------------------------------------------


def _t5_fields(config, shapes):
  _require(config, is_encoder_decoder=True)
  kind = config['model_type']
  default = 'gated-gelu' if kind in ('mt5', 'umt5') else 'relu'
  projection = config.get('feed_forward_proj') or default
  *gated, act = projection.split('-')
  act = 'gelu' if projection == 'gated-gelu' else _our_act(act)
  # Released configs disagree on tie_word_embeddings: a separate lm_head is decided by the tensors.
  declared_tied = config.get('tie_word_embeddings', kind != 'mt5')
  scaled = config.get('scale_decoder_outputs', declared_tied)
  tied = 'lm_head.weight' not in shapes or bool(declared_tied and scaled)
  fields = dict(
      vocab_size=config['vocab_size'], d_model=config['d_model'], d_ff=config['d_ff'],
      n_heads=config['num_heads'], d_head=config['d_kv'], enc_layers=config['num_layers'],
      dec_layers=_int(config, 'num_decoder_layers', config['num_layers']),
      acts=(act, 'linear') if gated else (act,), norm_eps=config.get('layer_norm_epsilon', 1e-6),
      rel_buckets=config.get('relative_attention_num_buckets', 32),
      rel_max_distance=config.get('relative_attention_max_distance', 128),
      per_layer_bias=kind == 'umt5', tied=tied, scale_logits=bool(scaled) and kind != 'mt5',
      dropout=config.get('dropout_rate', 0.1), pad_id=_int(config, 'pad_token_id', 0),
      start_id=_int(config, 'decoder_start_token_id', _int(config, 'pad_token_id', 0)),
      eos_id=_int(config, 'eos_token_id', 1))
  if kind == 'longt5':
    attention = config.get('encoder_attention_type', 'local').replace('-', '_')
    fields.update(enc_attention=attention, local_radius=config.get('local_radius', 127),
                  global_block=config.get('global_block_size', 16))
  if kind == 'switch_transformers':
    # Their capacity is a number of tokens per row, whatever its length; with this factor ours is
    # never smaller than what a row asks for.
    fields.update(experts=config['num_experts'], moe_every=_switch_moe_every(config, fields),
                  eval_capacity_factor=float(config['num_experts']))
  return fields


def _switch_moe_every(config, fields) -> int:
  """Returns n if every n-th layer of both stacks has experts."""
  intervals = {
      fields['enc_layers'] // max(config.get('num_sparse_encoder_layers', 3), 1),
      fields['dec_layers'] // max(config.get('num_sparse_decoder_layers', 3), 1)}
  if len(intervals) > 1:
    raise UsageError('config.json: the encoder has experts in other layers than the decoder')
  return intervals.pop()


def _t5_config(c):
  if c.experts:
    raise UsageError('models with experts cannot be written for Hugging Face: its capacity is a '
                     'number of tokens, ours a factor')
  gated = len(c.acts) == 2
  act = _their_act(c.acts[0])
  if gated:
    act = 'gated-gelu' if act == 'gelu_new' else f'gated-{act}'
  kind = 't5' if c.enc_attention == 'full' else 'longt5'
  kind = 'umt5' if c.per_layer_bias else kind
  name = {'umt5': 'UMT5', 'longt5': 'LongT5', 't5': 'T5'}[kind]
  config = dict(
      model_type=kind, architectures=[f'{name}ForConditionalGeneration'], is_encoder_decoder=True,
      vocab_size=c.vocab_size, d_model=c.d_model, d_ff=c.d_ff, num_heads=c.n_heads, d_kv=c.d_head,
      num_layers=c.enc_layers, num_decoder_layers=c.dec_layers, layer_norm_epsilon=c.norm_eps,
      feed_forward_proj=act, relative_attention_num_buckets=c.rel_buckets, dropout_rate=c.dropout,
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
    hf_tensors.t5, _t5_fields, _t5_config, aliases=_t5_aliases,
    # Old exports of T5 hold this table, which no code reads.
    ignore=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',))


# -- BART ---------------------------------------------------------------------------------------


def _bart_fields(config, shapes):
  for key in ('attention_heads', 'ffn_dim'):
    if config[f'encoder_{key}'] != config[f'decoder_{key}']:
      raise UsageError(f'config.json: encoder_{key}={config[f"encoder_{key}"]} and decoder_{key}='
                       f'{config[f"decoder_{key}"]}; both stacks must be equal')
  d, heads = config['d_model'], config['encoder_attention_heads']
  return dict(
      vocab_size=config['vocab_size'], d_model=d, d_ff=config['encoder_ffn_dim'], n_heads=heads,
      d_head=d // heads, enc_layers=config['encoder_layers'], dec_layers=config['decoder_layers'],
      acts=(_our_act(config.get('activation_function', 'gelu')),), norm='layer', norm_eps=1e-5,
      post_norm=True, embed_norm=True, bias=True, positions='learned', position_offset=2,
      max_length=config['max_position_embeddings'], scale_attn=True, scale_logits=False,
      embed_scale=bool(config.get('scale_embedding', False)), init_std=config.get('init_std', 0.02),
      logit_bias='final_logits_bias' in shapes, final_dropout=False,
      dropout=config.get('dropout', 0.1), pad_id=_int(config, 'pad_token_id', 1),
      start_id=_int(config, 'decoder_start_token_id', 2),
      eos_id=_int(config, 'eos_token_id', 2))


def _bart_config(c):
  return dict(
      model_type='bart', architectures=['BartForConditionalGeneration'], is_encoder_decoder=True,
      vocab_size=c.vocab_size, d_model=c.d_model, encoder_ffn_dim=c.d_ff, decoder_ffn_dim=c.d_ff,
      encoder_attention_heads=c.n_heads, decoder_attention_heads=c.n_heads,
      encoder_layers=c.enc_layers, decoder_layers=c.dec_layers,
      activation_function=_their_act(c.acts[0]), max_position_embeddings=c.max_length,
      scale_embedding=c.embed_scale, dropout=c.dropout, init_std=c.init_std, pad_token_id=c.pad_id,
      decoder_start_token_id=c.start_id, eos_token_id=c.eos_id, bos_token_id=0,
      forced_eos_token_id=None, tie_word_embeddings=True)


BART = Format(
    hf_tensors.bart, _bart_fields, _bart_config,
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
      vocab_size=config['vocab_size'], d_model=d, d_ff=_int(config, 'n_inner', 4 * d),
      n_heads=heads, d_head=d // heads, enc_layers=0, dec_layers=config['n_layer'],
      acts=(_our_act(config.get('activation_function', 'gelu_new')),), norm='layer',
      norm_eps=config.get('layer_norm_epsilon', 1e-5), bias=True, positions='learned',
      max_length=config['n_positions'], scale_attn=True, scale_logits=False, final_dropout=False,
      dropout=config.get('resid_pdrop', 0.1), init_std=config.get('initializer_range', 0.02),
      start_id=_int(config, 'bos_token_id', _int(config, 'eos_token_id', 0)),
      eos_id=_int(config, 'eos_token_id', 0))


def _gpt2_config(c):
  return dict(
      model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=c.vocab_size,
      n_embd=c.d_model, n_inner=c.d_ff, n_head=c.n_heads, n_layer=c.dec_layers,
      activation_function=_their_act(c.acts[0]), layer_norm_epsilon=c.norm_eps,
      n_positions=c.max_length, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
      initializer_range=c.init_std, bos_token_id=c.start_id, eos_token_id=c.eos_id,
      tie_word_embeddings=True)


GPT2 = Format(
    hf_tensors.gpt2, _gpt2_fields, _gpt2_config,
    canonical=lambda n: n if n.startswith(('transformer.', 'lm_head')) else f'transformer.{n}',
    aliases=lambda c: {'lm_head.weight': 'transformer.wte.weight'},
    ignore=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',))


ROPE_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor',
                'original_max_position_embeddings')     # in the order of model.rope_scaling


def _llama_fields(config, shapes):
  _require(config, attention_bias=False, mlp_bias=False, hidden_act='silu', pretraining_tp=1)
  heads = config['num_attention_heads']
  # rope_parameters in transformers 5, rope_theta and rope_scaling in 4
  rope = {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'llama3'):
    raise UsageError(f'config.json: rope_type={kind!r} is not supported, only default and llama3')
  scaling = () if kind == 'default' else tuple(float(rope[key]) for key in ROPE_SCALING)
  tied = 'lm_head.weight' not in shapes or bool(config.get('tie_word_embeddings', False))
  return dict(
      vocab_size=config['vocab_size'], d_model=config['hidden_size'],
      d_ff=config['intermediate_size'], n_heads=heads,
      n_kv_heads=_int(config, 'num_key_value_heads', heads),
      d_head=_int(config, 'head_dim', config['hidden_size'] // heads), enc_layers=0,
      dec_layers=config['num_hidden_layers'], acts=('silu', 'linear'),
      norm_eps=config.get('rms_norm_eps', 1e-6), positions='rope',
      max_length=config.get('max_position_embeddings', 2048),
      rope_theta=float(rope.get('rope_theta', config.get('rope_theta', 10_000.))),
      rope_scaling=scaling, scale_attn=True, tied=tied, scale_logits=False, final_dropout=False,
      init_std=config.get('initializer_range', 0.02), start_id=_int(config, 'bos_token_id', 1),
      eos_id=_int(config, 'eos_token_id', 2))


def _llama_config(c):
  scaling = None
  if c.rope_scaling:
    scaling = {'rope_type': 'llama3', **dict(zip(ROPE_SCALING, c.rope_scaling))}
    scaling['original_max_position_embeddings'] = int(c.rope_scaling[3])
  rope = {'rope_theta': c.rope_theta, 'rope_type': 'default', **(scaling or {})}
  return dict(
      model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=c.vocab_size,
      hidden_size=c.d_model, intermediate_size=c.d_ff, num_attention_heads=c.n_heads,
      num_key_value_heads=c.kv_heads, head_dim=c.d_head, num_hidden_layers=c.dec_layers,
      hidden_act='silu', rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_length or 2048,
      rope_parameters=rope, rope_scaling=scaling, rope_theta=c.rope_theta,
      tie_word_embeddings=c.tied, initializer_range=c.init_std,
      bos_token_id=c.start_id, eos_token_id=c.eos_id, attention_bias=False, mlp_bias=False)


LLAMA = Format(
    hf_tensors.llama, _llama_fields, _llama_config,
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
  classes = shapes['classifier.weight'][0] if 'classifier.weight' in shapes else 0
  pooler = 'bert.pooler.dense.weight' in names
  return dict(
      vocab_size=config['vocab_size'], d_model=d, d_ff=config['intermediate_size'], n_heads=heads,
      d_head=d // heads, enc_layers=config['num_hidden_layers'], dec_layers=0,
      acts=(_our_act(config.get('hidden_act', 'gelu')),), norm='layer',
      norm_eps=config.get('layer_norm_eps', 1e-12), post_norm=True, embed_norm=True, bias=True,
      types=config.get('type_vocab_size', 2), positions='learned',
      max_length=config['max_position_embeddings'], scale_attn=True, scale_logits=False,
      logit_bias=mlm, mlm_head=mlm, pooler=pooler, nsp='cls.seq_relationship.weight' in names,
      classes=classes, pool='pooler' if classes else 'mean',
      final_dropout=False, dropout=config.get('hidden_dropout_prob', 0.1),
      init_std=config.get('initializer_range', 0.02), pad_id=_int(config, 'pad_token_id', 0))


def bert_class(c) -> str:
  """Returns the class of transformers that has exactly the heads of c."""
  if c.classes:
    return 'BertForSequenceClassification'
  if not c.mlm_head:
    return 'BertModel'
  return 'BertForPreTraining' if c.nsp else 'BertForMaskedLM'


def _bert_config(c):
  if c.classes and c.pool != 'pooler':
    raise UsageError("BertForSequenceClassification needs model.pool='pooler', this model has "
                     f'{c.pool!r}')
  config = dict(
      model_type='bert', architectures=[bert_class(c)], vocab_size=c.vocab_size,
      hidden_size=c.d_model, intermediate_size=c.d_ff, num_attention_heads=c.n_heads,
      num_hidden_layers=c.enc_layers, hidden_act=_their_act(c.acts[0]),
      layer_norm_eps=c.norm_eps, type_vocab_size=c.types,
      max_position_embeddings=c.max_length, hidden_dropout_prob=c.dropout,
      attention_probs_dropout_prob=c.dropout, initializer_range=c.init_std, pad_token_id=c.pad_id,
      position_embedding_type='absolute')
  return {**config, 'num_labels': c.classes} if c.classes else config


BERT = Format(
    hf_tensors.bert, _bert_fields, _bert_config, canonical=_bert_name,
    aliases=lambda c: {
        'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'} if c.mlm_head else {},
    ignore=(r'bert\.embeddings\.(position_ids|token_type_ids)',))


# -- choosing one -------------------------------------------------------------------------------

FORMATS = {'t5': T5, 'mt5': T5, 'umt5': T5, 'longt5': T5, 'switch_transformers': T5, 'bart': BART,
           'gpt2': GPT2, 'llama': LLAMA, 'bert': BERT}
# (kind, positions) of a model: the one architecture that can match it, if the other fields do too.
CANDIDATES = {
    ('encoder_decoder', 'relative'): T5, ('encoder_decoder', 'learned'): BART,
    ('decoder', 'learned'): GPT2, ('decoder', 'rope'): LLAMA, ('encoder', 'learned'): BERT}
# Fields that need not survive the way through config.json: they do not change what is computed
# there (init_std, remat), or are compared or carried elsewhere (n_kv_heads, eos_id).
FREE = {'remat', 'dtype', 'init_std', 'max_length', 'capacity_factor', 'eval_capacity_factor',
        'dropout', 'n_kv_heads', 'local_radius', 'global_block', 'start_id', 'eos_id', 'pool'}


def read_config(config: Mapping, reader) -> tuple[Format, TransformerConfig, RenamedReader]:
  """Returns the format, our config and the reader with canonical names, from a config.json.

  UsageError for an architecture that is not in FORMATS, a missing key or an unsupported value.
  """
  kind = config.get('model_type')
  if kind not in FORMATS:
    raise UsageError(f'config.json: model_type {kind!r} is unknown.'
                     f'{did_you_mean(str(kind), FORMATS)}')
  format_ = FORMATS[kind]
  try:
    c = TransformerConfig(**format_.fields(config, reader.shapes()))
  except KeyError as e:
    raise UsageError(f'config.json lacks {e}, which a {kind} config has') from e
  except (TypeError, ValueError, AttributeError) as e:
    raise UsageError(f'config.json is not a {kind} config: {e}') from e
  reader = RenamedReader(reader, format_.canonical, format_.aliases(c), 'the checkpoint')
  return format_, c, reader


def format_for(c: TransformerConfig) -> Format:
  """Returns the Hugging Face architecture that computes c; UsageError if there is none."""
  if (c.kind, c.positions) not in CANDIDATES:
    raise UsageError(f'no Hugging Face architecture is known for {c.kind.replace("_", "-")}s with '
                     f'{c.positions} positions; known: {", ".join(FORMATS)}')
  format_ = CANDIDATES[c.kind, c.positions]
  # Through its config.json and back: a field that the architecture cannot express has its default.
  config = format_.config(c)
  shapes = {row.name: (c.classes,) for row in format_.tensor_rows(c)}
  back = TransformerConfig(**format_.fields(config, shapes))
  lost = [f'{field.name}={getattr(c, field.name)!r}' for field in dataclasses.fields(c)
          if field.name not in FREE and getattr(back, field.name) != getattr(c, field.name)]
  if lost or back.kv_heads != c.kv_heads:
    raise UsageError(f"Hugging Face's {config['architectures'][0]}, the nearest architecture, "
                     f'cannot express {", ".join(lost) or "n_kv_heads"}')
  return format_
