"""The data settings of a config reach the stream."""
import numpy as np
import pytest

from t5lab import config
from t5lab.data.batches import pipeline
from t5lab.data.tasks import registry as tasks
from t5lab.errors import DataError, UsageError
from t5lab.programs import streams

pytestmark = pytest.mark.usefixtures('plain_registry')

LENGTHS = {'inputs': 32, 'targets': 32}


def tiny(**changes):
  return config.load('configs/quickstart.py:tiny',
                     {'data.split': 'validation', **{k.replace('__', '.'): str(v)
                                                     for k, v in changes.items()}})


@pytest.mark.parametrize('changes, same', [
    (dict(seed=5), dict(seed=5)), (dict(data__pack=False), dict(pack=False)),
    (dict(model__start_id=9), dict(start_id=9)), (dict(data__batch_size=16), dict(batch_size=16)),
    (dict(data__lengths__targets=20), dict(targets=20))])
def test_the_stream_is_the_pipeline_that_the_config_describes(changes, same):
  stream = streams.open_stream(tiny(**changes))
  lengths = {**LENGTHS, **{k: same.pop(k) for k in ('targets',) if k in same}}
  expect = pipeline.Pipeline(stream.components, lengths, **{'batch_size': 8, 'seed': 0, **same})
  batch, wanted = stream.batches.batch(3), expect.batch(3)
  assert stream.batches.fingerprint == expect.fingerprint and batch.keys() == wanted.keys()
  for name, x in wanted.items():
    np.testing.assert_array_equal(batch[name], x, err_msg=name)
  assert stream.vocabulary.spec == 't5lab_2048'


def test_each_process_has_its_part():
  whole = streams.open_stream(tiny()).batches.batch(2)
  parts = [streams.open_stream(tiny(), rows).batches.batch(2)
           for rows in (range(4), range(4, 8))]
  for name, x in whole.items():
    np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), x)


def test_several_tasks_are_mixed_by_their_sizes_and_a_named_mixture_by_its_own():
  rates = lambda c: [x.rate for x in streams.open_stream(c).components]
  two = dict(data__mixture='ha_ende,ha_enfr')
  sizes = rates(tiny(**two))
  assert len(sizes) == 2 and all(rate == int(rate) > 10 for rate in sizes)
  assert rates(tiny(**two, data__mixing__limit=100)) == [100, 100]
  warm = rates(tiny(**two, data__mixing__temperature=2))
  np.testing.assert_allclose(warm, np.sqrt(sizes))
  own = streams.open_stream(tiny(data__mixture='embedded_supervised')).components
  assert len(own) == 5 and all(
      c.rate == tasks.get(c.name).num_input_examples('train') for c in own)


def test_what_could_only_be_found_out_at_the_end_is_found_out_first():
  with pytest.raises(DataError, match="has no split 'valid'"):
    streams.open_stream(tiny(eval__split='valid'))


def test_a_start_token_beyond_the_vocabulary_is_refused():
  with pytest.raises(UsageError, match='start_id=128000, .* must be from 0 to .* = 2047'):
    streams.open_stream(tiny(model__start_id=128000))
  with pytest.raises(DataError, match='tfds build'):
    streams.open_stream(tiny(eval__mixture='wmt_t2t_ende_v003'))
  with pytest.raises(UsageError, match='names ha_ende twice'):
    streams.open_stream(tiny(data__mixture='ha_ende,ha_ende'))
