"""config.json of a run: plain JSON, whole or absent, compared key by key."""

import os

import pytest

from t5lab import files
from t5lab.errors import UsageError
from t5lab.runs import rundir


def test_config_round_trip(tmp_path):
  config = {'model': {'layers': 2, 'act': ['gelu', 'linear']}, 'lr': 1e-3, 'name': 'ü', 'x': None}
  rundir.write_config(tmp_path, config)
  assert rundir.read_config(tmp_path) == config
  assert os.listdir(tmp_path) == ['config.json']


@pytest.mark.parametrize('value', [object(), len, {1, 2}, b'x', float('nan')])
def test_a_config_must_be_plain_json(tmp_path, value):
  with pytest.raises(UsageError, match='config.json must hold plain JSON values only: '):
    rundir.write_config(tmp_path, {'a': value})
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('text', [
    '', '[1]', '{"a": ', '\xff', '[' * 100_000, ' ' * (files.CONFIG_BYTES + 1)])
def test_a_bad_config_is_an_error_of_one_line(tmp_path, text):
  (tmp_path / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(UsageError, match='config.json') as e:
    rundir.read_config(tmp_path)
  assert '\n' not in str(e.value)


def test_a_directory_without_config(tmp_path):
  for directory in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(UsageError, match='is not a run of t5lab'):
      rundir.read_config(directory)


def test_differences_between_configs():
  saved = {'total_steps': 100, 'model': {'layers': 2, 'act': ['gelu']}, 'log': {'every': 10},
           'logits': 1, 'empty': {}}
  new = {'total_steps': 200, 'model': {'layers': 3, 'act': ('gelu',), 'heads': 4},
         'log': {'every': 5}, 'logits': 2, 'empty': {}}
  assert rundir.config_differences(saved, new, allowed=('total_steps', 'log')) == [
      'logits: 1 -> 2', 'model.heads: absent -> 4', 'model.layers: 2 -> 3']
  assert rundir.config_differences(new, new) == []
  assert rundir.config_differences({'a': {}}, {'a': {'b': 1}}) == [
      'a: {} -> absent', 'a.b: absent -> 1']
  assert rundir.config_differences({'a': True}, {'a': 1}) == ['a: true -> 1']
