"""The sentry: bad steps are reported, recorded, skipped or rewound."""

import math
import types

import pytest

from t5lab.errors import NumericalError
from t5lab.runs import sentry
from t5lab.training import diagnosis, guards

STATE = types.SimpleNamespace(step=5)      # the sentry reads the number of updates only


@pytest.fixture(scope='module')
def stream():
  from t5lab import config
  from t5lab.programs import streams
  c = config.load('configs/quickstart.py:tiny', {})
  return streams.open_stream(c)


def watch(stream, workdir, lines=None, **kwargs):
  """A Sentry that appends what it prints to `lines`."""
  settings = guards.Settings(**{k: kwargs.pop(k) for k in ('policy', 'patience') if k in kwargs})
  explain = lambda state, number: diagnosis.Finding('here', 'decoder/x', [1])
  lines = [] if lines is None else lines
  return sentry.Sentry(workdir, settings, data=stream.batches, vocabulary=stream.vocabulary,
                       explain=explain, newest=lambda: 4, log=lines.append, **kwargs)


def metrics(loss=2., **more):
  return {'loss': loss, 'grad_norm': 1., 'param_norm': 3., 'skipped': 0., 'halted': 0., **more}


BAD = dict(loss=math.nan, skipped=1.)


def test_a_skipped_step_gives_one_line_and_one_entry(stream, tmp_path):
  lines = []
  watched = watch(stream, tmp_path, lines, policy='skip', offset=2)
  logged = watched.check([(5, metrics()), (6, metrics(**BAD)), (7, metrics())], STATE)
  assert [step for step, _ in logged] == [5, 6, 7] and 'halted' not in logged[0][1]
  entry, = sentry.read_anomalies(tmp_path)
  ids = stream.batches.row_ids(7)                       # of batch 8 of the stream
  assert (entry['step'], entry['batch'], entry['kind']) == (6, 8, 'nonfinite')
  assert math.isnan(entry['loss']) and entry['layer'] == 'decoder/x' and entry['rows'] == [1]
  assert entry['examples'] == [i for row in ids for i in row] == stream.batches.example_ids(7)
  assert entry['blamed'] == ids[1]
  corpus = stream.batches.rows[0].examples
  for text in entry['text']:
    stored = corpus[int(text['id'].split(':')[1])]
    assert text['id'] in ids[1]
    assert text['inputs'] == stream.vocabulary.decode(list(stored['inputs']))
    assert text['targets'] == stream.vocabulary.decode(list(stored['targets']))
  line, = lines
  assert '\n' not in line and line.endswith('; skipped')
  for part in ('step 6: loss is nan', 'rows 1', ids[1][0], entry['text'][0]['inputs'][:20]):
    assert part in line
  # Step 7 has changed the state since, so the entry says which weights were used.
  assert entry['found'] == 'here, with the weights of update 5, some good steps later'


def test_a_stop_names_the_cause_and_the_last_good_checkpoint(stream, tmp_path):
  watched = watch(stream, tmp_path, policy='stop')
  later = metrics(skipped=1., halted=1.)
  with pytest.raises(NumericalError) as e:
    watched.check([(5, metrics()), (6, metrics(**BAD, halted=1.)), (7, later)], STATE)
  text = str(e.value)
  assert text.startswith('step 6: loss is nan, gradient norm 1; here (rows 1)')
  assert 'last good checkpoint: step 4' in text and 'guard.policy=skip' in text and '\n' not in text
  anomaly, = sentry.read_anomalies(tmp_path)
  assert anomaly['found'] == 'here'


def test_the_run_ends_when_patience_is_used_up_and_records_each_step(stream, tmp_path):
  watched = watch(stream, tmp_path, policy='skip', patience=2)
  with pytest.raises(NumericalError, match='step 7: .* 2 bad steps in a row'):
    watched.check([(6, metrics(**BAD)), (7, metrics(**BAD, halted=1.)),
                   (8, metrics(skipped=1., halted=1.))], STATE)
  assert [r['step'] for r in sentry.read_anomalies(tmp_path)] == [6, 7]


def test_a_spike_is_reported_with_its_deviations(stream, tmp_path):
  lines = []
  watch(stream, tmp_path, lines, policy='skip').check(
      [(6, metrics(loss=90., deviations=41.5, skipped=1.))], STATE)
  assert sentry.read_anomalies(tmp_path)[0]['kind'] == 'spike'
  assert 'loss is 90, gradient norm 1, 41.5 deviations above' in lines[0]


def test_rewinds_shift_the_stream_and_end_the_run_without_progress(stream, tmp_path):
  watched = watch(stream, tmp_path, policy='rewind', patience=2)
  with pytest.raises(sentry.Rewind) as e:
    watched.check([(6, metrics(**BAD, halted=1.))], STATE)
  assert e.value.step == 6
  assert watched.record_rewind(6, 4) == 2     # step 5 reads batch 7, after the bad one
  assert watched.record_rewind(5, 4) == 3     # batch 7 was bad too: step 5 reads batch 8
  assert watched.record_rewind(12, 10) == 5   # a newer checkpoint: patience starts again
  assert watched.record_rewind(11, 10) == 6
  with pytest.raises(NumericalError, match='after 2 rewinds to step 10'):
    watched.record_rewind(11, 10)
  assert [r['offset'] for r in sentry.read_anomalies(tmp_path)[1:]] == [2, 3, 5, 6]


def test_a_resumed_run_removes_entries_of_batches_that_it_will_read_again(stream, tmp_path):
  watched = watch(stream, tmp_path, policy='skip', offset=2)
  watched.check([(s, metrics(**BAD)) for s in (3, 5)], STATE)          # batches 5 and 7
  (tmp_path / sentry.NAME).open('a').write('{"step": 6, "bat')      # torn
  watch(stream, tmp_path, policy='skip', step=2, offset=4, write=False)
  assert len(sentry.read_anomalies(tmp_path)) == 2
  watch(stream, tmp_path, policy='skip', step=2, offset=4)             # six batches were read
  assert [r['step'] for r in sentry.read_anomalies(tmp_path)] == [3]
