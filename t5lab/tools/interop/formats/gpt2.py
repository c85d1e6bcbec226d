"""GPT-2 and GPT-3's architecture."""

from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.formats.format import Format, integer, prefixed, require
from t5lab.tools.interop.tensor_map import COPY, TRANSPOSE, TensorRow, module_rows


def tensor_rows(c: TransformerConfig) -> list[TensorRow]:
  rows = [TensorRow('embedding', 'transformer.wte.weight'),
          TensorRow('decoder/positions', 'transformer.wpe.weight'),
          *module_rows('decoder/', 'transformer.', {'norm': 'ln_f'})]
  if not c.tied:
    rows.append(TensorRow('logits/kernel', 'lm_head.weight', op=TRANSPOSE))
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


def _gpt2_fields(config, shapes):
  require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
           add_cross_attention=False)
  eos_id = integer(config, 'eos_token_id', 0)
  return dict(d_ff=integer(config, 'n_inner', 4 * config['n_embd']), eos_id=eos_id,
              start_id=integer(config, 'bos_token_id', eos_id))


GPT2 = Format(
    tensor_rows, 'gpt2/small',
    dict(vocab_size='vocab_size', n_embd='d_model', n_inner='d_ff', n_head='n_heads',
         n_layer='dec_layers', layer_norm_epsilon='norm_eps', n_positions='max_length',
         embd_pdrop='dropout', attn_pdrop='dropout', resid_pdrop='dropout',
         initializer_range='init_std', bos_token_id='start_id', eos_token_id='eos_id',
         tie_word_embeddings='tied'),
    _gpt2_fields, dict(model_type='gpt2'),
    lambda c, kind: 'GPT2LMHeadModel', act='activation_function',
    canonical=prefixed('transformer.', 'lm_head'),
    aliases=lambda c: {'lm_head.weight': 'transformer.wte.weight'} if c.tied else {},
    ignore=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',))
