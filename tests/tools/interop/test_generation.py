"""Generation settings of Hugging Face: outputs equal to transformers.generate, and the way back."""

import functools
import json
import re
import shutil

from hf_models import model, save
import pytest
import torch
import transformers

from t5lab import config
from t5lab.decoding import options
from t5lab.errors import UsageError
from t5lab.models import families
from t5lab.models.families import TransformerConfig
from t5lab.programs.lab import Lab, load
from t5lab.tools.interop import convert, generation

INPUTS = [[5, 7, 9, 11, 13, 6, 8, 17, 2, 3, 19, 33, 41, 29, 23, 4, 45, 12, 10, 40, 31],
          [6, 8, 10, 4, 12, 31, 37, 26, 30, 9, 14, 15, 16, 18], [44, 21]]
ENDS = [1, 9, 20, 25, 33, 40]        # so that random models do end their texts
GREEDY = {'max_length': 12}
BEAMS = {'max_length': 12, 'num_beams': 3, 'eos_token_id': ENDS}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """name -> a directory that transformers wrote, without its generation_config.json."""
  @functools.cache
  def get(name):
    folder = tmp_path_factory.mktemp(name)
    save(name, folder)
    (folder / 'generation_config.json').unlink()
    return folder, convert.read_hf(folder).read_params()
  return get


def copy(saved, name, folder, settings, legacy=False):
  """A copy whose generation_config.json, or config.json if legacy, has these settings."""
  there, params = saved(name)
  folder.mkdir()
  shutil.copy(there / 'model.safetensors', folder)
  hf_config = json.loads((there / 'config.json').read_text())
  if not legacy:
    defaults = {key: hf_config[key] for key in ('eos_token_id', 'pad_token_id', 'bos_token_id',
                                                'decoder_start_token_id') if key in hf_config}
    (folder / generation.NAME).write_text(json.dumps({**defaults, **settings}))
  (folder / 'config.json').write_text(json.dumps({**hf_config, **(settings if legacy else {})}))
  return folder, params


def theirs(name, folder, **kwargs):
  """The outputs of transformers for INPUTS, cut after the end of the text."""
  reference = type(model(name)).from_pretrained(folder)
  ends = reference.generation_config.eos_token_id
  ends = ends if isinstance(ends, list) else [ends]
  outputs = []
  for ids in INPUTS:
    with torch.no_grad():
      out = reference.generate(input_ids=torch.tensor([ids]), pad_token_id=0, **kwargs)[0].tolist()
    out = out[1 if reference.config.is_encoder_decoder else len(ids):]
    stop = next((i for i, token in enumerate(out) if token in ends), len(out))
    outputs.append(out[:stop])
  return outputs


def ours(folder, params, **changes):
  source = convert.read_hf(folder)
  source.config.data.start = False
  lab = Lab(source.config, params)
  out, eos = lab.generate_tokens(INPUTS, **changes).tolist(), source.config.model.eos_id
  stops = lab.decoding(**changes).stop_ids
  if stops and eos not in stops:         # then only the last one is an end
    out = [row[:len(row) - row[::-1].index(eos) - 1] if eos in row and not any(
        row[len(row) - row[::-1].index(eos):]) else row for row in out]
    return out, source
  return [row[:row.index(eos)] if eos in row else row for row in out], source


CASES = {
    'plain': {}, 'max_new_tokens': {'max_new_tokens': 5}, 'ends': {'eos_token_id': ENDS},
    'suppress': {'suppress_tokens': list(range(2, 30)), 'begin_suppress_tokens': [31, 33, 40, 41]},
    'bad_words': {'bad_words_ids': [[i] for i in range(5, 40, 3)] + [[i, i] for i in range(48)]},
    'bad_words_and_ends': {'bad_words_ids': [[9], [20], [7, 9]], 'eos_token_id': ENDS},
    'min_length': {'min_length': 9, 'eos_token_id': ENDS},
    'min_new_tokens': {'min_new_tokens': 4, 'min_length': 11, 'eos_token_id': ENDS},
    'min_new_tokens_0': {'min_new_tokens': 0, 'min_length': 11, 'eos_token_id': ENDS},
    'ngram_1': {'no_repeat_ngram_size': 1}, 'ngram_2': {'no_repeat_ngram_size': 2},
    'ngram_20': {'no_repeat_ngram_size': 20},
    'penalty': {'repetition_penalty': 1.7}, 'bonus': {'repetition_penalty': 0.6},
    'forced_last': {'forced_eos_token_id': 7, 'eos_token_id': ENDS},
    'leftovers': {'do_sample': False, 'temperature': 0.3, 'top_k': 4, 'top_p': 0.5,
                  'length_penalty': 3.},
    'together': {'repetition_penalty': 1.3, 'no_repeat_ngram_size': 3, 'min_length': 6,
                 'bad_words_ids': [[7], [31, 7]], 'suppress_tokens': [3, 12], 'eos_token_id': ENDS,
                 'forced_eos_token_id': 1}}
ENCODER_DECODER = {
    'forced_first': {'forced_bos_token_id': 9},
    'forced_first_and_begin': {'forced_bos_token_id': 8, 'begin_suppress_tokens': [*range(4, 40)]},
    'start': {'decoder_start_token_id': 7, 'repetition_penalty': 2.}, 'length_1': {'max_length': 2}}
WITH_BEAMS = {
    'beams': {}, 'longer': {'length_penalty': 2.}, 'shorter': {'length_penalty': -1.},
    'bare': {'length_penalty': 0.}, 'early': {'early_stopping': True},
    'never': {'early_stopping': 'never'}, 'never_shorter': {'early_stopping': 'never',
                                                             'length_penalty': -0.5},
    'one_end': {'eos_token_id': 1, 'num_beams': 4},
    'bart_cnn': {'early_stopping': True, 'forced_bos_token_id': 0, 'forced_eos_token_id': 1,
                 'length_penalty': 2., 'min_length': 6, 'no_repeat_ngram_size': 3, 'num_beams': 4},
    'marian': {'bad_words_ids': [[47]], 'decoder_start_token_id': 47, 'forced_eos_token_id': 0,
               'num_beams': 6},
    'together': {**CASES['together'], 'early_stopping': True, 'length_penalty': 0.6}}
SLOW = {'t5_1_0'}       # repeats a path of the others


def cases():
  for name in ('bart', 'gpt2', 't5_1_0'):
    groups = [('greedy', {**CASES, **({} if name == 'gpt2' else ENCODER_DECODER)}, GREEDY)]
    if name != 'gpt2':
      groups.append(('beams', WITH_BEAMS, BEAMS))
    for kind, table, base in groups:
      for key, settings in table.items():
        base = {'max_length': 27} if name == 'gpt2' else base
        yield pytest.param(name, {**base, **settings}, id=f'{name}-{kind}-{key}',
                           marks=[pytest.mark.slow] if name in SLOW else [])


# As people publish them, with ids and lengths of these models.
PUBLISHED = [
    ('marian', {'bad_words_ids': [[47]], 'bos_token_id': 0, 'decoder_start_token_id': 47,
                'eos_token_id': 0, 'forced_eos_token_id': 0, 'max_length': 14, 'num_beams': 4,
                'pad_token_id': 47, 'renormalize_logits': False}),
    ('mbart', {'bos_token_id': 0, 'decoder_start_token_id': 2, 'early_stopping': True,
               'eos_token_id': 2, 'forced_bos_token_id': 44, 'forced_eos_token_id': 2,
               'max_length': 14, 'num_beams': 3, 'pad_token_id': 1}),
    ('pegasus', {'bos_token_id': 0, 'decoder_start_token_id': 0, 'eos_token_id': 1,
                 'forced_eos_token_id': 1, 'length_penalty': 0.8, 'max_length': 14, 'num_beams': 4,
                 'pad_token_id': 0}),
    ('llama', {'bos_token_id': 3, 'eos_token_id': ENDS, 'max_length': 30, 'pad_token_id': 0,
               'repetition_penalty': 1.1, 'do_sample': False, 'temperature': 0.6, 'top_p': 0.9}),
    ('t5gemma', {'bos_token_id': 2, 'eos_token_id': [1, 40], 'max_new_tokens': 9,
                 'pad_token_id': 0})]


@pytest.mark.parametrize('name, settings', PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_published_settings(name, settings, saved, tmp_path):
  test_outputs_are_those_of_transformers(name, settings, saved, tmp_path)


@pytest.mark.parametrize('name, settings', cases())
def test_outputs_are_those_of_transformers(name, settings, saved, tmp_path):
  folder, params = copy(saved, name, tmp_path / name, settings)
  got, source = ours(folder, params)
  assert got == theirs(name, folder)
  assert not source.notes


def test_without_a_file_the_settings_are_those_of_config_json(saved, tmp_path):
  """Old checkpoints have them there; those of a task are for pipelines, and generate reads none."""
  settings = {**BEAMS, **WITH_BEAMS['bart_cnn'],
              'task_specific_params': {'summarization': {'max_length': 4, 'num_beams': 1}}}
  folder, params = copy(saved, 'bart', tmp_path / 'src', settings, legacy=True)
  got, source = ours(folder, params)
  assert got == theirs('bart', folder)
  assert source.config.eval.beams == 4 and source.config.eval.max_length == 11


def test_a_file_hides_what_config_json_says(saved, tmp_path):
  folder, params = copy(saved, 'bart', tmp_path / 'src', {**GREEDY, 'forced_bos_token_id': 9},
                        legacy=True)
  (folder / generation.NAME).write_text(json.dumps(
      {'eos_token_id': 1, 'decoder_start_token_id': 5, 'max_length': 7}))
  got, source = ours(folder, params)
  assert got == theirs('bart', folder) and source.config.eval.start == 5


@pytest.mark.parametrize('options, kwargs', [
    (dict(length=6), dict(max_new_tokens=6)), (dict(beams=1), dict(num_beams=1)),
    (dict(length_penalty=3., early_stopping=True), dict(length_penalty=3., early_stopping=True)),
    (dict(min_new_tokens=8, stop_ids=ENDS[:3]), dict(min_new_tokens=8, eos_token_id=ENDS[:3])),
    (dict(alpha=0.), dict(length_penalty=0.))], ids=str)
def test_each_option_can_be_given_instead(options, kwargs, saved, tmp_path):
  """As an argument of generate, which comes before the file in both."""
  folder, params = copy(saved, 'bart', tmp_path / 'src', {**BEAMS, **WITH_BEAMS['together']})
  got, _ = ours(folder, params, **options)
  expected = theirs('bart', folder, **kwargs)
  ends = kwargs.get('eos_token_id', ENDS)
  cut = lambda row: row[:next((i for i, token in enumerate(row) if token in ends), len(row))]
  assert got == list(map(cut, expected))


# -- reading alone ---------------------------------------------------------------------------------


def tiny(name='bart/base', **fields):
  return TransformerConfig(**{**families.row(name), 'vocab_size': 48, 'max_length': 32, **fields})


def read(raw, c=None, **kwargs):
  return generation.read(raw, c or tiny(), **{'eos_id': 2, 'default_eos': 2, **kwargs})


@pytest.mark.parametrize('raw, expected', [
    ({'do_sample': True}, dict(temperature=1., top_k=50)),
    ({'do_sample': True, 'temperature': 0.6, 'top_p': 0.9, 'top_k': 0, 'min_p': 0.1},
     dict(temperature=0.6, top_p=0.9, top_k=0, min_p=0.1)),
    ({'temperature': 0.6, 'top_p': 0.9}, dict(top_p=0.9)),
    ({'do_sample': False, 'temperature': 0., 'top_k': None}, {}),
    ({'max_length': 20}, dict(max_length=19)), ({'max_length': 20, 'max_new_tokens': 3},
                                                dict(max_length=3)),
    ({'eos_token_id': [2]}, {}), ({'eos_token_id': 3}, dict(stop_ids=(3,))),
    ({'repetition_penalty': 1, 'typical_p': 1.0, 'renormalize_logits': False, 'bad_words_ids': None,
      'encoder_no_repeat_ngram_size': 0, 'num_beam_groups': 1, 'unknown': 'kept'},
     dict(repetition_penalty=1.))])
def test_values(raw, expected):
  settings = read(raw)
  defaults = dict(alpha=0., length_penalty=1., early_stopping='false', stop_ids=())
  assert settings.values == {**defaults, **expected} and settings.raw == raw
  assert settings.notes == ()


@pytest.mark.parametrize('raw, note', [
    ({'typical_p': 0.9, 'do_sample': True}, 'typical_p=0.9 is not supported'),
    ({'encoder_no_repeat_ngram_size': 3}, 'encoder_no_repeat_ngram_size=3 is not supported'),
    ({'num_beam_groups': 2, 'num_beams': 4}, 'num_beam_groups=2 is not supported'),
    ({'renormalize_logits': True, 'num_beams': 4}, 'renormalize_logits=True is not supported'),
    ({'sequence_bias': [[[4], 1.]]}, r'sequence_bias=\[\[\[4\], 1.0\]\] is not supported'),
    ({'num_beams': 4, 'do_sample': True}, 'do_sample=True is ignored: with num_beams=4'),
    ({'do_sample': True, 'temperature': 0}, 'temperature=0 with do_sample=true is greedy'),
    ({'suppress_tokens': [3, 99]}, r'suppress_tokens=\[3, 99\] has ids beyond the vocab'),
    ({'bad_words_ids': [[4, 48]]}, 'bad_words_ids=.* beyond the vocabulary'),
    ({'forced_bos_token_id': 250004}, 'forced_bos_token_id=250004 has ids beyond'),
    ({'eos_token_id': 50256}, 'eos_token_id=50256 has ids beyond the vocabulary of 48: ignored'),
    ({'max_length': 200}, 'max_length=200 is more than the 32 positions of the model'),
    ({'max_length': 1}, 'max_length=1 leaves no token to generate')])
def test_what_is_not_honoured_is_said_in_one_line(raw, note):
  (line,) = read(raw).notes
  assert re.search(note, line) and line.startswith('generation_config.json: ') and '\n' not in line


@pytest.mark.parametrize('raw, note', [
    ({'num_beams': 2}, 'num_beams=2 is ignored: beam search does not support decoder-only'),
    ({'forced_bos_token_id': 3}, 'forced_bos_token_id=3 is ignored: a decoder-only model')])
def test_what_a_decoder_alone_cannot_do(raw, note):
  settings = read(raw, tiny('gpt2/small'))
  assert note in settings.notes[0]
  assert settings.values.get('beams', 1) == 1 and 'forced_first' not in settings.values


@pytest.mark.parametrize('raw, message', [
    ({'num_beams': 'four'}, "num_beams must be an integer of at least 1, got 'four'"),
    ({'num_beams': 0}, 'num_beams must be an integer of at least 1, got 0'),
    ({'num_beams': True}, 'num_beams must be an integer'), ({'top_k': 1.5}, 'top_k must be an int'),
    ({'max_length': 10**400}, 'max_length must be an integer of at least 1'),
    ({'max_new_tokens': -1}, 'max_new_tokens must be an integer of at least 1, got -1'),
    ({'temperature': float('nan')}, 'temperature must be a number of at least 0, got nan'),
    ({'top_p': 0}, 'top_p must be above 0 and at most 1, got 0'), ({'min_p': 2}, 'min_p must be'),
    ({'repetition_penalty': 0.}, 'repetition_penalty must be above 0'),
    ({'do_sample': 'yes'}, "do_sample must be true or false, got 'yes'"),
    ({'early_stopping': 'sometimes'}, "early_stopping must be true, false or 'never'"),
    ({'early_stopping': 1}, "early_stopping must be true, false or 'never'"),
    ({'suppress_tokens': 3}, 'suppress_tokens must be a list of token ids, got 3'),
    ({'eos_token_id': ['</s>']}, 'eos_token_id must be a list of token ids'),
    ({'bad_words_ids': [3]}, 'bad_words_ids must be a list of lists of token ids'),
    ({'bad_words_ids': [[]]}, 'bad_words_ids must be a list of lists of token ids'),
    ({'decoder_start_token_id': 'x'}, 'decoder_start_token_id must be a list of token ids')])
def test_a_value_of_another_type_is_refused(raw, message):
  with pytest.raises(UsageError) as e:
    read(raw)
  assert str(e.value).startswith(f'generation_config.json: {message}')


def test_the_start_token_has_a_row():
  """GPT-2 configs of small vocabularies keep 50256; an encoder-decoder could not start."""
  gpt2 = tiny('gpt2/small', start_id=50256)
  start, note = generation.start_id(gpt2, read({}, gpt2), 47)
  assert start == 47 and 'the start token 50256 is not in the vocabulary of 48' in note
  bart = tiny(start_id=50)
  assert generation.start_id(bart, read({'decoder_start_token_id': 3}, bart), 2)[0] == 3
  with pytest.raises(UsageError, match='50 is not in the vocabulary of 48: give decoder_start'):
    generation.start_id(bart, read({}, bart), 2)
  assert generation.start_id(tiny(), read({}), 2) == (2, '')


# -- the way back ----------------------------------------------------------------------------------


def written(raw, c=None, **changes):
  model = c or tiny()
  c = config.from_model(model)
  c.eval.update(read(raw, model).values)
  c.eval.update(changes)
  return generation.write(raw, c, model)


FULL = {'num_beams': 4, 'early_stopping': True, 'length_penalty': 2.0, 'min_length': 6,
        'no_repeat_ngram_size': 3, 'forced_bos_token_id': 0, 'forced_eos_token_id': 2,
        'eos_token_id': [2, 9], 'decoder_start_token_id': 2, 'max_length': 20, 'typical_p': 0.9,
        'bad_words_ids': [[3], [4, 5]], 'suppress_tokens': [7], 'custom': {'a': [1]},
        'transformers_version': '4.30.0'}


@pytest.mark.parametrize('raw', [
    FULL, {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9, 'eos_token_id': 2},
    {'min_new_tokens': 3, 'min_length': 9}, {'eos_token_id': None}], ids=str)
def test_what_nobody_changed_comes_back_as_it_was(raw):
  assert written(raw) == (raw, [])


@pytest.mark.parametrize('changes, expected', [
    (dict(beams=1), {'num_beams': 1}), (dict(length_penalty=0.5), {'length_penalty': 0.5}),
    (dict(early_stopping='never'), {'early_stopping': 'never'}),
    (dict(stop_ids=()), {'eos_token_id': 2}), (dict(stop_ids=(2, 7)), {'eos_token_id': [2, 7]}),
    (dict(forced_first=-1), {'forced_bos_token_id': None}), (dict(start=5),
                                                             {'decoder_start_token_id': 5}),
    (dict(bad_words_ids=((8, 9),)), {'bad_words_ids': [[8, 9]]}),
    (dict(max_length=5), {'max_length': None, 'max_new_tokens': 5}),
    (dict(min_length=0), {'min_length': 0}), (dict(repetition_penalty=1.2),
                                              {'repetition_penalty': 1.2}),
    (dict(beams=1, temperature=0.5), {'num_beams': 1, 'do_sample': True, 'temperature': 0.5,
                                      'top_k': 0})])
def test_a_change_is_written_and_read_again(changes, expected):
  out, notes = written(FULL, **changes)
  assert out == {**FULL, **expected} and not notes
  again = {**options.defaults(), **read(out).values}
  for key, value in changes.items():
    assert again[key] == value


def test_weights_of_ours():
  """Whose alpha has no equal there; the rest is written in full."""
  c = config.from_model(tiny())
  e = c.eval
  ids = {'eos_token_id': 2, 'pad_token_id': 1, 'decoder_start_token_id': 2}
  write = functools.partial(generation.write, {}, c, tiny())
  assert write() == (ids, [])
  e.beams, e.max_length = 4, 9
  out, (note,) = write()
  assert out == {**ids, 'num_beams': 4, 'early_stopping': 'never', 'max_new_tokens': 9}
  assert note.startswith('eval.alpha=0.6 has no equal in transformers')
  e.update(beams=1, temperature=0.7, stop_ids=(2, 3))
  assert write()[0] == {**ids, 'eos_token_id': [2, 3], 'max_new_tokens': 9, 'do_sample': True,
                        'temperature': 0.7, 'top_k': 0}


@pytest.mark.parametrize('legacy', [False, True], ids=['own file', 'config.json'])
def test_from_hugging_face_and_back(legacy, saved, tmp_path):
  """With a note in the certificate for what is not honoured, and without losing it."""
  settings = {**BEAMS, **WITH_BEAMS['bart_cnn'], 'encoder_no_repeat_ngram_size': 2}
  folder, _ = copy(saved, 'bart', tmp_path / 'src', settings, legacy)
  log = []
  go = functools.partial(convert.convert, log=log.append, use_reference=False)
  body = go(convert.read_hf(folder), tmp_path / 'ours', 't5lab')
  note = f'{"config.json" if legacy else generation.NAME}: encoder_no_repeat_ngram_size=2'
  assert body['notes'][0].startswith(note) and body['notes'][0] in log
  go(convert.read_t5lab(tmp_path / 'ours'), tmp_path / 'back', 'hf')
  load = transformers.GenerationConfig.from_pretrained
  expected = load(folder, 'config.json', _from_model_config=True) if legacy else load(folder)
  differing = {key: value for key, value in load(tmp_path / 'back').to_dict().items()
               if value != expected.to_dict()[key]}
  assert differing.keys() <= {'transformers_version', '_from_model_config', 'use_cache'}


def test_a_start_token_beyond_the_vocabulary_is_replaced_with_a_line(saved, tmp_path):
  """As in GPT-2 configs of small models, which keep 50256; both verifications pass."""
  folder, _ = copy(saved, 'gpt2', tmp_path / 'src', {'bos_token_id': 50256, 'eos_token_id': 50256},
                   legacy=True)
  for use_reference in (True, False):
    log = []
    body = convert.convert(convert.read_hf(folder), tmp_path / str(use_reference), 't5lab',
                           log=log.append, use_reference=use_reference)
    ends, start = body['notes']
    assert ends == 'config.json: eos_token_id=50256 has ids beyond the vocabulary of 48: ignored'
    assert start.endswith('50256 is not in the vocabulary of 48; an empty prompt starts with 0')
  lab = load(tmp_path / 'False')
  assert lab.generate_tokens([[]], length=3).shape == (1, 3)
