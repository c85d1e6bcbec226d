"""Typos in names (F22): reported at once, with the name that was probably meant."""

import time

import processes
from processes import Process, train_command
import pytest


@pytest.mark.parametrize('overrides, message', [
    ({'data.mixture': 'ha_ened'}, "no task or mixture 'ha_ened'. Did you mean 'ha_enes' or"),
    ({'optim.learning_rte': 1}, "unknown config key 'optim.learning_rte'."),
    ({'data.fields.input': 'q'}, "unknown config key 'data.fields.input'. Did you mean 'inputs'"),
    ({'data.files.train': 'x.tsv', 'data.files.validation': 'x.tsv', 'data.metrics': 'blue,squad'},
     "data.metrics names 'blue'. Did you mean 'bleu'"),
    ({'checkpoint.evry': 5}, "unknown config key 'checkpoint.evry'. Did you mean 'every'"),
])
def test_a_typo_is_reported_within_five_seconds(tmp_path, record, overrides, message):
  """F22. Exit 2 before data is read or anything compiled."""
  with Process(train_command(tmp_path / 'run', overrides), tmp_path / 'log',
               JAX_LOG_COMPILES='1') as p:
    assert p.wait() == 2, p.output()
    seconds = time.monotonic() - p.started
  last = p.output().splitlines()[-1]
  assert last.startswith('t5lab: ') and message in last, last
  assert 'Compiling' not in p.output() and not processes.entries(tmp_path / 'run')
  record('typo_seconds', round(seconds, 1))
  assert seconds <= 5, f'{seconds:.1f} s'
