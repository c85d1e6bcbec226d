"""Whether our token ids are those of the tokenizer that a directory declares.

The directory's own tokenizer is what transformers' AutoTokenizer makes of it, from local files and
without code from elsewhere.
"""

from collections.abc import Callable
from pathlib import Path

import tokenizers

from t5lab import files
from t5lab.data import vocab
from t5lab.data.vocab import tokenizer_config
from t5lab.errors import UsageError
from t5lab.tools.interop import probe_texts, reference

MOST_SPECIAL = 32      # special tokens with texts of their own


def compare(folder: Path, vocabulary: vocab.Vocab, *, kind: str, starts: bool,
            ours: bool = False, use_reference: bool = True) -> dict:
  """Returns the certificate's entry on token ids; UsageError at the first that differ.

  folder: the Hugging Face directory. kind: of the model. starts: whether our texts start with BOS.
  ours: whether the vocabulary is one of t5lab's own; texts that Hugging Face cannot read as it does
  are left out (see hf_tokenizer.py).
  """
  if not use_reference:
    return {'compared': 0, 'reason': 'transformers was not asked (--golden)'}
  if not reference.available():
    return {'compared': 0, 'reason': 'transformers is not installed'}
  try:
    tokenizer, name = reference.open_tokenizer(folder)
  except UsageError as e:
    return {'compared': 0, 'reason': str(e)}

  texts = _texts(tokenizer, vocabulary)
  if ours:
    unlike = [*vocabulary.names.values(), '<pad>', '</s>', '<unk>', '\u2581', '<0x']
    texts = [text for text in texts if not text.startswith((' ', '<extra_id_'))
             and not any(part in text for part in unlike)]
  for text in texts:
    _check(text, vocabulary.encode(text), _theirs(tokenizer, text), name)

  # What is put around a text. Prompts of decoders have no end.
  text = 'one text'
  theirs = _theirs(tokenizer, text, framed=True)
  entry = {'compared': len(texts), 'equal': len(texts), 'with': name}
  if kind != 'decoder':
    _check(text, vocabulary.frame(text), theirs, name)
    if kind == 'encoder' and theirs is not None and vocabulary.middle is not None:
      both, bare = list(tokenizer(text, text).input_ids), _theirs(tokenizer, text)
      if both != bare + bare:           # where its files say nothing, each text has its own end
        _check(text, vocabulary.frame(text, text), both, f'{name}, as one of a pair,')
  elif theirs is not None:
    bare = _theirs(tokenizer, text)
    theirs_start = theirs[:1] != bare[:1] and theirs[0] == vocabulary.bos_id
    if theirs_start != starts:
      entry['start'] = (f'our texts {"start" if starts else "do not start"} with BOS, those of '
                        f'{name} {"do" if theirs_start else "do not"}')
  return entry


def _texts(tokenizer, vocabulary) -> list[str]:
  """The probe texts, with the special tokens of both sides, the first and last sentinels apart."""
  sentinels = [vocabulary.piece(i) for i in vocabulary.sentinels]
  added = [text for text in tokenizer.get_added_vocab() if not text.startswith('<extra_id_')]
  special = [*vocabulary.names.values(), *added[:MOST_SPECIAL], *added[-2:]]
  special += [*sentinels[:2], *sentinels[-2:], '<extra_id_0>', f'<extra_id_{len(sentinels)}>']
  return probe_texts.texts(dict.fromkeys(special))


def _theirs(tokenizer, text: str, framed: bool = False) -> list[int] | None:
  """Their ids; None where their code fails, e.g. at an empty text."""
  try:
    return list(tokenizer.encode(text, add_special_tokens=framed))
  except Exception:
    return None


def _check(text, ours, theirs, name):
  if theirs is not None and ours != theirs:
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b),
                 min(len(ours), len(theirs)))
    show = lambda ids: f'{ids[max(0, first - 2):first + 6]}'
    raise UsageError(
        f'not written: {text[:60]!r} has other token ids than with {name}: from id '
        f'{max(0, first - 2)} on {show(ours)} here, {show(theirs)} there')


def rebuilt(spec: str, vocabulary: vocab.Vocab, log: Callable[[str], None]) -> str:
  """Says where a class reads texts differently from the tokenizer.json that it is built from."""
  if not spec.endswith('tokenizer.json'):
    return ''
  path = Path(spec)
  settings = path.with_name('tokenizer_config.json')
  name = (files.read_json(settings, tokenizer_config.BYTES).get('tokenizer_class')
          if settings.is_file() else '') or 'its class'
  alone = tokenizers.Tokenizer.from_str(path.read_text('utf-8'))
  alone.no_truncation()
  alone.no_padding()
  texts = probe_texts.texts()
  differ = [text for text in texts
            if alone.encode(text, add_special_tokens=False).ids != vocabulary.encode(text)]
  if not differ:
    return ''
  line = (f'tokenizer.json alone gives {len(differ)} of {len(texts)} texts other ids, e.g. '
          f'{differ[0][:40]!r}: {name} rebuilds it, as in transformers 5')
  log(line)
  return line
