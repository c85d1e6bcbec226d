"""Injected faults change the batches and rows that they name, and nothing else."""

import numpy as np
import pytest

from t5lab.errors import UsageError
from t5lab.runs import injected_faults


def test_a_fault_changes_its_batches_and_its_row_only(monkeypatch):
  monkeypatch.delenv('T5LAB_FAULT', raising=False)
  assert injected_faults.requested() is None
  monkeypatch.setenv('T5LAB_FAULT', 'nan_shard@7-9:3')
  fault = injected_faults.requested()
  batch = {'decoder_loss_weights': np.ones((8, 6), np.int32)}
  assert fault.inject(batch, 6) is batch and fault.inject(batch, 10) is batch
  weights = fault.inject(batch, 8)['decoder_loss_weights']
  assert np.isnan(weights[3]).all() and np.isfinite(np.delete(weights, 3, 0)).all()
  half = fault.inject({k: v[4:] for k, v in batch.items()}, 8, rows=[3, 5, 6, 7])
  assert np.isnan(half['decoder_loss_weights'][0]).all()
  assert np.isfinite(half['decoder_loss_weights'][1:]).all()


@pytest.mark.parametrize('text', ['nan@7', 'nan_grad', 'nan_grad@x'])
def test_a_fault_that_does_not_exist_is_an_error(monkeypatch, text):
  monkeypatch.setenv('T5LAB_FAULT', text)
  with pytest.raises(UsageError, match=f"T5LAB_FAULT must be .* got '{text}'; kinds: nan_grad, "):
    injected_faults.requested()
