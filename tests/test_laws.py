"""The house's laws, by parsing imports: who may know whom, and who may not load TensorFlow."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / 't5lab').rglob('*.py'))

# A module imports modules of lower rank, or of its own folder. Longest prefix wins.
RANK = {
    't5lab': 0,                      # the lazy front door
    't5lab.errors': 0,
    't5lab.trees': 1,
    't5lab.parallel': 2,
    't5lab.models': 3,
    't5lab.decoding': 3,
    't5lab.config': 4,
    't5lab.evaluation.metrics': 1,
    't5lab.data': 2,
    't5lab.data.prepare': 3,
    't5lab.training': 5,
    't5lab.evaluation': 6,
    't5lab.interop': 7,
    't5lab.weights': 6,
    't5lab.lab': 7,
    't5lab.streams': 7,
    't5lab.program': 7,
    't5lab.scoring': 8,
    't5lab.replaying': 8,
    't5lab.bisecting': 9,
    't5lab.planning': 8,
    't5lab.training.loop': 9,
    't5lab.launching': 1,
    't5lab.doctor': 10,
    't5lab.commands': 11,
    't5lab.cli': 10,
}
# folder: what its modules must not import, at any depth of their own code.
FORBIDDEN = {
    't5lab/models': ('t5lab.data', 't5lab.training', 't5lab.config', 'ml_collections'),
    't5lab/data': ('jax', 'flax', 't5lab.models', 't5lab.training', 't5lab.config', 't5lab.trees'),
    't5lab/decoding': ('flax', 't5lab.models', 't5lab.data', 't5lab.config'),
    't5lab/parallel': ('t5lab.config', 'ml_collections'),
    't5lab/launching': ('jax', 'flax', 'tensorflow', 't5lab.config', 'ml_collections'),
    't5lab/planning': ('t5lab.data', 't5lab.commands', 'tensorflow', 'seqio'),
    't5lab/training/step.py': ('os', 'pathlib', 'time', 'logging', 'argparse', 't5lab.config',
                               'ml_collections', 't5lab.data'),
    't5lab/training/losses.py': ('os', 'time', 't5lab.config'),
    't5lab/training/optim.py': ('os', 'time', 't5lab.config'),
}


MODULES = {'.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in FILES}


def imports(path):
  """(module, line) of every import in the file, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        yield inner if inner in MODULES else node.module, node.lineno


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def rank(module):
  while module not in RANK:
    module = module.rpartition('.')[0]
  return RANK[module]


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_go_downwards(path):
  here = module_name(path)
  if here == 't5lab':
    return
  for module, line in imports(path):
    if not module.startswith('t5lab.'):
      continue
    folder = here.rpartition('.')[0]
    same_folder = here.count('.') > 1 and (module + '.').startswith(folder + '.')
    assert rank(module) < rank(here) or same_folder, f'{here}:{line} imports {module}'


@pytest.mark.parametrize('place', FORBIDDEN)
def test_forbidden_imports(place):
  files = [ROOT / place] if place.endswith('.py') else sorted((ROOT / place).rglob('*.py'))
  assert files
  for path in files:
    for module, line in imports(path):
      for name in FORBIDDEN[place]:
        assert module != name and not module.startswith(name + '.'), f'{path.name}:{line} {module}'


def test_only_one_module_imports_tensorflow():
  users = {module_name(p) for p in FILES for m, _ in imports(p)
           if m.split('.')[0] in ('tensorflow', 'seqio')}
  assert users == {'t5lab.data.seqio_tf'}


@pytest.mark.parametrize('module', [
    't5lab', 't5lab.lab', 't5lab.cli', 't5lab.models.transformer', 't5lab.training.loop',
    't5lab.training.step', 't5lab.decoding.engine', 't5lab.parallel.sharding', 't5lab.config',
    't5lab.data.pipeline'])
def test_importing_loads_no_tensorflow(module):
  code = f'import sys, {module}; print([m for m in ("tensorflow", "seqio") if m in sys.modules])'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert out.stdout.strip() == '[]', out.stderr


def test_the_front_door_and_configs_load_no_jax():
  code = ('import sys, t5lab, t5lab.config, t5lab.cli; t5lab.config.base("t5_1_1/small"); '
          'print("jax" in sys.modules)')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert out.stdout.strip() == 'False', out.stderr


def test_tensorflow_sees_no_accelerator():
  code = ('from t5lab.data.seqio_tf import tf; print(tf.config.get_visible_devices("GPU") == [], '
          'tf.config.get_visible_devices("TPU") == [])')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert out.stdout.split() == ['True', 'True'], out.stderr


def test_nothing_executes_what_it_reads():
  """No eval, exec, pickle, shell or yaml.load; literal_eval is none of these."""
  bad = {'eval', 'exec', 'compile', '__import__'}
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id not in bad, f'{path}:{node.lineno} calls {node.func.id}'
      if isinstance(node, ast.keyword) and node.arg == 'shell':
        raise AssertionError(f'{path}:{node.value.lineno} passes shell=')
    names = {m.split('.')[0] for m, _ in imports(path)}
    assert not names & {'pickle', 'dill', 'cloudpickle', 'marshal', 'yaml'}, path


def test_files_stay_one_idea_long():
  long = {str(p.relative_to(ROOT)): n for p in FILES
          if (n := len(p.read_text().splitlines())) > 450}
  assert not long
