"""BERT, RoBERTa (XLM-R and CamemBERT are its sizes) and DistilBERT, with or without their heads.

Each bare model's tensors may lack the model's prefix. The masked-token head, the pooler and the
classifier are read if their tensors exist.
"""

import re

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.formats.format import Format, integer, prefixed, require
from t5lab.tools.interop.tensor_map import TRANSPOSE, TensorRow, module_rows

EMBEDDINGS = {'embedding': 'word_embeddings', 'encoder/positions': 'position_embeddings',
              'encoder/types': 'token_type_embeddings'}
LAYER = {
    'attn/q': 'attention.self.query', 'attn/k': 'attention.self.key',
    'attn/v': 'attention.self.value', 'attn/o': 'attention.output.dense',
    'attn_norm': 'attention.output.LayerNorm', 'mlp/wi_0': 'intermediate.dense',
    'mlp/wo': 'output.dense', 'mlp_norm': 'output.LayerNorm'}
HEADS = {'bert': {'pooler': 'bert.pooler.dense', 'mlm_dense': 'cls.predictions.transform.dense',
                  'mlm_norm': 'cls.predictions.transform.LayerNorm',
                  'logit_bias': 'cls.predictions.bias', 'nsp': 'cls.seq_relationship',
                  'decoder': 'cls.predictions.decoder', 'classifier': 'classifier'},
         'roberta': {'pooler': 'roberta.pooler.dense', 'mlm_dense': 'lm_head.dense',
                     'mlm_norm': 'lm_head.layer_norm', 'logit_bias': 'lm_head.bias',
                     'decoder': 'lm_head.decoder', 'classifier': 'classifier.out_proj'},
         'distilbert': {'pooler': 'pre_classifier', 'mlm_dense': 'vocab_transform',
                        'mlm_norm': 'vocab_layer_norm', 'logit_bias': 'vocab_projector.bias',
                        'decoder': 'vocab_projector', 'classifier': 'classifier'}}
DISTILBERT_LAYER = {
    'attn/q': 'attention.q_lin', 'attn/k': 'attention.k_lin', 'attn/v': 'attention.v_lin',
    'attn/o': 'attention.out_lin', 'attn_norm': 'sa_layer_norm', 'mlp/wi_0': 'ffn.lin1',
    'mlp/wo': 'ffn.lin2', 'mlp_norm': 'output_layer_norm'}


# What has a class, by the end of the name of transformers' class.
CLASS_OF = {'ForSequenceClassification': 'input', 'ForTokenClassification': 'token',
            'ForQuestionAnswering': 'span'}


def _heads(kind: str, class_of: str) -> dict[str, str]:
  """Returns {our path: their name} of a model whose classes are of class_of; '': none."""
  if class_of == 'span':
    return HEADS[kind] | {'classifier': 'qa_outputs'}
  if class_of == 'token':
    return HEADS[kind] | {'classifier': 'classifier'}
  if kind == 'roberta' and class_of == 'input':      # its classifier has a dense layer of its own
    return HEADS[kind] | {'pooler': 'classifier.dense'}
  return HEADS[kind]


def _class_of(config) -> str:
  """Returns class_of by the class that wrote the checkpoint; '' if it has no classifier."""
  for name in config.get('architectures') or ():
    for end, class_of in CLASS_OF.items():
      if str(name).endswith(end):
        return class_of
  return ''


def _tensor_rows(kind: str):
  def rows_of(c: TransformerConfig) -> list[TensorRow]:
    embeddings = f'{kind}.embeddings'
    rows = [TensorRow(ours, f'{embeddings}.{theirs}.weight')
            for ours, theirs in EMBEDDINGS.items() if c.types or ours != 'encoder/types']
    rows += module_rows('encoder/', f'{embeddings}.', {'embed_norm': 'LayerNorm'})
    layers, modules = 'encoder.layer', LAYER
    if kind == 'distilbert':
      layers, modules = 'transformer.layer', DISTILBERT_LAYER
    for i in range(c.enc_layers):
      rows += module_rows('encoder/layers/', f'{kind}.{layers}.{i}.', modules, i)

    heads = _heads(kind, c.class_of if c.classes else '')
    used = ['pooler'] * c.pooler + ['mlm_dense', 'mlm_norm'] * c.mlm_head + ['nsp'] * c.nsp
    used += ['classifier'] * (c.classes > 0)
    rows += module_rows('', '', {name: heads[name] for name in used})
    if not c.tied:
      rows.append(TensorRow('logits/kernel', f'{heads["decoder"]}.weight', op=TRANSPOSE))
    if c.logit_bias:        # untied, the matrix has the bias, and nothing reads the other one
      name = heads['logit_bias'] if c.tied else f'{heads["decoder"]}.bias'
      rows.append(TensorRow('logit_bias', name))
    return rows
  return rows_of


def _name(kind: str):
  """Returns the function from a stored name to the canonical one."""
  others = {name.split('.')[0] + '.' for name in HEADS[kind].values()} - {f'{kind}.'}
  others |= {'qa_outputs.'}
  add_prefix = prefixed(f'{kind}.', *sorted(others))

  def name_of(name: str) -> str:
    name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
    return add_prefix(re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name))
  return name_of


def _head_fields(kind: str, config, shapes) -> dict:
  """Returns the fields that the tensors decide, whether the softmax matrix is tied among them;
  without `architectures` a classifier is of inputs.
  """
  names = {_name(kind)(name): shape for name, shape in shapes.items()}
  class_of = _class_of(config)
  classifier = names.get(f'{_heads(kind, class_of)["classifier"]}.weight')
  if class_of and not classifier:
    raise UsageError(f'config.json: architectures={config["architectures"]}, but the checkpoint '
                     f'has no {_heads(kind, class_of)["classifier"]}.weight')
  class_of = class_of or 'input'
  heads = _heads(kind, class_of if classifier else '')
  has = lambda head: f'{heads[head]}.weight' in names
  return dict(
      logit_bias=has('mlm_dense'), mlm_head=has('mlm_dense'), pooler=has('pooler'),
      nsp='nsp' in heads and has('nsp'), classes=classifier[0] if classifier else 0,
      class_of=class_of if classifier else 'input',
      pool='pooler' if classifier and class_of == 'input' else 'mean',
      tied=config.get('tie_word_embeddings', True) or not has('mlm_dense'))


def _bert_fields(config, shapes):
  require(config, position_embedding_type='absolute', is_decoder=False, add_cross_attention=False)
  return dict(_head_fields('bert', config, shapes), eos_id=1)


def _roberta_fields(config, shapes):
  require(config, position_embedding_type='absolute', is_decoder=False, add_cross_attention=False)
  pad = integer(config, 'pad_token_id', 1)
  fields = dict(pad_id=pad, position_offset=pad + 1,
                max_length=config['max_position_embeddings'] - pad - 1)
  return _head_fields('roberta', config, shapes) | fields


def _distilbert_fields(config, shapes):
  return dict(_head_fields('distilbert', config, shapes), types=0, eos_id=1)


def _label_keys(c):
  if c.classes and c.class_of == 'input' and c.pool != 'pooler':
    raise UsageError("BertForSequenceClassification needs model.pool='pooler', this model has "
                     f'{c.pool!r}')
  return {'num_labels': c.classes} if c.classes and c.class_of != 'span' else {}


def _roberta_keys(c):
  return dict(_label_keys(c), max_position_embeddings=c.max_length + c.position_offset)


CLASSES = {'bert': 'Bert', 'roberta': 'Roberta', 'xlm-roberta': 'XLMRoberta',
           'camembert': 'Camembert', 'distilbert': 'DistilBert'}


def _class_name(c, model_type):
  """Returns the class that has exactly the heads of c."""
  if c.classes:
    head = next(end for end, class_of in CLASS_OF.items() if class_of == c.class_of)
  elif not c.mlm_head:
    head = 'Model'
  else:
    head = 'ForPreTraining' if c.nsp else 'ForMaskedLM'
  return CLASSES[model_type] + head


def _format(kind: str, family: str, fields, **others) -> Format:
  def aliases(c):
    if not c.mlm_head or not c.tied:
      return {}
    decoder, bias = HEADS[kind]['decoder'], HEADS[kind]['logit_bias']
    table = f'{kind}.embeddings.word_embeddings.weight'
    return {f'{decoder}.weight': table} | (
        {f'{decoder}.bias': bias} if bias != f'{decoder}.bias' else {})

  keys = dict(vocab_size='vocab_size', hidden_size='d_model', intermediate_size='d_ff',
              num_attention_heads='n_heads', num_hidden_layers='enc_layers',
              layer_norm_eps='norm_eps', type_vocab_size='types',
              max_position_embeddings='max_length', attention_probs_dropout_prob='dropout',
              hidden_dropout_prob='dropout', initializer_range='init_std', pad_token_id='pad_id',
              tie_word_embeddings='tied')
  settings = dict(keys=keys, act='hidden_act', other_keys=_label_keys,
                  constants=dict(model_type=kind, position_embedding_type='absolute')) | others
  return Format(
      tensor_rows=_tensor_rows(kind), family=family, other_fields=fields, class_name=_class_name,
      canonical=_name(kind), aliases=aliases,
      ignore=(rf'{kind}\.embeddings\.(position_ids|token_type_ids)',), **settings)


BERT = _format('bert', 'bert/base', _bert_fields)
ROBERTA = _format('roberta', 'roberta/base', _roberta_fields, other_keys=_roberta_keys,
                  defaults={'norm_eps': 1e-12})
DISTILBERT = _format(
    'distilbert', 'distilbert/base', _distilbert_fields, act='activation',
    keys=dict(vocab_size='vocab_size', dim='d_model', hidden_dim='d_ff', n_heads='n_heads',
              n_layers='enc_layers', max_position_embeddings='max_length', dropout='dropout',
              initializer_range='init_std', pad_token_id='pad_id', tie_word_embeddings='tied'),
    constants=dict(model_type='distilbert'))
