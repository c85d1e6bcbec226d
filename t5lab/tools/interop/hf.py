"""Hugging Face configs: from config.json to our fields and back, one Format per architecture.

The names of tensors are in hf_tensors.py, the files in tensor_files.py.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

from t5lab.errors import UsageError, did_you_mean
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop import hf_tensors
from t5lab.tools.interop.tensor_map import RenamedReader, TensorRow

ACTS = {'relu': 'relu', 'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf',
        'silu': 'silu', 'swish': 'silu'}
THEIR_ACTS = {ours: theirs for theirs, ours in reversed(ACTS.items())}   # the first of several
# Fields that config.json must have.
SIZES = ('vocab_size', 'd_model', 'd_ff', 'n_heads', 'd_head', 'enc_layers', 'dec_layers',
         'max_length')


@dataclasses.dataclass(frozen=True)
class Format:
  """One architecture.

  family: the row of models/families.py that has the values of what config.json may lack. keys:
  {their key: our field}; a field is read from the last of its keys, unless
  other_fields(config, shapes) has it. act: the key of the activation. constants, other_keys(c): the
  rest of config.json. canonical, aliases: see RenamedReader. ignore: regexes of tensors that may
  stay unread.
  """
  tensor_rows: Callable[[TransformerConfig], list[TensorRow]]
  family: str
  keys: Mapping[str, str]
  other_fields: Callable[[Mapping, Mapping], dict]
  constants: Mapping[str, Any]
  act: str = ''
  other_keys: Callable[[TransformerConfig], dict] = lambda c: {}
  canonical: Callable[[str], str] = lambda name: name
  aliases: Callable[[TransformerConfig], dict[str, str]] = lambda c: {}
  ignore: tuple[str, ...] = ()

  def fields(self, config: Mapping, shapes: Mapping) -> dict:
    """Returns the fields of a TransformerConfig from config.json and tensor shapes."""
    others = self.other_fields(config, shapes)
    row = {**families.row(self.family), 'dropout': 0.1}      # runs decide it, not rows
    if self.act in config:
      others['acts'] = (_our_act(config[self.act]),)

    def value(key, field):
      if key.endswith('_token_id'):
        return _int(config, key, row[field])
      return config[key] if field in SIZES else config.get(key, row[field])

    fields = {field: value(key, field) for key, field in self.keys.items() if field not in others}
    fields |= others
    if 'd_head' not in fields:
      fields['d_head'] = fields['d_model'] // fields['n_heads']
    return {**row, **fields}

  def config(self, c: TransformerConfig) -> dict:
    """Returns the config.json of a TransformerConfig."""
    config = {key: getattr(c, field) for key, field in self.keys.items()}
    if self.act:
      config[self.act] = THEIR_ACTS.get(c.acts[0], c.acts[0])
    config.update(self.constants, **self.other_keys(c))
    return {**config, 'architectures': [class_name(c, config['model_type'])]}


def _our_act(name: str) -> str:
  if name not in ACTS:
    raise UsageError(f'config.json: activation {name!r} is unknown.{did_you_mean(name, ACTS)}')
  return ACTS[name]


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


def _prefixed(*known: str) -> Callable[[str], str]:
  """Returns a function that gives a name the first prefix unless it has one of them."""
  return lambda name: name if name.startswith(known) else known[0] + name


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
  layers = {'encoder': config['num_layers'],
            'decoder': _int(config, 'num_decoder_layers', config['num_layers'])}
  fields = dict(
      dec_layers=layers['decoder'], acts=(act, 'linear') if gated else (act,),
      per_layer_bias=kind == 'umt5', scale_logits=bool(scaled) and kind != 'mt5',
      tied='lm_head.weight' not in shapes or bool(declared_tied and scaled),
      start_id=_int(config, 'decoder_start_token_id', _int(config, 'pad_token_id', 0)))
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


def _t5_keys(c):
  if c.experts:
    raise UsageError('models with experts cannot be written for Hugging Face: its capacity is a '
                     'number of tokens, ours a factor')
  act = THEIR_ACTS.get(c.acts[0], c.acts[0])
  if len(c.acts) == 2:
    act = 'gated-gelu' if act == 'gelu_new' else f'gated-{act}'
  kind = 't5' if c.enc_attention == 'full' else 'longt5'
  kind = 'umt5' if c.per_layer_bias else kind
  keys = dict(model_type=kind, feed_forward_proj=act)
  if kind == 'longt5':
    keys.update(encoder_attention_type=c.enc_attention.replace('_', '-'),
                local_radius=c.local_radius, global_block_size=c.global_block)
  return keys


T5 = Format(
    hf_tensors.t5, 't5_1_0/small',
    dict(vocab_size='vocab_size', d_model='d_model', d_ff='d_ff', num_heads='n_heads',
         d_kv='d_head', num_layers='enc_layers', num_decoder_layers='dec_layers',
         layer_norm_epsilon='norm_eps', relative_attention_num_buckets='rel_buckets',
         relative_attention_max_distance='rel_max_distance', dropout_rate='dropout',
         tie_word_embeddings='scale_logits', pad_token_id='pad_id',
         decoder_start_token_id='start_id', eos_token_id='eos_id'),
    _t5_fields, dict(is_encoder_decoder=True), other_keys=_t5_keys,
    aliases=lambda c: dict.fromkeys(
        ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight',
         *(['lm_head.weight'] if c.tied else [])), 'shared.weight'),
    # Old exports of T5 hold this table, which no code reads.
    ignore=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',))


# -- BART ---------------------------------------------------------------------------------------


def _bart_fields(config, shapes):
  for key in ('attention_heads', 'ffn_dim'):
    if config[f'encoder_{key}'] != config[f'decoder_{key}']:
      raise UsageError(f'config.json: encoder_{key}={config[f"encoder_{key}"]} and decoder_{key}='
                       f'{config[f"decoder_{key}"]}; both stacks must be equal')
  return dict(embed_scale=bool(config.get('scale_embedding', False)),
              logit_bias='final_logits_bias' in shapes)


BART = Format(
    hf_tensors.bart, 'bart/base',
    dict(vocab_size='vocab_size', d_model='d_model', encoder_ffn_dim='d_ff',
         decoder_ffn_dim='d_ff', encoder_attention_heads='n_heads',
         decoder_attention_heads='n_heads', encoder_layers='enc_layers',
         decoder_layers='dec_layers', max_position_embeddings='max_length',
         scale_embedding='embed_scale', init_std='init_std', dropout='dropout',
         pad_token_id='pad_id', decoder_start_token_id='start_id', eos_token_id='eos_id'),
    _bart_fields,
    dict(model_type='bart', is_encoder_decoder=True, bos_token_id=0, forced_eos_token_id=None,
         tie_word_embeddings=True),
    act='activation_function', canonical=_prefixed('model.', 'final_', 'lm_head'),
    aliases=lambda c: dict.fromkeys(
        ('model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight',
         'lm_head.weight'), 'model.shared.weight'))


# -- GPT-2, LLaMA -------------------------------------------------------------------------------


def _gpt2_fields(config, shapes):
  _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
           add_cross_attention=False)
  return dict(
      d_ff=_int(config, 'n_inner', 4 * config['n_embd']), eos_id=_int(config, 'eos_token_id', 0),
      start_id=_int(config, 'bos_token_id', _int(config, 'eos_token_id', 0)))


GPT2 = Format(
    hf_tensors.gpt2, 'gpt2/small',
    dict(vocab_size='vocab_size', n_embd='d_model', n_inner='d_ff', n_head='n_heads',
         n_layer='dec_layers', layer_norm_epsilon='norm_eps', n_positions='max_length',
         embd_pdrop='dropout', attn_pdrop='dropout', resid_pdrop='dropout',
         initializer_range='init_std', bos_token_id='start_id', eos_token_id='eos_id'),
    _gpt2_fields, dict(model_type='gpt2', tie_word_embeddings=True),
    act='activation_function', canonical=_prefixed('transformer.', 'lm_head'),
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
      n_kv_heads=_int(config, 'num_key_value_heads', heads),
      d_head=_int(config, 'head_dim', config['hidden_size'] // heads),
      max_length=config.get('max_position_embeddings', 2048),
      rope_theta=float(rope.get('rope_theta', config.get('rope_theta', 10_000.))),
      rope_scaling=scaling, tied=tied, dropout=0.)


def _llama_keys(c):
  scaling = None
  if c.rope_scaling:
    scaling = {'rope_type': 'llama3', **dict(zip(ROPE_SCALING, c.rope_scaling))}
    scaling['original_max_position_embeddings'] = int(c.rope_scaling[3])
  rope = {'rope_theta': c.rope_theta, 'rope_type': 'default', **(scaling or {})}
  return dict(num_key_value_heads=c.kv_heads, max_position_embeddings=c.max_length or 2048,
              rope_parameters=rope, rope_scaling=scaling)


LLAMA = Format(
    hf_tensors.llama, 'llama1/7b',
    dict(vocab_size='vocab_size', hidden_size='d_model', intermediate_size='d_ff',
         num_attention_heads='n_heads', head_dim='d_head', num_hidden_layers='dec_layers',
         rms_norm_eps='norm_eps', max_position_embeddings='max_length',
         rope_theta='rope_theta', tie_word_embeddings='tied', initializer_range='init_std',
         bos_token_id='start_id', eos_token_id='eos_id'),
    _llama_fields,
    dict(model_type='llama', hidden_act='silu', attention_bias=False, mlp_bias=False),
    other_keys=_llama_keys, canonical=_prefixed('model.', 'lm_head'),
    aliases=lambda c: {'lm_head.weight': 'model.embed_tokens.weight'} if c.tied else {},
    ignore=(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',))


# -- BERT ---------------------------------------------------------------------------------------


def _bert_name(name: str) -> str:
  name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
  name = re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)
  return _prefixed('bert.', 'cls.', 'classifier.')(name)


def _bert_fields(config, shapes):
  _require(config, position_embedding_type='absolute', is_decoder=False, add_cross_attention=False)
  names = {_bert_name(n) for n in shapes}
  mlm = 'cls.predictions.transform.dense.weight' in names
  classes = shapes['classifier.weight'][0] if 'classifier.weight' in shapes else 0
  return dict(
      eos_id=1, logit_bias=mlm, mlm_head=mlm, pooler='bert.pooler.dense.weight' in names,
      nsp='cls.seq_relationship.weight' in names, classes=classes,
      pool='pooler' if classes else 'mean')


def _bert_keys(c):
  if c.classes and c.pool != 'pooler':
    raise UsageError("BertForSequenceClassification needs model.pool='pooler', this model has "
                     f'{c.pool!r}')
  return {'num_labels': c.classes} if c.classes else {}


BERT = Format(
    hf_tensors.bert, 'bert/base',
    dict(vocab_size='vocab_size', hidden_size='d_model', intermediate_size='d_ff',
         num_attention_heads='n_heads', num_hidden_layers='enc_layers',
         layer_norm_eps='norm_eps', type_vocab_size='types',
         max_position_embeddings='max_length', attention_probs_dropout_prob='dropout',
         hidden_dropout_prob='dropout', initializer_range='init_std', pad_token_id='pad_id'),
    _bert_fields, dict(model_type='bert', position_embedding_type='absolute'),
    act='hidden_act', other_keys=_bert_keys, canonical=_bert_name,
    aliases=lambda c: {
        'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'} if c.mlm_head else {},
    ignore=(r'bert\.embeddings\.(position_ids|token_type_ids)',))


# -- choosing one -------------------------------------------------------------------------------

FORMATS = {'t5': T5, 'mt5': T5, 'umt5': T5, 'longt5': T5, 'switch_transformers': T5, 'bart': BART,
           'gpt2': GPT2, 'llama': LLAMA, 'bert': BERT}
CLASSES = {'t5': 'T5ForConditionalGeneration', 'mt5': 'MT5ForConditionalGeneration',
           'umt5': 'UMT5ForConditionalGeneration', 'longt5': 'LongT5ForConditionalGeneration',
           'switch_transformers': 'SwitchTransformersForConditionalGeneration',
           'bart': 'BartForConditionalGeneration', 'gpt2': 'GPT2LMHeadModel',
           'llama': 'LlamaForCausalLM'}
# (kind, positions) of a model: the one architecture that can match it, if the other fields do too.
CANDIDATES = {
    ('encoder_decoder', 'relative'): T5, ('encoder_decoder', 'learned'): BART,
    ('decoder', 'learned'): GPT2, ('decoder', 'rope'): LLAMA, ('encoder', 'learned'): BERT}
# Fields that need not survive the way through config.json: they do not change what is computed
# there (init_std, remat), or are compared or carried elsewhere (n_kv_heads, eos_id).
FREE = {'remat', 'dtype', 'init_std', 'max_length', 'capacity_factor', 'eval_capacity_factor',
        'dropout', 'n_kv_heads', 'local_radius', 'global_block', 'start_id', 'eos_id', 'pool'}


def class_name(c: TransformerConfig, model_type: str) -> str:
  """Returns the class of transformers for c; of BERT's, the one that has exactly its heads."""
  if c.kind != 'encoder':
    return CLASSES[model_type]
  if c.classes:
    return 'BertForSequenceClassification'
  if not c.mlm_head:
    return 'BertModel'
  return 'BertForPreTraining' if c.nsp else 'BertForMaskedLM'


def read_config(config: Mapping, reader) -> tuple[Format, TransformerConfig, RenamedReader]:
  """Returns the format, our config and the reader with canonical names, from a config.json.

  UsageError for an architecture that is not in FORMATS, a missing key or an unsupported value.
  """
  kind = config.get('model_type')
  if not isinstance(kind, str) or kind not in FORMATS:
    raise UsageError(f'config.json: model_type {kind!r} is unknown.'
                     f'{did_you_mean(str(kind), FORMATS)}')
  _check_head(config, kind)
  format_ = FORMATS[kind]
  try:
    c = TransformerConfig(**format_.fields(config, reader.shapes()))
  except KeyError as e:
    raise UsageError(f'config.json lacks {e}, which a {kind} config has') from e
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
    raise UsageError(f'config.json is not a {kind} config: {e}') from e
  _check_values(c, kind, len(reader.shapes()))
  reader = RenamedReader(reader, format_.canonical, format_.aliases(c))
  return format_, c, reader


# The heads that end the names of transformers' classes and that no model here has.
HEADS = ('ForTokenClassification', 'ForQuestionAnswering', 'ForMultipleChoice',
         'ForSequenceClassification', 'DoubleHeadsModel')


def _check_head(config: Mapping, kind: str) -> None:
  """UsageError if the class that wrote the checkpoint has a head that its tensors would not show.

  A token classifier has the tensors of a sequence classifier.
  """
  architectures = config.get('architectures') or []
  if not isinstance(architectures, list):
    raise UsageError(f'config.json: architectures must be a list, got {architectures!r}')
  for name in map(str, architectures):
    if name.endswith(HEADS) and name != 'BertForSequenceClassification':
      known = 'BertForSequenceClassification' if kind == 'bert' else CLASSES[kind]
      raise UsageError(f'config.json: the head of {name} is not supported; of {kind} models with a '
                       f'head, {known} is')


def read_labels(config: Mapping, classes: int) -> tuple[str, ...]:
  """Returns the names of the classes in id2label; () if it has none but transformers' own."""
  id2label = config.get('id2label') or {}
  defaults = {str(i): f'LABEL_{i}' for i in range(classes)}
  if not id2label or id2label == defaults:
    return ()
  if not isinstance(id2label, Mapping) or id2label.keys() != defaults.keys() or not all(
      isinstance(name, str) for name in id2label.values()):
    raise UsageError(f'config.json: id2label must name the {classes} classes by the keys "0" to '
                     f'"{classes - 1}", got {id2label!r}')
  return tuple(id2label[key] for key in defaults)


def label_keys(settings) -> dict:
  """Returns the keys of config.json for the eval section of a classifier's config."""
  keys = {}
  if settings.labels:
    keys['id2label'] = {str(i): name for i, name in enumerate(settings.labels)}
    keys['label2id'] = {name: i for i, name in enumerate(settings.labels)}
  if settings.problem_type:
    keys['problem_type'] = settings.problem_type
  return keys


def _check_values(c: TransformerConfig, kind: str, tensors: int) -> None:
  """UsageError for a field of the wrong type or out of range, and for more layers than tensors."""
  wrong = f'config.json is not a {kind} config:'
  for field in dataclasses.fields(c):
    value, needed = getattr(c, field.name), type(field.default)
    accepted = (int, float) if needed is float else needed
    is_unexpected_bool = isinstance(value, bool) and needed is not bool
    if is_unexpected_bool or not isinstance(value, accepted):
      raise UsageError(f'{wrong} model.{field.name} must be of type {needed.__name__}, got '
                       f'{value!r}')
    if needed is int and abs(value) >= 2**31:
      raise UsageError(f'{wrong} model.{field.name} must be less than 2**31, got {value}')
  for name in ('vocab_size', 'd_model', 'd_ff', 'n_heads', 'd_head', 'local_radius',
               'global_block'):
    if getattr(c, name) < 1:
      raise UsageError(f'{wrong} model.{name} must be at least 1, got {getattr(c, name)}')
  for name in ('n_kv_heads', 'max_length', 'types'):
    if getattr(c, name) < 0:
      raise UsageError(f'{wrong} model.{name} must be at least 0, got {getattr(c, name)}')
  if not 0 < c.norm_eps < 1:
    raise UsageError(f'{wrong} model.norm_eps must be between 0 and 1, got {c.norm_eps}')
  # Before anything is listed for each layer.
  for name in ('enc_layers', 'dec_layers', 'experts'):
    if getattr(c, name) > tensors:
      raise UsageError(f'{wrong} model.{name}={getattr(c, name):,}, but the checkpoint has only '
                       f'{tensors:,} tensors')


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
