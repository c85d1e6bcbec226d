"""Directories of sentence-transformers: the vectors are those of its formulas, and they come back.

The formulas are those of sentence-transformers 6.2; its own `encode` was compared by hand on these
cases (largest difference 3e-6 at a scale of 5).
"""

import dataclasses
import functools
import json
import string

from hf_models import model, save
import numpy as np
import pytest
import torch

from t5lab import config
from t5lab.errors import UsageError
from t5lab.programs import loading
from t5lab.programs.lab import Lab
from t5lab.tools.interop import convert, golden, sentence, tensor_files

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *string.ascii_lowercase,
         *('##' + x for x in string.ascii_lowercase[:17])]
TEXTS = ['a dog', 'x', 'the b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e f g', '']
D = 32


@pytest.fixture(scope='module', autouse=True)
def golden_once():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(golden, 'relative_difference', functools.cache(golden.relative_difference))
    yield


def flags(*modes):
  """The older form of a Pooling config."""
  return {'word_embedding_dimension': D,
          **{flag: mode in modes for mode, flag in sentence.FLAGS.items()}}


def write(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def make(folder, pooling=None, dense=(), normalize=False, length=None, prompts=None, types=None,
         inner='', default=None):
  """Writes a directory of sentence-transformers. dense: (out, bias, activation) of each layer.

  types: of modules.json, None for none. inner: the Transformer's folder.
  """
  main = folder / inner
  main.mkdir(parents=True, exist_ok=True)
  save('bert_bare', main)
  (main / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
  if length:
    write(main / 'sentence_bert_config.json', {'max_seq_length': length, 'do_lower_case': False})
  paths = [inner]
  if pooling is not None:
    paths.append('1_Pooling')
    write(folder / '1_Pooling' / 'config.json', pooling)
  width = D * (len(sentence._pool(pooling, '', sizes()).split('+')) if pooling else 1)
  for out, bias, act in dense:
    paths.append(f'{len(paths)}_Dense')
    write(folder / paths[-1] / 'config.json', {
        'in_features': width, 'out_features': out, 'bias': bias,
        'activation_function': f'torch.nn.modules.{act}'})
    weights = {'linear.weight': (out, width), **({'linear.bias': (out,)} if bias else {})}
    stream = np.random.RandomState(out)
    arrays = {name: stream.randn(*shape).astype(np.float32) / 5 for name, shape in weights.items()}
    tensor_files.write_safetensors(
        folder / paths[-1], arrays.items(), {k: (x.shape, x.dtype) for k, x in arrays.items()})
    width = out
  if normalize:
    paths.append(f'{len(paths)}_Normalize')
    (folder / paths[-1]).mkdir()
  kinds = ['Transformer', *(path.partition('_')[2] for path in paths[1:])]
  if types is not None:
    write(folder / 'modules.json', [
        {'idx': i, 'name': str(i), 'path': path, 'type': types.format(kind=kind, low=kind.lower())}
        for i, (path, kind) in enumerate(zip(paths, kinds))])
  if prompts:
    write(folder / 'config_sentence_transformers.json', {
        'model_type': 'SentenceTransformer', 'prompts': prompts, 'default_prompt_name': default,
        'similarity_fn_name': 'dot'})
  return folder


class sizes:
  d_model = D


OLD = 'sentence_transformers.models.{kind}'
NEW = 'sentence_transformers.base.modules.{low}.{kind}'
TANH, IDENTITY, GELU = 'activation.Tanh', 'linear.Identity', 'activation.GELU'
# name: (arguments of make, pool, whether of length 1, tokens at most)
CASES = {
    'mean': (dict(pooling=flags('mean'), normalize=True, types=OLD), 'mean', True, 32),
    'cls': (dict(pooling=flags('cls'), length=20, types=OLD), 'first', False, 20),
    'max': (dict(pooling=flags('max'), types=NEW, prompts={'q': 'a b ', 'none': None}, default='q'),
            'max', False, 32),
    'sqrt': (dict(pooling=flags('mean_sqrt_len_tokens'), length=7, types=NEW), 'mean_sqrt', False,
             7),
    'weighted': (dict(pooling=flags('weightedmean'), types=OLD), 'weighted_mean', False, 32),
    'last': (dict(pooling=flags('lasttoken'), length=512, types=OLD), 'last', False, 32),
    'three': (dict(pooling=flags('mean', 'cls', 'max'), types=OLD, normalize=True),
              'first+max+mean', True, 32),
    'newer': (dict(pooling={'embedding_dimension': D, 'pooling_mode': 'cls'}, types=NEW), 'first',
              False, 32),
    'listed': (dict(pooling={'embedding_dimension': D, 'pooling_mode': ['mean', 'cls']}, types=NEW,
                    dense=[(24, True, TANH)], length=12), 'mean+first', False, 12),
    'joined': (dict(pooling={'pooling_mode': 'mean+max', 'include_prompt': False}, types=NEW,
                    prompts={'q': 'a b '}), 'mean+max', False, 32),
    'no_mode': (dict(pooling={'word_embedding_dimension': D}, types=OLD), 'mean', False, 32),
    'labse': (dict(pooling=flags('cls'), dense=[(D, True, TANH)], normalize=True, types=OLD,
                   length=16), 'first', True, 16),
    'two_dense': (dict(pooling=flags('mean'), dense=[(40, False, IDENTITY), (8, True, GELU)],
                       normalize=True, types=OLD), 'mean', True, 32),
    'inner': (dict(pooling=flags('mean'), types=OLD, inner='0_Transformer', length=9), 'mean',
              False, 9),
    'no_modules_json': (dict(pooling=flags('max'), dense=[(8, False, TANH)], length=10), 'max',
                        False, 10),
}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """name of CASES -> (folder, its Source)."""
  @functools.cache
  def get(name):
    folder = make(tmp_path_factory.mktemp(name), **CASES[name][0])
    return folder, convert.read_hf(folder)
  return get


def expected(folder, text, pool, limit, normalize, prompt=0):
  """The vector of a text by sentence-transformers' formulas, around transformers' BertModel."""
  ids = [WORDS.index(c) for c in text if c != ' ']
  ids = [2, *ids[:limit - 2], 3]
  with torch.no_grad():
    x = model('bert_bare')(torch.tensor([ids])).last_hidden_state[0].numpy()[prompt:]
  t = np.arange(prompt + 1, len(ids) + 1)[:, None]
  modes = {'first': x[0], 'last': x[-1], 'max': x.max(0), 'mean': x.mean(0),
           'mean_sqrt': x.sum(0) / len(x) ** 0.5, 'weighted_mean': (x * t).sum(0) / t.sum()}
  vector = np.concatenate([modes[mode] for mode in pool.split('+')])
  acts = {'Tanh': np.tanh, 'Identity': lambda x: x,
          'GELU': lambda x: torch.nn.functional.gelu(torch.tensor(x)).numpy()}
  for path in sorted(folder.glob('*_Dense')):
    reader = tensor_files.open_hf(path)
    vector = reader.read('linear.weight') @ vector
    if 'linear.bias' in reader.shapes():
      vector = vector + reader.read('linear.bias')
    act = json.loads((path / 'config.json').read_text())['activation_function']
    vector = acts[act.rpartition('.')[2]](vector)
  return vector / np.linalg.norm(vector) if normalize else vector


def spaced(text):
  """TEXTS hold words of several letters; WordPiece has whole letters only."""
  return ' '.join(text.replace(' ', ''))


@pytest.mark.parametrize('name', CASES)
def test_vectors(name, source):
  _, pool, normalize, limit = CASES[name]
  folder, src = source(name)
  assert src.model.pool == pool and src.config.embed.max_length == limit
  lab = Lab(src.config, src.read_params())
  texts = [spaced(text) for text in TEXTS]
  plain = lab.embed(texts, prompt='')
  want = [expected(folder, text, pool, limit, normalize) for text in texts]
  np.testing.assert_allclose(plain, want, rtol=1e-4, atol=2e-5)
  if 'prompts' in CASES[name][0]:
    prompted = lab.embed(texts, prompt_name='q')
    skip = 3 if name == 'joined' else 0       # include_prompt is false: [CLS] a b is not pooled
    want = [expected(folder, f'a b {text}', pool, limit, normalize, skip) for text in texts]
    np.testing.assert_allclose(prompted, want, rtol=1e-4, atol=2e-5)
    # with a default_prompt_name it is put before every text
    np.testing.assert_array_equal(lab.embed(texts), prompted if name == 'max' else plain)


@pytest.mark.parametrize('name', ['max', 'listed', 'two_dense', 'inner', 'joined'])
def test_modules_survive_hf_to_ours_to_hf(name, source, tmp_path):
  folder, src = source(name)
  quiet = dict(log=lambda line: None, use_reference=False)
  proof = convert.convert(src, tmp_path / 'ours', 't5lab', **quiet)
  assert 'bit-equal' in proof['round_trip']
  convert.convert(convert.read_t5lab(tmp_path / 'ours'), tmp_path / 'back', 'hf', **quiet)
  again = convert.read_hf(tmp_path / 'back')
  assert again.model == src.model
  assert again.config.embed.to_dict() == src.config.embed.to_dict()
  for path in folder.glob('*_Dense'):
    before, after = tensor_files.open_hf(path), tensor_files.open_hf(tmp_path / 'back' / path.name)
    assert before.shapes() == after.shapes()
    for tensor in before.shapes():
      np.testing.assert_array_equal(before.read(tensor), after.read(tensor))
  listed = json.loads((tmp_path / 'back' / 'modules.json').read_text())
  assert [entry['type'].rpartition('.')[2] for entry in listed] == [
      'Transformer', 'Pooling', *['Dense'] * len(src.model.dense),
      *['Normalize'] * src.config.embed.normalize]
  pooling = json.loads((tmp_path / 'back' / '1_Pooling' / 'config.json').read_text())
  assert pooling['include_prompt'] == src.config.embed.pool_prompt
  if name == 'listed':                    # an order that the flags cannot express
    assert pooling['pooling_mode'] == ['mean', 'cls']
  if name == 'max':                       # copied, with what we do not read
    other = json.loads((tmp_path / 'back' / 'config_sentence_transformers.json').read_text())
    assert other['similarity_fn_name'] == 'dot'


def test_a_run_that_starts_from_them_keeps_them(source, tmp_path):
  _, src = source('listed')
  convert.convert(src, tmp_path / 'ours', 't5lab', log=lambda line: None, use_reference=False)
  ours = loading.read_config(tmp_path / 'ours')
  c = config.base('bert/base', n_heads=4, d_head=8)
  c.init.path = str(tmp_path / 'ours')
  inherited = loading.inherit_embedding(c, tmp_path)
  assert (c.model.pool, c.model.dense) == ('mean+first', (24,))
  assert inherited['model.dense'] == (24,) and inherited['embed.max_length'] == 12
  assert c.embed.to_dict() == ours.embed.to_dict() and c.embed.modules
  loading._check_architecture(config.model_config(c), config.model_config(ours), '')

  # What the config says itself stays, and a classifier pools as it says.
  c = config.base('bert/base', classes=2, pool='pooler')
  c.init.path, c.embed.max_length = str(tmp_path / 'ours'), 9
  assert not loading.inherit_embedding(c, tmp_path)
  assert (c.model.pool, c.model.dense, c.embed.max_length) == ('pooler', (), 9)
  assert not sentence.has_modules(config.model_config(c), c.embed)
  # another activation of the same layers is another architecture
  c = config.base('bert/base', n_heads=4, d_head=8, pool='mean+first', dense=(24,),
                  dense_acts=('relu',), dense_bias=(True,))
  with pytest.raises(UsageError, match="dense_acts=.*'tanh'.* there, .*'relu'"):
    loading._check_architecture(config.model_config(c), config.model_config(ours), '')


def module(folder, **changes):
  listed = json.loads((folder / 'modules.json').read_text())
  write(folder / 'modules.json', [*listed[:-1], {**listed[-1], **changes}])


def pooling(**changes):
  def damage(folder):
    path = folder / '1_Pooling' / 'config.json'
    write(path, {**json.loads(path.read_text()), **changes})
  return damage


def dense(**changes):
  def damage(folder):
    path = folder / '2_Dense' / 'config.json'
    write(path, {**json.loads(path.read_text()), **changes})
  return damage


def link_out(folder):
  (folder / '1_Pooling' / 'config.json').unlink()
  (folder / '1_Pooling' / 'config.json').symlink_to('/etc/hostname')


def length(**values):
  return lambda folder: write(folder / 'sentence_bert_config.json', values)


@pytest.mark.parametrize('damage, message', [
    (lambda f: module(f, type='sentence_transformers.models.LSTM'), 'models.LSTM is not supported'),
    (lambda f: module(f, type='custom_st.Pooling'), 'custom_st.Pooling is not supported'),
    (lambda f: module(f, type='sentence_transformers.models.Normalise'), 'Did you mean.*Normalize'),
    (lambda f: module(f, type='sentence_transformers.models.Pooling'),
     'modules Transformer, Pooling, Pooling are not supported, only'),
    (lambda f: module(f, path='../other'), 'links out of its directory'),
    (lambda f: module(f, path=3), 'must have a type and a path'),
    (lambda f: write(f / 'modules.json', {}), 'must hold a JSON list, got dict'),
    (lambda f: write(f / 'modules.json', [3]), 'must have a type and a path'),
    (lambda f: write(f / 'modules.json', []), None),
    (lambda f: write(f / 'modules.json', json.loads((f / 'modules.json').read_text())[:1]),
     'modules Transformer are not supported'),
    (pooling(pooling_mode='clss'), "pooling_mode 'clss' is unknown. Did you mean"),
    (pooling(pooling_mode=['cls', 3]), 'pooling_mode 3 is unknown'),
    (pooling(pooling_mode=3), 'pooling_mode must be one or several of cls, max'),
    (pooling(pooling_mode=[]), 'pooling_mode must be one or several of'),
    (pooling(pooling_mode_max_tokens='yes'), "flag must be true or false, got 'yes'"),
    (pooling(word_embedding_dimension=768), 'pools vectors of 768 numbers, the model has 32'),
    (dense(activation_function='my.Swish'), "activation_function 'my.Swish' is not supported"),
    (dense(activation_function='torch.nn.modules.activation.Softplus'), "Softplus' is not support"),
    (dense(in_features=31), 'must be 32 and a positive number, got 31 and 24'),
    (dense(out_features='24'), "got 32 and '24'"),
    (dense(out_features=25), r'2_Dense/linear.weight has shape \(24, 32\)'),
    (dense(bias=False), 'unread 2_Dense/linear.bias'),
    (dense(bias=0), 'bias=0'),
    (dense(use_residual=True), 'use_residual=True is not supported'),
    (dense(module_input_name='token_embeddings'), "'token_embeddings' is not supported"),
    (lambda f: (f / '2_Dense' / 'model.safetensors').unlink(), 'no model.safetensors|2_Dense'),
    (link_out, 'links out of its directory'),
    (length(max_seq_length='9'), "max_seq_length must be a positive number, got '9'"),
    (length(max_seq_length=-1), 'max_seq_length must be a positive number, got -1'),
    (length(transformer_task='fill-mask'), "transformer_task='fill-mask'"),
    (length(modality_config={'text': {'method_output_name': 'logits'}}), "the output 'logits'"),
    (length(modality_config=3), 'the output None is not supported'),
    (length(processing_kwargs={'text': {'truncation': False}}), 'truncation=False'),
    (length(processing_kwargs={'text': 3}), 'text=3 is not supported'),
    (lambda f: write(f / 'tokenizer_config.json', {'truncation_side': 'left'}),
     "truncation_side='left' is not supported"),
    (lambda f: write(f / sentence.CONFIG, {'model_type': 'SparseEncoder'}),
     "model_type 'SparseEncoder' is not supported"),
    (lambda f: write(f / sentence.CONFIG, {'default_prompt_name': 'q'}),
     "default_prompt_name='q' is not among"),
    (lambda f: write(f / sentence.CONFIG, {'prompts': ['q']}), 'prompts must map names to texts'),
    (lambda f: write(f / sentence.CONFIG, {'truncate_dim': 8}), 'truncate_dim=8 is not supported'),
])
def test_what_is_not_supported_is_refused_by_name(damage, message, tmp_path):
  folder = make(tmp_path / 'x', flags('mean'), dense=[(24, True, TANH)], types=OLD)
  damage(folder)
  if message is None:
    convert.read_hf(folder)
    return
  with pytest.raises(UsageError, match=message) as e:
    convert.read_hf(folder).read_params()
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('values, tokenizer, limit', [
    (dict(max_seq_length=9), dict(model_max_length=7), 9),
    (dict(max_seq_length=None), dict(model_max_length=7), 7),
    ({}, dict(model_max_length=1000000000000000019884624838656), 32),
    ({}, dict(model_max_length=1e30), 32),
    ({}, {}, 32),
    (dict(processing_kwargs={'text': {'max_length': 5, 'padding': True}}), {}, 5),
    (dict(max_seq_length=9, do_lower_case=True), {}, 9),
])
def test_the_length_that_sentence_transformers_would_take(values, tokenizer, limit, tmp_path):
  folder = make(tmp_path / 'x', flags('mean'), types=OLD)
  write(folder / 'sentence_bert_config.json', values)
  write(folder / 'tokenizer_config.json', tokenizer)
  e = convert.read_hf(folder).config.embed
  assert (e.max_length, e.lowercase) == (limit, 'do_lower_case' in values)


def test_a_cross_encoder_has_no_vectors_and_a_pooled_classifier_is_refused(tmp_path):
  folder = tmp_path / 'x'
  folder.mkdir()
  save('bert_classifier', folder)
  entry = {'path': '', 'type': 'sentence_transformers.base.modules.transformer.Transformer'}
  write(folder / 'modules.json', [entry])
  assert not convert.read_hf(folder).config.embed.modules
  write(folder / 'modules.json', [entry, {'path': '1_Pooling', 'type': OLD.format(kind='Pooling')}])
  with pytest.raises(UsageError, match='Pooling around a classifier is not supported'):
    convert.read_hf(folder)


@pytest.mark.parametrize('changes, to, message', [
    (dict(pool='pooler'), 'hf', "model.pool='pooler' cannot be written for sentence-transformers"),
    (dict(classes=2, pool='pooler'), 'hf', r'model.dense=\(24,\) under a classifier'),
    ({}, 't5x', r'model.dense=\(24,\) cannot be written for T5X'),
])
def test_what_cannot_be_written(changes, to, message, source, tmp_path):
  src = dataclasses.replace(source('listed')[1])
  src.model = dataclasses.replace(src.model, **changes)
  with pytest.raises(UsageError, match=message):
    convert.convert(src, tmp_path / 'y', to, log=lambda line: None)
  assert not (tmp_path / 'y').exists()
