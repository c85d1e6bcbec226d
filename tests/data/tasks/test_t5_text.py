"""Every data set of the papers by hand: a row as TFDS has it -> the text that T5 makes of it."""
import numpy as np
import pytest

from t5lab.data.tasks import t5_text

PAIR = {'sentence1': 'It rains.', 'sentence2': 'It pours.'}
ROWS = {
    'glue/cola': ({'sentence': 'It rains.', 'label': 1, 'idx': 7},
                  'cola sentence: It rains.', 'acceptable', {'idx': 7}),
    'glue/sst2': ({'sentence': 'a bore ', 'label': 0, 'idx': 0},
                  'sst2 sentence: a bore ', 'negative', {'idx': 0}),
    'glue/mrpc': ({**PAIR, 'label': 1, 'idx': 2},
                  'mrpc sentence1: It rains. sentence2: It pours.', 'equivalent', {'idx': 2}),
    'glue/stsb': ({**PAIR, 'label': np.float32(3.25), 'idx': 3},
                  'stsb sentence1: It rains. sentence2: It pours.', '3.2', {'idx': 3}),
    'glue/qqp': ({'question1': 'Why?', 'question2': 'How?', 'label': 0, 'idx': 4},
                 'qqp question1: Why? question2: How?', 'not_duplicate', {'idx': 4}),
    'glue/mnli': ({'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 0, 'idx': 5},
                  'mnli hypothesis: It is wet. premise: It rains.', 'entailment', {'idx': 5}),
    'glue/mnli_matched': ({'premise': 'A.', 'hypothesis': 'B.', 'label': 1, 'idx': 6},
                          'mnli hypothesis: B. premise: A.', 'neutral', {'idx': 6}),
    'glue/mnli_mismatched': ({'premise': 'A.', 'hypothesis': 'B.', 'label': 2, 'idx': 6},
                             'mnli hypothesis: B. premise: A.', 'contradiction', {'idx': 6}),
    'glue/ax': ({'premise': 'A.', 'hypothesis': 'B.', 'label': -1, 'idx': 8},
                'mnli hypothesis: B. premise: A.', '<unk>', {'idx': 8}),
    'glue/qnli': ({'question': 'Who?', 'sentence': 'Ada.', 'label': 0, 'idx': 9},
                  'qnli question: Who? sentence: Ada.', 'entailment', {'idx': 9}),
    'glue/rte': ({**PAIR, 'label': 1, 'idx': 10},
                 'rte sentence1: It rains. sentence2: It pours.', 'not_entailment', {'idx': 10}),
    'glue/wnli': ({**PAIR, 'label': 1, 'idx': 11},
                  'wnli sentence1: It rains. sentence2: It pours.', 'entailment', {'idx': 11}),
    'super_glue/boolq': ({'question': 'is it wet', 'passage': 'Rain -- Wet.', 'label': 1, 'idx': 1},
                         'boolq passage: Rain -- Wet. question: is it wet', 'True', {'idx': 1}),
    'super_glue/cb': ({'premise': 'A.', 'hypothesis': 'B.', 'label': 1, 'idx': 2},
                      'cb hypothesis: B. premise: A.', 'contradiction', {'idx': 2}),
    'super_glue/copa': (
        {'premise': 'It rained.', 'choice1': 'I got wet.', 'choice2': 'I slept.',
         'question': 'effect', 'label': 0, 'idx': 3},
        'copa choice1: I got wet. choice2: I slept. premise: It rained. question: effect',
        'choice1', {'idx': 3}),
    'super_glue/multirc': (
        {'paragraph': '<b>Sent 1: </b>It rained.<br><b>Sent 2: </b>Ada ran.<br>',
         'question': 'Who ran?', 'answer': 'Ada', 'label': 1, 'idx/paragraph': 4,
         'idx/question': 13},
        'multirc question: Who ran? answer: Ada paragraph: Sent 1: It rained. Sent 2: Ada ran. ',
        'True', {'idx/paragraph': 4, 'idx/question': 13}),
    'super_glue/rte': ({'premise': 'A.', 'hypothesis': 'B.', 'label': 0, 'idx': 5},
                       'rte hypothesis: B. premise: A.', 'entailment', {'idx': 5}),
    'super_glue/wic': (
        {'word': 'bank', 'sentence1': 'A river bank.', 'sentence2': 'The bank pays.', 'label': 0,
         'idx': 6},
        'wic sentence1: A river bank. sentence2: The bank pays. word: bank', 'False', {'idx': 6}),
    'super_glue/axb': ({'sentence1': 'A.', 'sentence2': 'B.', 'label': -1, 'idx': 7},
                       'rte hypothesis: B. premise: A.', '<unk>', {'idx': 7}),
    'super_glue/axg': ({'premise': 'A.', 'hypothesis': 'B.', 'label': -1, 'idx': 8},
                       'rte hypothesis: B. premise: A.', '<unk>', {'idx': 8}),
    'super_glue/wsc.fixed': (
        {'text': 'Bob asked Tom if he can lend some money.', 'span1_text': 'Bob', 'span2_index': 4,
         'span2_text': 'he', 'label': 0, 'idx': 9},
        'wsc: Bob asked Tom if *he* can lend some money.', 'Bob', {'label': 0, 'idx': 9}),
    'super_glue/wsc.fixed/train': (
        {'text': 'Bob asked Tom if he can lend some money.', 'span1_text': 'Tom', 'span2_index': 4,
         'span2_text': 'he', 'label': 1, 'idx': 9},
        'wsc: Bob asked Tom if *he* can lend some money.', 'Tom', {'label': 1, 'idx': 9}),
    'definite_pronoun_resolution': (
        {'sentence': 'Bob asked the chef if he, he said, can cook.', 'pronoun': 'he',
         'candidates': ['Bob', 'The chef'], 'label': 1},
        'wsc: Bob asked the chef if *he*, he said, can cook.', 'The chef', {}),
    'cnn_dailymail': ({'article': 'It rained .', 'highlights': 'Rain .\nWet .'},
                      'summarize: It rained .', 'Rain .\nWet .', {}),
    'xsum': ({'document': 'It rained.', 'summary': 'Rain.'}, 'summarize: It rained.', 'Rain.', {}),
    'gigaword': ({'document': 'it rained .', 'summary': 'rain'},
                 'summarize: it rained .', 'rain', {}),
    'squad': (
        {'question': "Who's the U.S. president (1961)?", 'answers/text': ['1961-63', 'JFK'],
         'context': 'John F. Kennedy, "JFK", 1961-63.'},
        "question: Who ' s the U . S . president ( 1961 ) ? "
        'context: John F . Kennedy , " JFK " , 1961 - 63 . ', '1961 - 63',
        {'answers': ['1961 - 63', 'JFK']}),
    'squad/context_free': (
        {'question': '"JFK"  who?', 'answers/text': ['Kennedy']},
        'squad trivia question: " JFK " who ? ', 'Kennedy', {'answers': ['Kennedy']}),
    'natural_questions_open': (
        {'question': 'who are the twins', 'answer': ['Ada and Bo', 'Bo and Ada']},
        'nq question: who are the twins', 'Ada and Bo', {'answers': ['Ada and Bo', 'Bo and Ada']}),
    'trivia_qa': (
        {'question': 'Who?', 'answer/value': 'Ada L.', 'answer/aliases': ['Lady L', 'Ada L.']},
        'trivia_qa question: Who?', 'Ada L.', {'answers': ['Lady L', 'Ada L.']}),
    'web_questions': ({'question': 'who?', 'answers': ['Ada', 'Bo']},
                      'wq question: who?', 'Ada', {'answers': ['Ada', 'Bo']}),
}


@pytest.mark.parametrize('name', [n for n in t5_text.TEXTS if n != 'super_glue/record'])
def test_a_row_of_every_data_set(name):
  row, inputs, targets, rest = ROWS[name]
  text = t5_text.TEXTS[name]
  assert text.fn(row) == [{'inputs': inputs, 'targets': targets, **rest}]
  assert set(text.columns) == set(row)
  assert text.extra == {key: type(v) for key, v in rest.items()}


RECORD = {
    'query': 'A @placeholder is a bird.', 'entities': ['penguin', 'potato', 'pigeon'],
    'passage': 'It swims.\n@highlight\nIt flies\n@highlight\n"Yes"\n@highlight\nEnd',
    'answers': ['penguin', 'pigeon'], 'idx/passage': 3, 'idx/query': 11}


def test_record_has_an_example_for_each_answer():
  text = t5_text.TEXTS['super_glue/record']
  inputs = ('record query: A @placeholder is a bird. entities: penguin, potato, pigeon '
            'passage: It swims. It flies. "Yes" End')
  rest = {'answers': ['penguin', 'pigeon'], 'idx/passage': 3, 'idx/query': 11}
  assert text.fn(RECORD) == [{'inputs': inputs, 'targets': 'penguin', **rest},
                             {'inputs': inputs, 'targets': 'pigeon', **rest}]
  assert text.fn({**RECORD, 'answers': []}) == [
      {'inputs': inputs, 'targets': '<unk>', **rest, 'answers': []}]
  assert set(text.columns) == set(RECORD)
  assert text.extra == {'answers': list, 'idx/passage': int, 'idx/query': int}


@pytest.mark.parametrize('label, text', [
    (3.4, '3.4'), (5, '5.0'), (0, '0.0'), (2.5, '2.4'), (2.7, '2.8'), (1.5, '1.6'), (3.3, '3.2'),
    (0.1, '0.0'), (-1, '-1.0')])
def test_stsb_rounds_to_fifths_half_to_even_in_float32(label, text):
  """2.5 * 5 = 12.5 -> 12, 1.5 * 5 = 7.5 -> 8; 3.3 and 0.1 are halves in float32 alone."""
  row = {**PAIR, 'label': np.float32(label), 'idx': 0}
  assert t5_text.TEXTS['glue/stsb'].fn(row)[0]['targets'] == text


def test_missing_labels_and_answers():
  row = {**ROWS['super_glue/multirc'][0], 'label': -1}
  assert t5_text.TEXTS['super_glue/multirc'].fn(row)[0]['targets'] == '<unk>'
  squad = t5_text.TEXTS['squad'].fn({'question': 'a', 'context': 'b', 'answers/text': []})
  assert squad == [{'inputs': 'question: a context: b', 'targets': '', 'answers': []}]
  web = t5_text.TEXTS['web_questions'].fn({'question': 'a', 'answers': []})
  assert web == [{'inputs': 'wq question: a', 'targets': '<unk>', 'answers': []}]


@pytest.mark.parametrize('source, target, prompt', [
    ('en', 'de', 'translate English to German: '), ('en', 'fr', 'translate English to French: '),
    ('en', 'ro', 'translate English to Romanian: '), ('zh', 'en', 'translate Chinese to English: '),
    ('kk', 'en', 'translate Kazakh to English: ')])
def test_translation(source, target, prompt):
  text = t5_text.translate(source, target)
  assert text.columns == (source, target)
  assert text.fn({source: 'Das ist gut.', target: '{x}'}) == [
      {'inputs': prompt + 'Das ist gut.', 'targets': '{x}'}]


@pytest.mark.parametrize('text, index, pronoun, marked', [
    ('Tom is here if he asks and he can', 4, 'he', 'Tom is here if *he* asks and he can'),
    ('Tom is here if he asks and he can', 7, 'he', 'Tom is here if he asks and *he* can'),
    # the two rows that T5 lists
    ('The boy continued to whip the pony , and eventually the pony threw him over. John laughed '
     'out quite loud. "Good for him," he said. ', 21, 'him',
     'The boy continued to whip the pony , and eventually the pony threw him over. John laughed '
     'out quite loud. "Good for *him* ," he said.'),
    ('When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic '
     'pebble in an iron safe . Some day they might want to use it , but really for now, what more '
     'could they wish for?', 28, 'it',
     'When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic '
     'pebble in an iron safe . Some day they might want to use *it* , but really for now, what '
     'more could they wish for?')])
def test_the_pronoun_is_marked(text, index, pronoun, marked):
  assert t5_text.mark_pronoun(text, index, pronoun) == marked


def test_a_pronoun_that_is_not_there():
  with pytest.raises(ValueError, match="no word is the pronoun 'he' in: Then she left"):
    t5_text.mark_pronoun('Then she left', 1, 'he')


def test_wsc_trains_on_true_rows_only():
  row = ROWS['super_glue/wsc.fixed/train'][0]
  assert t5_text.TEXTS['super_glue/wsc.fixed/train'].fn({**row, 'label': 0}) == []
  assert t5_text.TEXTS['super_glue/wsc.fixed/train'].fn({**row, 'label': -1}) == []


def test_a_pronoun_is_no_pattern():
  assert t5_text.mark_pronoun('A bxc b.c d', 1, 'b.c') == 'A bxc *b.c* d'
  row = {'sentence': 'A b.c d', 'pronoun': 'b.c', 'candidates': ['A', 'd'], 'label': 0}
  fn = t5_text.TEXTS['definite_pronoun_resolution'].fn
  assert fn(row)[0]['inputs'] == 'wsc: A *b.c* d'
  assert fn({**row, 'sentence': 'A bxc b.c.'})[0]['inputs'] == 'wsc: A bxc *b.c*.'


# Back from text


def test_scores_and_classes():
  assert [t5_text.to_score(x) for x in ('3.4', '-1.0', '', 'x', 'nan', 'inf')] == [
      3.4, -1., -1., -1., -1., -1.]
  cb = t5_text.to_class('cb')
  assert [cb(x) for x in ('entailment', 'contradiction', 'neutral', 'Neutral', '<unk>', '')] == [
      0, 1, 2, -1, -1, -1]
  assert t5_text.to_class('wnli')('entailment', example={}, is_target=True) == 1


def test_values_in_groups():
  example = {'idx/paragraph': np.int32(4), 'idx/question': np.int32(13),
             'idx/passage': np.int32(3), 'idx/query': np.int32(11),
             'answers': np.array([b'pinguin', 'Möwe'.encode()], object)}
  assert t5_text.multirc_value('True', example=example, is_target=True) == {
      'value': 1, 'group': (4, 13)}
  assert t5_text.multirc_value('maybe', example=example) == {'value': -1}
  assert t5_text.record_value('pinguin', example=example, is_target=True) == {
      'value': ['pinguin', 'Möwe'], 'group': (3, 11)}
  assert t5_text.record_value('potato', example=example) == {'value': 'potato'}


@pytest.mark.parametrize('referent, prediction, same', [
    ('The cat', 'cat', 1), ('cat', 'the black Cat ', 1), ('fuzzy bunny', 'bunny', 1),
    ('cat', 'dog', 0), ('black cat', 'white cat', 0), ("Bob's hat", 'Bob', 0), ('Bob', "Bob's", 0),
    ("Bob's hat", 'hat', 0),
    ("Bob's hat", "Bob's", 1), ('cat', '', 0), ('cat', 'the', 0), ('the cat', ' ', 0)])
def test_the_lenient_match_of_wsc(referent, prediction, same):
  example = {'label': np.int32(0), 'targets_pretokenized': referent.encode()}
  assert t5_text.wsc_value(prediction, example=example) == same
  assert t5_text.wsc_value(referent, example=example, is_target=True) == 0
  assert t5_text.wsc_value(referent, example={**example, 'label': 1}, is_target=True) == 1
