"""Planted repeats, cuts and unknown tokens are counted exactly, and shown."""

import base64
import dataclasses
import html.parser
import re

import numpy as np
import pytest

from t5lab.data import vocab
from t5lab.data.batches import features
from t5lab.data.batches.pipeline import Pipeline
from t5lab.data.tasks import registry
from t5lab.data.tasks.seqio_tf import seqio
from t5lab.data.vocab.base import UNKNOWN, Vocab
from t5lab.tools.inspect import page, round_trip, statistics, view

LENGTHS = {'inputs': 4, 'targets': 3}
LETTERS = {3: 'a', 4: 'B', 5: 'c', 6: '<', 7: '\n', 8: '\0'}
WORDS = Vocab(          # 1 is the end, 2 unknown, 4 a letter that no round trip restores
    'letters', 'f' * 64, 10, 1,
    lambda text: [{v: k for k, v in LETTERS.items()}.get(c, 2) for c in text.lower()],
    lambda ids: ''.join(LETTERS.get(i, UNKNOWN if i == 2 else '') for i in ids),
    lambda i: LETTERS.get(i, ''), unk_id=2, sentinels=(9,), names={'eos': '</s>'})


@dataclasses.dataclass
class Component:
  name: str
  examples: list
  rate: float = 1.
  objective: object = None
  note: str = ''


class Shift:
  """An objective that cuts the tokens at a random place and puts a token before the targets."""

  def sizes(self, lengths):
    return {'inputs': lengths['targets'], 'targets': lengths['targets']}

  def apply(self, example, rng):
    cut = int(rng.integers(1, len(example['targets'])))
    return {'inputs': example['targets'][:cut],
            'targets': np.append(9, example['targets'][cut:]).astype(np.int32)}


def pairs(*rows):
  """Returns examples of (inputs, targets)."""
  return [{'inputs': np.array(x, np.int32), 'targets': np.array(y, np.int32)} for x, y in rows]


PLANTED = pairs(([5, 6, 1], [7, 1]),
                ([5, 6, 1], [7, 1]),                      # the same again
                ([5, 6, 1], [8, 1]),                      # the same inputs with other targets
                ([5, 2, 6, 7, 8, 1], [9, 1]),             # 2 too many, 1 unknown
                ([2, 1], [5, 6, 7, 8, 9, 1]),             # 3 too many, 1 unknown
                ([9, 1], [2, 2, 1]))                      # 2 unknown


def rows_of(examples, lengths=LENGTHS, objective=None, **kwargs):
  return Pipeline([Component('planted', examples, objective=objective)], lengths, batch_size=1,
                  seed=0, **kwargs).rows[0]


def numbers(rows, seed=0, **kwargs):
  return statistics.task_statistics(rows, WORDS, np.random.default_rng(seed), **kwargs)


def counts(share):
  return share['count'], share['of']


# -- statistics --


def test_planted_examples_are_counted():
  ticks = []
  result = numbers(rows_of(PLANTED), tick=ticks.append)
  assert ticks == [1] * 6
  assert result['examples'] == result['rows'] == result['sampled'] == 6
  assert result['objective'] is None
  assert counts(result['truncated']['examples']) == (2, 6)
  assert counts(result['truncated']['tokens']) == (5, 36)
  assert counts(result['unknown']) == (4, 36)
  assert result['unknown']['share'] == 4 / 36
  assert counts(result['duplicates']) == (1, 6)
  assert counts(result['contradictions']) == (3, 6)
  assert result['lengths']['inputs']['percentiles'] == {
      '1': 2, '5': 2, '25': 2, '50': 3, '75': 3, '95': 6, '99': 6, 'max': 6}
  assert result['lengths']['targets']['percentiles'] == {
      '1': 2, '5': 2, '25': 2, '50': 2, '75': 3, '95': 6, '99': 6, 'max': 6}
  assert [result['lengths'][f]['limit'] for f in ('inputs', 'targets')] == [4, 3]
  assert [result['lengths'][f]['tokens'] for f in ('inputs', 'targets')] == [19, 17]
  # one example a row: (3 3 3 4 2 2) + (2 2 2 2 3 3) tokens in 6 rows of 7
  assert result['slots'] == {'measured': 6, 'a_row': 7, 'tokens': pytest.approx(31 / 6),
                            'loss': pytest.approx(14 / 6), 'filled': pytest.approx(31 / 42)}


def test_an_end_of_text_that_is_called_unknown_is_not_counted():
  gpt2 = dataclasses.replace(WORDS, unk_id=1, bos_id=1, pad_id=1)
  result = statistics.task_statistics(rows_of(PLANTED), gpt2, np.random.default_rng(0))
  assert counts(result['unknown']) == (0, 36)
  assert view.piece(gpt2, 1) == view.Span('special', '</s>')


def test_the_border_between_features_counts():
  """[5] [6 7] and [5 6] [7] differ; int64 and int32 are the same."""
  result = numbers(rows_of(pairs(([5], [6, 7]), ([5, 6], [7])) + [
      {name: x.astype(np.int64) for name, x in pairs(([5], [6, 7]))[0].items()}]))
  assert counts(result['duplicates']) == (1, 3)


def test_a_contradiction_outlasts_a_repeat():
  result = numbers(rows_of(pairs(([5], [6]), ([5], [7]), ([5], [6]), ([8], [6]))))
  assert counts(result['contradictions']) == (3, 4) and counts(result['duplicates']) == (1, 4)


def test_a_sample_is_random_and_lengths_cover_everything():
  drawn = [statistics.sample(50, 5, np.random.default_rng(seed)) for seed in range(60)]
  assert all(len(set(x)) == 5 and x == sorted(x) for x in drawn)
  assert set().union(*drawn) == set(range(50))
  assert statistics.sample(3, 5, np.random.default_rng(0)) == [0, 1, 2]
  result = numbers(rows_of(PLANTED), size=4)
  assert result['sampled'] == 4 and result['duplicates']['of'] == 4
  assert result['lengths']['inputs']['measured'] == 6
  assert counts(result['truncated']['tokens']) == (5, 36)
  assert result == numbers(rows_of(PLANTED), size=4)


def test_the_output_of_an_objective_is_measured():
  texts = [{'targets': np.arange(3, 3 + n, dtype=np.int32)} for n in (2, 3, 5, 5)]
  rows = rows_of(texts, objective=Shift())
  drawn = [rows.objective.apply(texts[i], np.random.default_rng([rows.seed, 0, i]))
           for i in range(4)]
  result = numbers(rows)
  for name in ('inputs', 'targets'):
    assert result['lengths'][name]['tokens'] == sum(len(x[name]) for x in drawn)
  over = [len(x['targets']) > 3 or len(x['inputs']) > 4 for x in drawn]
  assert 0 < sum(over) < 4 and counts(result['truncated']['examples']) == (sum(over), 4)
  assert counts(result['unknown']) == (0, 15) and counts(result['duplicates']) == (1, 4)
  assert result['contradictions'] is None
  real = sum(len(x) for i in range(4) for x in rows.example(0, i).values())
  assert result['slots']['tokens'] == real / rows.count
  for i in range(4):                       # the pipeline cuts what uncut returns
    cut = features.trim(rows.uncut(0, i), LENGTHS)[0]
    for name, tokens in rows.example(0, i).items():
      assert cut[name].tolist() == tokens.tolist()


def test_classes_are_not_tokens_and_masked_features_are_cut_as_one():
  rows = rows_of(pairs(([5, 6, 7, 8, 9, 1], [2]), ([5, 1], [2])), kind='encoder')
  result = numbers(rows, form='classes')
  assert counts(result['unknown']) == (0, 8) and list(result['lengths']) == ['inputs']
  assert counts(result['truncated']['tokens']) == (2, 8)
  assert counts(result['contradictions']) == (0, 2)
  five = np.arange(3, 8, dtype=np.int32)
  masked = {'inputs': five, 'targets': five, 'weights': (five > 5).astype(np.int32)}
  result = numbers(rows_of([masked], kind='encoder'), form='mlm')
  assert list(result['lengths']) == ['inputs'] and result['contradictions'] is None
  assert counts(result['truncated']['tokens']) == (1, 5) and result['slots']['loss'] == 1


def test_histogram():
  result = statistics.length_statistics(np.array([1] * 98 + [2, 1000]), 10)
  assert result['histogram'] == {'first': 0, 'width': 1, 'open': True,
                                'counts': [0, 98, 1, *[0] * 9, 1]}
  result = statistics.length_statistics(np.array([0, 99, 100, 101, 119, 120]), 100)
  bars = result['histogram']
  assert (bars['first'], bars['width'], bars['open']) == (-3, 4, False)    # … 97 to 100, 101 …
  assert [(k, n) for k, n in enumerate(bars['counts']) if n] == [(0, 1), (25, 2), (26, 1), (30, 2)]
  assert result['mean'] == 539 / 6 and result['percentiles']['50'] == 100


class Blocks:
  """Rows of a cache in blocks, which are slow to open: only the first should be read."""
  name, blocks, count, objective = 't', 3, 2_000, Shift()

  def __init__(self):
    self.requests = []

  def row(self, epoch, i):
    self.requests.append((epoch, i))
    return {'decoder_segment_ids': np.array([1, 1, 0, 0]), 'decoder_positions': np.arange(4),
            'decoder_input_tokens': np.full(4, 3), 'decoder_target_tokens': np.full(4, 3),
            'decoder_loss_weights': np.array([0, 1, 0, 0])}

  def ids(self, epoch, i):
    self.requests.append((epoch, i))
    return [i] * (1 + i % 7)


def test_the_first_rows_of_blocks_are_measured():
  rows = Blocks()
  assert statistics.slot_statistics(rows, None) == {'measured': 500, 'a_row': 4, 'tokens': 2.,
                                                 'loss': 1., 'filled': 0.5}
  assert rows.requests == [(0, i) for i in range(500)]
  rows = Blocks()
  assert view.row(rows, WORDS).examples == ['t:6'] * 7
  assert max(rows.requests) == (0, 19)


def test_mixture_by_hand():
  by_task = {'a': {'examples': 8, 'rows': 4, 'slots': {'a_row': 40, 'tokens': 10., 'loss': 4.}},
             'b': {'examples': 2, 'rows': 2, 'slots': {'a_row': 40, 'tokens': 20., 'loss': 9.}}}
  result = statistics.mixture_statistics([3., 1.], by_task, batch_size=5, total_steps=10)
  near = lambda x: pytest.approx(x, rel=1e-12)
  assert result['tasks']['a'] == {'rate': 0.75, 'rows': near(0.6), 'tokens': near(6 / 14),
                                 'epochs': near(7.5), 'steps_an_epoch': near(4 / 3)}
  assert result['tasks']['b'] == {'rate': 0.25, 'rows': near(0.4), 'tokens': near(8 / 14),
                                 'epochs': near(10), 'steps_an_epoch': near(1)}
  assert result['a_step'] == {'rows': 5, 'slots': 200, 'tokens': near(70), 'loss': near(30),
                             'padding': near(0.65)}
  assert result['run'] == {'steps': 10, 'tokens': near(700), 'loss': near(300)}
  assert result['steps_an_epoch'] == 1.2
  none = statistics.mixture_statistics([1., 0.], by_task, batch_size=5, total_steps=10)
  assert none['tasks']['b']['steps_an_epoch'] is None and none['tasks']['b']['epochs'] == 0


def test_the_mixture_agrees_with_the_pipeline():
  short = pairs(*[([5, 1], [i % 7 + 3]) for i in range(12)])          # two or three per row
  long = pairs(*[([9, 9, 9, 1], [i % 7 + 3, 1]) for i in range(4)])
  components = [Component('short', short, rate=2.), Component('long', long)]
  data = Pipeline(components, LENGTHS, batch_size=6, seed=0)
  each = {r.name: numbers(r) for r in data.rows}
  result = statistics.mixture_statistics([2., 1.], each, batch_size=6, total_steps=40)
  drawn = {'short': 0, 'long': 0}
  tokens = loss = 0
  for step in range(40):
    batch = data.batch(step)
    is_long = (batch['encoder_input_tokens'][:, 0] == 9).sum()
    drawn['long'] += is_long
    drawn['short'] += 6 - is_long
    tokens += (batch['encoder_segment_ids'] > 0).sum() + (batch['decoder_segment_ids'] > 0).sum()
    loss += batch['decoder_loss_weights'].sum()
  for name, r in zip(drawn, data.rows):
    assert result['tasks'][name]['epochs'] == pytest.approx(drawn[name] / r.count, rel=0.02)
  assert result['run']['tokens'] == pytest.approx(tokens, rel=0.01)
  assert result['run']['loss'] == pytest.approx(loss, rel=0.01)


# -- round trips --


def test_losses():
  text = 'x' * 60 + 'ß' + 'y' * 60
  result = round_trip.losses(
      [('same', 'same'), ('aßß', 'a ⁇ '), (text, text.replace('ß', '')), ('A', 'a'), ('B', 'b'),
       ('end', 'en')], 'texts')
  assert result['source'] == 'texts' and counts(result['lost']) == (5, 6)
  assert result['characters'] == {'ß': 3, 'A': 1, 'B': 1, 'd': 1}
  assert result['shown'] == [('aßß', 'a ⁇ '), ('x' * 40 + 'ß' + 'y' * 39, 'x' * 40 + 'y' * 40),
                            ('A', 'a')]


def test_losses_of_ids():
  """B is decoded and comes back as unknown; an unknown that was stored does not change."""
  rows = rows_of(pairs(([3, 4, 1, 5, 1], [3, 5, 1]), ([3, 4, 1], [3, 1])))
  result = round_trip.id_losses(rows, WORDS, 'inputs', range(2))
  assert result['source'] == 'ids' and counts(result['lost']) == (2, 5)
  assert result['shown'] == [('aB', 'a ⁇ '), ('aB', 'a ⁇ ')]
  classes = rows_of(pairs(([3, 4, 1], [4])), kind='encoder')
  assert counts(round_trip.id_losses(classes, WORDS, 'classes', [0])['lost']) == (1, 1)
  tables = dataclasses.replace(WORDS, target_encoder=lambda text: [4] * len(text))
  result = round_trip.id_losses(rows, tables, 'inputs', [0])
  assert result['shown'] == [('ac', 'BB')] and result['lost']['of'] == 1   # not the inputs


def test_texts_of_tasks(plain_registry):
  registry.register('t5lab_2048')
  task = seqio.TaskRegistry.get('ha_ende')
  result = round_trip.task_losses(task, 'validation', {'inputs': 8, 'targets': 8}, 5)
  assert result['source'] == 'texts' and counts(result['lost']) == (0, 10)
  # Cut into segments: the text is beside the ids only before that.
  books = seqio.TaskRegistry.get('books_lm')
  assert counts(round_trip.task_losses(books, 'validation', {'targets': 8}, 3)['lost']) == (0, 3)
  bert = seqio.TaskRegistry.get('books_bert')          # never beside them
  assert round_trip.task_losses(bert, 'validation', {'inputs': 16}, 3) is None


# -- view --


def test_printable():
  assert view.printable('a\n\0\x1b[31m\u202eß 漢 \u2028') == 'a\\n\\x00\\x1b[31m\\u202eß 漢 \\u2028'


def test_spans():
  Span = view.Span
  v = vocab.load('t5lab_2048')
  ids = [*v.encode('Turn <extra_id_0> light\n'), 1, *v.encode('ß')]
  assert view.spans(v, ids) == [
      Span('text', 'Turn '), Span('sentinel', '<extra_id_0>'), Span('text', ' light\\n'),
      Span('special', '</s>'), Span('text', 'ß')]
  assert view.spans(WORDS, [3, 2, 5, 1]) == [
      Span('text', 'a'), Span('unknown', ' ⁇ '), Span('text', 'c'), Span('special', '</s>')]
  assert [view.piece(WORDS, i) for i in (1, 2, 3, 0, 7, 9)] == [
      Span('special', '</s>'), Span('unknown', '⁇'), Span('text', 'a'), Span('special', '<pad>'),
      Span('text', '\\n'), Span('sentinel', '<9>')]
  one_id = dataclasses.replace(WORDS, pad_id=1, bos_id=1)
  assert view.spans(one_id, [1]) == [Span('special', '</s>')]


def test_examples_are_shown_after_cutting():
  shown = view.example(rows_of(PLANTED), 3, WORDS)
  assert shown.name == 'planted:3' and shown.cut == {'inputs': 2, 'targets': 0}
  assert ''.join(s.text for s in shown.features['inputs']) == 'c ⁇ <</s>'
  shown = view.example(rows_of(pairs(([3, 1], [4])), kind='encoder'), 0, WORDS, 'classes')
  assert shown.features['targets'] == [view.Span('number', '4')]
  tables = dataclasses.replace(WORDS, target_encoder=WORDS.encoder)
  shown = view.example(rows_of(PLANTED), 0, tables)
  assert shown.features['inputs'] == [view.Span('number', '5 6 1')]
  assert shown.features['targets'][0] == view.Span('text', '\\n')


def test_a_cut_example_is_among_those_shown():
  rows = rows_of(PLANTED)
  for seed in range(20):
    assert {3, 4} & set(view.choose(rows, 2, np.random.default_rng(seed)))
  assert view.choose(rows, 0, np.random.default_rng(0)) == []
  assert len(view.choose(rows, 9, np.random.default_rng(0))) == 6
  assert {view.choose(rows, 1, np.random.default_rng(seed))[0] for seed in range(60)} == set(
      range(6))


def two_in_a_row(kind, lengths=None):
  examples = pairs(([3, 1], [5]), ([3, 1], [5])) + pairs(([3, 3, 3, 1], [5, 5, 1]))
  return view.row(rows_of(examples, lengths or LENGTHS, kind=kind), WORDS)


def drawn(sequence):
  return [(s.segment, s.position, s.read.text, s.predicted and s.predicted.text, s.loss)
          for s in sequence.slots]


def test_a_packed_row():
  row = two_in_a_row('encoder_decoder')
  assert sorted(row.examples) == ['planted:0', 'planted:1'] and row.labels == {}
  encoder, decoder = row.sequences
  assert (encoder.name, encoder.padding, decoder.name, decoder.padding) == (
      'encoder', 0, 'decoder', 1)
  assert drawn(encoder) == [(1, 0, 'a', None, False), (1, 1, '</s>', None, False),
                            (2, 0, 'a', None, False), (2, 1, '</s>', None, False)]
  assert drawn(decoder) == [(1, 0, '<pad>', 'c', True), (2, 0, '<pad>', 'c', True)]
  row = two_in_a_row('decoder')
  assert drawn(row.sequences[0]) == [
      (s, i, read, predicted, loss) for s in (1, 2) for i, (read, predicted, loss) in enumerate(
          [('<pad>', 'a', False), ('a', '</s>', False), ('</s>', 'c', True)])]
  assert row.sequences[0].padding == 1


def test_inputs_with_a_table_of_their_own_are_shown_as_numbers():
  tables = dataclasses.replace(WORDS, target_encoder=WORDS.encoder)
  encoder, decoder = view.row(rows_of(pairs(([3, 1], [5]))), tables).sequences
  assert [slot.read for slot in encoder.slots] == [
      view.Span('number', '3'), view.Span('number', '1')]
  assert drawn(decoder) == [(1, 0, '<pad>', 'c', True)]


def test_a_row_of_an_encoder():
  row = view.row(rows_of(pairs(([3, 1], [4])), kind='encoder'), WORDS)
  assert row.labels == {'encoder_target_tokens': 4, 'encoder_loss_weights': 1}
  assert drawn(row.sequences[0]) == [(1, 0, 'a', None, False), (1, 1, '</s>', None, False)]
  two = lambda *x: np.array(x, np.int32)
  masked = {'inputs': two(9, 3), 'targets': two(5, 3), 'weights': two(1, 0)}
  row = view.row(rows_of([masked], kind='encoder'), WORDS)
  assert drawn(row.sequences[0]) == [(1, 0, '<9>', 'c', True), (1, 1, 'a', 'a', False)]


class Page(html.parser.HTMLParser):
  """Checks that tags balance and collects tags, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], set(), [], ''
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += attrs
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_page():
  hostile = '<script>alert("1")</script>{x}&amp;\n\0'
  rows = rows_of(pairs(([6, 7, 8, 3, 3, 1], [3, 2, 1]), ([6, 9, 1], [3, 1])))
  task = {**numbers(rows), 'round_trip': round_trip.losses([(hostile, 'gone')], 'ids')}
  mixture = statistics.mixture_statistics([1.], {'t': task}, batch_size=2, total_steps=3)
  examples = [view.example(rows, i, WORDS) for i in range(2)]
  text = page.render(f'title {hostile}', [('data', hostile)],
                                {'tasks': {hostile: task}, 'mixture': mixture},
                                {hostile: ([f'note {hostile}'], examples, view.row(rows, WORDS))})
  parsed = Page(text)
  assert 'script' not in parsed.tags and '\0' not in text and '{x}' in parsed.text
  assert parsed.text.count('<script>alert("1")</script>{x}&amp;\\n\\x00') >= 4
  assert not [v for k, v in parsed.attributes if k in ('href', 'srcset') or k.startswith('on')]
  sources = [v for k, v in parsed.attributes if k == 'src']
  assert len(sources) == 2 and 'http' not in re.sub('http-equiv', '', text)
  for source in sources:
    kind, data = source.split(',')
    assert kind == 'data:image/png;base64' and base64.b64decode(data)[:4] == b'\x89PNG'
  assert ('content', "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
      parsed.attributes)
  assert '✂ 2 tokens cut' in parsed.text and text.count('tokens cut') == 1
  assert '<span class="unknown"> ⁇ </span>' in text and '<span class="special">&lt;/s&gt;' in text
  assert '<b>inputs</b> &lt;\\n\\x00<span class="special">' in text
  slots = re.findall('<span class="slot (even|odd)( loss)?">', text)
  row = view.row(rows, WORDS)
  assert len(slots) == sum(len(s.slots) for s in row.sequences)
  assert sum(bool(loss) for _, loss in slots) == len(row.sequences[1].slots)


def test_a_long_row_is_cut_on_the_page():
  slot = view.Slot(1, 0, view.Span('text', 'a'), None, False)
  row = view.ShownRow(['t:0'], [view.ShownSequence('encoder', [slot] * 1030, 0)], {})
  text = page._row(row)
  assert text.count('class="slot even"') == 1024 and 'The first 1,024 are shown, 6 are not' in text
