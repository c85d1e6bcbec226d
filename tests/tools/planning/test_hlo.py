"""Reading the TPU compiler's scheduled HLO, against hand-counted FLOPs, trips, bytes and waits.

The .txt files are four small programs compiled by libtpu 0.0.42 for v5e (backend_config is reduced
to the costs in two of them):
  scan_two_layers   x[256, 512] through two layers tanh(x @ w[512, 512]) in one lax.scan, one chip
  tensor_parallel   tanh(x[256, 512] @ a[512, 1024]) @ b, mesh data=2 model=2, a and b over model
  async_gather      tanh(x[4096, 2048] @ a[2048, 2048]) @ b, all sharded over fsdp=4
  fsdp_step         gradient of 4 scanned, rematerialised layers, x[8192, 2048], w over fsdp=4
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5lab.tools.planning import chips, collectives, hlo, hlo_costs, memory, timeline

HERE = pathlib.Path(__file__).parent
CHIP = chips.CHIPS['v5e']
SLICE = chips.parse('v5e:2x2')


@functools.cache
def module(name):
  return hlo.parse((HERE / f'{name}.txt').read_text())


def simulate(m, topology=SLICE, **mesh):
  return timeline.simulate(m, collectives.Network(topology, mesh))


def flops(m, computation):
  return sum(hlo_costs.product_flops(product, parent) for op in computation.ops
             for product, parent in hlo_costs.matrix_products(m, op, computation))


def test_a_loop_is_multiplied_by_its_trips():
  m = module('scan_two_layers')
  result = simulate(m, data=1)
  assert [trips for _, trips in result.loops] == [2]
  assert result.flops == 2 * 2 * 256 * 512 * 512
  (entry, once, _), (body, twice, loops) = m.executed()
  assert (once, twice, len(loops)) == (1, 2, 1)
  cycles = lambda c: sum(op.cycles or 0 for op in c.ops)
  assert cycles(body) == 2946 + 7012 and cycles(entry) == 0
  assert result.cycles == 2 * (2946 + 7012)
  assert result.seconds == pytest.approx(result.cycles / CHIP.clock + result.waits)


def test_forward_recomputation_and_both_gradients_are_four_products():
  result = simulate(module('fsdp_step'), fsdp=4)
  assert result.flops == 4 * 4 * 2 * (8192 // 4) * 2048 * 2048
  assert [trips for _, trips in result.loops] == [4, 4]
  assert result.flops_by_type == {'bf16': result.flops}


def test_an_all_reduce_over_the_model_axis():
  (traffic,) = simulate(module('tensor_parallel'), data=2, model=2).traffic.values()
  size = 128 * 512 * 2                   # bf16, half of the rows
  assert (traffic.kind, traffic.where, traffic.count) == ('all-reduce', 'model', 1)
  assert traffic.size == size and traffic.wire == 2 * size / 2
  # two chips in an open line: 45 GB/s
  assert [traffic.seconds, traffic.exposed] == pytest.approx([size / 45e9] * 2)
  assert traffic.asynchronous == 0


def test_an_asynchronous_gather_is_counted_once_and_hides_behind_its_product():
  result = simulate(module('async_gather'), fsdp=4)
  (traffic,) = result.traffic.values()
  wire = 2048 * 2048 * 2 * 3 / 4
  assert (traffic.kind, traffic.where, traffic.count) == ('all-gather', 'fsdp', 2)
  assert traffic.wire == 2 * wire
  each = wire / 90e9                     # both open axes of 2x2
  assert traffic.seconds == pytest.approx(2 * each)
  assert traffic.asynchronous == pytest.approx(each)
  product = next(op for op in module('async_gather').entry.ops
                 if op.calls.startswith('async_collective_fusion'))
  hidden = product.cycles / CHIP.clock + result.waits
  assert traffic.exposed == pytest.approx(2 * each - hidden, rel=0.1)
  assert traffic.exposed < 2 * each - product.cycles / CHIP.clock + 1e-12


GATHERS = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[512,2048]) -> bf16[2048,2048] {
  %a = bf16[512,2048]{1,0} parameter(0)
  %s1 = (bf16[512,2048]{1,0}, bf16[2048,2048]{1,0}) all-gather-start(%a), replica_groups=[1,4]<=[4]
  %s2 = (bf16[512,2048]{1,0}, bf16[2048,2048]{1,0}) all-gather-start(%a), replica_groups=[1,4]<=[4]
  %d1 = bf16[2048,2048]{1,0} all-gather-done(%s1)
  ROOT %d2 = bf16[2048,2048]{1,0} all-gather-done(%s2)
}
"""


def test_the_network_runs_one_collective_at_a_time():
  result = simulate(hlo.parse(GATHERS), fsdp=4)
  (traffic,) = result.traffic.values()
  each = 2048 * 2048 * 2 * 3 / 4 / 90e9
  assert (traffic.count, traffic.size) == (2, 2 * 2048 * 2048 * 2)
  assert [traffic.exposed, traffic.asynchronous, result.seconds] == pytest.approx([2 * each] * 3)


def test_a_fused_reduce_scatter_and_gathers_in_loops():
  traffic = simulate(module('fsdp_step'), fsdp=4).traffic
  assert set(traffic) == {('all-gather', 'fsdp'), ('reduce-scatter', 'fsdp'),
                          ('collective-permute', 'fsdp')}
  gather = traffic['all-gather', 'fsdp']
  assert gather.count == 8               # the weight of each layer, forward and backward
  assert gather.wire == 8 * 2048 * 2048 * 2 * 3 / 4
  scatter = traffic['reduce-scatter', 'fsdp']
  assert scatter.count == 4 and scatter.size == 4 * 4 * 528 * 2048 * 2   # rows padded to 528


def test_buffers_that_loops_fill_in_hbm():
  m = hlo.parse((HERE / 'fsdp_step.txt').read_text().replace('S(1)', ''))
  assert memory.stacked_buffers(m) == {
      'saved for the backward pass': 4 * 2048 * 2048 * 2,        # the input of each layer
      'gradients of stacked layers': 4 * 512 * 2048 * 4}
  assert set(memory.stacked_buffers(module('fsdp_step')).values()) == {0}       # all in VMEM


def test_donated_buffers_are_in_the_header():
  assert module('fsdp_step').aliases == {0: 1} and module('async_gather').aliases == {}


def test_buffers_in_vmem_move_no_hbm_bytes():
  m = module('async_gather')
  by_kind = {}
  for op in m.entry.ops:
    by_kind.setdefault(op.kind, []).append(hlo_costs.hbm_bytes(m, op, m.entry))
  half = 1024 * 2048 * 2
  assert sorted(by_kind['copy-start']) == [half / 2, half]       # read from HBM, written to VMEM
  assert by_kind['fusion'][-1] == half                           # the result, its operands in VMEM


SLICED = """HloModule m, is_scheduled=true

%inner (p0: f32[8,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,128]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

%update (p0.1: f32[8,128], p1.1: f32[1,128], p2.1: s32[]) -> f32[8,128] {
  %p0.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p1.1 = f32[1,128]{1,0:T(8,128)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %put = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %zero.1)
}

ENTRY %main (a: f32[8,128], i: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %row = f32[1,128]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%inner
  ROOT %all = f32[8,128]{1,0:T(8,128)} fusion(%a, %row, %i), kind=kLoop, calls=%update
}
"""


def test_slices_and_updates_count_instead_of_whole_buffers():
  m = hlo.parse(SLICED)
  row, whole = (hlo_costs.hbm_bytes(m, m.entry.by_name[name], m.entry) for name in ('row', 'all'))
  assert row == 128 * 4 + 4 + 128 * 4            # the slice, the index, the result
  assert whole == 128 * 4 + 4 + 128 * 4          # the update read, the index, the update written


NESTED = SLICED[:SLICED.index('ENTRY')] + """%outer (q0: f32[8,128], q1: s32[], q2: f32[8,128]) -> (f32[8,128], f32[1,128], f32[8,128]) {
  %q0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  %q2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %cast = f32[8,128]{1,0:T(8,128)} bitcast(%q0)
  %line = f32[1,128]{1,0:T(8,128)} fusion(%cast, %q1), kind=kLoop, calls=%inner
  %twice = f32[1,128]{1,0:T(8,128)} add(%line, %line)
  %new = f32[8,128]{1,0:T(8,128)} fusion(%q0, %twice, %q1), kind=kLoop, calls=%update
  ROOT %out = (f32[8,128]{1,0:T(8,128)}, f32[1,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%new, %twice, %q2)
}

ENTRY %main (a: f32[8,128], i: s32[], b: f32[8,128]) -> (f32[8,128], f32[1,128], f32[8,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %b = f32[8,128]{1,0:T(8,128)} parameter(2)
  ROOT %all = (f32[8,128]{1,0:T(8,128)}, f32[1,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) fusion(%a, %i, %b), kind=kLoop, calls=%outer
}
"""                                                                    # noqa: E501


def test_slices_and_updates_in_nested_fusions():
  """The TPU's fusions with a collective are nested; a value that is passed on moves no bytes."""
  m = hlo.parse(NESTED)
  # read: the slice, the index; written: the row of the update, the row itself
  assert hlo_costs.hbm_bytes(m, m.entry.root, m.entry) == 128 * 4 + 4 + 2 * 128 * 4


def loop(condition, start='0'):
  return f"""HloModule m

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %s = (s32[], f32[4]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s), index=0
  %x.1 = f32[4]{{0}} get-tuple-element(%s), index=1
  ROOT %t.1 = (s32[], f32[4]{{0}}) tuple(%i.1, %x.1)
}}

%cond (s.2: (s32[], f32[4])) -> pred[] {{
  %s.2 = (s32[], f32[4]{{0}}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] {condition}
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %t = (s32[], f32[4]{{0}}) tuple(%zero, %x)
  %w = (s32[], f32[4]{{0}}) while(%t), condition=%cond, body=%body
  ROOT %y = f32[4]{{0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize('condition, start, trips', [
    ('compare(%i.2, %n), direction=LT', '0', 7), ('compare(%i.2, %n), direction=LE', '0', 8),
    ('compare(%n, %i.2), direction=GT', '0', 7), ('compare(%i.2, %n), direction=NE', '2', 5),
    ('compare(%i.2, %i.2), direction=EQ', '0', None), ('custom-call(%i.2)', '0', None)])
def test_trip_counts(condition, start, trips):
  m = hlo.parse(loop(condition, start))
  assert m.loop(m.entry.by_name['w'], m.entry)[1] == trips


def test_a_loop_of_unknown_length_is_listed():
  result = simulate(hlo.parse(loop('custom-call(%i.2)')), data=1)
  assert result.loops == [('w', None)]


def test_padding_fills_whole_tiles():
  (shape,) = hlo.parse_shapes('f32[8,114,2]{1,0,2:T(8,128)S(1)}')
  assert (shape.dims, shape.space) == ((8, 114, 2), 1)
  assert shape.bytes == 8 * 114 * 2 * 4 and shape.padded == 8 * 128 * 2 * 4


@pytest.mark.parametrize('fn, shapes', [
    (lambda a, b: a @ b, [(8, 16), (16, 32)]),
    (lambda a, b: jnp.einsum('bij,bjk->bik', a, b), [(3, 8, 16), (3, 16, 4)]),
    (lambda a, b: jax.lax.conv_general_dilated(a, b, (2, 1), ((1, 2), (0, 1))),
     [(2, 5, 9, 8), (6, 5, 3, 2)]),
    (lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1), ((2, 2), (1, 1)), lhs_dilation=(2, 3)),
     [(2, 4, 5, 6), (3, 4, 3, 3)]),
    (lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), ((0, 0),), rhs_dilation=(2,),
                                               feature_group_count=2), [(2, 4, 9), (6, 2, 3)]),
])
def test_flops_equal_those_of_xlas_counter(fn, shapes):
  lowered = jax.jit(fn).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])
  m = hlo.parse(lowered.as_text(dialect='hlo'))
  assert flops(m, m.entry) == lowered.cost_analysis()['flops'] > 0


def test_the_text_of_the_cpu_compiler():
  def f(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
  compiled = jax.jit(f).lower(jnp.ones((8, 16)), jnp.ones((5, 16, 16))).compile()
  m = hlo.parse(compiled.as_text())
  total = sum(flops(m, c) * times for c, times, _ in m.executed())
  assert total == 5 * 2 * 8 * 16 * 16


@pytest.mark.parametrize('text, axes, groups', [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', ('model',), 4),
    ('replica_groups={{0,2},{1,3},{4,6},{5,7}}', ('fsdp',), 4),
    ('replica_groups=[2,4]<=[8]', ('fsdp', 'model'), 2),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', ('data',), 4),
    ('replica_groups={}', ('data', 'fsdp', 'model'), 1),
    ('source_target_pairs={{0,4},{4,0},{1,1}}', ('data',), 3)])
def test_groups_are_named_by_mesh_axes(text, axes, groups):
  mesh = collectives.Network(SLICE, {'data': 2, 'fsdp': 2, 'model': 2})
  op = hlo.Op('x', 'all-reduce', (), (), f'), channel_id=1, {text}, use_global_device_ids=true',
              False)
  members = mesh.groups(op)
  assert len(members) == groups
  assert mesh.spanned(members) == axes


# An all-reduce of gradients between two slices of v5e:2x2, compiled by libtpu 0.0.42.
MEGASCALE = """HloModule m, is_scheduled=true

ENTRY %main (g: bf16[256,8,128]) -> bf16[256,8,128] {
  %g = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%g, %after-all), \
channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name=\
"xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv-done = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %sum = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%recv-done), index=0
}
"""


def test_collectives_between_slices_use_the_hosts_network():
  result = simulate(hlo.parse(MEGASCALE), chips.parse('v5e:2x2*2'), dcn_data=2, fsdp=4)
  (traffic,) = result.traffic.values()
  size = 256 * 8 * 128 * 2
  assert (traffic.kind, traffic.where, traffic.count) == ('all-reduce', 'dcn_data', 1)
  assert traffic.between_slices and traffic.size == traffic.wire == size
  assert traffic.seconds == pytest.approx(size / CHIP.dcn + 20e-6)
  assert traffic.asynchronous == traffic.exposed == traffic.seconds


def test_a_permutation_onto_itself_spans_no_axis():
  assert collectives.Network(SLICE, {'a': 4}).spanned(np.array([[1, 1], [2, 2]])) == ()


def test_text_without_a_program():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('HloModule nothing\n')
