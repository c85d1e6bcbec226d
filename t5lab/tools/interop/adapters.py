"""PEFT's adapters: LoRA matrices and retrained modules, merged onto the weights of their base.

W + B A * alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA. [Hu et al. 2021, 4.1;
Kalajdzievski 2023; checked against peft 0.21] Every other method of PEFT is refused by name.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
from pathlib import Path
import re

import numpy as np

from t5lab import files
from t5lab.errors import UsageError
from t5lab.tools.interop import recognise, tensor_files
from t5lab.tools.interop.tensor_map import TensorReader, name_list
from t5lab.tools.interop.untrusted import show

CONFIG = 'adapter_config.json'
WEIGHTS = ('adapter_model.safetensors', 'adapter_model.bin')
LORA = re.compile(r'(.+)\.lora_(embedding_)?(A|B)(?:\.(?!bias$)\w+)??(?:\.weight)?')
# Keys of adapter_config.json that make the adapter compute something else, if set.
VARIANTS = ('use_dora', 'use_qalora', 'use_bdlora', 'lora_bias', 'layer_replication',
            'trainable_token_indices', 'target_parameters', 'alora_invocation_tokens',
            'arrow_config', 'kasa_config', 'monteclora_config', 'velora_config')
# Values of init_lora_weights that leave the base weights as they are; PiSSA, OLoRA, LoftQ and
# others subtract the first A and B from them.
INITS = (None, True, False, 'gaussian', 'orthogonal', 'eva')


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A directory with adapter_config.json, whose contents are `config`."""
  path: Path
  config: Mapping

  def merge(self, base: TensorReader, base_config: Mapping, *, allow_pickle: bool):
    """Returns (the base's tensors with the adapter merged, notes)."""
    weights = _open_weights(self.path, allow_pickle=allow_pickle)
    merged = AdaptedReader(base, weights, self.config, base_config)
    note = f'adapter {self.path}: {merged.changed} tensors changed by LoRA'
    if merged.replaced:
      note += f', and replaced: {name_list(merged.replaced)}'
    return merged, [note]


def find(path, base) -> Adapter | None:
  """Returns the adapter in directory `path`, or None; base: the directory of its model or None.

  UsageError for a method that is not LoRA, for every variant of it that computes otherwise, for an
  adapter without a base and for a base without an adapter.
  """
  path = Path(path)
  if not os.path.lexists(path / CONFIG):
    if base is not None:
      raise UsageError(f'--base applies to an adapter, but {path} has no {CONFIG}')
    return None
  config = files.read_json(tensor_files.resolve_inside(path, CONFIG))
  kind = config.get('peft_type')
  if kind != 'LORA':
    raise UsageError(f'{path}: a PEFT adapter of type {show(kind)} is not supported, only LORA; '
                     'merge it with peft (merge_and_unload) and convert the result')
  for key in VARIANTS:
    if config.get(key):
      raise UsageError(f'{path}: {CONFIG} has {key}={show(config[key])}, which is not supported; '
                       'merge the adapter with peft (merge_and_unload) and convert the result')
  init = config.get('init_lora_weights')
  if init not in INITS:
    raise UsageError(f'{path}: {CONFIG} has init_lora_weights={show(init)}, which changes the base '
                     'weights; merge the adapter with peft (merge_and_unload) and convert the '
                     'result')
  if base is None and not os.path.lexists(path / 'config.json'):     # or beside the base itself
    name = config.get('base_model_name_or_path')
    raise UsageError(f'{path} is a PEFT adapter of {show(name)}: give the directory of that model '
                     'with --base DIR')
  return Adapter(path, config)


def _open_weights(path, *, allow_pickle: bool) -> TensorReader:
  for name in WEIGHTS:
    if os.path.lexists(Path(path, name)):
      return tensor_files.open_hf(tensor_files.resolve_inside(path, name),
                                  allow_pickle=allow_pickle)
  raise UsageError(f'{path} has {CONFIG} but no weights of an adapter: looked for '
                   f'{" and ".join(WEIGHTS)}')


@dataclasses.dataclass
class _Delta:
  """The change of one tensor: a @ b * scale. a, b: names in the adapter."""
  a: str = ''
  b: str = ''
  is_embedding: bool = False
  scale: float = 0.


class AdaptedReader(TensorReader):
  """The tensors of a base model with an adapter merged: changed ones as float32.

  base: with unwrapped names (recognise.unwrap). changed: the number of tensors with a delta.
  replaced: the names of those that the adapter has whole. If the adapter changes one of two tied
  tables, the other stays as it is: peft changes the module, not what it shares.
  """

  def __init__(self, base: TensorReader, adapter: TensorReader, config: Mapping,
               base_config: Mapping):
    self._base, self._adapter, self._kind = base, adapter, base_config['model_type']
    self._shapes, self.copies = dict(base.shapes()), base.copies
    self._stay_tied = bool(config.get('ensure_weight_tying'))
    self._copies = {}                    # {softmax matrix: embedding}
    if head := recognise.tied_head(base_config, self._shapes):
      self._copies = dict([head])
      self._shapes[head[0]] = self._shapes[head[1]]
    self._deltas, self._whole = {}, {}
    pairs = {}
    for stored in adapter.shapes():
      if lora := LORA.fullmatch(stored):
        delta = pairs.setdefault(lora[1], _Delta(is_embedding=bool(lora[2])))
        if getattr(delta, lora[3].lower()) or delta.is_embedding != bool(lora[2]):
          raise UsageError(f'the adapter: {lora[1]} has more than one pair of LoRA matrices')
        setattr(delta, lora[3].lower(), stored)
      elif '.lora_' in stored:
        raise UsageError(f'the adapter: {show(stored)} is not a matrix of plain LoRA; merge it '
                         'with peft (merge_and_unload)')
      else:
        self._replace(stored, config)
    for module, delta in pairs.items():
      self._add(module, delta, config)
    if not self._deltas and not self._whole:
      raise UsageError('the adapter changes no tensor: its file is empty (as DeepSpeed ZeRO 3 '
                       'leaves it if the shards were not gathered before saving)')
    self.changed, self.replaced = len(self._deltas), sorted(self._whole)

  def _name_in_base(self, name: str) -> str | None:
    """Returns the base's name of a tensor; either may lack the name of the model below the head."""
    names = self._shapes
    if name in names:
      return name
    found = [other for other in names if name.endswith(f'.{other}') or other.endswith(f'.{name}')]
    return found[0] if len(found) == 1 else None

  def _replace(self, stored, config):
    """Registers a tensor that the adapter has whole: modules_to_save, biases, resized tables."""
    plain = re.sub(r'(modules_to_save|original_module)\.(default\.)?', '', stored)
    if 'original_module.' in stored:
      return
    name = recognise.unwrapped(plain)
    in_base = self._name_in_base(name)
    saved = config.get('modules_to_save') or []
    if not isinstance(saved, list):
      raise UsageError(f'{CONFIG}: modules_to_save must be a list, got {show(saved)}')
    if in_base is None and not set(map(str, saved)) & set(name.split('.')):
      raise UsageError(f'the adapter: {show(stored)} is not a tensor of the base model; is --base '
                       'another model?')
    name = in_base or name
    if any(re.search(rf'(^|\.){re.escape(str(module))}\.', name) for module in saved):
      self._check_table(name)
    self._whole[name] = stored
    self._shapes[name] = self._adapter.shapes()[stored]

  def _add(self, module, delta, config):
    """Registers the delta of a module after checking its matrices against the base."""
    name = f'{recognise.unwrapped(module)}.weight'
    self._check_table(name)
    name = self._name_in_base(name)
    if name is None:
      raise UsageError(f'the adapter: {show(module)} is not a module of the base model; is --base '
                       'another model?')
    if not (delta.a and delta.b):
      raise UsageError(f'the adapter: {show(module)} lacks lora_{"B" if delta.a else "A"}')
    a, b = (self._adapter.shapes()[stored] for stored in (delta.a, delta.b))
    key = module.removeprefix('base_model.model.')
    rank = _for_module(config, 'r', 'rank_pattern', key)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
      raise UsageError(f'the adapter: the LoRA matrices of {show(module)} have the shapes {a} and '
                       f'{b}, its rank is {show(rank)}')
    shape = (b[0], a[1])
    if delta.is_embedding or self._is_conv1d(name):
      shape = shape[::-1]
    if shape != self._shapes[name]:
      raise UsageError(f'the adapter: {show(module)} has a change of shape {shape}, {name} of the '
                       f'base has {self._shapes[name]}; is --base another model?')
    alpha = _for_module(config, 'lora_alpha', 'alpha_pattern', key)
    delta.scale = alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
    self._deltas[name] = delta

  def _check_table(self, name):
    """UsageError for an embedding that several modules share: peft changes one of them."""
    if self._kind not in recognise.TABLES and name.endswith(recognise.EMBEDDINGS):
      raise UsageError(f'the adapter changes {name}, which modules of a {self._kind} model share; '
                       'merge it with peft (merge_and_unload) and convert the result')

  def _is_conv1d(self, name) -> bool:
    """True for the kernels that are [in, out] in the file."""
    return self._kind == 'gpt2' and re.search(r'\.c_(attn|proj|fc)\.weight$', name) is not None

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return self._shapes

  def read(self, name: str) -> np.ndarray:
    """Reads a tensor; a changed one as float32."""
    whole = self._whole.get(name)
    original = self._copies.get(name, name)
    if original != name and whole is None and name not in self._deltas and self._stay_tied:
      return self.read(original)
    weight = self._base.read(original) if whole is None else self._adapter.read(whole)
    if name not in self._deltas:
      return weight
    delta = self._deltas[name]
    a, b = (self._adapter.read(stored).astype(np.float32) for stored in (delta.a, delta.b))
    change = (b @ a) * np.float32(delta.scale)
    is_transposed = delta.is_embedding or self._is_conv1d(name)
    return weight.astype(np.float32) + (change.T if is_transposed else change)


def _for_module(config: Mapping, key: str, pattern_key: str, module: str) -> float:
  """Returns the rank or alpha of a module: of the first pattern that matches it, or the default."""
  value = config.get(key)
  patterns = config.get(pattern_key) or {}
  if not isinstance(patterns, Mapping):
    raise UsageError(f'{CONFIG}: {pattern_key} must be an object, got {show(patterns)}')
  for pattern, other in patterns.items():
    if _matches(pattern, module):
      value = other
      break
  if type(value) not in (int, float) or not 0 < value < 1 << 31:
    raise UsageError(f'{CONFIG}: {key} must be a positive number, got {show(value)} (for '
                     f'{show(module)})')
  return value


def _matches(pattern: str, module: str) -> bool:
  """True if the end of the module's name fits the regex, as in peft's get_pattern_key.

  A foreign regex may take exponential time; one that could is refused.
  """
  repeats = re.findall(r'[*+?{]', pattern)
  if len(pattern) > 200 or len(repeats) > 3 or re.search(r'\)[*+?{]', pattern):
    raise UsageError(f'{CONFIG}: the pattern {show(pattern)} repeats too much; at most three of '
                     '* + ? { and none after a group')
  try:
    return re.fullmatch(rf'(.*\.)?({pattern})', module) is not None
  except (re.error, OverflowError, RecursionError) as e:
    raise UsageError(f'{CONFIG}: the pattern {show(pattern)} is not a regex: {e}') from None
