"""Weights on disk, by directory alone: which step, which average, which copy of the vocabulary."""

import functools
import shutil

import jax
import numpy as np
import pytest
import small_models
from small_models import CONFIGS

from t5lab import config, trees
from t5lab.errors import CheckpointError, UsageError
from t5lab.parallel import sharding
from t5lab.programs import loading, shapes
from t5lab.runs import rundir
from t5lab.runs.checkpoint import Checkpoints

MODEL = CONFIGS['t5_1_1']
random_params = functools.cache(small_models.random_params)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A directory of two steps with averages, the first the better one."""
  path = tmp_path_factory.mktemp('saved')
  c = config.from_model(MODEL)
  c.optim.ema, c.checkpoint.best = 0.9, 'x/ema/loss'
  rundir.write_config(path, config.to_dict(c))
  checkpoints = Checkpoints(path / 'checkpoints')
  for step, metrics in ((1, {'x/ema/loss': 1.}), (2, {'x/ema/loss': 2.})):
    checkpoints.save(step, {'params': random_params(MODEL, step),
                            'ema': random_params(MODEL, step + 10)}, meta={}, metrics=metrics)
  checkpoints.wait()
  return path


def same(loaded, seed):
  want = random_params(MODEL, seed)
  jax.tree.map(np.testing.assert_array_equal, trees.unflatten(trees.flatten(loaded.params)), want)


def test_the_average_of_the_newest_step_or_what_is_asked_for(saved):
  sha256 = {}
  for step, which, number, part, seed in (
      ('latest', None, 2, 'ema', 12), ('latest', 'raw', 2, 'raw', 2), (1, 'raw', 1, 'raw', 1),
      ('1', 'ema', 1, 'ema', 11), ('best', None, 1, 'ema', 11)):
    loaded = loading.load(saved, step, which)
    assert (loaded.step, loaded.weights) == (number, part)
    same(loaded, seed)
    sha256[step, part] = loaded.sha256
  assert sha256['1', 'ema'] != sha256['latest', 'ema']
  assert sha256['1', 'ema'] == sha256[1, 'raw'] == sha256['best', 'ema']


def test_arrays_go_to_the_mesh_that_is_asked_for(saved):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  loaded = loading.load(saved, mesh=mesh)
  assert all(x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(loaded.params))
  same(loaded, 12)


def test_what_is_not_there_is_said(saved, tmp_path):
  with pytest.raises(UsageError, match="step must be a number, 'latest' or 'best', got 'newest'"):
    loading.load(saved, 'newest')
  with pytest.raises(CheckpointError, match='no checkpoint of step 7'):
    loading.load(saved, 7)
  c = loading.read_config(saved)
  c.optim.ema = 0.
  with pytest.raises(UsageError, match="weights='ema': .* has raw only"):
    loading.load(saved, weights='ema', c=c)
  c.checkpoint.best = 'x/raw/bleu'
  with pytest.raises(UsageError, match='no checkpoint has an evaluation of .*x/raw/bleu'):
    loading.load(saved, 'best', c=c)
  with pytest.raises(UsageError, match='is not a run of t5lab'):
    loading.read_config(tmp_path)
  c.init.path = str(tmp_path)
  shutil.copy(saved / 'config.json', tmp_path)
  with pytest.raises(CheckpointError, match='has no checkpoint yet'):
    loading.load(tmp_path)
  with pytest.raises(CheckpointError, match='init.path=.* has no checkpoint'):
    loading.load_base(c, shapes.boxed_params(c), sharding.make_mesh())


def test_a_directory_has_its_own_copy_of_the_vocabulary(tmp_path):
  """By the name that was copied; of a .gguf only its tokenizer was, under another name."""
  folder = tmp_path / 'vocabulary'
  folder.mkdir()
  own = lambda spec: loading.stored_vocabulary(tmp_path, spec)
  for spec in ('', 'byte', 't5lab_2048', '/models/spiece.model', '/models/x.gguf'):
    assert own(spec) == spec
  for name in ('spiece.model', 'tokenizer.json'):
    (folder / name).write_text('')
  assert own('/models/spiece.model') == own('spiece.model') == str(folder / 'spiece.model')
  assert own('/models/x.gguf') == str(folder / 'tokenizer.json')
  assert own('') == '' and own('byte') == 'byte'
