"""Vocabularies and checkpoints that belong to another model (F23, F24)."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import processes
import pytest

import t5lab
from t5lab import cli, config, trees
from t5lab.errors import DataError
from t5lab.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures('plain_registry')


def call(*argv, capsys):
  capsys.readouterr()
  code = cli.main([str(a) for a in argv])
  return code, *capsys.readouterr()


@pytest.fixture
def run(reference, tmp_path):
  shutil.copytree(reference, tmp_path / 'run')
  return tmp_path / 'run'


def edit(run, change):
  path = run / 'config.json'
  c = json.loads(path.read_text())
  change(c)
  path.write_text(json.dumps(c))


@pytest.fixture
def rows(tmp_path):
  path = tmp_path / 'rows.txt'
  path.write_text('Turn on the light\n')
  return path


# --- vocabularies (F23) ------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_model(tmp_path, capsys):
  """F23. Both numbers, before data and model are built."""
  code, out, err = call(*processes.train_command(tmp_path / 'run', {'model.vocab_size': 2000}),
                        capsys=capsys)
  assert code == 2 and err.count('\n') == 1
  assert "'t5lab_2048'" in err and '2,048' in err and '2,000 rows' in err


def test_a_vocabulary_larger_than_the_model(run, rows, tmp_path, capsys):
  """F23. No command decodes with a run whose vocabulary was exchanged."""
  edit(run, lambda c: c['data'].update(vocab='t5lab_8192'))
  for argv in (['eval', '--workdir', run],
               ['infer', '--workdir', run, '--input', rows, '--output', tmp_path / 'out'],
               ['convert', '--from', 't5lab', '--to', 'hf', run, tmp_path / 'hf']):
    code, _, err = call(*argv, capsys=capsys)
    assert code == 2, f'{argv[0]}: exit code {code}'
    assert '2,048 rows' in err or '2,048' in err and '8,192' in err, err
  assert not (tmp_path / 'out').exists() and not (tmp_path / 'hf').exists()


@pytest.mark.parametrize('wrong', [2048, 2**31 - 1, -1])
def test_invalid_ids_are_refused(reference, wrong):
  """F23. JAX's gather would clamp them or fill in, and return numbers."""
  lab = t5lab.load(str(reference))
  assert lab.generate_tokens([[5, 1]]).shape == (1, 8)
  with pytest.raises(DataError, match=f'{wrong}.* 0 to 2,?047'):
    lab.generate_tokens([[5, 1], [wrong, 1]])
  ids = np.array([[5, wrong, 1]])
  for side in ('encoder', 'decoder'):
    batch = {'encoder_input_tokens': np.array([[5, 1]]), 'decoder_input_tokens': np.array([[0, 5]]),
             f'{side}_input_tokens': ids}
    with pytest.raises(DataError, match=f'{side}_input_tokens.*{wrong}'):
      lab.logits(batch)


# --- checkpoints (F24) -------------------------------------------------------------------------


def family(name):
  """The model section of another family, as small as R."""
  c = config.tiny(config.base(name, vocab_size=2048))
  return json.loads(json.dumps(c.model.to_dict()))


CHANGES = {
    'layers': (lambda m: m.update(enc_layers=3),
               r'/encoder/\S+: float32\[3,\S+\] in the model, float32\[2,'),
    'width': (lambda m: m.update(d_model=48),
              r'float32\[\S*48\S*\] in the model, float32\[\S*32'),
    'untied': (lambda m: m.update(tied=False),
               r'float32\[\S+\] in the model, absent in the checkpoint'),
    'architecture': (lambda m: m.update(family('bart/base')),
                     r'in the model, absent in the checkpoint'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_a_checkpoint_of_another_model(run, rows, tmp_path, capsys, change):
  """F24. Every command exits with 4 and lists ten arrays; nothing is padded or cut."""
  edit(run, lambda c: CHANGES[change][0](c['model']))
  for argv in (['eval', '--workdir', run],
               ['infer', '--workdir', run, '--input', rows, '--output', tmp_path / 'out'],
               ['convert', '--from', 't5lab', '--to', 't5lab', run, tmp_path / 'copy']):
    code, _, err = call(*argv, capsys=capsys)
    assert code == 4, f'{argv[0]}: exit code {code}: {err}'
    last = err.splitlines()[-1]
    assert 'holds another model' in last and re.search(CHANGES[change][1], last), last
    total = int(re.search(r'(\d+) of \d+ arrays differ', last)[1])
    assert len(re.findall(r' in the model| in the checkpoint', last)) == 2 * min(10, total)
    assert ('more' in last) == (total > 10)
  assert not (tmp_path / 'out').exists() and not (tmp_path / 'copy').exists()


@pytest.mark.parametrize('dtype, shown', [(jnp.float16, 'float16'), (jnp.bfloat16, 'bfloat16')])
def test_a_checkpoint_of_another_dtype(run, capsys, dtype, shown):
  """F24. Nothing is cast, neither by a resumed run nor by an evaluation."""
  saver = Checkpoints(run / 'checkpoints', keep=0)
  state = {path: x.astype(dtype) if path.startswith(('params/', 'ema/')) else x
           for path, x in processes.arrays(run, 30).items()}
  saver.save(36, trees.unflatten(state), meta=saver.manifest(30).meta)
  saver.wait()
  for argv in (processes.train_command(run, {**processes.R, 'total_steps': 42}),
               ['eval', '--workdir', run]):
    code, out, err = call(*argv, capsys=capsys)
    last = err.splitlines()[-1]
    assert code == 4 and 'step 37/' not in out, err
    assert re.search(
        rf': float32\[\S+\] in the model, {shown}\[\S+\] in the checkpoint', last), last


def test_a_counter_of_another_dtype(run, capsys):
  """F24. As a float, a step number beyond 2**24 equals its neighbour."""
  saver = Checkpoints(run / 'checkpoints', keep=0)
  state = processes.arrays(run, 30)
  saver.save(36, trees.unflatten({**state, 'step': state['step'].astype(np.float32)}),
             meta=saver.manifest(30).meta)
  saver.wait()
  code, _, err = call(*processes.train_command(run, {**processes.R, 'total_steps': 42}),
                      capsys=capsys)
  assert code == 4 and 'step: int32[] in the model, float32[] in the checkpoint' in err


def test_training_from_weights_of_another_model(reference, tmp_path, capsys):
  """F24. Weights of init.path that do not fit."""
  code, out, err = call(*processes.train_command(tmp_path / 'new', {
      'init.path': reference, 'model.d_ff': 128}), capsys=capsys)
  assert code == 4 and 'step 1/' not in out
  assert re.search(r'params/\S+: float32\[2,32,128\] in the model, float32\[2,32,64\]', err) or (
      re.search(r'ema/\S+: float32\[2,32,128\] in the model, float32\[2,32,64\]', err)), err
