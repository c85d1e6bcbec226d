r"""Text to ids and back. `load(spec)` opens every kind of vocabulary; all have one interface.

  load('byte')            3 + UTF-8 byte and 100 sentinels, no file; 'byte:125' has 125 (ByT5's 384)
  load('byt5:125')        the same ids, with the sentinels of Hugging Face: <extra_id_0> comes first
  load('t5lab_2048')      sentencepiece, embedded; 2048 ids in total
  load('…/spiece.model')  any sentencepiece model; T5's gets 100 sentinels after its pieces
  load('…/tokenizer.json')   of the tokenizers library, as Hugging Face stores it
  load('…/vocab.txt')     BERT's WordPiece
  load('…/vocab.json')    byte-level BPE, with the merges.txt beside it (GPT-2, RoBERTa)
  load('…/model.gguf')    the tokenizer inside (byte-level BPE or LLaMA's sentencepiece)
  load('…/characters.json')  one id per character, from two tables

The embedded ones have pad 0, end of sequence 1, unknown 2, then bytes and pieces, and last the
sentinels: size-1 is <extra_id_0>, size-2 is <extra_id_1>, … [Raffel et al. 2020, 3.1.4] They are
lossless: decode(encode(text)) == text for any Unicode text. Files keep the ids of their own model.

In a Hugging Face directory, whose tokenizer_config.json or config.json declares a tokenizer class,
files are read by the rules of that class, with the added tokens listed there (declared.py).
"""
import functools
from importlib import resources
import itertools
import pathlib
import re

from t5lab import files
from t5lab.data.vocab import declared, gguf, hf_tokenizers, pieces, tables, tokenizer_config
from t5lab.data.vocab.base import Vocab
from t5lab.data.vocab.tables import NUM_SENTINELS, sentencepiece_model
from t5lab.errors import DataError, UsageError, did_you_mean

__all__ = ['NUM_SENTINELS', 'Vocab', 'check_embedding_size', 'embedded', 'export', 'load',
           'padded_size', 'sentencepiece_model', 'source_files']

DEFAULT = 't5lab_2048'
# Ends of a path.
KINDS = ('.model', 'tokenizer.json', 'vocab.txt', 'vocab.json', '.gguf', 'characters.json')
BYTES = re.compile(r'(byte|byt5):(\d{1,6})')
MOST_SENTINELS = 100_000
MODEL_BYTES = 256 << 20       # limit; the largest tokenizer.json of 2025's models has about 35 MB
SIBLING_BYTES = 16 << 20


def embedded_model(spec: str) -> bytes:
  """The sentencepiece model file of an embedded vocabulary other than 'byte'."""
  return resources.files('t5lab.data').joinpath('files', f'{spec}.model').read_bytes()


def embedded() -> list[str]:
  """The specs of the vocabularies in the package, 'byte' first."""
  folder = resources.files('t5lab.data').joinpath('files')
  models = [f.name.removesuffix('.model') for f in folder.iterdir() if f.name.endswith('.model')]
  return ['byte'] + sorted(models, key=lambda name: (len(name), name))


@functools.cache
def load(spec: str = DEFAULT) -> Vocab:
  """Loads the vocabulary of a spec: 'byte', 'byte:N', 'byt5:N', an embedded name, or a path.

  Errors: UsageError for an unknown name or kind of file, or a tokenizer class that is not
  implemented; DataError for a file that cannot be read as the kind that its name ends in.
  """
  if spec == 'byte':
    return tables.byte()
  if match := BYTES.fullmatch(spec):
    if int(match[2]) > MOST_SENTINELS:
      raise UsageError(f'vocabulary {spec!r}: at most {MOST_SENTINELS:,} sentinels')
    make = tables.byte if match[1] == 'byte' else tables.byt5
    return make(spec, int(match[2]))
  if spec in embedded():
    return sentencepiece_model(spec, embedded_model(spec))

  path = _path(spec)
  try:
    (name, data), *siblings = _contents(spec).items()
  except OSError as e:
    raise DataError(f'cannot read vocabulary {spec!r}: {e.strerror}. '
                    f'Embedded: {", ".join(embedded())}.') from e
  config = tokenizer_config.config(dict(siblings), path.parent)
  if name.endswith('characters.json'):
    return tables.characters(spec, data)
  contents = dict(siblings)
  class_name = declared.class_of(contents, config.settings)
  if class_name in pieces.CLASSES and not name.endswith('tokenizer.json'):
    return pieces.load(spec, class_name, {name: data, **contents}, config.settings)
  built = declared.build(spec, name, data, contents, config.settings)
  if built is None:
    return sentencepiece_model(spec, data, config)
  return hf_tokenizers.vocabulary(spec, built, config)


def _path(spec: str) -> pathlib.Path:
  if not spec.endswith(KINDS):
    raise UsageError(f'no vocabulary {spec!r}.{did_you_mean(spec, embedded())} '
                     f'Or give a path that ends in {", ".join(KINDS)}.')
  return pathlib.Path(spec)


def _contents(spec: str) -> dict[str, bytes]:
  """{name: contents} of a vocabulary's files; a .gguf file becomes files of another kind."""
  if spec.endswith('.gguf'):
    return gguf.tokenizer_files(gguf.metadata(_path(spec)), spec)
  limits = itertools.chain([MODEL_BYTES], itertools.repeat(SIBLING_BYTES))
  paths = source_files(spec)
  return {str(path.relative_to(paths[0].parent)): files.read_bytes(path, limit, DataError)
          for path, limit in zip(paths, limits)}


def source_files(spec: str) -> list[pathlib.Path]:
  """The files of a vocabulary, its model first; none for 'byte' and embedded ones."""
  if spec in embedded() or BYTES.fullmatch(spec):
    return []
  path = _path(spec)
  if spec.endswith(('.gguf', 'characters.json')):
    return [path]
  names = [*tokenizer_config.SIBLINGS, declared.ADDED]
  if spec.endswith('vocab.json'):
    names += [declared.MERGES, pieces.SOURCE, pieces.TARGET, pieces.TARGET_VOCAB]
  elif spec.endswith(pieces.MODEL):
    names.append('vocab.json')
  beside = [path.parent / name for name in names]
  if declared.is_model_config(path.parent / declared.MODEL):
    beside.append(path.parent / declared.MODEL)
  beside += tokenizer_config.template_files(path.parent)
  return [path, *(file for file in beside if file.is_file())]


def export(spec: str, folder) -> str:
  """Copies a vocabulary's files into `folder` -> the spec that loads it from there.

  The tokenizer of a .gguf file is written as ordinary files, without the model. 'byte' and embedded
  vocabularies have no files and keep their spec.
  """
  contents = _contents(spec)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  here = [path.resolve() for path in source_files(spec)]
  for name, data in contents.items():
    if (folder / name).resolve() not in here:
      (folder / name).parent.mkdir(exist_ok=True)
      (folder / name).write_bytes(data)
  return str(folder / next(iter(contents))) if contents else spec


def padded_size(vocab: Vocab, multiple: int = 128) -> int:
  """The rows of an embedding, which mesh axes divide: 32,100 -> 32,128 (T5)."""
  return -(-vocab.size // multiple) * multiple


def check_embedding_size(vocab: Vocab, size: int, what: str) -> None:
  """UsageError unless an embedding of `size` rows has one for every id. what: whose it is."""
  if size >= vocab.size:
    return
  own = vocab.size - vocab.num_sentinels
  raise UsageError(
      f'vocabulary {vocab.spec!r}: {own:,} ids + {vocab.num_sentinels:,} sentinels = '
      f'{vocab.size:,}; the embedding of {what} has {size:,} rows and needs at least '
      f'{vocab.size:,} (padded to a multiple of 128: {padded_size(vocab):,})')
