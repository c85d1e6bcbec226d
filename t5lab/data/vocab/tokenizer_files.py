"""The files of a Hugging Face tokenizer, whatever their form, as one record.

A tokenizer is saved as a tokenizer.json, a sentencepiece model, or a vocab.json with merges.txt or
a vocab.txt. Which of these it was makes no difference to the classes of classes.py.
"""

import base64
import binascii
from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from google.protobuf import message as protobuf_message
from sentencepiece import sentencepiece_model_pb2
import tokenizers

from t5lab import files
from t5lab.errors import DataError

# What Rust's trim_end removes; Python's rstrip removes more.
_WHITESPACE = '\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000' + ''.join(
    map(chr, range(0x2000, 0x200b)))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4      # sentencepiece's types of pieces
FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')      # of an added token


@dataclasses.dataclass(frozen=True)
class Parts:
  """The content of the files.

  kind: 'BPE', 'Unigram', 'WordPiece' or 'WordLevel'. vocab: {token: id}, for Unigram [(token,
  score)]. post_processor: of a tokenizer.json. pieces: the sentencepiece model, if it was one.
  added: the tokens that the file itself adds, {id: AddedToken}.
  """
  kind: str
  vocab: Any
  merges: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  charsmap: bytes | None = None
  post_processor: Any = None
  pieces: Any = None
  added: dict[int, tokenizers.AddedToken] = dataclasses.field(default_factory=dict)

  @property
  def size(self) -> int:
    return len(self.vocab)


def from_json(data: bytes, tokenizer: tokenizers.Tokenizer, what: str) -> Parts:
  """Reads a tokenizer.json that the library has opened as `tokenizer`."""
  content = files.parse_json(data, what, DataError)
  model = content['model']
  kind, vocab = type(tokenizer.model).__name__, model['vocab']
  if kind == 'Unigram':
    vocab = [(token, score) for token, score in vocab]
  merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m)
            for m in model.get('merges') or ()]

  # The first precompiled character map of the normalizer, which may be a sequence.
  normalizer = content.get('normalizer') or {}
  charsmap = None
  for step in normalizer.get('normalizers') or [normalizer]:
    if step.get('precompiled_charsmap'):
      try:
        charsmap = base64.b64decode(step['precompiled_charsmap'])
      except binascii.Error as e:
        raise DataError(f'{what} has a precompiled_charsmap that is not base64') from e
      break
  return Parts(kind, vocab, merges, charsmap, tokenizer.post_processor,
               added=tokenizer.get_added_tokens_decoder())


def from_sentencepiece(data: bytes, kind: str, what: str) -> Parts:
  """Reads a sentencepiece model; kind: 'BPE' makes merges, 'Unigram' keeps scores, '' asks it."""
  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(data)
  except protobuf_message.DecodeError as e:
    raise DataError(f'{what} is not a sentencepiece model') from e
  if not proto.pieces:
    raise DataError(f'{what} is not a sentencepiece model: it has no pieces')
  kind = kind or ('Unigram' if proto.trainer_spec.model_type == 1 else 'BPE')
  charsmap = proto.normalizer_spec.precompiled_charsmap or None
  if kind == 'Unigram':
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    return Parts(kind, vocab, charsmap=charsmap, pieces=proto)
  vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  return Parts(kind, vocab, merges_by_id(vocab), charsmap, pieces=proto)


def merges_by_id(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
  """All pairs of tokens that make a token, in the order of ids; sentencepiece's BPE by rank.

  Of several pairs that make one token, the shorter left one comes first.
  """
  found = []
  for token, i in vocab.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in vocab and right in vocab:
        found.append((i, len(left), len(right), left, right))
  return [(left, right) for *_, left, right in sorted(found)]


def from_merges(vocab_json: bytes, merges_txt: bytes, what: str) -> Parts:
  """Reads GPT-2's pair of files."""
  vocab = files.parse_json(vocab_json, what, DataError)
  if not vocab or not all(type(i) is int and i >= 0 for i in vocab.values()):
    raise DataError(f'{what} must hold an object of tokens and ids')
  merges = []
  for number, line in enumerate(_text(merges_txt, 'merges.txt').split('\n'), 1):
    line = line.removesuffix('\r')
    if not line or line.startswith('#version'):
      continue
    pair = tuple(line.split(' '))
    if len(pair) != 2:
      raise DataError(f'merges.txt beside {what}: line {number} must be two tokens, got '
                      f'{line[:40]!r}')
    merges.append(pair)
  return Parts('BPE', vocab, merges)


def from_lines(vocab_txt: bytes, what: str) -> Parts:
  """Reads BERT's vocab.txt: a token's id is its line."""
  # str.splitlines would also split at U+2028 and the like, which are tokens of some vocabularies.
  lines = _text(vocab_txt, what).removesuffix('\n').split('\n')
  return Parts('WordPiece', {line.rstrip(_WHITESPACE): i for i, line in enumerate(lines)})


def _text(data: bytes, what: str) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise DataError(f'{what} is not UTF-8 text: byte {e.start}') from e


def added_token(value, what: str, special: bool = True) -> tokenizers.AddedToken:
  """A token of tokenizer_config.json and its kin: a text, or an object with `content`."""
  fields = {'special': special}
  if isinstance(value, dict):
    fields |= {key: value[key] for key in FLAGS if key in value}
    if not all(type(x) is bool for x in fields.values()):
      raise DataError(f'{what} has an added token whose flags are not true or false: '
                      f'{json.dumps(value)[:200]}')
    value = value.get('content')
  if not isinstance(value, str) or not value:
    raise DataError(f'{what} has an added token without a text: {str(value)[:80]!r}')
  return tokenizers.AddedToken(value, **fields)
