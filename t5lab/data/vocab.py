r"""Text to ids and back, losslessly: decode(encode(text)) == text for any Unicode text.

Ids of every vocabulary: pad 0, end of sequence 1, unknown 2, then bytes and pieces, and on top 100
sentinels: size-1 is <extra_id_0>, size-2 is <extra_id_1>, ... [Raffel et al. 2020, 3.1.4]

  load('byte')            3 + UTF-8 byte, no file [Xue et al. 2022, ByT5]
  load('t5lab_2048')      sentencepiece, embedded; 2048 ids in all (train_vocab.py made it)
  load('my/spiece.model') any sentencepiece model with these special ids, lossless if its spec is

A lossless model has an identity normaliser, byte fallback and remove_extra_whitespaces off. U+2581
(sentencepiece's mark for a space) in a text would come back as a space, so it goes in as its bytes.
"""
import functools
import hashlib
from importlib import resources
import pathlib
import re

from google.protobuf import message as protobuf_message
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5lab.errors import DataError, UsageError, did_you_mean

PAD, EOS, UNK = 0, 1, 2
NUM_SENTINELS = 100
DEFAULT = 't5lab_2048'
SPACE = '\u2581'

_SENTINEL = re.compile(r'<extra_id_(0|[1-9]\d?)>')
_SENTINEL_OR_MARK = re.compile(rf'(<extra_id_(?:0|[1-9]\d?)>|[{SPACE}\0]+)')
_UNKNOWN = ' \u2047 '.encode()  # what sentencepiece prints for an unknown piece


class Vocab:
  """One vocabulary: ids in [0, size), sentinels included. `sha256` is that of the model file."""
  pad_id, eos_id, unk_id = PAD, EOS, UNK

  def __init__(self, spec, sha256, table, encode_text, add_prefix='', strip_prefix=b''):
    """table: list of the bytes of each id below the sentinels; encode_text: str -> ids, given text
    between sentinels; a text begins with `add_prefix` when encoded and loses `strip_prefix` when
    decoded."""
    self.spec, self.sha256 = spec, sha256
    self.size = len(table) + NUM_SENTINELS
    self._table = table + [f'<extra_id_{self.size - 1 - i}>'.encode()
                           for i in range(len(table), self.size)]
    self._encode_text = encode_text
    self._add_prefix, self._strip_prefix = add_prefix, strip_prefix

  def __repr__(self):
    return f'Vocab({self.spec!r}, size={self.size}, sha256={self.sha256[:12]})'

  def sentinel(self, i: int) -> int:
    if not 0 <= i < NUM_SENTINELS:
      raise ValueError(f'sentinel {i} of {NUM_SENTINELS}')
    return self.size - 1 - i

  def encode(self, text: str) -> list[int]:
    """Ids of the text, with no end of sequence. '<extra_id_N>' in the text becomes sentinel N."""
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as e:
      raise DataError(f'text with a lone surrogate U+{ord(text[e.start]):04X} at character '
                      f'{e.start} is not Unicode text: decode the file as UTF-8.') from e
    if not text:
      return []
    ids = []
    for part in _SENTINEL_OR_MARK.split(self._add_prefix + text):
      match = _SENTINEL.fullmatch(part)
      if match:
        ids.append(self.sentinel(int(match[1])))
      elif part:
        ids.extend(self._encode_text(part))
    return ids

  def decode(self, ids) -> str:
    """Text up to the first end of sequence; pads print nothing, broken UTF-8 prints U+FFFD."""
    pieces = []
    for i in map(int, ids):
      if i == EOS:
        break
      pieces.append(self._table[i] if 0 <= i < self.size else _UNKNOWN)
    return b''.join(pieces).removeprefix(self._strip_prefix).decode('utf-8', 'replace')

  def pieces(self, ids) -> list[str]:
    """The text of each id alone, for showing what a model sees."""
    return [self._table[i].decode('utf-8', 'backslashreplace') for i in map(int, ids)]


def _byte_vocab() -> Vocab:
  table = [b'', b'', _UNKNOWN] + [bytes([b]) for b in range(256)]
  return Vocab('byte', hashlib.sha256(b''.join(table)).hexdigest(), table,
               lambda text: [3 + b for b in text.encode('utf-8')])


def from_bytes(spec: str, model: bytes) -> Vocab:
  """The vocabulary of a sentencepiece model file's bytes."""
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
  except (protobuf_message.DecodeError, RuntimeError) as e:
    raise DataError(f'{spec} is not a sentencepiece model.') from e
  special = (sp.pad_id(), sp.eos_id(), sp.unk_id())
  if special != (PAD, EOS, UNK):
    raise DataError(f'{spec} has pad, eos, unk ids {special}, not {(PAD, EOS, UNK)}: train it with '
                    f'pad_id=0, eos_id=1, unk_id=2, bos_id=-1.')
  kind = sentencepiece_model_pb2.ModelProto.SentencePiece
  byte_ids = [None] * 256
  table = []
  for i, piece in enumerate(proto.pieces):
    if piece.type == kind.BYTE:
      value = int(piece.piece[1:-1], 16)  # '<0x0A>'
      byte_ids[value] = i
      table.append(bytes([value]))
    elif piece.type == kind.CONTROL:
      table.append(b'')
    elif piece.type == kind.UNKNOWN:
      table.append(_UNKNOWN)
    else:
      table.append(piece.piece.replace(SPACE, ' ').encode('utf-8'))

  # The leading space is put on here rather than by sentencepiece, which would put one on each part
  # of a text that was cut at a sentinel or a space mark.
  normalizer = proto.normalizer_spec
  strip_prefix = b' ' if normalizer.add_dummy_prefix else b''
  own_prefix = normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
  if own_prefix:
    normalizer.add_dummy_prefix = False
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
  as_bytes = None not in byte_ids

  def encode_text(text):
    if as_bytes and text[0] in (SPACE, '\0'):
      return [byte_ids[b] for b in text.encode('utf-8')]
    return sp.encode(text)

  return Vocab(spec, hashlib.sha256(model).hexdigest(), table, encode_text,
               ' ' if own_prefix else '', strip_prefix)


def embedded() -> list[str]:
  """Specs of the vocabularies inside the package, 'byte' first."""
  files = resources.files('t5lab.data').joinpath('files')
  models = [f.name.removesuffix('.model') for f in files.iterdir() if f.name.endswith('.model')]
  return ['byte'] + sorted(models, key=lambda name: (len(name), name))


@functools.cache
def load(spec: str = DEFAULT) -> Vocab:
  """The vocabulary that `spec` names: 'byte', an embedded name, or a path to a .model file."""
  if spec == 'byte':
    return _byte_vocab()
  if spec in embedded():
    path = resources.files('t5lab.data').joinpath('files', f'{spec}.model')
    return from_bytes(spec, path.read_bytes())
  if not spec.endswith('.model'):
    raise UsageError(f'no vocabulary {spec!r}.{did_you_mean(spec, embedded())} '
                     f'Or give a path to a sentencepiece .model file.')
  try:
    return from_bytes(spec, pathlib.Path(spec).read_bytes())
  except OSError as e:
    raise DataError(f'cannot read vocabulary {spec!r}: {e.strerror}. '
                    f'Embedded: {", ".join(embedded())}.') from e
