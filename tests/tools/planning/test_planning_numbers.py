"""Model FLOPs, memory and network by numbers known from elsewhere or counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from t5lab.errors import UsageError
from t5lab.models import families
from t5lab.tools.planning import collectives, compiling, flops, hlo, memory, topology

GIB = 2 ** 30


def model(name, **changes):
  fields = {**families.row(name), **changes}
  return families.TransformerConfig(**fields)


@pytest.mark.parametrize('name, gigaflops', [     # PERFORMANCE 1.3, training a row of 512 + 114
    ('t5_1_0/small', 106), ('t5_1_0/base', 425), ('t5_1_0/large', 1442), ('t5_1_0/3b', 5702),
    ('t5_1_0/11b', 22739), ('t5_1_1/base', 425), ('t5_1_1/xl', 5342), ('t5_1_1/xxl', 20893)])
def test_model_flops_of_t5(name, gigaflops):
  assert flops.of_row(model(name), 512, 114).train / 1e9 == pytest.approx(gigaflops, abs=0.5)


def test_model_flops_by_hand():
  # decoder-only, grouped keys: D 8, N 4, K 2, H 4, F 16 gated, V 32, one layer, 10 positions
  m = model('llama2/7b', vocab_size=32, d_model=8, d_ff=16, n_heads=4, n_kv_heads=2, d_head=4,
            dec_layers=1)
  weights = 2 * 10 * (2 * 8 * 16 + 2 * 8 * 8 + 3 * 8 * 16)
  scores = 4 * 16 * 10 * 10 / 2
  row = flops.of_row(m, 0, 10)
  head = 2 * 8 * 32 * 10
  assert (row.forward, row.attention, row.tokens) == (weights + scores + head, scores, 10)
  assert row.train == 3 * row.forward
  # encoder-only with its head: every position is predicted, through one more D x D
  m = model('bert/base', d_model=8, d_ff=16, n_heads=2, d_head=4, enc_layers=1, vocab_size=32,
            nsp=False)
  layers = 2 * 6 * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 8 * 6 * 6
  assert flops.of_row(m, 6, 0).forward == layers + 6 * (2 * 8 * 32 + 2 * 8 * 8)


def test_model_flops_of_experts_are_those_that_a_token_meets():
  dense = model('t5_1_1/base')
  for top_k in (1, 2):
    sparse = dataclasses.replace(dense, experts=32, expert_top_k=top_k, moe_every=2)
    more = flops.of_row(sparse, 512, 114).layers - flops.of_row(dense, 512, 114).layers
    router = 2 * (512 + 114) * 6 * 768 * 32
    experts = 2 * (512 + 114) * 6 * (top_k - 1) * 3 * 768 * 2048
    assert more == router + experts


def test_recomputation():
  row = flops.of_row(model('t5_1_1/base'), 512, 114)
  assert row.executed('none', False) == row.train
  assert row.executed('full', False) == row.train + row.layers
  assert row.executed('full', True) == row.train + row.forward
  assert row.executed('dots', False) == row.train + row.attention


def test_local_attention_meets_few_keys():
  m = model('longt5_local/base')
  assert flops.keys_met(m, 4096) == 255 and flops.keys_met(m, 100) == 100
  assert flops.keys_met(model('longt5_tglobal/base'), 4096) == 255 + 4096 // 16


# -- memory --------------------------------------------------------------------------------------


def test_bytes_of_a_device_and_what_is_whole_on_each():
  mesh = AbstractMesh((4, 2), ('fsdp', 'model'), axis_types=(AxisType.Auto,) * 2)
  leaf = lambda shape, spec, dtype=jnp.float32: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, spec))
  found = memory.tensors(
      params={'w': leaf((4096, 8192), P('fsdp', 'model')), 'v': leaf((8192, 4096), P())},
      batch={'tokens': leaf((64, 10), P('fsdp'), jnp.int32)})
  assert memory.by_kind(found) == {'parameters': 4096 * 8192 * 4 // 8 + 8192 * 4096 * 4,
                                   'batch': 16 * 10 * 4}
  (whole,) = memory.replicated(found)
  assert str(whole) == 'params/v float32[8192,4096]' and whole.bytes == 128 * 2 ** 20
  assert memory.replicated(found, limit=128 * 2 ** 20) == []


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
  full = memory.activations(m, 3, 10, 0, one, 1)
  assert full['saved'] == 3 * 10 * 8 * 2
  assert full['logits'] == 3 * 10 * 32 * 4 * 2
  dots = memory.activations(dataclasses.replace(m, remat='dots'), 3, 10, 0, one, 1)
  assert dots['saved'] == 3 * 10 * (8 + 8 + 2 * 8 + 2 * 8 + 16) * 2
  none = memory.activations(dataclasses.replace(m, remat='none'), 3, 10, 0, one, 1)
  scores = 3 * 2 * 10 * 10 * (2 + 8)
  assert none['saved'] == dots['saved'] + 3 * 10 * (3 * 8 + 2 * 16) * 2 + scores
  assert none['layer'] == 0
  split = memory.activations(m, 4, 10, 0, memory.Shards(batch=4, length=2), 2)
  assert split['saved'] == 10 / 2 * 8 * 2 and split['logits'] == 10 / 2 * 32 * 8 / 2


# -- what the compiler says ----------------------------------------------------------------------

REFUSAL = ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
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


def test_a_refusal_says_how_much_and_what():
  assert compiling.exceeded(REFUSAL) == (192 * GIB, 30.75 * GIB)
  assert compiling.exceeded(REPORT) == (192 * GIB, 30.75 * GIB)
  assert compiling.exceeded('INTERNAL: something') is None
  assert compiling.buffers(REPORT) == [(64 * GIB, 'f32[262144,65536]'), (GIB / 2, 'f32[64,64]')]


def test_the_partitioners_warning_names_the_operation_once():
  assert compiling.warnings(WARNING * 2 + 'W other\n') == [
      'jit(h)/reshape: f32[1,64,64] reshape, from {devices=[4,1,1]<=[4]} to '
      '{devices=[1,2,2]<=[4]}']


def test_what_is_kept_is_read_back_and_a_torn_file_is_not(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  kept = compiling.Compiled('text', {'temp': 3}, ['w'], 1.5)
  compiling.write('x', kept)
  assert compiling.read('x') == dataclasses.replace(kept, cached=True, largest=[])
  (path,) = (tmp_path / 't5lab/plan').iterdir()
  path.write_bytes(path.read_bytes()[:-9])
  assert compiling.read('x') is None and compiling.read('y') is None


def test_the_key_follows_what_decides_the_program():
  slice_ = topology.parse('v5e:4x4')
  base = {'model': {'d': 1}, 'eval': {'n': 1}, 'total_steps': 5}
  key = lambda c, where=slice_, what='train': compiling.key(c, where, what)
  assert key(base) == key({**base, 'total_steps': 6, 'eval': {'n': 2}})
  others = [key({**base, 'model': {'d': 2}}), key(base, topology.parse('v5e:4x8')),
            key(base, what='decode'), key({**base, 'eval': {'n': 2}}, what='decode')]
  assert len({key(base), *others}) == 5


# -- slices --------------------------------------------------------------------------------------


def test_topologies():
  t = topology.parse('v5e:16x16*2')
  assert (t.chips, t.slices, t.name) == (512, 2, 'v5e:16x16*2')
  assert topology.parse('v5p:2x2x4').chips == 16
  assert topology.environment(topology.parse('v4:2x2x2'))['TPU_ACCELERATOR_TYPE'] == 'v4-16'
  closed = lambda text: [topology.parse(text).closed(i) for i in range(len(
      topology.parse(text).shape))]
  assert closed('v5e:8x16') == [False, True] and closed('v5p:4x4x8') == [True] * 3
  assert closed('v4:2x2x4') == [False] * 3


@pytest.mark.parametrize('text, said', [
    ('v5e', 'the sizes of a slice'), ('v5x:4x4', "no chip 'v5x'. Did you mean"),
    ('v5e:2x2x2', '2 sizes, as v5e:4x4'), ('v5p:4x4', '3 sizes'), ('v5e:32x16', 'a pod of v5e'),
    ('v5e:0x4', '2 sizes')])
def test_a_slice_that_is_none(text, said):
  with pytest.raises(UsageError, match=said):
    topology.parse(text)


def made(kind, axes, group, size):
  return collectives.Collective(kind, axes, group, size, 'sync', '', None)


def test_ring_formulas():
  assert made('all-gather', ('a',), 4, 100.).wire == 75
  assert made('reduce-scatter', ('a',), 4, 100.).wire == 75
  assert made('all-reduce', ('a',), 4, 100.).wire == 150
  assert made('collective-permute', ('a',), 2, 100.).wire == 100


def test_bandwidth_of_rings_lines_and_slices():
  pod = topology.parse('v5e:16x16')
  ring = collectives.Network(pod, {'data': 16, 'fsdp': 16}, {'data': (0,), 'fsdp': (1,)})
  assert ring.bandwidth(('data',)) == 9e10 and ring.bandwidth(('data', 'fsdp')) == 18e10
  part = collectives.Network(pod, {'data': 64, 'model': 4}, {'data': (0, 1), 'model': (1,)})
  assert part.bandwidth(('model',)) == 4.5e10        # 4 of 16 in a row are no ring
  big = made('all-gather', ('data',), 16, 16e9)
  assert ring.seconds(big) == pytest.approx(15e9 / 9e10)
  small = made('all-gather', ('data',), 16, 16.)
  assert ring.seconds(small) == 15 * topology.HOP / 2
  far = collectives.Network(topology.parse('v5e:4x4*2'), {'dcn_data': 2, 'fsdp': 16})
  both = made('all-reduce', ('dcn_data', 'fsdp'), 32, 32e9)
  near = 2 * 32e9 * 15 / 16 / 9e10
  assert far.seconds(both) == pytest.approx(near + 2 * 2e9 / 2 / 3.125e9, rel=1e-3)
  assert far.crosses_slices(both) and not far.crosses_slices(made('all-gather', ('fsdp',), 16, 1.))
