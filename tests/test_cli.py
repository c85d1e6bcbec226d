"""The commands as a person types them: output, exit codes, one line for a mistake."""

import io
import json
import pathlib
import subprocess
import sys

import pytest

from t5lab import cli, config
from t5lab.training import loop

QUICKSTART = str(pathlib.Path(__file__).parent.parent / 'configs' / 'quickstart.py')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  loop.train(config.load(QUICKSTART + ':tiny', {'checkpoint.best': 'ha_ende/ema/loss'}), path)
  return str(path)


def call(*argv, capsys):
  code = cli.main(list(argv))
  out = capsys.readouterr()
  return code, out.out, out.err


def test_help_of_every_command(capsys):
  code, out, _ = call('--help', capsys=capsys)
  assert code == 0 and all(name in out for name in cli.COMMANDS)
  for name in cli.COMMANDS:
    done = subprocess.run([sys.executable, '-m', 't5lab.cli', name, '--help'],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and '--workdir' in done.stdout
  code, out, _ = call('--version', capsys=capsys)
  assert code == 0 and out.count('.') == 2


@pytest.mark.parametrize('argv, code, message', [
    (['trian'], 2, "no command 'trian'. Did you mean 'train'"),
    (['train'], 2, 'the following arguments are required: --config, --workdir'),
    (['train', '--config', 'no.py', '--workdir', 'x'], 2, "no config file 'no.py'"),
    (['train', '--config', QUICKSTART, '--workdir', 'x', '--config.optim.lrr=1'], 2,
     "unknown config key 'optim.lrr'. Did you mean 'lr'"),
    (['train', '--config', QUICKSTART, '--workdir', 'x', '--config.optim.lr'], 2, 'needs a value'),
    (['eval', '--workdir', 'nowhere'], 2, 'nowhere'),
    (['infer', '--workdir', 'nowhere', '--input', 'no.jsonl'], 3, 'cannot read no.jsonl'),
    (['eval', '--workdir', 'x', '--config.optim.lr=1'], 2, 'eval takes changes of eval.* only'),
])
def test_a_mistake_is_one_line_with_its_code(argv, code, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  got, out, err = call(*argv, capsys=capsys)
  assert got == code and message in err
  assert err.startswith('t5lab: ') and err.count('\n') == 1 and not out
  assert not list(tmp_path.iterdir())


def test_an_internal_error_is_one_line_too_and_debug_shows_it(capsys, monkeypatch):
  monkeypatch.setattr(config, 'load', lambda *a: 1 / 0)
  argv = ['train', '--config', QUICKSTART, '--workdir', 'x']
  code, _, err = call(*argv, capsys=capsys)
  assert code == 70 and 'ZeroDivisionError' in err and err.count('\n') == 1
  with pytest.raises(ZeroDivisionError):
    cli.main([*argv, '--debug'])


def test_infer_lines(workdir, capsys, monkeypatch):
  text = 'Turn on the light\nSélectionner\n\nOff'
  monkeypatch.setattr(sys, 'stdin', type('In', (), {'buffer': io.BytesIO(text.encode())}))
  code, out, err = call('infer', '--workdir', workdir, capsys=capsys)
  assert code == 0, err
  assert out.count('\n') == 4


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
    (b'{"en": "a"}\n{"en": "b\xff"}\n', ':2: byte 9 (0xff) is not UTF-8'),
    (b'{"en": "a"}\nnot json\n', ':2: not JSON'),
    (b'[1]\n', ':1: expected a JSON object, found list'),
    (b'', 'is empty'),
])
def test_bad_rows_are_named_and_nothing_is_written(data, message, capsys, tmp_path):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_bytes(data)
  code, _, err = call('infer', '--workdir', 'unused', '--input', str(source), '--output',
                      str(target), capsys=capsys)
  assert code == 3 and message in err and err.count('\n') == 1
  assert not target.exists()


def test_rows_without_the_fields_of_the_task(workdir, capsys, tmp_path):
  source, target = tmp_path / 'x.jsonl', tmp_path / 'y.jsonl'
  source.write_text('{"de": "a"}\n')
  code, _, err = call('infer', '--workdir', workdir, '--input', str(source), '--output',
                      str(target), capsys=capsys)
  assert code == 2 and 'needs the text fields en; missing: en' in err
  assert not list(tmp_path.glob('y*'))


def test_long_inputs_are_counted_not_refused(workdir, capsys, tmp_path):
  source = tmp_path / 'x.txt'
  source.write_text('word ' * 200 + '\nshort\n')
  code, out, err = call('infer', '--workdir', workdir, '--input', str(source), '--max-length', '3',
                        capsys=capsys)
  assert code == 0 and out.count('\n') == 2
  assert '1 of 2 inputs are longer than the 32 tokens' in err


@pytest.mark.parametrize('step, shown', [('latest', ['10']), ('best', None), ('5', ['5']),
                                         ('all', ['5', '10'])])
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
                        'train', '--config.eval.examples=2', capsys=capsys)
  assert code == 0, err
  assert 'rouge' in out and 'docs_summarize' in out
  code, _, err = call('eval', '--workdir', workdir, '--step', '7', capsys=capsys)
  assert code == 4 and 'no checkpoint of step 7' in err
  code, _, err = call('eval', '--workdir', workdir, '--step', 'newest', capsys=capsys)
  assert code == 2 and 'latest or best' in err
