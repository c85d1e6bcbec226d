"""Tokenizer directories of every class, made from nothing: {name: content} for `write`."""

import functools
import io
import json

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from t5lab.data.sources import corpora

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
         *'abcdefghijklmnopqrstuvwxyzABCXYZ0123456789.,!?[]',
         *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz0123456789'),
         'the', 'quick', 'é', '你', '好']


def write(folder, files):
  """Writes files, JSON unless they are text or bytes, and returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    if not isinstance(content, (bytes, str)):
      content = json.dumps(content)
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
  return folder


@functools.cache
def _texts():
  return [row[key] for key in ('en', 'de') for row in corpora.load('ende', 'train')[:300]]


@functools.cache
def _train(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(_texts()), model_writer=model, minloglevel=2,
      **{'vocab_size': 400, 'hard_vocab_limit': False, **options})
  return model.getvalue()


def t5(**options):
  return _train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **options)


def llama(**options):
  return _train(model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
                remove_extra_whitespaces=False, **options)


def size(model: bytes) -> int:
  return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


@functools.cache
def byte_level(first=(), last=()):
  """(vocab.json, merges.txt) of byte-level BPE, with special tokens before and after its own."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.train_from_iterator(_texts(), trainers.BpeTrainer(
      vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  model = json.loads(tokenizer.to_str())['model']
  tokens = [*first, *sorted(model['vocab'], key=model['vocab'].get), *last]
  merges = [' '.join(pair) for pair in model['merges']]
  return {token: i for i, token in enumerate(tokens)}, '\n'.join(['#version: 0.2', *merges, ''])


def token(text, special=True, **flags):
  return {'content': text, 'special': special, 'normalized': not special, 'lstrip': False,
          'rstrip': False, 'single_word': False, **flags}


def added(first, *texts, **flags):
  """added_tokens_decoder with ids from `first` on."""
  return {str(first + i): token(text, **flags) for i, text in enumerate(texts)}


def sentinels(count):
  return [f'<extra_id_{i}>' for i in range(count)]


def _t5(family='t5', model=None, **config):
  config = {'tokenizer_class': 'T5Tokenizer', **config}
  return {'spiece.model': model or t5(), 'config.json': {'model_type': family},
          'tokenizer_config.json': config}


def _llama(*, model=None, more=(), **config):
  config = {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True, **config}
  return {'tokenizer.model': model or llama(), 'config.json': {'model_type': 'llama'},
          'tokenizer_config.json': config, **dict(more)}


def _bpe(family, files, **config):
  vocab, merges = files
  out = {'vocab.json': vocab, 'merges.txt': merges, 'config.json': {'model_type': family}}
  return {**out, 'tokenizer_config.json': config} if config else out


def _bert(family='bert', more=(), **config):
  return {'vocab.txt': '\n'.join(WORDS) + '\n', 'config.json': {'model_type': family},
          'tokenizer_config.json': config, **dict(more)}


def _fairseq(family, cls, model_type='unigram', **config):
  model = _train(unk_id=0, bos_id=1, eos_id=2, pad_id=-1, model_type=model_type)
  return {'sentencepiece.bpe.model': model, 'config.json': {'model_type': family},
          'tokenizer_config.json': {'tokenizer_class': cls, **config}}


def _nllb(**config):
  files = _fairseq('m2m_100', 'NllbTokenizer', 'bpe')
  first = size(files['sentencepiece.bpe.model']) + 1
  languages = ['deu_Latn', 'eng_Latn', 'fra_Latn']
  listed = {**added(0, '<s>', '<pad>', '</s>', '<unk>'), **added(first, *languages),
            **added(first + 3, '<mask>', lstrip=True)}
  files['tokenizer_config.json'] |= {'src_lang': 'deu_Latn', 'added_tokens_decoder': listed,
                                     'additional_special_tokens': languages, **config}
  return files


def _marian(separate=False, **config):
  """Each side has a sentencepiece model; vocab.json has the pieces of both, in another order."""
  models = [_train(model_type='bpe', vocab_size=n) for n in (300, 400)]
  pieces = [piece for model in models for piece in pieces_of(model)]
  listed = ['</s>', '<unk>', *sorted({*pieces} - {'</s>', '<unk>', '<s>'}), '>>fr<<', '<pad>']
  out = {'source.spm': models[0], 'target.spm': models[1], 'config.json': {'model_type': 'marian'},
         'vocab.json': {piece: i for i, piece in enumerate(listed)},
         'tokenizer_config.json': {'source_lang': 'en', 'target_lang': 'fr', **config}}
  if separate:
    out['tokenizer_config.json'] |= {'separate_vocabs': True}
    reverse = ['</s>', '<unk>', *reversed(listed[2:-2]), '<pad>']
    out['target_vocab.json'] = {piece: i for i, piece in enumerate(reverse)}
  return out


def pieces_of(model):
  sp = sentencepiece.SentencePieceProcessor(model_proto=model)
  return [sp.id_to_piece(i) for i in range(sp.get_piece_size())]


def _m2m100(**config):
  model = _train(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
  listed = ['<s>', '<pad>', '</s>', '<unk>', *sorted(pieces_of(model)[3:])]
  return {'sentencepiece.bpe.model': model, 'config.json': {'model_type': 'm2m_100'},
          'vocab.json': {piece: i for i, piece in enumerate(listed)},
          'tokenizer_config.json': {'tokenizer_class': 'M2M100Tokenizer', **config}}


GPT2 = ((), ('<|endoftext|>',))
ROBERTA = (('<s>', '<pad>', '</s>', '<unk>'), ('<mask>',))
CHATML = ('<|im_start|>', '<|im_end|>')


def _listed(first):
  """T5's added tokens, as transformers 4 saves them."""
  texts = reversed(sentinels(100))
  return {**added(0, '<pad>', '</s>', '<unk>'), **added(first, *texts), **added(first + 100, '<n>'),
          **added(first + 101, 'foo', special=False)}


DIRECTORIES = {
    't5': lambda: {'spiece.model': t5(), 'config.json': {'model_type': 't5'}},
    **{f't5_{n}_sentinels': functools.partial(_t5, extra_ids=n) for n in (0, 20, 200)},
    't5_added': lambda: {**_t5(), 'added_tokens.json': {'<n>': size(t5()) + 100,
                                                        'a b': size(t5()) + 101}},
    't5_listed': lambda: _t5(extra_ids=100, added_tokens_decoder=_listed(size(t5())),
                             additional_special_tokens=sentinels(100)),
    't5_bytes': lambda: _t5(model=t5(normalization_rule_name='identity', byte_fallback=True,
                                     remove_extra_whitespaces=False)),
    'mt5_inside': lambda: _t5('mt5', t5(user_defined_symbols=','.join(reversed(sentinels(9)))),
                              extra_ids=0, additional_special_tokens=None),
    'mt5_inside_marked': lambda: _t5('mt5', t5(
        user_defined_symbols=','.join(
            f'\u2581{text}' for text in reversed(sentinels(9)))), extra_ids=0),
    'umt5': lambda: _t5('umt5', extra_ids=300, added_tokens_decoder=added(
        size(t5()), *sentinels(300)), additional_special_tokens=sentinels(300)),
    'byt5': lambda: {'config.json': {'model_type': 't5'}, 'tokenizer_config.json': {
        'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125}},
    'byt5_listed': lambda: {'config.json': {'model_type': 't5'}, 'tokenizer_config.json': {
        'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 0,
        'additional_special_tokens': sentinels(125),
        'added_tokens_decoder': {**added(0, '<pad>', '</s>', '<unk>', lstrip=True, rstrip=True),
                                 **added(259, *sentinels(125))}}},
    'llama': lambda: {'tokenizer.model': llama(), 'config.json': {'model_type': 'llama'}},
    'llama_legacy': lambda: _llama(legacy=True),
    'llama_first': lambda: _llama(legacy=False),
    'llama_no_prefix': lambda: _llama(add_prefix_space=False, add_bos_token=False),
    'llama_chatml': lambda: _llama(eos_token='<|im_end|>', more={
        'added_tokens.json': {text: size(llama()) + i for i, text in enumerate(CHATML)}}.items()),
    'llama_listed': lambda: _llama(
        eos_token='<|im_end|>', add_eos_token=True, added_tokens_decoder={
            **added(0, '<unk>', '<s>', '</s>'), **added(size(llama()), '<|im_start|>',
                                                        special=False),
            **added(size(llama()) + 1, '<|im_end|>')}),
    'llama_inside': lambda: _llama(model=llama(user_defined_symbols=','.join(CHATML))),
    'gemma': lambda: {
        'tokenizer.model': _train(
            pad_id=0, eos_id=1, bos_id=2, unk_id=3, model_type='bpe', byte_fallback=True,
            add_dummy_prefix=False, remove_extra_whitespaces=False,
            normalization_rule_name='identity', pad_piece='<pad>', eos_piece='<eos>',
            bos_piece='<bos>', user_defined_symbols='<start_of_turn>,<end_of_turn>'),
        'config.json': {'model_type': 'gemma2'},
        'tokenizer_config.json': {'tokenizer_class': 'GemmaTokenizer', 'add_bos_token': True}},
    'gpt2': lambda: _bpe('gpt2', byte_level(*GPT2)),
    'gpt2_prefix': lambda: _bpe('gpt2', byte_level(*GPT2), tokenizer_class='GPT2Tokenizer',
                                add_prefix_space=True),
    'gpt2_bos': lambda: _bpe('gpt2', byte_level(*GPT2), tokenizer_class='GPT2Tokenizer',
                             add_bos_token=True),
    'gpt2_added': lambda: {
        **_bpe('gpt2', byte_level(*GPT2)), 'added_tokens.json': {'<pad>': 401, '<sep>': 402},
        'special_tokens_map.json': {'eos_token': '<|endoftext|>', 'pad_token': '<pad>'}},
    'roberta': lambda: _bpe('roberta', byte_level(*ROBERTA)),
    'bart': lambda: _bpe('bart', byte_level(*ROBERTA), tokenizer_class='BartTokenizer'),
    'qwen2': lambda: _bpe('qwen2', byte_level(), tokenizer_class='Qwen2Tokenizer',
                          eos_token='<|im_end|>', bos_token=None,
                          added_tokens_decoder=added(400, '<|endoftext|>', *CHATML)),
    'bert': _bert,
    'bert_cased': lambda: _bert(tokenizer_class='BertTokenizer', do_lower_case=False),
    'bert_added': lambda: _bert(more={
        'added_tokens.json': {'[NEW]': len(WORDS), 'foo bar': len(WORDS) + 1}}.items()),
    'bert_listed': lambda: _bert(tokenizer_class='BertTokenizer', added_tokens_decoder={
        **added(0, *WORDS[:5]), **added(len(WORDS), '[NEW]'),
        **added(len(WORDS) + 1, 'Foo', special=False)}),
    'distilbert': lambda: _bert('distilbert', tokenizer_class='DistilBertTokenizer'),
    'xlm_roberta': lambda: _fairseq('xlm-roberta', 'XLMRobertaTokenizer'),
    'mbart50': lambda: _fairseq('mbart', 'MBart50Tokenizer', src_lang='de_DE'),
    'mbart': lambda: _fairseq('mbart', 'MBartTokenizer', src_lang='de_DE', tgt_lang='ro_RO'),
    'nllb': _nllb,
    'nllb_legacy': lambda: _nllb(legacy_behaviour=True, tgt_lang='fra_Latn'),
    'marian': _marian,
    'marian_separate': lambda: _marian(True),
    'm2m_100': _m2m100,
    'm2m_100_de': lambda: _m2m100(src_lang='de', tgt_lang='fr'),
    'm2m_100_wmt21': lambda: _m2m100(language_codes='wmt21', src_lang='ha'),
    'pegasus': lambda: {**_t5('pegasus', tokenizer_class='PegasusTokenizer')},
}

# Forms that people publish: {name: files}. The name begins with the model's family.
VARIANTS = {
    't5_only_extra_ids': lambda: {**DIRECTORIES['t5'](),
                                  'tokenizer_config.json': {'extra_ids': 20}},
    't5_listed_special': lambda: _t5(additional_special_tokens=[*sentinels(100), '<foo>']),
    't5_other_special': lambda: _t5(additional_special_tokens=['<foo>']),
    't5_null_special': lambda: _t5(additional_special_tokens=None),
    't5_special_by_name': lambda: _t5(extra_special_tokens={'image_token': '<image>'}),
    't5_image_token': lambda: _t5(image_token='<image>', mask_token='<mask>'),
    't5_special_map': lambda: {
        **_t5(), 'added_tokens.json': {'<n>': size(t5()) + 100},
        'special_tokens_map.json': {'eos_token': {'content': '</s>'},
                                    'additional_special_tokens': ['<n>']}},
    't5_unsplit': lambda: _t5(split_special_tokens=True),
    't5_stripped': lambda: _t5(
        added_tokens_decoder={
            **added(size(t5()), *reversed(sentinels(100)), lstrip=True, rstrip=True),
            **added(size(t5()) + 100, 'new', special=False, single_word=True)},
        additional_special_tokens=sentinels(100)),
    't5_class_of_config': lambda: {'spiece.model': t5(), 'config.json': {
        'model_type': 'longt5', 'tokenizer_class': 'T5TokenizerFast'}},
    't5_bpe': lambda: _t5(model=t5(model_type='bpe')),
    'llama_new_pad': lambda: _llama(pad_token='[PAD]'),
    'llama_legacy_listed': lambda: _llama(legacy=True, added_tokens_decoder={
        **added(0, '<unk>', '<s>', '</s>', normalized=True), **added(size(llama()), '<|x|>'),
        **added(size(llama()) + 1, 'y z', special=False)}),
    'llama_fast_no_bos': lambda: _llama(tokenizer_class='LlamaTokenizerFast', bos_token=None,
                                        add_bos_token=False),
    'llama_alone_chatml': lambda: {**DIRECTORIES['llama'](), 'added_tokens.json': {
        text: size(llama()) + i for i, text in enumerate(CHATML)}},
    'llama_alone_inside': lambda: {**DIRECTORIES['llama'](), 'tokenizer.model': llama(
        user_defined_symbols=','.join(CHATML))},
    'llama_alone_unigram': lambda: {**DIRECTORIES['llama'](),
                                    'tokenizer.model': _train(byte_fallback=True)},
    'llama_alone_no_prefix': lambda: {**DIRECTORIES['llama'](),
                                      'tokenizer.model': llama(add_dummy_prefix=False)},
    'llama_unigram': lambda: _llama(model=_train(byte_fallback=True)),
    'llama_mistral': lambda: {**_llama(), 'config.json': {'model_type': 'mistral'}},
    'gpt2_no_end': lambda: _bpe('gpt2', byte_level()),
    'gpt2_other_end': lambda: _bpe('gpt2', byte_level((), ('<|endoftext|>', '<|eot|>')),
                                   tokenizer_class='GPT2TokenizerFast', eos_token='<|eot|>'),
    'gpt2_windows': lambda: _bpe('gpt2', (byte_level(*GPT2)[0],
                                          byte_level(*GPT2)[1].replace('\n', '\r\n'))),
    'gpt2_new_pad': lambda: _bpe('gpt2', byte_level(*GPT2), pad_token='<pad>',
                                 extra_special_tokens=['<a>', '<b>']),
    'roberta_prefix': lambda: _bpe(
        'roberta', byte_level(*ROBERTA), add_prefix_space=True,
        mask_token=token('<mask>', lstrip=True, __type='AddedToken')),
    'qwen2_wrong_class': lambda: _bpe('qwen2', byte_level(), tokenizer_class='GPT2Tokenizer',
                                      added_tokens_decoder=added(400, '<|endoftext|>', *CHATML)),
    'bert_accents': lambda: _bert(strip_accents=False, tokenize_chinese_chars=False),
    'bert_cased_stripped': lambda: _bert(do_lower_case=False, strip_accents=True),
    'bert_map': lambda: _bert(more={'special_tokens_map.json': {
        'cls_token': '[CLS]', 'additional_special_tokens': ['[E1]', '[E2]']}}.items()),
    'bert_lower_added': lambda: _bert(added_tokens_decoder={
        **added(0, *WORDS[:5]), **added(len(WORDS), 'ÉTÉ', special=False)}),
    'bert_lines': lambda: {**_bert(), 'vocab.txt': '\r\n'.join(
        [*WORDS, 'a', '', 'b ', '\u2028', '\u3000']) + '\n'},
    'byt5_of_config': lambda: {'config.json': {
        'model_type': 't5', 'tokenizer_class': 'ByT5Tokenizer'}},
    'byt5_none': lambda: {'config.json': {'model_type': 't5'}, 'tokenizer_config.json': {
        'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 0}},
    'pegasus_listed': lambda: _t5(
        'pegasus', tokenizer_class='PegasusTokenizer', mask_token='<mask_2>',
        additional_special_tokens=['<mask_1>', *(f'<unk_{i}>' for i in range(2, 103))]),
}
