"""Marian's and M2M100's tokenizers: sentencepiece splits a text, a vocab.json has the ids.

Special and added tokens are cut out of a text first; what lies between them is split by itself.
[transformers 5.24, tokenization_marian.py, tokenization_m2m_100.py]
"""

from collections.abc import Mapping
import hashlib

import sentencepiece

from t5lab import files
from t5lab.data.vocab import declared, tables
from t5lab.data.vocab.base import UNKNOWN, Vocab, special_fields
from t5lab.errors import DataError

SOURCE, TARGET, TARGET_VOCAB = 'source.spm', 'target.spm', 'target_vocab.json'
MODEL = 'sentencepiece.bpe.model'
SPACE = '\u2581'
CLASSES = ('MarianTokenizer', 'M2M100Tokenizer')
# In the order of their ids, after those of vocab.json. [Fan et al. 2020; Tran et al. 2021]
LANGUAGES = {
    'm2m100': ('af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy '
               'ga gd gl gu ha he hi hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo '
               'lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl so sq '
               'sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu').split(),
    'wmt21': 'en ha is ja cs ru zh de'.split()}


def load(spec: str, class_name: str, contents: Mapping[str, bytes], settings: dict) -> Vocab:
  """The Vocab of a directory of either class. contents: all of its files by name.

  Errors: DataError for a file that is missing or that cannot be read.
  """
  ids = _table(spec, contents, 'vocab.json')
  roles = {'unk': '<unk>', 'eos': '</s>', 'pad': '<pad>'}
  if class_name == 'M2M100Tokenizer':
    roles['bos'] = '<s>'
  names = {role: _special(spec, settings, role, text, ids) for role, text in roles.items()}
  special = {text: ids[text] for text in names.values()}
  unk = names['unk']
  for i, token in sorted(declared.listed_tokens(spec, settings, contents).items()):
    special[token.content] = i

  if class_name == 'MarianTokenizer':
    fields = _marian(spec, contents, ids, unk, special, settings.get('separate_vocabs') is True)
  else:
    fields = _m2m100(spec, contents, ids, unk, special, settings)

  sha256 = hashlib.sha256(repr(sorted(special.items())).encode())
  for name in sorted(contents):
    if name.endswith(('.spm', '.model', 'vocab.json')):
      sha256.update(contents[name])
  sha256.update(repr([fields.get(key) for key in ('prefix', 'target_language')]).encode())
  role_ids = special_fields({role: ids[text] for role, text in names.items()})
  return Vocab(spec, sha256.hexdigest(), names=names, **role_ids, **fields)


def _table(spec, contents, name) -> dict[str, int]:
  ids = files.parse_json(_file(spec, contents, name), name, DataError)
  if not all(type(i) is int and i >= 0 for i in ids.values()):
    raise DataError(f'{name} of {spec} must hold an object of tokens and ids')
  return ids


def _file(spec, contents, name) -> bytes:
  if name not in contents:
    raise DataError(f'{spec} has no {name} beside it')
  return contents[name]


def _special(spec, settings, role, default, ids) -> str:
  value = settings.get(f'{role}_token', default)
  value = value.get('content') if isinstance(value, dict) else value
  if not isinstance(value, str) or value not in ids:
    raise DataError(f'{spec} has no {value!r}, its {role}_token, in vocab.json')
  return value


def _splitter(spec, contents, name):
  """Returns text -> pieces."""
  try:
    sp = sentencepiece.SentencePieceProcessor(model_proto=_file(spec, contents, name))
  except RuntimeError as e:
    raise DataError(f'{name} of {spec} is not a sentencepiece model') from e
  return lambda text: sp.encode(text, out_type=str)


def _decoder(ids, special):
  """Returns (ids -> text, id -> its own text); special tokens print nothing."""
  size = max(*ids.values(), *special.values()) + 1
  table = [UNKNOWN.encode()] * size
  for text, i in ids.items():
    table[i] = text.replace(SPACE, ' ').encode()
  for i in special.values():
    table[i] = b''
  decode, piece = tables.byte_decoder(table, b' ')
  return size, decode, piece


def _marian(spec, contents, ids, unk, special, separate) -> dict:
  """Source and target texts have a sentencepiece model each, and the same ids or ids of their own.

  A text may start with the code of its target language, '>>fr<<'.
  """
  def encoder(model, ids):
    split = _splitter(spec, contents, model)

    def encode(text):
      pieces = []
      if text.startswith('>>') and (end := text.find('<<')) != -1:
        pieces, text = [text[:end + 2]], text[end + 2:]
      return [ids.get(piece, ids[unk]) for piece in [*pieces, *split(text)]]
    return tables.split_encoder(encode, special)

  target = _table(spec, contents, TARGET_VOCAB) if separate else ids
  if unk not in target:
    raise DataError(f'{spec} has no {unk!r} in {TARGET_VOCAB}')
  size, decode, piece = _decoder(target, special)
  return dict(size=max(size, max(ids.values()) + 1), encoder=encoder(SOURCE, ids),
              target_encoder=encoder(TARGET, target), decoder=decode, piece=piece)


def _m2m100(spec, contents, ids, unk, special, settings) -> dict:
  """A source text starts with the token of its language, and a target with that of its own."""
  codes = settings.get('language_codes', 'm2m100')
  if not isinstance(codes, str) or codes not in LANGUAGES:
    raise DataError(f'{spec}: language_codes must be {" or ".join(LANGUAGES)}, got {codes!r}')
  languages = {code: len(ids) + i for i, code in enumerate(LANGUAGES[codes])}
  # Texts contain them as tokens, too.
  special |= {f'__{code}__': i for code, i in languages.items()}
  source, target = settings.get('src_lang') or 'en', settings.get('tgt_lang') or None
  for key, value in {'src_lang': source, 'tgt_lang': target}.items():
    if value is not None and (not isinstance(value, str) or value not in languages):
      raise DataError(f'{spec}: {key} must be one of {" ".join(languages)}, got {value!r}')
  split = _splitter(spec, contents, MODEL)
  size, decode, piece = _decoder(ids, special)
  encode = tables.split_encoder(
      lambda text: [ids.get(piece, ids[unk]) for piece in split(text)], special)
  return dict(size=size, encoder=encode, decoder=decode, piece=piece, prefix=(languages[source],),
              languages=languages, target_language=languages[target] if target else None)
