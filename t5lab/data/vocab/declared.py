"""The tokenizer that a Hugging Face directory declares, with its special and added tokens.

The class is named in tokenizer_config.json or follows from config.json; classes.py builds it.
Tokens are added in the order and with the ids that the files list: added_tokens_decoder in
tokenizer_config.json or, before that existed, added_tokens.json and special_tokens_map.json.
[transformers 5.24, PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__]
"""

from collections.abc import Mapping
import dataclasses
import re

import tokenizers
from tokenizers import AddedToken, Tokenizer, processors

from t5lab import files
from t5lab.data.vocab import classes, tokenizer_files
from t5lab.errors import DataError

ADDED, MAP, MODEL, MERGES = ('added_tokens.json', 'special_tokens_map.json', 'config.json',
                             'merges.txt')
MOST_IDS = 1 << 31
STARTED_WITH_BOS = ('LlamaTokenizer', 'GemmaTokenizer')      # unless add_bos_token is false


@dataclasses.dataclass(frozen=True)
class Built:
  """A tokenizer, its special tokens by role, and the bytes that decide its ids.

  languages: {code: id}, for a class whose texts are marked with their language; target_language:
  the code of tgt_lang, or ''; language_starts: see base.Vocab.
  """
  tokenizer: Tokenizer
  names: dict[str, str]
  data: bytes
  languages: dict[str, int] = dataclasses.field(default_factory=dict)
  target_language: str = ''
  language_starts: bool = False


def class_of(contents: Mapping[str, bytes], settings: dict, byte_level: bool = False) -> str:
  """The class that the files of a directory declare, see classes.name_of."""
  model = files.parse_json(contents.get(MODEL, b'{}'), MODEL, DataError)
  return classes.name_of(settings, model, byte_level)


def build(spec: str, name: str, data: bytes, contents: Mapping[str, bytes], settings: dict
          ) -> Built | None:
  """Builds the tokenizer of the file `name`, whose bytes are `data`.

  contents: of the files beside it, by name. settings: tokenizer_config.json. Returns None for a
  sentencepiece model in a directory that declares nothing.
  Errors: UsageError for a class that t5lab does not implement, DataError for files that disagree.
  """
  is_json = name.endswith('tokenizer.json')
  tokenizer = _open(data, spec) if is_json else None
  byte_level = is_json and 'ByteLevel' in (type(tokenizer.pre_tokenizer).__name__,
                                           type(tokenizer.decoder).__name__)
  class_name = class_of(contents, settings, byte_level)

  if is_json:
    if class_name not in classes.CLASSES:
      size = tokenizer.get_vocab_size()
      names = _add_tokens(tokenizer, _Tokens(spec, settings, contents, {}, {}))
      unchanged = tokenizer.get_vocab_size() == size
      return Built(tokenizer, names, data if unchanged else tokenizer.to_str().encode())
    parts = tokenizer_files.from_json(data, tokenizer, spec)
  elif name.endswith('.model'):
    if class_name == classes.PLAIN and not (settings.get('tokenizer_class') or MODEL in contents):
      return None
    parts = tokenizer_files.from_sentencepiece(data, _kind(class_name), spec)
    if class_name == classes.PLAIN and _is_t5(parts.pieces):
      class_name = 'T5Tokenizer'                   # umT5 and LongT5 have no class of their own
      parts = tokenizer_files.from_sentencepiece(data, 'Unigram', spec)
  elif name.endswith('vocab.txt'):
    class_name = 'BertTokenizer' if class_name == classes.PLAIN else class_name
    parts = tokenizer_files.from_lines(data, spec)
  else:
    if MERGES not in contents:
      raise DataError(f'{spec} has no merges.txt beside it')
    parts = tokenizer_files.from_merges(data, contents[MERGES], spec)
    if class_name == classes.PLAIN:
      class_name = 'RobertaTokenizer' if '<s>' in parts.vocab else 'GPT2Tokenizer'
  return _of_class(spec, class_name, parts, contents, settings)


def is_model_config(path) -> bool:
  """True for the config.json of a Hugging Face model, False for that of a t5lab run."""
  if not path.is_file():
    return False
  try:
    return 'model_type' in files.read_json(path, error=DataError)
  except DataError:
    return False


def _open(data: bytes, spec: str) -> Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(data.decode('utf-8'))
  except BaseException as e:          # the library raises the bare class, and panics
    reraise_unless_library(e)
    raise DataError(f'{spec} is not a tokenizer.json that the tokenizers library reads: '
                    f'{" ".join(str(e).split())[:200]}') from e


def reraise_unless_library(e: BaseException) -> None:
  """Raises e again unless it is an Exception or a panic of Rust, which is a BaseException."""
  if not isinstance(e, Exception) and type(e).__name__ != 'PanicException':
    raise e


def _kind(class_name: str) -> str:
  cls = classes.CLASSES.get(class_name)
  return cls.kind if cls else ''


def _is_t5(pieces) -> bool:
  trainer = pieces.trainer_spec
  return (trainer.pad_id, trainer.eos_id, trainer.unk_id) == (0, 1, 2)


def _of_class(spec, class_name, parts, contents, settings):
  """Builds a tokenizer by the rules of a class."""
  tokens = _Tokens(spec, settings, contents, parts.added,
                   classes.CLASSES[class_name].names if class_name in classes.CLASSES else {})
  if class_name == classes.PLAIN:
    build_class = classes.plain_sentencepiece
  else:
    classes.check_known(class_name, spec)
    build_class = classes.CLASSES[class_name].build
    if parts.kind != classes.CLASSES[class_name].kind:
      raise DataError(f'{spec} holds a {parts.kind} model, but {class_name}, which its directory '
                      f'declares, is {classes.CLASSES[class_name].kind}')
    if class_name == 'BertTokenizer':
      _check_word_pieces(spec, parts, tokens.names)

  # The control and user-defined pieces of a sentencepiece model are special tokens.
  extra = tokens.extra
  if parts.pieces and not tokens.lists_extra:      # also in place of special_tokens_map.json
    special = (tokenizer_files.CONTROL, tokenizer_files.USER_DEFINED)
    extra = [AddedToken(p.piece, normalized=False, special=p.type == tokenizer_files.CONTROL)
             for p in parts.pieces.pieces if p.type in special]
  declared = {token.content for token in tokens.added.values()}
  try:
    draft = build_class(parts, {**settings, 'declared': declared}, dict(tokens.names), extra)
    if parts.post_processor is not None:
      draft.tokenizer.post_processor = parts.post_processor
  except DataError:
    raise
  except BaseException as e:
    reraise_unless_library(e)
    raise DataError(f'{spec} does not make a {class_name}: {" ".join(str(e).split())[:200]}') from e
  # A list of further special tokens, even an empty one, stands in place of the class's own.
  tokens.names, tokens.extra = draft.names, tokens.extra if tokens.lists_extra else draft.extra
  tokenizer = draft.tokenizer
  if class_name == classes.PLAIN and parts.pieces.normalizer_spec.add_dummy_prefix:
    # What lies between added tokens begins like a text.
    flags = lambda token: {key: getattr(token, key) for key in tokenizer_files.FLAGS}
    tokens.added = {i: AddedToken(token.content, **{**flags(token), 'normalized': False})
                    for i, token in tokens.added.items()}
  names = _add_tokens(tokenizer, tokens)

  frame = draft.frame
  if frame is None and parts.post_processor is None and names.get('bos'):
    starts = settings.get('add_bos_token')
    sentencepiece_llama = class_name == classes.PLAIN or class_name in STARTED_WITH_BOS
    if starts is True or (starts is not False and sentencepiece_llama):
      frame = ['bos', '$A']
  if frame:
    texts = lambda parts: parts and [names.get(part, part) for part in parts]
    _set_frame(spec, tokenizer, texts(frame), texts(draft.pair))
  languages, target = {}, ''
  if class_name in classes.TRANSLATORS:
    known, code = tokenizer.get_vocab(), re.compile(classes.TRANSLATORS[class_name])
    languages = {text: known[text] for text in sorted(known) if code.fullmatch(text)}
    target = settings.get('tgt_lang') or ''
  if target and (not isinstance(target, str) or target not in languages):
    raise DataError(f'{spec} has no {target!r}, its tgt_lang')
  return Built(tokenizer, names, tokenizer.to_str().encode(), languages, target,
               language_starts=class_name == 'MBartTokenizer')


def _check_word_pieces(spec, parts, names):
  missing = [str(names[role]) for role in ('unk', 'cls', 'sep')
             if str(names[role]) not in parts.vocab]
  if missing:
    raise DataError(f'{spec} has no {", ".join(missing)} among its {parts.size:,} lines: it is not '
                    'a WordPiece vocabulary of BERT')


def _set_frame(spec, tokenizer, frame, pair):
  """Puts the tokens around '$A' before and after every text, those of `pair` around two."""
  around = [token for token in dict.fromkeys(frame) if token != '$A']
  ids = [tokenizer.token_to_id(token) for token in around]
  if None in ids:
    raise DataError(f'{spec} has no {around[ids.index(None)]!r}, which its class puts around texts')
  tokenizer.post_processor = processors.TemplateProcessing(
      single=frame, pair=pair, special_tokens=list(zip(around, ids)))


class _Tokens:
  """The special and added tokens that the files beside a tokenizer list.

  names: {role: token or None}. extra: further special tokens. added: {id: token}.
  """

  def __init__(self, spec, settings, contents, own, defaults):
    self.spec, self.own = spec, own
    self.split_special = settings.get('split_special_tokens') is True
    legacy = settings.get('added_tokens_decoder') is None
    named = files.parse_json(contents.get(MAP, b'{}'), MAP, DataError) if legacy else {}
    values = {**settings, **named}          # the map has the last word where it is read
    what = f'tokenizer_config.json beside {spec}'
    self.lists_extra, self.extra, more = _extra(settings, named, what)
    special = {token.content for token in self.extra} if self.lists_extra else set()
    for role in classes.ROLES:
      value = values.get(f'{role}_token')
      if value is not None and not isinstance(_text_of(value), str):
        raise DataError(f'{what}: {role}_token must be a text, got {str(value)[:80]}')
    special |= {text for role in classes.ROLES
                if (text := _text_of(values.get(f'{role}_token')))}
    self.added = listed_tokens(spec, settings, contents, special) | (own if legacy else {})

    # An added token of the same text also says how spaces around a special token are read.
    by_text = {token.content: token for token in self.added.values()}
    self.names = {}
    for role in classes.ROLES:
      key = f'{role}_token'
      value = values[key] if key in values else defaults.get(role)
      if value is None:
        self.names[role] = None
      elif isinstance(value, dict):
        self.names[role] = tokenizer_files.added_token(value, what)
      else:
        self.names[role] = by_text.get(_text_of(value)) or value
        tokenizer_files.added_token(_text_of(self.names[role]), what)
    # Further tokens with names of their own, e.g. image_token.
    for key, value in [*values.items(), *more.items()]:
      if key in more or (key.endswith('_token') and key[:-len('_token')] not in classes.ROLES):
        if isinstance(value, str) and value:
          self.names[key] = value


def listed_tokens(spec, settings, contents, special=()) -> dict[int, AddedToken]:
  """The added tokens of tokenizer_config.json, else of added_tokens.json, by id.

  special: the texts of special tokens, which added_tokens.json does not mark.
  """
  what, listed = f'tokenizer_config.json beside {spec}', settings.get('added_tokens_decoder')
  if listed is None:
    plain = files.parse_json(contents.get(ADDED, b'{}'), ADDED, DataError)
    what = f'{ADDED} beside {spec}'
    listed = {str(i): {'content': text, 'special': text in special} for text, i in plain.items()}
  if not isinstance(listed, dict):
    raise DataError(f'{what}: added_tokens_decoder must be an object')
  return {_id(key, what): tokenizer_files.added_token(value, what, special=False)
          for key, value in listed.items()}


def _extra(settings, named, what) -> tuple[bool, list[AddedToken], dict]:
  """Further special tokens: (whether they stand in place of the class's own, they, those by name).

  named: special_tokens_map.json, whose list is added to the class's own.
  """
  own = named.get('extra_special_tokens', settings.get('extra_special_tokens'))
  more = own if isinstance(own, dict) else {}
  listed = own if isinstance(own, list) else settings.get('additional_special_tokens')
  replaces = not more and ('extra_special_tokens' in {**settings, **named}
                           or 'additional_special_tokens' in settings)
  if not listed:
    listed = named.get('additional_special_tokens') or []
  if not isinstance(listed, list):
    raise DataError(f'{what}: additional_special_tokens must be a list')
  return replaces, [tokenizer_files.added_token(token, what) for token in listed], more


def _text_of(value):
  if isinstance(value, dict):
    return value.get('content')
  return str(value) if isinstance(value, (str, AddedToken)) else value


def _id(key, what) -> int:
  if not str(key).isdecimal() or int(key) >= MOST_IDS:
    raise DataError(f'{what}: the id of an added token must be a number, got {str(key)[:40]!r}')
  return int(key)


def _add_tokens(tokenizer: Tokenizer, tokens: _Tokens) -> dict[str, str]:
  """Adds the tokens, checks their ids, and returns the special ones by role."""
  new = [token for _, token in sorted(tokens.added.items(), key=lambda item: item[0])]
  new += [token for token in tokens.own.values() if token.content not in map(str, new)]
  present = {str(token) for token in new}
  named = [token for token in tokens.names.values() if token is not None]
  special = {str(token) for token in named}
  for token in [*named, *tokens.extra]:
    if str(token) not in present:
      new.append(token)
      present.add(str(token))
  final = []
  for token in new:
    if isinstance(token, str):
      token = AddedToken(token, special=True)
    elif str(token) in special:
      token.special = True
    final.append(token)
  if final:
    tokenizer.add_tokens(final)
  tokenizer.encode_special_tokens = tokens.split_special

  # An id can only be the next one: others would need rows that have no token.
  for i, token in tokens.added.items():
    if (got := tokenizer.token_to_id(token.content)) != i:
      raise DataError(f'{tokens.spec}: the added token {token.content!r} is listed with id {i}, '
                      f'but the next free id is {got}: ids must have no gaps')
  return {role: str(token) for role, token in tokens.names.items() if token is not None}
