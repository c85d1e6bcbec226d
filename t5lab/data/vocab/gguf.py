"""The tokenizer inside a .gguf file, as the ordinary files that say the same.

Only the file's metadata is read, with our own reader: counts and lengths are checked against the
file's size before anything is allocated, and no tensor is touched. [GGUF specification, ggml]
"""
import json
import pathlib
import struct

from sentencepiece import sentencepiece_model_pb2
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from t5lab.data.vocab import tokenizer_config
from t5lab.errors import DataError, UsageError, did_you_mean

# Value types of the format: name of the struct format, or how it is read.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q',
            12: 'd'}
_STRING, _ARRAY = 8, 9
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)    # tokenizer.ggml.token_type
_LARGEST_STRING = 16 << 20

# Where a text is cut before byte pairs are merged, by tokenizer.ggml.pre. [llama.cpp, unicode
# regexes of llama-vocab; Radford et al. 2019 for gpt-2]
_LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
            r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
_BY_REGEX = {'llama-bpe': _LLAMA_3, 'qwen2': _LLAMA_3.replace('{1,3}', '')}
PRE_TOKENIZERS = ('default', 'gpt-2', 'smollm', *_BY_REGEX)


def metadata(path) -> dict:
  """The key-value pairs of a .gguf file. DataError for a file that is none or is cut short."""
  tokenizer_config.check_regular(pathlib.Path(path))
  with open(path, 'rb') as f:
    f.seek(0, 2)
    reader = _Reader(f, f.tell(), path)
    f.seek(0)
    if reader.bytes(4) != b'GGUF':
      raise DataError(f'{path} is not a GGUF file')
    version = reader.scalar(4)
    if version not in (2, 3):
      raise DataError(f'{path}: GGUF version {version}; 2 and 3 are read')
    reader.scalar(10)                                    # tensors
    pairs, out = reader.count(12), {}
    for _ in range(pairs):
      key = reader.string()
      if key in out:
        raise DataError(f'{path}: key {key!r} stands twice')
      out[key] = reader.value(reader.scalar(4))
    return out


class _Reader:
  """Little-endian values of a file, never more than the file still holds."""

  def __init__(self, f, size, path):
    self._f, self._size, self._path = f, size, path

  def bytes(self, count):
    left = self._size - self._f.tell()
    if count > left:
      raise DataError(f'{self._path} is cut short or damaged: {count:,} bytes are wanted at byte '
                      f'{self._f.tell():,}, {left:,} are left')
    return self._f.read(count)

  def scalar(self, kind):
    form = '<' + _SCALARS[kind]
    return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

  def count(self, least_size):
    """A uint64 that says how many things of at least so many bytes follow."""
    count = self.scalar(10)
    if count * least_size > self._size - self._f.tell():
      raise DataError(f'{self._path} is cut short or damaged: it announces {count:,} entries, more '
                      'than its bytes can hold')
    return count

  def string(self):
    length = self.scalar(10)
    if length > _LARGEST_STRING:
      raise DataError(f'{self._path}: a text of {length:,} bytes; the limit is {_LARGEST_STRING:,}')
    return self.bytes(length).decode('utf-8', 'replace')

  def value(self, kind, depth=0):
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.scalar(kind)
    if kind != _ARRAY or depth > 3:
      raise DataError(f'{self._path}: value type {kind} is none of GGUF')
    inner = self.scalar(4)
    if inner not in _SCALARS:
      return [self.value(inner, depth + 1) for _ in range(self.count(8))]
    form = _SCALARS[inner]
    count = self.count(struct.calcsize(form))
    return list(struct.unpack(f'<{count}{form}', self.bytes(count * struct.calcsize(form))))


def tokenizer_files(meta: dict, what: str) -> dict[str, bytes]:
  """GGUF metadata -> {name: contents}: tokenizer.json or tokenizer.model first, then its config.

  Byte-level BPE (tokenizer.ggml.model gpt2) becomes a tokenizer.json; llama a sentencepiece model.
  """
  get = lambda key, default=None: meta.get(f'tokenizer.ggml.{key}', default)
  kind, tokens = get('model'), get('tokens')
  if kind not in ('gpt2', 'llama'):
    raise UsageError(f'{what} has a tokenizer of kind {kind!r}; gpt2 (byte-level BPE) and llama '
                     '(sentencepiece) are read')
  if not _is_list(tokens, str) or not tokens:
    raise DataError(f'{what} has no tokenizer.ggml.tokens')
  types = get('token_type', [_NORMAL] * len(tokens))
  if not _is_list(types, int) or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise DataError(f'{what}: {len(tokens):,} tokens, {len(set(tokens)):,} different ones, '
                    f'{len(types):,} types: they must be as many')
  names = {}
  for role, key in (('bos', 'bos_token_id'), ('eos', 'eos_token_id'), ('pad', 'padding_token_id'),
                    ('unk', 'unknown_token_id')):
    i = get(key)
    if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
      raise DataError(f'{what}: tokenizer.ggml.{key} is {i!r}, of {len(tokens):,} tokens')
    if i is not None:
      names[role] = i
  if 'eos' not in names:
    raise DataError(f'{what} has no tokenizer.ggml.eos_token_id')
  add_bos = get('add_bos_token')
  if add_bos is None:             # what llama.cpp takes where the file says nothing
    add_bos = kind == 'llama' or get('pre') == 'llama-bpe'
  settings = {
      'tokenizer_class': 'LlamaTokenizer' if kind == 'llama' else 'PreTrainedTokenizerFast',
      'add_bos_token': bool(add_bos) and 'bos' in names,
      'add_eos_token': bool(get('add_eos_token')),
      **{f'{role}_token': tokens[i] for role, i in names.items()},
      'clean_up_tokenization_spaces': False}
  if isinstance(meta.get('tokenizer.chat_template'), str):
    settings['chat_template'] = meta['tokenizer.chat_template']
  if kind == 'llama':
    name, data = 'tokenizer.model', _sentencepiece(meta, tokens, types, names, what)
  else:
    name, data = 'tokenizer.json', _byte_level(meta, tokens, types, names, settings, what)
  return {name: data,
          'tokenizer_config.json': (json.dumps(settings, indent=1, ensure_ascii=False) + '\n')
          .encode()}


def export_gguf(path, folder) -> str:
  """Writes a .gguf file's tokenizer as ordinary files into `folder` -> the spec that loads it."""
  files = tokenizer_files(metadata(path), str(path))
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  return str(folder / next(iter(files)))


def _is_list(value, kind) -> bool:
  return isinstance(value, list) and all(type(x) is kind for x in value)


def _byte_level(meta, tokens, types, names, settings, what) -> bytes:
  pre = meta.get('tokenizer.ggml.pre', 'default')
  if pre not in PRE_TOKENIZERS:
    raise UsageError(f'{what} cuts text by the rule {pre!r} (tokenizer.ggml.pre), which is not '
                     f'known here.{did_you_mean(str(pre), PRE_TOKENIZERS)}')
  merges = meta.get('tokenizer.ggml.merges')
  pairs = [tuple(m.split(' ')) for m in merges] if _is_list(merges, str) else None
  if pairs is None or any(len(pair) != 2 for pair in pairs):
    raise DataError(f'{what}: tokenizer.ggml.merges must be pairs of tokens')
  ids = {token: i for i, token in enumerate(tokens)}
  try:
    tokenizer = tokenizers.Tokenizer(models.BPE(
        ids, pairs, ignore_merges=pre == 'llama-bpe'))
  except Exception as e:          # the library raises the bare class
    raise DataError(f'{what}: tokens and merges do not fit: {" ".join(str(e).split())[:200]}'
                    ) from e
  if pre == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  if pre in _BY_REGEX:
    cut = pre_tokenizers.Split(tokenizers.Regex(_BY_REGEX[pre]), 'isolated')
  else:
    cut = pre_tokenizers.Digits(individual_digits=True) if pre == 'smollm' else None
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _BY_REGEX)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level]) if cut else level
  tokenizer.decoder = decoders.ByteLevel()
  role = lambda name: [(tokens[names[name]], names[name])]
  before = role('bos') if settings['add_bos_token'] else []
  after = role('eos') if settings['add_eos_token'] else []
  if before or after:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(t for t, _ in before), '$A', *(t for t, _ in after)],
        special_tokens=list(dict(before + after).items()))
  tokenizer.add_special_tokens([
      tokenizers.AddedToken(t, special=True, normalized=False)
      for t, kind in zip(tokens, types) if kind == _CONTROL])
  tokenizer.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False)
                        for t, kind in zip(tokens, types) if kind == _USER])
  return (tokenizer.to_str(pretty=True) + '\n').encode('utf-8')


def _sentencepiece(meta, tokens, types, names, what) -> bytes:
  """A sentencepiece model of the tokens, their scores and types; the numbers of types agree."""
  scores = meta.get('tokenizer.ggml.scores')
  if not _is_list(scores, float) or len(scores) != len(tokens):
    raise DataError(f'{what}: {len(tokens):,} tokens need as many tokenizer.ggml.scores')
  proto = sentencepiece_model_pb2.ModelProto()
  for token, score, kind in zip(tokens, scores, types):
    if kind not in range(_NORMAL, _BYTE + 1):
      raise DataError(f'{what}: token {token!r} has type {kind}, which is none of GGUF')
    proto.pieces.add(piece=token, score=score, type=kind)
  trainer = proto.trainer_spec
  trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
  trainer.byte_fallback = _BYTE in types
  for role in ('unk', 'bos', 'eos', 'pad'):
    setattr(trainer, f'{role}_id', names.get(role, -1))
    if role in names:
      setattr(trainer, f'{role}_piece', tokens[names[role]])
  normalizer = proto.normalizer_spec
  normalizer.name, normalizer.remove_extra_whitespaces = 'identity', False
  normalizer.add_dummy_prefix = meta.get('tokenizer.ggml.add_space_prefix') is not False
  return proto.SerializeToString(deterministic=True)
