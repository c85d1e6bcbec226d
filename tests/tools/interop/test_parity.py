"""Every Hugging Face architecture: our code on its tensors compared with its own code."""

import dataclasses
import functools
import json

import flax.linen as nn
from hf_models import MODELS, model, save
import jax
import numpy as np
import pytest
from small_models import next_sentence
import torch

from t5lab import trees
from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding
from t5lab.errors import UsageError
from t5lab.models import families
from t5lab.models.cache import decoding
from t5lab.models.families import TransformerConfig
from t5lab.models.transformer import Transformer
from t5lab.programs import shapes
from t5lab.tools.interop import golden, hf, tensor_files, tensor_map

ENCODER = np.array([[5, 7, 9, 11, 13, 6, 8, 17, 2, 3, 19, 33, 41, 29, 23, 4, 45, 12, 10, 1, 40],
                    [6, 8, 10, 4, 12, 31, 37, 26, 1, 9, 14, 15, 16, 18, 0, 0, 0, 0, 0, 0, 0]])
DECODER = np.array([[0, 20, 21, 22, 1, 9, 14], [0, 30, 31, 7, 5, 11, 39]])


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """name -> (config, parameters, format, reader), read as convert does."""
  @functools.cache
  def get(name):
    folder = tmp_path_factory.mktemp(name)
    save(name, folder)
    config = json.loads((folder / 'config.json').read_text())
    format_, c, reader = hf.read_config(config, tensor_files.open_hf(folder))
    params = tensor_map.read(format_.tensor_rows(c), reader, shapes.abstract_params(c),
                             ignore=format_.ignore)
    return c, params, format_, reader
  return get


def batch(c):
  encoder = np.where(ENCODER == 0, c.pad_id, np.where(ENCODER == c.pad_id, 25, ENCODER))
  out = {'encoder_input_tokens': encoder} if c.enc_layers else {}
  if c.types > 1:
    out['encoder_token_types'] = np.tile(np.arange(21) > 9, (2, 1)).astype(np.int32)
  if c.dec_layers:
    out['decoder_input_tokens'] = decoder_tokens(c)
  return out


def decoder_tokens(c):
  # M2M100 does not count padding as a position, and the row's 1 would be padding.
  return np.where(DECODER == c.pad_id, 25, DECODER) if c.sinusoids == 'fairseq' else DECODER


def int_tensor(x):
  return torch.tensor(np.asarray(x, np.int64))


def run_transformers(name, c, inputs):
  kwargs = {}
  if c.enc_layers:
    tokens = inputs['encoder_input_tokens']
    kwargs = dict(input_ids=int_tensor(tokens), attention_mask=int_tensor(tokens != c.pad_id))
    if c.types > 1:
      kwargs['token_type_ids'] = int_tensor(inputs['encoder_token_types'])
  if c.dec_layers:
    kwargs['decoder_input_ids' if c.enc_layers else 'input_ids'] = int_tensor(decoder_tokens(c))
  with torch.no_grad():
    return model(name)(**kwargs)


READ_ONLY = ('t5gemma2',)          # what is written there has more than text


@pytest.mark.parametrize('name', MODELS)
def test_logits_and_round_trip(name, converted):
  c, params, format_, reader = converted(name)
  inputs = batch(c)
  headless = c.kind == 'encoder' and not (c.mlm_head or c.classes)
  method = 'hidden' if headless else '__call__'
  run = jax.jit(Transformer(c).apply, static_argnames='method')
  logits = np.asarray(run({'params': params}, inputs, method=method))
  out = run_transformers(name, c, inputs)
  field = 'prediction_logits' if name == 'bert' else 'logits'
  field = 'last_hidden_state' if headless else field
  if c.class_of == 'span':
    expected = torch.stack([out.start_logits, out.end_logits], -1).numpy()
  else:
    expected = getattr(out, field).numpy()
  if c.classes and c.class_of == 'input':
    logits = logits[:, 0]
  elif c.kind == 'encoder':
    real = inputs['encoder_input_tokens'] != c.pad_id
    logits, expected = logits[real], expected[real]
  np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
  if name == 'bert':
    nsp = run({'params': params}, inputs, method=next_sentence)
    np.testing.assert_allclose(nsp, out.seq_relationship_logits.numpy(), atol=1e-5)

  # Every tensor comes back, and so does the config.
  nearest = format_ if name in READ_ONLY else hf.format_for(c)
  back = dict(tensor_map.write(nearest.tensor_rows(c), params))
  assert back.keys() == reader.shapes().keys() - {
      n for n in reader.shapes() if trees.fits(n, format_.ignore)}
  for tensor in back:
    assert np.array_equal(back[tensor], reader.read(tensor)), tensor
  assert {n: x.shape for n, x in back.items()} == tensor_map.shapes(format_.tensor_rows(c), params)
  if name in READ_ONLY:
    return
  fields = dataclasses.asdict(c)
  written = nearest.fields(nearest.config(c), reader.shapes())
  assert {k: v for k, v in written.items() if fields[k] != v} in ({}, {'n_kv_heads': c.kv_heads})


def generate(name, c, params, beams=1, length=9, alpha=1.):
  """Returns the tokens of our engine and of transformers, both padded with 0 after the end."""
  decoder_only = c.kind == 'decoder'
  start, step, prefill = decoding(c)
  engine = Engine(start, step, prefill if decoder_only else None, eos=c.eos_id,
                  start_id=None if decoder_only else c.start_id, batch_size=2)
  inputs = batch(c)['decoder_input_tokens' if decoder_only else 'encoder_input_tokens']
  requests = list(inputs) if decoder_only else [row[row != c.pad_id] for row in inputs]
  tokens = engine.generate(params, requests, Decoding(length=length, beams=beams, alpha=alpha))
  mask = np.ones_like(inputs) if decoder_only else inputs != c.pad_id
  kwargs = {} if decoder_only else dict(decoder_start_token_id=c.start_id)
  with torch.no_grad():
    expected = model(name).generate(
        input_ids=int_tensor(inputs), max_new_tokens=length, num_beams=beams, do_sample=False,
        attention_mask=int_tensor(mask), eos_token_id=c.eos_id, pad_token_id=0,
        length_penalty=0., early_stopping='never', **kwargs)
  expected = expected.numpy()[:, inputs.shape[1] if decoder_only else 1:]
  expected = np.pad(expected, [(0, 0), (0, length - expected.shape[1])])
  is_eos = expected == c.eos_id                   # transformers pads its beams with eos
  return tokens, np.where(np.cumsum(is_eos, axis=1) - is_eos > 0, 0, expected)


def some(names, slow):
  """The names, of which the slow ones repeat a path of the others."""
  return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


# The decoders of LongT5, mT5 and tied LLaMA step like those of the others; T5 1.0's is in
# test_beam_search.
@pytest.mark.parametrize('name', some(
    [n for n in MODELS if 'bert' not in n and 'encoder' not in n],
    slow=('t5_1_0', 'mt5', 'longt5_local', 'longt5_tglobal', 'llama_tied', 'llama_linear',
          'llama_bias', 'llama_yarn', 'blenderbot', 'marian_two_tables', 'pegasus', 'qwen2',
          'gemma')))
def test_greedy_decoding(name, converted):
  c, params, _, _ = converted(name)
  tokens, expected = generate(name, c, params)
  np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize('name', some(
    ['t5_1_0', 't5_1_1', 't5gemma2', 'marian', 'm2m100'], slow=('t5_1_1', 'marian', 'm2m100')))
def test_beam_search(name, converted):
  """With a length penalty of 0: transformers' log p / length ** penalty is then our score too."""
  c, params, _, _ = converted(name)
  tokens, expected = generate(name, c, params, beams=4, alpha=0.)
  np.testing.assert_array_equal(tokens, expected)


ARCHITECTURES = {
    'T5ForConditionalGeneration': 't5_1_0 t5_1_1 t5_1_1_lm flan_t5 mt5 byt5 ul2 tiny',
    'UMT5ForConditionalGeneration': 'umt5',
    'LongT5ForConditionalGeneration': 'longt5_local longt5_tglobal',
    'T5GemmaForConditionalGeneration': 't5gemma',
    'BartForConditionalGeneration': 'bart', 'MBartForConditionalGeneration': 'mbart mbart50',
    'BlenderbotForConditionalGeneration': 'blenderbot', 'MarianMTModel': 'marian',
    'PegasusForConditionalGeneration': 'pegasus', 'M2M100ForConditionalGeneration': 'm2m100 nllb',
    'BertForPreTraining': 'bert', 'BertModel': 'minilm',
    'RobertaForMaskedLM': 'roberta xlm_roberta', 'DistilBertForMaskedLM': 'distilbert',
    'GPT2LMHeadModel': 'gpt2 gpt3', 'LlamaForCausalLM': 'llama1 llama2 llama3 llama3_1 smollm2',
    'MistralForCausalLM': 'mistral', 'Qwen2ForCausalLM': 'qwen2', 'Qwen3ForCausalLM': 'qwen3',
    'GemmaForCausalLM': 'gemma', 'Gemma2ForCausalLM': 'gemma2', 'Gemma3ForCausalLM': 'gemma3'}
REFUSED = {
    'decoder': 'no Hugging Face architecture is known for decoders with relative positions',
    'transformer_2017': "nearest architecture, cannot express norm_eps=1e-06, sinusoids='inter",
    't5gemma2': 'T5GemmaForConditionalGeneration, the nearest architecture, cannot express qk_norm',
    'switch': 'models with experts cannot be written', 'st_moe': 'models with experts cannot be'}


def test_every_family_has_its_architecture_or_is_refused():
  expected = {family: name for name, group in ARCHITECTURES.items() for family in group.split()}
  for row in families.ROWS:
    c, family = TransformerConfig(**families.row(row)), row.split('/')[0]
    if family in REFUSED:
      with pytest.raises(UsageError, match=REFUSED[family]):
        hf.format_for(c)
    else:
      assert hf.format_for(c).config(c)['architectures'] == [expected[family]]


@pytest.mark.parametrize('change, message', [
    (dict(acts=('gelu_erf',)), r"LlamaForCausalLM, .* cannot express acts=\('gelu_erf',\)"),
    (dict(embed_scale=True), 'LlamaForCausalLM, .* cannot express embed_scale=True'),
    (dict(enc_layers=2), 'T5GemmaForConditionalGeneration, .* cannot express sandwich_norm=False')])
def test_rope_alone_does_not_make_a_llama(change, message):
  with pytest.raises(UsageError, match=message):
    hf.format_for(TransformerConfig(**{**families.row('llama3/8b'), **change}))


# test_logits_and_round_trip guards the formulas; test_convert.py reads umt5's vectors.
@pytest.mark.parametrize('name', some(
    golden.CONFIGS, slow=('t5_1_0', 'umt5', 'longt5_local', 'bart', 'llama', 'blenderbot',
                          'marian_big', 'pegasus', 'llama_bias', 'llama_linear', 'qwen2',
                          'gemma')))
def test_golden_vectors(name):
  assert golden.relative_difference(name) < 5e-6
  assert golden.matching_name(golden.config(name)) == name


@pytest.mark.parametrize('name, acts, expected', [
    ('umt5', ('gelu', 'linear'), 'umt5'), ('umt5', ('relu',), None),
    ('longt5_tglobal', ('relu',), None)])
def test_an_encoder_of_t5_has_the_vectors_of_the_whole_or_none(name, acts, expected):
  c = dataclasses.replace(golden.config(name), dec_layers=0, acts=acts)
  assert golden.matching_name(c) == expected


def test_another_formula_misses_the_golden_vectors(monkeypatch):
  """For example the other form of gelu, which differs by 3e-4 at most."""
  family, changes = golden.CONFIGS['gpt2']
  monkeypatch.setitem(golden.CONFIGS, 'gpt2', (family, {**changes, 'acts': ('gelu_erf',)}))
  assert golden.relative_difference('gpt2') > 1e-5


def test_switch_transformer_of_hugging_face():
  """Read only, because its capacity counts tokens; none is dropped here."""
  import transformers
  torch.manual_seed(0)
  switch = transformers.SwitchTransformersForConditionalGeneration(
      transformers.SwitchTransformersConfig(
          vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=4,
          num_heads=4, dropout_rate=0., num_experts=4, num_sparse_encoder_layers=2,
          num_sparse_decoder_layers=2,
          decoder_start_token_id=0)).eval()  # ty: ignore[unknown-argument]
  with torch.no_grad():
    for p in switch.parameters():
      p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1))

  state = tensor_map.TensorReader({k: v.numpy() for k, v in switch.state_dict().items()})
  format_, c, reader = hf.read_config(switch.config.to_dict(), state)
  inputs = batch(c)
  boxed = jax.eval_shape(Transformer(c).init, jax.random.key(0), inputs)['params']
  params = tensor_map.read(format_.tensor_rows(c), reader, nn.unbox(boxed))
  logits = np.asarray(jax.jit(Transformer(c).apply)({'params': params}, inputs))
  with torch.no_grad():
    tokens = int_tensor(inputs['encoder_input_tokens'])
    expected = switch(input_ids=tokens, attention_mask=(tokens != 0).long(),
                      decoder_input_ids=torch.tensor(DECODER)).logits.numpy()
  np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
