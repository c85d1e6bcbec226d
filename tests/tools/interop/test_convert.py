"""`t5lab convert` from end to end: every way in and out, its proof, and what it refuses."""

import json
import os
import shutil

from hf_models import model, save
import jax
import numpy as np
import pytest
import torch

import t5lab
from t5lab import cli, trees
from t5lab.tools.interop import certify, convert, reference, tensor_files


def run(*argv, capsys):
  code = cli.main(['convert', *map(str, argv)])
  out = capsys.readouterr()
  return code, out.out, out.err


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
  """name -> a folder that transformers wrote."""
  made = {}

  def get(name, **kwargs):
    key = (name, *kwargs)
    if key not in made:
      made[key] = tmp_path_factory.mktemp(name)
      save(name, made[key], **kwargs)
    return made[key]
  return get


@pytest.fixture(scope='module')
def ours(hf, tmp_path_factory):
  """name -> the folder that convert made of it."""
  made = {}

  def get(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp('ours') / name
      convert.convert(convert.read_hf(hf(name)), made[name], 't5lab', say=lambda line: None,
                      use_reference=False)
    return made[name]
  return get


def tensors(path):
  reader = tensor_files.open_hf(path)
  return {name: reader.read(name) for name in reader.shapes()}


@pytest.mark.parametrize('name', ['t5_1_1', 'bart', 'gpt2', 'llama', 'bert'])
def test_hf_to_ours_and_back_is_certified_and_bit_equal(name, hf, tmp_path, capsys):
  code, out, err = run('--from', 'hf', '--to', 't5lab', hf(name), tmp_path / 'ours', capsys=capsys)
  assert code == 0, err
  assert 'certified: logits within' in out and 'peak memory' in out
  proof = json.loads((tmp_path / 'ours' / certify.NAME).read_text())
  assert proof['reference'].startswith('transformers') and 'bit-equal' in proof['round_trip']
  assert proof['logits']['largest_relative_difference'] < 1e-5
  assert name == 'bert' or proof['greedy'] == {'tokens': 16, 'equal': 16}
  lab = t5lab.load(tmp_path / 'ours')
  assert proof['sha256'] == certify.digest(lab.params)
  code, out, err = run('--from', 't5lab', '--to', 'hf', tmp_path / 'ours', tmp_path / 'back',
                       capsys=capsys)
  assert code == 0, err
  before, after = tensors(hf(name)), tensors(tmp_path / 'back')
  if name == 't5_1_1':
    before.pop('encoder.embed_tokens.weight', None)
    before.pop('decoder.embed_tokens.weight', None)
  assert before.keys() == after.keys()
  assert all(np.array_equal(before[k], after[k]) for k in before)
  # and transformers reads what we wrote as the model that it wrote
  again = type(model(name)).from_pretrained(tmp_path / 'back')
  ids = torch.tensor([[5, 7, 9, 11]])
  kwargs = {'decoder_input_ids': ids} if name in ('t5_1_1', 'bart') else {}
  with torch.no_grad():
    assert torch.equal(again(input_ids=ids, **kwargs)[0], model(name)(input_ids=ids, **kwargs)[0])


def test_without_torch_golden_vectors_and_the_round_trip_are_the_proof(ours):
  proof = json.loads((ours('umt5') / certify.NAME).read_text())
  assert proof['reference'] == 'golden vectors and round trip'
  assert proof['golden']['architecture'] == 'umt5'
  assert proof['golden']['largest_relative_difference'] < 1e-5 and 'logits' not in proof


def test_t5x_and_back(ours, tmp_path, capsys):
  """Ours -> T5X, unscanned and Orbax -> ours: the same arrays and step."""
  want = trees.flatten(t5lab.load(ours('t5_1_1')).params)
  for i, form in enumerate(((), ('--orbax',))):
    there, back = tmp_path / f'checkpoint_{i}', tmp_path / f'back_{i}'
    code, out, err = run('--from', 't5lab', '--to', 't5x', *form, ours('t5_1_1'), there,
                         capsys=capsys)
    assert code == 0, err
    assert 'read back: 61 tensors bit-equal' in out
    code, out, err = run('--from', 't5x', '--to', 't5lab', there, back, '--golden', capsys=capsys)
    assert code == 0, err
    got = trees.flatten(t5lab.load(back).params)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[k], want[k]) for k in want)
  code, _, err = run('--from', 't5lab', '--to', 't5x', '--scanned', ours('umt5'),
                     tmp_path / 'scanned', capsys=capsys)
  assert code == 0, err
  code, _, err = run('--from', 't5x', '--to', 'hf', tmp_path / 'scanned', tmp_path / 'hf',
                     capsys=capsys)
  assert code == 0, err
  want = tensors(tmp_path / 'hf')
  assert np.array_equal(want['shared.weight'], np.asarray(
      t5lab.load(ours('umt5')).params['embedding']))


def test_sharded_and_half_precision_sources(hf, tmp_path):
  """Shards are found through their index; bfloat16 and float16 come in as the float32 of their
  values."""
  source = hf('llama', max_shard_size='20KB')
  assert (source / 'model.safetensors.index.json').exists()
  a = convert.read_hf(source).params()
  b = convert.read_hf(hf('llama')).params()
  jax.tree.map(np.testing.assert_array_equal, a, b)
  for dtype in (torch.bfloat16, torch.float16):
    half = tmp_path / str(dtype)
    copy = type(model('llama'))(model('llama').config)
    copy.load_state_dict(model('llama').state_dict())
    copy.to(dtype).save_pretrained(half)
    source = convert.read_hf(half)
    params = source.params()
    assert source.same(params) > 10
    table = np.asarray(params['embedding'])
    want = copy.model.embed_tokens.weight.detach().float().numpy()
    assert table.dtype == np.float32 and np.array_equal(table, want)


def test_restores_onto_any_mesh(ours):
  from t5lab import config
  from t5lab.parallel import sharding
  from t5lab.programs import loading as weights
  c = weights.read_config(ours('t5_1_1'))
  want = weights.load(ours('t5_1_1'), config=c).params
  for fsdp, model_axis, rules in ((8, 1, 'fsdp'), (2, 4, 'fsdp_tp')):
    c = weights.read_config(ours('t5_1_1'))
    c.mesh.data, c.mesh.fsdp, c.mesh.model, c.rules = 1, fsdp, model_axis, rules
    got = weights.load(ours('t5_1_1'), config=c).params
    jax.tree.map(np.testing.assert_array_equal, got, want)
    kernel = got['encoder']['layers']['mlp']['wi_0']['kernel']
    assert kernel.sharding.mesh.size == 8 and not kernel.sharding.is_fully_replicated
  assert config.to_dict(c)['rules'] == 'fsdp_tp' and sharding.RULES


def test_a_wrong_weight_is_not_written(hf, tmp_path, monkeypatch):
  """The proof is a proof: one changed tensor, or one formula, and there is no destination."""
  source = convert.read_hf(hf('gpt2'))
  good = source.params
  def bad():
    params = good()
    params['decoder']['layers']['attn']['q']['bias'][1] += 0.5
    return params
  source.params = bad
  with pytest.raises(Exception, match='does not come back from our arrays'):
    convert.convert(source, tmp_path / 'x', 't5lab', say=lambda line: None)
  source.same = lambda params: 0
  with pytest.raises(Exception, match='logits differ from those of transformers'):
    convert.convert(source, tmp_path / 'x', 't5lab', say=lambda line: None)
  source = convert.read_hf(hf('gpt2'))
  source.model = source.model.__class__(**{**vars(source.model), 'acts': ('relu',)})
  with pytest.raises(Exception, match='logits differ'):
    convert.convert(source, tmp_path / 'x', 't5lab', say=lambda line: None)
  assert not list(tmp_path.iterdir())


def test_other_greedy_tokens_are_refused_and_ties_are_not():
  logits = np.ones((3, 5), np.float32)
  theirs = certify.Outputs(logits, np.array([[1, 2, 3]]), np.array([[.5, .5, .5]]))
  report = certify.compare(certify.Outputs(logits, np.array([[1, 2, 3]])), theirs, 'x')
  assert report['greedy'] == {'tokens': 3, 'equal': 3}
  with pytest.raises(Exception, match='greedy decoding gives'):
    certify.compare(certify.Outputs(logits, np.array([[1, 4, 3]])), theirs, 'x')
  tie = theirs.__class__(logits, theirs.tokens, np.array([[.5, 1e-6, .5]]))
  report = certify.compare(certify.Outputs(logits, np.array([[1, 4, 3]])), tie, 'x')
  assert report['greedy'] == {'tokens': 3, 'equal': 1}


# -- what it refuses: one line, exit code 2, no destination ----------------------------------------


def truncate(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


def other_architecture(folder):
  change(folder, model_type='mamba')


def other_size(folder):
  change(folder, num_layers=5)


def no_config(folder):
  (folder / 'config.json').unlink()


def not_json(folder):
  (folder / 'config.json').write_text('{"model_type": ')


def missing_key(folder):
  config = json.loads((folder / 'config.json').read_text())
  config.pop('d_ff')
  (folder / 'config.json').write_text(json.dumps(config))


def not_a_number(folder):
  rewrite(folder, 'encoder.final_layer_norm.weight', lambda x: x * np.nan)


def misshaped(folder):
  rewrite(folder, 'encoder.final_layer_norm.weight', lambda x: x[:-1])


def missing_tensor(folder):
  rewrite(folder, 'encoder.final_layer_norm.weight', None)


def extra_tensor(folder):
  arrays = tensors(folder)
  write(folder, {**arrays, 'encoder.surprise': np.zeros(3, np.float32)})


def traversal(folder):
  os.rename(folder / 'model.safetensors', folder.parent / 'elsewhere.safetensors')
  (folder / 'model.safetensors.index.json').write_text(json.dumps(
      {'weight_map': {'shared.weight': '../elsewhere.safetensors'}}))


def link_out(folder):
  """A tokenizer file that would carry another file of this machine along."""
  (folder.parent / 'secret').write_text('{}')
  (folder / 'tokenizer_config.json').symlink_to(folder.parent / 'secret')


def small_embedding(folder):
  """A vocabulary with more ids than the embedding has rows."""
  (folder / 'tokenizer_config.json').write_text(json.dumps(
      {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125}))


def broken_tokenizer(folder):
  (folder / 'tokenizer.json').write_text('{}')


def disagreeing_copy(folder):
  arrays = tensors(folder)
  write(folder, {**arrays, 'lm_head.weight': arrays['shared.weight'] + 1})
  change(folder, tie_word_embeddings=True, scale_decoder_outputs=True)


def pickled(folder):
  (folder / 'model.safetensors').unlink()
  torch.save({'shared.weight': torch.zeros(3)}, folder / 'pytorch_model.bin')


def change(folder, **values):
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, **values}))


def write(folder, arrays):
  (folder / 'model.safetensors').unlink()
  tensor_files.write_safetensors(folder, arrays.items(),
                          {k: (v.shape, v.dtype) for k, v in arrays.items()})


def rewrite(folder, name, f):
  arrays = tensors(folder)
  if f is None:
    arrays.pop(name)
  else:
    arrays[name] = f(arrays[name])
  write(folder, arrays)


@pytest.mark.parametrize('damage, message', [
    (truncate, 'model.safetensors'), (other_architecture, "model_type 'mamba' is unknown"),
    (other_size, 'missing encoder.block.3'), (no_config, 'config.json'),
    (not_json, 'not JSON'), (missing_key, "a t5 config has 'd_ff'"),
    (not_a_number, 'encoder.final_layer_norm.weight not finite'),
    (misshaped, 'final_layer_norm.weight has shape (31,)'),
    (missing_tensor, 'missing encoder.final_layer_norm.weight'),
    (extra_tensor, 'left unread encoder.surprise'), (traversal, 'elsewhere'),
    (link_out, 'links out of its directory'),
    (small_embedding, '384; the embedding of these weights has 48 rows'),
    (broken_tokenizer, 'tokenizer.json'), (disagreeing_copy, 'should be a copy of shared.weight'),
    (pickled, 'pass --allow-pickle'),
], ids=lambda x: getattr(x, '__name__', ''))
def test_bad_sources(damage, message, hf, tmp_path, capsys):
  shutil.copytree(hf('t5_1_0'), tmp_path / 'src' / 'model')
  damage(tmp_path / 'src' / 'model')
  (tmp_path / 'out').mkdir()
  code, out, err = run('--from', 'hf', '--to', 't5lab', tmp_path / 'src' / 'model',
                       tmp_path / 'out' / 'dst', '--golden', capsys=capsys)
  assert code == 2 and message in err and err.count('\n') == 1, err
  assert err.startswith('t5lab: ') and not list((tmp_path / 'out').iterdir())


def test_a_hostile_pickle_is_not_run(hf, tmp_path, capsys):
  canary = tmp_path / 'canary'

  class Bomb:
    def __reduce__(self):
      return os.system, (f'touch {canary}',)
  shutil.copytree(hf('t5_1_0'), tmp_path / 'src')
  (tmp_path / 'src' / 'model.safetensors').unlink()
  torch.save({'shared.weight': Bomb()}, tmp_path / 'src' / 'pytorch_model.bin')
  for flags in ((), ('--allow-pickle',)):
    code, _, err = run('--from', 'hf', '--to', 't5lab', tmp_path / 'src', tmp_path / 'dst', *flags,
                       capsys=capsys)
    assert code == 2 and err.count('\n') == 1 and 'pytorch_model.bin' in err
  assert not canary.exists() and not (tmp_path / 'dst').exists()


def test_an_honest_pickle_is_read_when_allowed(hf, tmp_path, capsys):
  shutil.copytree(hf('t5_1_0'), tmp_path / 'src')
  (tmp_path / 'src' / 'model.safetensors').unlink()
  torch.save(model('t5_1_0').state_dict(), tmp_path / 'src' / 'pytorch_model.bin')
  code, _, err = run('--from', 'hf', '--to', 't5lab', tmp_path / 'src', tmp_path / 'dst',
                     '--allow-pickle', '--golden', capsys=capsys)
  assert code == 0, err


@pytest.mark.parametrize('argv, message', [
    (['--from', 'hf', '--to', 't5lab', 'nowhere', 'dst'], 'nowhere'),
    (['--from', 'gguf', '--to', 't5lab', 'nowhere', 'dst'], 'nowhere'),
    (['--from', 't5x', '--to', 't5lab', 'nowhere', 'dst'], 'nowhere'),
    (['--from', 't5lab', '--to', 'hf', 'nowhere', 'dst'], 'nowhere'),
    (['--from', 'hf', '--to', 't5lab', '--scanned', 'a', 'b'], '--scanned has no meaning'),
    (['--from', 'hf', '--to', 'gguf', 'a', 'b'], "invalid choice: 'gguf'"),
])
def test_bad_arguments(argv, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, _, err = run(*argv, capsys=capsys)
  assert code == 2 and message in err and err.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_an_existing_destination_stays(hf, tmp_path, capsys):
  (tmp_path / 'dst').mkdir()
  (tmp_path / 'dst' / 'mine').write_text('x')
  code, _, err = run('--from', 'hf', '--to', 't5lab', hf('t5_1_0'), tmp_path / 'dst', capsys=capsys)
  assert code == 2 and 'exists already' in err
  assert [p.name for p in (tmp_path / 'dst').iterdir()] == ['mine']


def test_what_hugging_face_cannot_say(ours, tmp_path, capsys):
  folder = tmp_path / 'changed'
  shutil.copytree(ours('gpt2'), folder)
  config = json.loads((folder / 'config.json').read_text())
  config['model']['acts'] = ['silu', 'linear']
  (folder / 'config.json').write_text(json.dumps(config))
  code, _, err = run('--from', 't5lab', '--to', 'hf', folder, tmp_path / 'dst', capsys=capsys)
  assert code == 2 and "cannot say acts=('silu', 'linear')" in err
  assert reference.available()


def test_a_run_of_ours_goes_to_hugging_face_with_its_tokenizer(tmp_path_factory, capsys):
  """The quickstart scales its attention, as Adam wants; elsewhere T5's kernels hold the scale."""
  import pathlib

  import transformers

  from t5lab import config
  from t5lab.programs import loop
  folder = tmp_path_factory.mktemp('run')
  quickstart = pathlib.Path(__file__).parents[3] / 'configs' / 'quickstart.py'
  loop.train(config.load(f'{quickstart}:tiny', {'eval.examples': '2', 'total_steps': '2'}),
             folder / 'run')
  code, out, err = run('--from', 't5lab', '--to', 'hf', folder / 'run', folder / 'hf',
                       capsys=capsys)
  assert code == 0, err
  assert 'folded into the query kernels' in out and '16 of 16 greedy tokens equal' in out
  lab = t5lab.load(folder / 'run')
  words = transformers.AutoTokenizer.from_pretrained(folder / 'hf')
  for text in ('Turn on the light', 'größe ☃\n{x}  y', 'a<extra_id_3>b <extra_id_99>', 'tab\tend '):
    ids = words(text).input_ids
    assert ids == lab.tokens(text)
    assert '<' in text or words.decode(ids, skip_special_tokens=True) == text
  theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / 'hf')
  ids, start = lab.tokens('Turn on the light'), [0, 5, 6]
  with torch.no_grad():
    want = theirs(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([start])).logits
  got = lab.logits({'encoder_input_tokens': np.array([ids]),
                    'decoder_input_tokens': np.array([start])})
  np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


@pytest.mark.parametrize('to, code', [('hf', 2), ('t5lab', 4)])
def test_a_full_disk_leaves_no_half_destination(to, code, ours, tmp_path):
  """A limit on the size of files stands in for a disk that fills while the weights are written."""
  import resource
  import subprocess
  import sys
  (tmp_path / 'out').mkdir()
  done = subprocess.run(
      [sys.executable, '-m', 't5lab', 'convert', '--from', 't5lab', '--to', to, '--golden',
       str(ours('gpt2')), str(tmp_path / 'out' / 'dst')], capture_output=True, text=True,
      timeout=120, env={**os.environ, 'XLA_FLAGS': '', 'XDG_CACHE_HOME': str(tmp_path / 'cache')},
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
  assert done.returncode == code, done.stderr
  said, = [line for line in done.stderr.splitlines() if line.startswith('t5lab: ')]
  assert {'hf': 'cannot write', 't5lab': 'failed'}[to] in said
  if to == 'hf':      # TensorStore's threads write their own traces of callbacks that came too late
    assert done.stderr.count('\n') == 1
  assert not list((tmp_path / 'out').iterdir())
