"""The uses of a loaded model: logits, scores, vectors, classes, masks, chats; each against a sum
done by hand, one text at a time and without padding."""

import dataclasses
import functools
import json
import string
import types

import jax
import numpy as np
import pytest
from small_models import random_params, shrink
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from t5lab import config, trees
from t5lab.commands import infer
from t5lab.decoding.engine import Engine
from t5lab.decoding.options import Decoding
from t5lab.errors import DataError, UsageError
from t5lab.models.cache import decoding
from t5lab.models.transformer import Transformer
from t5lab.programs.lab import Lab, make_engine

LETTERS = string.ascii_lowercase
TEMPLATE = ("{% for m in messages %}{{ '<s>' if loop.first }}{{ m.role[0] }}{{ m.content }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a{% endif %}")
TEXTS = ['b', 'the quick brown fox jumps over it all', '', 'a dog', 'lazy', 'is it so or not', 'x']


# -- small models with small vocabularies ----------------------------------------------------------


def characters(folder, special, framing, **settings):
  """A tokenizer.json with a token a character, after the special ones."""
  tokens = [*special, *LETTERS, ' ']
  tokenizer = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, '<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex('.'), 'isolated')
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens(special)
  if framing:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=framing, special_tokens=[(t, i) for i, t in enumerate(special)])
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return str(folder / 'tokenizer.json')


def bert(folder):
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS, *('##' + x for x in LETTERS)]
  (folder / 'vocab.txt').write_text('\n'.join(words) + '\n')
  return str(folder / 'vocab.txt')


SPECIAL = ['<unk>', '<s>', '</s>']
TOKENS = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
VOCABULARIES = {
    'byte': lambda folder: 'byte',
    'pieces': lambda folder: 't5lab_2048',
    'bert': bert,
    'bart': lambda folder: characters(folder, ['<s>', '<pad>', '</s>', '<unk>'], '<s> $A </s>',
                                      **TOKENS),
    'llama': lambda folder: characters(folder, SPECIAL, '<s> $A', chat_template=TEMPLATE, **TOKENS),
    'gpt2': lambda folder: characters(folder, SPECIAL, '', **TOKENS),
}
LABS = {   # row, vocabulary, what of the row is not as `shrink` leaves it
    't5': ('t5_1_1/small', 'byte', dict(vocab_size=384)),
    'decoder': ('decoder/small', 'byte', dict(vocab_size=384)),
    'pieces': ('decoder/small', 'pieces', dict(vocab_size=2048)),
    'bart': ('bart/base', 'bart', dict(pad_id=1, start_id=2, eos_id=2, max_length=64)),
    'gpt2': ('gpt2/small', 'gpt2', dict(start_id=2, eos_id=2, max_length=64)),
    'llama': ('llama3_1/8b', 'llama', dict(start_id=1, eos_id=2)),
    'bert': ('bert/base', 'bert', dict(vocab_size=64, eos_id=3, max_length=64)),
    'minilm': ('minilm/l6', 'bert', dict(vocab_size=64, eos_id=3, max_length=64, pooler=True)),
    'classifier': ('minilm/l6', 'bert', dict(vocab_size=64, eos_id=3, max_length=64, classes=3,
                                             pool='pooler')),
    'cross_encoder': ('minilm/l6', 'bert', dict(vocab_size=64, eos_id=3, max_length=64, pooler=True,
                                                classes=1, pool='pooler')),
    'tagger': ('minilm/l6', 'bert', dict(vocab_size=64, eos_id=3, max_length=64, classes=3,
                                         class_of='token')),
    'reader': ('minilm/l6', 'bert', dict(vocab_size=64, eos_id=3, max_length=64, classes=2,
                                         class_of='span')),
}


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  """lab(name, **changes of the config) -> a Lab; of one name they share what was compiled."""
  @functools.cache
  def make(name):
    row, kind, fields = LABS[name]
    model = shrink(row).__class__(**{**vars(shrink(row)), **fields})
    c = config.from_model(model, VOCABULARIES[kind](tmp_path_factory.mktemp(name)))
    c.eval.batch_size, c.eval.max_length = 3, 8
    c.data.start = name != 'gpt2'
    # biases of norms as large as what they are added to would say the same token always
    params = trees.map_paths(lambda path, x: x * 0.1 if path.endswith('bias') else x,
                             random_params(model))
    return c, Lab(c, params, engine=make_engine(c))

  def get(name, **changes):
    c, first = make(name)
    if not changes:
      return first
    c = c.copy_and_resolve_references()
    for key, value in changes.items():
      config.override(c, key.replace('__', '.'), str(value))
    other = Lab(c, first.params)
    if other.model == first.model:
      other._jitted = first._jitted
      if c.eval.batch_size == first.config.eval.batch_size:
        other._engine = first._engine
    return other
  return get


@functools.cache
def jitted(model, method):
  return jax.jit(functools.partial(Transformer(model).apply, method=method))


def forward(lab, method='__call__', **batch):
  """The model itself on one unpadded row."""
  batch = {k: np.array([v], np.int32) for k, v in batch.items()}
  return jitted(lab.model, method)({'params': lab.params}, batch)[0]


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x -= x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


# -- logits ----------------------------------------------------------------------------------------

ENCODER = {'encoder_input_tokens': np.array([[5, 7, 9, 3], [6, 8, 3, 0]])}
DECODER = {'decoder_input_tokens': np.array([[2, 20, 21], [2, 30, 31]])}


@pytest.mark.parametrize('name, batch', [('t5', ENCODER | DECODER), ('gpt2', DECODER),
                                         ('bert', ENCODER)])
def test_logits_are_the_models(name, batch, lab):
  got = lab(name).logits(batch)
  want = jitted(lab(name).model, '__call__')({'params': lab(name).params}, batch)
  assert isinstance(got, np.ndarray) and got.dtype == np.float32
  assert got.shape == (2, 4 if name == 'bert' else 3, lab(name).model.vocab_size)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  types = {'encoder_token_types': np.array([[0, 0, 1, 1], [0, 1, 1, 0]])}
  if name == 'bert':
    assert np.abs(lab(name).logits(batch | types) - got).max() > 1e-2


def test_logits_name_what_is_missing(lab):
  for name, batch, message in (
      ('t5', DECODER, 'missing: encoder_input_tokens'),
      ('t5', {}, 'missing: encoder_input_tokens, decoder_input_tokens'),
      ('gpt2', ENCODER, 'needs decoder_input_tokens; missing: decoder_input_tokens'),
      ('minilm', ENCODER, 'no head that computes logits; use embed')):
    with pytest.raises(UsageError, match=message):
      lab(name).logits(batch)
  with pytest.raises(UsageError, match='65 tokens: .* has only 64 learned positions'):
    lab('gpt2').logits(DECODER | {'decoder_positions': np.array([[0, 1, 64], [0, 1, 2]])})


# -- score -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['t5', 'bart', 'decoder', 'gpt2', 'llama'])
def test_score_is_the_sum_of_the_log_probabilities(name, lab):
  """The ids by hand: bytes are 3 and their value, characters stand after the special tokens."""
  def ids(text):
    return ([3 + b for b in text.encode()] if name in ('t5', 'decoder') else
            [(*LETTERS, ' ').index(x) + (4 if name == 'bart' else 3) for x in text])
  end = {'t5': [1], 'decoder': [1]}.get(name, [2])
  inputs, targets = ['hello', '', 'ab'], ['no way', 'x', 'yes']
  got = {eos: lab(name).score(inputs, targets, eos=eos) for eos in (None, True, False)}
  for i, (text, target) in enumerate(zip(inputs, targets)):
    want = ids(target) + end
    if name in ('t5', 'bart'):
      before, start = ([0], [2]) if name == 'bart' else ([], [0])
      want = before + want
      logits = forward(lab(name), encoder_input_tokens=before + ids(text) + end,
                       decoder_input_tokens=start + want[:-1])
    else:
      start = {'decoder': [0], 'llama': [1], 'gpt2': [2] * (not text)}[name]
      prompt = start + ids(text)
      logits = forward(lab(name), decoder_input_tokens=prompt + want[:-1])[len(prompt) - 1:]
    by_hand = log_softmax(logits)[np.arange(len(want)), want]
    for eos, scores in got.items():
      assert scores.dtype == np.float32 and scores.shape == (3,)
      ends = name in ('t5', 'bart') if eos is None else eos
      np.testing.assert_allclose(scores[i], by_hand.sum() if ends else by_hand[:-1].sum(),
                                 rtol=1e-5)


@pytest.mark.parametrize('text, target', [
    ('It is', '!'),                   # alone, the target would begin with a space
    ('', 'It is'), ('It is', ' good'), ('It is ', 'good'),
    ('The hou', 'se is old')])        # the word has other pieces than its beginning
def test_a_continuation_has_the_ids_that_it_has_in_the_text(text, target, lab):
  l = lab('pieces')
  whole = l.vocab.encode(text + target)
  logits = forward(l, decoder_input_tokens=[0, *whole[:-1]])
  log_p = log_softmax(logits)[np.arange(len(whole)), whole]
  prompt = l.vocab.encode(text)
  shared = len(prompt) if whole[:len(prompt)] == prompt else (
      np.array(prompt) == whole[:len(prompt)]).argmin()
  score, = l.score([text], [target])
  np.testing.assert_allclose(score, log_p[shared:].sum(), rtol=1e-5)


# The rows of one family are put together like those of another.
@pytest.mark.parametrize('name', ['t5', pytest.param('gpt2', marks=pytest.mark.slow)])
def test_scores_know_nothing_of_their_neighbours(name, lab):
  targets = ['m', 'no', 'a longer one so that shapes differ', 'yes', 'x', 'a', 'b']
  inputs = [text[:20] for text in TEXTS]
  got = lab(name).score(inputs, targets)
  np.testing.assert_allclose(lab(name).score(inputs[::-1], targets[::-1])[::-1], got, rtol=1e-5)
  for i in (0, 1, 2):
    alone = lab(name, eval__batch_size=1).score([inputs[i]], [targets[i]])
    np.testing.assert_allclose(alone, got[i:i + 1], rtol=1e-5)


# -- embed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, pool', [
    ('t5', 'mean'), ('bert', 'mean'), ('bert', 'first'), ('bert', 'pooler'), ('gpt2', 'mean'),
    ('llama', 'mean')])
def test_embeddings_are_the_pooled_vectors_of_length_one(name, pool, lab):
  l = lab(name, model__pool=pool) if name == 'bert' else lab(name)
  got = l.embed(TEXTS)
  assert got.dtype == np.float32 and got.shape == (len(TEXTS), 16)
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
  # Hidden vectors do not depend on how they are pooled.
  unpooled = dataclasses.replace(l.model, pool='mean')
  for i in (0, 1, 2):
    if l.model.kind == 'decoder':
      start = [1] if name == 'llama' else [2] * (not TEXTS[i])
      x = forward(l, 'hidden', decoder_input_tokens=start + l.vocab.encode(TEXTS[i]))
    else:
      ids = np.array([l.vocab.frame(TEXTS[i])])
      assert ids[0, -1] == l.model.eos_id
      x = jitted(unpooled, 'encode')({'params': l.params}, ids)[0][0]
    x = np.asarray(x)
    pooler = l.params.get('pooler')
    want = {'mean': x.mean(0), 'first': x[0], 'pooler': pooler and np.tanh(
        x[0] @ pooler['kernel'] + pooler['bias'])}[pool]
    np.testing.assert_allclose(got[i], want / np.linalg.norm(want), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(l.embed(TEXTS[::-1])[::-1], got, rtol=1e-4, atol=1e-6)


# -- encoders with heads ---------------------------------------------------------------------------


def test_classes_of_texts_and_of_pairs(lab):
  l = lab('classifier')
  got = l.classify(['a dog', 'x', ('a dog', 'bit'), ('a dog bit', '')])
  assert got.shape == (4, 3) and got.dtype == np.float32
  np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)
  a, dog, x, b, it = l.vocab.encode('a dog x b it')[0:1], l.vocab.encode('dog'), l.vocab.encode(
      'x'), l.vocab.encode('bit')[:1], l.vocab.encode('bit')[1:]
  for row, (first, second) in zip(got, ((a + dog, None), (x, None), (a + dog, b + it),
                                        (a + dog + b + it, []))):
    ids = [2, *first, 3] + ([*second, 3] if second is not None else [])
    types = [0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2)
    logits = forward(l, encoder_input_tokens=ids, encoder_token_types=types)
    np.testing.assert_allclose(row, np.exp(log_softmax(logits))[0], rtol=1e-4)
  other = np.exp(log_softmax(forward(l, encoder_input_tokens=[2, *a, *dog, 3, *b, *it, 3])))
  assert np.abs(other[0] - got[2]).max() > 1e-3            # types are seen


def test_token_types_are_those_of_the_tokenizer(lab):
  """RoBERTa's gives all tokens type 0, also to a BERT that has two."""
  first = lab('classifier')
  other = Lab(first.config, first.params)
  other.__dict__['vocab'] = dataclasses.replace(first.vocab, second_type=False)
  ids = other.vocab.frame('a dog', 'bit')
  logits = forward(other, encoder_input_tokens=ids, encoder_token_types=[0] * len(ids))
  got, = other.classify([('a dog', 'bit')])
  np.testing.assert_allclose(got, np.exp(log_softmax(logits))[0], rtol=1e-4)
  assert np.abs(got - first.classify([('a dog', 'bit')])[0]).max() > 1e-3


def test_what_classify_gives_depends_on_the_problem(lab):
  """Several labels are independent; a regression, like a single class, is a bare score."""
  softmax = lab('classifier').classify(['a dog', 'x'])
  score = lab('classifier', eval__problem_type='regression').classify(['a dog', 'x'])
  np.testing.assert_allclose(log_softmax(score), np.log(softmax), rtol=1e-5, atol=1e-6)
  assert (np.abs(score.sum(1) - 1) > 0.1).all()
  several = lab('classifier', eval__problem_type='multi_label_classification').classify(
      ['a dog', 'x'])
  np.testing.assert_allclose(several, 1 / (1 + np.exp(-score)), rtol=1e-5)
  named = lab('classifier', eval__labels="('no', 'maybe', 'yes')")
  assert named.labels == ('no', 'maybe', 'yes') and lab('classifier').labels[2] == 'LABEL_2'


def test_a_single_class_is_a_score_not_probability_one(lab):
  scores = lab('cross_encoder').classify([('a dog', 'bit'), ('x', 'y')])
  assert scores.shape == (2, 1) and (scores != 1).all() and scores[0] != scores[1]


def test_masks_are_filled_with_the_most_probable_pieces(lab):
  l = lab('bert')
  texts = ['a [MASK] dog', 'the [MASK] is [MASK]', '[MASK]']
  got = l.fill_mask(texts, k=4)
  assert [len(masks) for masks in got] == [1, 2, 1]
  for text, masks in zip(texts, got):
    ids = l.vocab.frame(text)
    probs = np.exp(log_softmax(forward(l, encoder_input_tokens=ids)))
    for at, mask in zip(np.flatnonzero(np.array(ids) == 4), masks):
      best = np.argsort(-probs[at])[:4]
      assert [word for word, _ in mask] == l.vocab.pieces(best)
      np.testing.assert_allclose([p for _, p in mask], probs[at][best], rtol=1e-4)
  with pytest.raises(UsageError, match=r"text 2 of 2 has no \[MASK\]: 'a dog'"):
    l.fill_mask(iter(['[MASK]', 'a dog']))
  with pytest.raises(UsageError, match='between 1 and the vocabulary size, 64, got 65'):
    l.fill_mask(['[MASK]'], k=65)


def test_every_token_has_a_label(lab):
  l = lab('tagger', eval__labels="('O', 'B', 'I')")
  texts = ['a dog', 'x']
  for text, tags in zip(texts, l.tag(texts)):
    ids = l.vocab.encode(text)
    probs = np.exp(log_softmax(forward(l, encoder_input_tokens=l.vocab.frame(text))))[1:-1]
    assert [piece for piece, _, _ in tags] == l.vocab.pieces(ids)
    assert [label for _, label, _ in tags] == [l.labels[i] for i in probs.argmax(-1)]
    np.testing.assert_allclose([p for _, _, p in tags], probs.max(-1), rtol=1e-4)
  with pytest.raises(UsageError, match='its classes are of tokens: use tag'):
    l.classify(texts)
  with pytest.raises(UsageError, match='no classifier of tokens'):
    lab('classifier').tag(texts)


def test_an_answer_is_the_best_span_of_its_context(lab):
  l = lab('reader')
  question, context = 'who bit', 'a dog bit it'
  (text, probability), = l.answer([question], [context])
  q, ids = l.vocab.encode(question), l.vocab.encode(context)
  types = [0] * (len(q) + 2) + [1] * (len(ids) + 1)
  logits = forward(l, encoder_input_tokens=[2, *q, 3, *ids, 3], encoder_token_types=types)
  start, end = np.exp(log_softmax(logits[len(q) + 2:-1].T))
  spans = {(i, j): start[i] * end[j] for i in range(len(ids)) for j in range(i, len(ids))}
  i, j = max(spans, key=spans.get)
  assert text == l.vocab.decode(ids[i:j + 1]) and text
  assert probability == pytest.approx(spans[i, j], rel=1e-4)
  assert l.answer([question], ['']) == [('', 0.)]
  with pytest.raises(UsageError, match='1 questions and 2 contexts'):
    l.answer([question], ['a', 'b'])
  with pytest.raises(UsageError, match='no head that finds answers'):
    lab('tagger').answer([question], [context])


def test_infer_writes_the_classes_of_tokens_and_answers(lab):
  args = infer._parse(['--workdir', 'x', '--classify'])
  run = lambda name, inputs: list(infer._outputs(lab(name), 'classify', args, inputs))
  tags, = run('tagger', ['a dog'])
  assert [(t['piece'], t['label'], t['probability']) for t in tags] == [
      (piece, label, round(p, 4)) for piece, label, p in lab('tagger').tag(['a dog'])[0]]
  (answer,), = run('reader', [{'question': 'who', 'context': 'a dog', 'id': 7}])
  (text, p), = lab('reader').answer(['who'], ['a dog'])
  assert answer == {'answer': text, 'probability': round(p, 4)}
  for item in ('a dog', {'question': 'who'}):
    with pytest.raises(DataError, match='row 1 must be {"question": TEXT, "context": TEXT}, got'):
      run('reader', [item])


def test_heads_of_tokens_are_not_trained(lab):
  c = lab('tagger').config.copy_and_resolve_references()
  c.data.mixture = 'ha_ende'
  with pytest.raises(UsageError, match='class_of=token: classifiers of tokens and of spans are'):
    config.check_trainable(c)


# -- text out --------------------------------------------------------------------------------------


def continued(l, ids, length, inputs=None):
  """Greedy by hand: the whole text through the model for each token."""
  ids, start = list(ids), len(ids)
  given = {} if inputs is None else {'encoder_input_tokens': inputs}
  for _ in range(length):
    width = {'decoder_input_tokens': np.array([ids + [0] * (64 - len(ids))])}
    logits = l.logits({k: np.array([v]) for k, v in given.items()} | width)[0, len(ids) - 1]
    ids.append(int(logits.argmax()))
    if ids[-1] == l.vocab.eos_id:
      break
  return ids[start:]


@pytest.mark.parametrize('start', [True, False])
def test_a_chat_reads_what_the_template_says(start, lab):
  """Its <s> too, once, whether or not plain prompts begin with it."""
  messages = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'},
              {'role': 'user', 'content': 'so'}]
  l = lab('llama', data__start=start)
  ids = [1, *l.vocab.encode('uhi'), 2, *l.vocab.encode('ayo'), 2, *l.vocab.encode('uso'), 2,
         *l.vocab.encode('a')]
  got = l.chat(messages, length=5)
  assert got == l.vocab.decode(continued(l, ids, 5)) and len(got) > 2
  assert got != l.chat(messages[2:], length=5)


@pytest.mark.parametrize('name', ['decoder', 'gpt2', 'llama'])
def test_prompts_read_at_once_go_on_as_those_read_token_by_token(name, lab):
  l = lab(name, eval__batch_size=4)
  start, step, prefill = decoding(l.model)
  size = dict(eos=l.model.eos_id, start_id=None, batch_size=4)
  stream = np.random.default_rng(3)
  lengths = [31, 40, 30, 33]                                 # known: 16
  requests = [stream.integers(3, 30, n).tolist() for n in lengths]
  slow = Engine(start, step, None, **size).generate(l.params, requests, Decoding(6))
  assert len(np.unique(slow)) > 5                            # not one word again and again
  fast = Engine(start, step, prefill, **size)
  assert fast._pad(sorted(requests, key=len))[2] > 8         # reads several at once indeed
  np.testing.assert_array_equal(fast.generate(l.params, requests, Decoding(6)), slow)
  assert continued(l, requests[1], 6) == [t for t in slow[1].tolist() if t]


def test_a_prompt_begins_as_the_config_says(lab):
  ids = lab('llama').vocab.encode('hello')
  for name, start, want in (('llama', True, [1, *ids]), ('llama', False, ids), ('gpt2', False, ids),
                            ('gpt2', True, [2, *ids])):
    l = lab(name, data__start=start)
    text = l.vocab.decode(continued(l, want, 5))
    assert l.generate(['hello'], length=5) == [text]
  assert len(lab('gpt2').generate_tokens([[]], length=5)) == 1         # begins with start_id


def test_the_first_token_can_be_forced(lab):
  l = lab('bart')
  inputs = [l.tokens('hello'), l.tokens('the fox and the dog')]
  free = l.generate_tokens(inputs, length=6)
  assert (free[:, 0] != 9).all()
  for beams in (1, 3):
    forced = l.generate_tokens(inputs, length=6, beams=beams, forced_first=9)
    assert (forced[:, 0] == 9).all()
    if beams == 1:
      assert forced[0].tolist()[:3] == [9, *continued(l, [2, 9], 2, inputs[0])]
    as_config = lab('bart', eval__forced_first=9, eval__beams=beams)
    np.testing.assert_array_equal(as_config.generate_tokens(inputs, length=6), forced)


def test_an_option_turns_off_what_says_the_same_in_another_way(lab):
  bart = lab('bart', eval__beams=4, eval__length_penalty=2., eval__min_length=5).decoding
  gpt2 = lab('gpt2', eval__max_total=20).decoding
  pick = lambda settings, *names: tuple(getattr(settings, name) for name in names)
  assert pick(bart(), 'beams', 'alpha', 'length_penalty', 'min_length') == (4, 0.6, 2., 5)
  assert pick(bart(alpha=1.), 'alpha', 'length_penalty') == (1., 0.)
  assert pick(bart(length_penalty=0.), 'alpha', 'length_penalty') == (0., 0.)
  assert pick(bart(min_new_tokens=2), 'min_length', 'min_new_tokens') == (0, 2)
  assert pick(bart(temperature=0.5), 'beams', 'temperature') == (1, 0.5)
  assert pick(bart(temperature=0.), 'beams') == (4,)
  assert pick(bart(temperature=0.5, beams=3), 'beams') == (3,)
  assert pick(gpt2(), 'max_total') == (20,) and pick(gpt2(length=5), 'max_total') == (0,)
  assert pick(gpt2(length=5, max_total=9), 'max_total') == (9,)


def stub(l, reply, **fields):
  """The Lab with an engine that gives this reply, which keeps what it is asked in `asked`."""
  asked = []

  def generate(params, requests, settings, **options):
    asked.append(settings)
    return np.array([reply])
  other = Lab(l.config, l.params, engine=types.SimpleNamespace(generate=generate))
  other.__dict__['vocab'] = dataclasses.replace(l.vocab, **fields)
  return other, asked


def test_a_chat_also_ends_where_the_template_ends_a_turn(lab):
  template = '{% for m in messages %}{{ m.content }}<s>{% endfor %}'
  l, asked = stub(lab('llama'), [5, 6, 2, 0, 0], chat_template=template)
  assert l.chat(USER) == l.vocab.decode([5, 6]) != ''
  l.chat(USER, stop_ids=(9,))
  assert [settings.stop_ids for settings in asked] == [(2, 1), (9, 1)]
  l, asked = stub(lab('llama'), [5, 6, 2, 0, 0])
  l.chat(USER)
  assert asked[0].stop_ids == (2,)


def test_the_end_of_a_vocabulary_may_end_no_text(lab):
  """By the model's settings 9 ends a text: the tokenizer's end inside it is one token more."""
  for reply, text in (([5, 2, 6, 2, 0], [5, 6]), ([5, 2, 6, 7, 8], [5, 6, 7, 8]),
                      ([5, 6, 0, 0, 0], [5, 6, 0, 0, 0])):
    l, _ = stub(lab('gpt2'), reply)
    assert l.generate(['a'], stop_ids=(9,)) == [l.vocab.decoder(text)]
  l, _ = stub(lab('gpt2'), [5, 2, 6, 2, 0])
  assert l.generate(['a'], stop_ids=(9, 2)) == l.generate(['a']) == [l.vocab.decoder([5])]


def test_n_samples_of_a_text(lab):
  l = lab('t5')
  options = dict(temperature=1., length=6)
  groups = l.generate(['hello', 'hello'], n=3, **options)
  assert [len(group) for group in groups] == [3, 3] and len({*groups[0], *groups[1]}) == 6
  assert l.generate(['hello', 'hello'], **options) == [group[0] for group in groups]
  assert l.generate(['hello'], n=3, place=1, **options) == groups[1:]
  best = l.generate(['hello'], n=2, beams=3, length=6)
  assert best[0][0] == l.generate(['hello'], beams=3, length=6)[0] != best[0][1]
  with pytest.raises(UsageError, match='got n=2 with beams=1 and temperature=0'):
    l.generate(['hello'], n=2, length=6)


# -- what each use refuses -------------------------------------------------------------------------

USER = [{'role': 'user', 'content': 'hi'}]


@pytest.mark.parametrize('name, use, message', [
    ('bert', lambda l: l.generate(['a']), 'is encoder-only and generates no text; use embed'),
    ('bert', lambda l: l.chat(USER), 'chat needs a decoder-only model'),
    ('t5', lambda l: l.chat(USER), 'chat needs a decoder-only model'),
    ('bert', lambda l: l.score(['a'], ['b']), 'is encoder-only: it cannot score targets'),
    ('t5', lambda l: l.score(['a', 'b'], ['b']), 'got 2 inputs and 1 targets'),
    ('gpt2', lambda l: l.score(['a', 'b'], ['b', '']), 'target 1 is empty'),
    ('t5', lambda l: l.score('a', 'b'), 'score takes a list of texts'),
    ('t5', lambda l: l.score(['a'], [7]), 'score takes strings, got int 7'),
    ('t5', lambda l: l.embed('a'), 'embed takes a list of texts'),
    ('bert', lambda l: l.embed([('a', 'b')]), 'embed takes strings, got tuple'),
    ('bert', lambda l: l.classify(['a']), r'no classifier \(model.classes=0\)'),
    ('classifier', lambda l: l.classify('a'), 'classify takes a list'),
    ('classifier', lambda l: l.classify([('a', 'b', 'c')]), 'one text or a pair, got 3'),
    ('classifier', lambda l: l.classify([('a', None)]), 'takes strings, got NoneType'),
    ('t5', lambda l: l.fill_mask(['a']), 'no masked-token head'),
    ('classifier', lambda l: l.fill_mask(['[MASK]']), 'no masked-token head'),
    ('bert', lambda l: l.fill_mask('[MASK]'), 'fill_mask takes a list'),
    ('gpt2', lambda l: l.generate(['a'], beams=2), 'beam search does not support decoder-only'),
    ('gpt2', lambda l: l.generate(['a'], forced_first=5), 'put the token at the end'),
    ('bart', lambda l: l.generate(['a'], forced_first=48), 'less than the vocabulary size, 48'),
    ('bart', lambda l: l.generate(['a'], max_total=9), 'max_total=9 is for decoder-only models'),
    ('gpt2', lambda l: l.generate(['a'], start=5), 'put the token at the end of the prompt'),
    ('gpt2', lambda l: l.generate(['abc'], length=9, max_total=3), 'a prompt of 3 tokens leaves'),
    ('t5', lambda l: l.generate(['a'], suppress_tokens=(384,)), 'suppress_tokens must be less'),
    ('gpt2', lambda l: l.generate(['a' * 60], length=5), '65 tokens: .* learned positions'),
    ('gpt2', lambda l: l.score(['a' * 32], ['b' * 34]), '65 tokens: .* learned positions'),
    ('bart', lambda l: l.score(['a'], ['b' * 63]), '65 tokens: .* learned positions'),
    ('bart', lambda l: l.generate(['a' * 63], length=5), '65 tokens: .* learned positions'),
    ('bart', lambda l: l.generate(['a'], length=65), '65 tokens: .* learned positions'),
    ('bert', lambda l: l.embed(['a', 'a b ' * 32]), '66 tokens: .* learned positions'),
    ('t5', lambda l: l.generate([{'en': 'a'}]), 'dicts of fields need a task'),
])
def test_a_wrong_use_is_one_clear_line(name, use, message, lab):
  with pytest.raises(UsageError, match=message) as e:
    use(lab(name))
  assert '\n' not in str(e.value)


def test_up_to_the_last_learned_position(lab):
  assert lab('gpt2').score(['a' * 32], ['b' * 33]).shape == (1,)     # begins with its first letter
  assert len(lab('gpt2').generate(['a' * 60], length=4)) == 1
  assert lab('bert').embed(['a b ' * 31]).shape == (1, 16)


def test_no_texts_make_no_rows(lab):
  assert lab('t5').score([], []).shape == (0,)
  assert lab('bert').embed([]).shape == (0, 16)
  assert lab('classifier').classify([]).shape == (0, 3)
  assert lab('bert').fill_mask([]) == [] and lab('t5').generate([]) == []


def test_without_a_vocabulary_ids_still_work(lab):
  l = Lab(lab('gpt2').config.copy_and_resolve_references(), lab('gpt2').params)
  l.config.data.vocab = ''
  assert l.generate_tokens([[5, 6]], length=3).shape == (1, 3)
  for use in (lambda: l.generate(['a']), lambda: l.score(['a'], ['b']), lambda: l.embed(['a'])):
    with pytest.raises(UsageError, match='came without a vocabulary'):
      use()


def test_a_vocabulary_without_a_template_has_no_chat(lab):
  with pytest.raises(DataError, match='has no chat template'):
    lab('gpt2').chat(USER)
