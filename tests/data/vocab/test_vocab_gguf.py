"""Tokenizers inside .gguf files: read without the model and exported; damaged files refused."""

import io
import json
import os
import re
import struct

from pretrained_files import FILES, file
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.data.vocab import gguf
from t5lab.errors import DataError, UsageError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())     # how such files spell the 256 bytes
MERGES = ['t h', 'th e', 'Ġ the', '1 2', '12 3', 'Ġ 1', '! !']
TOKENS = [*LETTERS, *(m.replace(' ', '') for m in MERGES), '<s>', '<|end|>', '<tool>']
BOS, EOS, TOOL = range(len(TOKENS) - 3, len(TOKENS))


def pack(value):
  """A value as GGUF stores it: (type, bytes)."""
  if isinstance(value, bool):
    return 7, struct.pack('<?', value)
  if isinstance(value, int):
    return 4, struct.pack('<I', value)
  if isinstance(value, float):
    return 6, struct.pack('<f', value)
  if isinstance(value, str):
    return 8, struct.pack('<Q', len(value.encode())) + value.encode()
  kinds = {pack(x)[0] for x in value} or {4}
  return 9, struct.pack('<IQ', kinds.pop(), len(value)) + b''.join(pack(x)[1] for x in value)


def write_gguf(path, meta, tail=b''):
  """Writes a .gguf file of metadata alone. -> its path as a spec"""
  data = b'GGUF' + struct.pack('<IQQ', 3, 0, len(meta))
  for key, value in meta.items():
    kind, packed = pack(value)
    data += pack(key)[1] + struct.pack('<I', kind) + packed
  path.write_bytes(data + tail)
  vocab.load.cache_clear()
  return str(path)


def bpe(**changes):
  meta = {'model': 'gpt2', 'pre': 'gpt-2', 'tokens': TOKENS, 'merges': MERGES,
          'token_type': [1] * (len(TOKENS) - 3) + [3, 3, 4], 'bos_token_id': BOS,
          'eos_token_id': EOS}
  meta = {f'tokenizer.ggml.{k}': v for k, v in {**meta, **changes}.items() if v is not None}
  return {'general.architecture': 'llama', 'llama.context_length': 8, **meta,
          'tokenizer.chat_template': "{{ bos_token }}{{ messages[0]['content'] }}<|end|>"}


def pieces(v, text):
  return v.pieces(v.encode(text))


def test_byte_level_bpe(tmp_path):
  v = vocab.load(write_gguf(tmp_path / 'm.gguf', bpe()))
  assert (v.size, v.bos_id, v.eos_id, v.pad_id, v.unk_id) == (len(TOKENS), BOS, EOS, EOS, None)
  assert (v.num_sentinels, v.prefix, v.starts_with_bos) == (0, (), False)
  assert pieces(v, 'the the') == ['the', 'Ġthe'] and v.encode('') == []
  assert v.encode('<s>!<|end|><tool>') == [BOS, 0, EOS, TOOL]
  assert v.decode([BOS, 0, TOOL, 0, EOS, 0]) == '!<tool>!'        # id 0 is a real token
  assert v.decode([0, v.size, -1]) == '! \u2047  \u2047 '
  for text in ('é 日本 👩', '\0\n\t', '  a  ', '\u2581'):
    assert v.decode(v.encode(text)) == text
  chat = v.chat([{'role': 'user', 'content': 'the'}])
  assert chat == '<s>the<|end|>'
  assert v.encode(chat) == [BOS, TOKENS.index('the'), EOS]


@pytest.mark.parametrize('pre, cut', [
    ('gpt-2', ['Ġ', '123', '4', "'", 'S']), ('default', ['Ġ', '123', '4', "'", 'S']),
    ('smollm', ['Ġ', '1', '2', '3', '4', "'", 'S']), ('qwen2', ['Ġ', '1', '2', '3', '4', "'S"]),
    ('llama-bpe', ['Ġ', '123', '4', "'S"])])
def test_where_text_is_cut_before_merging(pre, cut, tmp_path):
  meta = bpe(pre=pre, tokens=[*TOKENS, "'S"], merges=[*MERGES, "' S"],
             token_type=[1] * (len(TOKENS) + 1))
  v = vocab.load(write_gguf(tmp_path / 'm.gguf', meta))
  assert pieces(v, " 1234'S") == cut
  assert pieces(v, 'the\n\n the') == ['the', 'Ċ', 'Ċ', 'Ġthe']


def test_bos_and_eos_follow_the_file(tmp_path):
  opens = vocab.load(write_gguf(tmp_path / 'a.gguf', bpe(add_bos_token=True)))
  assert opens.starts_with_bos and opens.prefix == () and opens.eos_id == EOS
  assert vocab.load(write_gguf(tmp_path / 'b.gguf', bpe(pre='llama-bpe'))).starts_with_bos
  both = vocab.load(write_gguf(tmp_path / 'c.gguf', bpe(add_bos_token=True, add_eos_token=True)))
  assert both.prefix == (BOS,) and not both.starts_with_bos


def test_export_is_the_same_vocabulary(tmp_path):
  v = vocab.load(write_gguf(tmp_path / 'm.gguf', bpe(add_bos_token=True, padding_token_id=0)))
  spec = vocab.export(str(tmp_path / 'm.gguf'), tmp_path / 'out')
  assert sorted(os.listdir(tmp_path / 'out')) == ['tokenizer.json', 'tokenizer_config.json']
  w = vocab.load(spec)
  assert w.sha256 == v.sha256 and w.pad_id == v.pad_id == 0 and w.starts_with_bos
  hi = [{'role': 'user', 'content': 'the 1'}]
  assert w.chat(hi) == v.chat(hi) and w.encode(w.chat(hi)) == v.encode(v.chat(hi))
  settings = json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())
  assert settings['add_bos_token'] is True
  assert (settings['eos_token'], settings['bos_token']) == ('<|end|>', '<s>')
  assert vocab.export(str(tmp_path / 'm.gguf'), tmp_path / 'too') == str(
      tmp_path / 'too' / 'tokenizer.json')


def test_llamas_sentencepiece(tmp_path):
  model = io.BytesIO()
  texts = [row['en'] for row in corpora.load('ende', 'train')[:1500]]
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts), model_writer=model, minloglevel=2, vocab_size=500,
      hard_vocab_limit=False, model_type='bpe', byte_fallback=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False)
  sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
  meta = bpe(model='llama', pre=None, merges=None, tokens=[p.piece for p in proto.pieces],
             scores=[p.score for p in proto.pieces], token_type=[p.type for p in proto.pieces],
             bos_token_id=1, eos_token_id=2, unknown_token_id=0)
  v = vocab.load(write_gguf(tmp_path / 'm.gguf', meta))
  assert (v.unk_id, v.bos_id, v.eos_id, v.starts_with_bos) == (0, 1, 2, True)
  for text in [*texts[:30], '  é 日本\n', "don't 123"]:
    assert v.encode(text) == sp.encode(text) and v.decode(v.encode(text)) == text
  assert v.encode('<s>a</s>') == [1, *sp.encode('a'), 2]
  spec = vocab.export(str(tmp_path / 'm.gguf'), tmp_path / 'out')
  assert spec.endswith('tokenizer.model') and vocab.load(spec).sha256 == v.sha256
  bare = vocab.load(write_gguf(tmp_path / 'm.gguf', {
      **meta, 'tokenizer.ggml.add_space_prefix': False, 'tokenizer.ggml.add_bos_token': False}))
  assert bare.pieces(bare.encode('a'))[0] == 'a' and not bare.starts_with_bos


@pytest.mark.parametrize('changes, error, message', [
    (dict(pre='gpt-4o'), UsageError, "unknown pre-tokenizer 'gpt-4o' .* Did you mean 'gpt-2'"),
    (dict(pre='tekken'), UsageError, "'tekken' .*Known: default, gpt-2, llama-bpe, qwen2, smollm"),
    (dict(model='bert'), UsageError, "kind 'bert'; supported: gpt2 .* and llama"),
    (dict(model=None), UsageError, 'kind None'),
    (dict(tokens=None), DataError, 'has no tokenizer.ggml.tokens'),
    (dict(tokens=[1, 2]), DataError, 'has no tokenizer.ggml.tokens'),
    (dict(token_type=[1]), DataError,
     '266 tokens, 266 distinct tokens and 1 token types; .* must be equal'),
    (dict(tokens=['a', 'a'], token_type=[1, 1]), DataError,
     '2 tokens, 1 distinct tokens and 2 token types'),
    (dict(eos_token_id=None), DataError, 'no tokenizer.ggml.eos_token_id'),
    (dict(eos_token_id=266), DataError,
     'eos_token_id must be the id of one of the 266 tokens, got 266'),
    (dict(bos_token_id='x'), DataError,
     "bos_token_id must be the id of one of the 266 tokens, got 'x'"),
    (dict(merges=['a b c']), DataError, 'merges must be pairs'),
    (dict(merges=['q zz']), DataError, 'the merges do not fit the tokens: .'),
    (dict(model='llama'), DataError, 'scores must hold one number for each of the 266 tokens'),
    (dict(model='llama', scores=[0.] * 266, token_type=[9] * 266), DataError,
     'has type 9; known: 1 to 6'),
    (dict(model='llama', scores=[0.] * 266), DataError, 'is not a sentencepiece model'),
])
def test_invalid_tokenizers(changes, error, message, tmp_path):
  with pytest.raises(error, match=message) as e:
    vocab.load(write_gguf(tmp_path / 'm.gguf', bpe(**changes)))
  assert '\n' not in str(e.value)


def test_damaged_files(tmp_path):
  path = tmp_path / 'm.gguf'
  write_gguf(path, bpe())
  whole = path.read_bytes()
  for end in [*range(0, 60), *range(60, len(whole), 97), len(whole) - 1]:
    path.write_bytes(whole[:end])
    with pytest.raises(DataError, match='is truncated or not a GGUF file: .* bytes at'):
      gguf.metadata(path)
  head = b'GGUF' + struct.pack('<IQ', 3, 0)
  one, key = struct.pack('<Q', 1), struct.pack('<Q', 1) + b'k'
  for data, message in [
      (b'GGML' + whole[4:], "is not a GGUF file: it begins with b'GGML'"),
      (b'GGUF' + struct.pack('<I', 1) + whole[8:], 'GGUF version 1; known: 2 and 3'),
      (head + struct.pack('<Q', 2**60), f'claims {2**60} metadata keys; the limit is 65536'),
      (head + struct.pack('<Q', 60_000), 'list of 60000 metadata keys takes 780000 bytes at 24'),
      (head + struct.pack('<QQ', 1, 2**62), f'a key takes {2**62} bytes at 32, of 96 .*100000000'),
      (head + one + key + struct.pack('<IIQ', 9, 4, 2**60), f"claims {2**60} numbers of 'k'; .* 8"),
      (head + one + key + struct.pack('<I', 77), "the value of 'k' has type 77; known: 0 to 12"),
      (head + one + key + struct.pack('<IIQ', 9, 9, 1), 'an array of type 9; known: 0 to 8, 10'),
      (head + struct.pack('<Q', 2) + (key + struct.pack('<II', 4, 1)) * 2, "key 'k' occurs twice"),
  ]:
    path.write_bytes(data + bytes(64))
    with pytest.raises(DataError, match=message):
      gguf.metadata(path)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(DataError, match='is not a regular file'):
    gguf.metadata(path)
  vocab.load.cache_clear()
  with pytest.raises(DataError, match='cannot read vocabulary .*No such file'):
    vocab.load(str(tmp_path / 'none.gguf'))


@pytest.fixture(scope='module')
def smollm():
  return vocab.load(str(file(*FILES['smollm2'])))


def merged(word, ranks):
  """Merges the byte pairs of one piece of text by rank, one at a time."""
  parts = list(word)
  while len(parts) > 1:
    rank, i = min((ranks.get((a, b), 1e9), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
    if rank == 1e9:
      break
    parts[i:i + 2] = [parts[i] + parts[i + 1]]
  return parts


@pytest.mark.weights
def test_smollm2_against_merging_by_hand(smollm):
  v = smollm
  assert (v.size, v.bos_id, v.eos_id, v.unk_id, v.starts_with_bos) == (49152, 1, 2, 0, False)
  meta = gguf.metadata(v.spec)
  ids = {t: i for i, t in enumerate(meta['tokenizer.ggml.tokens'])}
  ranks = {tuple(m.split(' ')): i for i, m in enumerate(meta['tokenizer.ggml.merges'])}
  # GPT-2's rule for ASCII, after digits are split off.
  words = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+")
  for row in corpora.load('qa', 'validation')[:40]:
    text = row['context'].encode('ascii', 'ignore').decode()
    expected = []
    for part in re.split(r'(\d)', text):
      for word in words.findall(part):
        expected += [ids[t] for t in merged(
            word.replace(' ', 'Ġ').replace('\n', 'Ċ').replace('\t', 'ĉ'), ranks)]
    assert v.encode(text) == expected and v.decode(expected) == text


@pytest.mark.weights
def test_smollm2_chats(smollm):
  chat = smollm.chat([{'role': 'user', 'content': 'Hi'}])
  assert chat == ('<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by '
                  'Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n')
  ids = smollm.encode(chat)
  assert ids.count(1) == 3 and ids.count(2) == 2 and ids[0] == 1
  assert smollm.decode(ids) == chat[len('<|im_start|>'):chat.index('<|im_end|>')]
