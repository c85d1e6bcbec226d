"""Every knob and its default, once. Reading a config touches no device and imports no jax.

A config is a Python file with `get_config(arg='')`; see configs/. On the command line
`--config FILE[:ARG]`, then `--config.optim.lr=3e-3` for any key below.
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
from t5lab.errors import UsageError, did_you_mean
from t5lab.models import families


def base(family: str, **model) -> ConfigDict:
  """The default config of a family row; `model` overrides fields of TransformerConfig."""
  c = ConfigDict()
  c.family = family                  # row of models/families.py that `model` started from
  c.model = ConfigDict({**families.row(family), **_known(model, families.row(family), 'model')})
  c.seed = 0                         # of parameters, data order and dropout
  c.total_steps = 1000

  c.init = i = ConfigDict()          # weights to start from
  i.path = ''                        # a run or a converted checkpoint; '': the seed's
  i.step = 'latest'                  # latest | best | a number
  i.weights = ''                     # ema | raw; '': the average where there is one
  i.optimizer = 'fresh'              # fresh | restore
  i.fresh = ()                       # regexes of our paths that path lacks: a new head
  i.ignore = ()                      # regexes of its paths that we lack

  c.lora = r = ConfigDict()          # adapters on frozen weights of init.path [Hu et al. 2022]
  r.rank = 0                         # 0: off, everything is trained
  r.alpha = 16.                      # the adapters' product times alpha / rank
  r.kernels = ('.*/attn/(q|v)/kernel',)   # regexes of the kernels that get one

  c.data = d = ConfigDict()
  d.mixture = ''                     # a seqio Task or Mixture, or several with commas between
  d.split = 'train'
  d.mixing = x = ConfigDict()        # rates of several, by their examples n: min(n, limit)^(1/T)
  x.temperature, x.limit = 1., 0     # T: 1 is proportional, a large one equal; limit 0: none
  d.files = ConfigDict({'train': '', 'validation': '', 'test': ''})   # own ones: the task 'files'
  d.fields = ConfigDict({'inputs': 'inputs', 'targets': 'targets'})   # columns; inputs '': none
  d.prompt = ''                      # as 'question: {question} context: {context}'; '': inputs
  d.metrics = ()                     # of data/tasks/names.py, as ('squad', 'rouge')
  d.objective = ''                   # for text without inputs, one of data/tasks/names.py
  d.bad_rows = 0.01                  # share of rows that may be skipped; 0: none
  d.modules = ()                     # own modules that register seqio Tasks, as ('my.tasks',)
  d.cache = ''                       # a folder that `t5lab cache` filled; '': all in memory
  d.vocab = 't5lab_2048'             # see data/vocab/__init__.py; 'init': that of init.path
  d.lengths = ConfigDict({'inputs': 128, 'targets': 128})   # tokens, EOS included; inputs 0: none
  d.batch_size = 64                  # rows a step, over all devices and microbatches
  d.pack = True                      # several short examples in a row, kept apart by segment ids
  d.start = True                     # decoder-only: prompts too begin with model.start_id

  c.optim = o = ConfigDict()
  o.name = 'adafactor'               # see training/optim.py
  o.lr = 1e-3
  o.schedule = 'constant'            # constant | rsqrt | cosine | linear | wsd
  o.warmup = 0                       # steps; for rsqrt, the steps at a constant lr
  o.end_lr = 0.                      # where cosine, linear and wsd end, as a fraction of lr
  o.decay_fraction = 0.1             # wsd: the last part of total_steps, which decays
  o.clip = 0.                        # global gradient norm; 0: off
  o.weight_decay = 0.
  o.b1, o.b2, o.eps = 0.9, 0.999, 1e-8   # adamw
  o.microbatches = 1                 # gradient accumulation: the batch in so many parts
  o.ema = 0.                         # decay of the averaged weights; 0: off

  c.loss = l = ConfigDict()
  l.z_loss = 1e-4                    # times log(Z)^2 a token [T5X losses.py]
  l.label_smoothing = 0.
  l.chunks = 1                       # parts of the batch's tokens whose logits exist at once
  l.balance = 0.01                   # of experts' load [Fedus et al. 2022, 2.2]
  l.router_z = 0.001                 # of routers' logits [Zoph et al. 2022, 3.3]

  c.mesh = m = ConfigDict()          # devices an axis; one may be -1: what is left
  m.data, m.fsdp, m.expert = -1, 1, 1    # these share the batch's rows
  m.sequence, m.model = 1, 1         # these share each row: its positions, its heads and widths
  m.dcn_data, m.dcn_fsdp = 1, 1      # slices, joined by the data centre's network
  c.rules = 'dp'                     # row of parallel/sharding.py: dp fsdp tp fsdp_tp sp ep

  c.guard = u = ConfigDict()         # against steps that spoil a run, see training/guards.py
  u.policy = 'stop'                  # at a loss or gradient that is no number, or a spike:
                                     # stop | skip the batch | rewind to the last checkpoint
  u.patience = 3                     # bad steps in a row, or rewinds, that end a run all the same
  u.spike = 0.                       # deviations from the running mean that are a spike; 0: none
  u.watchdog = 60.                   # seconds without a step that end a run, at least; 0: never

  c.plan = n = ConfigDict()          # budgets of `t5lab check`, a chip and step; 0: none
  n.topology = ''                    # the slice that the run is for, as v5e:4x4
  n.max_hbm_gb = 0.                  # GiB; 0: what the chip has
  n.max_collective_gb = 0.           # GiB that a chip sends
  n.float32 = ()                     # regexes of op names that may multiply in float32 under bf16

  c.log = g = ConfigDict()
  g.every = 20                       # steps between rows of metrics.jsonl
  c.checkpoint = k = ConfigDict()
  k.every = 500                      # steps; the last step is always saved
  k.keep = 3                         # newest ones kept, and the best
  k.best = ''                        # kept too: the best by a metric, as 'ha_ende/ema/bleu'

  c.eval = e = ConfigDict()
  e.mixture = ''                     # '': that of data
  e.split = 'validation'
  e.every = 0                        # steps; 0: only after the last
  e.examples = 0                     # first so many of the split; 0: all
  e.batch_size = 64
  e.max_length = 0                   # generated tokens; 0: data.lengths.targets
  e.samples = 5                      # source, reference, prediction triples shown
  e.temperature = 0.                 # 0: greedy
  e.beams = 1                        # over 1: beam search
  e.alpha = 0.6                      # its length penalty [Wu et al. 2016]
  e.forced_first = -1                # token that every output begins with (BART); -1: none
  c.lock()
  return c


def tiny(c: ConfigDict) -> ConfigDict:
  """The same experiment for seconds on one CPU: two layers, 32 wide, ten steps."""
  m = c.model
  m.update(d_model=32, d_ff=64, n_heads=2, n_kv_heads=min(1, m.n_kv_heads), d_head=16,
           dec_layers=min(2, m.dec_layers), enc_layers=min(2, m.enc_layers),
           experts=min(4, m.experts), moe_every=min(2, m.moe_every), dtype='float32')
  c.init.path, c.lora.rank = '', 0       # of other sizes
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
  fields = c.model.to_dict()
  return families.TransformerConfig(**{
      k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def of_model(model: families.TransformerConfig, vocab: str = '') -> ConfigDict:
  """The config of weights that came from elsewhere: a model and a vocabulary, no task.

  Its family is the row with these fields, or 'converted'.
  """
  fields = dataclasses.asdict(model)
  free = ('dropout', 'dtype', 'remat', 'init_std', 'max_length', 'pool')
  same = lambda name: all(value == fields[k] for k, value in families.row(name).items()
                          if k not in free)
  c = base(next((name for name in families.ROWS if same(name)), 'tiny'))
  c.family = c.family if c.family != 'tiny' else 'converted'
  c.model.update(fields)
  c.data.vocab = vocab
  length = min(model.max_length or 512, 512)
  c.data.lengths.inputs = length if model.enc_layers else 0
  c.data.lengths.targets = length if model.dec_layers else 0
  c.eval.max_length = min(128, length)
  return c


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
  """Sets what a command line gives. Files given there are the data, whatever mixture c names."""
  for key, value in overrides.items():
    override(c, key, value)
  if any(key.startswith('data.files.') for key in overrides):
    if 'data.mixture' not in overrides:
      c.data.mixture = own_files.NAME
    if 'eval.mixture' not in overrides:
      c.eval.mixture = ''


def files(c: ConfigDict) -> own_files.OwnFiles | None:
  """The task 'files' of a config that names some."""
  named = {split: patterns for split, patterns in c.data.files.items() if patterns}
  if not named:
    return None
  return own_files.OwnFiles(named, c.data.fields.to_dict(), c.data.prompt, c.data.bad_rows,
                            tuple(c.data.metrics), c.data.objective)


def override(c: ConfigDict, key: str, text: str) -> None:
  """Sets c.<key> from text, which is read as the type of the present value."""
  *parents, leaf = key.split('.')
  node, at = c, ''
  for name in [*parents, leaf]:
    if not isinstance(node, ConfigDict) or name not in node:
      known = list(node) if isinstance(node, ConfigDict) else []
      raise UsageError(f'unknown config key {key!r}.{did_you_mean(name, known)}'
                       + (f' (in {at!r})' if at else ''))
    at = f'{at}.{name}'.strip('.')
    if name != leaf or at != key:
      node = node[name]
  now = node[leaf]
  if isinstance(now, ConfigDict):
    raise UsageError(f'{key!r} is a section; set one of its keys: {", ".join(now)}')
  node[leaf] = _parse(key, text, now)


def _parse(key, text, now):
  kind = type(now)
  wrong = UsageError(f'config key {key!r} takes {kind.__name__} (now {now!r}), not {text!r}')
  if kind is str:
    return text
  if kind is bool:
    values = {'true': True, '1': True, 'false': False, '0': False}
    if text.lower() not in values:
      raise wrong
    return values[text.lower()]
  if kind is tuple and re.fullmatch(r'[\w.:-]+(,[\w.:-]+)*,?', text) and not text[0].isdigit():
    return tuple(part for part in text.split(',') if part)              # squad,rouge
  try:
    value = ast.literal_eval(text)
    if kind is int and isinstance(value, float) and value.is_integer():
      value = int(value)                       # 1e6 steps
    if kind is float and type(value) is int:
      value = float(value)
    if kind is tuple:
      value = (value,) if isinstance(value, str) else tuple(value)
  except (ValueError, SyntaxError, TypeError) as e:
    raise wrong from e
  if type(value) is not kind:
    raise wrong
  return value


def check(c: ConfigDict) -> None:
  """The rules that need no data and no device. UsageError names the value and the limit."""
  expected = base('tiny')
  _known(keys(c), keys(expected), '')
  missing = sorted(set(keys(expected)) - set(keys(c)))
  if missing:
    raise UsageError(f'the config lacks {", ".join(missing)}: a section was replaced by a dict')
  for key in ('total_steps', 'data.batch_size', 'optim.microbatches', 'loss.chunks', 'log.every',
              'checkpoint.every', 'checkpoint.keep', 'eval.batch_size', 'eval.beams',
              *['data.lengths.targets'] * bool(c.model.dec_layers)):
    if keys(c)[key] < 1:
      raise UsageError(f'{key}={keys(c)[key]}: it must be 1 or more')
  if c.data.batch_size % c.optim.microbatches:
    raise UsageError(f'data.batch_size={c.data.batch_size} is not a multiple of '
                     f'optim.microbatches={c.optim.microbatches}')
  if not 0 <= c.optim.ema < 1:
    raise UsageError(f'optim.ema={c.optim.ema}: a decay in [0, 1), as 0.999')
  if bool(c.model.enc_layers) != bool(c.data.lengths.inputs) and c.model.enc_layers:
    raise UsageError(f'data.lengths.inputs={c.data.lengths.inputs}, but the model has '
                     f'{c.model.enc_layers} encoder layers; give the inputs a length')
  model = model_config(c)
  if model.positions == 'learned':
    for feature, layers in (('inputs', model.enc_layers), ('targets', model.dec_layers)):
      length = c.data.lengths[feature] if layers else 0
      if model.kind == 'decoder':
        length += c.data.lengths.inputs
      if length > model.max_length:
        raise UsageError(f'data.lengths.{feature}={length}: the table of learned positions has '
                         f'model.max_length={model.max_length} rows')
  if c.init.optimizer not in ('fresh', 'restore'):
    raise UsageError(f"init.optimizer={c.init.optimizer!r}: 'fresh' or 'restore'")
  if c.lora.rank < 0 or c.lora.rank and not c.lora.kernels:
    raise UsageError(f'lora.rank={c.lora.rank}, lora.kernels={tuple(c.lora.kernels)}: a rank of 1 '
                     'or more and the kernels to adapt, or rank 0')
  if c.lora.rank and not c.init.path:
    raise UsageError('lora.rank adapts frozen weights: name them with init.path')


def check_trainable(c: ConfigDict) -> None:
  """`check`, and that there is something to train on."""
  check(c)
  if not c.data.mixture:
    raise UsageError('data.mixture is empty: name a seqio Task or Mixture, as ha_ende, or your own '
                     'files with data.files.train')
  if not (c.model.dec_layers or c.model.classes or c.model.mlm_head):
    raise UsageError('an encoder-only model is trained as a classifier (set model.classes and '
                     'data.lengths.targets=1, as configs/minilm_match.py does) or to fill masks '
                     '(model.mlm_head, and a task such as books_bert)')
  if own := files(c):
    own.check()
  if c.data.mixture == own_files.NAME:
    evaluated = [c.eval.split] * (c.eval.mixture in ('', own_files.NAME))
    for split in (c.data.split, *evaluated):
      if not c.data.files.get(split):
        raise UsageError(f'data.files.{split} is empty: name the files of the {split} split')
  if not 0 <= c.data.bad_rows <= 1 or c.data.mixing.temperature <= 0 or c.data.mixing.limit < 0:
    raise UsageError(f'data.bad_rows={c.data.bad_rows}, data.mixing={c.data.mixing.to_dict()}: a '
                     'share in [0, 1], a temperature over 0, a limit of 0 or more')


def mixtures(c: ConfigDict) -> set[str]:
  """The names of the tasks and mixtures that c trains on and evaluates."""
  return {*c.data.mixture.split(','), *filter(None, c.eval.mixture.split(','))}


def embedded(name: str) -> bool:
  """Whether the package carries the data of this task or mixture of ours."""
  return name.startswith(task_names.EMBEDDED)


def check_names(c: ConfigDict) -> None:
  """UsageError for a task or mixture that is none, told before TensorFlow is imported."""
  if c.data.modules or 'seqio' in sys.modules:   # tasks of the user's own may be among seqio's
    return
  for name in mixtures(c):
    if name != own_files.NAME and name not in task_names.NAMES:
      raise UsageError(f'no task or mixture {name!r}.{did_you_mean(name, task_names.NAMES)}')


def keys(c: ConfigDict) -> dict:
  """{'optim.lr': 0.001, …}."""
  flat = {}
  for k, v in c.items():
    flat.update({f'{k}.{q}': w for q, w in keys(v).items()} if isinstance(v, ConfigDict)
                else {k: v})
  return flat


def to_dict(c: ConfigDict) -> dict:
  """Plain JSON values: what is saved beside checkpoints and alone rebuilds the model."""
  return json.loads(json.dumps(c.to_dict()))


def digest(c: ConfigDict) -> str:
  """SHA-256 of `to_dict`."""
  return hashlib.sha256(json.dumps(to_dict(c), sort_keys=True).encode()).hexdigest()


def from_dict(d: dict) -> ConfigDict:
  """A saved config. Keys that are newer than the save take their defaults, unknown ones raise."""
  c = base('tiny')
  def fill(node, values, at):
    for k, v in _known(values, node, at).items():
      if isinstance(node[k], ConfigDict):
        fill(node[k], v, f'{at}.{k}'.strip('.'))
      else:
        node[k] = tuple(v) if isinstance(v, list) else v
  fill(c, d, '')
  check(c)
  return c


def _known(given, known, at):
  for k in given:
    if k not in known:
      raise UsageError(f'unknown config key {(at + "." + k).strip(".")!r}.{did_you_mean(k, known)}')
  return given
