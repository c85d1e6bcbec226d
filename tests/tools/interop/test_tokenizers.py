"""Tokenizers of foreign directories: ids equal to transformers', hostile files, round trips."""

import base64
import functools
import json

import hf_models
from hf_models import hf as transformers
import pytest
import tokenizer_files
from tokenizer_files import (
  DIRECTORIES,
  VARIANTS,
  added,
  byte_level,
  llama,
  sentinels,
  size,
  t5,
  write,
)

import t5lab
from t5lab import cli
from t5lab.data import vocab
from t5lab.errors import DataError, UsageError
from t5lab.tools.interop import (
  came_with,
  certify,
  hf_tokenizer,
  probe_texts,
  reference,
  screen,
  token_ids,
)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """name -> the directory of tokenizer_files."""
  @functools.cache
  def get(name):
    make = {**DIRECTORIES, **VARIANTS}[name]
    return write(tmp_path_factory.mktemp('made') / name, make())
  return get


def load(folder):
  return vocab.load(came_with.vocabulary_spec(folder, came_with.files_of(folder)))


def _texts():
  from t5lab.data.sources import corpora
  return [row['de'] for row in corpora.load('ende', 'validation')[:20]]


def compare(folder, v, kind='encoder_decoder'):
  return token_ids.compare(folder, v, kind=kind, starts=v.starts_with_bos)


DECODERS = ('llama', 'gemma', 'gpt2', 'qwen2')
UNOPENED = ('umt5',)      # transformers 5.24 opens no umT5 without a tokenizer.json


@pytest.mark.parametrize('name', sorted({*DIRECTORIES, *VARIANTS} - set(UNOPENED)))
def test_ids_are_those_of_transformers(name, directory):
  kind = 'decoder' if name.startswith(DECODERS) else 'encoder_decoder'
  v = load(directory(name))
  entry = compare(directory(name), v, kind)
  assert entry['compared'] == entry['equal'] > 220
  assert entry['with'].startswith('transformers 5.')
  # LLaMA was trained with BOS, which transformers 5 leaves out of a tokenizer.model by itself.
  assert ('start' in entry) == (name == 'llama' or name.startswith('llama_alone'))


@pytest.mark.parametrize('name', ['t5_listed', 'mt5_inside', 'byt5', 'llama_legacy', 'llama_chatml',
                                  'gpt2', 'roberta', 'qwen2', 'bert_added', 'bert_cased', 'nllb',
                                  'pegasus', 'mbart50', 'xlm_roberta', 'gemma'])
def test_ids_are_those_of_transformers_after_it_saved_them(name, directory, tmp_path):
  """save_pretrained of transformers 5 writes a tokenizer.json, which the class rebuilds."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory(name))
  tokenizer.save_pretrained(tmp_path)
  (tmp_path / 'config.json').write_bytes((directory(name) / 'config.json').read_bytes())
  kind = 'decoder' if name.startswith(DECODERS) else 'encoder_decoder'
  assert compare(tmp_path, load(tmp_path), kind)['equal'] > 220


def test_sentinels_and_added_tokens_have_their_own_ids(directory):
  first = size(t5())
  v = load(directory('t5'))
  assert (v.size, v.sentinel(0), v.sentinel(99)) == (first + 100, first + 99, first)
  assert [load(directory(f't5_{n}_sentinels')).num_sentinels for n in (0, 20, 200)] == [0, 20, 200]
  v = load(directory('t5_added'))
  assert v.encode('<n>') == [first + 100] and v.encode('x a b')[-1] == first + 101
  v = load(directory('t5_listed'))
  assert (v.sentinel(0), v.encode('<n>'), v.size) == (first + 99, [first + 100], first + 102)
  assert load(directory('t5_class_of_config')).num_sentinels == 100      # LongT5
  v = load(directory('umt5'))
  assert v.encode('x\t \n y') == load(directory('t5')).encode('x y')
  assert (v.size, v.sentinel(0), v.sentinel(299)) == (first + 300, first, first + 299)
  v = load(directory('byt5'))
  assert (v.spec, v.sentinel(0), v.sentinel(124), v.size) == ('byt5:125', 259, 383, 384)
  assert v.encode('a <pad> b') == [100, 0, 101] and v.decode([100, 259]) == 'a<extra_id_0>'
  assert vocab.load('byte:125').sentinel(0) == 383          # of the pretraining, and of T5X
  v = load(directory('llama_chatml'))
  assert (v.eos_id, v.encode('<|im_start|>')) == (size(llama()) + 1, [size(llama())])
  v = load(directory('bert_added'))
  assert v.encode('a [NEW] foo bar')[1:] == [len(tokenizer_files.WORDS) + i for i in range(2)]


def test_spaces_of_llama(directory):
  """A sentencepiece model by itself marks every leading space; the class marks a text once."""
  alone, by_class = load(directory('llama')), load(directory('llama_first'))
  space = alone.encode(' ')
  assert len(alone.encode('  a')) == len(by_class.encode('  a')) + 1 and len(space) == 2
  no_prefix = load(directory('llama_no_prefix'))
  assert no_prefix.decode(no_prefix.encode(' a  b')) == ' a  b' and not no_prefix.starts_with_bos
  for v in (alone, by_class, no_prefix):
    assert v.decode(v.encode('x  y\n\n z')) == 'x  y\n\n z'


def test_framing(directory):
  v = load(directory('roberta'))
  assert v.frame('a')[0] == v.cls_id == 0 and v.frame('a')[-1] == v.sep_id == 2
  assert load(directory('bart')).prefix == (0,)
  v = load(directory('gpt2_bos'))
  assert (v.starts_with_bos, v.prefix, v.bos_id) == (True, (), v.eos_id)


@pytest.mark.parametrize('name', ['roberta', 'xlm_roberta', 'bert_added', 't5'])
def test_framing_of_pairs(name, directory):
  v, tokenizer = load(directory(name)), transformers.AutoTokenizer.from_pretrained(directory(name))
  assert v.frame('a text', 'and b') == tokenizer('a text', 'and b').input_ids


def test_languages_around_a_text(directory):
  v = load(directory('mbart50'))
  assert v.piece(v.prefix[0]) == 'de_DE' and v.frame('a')[-1] == v.eos_id == 2
  assert v.target_prefix == v.prefix                         # without tgt_lang
  v = load(directory('mbart'))
  assert v.prefix == () and v.pieces(v.frame('a')[-2:]) == ['</s>', 'de_DE']
  assert v.piece(v.target_language) == 'ro_RO'
  v = load(directory('nllb_legacy'))
  assert v.pieces(v.frame('a')[-2:]) == ['</s>', 'deu_Latn']
  assert v.pieces(v.target_prefix) == ['fra_Latn']
  v, other = load(directory('m2m_100_de')), load(directory('m2m_100'))
  first = len(v.encode('a')) and v.size - 100
  assert v.prefix == (first + 16,) and v.target_prefix == (first + 24,)
  assert other.prefix == other.target_prefix == (first + 18,) and other.sha256 != v.sha256
  assert v.decode([first + 24, *v.encode('Ein Text'), v.eos_id]) == 'Ein Text'


@pytest.mark.parametrize('name, source, target', [
    ('mbart', 'fr_XX', 'en_XX'), ('mbart50', 'fr_XX', 'gl_ES'), ('nllb', 'fra_Latn', 'eng_Latn'),
    ('nllb_legacy', 'fra_Latn', 'eng_Latn'), ('m2m_100', 'fr', 'zu')])
def test_other_languages_than_those_of_the_files(name, source, target, directory):
  v = load(directory(name)).between(source, target)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory(name))
  tokenizer.src_lang = source
  assert v.frame('a text') == tokenizer('a text').input_ids
  text = target if name != 'm2m_100' else f'__{target}__'
  assert v.target_language == tokenizer.convert_tokens_to_ids(text)
  assert v.target_prefix == (() if name == 'mbart' else (v.target_language,))
  with pytest.raises(UsageError, match="has no language 'xx'"):
    v.between('xx', None)
  with pytest.raises(UsageError, match='It has: none'):
    load(directory('t5')).between(None, target)


def test_marian_has_a_side_for_each_language(directory):
  v, separate = load(directory('marian')), load(directory('marian_separate'))
  text = 'the same words'
  assert v.encode('>>fr<<' + text) == [v.size - 2, *v.encode(text)]
  assert v.decode(v.encode_target(text)) == text == separate.decode(separate.encode_target(text))
  assert v.encode(text) == separate.encode(text) != separate.encode_target(text)
  tokenizer, texts = transformers.AutoTokenizer.from_pretrained(directory('marian')), _texts()
  assert any(v.encode(text) != v.encode_target(text) for text in texts)
  for text in texts:
    theirs = tokenizer(text_target=text, add_special_tokens=False).input_ids
    assert v.encode_target(text) == theirs
  assert (v.eos_id, v.unk_id, v.pad_id, v.frame('')) == (0, 1, v.size - 1, [0])
  again = vocab.load(vocab.export(v.spec, directory('marian').parent / 'copy'))
  assert again.sha256 == v.sha256 and again.encode_target(text) == v.encode_target(text)


@pytest.mark.parametrize('name', ['t5_listed', 'llama', 'gpt2_added', 'bert_added', 'umt5'])
def test_an_exported_vocabulary_keeps_its_ids(name, directory, tmp_path):
  v = load(directory(name))
  again = vocab.load(vocab.export(v.spec, tmp_path))
  assert (again.sha256, again.size, again.sentinels) == (v.sha256, v.size, v.sentinels)
  texts = probe_texts.texts(['<n>', '<unk>', '[NEW]'])
  assert [again.encode(text) for text in texts] == [v.encode(text) for text in texts]


@pytest.mark.parametrize('name', ['BertJapaneseTokenizer', 'BertweetTokenizer', 'CanineTokenizer',
                                  'DNATokenizer', 'PhobertTokenizer', 'EsmTokenizerFast'])
def test_word_lists_of_other_tokenizers_are_refused_by_name(name, tmp_path):
  write(tmp_path, {**DIRECTORIES['bert'](), 'tokenizer_config.json': {'tokenizer_class': name}})
  with pytest.raises(UsageError, match=f'a {name.removesuffix("Fast")}, which t5lab does not'):
    load(tmp_path)


@pytest.mark.parametrize('name, files, message', [
    ('t5', {'added_tokens.json': {'<n>': 9999}}, "'<n>' is listed with id 9999, but the next free"),
    ('t5', {'added_tokens.json': {'<n>': '?'}}, 'id of an added token must be a number'),
    ('t5', {'added_tokens.json': []}, 'added_tokens.json must hold a JSON object'),
    ('t5_listed', {'tokenizer_config.json': {'extra_ids': -1}}, 'extra_ids must be 0 to 100,000'),
    ('t5', {'tokenizer_config.json': {'added_tokens_decoder': {'1': {'special': 3}}}}, 'flags are'),
    ('t5', {'tokenizer_config.json': {'added_tokens_decoder': {'1': {}}}}, 'without a text'),
    ('t5', {'tokenizer_config.json': {'tokenizer_class': 3}}, 'tokenizer_class must be a name'),
    ('t5', {'tokenizer_config.json': {'eos_token': ['x']}}, 'eos_token must be a text'),
    ('t5', {'special_tokens_map.json': {'pad_token': 3}}, 'pad_token must be a text'),
    ('byt5', {'tokenizer_config.json': {'tokenizer_class': 'ByT5Tokenizer',
                                        'added_tokens_decoder': [1]}}, 'must be an object'),
    ('marian', {'tokenizer_config.json': {'eos_token': ['x']}}, "has no \\['x'\\], its eos_token"),
    ('m2m_100', {'tokenizer_config.json': {'tgt_lang': ['x']}}, 'tgt_lang must be one of'),
    ('t5', {'spiece.model': b'\xff\xff'}, 'is not a sentencepiece model'),
    ('gpt2', {'merges.txt': 'a\n'}, 'line 1 must be two tokens'),
    ('gpt2', {'merges.txt': 'zz yy\n'}, 'does not make a GPT2Tokenizer'),
    ('gpt2', {'vocab.json': {'a': 'b'}}, 'must hold an object of tokens and ids'),
    ('bert', {'vocab.txt': 'a\nb\n'}, r'has no \[UNK\], \[CLS\], \[SEP\] among its 2 lines'),
    ('marian', {'source.spm': b'x'}, 'source.spm of .* is not a sentencepiece model'),
    ('marian', {'vocab.json': {'a': 0}}, "has no '<unk>', its unk_token, in vocab.json"),
    ('marian', {'vocab.json': {'a': []}}, 'must hold an object of tokens and ids'),
    ('marian_separate', {'target_vocab.json': {'a': 0}}, "has no '<unk>' in target_vocab.json"),
    ('m2m_100', {'tokenizer_config.json': {'tokenizer_class': 'M2M100Tokenizer',
                                           'src_lang': 'xx'}}, 'src_lang must be one of af am'),
    ('m2m_100', {'tokenizer_config.json': {'tokenizer_class': 'M2M100Tokenizer',
                                           'language_codes': 'x'}}, 'must be m2m100 or wmt21'),
    ('mbart', {'tokenizer_config.json': {'tokenizer_class': 'MBartTokenizer',
                                         'tgt_lang': 'xx'}}, "has no 'xx', its tgt_lang"),
    ('mbart50', {'tokenizer_config.json': {'tokenizer_class': 'MBart50Tokenizer',
                                           'src_lang': 'xx'}}, "has no 'xx'"),
])
def test_malformed_files(name, files, message, directory, tmp_path):
  write(tmp_path, {**DIRECTORIES[name](), **files})
  with pytest.raises((DataError, UsageError), match=message) as e:
    load(tmp_path)
  assert '\n' not in str(e.value)


def test_a_missing_merges_txt(tmp_path):
  write(tmp_path, {'vocab.json': byte_level()[0], 'config.json': {'model_type': 'gpt2'}})
  with pytest.raises(DataError, match='has no merges.txt beside it'):
    load(tmp_path)


@pytest.mark.parametrize('listed, spec', [
    (added(259, *sentinels(5)), 'byt5:5'), (added(259, *reversed(sentinels(5))), 'byte:5'),
    ({}, 'byt5:125'), (added(259, 'x'), None), (added(260, *sentinels(5)), None)])
def test_the_order_of_byt5s_sentinels_is_read_from_their_ids(listed, spec, tmp_path):
  write(tmp_path, {'config.json': {'model_type': 't5'}, 'tokenizer_config.json': {
      'tokenizer_class': 'ByT5Tokenizer', 'added_tokens_decoder': listed}})
  if spec:
    assert hf_tokenizer.byte_spec(tmp_path) == spec
  else:
    with pytest.raises(UsageError, match='adds tokens to ByT5Tokenizer'):
      hf_tokenizer.byte_spec(tmp_path)


# -- conversion -----------------------------------------------------------------------------------

# Architectures of tiny models with room for a tokenizer's ids.
MODELS = {
    't5': lambda n: transformers.T5ForConditionalGeneration(transformers.T5Config(**{
        **hf_models._T5, 'vocab_size': n, 'num_layers': 1, 'num_decoder_layers': 1})),
    'gpt2': lambda n: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=n, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=n - 1,
        eos_token_id=n - 1)),
    'llama': lambda n: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        **hf_models._LLAMA, 'vocab_size': n, 'num_hidden_layers': 1})),
    'bert': lambda n: transformers.BertForMaskedLM(transformers.BertConfig(**{
        **hf_models._BERT, 'vocab_size': n, 'num_hidden_layers': 1}))}


def run(*argv, capsys):
  code = cli.main(['convert', *map(str, argv)])
  out = capsys.readouterr()
  return code, out.out, out.err


def checkpoint(folder, name, rows):
  """A tiny model with the tokenizer of DIRECTORIES[name]."""
  hf_models.torch.manual_seed(0)
  family = next(family for family in MODELS if name.startswith(family) or name == 'byt5')
  MODELS[family](rows).save_pretrained(folder)
  files = DIRECTORIES[name]()
  files.pop('config.json')
  return write(folder, files)


@pytest.mark.parametrize('name, rows', [
    ('t5_listed', 512), ('byt5', 384), ('llama_chatml', 402), ('gpt2_added', 403),
    ('bert_added', 128)])
def test_the_certificate_says_that_ids_are_equal_there_and_back(name, rows, tmp_path, capsys):
  source = checkpoint(tmp_path / 'source', name, rows)
  code, out, err = run('--from', 'hf', '--to', 't5lab', source, tmp_path / 'ours', capsys=capsys)
  assert code == 0, err
  proof = json.loads((tmp_path / 'ours' / certify.NAME).read_text())['token_ids']
  assert proof['compared'] == proof['equal'] > 220 and 'all equal to transformers 5' in out
  lab = t5lab.load(tmp_path / 'ours')
  v = load(source)
  assert (lab.vocab.sha256, lab.vocab.size) == (v.sha256, v.size)

  code, _, err = run('--from', 't5lab', '--to', 'hf', tmp_path / 'ours', tmp_path / 'back',
                     capsys=capsys)
  assert code == 0, err
  back = json.loads((tmp_path / 'back' / certify.NAME).read_text())['token_ids']
  assert back['compared'] == back['equal'] > 220
  before, after = (transformers.AutoTokenizer.from_pretrained(folder)
                   for folder in (source, tmp_path / 'back'))
  for text in probe_texts.texts(before.get_added_vocab())[1:]:
    assert before(text).input_ids == after(text).input_ids


def test_generation_into_a_language(tmp_path, capsys):
  config = transformers.M2M100Config(
      vocab_size=512, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
      decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
      max_position_embeddings=64)
  hf_models.torch.manual_seed(0)
  model = transformers.M2M100ForConditionalGeneration(config).eval()
  with hf_models.torch.no_grad():
    for p in model.parameters():         # so that a model this small hears its first token
      p.mul_(8. if p.ndim > 1 else 1.)
  model.save_pretrained(tmp_path / 'source')
  files = DIRECTORIES['m2m_100']()
  files.pop('config.json')
  write(tmp_path / 'source', files)
  code, _, err = run('--from', 'hf', '--to', 't5lab', tmp_path / 'source', tmp_path / 'ours',
                     capsys=capsys)
  assert code == 0, err
  lab, tokenizer = t5lab.load(tmp_path / 'ours'), transformers.AutoTokenizer.from_pretrained(
      tmp_path / 'source', src_lang='fr')
  batch = tokenizer('a text', return_tensors='pt')
  first = tokenizer.convert_tokens_to_ids('__zu__')
  theirs = model.generate(**batch, forced_bos_token_id=first, max_new_tokens=6, num_beams=1)
  expected = lab.vocab.decode(theirs[0, 1:].tolist())
  options = dict(source_language='fr', length=6, beams=1)
  assert lab.generate(['a text'], target_language='zu', **options) == [expected]
  assert lab.generate(['a text'], target_language='af', **options) != [expected]
  with pytest.raises(UsageError, match="has no language 'zz'"):
    lab.generate(['a text'], target_language='zz')

  # And on the command line.
  texts = tmp_path / 'texts'
  texts.write_text('a text\n')
  argv = ['infer', '--workdir', tmp_path / 'ours', '--input', texts, '--source-language', 'fr']
  assert cli.main([*map(str, argv), '--target-language', 'zu', '--max-length', '6',
                   '--beams', '1']) == 0
  assert capsys.readouterr().out == f'{expected}\n'
  assert cli.main([*map(str, argv), '--embed']) == 2
  assert '--target-language are for texts, not for --embed' in capsys.readouterr().err


def test_another_id_is_a_refusal_with_the_text_and_both_ids(tmp_path, capsys, monkeypatch):
  source = checkpoint(tmp_path / 'source', 'byt5', 384)
  monkeypatch.setattr(hf_tokenizer, 'byte_spec', lambda folder: 'byte:125')
  code, _, err = run('--from', 'hf', '--to', 't5lab', source, tmp_path / 'ours', capsys=capsys)
  assert code == 2 and err.count('\n') == 1 and not (tmp_path / 'ours').exists()
  assert 'has other token ids than with transformers 5' in err and 'ByT5Tokenizer' in err
  assert "'<pad>'" in err and '[63, 115, 100, 103, 65] here, [0] there' in err


def test_a_certificate_without_transformers_says_that_ids_were_not_compared(
    tmp_path, capsys, monkeypatch):
  source = checkpoint(tmp_path / 'source', 'byt5', 384)
  reason = {}
  for form in ('--golden', 'absent'):
    if form == 'absent':
      monkeypatch.setattr(reference, 'available', lambda: False)
    options = ('--golden',) if form == '--golden' else ()
    code, out, err = run('--from', 'hf', '--to', 't5lab', source, tmp_path / form, *options,
                         capsys=capsys)
    assert code == 0 and 'token ids were not compared' in out, err
    reason[form] = json.loads((tmp_path / form / certify.NAME).read_text())['token_ids']
  assert reason == {
      '--golden': {'compared': 0, 'reason': 'transformers was not asked (--golden)'},
      'absent': {'compared': 0, 'reason': 'transformers is not installed'}}


@pytest.mark.parametrize('spec', ['byte', 'byte:125', 'byt5:30', 't5lab_2048'])
def test_vocabularies_of_ours_are_written_with_their_ids(spec, tmp_path):
  """Also the order of the byte vocabularies' sentinels."""
  v = vocab.load(spec)
  if spec.startswith('byt'):
    write(tmp_path, {'tokenizer_config.json': hf_tokenizer.byte_config(spec)})
  else:
    hf_tokenizer.write(tmp_path, spec)
  write(tmp_path, {'config.json': {'model_type': 't5'}})
  entry = token_ids.compare(tmp_path, v, kind='encoder_decoder', starts=False, ours=True)
  assert entry['equal'] > 160
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  names = sentinels(v.num_sentinels)
  assert tokenizer.convert_tokens_to_ids(names) == list(v.sentinels)


def test_llama_3s_bytes_are_not_llamas_pieces(directory, tmp_path):
  """A byte-level tokenizer.json under LlamaTokenizer is read as it stands."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory('gpt2'))
  tokenizer.save_pretrained(tmp_path)
  write(tmp_path, {'config.json': {'model_type': 'llama'}, 'tokenizer_config.json': {
      'tokenizer_class': 'LlamaTokenizerFast', 'eos_token': '<|endoftext|>'}})
  v = load(tmp_path)
  assert compare(tmp_path, v, 'decoder')['equal'] > 220
  assert v.encode('a b') == load(directory('gpt2')).encode('a b')


def test_a_directory_that_transformers_does_not_open_is_said_to_be_uncompared(directory):
  entry = compare(directory('umt5'), load(directory('umt5')))
  assert entry['compared'] == 0 and 'does not open the tokenizer' in entry['reason']


def test_a_class_that_reads_texts_unlike_its_tokenizer_json_is_named(directory, tmp_path):
  """transformers 5 rebuilds LLaMA's tokenizer.json and loses how version 4 read leading spaces."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory('llama_first'))
  tokenizer.save_pretrained(tmp_path)
  path = tmp_path / 'tokenizer.json'
  content = json.loads(path.read_text())
  content['pre_tokenizer'] = None
  content['normalizer'] = {'type': 'Sequence', 'normalizers': [
      {'type': 'Prepend', 'prepend': '\u2581'},
      {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'}]}
  write(tmp_path, {'tokenizer.json': content, 'config.json': {'model_type': 'llama'}})
  v, lines = load(tmp_path), []
  assert compare(tmp_path, v, 'decoder')['equal'] > 220
  line = token_ids.rebuilt(v.spec, v, lines.append)
  assert lines == [line] and "e.g. ' ': LlamaTokenizer rebuilds it" in line
  assert token_ids.rebuilt('byt5:5', v, lines.append) == ''


# -- hostile files --------------------------------------------------------------------------------


@functools.cache
def tokenizer_json(name):
  """A tokenizer.json as a dict: 'bytes' is byte-level BPE, 'words' WordPiece, 'pieces' Unigram."""
  import tokenizers
  from tokenizers import models, pre_tokenizers
  ids = {word: i for i, word in enumerate(tokenizer_files.WORDS)}
  model = {'bytes': lambda: models.BPE({**byte_level()[0], '</s>': 400}, []),
           'words': lambda: models.WordPiece(ids, unk_token='[UNK]'),
           'pieces': lambda: models.Unigram([('<unk>', 0.), ('a', -1.), ('</s>', 0.)], unk_id=0)}
  tokenizer = tokenizers.Tokenizer(model[name]())
  if name == 'bytes':
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.add_special_tokens(['[SEP]' if name == 'words' else '</s>'])
  return tokenizer.to_str()


def replaced(*contents):
  return {'type': 'Sequence', 'normalizers': [
      {'type': 'Replace', 'pattern': {'Regex': '.'}, 'content': text} for text in contents]}


def precompiled(data):
  return {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(data).decode()}


def template(i):
  around = {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {
      'x': {'id': 'x', 'ids': [i], 'tokens': ['x']}}}
  around['single'] = [{'SpecialToken': {'id': 'x', 'type_id': 0}},
                      {'Sequence': {'id': 'A', 'type_id': 0}}]
  around['pair'] = [*around['single'], {'Sequence': {'id': 'B', 'type_id': 1}}]
  return around


@pytest.mark.parametrize('name, change, model, message', [
    ('words', {}, {'unk_token': '[NOPE]'}, 'Missing'),
    ('words', {}, {'vocab': {}}, 'Missing'),
    ('pieces', {}, {'unk_id': 99}, 'UnkIdNotInVocabulary'),
    ('pieces', {}, {'unk_id': None}, 'unk_id'),
    ('bytes', {'post_processor': template(4_000_000_000)}, {}, 'puts id 4000000000 around texts'),
    ('bytes', {'pre_tokenizer': {'type': 'FixedLength', 'length': 0}}, {}, 'non-zero'),
    ('pieces', {'normalizer': precompiled(b'abc')}, {}, 'precompiled_charsmap'),
    ('pieces', {'normalizer': precompiled(b'\x08\0\0\0' + b'\xff' * 8 + b'a\0')}, {}, 'bounds'),
    ('bytes', {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': '(a+)+$'},
                                 'behavior': 'Isolated', 'invert': False}}, {}, 'retry-limit'),
    pytest.param('bytes', {'normalizer': replaced(*['a' * 1000] * 6)}, {}, 'ended a process with',
                 marks=pytest.mark.slow),
])
def test_a_tokenizer_json_that_panics_or_explodes(name, change, model, message, tmp_path, capfd):
  content = json.loads(tokenizer_json(name))
  content |= change
  content['model'] |= model
  write(tmp_path, {'tokenizer.json': content, 'config.json': {}})
  with pytest.raises((UsageError, DataError), match=message) as e:
    load(tmp_path)
  assert '\n' not in str(e.value)
  if 'ended a process' not in message:        # without a child: in one line as well
    vocab.load.cache_clear()
    with pytest.raises(DataError):
      vocab.load(str(tmp_path / 'tokenizer.json')).encode('a' * 40 + 'x \u2603')
  capfd.readouterr()


def test_the_child_process_has_a_limit_on_memory_and_time(tmp_path, monkeypatch):
  path = write(tmp_path, {'tokenizer.json': tokenizer_json('bytes')}) / 'tokenizer.json'
  screen.check(path, ['a'])
  monkeypatch.setattr(screen.subprocess, 'run', functools.partial(_without_time, screen.subprocess))
  with pytest.raises(UsageError, match='it took more than 120 s'):
    screen.check(path, ['a'])


def _without_time(subprocess, command, **options):
  raise subprocess.TimeoutExpired(command, options['timeout'])
