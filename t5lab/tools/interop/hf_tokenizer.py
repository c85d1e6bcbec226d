"""Our embedded sentencepiece vocabularies as a tokenizer.json with the same ids in transformers.

Given the .model file, transformers would normalise spaces and lose line breaks and bytes. One
difference remains: a leading space of a text is dropped.
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from t5lab.data import vocab

SPACE = '\u2581'


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
      single=f'$A {names["eos"]}', special_tokens=[(names['eos'], vocabulary.eos_id)])
  tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in names.values()])
  # Ids grow in the order of adding, and the highest sentinel is <extra_id_0>.
  tokenizer.add_special_tokens([AddedToken(f'<extra_id_{i}>', normalized=False)
                                for i in reversed(range(vocabulary.num_sentinels))])
  tokenizer.save(str(Path(folder) / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
            **{f'{name}_token': piece for name, piece in names.items()}}
  (Path(folder) / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
