"""The reference of a certificate: Hugging Face's own implementation, where [parity] is installed.

Nothing else of t5lab imports torch or transformers (files.py does to read a pickle).
"""

from collections.abc import Mapping
import gc
import importlib.util
import os
import warnings

import numpy as np

from t5lab.errors import UsageError
from t5lab.interop import hf
from t5lab.models.families import TransformerConfig

CLASSES = ('T5ForConditionalGeneration', 'UMT5ForConditionalGeneration',
           'LongT5ForConditionalGeneration', 'BartForConditionalGeneration', 'GPT2LMHeadModel',
           'LlamaForCausalLM', 'BertForPreTraining', 'BertForMaskedLM', 'BertModel',
           'BertForSequenceClassification', 'SwitchTransformersForConditionalGeneration',
           'MT5ForConditionalGeneration')


def available() -> bool:
  return all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def _libraries():
  os.environ.setdefault('HF_HUB_OFFLINE', '1')      # what we are given is all that is read
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
    self._model = None
    gc.collect()


def from_directory(path, c: TransformerConfig, config: Mapping) -> Reference:
  """The checkpoint in `path` as transformers itself reads it, in float32."""
  torch, transformers = _libraries()
  name = (config.get('architectures') or [''])[0]
  if name not in CLASSES or c.kind == 'encoder' and not (c.mlm_head or c.classes):
    name = 'BertModel' if c.kind == 'encoder' and not (c.mlm_head or c.classes) else (
        hf.for_config(c).config(c)['architectures'][0])
  model = getattr(transformers, name).from_pretrained(
      str(path), dtype=torch.float32, local_files_only=True, attn_implementation='eager')
  return Reference(model, c)


def from_tensors(c: TransformerConfig, tensors: Mapping[str, np.ndarray],
                 dtype: str = 'float32') -> Reference:
  """The architecture of c on given tensors, under Hugging Face's names; float32 shares memory."""
  torch, transformers = _libraries()
  config = dict(hf.for_config(c).config(c))
  cls = getattr(transformers, config['architectures'][0])
  made = cls.config_class(**{k: v for k, v in config.items()
                             if k not in ('model_type', 'architectures')})
  made._attn_implementation = 'eager'
  with torch.device('meta'):
    model = cls(made)
  with warnings.catch_warnings():       # arrays of jax are not writable, and nobody writes
    warnings.simplefilter('ignore', UserWarning)
    state = {name: torch.from_numpy(np.asarray(x)).to(getattr(torch, dtype))
             for name, x in tensors.items()}
  missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
  # told what is missing, it ties that alone: T5 1.1's softmax matrix is its own
  model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
  unset = [name for name, x in model.named_parameters() if x.is_meta]
  if unexpected or unset:
    raise UsageError(f'{cls.__name__} does not fit: unexpected {unexpected[:4]}, unset {unset[:4]}')
  # buffers that no checkpoint holds (rotations, position ids): those of a model of one layer
  if left := [name for name, x in model.named_buffers() if x.is_meta]:
    one = {k: 1 for k in ('num_hidden_layers', 'n_layer') if hasattr(made, k)}
    values = dict(cls(type(made)(**{**made.to_dict(), **one})).named_buffers())
    for name in left:
      module, _, leaf = name.rpartition('.')
      setattr(model.get_submodule(module), leaf, values[name])
  return Reference(model, c)
