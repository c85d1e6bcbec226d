"""Faults on demand, for the tests of the guard and the watchdog: T5LAB_FAULT, read at the start.

  nan_grad@7      the 7th batch of the stream has NaN for loss weights: loss and gradients are NaN
  nan_grad@7-9    the 7th to 9th
  nan_shard@7:3   in row 3 alone, and so on one device alone
  inf_loss@7      one loss weight is so large that the loss overflows to infinity
  spike@7         loss weights +-100 times as large, of about the same sum: the gradient norm jumps
  hang@7          the process sleeps for ever before the 7th batch; hang@7:1 only process 1 does

Batches are counted from 1 over the whole stream, so that a batch is bad whichever step reads it.
The step is the real one: only numbers in a batch change (its loss weights become float32, so that
step compiles once more). Not for use in earnest.
"""

from collections.abc import Sequence
import dataclasses
import os
import re
import time

import numpy as np

from t5lab.errors import UsageError

KINDS = ('nan_grad', 'nan_shard', 'inf_loss', 'spike', 'hang')


@dataclasses.dataclass(frozen=True)
class Fault:
  """kind at batches first … last; row: of the batch, None: all. Of hang, row is the process."""
  kind: str
  first: int
  last: int
  row: int | None

  def inject(self, batch: dict[str, np.ndarray], number: int, rows: Sequence[int] | None = None,
             process: int = 0) -> dict[str, np.ndarray]:
    """Batch `number` of the stream, on the host -> what the step gets.

    rows: which rows of the whole batch these are; None: all."""
    if not self.first <= number <= self.last:
      return batch
    if self.kind == 'hang':
      while self.row in (None, process):
        time.sleep(3600)
      return batch
    name = next(k for k in ('decoder_loss_weights', 'encoder_loss_weights') if k in batch)
    weights = batch[name].astype(np.float32)
    mine = np.arange(len(weights)) if rows is None else np.asarray(rows)
    hit = np.ones(len(mine), bool) if self.row is None else mine == self.row
    if self.kind == 'inf_loss':
      here = np.flatnonzero(hit & (weights > 0).any(axis=1))[:1 if 0 in mine else 0]
      weights[here, (weights[here] > 0).argmax(axis=1)] = 3e38
    elif self.kind == 'spike':
      signs = np.where(np.arange(weights.shape[1]) % 2, -99., 101.)
      weights[hit] *= signs.astype(np.float32)
    else:
      weights[hit] = np.nan
    return {**batch, name: weights}


def requested() -> Fault | None:
  """What T5LAB_FAULT asks for; UsageError for what is not a fault."""
  text = os.environ.get('T5LAB_FAULT', '')
  if not text:
    return None
  found = re.fullmatch(r'(\w+)@(\d+)(?:-(\d+))?(?::(\d+))?', text)
  if not found or found[1] not in KINDS:
    raise UsageError(f'T5LAB_FAULT={text!r}: one of {", ".join(KINDS)} @ a batch, as nan_grad@7, '
                     'nan_grad@7-9, nan_shard@7:3')
  kind, first, last, row = found.groups()
  return Fault(kind, int(first), int(last or first), int(row) if row else None)
