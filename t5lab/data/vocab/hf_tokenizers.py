"""Vocabularies of the `tokenizers` library: tokenizer.json, and BERT's vocab.txt.

The files beside the tokenizer name the special tokens; if they name none (openai's gpt2), the
conventional names are used. The tokenizer's own post-processor decides how texts are framed.
"""
import hashlib
import itertools
import json

import tokenizers
from tokenizers import models

from t5lab.data.vocab import tokenizer_config
from t5lab.data.vocab.base import UNKNOWN, Vocab, numbered_sentinels, special_fields
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
  """BERT's WordPiece, which lower-cases unless do_lower_case is false. [Devlin et al. 2019]"""
  try:
    # str.splitlines would also split at U+2028 and the like, which are tokens of some vocabularies.
    lines = data.decode('utf-8').removesuffix('\n').split('\n')
  except UnicodeDecodeError as e:
    raise DataError(f'{spec} is not UTF-8 text: byte {e.start}') from e
  ids = {line.rstrip('\r'): i for i, line in enumerate(lines)}
  names = {role: config.names.get(role, CONVENTIONAL[role][-1])
           for role in ('pad', 'unk', 'cls', 'sep', 'mask')}
  missing = [names[role] for role in ('unk', 'cls', 'sep') if names[role] not in ids]
  if missing:
    raise DataError(f'{spec} has no {", ".join(missing)} among its {len(lines):,} lines: it is not '
                    'a WordPiece vocabulary of BERT')

  settings = config.settings
  tokenizer = tokenizers.BertWordPieceTokenizer(
      ids, **{f'{role}_token': text for role, text in names.items()},
      handle_chinese_chars=settings.get('tokenize_chinese_chars') is not False,
      strip_accents=settings.get('strip_accents'),
      lowercase=settings.get('do_lower_case') is not False)
  rules = json.dumps([settings.get(key) for key in ('do_lower_case', 'strip_accents',
                                                    'tokenize_chinese_chars')])
  config = tokenizer_config.Config(settings, {**names, **config.names}, config.chat_template)
  return _vocab(spec, tokenizer, data + rules.encode(), config)


def _vocab(spec, tokenizer, data, config) -> Vocab:
  """Builds the Vocab. data: the bytes that, with the special ids, make its sha256."""
  tokenizer.no_truncation()       # some files truncate every text to 128 tokens
  tokenizer.no_padding()
  known = tokenizer.get_vocab(with_added_tokens=True)
  if not known:
    raise DataError(f'{spec} has no tokens')
  texts = {i: text for text, i in known.items()}

  # Special ids by role; the post-processor has the last word on how a text ends or starts.
  names = config.names or {role: next((text for text in options if text in known), None)
                           for role, options in CONVENTIONAL.items()}
  ids = {role: known[text] for role, text in names.items() if text in known}
  prefix, suffix = _framing(spec, tokenizer, texts)
  if suffix:
    ids['eos'] = suffix[0]
  elif prefix:
    ids['bos'] = prefix[0]
  if 'eos' not in ids:            # e.g. GPT-2's files that name the padding alone
    ids.update([('eos', known[text]) for text in CONVENTIONAL['eos'] if text in known][:1])
  if 'eos' not in ids:
    raise DataError(f'{spec} does not say which token ends a text: give eos_token in a '
                    'tokenizer_config.json beside it')
  add_bos = config.settings.get('add_bos_token') is True and 'bos' in ids

  # Special ids are not printed, except for sentinels and a model's own unknown token.
  sentinels = numbered_sentinels(known)
  added = tokenizer.get_added_tokens_decoder()
  special = {i for i, token in added.items() if token.special}
  silent = (special | set(ids.values())) - set(sentinels)
  unknown = None                  # byte-level models use the role for some other special token
  model = tokenizer.model
  has_unknown = isinstance(model, models.Unigram) or model.unk_token is not None
  if has_unknown and list(ids.values()).count(ids.get('unk')) == 1:
    unknown = ids['unk']
    silent.discard(unknown)

  def decode(ids):
    printed = [i for i in ids if i not in silent]
    if unknown is not None:       # in one call: decoders join the words on both sides of it
      known_ids = [i if i in texts else unknown for i in printed]
      text = tokenizer.decode(known_ids, skip_special_tokens=False)
      return text.replace(texts[unknown], UNKNOWN)
    runs = itertools.groupby(printed, key=lambda i: i in texts)
    return ''.join(tokenizer.decode(list(run), skip_special_tokens=False) if valid
                   else UNKNOWN * len(list(run)) for valid, run in runs)

  framing = json.dumps([sorted(ids.items()), prefix, suffix]).encode()
  return Vocab(
      spec, hashlib.sha256(data + framing).hexdigest(), size=max(texts) + 1,
      encoder=lambda text: tokenizer.encode(text, add_special_tokens=False).ids, decoder=decode,
      piece=lambda i: texts.get(i, UNKNOWN), sentinels=tuple(sentinels),
      prefix=tuple(prefix) if suffix else (),
      starts_with_bos=not suffix and (bool(prefix) or add_bos),
      chat_template=config.chat_template,
      names={**names, **{role: texts[i] for role, i in ids.items()}},
      special={texts[i]: i for i in {*added, *ids.values()} if i in texts}, **special_fields(ids))


def _framing(spec, tokenizer, texts) -> tuple[list[int], list[int]]:
  """(ids that the post-processor adds before a text, ids that it adds after it)."""
  for probe in ('a', 'A', *texts.values()):
    bare = tokenizer.encode(probe, add_special_tokens=False).ids if probe else []
    if bare:
      break
  else:
    raise DataError(f'{spec} encodes every text as an empty list')
  whole = tokenizer.encode(probe)
  added = whole.special_tokens_mask
  starts = range(len(added) - len(bare) + 1)
  first = next((i for i in starts if not any(added[i:i + len(bare)])), 0)
  prefix, suffix = whole.ids[:first], whole.ids[first + len(bare):]
  if len(suffix) > 1 or (len(prefix) > 1 and not suffix):
    raise DataError(f'{spec} puts {len(prefix)} tokens before a text and {len(suffix)} after it; '
                    'supported: one after it, or one before it and none after it')
  return prefix, suffix
