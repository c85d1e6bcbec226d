"""Every Hugging Face architecture, live: our code on its tensors against its own code."""

import dataclasses
import json

import flax.linen as nn
from hf_models import MODELS, model, save
import jax
import numpy as np
import pytest
import torch

from t5lab import trees
from t5lab.decoding.engine import Decoding, Engine
from t5lab.models.cache import decoding
from t5lab.models.transformer import Transformer
from t5lab.programs import loading as weights
from t5lab.tools.interop import golden, hf, rows, tensor_files

ENCODER = np.array([[5, 7, 9, 11, 13, 6, 8, 17, 2, 3, 19, 33, 41, 29, 23, 4, 45, 12, 10, 1, 40],
                    [6, 8, 10, 4, 12, 31, 37, 26, 1, 9, 14, 15, 16, 18, 0, 0, 0, 0, 0, 0, 0]])
DECODER = np.array([[0, 20, 21, 22, 1, 9, 14], [0, 30, 31, 7, 5, 11, 39]])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = {}

  def get(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp(name)
      save(name, made[name])
    return made[name]
  return get


def ours(path):
  """(config, parameters, format, reader) as convert reads them."""
  config = json.loads((path / 'config.json').read_text())
  format_, c, reader = hf.read_config(config, tensor_files.open_hf(path))
  params = rows.read(format_.rows(c), reader, weights.abstract_params(c), ignore=format_.ignore)
  return c, params, format_, reader


def batch(c):
  encoder = np.where(ENCODER == 0, c.pad_id, np.where(ENCODER == c.pad_id, 25, ENCODER))
  found = {'encoder_input_tokens': encoder} if c.enc_layers else {}
  if c.types:
    found['encoder_token_types'] = np.tile(np.arange(21) > 9, (2, 1)).astype(np.int32)
  return {**found, 'decoder_input_tokens': DECODER} if c.dec_layers else found


def theirs(name, c, given):
  tensor = lambda x: torch.tensor(np.asarray(x, np.int64))
  kwargs = {}
  if c.enc_layers:
    tokens = given['encoder_input_tokens']
    kwargs = dict(input_ids=tensor(tokens), attention_mask=tensor(tokens != c.pad_id))
    if c.types:
      kwargs['token_type_ids'] = tensor(given['encoder_token_types'])
  if c.dec_layers:
    kwargs['decoder_input_ids' if c.enc_layers else 'input_ids'] = tensor(DECODER)
  with torch.no_grad():
    return model(name)(**kwargs)


@pytest.mark.parametrize('name', MODELS)
def test_logits_and_round_trip(name, folder):
  c, params, format_, reader = ours(folder(name))
  given = batch(c)
  method = 'hidden' if name == 'bert_bare' else '__call__'
  run = jax.jit(Transformer(c).apply, static_argnames='method')
  got = np.asarray(run({'params': params}, given, method=method))
  out = theirs(name, c, given)
  field = {'bert': 'prediction_logits', 'bert_bare': 'last_hidden_state'}.get(name, 'logits')
  want = getattr(out, field).numpy()
  if name == 'bert_classifier':
    got = got[:, 0]
  elif c.kind == 'encoder':
    real = given['encoder_input_tokens'] != c.pad_id
    got, want = got[real], want[real]
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-5)
  if name == 'bert':
    nsp = run({'params': params}, given, method='next_sentence')
    np.testing.assert_allclose(nsp, out.seq_relationship_logits.numpy(), atol=1e-5)
  back = dict(rows.write(hf.for_config(c).rows(c), params))
  assert back.keys() == reader.shapes().keys() - {
      n for n in reader.shapes() if trees.fits(n, format_.ignore)}
  for tensor in back:
    assert np.array_equal(back[tensor], reader.read(tensor)), tensor
  assert {n: x.shape for n, x in back.items()} == rows.specs(format_.rows(c), params)
  fields = dataclasses.asdict(c)
  again = hf.for_config(c)
  written = again.fields(again.config(c), reader.shapes())
  assert {k: v for k, v in written.items() if fields[k] != v} in ({}, {'n_kv_heads': c.kv_heads})


def generate(name, c, params, beams=1, length=9, alpha=1.):
  alone = c.kind == 'decoder'
  start, step, prefill = decoding(c)
  engine = Engine(start, step, prefill if alone else None, eos=c.eos_id,
                  begin=None if alone else c.start_id, batch_size=2)
  given = batch(c)
  requests = [row for row in DECODER] if alone else [
      row[row != c.pad_id] for row in given['encoder_input_tokens']]
  got = engine.generate(params, requests, Decoding(length=length, beams=beams, alpha=alpha))
  with torch.no_grad():
    tensor = lambda x: torch.tensor(np.asarray(x, np.int64))
    inputs = given['decoder_input_tokens' if alone else 'encoder_input_tokens']
    kwargs = {} if alone else dict(decoder_start_token_id=c.start_id)
    want = model(name).generate(
        input_ids=tensor(inputs), max_new_tokens=length, num_beams=beams, do_sample=False,
        attention_mask=tensor(np.ones_like(inputs) if alone else inputs != c.pad_id),
        eos_token_id=c.eos_id, pad_token_id=0, length_penalty=0., early_stopping='never', **kwargs)
  want = want.numpy()[:, inputs.shape[1] if alone else 1:]
  want = np.pad(want, [(0, 0), (0, length - want.shape[1])])
  ended = np.cumsum(want == c.eos_id, axis=1) - (want == c.eos_id) > 0
  return got, np.where(ended, 0, want)            # beams of theirs are padded with the end


@pytest.mark.parametrize('name', [n for n in MODELS if 'bert' not in n])
def test_greedy_decoding(name, folder):
  c, params, _, _ = ours(folder(name))
  got, want = generate(name, c, params)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', ['t5_1_0', 't5_1_1'])
def test_beam_search(name, folder):
  """Their score is log p / length ** penalty, ours log p / ((5 + length) / 6) ** alpha: at 0 both
  are log p."""
  c, params, _, _ = ours(folder(name))
  got, want = generate(name, c, params, beams=4, alpha=0.)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', golden.CONFIGS)
def test_golden_vectors(name):
  assert golden.difference(name) < 5e-6
  assert golden.name_of(golden.config(name)) == name


def test_another_formula_misses_the_golden_vectors(monkeypatch):
  """As the two forms of gelu, which differ by 3e-4 at most."""
  family, changes = golden.CONFIGS['gpt2']
  monkeypatch.setitem(golden.CONFIGS, 'gpt2', (family, {**changes, 'acts': ('gelu_erf',)}))
  assert golden.difference('gpt2') > 1e-5


def test_switch_transformer_of_hugging_face():
  """Read only: its capacity counts tokens. Nothing is dropped here."""
  import transformers as T
  torch.manual_seed(0)
  theirs = T.SwitchTransformersForConditionalGeneration(T.SwitchTransformersConfig(
      vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=4, num_heads=4,
      dropout_rate=0., num_experts=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
      decoder_start_token_id=0)).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1))

  class State:
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    def shapes(self):
      return {k: v.shape for k, v in self.tensors.items()}
    def read(self, name):
      return self.tensors[name]
  format_, c, reader = hf.read_config(theirs.config.to_dict(), State())
  given = batch(c)
  boxed = jax.eval_shape(Transformer(c).init, jax.random.key(0), given)['params']
  params = rows.read(format_.rows(c), reader, nn.unbox(boxed))
  got = np.asarray(jax.jit(Transformer(c).apply)({'params': params}, given))
  with torch.no_grad():
    want = theirs(input_ids=torch.tensor(given['encoder_input_tokens']),
                  attention_mask=torch.tensor(given['encoder_input_tokens'] != 0).long(),
                  decoder_input_ids=torch.tensor(DECODER)).logits.numpy()
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
