import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t5lab.data.tasks.own_files import OwnFiles
from t5lab.errors import DataError, UsageError

FIELDS = {'inputs': 'en', 'targets': 'de'}


def own(path='x.jsonl', prompt='', fields=None, **options):
  return OwnFiles({'train': str(path)}, fields or FIELDS, prompt, **options)


def examples(own_data, split='train', shard=(0, 1)):
  return [own_data.example(record.fields) for record in own_data.reader(split, shard)]


def put(path, lines):
  path.write_text(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines))
  return path


def test_examples_of_pairs(tmp_path):
  path = put(tmp_path / 'a.jsonl', [{'en': 'Hi {de}', 'de': 'Hallo {{', 'n': 1},
                                    {'de': '}\n{}', 'en': '{0} %s\\'}])
  assert examples(own(path)) == [
      {'inputs': 'Hi {de}', 'targets': 'Hallo {{', 'answers': ['Hallo {{']},
      {'inputs': '{0} %s\\', 'targets': '}\n{}', 'answers': ['}\n{}']}]
  assert own(path, '{de}').columns() == ['de']
  prompt = own(path, '{{"{n}"}} ')
  assert prompt.columns() == ['n', 'de']
  prompt = own(path, 'to {{German}}: {en}\n({en})')
  assert prompt.columns() == ['en', 'de']
  assert prompt.inputs_for('Hi') == prompt.inputs_for({'en': 'Hi'}) == 'to {German}: Hi\n(Hi)'
  assert [row['inputs'] for row in examples(prompt)] == [
      'to {German}: Hi {de}\n(Hi {de})', 'to {German}: {0} %s\\\n({0} %s\\)']


def test_prompt_of_several_columns(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('my question,con.text[0],answer\nWho?,"It was\nme.",me\n')
  own_data = own(path, 'question: {my question} context: {con.text[0]}',
                 {'inputs': 'unused', 'targets': 'answer'})
  own_data.check()
  assert own_data.columns() == ['my question', 'con.text[0]', 'answer']
  assert examples(own_data) == [
      {'inputs': 'question: Who? context: It was\nme.', 'targets': 'me', 'answers': ['me']}]
  assert own_data.fill_prompt({'my question': 'a', 'con.text[0]': '{my question}'}) == (
      'question: a context: {my question}')
  with pytest.raises(DataError, match=r"needs the column 'con.text\[0\]'. Did you mean 'con.text'"):
    own_data.fill_prompt({'my question': 'a', 'con.text': 'b'})


def test_text_alone(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one {x}\ntwo\n')
  own_data = own(path, fields={'inputs': '', 'targets': 'text'})
  own_data.check()
  assert own_data.columns() == ['text']
  assert examples(own_data) == [
      {'inputs': '', 'targets': 'one {x}', 'answers': ['one {x}']},
      {'inputs': '', 'targets': 'two', 'answers': ['two']}]


def test_several_answers(tmp_path):
  rows = [{'en': 'a', 'de': ['x', 'y']}, {'en': 'b', 'de': 'z'}]
  own_data = own(put(tmp_path / 'a.jsonl', rows))
  assert examples(own_data) == [
      {'inputs': 'a', 'targets': 'x', 'answers': ['x', 'y']},
      {'inputs': 'b', 'targets': 'z', 'answers': ['z']}]
  pq.write_table(pa.table({'en': ['a'], 'de': [['x', 'y']]}), tmp_path / 'a.parquet')
  assert examples(own(tmp_path / 'a.parquet')) == [
      {'inputs': 'a', 'targets': 'x', 'answers': ['x', 'y']}]
  rows = [{'en': ['a'], 'de': 'x'}]
  reader = own(put(tmp_path / 'b.jsonl', rows), bad_rows=1.).reader('train')
  assert list(reader) == [] and reader.problems[0][2] == "field 'en' is list, not text"
  reader = own(tmp_path / 'a.jsonl', '{de}', bad_rows=1.).reader('train')      # lists have no text
  assert [row.line for row in reader] == [2]
  assert reader.problems[0][2] == "field 'de' is list, not text"


def test_bad_rows_and_shards(tmp_path):
  path = put(tmp_path / 'a.jsonl', [{'en': str(i), 'de': 'x' if i % 10 else ''} for i in range(30)])
  with pytest.raises(DataError, match='^3 of 30 records are bad, 10 %; the limit is 1 %'):
    examples(own(path))
  own_data = own(path, bad_rows=0.1)
  assert [row['inputs'] for row in examples(own_data, 'train', (1, 2))] == [
      str(i) for i in range(1, 30, 2)]
  assert len(examples(own_data, 'train', (0, 2))) == 12     # all bad ones: the whole is judged


def test_unknown_split():
  with pytest.raises(UsageError, match="data.files has no split 'trian'. Did you mean 'train'"):
    examples(own(), 'trian')


@pytest.mark.parametrize('prompt, message', [
    ('{', "'{': Single '{' encountered"), ('a}: {en}', "Single '}' encountered"),
    ('{en', "expected '}' before end of string"), ('{en{de}}', "unexpected '{' in field name"),
    ('{}', '{} names no column'), ('a {0}', '{0} names no column'), ('{ }', '{ } names no column'),
    ('{en!r}', '{en} has a format after its name'), ('{en:>9}', '{en} has a format'),
    ('{en:{de}}', '{en} has a format'), ('{"q": {en}}', '{"q"} has a format after its name')])
def test_prompts_with_wrong_braces(prompt, message):
  with pytest.raises(UsageError) as e:
    own(prompt=prompt).check()
  assert message in str(e.value) and str(e.value).startswith(f'data.prompt={prompt!r}: ')
  assert str(e.value).endswith('a column is {name}, a brace {{ or }}')


@pytest.mark.parametrize('own_data, message', [
    (own(prompt='translate: '), "names no column, so all inputs would be the same; did you mean "
     "'translate: {en}'?"),
    (own(prompt='{{en}}'), "did you mean '{{en}}{en}'?"),
    (own(prompt='{en}', fields={'inputs': '', 'targets': 'de'}), 'there are none: set one of them'),
    (own(fields={'inputs': 'en', 'targets': ''}),
     "data.fields.targets must name a column, got ''; for unlabelled text"),
    (own(fields={'input': 'en', 'targets': 'de'}), "'targets': column}, got {'input': 'en', "),
    (own(path=''), "data.files must name files for every split, got {'train': ''}"),
    (OwnFiles({}, FIELDS), 'data.files must name files for every split, got {}')])
def test_settings_that_make_no_examples(own_data, message):
  with pytest.raises(UsageError) as e:
    own_data.check()
  assert message in str(e.value)


@pytest.mark.parametrize('own_data', [own(), own(prompt='{{en}} {en}: '), own(bad_rows=0.),
                                      own(fields={'inputs': '', 'targets': 'text'})])
def test_settings_that_do(own_data):
  own_data.check()


def test_fingerprint():
  assert own(prompt='{en}').fingerprint() == '49a0bf32d2205fb6b57ee59fbd039d60'
  same = OwnFiles({'train': 'x.jsonl'}, {'targets': 'de', 'inputs': 'en'}, '{en}', bad_rows=0.5)
  assert same.fingerprint() == own(prompt='{en}').fingerprint()
  others = [own(), own('y.jsonl', '{en}'), own(prompt='{en} '),
            OwnFiles({'test': 'x.jsonl'}, FIELDS, '{en}'),
            own(prompt='{en}', fields={'inputs': 'en', 'targets': 'fr'})]
  assert len({own_data.fingerprint() for own_data in [*others, same]}) == 6
