"""Tiny random Hugging Face models of every architecture that t5lab converts."""

import functools
import json

import pytest

# Skips the tests that import this module where Hugging Face's code is not installed.
torch = pytest.importorskip('torch')
hf = pytest.importorskip('transformers')
hf.utils.logging.disable_progress_bar()     # tests compare what is printed

_T5 = dict(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2,
           num_heads=4, dropout_rate=0., decoder_start_token_id=0)
_GATED = dict(_T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False)
_LLAMA = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
_ROPE = dict(rope_type='llama3', rope_theta=10000., factor=8., low_freq_factor=1.,
             high_freq_factor=4., original_max_position_embeddings=16)
_BERT = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=32)
_BART = dict(vocab_size=48, d_model=32, encoder_layers=2, decoder_layers=3, dropout=0.,
             encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
             decoder_ffn_dim=64, max_position_embeddings=32, forced_eos_token_id=None)

MODELS = {
    't5_1_0': lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    't5_1_1': lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_GATED)),
    'mt5': lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**_GATED)),
    'umt5': lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**_GATED)),
    'longt5_local': lambda: hf.LongT5ForConditionalGeneration(hf.LongT5Config(
        **_T5, encoder_attention_type='local', local_radius=3)),
    'longt5_tglobal': lambda: hf.LongT5ForConditionalGeneration(hf.LongT5Config(
        **_T5, encoder_attention_type='transient-global', local_radius=3, global_block_size=4)),
    'bart': lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    'gpt2': lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=47,
        eos_token_id=47)),
    'llama': lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, rope_parameters=_ROPE)),
    'llama_tied': lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    'bert': lambda: hf.BertForPreTraining(hf.BertConfig(**_BERT)),
    'bert_mlm': lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    'bert_bare': lambda: hf.BertModel(hf.BertConfig(**_BERT)),
    'bert_classifier': lambda: hf.BertForSequenceClassification(hf.BertConfig(
        **_BERT, num_labels=3)),
}


UNTIED = ('t5_1_1', 'mt5', 'umt5')


@functools.cache
def model(name: str):
  """Returns the model with random weights, none of them 0 or 1, so that a lost tensor shows."""
  torch.manual_seed(sum(map(ord, name)))
  out = MODELS[name]().eval()
  with torch.no_grad():
    for key, p in out.named_parameters():
      std = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
      ones = p.ndim == 1 and key.endswith('weight') and float(p.mean()) > 0.5
      p.copy_(torch.randn_like(p) * std + ones)
    if hasattr(out, 'final_logits_bias'):
      out.final_logits_bias.normal_()
    if name in UNTIED:               # transformers 5 ties it on construction, T5 1.1 does not
      out.lm_head.weight = torch.nn.Parameter(
          torch.randn_like(out.lm_head.weight) * out.lm_head.weight.shape[-1] ** -0.5)
  return out


def save(name: str, folder, **kwargs) -> None:
  """Writes the Hugging Face directory of a model."""
  model(name).save_pretrained(str(folder), **kwargs)
  if name in UNTIED:                 # like the released config.json; transformers 5 rewrites it
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, 'tie_word_embeddings': False}))
