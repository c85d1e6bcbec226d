"""Tokenizer files that give Hugging Face the ids of t5lab's own vocabularies.

Given an embedded .model file, transformers would normalise spaces and lose line breaks and bytes,
so it is written as a tokenizer.json. These differences remain: <pad>, </s> and <unk> in a text are
special tokens there and plain text here; a leading space is dropped; a text that begins with a
sentinel has no space before it; U+2581 is a space, and '<0x0A>' a byte.
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from t5lab import files
from t5lab.data import vocab
from t5lab.data.vocab import classes, tokenizer_config
from t5lab.errors import UsageError

SPACE = '\u2581'
CONFIG = 'tokenizer_config.json'


def byte_spec(folder: Path) -> str:
  """The spec of a directory whose tokenizer has no file, which is ByT5's; '' for others.

  UsageError for added tokens other than sentinels.
  """
  path = folder / CONFIG
  settings = files.read_json(path, tokenizer_config.BYTES) if path.is_file() else {}
  name = classes.name_of(settings, files.read_json(folder / 'config.json'))
  if name != 'ByT5Tokenizer':
    return ''

  # Sentinels are listed with their ids, or counted: then they follow the bytes in order.
  listed = settings.get('added_tokens_decoder') or {}
  if not isinstance(listed, dict):
    raise UsageError(f'{path}: added_tokens_decoder must be an object')
  text = lambda token: str(token.get('content') if isinstance(token, dict) else token)
  added = {text(token): int(i) for i, token in listed.items() if i.isdecimal() and int(i) > 258}
  count = len(added) or settings.get('extra_ids', 125)
  if type(count) is not int or not 0 <= count <= vocab.MOST_SENTINELS:
    raise UsageError(f'{path}: extra_ids must be 0 to {vocab.MOST_SENTINELS:,}, got {count!r}')
  if not added:
    return f'byt5:{count}'
  for spec in (f'byt5:{count}', f'byte:{count}'):
    if added == {f'<extra_id_{n}>': i for n, i in enumerate(vocab.load(spec).sentinels)}:
      return spec
  raise UsageError(f'{path} adds tokens to ByT5Tokenizer: t5lab reads only <extra_id_0> to '
                   f'<extra_id_{count - 1}> with ids in order, got {str(added)[:80]}')


def byte_config(spec: str) -> dict:
  """tokenizer_config.json of a byte vocabulary, with the ids of its sentinels."""
  vocabulary = vocab.load(spec)
  token = lambda text, strip=False: dict(
      content=text, lstrip=strip, rstrip=strip, normalized=strip, single_word=False, special=True)
  added = {str(i): token(text, True) for i, text in enumerate(('<pad>', '</s>', '<unk>'))}
  added |= {str(i): token(f'<extra_id_{n}>') for n, i in enumerate(vocabulary.sentinels)}
  return {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': vocabulary.num_sentinels,
          'additional_special_tokens': [f'<extra_id_{n}>' for n in range(vocabulary.num_sentinels)],
          'added_tokens_decoder': added}


def write(folder, spec: str) -> None:
  """Writes tokenizer.json and tokenizer_config.json of an embedded vocabulary, not 'byte'."""
  vocabulary = vocab.load(spec)
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(vocab.embedded_model(spec))
  pieces = [(p.piece, p.score) for p in proto.pieces]
  names = {name: pieces[i][0] for name, i in (
      ('pad', vocabulary.pad_id), ('eos', vocabulary.eos_id), ('unk', vocabulary.unk_id))}
  tokenizer = Tokenizer(models.Unigram(pieces, unk_id=vocabulary.unk_id, byte_fallback=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
      replacement=SPACE, prepend_scheme='first', split=False)
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  tokenizer.post_processor = processors.TemplateProcessing(
      single=f'$A {names["eos"]}', pair=f'$A {names["eos"]} $B {names["eos"]}',
      special_tokens=[(names['eos'], vocabulary.eos_id)])
  tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in names.values()])
  # Ids grow in the order of adding, and the highest sentinel is <extra_id_0>.
  tokenizer.add_special_tokens([AddedToken(f'<extra_id_{i}>', normalized=False)
                                for i in reversed(range(vocabulary.num_sentinels))])
  tokenizer.save(str(Path(folder) / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
            **{f'{name}_token': piece for name, piece in names.items()}}
  (Path(folder) / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
