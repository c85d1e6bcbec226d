"""Lab.embed and Lab.encode: what is read of a text, how it is pooled, what comes out."""

import dataclasses
import functools
import json
import string

import jax
import numpy as np
import pytest
from small_models import random_params, shrink
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from t5lab import config
from t5lab.errors import UsageError
from t5lab.models.transformer import Transformer
from t5lab.programs.lab import Lab

TEXTS = ['a dog', 'the quick brown fox', 'x', '']
SPECIAL = ['<unk>', '<s>', '</s>', '<pad>']
# what the post-processor puts around a text
FRAMES = {'bos': '<s> $A', 'eos': '$A </s>', 'both': '<s> $A </s>', 'none': ''}


@functools.cache
def params(model):
  plain = dataclasses.replace(model, pool='mean')
  return random_params(plain)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  """lab(row, vocabulary, **config keys): byte, or a FRAME around single letters."""
  jitted = {}

  def make(row, kind, **changes):
    spec = 'byte'
    if kind in FRAMES:
      folder = tmp_path_factory.mktemp(kind)
      tokens = [*SPECIAL, *string.ascii_lowercase, ' ']
      tokenizer = tokenizers.Tokenizer(
          models.WordLevel({t: i for i, t in enumerate(tokens)}, '<unk>'))
      tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex('.'), 'isolated')
      tokenizer.add_special_tokens(SPECIAL)
      if FRAMES[kind]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=FRAMES[kind], special_tokens=[(t, i) for i, t in enumerate(SPECIAL)])
      spec = str(folder / 'tokenizer.json')
      tokenizer.save(spec)
      (folder / 'tokenizer_config.json').write_text(json.dumps(
          dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')))
    model = dataclasses.replace(shrink(row), vocab_size=384, start_id=1, eos_id=2, pooler=False,
                                max_length=24, mlm_head=False, nsp=False, logit_bias=False,
                                **({'dec_layers': 0} if row.startswith('t5') else {}))
    c = config.from_model(model, spec)
    c.eval.batch_size, c.data.start = 4, kind != 'none'
    for key, value in changes.items():
      section, key = key.split('__')
      c[section][key] = value
    made = Lab(c, params(dataclasses.replace(model, pool='mean')))
    made._jitted = jitted.setdefault(config.model_config(c), made._jitted)
    return made
  return make


def vectors(lab, ids):
  """[T, D] of one text, without padding."""
  model = dataclasses.replace(lab.model, pool='mean')
  if model.kind == 'decoder':
    batch = {'decoder_input_tokens': np.array([ids])}
    return np.asarray(Transformer(model).apply({'params': lab.params}, batch, method='hidden'))[0]
  x, _ = Transformer(model).apply({'params': lab.params}, np.array([ids]), method='encode')
  return np.asarray(x)[0]


def unit(x):
  return x / np.linalg.norm(x)


@pytest.mark.parametrize('row, kind, ids', [
    ('t5_1_1/small', 'byte', [100, 35, 101, 1]), ('minilm/l6', 'both', [1, 4, 30, 5, 2]),
    ('llama2/7b', 'bos', [1, 4, 30, 5]), ('llama2/7b', 'none', [4, 30, 5]),
    ('llama2/7b', 'eos', [4, 30, 5, 2]), ('gpt2/small', 'both', [1, 4, 30, 5, 2])])
def test_the_last_token_is_that_of_the_tokenizer(row, kind, ids, lab):
  """Decoder-only models read what their tokenizer frames, an end of sequence too."""
  l = lab(row, kind, model__pool='last')
  got = l.embed(['a b', 'a b c d'] if kind != 'byte' else ['a b'])
  np.testing.assert_allclose(got[0], unit(vectors(l, ids)[-1]), rtol=1e-4, atol=1e-5)
  # cut before the special tokens
  l = lab(row, kind, model__pool='last', embed__max_length=len(ids))
  longer = l.embed(['a bcdefg'])
  np.testing.assert_allclose(longer[0], unit(vectors(l, ids)[-1]), rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_positions(lab):
  text = 'a' * 40
  with pytest.raises(UsageError, match='42 tokens: .* only 24 learned positions'):
    lab('minilm/l6', 'both').embed([text])
  l = lab('minilm/l6', 'both', embed__max_length=24)
  x = vectors(l, [1, *[4] * 22, 2])
  np.testing.assert_allclose(l.embed([text])[0], unit(x.mean(0)), rtol=1e-4, atol=1e-5)


def test_prompts_case_and_length_of_the_vectors(lab):
  l = lab('minilm/l6', 'both', embed__prompts=(('q', 'ab '), ('none', '')),
          embed__default_prompt='q', embed__normalize=False, embed__lowercase=True)
  ask, plain = vectors(l, [1, 4, 5, 30, 6, 2]), vectors(l, [1, 6, 2])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(l.embed(['C'])[0], ask.mean(0))
  close(l.embed(['C'], normalize=True)[0], unit(ask.mean(0)))
  close(l.embed(['C'], prompt_name='none')[0], plain.mean(0))
  close(l.embed(['C'], prompt='')[0], plain.mean(0))
  close(l.embed([' c'], prompt='AB')[0], ask.mean(0))
  with pytest.raises(UsageError, match="no prompt 'qq'. Did you mean 'q'"):
    l.embed(['c'], prompt_name='qq')
  # <s>ab is not pooled: the special token before the prompt counts as a part of it
  l = lab('minilm/l6', 'both', embed__pool_prompt=False, embed__normalize=False)
  close(l.embed(['c'], prompt='ab ')[0], ask[4:].mean(0))
  close(l.embed(['c'])[0], plain.mean(0))
  assert l.embed([]).shape == (0, 16)


@pytest.mark.parametrize('section, message', [
    (dict(max_length=-1), 'embed.max_length must be 0'),
    (dict(prompts=('q',)), "embed.prompts must be pairs of a name and a text, got 'q'"),
    (dict(default_prompt='q'), "embed.default_prompt='q' is not a name")])
def test_bad_settings(section, message):
  c = config.base('tiny')
  c.embed.update(section)
  with pytest.raises(UsageError, match=message):
    config.check(c)


# -- encode ----------------------------------------------------------------------------------------


def test_encode_gives_every_vector_and_0_at_padding(lab):
  l = lab('t5_1_1/small', 'byte')
  hidden, mask = l.encode(TEXTS)
  ids = [l.tokens(text) for text in TEXTS]
  assert hidden.shape == (4, 20, 16) and hidden.dtype == np.float32 and mask.dtype == bool
  assert mask.sum(1).tolist() == [len(row) for row in ids]
  assert not hidden[~mask].any()
  for x, row in zip(hidden, ids):
    np.testing.assert_allclose(x[:len(row)], vectors(l, row), rtol=1e-4, atol=1e-5)

  # A fixed length: padded to it, or cut before the end of sequence.
  longer, _ = l.encode(TEXTS, length=33)
  np.testing.assert_allclose(longer[:, :20], hidden, rtol=1e-4, atol=1e-5)
  assert longer.shape == (4, 33, 16) and not longer[:, 20:].any()
  cut, mask = l.encode(TEXTS, length=4)
  assert mask.sum(1).tolist() == [4, 4, 2, 1]
  np.testing.assert_allclose(cut[1], vectors(l, [*ids[1][:3], 1]), rtol=1e-4, atol=1e-5)

  # Without a mask, padding is read and has vectors of its own.
  whole, mask = l.encode(TEXTS[:1], length=9, attend_padding=True)
  segments = np.ones((1, 9), np.int32)
  x, _ = Transformer(l.model).apply({'params': l.params}, np.array([[*ids[0], 0, 0, 0]]), segments,
                                    method='encode')
  np.testing.assert_allclose(whole, x, rtol=1e-4, atol=1e-5)
  assert mask.sum() == 6
  empty, mask = l.encode([], length=5)
  assert empty.shape == (0, 5, 16) and mask.shape == (0, 5)


def test_encode_in_bfloat16_and_under_the_callers_jit(lab):
  l = lab('t5_1_1/small', 'byte')
  hidden, mask = l.encode(TEXTS)
  half, _ = l.encode(TEXTS, dtype='bfloat16')
  assert half.dtype == 'bfloat16' and not half[~mask].any()
  difference = np.abs(half.astype(np.float32) - hidden)[mask]
  assert 1e-4 < difference.mean() < 0.03 * np.abs(hidden[mask]).mean()
  assert lab('t5_1_1/small', 'byte', model__dtype='bfloat16').encode(TEXTS)[0].dtype == 'bfloat16'

  encode = jax.jit(functools.partial(Transformer(l.model).apply, method='encode'))
  x, segments = encode({'params': l.params}, np.array([[*l.tokens('x'), 0]]))
  np.testing.assert_allclose(x[0, :2], hidden[2, :2], rtol=1e-4, atol=1e-5)
  assert segments.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize('row, kind, options, message', [
    ('llama2/7b', 'bos', {}, 'is decoder-only: use embed'),
    ('t5_1_1/small', 'byte', dict(length=-1), 'length must be 0 .* or more, got -1'),
    ('minilm/l6', 'both', dict(length=1), 'length=1 is less than the special tokens'),
    ('minilm/l6', 'both', dict(dtype='float16'), "model.dtype='float16' is unknown"),
])
def test_what_encode_refuses(row, kind, options, message, lab):
  with pytest.raises(UsageError, match=message):
    lab(row, kind).encode(['abc'], **options)
