"""GGUF: equal to what the library reads, LLaMA's rotary layout, hostile headers."""

import struct
import sys
import tracemalloc
import types

import jax
import numpy as np
import pytest

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.tools.interop import gguf
from t5lab.tools.interop.tensor_map import read, write

library = pytest.importorskip('gguf')

# V 40, D 64 (two blocks of 32), two layers, four query and two key heads of 16.
META = {'block_count': 2, 'context_length': 128, 'embedding_length': 64, 'feed_forward_length': 96,
        'attention.head_count': 4, 'attention.head_count_kv': 2,
        'attention.layer_norm_rms_epsilon': 1e-5, 'rope.freq_base': 500000.,
        'rope.dimension_count': 16, 'vocab_size': 40}
Q8, Q4 = 'Q8_0', 'Q4_1'
SHAPES = {'token_embd.weight': ((40, 64), Q8), 'output_norm.weight': ((64,), 'F32'),
          'output.weight': ((40, 64), 'F16')}
for layer in range(2):
  SHAPES |= {f'blk.{layer}.{name}.weight': spec for name, spec in {
      'attn_norm': ((64,), 'F32'), 'attn_q': ((64, 64), Q4), 'attn_k': ((32, 64), Q8),
      'attn_v': ((32, 64), 'F16'), 'attn_output': ((64, 64), Q4), 'ffn_norm': ((64,), 'F32'),
      'ffn_gate': ((96, 64), 'F32'), 'ffn_up': ((96, 64), 'BF16'),
      'ffn_down': ((64, 96), Q4)}.items()}


def build(path, rng, meta=META, shapes=SHAPES, arch='llama', extra=()):
  """Writes a file with the library; returns {name: array that the library dequantises}."""
  writer = library.GGUFWriter(path, arch)
  for key, value in meta.items():
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}[type(value)]
    add(f'{arch}.{key}', value)
  writer.add_bos_token_id(3)
  writer.add_eos_token_id(2)
  writer.add_token_list(['a', 'ü', '</s>'])
  writer.add_token_types([1, 2, 3])
  expected = {}
  for name, (shape, kind) in shapes.items():
    kind = library.GGMLQuantizationType[kind]
    data = library.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    expected[name] = library.quants.dequantize(data, kind).reshape(shape)
  for name, array in extra:
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return expected


def fields(reader):
  return types.SimpleNamespace(**gguf.fields(reader))


def abstract(c):
  """The shapes of the Transformer's parameters for this config."""
  n, d, f, q, k = c.dec_layers, c.d_model, c.d_ff, c.n_heads * c.d_head, c.n_kv_heads * c.d_head
  shapes = {'embedding': (c.vocab_size, d), 'decoder/norm/scale': (d,)} | {
      f'decoder/layers/{name}': (n, *shape) for name, shape in {
          'attn_norm/scale': (d,), 'mlp_norm/scale': (d,), 'attn/q/kernel': (d, q),
          'attn/k/kernel': (d, k), 'attn/v/kernel': (d, k), 'attn/o/kernel': (q, d),
          'mlp/wi_0/kernel': (d, f), 'mlp/wi_1/kernel': (d, f), 'mlp/wo/kernel': (f, d)}.items()}
  if not c.tied:
    shapes['logits/kernel'] = (d, c.vocab_size)
  return trees.unflatten(
      {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})


# --- reading -----------------------------------------------------------------------------------


def test_tensors_and_metadata_are_those_of_the_library(tmp_path, rng, monkeypatch):
  monkeypatch.setattr(gguf, 'PIECE', 128)   # two rows at once
  plain = {'ints': np.arange(6, dtype=np.int16).reshape(2, 3), 'wide': rng.normal(size=(2, 3))}
  expected = build(tmp_path / 'm.gguf', rng, extra=plain.items())
  reader = gguf.Gguf(tmp_path / 'm.gguf')
  assert reader.shapes() == {n: a.shape for n, a in {**expected, **plain}.items()}
  for name, array in expected.items():
    value = reader.read(name)
    assert value.dtype == np.float32 and np.array_equal(value, array)
  for name, array in plain.items():
    assert reader.read(name).dtype == array.dtype and np.array_equal(reader.read(name), array)
  assert reader.metadata['general.architecture'] == 'llama'
  assert reader.metadata['tokenizer.ggml.tokens'] == ['a', 'ü', '</s>']
  assert reader.metadata['tokenizer.ggml.token_type'].tolist() == [1, 2, 3]
  assert reader.metadata['llama.rope.freq_base'] == 500000


def split(tmp_path, rng, count=3):
  """Writes a model as parts, as gguf-split does; returns (the parts, the reader of the whole)."""
  build(tmp_path / 'whole.gguf', rng)
  whole = gguf.Gguf(tmp_path / 'whole.gguf')
  names = list(whole.shapes())
  paths = [tmp_path / f'm-{i + 1:05}-of-{count:05}.gguf' for i in range(count)]
  for i, path in enumerate(paths):
    writer = library.GGUFWriter(path, 'llama')
    for key, value in META.items() if i == 0 else ():
      (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f'llama.{key}', value)
    writer.add_uint16('split.no', i)
    writer.add_uint16('split.count', count)
    writer.add_int32('split.tensors.count', len(names))
    for name in names[i::count]:
      writer.add_tensor(name, whole.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  return paths, whole


def test_a_split_model_is_read_from_any_of_its_parts(tmp_path, rng):
  paths, whole = split(tmp_path, rng)
  for path in paths:
    reader = gguf.open_file(path)
    assert reader.path == str(paths[0]) and gguf.fields(reader)['dec_layers'] == 2
    assert reader.shapes() == {name: whole.shapes()[name] for name in reader.shapes()}
    assert reader.shapes().keys() == whole.shapes().keys()
    for name in whole.shapes():
      np.testing.assert_array_equal(reader.read(name), whole.read(name))


@pytest.mark.parametrize('damage, match', [
    (lambda p: p[1].unlink(), r'm-00001-of-00003.gguf is part 1 of 3; beside it must be '
                              r'm-00002-of-00003.gguf$'),
    (lambda p: (p[1].unlink(), p[2].unlink()), 'beside it must be m-00002-of-00003.gguf, m-00003'),
    (lambda p: p[2].write_bytes(p[1].read_bytes()), r'should be part 3 of 3; its .* \(1, 3\)'),
    (lambda p: p[0].rename(p[0].with_name('model.gguf')),
     r'model.gguf is part 1 of 3, but is not named NAME-00001-of-00003.gguf'),
    (lambda p: (p[1].rename(p[1].parents[1] / 'x'), p[1].symlink_to(p[1].parents[1] / 'x')),
     'links out of its directory')])
def test_a_split_model_with_a_missing_part_is_refused(tmp_path, rng, damage, match):
  (tmp_path / 'parts').mkdir()
  paths, _ = split(tmp_path / 'parts', rng)
  damage(paths)
  first = paths[0] if paths[0].exists() else paths[0].with_name('model.gguf')
  with pytest.raises(UsageError, match=match) as e:
    gguf.open_file(first)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('no, count, match', [
    (0, 1 << 20, 'split.count must be a number of parts, got 1048576'),
    (5, 2, 'split.no must be from 0 to 1, got 5')])
def test_numbers_of_parts_that_cannot_be(tmp_path, no, count, match):
  keys = [key(4, struct.pack('<I', number), f'split.{name}')
          for name, number in (('no', no), ('count', count))]
  (tmp_path / 'm-00001-of-00002.gguf').write_bytes(file(*keys, keys=2))
  with pytest.raises(UsageError, match=match):
    gguf.open_file(tmp_path / 'm-00001-of-00002.gguf')


def test_strings_that_are_not_utf_8_keep_their_bytes(tmp_path):
  tokens = struct.pack('<IQ', 8, 2) + text(b'\xff\xfe') + text('ü')
  (tmp_path / 'm.gguf').write_bytes(file(key(9, tokens), keys=1))
  bytes_ = [token.encode('utf-8', 'surrogateescape')
            for token in gguf.Gguf(tmp_path / 'm.gguf').metadata['k']]
  assert bytes_ == [b'\xff\xfe', b'\xc3\xbc']


def test_memory_stays_at_one_tensor(tmp_path, rng):
  build(tmp_path / 'm.gguf', rng, shapes={'big': ((2048, 4096), 'Q8_0')})   # 32 MB as float32
  reader = gguf.Gguf(tmp_path / 'm.gguf')
  tracemalloc.start()
  reader.read('big')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert 32 << 20 <= peak < 56 << 20


def test_fields(tmp_path, rng):
  build(tmp_path / 'm.gguf', rng)
  assert gguf.fields(gguf.Gguf(tmp_path / 'm.gguf')) == {
      'vocab_size': 40, 'd_model': 64, 'd_ff': 96, 'n_heads': 4, 'n_kv_heads': 2, 'd_head': 16,
      'enc_layers': 0, 'dec_layers': 2, 'acts': ('silu', 'linear'), 'tied': False,
      'scale_logits': False, 'scale_attn': True, 'norm': 'rms', 'norm_eps': 1e-5,
      'positions': 'rope', 'rope_theta': 500000., 'rope_scaling': (), 'bias': False,
      'max_length': 128, 'start_id': 3, 'eos_id': 2}


@pytest.mark.parametrize('changes, match', [
    ({'rope.dimension_count': 8},
     'rope.dimension_count must be 16, the size of a head, and even, got 8'),
    ({'attention.key_length': 15, 'rope.dimension_count': 15},
     'dimension_count must be 15, the .* even, got 15'),
    ({'attention.value_length': 8}, 'attention.value_length must be 16, .* got 8'),
    ({'rope.scaling.type': 'yarn'}, "rope.scaling.type is 'yarn'; known: 'none'"),
    ({'expert_count': 8}, 'llama.expert_count is 8: a mixture of experts'),
    ({'attention.sliding_window': 64}, 'sliding_window is 64, which this model does not have'),
    ({'vocab_size': 41}, 'vocab_size is 41, token_embd.weight has 40 rows'),
    ({'attention.head_count': [4, 4]},
     r'head_count must be one int for all layers, .* got array\(\[4, 4\]'),
    ({'attention.head_count': 5}, '64 dimensions do not divide into 5 heads'),
    ({'attention.head_count': 0}, '64 dimensions do not divide into 0 heads'),
    ({'context_length': 0.5},
     r'context_length must be one int for all layers, from 0 to 2\^31, got 0.5'),
    ({'rope.freq_base': float('nan')}, 'freq_base must be one float for all layers, .* got nan'),
    ({'feed_forward_length': None}, 'lacks llama.feed_forward_length'),
])
def test_unsupported_metadata(tmp_path, rng, changes, match):
  meta = {key: value for key, value in {**META, **changes}.items() if value is not None}
  build(tmp_path / 'm.gguf', rng, meta)
  with pytest.raises(UsageError, match=match) as e:
    gguf.fields(gguf.Gguf(tmp_path / 'm.gguf'))
  assert '\n' not in str(e.value)


def test_another_architecture(tmp_path, rng):
  build(tmp_path / 'm.gguf', rng, arch='qwen2')
  with pytest.raises(UsageError, match="architecture 'qwen2'; known: 'llama'"):
    gguf.fields(gguf.Gguf(tmp_path / 'm.gguf'))


def test_a_file_without_an_embedding(tmp_path, rng):
  shapes = {n: s for n, s in SHAPES.items() if n != 'token_embd.weight'}
  build(tmp_path / 'm.gguf', rng, shapes=shapes)
  with pytest.raises(UsageError, match='lacks the tensor token_embd.weight'):
    gguf.fields(gguf.Gguf(tmp_path / 'm.gguf'))


def divisors(factor=8., low=1., high=4., context=8192, theta=500000., head=16):
  """The divisor of each frequency under llama 3.1's scaling, one at a time as in Meta's code."""
  out = []
  for i in range(0, head, 2):
    wave = 2 * np.pi * theta ** (i / head)
    if wave < context / high:
      out.append(1)
    elif wave > context / low:
      out.append(factor)
    else:
      smooth = (context / wave - low) / (high - low)
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)


def test_rope_scaling_is_derived_and_verified(tmp_path, rng):
  def scaling(stored, **meta):
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}.gguf'
    build(path, rng, {**META, **meta}, extra=[('rope_freqs.weight', stored)])
    return gguf.fields(gguf.Gguf(path))['rope_scaling']

  # Waves of 6, 32, 167, 863 tokens; 4443, and longer than 8192.
  assert [d > 1 for d in divisors()] == [False] * 4 + [True] * 4
  assert scaling(divisors()) == (8., 1., 4., 8192)
  assert scaling(divisors(32.)) == (32., 1., 4., 8192)
  assert scaling(np.ones(8, np.float32)) == ()
  key = {'rope.scaling.original_context_length': 4096}
  assert scaling(divisors(context=4096), **key) == (8., 1., 4., 4096)
  for bad in (divisors(context=4096), divisors(high=3.), divisors()[:4],
              np.linspace(1, 8, 8, dtype=np.float32)):
    with pytest.raises(UsageError, match="is not llama 3.1's scaling by .* from 8192 tokens"):
      scaling(bad)
  for bad in (np.full(8, np.nan, np.float32), np.full(8, np.inf, np.float32)):
    with pytest.raises(UsageError, match='rope scaling by (nan|inf) from 8192 tokens'):
      scaling(bad)
  with pytest.raises(UsageError, match="rope scaling by 8.0 from '8k' tokens"):
    scaling(divisors(), **{'rope.scaling.original_context_length': '8k'})


# --- the tensor map ----------------------------------------------------------------------------


def test_rows_cover_the_model_and_writing_gives_every_tensor_back(tmp_path, rng):
  expected = build(tmp_path / 'm.gguf', rng, extra=[('rope_freqs.weight', divisors())])
  reader = gguf.Gguf(tmp_path / 'm.gguf')
  c = fields(reader)
  params = read(gguf.tensor_rows(c), reader, abstract(c), ignore=gguf.IGNORE)
  flat = trees.flatten(params)
  layer = expected['blk.1.ffn_gate.weight'], expected['blk.1.ffn_down.weight']
  assert np.array_equal(flat['decoder/layers/mlp/wi_0/kernel'][1], layer[0].T)
  assert np.array_equal(flat['decoder/layers/mlp/wo/kernel'][1], layer[1].T)
  for name, heads in (('q', 4), ('k', 2)):
    pairs = expected[f'blk.1.attn_{name}.weight'].reshape(heads, 8, 2, 64)
    apart = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(heads * 16, 64)
    assert np.array_equal(flat[f'decoder/layers/attn/{name}/kernel'][1], apart.T)
  assert np.array_equal(flat['logits/kernel'], expected['output.weight'].T)
  back = dict(write(gguf.tensor_rows(c), params))
  assert back.keys() == expected.keys()
  assert all(np.array_equal(back[name], expected[name]) for name in expected)


def test_a_tied_file_has_no_softmax_matrix(tmp_path, rng):
  shapes = {n: s for n, s in SHAPES.items() if n != 'output.weight'}
  build(tmp_path / 'm.gguf', rng, shapes=shapes)
  reader = gguf.Gguf(tmp_path / 'm.gguf')
  c = fields(reader)
  assert c.tied and 'logits/kernel' not in {row.path for row in gguf.tensor_rows(c)}
  read(gguf.tensor_rows(c), reader, abstract(c))


def test_rotary_pairs_move_apart_and_back():
  one = gguf._rotary(1)
  assert one.forward(np.arange(4)[:, None]).tolist() == [[0, 2, 1, 3]]
  x = np.arange(2 * 6 * 3).reshape(12, 3)   # two heads of 6
  op = gguf._rotary(2)
  assert op.forward(x)[0].tolist() == [0, 6, 12, 3, 9, 15, 18, 24, 30, 21, 27, 33]
  assert op.forward(x).shape == (3, 12)
  assert np.array_equal(op.inverse(op.forward(x)), x)
  with pytest.raises(UsageError, match='12 rows .* do not divide into 5 heads'):
    gguf._rotary(5).forward(x)


def test_rotation_gives_the_same_scores_in_both_layouts(rng):
  """q . k after rotating their adjacent pairs equals q . k after rotating ours."""
  heads, size, d = 2, 8, 5
  adjacent = rng.normal(size=(2, heads * size, d))               # q and k
  apart = [gguf._rotary(heads).forward(w) for w in adjacent]
  x = rng.normal(size=(3, d))
  angle = np.arange(3)[:, None, None] * 100. ** (-np.arange(0, size, 2) / size)
  rotated = []
  for w in adjacent:
    y = (x @ w.T).reshape(3, heads, size // 2, 2)
    z = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angle)
    rotated.append(np.stack([z.real, z.imag], -1).reshape(3, heads, size))
  a = np.einsum('tnh,snh->nts', *rotated)
  rotated = []
  for w in apart:
    y = (x @ w).reshape(3, heads, 2, size // 2)
    z = (y[:, :, 0] + 1j * y[:, :, 1]) * np.exp(1j * angle)
    rotated.append(np.concatenate([z.real, z.imag], -1))
  np.testing.assert_allclose(np.einsum('tnh,snh->nts', *rotated), a, rtol=1e-12)


# --- hostile and broken files ------------------------------------------------------------------


def text(s):
  s = s.encode() if isinstance(s, str) else s
  return struct.pack('<Q', len(s)) + s


def tensor(name='t', dims=(2,), kind=0, offset=0):
  return text(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def file(*parts, tensors=0, keys=0, version=3, data=b''):
  """The bytes of a GGUF file; data begins at the next multiple of 32."""
  head = b'GGUF' + struct.pack('<IQQ', version, tensors, keys) + b''.join(parts)
  return head + bytes(-len(head) % 32) + data if data else head


def key(kind, value, name='k'):
  return text(name) + struct.pack('<I', kind) + value


BIG = 1 << 60
CASES = {
    'empty': (b'', 'truncated or not a GGUF file: the magic takes 4 bytes at 0, of 0'),
    'magic': (b'GGML' + bytes(99), "is not a GGUF file: it begins with b'GGML'"),
    'version 1': (file(version=1), 'GGUF version 1; known: 2 and 3'),
    'big-endian': (file(version=3 << 24), 'big-endian'),
    'tensors': (file(tensors=BIG), f'claims {BIG} tensors; the limit is 131072'),
    'tensors beyond the file': (file(tensors=1000), '1000 tensors takes 24000 bytes at 16'),
    'keys': (file(keys=BIG), f'claims {BIG} metadata keys'),
    'keys beyond the file': (file(keys=60000), '60000 metadata keys takes'),
    'key length': (file(struct.pack('<Q', BIG), bytes(9), keys=1), f'a key takes {BIG} bytes'),
    'string length': (file(key(8, struct.pack('<Q', BIG)), keys=1), f"'k' takes {BIG} bytes"),
    'value type': (file(key(13, bytes(8)), keys=1), "value of 'k' has type 13; known: 0 to 12"),
    'array of arrays': (file(key(9, struct.pack('<IQ', 9, 1)), bytes(99), keys=1), 'of type 9'),
    'array length': (file(key(9, struct.pack('<IQ', 0, BIG)), keys=1), f"{BIG} numbers of 'k'"),
    'strings': (file(key(9, struct.pack('<IQ', 8, BIG)), keys=1), f"{BIG} strings of 'k'"),
    'array beyond the file': (file(key(9, struct.pack('<IQ', 10, 1 << 20)), keys=1),
                              "1048576 numbers of 'k' takes 8388608 bytes"),
    'key twice': (file(key(0, b'1'), key(0, b'2'), keys=2), "key 'k' occurs twice"),
    'alignment': (file(key(4, struct.pack('<I', 3), 'general.alignment'), keys=1),
                  'general.alignment must be a power of two, got 3'),
    'alignment of text': (file(key(8, text('x'), 'general.alignment'), keys=1),
                          "must be a power of two, got 'x'"),
    'alignment 0': (file(key(4, bytes(4), 'general.alignment'), keys=1), 'a power of two, got 0'),
    'cut in a tensor': (file(tensor()[:-4], tensors=1), "offset of 't' takes 8 bytes"),
    'no dimension': (file(tensor(dims=()), bytes(32), tensors=1), 'has 0 dimensions'),
    'many dimensions': (file(tensor(dims=(1,) * 9), tensors=1), 'has 9 dimensions'),
    'type': (file(tensor(kind=99), tensors=1, data=bytes(8)), 'has type 99, which the gguf'),
    'shape 0': (file(tensor(dims=(0, 4)), tensors=1, data=bytes(8)), r'shape \(4, 0\)'),
    'block': (file(tensor(dims=(33,), kind=8), tensors=1, data=bytes(99)),
              'the last size of Q8_0 must be a multiple of 32'),
    'overflow': (file(tensor(dims=(1 << 62, 1 << 62)), tensors=1, data=bytes(8)),
                 f'takes {1 << 126} bytes at 96'),
    'wraps to 0': (file(tensor(dims=(1 << 32, 1 << 32)), tensors=1, data=bytes(8)),
                   f'takes {1 << 66} bytes at 96'),
    'truncated': (file(tensor(), tensors=1, data=bytes(7)), 'takes 8 bytes at 64 . 0; the file'),
    'offset': (file(tensor(offset=1 << 63), tensors=1, data=bytes(8)), 'bytes at 64 . 9223'),
    'unaligned': (file(tensor(offset=1), tensors=1, data=bytes(99)), 'the alignment is 32'),
    'tensor twice': (file(tensor(), tensor(), tensors=2, data=bytes(99)), "'t' occurs twice"),
    'overlap': (file(tensor('a', (16,)), tensor('b', (4,), offset=32), tensors=2,
                     data=bytes(99)), "'b' at 128 overlaps 'a', which ends at 160"),
    'not dequantised': (file(tensor(dims=(32,), kind=9), tensors=1, data=bytes(99)),
                        "'t' has the quantisation Q8_1, which the gguf library does not"),
    'a name of lines': (file(tensor('a\nb' * 99, (0,)), tensors=1, data=bytes(8)), 'has shape'),
}


@pytest.mark.parametrize('case', CASES)
def test_a_hostile_file_is_refused(tmp_path, case):
  data, match = CASES[case]
  path = tmp_path / 'm.gguf'
  path.write_bytes(data)
  tracemalloc.start()
  try:
    with pytest.raises(UsageError, match=match) as e:
      gguf.Gguf(path)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert '\n' not in str(e.value) and len(str(e.value)) < 600
  assert str(path) in str(e.value)
  assert peak < 1 << 20


def test_every_cut_of_a_file_is_refused(tmp_path, rng):
  build(tmp_path / 'm.gguf', rng)
  data = (tmp_path / 'm.gguf').read_bytes()
  used = max(t.start + t.size for t in gguf.Gguf(tmp_path / 'm.gguf')._tensors.values())
  for n in [*range(0, 1500, 7), *range(1500, used, 4999), used - 1]:
    (tmp_path / 'cut.gguf').write_bytes(data[:n])
    with pytest.raises(UsageError):
      gguf.Gguf(tmp_path / 'cut.gguf')


def test_without_the_library(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(UsageError, match='needs its library: pip install gguf'):
    gguf.Gguf(tmp_path / 'm.gguf')
