"""The reference of a certificate: Hugging Face's own implementation, where [parity] is installed.

Nothing else of t5lab imports torch or transformers (files.py does to read a pickle).
"""

from collections.abc import Iterable, Mapping
import contextlib
import ctypes
import gc
import importlib.util
import os
import warnings

import numpy as np

from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig

CLASSES = {'t5': 'T5ForConditionalGeneration', 'mt5': 'MT5ForConditionalGeneration',
           'umt5': 'UMT5ForConditionalGeneration', 'longt5': 'LongT5ForConditionalGeneration',
           'switch_transformers': 'SwitchTransformersForConditionalGeneration',
           'bart': 'BartForConditionalGeneration', 'gpt2': 'GPT2LMHeadModel',
           'llama': 'LlamaForCausalLM'}


def available() -> bool:
  return all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def _libraries():
  os.environ.setdefault('HF_HUB_OFFLINE', '1')      # what we give it is all that it reads
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  import torch
  import transformers
  transformers.utils.logging.disable_progress_bar()
  transformers.utils.logging.set_verbosity_error()
  return torch, transformers


class Reference:
  """A Hugging Face model on the CPU; `close` gives its memory back."""

  def __init__(self, model, c: TransformerConfig):
    torch, transformers = _libraries()
    self._torch, self._model, self._c = torch, model.eval(), c
    self.name = f'transformers {transformers.__version__} {type(model).__name__}'

  def logits(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Model features -> float[B, T, V]: logits, or an encoder without a head's output."""
    c, tensor = self._c, lambda x: self._torch.tensor(np.asarray(x, np.int64))
    given = {}
    if c.enc_layers:
      tokens = features['encoder_input_tokens']
      given = dict(input_ids=tensor(tokens), attention_mask=tensor(tokens != c.pad_id))
      if 'encoder_token_types' in features:
        given['token_type_ids'] = tensor(features['encoder_token_types'])
    if c.dec_layers:
      given['decoder_input_ids' if c.enc_layers else 'input_ids'] = tensor(
          features['decoder_input_tokens'])
      given['use_cache'] = False
    with self._torch.no_grad():
      out = self._model(**given)
    for field in ('prediction_logits', 'logits', 'last_hidden_state'):
      if getattr(out, field, None) is not None:
        return getattr(out, field).numpy()
    raise UsageError(f'{self.name} returned no logits')

  def close(self) -> None:
    """Gives the memory back: to the system too, so that the peak stays that of one model."""
    self._model = None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):       # glibc's, elsewhere absent
      ctypes.CDLL(None).malloc_trim(0)


NOT_OURS = ('model_type', 'architectures', 'transformers_version', 'dtype', 'torch_dtype',
            '_name_or_path', '_attn_implementation', 'auto_map', 'quantization_config')


def _class(c: TransformerConfig, config: Mapping) -> str:
  """The class of the architecture that has just the heads of c."""
  if c.kind == 'encoder':
    return ('BertForSequenceClassification' if c.classes else 'BertModel' if not c.mlm_head else
            'BertForPreTraining' if c.nsp else 'BertForMaskedLM')
  return CLASSES[config['model_type']]


def from_tensors(c: TransformerConfig, config: Mapping, tensors: Iterable[tuple[str, np.ndarray]],
                 dtype: str = 'float32') -> Reference:
  """The architecture that config.json names on tensors under Hugging Face's names.

  Each tensor is let go of before the next is read, and float32 is not copied: memory is one model.
  """
  torch, transformers = _libraries()
  cls = getattr(transformers, _class(c, config))
  made = cls.config_class(**{k: v for k, v in config.items() if k not in NOT_OURS})
  made._attn_implementation = 'eager'
  with torch.device('meta'):
    model = cls(made)
  prefix = 'bert.' if cls.__name__ == 'BertModel' else ''       # alone it has no name for itself
  state = {}
  with warnings.catch_warnings():       # arrays of jax are not writable, and nobody writes
    warnings.simplefilter('ignore', UserWarning)
    for name, x in tensors:
      state[name.removeprefix(prefix)] = torch.from_numpy(
          np.asarray(x, np.float32)).to(getattr(torch, dtype))
  missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
  del state
  # told what is missing, it ties that alone: T5 1.1's softmax matrix is its own
  model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
  unset = [name for name, x in model.named_parameters() if x.is_meta]
  if unset:
    raise UsageError(f'{cls.__name__} does not fit: unexpected {unexpected[:4]}, unset {unset[:4]}')
  # buffers that no checkpoint holds (rotations, position ids): those of a model of one layer
  if left := [name for name, x in model.named_buffers() if x.is_meta]:
    one = {k: 1 for k in ('num_hidden_layers', 'n_layer') if hasattr(made, k)}
    values = dict(cls(type(made)(**{**made.to_dict(), **one})).named_buffers())
    for name in left:
      module, _, leaf = name.rpartition('.')
      setattr(model.get_submodule(module), leaf, values[name])
  return Reference(model, c)
