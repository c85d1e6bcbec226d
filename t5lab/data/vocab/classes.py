"""The tokenizer classes of Hugging Face: how each one builds a tokenizer from its files.

Since transformers 5 a class decides how its texts are split, from a tokenizer.json as from older
files: it takes the tokens, merges and character map of the file and rebuilds the rest. A class that
is not here is taken at the word of its tokenizer.json, or refused by name if it has none.
[transformers 5.24, models/*/tokenization_*.py and convert_slow_tokenizer.py]
"""

from collections.abc import Callable, Mapping
import dataclasses
import re

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
)

from t5lab.data.vocab import tokenizer_files
from t5lab.data.vocab.tokenizer_files import Parts
from t5lab.errors import DataError, UsageError

SPACE = '\u2581'
ROLES = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
PLAIN = 'TokenizersBackend'           # transformers' name for: what tokenizer.json says

# Qwen2's and LLaMA 3's split differ in the digits that stay together.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r'|\s*[\r\n]+|\s+(?!\S)|\s+')

MBART = ('ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR '
         'lt_LT lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN').split()
MBART50 = MBART + ('af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN '
                   'pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES '
                   'sl_SI').split()


@dataclasses.dataclass
class Draft:
  """A tokenizer under construction.

  names: {role: token or None}. extra: more special tokens. frame: names of roles, texts of tokens
  and '$A', in order, if the class puts tokens around a text. pair: with '$B', if two texts have
  more than their own ends between them.
  """
  tokenizer: Tokenizer
  names: dict[str, AddedToken | str | None]
  extra: list[AddedToken]
  frame: list[str] | None = None
  pair: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Class:
  """kind: of its model. names: special tokens if no file names others. build: fills a Draft."""
  kind: str
  names: Mapping[str, str]
  build: Callable[[Parts, Mapping, dict, list], Draft]


def _byte_level(parts, split, *, add_prefix_space) -> Tokenizer:
  tokenizer = Tokenizer(models.BPE(parts.vocab, parts.merges, continuing_subword_prefix='',
                                   end_of_word_suffix=''))
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
  tokenizer.pre_tokenizer = byte_level
  if split is not None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), 'isolated'), byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _gpt2(parts, settings, names, extra) -> Draft:
  prefix = settings.get('add_prefix_space') is True
  return Draft(_byte_level(parts, None, add_prefix_space=prefix), names, extra)


def _roberta(parts, settings, names, extra) -> Draft:
  return dataclasses.replace(_gpt2(parts, settings, names, extra), frame=['cls', '$A', 'sep'],
                             pair=['cls', '$A', 'sep', 'sep', '$B', 'sep'])


def _qwen2(parts, settings, names, extra) -> Draft:
  prefix = settings.get('add_prefix_space') is True
  tokenizer = _byte_level(parts, QWEN2, add_prefix_space=prefix)
  tokenizer.normalizer = normalizers.NFC()
  return Draft(tokenizer, names, extra)


def _bert(parts, settings, names, extra) -> Draft:
  tokenizer = Tokenizer(models.WordPiece(parts.vocab, unk_token=str(names['unk'])))
  tokenizer.normalizer = normalizers.BertNormalizer(
      clean_text=True, handle_chinese_chars=settings.get('tokenize_chinese_chars') is not False,
      strip_accents=settings.get('strip_accents'),
      lowercase=settings.get('do_lower_case') is not False)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece(prefix='##')
  return Draft(tokenizer, names, extra, ['cls', '$A', 'sep'])


def _metaspace(vocab, unk_id, *steps, scheme='always') -> Tokenizer:
  """A Unigram model over words that begin with U+2581."""
  tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id))
  mark = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, mark]) if steps else mark
  tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
  return tokenizer


def _one_space(charsmap):
  steps = [normalizers.Precompiled(charsmap)] if charsmap else []
  return normalizers.Sequence([*steps, normalizers.Replace(Regex(' {2,}'), ' ')])


def _t5(parts, settings, names, extra) -> Draft:
  # <extra_id_0> has the last id, unless the file lists the sentinels with other ids.
  vocab, count = list(parts.vocab), settings.get('extra_ids', 100)
  if type(count) is not int or not 0 <= count <= 100_000:
    raise DataError(f'extra_ids must be 0 to 100,000, got {count!r}')
  sentinels = [f'<extra_id_{i}>' for i in range(count)]
  known = {token for token, _ in vocab} | settings['declared']
  if parts.pieces:
    vocab += [(token, 0.) for token in reversed(sentinels) if token not in known]
  extra = extra + [AddedToken(token, special=True) for token in sentinels
                   if token not in map(str, extra)]
  tokenizer = _metaspace(vocab, 2, pre_tokenizers.WhitespaceSplit())
  if parts.charsmap:
    tokenizer.normalizer = normalizers.Precompiled(parts.charsmap)
  return Draft(tokenizer, names, extra, ['$A', 'eos'])


def _llama(parts, settings, names, extra) -> Draft:
  tokenizer = Tokenizer(models.BPE(parts.vocab, parts.merges, fuse_unk=True, byte_fallback=True))
  prefix = settings.get('add_prefix_space') is not False
  scheme = ('always' if settings.get('legacy') is True else 'first') if prefix else 'never'
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
      replacement=SPACE, prepend_scheme=scheme, split=False)
  steps = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  if prefix:
    steps.append(decoders.Strip(content=' ', left=1))
  tokenizer.decoder = decoders.Sequence(steps)
  return Draft(tokenizer, names, extra)


def _gemma(parts, settings, names, extra) -> Draft:
  del settings
  tokenizer = Tokenizer(models.BPE(parts.vocab, parts.merges, fuse_unk=True, byte_fallback=True,
                                   unk_token=str(names['unk'])))
  tokenizer.normalizer = normalizers.Replace(' ', SPACE)
  tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  tokenizer.decoder = decoders.Sequence(
      [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()])
  return Draft(tokenizer, names, extra)


def _fairseq(parts, names, more=()):
  """Tokens with fairseq's first four; a sentencepiece model has three others there."""
  if not parts.pieces:
    return parts.vocab
  first = [(str(names[role]), 0.) for role in ('bos', 'pad', 'eos', 'unk')]
  return [*first, *parts.vocab[3:], *((token, 0.) for token in more)]


def _xlm_roberta(parts, settings, names, extra) -> Draft:
  scheme = 'never' if settings.get('add_prefix_space') is False else 'always'
  vocab = _fairseq(parts, names, [str(names['mask'])])
  tokenizer = _metaspace(vocab, 3, pre_tokenizers.WhitespaceSplit(), scheme=scheme)
  if parts.charsmap:
    tokenizer.normalizer = normalizers.Precompiled(parts.charsmap)
  return Draft(tokenizer, names, extra, ['bos', '$A', 'eos'],
               ['bos', '$A', 'eos', 'eos', '$B', 'eos'])


def _language(settings, default):
  language = settings.get('src_lang') or default
  if not isinstance(language, str):
    raise DataError(f'src_lang must be the code of a language, got {language!r}')
  return language


def _codes(codes, extra):
  listed = set(map(str, extra))
  return extra + [AddedToken(code, special=True) for code in codes if code not in listed]


def _mask(names):
  if isinstance(names['mask'], str):
    names['mask'] = AddedToken(names['mask'], lstrip=True, special=True, normalized=True)
  return names


def _mbart(parts, settings, names, extra) -> Draft:
  vocab = _fairseq(parts, names, [*MBART, str(names['mask'])])
  tokenizer = _metaspace(vocab, 3, pre_tokenizers.WhitespaceSplit())
  return Draft(tokenizer, _mask(names), _codes(MBART, extra),
               ['$A', 'eos', _language(settings, 'en_XX')])


def _mbart50(parts, settings, names, extra) -> Draft:
  if parts.pieces:
    names['bos'] = names['cls']
  tokenizer = _metaspace(_fairseq(parts, names, [*MBART50, str(names['mask'])]), 3)
  tokenizer.normalizer = _one_space(parts.charsmap)
  return Draft(tokenizer, _mask({**names, 'bos': None}), _codes(MBART50, extra),
               [_language(settings, 'en_XX'), '$A', 'eos'])


def _nllb(parts, settings, names, extra) -> Draft:
  vocab = parts.vocab
  if parts.pieces:
    first = [str(names[role]) for role in ('bos', 'pad', 'eos', 'unk')]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*first, *vocab]))}
  tokenizer = Tokenizer(models.BPE(vocab, parts.merges, unk_token=str(names['unk']), fuse_unk=True))
  if parts.charsmap:
    tokenizer.normalizer = _one_space(parts.charsmap)
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme='always')
  tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme='always')
  language = _language(settings, 'eng_Latn')
  frame = [language, '$A', 'eos']
  if settings.get('legacy_behaviour') is True:
    frame = ['$A', 'eos', language]
  return Draft(tokenizer, _mask(names), extra, frame)


def _pegasus(parts, settings, names, extra) -> Draft:
  vocab, offset = list(parts.vocab), settings.get('offset', 103)
  if type(offset) is not int or not 2 <= offset <= 10_000:
    raise DataError(f'offset must be 2 to 10,000, got {offset!r}')
  sentence = settings.get('mask_token_sent', '<mask_1>')
  unknowns = [f'<unk_{i}>' for i in range(2, offset)]
  if parts.pieces:
    masks = [settings.get('mask_token', '<mask_1>'), settings.get('mask_token_sent', '<mask_2>')]
    first = [*(names[role] for role in ('pad', 'eos')), *dict.fromkeys(masks)]
    vocab = [*((str(token), 0.) for token in first if token is not None),
             *((token, -100.) for token in unknowns), *vocab[2:]]
  unk_id = [token for token, _ in vocab].index(str(names['unk']))
  tokenizer = _metaspace(vocab, unk_id)
  tokenizer.normalizer = _one_space(parts.charsmap)
  if not parts.charsmap:
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace('\n', ' '), normalizers.Replace(Regex(' {2,}'), ' ')])
  listed = [str(token) for token in extra]
  more = [sentence] if sentence is not None and sentence not in listed else []
  extra = extra + [AddedToken(token, special=True) for token in [*more, *unknowns]
                   if token not in listed]
  return Draft(tokenizer, names, extra, ['$A', 'eos'])


def plain_sentencepiece(parts: Parts, settings, names, extra) -> Draft:
  """A sentencepiece model that no class claims: its own rules, as its library applies them."""
  normalizer, trainer = parts.pieces.normalizer_spec, parts.pieces.trainer_spec
  types = [piece.type for piece in parts.pieces.pieces]
  user_defined = [p.piece for p in parts.pieces.pieces if p.type == tokenizer_files.USER_DEFINED]
  if parts.kind == 'Unigram':
    model = models.Unigram(parts.vocab, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
  else:
    # Only normal pieces are merged, the best score first.
    normal = {token: i for token, i in parts.vocab.items() if types[i] == tokenizer_files.NORMAL}
    ranked = []
    for token, i in normal.items():
      for cut in range(1, len(token)):
        left, right = token[:cut], token[cut:]
        if left in normal and right in normal:
          ranked.append((-parts.pieces.pieces[i].score, i, left, right))
    model = models.BPE(
        parts.vocab, [(left, right) for _, _, left, right in sorted(ranked)], fuse_unk=True,
        unk_token=trainer.unk_piece, byte_fallback=trainer.byte_fallback,
        ignore_merges=bool(user_defined))
  tokenizer = Tokenizer(model)

  # Only spaces count as extra whitespace; sentencepiece leaves line breaks alone.
  legacy, steps = settings.get('legacy', True), []
  if parts.charsmap:
    steps.append(normalizers.Precompiled(parts.charsmap))
  if normalizer.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex(r'\A +| +\z'), ''),
              normalizers.Replace(Regex(' {2,}'), ' ')]
  if normalizer.escape_whitespaces:
    steps.append(normalizers.Replace(' ', SPACE))
  if normalizer.add_dummy_prefix and legacy:        # Metaspace adds none before a space
    steps.append(normalizers.Replace(Regex(rf'\A{SPACE}'), SPACE * 2))
  tokenizer.normalizer = normalizers.Sequence(steps)

  splits = []
  if normalizer.add_dummy_prefix:
    splits.append(pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme='always' if legacy else 'first', split=False))
  if user_defined:
    longest = sorted(user_defined, key=len, reverse=True)
    splits.append(pre_tokenizers.Split(Regex('|'.join(map(re.escape, longest))), 'isolated'))
  if splits:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)

  joins = [decoders.Replace(SPACE, ' ')]
  if trainer.byte_fallback:
    joins.append(decoders.ByteFallback())
  if normalizer.add_dummy_prefix:
    joins += [decoders.Fuse(), decoders.Strip(content=' ', left=1)]
  tokenizer.decoder = decoders.Sequence(joins)

  for role in ('bos', 'eos', 'unk'):
    if names.get(role) is None and getattr(trainer, f'{role}_id') >= 0:
      names[role] = getattr(trainer, f'{role}_piece')
  return Draft(tokenizer, names, extra)


_ANGLES = {'bos': '<s>', 'eos': '</s>', 'unk': '<unk>', 'pad': '<pad>'}
_FAIRSEQ = {**_ANGLES, 'sep': '</s>', 'cls': '<s>', 'mask': '<mask>'}
_END = '<|endoftext|>'

CLASSES = {
    'BertTokenizer': Class('WordPiece', {
        role: f'[{role.upper()}]' for role in ('unk', 'sep', 'pad', 'cls', 'mask')}, _bert),
    'GPT2Tokenizer': Class('BPE', {'bos': _END, 'eos': _END, 'unk': _END}, _gpt2),
    'GemmaTokenizer': Class('BPE', {'bos': '<bos>', 'eos': '<eos>', 'unk': '<unk>', 'pad': '<pad>',
                                    'mask': '<mask>'}, _gemma),
    'LlamaTokenizer': Class('BPE', {'bos': '<s>', 'eos': '</s>', 'unk': '<unk>'}, _llama),
    'MBart50Tokenizer': Class('Unigram', _FAIRSEQ, _mbart50),
    'MBartTokenizer': Class('Unigram', _FAIRSEQ, _mbart),
    'NllbTokenizer': Class('BPE', _FAIRSEQ, _nllb),
    'PegasusTokenizer': Class('Unigram', {'eos': '</s>', 'unk': '<unk>', 'pad': '<pad>',
                                          'mask': '<mask_2>'}, _pegasus),
    'Qwen2Tokenizer': Class('BPE', {'eos': _END, 'unk': _END, 'pad': _END}, _qwen2),
    'RobertaTokenizer': Class('BPE', _FAIRSEQ, _roberta),
    'T5Tokenizer': Class('Unigram', {'eos': '</s>', 'unk': '<unk>', 'pad': '<pad>'}, _t5),
    'XLMRobertaTokenizer': Class('Unigram', _FAIRSEQ, _xlm_roberta),
}

# Their texts are marked with a language, whose codes have this form.
TRANSLATORS = {'MBart50Tokenizer': '[a-z]{2}_[A-Z]{2}', 'MBartTokenizer': '[a-z]{2}_[A-Z]{2}',
               'NllbTokenizer': '[a-z]{3}_[A-Z][a-z]{3}'}
# Other names of the same classes.
ALIASES = {'BartTokenizer': 'RobertaTokenizer', 'LEDTokenizer': 'RobertaTokenizer',
           'LongformerTokenizer': 'RobertaTokenizer', 'MT5Tokenizer': 'T5Tokenizer',
           **dict.fromkeys(('DistilBertTokenizer', 'ElectraTokenizer', 'ConvBertTokenizer',
                            'SqueezeBertTokenizer', 'RetriBertTokenizer'), 'BertTokenizer')}
# For a config.json whose tokenizer names no class. [transformers' TOKENIZER_MAPPING_NAMES]
OF_MODELS = {
    **dict.fromkeys(('bert', 'distilbert', 'electra', 'convbert', 'nomic_bert'), 'BertTokenizer'),
    **dict.fromkeys(('gpt2', 'gpt_neo', 'gptj', 'opt', 'codegen', 'phi', 'starcoder2'),
                    'GPT2Tokenizer'),
    **dict.fromkeys(('bart', 'roberta', 'longformer', 'led', 'data2vec-text'), 'RobertaTokenizer'),
    **dict.fromkeys(('gemma', 'gemma2', 'gemma3', 'gemma3_text', 't5gemma'), 'GemmaTokenizer'),
    **dict.fromkeys(('qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe'), 'Qwen2Tokenizer'),
    **dict.fromkeys(('t5', 'mt5', 'switch_transformers'), 'T5Tokenizer'),
    'mbart': 'MBartTokenizer', 'mbart50': 'MBart50Tokenizer', 'nllb': 'NllbTokenizer',
    'pegasus': 'PegasusTokenizer', 'xlm-roberta': 'XLMRobertaTokenizer', 'byt5': 'ByT5Tokenizer',
    'marian': 'MarianTokenizer', 'm2m_100': 'M2M100Tokenizer', 'canine': 'CanineTokenizer',
    **dict.fromkeys(('umt5', 'mistral', 'mixtral', 'ministral', 'granite', 'olmo2', 'stablelm'),
                    PLAIN)}
_NO_CLASS = (PLAIN, 'PreTrainedTokenizerFast', 'PreTrainedTokenizer', 'PythonBackend')
# Their repositories name a wrong class so often that transformers ignores it.
_DISTRUSTED = ('qwen2', 'modernbert', 'modernbert-decoder', 'phi3', 'phimoe')


def name_of(settings: Mapping, model: Mapping, byte_level: bool = False) -> str:
  """The class that a directory declares, without 'Fast'; PLAIN for what its tokenizer.json says.

  settings: tokenizer_config.json. model: config.json. byte_level: whether there is a tokenizer.json
  of bytes, which LlamaTokenizer is not. [transformers' AutoTokenizer.from_pretrained]
  """
  declared = settings.get('tokenizer_class') or model.get('tokenizer_class')
  family = model.get('model_type')
  own = OF_MODELS.get(family if isinstance(family, str) else '')
  if declared is not None and not isinstance(declared, str):
    raise DataError(f'tokenizer_class must be a name, got {str(declared)[:80]!r}')
  if not declared:
    return own or PLAIN
  short = declared if declared == 'PreTrainedTokenizerFast' else declared.removesuffix('Fast')
  short = ALIASES.get(short, short)
  if short == 'LlamaTokenizer' and byte_level and family not in _DISTRUSTED:
    return PLAIN
  if family in _DISTRUSTED:
    return own or PLAIN
  # Where transformers has no class for a model, it reads tokenizer.json as it stands.
  return PLAIN if short in _NO_CLASS or own == PLAIN else short


def check_known(name: str, what: str) -> None:
  """UsageError unless the class is one whose older files we read."""
  if name not in CLASSES:
    raise UsageError(f'{what} belongs to a {name}, which t5lab does not implement; supported '
                     f'without a tokenizer.json: {", ".join(sorted([*CLASSES, "ByT5Tokenizer"]))}')
