"""What transformers 5 writes for every kind of T5, and what version 4 wrote, give one model."""

import itertools
import json

from hf_models import hf, torch
import numpy as np
import pytest

import t5lab
from t5lab.tools.interop import convert

SIZES = dict(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2,
             num_heads=4, dropout_rate=0., decoder_start_token_id=0)
GATED = dict(SIZES, feed_forward_proj='gated-gelu', tie_word_embeddings=False)
BYTES = dict(GATED, vocab_size=384, tokenizer_class='ByT5Tokenizer')
KINDS = {      # class, config, whether its softmax matrix is its own
    't5 1.0': (hf.T5ForConditionalGeneration, hf.T5Config(**SIZES), False),
    't5 1.1': (hf.T5ForConditionalGeneration, hf.T5Config(**GATED), True),
    # tied and not scaled, as T5 1.1 without a matrix of its own
    't5 1.1 tied': (hf.T5ForConditionalGeneration, hf.T5Config(**GATED), False),
    'byt5': (hf.T5ForConditionalGeneration, hf.T5Config(**BYTES), True),
    'mt5': (hf.MT5ForConditionalGeneration, hf.MT5Config(**GATED), True),
    'mt5 tied': (hf.MT5ForConditionalGeneration, hf.MT5Config(**GATED), False),
    'umt5': (hf.UMT5ForConditionalGeneration, hf.UMT5Config(**GATED), True),
    'umt5 tied and scaled': (hf.UMT5ForConditionalGeneration, hf.UMT5Config(
        **{**GATED, 'tie_word_embeddings': True}), False),
    'longt5': (hf.LongT5ForConditionalGeneration, hf.LongT5Config(**GATED), False),
    'longt5 untied': (hf.LongT5ForConditionalGeneration, hf.LongT5Config(**GATED), True),
}
ENCODER = np.array([[5, 7, 9, 11, 13, 1], [6, 8, 1, 0, 0, 0]])
DECODER = np.array([[0, 20, 21, 22], [0, 30, 31, 7]])


def saved(kind, folder):
  """Writes the directory -> the logits of the model that was saved."""
  cls, config, is_untied = KINDS[kind]
  torch.manual_seed(0)
  model = cls(config).eval()
  if is_untied:
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
  model.save_pretrained(folder)
  return logits(model)


def logits(model):
  tokens = torch.tensor(ENCODER)
  with torch.no_grad():
    return model(input_ids=tokens, attention_mask=(tokens != 0).long(),
                 decoder_input_ids=torch.tensor(DECODER)).logits.numpy()


FAST = [('t5 1.1', 5), ('mt5', 5), ('longt5', 5), ('t5 1.1 tied', 4)]


@pytest.mark.parametrize('kind, version', [
    pytest.param(*case, marks=[pytest.mark.slow] * (case not in FAST))
    for case in itertools.product(KINDS, (5, 4))])
def test_every_kind_of_t5_that_was_saved(kind, version, tmp_path):
  folder = tmp_path / 'hf'
  expected = saved(kind, folder)
  cls, config, is_untied = KINDS[kind]
  path = folder / 'config.json'
  written = json.loads(path.read_text())
  assert written['tie_word_embeddings'] is True         # version 5, whatever the tensors are
  if version == 4:                                      # has one key for both
    scaled = written.pop('scale_decoder_outputs', False)
    path.write_text(json.dumps({**written, 'tie_word_embeddings': scaled}))
  np.testing.assert_allclose(logits(cls.from_pretrained(folder)), expected, atol=1e-5)

  source = convert.read_hf(folder)
  assert source.model.tied == (not is_untied)
  proof = convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None)
  assert proof['logits']['largest_relative_difference'] < 1e-5
  got = t5lab.load(tmp_path / 'ours').logits({'encoder_input_tokens': ENCODER,
                                              'decoder_input_tokens': DECODER})
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())

  # And back: transformers reads what we write.
  convert.convert(convert.read_t5lab(tmp_path / 'ours'), tmp_path / 'back', 'hf',
                  log=lambda line: None)
  name = json.loads((tmp_path / 'back' / 'config.json').read_text())['architectures'][0]
  back = getattr(hf, name).from_pretrained(tmp_path / 'back')
  np.testing.assert_allclose(logits(back), expected, atol=1e-5 * np.abs(expected).max())
