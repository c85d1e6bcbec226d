"""A trained model in hand, from its directory alone."""

import pathlib

import jax
import numpy as np
import pytest

import t5lab
from t5lab import config
from t5lab.errors import CheckpointError, UsageError
from t5lab.programs import loop

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  loop.train(config.load(f'{CONFIGS}/quickstart.py:tiny', {'eval.examples': '2'}), path)
  return path


def test_load_and_generate(workdir):
  lab = t5lab.load(workdir)
  assert (lab.step, lab.weights) == (10, 'ema')
  texts = ['Turn on the light', 'Off', 'Enter your password ' * 3]
  out = lab.generate(texts, length=6)
  assert len(out) == 3 and all(isinstance(t, str) for t in out)
  assert lab.generate(texts[::-1], length=6) == out[::-1]
  assert lab.generate([{'en': t} for t in texts], length=6) == out
  prompted = ['translate English to German: ' + t for t in texts]
  assert lab.generate(prompted, task='', length=6) == out
  sampled = lab.generate(texts, length=6, temperature=1., seed=1)
  assert sampled == lab.generate(texts, length=6, temperature=1., seed=1)
  assert sampled != lab.generate(texts, length=6, temperature=1., seed=2)
  assert lab.generate([]) == []


def test_raw_and_averaged_weights_differ_and_a_step_can_be_chosen(workdir):
  ema, raw = t5lab.load(workdir), t5lab.load(workdir, weights='raw')
  early = t5lab.load(workdir, step=5, weights='raw')
  embedding = lambda lab: np.asarray(lab.params['embedding'])
  assert (embedding(ema) != embedding(raw)).any() and (embedding(early) != embedding(raw)).any()
  assert early.step == 5
  assert isinstance(jax.tree.leaves(raw.params)[0].sharding, jax.sharding.NamedSharding)


def test_what_is_wrong_is_said(workdir, tmp_path):
  lab = t5lab.load(workdir)
  with pytest.raises(UsageError, match="no option 'beam'. Did you mean 'beams'"):
    lab.generate(['x'], beam=2)
  with pytest.raises(UsageError, match='takes a list'):
    lab.generate('x')
  with pytest.raises(UsageError, match="task 'ha_enxx' has no prompt. Did you mean"):
    lab.generate(['x'], task='ha_enxx')
  with pytest.raises(UsageError, match="weights='avg': .* has ema and raw"):
    t5lab.load(workdir, weights='avg')
  with pytest.raises(UsageError, match=str(tmp_path)):
    t5lab.load(tmp_path)
  (tmp_path / 'config.json').write_text((workdir / 'config.json').read_text())
  with pytest.raises(CheckpointError, match='no checkpoint yet'):
    t5lab.load(tmp_path)


@pytest.mark.parametrize('task, family', [('books_lm', 'decoder/small'),
                                          ('ha_enfr', 'decoder/small'),
                                          ('books_span_corruption', 't5_1_0/small')])
def test_other_objectives_and_families_train_evaluate_and_generate(task, family, tmp_path):
  c = config.base(family, vocab_size=2048)
  c.data.mixture, c.optim.ema = task, 0.
  c.data.lengths.inputs = 0 if task == 'books_lm' else 32
  c = config.tiny(c)
  c.total_steps, c.optim.name, c.log.every = 3, 'adafactor', 1
  c.eval.examples = 8
  result = loop.train(c, tmp_path)
  assert np.isfinite(result.scores[f'{task}/raw/loss'])
  assert ('ha_enfr/raw/bleu' in result.scores) == (task == 'ha_enfr')
  lab = t5lab.load(tmp_path)
  assert lab.weights == 'raw' and len(lab.generate(['Call me Ishmael', 'The'], length=4)) == 2
  if family.startswith('decoder'):
    with pytest.raises(UsageError, match='decoder-only'):
      lab.generate(['x'], beams=2)
