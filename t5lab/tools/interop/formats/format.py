"""An architecture of Hugging Face's: from its config.json and tensors to ours, and back.

One module per group of architectures has their Formats: the fields that config.json means, and the
rows of the tensors. hf.py chooses among them.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from t5lab.errors import UsageError, did_you_mean
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop.tensor_map import TensorReader, TensorRow

ACTS = {'relu': 'relu', 'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf',
        'silu': 'silu', 'swish': 'silu'}
THEIR_ACTS = {ours: theirs for theirs, ours in reversed(ACTS.items())}   # the first of several
# Fields that config.json must have.
SIZES = ('vocab_size', 'd_model', 'd_ff', 'n_heads', 'd_head', 'enc_layers', 'dec_layers',
         'max_length')


@dataclasses.dataclass(frozen=True)
class Format:
  """One architecture.

  family: the row of models/families.py that has the values of what config.json may lack, except for
  `defaults`, the fields for which transformers' class has another default. keys:
  {their key: our field}; a field is read from the last of its keys, unless
  other_fields(config, shapes) has it. act: the key of the activation. constants, other_keys(c): the
  rest of config.json. class_name(c, model_type): the class of transformers. canonical, aliases: see
  RenamedReader. ignore: regexes of tensors that may stay unread. check(c, reader): a UsageError for
  tensors that the rows do not map and that would change the output. computed(c): tensors that
  follow from c and that transformers misses in files without them. reference_name: from a canonical
  name to that of transformers' class, where its files have others.
  """
  tensor_rows: Callable[[TransformerConfig], list[TensorRow]]
  family: str
  keys: Mapping[str, str]
  other_fields: Callable[[Mapping, Mapping], dict]
  constants: Mapping[str, Any]
  class_name: Callable[[TransformerConfig, str], str]
  act: str = ''
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  other_keys: Callable[[TransformerConfig], dict] = lambda c: {}
  canonical: Callable[[str], str] = lambda name: name
  aliases: Callable[[TransformerConfig], dict[str, str]] = lambda c: {}
  ignore: tuple[str, ...] = ()
  check: Callable[[TransformerConfig, TensorReader], None] = lambda c, reader: None
  computed: Callable[[TransformerConfig], dict[str, np.ndarray]] = lambda c: {}
  reference_name: Callable[[str], str] = lambda name: name

  def fields(self, config: Mapping, shapes: Mapping) -> dict:
    """Returns the fields of a TransformerConfig from config.json and tensor shapes."""
    others = self.other_fields(config, shapes)
    # Dropout: runs decide it, not rows.
    row = {**families.row(self.family), 'dropout': 0.1, **self.defaults}
    if self.act in config:
      others['acts'] = (our_act(config[self.act]),)

    def value(key, field):
      if key.endswith('_token_id'):
        return integer(config, key, row[field])
      return config[key] if field in SIZES else config.get(key, row[field])

    fields = {field: value(key, field) for key, field in self.keys.items() if field not in others}
    fields |= others
    if 'd_head' not in fields:
      fields['d_head'] = fields['d_model'] // fields['n_heads']
    return {**row, **fields}

  def config(self, c: TransformerConfig) -> dict:
    """Returns the config.json of a TransformerConfig."""
    config = {key: getattr(c, field) for key, field in self.keys.items()}
    if self.act:
      config[self.act] = THEIR_ACTS.get(c.acts[0], c.acts[0])
    config.update(self.constants, **self.other_keys(c))
    return {**config, 'architectures': [self.class_name(c, config['model_type'])]}


def our_act(name: str) -> str:
  if name not in ACTS:
    raise UsageError(f'config.json: activation {name!r} is unknown.{did_you_mean(name, ACTS)}')
  return ACTS[name]


def require(config: Mapping, **supported) -> None:
  for key, value in supported.items():
    if config.get(key) not in (None, value):       # null is the default, too
      raise UsageError(f'config.json: {key}={config[key]!r} is not supported, only {value!r}')


def integer(config: Mapping, key: str, default: int) -> int:
  """Returns config[key], or `default` for None; of a list (several end tokens) the first."""
  value = config.get(key)
  if isinstance(value, list) and value:
    value = value[0]
  return default if value is None else int(value)


def prefixed(*known: str) -> Callable[[str], str]:
  """Returns a function that gives a name the first prefix unless it has one of them."""
  return lambda name: name if name.startswith(known) else known[0] + name
