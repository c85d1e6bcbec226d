"""Vocabularies of the `tokenizers` library.

The files beside the tokenizer name the special tokens; if they name none (openai's gpt2), the
conventional names are used. The tokenizer's own post-processor decides how texts are framed.
"""
import hashlib
import itertools
import json

from tokenizers import models

from t5lab.data.vocab import declared, tokenizer_config
from t5lab.data.vocab.base import UNKNOWN, Vocab, numbered_sentinels, special_fields
from t5lab.errors import DataError

CONVENTIONAL = {'bos': ('<s>', '<|begin_of_text|>', '<|endoftext|>'),
                'eos': ('</s>', '<|end_of_text|>', '<|endoftext|>', '[SEP]'),
                'pad': ('<pad>', '[PAD]'), 'unk': ('<unk>', '[UNK]'), 'cls': ('[CLS]',),
                'sep': ('[SEP]',), 'mask': ('<mask>', '[MASK]')}


def vocabulary(spec: str, built: declared.Built, config: tokenizer_config.Config) -> Vocab:
  """The Vocab of a tokenizer; DataError for one that fails on a text, or that has no end."""
  tokenizer = built.tokenizer
  config_names = {**config.names, **{role: text for role, text in built.names.items()
                                     if role in tokenizer_config.ROLES}}
  tokenizer.no_truncation()       # some files truncate every text to 128 tokens
  tokenizer.no_padding()
  known = tokenizer.get_vocab(with_added_tokens=True)
  if not known:
    raise DataError(f'{spec} has no tokens')
  texts = {i: text for text, i in known.items()}

  # Special ids by role; the post-processor has the last word on how a text ends or starts.
  names = config_names or {role: next((text for text in options if text in known), None)
                           for role, options in CONVENTIONAL.items()}
  ids = {role: known[text] for role, text in names.items() if text in known}
  prefix, suffix, middle, second_type = _framing(spec, tokenizer, texts)
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
  framing += built.target_language.encode()
  framing += json.dumps(middle).encode() if middle != [] else b''
  framing += b'' if second_type else b'types 0'
  return Vocab(
      spec, hashlib.sha256(built.data + framing).hexdigest(), size=max(texts) + 1,
      encoder=lambda text: _encode(spec, tokenizer, text).ids, decoder=decode,
      piece=lambda i: texts.get(i, UNKNOWN), sentinels=tuple(sentinels),
      prefix=tuple(prefix) if suffix else (), suffix=tuple(suffix[1:]),
      middle=None if middle is None else tuple(middle), second_type=second_type,
      languages=built.languages, language_starts=built.language_starts,
      target_language=built.languages.get(built.target_language),
      starts_with_bos=not suffix and (bool(prefix) or add_bos), ends_with_eos=bool(suffix),
      chat_template=config.chat_template,
      names={**names, **{role: texts[i] for role, i in ids.items()}},
      special={texts[i]: i for i in {*added, *ids.values()} if i in texts}, **special_fields(ids))


def _encode(spec, tokenizer, text, second=None, framed=False):
  try:
    return tokenizer.encode(text, second, add_special_tokens=framed)
  except BaseException as e:         # a panic of the library is a BaseException
    declared.reraise_unless_library(e)
    raise DataError(f'{spec} cannot encode {text[:40]!r}: {" ".join(str(e).split())[:200]}') from e


def _framing(spec, tokenizer, texts) -> tuple[list[int], list[int], list[int] | None, bool]:
  """(prefix, suffix, middle, second_type) of a Vocab, from what the post-processor adds."""
  for probe in ('a', 'A', *texts.values()):
    bare = _encode(spec, tokenizer, probe).ids if probe else []
    if bare:
      break
  else:
    raise DataError(f'{spec} encodes every text as an empty list')
  whole = _encode(spec, tokenizer, probe, framed=True)
  added = whole.special_tokens_mask
  starts = range(len(added) - len(bare) + 1)
  first = next((i for i in starts if not any(added[i:i + len(bare)])), 0)
  prefix, suffix = whole.ids[:first], whole.ids[first + len(bare):]
  if unknown := [i for i in (*prefix, *suffix) if i not in texts]:
    raise DataError(f'{spec} puts id {unknown[0]} around texts, which none of its {len(texts):,} '
                    'tokens has')
  if len(suffix) > 2 or (len(prefix) > 1 and not suffix):
    raise DataError(f'{spec} puts {len(prefix)} tokens before a text and {len(suffix)} after it; '
                    'supported: one or two after it, or one before it and none after it')
  pair = _encode(spec, tokenizer, probe, probe, framed=True)
  if not suffix or pair.ids == [*bare, *bare]:      # a tokenizer that says nothing about pairs
    return prefix, suffix, [], True
  start, end = [*prefix, *bare, suffix[0]], [*bare, *suffix]
  middle = pair.ids[len(start):len(pair.ids) - len(end)]
  is_framed = [*start, *middle, *end] == pair.ids
  return prefix, suffix, middle if is_framed else None, any(pair.type_ids)
