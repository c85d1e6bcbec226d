"""Tensor files: bit-equal to the safetensors library, bounded memory, hostile files refused."""

import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.tools.interop import tensor_files

SAFE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
F32 = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


def raw(header, data=b'', length=None):
  """The bytes of a .safetensors file; header: a dict, or its text."""
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(header) if length is None else length) + header + data


def arrays(rng):
  """One array of every dtype, with sizes that would break alignment, a scalar and an empty one."""
  out = {}
  for i, (name, dtype) in enumerate(sorted(tensor_files.DTYPES.items())):
    bits = rng.integers(0, 2 if name == 'BOOL' else 256, (3, 5 + i, dtype.itemsize), np.uint8)
    out[f'{name}.weight'] = bits.view(dtype)[..., 0]
  return {**out, 'scalar': np.array(3.5, np.float32), 'empty': np.zeros((0, 4), np.float16),
          'ünïcode "quoted"': np.arange(3, dtype=np.int64)}


def specs(tensors):
  return {name: (a.shape, a.dtype) for name, a in tensors.items()}


def is_same(a, b):
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- round trips -------------------------------------------------------------------------------


def test_every_dtype_survives_writing_and_reading(tmp_path, rng):
  tensors = arrays(rng)
  backwards = reversed(tensors.items())   # the order of arrival does not matter
  assert tensor_files.write_safetensors(tmp_path, backwards, specs(tensors)) == [SAFE]
  reader = tensor_files.open_hf(tmp_path)
  assert reader.shapes() == {n: a.shape for n, a in tensors.items()}
  for name, array in tensors.items():
    value = reader.read(name)
    assert is_same(value, array) and value.flags.owndata and value.flags.writeable
  assert os.listdir(tmp_path) == [SAFE]
  data = (tmp_path / SAFE).read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + size])
  assert header.pop('__metadata__') == {'format': 'pt'} and size % 8 == 0
  assert all(e['data_offsets'][0] % tensors[n].dtype.itemsize == 0 for n, e in header.items())


def test_the_library_writes_what_we_read_and_reads_what_we_write(tmp_path, rng):
  library = pytest.importorskip('safetensors.numpy')
  known = ('F64', 'F32', 'F16', 'I64', 'I32', 'I16', 'I8', 'U64', 'U32', 'U16', 'U8', 'BOOL', 'C64')
  tensors = {n: a for n, a in arrays(rng).items() if n.split('.')[0] in known or '.' not in n}
  library.save_file(tensors, tmp_path / 'theirs.safetensors', metadata={'format': 'pt'})
  reader = tensor_files.open_hf(tmp_path / 'theirs.safetensors')
  assert all(is_same(reader.read(n), a) for n, a in tensors.items())
  (tmp_path / 'ours').mkdir()
  tensor_files.write_safetensors(tmp_path / 'ours', tensors.items(), specs(tensors))
  back = library.load_file(tmp_path / 'ours' / SAFE)
  assert all(is_same(back[n], a) for n, a in tensors.items())


def test_torch_reads_what_we_write_bfloat16_and_float8_too(tmp_path, rng):
  torch = pytest.importorskip('torch')
  library = pytest.importorskip('safetensors.torch')
  tensors = {n: a for n, a in arrays(rng).items() if n.split('.')[0] != 'F8_E8M0'}
  tensor_files.write_safetensors(tmp_path, tensors.items(), specs(tensors))
  back = library.load_file(tmp_path / SAFE)
  for name, array in tensors.items():
    bits = back[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert bits == array.tobytes() and tuple(back[name].shape) == array.shape
    assert str(back[name].dtype) == f'torch.{array.dtype}'
  library.save_file({n: t.contiguous() for n, t in back.items()}, tmp_path / 'theirs.safetensors')
  reader = tensor_files.open_hf(tmp_path / 'theirs.safetensors')
  assert all(is_same(reader.read(n), a) for n, a in tensors.items())


def test_shards_their_index_and_transposed_views(tmp_path, rng, monkeypatch):
  tensors = {f'layer.{i}': rng.normal(size=(6, 4)).astype(np.float32).T for i in range(5)}
  events, fsync, replace = [], os.fsync, os.replace
  monkeypatch.setattr(os, 'fsync', lambda fd: (events.append('fsync'), fsync(fd)))
  monkeypatch.setattr(os, 'replace', lambda a, b: (events.append(b.name), replace(a, b)))
  written = tensor_files.write_safetensors(
      tmp_path, tensors.items(), specs(tensors), max_shard_bytes=200)   # two of 96 bytes a file
  assert written == [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)] + [INDEX]
  # All four files are on disk before the first gets its name; the index gets its name last.
  assert events[:4] == ['fsync'] * 4 and [e for e in events if e != 'fsync'] == written
  index = json.loads((tmp_path / INDEX).read_text())
  assert index['metadata'] == {'total_size': 480}
  assert index['weight_map']['layer.4'] == 'model-00003-of-00003.safetensors'
  reader = tensor_files.open_hf(tmp_path)
  assert all(is_same(reader.read(n), np.ascontiguousarray(a)) for n, a in tensors.items())
  (tmp_path / 'model-00002-of-00003.safetensors').unlink()
  (tmp_path / 'model-00003-of-00003.safetensors').unlink()
  with pytest.raises(UsageError, match='lacks 2 of the 3 files of its index: model-00002-of-00003'):
    tensor_files.open_hf(tmp_path)


def test_pieces_of_a_large_tensor_come_in_order(tmp_path, rng, monkeypatch):
  monkeypatch.setattr(tensor_files, 'PIECE', 64)
  tensors = {'a': rng.normal(size=(7, 9)).T, 'b': rng.normal(size=(50,))}
  tensor_files.write_safetensors(tmp_path, tensors.items(), specs(tensors))
  reader = tensor_files.open_hf(tmp_path)
  assert all(np.array_equal(reader.read(n), a) for n, a in tensors.items())


def test_transformers_loads_the_shards(tmp_path):
  transformers = pytest.importorskip('transformers')
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
  model.config.save_pretrained(tmp_path)
  tensors = {n: p.detach().numpy() for n, p in model.named_parameters()}
  assert len(tensor_files.write_safetensors(
      tmp_path, tensors.items(), specs(tensors), max_shard_bytes=8000)) > 2
  back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
  assert all(np.array_equal(p.detach().numpy(), tensors[n]) for n, p in back.named_parameters())


def test_a_failure_while_writing_leaves_nothing(tmp_path):
  one = {'a': ((2,), np.float32)}
  with pytest.raises(ValueError, match='specs without a tensor: a'):
    tensor_files.write_safetensors(tmp_path, [], one)
  with pytest.raises(ValueError, match="'a' is float64"):
    tensor_files.write_safetensors(tmp_path, [('a', np.zeros(2))], one)
  with pytest.raises(ValueError, match="'a' has no spec or was given twice"):
    tensor_files.write_safetensors(tmp_path, [('a', np.zeros(2, np.float32))] * 2, one)
  assert os.listdir(tmp_path) == []
  with pytest.raises(UsageError, match='cannot write to .*: No such file'):
    tensor_files.write_safetensors(tmp_path / 'none', [], one)
  tensor_files.write_safetensors(tmp_path, [('a', np.zeros(2, np.float32))], one)
  with pytest.raises(UsageError, match='already holds model.safetensors; choose an empty folder'):
    tensor_files.write_safetensors(tmp_path, [('a', np.ones(2, np.float32))], one)
  assert tensor_files.open_hf(tmp_path).read('a').tolist() == [0, 0]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_stays_at_one_tensor(tmp_path):
  """256 MB in 16 MB tensors, written (some transposed) and read in a separate process."""
  code = textwrap.dedent(f"""
    import re, numpy as np
    from t5lab.tools.interop import tensor_files
    # VmHWM, because ru_maxrss starts at the value of the parent
    now = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10
    names = [f't{{i}}' for i in range(16)]
    def tensors():
      for i, name in enumerate(names):
        array = np.full((2048, 2048), i, np.float32)
        yield name, array.T if i % 2 else array
        del array
    before = now()
    specs = {{n: ((2048, 2048), 'f4') for n in names}}
    tensor_files.write_safetensors({str(tmp_path)!r}, tensors(), specs)
    written = now()
    reader = tensor_files.open_hf({str(tmp_path)!r})
    for i, name in enumerate(names):
      assert reader.read(name).mean() == i
    print(written - before, now() - before)
  """)
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert out.returncode == 0, out.stderr
  assert all(int(mb) < 40 for mb in out.stdout.split()), out.stdout


# --- hostile and broken files ------------------------------------------------------------------

HEADERS = {
    'no header': (b'abc', 'ends at byte 3, 5 short'),
    'length 2^60': (raw({}, length=1 << 60), 'a header of 1152921504606846976 bytes, and 2 after'),
    'cut header': (raw({'a': F32}, bytes(8))[:20], 'is truncated'),
    'no JSON': (raw(b'{"a": '), 'not readable JSON: JSONDecodeError'),
    'no UTF-8': (raw(b'{"\xff": 1}'), 'not readable JSON: UnicodeDecodeError'),
    'nested': (raw(b'{"a":' + b'[' * 100_000), 'not readable JSON: RecursionError'),
    'long number': (raw(b'{"a":' + b'9' * 5000 + b'}'), 'not readable JSON: ValueError'),
    'a list': (raw(b'[]'), 'expected a JSON object, found list'),
    'duplicate key': (raw(b'{"a": {}, "a": {}}'), "key 'a' occurs twice"),
    'duplicate inside': (raw(b'{"a": {"dtype": "F32", "dtype": 1}}'), "key 'dtype' occurs twice"),
    'metadata': (raw({'__metadata__': {'a': 1}}), 'not a map of strings to strings'),
    'metadata list': (raw({'__metadata__': ['a']}), 'not a map of strings to strings'),
    'entry': (raw({'a': 1}), 'must have exactly dtype, shape and data_offsets'),
    'fields': (raw({'a': {'dtype': 'F32', 'shape': [2]}}, bytes(8)), 'must have exactly dtype'),
    'dtype': (raw({'a': {**F32, 'dtype': 'F31'}}, bytes(8)), "dtype 'F31'; known: F64"),
    'dtype list': (raw({'a': {**F32, 'dtype': []}}, bytes(8)), r'dtype \[\]; known'),
    'negative shape': (raw({'a': {**F32, 'shape': [-2, -1]}}, bytes(8)), r'shape \[-2, -1\]; exp'),
    'float shape': (raw({'a': {**F32, 'shape': [2.0]}}, bytes(8)), r'shape \[2.0\]; expected'),
    'bool shape': (raw({'a': {**F32, 'shape': [True, 2]}}, bytes(8)), 'shape'),
    'overflow': (raw({'a': {**F32, 'shape': [1 << 62, 4]}}, bytes(8)), 'less than 2.63 bytes'),
    'overflow beside 0': (raw({'a': {'dtype': 'F32', 'shape': [0, 1 << 70],
                                     'data_offsets': [0, 0]}}), 'less than 2.63 bytes'),
    'rank': (raw({'a': {**F32, 'shape': [1] * 99}}, bytes(4)), 'up to 32 natural numbers'),
    'wrong shape': (raw({'a': {**F32, 'shape': [3]}}, bytes(8)), r'F32 \[3\] takes 12 bytes'),
    'reversed': (raw({'a': {**F32, 'data_offsets': [8, 0]}}, bytes(8)), r'data_offsets \[8, 0\]'),
    'three offsets': (raw({'a': {**F32, 'data_offsets': [0, 8, 8]}}, bytes(8)), 'expected two in'),
    'beyond the file': (raw({'a': {**F32, 'data_offsets': [8, 16]}}, bytes(8)), 'two in 0 … 8'),
    'truncated': (raw({'a': F32}, bytes(7)), 'two in 0 … 7'),
    'hole': (raw({'a': F32, 'b': {**F32, 'data_offsets': [12, 20]}}, bytes(20)),
             "4 bytes between tensor 'a' and tensor 'b' belong to no tensor"),
    'hole at the start': (raw({'a': {**F32, 'data_offsets': [4, 12]}}, bytes(12)),
                          "4 bytes between the header and tensor 'a'"),
    'tail': (raw({'a': F32}, bytes(9)), '1 bytes between .* and the end of the file'),
    'overlap': (raw({'a': F32, 'b': {**F32, 'data_offsets': [4, 12]}}, bytes(12)),
                "'b' begins at 4 and overlaps tensor 'a', which ends at 8"),
    'twice the same bytes': (raw({'a': F32, 'b': F32}, bytes(8)), "'b' begins at 0 and overlaps"),
    'a name of lines': (raw({'a\nb' * 999: {**F32, 'shape': [3]}}, bytes(8)), r'takes 12 bytes'),
}


def refused(path, match, **options):
  """Checks that opening or reading raises UsageError, and returns its message.

  It must be one line, and little memory may be allocated.
  """
  tracemalloc.start()
  try:
    with pytest.raises(UsageError, match=match) as e:
      reader = tensor_files.open_hf(path, **options)
      for name in reader.shapes():
        reader.read(name)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert '\n' not in str(e.value) and len(str(e.value)) < 600
  assert peak < 8 << 20
  return str(e.value)


@pytest.mark.parametrize('case', HEADERS)
def test_a_bad_header_is_refused(tmp_path, case):
  data, match = HEADERS[case]
  (tmp_path / SAFE).write_bytes(data)
  assert SAFE in refused(tmp_path, match)


@pytest.mark.parametrize('name', [SAFE, INDEX])
def test_a_header_beyond_the_limit_is_not_read(tmp_path, name):
  (tmp_path / name).write_bytes(struct.pack('<Q', 100_000_001))
  os.truncate(tmp_path / name, 200_000_000)   # sparse
  refused(tmp_path, 'the limit is 100000000')


def test_booleans_are_0_or_1_and_a_file_may_not_shrink(tmp_path):
  data = raw({'a': {'dtype': 'BOOL', 'shape': [2], 'data_offsets': [0, 2]}}, b'\1\2')
  (tmp_path / SAFE).write_bytes(data)
  refused(tmp_path, "BOOL tensor 'a' has bytes other than 0 and 1")
  reader = tensor_files.open_hf(tmp_path)
  os.truncate(tmp_path / SAFE, len(data) - 1)
  with pytest.raises(UsageError, match='1 short: it is truncated'):
    reader.read('a')


@pytest.mark.parametrize('target, match', [
    ('../outside.safetensors', 'plain name of a file beside it'),
    ('/etc/hostname', 'plain name of a file beside it'),
    ('a\\b.safetensors', 'plain name of a file beside it'),
    ('..', 'plain name of a file beside it'),
    ('', 'plain name of a file beside it'),
    ('a\nb', 'plain name of a file beside it'),
    ({'a': 1}, 'plain name of a file beside it'),
    ('missing.safetensors', 'lacks 1 of the 1 files of its index: missing.safetensors'),
    ('other.safetensors', "the index maps 'b' to other.safetensors, which does not contain it"),
    ('folder', 'folder is not a regular file'),
    ('fifo', 'fifo is not a regular file'),
    ('link', 'link links out of its directory'),
])
def test_an_index_leads_only_to_files_beside_it(tmp_path, target, match):
  (tmp_path / 'outside.safetensors').write_bytes(raw({'b': F32}, bytes(8)))
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'other.safetensors').write_bytes(raw({'a': F32}, bytes(8)))
  (folder / 'folder').mkdir()
  os.mkfifo(folder / 'fifo')
  (folder / 'link').symlink_to('../outside.safetensors')
  (folder / INDEX).write_text(json.dumps({'weight_map': {'b': target}}))
  refused(folder, match)


@pytest.mark.parametrize('text', ['[]', '{}', '{"weight_map": ["a"]}', '{"weight_map": {}}', '{'])
def test_an_index_without_a_map(tmp_path, text):
  (tmp_path / INDEX).write_text(text)
  refused(tmp_path, 'weight_map|JSON')


def test_the_index_decides_between_two_shards_with_one_name(tmp_path):
  for i in range(2):
    (tmp_path / f'{i}.safetensors').write_bytes(
        raw({'a': F32, f'b{i}': {**F32, 'data_offsets': [8, 16]}}, bytes([i]) * 16))
  whole = {'weight_map': {'a': '1.safetensors', 'b0': '0.safetensors'}}
  (tmp_path / INDEX).write_text(json.dumps(whole))
  reader = tensor_files.open_hf(tmp_path)
  assert sorted(reader.shapes()) == ['a', 'b0', 'b1']   # b1 is listed: the map decides
  assert reader.read('a').tobytes() == b'\1' * 8
  whole['weight_map'] = {'b0': '0.safetensors', 'b1': '1.safetensors'}
  (tmp_path / INDEX).write_text(json.dumps(whole))
  refused(tmp_path, "'a' is in two files and not in the index")


def test_links_may_lead_to_the_blobs_of_their_cache_and_nowhere_else(tmp_path):
  model = tmp_path / 'models--a--b'
  snapshot = model / 'snapshots' / 'abc'
  snapshot.mkdir(parents=True)
  (model / 'blobs').mkdir()
  (model / 'blobs' / '123').write_bytes(raw({'a': F32}, bytes(8)))
  (snapshot / SAFE).symlink_to('../../blobs/123')
  assert tensor_files.open_hf(snapshot).read('a').tolist() == [0, 0]
  secret = tmp_path / 'secret'
  secret.write_bytes(raw({'a': F32}, bytes(8)))
  (snapshot / SAFE).unlink()
  (snapshot / SAFE).symlink_to(secret)
  refused(snapshot, 'links out of its directory, to .*secret')
  (model / 'blobs' / '124').symlink_to(secret)   # a blob that is itself a link
  (snapshot / SAFE).unlink()
  (snapshot / SAFE).symlink_to('../../blobs/124')
  refused(snapshot, 'links out of its directory, to .*secret')
  (snapshot / SAFE).unlink()
  (snapshot / SAFE).symlink_to('nothing')
  refused(snapshot, 'cannot read .*: No such file')


def test_pipes_and_devices_are_refused_and_do_not_block(tmp_path):
  os.mkfifo(tmp_path / SAFE)
  refused(tmp_path, 'not a regular file')
  refused(tmp_path / SAFE, 'not a regular file')
  (tmp_path / 'zero.safetensors').symlink_to('/dev/zero')
  refused(tmp_path / 'zero.safetensors', 'not a regular file')


def test_paths_without_weights(tmp_path):
  (tmp_path / 'tf_model.h5').write_bytes(b'')
  refused(tmp_path, r"looked for model.safetensors, model.safetensors.index.json, "
                    r"pytorch_model.bin, .* and one .npz; found \['tf_model.h5'\]")
  refused(tmp_path / 'tf_model.h5', r'known endings are .safetensors, .npz, .bin')
  refused(tmp_path / 'none', 'does not exist')


# --- pickles -----------------------------------------------------------------------------------


class Canary:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_pickles_only_when_allowed(tmp_path):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  message = refused(tmp_path, 'can run code when read')
  assert message == (
      f'{tmp_path} holds pickled weights (pytorch_model.bin), which can run code when read; '
      'convert them to safetensors where they were made, or pass --allow-pickle to read them with '
      "torch's weights-only loader")
  refused(tmp_path / 'pytorch_model.bin', 'can run code when read')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_hostile_pickle_runs_nothing(tmp_path, zipped):
  torch = pytest.importorskip('torch')
  bad = {'a': torch.zeros(2), 'b': Canary(str(tmp_path / 'ran'))}
  path = tmp_path / 'pytorch_model.bin'
  torch.save(bad, path, _use_new_zipfile_serialization=zipped)
  refused(tmp_path, 'refuses it and executed nothing: it asks for posix.mkdir', allow_pickle=True)
  assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_weights_are_read_bit_for_bit(tmp_path, rng, zipped):
  torch = pytest.importorskip('torch')
  tensors = {'f': torch.from_numpy(rng.normal(size=(3, 4)).astype(np.float32)),
             'half': torch.arange(6).half(), 'brain': torch.arange(6).bfloat16().reshape(2, 3),
             'i': torch.tensor(7), 'yes': torch.tensor([True, False])}
  tensors['view'] = tensors['f'].T[1:3]
  if zipped:   # torch cannot write it in its old format
    tensors['eight'] = torch.arange(6).to(torch.float8_e4m3fn)
  torch.save(tensors, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
  reader = tensor_files.open_hf(tmp_path, allow_pickle=True)
  assert reader.shapes() == {n: tuple(t.shape) for n, t in tensors.items()}
  value = reader.read('brain')
  assert value.dtype == ml_dtypes.bfloat16 and value.tolist() == [[0, 1, 2], [3, 4, 5]]
  if zipped:
    value = reader.read('eight')
    assert value.dtype == ml_dtypes.float8_e4m3fn and value.tolist() == [0, 1, 2, 3, 4, 5]
  for name in ('f', 'half', 'i', 'yes', 'view'):
    assert is_same(reader.read(name), tensors[name].numpy())


def test_pickled_shards(tmp_path):
  torch = pytest.importorskip('torch')
  for i in range(2):
    torch.save({f'a{i}': torch.full((2,), i)}, tmp_path / f'pytorch_model-{i}.bin')
  index = {'weight_map': {f'a{i}': f'pytorch_model-{i}.bin' for i in range(2)}}
  (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
  refused(tmp_path, r'pickled weights \(pytorch_model-0.bin\)')
  assert tensor_files.open_hf(tmp_path, allow_pickle=True).read('a1').tolist() == [1, 1]


def test_pickles_without_a_state_dict(tmp_path):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'pytorch_model.bin'
  for bad, match in (
      ([1], 'holds a list; expected a dict'), ({'a': 1}, "'a' is a int; expected only names and"),
      ({1: torch.zeros(2)}, '1 is a Tensor; expected only names'),
      ({'a': torch.zeros(2).to_sparse()}, "'a' is a Tensor; expected only names and dense"),
      ({'a': torch.zeros(1).expand(1 << 40)}, r"'a' has shape \(1099511627776,\), more than the")):
    torch.save(bad, path)
    refused(tmp_path, match, allow_pickle=True)
  torch.save({'a': torch.zeros(1 << 12)}, path)
  path.write_bytes(path.read_bytes()[:-3000])
  refused(tmp_path, 'weights-only loader refuses it', allow_pickle=True)
  path.write_bytes(b'')
  refused(tmp_path, 'weights-only loader refuses it', allow_pickle=True)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
    z.writestr('archive/data.pkl', bytes(1 << 24))
  refused(tmp_path, 'contains compressed entries', allow_pickle=True)


def test_without_torch_or_with_an_old_one(tmp_path, monkeypatch):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  refused(tmp_path, r"needs torch: pip install 't5lab\[parity\]'", allow_pickle=True)
  monkeypatch.setitem(sys.modules, 'torch', type(sys)('torch'))
  sys.modules['torch'].__version__ = '2.5.1+cpu'
  refused(tmp_path, 'torch 2.5.1.cpu.* torch 2.6 or later is needed', allow_pickle=True)


# --- npz ---------------------------------------------------------------------------------------


def npy(array, **header):
  """The bytes of a .npy file, some header fields replaced."""
  f = io.BytesIO()
  np.lib.format.write_array_header_1_0(f, {**np.lib.format.header_data_from_array_1_0(array),
                                           **header})
  return f.getvalue() + array.tobytes()


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path, rng, save):
  tensors = {'a/b': rng.normal(size=(3, 4)), 'f': np.asfortranarray(rng.normal(size=(3, 4))),
             'big': np.arange(4, dtype='>f4'), 'i': np.arange(3), 'zero': np.zeros((0, 2)),
             'note': np.array('{"a": 1}')}
  save(tmp_path / 'weights.npz', **tensors)
  reader = tensor_files.open_hf(tmp_path)
  assert reader.shapes() == {n: a.shape for n, a in tensors.items()}
  for name, array in tensors.items():
    value = reader.read(name)
    assert np.array_equal(value, array) and value.dtype.isnative


def test_hostile_npz(tmp_path):
  path = tmp_path / 'w.npz'
  np.savez(path, a=np.array([{}], object))
  refused(path, "'a.npy' has dtype 'object'; expected numbers or strings")
  two = np.zeros(2)
  header = np.lib.format.header_data_from_array_1_0(two)['descr']
  for content, match in (
      ({'a.npy': npy(two, shape=(1 << 40,))}, 'does not take the 16 bytes it has'),
      ({'a.npy': npy(two, shape=(-2,))}, 'expected up to 32 natural numbers'),
      ({'a.npy': npy(two, descr=[('x', header)])}, 'has dtype'),
      ({'a.npy': npy(two)[:-1]}, 'does not take the 15 bytes it has'),
      ({'a.npy': b'\x93NUMPY\x01\x00\xff\xff{'}, 'is not a .npz: ValueError'),
      ({'a.npy': b''}, 'is not a .npz: ValueError'),
      ({'a.txt': npy(two)}, "'a.txt' occurs twice or is not named .npy")):
    with zipfile.ZipFile(path, 'w') as z:
      for name, data in content.items():
        z.writestr(name, data)
    refused(path, match)
  with zipfile.ZipFile(path, 'w') as z, pytest.warns(UserWarning, match='Duplicate'):
    z.writestr('a.npy', npy(two))
    z.writestr('a.npy', npy(two))
  refused(path, "'a.npy' occurs twice")
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_BZIP2) as z:
    z.writestr('a.npy', npy(two))
  refused(path, 'encrypted or compressed other than by deflate')
  with zipfile.ZipFile(path, 'w') as z:
    z.writestr('a.npy', npy(two))
    z.filelist[0].flag_bits |= 1   # written at the end, with the directory
  refused(path, 'encrypted or compressed other than by deflate')
  with zipfile.ZipFile(path, 'w') as z:
    z.writestr('a.npy', npy(two, shape=(1 << 30,)))
    z.filelist[0].file_size = z.filelist[0].compress_size = 128 + (8 << 30)
  refused(path, 'claims 8589934720 bytes from 8589934720; .* in a file of ')
  path.write_bytes(b'PK nothing')
  refused(path, 'is not a .npz: BadZipFile')
  np.savez(path, a=np.arange(4096.))
  data = bytearray(path.read_bytes())
  data[20_000] ^= 1
  path.write_bytes(data)
  refused(path, "array 'a': BadZipFile: Bad CRC-32")


def test_an_npz_may_not_expand_beyond_reason(tmp_path):
  path, zeros = tmp_path / 'w.npz', np.zeros(0)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z, z.open('a.npy', 'w') as f:
    f.write(npy(zeros, shape=(80 << 17,)))
    for _ in range(80):
      f.write(bytes(1 << 20))
  refused(path, r"array 'a.npy' claims 838\d+ bytes from 8\d+; the limit is 100 times")
