"""Every benchmark runs, at a tiny size, and prints its rows."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def load(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_every_benchmark_has_a_test():
  assert {path.stem for path in (ROOT / 'benchmarks').glob('*.py')} == {
      'convert_memory', 'data_stream', 'guard_overhead'}


def test_data_stream(tmp_path, capsys):
  load('data_stream').main(160, str(tmp_path), batches=2)
  out = capsys.readouterr().out
  assert '160 examples' in out and 'batch of step 1,000,000' in out
  assert out.count('batches/s') == 3 and out.count(' s\n') == 5


@pytest.mark.slow
def test_guard_overhead(capsys):
  load('guard_overhead').main(['2', '--config', str(ROOT / 'configs' / 'quickstart.py:tiny')])
  assert '%' in capsys.readouterr().out


@pytest.mark.slow
def test_convert_memory(tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  load('convert_memory').main(['tiny', '--golden'])
  assert 'exit 0' in capfd.readouterr().out
