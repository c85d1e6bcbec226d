"""`t5lab data`: command lines and their results."""
import gzip
import json

import pytest

from t5lab.commands import data
from t5lab.errors import DataError, UsageError
from t5lab.programs import lab
from t5lab.tools.prepare import clean

ROWS = [{'text': 'Write to ann@x.org now. Please do it. It is not far.', 'n': 1},
        {'text': 'write to  ann@x.org now. Please do it. It is not far.', 'n': 2},
        {'text': 'Enable javascript in your browser.', 'n': 3}]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / 'in.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  return str(path)


def run(tool, *args):
  """Returns (the numbers of the records written, the report)."""
  assert data.main([tool, *map(str, args)]) == 0
  output = str(args[args.index('--output') + 1])
  with open(f'{output}.report.json') as f:
    report = json.load(f)
  with (gzip.open if output.endswith('.gz') else open)(output, 'rt') as f:
    return [json.loads(line)['n'] for line in f], report


def test_tools(source, tmp_path, capsys):
  out = tmp_path / 'o.jsonl'
  kept, report = run('clean', source, '--output', out, '--without', 'few_sentences,short_line')
  assert kept == [1]
  assert report['settings']['rules'] == [
      rule for rule in clean.RULES
      if rule not in ('few_sentences', 'short_line', 'bad_words', 'language')]
  assert capsys.readouterr().out == f'{out}: 1 records written, 3 read · {out}.report.json\n'
  kept, report = run('dedup', source, '--output', out, '--overwrite', '--exact')
  assert kept == [1, 3] and list(report['rules']) == ['exact']
  with pytest.raises(UsageError, match='o.jsonl exists; add --overwrite to replace it'):
    run('scrub', source, '--output', out)
  kept, report = run('scrub', source, '--output', out, '--overwrite')
  assert kept == [1, 2, 3] and report['rules']['email']['count'] == 2
  kept, report = run('augment', source, '--output', out, '--overwrite', '--method',
                     'span_deletion', '--copies', 2, '--rate', 0.5)
  assert kept == [1, 1, 1, 2, 2, 2, 3, 3, 3]
  assert report['settings'] == {
      'bad_rows': 0.01, 'method': 'span_deletion', 'copies': 2, 'seed': 0, 'rate': 0.5,
      'mean_span': 3.0, 'workdir': None, 'source': None, 'tag': ''}


def test_inputs_by_commas_globs_and_several_arguments(source, tmp_path):
  for name in 'abc':
    (tmp_path / f'{name}.tsv').write_text(f'text\tn\n{name}\t{name}\n')
  kept, report = run('scrub', f'{tmp_path}/b.tsv,{source}', f'{tmp_path}/[ac].tsv', '--output',
                     tmp_path / 'o.jsonl.gz')
  assert kept == ['b', 1, 2, 3, 'a', 'c']
  assert [entry['file'][-5:] for entry in report['inputs']] == ['b.tsv', 'jsonl', 'a.tsv', 'c.tsv']


def test_clean_with_a_list_of_words(source, tmp_path):
  (tmp_path / 'words').write_text('browser\n')
  kept, report = run('clean', source, '--output', tmp_path / 'o.jsonl', '--rules', 'bad_words',
                     '--bad-words', tmp_path / 'words')
  assert kept == [1, 2] and report['rules'] == {
      'bad_words': {'count': 1, 'examples': [{'row': f'{source}:3', 'text': ROWS[2]['text']}]}}


def test_decontaminate(source, tmp_path, capsys):
  evaluation = tmp_path / 'test.tsv'
  evaluation.write_text('q\tn\nEnable JavaScript in your browser\t1\n')
  out = tmp_path / 'o.jsonl'
  kept, report = run('decontaminate', source, '--output', out, '--against',
                     f'test={evaluation}', '--against-field', 'q')
  assert kept == [1, 2] and report['evaluations']['test']['training_rows'] == 1
  assert data.main(['decontaminate', source, '--output', f'{tmp_path}/p.jsonl', '--mode', 'report',
                    '--against', f'test={evaluation}', '--against-field', 'q']) == 0
  assert not (tmp_path / 'p.jsonl').exists() and (tmp_path / 'p.jsonl.report.json').exists()
  assert capsys.readouterr().out.splitlines()[-1] == (
      f'{tmp_path}/p.jsonl: 3 read · {tmp_path}/p.jsonl.report.json')


def test_back_translation(source, tmp_path, monkeypatch):
  calls = {}

  class Model:
    def generate(self, texts, **options):
      calls.update(texts=texts, options=options)
      return [text[:5] for text in texts]

  monkeypatch.setattr(lab, 'load', lambda workdir: calls.update(workdir=workdir) or Model())
  out = tmp_path / 'o.jsonl'
  kept, _ = run('augment', source, '--output', out, '--method', 'back_translation', '--field',
                'text', '--source', 'de', '--workdir', 'runs/x', '--tag', '<BT>')
  assert kept == [1, 2, 3]
  assert json.loads(out.read_text().splitlines()[0]) == {**ROWS[0], 'de': '<BT> Write'}
  assert calls == {'workdir': 'runs/x', 'texts': [row['text'] for row in ROWS],
                   'options': {'temperature': 0.}}


def test_vocab(tmp_path, monkeypatch):
  from t5lab.data import vocab
  from t5lab.tools.prepare import vocabulary
  monkeypatch.setattr(vocabulary, 'train', lambda lines, size: (
      list(lines), vocab.embedded_model(f't5lab_{size}'))[1])
  (tmp_path / 'a.txt').write_text('one\ntwo\n')
  out = tmp_path / 'v.model'
  assert data.main(['vocab', f'{tmp_path}/a.txt', '--output', str(out), '--size', '2048']) == 0
  assert out.read_bytes() == vocab.embedded_model('t5lab_2048')


@pytest.mark.parametrize('args, message', [
    ('', 'the following arguments are required: TOOL'),
    ('wash', "invalid choice: 'wash'"),
    ('clean {in}', r'required: --output \(see t5lab data clean --help\)'),
    ('clean --output {out}', 'required: INPUT'),
    ('clean {in} --output {out} --rules polcy', "unknown rule 'polcy'. Did you mean 'policy'"),
    ('clean {in} --output {out} --rules bad_words', 'needs --bad-words FILE'),
    ('scrub {in} --output {in}', 'is one of the inputs'),
    ('dedup {in} --output {out} --threshold 2',
     '--threshold must be a similarity above 0 and up to 1, got 2.0'),
    ('decontaminate {in} --output {out} --against x', '--against must be NAME=FILES, .*, got x'),
    ('decontaminate {in} --output {out} --against x={in} --against x={in}', 'x is given twice'),
    ('augment {in} --output {out} --method back_translation', 'needs --workdir DIR and --source'),
    ('augment {in} --output {out} --method back_translation --workdir x --source en',
     'needs one --field, the target column'),
    ('augment {in} --output {out} --method back_translation --workdir x --source text --field text',
     'other than --source text'),
    ('augment {in} --output {out} --method back_translation --workdir x --source en --field text '
     '--copies 2', '--copies must be 1 .*; got 2'),
    ('augment {in} --output {out} --method back_translation --workdir x --source en --field text '
     '--mean-span 2', '--mean-span cannot be used'),
    ('augment {in} --output {out} --method word_dropout --mean-span 2',
     '--mean-span needs --method span_deletion'),
    ('augment {in} --output {out} --method word_dropout --workdir x',
     '--workdir needs --method back_'),
    ('vocab {in} --output v.jsonl --size 1024', r'must end in \.model'),
    ('vocab {in} --output v.model --size 359',
     '--size must be above 359 .*, got 359; at least 512'),
    ('vocab {in} --output v.model --size 512 --max-sentences 0',
     '--max-sentences must be at least 1, got 0'),
])
def test_invalid_options(source, tmp_path, args, message):
  argv = [arg.format(**{'in': source, 'out': tmp_path / 'o.jsonl'}) for arg in args.split()]
  with pytest.raises(UsageError, match=message):
    data.main(argv)
  assert [p.name for p in tmp_path.iterdir()] == ['in.jsonl']


@pytest.mark.parametrize('args, message', [
    ('scrub {in}.gone --output {out}', 'in.jsonl.gone'),
    ('scrub {in} --output {out} --field txt', "no field 'txt'. Did you mean 'text'"),
    ('clean {in} --output {out} --bad-words {in}.words', 'cannot read'),
    ('decontaminate {in} --output {out} --against x={in}.gone', 'in.jsonl.gone'),
])
def test_missing_data(source, tmp_path, args, message):
  argv = [arg.format(**{'in': source, 'out': tmp_path / 'o.jsonl'}) for arg in args.split()]
  with pytest.raises(DataError, match=message):
    data.main(argv)
  assert [p.name for p in tmp_path.iterdir()] == ['in.jsonl']


@pytest.mark.parametrize('tool', ['', 'clean', 'dedup', 'decontaminate', 'scrub', 'augment',
                                  'vocab'])
def test_help_describes_every_tool(tool, capsys):
  with pytest.raises(SystemExit) as exit_:
    data.main([tool, '--help'] if tool else ['--help'])
  assert exit_.value.code == 0
  text = capsys.readouterr().out
  assert max(map(len, text.splitlines())) <= 100 and '==' not in text
  for word in {'': ['clean', 'dedup', 'decontaminate', 'scrub', 'augment', 'vocab', '.report.json'],
               'clean': [*clean.RULES, '--bad-words', 'Raffel'],
               'dedup': ['--threshold', '850 bytes', 'Lee et al.'],
               'decontaminate': ['--against', 'Brown et al.', '--mode'],
               'scrub': ['--field', 'phone'], 'augment': ['--seed', 'back-translation', '--tag'],
               'vocab': ['--size', '--max-sentences', '.model']}[tool]:
    assert word in text
