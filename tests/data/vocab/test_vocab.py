import random

import pytest

from t5lab.data import vocab
from t5lab.data.sources import corpora
from t5lab.errors import DataError, UsageError
from t5lab.tools.prepare import embedded_vocabs, vocabulary

SPECS = ['byte', 't5lab_2048', 't5lab_8192']


@pytest.mark.parametrize('spec, size', zip(SPECS, [359, 2048, 8192]))
def test_ids(spec, size):
  v = vocab.load(spec)
  assert (v.spec, v.size) == (spec, size)
  assert (v.pad_id, v.eos_id, v.unk_id) == (0, 1, 2)
  assert [v.sentinel(0), v.sentinel(1), v.sentinel(99)] == [size - 1, size - 2, size - 100]
  with pytest.raises(ValueError):
    v.sentinel(100)


def test_embedded_lists_what_ships():
  assert vocab.embedded() == SPECS
  assert vocab.load().spec == 't5lab_2048'


def test_byte_ids_are_those_of_byt5():
  v = vocab.load('byte')
  assert v.encode('Aé\n') == [3 + 65, 3 + 0xC3, 3 + 0xA9, 3 + 10]
  assert v.decode([68, 198, 172, 13]) == 'Aé\n'


def test_byte_with_another_number_of_sentinels():
  v = vocab.load('byte:125')
  assert (v.size, v.num_sentinels, v.sentinel(0), v.sentinel(124)) == (384, 125, 383, 259)
  assert v.encode('a<extra_id_124>') == [100, 259]
  assert v.sha256 != vocab.load('byte').sha256 == vocab.load('byte:100').sha256
  none = vocab.load('byte:0')
  assert (none.size, none.num_sentinels) == (259, 0)
  assert none.decode(none.encode('<extra_id_0>')) == '<extra_id_0>'
  with pytest.raises(UsageError, match='at most 100,000 sentinels'):
    vocab.load('byte:999999')


def test_the_rest_of_the_interface_of_embedded_vocabularies():
  v = vocab.load('t5lab_2048')
  assert (v.bos_id, v.mask_id, v.cls_id, v.sep_id, v.prefix, v.starts_with_bos) == (
      None, None, None, None, (), False)
  assert (v.num_sentinels, v.sentinel_step, v.chat_template) == (100, -1, None)
  assert v.encode_target('Ja') == v.encode('Ja')
  assert v.frame('a', 'b') == [*v.encode('a'), 1, *v.encode('b'), 1]
  assert not any(map(vocab.source_files, ['byte', 'byte:3', 't5lab_2048']))
  with pytest.raises(DataError, match="'t5lab_2048' has no chat template"):
    v.chat([{'role': 'user', 'content': 'x'}])


def test_rows_of_an_embedding():
  assert [vocab.padded_size(vocab.load(s)) for s in ('byte:125', 'byte', 't5lab_2048')] == [
      384, 384, 2048]
  assert vocab.padded_size(vocab.load('byte'), 8) == 360
  vocab.check_embedding_size(vocab.load('byte'), 359, 'the model')
  with pytest.raises(UsageError) as e:
    vocab.check_embedding_size(vocab.load('t5lab_2048'), 1948, 'small.gguf')
  assert str(e.value) == (
      "vocabulary 't5lab_2048': 1,948 ids + 100 sentinels = 2,048; the embedding of small.gguf has "
      '1,948 rows and needs at least 2,048 (padded to a multiple of 128: 2,048)')


def test_literal_pieces():
  v = vocab.load('t5lab_2048')
  ids = v.encode('translate English to German: Gerät')
  assert ''.join(v.pieces(ids)) == ' translate English to German: Gerät'
  assert len(ids) < 10
  assert v.pieces(v.encode('\n\t')) == [' ', '\n', '\t']


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('text', [
    '', ' ', '   ', 'a', ' a', '  a  b   ', '\n', 'a\n\n\tb\r\n ', '{x}  {{y}}', '\0', 'a\0\0b',
    '\u2581', ' \u2581 a\u2581\u2581b', '👩‍👩‍👧 😀', 'e\u0301 é', '\ufeffx', '\u2028\x85', '\ufffd',
    ' \u2047 ', '<0x0A>', '</s><pad><unk>', 'x <extra_id_0> y<extra_id_99>', '<extra_id_100>',
    '<extra_id_01>', '日本語 ελληνικά кириллица'])
def test_lossless(spec, text):
  v = vocab.load(spec)
  assert v.decode(v.encode(text)) == text


@pytest.mark.parametrize('spec', SPECS)
def test_lossless_on_random_unicode(spec):
  v, rng = vocab.load(spec), random.Random(spec)
  kinds = [
      lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
      lambda: rng.choice(' \n\t\0\u2581{}<>_ab'),
      lambda: rng.choice(['<extra_id_', '7>', '<0x41>', 'the ', '\u2581\u2581', '<extra_id_7>'])]
  for _ in range(3000):
    text = ''.join(rng.choice(kinds)() for _ in range(rng.randrange(12)))
    ids = v.encode(text)
    assert v.decode(ids) == text
    assert all(3 <= i < v.size for i in ids)


@pytest.mark.parametrize('spec', SPECS)
def test_space_mark_is_encoded_as_bytes(spec):
  v = vocab.load(spec)
  mark, space = v.encode('a\u2581b'), v.encode('a b')
  assert mark != space
  assert len(mark) >= 5  # a, three bytes, b


@pytest.mark.parametrize('spec', SPECS)
def test_sentinel_text_is_one_id(spec):
  v = vocab.load(spec)
  assert v.encode('a<extra_id_3>b')[-2] == v.sentinel(3)
  assert v.decode([v.sentinel(0), v.sentinel(12)]) == '<extra_id_0><extra_id_12>'


def test_decode_stops_at_eos_and_skips_pad():
  v = vocab.load('byte')
  assert v.decode([0, 68, 0, 69, 1, 70]) == 'AB'
  assert v.decode([68, 2, 359, -1]) == 'A' + 3 * ' \u2047 '


@pytest.mark.parametrize('spec', SPECS)
def test_broken_utf8_prints_a_replacement(spec):
  v = vocab.load(spec)
  assert v.decode(v.encode('\U0001F47E')[:-1]).strip() in ('\ufffd', '\ufffd\ufffd', '\ufffd' * 3)


def test_a_lone_surrogate_is_invalid():
  with pytest.raises(DataError, match=r'lone surrogate U\+D800 at character 1'):
    vocab.load('byte').encode('a\ud800')


def test_unknown_specs(tmp_path):
  with pytest.raises(UsageError, match="no vocabulary 't5lab_2047'. Did you mean 't5lab_2048'"):
    vocab.load('t5lab_2047')
  with pytest.raises(DataError, match='cannot read vocabulary .*none.model.*No such file'):
    vocab.load(str(tmp_path / 'none.model'))
  with pytest.raises(UsageError, match='path that ends in .model, tokenizer.json, vocab.txt'):
    vocab.load(str(tmp_path / 'tokens.bin'))
  (tmp_path / 'bad.model').write_bytes(b'not a model')
  with pytest.raises(DataError, match='bad.model is not a sentencepiece model'):
    vocab.load(str(tmp_path / 'bad.model'))


def _train(**options):
  import io

  import sentencepiece
  model = io.BytesIO()
  texts = [row['en'] for row in corpora.load('ende', 'train')[:2000]]
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts), model_writer=model, vocab_size=200, minloglevel=2, **options)
  return model.getvalue()


def test_foreign_model_file_with_sentencepiece_defaults(tmp_path):
  """T5's kind of model: no byte fallback, whitespace collapsed, unknown characters lost."""
  path = tmp_path / 'foreign.model'
  path.write_bytes(_train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
  v = vocab.load(str(path))
  assert v.size == 300
  assert v.decode(v.encode('  the   code ')) == 'the code'
  assert v.decode(v.encode('the \u65e5')) == 'the  \u2047 '


def test_model_without_an_end_of_sequence_is_refused():
  with pytest.raises(DataError, match=r'no end-of-sequence piece \(pad, eos, unk ids \(0, -1, 2\)'):
    vocab.sentencepiece_model('x', _train(pad_id=0, eos_id=-1, unk_id=2, bos_id=-1))


@pytest.fixture(scope='module')
def lines():
  return embedded_vocabs.balanced_lines()


def test_training_is_deterministic(lines):
  assert vocabulary.train(lines[::60], 512) == vocabulary.train(lines[::60], 512)


def test_training_reproduces_the_embedded_model(lines):
  again = vocab.sentencepiece_model('again', vocabulary.train(lines, 2048))
  shipped = vocab.load('t5lab_2048')
  pieces = lambda v: set(v.pieces(range(259, v.size)))
  # Equal on the machine that trained it; another libm may swap a few pieces.
  assert len(pieces(again) & pieces(shipped)) > 0.98 * len(pieces(shipped))


def test_tokens_per_word_of_the_table():
  rates = embedded_vocabs.tokens_per_word(vocab.load('t5lab_2048'))
  assert round(rates['de'], 2) == 2.70 and round(rates['en'], 2) == 1.85
