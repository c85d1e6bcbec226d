"""`t5lab convert --explain`, and the table of architectures that documents show."""

import json
from pathlib import Path

from hf_models import MODELS, save
import pytest

from t5lab import cli
from t5lab.models import families
from t5lab.tools.interop import architectures, explain

ROOT = Path(__file__).parents[3]


def run(capsys, *argv):
  code = cli.main(['convert', '--explain', *map(str, argv)])
  out = capsys.readouterr()
  return code, ' '.join(out.out.split()), out.err


@pytest.mark.parametrize('name, texts', [
    ('t5_1_1', ['architecture: encoder-decoder, 3 encoder layers and 2 decoder layers',
                'feed-forward 64 (gelu × linear), RMSNorm before each sublayer',
                'relative positions in 32 buckets', 'the softmax matrix is separate',
                'heads: language model', 'tokenizer: none was found', 'generation: start 0, end 1',
                'writes to: hf, as T5ForConditionalGeneration', 'writes to: t5x']),
    ('gemma3', ['rotary positions, theta 10000, linear scaling (8.0,)',
                'window of 3 in 2 of 3 layers', 'norms on queries and keys',
                'RMSNorm around each sublayer', 'the softmax matrix is the embedding',
                'writes to: hf, as Gemma3ForCausalLM',
                'does not write to: t5x: model.embed_scale=True']),
    ('bert_spans', ['architectures = ["BertForQuestionAnswering"]', 'pooling: mean',
                    'classifier of the ends of an answer: 2 classes',
                    'writes to: hf, as BertForQuestionAnswering']),
    ('t5gemma2', ["does not write to: hf: Hugging Face's T5GemmaForConditionalGeneration"])])
def test_what_was_recognised(name, texts, tmp_path, capsys):
  save(name, tmp_path)
  code, out, err = run(capsys, tmp_path)
  assert code == 0 and not err
  assert out.startswith('format: hf config.json: model_type = ')
  for text in texts:
    assert text in out


def test_a_refusal_comes_after_what_the_files_say(tmp_path, capsys):
  save('bert_bare', tmp_path)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'model_type': 'modernbert'}))
  code, out, err = run(capsys, tmp_path)
  assert code == 2 and 'model_type = "modernbert"' in out
  assert 'its first layer has no norm' in err and err.count('\n') == 1


@pytest.mark.parametrize('argv, message', [
    (['x', 'y', '--to', 'hf'], '--explain writes nothing: leave out DST and --to'),
    (['missing'], 'cannot read missing/config.json: No such file')])
def test_wrong_arguments_of_explain(argv, message, capsys):
  code, _, err = run(capsys, *argv)
  assert code == 2 and message in err


def test_a_conversion_needs_its_arguments(capsys):
  assert cli.main(['convert', 'src', '--from', 'hf']) == 2
  assert 'convert needs DST, --to; or --explain SRC alone' in capsys.readouterr().err


def test_the_format_is_guessed(tmp_path):
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 't5x').mkdir()
  (tmp_path / 't5x' / 'checkpoint').touch()
  assert [explain.guess_format(tmp_path / name) for name in ('m.gguf', 'run', 't5x', 'other')] == [
      'gguf', 't5lab', 't5x', 'hf']


@pytest.mark.parametrize('name', architectures.PAGES)
def test_pages_show_the_table(name):
  """`python -m t5lab.tools.interop.architectures` writes them."""
  text = (ROOT / name).read_text()
  assert architectures.page(text, architectures.PAGES[name]()) == text


def test_every_class_and_family_of_the_table_exists():
  import transformers
  for row in architectures.TABLE:
    for name in row.classes:
      assert hasattr(transformers, name), name
    for family in row.families:
      assert any(name.split('/')[0] == family for name in families.ROWS), family
  assert not architectures.FORMATS.keys() & architectures.LEFT_OUT.keys()
  tested = {MODELS[name]().config.model_type for name in MODELS}
  assert architectures.FORMATS.keys() - tested == {'switch_transformers', 'camembert'}
