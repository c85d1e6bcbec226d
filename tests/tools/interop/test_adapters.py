"""PEFT adapters, merged onto a base: the formula of LoRA, every way to write it, and refusals.

The merged tensors and logits were compared with peft 0.21.2 itself on 2026-12-01: equal bit for bit
(merge_and_unload), and within 1.2e-6 where one of two tied tables is adapted.
"""

import functools
import json

from hf_models import save
import numpy as np
import pytest
import torch

from t5lab import cli
from t5lab.errors import UsageError
from t5lab.tools.interop import adapters, convert, hf, tensor_files, tensor_map

HEADER = 'base_model.model.'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """name -> (the directory of a base model, {name: tensor} as convert reads it)."""
  @functools.cache
  def get(name):
    folder = tmp_path_factory.mktemp(name)
    save(name, folder)
    return folder, merged(convert.read_hf(folder))
  return get


def merged(source):
  """Returns {their name: tensor} of a source, verified."""
  params = source.read_params()
  assert source.verify(params) > 5
  rows = hf.format_for(source.model).tensor_rows(source.model)
  return {name: np.array(x) for name, x in tensor_map.write(rows, params)}


def write(folder, tensors, **config):
  """Writes an adapter's directory."""
  folder.mkdir(exist_ok=True)
  config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 8, 'base_model_name_or_path': 'a/b'} | config
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  if tensors:
    written = folder / 'new'
    written.mkdir()
    tensor_files.write_safetensors(written, tensors.items(),
                                   {k: (v.shape, v.dtype) for k, v in tensors.items()})
    (written / 'model.safetensors').rename(folder / 'adapter_model.safetensors')
    written.rmdir()
  return folder


def pair(rng, module, fan_out, fan_in, r=2, end='.weight', embedding=''):
  a = rng.normal(size=(r, fan_in)).astype(np.float32)
  b = rng.normal(size=(fan_out, r)).astype(np.float32)
  return {f'{module}.lora_{embedding}A{end}': a, f'{module}.lora_{embedding}B{end}': b}, b @ a


Q = 'model.layers.1.self_attn.q_proj'


@pytest.mark.parametrize('module, config, scale', [
    (Q, {}, 4), (Q, {'lora_alpha': 3}, 1.5), (Q, {'use_rslora': True}, 8 / 2 ** .5),
    (Q, {'r': 9, 'rank_pattern': {'q_proj': 2}}, 4),
    (Q, {'r': 9, 'rank_pattern': {'k_proj': 5, r'layers\.\d+\.self_attn\.q_proj': 2}}, 4),
    (Q, {'alpha_pattern': {'^model.layers.1.self_attn.q_proj': 1}}, .5),
    (Q, {'alpha_pattern': {'layers.0.self_attn.q_proj': 1}}, 4),
    (Q, {'fan_in_fan_out': True, 'init_lora_weights': 'gaussian'}, 4)])
@pytest.mark.parametrize('end', ['.weight', '.default.weight', ''])
def test_lora_on_a_linear(module, config, scale, end, base, tmp_path, rng):
  folder, expected = base('llama')
  tensors, product = pair(rng, HEADER + module, 32, 32, end=end)
  source = convert.read_hf(write(tmp_path / 'adapter', tensors, **config), base=folder)
  found = merged(source)
  for name, x in found.items():
    change = np.float32(scale) * product if name == f'{module}.weight' else 0
    np.testing.assert_allclose(x, expected[name] + change, atol=1e-5, err_msg=name)
  assert source.notes == (f'adapter {tmp_path / "adapter"}: 1 tensors changed by LoRA',)


def test_the_kernels_of_gpt2_are_transposed_the_square_one_too(base, tmp_path, rng):
  folder, expected = base('gpt2')
  tensors, changes = {}, {}
  for module, fan_out, fan_in in (('attn.c_attn', 96, 32), ('attn.c_proj', 32, 32),
                                  ('mlp.c_fc', 128, 32)):
    module = f'transformer.h.0.{module}'
    more, product = pair(rng, HEADER + module, fan_out, fan_in)
    tensors |= more
    changes[f'{module}.weight'] = 4 * product.T
  found = merged(convert.read_hf(write(tmp_path / 'adapter', tensors), base=folder))
  for name, x in found.items():
    np.testing.assert_allclose(x, expected[name] + changes.get(name, 0), atol=1e-5)


@pytest.mark.parametrize('config, head_follows', [
    ({}, False), ({'ensure_weight_tying': True}, True)])
def test_a_tied_embedding_is_adapted_alone(config, head_follows, base, tmp_path, rng):
  """peft wraps the embedding, and the softmax matrix stays what it was."""
  folder, expected = base('llama_tied')
  tensors, product = pair(rng, f'{HEADER}model.embed_tokens', 32, 48, end='',
                          embedding='embedding_')
  source = convert.read_hf(write(tmp_path / 'adapter', tensors, **config), base=folder)
  found, name = merged(source), 'model.embed_tokens.weight'
  np.testing.assert_allclose(found[name], expected[name] + 4 * product.T, atol=1e-5)
  assert source.model.tied == head_follows
  if not head_follows:
    np.testing.assert_array_equal(found['lm_head.weight'], expected[name])


@pytest.mark.parametrize('stored', ['classifier.weight', 'classifier.modules_to_save.weight',
                                    'classifier.modules_to_save.default.weight'])
def test_retrained_modules_and_biases_replace_those_of_the_base(stored, base, tmp_path, rng):
  folder, expected = base('bert_classifier')
  new = rng.normal(size=(3, 32)).astype(np.float32)
  bias = 'bert.encoder.layer.0.attention.self.query'
  tensors = {HEADER + stored: new, f'{HEADER}{bias}.base_layer.bias': np.full(32, 7, np.float32),
             f'{HEADER}classifier.original_module.weight': new + 1}
  source = convert.read_hf(
      write(tmp_path / 'adapter', tensors, modules_to_save=['classifier'], bias='all'), base=folder)
  found = merged(source)
  for name, x in found.items():
    wanted = {'classifier.weight': new, f'{bias}.bias': 7}.get(name, expected[name])
    np.testing.assert_array_equal(x, np.broadcast_to(wanted, x.shape), err_msg=name)
  assert f'and replaced: {bias}.bias, classifier.weight' in source.notes[0]


def test_the_base_may_be_saved_without_its_head_and_in_bfloat16(base, tmp_path, rng):
  import ml_dtypes
  folder, _ = base('gpt2')
  reader = tensor_files.open_hf(folder)
  bare = tmp_path / 'bare'
  bare.mkdir()
  arrays = {name.removeprefix('transformer.'): reader.read(name).astype(ml_dtypes.bfloat16)
            for name in reader.shapes()}
  tensor_files.write_safetensors(bare, arrays.items(),
                                 {k: (v.shape, v.dtype) for k, v in arrays.items()})
  (bare / 'config.json').write_bytes((folder / 'config.json').read_bytes())
  tensors, product = pair(rng, f'{HEADER}transformer.h.1.mlp.c_fc', 128, 32)
  found = merged(convert.read_hf(write(tmp_path / 'adapter', tensors), base=bare))
  expected = arrays['h.1.mlp.c_fc.weight'].astype(np.float32) + 4 * product.T
  np.testing.assert_allclose(found['transformer.h.1.mlp.c_fc.weight'], expected, atol=1e-5)


def test_the_command_and_the_tokenizer_of_the_adapter(base, tmp_path, rng, capsys):
  folder, _ = base('t5_1_0')
  (folder / 'generation_config.json').write_text('{"eos_token_id": [1, 9]}')
  tensors, _ = pair(rng, f'{HEADER}encoder.block.0.layer.0.SelfAttention.q', 32, 32)
  source = write(tmp_path / 'adapter', tensors)
  (source / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a']))
  opened = convert.read_hf(source, base=folder)
  assert source / 'vocab.txt' in opened.copied and tuple(opened.config.eval.stop_ids) == (1, 9)
  (source / 'vocab.txt').unlink()
  argv = ['convert', '--from', 'hf', '--to', 't5lab', '--golden', str(source)]
  assert cli.main([*argv, str(tmp_path / 'x')]) == 2
  assert capsys.readouterr().err == (
      f"t5lab: {source} is a PEFT adapter of 'a/b': give the directory of that model with "
      '--base DIR\n')
  assert cli.main([*argv, str(tmp_path / 'x'), '--base', str(folder)]) == 0
  assert 'tensors changed by LoRA' in capsys.readouterr().out
  assert cli.main([*argv[:-1], str(folder), str(tmp_path / 'y'), '--base', str(folder)]) == 2
  assert '--base applies to an adapter' in capsys.readouterr().err


A, B = f'{HEADER}{Q}.lora_A.weight', f'{HEADER}{Q}.lora_B.weight'
GOOD = {A: np.ones((2, 32), np.float32), B: np.ones((32, 2), np.float32)}
REFUSED = {
    'IA3': (GOOD, {'peft_type': 'IA3'}, "of type 'IA3' is not supported, only LORA"),
    'prompts': (GOOD, {'peft_type': 'PROMPT_TUNING'}, 'PROMPT_TUNING'),
    'no type': (GOOD, {'peft_type': None}, 'of type None'),
    'AdaLoRA': (GOOD, {'peft_type': 'ADALORA'}, 'ADALORA'),
    'DoRA': (GOOD, {'use_dora': True}, 'use_dora=True, which is not supported'),
    'DoRA by its tensors': ({**GOOD, f'{HEADER}{Q}.lora_magnitude_vector': np.ones(32)}, {},
                            'lora_magnitude_vector.* is not a matrix of plain LoRA'),
    'a bias of B': ({**GOOD, f'{HEADER}{Q}.lora_B.bias': np.ones(32)}, {}, 'not a matrix of plain'),
    'PiSSA': (GOOD, {'init_lora_weights': 'pissa_niter_4'}, 'changes the base weights'),
    'repeated layers': (GOOD, {'layer_replication': [[0, 1]]}, 'layer_replication'),
    'another base': ({f'{HEADER}model.layers.7.x.lora_A.weight': GOOD[A]}, {}, 'not a module of'),
    'a tensor of another base': ({f'{HEADER}score.weight': GOOD[A]}, {}, 'not a tensor of the'),
    'a width of another base': ({A: np.ones((2, 16), np.float32), B: GOOD[B]}, {},
                                r'a change of shape \(32, 16\)'),
    'half a pair': ({A: GOOD[A]}, {}, 'lacks lora_B'),
    'two adapters': ({**GOOD, A.replace('A.w', 'A.other.w'): GOOD[A]}, {}, 'more than one pair'),
    'another rank': (GOOD, {'r': 3}, 'its rank is 3'),
    'rank of text': (GOOD, {'r': 'x'}, "r must be a positive number, got 'x'"),
    'rank 0': (GOOD, {'r': 0}, 'r must be a positive number, got 0'),
    'no alpha': (GOOD, {'lora_alpha': None}, 'lora_alpha must be a positive number, got None'),
    'alpha NaN': (GOOD, {'lora_alpha': float('nan')}, 'lora_alpha must be a positive number'),
    'patterns of a list': (GOOD, {'rank_pattern': [1]}, 'rank_pattern must be an object'),
    'no regex': (GOOD, {'rank_pattern': {'[': 2}}, 'is not a regex'),
    'a repeat beyond re': (GOOD, {'rank_pattern': {'a{99999999999}': 2}}, 'is not a regex'),
    'a regex bomb': (GOOD, {'alpha_pattern': {'(.*)*x': 2}}, 'repeats too much'),
    'modules of text': ({f'{HEADER}lm_head.weight': GOOD[A]}, {'modules_to_save': 'lm_head'},
                        'modules_to_save must be a list'),
    'no weights': ({}, {}, 'but no weights of an adapter: looked for adapter_model.safetensors'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_plain_lora_on_this_base_is_refused(case, base, tmp_path):
  tensors, config, message = REFUSED[case]
  folder, _ = base('llama')
  with pytest.raises(UsageError, match=message) as e:
    convert.read_hf(write(tmp_path / 'adapter', tensors, **config), base=folder)
  assert '\n' not in str(e.value)


def test_an_adapter_without_tensors_is_refused(base, tmp_path):
  folder, _ = base('llama')
  source = write(tmp_path / 'adapter', GOOD)
  (source / 'adapter_model.safetensors').write_bytes((2).to_bytes(8, 'little') + b'{}')
  with pytest.raises(UsageError, match='the adapter changes no tensor: its file is empty'):
    convert.read_hf(source, base=folder)


@pytest.mark.parametrize('name, module', [
    ('t5_1_0', 'shared'), ('bart', 'model.decoder.embed_tokens'), ('t5_1_1', 'shared')])
def test_an_embedding_that_modules_share_is_not_adapted(name, module, base, tmp_path, rng):
  folder, _ = base(name)
  tensors, _ = pair(rng, HEADER + module, 32, 48, end='', embedding='embedding_')
  with pytest.raises(UsageError, match=f'modules of a {name[:4].split("_")[0]} model share'):
    convert.read_hf(write(tmp_path / 'adapter', tensors), base=folder)


def test_pickled_adapters_need_the_flag_and_links_stay_inside(base, tmp_path):
  folder, _ = base('llama')
  source = write(tmp_path / 'adapter', {})
  torch.save({k: torch.tensor(v) for k, v in GOOD.items()}, source / 'adapter_model.bin')
  with pytest.raises(UsageError, match='pass --allow-pickle'):
    convert.read_hf(source, base=folder)
  assert 'changed by LoRA' in convert.read_hf(source, True, base=folder).notes[0]
  (source / 'adapter_model.bin').rename(tmp_path / 'elsewhere.bin')
  (source / 'adapter_model.bin').symlink_to(tmp_path / 'elsewhere.bin')
  with pytest.raises(UsageError, match='links out of its directory'):
    convert.read_hf(source, True, base=folder)


def test_an_adapter_beside_its_base_is_merged(base, tmp_path):
  import shutil
  folder, expected = base('llama')
  shutil.copytree(folder, tmp_path / 'both')
  found = merged(convert.read_hf(write(tmp_path / 'both', GOOD)))
  np.testing.assert_allclose(found[f'{Q}.weight'], expected[f'{Q}.weight'] + 8, atol=1e-5)
  assert adapters.find(folder, None) is None
