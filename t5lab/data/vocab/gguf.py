"""The tokenizer inside a .gguf file, converted to ordinary tokenizer files.

Only the file's header is read; no tensor is touched. [GGUF specification, ggml]
"""
import json

import numpy as np
from sentencepiece import sentencepiece_model_pb2
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from t5lab import files
from t5lab.data.vocab import gguf_header
from t5lab.errors import DataError, UsageError, did_you_mean

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)    # tokenizer.ggml.token_type
_ID_KEYS = {'bos': 'bos_token_id', 'eos': 'eos_token_id', 'pad': 'padding_token_id',
            'unk': 'unknown_token_id'}

# How a text is split before byte pairs are merged, by tokenizer.ggml.pre. [llama.cpp, unicode
# regexes of llama-vocab; Radford et al. 2019 for gpt-2]
_LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
            r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
_BY_REGEX = {'llama-bpe': _LLAMA_3, 'qwen2': _LLAMA_3.replace('{1,3}', '')}
PRE_TOKENIZERS = ('default', 'gpt-2', 'smollm', *_BY_REGEX)


def metadata(path) -> dict:
  """Returns the metadata of a .gguf file; DataError for a file that is not GGUF or is truncated."""
  files.check_regular(path, DataError)
  with open(path, 'rb') as f:
    return gguf_header.read_header(f, path, decode_errors='replace').metadata


def tokenizer_files(meta: dict, what: str) -> dict[str, bytes]:
  """GGUF metadata -> {name: contents}: tokenizer.json or tokenizer.model first, then its config.

  Byte-level BPE (tokenizer.ggml.model gpt2) becomes a tokenizer.json; llama a sentencepiece model.
  """
  kind, tokens = meta.get('tokenizer.ggml.model'), meta.get('tokenizer.ggml.tokens')
  if kind not in ('gpt2', 'llama'):
    raise UsageError(f'{what} has a tokenizer of kind {kind!r}; supported: gpt2 (byte-level BPE) '
                     'and llama (sentencepiece)')
  if not isinstance(tokens, list) or not tokens:   # the header's only lists are of strings
    raise DataError(f'{what} has no tokenizer.ggml.tokens')
  types = _numbers(meta, 'tokenizer.ggml.token_type', int)
  if 'tokenizer.ggml.token_type' not in meta:
    types = [_NORMAL] * len(tokens)
  if types is None or not len(tokens) == len(types) == len(set(tokens)):
    raise DataError(f'{what} has {len(tokens):,} tokens, {len(set(tokens)):,} distinct tokens and '
                    f'{len(types or ()):,} token types; the three numbers must be equal')

  ids = _special_ids(meta, len(tokens), what)
  add_bos = meta.get('tokenizer.ggml.add_bos_token')
  if add_bos is None:             # llama.cpp's default
    add_bos = kind == 'llama' or meta.get('tokenizer.ggml.pre') == 'llama-bpe'
  settings = {
      # Without a class, a sentencepiece model is read as its own library reads it.
      **({'tokenizer_class': 'PreTrainedTokenizerFast'} if kind == 'gpt2' else {}),
      'add_bos_token': bool(add_bos) and 'bos' in ids,
      'add_eos_token': bool(meta.get('tokenizer.ggml.add_eos_token')),
      **{f'{role}_token': tokens[i] for role, i in ids.items()},
      'clean_up_tokenization_spaces': False}
  if isinstance(meta.get('tokenizer.chat_template'), str):
    settings['chat_template'] = meta['tokenizer.chat_template']

  if kind == 'llama':
    name, data = 'tokenizer.model', _sentencepiece(meta, tokens, types, ids, what)
  else:
    name, data = 'tokenizer.json', _byte_level(meta, tokens, types, ids, settings, what)
  config = json.dumps(settings, indent=1, ensure_ascii=False) + '\n'
  return {name: data, 'tokenizer_config.json': config.encode()}


def _numbers(meta: dict, key: str, kind: type) -> list | None:
  """The array of numbers of this Python type at `key`, None for any other value."""
  value = meta.get(key)
  if not isinstance(value, np.ndarray):
    return None
  numbers = value.tolist()
  return numbers if all(type(x) is kind for x in numbers) else None


def _special_ids(meta: dict, size: int, what: str) -> dict[str, int]:
  """{role: token id} of the special tokens that the file names."""
  ids = {role: meta.get(f'tokenizer.ggml.{key}') for role, key in _ID_KEYS.items()}
  ids = {role: i for role, i in ids.items() if i is not None}
  for role, i in ids.items():
    if type(i) is not int or not 0 <= i < size:
      raise DataError(f'{what}: tokenizer.ggml.{_ID_KEYS[role]} must be the id of one of the '
                      f'{size:,} tokens, got {i!r}')
  if 'eos' not in ids:
    raise DataError(f'{what} has no tokenizer.ggml.eos_token_id')
  return ids


def _byte_level(meta, tokens, types, ids, settings, what) -> bytes:
  """Returns a tokenizer.json of byte-level BPE."""
  rule = meta.get('tokenizer.ggml.pre', 'default')
  if rule not in PRE_TOKENIZERS:
    raise UsageError(f'{what} uses an unknown pre-tokenizer {rule!r} (tokenizer.ggml.pre).'
                     f'{did_you_mean(str(rule), PRE_TOKENIZERS)}')
  merges = meta.get('tokenizer.ggml.merges')
  pairs = [tuple(merge.split(' ')) for merge in merges] if isinstance(merges, list) else None
  if pairs is None or any(len(pair) != 2 for pair in pairs):
    raise DataError(f'{what}: tokenizer.ggml.merges must be pairs of tokens')
  try:
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=rule == 'llama-bpe'))
  except Exception as e:          # the library raises the bare class
    raise DataError(f'{what}: the merges do not fit the tokens: {" ".join(str(e).split())[:200]}'
                    ) from e

  # How a text is normalised and split.
  if rule == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _BY_REGEX)
  steps = [byte_level]
  if rule in _BY_REGEX:
    steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(_BY_REGEX[rule]), 'isolated'))
  elif rule == 'smollm':
    steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if steps[1:] else byte_level
  tokenizer.decoder = decoders.ByteLevel()

  # Special tokens, and those put around a text.
  before = [tokens[ids['bos']]] if settings['add_bos_token'] else []
  after = [tokens[ids['eos']]] if settings['add_eos_token'] else []
  if before or after:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, '$A', *after],
        special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(before + after)])
  added = lambda kind: [tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
                        for token, token_type in zip(tokens, types) if token_type == kind]
  tokenizer.add_special_tokens(added(_CONTROL))
  tokenizer.add_tokens(added(_USER))
  return (tokenizer.to_str(pretty=True) + '\n').encode('utf-8')


def _sentencepiece(meta, tokens, types, ids, what) -> bytes:
  """Returns a sentencepiece model; its numbers for the types of tokens are GGUF's."""
  scores = _numbers(meta, 'tokenizer.ggml.scores', float)
  if scores is None or len(scores) != len(tokens):
    raise DataError(f'{what}: tokenizer.ggml.scores must hold one number for each of the '
                    f'{len(tokens):,} tokens')
  proto = sentencepiece_model_pb2.ModelProto()
  for token, score, kind in zip(tokens, scores, types):
    if kind not in range(_NORMAL, _BYTE + 1):
      raise DataError(f'{what}: token {token!r} has type {kind}; known: {_NORMAL} to {_BYTE}')
    proto.pieces.add(piece=token, score=score, type=kind)

  trainer = proto.trainer_spec
  trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
  trainer.byte_fallback = _BYTE in types
  for role in ('unk', 'bos', 'eos', 'pad'):
    setattr(trainer, f'{role}_id', ids.get(role, -1))
    if role in ids:
      setattr(trainer, f'{role}_piece', tokens[ids[role]])

  normalizer = proto.normalizer_spec
  normalizer.name, normalizer.remove_extra_whitespaces = 'identity', False
  normalizer.add_dummy_prefix = meta.get('tokenizer.ggml.add_space_prefix') is not False
  return proto.SerializeToString(deterministic=True)
