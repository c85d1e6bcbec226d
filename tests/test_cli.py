"""The commands: output, exit codes, one line per error."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import shared_programs
import small_models
import tokenizers

import t5lab
from t5lab import cli, config
from t5lab.commands import infer, train
from t5lab.programs import lab as lab_module
from t5lab.programs import loop, scoring
from t5lab.runs import rundir
from t5lab.runs.checkpoint import Checkpoints

QUICKSTART = str(pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py')


@pytest.fixture(scope='module', autouse=True)
def one_program():
  with shared_programs.shared():
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  loop.train(config.load(QUICKSTART + ':tiny', {
      'checkpoint.best': 'ha_ende/ema/loss', 'eval.examples': '4', 'eval.max_length': '4'}), path)
  return str(path)


def call(*argv, capsys):
  code = cli.main(list(argv))
  out = capsys.readouterr()
  return code, out.out, out.err


def test_help_of_every_command(capsys):
  code, out, _ = call('--help', capsys=capsys)
  assert code == 0 and all(name in out for name in cli.COMMANDS)
  needs = {'convert': 'SRC DST', 'cache': '--config', 'inspect': '--config', 'data': 'dedup',
           'plan': '--config', 'check': '--config', 'bisect': 'RUN_A'}
  for name in cli.COMMANDS:
    with pytest.raises(SystemExit) as exit_:
      cli.main([name, '--help'])
    assert exit_.value.code == 0
    assert needs.get(name, '--workdir') in capsys.readouterr().out
  code, out, _ = call('--version', capsys=capsys)
  assert code == 0 and out.count('.') == 2


def test_the_package_is_a_program():
  done = subprocess.run([sys.executable, '-m', 't5lab', 'trian'],
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('t5lab: ') and "Did you mean 'train'" in done.stderr
  assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('packages, vendor, given, chosen', [
    (('libtpu',), '0x8086', None, 'cpu'),                      # installed for the planner
    (('libtpu',), '0x1ae0', None, None),                       # a TPU machine
    (('libtpu', 'jax_plugins'), '0x8086', None, None),         # a GPU machine
    (('libtpu',), '0x8086', 'tpu', 'tpu'), ((), '0x8086', None, None)])
def test_libtpu_without_a_tpu_is_left_alone(monkeypatch, tmp_path, packages, vendor, given, chosen):
  monkeypatch.setenv('JAX_PLATFORMS', given or '')
  if given is None:
    monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(cli.importlib.util, 'find_spec', lambda name: name in packages or None)
  (tmp_path / '0000:00:04.0').mkdir()
  (tmp_path / '0000:00:04.0/vendor').write_text(f'{vendor}\n')
  monkeypatch.setattr(cli, 'PCI_DEVICES', tmp_path)
  cli.choose_platform()
  assert os.environ.get('JAX_PLATFORMS') == chosen


@pytest.mark.parametrize('argv, code, message', [
    (['trian'], 2, "no command 'trian'. Did you mean 'train'"),
    (['train'], 2, 'the following arguments are required: --config, --workdir'),
    (['train', '--config', 'no.py', '--workdir', 'x'], 2, "no config file 'no.py'"),
    (['train', '--config', QUICKSTART, '--workdir', 'x', '--config.optim.lrr=1'], 2,
     "unknown config key 'optim.lrr'. Did you mean 'lr'"),
    (['train', '--config', QUICKSTART, '--workdir', 'x', '--config.optim.lr'], 2,
     '--config.optim.lr needs a value'),
    (['eval', '--workdir', 'nowhere'], 2, 'nowhere'),
    (['infer', '--workdir', 'nowhere', '--input', 'no.jsonl'], 3, "no file matches 'no.jsonl'"),
    (['eval', '--workdir', 'x', '--config.optim.lr=1'], 2,
     '--config.optim.lr cannot be set for eval, only keys of eval, data.files, data.fields'),
])
def test_an_error_is_one_line_with_its_code(argv, code, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  got, out, err = call(*argv, capsys=capsys)
  assert got == code and message in err
  assert err.startswith('t5lab: ') and err.count('\n') == 1 and not out
  assert not list(tmp_path.iterdir())


def test_an_internal_error_is_one_line_and_debug_shows_the_trace(capsys, monkeypatch):
  monkeypatch.setattr(config, 'load', lambda *a: 1 / 0)
  argv = ['train', '--config', QUICKSTART, '--workdir', 'x']
  code, _, err = call(*argv, capsys=capsys)
  assert code == 70 and 'ZeroDivisionError' in err and err.count('\n') == 1
  with pytest.raises(ZeroDivisionError):
    cli.main([*argv, '--debug'])


def test_infer_lines(workdir, capsys, monkeypatch):
  text = 'Turn on the light\nSélectionner\n\nOff'
  type_in(text, monkeypatch)
  code, out, err = call('infer', '--workdir', workdir, capsys=capsys)
  assert code == 0, err
  assert out.count('\n') == 4


def test_samples_of_equal_lines_differ(workdir, capsys, monkeypatch):
  """Also in another chunk of the input, and with --seed they are the same again."""
  monkeypatch.setattr(infer, 'CHUNK', 2)
  outputs = []
  for _ in range(2):
    type_in('Off\n' * 5, monkeypatch)
    code, out, err = call('infer', '--workdir', workdir, '--temperature', '1', '--max-length', '8',
                          '--seed', '7', capsys=capsys)
    assert code == 0, err
    outputs.append(out.splitlines())
  assert outputs[0] == outputs[1] and len(set(outputs[0])) == 5


def test_infer_jsonl(workdir, capsys, tmp_path):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text('{"en": "Turn on", "id": 7}\n{"en": "Off {x} \\u2581"}\n', encoding='utf-8')
  code, _, err = call('infer', '--workdir', workdir, '--input', str(source), '--output',
                      str(target), '--max-length', '4', '--beams', '2', capsys=capsys)
  assert code == 0, err
  rows = [json.loads(line) for line in target.read_text(encoding='utf-8').splitlines()]
  assert [r['en'] for r in rows] == ['Turn on', 'Off {x} ▁'] and rows[0]['id'] == 7
  assert all(isinstance(r['output'], str) for r in rows)


@pytest.mark.parametrize('data, message', [
    (b'{"en": "a"}\n{"en": "b\xff"}\n', ':2: not UTF-8: byte 0xff at byte 9'),
    (b'{"en": "a"}\nnot json\n', ':2: not valid JSON'),
    (b'[1]\n', ':1: a JSON list, not an object'),
    (b'', 'holds no records'),
])
def test_bad_records_are_named_and_nothing_is_written(data, message, capsys, tmp_path):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_bytes(data)
  code, _, err = call('infer', '--workdir', 'unused', '--input', str(source), '--output',
                      str(target), capsys=capsys)
  assert code == 3 and message in err and err.count('\n') == 1
  assert not target.exists()


# -- other uses of infer ---------------------------------------------------------------------------

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
TEMPLATE = '{% for m in messages %}<s>{{ m.content }}{{ eos_token }}{% endfor %}a'


def saved(folder, family, spec, labels=(), **fields):
  """Makes a folder like that of `t5lab convert`, with a tiny model and random parameters."""
  model = small_models.shrink(family)
  model = model.__class__(**{**vars(model), **fields})
  c = config.from_model(model, spec)
  c.eval.max_length, c.eval.labels = 5, labels
  rundir.write_config(folder, config.to_dict(c))
  checkpoints = Checkpoints(folder / 'checkpoints', keep=0)
  checkpoints.save(0, {'params': small_models.random_params(model)}, meta={})
  checkpoints.wait()
  return str(folder)


@pytest.fixture(scope='module')
def talker(tmp_path_factory):
  """A LLaMA with one token per letter and a chat template."""
  folder = tmp_path_factory.mktemp('talker')
  (folder / 'vocabulary').mkdir()
  words = {token: i for i, token in enumerate(['<unk>', '<s>', '</s>', *LETTERS, ' '])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '<unk>'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex('.'), 'isolated')
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.add_special_tokens(['<s>', '</s>'])
  tokenizer.save(str(folder / 'vocabulary' / 'tokenizer.json'))
  (folder / 'vocabulary' / 'tokenizer_config.json').write_text(json.dumps(dict(
      bos_token='<s>', eos_token='</s>', unk_token='<unk>', chat_template=TEMPLATE)))
  return saved(folder, 'llama2/7b', 'tokenizer.json', start_id=1, eos_id=2)


def with_letters(folder):
  """Writes BERT's vocabulary of single letters."""
  (folder / 'vocabulary').mkdir()
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *LETTERS]
  (folder / 'vocabulary' / 'vocab.txt').write_text('\n'.join(words) + '\n')
  return folder


@pytest.fixture(scope='module')
def filler(tmp_path_factory):
  folder = with_letters(tmp_path_factory.mktemp('filler'))
  return saved(folder, 'bert/base', 'vocab.txt', eos_id=3, max_length=32)


def type_in(text, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', type('In', (), {'buffer': io.BytesIO(text.encode())}))


def test_chat_answers_each_line(talker, capsys, monkeypatch, tmp_path):
  lab = t5lab.load(talker)
  expected = [lab.chat([{'role': 'user', 'content': text}]) for text in ('hi', 'a dog')]
  assert expected != lab.generate(['hi', 'a dog'])
  type_in('hi\na dog\n', monkeypatch)
  code, out, err = call('infer', '--workdir', talker, '--chat', capsys=capsys)
  assert code == 0, err
  assert out == ''.join(f'{text}\n' for text in expected)
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text('{"inputs": "hi", "id": 7}\n{"inputs": "a dog"}\n')
  code, _, err = call('infer', '--workdir', talker, '--chat', '--input', str(source), '--output',
                      str(target), '--max-length', '3', capsys=capsys)
  assert code == 0, err
  rows = [json.loads(line) for line in target.read_text().splitlines()]
  short = [lab.chat([{'role': 'user', 'content': text}], length=3) for text in ('hi', 'a dog')]
  assert rows == [{'inputs': 'hi', 'id': 7, 'output': short[0]},
                  {'inputs': 'a dog', 'output': short[1]}]


def test_fill_mask_shows_the_best_words_of_each_mask(filler, capsys, monkeypatch, tmp_path):
  texts = ['a [MASK] c', '[MASK] b [MASK]']
  expected = t5lab.load(filler).fill_mask(texts)
  type_in('\n'.join(texts), monkeypatch)
  code, out, err = call('infer', '--workdir', filler, '--fill-mask', capsys=capsys)
  assert code == 0, err
  shown = [' | '.join(' · '.join(f'{word} {p:.4f}' for word, p in mask) for mask in masks)
           for masks in expected]
  assert out.splitlines() == shown and out.count('|') == 1 and out.count('·') == 12
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text(''.join(json.dumps({'inputs': text}) + '\n' for text in texts))
  code, _, err = call('infer', '--workdir', filler, '--fill-mask', '--input', str(source),
                      '--output', str(target), capsys=capsys)
  assert code == 0, err
  rows = [json.loads(line) for line in target.read_text().splitlines()]
  assert [row['inputs'] for row in rows] == texts
  assert [row['output'] for row in rows] == [
      [[{'word': word, 'probability': round(p, 4)} for word, p in mask] for mask in masks]
      for masks in expected]


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  folder = with_letters(tmp_path_factory.mktemp('judge'))
  return saved(folder, 'minilm/l6', 'vocab.txt', eos_id=3, max_length=32, classes=3,
               labels=('good', 'bad', 'fair'))


def test_an_encoder_classifies_or_embeds(judge, filler, capsys, monkeypatch, tmp_path):
  lab = t5lab.load(judge)
  texts = ['a b', 'c d e']
  best = [sorted(zip(lab.labels, map(float, row)), key=lambda pair: -pair[1])
          for row in lab.classify(texts)]
  type_in('\n'.join(texts), monkeypatch)
  code, out, err = call('infer', '--workdir', judge, capsys=capsys)
  assert code == 0, err
  assert out.splitlines() == [' · '.join(f'{label} {p:.4f}' for label, p in row) for row in best]

  # Records, of single texts and of pairs.
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text('{"inputs": "a b", "id": 7}\n{"inputs": ["a b", "c d e"]}\n')
  code, _, err = call('infer', '--workdir', judge, '--classify', '--input', str(source),
                      '--output', str(target), capsys=capsys)
  assert code == 0, err
  rows = [json.loads(line) for line in target.read_text().splitlines()]
  assert rows[0]['id'] == 7 and rows[0]['output'] == [
      {'label': label, 'probability': round(p, 4)} for label, p in best[0]]
  pair = lab.classify([('a b', 'c d e')])[0]
  assert {c['label']: c['probability'] for c in rows[1]['output']} == {
      label: round(float(p), 4) for label, p in zip(lab.labels, pair)}

  # Vectors, of which no digit is lost.
  type_in('\n'.join(texts), monkeypatch)
  code, out, err = call('infer', '--workdir', filler, '--embed', capsys=capsys)
  assert code == 0, err
  got = np.array([json.loads(line) for line in out.splitlines()], np.float32)
  np.testing.assert_array_equal(got, t5lab.load(filler).embed(texts))


@pytest.mark.parametrize('problem_type, classes', [('regression', 3), ('', 1)])
def test_scores_are_not_called_probabilities(problem_type, classes):
  c = config.base('minilm/l6', classes=classes)
  c.eval.problem_type = problem_type
  rows = infer._classes(lab_module.Lab(c, {}), np.array([1.5, -2., 3.][:classes]))
  assert [row['score'] for row in rows] == sorted([1.5, -2., 3.][:classes], reverse=True)
  assert rows[0]['label'] == ('LABEL_2' if classes == 3 else 'LABEL_0')
  assert infer._one_line(rows).startswith('LABEL_2 3.0000 · ' if classes == 3 else 'LABEL_0 1.5000')


@pytest.mark.parametrize('model, flags, data, code, message', [
    ('talker', ['--chat'], '{"text": "hi"}', 3,
     'row 1 must be {"inputs": TEXT}, got {"text": "hi"}'),
    ('talker', ['--chat'], '{"inputs": 7}', 3, 'row 1 must be {"inputs": TEXT}, got {"inputs": 7}'),
    ('talker', ['--fill-mask'], '{"inputs": "a"}', 2, 'no masked-token head'),
    ('talker', ['--chat', '--beams', '2'], '{"inputs": "a"}', 2, 'beams=2: beam search does not'),
    ('talker', ['--chat', '--fill-mask'], '{"inputs": "a"}', 2, 'not allowed with argument'),
    ('talker', ['--chat', '--task', 'ha_ende'], '{"inputs": "a"}', 2,
     '--task ha_ende adds a prompt'),
    ('filler', ['--chat'], '{"inputs": "a"}', 2, 'chat needs a decoder-only model'),
    ('filler', [], '{"inputs": "a"}', 2, 'is encoder-only and generates no text: use --fill-mask'),
    ('filler', ['--classify'], '{"inputs": "a"}', 2, 'has no classifier'),
    ('filler', ['--embed'], '{"inputs": ["a", "b"]}', 3, 'row 1 must be {"inputs": TEXT}, got'),
    ('judge', ['--task', 'ha_ende'], '{"inputs": "a"}', 2, 'this model can only classify'),
    ('judge', [], '{"inputs": ["a", 3]}', 3, 'TEXT} or {"inputs": [TEXT, TEXT]}, got {"inputs": ['),
    ('judge', ['--date', '2026-12-01'], '{"inputs": "a"}', 2, '--date is for --chat'),
    ('talker', ['--chat', '--date', '1.12.'], '{"inputs": "a"}', 2, 'date must be YYYY-MM-DD'),
    ('talker', ['--chat', '--template', 'rag'], '{"inputs": "a"}', 3, "no chat template 'rag'"),
    ('filler', ['--fill-mask'], '{"inputs": "[MASK]"}\n{"inputs": "a"}', 2,
     "text 2 of 2 has no [MASK]: 'a'"),
    ('workdir', ['--chat'], '{"inputs": "a"}', 2, 'chat needs a decoder-only model'),
    ('workdir', ['--fill-mask'], '{"inputs": "a"}', 2, 'no masked-token head'),
])
def test_a_use_that_the_model_lacks_is_one_line(model, flags, data, code, message, request, capsys,
                                                tmp_path):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text(data + '\n')
  folder = request.getfixturevalue(model)
  capsys.readouterr()          # drops what the fixture printed
  got, out, err = call('infer', '--workdir', folder, *flags, '--input', str(source),
                       '--output', str(target), capsys=capsys)
  assert got == code and message in err, err
  assert err.startswith('t5lab: ') and err.count('\n') == 1 and not out
  assert not list(tmp_path.glob('y*'))


@pytest.mark.parametrize('fields, mixture, shown', [
    (dict(enc_layers=2), 'ha_ende', "echo 'Turn on the light' | "),
    (dict(enc_layers=2), 'g2p_en_us', "echo 'lighthouse' | "),
    (dict(enc_layers=2), 'numpydoc_qa', '--input rows.jsonl'),
    (dict(enc_layers=2, dec_layers=0, classes=2), 'docs_match', '--classify'),
    (dict(enc_layers=2, dec_layers=0), 'books_lm', '--embed'),
])
def test_the_summary_suggests_a_use_of_the_model(fields, mixture, shown, capsys):
  c = config.base('tiny', **fields)
  c.data.mixture = mixture
  train.summary(c, 'runs/x', scoring.EvalResult({}, {}))
  assert shown in capsys.readouterr().out


def test_records_without_the_fields_of_the_task(workdir, capsys, tmp_path):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text('{"de": "a"}\n')
  code, _, err = call('infer', '--workdir', workdir, '--input', str(source), '--output',
                      str(target), capsys=capsys)
  assert code == 2 and 'needs the text fields en; missing: en' in err
  assert not list(tmp_path.glob('y*'))


def test_long_inputs_are_counted(workdir, capsys, tmp_path):
  source = tmp_path / 'x.txt'
  source.write_text('word ' * 40 + '\nshort\n')
  code, out, err = call('infer', '--workdir', workdir, '--input', str(source), '--max-length', '3',
                        capsys=capsys)
  assert code == 0 and out.count('\n') == 2
  assert '1 of 2 inputs are longer than 32 tokens, the limit in training' in err


@pytest.mark.parametrize('step, shown', [('latest', ['10']), ('best', None), ('all', ['5', '10'])])
def test_eval_prints_a_table_and_writes_files(workdir, step, shown, capsys):
  code, out, err = call('eval', '--workdir', workdir, '--step', step, '--config.eval.examples=4',
                        '--config.eval.samples=1', capsys=capsys)
  assert code == 0, err
  assert 'copy of the source' in out and 'raw' in out and 'ema' in out
  for number in shown or []:
    scores = json.loads((pathlib.Path(workdir) / 'eval' / f'{number}.json').read_text())
    assert scores['step'] == int(number) and 'ha_ende/ema/bleu' in scores


def test_eval_of_another_task_and_split(workdir, capsys):
  code, out, err = call('eval', '--workdir', workdir, '--task', 'docs_summarize', '--split',
                        'train', '--step', '5', '--config.eval.examples=2', capsys=capsys)
  assert code == 0, err
  assert 'rouge' in out and 'docs_summarize' in out
  scores = json.loads((pathlib.Path(workdir) / 'eval/5.docs_summarize.train.json').read_text())
  assert scores['step'] == 5 and 'docs_summarize/raw/rouge1' in scores
  code, _, err = call('eval', '--workdir', workdir, '--step', '7', capsys=capsys)
  assert code == 4 and 'no checkpoint of step 7' in err
  code, _, err = call('eval', '--workdir', workdir, '--step', 'newest', capsys=capsys)
  assert code == 2 and "step must be a number, 'latest' or 'best', got 'newest'" in err
