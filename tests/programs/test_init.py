"""Starting from weights: of a run, of converted ones, with new and with left-out parts, with their
optimizer's state or without."""

import dataclasses
import functools
import json
import pathlib
import shutil

import flax.linen as nn
from hf_models import save
import jax
import numpy as np
from processes import arrays
import pytest
import shared_programs
import transformers

import t5lab
from t5lab import config, trees
from t5lab.errors import CheckpointError, UsageError
from t5lab.models import families
from t5lab.parallel import sharding
from t5lab.programs import build, loading, loop, shapes
from t5lab.runs import rundir
from t5lab.runs.checkpoint import Checkpoints
from t5lab.tools.interop import convert, t5x
from t5lab.training import adafactor, optim

QUICKSTART = str(pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py')
# The first step of the warm-up has a learning rate of 0.
FAST = {'total_steps': '2', 'checkpoint.every': '1', 'eval.examples': '1', 'eval.max_length': '1',
        'eval.beams': '1', 'checkpoint.best': '', 'optim.warmup': '1'}


@pytest.fixture(scope='module', autouse=True)
def one_program():
  with shared_programs.shared():
    yield


def tiny(init='', **overrides):
  c = config.load(QUICKSTART + ':tiny', FAST)
  c.init.path, c.data.mixture = str(init), 'ha_enfr'      # the smallest translations
  for key, value in overrides.items():
    config.override(c, key.replace('__', '.'), str(value))
  return c


def base_of(c, fresh=None):
  mesh = sharding.make_mesh()
  loaded = loading.load_base(c, shapes.boxed_params(c), mesh, fresh)
  return loaded, trees.flatten(loaded.params)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Two steps of AdamW, raw and averaged weights saved at each."""
  path = tmp_path_factory.mktemp('run')
  loop.train(tiny(), path)
  return path


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  """A converted BERT of 48 words without a classifier."""
  there = tmp_path_factory.mktemp('bert')
  save('bert_bare', there)
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz']
  (there / 'vocab.txt').write_text('\n'.join([*words, *map('##{}'.format, 'aeinorst')]) + '\n')
  path = tmp_path_factory.mktemp('converted') / 'bert'
  convert.convert(convert.read_hf(there), path, 't5lab', log=lambda line: None,
                  use_reference=False)
  return path


def matching(init, classes=2, **overrides):
  """docs_match on the converted BERT."""
  source = loading.read_config(init)
  c = config.base('bert/base', **{**source.model.to_dict(), 'classes': classes})
  c.init.path, c.init.fresh = str(init), ('classifier/.*',)
  c.data.mixture, c.data.vocab = 'docs_match', 'init'
  c.data.lengths.inputs, c.data.lengths.targets, c.data.pack = 32, 1, False
  c.data.batch_size, c.optim.name, c.eval.batch_size = 8, 'adamw', 8
  for key, value in {**FAST, **overrides}.items():
    config.override(c, key.replace('__', '.'), str(value))
  return c


# -- which weights ---------------------------------------------------------------------------------


def test_the_weights_of_a_run_averaged_or_raw_of_any_step(run):
  saved = {step: arrays(run, step) for step in (1, 2)}
  for changes, step, part in (({}, 2, 'ema'), ({'init__weights': 'raw'}, 2, 'params'),
                              ({'init__step': '1', 'init__weights': 'ema'}, 1, 'ema')):
    loaded, got = base_of(tiny(run, **changes))
    assert (loaded.step, loaded.weights) == (step, 'raw' if part == 'params' else part)
    assert {f'{part}/{p}' for p in got} == {p for p in saved[step] if p.startswith(f'{part}/')}
    for path, x in got.items():
      np.testing.assert_array_equal(x, saved[step][f'{part}/{path}'])
  other = base_of(tiny(run, init__step='1'))[0]
  assert other.sha256 != base_of(tiny(run))[0].sha256


def test_a_run_begins_at_them_and_says_so(run, tmp_path, capsys):
  """After a first step with a learning rate of 0, they are as they were."""
  c = tiny(run)
  loop.train(c, tmp_path)
  output = capsys.readouterr().out
  assert f'weights of {run}, step 2, ema; optimizer state fresh' in output
  ours, initial = arrays(tmp_path, 1), arrays(run, 2)
  for path in ours:
    if path.startswith('params/'):
      np.testing.assert_array_equal(ours[path], initial[path.replace('params', 'ema', 1)])
  meta = Checkpoints(tmp_path / 'checkpoints').manifest(2).meta
  assert meta['init'] == {'path': str(run), 'step': 2, 'sha256': base_of(tiny(run))[0].sha256}
  loop.train(c, tmp_path)
  assert 'resuming from step 2' in capsys.readouterr().out


def test_a_new_classifier_on_converted_weights_and_then_another(bert, tmp_path, capsys):
  """From the seed alone is what init.fresh names; the rest is the converted BERT, bit for bit. The
  vocabulary comes along, so the run outlives what it began with."""
  gone = tmp_path / 'gone'
  shutil.copytree(bert, gone)
  workdir = tmp_path / 'run'
  with pytest.raises(CheckpointError, match='(?s)classifier/(bias|kernel)'):
    loop.train(matching(gone, optim__lr='0.', init__fresh='()'), tmp_path / 'refused')
  assert not list(tmp_path.glob('refused/checkpoints/step_*'))
  loop.train(matching(gone, optim__lr='0.'), workdir)
  assert f'weights of {gone}, step 0, raw; optimizer state fresh' in capsys.readouterr().out
  ours = {p.removeprefix('params/'): x for p, x in arrays(workdir, 2).items()
          if p.startswith('params/')}
  base = trees.flatten(t5lab.load(bert).params)
  assert ours.keys() - base.keys() == {'classifier/kernel', 'classifier/bias'}
  for path, x in base.items():
    np.testing.assert_array_equal(ours[path], x)
  assert ours['classifier/kernel'].shape == (32, 2) and ours['classifier/kernel'].std() > 1e-3
  shutil.rmtree(gone)
  assert (workdir / 'vocabulary' / 'vocab.txt').is_file()
  lab = t5lab.load(workdir)
  assert lab.config.data.vocab == str(workdir / 'vocabulary' / 'vocab.txt')
  assert lab.classify([('ab', 'cd'), 'ab']).shape == (2, 2)
  # three classes on what has two: a part of another shape is new, too
  c = matching(workdir, classes=3)
  ones = {'classifier/kernel': np.ones((32, 3)), 'classifier/bias': np.ones(3)}
  _, got = base_of(c, lambda paths: {p: ones[p] for p in paths})
  assert got['classifier/kernel'].shape == (32, 3) and got['embedding'].shape == (48, 32)
  _, got = base_of(matching(workdir), lambda paths: 1 / 0)           # nothing is new: nothing made
  np.testing.assert_array_equal(got['classifier/kernel'], ours['classifier/kernel'])


def test_what_path_has_too_much_is_left_only_if_named(bert, tmp_path):
  """The classifier's pooler is not ours: refused, then ignored."""
  c = matching(bert, init__fresh='()', classes=0)
  c.model.pooler, c.model.classes, c.model.pool = False, 0, 'mean'
  with pytest.raises(CheckpointError, match='arrays differ') as e:
    base_of(c)
  assert 'params/pooler/kernel' in str(e.value) and 'params/pooler/bias' in str(e.value)
  c.init.ignore = ('pooler/.*',)
  _, got = base_of(c)
  base = trees.flatten(t5lab.load(bert).params)
  assert base.keys() - got.keys() == {'pooler/kernel', 'pooler/bias'}
  for path, x in got.items():
    np.testing.assert_array_equal(x, base[path])


@pytest.mark.parametrize('changes, error, message', [
    (dict(init__fresh='()'), CheckpointError, 'classifier/(bias|kernel)'),
    (dict(model__d_ff=48), CheckpointError, r'mlp/wi_0/kernel.*32,48'),
    (dict(init__fresh="('(.*',)"), UsageError, 'not a regular expression'),
    (dict(init__weights='ema'), UsageError, "init.weights='ema': .* has raw only"),
    (dict(init__step='7'), CheckpointError, 'no checkpoint of step 7'),
    (dict(init__step='new'), UsageError, "step must be a number, 'latest' or 'best', got 'new'"),
    (dict(init__path='/nowhere'), UsageError, '/nowhere is not a run of t5lab'),
    (dict(init__optimizer='restore'), CheckpointError, 'holds no optimizer state; use '
                                                       'init.optimizer=fresh'),
])
def test_what_does_not_fit_is_listed_and_nothing_is_saved(changes, error, message, bert, tmp_path):
  c = matching(bert, **{'data__vocab': str(bert / 'vocabulary' / 'vocab.txt'), **changes})
  with pytest.raises(error, match=f'(?s){message}'):
    loop.train(c, tmp_path)
  assert not list(tmp_path.glob('checkpoints/step_*'))


# -- the optimizer's state -------------------------------------------------------------------------


def test_the_optimizers_state_comes_along_if_asked(run, tmp_path, capsys):
  """The saved moments and their count; the schedule begins anew. Without clipping, which has no
  state but a place in the chain, they are the same."""
  c = tiny(run, init__optimizer='restore', init__weights='raw')
  saved = arrays(run, 2)
  for clip, first in ((1., 1), (0., 0)):
    tx = optim.optimizer('adamw', lambda step: 1e-3, clip=clip, weight_decay=0.01)
    abstract = build.abstract_state(c, tx, sharding.make_mesh())
    got = trees.flatten(loading.load_optimizer(c, abstract.opt_state, 2))
    assert int(got.pop(f'{first + 2}/count')) == 0 and int(got[f'{first}/count']) == 2
    assert len(got) == sum(p.startswith('opt_state/') for p in saved) - 1
    for path, x in got.items():
      np.testing.assert_array_equal(x, saved[f'opt_state/1/{path.partition("/")[2]}'])
  loop.train(c, tmp_path)
  assert f'weights of {run}, step 2, raw; optimizer state restored' in capsys.readouterr().out
  after = arrays(tmp_path, 2)
  counts = {p: int(x) for p, x in after.items() if p.endswith('/count')}
  assert counts == {'opt_state/1/count': 4, 'opt_state/3/count': 2}  # two steps and two more
  tx = optim.optimizer('adafactor', lambda step: 1e-3)
  abstract = build.abstract_state(c, tx, sharding.make_mesh())
  with pytest.raises(CheckpointError, match='opt_state'):            # of another optimizer
    loading.load_optimizer(c, abstract.opt_state, 2)


def test_a_t5x_checkpoint_goes_on_with_its_adafactor_slots(tmp_path, capsys):
  """T5X -> convert -> train: the run's first update is the one that the slots call for."""
  c = tiny(optim__name='adafactor', optim__ema='0', optim__clip='0', optim__weight_decay='0',
           optim__schedule='constant', optim__lr='1e-3', model__dropout='0',
           model__scale_attn='false', model__tied='false', model__scale_logits='false')
  m = config.model_config(c)
  stream = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: stream.normal(0, 0.1, x.shape).astype(np.float32) + (x.ndim < 3),
      nn.unbox(shapes.boxed_params(c)))
  slots = jax.tree.map(
      lambda x: np.abs(stream.normal(0, 1, x.shape)).astype(np.float32),
      jax.eval_shape(adafactor.scale_by_adafactor().init, params))._replace(count=np.int32(5000))
  # an unused slot has one number, of which T5X keeps none
  slots = slots._replace(**{k: jax.tree.map(
      lambda x: np.zeros_like(x) if x.shape[-1] == 1 else x, getattr(slots, k))
      for k in ('v_row', 'v_col', 'v')})
  t5x.write(tmp_path / 'checkpoint_5000', m, params, 5000, optimizer=slots)
  source = convert.read_t5x(tmp_path / 'checkpoint_5000', 't5lab_2048')
  convert.convert(source, tmp_path / 'ours', 't5lab', log=lambda line: None, use_reference=False)
  saved = arrays(tmp_path / 'ours', 5000)
  want = trees.flatten(slots)
  assert set(want) == {p.removeprefix('opt_state/0/') for p in saved
                       if p.startswith('opt_state/0/')}
  for path, x in want.items():
    np.testing.assert_array_equal(saved[f'opt_state/0/{path}'], x, err_msg=path)

  c.init.path, c.init.optimizer, c.total_steps = str(tmp_path / 'ours'), 'restore', 1
  loop.train(c, tmp_path / 'run')
  assert 'step 5000, raw; optimizer state restored' in capsys.readouterr().out
  after = arrays(tmp_path / 'run', 1)
  assert [int(after[f'opt_state/{i}/count']) for i in (0, 1)] == [5001, 1]
  c.init.optimizer = 'fresh'
  loop.train(c, tmp_path / 'anew')
  anew = arrays(tmp_path / 'anew', 1)
  # decay 1 - 5001^-0.8 keeps nearly all of the old second moment; a fresh one is this step's alone
  v = 'opt_state/0/v/encoder/layers/attn/q/kernel'
  np.testing.assert_allclose(after[v], saved[v], rtol=2e-2, atol=1e-3)
  assert np.abs(anew[v]).max() < 0.1 < np.abs(after[v]).max()


def test_a_run_of_before_these_keys_goes_on(run, tmp_path):
  """Its config.json lacks init, lora and the newer keys of model and data."""
  shutil.copytree(run, tmp_path / 'run')
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  for section, key in (('', 'init'), ('', 'lora'), ('data', 'start'), ('model', 'classes'),
                       ('loss', 'balance'), ('mesh', 'expert'), ('eval', 'forced_first')):
    del (saved[section] if section else saved)[key]
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(saved))
  assert t5lab.load(tmp_path / 'run').step == 2
  loop.train(tiny(), tmp_path / 'run', resume='must')
  assert 'init' in json.loads((tmp_path / 'run' / 'config.json').read_text())


def test_weights_of_another_architecture_are_refused():
  """Arrays of the same shapes that mean something else."""
  ours = families.TransformerConfig(**families.row('llama1/7b'))
  loading._check_architecture(ours, ours, 'x')
  for changed in (dict(rope_theta=5e5), dict(acts=('gelu', 'linear')), dict(norm_eps=1e-5)):
    with pytest.raises(UsageError, match=f'a different architecture: model.{list(changed)[0]}='):
      loading._check_architecture(ours, dataclasses.replace(ours, **changed), 'x')


# -- what came with the weights --------------------------------------------------------------------

GENERATION = {'num_beams': 2, 'length_penalty': 2.0, 'early_stopping': True, 'max_length': 9,
              'eos_token_id': [1, 9], 'decoder_start_token_id': 0, 'pad_token_id': 0,
              'suppress_tokens': [7], 'bad_words_ids': [[3, 4]], 'custom': {'kept': [1]}}


def test_a_tuned_run_is_exported_with_what_came_with_its_weights(tmp_path):
  """Generation settings, also those that nothing here reads, and files of the tokenizer; what the
  run sets itself is its own."""
  src = tmp_path / 'src'
  size = dict(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
              decoder_start_token_id=0)
  transformers.T5ForConditionalGeneration(transformers.T5Config(**size)).save_pretrained(src)
  tokenizer = {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125}
  contents = {'generation_config': GENERATION, 'tokenizer_config': tokenizer,
              'special_tokens_map': {'eos_token': '</s>'}}
  for name, content in contents.items():
    (src / f'{name}.json').write_text(json.dumps(content))
  (src / 'chat_template.jinja').write_text('{{ messages }}')
  go = functools.partial(convert.convert, log=lambda line: None, use_reference=False)
  go(convert.read_hf(src), tmp_path / 'ours', 't5lab')

  fields = loading.read_config(tmp_path / 'ours').model.to_dict()
  c = config.base('t5_1_0/small', **fields)
  c.init.path, c.data.mixture, c.data.vocab = str(tmp_path / 'ours'), 'ha_enfr', 'init'
  c.data.lengths.inputs, c.data.lengths.targets, c.data.batch_size = 16, 16, 8
  c.eval.batch_size, c.eval.examples, c.eval.no_repeat_ngram_size = 8, 1, 3
  c.total_steps = 2
  loop.train(c, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'ours')
  decoding = t5lab.load(tmp_path / 'run').decoding()
  assert (decoding.beams, decoding.stop_ids, decoding.length) == (2, (1, 9), 8)
  assert decoding.no_repeat_ngram_size == 3 and decoding.length_penalty == 2.

  go(convert.read_t5lab(tmp_path / 'run'), tmp_path / 'back', 'hf')
  read = lambda name: json.loads((tmp_path / 'back' / name).read_text())
  assert read('generation_config.json') == {**GENERATION, 'no_repeat_ngram_size': 3}
  assert read('tokenizer_config.json').items() >= tokenizer.items()
  for name in ('special_tokens_map.json', 'chat_template.jinja'):
    assert (tmp_path / 'back' / name).read_bytes() == (src / name).read_bytes()


def inherited(tmp_path, there, here, path=None):
  """What a run with the values `here` takes from weights with the values `there`."""
  def made(values):
    c = config.base('bert/base', classes=values.pop('classes', 3), pooler=True, pool='pooler')
    for key, value in values.items():
      config.override(c, key.replace('__', '.'), str(value))
    return c
  source, c = made({'data__vocab': 't5lab_2048', **there}), made(here)
  (tmp_path / 'init').mkdir(exist_ok=True)
  rundir.write_config(tmp_path / 'init', config.to_dict(source))
  c.init.path = str(path or tmp_path / 'init')
  return loading.inherit(c, tmp_path)


def test_what_a_run_does_not_set_it_takes_from_its_weights(tmp_path):
  labels = dict(eval__labels='a,b,c', eval__problem_type='regression')
  expected = {'labels': ('a', 'b', 'c'), 'problem_type': 'regression'}
  take = functools.partial(inherited, tmp_path)
  assert take(labels, {}) == expected
  assert take(labels, {'classes': 2}) == take(labels, {'data__vocab': 'byte'}) == {}
  gone = tmp_path / 'gone'
  assert take(labels, {}, gone) == {}
  rundir.write_config(tmp_path, rundir.read_config(tmp_path / 'init'))
  assert take(labels, {}, gone) == expected       # a run that had begun before it was
  of_evaluation = dict(eval__batch_size=3, eval__split='test', eval__seed=4)
  assert take({**labels, **of_evaluation}, {}) == expected

  # What the run sets, and what that replaces, is its own.
  beams = dict(eval__beams=4, eval__length_penalty=2., eval__min_length=5, eval__max_length=20)
  names = lambda here: {*take(beams, here)}
  assert names({}) == {'beams', 'length_penalty', 'min_length', 'max_length'}
  assert names({'eval__alpha': 1.}) == {'beams', 'min_length', 'max_length'}
  assert names({'eval__temperature': 1.}) == {'length_penalty', 'min_length', 'max_length'}
  assert names({'eval__min_new_tokens': 1, 'eval__max_length': 9}) == {'beams', 'length_penalty'}
  assert 'max_length' not in take({**beams, 'eval__max_length': 128}, {})     # nobody's choice
