"""Chooses the format of a Hugging Face directory, and of a model that is written as one.

The architectures are in formats/, the files in tensor_files.py.
"""

from collections.abc import Mapping
import dataclasses
import itertools

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop import architectures as supported
from t5lab.tools.interop.architectures import FORMATS
from t5lab.tools.interop.formats import bart, bert, gpt2, llama, t5, t5gemma
from t5lab.tools.interop.formats.format import Format
from t5lab.tools.interop.tensor_map import RenamedReader

# (kind, positions) of a model: the formats that can match it, if the other fields do too. Of
# several that do, the first is written.
CANDIDATES = {
    ('encoder_decoder', 'relative'): (t5.T5,), ('encoder', 'relative'): (t5.T5,),
    ('encoder_decoder', 'learned'): (bart.BART, bart.MBART, bart.BLENDERBOT),
    ('encoder_decoder', 'sinusoid'): (bart.MARIAN, bart.PEGASUS, bart.M2M100),
    ('encoder_decoder', 'rope'): (t5gemma.T5GEMMA,),
    ('decoder', 'learned'): (gpt2.GPT2,),
    ('decoder', 'rope'): (llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, llama.GEMMA,
                          llama.GEMMA2, llama.GEMMA3),
    ('encoder', 'learned'): (bert.BERT, bert.ROBERTA, bert.DISTILBERT)}
# Fields that need not survive the way through config.json: they do not change what is computed
# there (init_std, remat), or are compared or carried elsewhere (n_kv_heads, eos_id).
FREE = {'remat', 'dtype', 'init_std', 'max_length', 'capacity_factor', 'eval_capacity_factor',
        'dropout', 'n_kv_heads', 'window', 'window_pattern', 'rope_type', 'local_radius',
        'global_block', 'start_id', 'eos_id', 'pool', 'dense', 'dense_acts', 'dense_bias'}


def class_name(c: TransformerConfig, model_type: str) -> str:
  """Returns the class of transformers for c; of BERT's, the one that has exactly its heads."""
  return FORMATS[model_type].class_name(c, model_type)


def read_config(config: Mapping, reader) -> tuple[Format, TransformerConfig, RenamedReader]:
  """Returns the format, our config and the reader with canonical names, from a config.json.

  UsageError for an architecture that is not in FORMATS, a missing key or an unsupported value.
  """
  kind = config.get('model_type')
  if not isinstance(kind, str) or kind not in FORMATS:
    raise UsageError(supported.refusal(kind))
  _check_head(config, kind)
  format_ = FORMATS[kind]
  try:
    c = TransformerConfig(**format_.fields(config, reader.shapes()))
  except KeyError as e:
    raise UsageError(f'config.json lacks {e}, which a {kind} config has') from e
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
    raise UsageError(f'config.json is not a {kind} config: {e}') from e
  _check_values(c, kind, len(reader.shapes()))
  reader = RenamedReader(reader, format_.canonical, format_.aliases(c))
  format_.check(c, reader)
  return format_, c, reader


# The heads that end the names of transformers' classes and that tensors alone may not show.
HEADS = ('ForTokenClassification', 'ForQuestionAnswering', 'ForMultipleChoice',
         'ForNextSentencePrediction', 'ForSequenceClassification', 'DoubleHeadsModel')


def _check_head(config: Mapping, kind: str) -> None:
  """UsageError if the class that wrote the checkpoint has a head that its tensors would not show.

  A token classifier has the tensors of a sequence classifier.
  """
  architectures = config.get('architectures') or []
  if not isinstance(architectures, list):
    raise UsageError(f'config.json: architectures must be a list, got {architectures!r}')
  known = supported.classes(kind)
  for name in map(str, architectures):
    if name.endswith(HEADS) and name not in known:
      raise UsageError(f'config.json: the head of {name} is not supported; '
                       f'supported for {kind} models: {", ".join(known)}')


def read_labels(config: Mapping, classes: int) -> tuple[str, ...]:
  """Returns the names of the classes in id2label; () if it has none but transformers' own."""
  id2label = config.get('id2label') or {}
  defaults = {str(i): f'LABEL_{i}' for i in range(classes)}
  if not id2label or id2label == defaults:
    return ()
  if not isinstance(id2label, Mapping) or id2label.keys() != defaults.keys() or not all(
      isinstance(name, str) for name in id2label.values()):
    raise UsageError(f'config.json: id2label must name the {classes} classes by the keys "0" to '
                     f'"{classes - 1}", got {id2label!r}')
  return tuple(id2label[key] for key in defaults)


def label_keys(settings) -> dict:
  """Returns the keys of config.json for the eval section of a classifier's config."""
  keys = {}
  if settings.labels:
    keys['id2label'] = {str(i): name for i, name in enumerate(settings.labels)}
    keys['label2id'] = {name: i for i, name in enumerate(settings.labels)}
  if settings.problem_type:
    keys['problem_type'] = settings.problem_type
  return keys


def _check_values(c: TransformerConfig, kind: str, tensors: int) -> None:
  """UsageError for a field of the wrong type or out of range, and for more layers than tensors."""
  wrong = f'config.json is not a {kind} config:'
  for field in dataclasses.fields(c):
    value, needed = getattr(c, field.name), type(field.default)
    accepted = (int, float) if needed is float else needed
    is_unexpected_bool = isinstance(value, bool) and needed is not bool
    if is_unexpected_bool or not isinstance(value, accepted):
      raise UsageError(f'{wrong} model.{field.name} must be of type {needed.__name__}, got '
                       f'{value!r}')
    if needed is int and abs(value) >= 2**31:
      raise UsageError(f'{wrong} model.{field.name} must be less than 2**31, got {value}')
  for name in ('vocab_size', 'd_model', 'd_ff', 'n_heads', 'd_head', 'local_radius',
               'global_block'):
    if getattr(c, name) < 1:
      raise UsageError(f'{wrong} model.{name} must be at least 1, got {getattr(c, name)}')
  for name in ('n_kv_heads', 'max_length', 'types'):
    if getattr(c, name) < 0:
      raise UsageError(f'{wrong} model.{name} must be at least 0, got {getattr(c, name)}')
  if not 0 < c.norm_eps < 1:
    raise UsageError(f'{wrong} model.norm_eps must be between 0 and 1, got {c.norm_eps}')
  # Before anything is listed for each layer.
  for name in ('enc_layers', 'dec_layers', 'experts'):
    if getattr(c, name) > tensors:
      raise UsageError(f'{wrong} model.{name}={getattr(c, name):,}, but the checkpoint has only '
                       f'{tensors:,} tensors')


def format_for(c: TransformerConfig) -> Format:
  """Returns the Hugging Face architecture that computes c; UsageError if there is none."""
  if (c.kind, c.positions) not in CANDIDATES:
    raise UsageError(f'no Hugging Face architecture is known for {c.kind.replace("_", "-")}s with '
                     f'{c.positions} positions; known: {", ".join(FORMATS)}')
  losses = []
  for format_ in CANDIDATES[c.kind, c.positions]:
    config = format_.config(c)
    lost = _lost(c, format_, config)
    if not lost:
      return format_
    losses.append((lost, config['architectures'][0]))
  lost, name = min(losses, key=lambda loss: len(loss[0]))
  raise UsageError(f"Hugging Face's {name}, the nearest architecture, cannot express "
                   f'{", ".join(lost)}')


def _lost(c: TransformerConfig, format_: Format, config: dict) -> list[str]:
  """Returns the fields that do not survive the way through config.json and back."""
  shapes = {row.name: (c.classes,) for row in format_.tensor_rows(c)}
  back = TransformerConfig(**format_.fields(config, shapes))
  lost = [f'{field.name}={getattr(c, field.name)!r}' for field in dataclasses.fields(c)
          if field.name not in FREE and getattr(back, field.name) != getattr(c, field.name)]
  if back.kv_heads != c.kv_heads:
    lost.append(f'n_kv_heads={c.n_kv_heads}')
  if _windows(back) != _windows(c):
    lost.append(f'window={c.window}, window_pattern={c.window_pattern}')
  if back.rope_scaling and back.rope_type != c.rope_type:
    lost.append(f'rope_type={c.rope_type!r}')
  return lost


def _windows(c: TransformerConfig) -> list[int]:
  """Returns the window of every layer, or 0."""
  layers = max(c.enc_layers, c.dec_layers)
  pattern = itertools.islice(itertools.cycle(c.window_pattern or (False,)), layers)
  return [c.window * has_window for has_window in pattern]
