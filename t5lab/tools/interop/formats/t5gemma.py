"""T5Gemma, two stacks of Gemma 2, and T5Gemma 2, two of Gemma 3, of which text alone is read."""

from t5lab.errors import UsageError
from t5lab.tools.interop.formats import llama
from t5lab.tools.interop.formats.format import Format, integer, prefixed, require
from t5lab.tools.interop.tensor_map import TRANSPOSE, TensorRow, module_rows


def _rows(c):
  """The rows of both: T5Gemma 2 has one table of embeddings and no cross-attention of its own."""
  rows = [TensorRow('embedding', 'model.encoder.embed_tokens.weight')]
  if not c.shared_embedding:
    rows.append(TensorRow('target_embedding', 'model.decoder.embed_tokens.weight'))
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.out_proj.weight', op=TRANSPOSE))
  norms = {}
  for ours, theirs in (('attn', 'self_attn'), ('mlp', 'feedforward')):
    norms |= {f'{ours}_norm': f'pre_{theirs}_layernorm',
              f'{ours}_output_norm': f'post_{theirs}_layernorm'}
  cross = {f'cross/{p}': f'cross_attn.{p}_proj' for p in 'qkvo'} | {
      'cross_norm': 'pre_cross_attn_layernorm', 'cross_output_norm': 'post_cross_attn_layernorm'}
  for stack, layers in (('encoder', c.enc_layers), ('decoder', c.dec_layers)):
    rows.append(TensorRow(f'{stack}/norm/scale', f'model.{stack}.norm.weight'))
    for i in range(layers):
      path, name = f'{stack}/layers/', f'model.{stack}.layers.{i}.'
      rows += llama.layer_rows(c, path, name, norms, i)
      if stack == 'decoder' and not c.merged_attention:
        rows += module_rows(path, name, cross, i, bias=False)
  return rows


def _fields(config, shapes):
  """Both stacks are configs of Gemma 2, which must have one width."""
  require(config, is_encoder_decoder=True)
  declared = {'tie_word_embeddings': config.get('tie_word_embeddings', True)}
  encoder, decoder = (llama.GEMMA2.fields({**config[name], **declared}, {})
                      for name in ('encoder', 'decoder'))
  _check_alike(encoder, decoder)
  require(config['decoder'], attention_bias=False)
  return dict(decoder, enc_layers=encoder['dec_layers'], shared_embedding=False,
              pad_id=integer(config['encoder'], 'pad_token_id', 0))


def _check_alike(encoder: dict, decoder: dict) -> None:
  """UsageError unless both stacks have the same fields."""
  free = ('dec_layers', 'logit_softcap', 'start_id', 'eos_id', 'max_length', 'init_std', 'dropout')
  unlike = [name for name in decoder if name not in free and encoder[name] != decoder[name]]
  if unlike:
    field = unlike[0]
    raise UsageError(f'config.json: the encoder has {field}={encoder[field]!r}, the decoder '
                     f'{decoder[field]!r}; both stacks must be equal (an unbalanced T5Gemma is not '
                     'supported)')


def _keys(c):
  stack = llama.GEMMA2.config(c) | dict(cross_attention_hidden_size=None, pad_token_id=c.pad_id)
  del stack['architectures'], stack['model_type']
  types = {name: llama.layer_types(c, layers) for name, layers in (('encoder', c.enc_layers),
                                                             ('decoder', c.dec_layers))}
  encoder = dict(stack, num_hidden_layers=c.enc_layers, layer_types=types['encoder'])
  decoder = dict(stack, num_hidden_layers=c.dec_layers, layer_types=types['decoder'],
                 is_decoder=True, cross_attention_hidden_size=c.d_model)
  return dict(encoder=encoder, decoder=decoder, tie_word_embeddings=c.tied, vocab_size=c.vocab_size)


def _second_fields(config, shapes):
  """Both stacks are configs of Gemma 3; that of the encoder is beside an image encoder's."""
  require(config, is_encoder_decoder=True)
  tied = {'tie_word_embeddings': config.get('tie_word_embeddings', True)}
  encoder = llama.GEMMA3.fields({**config['encoder']['text_config'], **tied}, {})
  decoder = llama.GEMMA3.fields({**config['decoder'], **tied}, {})
  _check_alike(encoder, decoder)
  return dict(decoder, enc_layers=encoder['dec_layers'], merged_attention=True,
              encoder_window='total',
              pad_id=integer(config['encoder']['text_config'], 'pad_token_id', 0))


def _second_keys(c):
  raise UsageError('a T5Gemma 2 cannot be written for Hugging Face: its class there has an image '
                   'encoder')


def _name_there(name: str) -> str:
  """Returns the name of a tensor inside transformers' class, which is not the one in its files."""
  start = 'model.encoder.'
  is_text = name.startswith((f'{start}layers.', f'{start}norm.', f'{start}embed_tokens.'))
  return name.replace(start, f'{start}text_model.') if is_text else name


_with_prefix = prefixed('model.', 'lm_head')

T5GEMMA2 = Format(
    _rows, 't5gemma2/270m_270m', {}, _second_fields,
    dict(model_type='t5gemma2', is_encoder_decoder=True),
    lambda c, kind: 'T5Gemma2ForConditionalGeneration', other_keys=_second_keys,
    canonical=lambda name: _with_prefix(name).replace('encoder.text_model.', 'encoder.'),
    reference_name=_name_there,
    aliases=lambda c: dict.fromkeys(
        ('model.decoder.embed_tokens.weight', *(['lm_head.out_proj.weight'] if c.tied else [])),
        'model.encoder.embed_tokens.weight'),
    # Images, and the embedding of the token that ends one.
    ignore=(r'model\.encoder\.(vision_tower|multi_modal_projector)\..*',
            r'model\.(en|de)coder\.embed_tokens\.eoi_embedding'))


T5GEMMA = Format(
    _rows, 't5gemma/2b_2b', {}, _fields,
    dict(model_type='t5gemma', is_encoder_decoder=True),
    lambda c, kind: 'T5GemmaForConditionalGeneration', other_keys=_keys, canonical=_with_prefix,
    aliases=lambda c: (
        {'lm_head.out_proj.weight': 'model.decoder.embed_tokens.weight'} if c.tied else {}))
