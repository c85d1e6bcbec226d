"""Every configuration key with its default. Reading a config touches no device and imports no jax.

A config is a Python file with `get_config(arg='')`; see configs/. On the command line it is
`--config FILE[:ARG]`, and any key below can be set with `--config.optim.lr=3e-3`.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
import sys

from ml_collections import ConfigDict

from t5lab.data.tasks import names as task_names
from t5lab.data.tasks import own_files
from t5lab.decoding import options
from t5lab.errors import UsageError, did_you_mean
from t5lab.models import families


def base(family: str, **model) -> ConfigDict:
  """The default config of a row of models/families.py; `model` overrides its fields."""
  c = ConfigDict()
  c.family = family                  # the row of models/families.py that `model` started from
  c.model = ConfigDict({**families.row(family), **_known(model, families.row(family), 'model')})
  c.seed = 0                         # for parameters, data order and dropout
  c.total_steps = 1000

  c.init = i = ConfigDict()          # weights to start from
  i.path = ''                        # a run or a converted checkpoint; '': random weights
  i.step = 'latest'                  # latest | best | a step
  i.weights = ''                     # ema | raw; '': the average if there is one
  i.optimizer = 'fresh'              # fresh | restore
  i.fresh = ()                       # regexes of parameters that init.path lacks: a new head
  i.ignore = ()                      # regexes of parameters of init.path to drop

  c.lora = r = ConfigDict()          # adapters on frozen weights of init.path [Hu et al. 2022]
  r.rank = 0                         # 0: no adapters, all weights are trained
  r.alpha = 16.                      # the product of the adapters is scaled by alpha / rank
  r.kernels = ('.*/attn/(q|v)/kernel',)   # regexes of the kernels to adapt

  c.data = d = ConfigDict()
  d.mixture = ''                     # a seqio Task or Mixture, or several separated by commas
  d.split = 'train'
  d.mixing = x = ConfigDict()        # rates of several tasks: min(examples, limit)^(1/temperature)
  x.temperature, x.limit = 1., 0     # 1: proportional, large: equal; limit 0: no limit
  d.files = ConfigDict({'train': '', 'validation': '', 'test': ''})   # your files: task 'files'
  d.fields = ConfigDict({'inputs': 'inputs', 'targets': 'targets'})   # columns; inputs '': none
  d.prompt = ''                      # 'question: {question} context: {context}'; '': the inputs
  d.metrics = ()                     # names in data/tasks/names.py: ('squad', 'rouge')
  d.objective = ''                   # for text without inputs: a name in data/tasks/names.py
  d.bad_rows = 0.01                  # fraction of records that may be skipped
  d.modules = ()                     # your modules that register seqio Tasks: ('my.tasks',)
  d.cache = ''                       # a folder filled by `t5lab cache`; '': examples in memory
  d.vocab = 't5lab_2048'             # see data/vocab/__init__.py; 'init': that of init.path
  d.lengths = ConfigDict({'inputs': 128, 'targets': 128})   # tokens with EOS; inputs 0: no inputs
  d.batch_size = 64                  # rows per step, over all devices and microbatches
  d.pack = True                      # several examples in a row, separated by segment ids
  d.start = True                     # decoder-only: prompts too start with model.start_id

  c.optim = o = ConfigDict()
  o.name = 'adafactor'               # see training/optim.py
  o.lr = 1e-3
  o.schedule = 'constant'            # constant | rsqrt | cosine | linear | wsd
  o.warmup = 0                       # steps; for rsqrt, the steps at constant lr
  o.end_lr = 0.                      # final value of cosine, linear and wsd, as a fraction of lr
  o.decay_fraction = 0.1             # wsd: the fraction of total_steps that decays
  o.clip = 0.                        # largest global gradient norm; 0: no clipping
  o.weight_decay = 0.
  o.b1, o.b2, o.eps = 0.9, 0.999, 1e-8   # for adamw
  o.microbatches = 1                 # gradient accumulation: number of parts of a batch
  o.ema = 0.                         # decay of the averaged weights; 0: off

  c.loss = l = ConfigDict()
  l.z_loss = 1e-4                    # weight of log(Z)^2 per token [T5X losses.py]
  l.label_smoothing = 0.
  l.chunks = 1                       # number of parts in which logits are computed, to save memory
  l.balance = 0.01                   # weight of the experts' load loss [Fedus et al. 2022, 2.2]
  l.router_z = 0.001                 # weight of the router z-loss [Zoph et al. 2022, 3.3]

  c.mesh = m = ConfigDict()          # number of devices per axis; one may be -1 (the rest)
  m.data, m.fsdp, m.expert = -1, 1, 1    # these axes divide the rows of a batch
  m.sequence, m.model = 1, 1         # these divide a row: its positions, its heads and widths
  m.dcn_data, m.dcn_fsdp = 1, 1      # slices, connected by the data center network
  c.rules = 'dp'                     # rule set in parallel/sharding.py: dp fsdp tp fsdp_tp sp ep

  c.guard = u = ConfigDict()         # against steps that spoil a run, see training/guards.py
  u.policy = 'stop'                  # at a non-finite loss or gradient, or a spike:
                                     # stop | skip the batch | rewind to the last checkpoint
  u.patience = 3                     # consecutive bad steps, or rewinds, that end the run anyway
  u.spike = 0.                       # standard deviations above the mean that are a spike; 0: off
  u.watchdog = 60.                   # least number of seconds without a step that end a run; 0: off

  c.plan = n = ConfigDict()          # budgets of `t5lab check`, per chip and step; 0: no limit
  n.topology = ''                    # the slice to plan for: v5e:4x4
  n.max_hbm_gb = 0.                  # GiB; 0: the memory of the chip
  n.max_collective_gb = 0.           # GiB that a chip may send
  n.float32 = ()                     # regexes of ops that may multiply in float32 under bfloat16

  c.log = g = ConfigDict()
  g.every = 20                       # steps between rows of metrics.jsonl
  g.profile = 0                      # step from which 3 steps are profiled, see runs/profiler.py
  c.checkpoint = k = ConfigDict()
  k.every = 500                      # steps; the last step is always saved
  k.keep = 3                         # how many of the newest checkpoints are kept
  k.best = ''                        # the metric whose best checkpoint is kept: 'ha_ende/ema/bleu'

  c.eval = e = ConfigDict()
  e.mixture = ''                     # '': data.mixture
  e.split = 'validation'
  e.every = 0                        # steps; 0: only after the last
  e.examples = 0                     # number of examples, from the start of the split; 0: all
  e.batch_size = 64
  e.max_length = 0                   # tokens to generate at most; 0: data.lengths.targets
  e.samples = 5                      # predictions shown with source and reference
  e.labels = ()                      # names of a classifier's classes, in order
  e.problem_type = ''                # of a classifier, see PROBLEM_TYPES; '': a single label
  e.update(options.defaults())       # beams, alpha, temperature, …: see decoding/options.py

  c.embed = v = ConfigDict()         # how Lab.embed reads texts
  v.max_length = 0                   # tokens of a text with its special ones; 0: all of them
  v.normalize = True                 # vectors of length 1
  v.prompts = ()                     # (name, text) pairs: texts that may be put before an input
  v.default_prompt = ''              # the name of the one before every input; '': none
  v.pool_prompt = True               # False: the tokens of the prompt are not pooled
  v.lowercase, v.modules = False, False    # modules: `convert --to hf` writes modules.json
  c.lock()
  return c


def tiny(c: ConfigDict) -> ConfigDict:
  """The same experiment in a few seconds on one CPU: two layers of width 32, ten steps."""
  m = c.model
  m.update(d_model=32, d_ff=64, n_heads=2, n_kv_heads=min(1, m.n_kv_heads), d_head=16,
           dec_layers=min(2, m.dec_layers), enc_layers=min(2, m.enc_layers),
           experts=min(4, m.experts), moe_every=min(2, m.moe_every), dtype='float32')
  c.init.path, c.lora.rank = '', 0       # those weights have other sizes
  if c.data.vocab == 'init':
    c.data.vocab, m.vocab_size = 'byte', 384
  c.total_steps = 10
  c.data.batch_size = 8
  for feature, length in c.data.lengths.items():
    c.data.lengths[feature] = min(32, length)
  c.optim.warmup = min(c.optim.warmup, 2)
  c.log.every, c.checkpoint.every, c.eval.every = 1, 5, 0
  c.eval.examples, c.eval.batch_size, c.eval.max_length = 8, 8, 8
  return c


def model_config(c: ConfigDict) -> families.TransformerConfig:
  """The `model` section as a TransformerConfig."""
  fields = c.model.to_dict()
  return families.TransformerConfig(**{
      k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def from_model(model: families.TransformerConfig, vocab: str = '') -> ConfigDict:
  """The config of converted weights: a model and a vocabulary, without a task.

  Its family is the row of models/families.py that has these fields, or else 'converted'.
  """
  fields = dataclasses.asdict(model)
  free = ('dropout', 'dtype', 'remat', 'init_std', 'max_length', 'pool', 'dense', 'dense_acts',
          'dense_bias')
  is_row = lambda row: all(row[field] == fields[field] for field in row if field not in free)
  family = next((name for name in families.ROWS if is_row(families.row(name))), 'tiny')
  c = base(family)
  c.family = 'converted' if family == 'tiny' else family
  c.model.update(fields)
  c.data.vocab = vocab
  length = min(model.max_length or 512, 512)
  c.data.lengths.inputs = length if model.enc_layers else 0
  c.data.lengths.targets = length if model.dec_layers else 0
  c.eval.max_length = usual_output_length(c)
  return c


def usual_output_length(c: ConfigDict) -> int:
  """The eval.max_length of converted weights that came without one."""
  return min(128, c.data.lengths.targets)


# -- reading ------------------------------------------------------------------------------------


def load(file_and_arg: str, overrides: dict[str, str] | None = None) -> ConfigDict:
  """'configs/x.py:arg' and {'optim.lr': '3e-3'} -> a locked config."""
  path, arg = file_and_arg, ''
  if ':' in path and not pathlib.Path(path).is_file():
    path, _, arg = path.rpartition(':')
  if not pathlib.Path(path).is_file():
    near = sorted(str(p) for p in pathlib.Path(path).parent.glob('*.py'))
    raise UsageError(f'no config file {path!r}.{did_you_mean(path, near) if near else ""}')
  spec = importlib.util.spec_from_file_location('t5lab_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    c = module.get_config(arg)
  except (AttributeError, KeyError) as e:      # a locked ConfigDict refuses a key it does not have
    raise UsageError(f'{path}: {" ".join(str(e).split())}') from e
  apply(c, overrides or {})
  check_trainable(c)
  return c


def apply(c: ConfigDict, overrides: dict[str, str]) -> None:
  """Sets the keys of a command line. Files given there replace the mixture that `c` names."""
  for key, value in overrides.items():
    override(c, key, value)
  if any(key.startswith('data.files.') for key in overrides):
    if 'data.mixture' not in overrides:
      c.data.mixture = own_files.NAME
    if 'eval.mixture' not in overrides:
      c.eval.mixture = ''


def files(c: ConfigDict) -> own_files.OwnFiles | None:
  """The task 'files', or None if the config names no files."""
  patterns = {split: pattern for split, pattern in c.data.files.items() if pattern}
  if not patterns:
    return None
  return own_files.OwnFiles(patterns, c.data.fields.to_dict(), c.data.prompt, c.data.bad_rows,
                            tuple(c.data.metrics), c.data.objective)


def override(c: ConfigDict, key: str, text: str) -> None:
  """Sets the key 'optim.lr' from text, which is parsed as the type of the present value."""
  present, path = c, []
  for name in key.split('.'):
    section = present
    if not isinstance(section, ConfigDict) or name not in section:
      known = list(section) if isinstance(section, ConfigDict) else []
      where = f" (in {'.'.join(path)!r})" if path else ''
      raise UsageError(f'unknown config key {key!r}.{did_you_mean(name, known)}{where}')
    path.append(name)
    present = section[name]
  if isinstance(present, ConfigDict):
    raise UsageError(f'{key!r} is a section; set one of its keys: {", ".join(present)}')
  section[name] = _parse(key, text, present)


def _parse(key, text, present):
  kind = type(present)
  error = UsageError(f'config key {key!r} takes {kind.__name__} (now {present!r}), not {text!r}')
  if kind is str:
    return text
  if kind is bool:
    values = {'true': True, '1': True, 'false': False, '0': False}
    if text.lower() not in values:
      raise error
    return values[text.lower()]
  if kind is tuple and re.fullmatch(r'[\w.:-]+(,[\w.:-]+)*,?', text) and not text[0].isdigit():
    return tuple(part for part in text.split(',') if part)              # squad,rouge

  # Numbers and other tuples are Python literals.
  try:
    value = ast.literal_eval(text)
    if kind is int and isinstance(value, float) and value.is_integer():
      value = int(value)                       # 1e6 steps
    if kind is float and type(value) is int:
      value = float(value)
    if kind is tuple:
      value = (value,) if isinstance(value, str) else tuple(value)
  except (ValueError, SyntaxError, TypeError) as e:
    raise error from e
  if type(value) is not kind:
    raise error
  return value


# As in the config.json of Hugging Face. `classify` gives a softmax; a sigmoid for each class if a
# text may have several labels; the bare score for a regression or a single class.
PROBLEM_TYPES = ('', 'single_label_classification', 'multi_label_classification', 'regression')


def check_classes(c: ConfigDict) -> None:
  """UsageError for an unknown eval.problem_type, or labels for another number of classes."""
  kind = c.eval.problem_type
  if kind not in PROBLEM_TYPES:
    raise UsageError(f'eval.problem_type={kind!r} is unknown.{did_you_mean(kind, PROBLEM_TYPES)}')
  if len(c.eval.labels) not in (0, c.model.classes):
    raise UsageError(f'eval.labels names {len(c.eval.labels)} classes, but model.classes='
                     f'{c.model.classes}')


def check_embed(c: ConfigDict) -> None:
  """UsageError for a negative length, malformed prompts or an unknown default one."""
  e = c.embed
  if e.max_length < 0:
    raise UsageError(f'embed.max_length must be 0 (no limit) or more, got {e.max_length}')
  for pair in e.prompts:
    if type(pair) not in (list, tuple) or [*map(type, pair)] != [str, str]:
      raise UsageError(f'embed.prompts must be pairs of a name and a text, got {pair!r}')
  if e.default_prompt not in {'', *dict(e.prompts)}:
    raise UsageError(f'embed.default_prompt={e.default_prompt!r} is not a name in embed.prompts')


def check(c: ConfigDict) -> None:
  """Checks what can be checked without data or devices. UsageError names the value and the limit.
  """
  # The keys.
  flat, expected = keys(c), keys(base('tiny'))
  _known(flat, expected, '')
  missing = sorted(set(expected) - set(flat))
  if missing:
    raise UsageError(f'the config lacks {", ".join(missing)}: a section was replaced by a dict')

  # Numbers.
  counts = ['total_steps', 'data.batch_size', 'optim.microbatches', 'loss.chunks', 'log.every',
            'checkpoint.every', 'checkpoint.keep', 'eval.batch_size', 'eval.beams']
  if c.model.dec_layers:
    counts.append('data.lengths.targets')
  for key in counts:
    if flat[key] < 1:
      raise UsageError(f'{key} must be 1 or more, got {flat[key]}')
  if c.data.batch_size % c.optim.microbatches:
    raise UsageError(f'data.batch_size={c.data.batch_size} is not a multiple of '
                     f'optim.microbatches={c.optim.microbatches}')
  if not 0 <= c.optim.ema < 1:
    raise UsageError(f'optim.ema must be a decay in [0, 1), for example 0.999, got {c.optim.ema}')

  # Lengths, and learned positions that end before them.
  if c.model.enc_layers and not c.data.lengths.inputs:
    raise UsageError(f'data.lengths.inputs={c.data.lengths.inputs}, but the model has '
                     f'{c.model.enc_layers} encoder layers; give the inputs a length')
  model = model_config(c)
  if model.positions == 'learned':
    for feature, layers in (('inputs', model.enc_layers), ('targets', model.dec_layers)):
      length = c.data.lengths[feature] if layers else 0
      if model.kind == 'decoder':              # reads the inputs too
        length += c.data.lengths.inputs
      if length > model.max_length:
        raise UsageError(f'data.lengths.{feature}={length}, but the model has only '
                         f'model.max_length={model.max_length} learned positions')

  check_classes(c)
  options.Decoding(length=1, **{name: c.eval[name] for name in options.defaults()})
  check_embed(c)

  # Initial weights and adapters.
  if c.init.optimizer not in ('fresh', 'restore'):
    raise UsageError(f"init.optimizer must be 'fresh' or 'restore', got {c.init.optimizer!r}")
  if c.lora.rank < 0 or (c.lora.rank and not c.lora.kernels):
    raise UsageError(f'lora.rank={c.lora.rank}, lora.kernels={tuple(c.lora.kernels)}: adapters '
                     'need a rank of 1 or more and kernels; rank 0 turns them off')
  if c.lora.rank and not c.init.path:
    raise UsageError('lora.rank adapts frozen weights: name them with init.path')


def check_trainable(c: ConfigDict) -> None:
  """Checks the config, and that there is something to train on."""
  check(c)
  if not c.data.mixture:
    raise UsageError('data.mixture is empty: name a seqio Task or Mixture, for example ha_ende, or '
                     'your own files with data.files.train')
  if not (c.model.dec_layers or c.model.classes or c.model.mlm_head):
    raise UsageError('an encoder-only model is trained as a classifier (set model.classes and '
                     'data.lengths.targets=1, see configs/minilm_match.py) or to fill masks '
                     '(model.mlm_head, and a task such as books_bert)')

  if c.model.classes and c.model.class_of != 'input':
    raise UsageError(f'model.class_of={c.model.class_of}: classifiers of tokens and of spans are '
                     'converted and used, but not trained; set model.class_of=input')
  # The files of every split that is read.
  if own := files(c):
    own.check()
  if c.data.mixture == own_files.NAME:
    splits = [c.data.split]
    if c.eval.mixture in ('', own_files.NAME):
      splits.append(c.eval.split)
    for split in splits:
      if not c.data.files.get(split):
        raise UsageError(f'data.files.{split} is empty: name the files of the {split} split')

  if not 0 <= c.data.bad_rows <= 1:
    raise UsageError(f'data.bad_rows must be a fraction between 0 and 1, got {c.data.bad_rows}')
  if c.data.mixing.temperature <= 0:
    raise UsageError('data.mixing.temperature must be greater than 0, got '
                     f'{c.data.mixing.temperature}')
  if c.data.mixing.limit < 0:
    raise UsageError(f'data.mixing.limit must be 0 (no limit) or more, got {c.data.mixing.limit}')


def mixtures(c: ConfigDict) -> set[str]:
  """The names of the tasks and mixtures that `c` trains on and evaluates."""
  return {*c.data.mixture.split(','), *filter(None, c.eval.mixture.split(','))}


def is_embedded(name: str) -> bool:
  """True if the package contains the data of this task or mixture."""
  return name in task_names.EMBEDDED


def check_names(c: ConfigDict) -> None:
  """UsageError for an unknown task or mixture, before TensorFlow is imported."""
  if c.data.modules or 'seqio' in sys.modules:   # the user's own tasks may be among seqio's
    return
  for name in mixtures(c):
    if name != own_files.NAME and name not in task_names.NAMES:
      raise UsageError(f'no task or mixture {name!r}.{did_you_mean(name, task_names.NAMES)}')


def keys(c: ConfigDict) -> dict:
  """All keys and values: {'optim.lr': 0.001, …}."""
  flat = {}
  for key, value in c.items():
    if isinstance(value, ConfigDict):
      flat.update({f'{key}.{inner}': leaf for inner, leaf in keys(value).items()})
    else:
      flat[key] = value
  return flat


def to_dict(c: ConfigDict) -> dict:
  """Plain JSON values. Saved beside the checkpoints, they are enough to rebuild the model."""
  return json.loads(json.dumps(c.to_dict()))


def digest(c: ConfigDict) -> str:
  """The SHA-256 of `to_dict`."""
  return hashlib.sha256(json.dumps(to_dict(c), sort_keys=True).encode()).hexdigest()


def from_dict(d: dict) -> ConfigDict:
  """A saved config. Keys newer than the save take their defaults; unknown keys are a UsageError."""
  c = base('tiny')

  def fill(section, values, path):
    for key, value in _known(values, section, path).items():
      if isinstance(section[key], ConfigDict):
        fill(section[key], value, f'{path}.{key}'.strip('.'))
      else:
        section[key] = tuple(value) if isinstance(value, list) else value

  fill(c, d, '')
  check(c)
  return c


def _known(given, known, path):
  for key in given:
    if key not in known:
      full = f'{path}.{key}'.strip('.')
      raise UsageError(f'unknown config key {full!r}.{did_you_mean(key, known)}')
  return given
