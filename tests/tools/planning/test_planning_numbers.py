"""Model FLOPs, memory and network against published or hand-counted numbers; the plan's cache."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from t5lab.errors import UsageError
from t5lab.models import families
from t5lab.tools.planning import chips, collectives, compiling, flops, hlo, memory
from t5lab.tools.planning.collectives import Collective

GIB = 2 ** 30


def model(name, **changes):
  fields = {**families.row(name), **changes}
  return families.TransformerConfig(**fields)


@pytest.mark.parametrize('name, gigaflops', [     # training a row of 512 + 114
    ('t5_1_0/small', 106), ('t5_1_0/base', 425), ('t5_1_0/large', 1442), ('t5_1_0/3b', 5702),
    ('t5_1_0/11b', 22739), ('t5_1_1/base', 425), ('t5_1_1/xl', 5342), ('t5_1_1/xxl', 20893)])
def test_model_flops_of_t5(name, gigaflops):
  assert flops.row_flops(model(name), 512, 114).train / 1e9 == pytest.approx(gigaflops, abs=0.5)


def test_model_flops_by_hand():
  # decoder-only, grouped keys: D 8, N 4, K 2, H 4, F 16 gated, V 32, one layer, 10 positions
  m = model('llama2/7b', vocab_size=32, d_model=8, d_ff=16, n_heads=4, n_kv_heads=2, d_head=4,
            dec_layers=1)
  weights = 2 * 10 * (2 * 8 * 16 + 2 * 8 * 8 + 3 * 8 * 16)
  scores = 4 * 16 * 10 * 10 / 2
  row = flops.row_flops(m, 0, 10)
  head = 2 * 8 * 32 * 10
  assert (row.forward, row.attention, row.tokens) == (weights + scores + head, scores, 10)
  assert row.train == 3 * row.forward
  # encoder-only with its head: every position is predicted, through one more D x D
  m = model('bert/base', d_model=8, d_ff=16, n_heads=2, d_head=4, enc_layers=1, vocab_size=32,
            nsp=False)
  layers = 2 * 6 * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 8 * 6 * 6
  assert flops.row_flops(m, 6, 0).forward == layers + 6 * (2 * 8 * 32 + 2 * 8 * 8)


def test_only_the_experts_of_a_token_count():
  dense = model('t5_1_1/base')
  for top_k in (1, 2):
    sparse = dataclasses.replace(dense, experts=32, expert_top_k=top_k, moe_every=2)
    more = flops.row_flops(sparse, 512, 114).layers - flops.row_flops(dense, 512, 114).layers
    router = 2 * (512 + 114) * 6 * 768 * 32
    experts = 2 * (512 + 114) * 6 * (top_k - 1) * 3 * 768 * 2048
    assert more == router + experts


def test_recomputation():
  row = flops.row_flops(model('t5_1_1/base'), 512, 114)
  assert row.executed('none', False) == row.train
  assert row.executed('full', False) == row.train + row.layers
  assert row.executed('full', True) == row.train + row.forward
  assert row.executed('dots', False) == row.train + row.attention


def test_local_attention_has_few_keys():
  m = model('longt5_local/base')
  assert flops.keys_per_query(m, 4096) == 255 and flops.keys_per_query(m, 100) == 100
  assert flops.keys_per_query(model('longt5_tglobal/base'), 4096) == 255 + 4096 // 16


# --- memory -------------------------------------------------------------------------------------


def test_bytes_on_a_device_and_replicated_tensors():
  mesh = AbstractMesh((4, 2), ('fsdp', 'model'), axis_types=(AxisType.Auto,) * 2)
  leaf = lambda shape, spec, dtype=jnp.float32: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, spec))
  leaves = memory.tensors(
      params={'w': leaf((4096, 8192), P('fsdp', 'model')), 'v': leaf((8192, 4096), P())},
      batch={'tokens': leaf((64, 10), P('fsdp'), jnp.int32)})
  assert memory.bytes_by_kind(leaves) == {'parameters': 4096 * 8192 * 4 // 8 + 8192 * 4096 * 4,
                                          'batch': 16 * 10 * 4}
  assert memory.elements(leaves, 'params') == 2 * 4096 * 8192
  (whole,) = memory.large_replicated(leaves)
  assert str(whole) == 'params/v float32[8192,4096]' and whole.bytes == 128 * 2 ** 20
  assert memory.large_replicated(leaves, limit=128 * 2 ** 20) == []


def donated(header):
  return hlo.parse(f"""HloModule m, {header}

ENTRY %main (a: f32[4], b: f32[4], c: s32[4]) -> (f32[4], f32[4]) {{
  %a = f32[4]{{0}} parameter(0), metadata={{op_name="state.params[\\'w\\'][\\'kernel\\']"}}
  %b = f32[4]{{0}} parameter(1), metadata={{op_name="state.opt_state[0].v[\\'w\\'][\\'kernel\\']"}}
  %c = s32[4]{{0}} parameter(2), metadata={{op_name="batch[\\'tokens\\']"}}
  ROOT %t = (f32[4]{{0}}, f32[4]{{0}}) tuple(%a, %b)
}}
""")


def test_donated_buffers_that_are_not_reused_are_named():
  both = 'input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, must-alias) }'
  assert memory.not_aliased(donated(both)) == []
  assert memory.not_aliased(donated('input_output_alias={ {0}: (0, {}, may-alias) }')) == [
      'opt_state/0/v/w/kernel']
  assert memory.not_aliased(donated('is_scheduled=true'))[0] == 'params/w/kernel'


def test_activations_by_hand():
  # one encoder layer, D 8, N 2, H 4, F 16 (one act), 3 rows of 10, bfloat16
  m = model('t5_1_0/small', d_model=8, d_ff=16, n_heads=2, d_head=4, enc_layers=1, dec_layers=0,
            vocab_size=32, dtype='bfloat16', remat='full')
  one = memory.Shards()
  full = memory.activation_bytes(m, 3, 10, 0, one, 1)
  assert full['saved'] == 3 * 10 * 8 * 2
  assert full['logits'] == 3 * 10 * 32 * 4 * 2
  dots = memory.activation_bytes(dataclasses.replace(m, remat='dots'), 3, 10, 0, one, 1)
  assert dots['saved'] == 3 * 10 * (8 + 8 + 2 * 8 + 2 * 8 + 16) * 2
  none = memory.activation_bytes(dataclasses.replace(m, remat='none'), 3, 10, 0, one, 1)
  scores = 3 * 2 * 10 * 10 * (2 + 8)
  assert none['saved'] == dots['saved'] + 3 * 10 * (3 * 8 + 2 * 16) * 2 + scores
  assert none['layer'] == 0
  split = memory.activation_bytes(m, 4, 10, 0, memory.Shards(batch=4, length=2), 2)
  assert split['saved'] == 10 / 2 * 8 * 2 and split['logits'] == 10 / 2 * 32 * 8 / 2


# --- messages of the compiler ------------------------------------------------------------------

REJECTION = ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
             'temporaries (192.00G) exceeds available HBM (30.75G).')
REPORT = """E1128 11:53:12.949038 compiler.cc:3781] XLA:TPU compile permanent error. Ran out of \
memory in memory space hbm. Used 192.00G of 30.75G hbm. Exceeded hbm capacity by 161.25G.

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   64.00GiB(100%);   64.00GiB;            0;                1; f32[262144,65536]
  192.00GiB(100%);  512.00MiB;            0;                1; f32[64,64]
"""
WARNING = """W1128 11:46:19.644183 20523 spmd_partitioner.cc:654] [SPMD] Involuntary full \
rematerialization. The compiler cannot go from sharding {devices=[4,1,1]<=[4]} to \
{devices=[1,2,2]<=[4]} efficiently for HLO operation %reshape.0 = f32[1,64,64]{2,1,0} \
reshape(%param), sharding={devices=[4,1,1]<=[4]}, metadata={op_name="jit(h)/reshape" \
stack_frame_id=2}. As the last resort, SPMD will replicate the tensor and then partition it.
"""


def test_needed_memory_and_largest_buffers_of_a_rejected_program():
  assert compiling.exceeded_memory(REJECTION) == (192 * GIB, 30.75 * GIB)
  assert compiling.exceeded_memory(REPORT) == (192 * GIB, 30.75 * GIB)
  assert compiling.exceeded_memory('INTERNAL: something') is None
  assert compiling.reported_buffers(REPORT) == [
      (64 * GIB, 'f32[262144,65536]'), (GIB / 2, 'f32[64,64]')]


def test_the_partitioners_warning_names_the_operation_once():
  assert compiling.spmd_warnings(WARNING * 2 + 'W other\n') == [
      'jit(h)/reshape: f32[1,64,64] reshape, from {devices=[4,1,1]<=[4]} to '
      '{devices=[1,2,2]<=[4]}']


# --- the cache ---------------------------------------------------------------------------------


def test_a_cached_result_is_read_and_a_damaged_file_is_not(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  compiled = compiling.Compiled('text', {'temp': 3}, ['w'], 1.5)
  compiling.write_cache('x', compiled)
  assert compiling.read_cache('x') == dataclasses.replace(compiled, cached=True, largest=[])
  (path,) = (tmp_path / 't5lab/plan').iterdir()
  assert path.name == 'x.json.gz'
  path.write_bytes(path.read_bytes()[:-9])
  assert compiling.read_cache('x') is None and compiling.read_cache('y') is None


def test_a_cache_that_cannot_be_written_is_skipped(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  (tmp_path / 't5lab').write_text('a file where the folder would be')
  compiling.write_cache('x', compiling.Compiled('text', {}, [], 1.))
  assert compiling.read_cache('x') is None


def test_the_key_depends_on_code_config_step_and_slice(monkeypatch):
  slice_ = chips.parse('v5e:4x4')
  base = {'model': {'d': 1}, 'eval': {'n': 1}, 'total_steps': 5}
  key = lambda c, where=slice_, step='train': compiling.cache_key(c, where, step)
  assert key(base) == key({**base, 'total_steps': 6, 'eval': {'n': 2}})
  keys = [key(base), key({**base, 'model': {'d': 2}}), key(base, chips.parse('v5e:4x8')),
          key(base, step='decode'), key({**base, 'eval': {'n': 2}}, step='decode')]
  monkeypatch.setattr(compiling, 'code_digest', lambda: 'other code')
  assert len({*keys, key(base)}) == 6


@pytest.fixture
def package(tmp_path):
  """A package whose module a imports b.c inside a function, which imports d."""
  root = tmp_path / 'pkg'
  (root / 'b').mkdir(parents=True)
  sources = {'__init__': 'import pkg.unused', 'unused': '', 'b/__init__': '', 'd': 'X = 1',
             'a': 'import os\ndef f():\n  from pkg.b import c', 'b/c': 'from pkg.d import X'}
  for name, text in sources.items():
    (root / f'{name}.py').write_text(text)
  return root


def test_the_digest_covers_all_imported_modules(package):
  relative = lambda: [str(path.relative_to(package))
                      for path in compiling.source_files(('pkg.a',), package)]
  assert relative() == ['a.py', 'b/__init__.py', 'b/c.py', 'd.py']

  # A change of an indirectly imported module changes the digest, one of another module does not.
  digest = lambda: compiling.code_digest.__wrapped__(('pkg.a',), package)
  before = digest()
  (package / 'unused.py').write_text('X = 2')
  assert digest() == before
  (package / 'd.py').write_text('X = 2')
  assert digest() != before


@pytest.mark.parametrize('module', ['pkg.gone', 'pkg.b.gone'])
def test_a_module_without_a_file_is_an_error(package, module):
  (package / 'd.py').write_text(f'import {module}')
  with pytest.raises(FileNotFoundError, match=f'the module {module} has no file'):
    compiling.source_files(('pkg.a',), package)


def test_the_key_covers_the_step():
  covered = {str(path.relative_to(compiling.PACKAGE))
             for path in compiling.source_files(compiling.PROGRAMS)}
  assert covered >= {'config.py', 'trees.py', 'models/transformer.py', 'models/layers.py',
                     'models/moe.py', 'training/steps.py', 'training/losses.py',
                     'training/optim.py', 'training/guards.py', 'parallel/sharding.py',
                     'data/batches/features.py', 'programs/build.py', 'programs/loading.py',
                     'models/cache.py', 'tools/planning/decode.py'}


# --- slices ------------------------------------------------------------------------------------


def test_topologies():
  t = chips.parse('v5e:16x16*2')
  assert (t.chips, t.slices, t.name) == (512, 2, 'v5e:16x16*2')
  assert chips.parse('v5p:2x2x4').chips == 16
  assert chips.environment(chips.parse('v4:2x2x2'))['TPU_ACCELERATOR_TYPE'] == 'v4-16'


@pytest.mark.parametrize('name, rings', [
    ('v5e:8x16', [False, True]), ('v5p:4x4x8', [True] * 3), ('v4:2x2x4', [False] * 3)])
def test_rings(name, rings):
  t = chips.parse(name)
  assert [t.is_ring(axis) for axis in range(len(t.shape))] == rings


@pytest.mark.parametrize('text, message', [
    ('v5e', "'v5e' must be a chip, the shape"), ('v5x:4x4', "chip 'v5x' is unknown. Did you mean"),
    ('v5e:2x2x2', 'has 2 sizes, e.g. v5e:4x4'), ('v5p:4x4', 'has 3 sizes, e.g. v5p:2x2x2'),
    ('v5e:32x16', r'a pod of v5e has 16x16 chips; .* v5e:16x16\*2'), ('v5e:0x4', '2 sizes')])
def test_an_invalid_slice(text, message):
  with pytest.raises(UsageError, match=message):
    chips.parse(text)


def test_ring_formulas():
  assert Collective('all-gather', ('a',), 4, 100.).wire == 75
  assert Collective('reduce-scatter', ('a',), 4, 100.).wire == 75
  assert Collective('all-reduce', ('a',), 4, 100.).wire == 150
  assert Collective('collective-permute', ('a',), 2, 100.).wire == 100


def test_bandwidth_of_rings_lines_and_slices():
  pod = chips.parse('v5e:16x16')
  ring = collectives.Network(pod, {'data': 16, 'fsdp': 16}, {'data': (0,), 'fsdp': (1,)})
  assert ring.bandwidth(('data',)) == 9e10 and ring.bandwidth(('data', 'fsdp')) == 18e10
  line = collectives.Network(pod, {'data': 64, 'model': 4}, {'data': (0, 1), 'model': (1,)})
  assert line.bandwidth(('model',)) == 4.5e10        # 4 neighbours of 16 are a line
  big = Collective('all-gather', ('data',), 16, 16e9)
  assert ring.seconds(big) == pytest.approx(15e9 / 9e10)
  small = Collective('all-gather', ('data',), 16, 16.)
  assert ring.seconds(small) == 15 * chips.HOP / 2
  far = collectives.Network(chips.parse('v5e:4x4*2'), {'dcn_data': 2, 'fsdp': 16})
  both = Collective('all-reduce', ('dcn_data', 'fsdp'), 32, 32e9)
  near = 2 * 32e9 * 15 / 16 / 9e10
  assert far.seconds(both) == pytest.approx(near + 2 * 2e9 / 2 / 3.125e9, rel=1e-3)
  assert far.crosses_slices(both) and not far.crosses_slices(
      Collective('all-gather', ('fsdp',), 16, 1.))
