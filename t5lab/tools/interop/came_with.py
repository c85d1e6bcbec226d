"""The files beside the weights of a Hugging Face directory: the vocabulary and its settings.

They are copied along with weights and config.json, from their directory to ours and back.
"""

import json
from pathlib import Path
import shutil

from t5lab import files
from t5lab.data import vocab
from t5lab.data.vocab import tokenizer_config
from t5lab.tools.interop import hf_tokenizer, probe_texts, screen, sentence, tensor_files

# The vocabulary is read from the first of these that exists.
VOCABULARIES = ('tokenizer.json', 'spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model',
                'vocab.txt', 'vocab.json', 'characters.json')
PAIRS = ('source.spm', 'target.spm', 'target_vocab.json')      # beside Marian's vocab.json
COPIED = (*VOCABULARIES, 'tokenizer_config.json', 'special_tokens_map.json',
          'added_tokens.json', 'chat_template.jinja', 'chat_template.json', 'merges.txt',
          sentence.CONFIG, *PAIRS)


def files_of(folder: Path) -> tuple[Path, ...]:
  """The files of a folder that are copied, those in its folder of chat templates too."""
  return (*(folder / name for name in COPIED if (folder / name).is_file()),
          *tokenizer_config.template_files(folder))


def check_link(folder: Path, file: Path) -> None:
  """UsageError if a file, or its folder inside `folder`, is a link that leads elsewhere."""
  if file.parent != folder:
    tensor_files.resolve_inside(folder, file.parent.name)
  tensor_files.resolve_inside(file.parent, file.name)


def copy(file: Path, folder: Path) -> None:
  """Copies one of them into `folder`, unless it is there; a chat template into a folder inside."""
  if file.parent.name == tokenizer_config.TEMPLATES:
    folder = folder / tokenizer_config.TEMPLATES
    folder.mkdir(exist_ok=True)
  if not (folder / file.name).exists():
    shutil.copyfile(file, folder / file.name)


def vocabulary_spec(folder: Path, copied) -> str:
  """Returns the spec of the vocabulary among the copied files, or ''."""
  for name in VOCABULARIES:
    if folder / name in copied:
      if name == 'tokenizer.json':
        screen.check(folder / name, probe_texts.texts() + probe_texts.BOMBS)
      return str(folder / name)
  return hf_tokenizer.byte_spec(folder)


def write(folder: Path, copied: tuple[Path, ...], spec: str, has_encoder: bool) -> None:
  """Copies the tokenizer's files, or writes files that mean the same to transformers."""
  for file in copied:
    copy(file, folder)
  if not spec or {file.name for file in copied}.intersection(VOCABULARIES):
    return
  if spec.startswith(('byte', 'byt5')):
    settings = json.dumps(hf_tokenizer.byte_config(spec), indent=1)
    files.write_text(folder / hf_tokenizer.CONFIG, settings + '\n')
  elif spec in vocab.embedded():
    hf_tokenizer.write(folder, spec)
  else:
    exported = Path(vocab.export(spec, folder))
    if exported.suffix == '.model':            # the names that transformers looks for
      exported.rename(folder / ('spiece.model' if has_encoder else 'tokenizer.model'))
