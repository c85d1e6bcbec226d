"""`t5lab plan` and `t5lab check` without libtpu, the budget checks, and the search."""

import json
import math
import os
import pathlib
import subprocess
import sys
import types

import pytest

from t5lab import config
from t5lab.commands import check, plan
from t5lab.errors import UsageError
from t5lab.parallel import sharding
from t5lab.tools.planning import (
  chips,
  collectives,
  compiling,
  estimate,
  float32,
  gate,
  memory,
  report,
  search,
)
from t5lab.tools.planning.planned_step import describe

ROOT = pathlib.Path(__file__).parents[3]
BASE = str(ROOT / 'configs/t5_1_1_base_c4.py')
GIB = 2 ** 30


@pytest.fixture
def in_process(monkeypatch):
  """Commands may run in this process, whose environment and platform stay as they are."""
  monkeypatch.setenv('T5LAB_NO_LIBTPU', '1')
  for command in (plan, check):
    monkeypatch.setattr(command, 'prepare_jax', lambda topology: None)


def test_without_the_compiler_the_plan_is_labelled_an_estimate(capsys):
  """In a process of its own, which has the 16 devices of the slice."""
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'T5LAB_NO_LIBTPU': '1'}
  env.pop('XLA_FLAGS', None)
  done = subprocess.run([sys.executable, '-m', 't5lab', 'plan', '--config', BASE, '--json'],
                        capture_output=True, text=True, env=env, timeout=300)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result['source'] == 'formula' and result['estimate'] is True and result['fits'] is True
  assert result['mesh'] == {'fsdp': 16} and result['chips'] == 16
  assert result['parameters'] == 247_577_856
  # 425 GFLOP per row, 2048 rows over 16 chips
  assert result['model_flops'] == pytest.approx(425.2e9 * 2048 / 16, rel=1e-3)
  kinds = result['hbm']['kinds']
  assert kinds['parameters'] == pytest.approx(247_577_856 * 4 / 16, rel=5e-3)   # norms are whole
  assert result['hbm']['total'] == pytest.approx(sum(kinds.values()))
  assert 0 < result['mfu'] < 1 and result['run']['chip_hours'] == pytest.approx(
      result['step_seconds'] * 1e6 / 3600 * 16)
  assert any('formulas' in line for line in result['assumptions'])
  report.show(result)
  text = capsys.readouterr().out
  assert 'ANALYTIC ESTIMATE: libtpu is not installed' in text and 'Memory of a chip: fits' in text
  assert f'{result["mfu"]:.1%}' in text and '2048 rows of 512+114' in text


@pytest.mark.parametrize('options, message', [
    (['--topology', 'v5e:3'], "--topology 'v5e:3'"),
    (['--topology', 'v5e:2x2', '--config.mesh.model=3'], 'mesh.model=3'),
    (['--topology', 'v5e:2x2', '--prices', 'nowhere.json'], 'cannot read nowhere.json'),
    (['--topology', 'v5e:2x2', '--search', '--decode'], 'remove --decode')])
def test_invalid_options(options, message, in_process):
  with pytest.raises(UsageError, match=message):
    plan.main(['--config', BASE, *options])


def test_the_slice_comes_from_the_flag_or_the_config():
  c = config.base('tiny')
  with pytest.raises(UsageError, match='--topology v5e:4x4'):
    plan.chosen_topology(c, None)
  c.plan.topology = 'v6e:2x2'
  assert plan.chosen_topology(c, None).name == 'v6e:2x2'
  assert plan.chosen_topology(c, 'v5e:4x4').name == 'v5e:4x4'


def test_the_shipped_prices_cover_all_chips():
  shipped = plan.read_prices(None)
  assert set(shipped['per_chip_hour']) == set(chips.CHIPS) and 'check' in shipped['note']


@pytest.mark.parametrize('changed, message', [
    ({'per_chip_hour': {'v5e': {'ours': -1}}}, 'per_chip_hour.v5e.ours must be a number .* got -1'),
    ({'per_chip_hour': {'v5e': 3}}, 'see the format of t5lab/tools/planning/prices.json'),
    ({'currency': None}, "'currency'; see the format of t5lab/tools/planning/prices.json")])
def test_invalid_prices(changed, message, tmp_path):
  prices = {**plan.read_prices(None), **changed}
  path = tmp_path / 'p.json'
  path.write_text(json.dumps({key: value for key, value in prices.items() if value is not None}))
  with pytest.raises(UsageError, match=message):
    plan.read_prices(path)


def test_a_check_prints_every_outcome_and_reports_the_first_failure(in_process, capsys):
  with pytest.raises(UsageError, match=r'plan.max_hbm_gb=1e-06: the step needs .* largest: '):
    check.main(['--config', str(ROOT / 'configs/quickstart.py'), '--topology', 'v5e:2x2', '--only',
                'plan', '--json', '--config.plan.max_hbm_gb=1e-6'])
  result = json.loads(capsys.readouterr().out)
  assert result['topology'] == 'v5e:2x2'
  assert {c['name']: c['ok'] for c in result['checks']} == {
      'plan.max_hbm_gb=1e-06': False, 'no float32 matmul': True, 'donated buffers are reused': None,
      'no full rematerialization': None, 'large state is split': True}


@pytest.fixture
def compile_as(in_process, monkeypatch):
  """compile_as(compiling.Compiled) -> a small train step on 2x2 chips that compiles to this."""
  c = config.tiny(config.base('t5_1_1/small', dtype='bfloat16'))
  c.rules, c.mesh.data, c.mesh.fsdp = 'fsdp', 1, 4
  step = describe(c, chips.parse('v5e:2x2'))
  layout = {'fsdp': (0, 1)}, {axis: 1 for axis in step.mesh.shape}

  def replace(compiled):
    monkeypatch.setattr(chips, 'has_compiler', lambda: True)
    monkeypatch.setattr(collectives, 'mesh_layout', lambda mesh: layout)
    monkeypatch.setattr(compiling, 'compile_step', lambda lower, key: compiled)
    return step
  return replace


def test_a_compiled_plan(compile_as, capsys):
  memory_fields = dict(argument=10 * GIB, output=9 * GIB, alias=8 * GIB, temp=2 * GIB,
                       generated_code=GIB // 4)
  hlo_text = (pathlib.Path(__file__).parent / 'fsdp_step.txt').read_text()
  step = compile_as(compiling.Compiled(hlo_text, memory_fields, ['jit(f)/x: gathered'], 3.))
  result, text = estimate.plan(step, plan.read_prices(None))
  assert text == hlo_text and result['source'] == 'compiler' and result['fits']
  hbm = result['hbm']
  assert hbm['total'] == 13.25 * GIB and hbm['headroom'] == 2.5 * GIB
  assert sum(hbm['kinds'].values()) == hbm['total'] and hbm['donated'] == 8 * GIB
  assert hbm['of_temporaries'] == {}                     # stacked buffers are all in VMEM
  assert result['hlo_flops'] == 4 * 4 * 2 * (8192 // 4) * 2048 * 2048
  assert [row['kind'] for row in result['collectives']] == [
      'all-gather', 'reduce-scatter', 'collective-permute']
  assert result['limiting'] == max(result['limits'], key=result['limits'].get)
  assert 'mesh axis fsdp=4: physical axis x+y, 90 GB/s' in result['assumptions']
  report.show(result)
  text = capsys.readouterr().out
  for line in ('compiled by libtpu (3 s)', 'fits, 13.25 GiB of 15.75 GiB usable',
               'the partitioner replicates a tensor: jit(f)/x: gathered', 'all-gather',
               'The whole run, estimated'):
    assert line in text


def test_a_compiled_plan_that_does_not_fit(compile_as, capsys):
  unfit = 'RESOURCE_EXHAUSTED: HLO temporaries (24.00G) exceeds available HBM (15.75G)'
  step = compile_as(compiling.Compiled('', {}, [], 3., unfit=unfit, largest=((GIB, 'f32[9]'),)))
  result, text = estimate.plan(step, plan.read_prices(None))
  assert text == '' and not result['fits'] and 'run' not in result
  assert (result['hbm']['total'], result['hbm']['usable']) == (24 * GIB, 15.75 * GIB)
  assert result['largest_buffers'] == [dict(bytes=GIB, shape='f32[9]', where='')]
  report.show(result)
  text = capsys.readouterr().out
  assert 'does NOT fit, 24.00 GiB of 15.75 GiB' in text and '1.00 GiB f32[9]' in text
  assert 'exceeds available HBM' in text


# --- the budget checks -------------------------------------------------------------------------


def planned_step(**budgets):
  c = config.base('tiny', dtype='bfloat16')
  c.plan.update(budgets)
  tensors = [memory.Tensor('params/w', (4, 4), 'float32', 3 * GIB, True),
             memory.Tensor('opt_state/0/v/w', (4, 4), 'float32', 4 * GIB, False)]
  return types.SimpleNamespace(config=c, tensors=tensors, model=config.model_config(c),
                               topology=chips.parse('v5e:4x4'))


def compiled_plan(total=9 * GIB, **more):
  kinds = {'parameters': 3 * GIB, 'optimizer': 4 * GIB, 'temporaries and activations': 2 * GIB}
  return {'source': 'compiler', 'spmd_warnings': [], 'not_aliased': [],
          'hbm': {'total': total, 'usable': 15.75 * GIB, 'kinds': kinds, 'state': 7 * GIB,
                  'donated': 7 * GIB}, **more}


def test_the_memory_budget_names_the_largest_kinds_and_tensor():
  assert gate.check_hbm(planned_step(), compiled_plan()).ok
  over = gate.check_hbm(planned_step(max_hbm_gb=8.), compiled_plan())
  assert not over.ok and over.name == 'plan.max_hbm_gb=8'
  assert over.text == ('the step needs 9.00 GiB of 8.00: optimizer 4.00, parameters 3.00, '
                       'temporaries and activations 2.00; largest: opt_state/0/v/w float32[4,4] '
                       '4.00 GiB')
  big = [dict(bytes=5 * GIB, shape='f32[9]', where='step/mlp')]
  over = gate.check_hbm(planned_step(max_hbm_gb=8.), compiled_plan(largest_buffers=big))
  assert 'f32[9] of step/mlp 5.00 GiB' in over.text
  over = gate.check_hbm(planned_step(), compiled_plan(total=16 * GIB))
  assert not over.ok and over.name == 'memory of v5e'


def test_the_collective_budget_names_the_kind_and_axis():
  rows = [dict(kind='all-gather', where='fsdp', wire=2 * GIB, count=8),
          dict(kind='all-reduce', where='model', wire=GIB, count=2)]
  result = compiled_plan(collectives=rows, collective_bytes=3 * GIB)
  assert gate.check_collectives(planned_step(), result) is None
  assert gate.check_collectives(planned_step(max_collective_gb=3.), result).ok
  over = gate.check_collectives(planned_step(max_collective_gb=2.5), result)
  assert not over.ok and over.name == 'plan.max_collective_gb=2.5'
  assert over.text == ('a chip sends 3.00 GiB per step, most of it in 8 all-gather over fsdp: '
                       '2.00 GiB')


def test_donated_buffers_and_partitioner_warnings():
  assert gate.check_donation(compiled_plan()).ok
  lost = gate.check_donation(compiled_plan(not_aliased=['params/w']))
  assert lost.ok is False and lost.text == '1 are not: params/w'
  partly = compiled_plan()
  partly['hbm']['donated'] = 6 * GIB
  assert gate.check_donation(partly).ok is False
  assert gate.check_partitioner(compiled_plan()).ok
  warned = gate.check_partitioner(compiled_plan(spmd_warnings=['jit(f): gather']))
  assert warned.ok is False and warned.text == 'jit(f): gather'
  assert gate.check_partitioner(compiled_plan(spmd_warnings=None)).ok is None


@pytest.mark.parametrize('rules', sharding.RULES)
def test_replicated_state_fails_under_rules_that_shard_parameters(rules):
  step = planned_step()
  step.config.rules = rules
  result = gate.check_replication(step)
  assert result.ok == (rules in ('dp', 'tp'))
  expected = f'3.00 GiB whole on each chip, which rules={rules!r} intend'
  if not result.ok:
    expected = 'params/w float32[4,4], 3.00 GiB, is whole on every chip'
  assert result.text == expected


LOWERED = """HloModule jit_f

FileNames
1 "/home/me/t5lab/models/layers.py"
2 "/site-packages/flax/linen.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=65 end_line=65 column=8 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=8 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

ENTRY main.1 {
  a = f32[2,3]{1,0} parameter(0)
  b = f32[3,4]{1,0} parameter(1)
  c = bf16[3,4]{1,0} parameter(2)
  d1 = f32[2,4]{1,0} dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="layers/mlp/wi_0/dot_general" stack_frame_id=2}
  d2 = f32[2,4]{1,0} dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="jit(f)/jvp(Transformer.unembed)/logits/dot_general" stack_frame_id=2}
  d3 = f32[2,4]{1,0} dot(a, c), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
metadata={op_name="layers/attn/o/dot_general" stack_frame_id=2}
  ROOT t = (f32[2,4]{1,0}, f32[2,4]{1,0}, f32[2,4]{1,0}) tuple(d1, d2, d3)
}
"""


def test_float32_products_are_named_with_their_line():
  (product,) = float32.unexpected_products(LOWERED)
  assert str(product) == ('layers/mlp/wi_0/dot_general f32[2,3] x f32[3,4] '
                          '(models/layers.py:65)')
  assert float32.unexpected_products(LOWERED, ('mlp/wi_0',)) == []
  assert gate.check_float32(planned_step(), LOWERED) == gate.BudgetCheck(
      'no float32 matmul', False, str(product))
  assert gate.check_float32(planned_step(float32=('wi_0',)), LOWERED).ok


def test_every_family_multiplies_in_bfloat16():
  """In the real step, lowered for the CPU, only logits and routers are float32."""
  from t5lab.programs import build
  def text(row, dtype):
    c = config.tiny(config.base(row))
    c.model.dtype = dtype
    return build.program(c).lower().as_text(dialect='hlo', debug_info=True)
  assert list(map(str, float32.unexpected_products(text('switch/base', 'bfloat16')))) == []
  named = [product for product in float32.unexpected_products(text('tiny', 'float32'))
           if 'mlp/wi_0' in product.op_name]
  assert named and all(product.where for product in named)


# --- the search --------------------------------------------------------------------------------


def test_factorizations():
  assert search.factorizations(4, 2) == [(1, 4), (2, 2), (4, 1)]
  assert len(search.factorizations(16, 3)) == 15 and search.factorizations(3, 1) == [(3,)]


def test_the_searched_axes_come_from_the_rules(monkeypatch):
  assert {rules: search.searched_axes(rules) for rules in sharding.RULES} == {
      'dp': (), 'fsdp': ('fsdp',), 'tp': ('model',), 'fsdp_tp': ('fsdp', 'model'),
      'sp': ('fsdp', 'sequence'), 'ep': ('fsdp', 'expert')}
  # new rules are searched without another entry
  monkeypatch.setitem(sharding.RULES, 'new', {'embed': ('dcn_fsdp', 'sequence')})
  tried = [rules for rules, _ in search.meshes(config.base('t5_1_1/base'), chips.parse('v5e:2x2'))]
  assert search.searched_axes('new') == ('sequence',) and 'new' in tried


def test_meshes_fill_the_slice_and_keep_slices_apart():
  c = config.base('t5_1_1/base')
  meshes = list(search.meshes(c, chips.parse('v5e:4x4*2')))
  for rules, mesh in meshes:
    assert math.prod(mesh.values()) == 32 and mesh['dcn_data'] == 2 and mesh.get('model', 1) <= 12
    assert rules != 'ep' and all(mesh[axis] > 1 for axis in search.searched_axes(rules))
  assert ('fsdp', {'dcn_data': 2, 'data': 1, 'fsdp': 16}) in meshes
  c.model.experts = 8
  assert any(rules == 'ep' for rules, _ in search.meshes(c, chips.parse('v5e:4x4')))


def test_fitting_plans_come_first_then_fast_ones():
  plans = [{'fits': False}, {'fits': True, 'step_seconds': 2.}, {'fits': False, 'step_seconds': 1.},
           {'fits': True, 'step_seconds': 1.5}]
  ranked = search.ranked([{'plan': p} for p in plans])
  assert [plans.index(row['plan']) for row in ranked] == [3, 1, 2, 0]


def candidate(seconds, remat='none', microbatches=1):
  return search.Candidate(seconds, 'dp', {'data': 2}, remat, microbatches, None)


def test_the_next_candidate_follows_from_the_results():
  a, b = candidate(1.), candidate(1.04, 'full')
  c, d = candidate(1.02, microbatches=2), candidate(1.05, 'full', 2)
  e, f = candidate(1.03, 'full', 4), candidate(1., microbatches=4)
  assert search._next_candidate([a, c, b, d], []) is a             # the formula's best
  # a is slow: untried choices are assumed to be faster, so d is next and not the runner-up
  assert search._next_candidate([a, c, b, d], [(a, 1.2)]) is d
  # remat full was less slow than none: another candidate with it, the formula's second
  assert search._next_candidate([a, d, f, e], [(a, 1.2), (d, 1.15)]) is e
  assert search._next_candidate([a, d, f, e], [(a, 1.15), (d, 1.3)]) is f
  assert search._next_candidate([a, b], [(a, None)]) is b          # a does not fit


def test_the_search_prints_lines_for_the_config(in_process, capsys):
  assert plan.main(['--config', BASE, '--search', '--json', '--finalists', '2', '--topology',
                    'v5e:2x2']) == 0
  result = json.loads(capsys.readouterr().out)
  assert result['fitting'] > 0 and len(result['finalists']) == 2
  [own] = [row for row in result['finalists'] if row['own']]       # the current config
  assert (own['rules'], own['remat'], own['microbatches']) == ('fsdp', 'full', 4)
  assert own['mesh'] == {'dcn_data': 1, 'data': 1, 'fsdp': 4}
  report.show_search(result)
  text = capsys.readouterr().out
  assert all(f'  {line}\n' in text for line in result['best']['lines'])
  first = result['finalists'][0]
  overrides = dict(o.removeprefix('--config.').split('=') for o in result['best']['overrides'])
  c = config.load(BASE, overrides)
  lines = result['best']['lines']
  assert (c.rules, c.model.remat, c.optim.microbatches) == (
      first['rules'], first['remat'], first['microbatches'])
  assert {axis: c.mesh[axis] for axis in first['mesh']} == first['mesh']
  assert f'c.rules = {c.rules!r}' in lines and f'c.model.remat = {c.model.remat!r}' in lines
  assert c.mesh.data * c.mesh.fsdp * c.mesh.model * c.mesh.sequence == 4
