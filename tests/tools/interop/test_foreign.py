"""Directories as people have them: wrappers' names, edited configs, resized and untied tables."""

import functools
import json

from hf_models import MODELS, model, save
import ml_dtypes
import numpy as np
import pytest
import torch

from t5lab import trees
from t5lab.errors import UsageError
from t5lab.tools.interop import convert, recognise, tensor_files


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """name -> (config.json, {name: tensor}) that transformers wrote."""
  @functools.cache
  def get(name):
    folder = tmp_path_factory.mktemp(name)
    save(name, folder)
    reader = tensor_files.open_hf(folder)
    return (json.loads((folder / 'config.json').read_text()),
            {tensor: reader.read(tensor) for tensor in reader.shapes()})
  return get


def write(folder, config, tensors):
  """Writes a directory; config values of None are left out."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {key: value for key, value in config.items() if value is not None}
  (folder / 'config.json').write_text(json.dumps(config))
  tensor_files.write_safetensors(folder, tensors.items(),
                                 {k: (v.shape, v.dtype) for k, v in tensors.items()})
  return folder


def params_of(folder, **options):
  source = convert.read_hf(folder, **options)
  params = source.read_params()
  assert source.verify(params) > 5
  return trees.flatten(params), source


def assert_same(params, expected):
  assert params.keys() == expected.keys()
  for path in params:
    np.testing.assert_array_equal(params[path], expected[path], err_msg=path)


# -- names --------------------------------------------------------------------------------------

BASES = {'gpt2': 'transformer.', 'bert': 'bert.', 'bert_mlm': 'bert.', 'bart': 'model.',
         'llama': 'model.', 'llama_tied': 'model.', 'bert_classifier': 'bert.'}
PREFIXES = {
    'DistributedDataParallel': lambda name, i: f'module.{name}',
    'torch.compile': lambda name, i: f'_orig_mod.{name}',
    'Lightning': lambda name, i: f'model.{name}',
    'PEFT': lambda name, i: f'base_model.model.{name}',
    'nested': lambda name, i: f'module._orig_mod.base_model.model.{name}',
    'some': lambda name, i: f'module.{name}' if i % 2 else name,
    'some twice': lambda name, i: f'_orig_mod.module.{name}' if i % 3 else f'model.{name}',
    'a compiled layer': lambda name, i: name.replace('.0.', '.0._orig_mod.', 1),
    'base layers': lambda name, i: name.replace('.weight', '.base_layer.weight'),
}


@pytest.mark.parametrize('name', sorted(set(MODELS) - {'bert_bare'}))
def test_the_prefixes_of_wrappers_are_removed(name, original, tmp_path):
  config, tensors = original(name)
  expected, _ = params_of(write(tmp_path / 'plain', config, tensors))
  for i, (case, rename) in enumerate(PREFIXES.items()):
    renamed = {rename(tensor, j): x for j, (tensor, x) in enumerate(tensors.items())}
    params, source = params_of(write(tmp_path / str(i), config, renamed))
    assert_same(params, expected)
    assert case == 'Lightning' or 'wrappers before the names' in source.notes[0], case
  # As saved from the model below the head.
  if base := BASES.get(name):
    bare = {tensor.removeprefix(base): x for tensor, x in tensors.items()}
    params, _ = params_of(write(tmp_path / 'bare', config, bare))
    assert_same(params, expected)


def test_two_names_of_one_tensor_must_be_equal(original, tmp_path):
  config, tensors = original('gpt2')
  name = 'transformer.ln_f.weight'
  _, source = params_of(write(tmp_path / 'a', config, {**tensors, f'module.{name}': tensors[name]}))
  assert [name, 'in the file, equal'] in source.tensors['copies'].values() or source.tensors[
      'copies'][name] == [f'module.{name}', 'in the file, equal']
  with pytest.raises(UsageError, match='two names of one tensor.* differs'):
    convert.read_hf(write(tmp_path / 'b', config,
                          {**tensors, f'module.{name}': tensors[name] + 1}))


@pytest.mark.parametrize('name, extra', [
    ('bart', ['encoder.version', 'decoder.version']),
    ('bart', ['model.encoder.version', 'model.decoder.embed_positions._float_tensor']),
    ('t5_1_0', ['module.decoder.version'])])
def test_tensors_that_no_model_reads_are_ignored_and_listed(name, extra, original, tmp_path):
  config, tensors = original(name)
  expected, _ = params_of(write(tmp_path / 'plain', config, tensors))
  more = {**tensors, **{tensor: np.full(1, 3, np.float32) for tensor in extra}}
  params, source = params_of(write(tmp_path / 'more', config, more))
  assert_same(params, expected)
  assert len(source.tensors['ignored']) == len(extra)


def test_mixed_dtypes_and_shards_beside_stale_files(original, tmp_path):
  """As transformers, model.safetensors is read before an index, and both before pickles."""
  config, tensors = original('llama')
  mixed = {name: x.astype((np.float32, ml_dtypes.bfloat16, np.float16)[i % 3])
           for i, (name, x) in enumerate(tensors.items())}
  folder = write(tmp_path / 'a', config, mixed)
  (folder / 'pytorch_model.bin').write_bytes(b'stale')
  (folder / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "gone"}}')
  params, _ = params_of(folder)
  table = mixed['model.embed_tokens.weight']
  np.testing.assert_array_equal(params['embedding'], table.astype(np.float32))

  shards = write(tmp_path / 'b', config, mixed)
  (shards / 'model.safetensors').unlink()
  tensor_files.write_safetensors(
      shards, mixed.items(), {k: (v.shape, v.dtype) for k, v in mixed.items()},
      max_shard_bytes=5000)
  (shards / 'pytorch_model.bin').write_bytes(b'stale')
  assert len(list(shards.glob('model-*'))) > 3
  assert_same(params_of(shards)[0], params)


# -- the model type -----------------------------------------------------------------------------


@pytest.mark.parametrize('name, kind, changes, note', [
    ('t5_1_1', 't5', {}, 'T5ForConditionalGeneration'),
    ('mt5', 'mt5', {}, 'MT5ForConditionalGeneration'),
    ('umt5', 'umt5', {}, 'UMT5ForConditionalGeneration'),
    ('longt5_tglobal', 'longt5', {}, 'LongT5ForConditionalGeneration'),
    ('gpt2', 'gpt2', {'architectures': ['TFGPT2LMHeadModel']}, 'TFGPT2LMHeadModel'),
    ('gpt2', 'gpt2', {'architectures': ['GPT2Model']}, 'GPT2Model'),
    ('llama', 'llama', {'architectures': ['LLaMAForCausalLM']}, 'LLaMAForCausalLM'),
    ('xlm_roberta', 'xlm-roberta', {}, 'XLMRobertaModel'),
    ('marian', 'marian', {}, 'MarianMTModel'),
    ('gemma3', 'gemma3_text', {}, 'Gemma3ForCausalLM'), ('qwen2', 'qwen2', {}, 'Qwen2ForCausalLM'),
    ('bert_mlm', 'bert', {}, 'BertForMaskedLM'), ('bart', 'bart', {}, 'BartForConditional'),
    ('t5_1_0', 't5', {'architectures': None}, 'its tensors'),
    ('t5_1_0', 't5', {'architectures': ['MyModel']}, 'its tensors'),
    ('umt5', 'umt5', {'architectures': None}, 'its tensors'),
    ('longt5_local', 'longt5', {'architectures': []}, 'its tensors'),
    ('gpt2', 'gpt2', {'architectures': None}, 'its tensors'),
    ('bert', 'bert', {'architectures': None}, 'its tensors'),
    ('bert_bare', 'bert', {'architectures': None}, 'its tensors'),
    ('bart', 'bart', {'architectures': None}, 'its tensors'),
    ('llama', 'llama', {'architectures': None}, 'its tensors'),
    ('llama_tied', 'llama', {'architectures': None}, 'its tensors'),
])
def test_a_missing_model_type_is_inferred(name, kind, changes, note, original, tmp_path):
  config, tensors = original(name)
  expected, whole = params_of(write(tmp_path / 'plain', config, tensors))
  params, source = params_of(write(tmp_path / 'none', {**config, 'model_type': None, **changes},
                                   tensors))
  assert_same(params, expected)
  assert source.model == whole.model
  assert f'no model_type: read as {kind}' in source.notes[0] and note in source.notes[0]


@pytest.mark.parametrize('name, changes, message', [
    ('llama', {'sliding_window': 4096}, 'names which llama, mistral, qwen2, gemma models share'),
    ('llama', {'residual_multiplier': .2}, 'names which llama, mistral'),
    ('llama', {'hidden_act': 'gelu_pytorch_tanh'}, 'names which llama, mistral'),
    ('bart', {'normalize_before': True}, 'names which bart, mbart, pegasus, marian'),
    ('bert_bare', {'pad_token_id': 1}, 'names which bert, roberta, electra models share'),
    ('bert_bare', {'type_vocab_size': 1}, 'names which bert, roberta')])
def test_tensors_that_several_families_name_alike_are_refused(name, changes, message, original,
                                                              tmp_path):
  config, tensors = original(name)
  config = {**config, 'model_type': None, 'architectures': None, **changes}
  folder = write(tmp_path, config, tensors)
  with pytest.raises(UsageError, match=message) as e:
    convert.read_hf(folder)
  assert 'add "model_type": one of bart, bert,' in str(e.value)


def test_a_class_that_transformers_lacks(original, tmp_path):
  """Auto classes go by model_type. Code that comes with a checkpoint may compute anything."""
  config, tensors = original('t5_1_0')
  config = {**config, 'architectures': ['T5WithSomething']}
  _, source = params_of(write(tmp_path / 'a', config, tensors))
  assert source.notes == ("architectures names 'T5WithSomething', which is not a class of t5 "
                          'models: read by model_type, as transformers does',)
  code = {'AutoModelForSeq2SeqLM': 'modeling.T5WithSomething'}
  with pytest.raises(UsageError, match=r"'T5WithSomething' is code of this checkpoint \(auto_map"):
    convert.read_hf(write(tmp_path / 'b', {**config, 'auto_map': code}, tensors))
  config['architectures'] = ['T5ForConditionalGeneration']
  _, source = params_of(write(tmp_path / 'c', {**config, 'auto_map': code}, tensors))
  assert not source.notes


# -- tables of the vocabulary -------------------------------------------------------------------

EMBEDDING = {'gpt2': 'transformer.wte.weight', 'llama': 'model.embed_tokens.weight',
             'bert_mlm': 'bert.embeddings.word_embeddings.weight', 't5_1_1': 'shared.weight',
             't5_1_0': 'shared.weight', 'llama_tied': 'model.embed_tokens.weight',
             'bart': 'model.shared.weight', 'marian': 'model.shared.weight',
             'mistral': 'model.embed_tokens.weight', 'gemma2': 'model.embed_tokens.weight',
             'qwen3': 'model.embed_tokens.weight',
             'bert_classifier': 'bert.embeddings.word_embeddings.weight',
             'roberta': 'roberta.embeddings.word_embeddings.weight',
             'distilbert': 'distilbert.embeddings.word_embeddings.weight'}
HEAD = {'bert_mlm': 'cls.predictions.decoder.weight', 'roberta': 'lm_head.decoder.weight',
        'distilbert': 'vocab_projector.weight'}
BIAS = {'bert_mlm': 'cls.predictions.bias', 'roberta': 'lm_head.bias'}


def golden(folder, dst, to='t5lab', read=convert.read_hf, **options):
  return convert.convert(read(folder, **options), dst, to, log=lambda line: None,
                         use_reference=False)


@pytest.mark.parametrize('name', EMBEDDING)
@pytest.mark.parametrize('declared', [32, 64])
def test_the_rows_of_the_tables_are_the_size_of_the_vocabulary(name, declared, original, tmp_path):
  config, tensors = original(name)
  expected, _ = params_of(write(tmp_path / 'plain', config, tensors))
  folder = write(tmp_path / 'other', {**config, 'vocab_size': declared}, tensors)
  params, source = params_of(folder)
  assert_same(params, expected)
  assert source.model.vocab_size == 48
  assert f'vocab_size={declared}, but' in source.notes[0] and '48 rows' in source.notes[0]
  if name in ('t5_1_1', 'bert_mlm') and declared == 64:
    proof = convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None)
    assert proof['logits'] and list(proof['notes']) == list(source.notes)
    golden(tmp_path / 'ours', tmp_path / 'back', 'hf', read=convert.read_t5lab)
    assert json.loads((tmp_path / 'back' / 'config.json').read_text())['vocab_size'] == 48


def test_an_embedding_and_a_head_of_unlike_sizes_are_refused(original, tmp_path):
  config, tensors = original('llama')
  tensors = {**tensors, 'lm_head.weight': tensors['lm_head.weight'][:40]}
  with pytest.raises(UsageError, match='embed_tokens.weight has 48 rows and lm_head.weight 40'):
    convert.read_hf(write(tmp_path, config, tensors))


@pytest.mark.parametrize('name, keys', [
    ('marian', {'scale_embedding': 'embed_scale', 'activation_function': 'acts'}),
    ('pegasus', {'scale_embedding': 'embed_scale', 'activation_function': 'acts'}),
    ('mbart', {'scale_embedding': 'embed_scale'}),
    ('blenderbot', {'scale_embedding': 'embed_scale'}),
    ('mistral', {'rms_norm_eps': 'norm_eps'}), ('roberta', {'layer_norm_eps': 'norm_eps'})])
def test_what_a_config_lacks_has_the_default_of_transformers(name, keys, original, tmp_path):
  config, tensors = original(name)
  _, source = params_of(write(tmp_path, {**config, **dict.fromkeys(keys)}, tensors))
  default = type(model(name).config)()
  for key, field in keys.items():
    expected = getattr(default, key)
    assert getattr(source.model, field) == (('gelu_erf',) if expected == 'gelu' else expected)


def test_two_vocabularies_of_unlike_sizes_are_refused_by_their_sizes(original, tmp_path):
  config, tensors = original('marian_two_tables')
  cut = {name: x[..., :44] if name == 'final_logits_bias' else x[:44] for name, x in tensors.items()
         if name.startswith(('final_', 'lm_head', 'model.decoder.embed_tokens'))}
  folder = write(tmp_path, {**config, 'decoder_vocab_size': 44}, {**tensors, **cut})
  with pytest.raises(UsageError, match='vocab_size=48 and decoder_vocab_size=44; both'):
    convert.read_hf(folder)


@pytest.mark.parametrize('name, values, fields', [
    ('gemma', {'hidden_act': 'gelu'}, {'acts': ('gelu', 'linear')}),      # the first releases
    ('gemma3', {'attn_logit_softcapping': 6.}, {'attn_softcap': 0.})])
def test_what_gemma_means_by_a_key_is_what_transformers_computes(name, values, fields, original,
                                                                 tmp_path):
  config, tensors = original(name)
  _, source = params_of(write(tmp_path, {**config, **values}, tensors))
  assert {field: getattr(source.model, field) for field in fields} == fields


@pytest.mark.parametrize('name, tied, missing', [
    ('llama', False, 'head'), ('llama', None, 'head'), ('llama', False, 'embedding'),
    ('llama_tied', False, 'head'), ('gpt2', False, 'head'), ('gpt2', False, 'embedding'),
    ('bert_mlm', False, 'head'), ('roberta', False, 'head'), ('distilbert', False, 'embedding'),
    ('mistral', None, 'head'), ('gemma2', False, 'head'), ('qwen3', False, 'head'),
    ('llama_tied', True, 'both'), ('gpt2', True, 'both')])
def test_a_missing_table_that_is_not_tied_is_refused(name, tied, missing, original, tmp_path):
  """transformers fills it with random numbers."""
  config, tensors = original(name)
  embedding, head = EMBEDDING[name], HEAD.get(name, 'lm_head.weight')
  names = {'head': [head], 'embedding': [embedding], 'both': [head, embedding]}[missing]
  tensors = {head: tensors[embedding], **tensors}
  tensors = {tensor: x for tensor, x in tensors.items() if tensor not in names}
  folder = write(tmp_path, {**config, 'tie_word_embeddings': tied}, tensors)
  with pytest.raises(UsageError) as e:
    convert.read_hf(folder)
  if missing == 'both':
    assert f'missing {embedding}' in str(e.value)
  else:
    default = ', the default' if tied is None else ''
    assert str(e.value) == (f'{names[0]} is missing and config.json says it is not tied '
                            f'(tie_word_embeddings=false{default})')


@pytest.mark.parametrize('name, architecture', [('llama', 'LlamaModel'),
                                                ('mistral', 'MistralModel')])
def test_a_bare_decoder_needs_no_head(name, architecture, original, tmp_path):
  """As models for embeddings are published: hidden states are what counts."""
  config, tensors = original(name)
  expected, _ = params_of(write(tmp_path / 'plain', config, tensors))
  tensors = {tensor.removeprefix('model.'): x for tensor, x in tensors.items()
             if tensor != 'lm_head.weight'}
  config = {**config, 'tie_word_embeddings': False, 'architectures': [architecture]}
  params, source = params_of(write(tmp_path / 'bare', config, tensors))
  assert source.model.tied and 'lm_head.weight is missing, as in models' in source.notes[0]
  assert_same(params, {path: x for path, x in expected.items() if path != 'logits/kernel'})
  convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None)


@pytest.mark.parametrize('name', ['llama_tied', 'gpt2', 'bert_mlm', 'roberta', 'gemma2', 'qwen3'])
def test_one_of_two_tied_tables_is_enough(name, original, tmp_path):
  config, tensors = original(name)
  embedding, head = EMBEDDING[name], HEAD.get(name, 'lm_head.weight')
  expected, _ = params_of(write(tmp_path / 'plain', config, tensors))
  both = {head: tensors[embedding], **tensors}
  for i, (left_out, where) in enumerate((
      (head, 'not in the file'), (embedding, 'in the file, which lacks the original'),
      (None, 'in the file, equal'))):
    some = {tensor: x for tensor, x in both.items() if tensor != left_out}
    params, source = params_of(write(tmp_path / str(i), config, some))
    assert_same(params, expected)
    assert source.tensors['copies'][head] == [embedding, where]


@pytest.mark.parametrize('name, declared', [
    ('llama', True), ('gpt2', False), ('gpt2', True), ('bert_mlm', False), ('bert_mlm', True),
    ('roberta', True), ('distilbert', False), ('gemma2', None)])
def test_untied_tables(name, declared, original, tmp_path):
  """Also where config.json says that they are tied: transformers 5 does not tie what differs."""
  config, tensors = original(name)
  embedding, head = EMBEDDING[name], HEAD.get(name, 'lm_head.weight')
  tensors = dict(tensors)
  tensors[head] = tensors.get(head, 0) + np.flip(tensors[embedding], 0)
  if bias := BIAS.get(name):       # transformers 5 then reads the other bias alone
    tensors[HEAD[name].replace('weight', 'bias')] = tensors[bias] + 1
  folder = write(tmp_path / 'src', {**config, 'tie_word_embeddings': declared}, tensors)
  source = convert.read_hf(folder)
  assert not source.model.tied
  assert declared is False or 'not tied' in source.notes[0]
  proof = convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None)
  assert proof['logits']['largest_relative_difference'] < 1e-5
  assert head in proof['bit_equal']['heads'] and embedding in proof['bit_equal']['embeddings']

  golden(tmp_path / 'ours', tmp_path / 'back', 'hf', read=convert.read_t5lab)
  ids = torch.tensor([[5, 7, 9, 11]])
  expected = type(model(name)).from_pretrained(folder)(ids).logits
  again = type(model(name)).from_pretrained(tmp_path / 'back')
  assert again.config.tie_word_embeddings is False
  np.testing.assert_allclose(again(ids).logits.detach(), expected.detach(), atol=1e-6)


@pytest.mark.parametrize('name', BIAS)
def test_the_one_bias_of_an_untied_bert_by_transformers_4(name, original, tmp_path):
  config, tensors = original(name)
  tensors = {**tensors, HEAD[name]: tensors[EMBEDDING[name]] + 1}
  tensors.pop(HEAD[name].replace('weight', 'bias'), None)
  folder = write(tmp_path / 'src', {**config, 'tie_word_embeddings': False}, tensors)
  params, source = params_of(folder)
  np.testing.assert_array_equal(params['logit_bias'], tensors[BIAS[name]])
  # The reference gets the one bias too, and zeros for the one that it does not read.
  proof = convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None)
  assert proof['logits']['largest_relative_difference'] < 1e-5


def test_the_certificate_lists_tables_heads_copies_and_the_rest(original, tmp_path):
  config, tensors = original('bert_classifier')
  proof = golden(write(tmp_path / 'src', config, tensors), tmp_path / 'dst')
  below = 'bert.embeddings.'
  assert proof['bit_equal'] == {
      'embeddings': [f'{below}word_embeddings.weight', f'{below}position_embeddings.weight',
                     f'{below}token_type_embeddings.weight'],
      'heads': ['bert.pooler.dense.weight', 'bert.pooler.dense.bias', 'classifier.weight',
                'classifier.bias'],
      'others': len(tensors) - 7}
  assert proof['round_trip'] == f'{len(tensors)} tensors bit-equal'
  config, tensors = original('t5_1_0')
  proof = golden(write(tmp_path / 'src2', config, tensors), tmp_path / 'dst2')
  assert proof['bit_equal']['embeddings'] == ['shared.weight'] and not proof['bit_equal']['heads']
  assert proof['copies']['lm_head.weight'] == ['shared.weight', 'not in the file']
  source = convert.read_hf(write(tmp_path / 'src3', *original('marian_two_tables')))
  assert source.tensors['bit_equal']['embeddings'] == [
      f'model.{stack}.embed_tokens.weight' for stack in ('encoder', 'decoder')]


def test_a_bart_that_is_not_tied_needs_equal_copies(original, tmp_path):
  config, tensors = original('bart')
  table = tensors['model.shared.weight']
  names = ('model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight',
           'lm_head.weight')
  config = {**config, 'tie_word_embeddings': False}
  with pytest.raises(UsageError, match='^encoder.embed_tokens.weight is missing and config.json'):
    convert.read_hf(write(tmp_path / 'a', config, tensors))
  whole = {**tensors, **dict.fromkeys(names, table)}
  source = convert.read_hf(write(tmp_path / 'b', config, whole))
  assert convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None)['logits']
  with pytest.raises(UsageError, match='lm_head.weight should be a copy of shared.weight'):
    convert.read_hf(write(tmp_path / 'c', config, {**whole, 'lm_head.weight': table + 1}))


def test_what_a_reference_would_drop_or_fill_is_refused_before_it_runs(original, tmp_path):
  config, tensors = original('gpt2')
  for changed, message in (
      ({**tensors, 'v_head.summary.weight': np.zeros((1, 32), np.float32)}, 'unread transformer.v'),
      ({k: v for k, v in tensors.items() if 'ln_f' not in k}, 'missing transformer.ln_f.weight')):
    folder = write(tmp_path / message.split('.')[1], config, changed)
    with pytest.raises(UsageError, match=message):
      convert.read_hf(folder)


def test_names_are_unwrapped():
  for wrapped, name in {
      'model.layers.0.x': 'layers.0.x', 'module._orig_mod.model.lm_head.weight': 'lm_head.weight',
      'base_model.model.model.layers.1._checkpoint_wrapped_module.y': 'layers.1.y',
      '_fsdp_wrapped_module.encoder.block.0._fsdp_wrapped_module.z': 'encoder.block.0.z',
      '0.auto_model.encoder.layer.0.w': 'encoder.layer.0.w', 'encoder.model.x': 'encoder.model.x',
      'h.0.attn.bias': 'h.0.attn.bias', 'xmodule.a': 'xmodule.a'}.items():
    assert recognise.unwrapped(wrapped) == name
