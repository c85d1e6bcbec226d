"""The toy twin has the run's structure and divisibility, similar data, and trains."""

import math
import os
import pathlib
import subprocess
import sys

import pytest

from t5lab import config
from t5lab.data.objectives import table
from t5lab.data.tasks import embedded
from t5lab.tools.launching import local
from t5lab.tools.planning import twin

ROOT = pathlib.Path(__file__).parents[3]
BASE = str(ROOT / 'configs/t5_1_1_base_c4.py')


def run_config(row='t5_1_1/base', rules='fsdp_tp', batch=256, **mesh):
  c = config.base(row, dtype='bfloat16', remat='dots')
  c.data.mixture, c.data.batch_size, c.rules = 'c4_v220_span_corruption', batch, rules
  if not c.model.enc_layers:
    c.data.mixture, c.data.lengths.inputs = 'c4_v310_full_lm', 0
  sizes = {axis: 1 for axis in c.mesh} | mesh
  return c, sizes


def derived(*args, **kwargs):
  return twin.derive(*run_config(*args, **kwargs))


def test_small_sizes_divide_exactly_where_large_ones_do():
  assert [twin.shrink(n, 8, 2, 4) for n in (16, 12, 8)] == [4, 5, 4]
  assert [twin.shrink(n, 3, 4, 30) for n in (9, 10)] == [32, 30]


@pytest.mark.parametrize('large, small', [
    ({'data': 8, 'fsdp': 32, 'model': 1}, {'data': 2, 'fsdp': 8, 'model': 1}),
    ({'data': 1, 'fsdp': 256, 'model': 1}, {'data': 1, 'fsdp': 16, 'model': 1}),
    ({'data': 4, 'fsdp': 4, 'model': 4}, {'data': 4, 'fsdp': 2, 'model': 2}),
    ({'data': 1, 'fsdp': 1, 'model': 1}, {'data': 1, 'fsdp': 1, 'model': 1})])
def test_every_axis_over_one_stays_over_one_on_sixteen_devices(large, small):
  assert twin.shrink_mesh(large) == small


def test_the_twin_of_t5_keeps_the_structure():
  t = derived(data=2, fsdp=16, model=8)
  c, m = t.config, t.config.model
  assert t.mesh == {'data': 2, 'fsdp': 4, 'model': 2} and (t.devices, t.processes) == (16, 2)
  assert (c.rules, m.dtype, m.remat, tuple(m.acts), m.tied) == (
      'fsdp_tp', 'bfloat16', 'dots', ('gelu', 'linear'), False)
  assert m.n_heads % 2                      # 12 heads do not divide over 8
  assert m.d_model % 4 == m.d_ff % 2 == m.vocab_size % 2 == 0
  assert c.data.batch_size % 8 == 0 and c.data.mixture == 'books_span_corruption'
  assert c.total_steps == 10 and (m.enc_layers, m.dec_layers) == (2, 2)
  assert 'books_span_corruption' in t.notes[0] and 'c4_v220' in t.notes[0]


def test_grouped_heads():
  m = derived('llama3/8b', model=4).config.model           # 32 heads and 8 keys over 4
  assert m.n_heads > m.n_kv_heads > 0 and m.n_heads % m.n_kv_heads == 0
  t = derived('llama3/8b', model=16)                       # 32 divide over 16, 8 do not
  shards = t.mesh['model']
  assert t.config.model.n_heads % shards == 0 and t.config.model.n_kv_heads % shards


def test_experts_and_an_incomplete_group_of_layers():
  c, sizes = run_config('st_moe/large', 'ep', expert=8, fsdp=2)
  m = twin.derive(c, sizes).config.model                # 27 layers, every fourth a mixture
  assert m.experts % twin.shrink_mesh(sizes)['expert'] == 0 and m.expert_top_k == 2
  assert m.enc_layers % m.moe_every and m.enc_layers > m.moe_every


@pytest.mark.parametrize('rows, micro, whole, parts', [
    (256, 4, True, True), (32, 4, True, False), (40, 1, False, False)])
def test_rows_divide_over_devices_exactly_where_those_of_the_run_do(rows, micro, whole, parts):
  c, sizes = run_config(rules='fsdp', batch=rows, fsdp=16)
  c.optim.microbatches = micro
  t = twin.derive(c, sizes).config
  devices = math.prod(t.mesh[axis] for axis in ('data', 'fsdp'))
  assert (t.data.batch_size % devices == 0) == whole
  assert (t.data.batch_size // t.optim.microbatches % devices == 0) == parts
  assert t.data.batch_size % t.optim.microbatches == 0


def test_initial_weights_and_files_are_replaced():
  c, sizes = run_config(rules='fsdp', fsdp=4)
  c.init.path, c.lora.rank, c.data.files.train = '/nowhere', 8, '/nowhere/*.jsonl'
  t = twin.derive(c, sizes)
  assert (t.config.init.path, t.config.lora.rank, t.config.data.files.train) == ('', 0, '')
  assert any('seed instead of init.path' in note for note in t.notes)


def test_the_twin_learns_the_same_objective():
  """For every objective in the table, of files, of known tasks and of tasks of the user."""
  rows = {'encoder_decoder': 't5_1_1/base', 'decoder': 'llama3/8b'}
  for name, objective in table.TABLE.items():
    if objective.kind == 'encoder':
      c, _ = run_config('bert/base')
      c.model.nsp = 'next' in objective.features
    else:
      c, _ = run_config(rows[objective.kind])
    c.data.mixture = f'my_{name}'
    assert twin.similar_task(c) == f'books_{name}'
    c.data.mixture, c.data.objective = 'files', name
    assert twin.similar_task(c) == f'books_{name}'
    assert f'books_{name}' in embedded.TEXT


@pytest.mark.parametrize('row, mixture, task', [
    ('t5_1_1/base', 'mc4.de', 'books_span_corruption'),      # its name lacks the objective
    ('t5_1_1/base', 'wmt_t2t_ende_v003', 'ha_ende'), ('t5_1_1/base', 'my_task', 'ha_ende'),
    ('t5_1_1/base', 'c4_v220_prefix_lm,wmt_t2t_ende_v003', 'books_prefix_lm'),
    ('t5_1_1/base', 'c4_v310_full_lm', 'ha_ende'),           # not for an encoder-decoder
    ('llama3/8b', 'c4_v310_full_lm', 'books_lm'), ('llama3/8b', 'my_task', 'books_lm')])
def test_the_data_of_the_twin(row, mixture, task):
  c, _ = run_config(row)
  c.data.mixture = mixture
  assert twin.similar_task(c) == task


def test_the_cause_is_the_processes_own_error():
  own = 't5lab: model.n_heads: 3 heads do not divide'
  assert twin._cause(['x\n' + own + '\n', 't5lab: process 0 of 2 gave up: 3 heads\n'],
                     [2, 2]) == own.removeprefix('t5lab: ')
  assert twin._cause(['', 'Killed\n'], [0, -9]) == 'process 1 exited with -9: Killed'
  assert twin._cause(['', ''], [0, 1]) == 'process 1 exited with 1: no output'


@pytest.fixture
def processes_that(monkeypatch):
  """processes_that(code): the twin's processes run this Python code instead of a training."""
  group = local.Group

  def replace(code):
    monkeypatch.setattr(local, 'Group', lambda argv, environments, logs, grace: group(
        [sys.executable, '-c', code, *argv], environments, logs, grace))
  return replace


def test_the_outcome_of_a_run(processes_that, monkeypatch):
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  processes_that("""
import json, os, pathlib, sys
if 'TPU_WORKER_HOSTNAMES' in os.environ:
  sys.exit('inherited')
folder = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
if os.environ['JAX_PROCESS_ID'] == '0':
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 3.5}\\n{"step": 2, "loss": 2.5}')
print('Compiling jit(train_step) with global shapes')
""")
  outcome = twin.run(derived(data=2, fsdp=8))
  assert (outcome.failure, outcome.steps, outcome.compilations) == ('', 2, 1)
  assert (outcome.first_loss, outcome.last_loss) == (3.5, 2.5)


def test_a_run_that_does_not_end_is_killed(processes_that):
  processes_that("import time; print('waiting', flush=True); time.sleep(60)")
  outcome = twin.run(derived(data=2, fsdp=8), timeout=1.)
  assert outcome.failure == 'still running after 1 s; process 0 exited with -9: waiting'
  assert outcome.seconds < 20


def check(*options, config=BASE):
  env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache/jax'),
         'PYTHONPATH': str(ROOT), 'T5LAB_NO_LIBTPU': '1'}
  return subprocess.run(
      [sys.executable, '-m', 't5lab', 'check', '--config', config, *options],
      capture_output=True, text=True, env=env, timeout=900)


@pytest.mark.slow
def test_the_twin_of_a_shipped_config_runs_in_two_processes():
  done = check('--only', 'twin')
  assert done.returncode == 0, done.stderr
  assert 'ok   toy twin: 10 steps' in done.stdout
  assert 'compiled 1 time in 10 steps' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('options, message', [
    (['--config.data.batch_size=2040'], 'is not a multiple of'),
    (['--config.rules=fsdp_tp', '--config.mesh.fsdp=2', '--config.mesh.model=8'],
     'heads do not divide over mesh.model='),
    (['--config.mesh.fsdp=8', '--config.mesh.model=2'], "rules='fsdp' do not use this axis")])
def test_a_size_that_does_not_divide_fails_in_one_line(options, message):
  done = check('--only', 'twin', *options)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.splitlines()[-1].startswith('t5lab: toy twin: ')
