"""The planner with the real TPU compiler, without a TPU: minutes, in `make test-slow`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from t5lab.tools.planning import chips

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not chips.has_compiler(), reason="needs libtpu: pip install 't5lab[tpu]'")]


def python(code, where='v5e:1x1', timeout=900):
  """Runs code in a process of its own, because jax reads the compiler's environment only once."""
  env = {**os.environ, **chips.environment(chips.parse(where)), 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env,
                        timeout=timeout)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


def t5lab(*argv, timeout=1500):
  return subprocess.run([sys.executable, '-m', 't5lab', *argv], capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=timeout)


CANARY = """
import json, re, jax, jax.numpy as jnp, numpy as np
from t5lab.tools.planning import chips, hlo, hlo_costs
d = chips.devices(chips.parse('{where}'))[:1]
s = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(d), ('a',)), jax.sharding.PartitionSpec())
x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=s)
m = hlo.parse(jax.jit(lambda a, b: a @ b).lower(x, x).compile().as_text())
flops = sum(hlo_costs.product_flops(*p) for op in m.entry.ops
            for p in hlo_costs.matrix_products(m, op, m.entry))
print(json.dumps([sum(op.cycles or 0 for op in m.entry.ops), flops]))
"""


@pytest.mark.parametrize('where, cycles', [
    ('v5e:1x1', 9557312), ('v4:2x2x1', 4523672), ('v5p:2x2x1', 4652072), ('v6e:2x2', 2977840)])
def test_the_calibration_still_holds(where, cycles):
  """A matmul of 8192^3 costs the same as under libtpu 0.0.42.

  If this fails, a new libtpu estimates differently, and plans of the two cannot be compared.
  """
  estimated, flops = python(CANARY.replace('{where}', where), where)
  assert estimated == cycles and flops == 2 * 8192 ** 3
  chip = chips.parse(where).chip
  assert 0.65 < flops / (estimated / chip.clock) / chip.peak < 0.98


WARNS = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from t5lab.tools.planning import chips, compiling
mesh = jax.sharding.Mesh(np.array(chips.devices(chips.parse('v5e:2x2'))).reshape(2, 2),
                         ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def split(*parts):
  return NamedSharding(mesh, P(*parts))
def f(x):
  return jax.lax.with_sharding_constraint(x.reshape(4, 64, 64), split(None, 'a', 'b')) * 2
def lower(fn, shape, *parts):
  with jax.set_mesh(mesh):
    return jax.jit(fn).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split(*parts)))
warned = compiling.compile_step(lambda: lower(f, (256, 64), ('a', 'b')))
big = compiling.compile_step(lambda: lower(lambda x: jnp.sin(x), (2 ** 18, 2 ** 16)))
needed = compiling.exceeded_memory(big.unfit)
print(json.dumps([warned.warnings, bool(warned.text), needed, big.largest]))
"""


def test_warnings_and_memory_reports_of_the_compiler():
  warnings, text, (needed, available), largest = python(WARNS, 'v5e:2x2')
  assert text and warnings == ['jit(f)/reshape: f32[1,64,64] reshape, from {devices=[4,1,1]<=[4]} '
                               'to {devices=[1,2,2]<=[4]}']
  assert needed == 128 * 2 ** 30 and available == chips.CHIPS['v5e'].usable
  assert largest[0] == [64 * 2 ** 30, 'f32[262144,65536]']


def small(*more):
  return ['--config', str(ROOT / 'configs/t5_1_1_base_c4.py'), '--config.model.d_model=256',
          '--config.model.d_ff=512', '--config.model.n_heads=4', '--config.model.enc_layers=2',
          '--config.model.dec_layers=2', '--config.data.batch_size=64',
          '--config.optim.microbatches=1', *more]


@pytest.mark.parametrize('where, more', [
    ('v5e:2x2', []), ('v5p:2x2x1', ['--config.rules=tp', '--config.mesh.fsdp=1',
                                    '--config.mesh.model=4']),
    ('v5e:2x2*2', ['--config.mesh.dcn_data=2'])])
def test_a_small_step_is_planned_and_cached(tmp_path, monkeypatch, where, more):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  done = t5lab('plan', *small('--topology', where, '--json', *more))
  assert done.returncode == 0, done.stderr
  plan = json.loads(done.stdout)
  assert plan['source'] == 'compiler' and plan['fits'] and not plan['cached']
  # Two layers each in encoder and decoder: only layers are recomputed, and half of the causal
  # scores is waste.
  assert 1.05 < plan['flops_ratio'] < 1.45
  assert plan['not_aliased'] == [] and plan['unknown_loops'] == []
  assert plan['hbm']['donated'] >= plan['hbm']['state'] * 0.999
  assert 0 < plan['mfu'] < 0.7 and plan['compute_seconds'] < plan['step_seconds']
  axes = {t['where'] for t in plan['collectives']}
  assert ({'fsdp': 'fsdp', 'tp': 'model'}[plan['rules']]) in axes
  assert any(t['between_slices'] for t in plan['collectives']) == ('*' in where)
  again = json.loads(t5lab('plan', *small('--topology', where, '--json', *more)).stdout)
  assert again['cached'] and again['step_seconds'] == plan['step_seconds']


def test_no_product_is_computed_twice(tmp_path, monkeypatch):
  """Collective matmuls would compute products twice: see TPU_OPTIONS in programs/build.py."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  done = t5lab('plan', '--config', str(ROOT / 'configs/t5_1_1_base_c4.py'), '--json',
               '--topology', 'v5e:4x4', '--config.model.remat=dots', '--config.model.enc_layers=2',
               '--config.model.dec_layers=2', '--config.data.batch_size=512',
               '--config.optim.microbatches=1')
  assert json.loads(done.stdout)['flops_ratio'] < 1.1, done.stderr


def test_a_step_that_does_not_fit_names_the_largest_buffer(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  more = ['--topology', 'v5e:1x1', '--config.data.batch_size=4096', '--config.mesh.fsdp=1',
          '--config.rules=dp', '--config.model.remat=none', '--config.model.n_heads=8']
  done = t5lab('plan', *small(*more))
  assert done.returncode == 0 and 'does NOT fit' in done.stdout, done.stderr
  done = t5lab('check', '--only', 'plan', *small(*more))
  assert done.returncode == 2 and 'memory of v5e: the step needs' in done.stderr
  assert 'largest: ' in done.stderr


def test_the_decode_step(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  done = t5lab('plan', *small('--topology', 'v5e:2x2', '--decode', '--json', '--config.rules=tp',
                              '--config.mesh.fsdp=1', '--config.mesh.model=4'))
  plan = json.loads(done.stdout)
  assert plan['what'] == 'decode step' and plan['source'] == 'compiler'
  assert plan['hbm']['kinds']['key-value cache'] > 0 and plan['step_seconds'] > 0
  assert plan['not_aliased'] == [] and 'run' not in plan
