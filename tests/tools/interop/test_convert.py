"""`t5lab convert` end to end: every source and destination, certificates, refused inputs."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys

from hf_models import model, save
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import random_params
import tokenizers
import torch
import transformers

import t5lab
from t5lab import cli, trees
from t5lab.errors import UsageError
from t5lab.files import Progress
from t5lab.tools.interop import certify, convert, golden, reference, tensor_files


def run(*argv, capsys):
  code = cli.main(['convert', *map(str, argv)])
  out = capsys.readouterr()
  return code, out.out, out.err


@pytest.fixture(scope='module', autouse=True)
def golden_once():
  """Compiles each golden model once: nothing in this file changes what it computes."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(golden, 'relative_difference', functools.cache(golden.relative_difference))
    yield


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
  """name -> a directory that transformers wrote."""
  @functools.cache
  def get(name, **kwargs):
    folder = tmp_path_factory.mktemp(name)
    save(name, folder, **kwargs)
    return folder
  return get


@pytest.fixture(scope='module')
def ours(hf, tmp_path_factory):
  """name -> the directory that convert made of it, without torch."""
  @functools.cache
  def get(name):
    folder = tmp_path_factory.mktemp('ours') / name
    convert.convert(convert.read_hf(hf(name)), folder, 't5lab', log=lambda line: None,
                    use_reference=False)
    return folder
  return get


def tensors(path):
  reader = tensor_files.open_hf(path)
  return {name: reader.read(name) for name in reader.shapes()}


# One of each kind; test_parity.py reads and writes every architecture.
@pytest.mark.parametrize('name', ['t5_1_1', 'gpt2', 'bert', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('bart', 'llama'))])
def test_hf_to_ours_and_back_is_certified_and_bit_equal(name, hf, tmp_path, capsys):
  code, out, err = run('--from', 'hf', '--to', 't5lab', hf(name), tmp_path / 'ours', capsys=capsys)
  assert code == 0, err
  assert 'verified against transformers' in out and ': logits within ' in out
  assert 'peak memory' in out
  proof = json.loads((tmp_path / 'ours' / certify.NAME).read_text())
  assert proof['reference'].startswith('transformers') and 'bit-equal' in proof['round_trip']
  assert proof['logits']['largest_relative_difference'] < 1e-5
  assert name == 'bert' or proof['greedy'] == {'tokens': 16, 'equal': 16}
  lab = t5lab.load(tmp_path / 'ours')
  assert proof['sha256'] == certify.digest(lab.params)
  code, out, err = run('--from', 't5lab', '--to', 'hf', tmp_path / 'ours', tmp_path / 'back',
                       '--golden', capsys=capsys)
  assert code == 0, err
  before, after = tensors(hf(name)), tensors(tmp_path / 'back')
  if name == 't5_1_1':
    before.pop('encoder.embed_tokens.weight', None)
    before.pop('decoder.embed_tokens.weight', None)
  assert before.keys() == after.keys()
  assert all(np.array_equal(before[k], after[k]) for k in before)
  # transformers reads our directory as the model that it wrote.
  again = type(model(name)).from_pretrained(tmp_path / 'back')
  ids = torch.tensor([[5, 7, 9, 11]])
  kwargs = {'decoder_input_ids': ids} if name in ('t5_1_1', 'bart') else {}
  with torch.no_grad():
    assert torch.equal(again(input_ids=ids, **kwargs)[0], model(name)(input_ids=ids, **kwargs)[0])


def test_without_torch_the_certificate_has_golden_vectors_and_the_round_trip(ours):
  proof = json.loads((ours('umt5') / certify.NAME).read_text())
  assert proof['reference'] == 'golden vectors and round trip'
  assert proof['golden']['architecture'] == 'umt5'
  assert proof['golden']['largest_relative_difference'] < 1e-5 and 'logits' not in proof


def test_t5x_and_back(ours, tmp_path, capsys):
  """Ours to T5X, unscanned and Orbax, and back to ours: the same arrays."""
  expected = trees.flatten(t5lab.load(ours('t5_1_1')).params)
  for i, form in enumerate(((), ('--orbax',))):
    there, back = tmp_path / f'checkpoint_{i}', tmp_path / f'back_{i}'
    code, out, err = run('--from', 't5lab', '--to', 't5x', *form, ours('t5_1_1'), there,
                         '--golden', capsys=capsys)
    assert code == 0, err
    assert 'read back: 61 tensors bit-equal' in out
    code, out, err = run('--from', 't5x', '--to', 't5lab', there, back, '--golden', capsys=capsys)
    assert code == 0, err
    params = trees.flatten(t5lab.load(back).params)
    assert params.keys() == expected.keys()
    assert all(np.array_equal(params[k], expected[k]) for k in expected)
  code, _, err = run('--from', 't5lab', '--to', 't5x', '--scanned', '--golden', ours('umt5'),
                     tmp_path / 'scanned', capsys=capsys)
  assert code == 0, err
  code, _, err = run('--from', 't5x', '--to', 'hf', tmp_path / 'scanned', tmp_path / 'hf',
                     '--golden', capsys=capsys)
  assert code == 0, err
  embedding = tensors(tmp_path / 'hf')['shared.weight']
  assert np.array_equal(embedding, np.asarray(t5lab.load(ours('umt5')).params['embedding']))


def test_sharded_and_half_precision_sources(hf, tmp_path):
  """Shards are found through their index; bfloat16 and float16 are read as float32."""
  source = hf('llama', max_shard_size='20KB')
  assert (source / 'model.safetensors.index.json').exists()
  a = convert.read_hf(source).read_params()
  b = convert.read_hf(hf('llama')).read_params()
  jax.tree.map(np.testing.assert_array_equal, a, b)
  for dtype in (torch.bfloat16, torch.float16):
    half = tmp_path / str(dtype)
    copy = type(model('llama'))(model('llama').config)
    copy.load_state_dict(model('llama').state_dict())
    copy.to(dtype).save_pretrained(half)
    source = convert.read_hf(half)
    params = source.read_params()
    assert source.verify(params) > 10
    table = np.asarray(params['embedding'])
    stored = copy.model.embed_tokens.weight.detach().float().numpy()
    assert table.dtype == np.float32 and np.array_equal(table, stored)


def test_reading_shows_its_progress(hf):
  out = io.StringIO()
  progress = lambda total: Progress('reading', 'tensors', total, file=out, every=0.)
  source = convert.read_hf(hf('llama'), progress=progress)
  source.read_params()
  lines = out.getvalue().splitlines()
  assert lines[0].startswith('reading: 1 of 21 tensors · ') and 'ETA' in lines[0]
  assert lines[-1].startswith('reading: 21 of 21 tensors · ') and lines[-1].endswith('done')


def test_restores_onto_any_mesh(ours):
  from t5lab import config
  from t5lab.parallel import sharding
  from t5lab.programs import loading
  c = loading.read_config(ours('t5_1_1'))
  expected = loading.load(ours('t5_1_1'), c=c).params
  for fsdp, model_axis, rules in ((8, 1, 'fsdp'), (2, 4, 'fsdp_tp')):
    c = loading.read_config(ours('t5_1_1'))
    c.mesh.data, c.mesh.fsdp, c.mesh.model, c.rules = 1, fsdp, model_axis, rules
    params = loading.load(ours('t5_1_1'), c=c).params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    kernel = params['encoder']['layers']['mlp']['wi_0']['kernel']
    assert kernel.sharding.mesh.size == 8 and not kernel.sharding.is_fully_replicated
  assert config.to_dict(c)['rules'] == 'fsdp_tp' and sharding.RULES


def test_a_wrong_weight_is_not_written(hf, tmp_path, monkeypatch):
  """One changed tensor, or another formula, and nothing is written."""
  source = convert.read_hf(hf('gpt2'))
  read_params = source.read_params
  def read_changed():
    params = read_params()
    params['decoder']['layers']['attn']['q']['bias'][1] += 0.5
    return params
  source.read_params = read_changed
  with pytest.raises(UsageError, match='made from our arrays differs from'):
    convert.convert(source, tmp_path / 'x', 't5lab', log=lambda line: None)
  source.verify = lambda params: 0
  with pytest.raises(UsageError, match='logits differ from those of transformers'):
    convert.convert(source, tmp_path / 'x', 't5lab', log=lambda line: None)
  source = convert.read_hf(hf('gpt2'))
  source.model = source.model.__class__(**{**vars(source.model), 'acts': ('relu',)})
  with pytest.raises(UsageError, match='logits differ'):
    convert.convert(source, tmp_path / 'x', 't5lab', log=lambda line: None)
  assert not list(tmp_path.iterdir())


def test_other_greedy_tokens_are_refused_and_ties_are_not():
  logits = np.ones((3, 5), np.float32)
  expected = certify.Outputs(logits, np.array([[1, 2, 3]]), np.array([[.5, .5, .5]]))
  report = certify.compare(certify.Outputs(logits, np.array([[1, 2, 3]])), expected, 'x')
  assert report['greedy'] == {'tokens': 3, 'equal': 3}
  with pytest.raises(UsageError, match='greedy decoding gives'):
    certify.compare(certify.Outputs(logits, np.array([[1, 4, 3]])), expected, 'x')
  tie = certify.Outputs(logits, expected.tokens, np.array([[.5, 1e-6, .5]]))
  report = certify.compare(certify.Outputs(logits, np.array([[1, 4, 3]])), tie, 'x')
  assert report['greedy'] == {'tokens': 3, 'equal': 1}


# -- refused inputs: one line, exit code 2, no destination -----------------------------------------


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
  """A tokenizer file that is a link to another file of this machine."""
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


def change(folder, file='config.json', **values):
  config = json.loads((folder / file).read_text())
  (folder / file).write_text(json.dumps({**config, **values}))


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
    (not_json, 'is not valid JSON'), (missing_key, "lacks 'd_ff', which a t5 config has"),
    (not_a_number, 'encoder.final_layer_norm.weight not finite'),
    (misshaped, 'final_layer_norm.weight has shape (31,)'),
    (missing_tensor, 'missing encoder.final_layer_norm.weight'),
    (extra_tensor, 'unread encoder.surprise'), (traversal, 'elsewhere'),
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


@pytest.mark.parametrize('name, values, message', [
    ('gpt2', dict(model_type=[]), 'model_type [] is unknown'),
    ('gpt2', dict(n_head=0), 'division or modulo by zero'),
    ('gpt2', dict(n_embd=1 << 40), 'model.d_model must be less than 2**31'),
    ('gpt2', dict(n_positions=1 << 30), 'transformer.wpe.weight has shape (32, 32)'),
    ('gpt2', dict(layer_norm_epsilon=None), 'model.norm_eps must be of type float, got None'),
    ('gpt2', dict(layer_norm_epsilon=float('nan')), 'model.norm_eps must be between 0 and 1'),
    ('llama', dict(num_hidden_layers=1 << 30), 'dec_layers=1,073,741,824, but the checkpoint has'),
    ('llama', dict(num_key_value_heads=-1), 'model.n_kv_heads must be at least 0, got -1'),
    ('llama', dict(max_position_embeddings=-1), 'model.max_length must be at least 0, got -1'),
    ('llama', dict(intermediate_size=1.5), 'model.d_ff must be of type int, got 1.5'),
    ('bert', dict(type_vocab_size=-1), 'model.types must be at least 0, got -1'),
    ('bart', dict(encoder_ffn_dim='a\nb'), "encoder_ffn_dim='a\\nb' and decoder_ffn_dim=64"),
    ('bart', dict(d_model=True), 'model.d_model must be of type int, got True'),
    ('bert_classifier', dict(problem_type=['x']), 'eval.problem_type="[\'x\']" is unknown'),
    ('t5_1_0', dict(num_decoder_layers=-2), 'model.dec_layers=-2: at least one'),
    ('t5_1_0', dict(feed_forward_proj=3), 'is not a t5 config'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', factor=0)), 'factor of the rotary'),
    ('llama', dict(rope_parameters=dict(rope_type='yarn', original_max_position_embeddings=-1)),
     'original_max_position_embeddings of the rotary positions must be more than 0, got -1'),
    ('mistral', dict(rope_parameters=None, rope_theta=0), 'rope_theta of the rotary'),
    ('gemma3', dict(rope_parameters=None, rope_local_base_freq=-1), 'rope_theta of the rotary'),
    ('qwen2', dict(use_sliding_window=False), 'but use_sliding_window=False: set it to true'),
])
def test_odd_values_in_a_config_are_refused_in_one_line(name, values, message, hf, tmp_path):
  shutil.copytree(hf(name), tmp_path / 'model')
  change(tmp_path / 'model', **values)
  with pytest.raises(UsageError) as e:
    convert.read_hf(tmp_path / 'model').read_params()
  assert message in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('values', [
    dict(id2label={'0': 'no', '1': 'maybe', '2': 'yes'}, problem_type='multi_label_classification'),
    dict(id2label={'2': 'c', '0': 'a', '1': 'b'}, problem_type='regression'), {}],
    ids=['several', 'regression', 'plain'])
def test_labels_and_problem_type_survive_the_round_trip(values, hf, tmp_path):
  shutil.copytree(hf('bert_classifier'), tmp_path / 'src')
  label2id = {name: int(i) for i, name in values.get('id2label', {}).items()}
  change(tmp_path / 'src', **values, **({'label2id': label2id} if label2id else {}))
  go = functools.partial(convert.convert, log=lambda line: None, use_reference=False)
  go(convert.read_hf(tmp_path / 'src'), tmp_path / 'ours', 't5lab')
  go(convert.read_t5lab(tmp_path / 'ours'), tmp_path / 'back', 'hf')
  back = transformers.AutoConfig.from_pretrained(tmp_path / 'back')
  expected = transformers.AutoConfig.from_pretrained(tmp_path / 'src')
  assert (back.id2label, back.label2id, back.problem_type, back.num_labels) == (
      expected.id2label, expected.label2id, expected.problem_type, 3)
  lab = t5lab.load(tmp_path / 'ours')
  assert lab.labels == tuple(expected.id2label[i] for i in range(3))


@pytest.mark.parametrize('where, ends, expected', [
    ('generation_config.json', [1, 9], (1, 9)), ('generation_config.json', [9], (9,)),
    ('generation_config.json', 9, (9,)), ('generation_config.json', 1, ()),
    ('generation_config.json', None, ()), ('generation_config.json', [], ()),
    ('config.json', [1, 9], (1, 9)), ('config.json', 1, ()), ('config.json', None, ())])
def test_every_id_that_ends_a_text_is_kept(where, ends, expected, hf, tmp_path):
  """LLaMA 3 Instruct ends a turn with another id than a text. transformers generates by
  generation_config.json alone, or by config.json if there is none."""
  shutil.copytree(hf('t5_1_0'), tmp_path / 'src')
  change(tmp_path / 'src', eos_token_id=1)
  (tmp_path / 'src' / 'generation_config.json').unlink(missing_ok=True)
  if where != 'config.json':
    (tmp_path / 'src' / where).write_text('{}')
  change(tmp_path / 'src', where, eos_token_id=ends)
  source = convert.read_hf(tmp_path / 'src')
  assert tuple(source.config.eval.stop_ids) == expected
  go = functools.partial(convert.convert, log=lambda line: None, use_reference=False)
  go(source, tmp_path / 'ours', 't5lab')
  again = convert.read_t5lab(tmp_path / 'ours')
  assert tuple(again.config.eval.stop_ids) == expected
  if ends == [1, 9]:
    go(again, tmp_path / 'back', 'hf')
    back = transformers.GenerationConfig.from_pretrained(tmp_path / 'back')
    assert back.eos_token_id == ends


def test_chat_templates_survive_the_round_trip(hf, tmp_path):
  folder = tmp_path / 'x'
  shutil.copytree(hf('llama'), folder)
  tokens = {'<unk>': 0, '</s>': 2, 'a': 1}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, '<unk>')).save(
      str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
  (folder / 'additional_chat_templates').mkdir()
  texts = {'chat_template.jinja': 'D', 'additional_chat_templates/rag.jinja': 'R',
           'chat_template.json': '{"chat_template": "P"}'}
  for name, text in texts.items():
    (folder / name).write_text(text)
  quiet = dict(log=lambda line: None, use_reference=False)
  convert.convert(convert.read_hf(folder), tmp_path / 'ours', 't5lab', **quiet)
  chats = t5lab.load(tmp_path / 'ours').vocab.chat_template
  assert chats == {'default': 'D', 'rag': 'R'}
  convert.convert(convert.read_t5lab(tmp_path / 'ours'), tmp_path / 'back', 'hf', **quiet)
  assert {name: (tmp_path / 'back' / name).read_text() for name in texts} == texts
  # a folder that is a link could lead anywhere
  shutil.rmtree(folder / 'additional_chat_templates')
  (folder / 'additional_chat_templates').symlink_to(tmp_path / 'back' / 'additional_chat_templates')
  with pytest.raises(UsageError, match='links out of its directory'):
    convert.read_hf(folder)


@pytest.mark.parametrize('name, architecture', [
    ('t5_1_0', 'T5ForSequenceClassification'), ('bart', 'BartForQuestionAnswering'),
    ('bert', 'BertForNextSentencePrediction'), ('bert_classifier', 'BertForMultipleChoice'),
    ('gpt2', 'GPT2ForSequenceClassification'),
    ('gpt2', 'GPT2DoubleHeadsModel'), ('t5_1_0', 'T5ForQuestionAnswering')])
def test_a_head_that_no_model_has_is_refused_by_its_name(name, architecture, hf, tmp_path):
  """Also where the tensors would fit: a token classifier's are those of a sequence classifier."""
  shutil.copytree(hf(name), tmp_path / 'model')
  change(tmp_path / 'model', architectures=[architecture])
  with pytest.raises(UsageError, match=f'the head of {architecture} is not supported'):
    convert.read_hf(tmp_path / 'model')


def test_an_encoder_that_was_saved_without_its_pooler(hf, tmp_path):
  """As Snowflake's arctic-embed: transformers fills the pooler, which no output depends on."""
  shutil.copytree(hf('bert_bare'), tmp_path / 'model')
  tensors = load_file(tmp_path / 'model' / 'model.safetensors')
  save_file({name: x for name, x in tensors.items() if 'pooler' not in name},
            tmp_path / 'model' / 'model.safetensors')
  source = convert.read_hf(tmp_path / 'model')
  body = convert.convert(source, tmp_path / 'out', 't5lab', log=print)
  assert body['reference'].endswith('BertModel') and not source.model.pooler


@pytest.mark.parametrize('architecture, missing', [
    ('BertForQuestionAnswering', 'qa_outputs.weight'),
    ('BertForTokenClassification', 'classifier.weight')])
def test_a_head_without_its_tensors_is_refused(architecture, missing, hf, tmp_path):
  shutil.copytree(hf('bert_bare'), tmp_path / 'model')
  change(tmp_path / 'model', architectures=[architecture])
  with pytest.raises(UsageError, match=f'{architecture}.*the checkpoint has no {missing}'):
    convert.read_hf(tmp_path / 'model')


@pytest.mark.parametrize('name', ['pegasus', 'marian', 'm2m100'])
def test_transformers_misses_nothing_in_what_is_written(name, hf, tmp_path):
  """Pegasus warns of positions that are newly initialized if the file has no table."""
  source = convert.read_hf(hf(name))
  convert.write_hf(tmp_path, source, source.read_params(), log=lambda line: None)
  back, info = type(model(name)).from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values()), info
  expected = model(name).state_dict()
  for key, x in back.state_dict().items():
    np.testing.assert_allclose(x, expected[key], atol=1e-6, err_msg=key)


@pytest.mark.parametrize('name, values', [
    ('llama', dict(initializer_range=1.02)), ('t5_1_0', dict(use_cache=None)),
    ('pegasus', dict(max_position_embeddings=8))])       # less than the certificate's inputs
def test_what_transformers_cannot_run_is_refused_in_one_line(name, values, hf, tmp_path, capsys):
  shutil.copytree(hf(name), tmp_path / 'model')
  change(tmp_path / 'model', **values)
  arrays = {key: x[:8] if 'embed_positions' in key else x
            for key, x in tensors(tmp_path / 'model').items()}
  write(tmp_path / 'model', arrays)
  code, _, err = run('--from', 'hf', '--to', 't5lab', tmp_path / 'model', tmp_path / 'dst',
                     capsys=capsys)
  assert code == 2 and 'cannot run this model: ' in err and err.count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['t5_1_0', 'umt5', 'longt5_tglobal', 'bart', 'gpt2', 'llama',
                                  'bert_classifier', 'marian', 'm2m100', 'qwen3', 'gemma3',
                                  't5gemma', 't5gemma2', 'roberta', 'distilbert_spans',
                                  't5_encoder_tokens'])
def test_any_value_of_any_key_is_read_or_refused(name, hf, tmp_path):
  """Never another exception than UsageError, whatever config.json says."""
  shutil.copytree(hf(name), tmp_path / 'model')
  config = json.loads((tmp_path / 'model' / 'config.json').read_text())
  for key in config:
    for value in (None, 0, -1, 3, 1.5, 'x', [], {}, True, 1 << 40):
      (tmp_path / 'model' / 'config.json').write_text(json.dumps({**config, key: value}))
      try:
        source = convert.read_hf(tmp_path / 'model')
        source.verify(source.read_params())
      except UsageError as e:
        assert '\n' not in str(e), (key, value)


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
    (['--from', 'hf', '--to', 't5lab', '--scanned', 'a', 'b'], '--scanned does not apply'),
    (['--from', 'hf', '--to', 'gguf', 'a', 'b'], "invalid choice: 'gguf'"),
])
def test_bad_arguments(argv, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, _, err = run(*argv, capsys=capsys)
  assert code == 2 and message in err and err.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_an_existing_destination_is_left_alone(hf, tmp_path, capsys):
  (tmp_path / 'dst').mkdir()
  (tmp_path / 'dst' / 'notes').write_text('x')
  code, _, err = run('--from', 'hf', '--to', 't5lab', hf('t5_1_0'), tmp_path / 'dst', capsys=capsys)
  assert code == 2 and 'exists already' in err
  assert [p.name for p in (tmp_path / 'dst').iterdir()] == ['notes']


def test_models_that_hugging_face_cannot_express(ours, tmp_path, capsys):
  folder = tmp_path / 'changed'
  shutil.copytree(ours('gpt2'), folder)
  config = json.loads((folder / 'config.json').read_text())
  config['model']['acts'] = ['silu', 'linear']
  (folder / 'config.json').write_text(json.dumps(config))
  code, _, err = run('--from', 't5lab', '--to', 'hf', folder, tmp_path / 'dst', capsys=capsys)
  assert code == 2 and "cannot express acts=('silu', 'linear')" in err
  assert reference.available()


def test_a_run_of_ours_goes_to_hugging_face_with_its_tokenizer(tmp_path_factory, capsys):
  """The quickstart scales its attention, for Adam; elsewhere T5's kernels hold the scale."""
  import pathlib

  import transformers

  from t5lab import config
  from t5lab.runs import rundir
  from t5lab.runs.checkpoint import Checkpoints
  folder = tmp_path_factory.mktemp('run')
  quickstart = pathlib.Path(__file__).parents[3] / 'configs' / 'quickstart.py'
  c = config.load(f'{quickstart}:tiny')
  (folder / 'run').mkdir()
  rundir.write_config(folder / 'run', config.to_dict(c))
  m = config.model_config(c)
  checkpoints = Checkpoints(folder / 'run' / 'checkpoints')
  checkpoints.save(2, {'params': random_params(m), 'ema': random_params(m, 1)}, meta={})
  checkpoints.wait()
  code, out, err = run('--from', 't5lab', '--to', 'hf', folder / 'run', folder / 'hf',
                       capsys=capsys)
  assert code == 0, err
  assert 'folded into the query kernels' in out and '16 of 16 greedy tokens equal' in out
  lab = t5lab.load(folder / 'run')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'hf')
  for text in ('Turn on the light', 'größe ☃\n{x}  y', 'a<extra_id_3>b <extra_id_99>', 'tab\tend '):
    ids = tokenizer(text).input_ids
    assert ids == lab.tokens(text)
    assert '<' in text or tokenizer.decode(ids, skip_special_tokens=True) == text
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / 'hf')
  ids, start = lab.tokens('Turn on the light'), [0, 5, 6]
  with torch.no_grad():
    expected = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([start])).logits
  logits = lab.logits({'encoder_input_tokens': np.array([ids]),
                       'decoder_input_tokens': np.array([start])})
  np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)


def test_a_full_disk_leaves_no_half_destination(ours, tmp_path):
  """A limit on the size of files simulates a disk that fills while the weights are written."""
  import resource
  code = """
import sys
from t5lab import cli
for to in ('hf', 't5lab'):
  code = cli.main(['convert', '--from', 't5lab', '--to', to, '--golden', sys.argv[1],
                   f'{sys.argv[2]}/{to}'])
  print(f'{to} ended with {code}', flush=True)
  print('== next', file=sys.stderr, flush=True)
"""
  (tmp_path / 'out').mkdir()
  done = subprocess.run(
      [sys.executable, '-c', code, str(ours('gpt2')), str(tmp_path / 'out')], capture_output=True,
      text=True, timeout=120,
      env={**os.environ, 'XLA_FLAGS': '', 'XDG_CACHE_HOME': str(tmp_path / 'cache')},
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
  ends = [line for line in done.stdout.splitlines() if ' ended with ' in line]
  assert ends == ['hf ended with 2', 't5lab ended with 4'], done.stderr
  first, second, _ = done.stderr.split('== next\n')
  assert first.startswith('t5lab: ') and 'cannot write' in first and first.count('\n') == 1
  # TensorStore's threads print traces of their own, for late callbacks.
  message, = [line for line in second.splitlines() if line.startswith('t5lab: ')]
  assert 'failed' in message
  assert not list((tmp_path / 'out').iterdir())
