"""The reference of a certificate: Hugging Face's own implementation, where [parity] is installed.

No other module of t5lab imports transformers; tensor_files.py imports torch to read a pickle.
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
from t5lab.tools.interop import hf


def available() -> bool:
  return all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def _import_libraries():
  os.environ.setdefault('HF_HUB_OFFLINE', '1')      # it reads only what we pass to it
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  import torch
  import transformers
  transformers.utils.logging.disable_progress_bar()
  transformers.utils.logging.set_verbosity_error()
  return torch, transformers


@contextlib.contextmanager
def _parameters_without_memory(torch):
  """Parameters that are made inside get no memory; buffers and frozen sinusoids do."""
  register = torch.nn.Module.register_parameter

  def register_on_meta(module, name, parameter):
    if parameter is not None and parameter.requires_grad:
      parameter = torch.nn.Parameter(parameter.to('meta'), parameter.requires_grad)
    register(module, name, parameter)

  torch.nn.Module.register_parameter = register_on_meta
  try:
    yield
  finally:
    torch.nn.Module.register_parameter = register


@contextlib.contextmanager
def _running(name: str):
  """Makes a UsageError of whatever transformers raises for a model that it cannot run."""
  try:
    yield
  except (UsageError, MemoryError):
    raise
  except Exception as e:
    raise UsageError(f'{name} cannot run this model: {" ".join(str(e).split())[:200]}') from e


class Reference:
  """A Hugging Face model on the CPU; `close` frees its memory."""

  def __init__(self, model, c: TransformerConfig):
    torch, transformers = _import_libraries()
    self._torch, self._model, self._c = torch, model.eval(), c
    self.name = f'transformers {transformers.__version__} {type(model).__name__}'

  def logits(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns float[B, T, V]: the logits, or the output of an encoder without a head."""
    c, tensor = self._c, lambda x: self._torch.tensor(np.asarray(x, np.int64))
    inputs = {}
    if c.enc_layers:
      tokens = features['encoder_input_tokens']
      inputs = dict(input_ids=tensor(tokens), attention_mask=tensor(tokens != c.pad_id))
      if 'encoder_token_types' in features:
        inputs['token_type_ids'] = tensor(features['encoder_token_types'])
    if c.dec_layers:
      name = 'decoder_input_ids' if c.enc_layers else 'input_ids'
      inputs[name] = tensor(features['decoder_input_tokens'])
      inputs['use_cache'] = False
      if c.enc_layers:       # T5Gemma would mask a start token that is the padding
        inputs['decoder_attention_mask'] = self._torch.ones_like(inputs[name])
    with self._torch.no_grad(), _running(self.name):
      out = self._model(**inputs)
    if c.classes and c.class_of == 'span':
      return self._torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    fields = (getattr(out, f, None) for f in ('prediction_logits', 'logits', 'last_hidden_state'))
    return next(x for x in fields if x is not None).numpy()

  def close(self) -> None:
    """Frees the memory, to the system as well, so that the peak stays that of one model."""
    self._model = None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):       # only glibc has malloc_trim
      ctypes.CDLL(None).malloc_trim(0)


def open_tokenizer(folder) -> tuple:
  """Returns (the tokenizer that a directory declares, its name); UsageError if it does not open.

  Only files of the directory are read, and none of them is run.
  """
  _, transformers = _import_libraries()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    try:
      tokenizer = transformers.AutoTokenizer.from_pretrained(
          folder, local_files_only=True, trust_remote_code=False)
    except BaseException as e:           # its Rust library panics with a BaseException
      if not isinstance(e, Exception) and type(e).__name__ != 'PanicException':
        raise
      why = ' '.join(str(e).split())[:200]
      raise UsageError(f'transformers {transformers.__version__} does not open the tokenizer of '
                       f'this directory: {why}') from e
  return tokenizer, f'transformers {transformers.__version__} {type(tokenizer).__name__}'


# Keys of config.json that are not arguments of the config class, or that we decide.
NOT_ARGUMENTS = ('model_type', 'architectures', 'transformers_version', 'dtype', 'torch_dtype',
                 '_name_or_path', '_attn_implementation', 'auto_map', 'quantization_config')

# Parameters that a checkpoint may lack, because the output does not depend on them: the bias of
# BERT's and RoBERTa's head, if its softmax matrix is untied, and the pooler of a bare encoder.
UNUSED = ('cls.predictions.bias', 'lm_head.bias')
POOLER = ('pooler.dense.weight', 'pooler.dense.bias')


def from_tensors(c: TransformerConfig, config: Mapping, tensors: Iterable[tuple[str, np.ndarray]],
                 dtype: str = 'float32') -> Reference:
  """Builds the architecture that config.json names, on tensors with Hugging Face's names.

  Each tensor is released before the next is read, and float32 is not copied: peak memory is one
  model.
  """
  torch, transformers = _import_libraries()
  name = hf.class_name(c, config['model_type'])
  cls = getattr(transformers, name)
  with _running(f'transformers {transformers.__version__} {name}'):
    hf_config = cls.config_class(**{k: v for k, v in config.items() if k not in NOT_ARGUMENTS})
    hf_config._attn_implementation = 'eager'
    with _parameters_without_memory(torch):
      model = cls(hf_config)

  # A bare BERT, unlike one with a head, does not prefix its tensors.
  prefix = '' if hasattr(model, cls.base_model_prefix) else f'{cls.base_model_prefix}.'
  format_ = hf.FORMATS[config['model_type']]
  rename = format_.reference_name
  state = {}
  with warnings.catch_warnings():       # about arrays of jax, which are read-only
    warnings.simplefilter('ignore', UserWarning)
    for tensor_name, x in tensors:
      tensor_name = rename(tensor_name)
      state[tensor_name.removeprefix(prefix)] = torch.from_numpy(
          np.asarray(x, np.float32)).to(getattr(torch, dtype))
  for key, x in model.named_parameters():
    if key not in state and (key in UNUSED or key in POOLER and not c.pooler):
      state[key] = torch.zeros(x.shape)
  missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
  del state
  # With missing_keys only these are tied: T5 1.1 has a softmax matrix of its own.
  model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
  unset = [key for key, x in model.named_parameters() if x.is_meta]
  read = {rename(row.name).removeprefix(prefix) for row in format_.tensor_rows(c)}
  dropped = [key for key in unexpected if key in read]       # others, no code reads
  if unset or dropped:
    problems = [f'it {what} {", ".join(keys[:4])}' for what, keys in (
        ('does not read', dropped), ('needs', unset)) if keys]
    raise UsageError(f'{name} of transformers does not fit the checkpoint: {"; ".join(problems)}')
  return Reference(model, c)
