"""LoRA adapters: they start at the base, are all that is trained and saved, and merge into it."""

import json
import pathlib
import shutil

import flax.linen as nn
import jax
import numpy as np
from processes import arrays
import pytest
from small_models import BATCH, CONFIGS, random_params

import t5lab
from t5lab import config, trees
from t5lab.errors import CheckpointError, UsageError
from t5lab.models.transformer import Transformer
from t5lab.parallel import sharding
from t5lab.programs import loading, loop, shapes
from t5lab.runs.checkpoint import Checkpoints
from t5lab.training import lora, steps

QUICKSTART = str(pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py')


@pytest.fixture(autouse=True, scope='module')
def _one_device():
  """One device where a test names no mesh.

  XLA on CPU deadlocks most often in the adapters' small all-reduces (tests/conftest.py).
  """
  real, patch = sharding.make_mesh, pytest.MonkeyPatch()
  unnamed = lambda axes: all(n == (-1 if axis == 'data' else 1) for axis, n in axes.items())
  patch.setattr(sharding, 'make_mesh', lambda devices=None, **axes: real(
      **axes, devices=jax.devices()[:1] if unnamed(axes) else devices))
  yield
  patch.undo()


def tiny(init='', **overrides):
  """Two layers, 8 rows of 32 tokens per step; adapters of rank 2 if there is a base."""
  c = config.load(QUICKSTART + ':tiny', {
      'total_steps': '4', 'checkpoint.every': '2', 'eval.examples': '2', 'eval.max_length': '2',
      'eval.beams': '1', 'checkpoint.best': '', 'optim.ema': '0'})
  c.init.path = str(init)
  c.lora.rank = 2 * bool(init)
  for key, value in overrides.items():
    config.override(c, key.replace('__', '.'), str(value))
  return c


def losses(workdir):
  entries = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [entry['loss'] for entry in entries if 'loss' in entry]


def train(c, workdir):
  """loop.train without the evaluation after the last step, whose decoding takes long to compile."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop._Loop, 'evaluate', lambda self: self.save() or True)
    loop.train(c, workdir)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A run of two steps, whose weights the other runs adapt."""
  path = tmp_path_factory.mktemp('base')
  train(tiny(total_steps=2), path)
  return path


@pytest.fixture(scope='module')
def adapted(base, tmp_path_factory):
  path = tmp_path_factory.mktemp('adapted')
  loop.train(tiny(base), path)
  return path


# --- the adapters themselves -------------------------------------------------------------------


def boxed(c):
  return jax.eval_shape(Transformer(c).init, jax.random.key(0), BATCH)['params']


EVERYWHERE = {'t5_1_1': '.*/(attn|cross|mlp)/.*', 'bert': '(.*/mlp/.*|mlm_dense|pooler)/kernel',
              'llama2_70b': '(.*/attn/.*|logits/kernel)', 'st_moe': '.*/attn/.*'}


@pytest.mark.parametrize('name', EVERYWHERE)
def test_adapters_start_at_the_base_and_merge_into_what_they_compute(name):
  c = CONFIGS[name]
  adapters = nn.unbox(lora.init(boxed(c), [EVERYWHERE[name]], 2, seed=0))
  params, scale = random_params(c), 3.
  compiled = jax.jit(lambda *given: Transformer(c).apply(steps.variables(*given), BATCH))
  apply = lambda *given: np.asarray(compiled(*given))
  plain = apply(params, None, 1.)
  np.testing.assert_array_equal(apply(adapters, params, scale), plain)
  flat = trees.flatten(adapters)
  assert {p.rsplit('/', 1)[1] for p in flat} == {'a', 'b'}
  assert all(not x.any() for p, x in flat.items() if p.endswith('/b'))
  deviation = np.concatenate([np.ravel(x) * x.shape[-2] ** 0.5 for p, x in flat.items()
                              if p.endswith('/a')]).std()
  assert 0.9 < deviation < 1.1
  stream = np.random.default_rng(0)
  adapters = jax.tree.map(lambda x: stream.normal(0, 0.1, x.shape).astype(np.float32), adapters)
  merged = lora.merge(params, adapters, scale)
  assert trees.flatten(merged).keys() == trees.flatten(params).keys()
  moved = apply(adapters, params, scale)
  assert np.abs(moved - plain).max() > 1e-2
  np.testing.assert_allclose(apply(merged, None, 1.), moved, rtol=1e-5, atol=1e-5)
  assert not np.allclose(apply(lora.merge(params, adapters, 1.), None, 1.), moved, atol=1e-3)
  # one kernel by hand: W + scale a b
  path = next(p for p in flat if p.endswith('/a')).removesuffix('/a')
  a, b = (np.asarray(trees.flatten(adapters)[f'{path}/{x}'], np.float64) for x in 'ab')
  expected = np.asarray(trees.flatten(params)[path]) + scale * np.matmul(a, b)
  np.testing.assert_allclose(trees.flatten(merged)[path], expected, rtol=1e-5, atol=1e-6)


def test_adapters_differ_by_kernel_and_by_seed():
  make = lambda seed: trees.flatten(nn.unbox(lora.init(
      boxed(CONFIGS['t5_1_1']), ['.*/attn/.*'], 2, seed)))
  one, again, other = make(0), make(0), make(1)
  a = [p for p in one if p.endswith('/a')]
  assert all(np.array_equal(one[p], again[p]) and not np.array_equal(one[p], other[p]) for p in a)
  assert not np.array_equal(one[a[0]], one[a[1]])


@pytest.mark.parametrize('name, patterns, rank, message', [
    ('t5_1_1', ['.*/attn/w/kernel'], 2, r'matches no kernel of this model; its kernels: .*attn/q'),
    ('t5_1_1', ['.*/attn/q/kernel', 'q'], 2, "lora.kernels: 'q' matches no kernel"),
    ('t5_1_1', ['(attn'], 2, r"lora.kernels: '\(attn' is not a regular expression"),
    ('t5_1_1', ['embedding'], 2, "'embedding' matches no kernel"),
    ('switch', ['.*/experts/.*'], 2, 'matches no kernel'),
    ('switch', ['.*/router.*'], 2, 'matches no kernel'),
    ('t5_1_1', ['.*/attn/q/kernel'], 16,
     'lora.rank must be below 16 .*decoder/layers/attn/q/kernel is 16 x 16, got 16'),
    ('t5_1_1', ['.*/attn/q/kernel', '.*/relpos/.*'], 2, 'matches no kernel'),
])
def test_bad_adapters_are_an_error_of_one_line(name, patterns, rank, message):
  with pytest.raises(UsageError, match=message) as e:
    lora.init(boxed(CONFIGS[name]), patterns, rank, seed=0)
  assert '\n' not in str(e.value)


# --- runs with adapters ------------------------------------------------------------------------


def test_a_run_trains_saves_and_counts_only_adapters(base, adapted, capsys):
  leaves = Checkpoints(adapted / 'checkpoints').manifest(4).leaves
  params = {p.removeprefix('params/'): shape for p, (shape, _) in leaves.items()
            if p.startswith('params/')}
  assert params == {f'{stack}/layers/attn/{p}/kernel/{x}': (2, *((32, 2) if x == 'a' else (2, 32)))
                    for stack in ('encoder', 'decoder') for p in 'qv' for x in 'ab'}
  moments = [p for p in leaves if p.startswith('opt_state/')]
  assert moments and all('/attn/' in p or p.endswith('count') for p in moments)
  assert not any(p.startswith('ema/') for p in leaves)
  loop.train(tiny(base), adapted)                # has ended: prints its description only
  output = capsys.readouterr().out
  total = sum(int(np.prod(shape)) for p, (shape, _) in
              Checkpoints(base / 'checkpoints').manifest(2).leaves.items()
              if p.startswith('params/'))
  assert f'1,024 parameters adapt {total:,} frozen ones' in output


def test_load_merges_and_leaves_the_base_as_it_is(base, adapted, tmp_path):
  before = trees.flatten(t5lab.load(base).params)
  after = trees.flatten(t5lab.load(adapted).params)
  assert before.keys() == after.keys()
  for path, x in before.items():
    same = np.array_equal(x, after[path])
    assert same != path.endswith(('attn/q/kernel', 'attn/v/kernel')), path
  saved = arrays(adapted, 4)
  path = 'encoder/layers/attn/q/kernel'
  expected = np.asarray(before[path]) + 16 / 2 * np.matmul(
      saved[f'params/{path}/a'], saved[f'params/{path}/b'])
  np.testing.assert_allclose(after[path], expected, rtol=1e-5, atol=1e-6)
  # the run's own evaluation used the merged weights too
  lab = t5lab.load(adapted)
  predictions = [json.loads(line) for line in
                 (adapted / 'eval' / '4.raw.jsonl').read_text().splitlines()]
  assert [p['prediction'] for p in predictions] == lab.generate([p['source'] for p in predictions])


def test_training_starts_with_the_loss_of_the_base(base, adapted, tmp_path):
  """The first loss equals that of a plain run from the same weights; then it falls."""
  train(tiny(base, lora__rank=0, total_steps=2), tmp_path)
  np.testing.assert_allclose(losses(adapted)[0], losses(tmp_path)[0], rtol=1e-6)
  assert losses(adapted)[-1] < losses(adapted)[0]


def test_two_steps_and_two_resumed_ones_equal_four(base, adapted, tmp_path):
  shutil.copytree(adapted, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / 'step_00000004')
  (tmp_path / 'run' / 'metrics.jsonl').unlink()
  train(tiny(base), tmp_path / 'run')
  assert losses(tmp_path / 'run') == losses(adapted)[2:]
  resumed, uninterrupted = arrays(tmp_path / 'run', 4), arrays(adapted, 4)
  assert resumed.keys() == uninterrupted.keys()
  for path in resumed:
    np.testing.assert_array_equal(resumed[path], uninterrupted[path], err_msg=path)


def test_eight_devices_in_another_layout_give_the_same_losses(base, adapted, tmp_path):
  c = tiny(base, mesh__data=1, mesh__fsdp=4, mesh__model=2, rules='fsdp_tp', total_steps=2)
  train(c, tmp_path)
  np.testing.assert_allclose(losses(tmp_path), losses(adapted)[:2], rtol=1e-5)
  pair = lora.init(shapes.boxed_params(c), c.lora.kernels, 2, 0)['encoder']['layers']['attn']['q']
  assert pair['kernel']['a'].names == ('layers', 'embed', None)
  assert pair['kernel']['b'].names == ('layers', None, 'heads')


def test_adapters_work_with_adafactor_and_an_average(base, tmp_path):
  train(tiny(base, optim__name='adafactor', optim__ema=0.5, total_steps=2), tmp_path)
  leaves = Checkpoints(tmp_path / 'checkpoints').manifest(2).leaves
  assert {p.split('/')[0] for p in leaves} == {'step', 'params', 'ema', 'opt_state'}
  ema, raw = t5lab.load(tmp_path), t5lab.load(tmp_path, weights='raw')
  assert (ema.weights, raw.weights) == ('ema', 'raw')
  q = lambda lab: np.asarray(lab.params['encoder']['layers']['attn']['q']['kernel'])
  assert not np.array_equal(q(ema), q(raw)) and not np.array_equal(q(raw), q(t5lab.load(base)))


def test_adapters_of_other_weights_are_refused(base, adapted, tmp_path):
  shutil.copytree(base, tmp_path / 'base')
  shutil.copytree(adapted, tmp_path / 'run')
  c = loading.read_config(tmp_path / 'run')
  c.init.path = str(tmp_path / 'base')
  loading.load(tmp_path / 'run', c=c)                       # the same base, elsewhere
  other = {path: x + 1 for path, x in arrays(base, 2).items()}
  shutil.rmtree(tmp_path / 'base' / 'checkpoints')
  checkpoints = Checkpoints(tmp_path / 'base' / 'checkpoints')
  checkpoints.save(2, trees.unflatten(other), meta={})
  checkpoints.wait()
  with pytest.raises(CheckpointError, match='holds adapters of other weights than'):
    loading.load(tmp_path / 'run', c=c)
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config.to_dict(c)))
  with pytest.raises(CheckpointError, match='adapters of other weights'):   # nor resumed
    loop.train(tiny(tmp_path / 'base'), tmp_path / 'run')


def test_configs_that_cannot_train_adapters(base, adapted, tmp_path):
  with pytest.raises(UsageError, match='lora.rank adapts frozen weights: name them with init.path'):
    loop.train(tiny(lora__rank=2), tmp_path / 'a')
  with pytest.raises(UsageError, match='is a run of adapters: export it'):
    loop.train(tiny(adapted), tmp_path / 'b')
  message = 'with lora.rank=2: new weights would keep their random values'
  with pytest.raises(UsageError, match=message):
    loop.train(tiny(base, init__fresh="('logits/.*',)"), tmp_path / 'c')
  assert not list(tmp_path.glob('*/checkpoints/step_*'))
