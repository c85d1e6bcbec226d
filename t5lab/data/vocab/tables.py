"""Vocabularies with a table of the bytes of each id: ByT5's, sentencepiece models, characters.

Encoding is lossless for 'byte' and for sentencepiece models with an identity normaliser, byte
fallback and remove_extra_whitespaces off. U+2581 (sentencepiece's mark for a space) in a text would
be decoded as a space, so it is encoded as bytes there.
"""
import collections
from collections.abc import Sequence
import hashlib
import re

from google.protobuf import message as protobuf_message
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5lab import files
from t5lab.data.vocab import tokenizer_config
from t5lab.data.vocab.base import UNKNOWN, Vocab, numbered_sentinels, special_fields
from t5lab.errors import DataError

PAD, EOS, UNK = 0, 1, 2           # of the byte vocabulary and of T5's kind of sentencepiece model
NUM_SENTINELS = 100
SPACE = '\u2581'

_UNKNOWN = UNKNOWN.encode()


def byte_decoder(table: Sequence[bytes], strip_prefix: bytes = b''):
  """Returns (ids -> text, id -> its own text) for a table of the bytes of each id."""
  def id_bytes(i):
    return table[i] if 0 <= i < len(table) else _UNKNOWN

  def decode(ids):
    return b''.join(map(id_bytes, ids)).removeprefix(strip_prefix).decode('utf-8', 'replace')

  return decode, lambda i: id_bytes(i).decode('utf-8', 'backslashreplace')


def _append_sentinels(table: list[bytes], count: int) -> dict[str, int]:
  """Adds sentinels to the table -> {'<extra_id_0>': id, …}; <extra_id_0> has the last id."""
  size = len(table) + count
  table += [f'<extra_id_{size - 1 - i}>'.encode() for i in range(len(table), size)]
  return {f'<extra_id_{n}>': size - 1 - n for n in range(count)}


def split_encoder(encode_text, special: dict[str, int], marks: str = '', add_prefix: str = ''):
  """Returns text -> ids, split at special tokens (the longest that matches) and runs of `marks`."""
  patterns = [re.escape(text) for text in sorted(special, key=len, reverse=True) if text]
  if marks:
    patterns.append(f'[{marks}]+')
  if not patterns:
    return encode_text
  pattern = re.compile(f'({"|".join(patterns)})')

  def encode(text):
    ids = []
    for part in pattern.split(add_prefix + text):
      if part in special:
        ids.append(special[part])
      elif part:
        ids.extend(encode_text(part))
    return ids
  return encode


def byte(spec: str = 'byte', sentinels: int = NUM_SENTINELS) -> Vocab:
  """3 + UTF-8 byte; ByT5's 384 ids have 125 sentinels. [Xue et al. 2022, ByT5]"""
  table = [b'', b'', _UNKNOWN] + [bytes([b]) for b in range(256)]
  count = b'' if sentinels == NUM_SENTINELS else f'{sentinels} sentinels'.encode()
  sha256 = hashlib.sha256(b''.join(table) + count).hexdigest()
  special = _append_sentinels(table, sentinels)
  decode, piece = byte_decoder(table)
  encode = split_encoder(lambda text: [3 + b for b in text.encode('utf-8')], special)
  return Vocab(spec, sha256, len(table), EOS, encode, decode, piece, pad_id=PAD, unk_id=UNK,
               sentinels=tuple(special.values()))


def byt5(spec: str, sentinels: int) -> Vocab:
  """The bytes of Hugging Face's ByT5Tokenizer: <extra_id_0> is 259, and its special tokens are read
  in texts, with the whitespace around them.

  The pretraining of ByT5 has the sentinels in the other order, as `byte` has.
  """
  table = [b'', b'', _UNKNOWN] + [bytes([b]) for b in range(256)]
  special = {f'<extra_id_{i}>': len(table) + i for i in range(sentinels)}
  table += [text.encode() for text in special]
  roles = {'<pad>': PAD, '</s>': EOS, '<unk>': UNK}
  around = re.compile(rf'\s*({"|".join(roles)})\s*')
  decode, piece = byte_decoder(table)
  encode_text = split_encoder(lambda text: [3 + b for b in text.encode('utf-8')], special)

  def encode(text):
    ids = []
    for i, part in enumerate(around.split(text)):
      ids += [roles[part]] if i % 2 else encode_text(part)
    return ids

  sha256 = hashlib.sha256(b''.join(table) + b'ByT5Tokenizer').hexdigest()
  return Vocab(spec, sha256, len(table), EOS, encode, decode, piece, pad_id=PAD, unk_id=UNK,
               sentinels=tuple(special.values()))


def sentencepiece_model(spec: str, model: bytes,
                        config: tokenizer_config.Config = tokenizer_config.NO_CONFIG) -> Vocab:
  """The vocabulary of a sentencepiece model file's bytes.

  With T5's special ids (pad 0, eos 1, unk 2) it gets 100 sentinels after its pieces, unless the
  file has <extra_id_N> pieces (mT5's). With others (LLaMA: unk 0, bos 1, eos 2) it has the
  sentinels of the file or none, control pieces in a text get their ids, and texts start with bos
  unless the config has add_bos_token false.
  """
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
  except (protobuf_message.DecodeError, RuntimeError) as e:
    raise DataError(f'{spec} is not a sentencepiece model') from e
  if sp.eos_id() < 0:
    raise DataError(f'{spec} has no end-of-sequence piece (pad, eos, unk ids '
                    f'{(sp.pad_id(), sp.eos_id(), sp.unk_id())}): train it with pad_id=0, '
                    'eos_id=1, unk_id=2, bos_id=-1.')
  t5 = (sp.pad_id(), sp.eos_id(), sp.unk_id()) == (PAD, EOS, UNK)

  # Sentinels: of the file, or after its pieces. Some trainers mark them as the start of a word.
  names = [piece.piece.removeprefix(SPACE) for piece in proto.pieces]
  numbered = numbered_sentinels({name: i for i, name in enumerate(names)
                                 if name.startswith('<extra_id_')})
  table, controls, byte_ids = _sentencepiece_table(spec, proto, numbered)
  special = {f'<extra_id_{n}>': i for n, i in enumerate(numbered)}
  if t5 and not numbered:
    special = _append_sentinels(table, NUM_SENTINELS)
  sentinels = tuple(special.values())

  # We add the leading space: sentencepiece would add one to each part of a text that is split at a
  # sentinel or a space mark.
  normalizer = proto.normalizer_spec
  strip_prefix = b' ' if normalizer.add_dummy_prefix else b''
  own_prefix = t5 and normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
  if own_prefix:
    normalizer.add_dummy_prefix = False
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  as_bytes = t5 and None not in byte_ids

  def encode_text(text):
    if as_bytes and text[0] in (SPACE, '\0'):
      return [byte_ids[b] for b in text.encode('utf-8')]
    return sp.encode(text)

  if t5:
    encode = split_encoder(encode_text, special, SPACE + '\0', ' ' if own_prefix else '')
  else:
    encode = split_encoder(encode_text, special | controls)
  decode, piece = byte_decoder(table, strip_prefix)
  ids = {'bos': sp.bos_id(), 'eos': sp.eos_id(), 'unk': sp.unk_id(), 'pad': sp.pad_id()}
  ids = {role: i for role, i in ids.items() if i >= 0}
  return Vocab(
      spec, hashlib.sha256(model).hexdigest(), len(table), encoder=encode, decoder=decode,
      piece=piece, **special_fields(ids), sentinels=sentinels, chat_template=config.chat_template,
      starts_with_bos=not t5 and 'bos' in ids and config.settings.get('add_bos_token') is not False,
      names={**{role: proto.pieces[i].piece for role, i in ids.items()}, **config.names},
      special={**controls, **_user_defined(proto)})


def _user_defined(proto) -> dict[str, int]:
  kind = sentencepiece_model_pb2.ModelProto.SentencePiece
  return {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == kind.USER_DEFINED}


def _sentencepiece_table(spec, proto, sentinels):
  """(bytes of each id, {text: id} of control pieces, id of each byte or None)."""
  kind = sentencepiece_model_pb2.ModelProto.SentencePiece
  table, controls, byte_ids = [], {}, [None] * 256
  for i, piece in enumerate(proto.pieces):
    if piece.type == kind.BYTE:
      try:
        value = int(piece.piece[1:-1], 16)  # '<0x0A>'
        byte_ids[value] = i
      except (ValueError, IndexError) as e:
        raise DataError(f'{spec}: byte piece {piece.piece!r} does not name a byte') from e
      table.append(bytes([value]))
    elif piece.type == kind.CONTROL:
      controls[piece.piece] = i
      table.append(b'')
    elif piece.type == kind.UNKNOWN:
      table.append(_UNKNOWN)
    else:
      table.append(piece.piece.replace(SPACE, ' ').encode('utf-8'))
  for n, i in enumerate(sentinels):
    table[i] = f'<extra_id_{n}>'.encode()
  return table, controls, byte_ids


def characters(spec: str, data: bytes) -> Vocab:
  """One id per character, from one table for inputs and another for targets.

  data: JSON {'inputs': 'table', 'targets': 'table', 'pad_id', 'bos_id', 'eos_id', 'unk_id'}. A
  character's id is its index; the characters at the four special ids are placeholders. Inputs start
  with bos and end in eos.
  """
  settings = files.parse_json(data, spec, DataError)
  keys = ('pad_id', 'bos_id', 'eos_id', 'unk_id')
  tables = [settings.get(name) for name in ('inputs', 'targets')]
  special = [settings.get(key) for key in keys]
  pad, bos, eos, unk = special
  if {*map(type, tables)} != {str} or {*map(type, special)} != {int}:
    raise DataError(f'{spec} must hold the texts inputs and targets and the numbers '
                    f'{", ".join(keys)}; it has: {", ".join(settings)}')
  sizes = list(map(len, tables))
  if len(set(special)) < 4 or not all(0 <= i < min(sizes) for i in special):
    raise DataError(f'{spec}: the special ids {special} must be four different ids of both tables, '
                    f'which have {sizes[0]} and {sizes[1]} characters')

  def encoder(name):
    """Returns text -> ids for one of the tables, whose characters must differ."""
    pairs = [(c, i) for i, c in enumerate(settings[name]) if i not in special]
    ids = dict(pairs)
    if len(ids) < len(pairs):
      counts = collections.Counter(c for c, _ in pairs)
      raise DataError(f'{spec}: {name} has {counts.most_common(1)[0][0]!r} more than once')
    return lambda text: [ids.get(c, unk) for c in text]

  table = [_UNKNOWN] * max(sizes)
  for i, character in enumerate(settings['targets']):
    if i != unk:
      table[i] = b'' if i in special else character.encode('utf-8')
  decode, piece = byte_decoder(table)
  return Vocab(
      spec, hashlib.sha256(data).hexdigest(), len(table), eos, encoder('inputs'), decode, piece,
      pad_id=pad, unk_id=unk, bos_id=bos, prefix=(bos,), target_encoder=encoder('targets'))
