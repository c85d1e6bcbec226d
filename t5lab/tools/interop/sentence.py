"""The modules of sentence-transformers around a Hugging Face model: one vector for a text.

  modules.json                       Transformer, Pooling, then any number of Dense, then Normalize
  sentence_bert_config.json          max_seq_length, do_lower_case
  config_sentence_transformers.json  prompts
  1_Pooling/config.json              how token vectors are pooled
  2_Dense/                           config.json and weights

Read as its versions up to 6.2 write them, and written so that all of them read it. A module that
would give other vectors here is refused by name.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import re

import numpy as np

from t5lab import files
from t5lab.errors import UsageError, did_you_mean
from t5lab.models.families import TransformerConfig
from t5lab.tools.interop import tensor_files, tensor_map
from t5lab.tools.interop.tensor_map import TRANSPOSE, TensorReader, TensorRow

MODULES, CONFIG = 'modules.json', 'config_sentence_transformers.json'
LENGTH = tuple(f'sentence_{kind}_config.json' for kind in (
    'bert', 'roberta', 'distilbert', 'camembert', 'albert', 'xlm-roberta', 'xlnet'))
PACKAGE = 'sentence_transformers.'
KINDS = ('Transformer', 'Pooling', 'Dense', 'Normalize')
# {its name: ours}, in the order in which the flags of its older form are concatenated.
POOLS = {'cls': 'first', 'max': 'max', 'mean': 'mean', 'mean_sqrt_len_tokens': 'mean_sqrt',
         'weightedmean': 'weighted_mean', 'lasttoken': 'last'}
FLAGS = {'cls': 'pooling_mode_cls_token', 'max': 'pooling_mode_max_tokens',
         'mean': 'pooling_mode_mean_tokens',
         'mean_sqrt_len_tokens': 'pooling_mode_mean_sqrt_len_tokens',
         'weightedmean': 'pooling_mode_weightedmean_tokens', 'lasttoken': 'pooling_mode_lasttoken'}
ACTS = {'Tanh': 'tanh', 'Identity': 'linear', 'ReLU': 'relu', 'GELU': 'gelu_erf', 'SiLU': 'silu'}
CLASSES = {'Identity': 'torch.nn.modules.linear.Identity'}      # the others are activations
VECTOR = 'sentence_embedding'
NO_LENGTH = 2 ** 31       # transformers writes about 1e30 if a tokenizer has no limit


@dataclasses.dataclass(frozen=True)
class Modules:
  """What the modules say.

  fields: of TransformerConfig. settings: of the embed section of a config. readers: those of the
  dense layers, by what the names of `rows` start with.
  """
  fields: dict
  settings: dict
  readers: dict[str, TensorReader]


def transformer_folder(folder: Path) -> Path:
  """The folder of the Transformer, which is 0_Transformer in old models."""
  modules = _modules(folder)
  return modules[0][1] if modules and modules[0][0] == 'Transformer' else folder


def read(folder: Path, hf_config: Mapping, model: TransformerConfig, *,
         allow_pickle: bool = False) -> Modules | None:
  """Reads the modules of a directory; None without any, and for a classifier alone.

  Errors: UsageError for a module, an option or an order of modules that is not supported.
  """
  modules = _modules(folder)
  config = _json(folder, CONFIG)
  kinds = [kind for kind, _ in modules]
  if not modules or (kinds == ['Transformer'] and model.classes):      # a cross-encoder
    return None
  if model.classes:
    raise UsageError(f'{folder / MODULES}: Pooling around a classifier is not supported; '
                     f'architectures is {hf_config.get("architectures")}')
  if config.get('model_type', 'SentenceTransformer') != 'SentenceTransformer':
    raise UsageError(f'{folder / CONFIG}: model_type {config["model_type"]!r} is not supported, '
                     'only SentenceTransformer')
  if not re.fullmatch('TransformerPooling(Dense)*(Normalize)*', ''.join(kinds)):
    raise UsageError(f'{folder / MODULES}: the modules {", ".join(kinds)} are not supported, only '
                     'Transformer, Pooling, any number of Dense, Normalize, in this order')

  # The vector.
  pooling = _json(modules[1][1], 'config.json')
  pool = _pool(pooling, modules[1][1] / 'config.json', model)
  fields = {'pool': pool, 'dense': (), 'dense_acts': (), 'dense_bias': ()}
  width, readers = model.d_model * len(pool.split('+')), {}
  for kind, path in modules[2:]:
    module = _json(path, 'config.json')
    for key in ('module_input_name', 'module_output_name'):
      if module.get(key) not in (None, VECTOR):
        raise UsageError(f'{path / "config.json"}: {key}={module[key]!r} is not supported, only '
                         f'{VECTOR!r}')
    if kind == 'Dense':
      readers[f'{_dense_folder(len(readers))}/'] = tensor_files.open_hf(
          path, allow_pickle=allow_pickle)
      for field, value in _dense(module, path / 'config.json', width).items():
        fields[field] += (value,)
      width = module['out_features']

  # The text.
  settings = {**_length_settings(modules[0][1], model), **_prompts(config, folder / CONFIG),
              'pool_prompt': pooling.get('include_prompt', True) is not False,
              'normalize': 'Normalize' in kinds, 'modules': True}
  return Modules(fields, settings, readers)


def _modules(folder: Path) -> list[tuple[str, Path]]:
  """[(kind, folder), …] of modules.json; without it, of folders with names like 1_Pooling."""
  listed = []
  if (folder / MODULES).is_file():
    tensor_files.resolve_inside(folder, MODULES)
    listed = files.read_json(folder / MODULES, kind=list)
  else:
    named = [(path.name, match) for path in sorted(folder.glob('*_*'))
             if (match := re.fullmatch(rf'\d+_({"|".join(KINDS)})', path.name)) and path.is_dir()]
    if named:
      listed = [{'type': PACKAGE + 'Transformer', 'path': ''}]
      listed += [{'type': PACKAGE + match[1], 'path': name} for name, match in named]

  modules = []
  for entry in listed:
    entry = entry if isinstance(entry, dict) else {}
    name, path = entry.get('type'), entry.get('path')
    if not isinstance(name, str) or not isinstance(path, str):
      raise UsageError(f'{folder / MODULES}: each module must have a type and a path, got '
                       f'{str(entry)[:80]}')
    kind = name.rpartition('.')[2]
    if not name.startswith(PACKAGE) or kind not in KINDS:
      raise UsageError(f'{folder / MODULES}: the module {name[:200]} is not supported.'
                       f'{did_you_mean(kind, KINDS)}')
    if path:
      tensor_files.resolve_inside(folder, path)
    modules.append((kind, folder / path))
  return modules


def _json(folder: Path, name: str) -> dict:
  """A JSON object of a folder; {} if the file does not exist."""
  if not (folder / name).is_file():
    return {}
  tensor_files.resolve_inside(folder, name)
  return files.read_json(folder / name)


def _pool(config: Mapping, path: Path, model: TransformerConfig) -> str:
  """model.pool of a Pooling module; without any mode it is the mean."""
  width = config.get('embedding_dimension', config.get('word_embedding_dimension', model.d_model))
  if width != model.d_model:
    raise UsageError(f'{path}: it pools vectors of {width!r} numbers, the model has '
                     f'{model.d_model}')
  flags = {mode: config.get(flag, False) for mode, flag in FLAGS.items()}
  modes = config.get('pooling_mode', [mode for mode, on in flags.items() if on is True] or 'mean')
  modes = modes.split('+') if isinstance(modes, str) else modes
  for value in flags.values():
    if not isinstance(value, bool):
      raise UsageError(f'{path}: a pooling_mode flag must be true or false, got {value!r}')
  if not isinstance(modes, list) or not modes:
    raise UsageError(f'{path}: pooling_mode must be one or several of {", ".join(POOLS)}, got '
                     f'{modes!r}')
  for mode in modes:
    if not isinstance(mode, str) or mode not in POOLS:
      raise UsageError(f'{path}: pooling_mode {mode!r} is unknown.{did_you_mean(str(mode), POOLS)}')
  return '+'.join(POOLS[mode] for mode in modes)


def _dense(config: Mapping, path: Path, width: int) -> dict:
  """The entries of a Dense module in our fields. width: of its input."""
  sizes = [config.get(key) for key in ('in_features', 'out_features')]
  if sizes[0] != width or type(sizes[1]) is not int or not 0 < sizes[1] < NO_LENGTH:
    raise UsageError(f'{path}: in_features and out_features must be {width} and a positive number, '
                     f'got {sizes[0]!r} and {sizes[1]!r}')
  bias, act = config.get('bias', True), config.get('activation_function', 'torch.nn.Tanh')
  if not isinstance(bias, bool) or config.get('use_residual', False) is not False:
    raise UsageError(f'{path}: bias={bias!r}, use_residual={config.get("use_residual")!r} is not '
                     'supported: bias must be true or false, use_residual false')
  name = str(act).rpartition('.')[2]
  if not str(act).startswith('torch.nn.') or name not in ACTS:
    raise UsageError(f'{path}: activation_function {act!r} is not supported.'
                     f'{did_you_mean(name, ACTS)}')
  return {'dense': sizes[1], 'dense_acts': ACTS[name], 'dense_bias': bias}


def _length_settings(folder: Path, model: TransformerConfig) -> dict:
  """max_length and lowercase, from the files of the Transformer and of its tokenizer."""
  name = next((name for name in LENGTH if (folder / name).is_file()), LENGTH[0])
  config, path = _json(folder, name), folder / name
  tokenizer = {}
  if (folder / 'tokenizer_config.json').is_file():
    tensor_files.resolve_inside(folder, 'tokenizer_config.json')
    tokenizer = files.read_json(folder / 'tokenizer_config.json', 32 << 20)
  task = config.get('transformer_task', 'feature-extraction')
  outputs = config.get('modality_config') or {}
  text = outputs.get('text', {}) if isinstance(outputs, dict) else None
  output = text.get('method_output_name', 'last_hidden_state') if isinstance(text, dict) else text
  if task != 'feature-extraction' or output not in ('last_hidden_state', ['last_hidden_state']):
    raise UsageError(f'{path}: transformer_task={task!r} with the output {output!r} is not '
                     "supported, only 'feature-extraction' with 'last_hidden_state'")
  if tokenizer.get('truncation_side', 'right') != 'right':
    raise UsageError(f'{folder / "tokenizer_config.json"}: truncation_side='
                     f'{tokenizer["truncation_side"]!r} is not supported, only right')

  # Its precedence: the arguments of the processor, this file, then the smaller of two defaults.
  limits = [_processor_length(config, path), config.get('max_seq_length')]
  limits += [_less(tokenizer.get('model_max_length'), model.max_length or None)]
  limit = next((limit for limit in limits if limit is not None), 0)
  if isinstance(limit, float) and limit > NO_LENGTH:
    limit = 0
  if type(limit) is not int or limit < 0:
    raise UsageError(f'{path}: max_seq_length must be a positive number, got {limit!r}')
  if model.positions == 'learned':
    limit = min(limit or model.max_length, model.max_length)
  return {'max_length': limit if limit < NO_LENGTH else 0,
          'lowercase': config.get('do_lower_case', False) is True}


def _less(a, b):
  """The smaller of two numbers, of which one may be None."""
  return min((x for x in (a, b) if isinstance(x, int | float) and x is not None), default=None)


def _processor_length(config: Mapping, path: Path) -> int | None:
  """The maximum length among the arguments of the tokenizer; None if they have none."""
  limit = None
  for section in (config.get('processing_kwargs') or {}).items():
    name, values = section
    for key, value in (values or {}).items() if isinstance(values, dict | None) else [section]:
      if key == 'max_length' and name in ('text', 'common'):
        limit = value
      elif key not in ('padding', 'return_tensors') and (key, value) not in (
          ('truncation', True), ('truncation', 'longest_first')):
        raise UsageError(f'{path}: processing_kwargs with {key}={value!r} is not supported')
  return limit


def _prompts(config: Mapping, path: Path) -> dict:
  prompts, default = config.get('prompts') or {}, config.get('default_prompt_name') or ''
  if not isinstance(prompts, dict) or not all(
      isinstance(text, str | None) for text in prompts.values()):
    raise UsageError(f'{path}: prompts must map names to texts, got {str(prompts)[:80]}')
  if default and default not in prompts:
    raise UsageError(f'{path}: default_prompt_name={default!r} is not among the prompts '
                     f'{", ".join(prompts)}')
  if config.get('truncate_dim') is not None:
    raise UsageError(f'{path}: truncate_dim={config["truncate_dim"]!r} is not supported; remove it '
                     'and take the first columns of what embed returns')
  return {'prompts': tuple((name, text or '') for name, text in prompts.items()),
          'default_prompt': default}


# -- to sentence-transformers -------------------------------------------------------------------


def _dense_folder(i: int) -> str:
  return f'{i + 2}_Dense'


def rows(c: TransformerConfig) -> list[TensorRow]:
  """The rows of the dense layers; a tensor's name starts with its folder."""
  out = []
  for i, bias in enumerate(c.dense_bias):
    out.append(TensorRow(f'dense_{i}/kernel', f'{_dense_folder(i)}/linear.weight', op=TRANSPOSE))
    if bias:
      out.append(TensorRow(f'dense_{i}/bias', f'{_dense_folder(i)}/linear.bias'))
  return out


def has_modules(c: TransformerConfig, settings) -> bool:
  """True if the export of a model needs modules. settings: the embed section of its config.

  Errors: UsageError for a model that sentence-transformers cannot express.
  """
  if c.classes and c.dense:
    raise UsageError(f'model.dense={c.dense} under a classifier cannot be written for Hugging Face')
  if c.classes or not (settings.modules or c.dense):
    return False
  unknown = [mode for mode in c.pool.split('+') if mode not in POOLS.values()]
  if unknown:
    raise UsageError(f'model.pool={c.pool!r} cannot be written for sentence-transformers, only '
                     f'{", ".join(POOLS.values())}; or set embed.modules to False')
  return True


def write(folder: Path, c: TransformerConfig, settings, params) -> dict[str, TensorReader]:
  """Writes the modules around a model in `folder`; returns readers of the written dense layers.

  Their keys are those of Modules.readers.
  """
  names = {ours: theirs for theirs, ours in POOLS.items()}
  modes = [names[mode] for mode in c.pool.split('+')]
  pooling = {'word_embedding_dimension': c.d_model}
  if modes == [mode for mode in POOLS if mode in modes]:
    pooling |= {flag: mode in modes for mode, flag in FLAGS.items()}
  else:                           # in another order, which only the newer form has
    pooling = {'embedding_dimension': c.d_model, 'pooling_mode': modes}
  pooling['include_prompt'] = settings.pool_prompt
  configs = {'': ('Transformer', None), '1_Pooling': ('Pooling', pooling)}

  acts = {ours: theirs for theirs, ours in ACTS.items()}
  width, readers = c.d_model * len(modes), {}
  tensors = dict(tensor_map.write(rows(c), params))
  for i, (out, act, bias) in enumerate(zip(c.dense, c.dense_acts, c.dense_bias)):
    if act not in acts:
      raise UsageError(f'model.dense_acts has {act!r}, which cannot be written for '
                       f'sentence-transformers; it has {", ".join(acts)}')
    name = acts[act]
    configs[_dense_folder(i)] = ('Dense', {
        'in_features': width, 'out_features': out, 'bias': bias,
        'activation_function': CLASSES.get(name, f'torch.nn.modules.activation.{name}')})
    width = out
  if settings.normalize:
    configs[f'{len(configs)}_Normalize'] = ('Normalize', None)

  for path, (kind, config) in configs.items():
    (folder / path).mkdir(exist_ok=True)
    if config is not None:
      _write_json(folder / path / 'config.json', config)
    if kind == 'Dense':
      own = {name.removeprefix(f'{path}/'): np.asarray(x, np.float32)
             for name, x in tensors.items() if name.startswith(f'{path}/')}
      tensor_files.write_safetensors(
          folder / path, own.items(), {name: (x.shape, x.dtype) for name, x in own.items()})
      readers[f'{path}/'] = tensor_files.open_hf(folder / path)
  _write_json(folder / MODULES, [
      {'idx': i, 'name': str(i), 'path': path, 'type': f'{PACKAGE}models.{kind}'}
      for i, (path, (kind, _)) in enumerate(configs.items())])
  _write_json(folder / LENGTH[0], {'max_seq_length': settings.max_length or None,
                                   'do_lower_case': settings.lowercase})
  if not (folder / CONFIG).exists():       # not copied from the source
    _write_json(folder / CONFIG, {'prompts': {name: text for name, text in settings.prompts},
                                  'default_prompt_name': settings.default_prompt or None})
  return readers


def _write_json(path: Path, value) -> None:
  files.write_text(path, json.dumps(value, indent=2) + '\n')
