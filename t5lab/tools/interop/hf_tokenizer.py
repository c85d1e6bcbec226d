"""Our embedded sentencepiece vocabularies as a tokenizer.json: the same ids in transformers.

Handed the .model file, transformers would normalise spaces and lose line breaks and bytes. One
difference stays: a space that a text begins with is not kept.
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from t5lab.data import vocab

SPACE = '\u2581'


def write(folder, spec: str) -> None:
  """tokenizer.json and tokenizer_config.json of an embedded vocabulary other than 'byte'."""
  words, proto = vocab.load(spec), sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(vocab.embedded_model(spec))
  pieces = [(p.piece, p.score) for p in proto.pieces]
  names = {name: pieces[i][0] for name, i in (
      ('pad', words.pad_id), ('eos', words.eos_id), ('unk', words.unk_id))}
  made = Tokenizer(models.Unigram(pieces, unk_id=words.unk_id, byte_fallback=True))
  made.pre_tokenizer = pre_tokenizers.Metaspace(
      replacement=SPACE, prepend_scheme='first', split=False)
  made.decoder = decoders.Sequence([
      decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  made.post_processor = processors.TemplateProcessing(
      single=f'$A {names["eos"]}', special_tokens=[(names['eos'], words.eos_id)])
  made.add_special_tokens([AddedToken(piece, normalized=False) for piece in names.values()])
  # ids grow with the order of adding: the highest sentinel is <extra_id_0>
  made.add_special_tokens([AddedToken(f'<extra_id_{i}>', normalized=False)
                           for i in reversed(range(words.num_sentinels))])
  made.save(str(Path(folder) / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
            **{f'{name}_token': piece for name, piece in names.items()}}
  (Path(folder) / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
