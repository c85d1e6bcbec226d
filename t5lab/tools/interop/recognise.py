"""What a foreign directory holds: names without wrappers, the model type, tied and resized tables.

Libraries that wrap a model (DistributedDataParallel, torch.compile, FSDP, PEFT, Lightning) prefix
the names of its tensors, and configs are edited by hand. What follows from the tensors is taken
from the tensors and reported in `notes`; what does not is a UsageError.
"""

from collections.abc import Mapping
import re

import numpy as np

from t5lab.errors import UsageError
from t5lab.tools.interop import hf
from t5lab.tools.interop.formats import bert, t5
from t5lab.tools.interop.tensor_map import RenamedReader, TensorReader
from t5lab.tools.interop.untrusted import show

# Wrappers of a whole model come first, those of a module anywhere. A leading `model.` is also the
# name that LLaMA and BART give to the model below their head: Format.canonical puts it back.
LEADING = re.compile(r'^((?:(?:module|model|base_model|pretrained_model|auto_model|0)\.)+)')
INNER = re.compile(r'(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module'
                   r'|_forward_module|base_layer)\.')
# Tensors that may stay unread: fairseq's format numbers and its placeholder for sinusoids; the
# bias of BERT's head, if its softmax matrix is untied and has a bias of its own.
IGNORE = (r'(model\.)?(encoder|decoder)\.version',
          r'(model\.)?(encoder|decoder)\.embed_positions\._float_tensor',
          r'(cls\.predictions|lm_head)\.bias')


def unwrapped(name: str) -> str:
  """Returns a tensor's name without the prefixes of wrappers.

  Example: `module.base_model.model.encoder._orig_mod.norm.weight` is `encoder.norm.weight`.
  """
  return LEADING.sub('', INNER.sub('', name))


def unwrap(reader: TensorReader) -> RenamedReader:
  """Returns the reader with unwrapped names; two tensors that get one name must be equal."""
  return RenamedReader(reader, unwrapped)


def prefix_notes(reader: RenamedReader) -> list[str]:
  """Returns a note on the prefixes that `unwrap` removed, if they are not transformers' own."""
  found = set()
  for name in reader.shapes():
    stored = reader.source_name(name)
    found.update(INNER.findall(stored))
    found.update(LEADING.findall(INNER.sub('', stored)))
  found.discard('model.')
  return [f'wrappers before the names of tensors: {", ".join(sorted(found))}'] if found else []


# -- the model type -----------------------------------------------------------------------------

# The ends of the names of transformers' classes, and {the beginning: model_type}.
ENDS = (r'(?:(?:PreTrained|Encoder|LMHead|WithLMHead|DoubleHeads|MT|Text)?Model|'
        r'For(?:ConditionalGeneration|CausalLM|MaskedLM|PreTraining|NextSentencePrediction|'
        r'SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice))')
CLASSES = {start: kind for kind, start in {**t5.NAMES, **bert.CLASSES}.items()} | {
    re.sub(f'{ENDS}$', '', format_.class_name(None, kind)): kind
    for kind, format_ in hf.FORMATS.items() if kind not in (*t5.NAMES, *bert.CLASSES)}

# Keys of LLaMA's configs. With any other, tensors of the same names may compute something else.
LLAMA_KEYS = frozenset((
    'architectures', 'attention_bias', 'attention_dropout', 'bos_token_id', 'dtype', 'eos_token_id',
    'head_dim', 'hidden_act', 'hidden_size', 'initializer_range', 'intermediate_size',
    'max_position_embeddings', 'mlp_bias', 'num_attention_heads', 'num_hidden_layers',
    'num_key_value_heads', 'pad_token_id', 'pretraining_tp', 'quantization_config', 'rms_norm_eps',
    'rope_parameters', 'rope_scaling', 'rope_theta', 'tie_word_embeddings', 'torch_dtype',
    'transformers_version', 'use_cache', 'vocab_size', '_name_or_path'))

ANY = lambda config: True
# (model_type, regexes of names, each of which some tensor must have, and what the config must be
# like, since other families have these names as well); the first that fits.
SIGNATURES = (
    ('switch_transformers', (r'encoder\.block\.\d+\.layer\.1\.mlp\.router\.classifier\.weight',),
     ANY),
    ('longt5', (r'encoder\.block\.0\.layer\.0\.(Local|TransientGlobal)SelfAttention\.q\.weight',),
     ANY),
    ('umt5', (r'encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight',),
     ANY),
    ('t5', (r'encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight',),
     ANY),
    ('gpt2', (r'(transformer\.)?wpe\.weight', r'(transformer\.)?h\.0\.attn\.c_attn\.weight',
              r'(transformer\.)?ln_f\.weight'), ANY),
    # Not mBART, Pegasus or Marian, which have no norm on the embeddings or one at the end.
    ('bart', (r'decoder\.layers\.0\.encoder_attn\.q_proj\.weight',
              r'decoder\.layernorm_embedding\.weight'),
     lambda config: not config.get('normalize_before') and not config.get('add_final_layer_norm')),
    # Not Mistral, Qwen, Gemma or Granite.
    ('llama', (r'layers\.0\.mlp\.gate_proj\.weight', r'layers\.0\.self_attn\.q_proj\.weight'),
     lambda config: config.get('hidden_act') == 'silu' and config.keys() <= LLAMA_KEYS),
    # Not RoBERTa, which pads with 1 and has one token type.
    ('bert', (r'(bert\.)?encoder\.layer\.0\.attention\.self\.query\.weight',
              r'(bert\.)?embeddings\.token_type_embeddings\.weight'),
     lambda config: config.get('pad_token_id') == 0 and config.get('type_vocab_size') == 2),
)
# The families that have these names.
AMBIGUOUS = {
    r'decoder\.layers\.0\.encoder_attn\.q_proj\.weight':
        'bart, mbart, pegasus, marian, m2m_100, blenderbot',
    r'layers\.0\.mlp\.gate_proj\.weight': 'llama, mistral, qwen2, gemma',
    r'(transformer\.)?h\.0\.attn\.c_attn\.weight': 'gpt2, openai-gpt, gpt_bigcode',
    r'encoder\.layer\.0\.attention\.self\.query\.weight': 'bert, roberta, electra',
}


def with_model_type(config: Mapping, shapes: Mapping, known) -> tuple[dict, list[str]]:
  """Returns config.json with a model_type, and notes on what it was taken from.

  known: the supported types. A missing type is inferred from `architectures`, or else from the
  names of the tensors. UsageError if several families share these names, or if the class is code
  that comes with the checkpoint.
  """
  architectures = config.get('architectures') or []
  if not isinstance(architectures, list):
    raise UsageError(f'config.json: architectures must be a list, got {show(architectures)}')
  name = str(architectures[0]) if architectures else ''

  kind = config.get('model_type')
  if kind is None:
    kind, why = _type_of_class(name), f'architectures names {name}'
    if kind is None:
      kind, why = _type_of_tensors(config, shapes, known), 'its tensors have the names of one'
    return {**config, 'model_type': kind}, [f'config.json has no model_type: read as {kind}, '
                                            f'because {why}']
  if not name or kind not in CLASSES.values() or _type_of_class(name) == kind:
    return dict(config), []
  code = config.get('auto_map')
  if isinstance(code, Mapping) and any(str(key).startswith('AutoModel') for key in code):
    raise UsageError(f'config.json: the class {show(name)} is code of this checkpoint (auto_map), '
                     f'which is never run; supported are the classes that transformers has for '
                     f'{kind} models')
  return dict(config), [f'architectures names {show(name)}, which is not a class of {kind} models: '
                        'read by model_type, as transformers does']


def _type_of_class(name: str) -> str | None:
  """Returns the model_type of a class of transformers, also of its TensorFlow and Flax forms."""
  for start, kind in CLASSES.items():
    if re.fullmatch(f'(?:TF|Flax)?{start}{ENDS}', name, re.IGNORECASE):   # LLaMAForCausalLM
      return kind
  return None


def _type_of_tensors(config: Mapping, shapes: Mapping, known) -> str:
  has = lambda pattern: any(re.fullmatch(pattern, name) for name in shapes)
  for kind, patterns, is_like in SIGNATURES:
    if kind in known and all(map(has, patterns)) and is_like(config):
      return kind
  families = next((names for pattern, names in AMBIGUOUS.items() if has(pattern)), '')
  which = f'which {families} models share' if families else 'which no supported model has'
  raise UsageError(
      'config.json has neither a model_type nor a known class in architectures, and its tensors '
      f'have names {which} (e.g. {", ".join(list(shapes)[:2])}); add "model_type": one of '
      f'{", ".join(sorted(known))}')


# -- tables of the vocabulary -------------------------------------------------------------------

# Types whose embeddings and softmax matrix are one table here, and the names of its copies.
ONE_TABLE = ('bart', 'mbart', 'pegasus', 'm2m_100', 'blenderbot')
COPIES = ('shared.weight', 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight',
          'lm_head.weight')
EMBEDDINGS = ('shared.weight', 'wte.weight', 'embed_tokens.weight', 'word_embeddings.weight')
HEADS = ('lm_head.weight', 'cls.predictions.decoder.weight', 'lm_head.decoder.weight',
         'vocab_projector.weight')
# {model_type: (tie_word_embeddings where config.json has none, embedding, softmax matrix, the start
# of the names of a head that the model may lack)} of those whose matrix may be one of its own.
TABLES = {'gpt2': (True, 'transformer.wte.weight', 'lm_head.weight', '')} | {
    kind: (kind.startswith('gemma'), 'model.embed_tokens.weight', 'lm_head.weight', '')
    for kind in ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text')} | {
    kind: (True, f'{name}.embeddings.word_embeddings.weight', head, start)
    for name, head, start, kinds in (
        ('bert', 'cls.predictions.decoder.weight', 'cls.predictions.', ('bert',)),
        ('roberta', 'lm_head.decoder.weight', 'lm_head.', ('roberta', 'xlm-roberta', 'camembert')),
        ('distilbert', 'vocab_projector.weight', 'vocab_', ('distilbert',)))
    for kind in kinds}


def with_tables(config: Mapping, reader: TensorReader) -> tuple[dict, TensorReader, list[str]]:
  """Returns config.json with the tensors' vocab_size and tie_word_embeddings; tensors; notes.

  UsageError if the embedding and the softmax matrix have different numbers of rows, or if the
  softmax matrix is missing and the config does not tie it: transformers would fill it with random
  numbers.
  """
  config, shapes, notes = dict(config), reader.shapes(), []
  kind = config.get('model_type')
  embedding = _find(shapes, EMBEDDINGS)
  head = _find(shapes, HEADS)

  # Rows: after resizing or padding, configs keep the old number.
  rows = {name: shapes[name][0] for name in (embedding, head) if name and len(shapes[name]) == 2}
  declared = config.get('vocab_size')
  if len(set(rows.values())) > 1:
    raise UsageError(f'the checkpoint: {embedding} has {rows[embedding]} rows and {head} '
                     f'{rows[head]}; both must have one for every id (config.json: vocab_size='
                     f'{show(declared)})')
  is_number = type(declared) is int and declared > 0
  # Marian with two tables; read_config refuses unlike sizes.
  has_two = config.get('share_encoder_decoder_embeddings') is False and (
      config.get('decoder_vocab_size') not in (None, declared))
  if (is_number and rows and declared not in rows.values() and not has_two
      and not str(kind).startswith('t5gemma')):
    name, count = next(iter(rows.items()))
    config['vocab_size'] = count
    if 'decoder_vocab_size' in config:      # Marian
      config['decoder_vocab_size'] = count
    notes.append(f'config.json: vocab_size={declared}, but {name} has {count} rows: read with '
                 f'{count}')

  # Tying: as transformers 5 does if config and tensors disagree.
  if kind in ONE_TABLE and config.get('tie_word_embeddings', True) is False:
    # Only if the file has every copy; RenamedReader compares them.
    if missing := [name for name in COPIES if not _find(shapes, (name,))]:
      raise UsageError(f'{missing[0]} is missing and config.json says it is not tied '
                       '(tie_word_embeddings=false)')
    notes.append('config.json: tie_word_embeddings=false; this architecture is read with one '
                 'table, and refused if the tensors differ')
    return {**config, 'tie_word_embeddings': True}, reader, notes
  # Of another head than a language model's: read_config reads or refuses it by its name.
  is_headed = str(config.get('architectures')).rstrip("']").endswith(hf.HEADS)
  if not isinstance(kind, str) or kind not in TABLES or is_headed or not _has_head(kind, shapes):
    return config, reader, notes
  default, *names, _ = TABLES[kind]
  tied = config.get('tie_word_embeddings', default)
  if not isinstance(tied, bool):
    raise UsageError(f'config.json: tie_word_embeddings must be true or false, got {show(tied)}')
  if not tied and embedding and not head and _is_bare(config):
    tied = True
    notes.append(f'{names[1]} is missing, as in models for embeddings: embed and hidden states are '
                 'those of the model, but logits use the embedding, which was not trained for them')
  if not tied and not (embedding and head):
    missing = ' and '.join(name for name, found in zip(names, (embedding, head)) if not found)
    default = '' if 'tie_word_embeddings' in config else ', the default'
    raise UsageError(f'{missing} is missing and config.json says it is not tied '
                     f'(tie_word_embeddings=false{default})')
  if tied and embedding and head and not np.array_equal(reader.read(embedding), reader.read(head)):
    tied = False
    notes.append(f'config.json: tie_word_embeddings=true, but {head} differs from {embedding}: '
                 'not tied')
  head_bias = names[1].removesuffix('weight') + 'bias'
  bias = head_bias.replace('.decoder', '')
  if not tied and bias != head_bias and bias in shapes and head_bias not in shapes:
    # transformers 4 has one bias, tied or not, and writes it once; 5 would fill the other with 0.
    reader = RenamedReader(reader, lambda name: head_bias if name == bias else name)
  return {**config, 'tie_word_embeddings': tied}, reader, notes


def tied_head(config: Mapping, shapes: Mapping) -> tuple[str, str] | None:
  """Returns the names (softmax matrix, embedding) if only the embedding is there, for both."""
  kind, embedding = config['model_type'], _find(shapes, EMBEDDINGS)
  if kind not in TABLES or not embedding or _find(shapes, HEADS) or not _has_head(kind, shapes):
    return None
  default, _, head, _ = TABLES[kind]
  return (head, embedding) if config.get('tie_word_embeddings', default) is True else None


def _is_bare(config: Mapping) -> bool:
  """True if the class that wrote the checkpoint is a model without a head."""
  names = list(map(str, config.get('architectures') or ()))
  return bool(names) and all(
      name.endswith('Model') and not name.endswith(('LMHeadModel', 'DoubleHeadsModel'))
      for name in names)


def _has_head(kind: str, shapes: Mapping) -> bool:
  """False for a BERT, RoBERTa or DistilBERT without the head of its masked language model."""
  return any(name.startswith(TABLES[kind][-1]) for name in shapes)


def _find(shapes: Mapping, endings) -> str:
  """Returns the first name that is one of the endings, or has it after a dot and is shortest."""
  for ending in endings:
    names = [name for name in shapes if name == ending or name.endswith(f'.{ending}')]
    if names:
      return min(names, key=len)
  return ''
