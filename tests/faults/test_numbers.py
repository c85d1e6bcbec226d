"""Non-finite numbers (F16) and spikes (F17), injected into real steps by T5LAB_FAULT."""

import json
import math
import re

import numpy as np
import processes
from processes import STEPS, R
import pytest

SKIP = {**R, 'guard.policy': 'skip'}


def anomalies(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'anomalies.jsonl').read_text().splitlines()]


def finite(workdir, step) -> bool:
  return all(np.isfinite(x).all() for path, x in processes.arrays(workdir, step).items())


@pytest.fixture(scope='module')
def without_batch_7(common):
  """The run whose batch 7 is skipped, without a kill."""
  return processes.shared(common, 'without_7', lambda path: processes.train(
      path, SKIP, T5LAB_FAULT='nan_grad@7'))


@pytest.mark.parametrize('fault', ['nan_grad@7', 'inf_loss@7', 'nan_shard@7:3'])
def test_one_bad_batch_changes_nothing(reference, tmp_path, fault):
  """F16. Parameters, moments, average and counter after step 7 are those of step 6, bit by bit."""
  workdir = tmp_path / 'run'
  short = {**SKIP, 'checkpoint.every': 1, 'eval.every': 0, 'total_steps': 30}
  # Killed after the save of step 8, whose state must be that of seven good batches.
  processes.train(workdir, short, code=-9, T5LAB_FAULT=fault, T5LAB_FAILPOINT='after_rename@8')
  six, seven = processes.digests(workdir, 6), processes.digests(workdir, 7)
  assert seven == six == processes.digests(reference, 6)
  assert processes.digests(workdir, 8) != seven              # and step 8 counts
  assert processes.arrays(workdir, 8)['step'] == 7
  anomaly, = anomalies(workdir)
  assert anomaly['step'] == 7 and anomaly['kind'] == 'nonfinite' and anomaly['action'] == 'skip'
  assert all(e.startswith('ha_ende:') for e in anomaly['examples']) and anomaly['examples']
  assert not math.isfinite(anomaly['loss']) or not math.isfinite(anomaly['grad_norm'])
  if fault.startswith('nan_shard'):
    assert anomaly['rows'] == [3]
  assert finite(workdir, 7) and finite(workdir, 8)


def test_a_bad_shard_counts_for_all_devices(tmp_path):
  """F16. NaN in one row of eight on four devices: all four devices keep their state."""
  workdir = tmp_path / 'run'
  short = {**SKIP, 'checkpoint.every': 1, 'eval.every': 0, 'mesh.data': 4}
  processes.train(workdir, short, code=-9, devices=4, T5LAB_FAULT='nan_shard@7:3',
                  T5LAB_FAILPOINT='after_rename@8')
  assert processes.digests(workdir, 7) == processes.digests(workdir, 6)
  assert processes.digests(workdir, 8) != processes.digests(workdir, 7)
  anomaly, = anomalies(workdir)
  assert anomaly['rows'] == [3] and finite(workdir, 8)


@pytest.mark.parametrize('overrides, fault, step', [
    ({'guard.policy': 'skip', 'guard.patience': 3}, 'nan_grad@14-30', 16),    # K in a row
    ({'guard.policy': 'stop'}, 'inf_loss@14', 14),
    ({'guard.policy': 'stop'}, 'nan_grad@14', 14),
])
def test_bad_batches_in_a_row_end_the_run(reference, tmp_path, overrides, fault, step):
  """F16. Exit 70 and the step; only finite checkpoints; resumed from the last good one it is R."""
  workdir = tmp_path / 'run'
  output = processes.train(workdir, {**R, **overrides}, code=70, T5LAB_FAULT=fault)
  last = output.splitlines()[-1]
  assert last.startswith(f't5lab: step {step}: loss is ') and 'ha_ende:' in last
  assert 'last good checkpoint: step 12' in last
  steps = processes.committed(workdir)
  assert steps == [6, 12] and all(finite(workdir, s) for s in steps)
  output = processes.train(workdir)                          # without the fault
  assert processes.resumed_from(output) == 12
  processes.assert_equal(workdir, reference)


def test_a_killed_run_with_a_skipped_batch_equals_the_uninterrupted_one(without_batch_7, tmp_path):
  """F16. A batch that was skipped before a kill is neither counted twice nor forgotten after it."""
  workdir = tmp_path / 'run'
  processes.train(workdir, SKIP, code=-9, T5LAB_FAULT='nan_grad@7',
                  T5LAB_FAILPOINT='before_rename@12')
  assert processes.committed(workdir) == [6]
  processes.train(workdir, SKIP, T5LAB_FAULT='nan_grad@7')
  same = lambda w: [(s, h) for s, h in processes.losses(w) if s != 7]     # NaN differs from itself
  assert same(workdir) == same(without_batch_7)
  assert processes.digests(workdir) == processes.digests(without_batch_7)
  assert [a['step'] for a in anomalies(workdir)] == [7]


SPIKE = {**R, 'guard.spike': 12.}


def test_no_step_of_a_good_run_is_a_spike(reference, tmp_path):
  """F17. The run does not reach the threshold without a fault."""
  workdir = tmp_path / 'run'
  processes.train(workdir, SPIKE)
  assert processes.digests(workdir) == processes.digests(reference)
  assert not (workdir / 'anomalies.jsonl').exists() or not anomalies(workdir)


@pytest.mark.parametrize('policy', ['stop', 'skip', 'rewind'])
def test_a_spike_is_flagged_with_its_examples(reference, tmp_path, policy):
  """F17. A gradient a hundred times as large: reported, and left out if the policy says so."""
  workdir = tmp_path / 'run'
  output = processes.train(workdir, {**SPIKE, 'guard.policy': policy},
                           code=70 if policy == 'stop' else 0, T5LAB_FAULT='spike@26')
  anomaly = anomalies(workdir)[0]
  assert anomaly['step'] == 26 and anomaly['batch'] == 26 and anomaly['kind'] == 'spike'
  assert anomaly['deviations'] > 12 and anomaly['examples'] and anomaly['action'] == policy
  assert 'deviations above' in output and anomaly['examples'][0].split(':')[0] in output
  last = processes.committed(workdir)[-1]
  assert last == (24 if policy == 'stop' else STEPS)
  if policy == 'skip':
    assert [s for s, _ in processes.losses(workdir)] == list(range(1, STEPS + 1))
    assert processes.losses(workdir)[:25] == processes.losses(reference)[:25]
    assert processes.arrays(workdir, STEPS)['step'] == STEPS - 1
  if policy == 'rewind':
    assert re.search(r'rewound from step 26 to the checkpoint of step 24', output)
    assert [s for s, _ in processes.losses(workdir)] == list(range(1, STEPS + 1))
    assert processes.arrays(workdir, STEPS)['step'] == STEPS
