"""The laws of the tree, checked by parsing imports: who may know whom, and what may be loaded."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 't5lab').rglob('*.py'))

# Room: the rooms that it may import. A room is a folder or a file directly under t5lab/. The table
# of CONTRIBUTING.md says the same in words.
MAY_IMPORT = {
    'errors': '',
    'trees': 'errors',
    'files': 'errors',
    'evaluation': 'errors',
    'parallel': 'errors trees',
    'data': 'errors files evaluation',
    'models': 'errors trees parallel',
    'decoding': 'errors trees parallel',
    'config': 'errors data models decoding',
    'training': 'errors trees parallel models',
    'runs': 'errors trees files parallel training',
    'programs': 'errors trees files evaluation parallel data models decoding config training runs',
    'tools': 'errors trees files evaluation parallel data models decoding config training runs '
             'programs',
    'commands': 'errors trees files evaluation parallel data models decoding config training runs '
                'programs tools',
    'cli': 'errors parallel',        # commands are imported by name
}
# The same between the folders of a room.
INSIDE = {
    'data': {'vocab': '', 'objectives': '', 'batches': '', 'sources': 'vocab',
             'tasks': 'vocab objectives batches sources'},
    'tools': {'planning': 'launching', 'launching': '', 'interop': '', 'doctor': '', 'inspect': '',
              'prepare': ''},
}
# Who may see a ConfigDict. Below are plain arguments and frozen dataclasses.
SEES_CONFIG = ('config', 'programs', 'tools', 'commands')
# Folder: packages that it must not import.
FORBIDDEN = {
    'data': 'jax flax',
    'evaluation': 'jax flax',
    'decoding': 'flax',
    'training': 'os pathlib time logging argparse',
    'tools/launching': 'jax flax tensorflow',
}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = set(map(module_name, FILES))


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


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_follow_the_law(path):
  _, *here = module_name(path).split('.')
  if not here or here == ['__main__']:       # the lazy front door, and python -m t5lab
    return
  for module, line in imports(path):
    package, *there = module.split('.')
    if package != 't5lab' or not there:
      continue
    if here[0] != there[0]:
      allowed = MAY_IMPORT[here[0]].split()
      assert there[0] in allowed, f'{module_name(path)}:{line} imports {module}'
    elif here[0] in INSIDE and len(here) > 1 and len(there) > 1 and here[1] != there[1]:
      allowed = INSIDE[here[0]][here[1]].split()
      assert there[1] in allowed, f'{module_name(path)}:{line} imports {module}'


def test_every_room_has_its_row():
  rooms = {module_name(path).split('.')[1] for path in FILES if path.parent != ROOT / 't5lab'}
  modules = {path.stem for path in FILES if path.parent == ROOT / 't5lab'}
  assert rooms | modules - {'__init__', '__main__'} == set(MAY_IMPORT)
  assert len(MAY_IMPORT) <= 15
  for name, row in MAY_IMPORT.items():       # so no cycles: each row names earlier rows only
    assert set(row.split()) <= set(list(MAY_IMPORT)[:list(MAY_IMPORT).index(name)])


@pytest.mark.parametrize('folder', FORBIDDEN)
def test_packages_that_a_folder_must_not_import(folder):
  files = sorted((ROOT / 't5lab' / folder).rglob('*.py'))
  assert files
  for path in files:
    for module, line in imports(path):
      package = module.split('.')[0]
      assert package not in FORBIDDEN[folder].split(), f'{module_name(path)}:{line} {module}'


def test_who_sees_a_configdict():
  for path in FILES:
    room = module_name(path).split('.')[1:2]
    for module, line in imports(path):
      if module.split('.')[0] == 'ml_collections' or (module + '.').startswith('t5lab.config.'):
        assert room and room[0] in SEES_CONFIG, f'{module_name(path)}:{line} {module}'


def test_only_one_module_imports_tensorflow():
  users = {module_name(p) for p in FILES for m, _ in imports(p)
           if m.split('.')[0] in ('tensorflow', 'seqio')}
  assert users == {'t5lab.data.tasks.seqio_tf'}


def modules_loaded_by(code):
  out = subprocess.run([sys.executable, '-c', f'import sys; {code}; print(*sys.modules)'],
                       capture_output=True, text=True, timeout=120)
  assert out.returncode == 0, out.stderr
  return set(out.stdout.split())


def test_importing_the_library_loads_no_tensorflow():
  loaded = modules_loaded_by(
      'import t5lab.programs.lab, t5lab.programs.loop, t5lab.cli, t5lab.models.transformer, '
      't5lab.decoding.engine, t5lab.parallel.sharding, t5lab.data.batches.pipeline')
  assert 't5lab.training.steps' in loaded and not loaded & {'tensorflow', 'seqio'}


def test_the_front_door_and_configs_load_no_jax():
  loaded = modules_loaded_by(
      'import t5lab, t5lab.config, t5lab.cli; t5lab.config.base("t5_1_1/small")')
  assert 't5lab.models.families' in loaded and 'jax' not in loaded


def test_tensorflow_sees_no_accelerator():
  code = ('from t5lab.data.tasks.seqio_tf import tf\n'
          'print([tf.config.get_visible_devices(kind) for kind in ("GPU", "TPU")])')
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert out.stdout.strip() == '[[], []]', out.stderr


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


def test_the_way_of_a_batch_is_short():
  """The files of the README's table "How a batch flows" exist and can be read in an afternoon."""
  section = (ROOT / 'README.md').read_text().split('## How a batch flows')[1].split('##')[0]
  files = []
  for row in section.splitlines():
    folder = None
    for name in re.findall(r'`([\w/]+\.py)`', row.split(' | ')[0]):
      folder = name.rpartition('/')[0] or folder     # a bare name is in the folder before it
      files.append(ROOT / folder / name.rpartition('/')[2])
  assert 20 <= len(files) <= 30
  assert sum(len(path.read_text().splitlines()) for path in files) <= 6000
