"""Weights on disk -> arrays on a mesh: of a run, of a converted checkpoint, or to start a run from.

Both are a directory with config.json, checkpoints/ and, where it is not an embedded one, the
vocabulary's files in vocabulary/. Arrays go straight to their devices, whatever mesh wrote them.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
from pathlib import Path
import re

import flax.linen as nn
import jax

from t5lab import config as configs
from t5lab import trees
from t5lab.data.batches import features
from t5lab.errors import CheckpointError, UsageError
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.runs import manifests, rundir
from t5lab.runs.checkpoint import Checkpoints
from t5lab.training import lora, steps

WEIGHTS = ('ema', 'raw')
VOCABULARY = 'vocabulary'      # the folder of a run's own copy


def read_config(path):
  """The config of a run or converted checkpoint; its vocabulary is the copy that lies there."""
  c = configs.from_dict(rundir.read_config(path))
  c.data.vocab = own_vocabulary(path, c.data.vocab)
  return c


def own_vocabulary(path, spec: str) -> str:
  """The spec of the copy in path/vocabulary/, or `spec` where there is none."""
  # of a .gguf its tokenizer alone was copied, as the file that it amounts to
  names = ('tokenizer.json', 'tokenizer.model') if spec.endswith('.gguf') else (Path(spec).name,)
  found = [mine for name in names if (mine := Path(path) / VOCABULARY / name).is_file()]
  return str(found[0]) if spec and found else spec


def batch_shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  """The model features of one row, as shapes: enough to build parameters."""
  model = configs.model_config(config)
  form = 'classes' if model.classes else 'nsp' if model.nsp else 'mlm'      # where it is an encoder
  row = features.build_row([], config.data.lengths.to_dict(), kind=model.kind, form=form)
  return {k: jax.ShapeDtypeStruct((1, *v.shape), v.dtype) for k, v in row.items()}


def boxed_params(config):
  """Abstract parameters of the config's model, with their logical axes."""
  return steps.abstract_params(Transformer(configs.model_config(config)), batch_shapes(config))[0]


def abstract_params(model):
  """Parameters of a TransformerConfig as shapes."""
  return nn.unbox(boxed_params(configs.of_model(model)))


def placed(boxed, mesh, rules: str):
  """Boxed abstract arrays -> the same as shapes with shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      nn.unbox(boxed), sharding.shardings(boxed, mesh, rules))


def open_checkpoints(config, path, log=functools.partial(print, flush=True)) -> Checkpoints:
  k = config.checkpoint
  return Checkpoints(Path(path) / 'checkpoints', keep=k.keep, best_metric=k.best,
                     best_mode='min' if k.best.endswith('loss') else 'max', log=log)


def choose_step(checkpoints: Checkpoints, step: str | int) -> int | None:
  """'latest' -> None (the newest that verifies), 'best' -> its number, N -> N."""
  if step == 'latest':
    return None
  if step == 'best':
    best = checkpoints.best_step()
    if best is None:
      raise UsageError('no checkpoint has an evaluation of checkpoint.best='
                       f'{checkpoints.best_metric!r}; use --step latest')
    return best
  try:
    return int(step)
  except ValueError:
    raise UsageError(f'step {step!r}: a number, latest or best') from None


@dataclasses.dataclass(frozen=True)
class Loaded:
  """params: placed arrays; step, weights ('ema' | 'raw') and the manifest's sha256 say which."""
  params: dict
  step: int
  weights: str
  sha256: str


def load(path, step: str | int = 'latest', weights: str | None = None, *, config=None, mesh=None,
         ) -> Loaded:
  """The parameters of a run or converted checkpoint; adapters are merged into their base.

  weights: 'ema' or 'raw'; None is the average where the run keeps one. config: instead of the saved
  one. CheckpointError if no checkpoint verifies.
  """
  path = Path(path)
  config = config or read_config(path)
  mesh = mesh or sharding.make_mesh(**config.mesh.to_dict())
  weights, part = _which(weights, config, f'weights={weights!r}: {path}')
  boxed = boxed_params(config)
  base, wanted = None, boxed
  if config.lora.rank:
    base = load_base(config, boxed, mesh)
    wanted = jax.eval_shape(lambda: lora.init(boxed, config.lora.kernels, config.lora.rank, 0))
  checkpoints = open_checkpoints(config, path)
  found = checkpoints.restore({part: placed(wanted, mesh, config.rules)},
                              choose_step(checkpoints, step), only=(part,))
  if found is None:
    raise CheckpointError(f'{path} has no checkpoint yet; train it with `t5lab train`')
  state, saved = found
  params = state[part]
  if base is not None:
    check_base(base, saved.meta, config, path)
    params = lora.merge(base.params, params, lora_scale(config))
  return Loaded(params, saved.step, weights, _digest(checkpoints, saved.step))


def _which(weights: str | None, config, what: str) -> tuple[str, str]:
  """('ema' or 'raw', the part of a state that it is); None or '' is the average if there is one."""
  weights = weights or ('ema' if config.optim.ema else 'raw')
  if weights not in WEIGHTS or (weights == 'ema' and not config.optim.ema):
    raise UsageError(f'{what} has ' + (
        ' and '.join(WEIGHTS) if config.optim.ema else 'raw only (optim.ema=0)'))
  return weights, 'ema' if weights == 'ema' else 'params'


def check_base(base: Loaded, meta: dict, config, path) -> None:
  """CheckpointError if the adapters of a checkpoint in path were made for other weights.

  meta: that checkpoint's.
  """
  made_with = meta.get('init', {}).get('sha256')
  if made_with != base.sha256:
    raise CheckpointError(f'{path} holds adapters of other weights than {config.init.path} has '
                          f'now (manifest {str(made_with)[:12]}, now {base.sha256[:12]})')


def lora_scale(config) -> float:
  return config.lora.alpha / config.lora.rank if config.lora.rank else 1.


def load_base(config, boxed, mesh, fresh: Callable | None = None) -> Loaded:
  """The weights of init.path for the parameters `boxed`.

  Leaves that init.fresh names, and path lacks or has in another shape, come from fresh(paths) ->
  {path: array}; leaves of path that init.ignore names are left. Any other difference is a
  CheckpointError that lists it.
  """
  path = Path(config.init.path)
  for name, patterns in (('fresh', config.init.fresh), ('ignore', config.init.ignore)):
    for pattern in patterns:
      try:
        re.compile(pattern)
      except re.error as e:
        raise UsageError(f'init.{name} has {pattern!r}, not a regular expression: {e}') from e
  if config.lora.rank and config.init.fresh:
    raise UsageError(f'init.fresh={tuple(config.init.fresh)} with lora.rank={config.lora.rank}: '
                     'new weights would stay as the seed made them, for adapters alone are trained')
  theirs = read_config(path)
  if theirs.lora.rank:
    raise UsageError(f'init.path={config.init.path} is a run of adapters: export it with `t5lab '
                     'convert --from t5lab --to t5lab`, which merges them')
  _check_formula(configs.model_config(config), configs.model_config(theirs), path)
  weights, part = _which(config.init.weights, theirs,
                         f'init.weights={config.init.weights!r}: {path}')
  checkpoints = open_checkpoints(theirs, path)
  step = choose_step(checkpoints, config.init.step)
  step = max(checkpoints.steps(), default=None) if step is None else step
  if step is None:
    raise CheckpointError(f'init.path={config.init.path} has no checkpoint')
  saved = {name.partition('/')[2]: shape for name, (shape, _) in
           checkpoints.manifest(step).leaves.items() if name.startswith(f'{part}/')}
  ours = trees.flatten(placed(boxed, mesh, config.rules))
  new = [p for p, leaf in ours.items()
         if saved.get(p) != leaf.shape and trees.fits(p, config.init.fresh)]
  dropped = [p for p in saved if p in new or p not in ours and trees.fits(p, config.init.ignore)]
  abstract = {p: leaf for p, leaf in ours.items() if p not in new}
  abstract.update({p: jax.ShapeDtypeStruct(saved[p], 'float32') for p in dropped})
  state, found = checkpoints.restore({part: trees.unflatten(abstract)}, step, only=(part,))
  params = trees.flatten(state[part])
  params = {p: x for p, x in params.items() if p in ours and p not in new}
  if new:
    params.update(fresh(new))
  return Loaded(trees.unflatten(params, like=nn.unbox(boxed)), found.step, weights,
                _digest(checkpoints, found.step))


# In what a model may differ from the weights that it starts from: what arrays show, or training.
MAY_DIFFER = ('vocab_size', 'd_model', 'd_ff', 'enc_layers', 'dec_layers', 'max_length', 'types',
              'experts', 'moe_every', 'capacity_factor', 'eval_capacity_factor', 'tied',
              'logit_bias', 'mlm_head', 'pooler', 'nsp', 'classes', 'pool', 'pad_id', 'start_id',
              'eos_id', 'init_std', 'dropout', 'final_dropout', 'dtype', 'remat')


def _check_formula(ours, theirs, path) -> None:
  """UsageError if arrays of equal shapes would be computed with in another way."""
  ours, theirs = (dataclasses.asdict(c) | {'n_kv_heads': c.kv_heads} for c in (ours, theirs))
  differ = [f'model.{k}={ours[k]!r} (there {theirs[k]!r})' for k in ours
            if k not in MAY_DIFFER and ours[k] != theirs[k]]
  if differ:
    raise UsageError(f'the weights of init.path={path} belong to another formula: '
                     + ', '.join(differ))


def load_optimizer(config, abstract, step: int):
  """The optimizer's state that lies with the weights of init.path, for the shapes `abstract`.

  Links of the chain that keep nothing (clipping, weight decay) may differ. The schedule begins
  anew: its count is that of the run's own steps.
  """
  path = config.init.path
  checkpoints = open_checkpoints(read_config(path), path)
  saved = checkpoints.manifest(step)
  if 'opt_state' not in saved.parts:
    raise CheckpointError(f'init.optimizer=restore: step {step} of {path} holds no optimizer '
                          'state; use init.optimizer=fresh')
  links = lambda paths: sorted({int(path.partition('/')[0]) for path in paths})
  ours = trees.flatten(abstract)
  theirs = links(p.partition('/')[2] for p in saved.leaves if p.startswith('opt_state/'))
  number = dict(zip(links(ours), theirs))
  rename = lambda p: f'{number.get(int(p.partition("/")[0]), "none")}/{p.partition("/")[2]}'
  wanted = trees.unflatten({rename(p): leaf for p, leaf in ours.items()})
  state, _ = checkpoints.restore({'opt_state': wanted}, step, only=('opt_state',))
  found = trees.flatten(state['opt_state'])
  inside = lambda link: [p for p in ours if p.startswith(f'{link}/')]
  schedules = [f'{link}/count' for link in links(ours) if inside(link) == [f'{link}/count']]
  return trees.unflatten({p: found[rename(p)] * (p not in schedules) for p in ours}, like=abstract)


def _digest(checkpoints, step) -> str:
  return hashlib.sha256((checkpoints.path(step) / manifests.NAME).read_bytes()).hexdigest()
