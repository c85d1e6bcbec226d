"""Vocabularies whose ids stand for bytes: ByT5's, sentencepiece models, tables of characters.

Encoding is lossless for 'byte' and for sentencepiece models with an identity normaliser, byte
fallback and remove_extra_whitespaces off. U+2581 (sentencepiece's mark for a space) in a text would
come back as a space, so there it goes in as its bytes.
"""
from collections.abc import Sequence
import hashlib

from google.protobuf import message as protobuf_message
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5lab.data.vocab import tokenizer_config
from t5lab.data.vocab.base import UNKNOWN, Vocab, numbered_sentinels, splitter
from t5lab.errors import DataError

PAD, EOS, UNK = 0, 1, 2           # of the byte vocabulary and of T5's kind of sentencepiece model
NUM_SENTINELS = 100
SPACE = '\u2581'

_UNKNOWN = UNKNOWN.encode()


def _decoder(table: Sequence[bytes], strip_prefix: bytes = b''):
  """(ids -> text, id -> its own text) of the bytes of every id."""
  at = lambda i: table[i] if 0 <= i < len(table) else _UNKNOWN
  return (lambda ids: b''.join(map(at, ids)).removeprefix(strip_prefix).decode('utf-8', 'replace'),
          lambda i: at(i).decode('utf-8', 'backslashreplace'))


def _sentinels_on_top(table: list[bytes], count: int) -> dict[str, int]:
  """{'<extra_id_0>': id, …}: the last id is <extra_id_0>. Their texts are added to the table."""
  size = len(table) + count
  table += [f'<extra_id_{size - 1 - i}>'.encode() for i in range(len(table), size)]
  return {f'<extra_id_{n}>': size - 1 - n for n in range(count)}


def _split_encoder(encode_text, special: dict[str, int], marks: str = '', add_prefix: str = ''):
  """text -> ids; special tokens by their ids, what stands between them by encode_text."""
  pattern = splitter(special, marks)
  if pattern is None:
    return encode_text

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
  """3 + UTF-8 byte. ByT5's tasks and its Hugging Face form have 125 sentinels: 384 ids.

  [Xue et al. 2022, ByT5]
  """
  table = [b'', b'', _UNKNOWN] + [bytes([b]) for b in range(256)]
  said = b'' if sentinels == NUM_SENTINELS else f'{sentinels} sentinels'.encode()
  sha256 = hashlib.sha256(b''.join(table) + said).hexdigest()
  special = _sentinels_on_top(table, sentinels)
  decode, piece = _decoder(table)
  encode = _split_encoder(lambda text: [3 + b for b in text.encode('utf-8')], special)
  return Vocab(spec, sha256, len(table), EOS, encode, decode, piece, pad_id=PAD, unk_id=UNK,
               sentinels=tuple(special.values()))


def sentencepiece_model(spec: str, model: bytes,
                        config: tokenizer_config.Config = tokenizer_config.config({})) -> Vocab:
  """The vocabulary of a sentencepiece model file's bytes.

  With T5's special ids (pad 0, eos 1, unk 2) it takes 100 sentinels on top, unless <extra_id_N> are
  pieces of the file (mT5's). With others (LLaMA: unk 0, bos 1, eos 2) it has the sentinels of the
  file or none, its control pieces are read in a text as such, and it opens texts with its bos
  unless the config says add_bos_token false.
  """
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
  except (protobuf_message.DecodeError, RuntimeError) as e:
    raise DataError(f'{spec} is not a sentencepiece model.') from e
  if sp.eos_id() < 0:
    raise DataError(f'{spec} has no end-of-sequence piece (pad, eos, unk ids '
                    f'{(sp.pad_id(), sp.eos_id(), sp.unk_id())}): train it with pad_id=0, '
                    'eos_id=1, unk_id=2, bos_id=-1.')
  t5 = (sp.pad_id(), sp.eos_id(), sp.unk_id()) == (PAD, EOS, UNK)
  # Some trainers mark them as the start of a word.
  inside = {p.piece.removeprefix(SPACE): i for i, p in enumerate(proto.pieces)
            if p.piece.removeprefix(SPACE).startswith('<extra_id_')}
  numbered = numbered_sentinels(inside)
  table, controls, byte_ids = _sentencepiece_table(spec, proto, numbered)
  special = {f'<extra_id_{n}>': i for n, i in enumerate(numbered)}
  if t5 and not numbered:
    special = _sentinels_on_top(table, NUM_SENTINELS)
  sentinels = tuple(special.values())

  # The leading space is put on here rather than by sentencepiece, which would put one on each part
  # of a text that was cut at a sentinel or a space mark.
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
    encode = _split_encoder(encode_text, special, SPACE + '\0', ' ' if own_prefix else '')
  else:
    encode = _split_encoder(encode_text, special | controls)
  decode, piece = _decoder(table, strip_prefix)
  ids = {'bos': sp.bos_id(), 'eos': sp.eos_id(), 'unk': sp.unk_id(), 'pad': sp.pad_id()}
  ids = {role: i for role, i in ids.items() if i >= 0}
  return Vocab(
      spec, hashlib.sha256(model).hexdigest(), len(table), ids['eos'], encode, decode, piece,
      pad_id=ids.get('pad', ids['eos']), unk_id=ids.get('unk'), bos_id=ids.get('bos'),
      sentinels=sentinels, chat_template=config.chat_template,
      starts_with_bos=not t5 and 'bos' in ids and config.settings.get('add_bos_token') is not False,
      names={**{role: proto.pieces[i].piece for role, i in ids.items()}, **config.names})


def _sentencepiece_table(spec, proto, sentinels):
  """(bytes of each id, {text: id} of its control pieces, id of each byte or None)."""
  kind = sentencepiece_model_pb2.ModelProto.SentencePiece
  table, controls, byte_ids = [], {}, [None] * 256
  for i, piece in enumerate(proto.pieces):
    if piece.type == kind.BYTE:
      try:
        value = int(piece.piece[1:-1], 16)  # '<0x0A>'
        byte_ids[value] = i
      except (ValueError, IndexError) as e:
        raise DataError(f'{spec}: byte piece {piece.piece!r} names no byte') from e
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
  """One id a character, of one table for inputs and of another for targets.

  data: JSON {'inputs': 'table', 'targets': 'table', 'pad_id', 'bos_id', 'eos_id', 'unk_id'}: a
  character's id is its index; what stands at the four special ids are placeholders. Inputs open
  with bos and end in eos.
  """
  said = tokenizer_config.parse_json(data, spec)
  roles = ('pad', 'bos', 'eos', 'unk')
  tables = [said.get('inputs'), said.get('targets')]
  special = [said.get(f'{role}_id') for role in roles]
  if not all(isinstance(t, str) for t in tables) or not all(type(i) is int for i in special):
    raise DataError(f'{spec} must hold the texts inputs and targets and the numbers '
                    f'{", ".join(f"{role}_id" for role in roles)}; it has: {", ".join(said)}')
  size = max(map(len, tables))
  if len(set(special)) < 4 or not all(0 <= i < min(map(len, tables)) for i in special):
    raise DataError(f'{spec}: the special ids {special} must be four different ones that both '
                    f'tables have, of {len(tables[0])} and {len(tables[1])} characters')
  ids = []
  for name, characters_of in zip(('inputs', 'targets'), tables):
    real = [c for i, c in enumerate(characters_of) if i not in special]
    if len(set(real)) < len(real):
      raise DataError(f'{spec}: {name} has {max(real, key=real.count)!r} more than once')
    ids.append({c: i for i, c in enumerate(characters_of) if i not in special})
  pad, bos, eos, unk = special
  table = [b'' if i in (pad, bos, eos) else _UNKNOWN if i == unk or i >= len(tables[1])
           else tables[1][i].encode('utf-8') for i in range(size)]
  decode, piece = _decoder(table)
  encoder = lambda known: lambda text: [known.get(c, unk) for c in text]
  return Vocab(spec, hashlib.sha256(data).hexdigest(), size, eos, encoder(ids[0]), decode, piece,
               pad_id=pad, unk_id=unk, bos_id=bos, prefix=(bos,), target_encoder=encoder(ids[1]))
