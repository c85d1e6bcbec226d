"""Vocabularies of the `tokenizers` library: tokenizer.json, and BERT's vocab.txt.

Special ids are those that the files beside it name; where none of them names any (openai's gpt2),
the conventional names. How texts are framed is asked of the tokenizer's own post-processor.
"""
import hashlib
import itertools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from t5lab.data.vocab import tokenizer_config
from t5lab.data.vocab.base import UNKNOWN, Vocab, numbered_sentinels
from t5lab.errors import DataError

CONVENTIONAL = {'bos': ('<s>', '<|begin_of_text|>', '<|endoftext|>'),
                'eos': ('</s>', '<|end_of_text|>', '<|endoftext|>', '[SEP]'),
                'pad': ('<pad>', '[PAD]'), 'unk': ('<unk>', '[UNK]'), 'cls': ('[CLS]',),
                'sep': ('[SEP]',), 'mask': ('<mask>', '[MASK]')}


def tokenizer_json(spec: str, data: bytes, config: tokenizer_config.Config) -> Vocab:
  """The vocabulary of a tokenizer.json's bytes."""
  try:
    tokenizer = tokenizers.Tokenizer.from_str(data.decode('utf-8'))
  except Exception as e:          # the library raises the bare class
    raise DataError(f'{spec} is not a tokenizer.json that the tokenizers library reads: '
                    f'{" ".join(str(e).split())[:200]}') from e
  return _vocab(spec, tokenizer, data, config)


def vocab_txt(spec: str, data: bytes, config: tokenizer_config.Config) -> Vocab:
  """BERT's WordPiece, one token a line. Lower case unless the config says do_lower_case false.

  [Devlin et al. 2019]
  """
  try:
    # str.splitlines would also split at U+2028 and the like, which are tokens of some vocabularies.
    tokens = [t.rstrip('\r') for t in data.decode('utf-8').removesuffix('\n').split('\n')]
  except UnicodeDecodeError as e:
    raise DataError(f'{spec} is not UTF-8 text: byte {e.start}') from e
  ids = {token: i for i, token in enumerate(tokens)}
  names = {role: config.names.get(role, CONVENTIONAL[role][-1])
           for role in ('pad', 'unk', 'cls', 'sep', 'mask')}
  missing = [names[role] for role in ('unk', 'cls', 'sep') if names[role] not in ids]
  if missing:
    raise DataError(f'{spec} has no {", ".join(missing)} among its {len(tokens):,} lines: not a '
                    'WordPiece vocabulary of BERT')
  said = config.settings
  tokenizer = tokenizers.Tokenizer(models.WordPiece(
      ids, unk_token=names['unk'], max_input_chars_per_word=100))
  tokenizer.normalizer = normalizers.BertNormalizer(
      clean_text=True, handle_chinese_chars=said.get('tokenize_chinese_chars') is not False,
      strip_accents=said.get('strip_accents'), lowercase=said.get('do_lower_case') is not False)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.BertProcessing(
      (names['sep'], ids[names['sep']]), (names['cls'], ids[names['cls']]))
  tokenizer.decoder = decoders.WordPiece()
  tokenizer.add_special_tokens([
      tokenizers.AddedToken(text, special=True, normalized=False)
      for text in names.values() if text in ids])
  rules = json.dumps([said.get(k) for k in ('do_lower_case', 'strip_accents',
                                            'tokenize_chinese_chars')])
  config = tokenizer_config.Config(said, {**names, **config.names}, config.chat_template)
  return _vocab(spec, tokenizer, data + rules.encode(), config)


def _vocab(spec, tokenizer, data, config) -> Vocab:
  """data: the bytes that, with the special ids, make the fingerprint."""
  tokenizer.no_truncation()       # some files ask for 128 tokens, whatever the text
  tokenizer.no_padding()
  known = tokenizer.get_vocab(with_added_tokens=True)
  if not known:
    raise DataError(f'{spec} has no tokens')
  texts = {i: text for text, i in known.items()}
  size = max(texts) + 1
  names = config.names or {role: next((t for t in options if t in known), None)
                           for role, options in CONVENTIONAL.items()}
  ids = {role: known[text] for role, text in names.items() if text in known}
  prefix, suffix = _framing(spec, tokenizer, texts)
  if suffix:
    ids['eos'] = suffix[0]
  elif prefix:
    ids['bos'] = prefix[0]
  if 'eos' not in ids:
    raise DataError(f'{spec} does not say which token ends a text: give eos_token in a '
                    'tokenizer_config.json beside it')
  sentinels = numbered_sentinels(known)
  special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  silent = (special | set(ids.values())) - set(sentinels)
  if _has_unknown(tokenizer.model) and list(ids.values()).count(ids.get('unk')) == 1:
    silent.discard(ids['unk'])
    unknown = ids['unk']
  else:                           # byte-level: an 'unknown' token is only one more special one
    unknown = None

  def decode(ids):
    said = [i for i in ids if i not in silent]
    if unknown is not None:       # in one go: decoders join the words on both sides of it
      known_ids = [i if i in texts else unknown for i in said]
      text = tokenizer.decode(known_ids, skip_special_tokens=False)
      return text.replace(texts[unknown], UNKNOWN)
    runs = itertools.groupby(said, key=lambda i: i in texts)
    return ''.join(tokenizer.decode(list(run), skip_special_tokens=False) if real
                   else UNKNOWN * len(list(run)) for real, run in runs)

  said = json.dumps([sorted(ids.items()), prefix, suffix]).encode()
  return Vocab(
      spec, hashlib.sha256(data + said).hexdigest(), size, ids['eos'],
      lambda text: tokenizer.encode(text, add_special_tokens=False).ids, decode,
      lambda i: texts.get(i, UNKNOWN), pad_id=ids.get('pad', ids['eos']), unk_id=ids.get('unk'),
      bos_id=ids.get('bos'), mask_id=ids.get('mask'), cls_id=ids.get('cls'), sep_id=ids.get('sep'),
      sentinels=tuple(sentinels), prefix=tuple(prefix) if suffix else (),
      starts_with_bos=bool(prefix) and not suffix or (
          not suffix and config.settings.get('add_bos_token') is True and 'bos' in ids),
      chat_template=config.chat_template,
      names={**names, **{role: texts[i] for role, i in ids.items()}})


def _framing(spec, tokenizer, texts) -> tuple[list[int], list[int]]:
  """(ids that the post-processor puts before a text, after it)."""
  for probe in ('a', 'A', *texts.values()):
    if probe and tokenizer.encode(probe, add_special_tokens=False).ids:
      break
  else:
    raise DataError(f'{spec} makes no tokens of any text')
  whole = tokenizer.encode(probe)
  added = whole.special_tokens_mask
  bare = len(tokenizer.encode(probe, add_special_tokens=False).ids)
  first = next((i for i in range(len(added) - bare + 1) if not any(added[i:i + bare])), 0)
  prefix, suffix = whole.ids[:first], whole.ids[first + bare:]
  if len(suffix) > 1 or (len(prefix) > 1 and not suffix):
    raise DataError(f'{spec} puts {len(prefix)} tokens before a text and {len(suffix)} after it; '
                    'one that closes it, or one that opens it, is what a model here can have')
  return prefix, suffix


def _has_unknown(model) -> bool:
  return isinstance(model, models.Unigram) or model.unk_token is not None
