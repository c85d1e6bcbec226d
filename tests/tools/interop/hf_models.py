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

# The translation and summarization models with BART's tensors.
for _name, _class, _config, _extra in (
    ('mbart', hf.MBartForConditionalGeneration, hf.MBartConfig, {}),
    ('pegasus', hf.PegasusForConditionalGeneration, hf.PegasusConfig, {}),
    ('m2m100', hf.M2M100ForConditionalGeneration, hf.M2M100Config, {}),
    ('blenderbot', hf.BlenderbotForConditionalGeneration, hf.BlenderbotConfig, {}),
    ('marian', hf.MarianMTModel, hf.MarianConfig, dict(
        activation_function='swish', pad_token_id=47, decoder_start_token_id=47, eos_token_id=0)),
    ('marian_two_tables', hf.MarianMTModel, hf.MarianConfig, dict(
        share_encoder_decoder_embeddings=False, pad_token_id=47, decoder_start_token_id=47,
        eos_token_id=0))):
  MODELS[_name] = functools.partial(
      lambda cls, config, extra: cls(config(**{
          **_BART, 'scale_embedding': True, 'decoder_start_token_id': 2, **extra})),
      _class, _config, _extra)

# Decoders with rotary positions. Windows are shorter than the inputs of the tests.
_SCALINGS = {
    'linear': dict(rope_type='linear', factor=4.),
    'dynamic': dict(rope_type='dynamic', factor=4.),
    'yarn': dict(rope_type='yarn', factor=4., original_max_position_embeddings=16)}
for _name, _scaling in _SCALINGS.items():
  MODELS[f'llama_{_name}'] = functools.partial(
      lambda rope, length: hf.LlamaForCausalLM(hf.LlamaConfig(**{
          **_LLAMA, 'max_position_embeddings': length, 'rope_parameters': rope})),
      dict(_scaling, rope_theta=10000.), 4 if _name == 'dynamic' else 64)
_SLIDING = dict(sliding_window=3, num_hidden_layers=3)
_GEMMA = dict(_LLAMA, **_SLIDING, head_dim=16, query_pre_attn_scalar=10)
_T5GEMMA2 = dict(_GEMMA, layer_types=['sliding_attention', 'sliding_attention', 'full_attention'])
_VISION = dict(model_type='siglip_vision_model', hidden_size=16, intermediate_size=16,
               num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
MODELS.update({
    'llama_bias': lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, attention_bias=True)),
    'mistral': lambda: hf.MistralForCausalLM(hf.MistralConfig(**{
        **_LLAMA, 'head_dim': 16, 'sliding_window': 3})),
    'qwen2': lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**{
        **_LLAMA, **_SLIDING}, use_sliding_window=True, max_window_layers=1, bos_token_id=0,
        eos_token_id=1)),
    'qwen3': lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(
        **_LLAMA, head_dim=16, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)),
    'gemma': lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_LLAMA, head_dim=16)),
    'gemma2': lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**_GEMMA})),
    'gemma3': lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(
        **_GEMMA, layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
        rope_parameters={
            'full_attention': dict(rope_type='linear', factor=8., rope_theta=1e4),
            'sliding_attention': dict(rope_type='default', rope_theta=100.)})),
    't5gemma': lambda: hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(
        encoder=dict(_GEMMA), decoder=dict(_GEMMA, num_hidden_layers=2))),
    't5gemma2': lambda: hf.T5Gemma2ForConditionalGeneration(hf.T5Gemma2Config(
        encoder=dict(text_config=dict(_T5GEMMA2), vision_config=_VISION, mm_tokens_per_image=1,
                     eoi_token_index=46, boi_token_index=45, image_token_index=47),
        decoder=dict(_T5GEMMA2), image_token_index=47)),
    't5_encoder': lambda: hf.T5EncoderModel(hf.T5Config(**_T5)),
    'umt5_encoder': lambda: hf.UMT5EncoderModel(hf.UMT5Config(**_GATED)),
})

# Encoders with BERT's layers.
_ROBERTA = dict(_BERT, type_vocab_size=1, pad_token_id=1)
_DISTILBERT = dict(vocab_size=48, dim=32, hidden_dim=64, n_layers=2, n_heads=4,
                   max_position_embeddings=32)
MODELS.update({
    'roberta': lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ROBERTA)),
    'roberta_tokens': lambda: hf.RobertaForTokenClassification(
        hf.RobertaConfig(**_ROBERTA, num_labels=3)),
    'bert_tokens': lambda: hf.BertForTokenClassification(hf.BertConfig(**_BERT, num_labels=3)),
    'bert_spans': lambda: hf.BertForQuestionAnswering(hf.BertConfig(**_BERT)),
    'distilbert_tokens': lambda: hf.DistilBertForTokenClassification(
        hf.DistilBertConfig(**_DISTILBERT, num_labels=3)),
    'distilbert_spans': lambda: hf.DistilBertForQuestionAnswering(
        hf.DistilBertConfig(**_DISTILBERT)),
    't5_encoder_tokens': lambda: hf.T5ForTokenClassification(hf.T5Config(**_T5, num_labels=3)),
    'roberta_classifier': lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**_ROBERTA, num_labels=3)),
    'xlm_roberta': lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_ROBERTA)),
    'distilbert': lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**_DISTILBERT)),
    'distilbert_classifier': lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(**_DISTILBERT, num_labels=3)),
})


UNTIED = ('t5_1_1', 'mt5', 'umt5')


@functools.cache
def model(name: str):
  """Returns the model with random weights, none of them 0 or 1, so that a lost tensor shows."""
  torch.manual_seed(sum(map(ord, name)))
  out = MODELS[name]().eval()
  with torch.no_grad():
    for key, p in out.named_parameters():
      if not p.requires_grad:            # a table of sinusoids
        continue
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
