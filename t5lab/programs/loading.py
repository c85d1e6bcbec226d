"""Weights from disk to a mesh: those of a run, of a converted checkpoint, or to start a run from.

Runs and converted checkpoints are both a directory with config.json, checkpoints/ and, unless the
vocabulary is embedded in the package, its files in vocabulary/. Arrays go straight to their
devices, whatever mesh wrote them.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
from pathlib import Path
import re
import shutil

import flax.linen as nn
import jax

from t5lab import config, trees
from t5lab.data import vocab
from t5lab.decoding import options
from t5lab.errors import CheckpointError, UsageError
from t5lab.models import families
from t5lab.parallel import sharding
from t5lab.programs import shapes
from t5lab.runs import manifests, rundir
from t5lab.runs.checkpoint import Checkpoints
from t5lab.training import lora

WEIGHTS = ('ema', 'raw')
VOCABULARY = 'vocabulary'      # the folder of a run's own copy of its vocabulary

# Fields in which a model may differ from the weights it starts from: either the shapes of the
# arrays show the difference, or it concerns training alone.
MAY_DIFFER = ('vocab_size', 'd_model', 'd_ff', 'enc_layers', 'dec_layers', 'max_length', 'types',
              'experts', 'moe_every', 'capacity_factor', 'eval_capacity_factor', 'tied',
              'logit_bias', 'mlm_head', 'pooler', 'nsp', 'classes', 'class_of', 'pool', 'dense',
              'dense_bias', 'pad_id', 'start_id', 'eos_id', 'init_std', 'dropout', 'final_dropout',
              'dtype', 'remat')


# --- config and vocabulary ---------------------------------------------------------------------


def read_config(path):
  """The config of a run or converted checkpoint, on the copy of the vocabulary stored there."""
  c = config.from_dict(rundir.read_config(path))
  c.data.vocab = stored_vocabulary(path, c.data.vocab)
  return c


def stored_vocabulary(path, spec: str) -> str:
  """The spec of the copy in path/vocabulary/, or `spec` if there is no copy."""
  if not spec:
    return spec
  names = [Path(spec).name]
  if spec.endswith('.gguf'):     # only its tokenizer was copied, as the file that it amounts to
    names = ['tokenizer.json', 'tokenizer.model']
  for name in names:
    copy = Path(path) / VOCABULARY / name
    if copy.is_file():
      return str(copy)
  return spec


# Keys of the eval section that say how a run is evaluated; the others say what its model is for.
OF_EVALUATION = ('mixture', 'split', 'every', 'examples', 'batch_size', 'samples', 'seed')


def inherit(c, workdir) -> dict:
  """Gives keys of c.eval that are at their defaults the values that init.path has.

  Generation settings and stop ids need the vocabulary of init.path, names of classes as many
  classes. A run whose init.path is gone keeps what it has saved in workdir.
  Returns {key: value} of the keys that were set.
  """
  if not c.init.path:
    return {}
  path = c.init.path if (Path(c.init.path) / 'config.json').is_file() else workdir
  if not (Path(path) / 'config.json').is_file():
    return {}                              # load_base says what is wrong
  source, default, changed = read_config(path), config.base('tiny').eval, {}
  if not (source.data.vocab and c.data.vocab) or (
      vocab.load(source.data.vocab).sha256 != vocab.load(c.data.vocab).sha256):
    return {}

  # What is set here, and what that replaces, is not taken from there.
  key_of = {'length': 'max_length'}
  is_set = lambda option: c.eval[key := key_of.get(option, option)] != default[key]
  kept = {other for option, (other, _) in options.REPLACES.items() if is_set(option)}
  kept |= {*OF_EVALUATION, *filter(is_set, default)}
  if source.model.classes != c.model.classes:
    kept |= {'labels', 'problem_type'}
  if source.eval.max_length == config.usual_output_length(source):
    kept.add('max_length')
  for key, value in source.eval.items():
    if key not in kept and value != c.eval[key]:
      c.eval[key] = changed[key] = value
  return changed


def inherit_embedding(c, workdir) -> dict:
  """Gives `c` the way in which the sentence-transformers model of init.path embeds.

  That is the embed section if it is at its defaults and, without a classifier, model.pool and
  model.dense if they are those of the family. Returns {key: value} of the keys that were set.
  """
  paths = [path for path in (c.init.path, workdir) if c.init.path
           and (Path(path) / 'config.json').is_file()]
  source = read_config(paths[0]) if paths else c
  if not source.embed.modules:
    return {}
  default, changed = config.base(c.family if c.family in families.ROWS else 'tiny'), {}
  fields = ('pool', 'dense', 'dense_acts', 'dense_bias')
  if c.embed.to_dict() == default.embed.to_dict():
    changed.update({('embed', key): value for key, value in source.embed.items()})
  if not c.model.classes and all(c.model[name] == default.model[name] for name in fields):
    changed.update({('model', name): source.model[name] for name in fields})
  changed = {(section, key): value for (section, key), value in changed.items()
             if c[section][key] != value}
  for (section, key), value in changed.items():
    c[section][key] = value
  return {'.'.join(names): value for names, value in changed.items()}


def copy_vocabulary(c, workdir) -> None:
  """Writes the vocabulary of a run into its folder, with the files that came with it to init.path.
  """
  folder = Path(workdir) / VOCABULARY
  vocab.export(c.data.vocab, folder)
  came_with = Path(c.init.path) / VOCABULARY
  if not c.init.path or not came_with.is_dir() or (
      read_config(c.init.path).data.vocab != c.data.vocab):
    return
  for path in came_with.iterdir():
    if path.is_file() and not (folder / path.name).exists():
      shutil.copyfile(path, folder / path.name)


# --- checkpoints -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loaded:
  """params: arrays on their devices. weights: 'ema' or 'raw'. sha256: of the step's manifest."""
  params: dict
  step: int
  weights: str
  sha256: str


def open_checkpoints(c, path, log=functools.partial(print, flush=True)) -> Checkpoints:
  """The checkpoints in path/checkpoints, kept and ranked as the config says."""
  k = c.checkpoint
  return Checkpoints(Path(path) / 'checkpoints', keep=k.keep, best_metric=k.best,
                     best_mode='min' if k.best.endswith('loss') else 'max', log=log)


def choose_step(checkpoints: Checkpoints, step: str | int) -> int | None:
  """'latest' -> None (the newest that verifies), 'best' -> its step, N -> N."""
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
    raise UsageError(f"step must be a number, 'latest' or 'best', got {step!r}") from None


def load(path, step: str | int = 'latest', weights: str | None = None, *, c=None,
         mesh=None) -> Loaded:
  """The parameters of a run or converted checkpoint; adapters are merged into their base.

  weights: 'ema' or 'raw'; None is the average if the run keeps one. c: a config to use instead of
  the saved one. Errors: CheckpointError if no checkpoint verifies.
  """
  path = Path(path)
  c = c or read_config(path)
  mesh = mesh or sharding.make_mesh(**c.mesh.to_dict())
  weights, part = _weights_part(weights, c, f'weights={weights!r}: {path}')

  # What to read: the parameters of the model, or those of the adapters.
  boxed = shapes.boxed_params(c)
  base, stored = None, boxed
  if c.lora.rank:
    base = load_base(c, boxed, mesh)
    stored = jax.eval_shape(lambda: lora.init(boxed, c.lora.kernels, c.lora.rank, 0))

  checkpoints = open_checkpoints(c, path)
  restored = checkpoints.restore({part: shapes.with_shardings(stored, mesh, c.rules)},
                                 choose_step(checkpoints, step), only=(part,))
  if restored is None:
    raise CheckpointError(f'{path} has no checkpoint yet; train it with `t5lab train`')
  state, manifest = restored
  params = state[part]
  if base is not None:
    check_base(base, manifest.meta, c, path)
    params = lora.merge(base.params, params, lora_scale(c))
  return Loaded(params, manifest.step, weights, _manifest_digest(checkpoints, manifest.step))


def _weights_part(weights: str | None, c, where: str) -> tuple[str, str]:
  """('ema' or 'raw', the part of the state that holds them). None or '': the average, if any."""
  weights = weights or ('ema' if c.optim.ema else 'raw')
  if weights not in WEIGHTS or (weights == 'ema' and not c.optim.ema):
    available = ' and '.join(WEIGHTS) if c.optim.ema else 'raw only (optim.ema=0)'
    raise UsageError(f'{where} has {available}')
  return weights, 'ema' if weights == 'ema' else 'params'


def _manifest_digest(checkpoints, step) -> str:
  return hashlib.sha256((checkpoints.path(step) / manifests.NAME).read_bytes()).hexdigest()


# --- the weights that a run starts from --------------------------------------------------------


def lora_scale(c) -> float:
  return c.lora.alpha / c.lora.rank if c.lora.rank else 1.


def check_base(base: Loaded, meta: dict, c, path) -> None:
  """CheckpointError if the adapters of a checkpoint in `path` were trained on other weights.

  meta: the metadata of that checkpoint.
  """
  trained_on = meta.get('init', {}).get('sha256')
  if trained_on != base.sha256:
    raise CheckpointError(f'{path} holds adapters of other weights than {c.init.path} has '
                          f'now (manifest {str(trained_on)[:12]}, now {base.sha256[:12]})')


def load_base(c, boxed, mesh, fresh: Callable | None = None) -> Loaded:
  """The weights of init.path for the parameters `boxed`.

  Leaves that init.fresh names and that init.path lacks, or has in another shape, come from
  fresh(paths) -> {path: array}. Leaves of init.path that init.ignore names are dropped.
  Errors: CheckpointError that lists any other difference.
  """
  path = Path(c.init.path)
  _check_init(c)
  source = read_config(path)
  if source.lora.rank:
    raise UsageError(f'init.path={c.init.path} is a run of adapters: export it with `t5lab '
                     'convert --from t5lab --to t5lab`, which merges them')
  _check_architecture(config.model_config(c), config.model_config(source), path)
  weights, part = _weights_part(c.init.weights, source,
                                f'init.weights={c.init.weights!r}: {path}')

  # The step to read.
  checkpoints = open_checkpoints(source, path)
  step = choose_step(checkpoints, c.init.step)
  step = checkpoints.newest() if step is None else step
  if step is None:
    raise CheckpointError(f'init.path={c.init.path} has no checkpoint')

  # Which leaves are new here, and which of the saved ones are dropped.
  saved = {}
  for name, (shape, _) in checkpoints.manifest(step).leaves.items():
    top, _, leaf_path = name.partition('/')
    if top == part:
      saved[leaf_path] = shape
  ours = trees.flatten(shapes.with_shardings(boxed, mesh, c.rules))
  new = [p for p, leaf in ours.items()
         if saved.get(p) != leaf.shape and trees.fits(p, c.init.fresh)]
  dropped = [p for p in saved
             if p in new or (p not in ours and trees.fits(p, c.init.ignore))]

  # A restore reads whole checkpoints, so it is asked for the dropped leaves too.
  abstract = {p: leaf for p, leaf in ours.items() if p not in new}
  abstract.update({p: jax.ShapeDtypeStruct(saved[p], 'float32') for p in dropped})
  state, manifest = checkpoints.restore({part: trees.unflatten(abstract)}, step, only=(part,))
  read = trees.flatten(state[part])
  params = {p: read[p] for p in ours if p not in new}
  if new:
    params.update(fresh(new))
  return Loaded(trees.unflatten(params, like=nn.unbox(boxed)), manifest.step, weights,
                _manifest_digest(checkpoints, manifest.step))


def _check_init(c) -> None:
  """UsageError for patterns that are not regular expressions, or that adapters cannot use."""
  for key, patterns in (('fresh', c.init.fresh), ('ignore', c.init.ignore)):
    for pattern in patterns:
      try:
        re.compile(pattern)
      except re.error as e:
        raise UsageError(f'init.{key} has {pattern!r}, not a regular expression: {e}') from e
  if c.lora.rank and c.init.fresh:
    raise UsageError(f'init.fresh={tuple(c.init.fresh)} with lora.rank={c.lora.rank}: new weights '
                     'would keep their random values, because only the adapters are trained')


def _check_architecture(ours, source, path) -> None:
  """UsageError if arrays of equal shapes would be used in another computation."""
  ours, source = (dataclasses.asdict(model) | {'n_kv_heads': model.kv_heads}
                  for model in (ours, source))
  if not (ours['dense'] and source['dense']):      # one of them has no activation to differ
    ours['dense_acts'] = source['dense_acts'] = ()
  differences = [f'model.{field}={source[field]!r} there, {ours[field]!r} here' for field in ours
                 if field not in MAY_DIFFER and ours[field] != source[field]]
  if differences:
    raise UsageError(f'the weights in init.path={path} were trained with a different '
                     f'architecture: {", ".join(differences)}')


def load_optimizer(c, abstract, step: int):
  """The optimizer state saved with the weights of init.path, for the shapes `abstract`.

  Links of the chain without state (clipping, weight decay) may differ. The schedule starts again:
  its count is reset to zero, because it counts the steps of this run.
  """
  path = c.init.path
  checkpoints = open_checkpoints(read_config(path), path)
  manifest = checkpoints.manifest(step)

  # Paths start with the link's position in its chain: match the links that have state, in order.
  link = lambda leaf_path: int(leaf_path.partition('/')[0])
  saved_paths = [p.removeprefix('opt_state/') for p in manifest.leaves
                 if p.startswith('opt_state/')]
  if not saved_paths:
    raise CheckpointError(f'init.optimizer=restore: step {step} of {path} holds no optimizer '
                          'state; use init.optimizer=fresh')
  ours = trees.flatten(abstract)
  our_links = sorted(set(map(link, ours)))
  saved_links = sorted(set(map(link, saved_paths)))
  position = dict(zip(our_links, saved_links))

  def rename(leaf_path):
    return f'{position.get(link(leaf_path), "none")}/{leaf_path.partition("/")[2]}'

  abstract_saved = trees.unflatten({rename(p): leaf for p, leaf in ours.items()})
  state, _ = checkpoints.restore({'opt_state': abstract_saved}, step, only=('opt_state',))
  saved = trees.flatten(state['opt_state'])

  # A link whose whole state is its count is the schedule.
  leaves_of = lambda number: [p for p in ours if link(p) == number]
  counts = [f'{n}/count' for n in our_links if leaves_of(n) == [f'{n}/count']]
  values = {p: saved[rename(p)] * (p not in counts) for p in ours}
  return trees.unflatten(values, like=abstract)
