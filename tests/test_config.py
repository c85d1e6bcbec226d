"""Configs: every key is declared once, typos get suggestions, and saves are read back."""

import pathlib

import jax
import pytest

from t5lab import config
from t5lab.errors import UsageError

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))
CONFIGS = [p for p in CONFIGS if p.name != '__init__.py']


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize('arg', ['', ':tiny'])
def test_every_config_has_the_keys_of_the_base_and_round_trips(path, arg):
  c = config.load(f'{path}{arg}')
  assert config.keys(c).keys() == config.keys(config.base('tiny')).keys()
  assert config.to_dict(config.from_dict(config.to_dict(c))) == config.to_dict(c)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_config_lowers_its_step_at_tiny(path):
  from t5lab.programs import build
  c = config.load(f'{path}:tiny')
  assert 'stablehlo' in build.program(c, jax.devices()[:1]).lower().as_text()


def quickstart(**overrides):
  return config.load(str(CONFIGS[0].parent / 'quickstart.py'), overrides)


@pytest.mark.parametrize('key, text, value', [
    ('optim.lr', '3e-3', 3e-3), ('optim.lr', '1', 1.0), ('total_steps', '1e3', 1000),
    ('data.pack', 'false', False), ('data.mixture', 'ha_enfr', 'ha_enfr'),
    ('model.acts', "('relu',)", ('relu',)), ('data.lengths.inputs', '96', 96)])
def test_overrides_take_the_type_of_the_default(key, text, value):
  assert config.keys(quickstart(**{key: text}))[key] == value


@pytest.mark.parametrize('key, text, message', [
    ('optim.learning_rate', '1', "unknown config key 'optim.learning_rate'"),
    ('optm.lr', '1', "Did you mean 'optim'"),
    ('optim.warmpu', '1', "Did you mean 'warmup'"),
    ('total_steps', 'many', "'total_steps' takes int (now"),
    ('total_steps', '1.5', "'total_steps' takes int (now"),
    ('data.pack', 'maybe', "'data.pack' takes bool"),
    ('optim', '1', "'optim' is a section"),
    ('total_steps', '0', 'total_steps must be 1 or more, got 0'),
    ('optim.microbatches', '3', 'is not a multiple of optim.microbatches=3'),
    ('optim.ema', '1.5', 'a decay in [0, 1), for example 0.999, got 1.5'),
    ('model.dtype', 'float16', "'float16' is unknown"),
    ('model.acts', "('swish',)", "model.acts has 'swish'"),
    ('model.dropout', '1.0', 'model.dropout must be in [0, 1), got 1.0'),
    ('data.lengths.inputs', '0', 'give the inputs a length'),
])
def test_a_wrong_value_is_reported_in_one_line(key, text, message):
  with pytest.raises(UsageError) as e:
    quickstart(**{key: text})
  assert message in str(e.value) and '\n' not in str(e.value)


def test_a_config_file_with_a_typo_or_a_replaced_section(tmp_path):
  def written(body):
    path = tmp_path / 'c.py'
    path.write_text('from t5lab import config\n\ndef get_config(arg=""):\n'
                    '  c = config.base("tiny")\n  c.data.mixture = "ha_ende"\n' + body
                    + '  return c\n')
    return str(path)
  with pytest.raises(UsageError, match='optimm'):
    config.load(written('  c.optimm.lr = 1.\n'))
  with pytest.raises(UsageError, match='lacks data.lengths.inputs'):
    config.load(written('  c.data.lengths = {"targets": 8}\n'))
  with pytest.raises(UsageError, match='no config file'):
    config.load('nothing.py')
  with pytest.raises(UsageError, match='no family row .t5_1_1/smal'):
    config.base('t5_1_1/smal')
  with pytest.raises(UsageError, match='model.d_modle'):
    config.base('tiny', d_modle=8)


def test_an_old_save_takes_defaults_and_a_foreign_one_is_refused():
  d = config.to_dict(quickstart())
  del d['eval']['alpha']
  assert config.from_dict(d).eval.alpha == 0.6
  d['evla'] = {}
  with pytest.raises(UsageError, match="unknown config key 'evla'"):
    config.from_dict(d)
