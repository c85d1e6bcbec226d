"""Faults that tests inject into a real run through environment variables. Not for real training.

T5LAB_FAULT, read when a run starts, changes batches of the training stream, counted from 1:

  nan_grad@7      batch 7 has NaN loss weights: its loss and gradients are NaN
  nan_grad@7-9    batches 7 to 9
  nan_shard@7:3   only row 3 of the batch, and so only one device
  inf_loss@7      one loss weight is so large that the loss overflows to infinity
  spike@7         loss weights are +-100 times as large, of about the same sum: the gradient norm
                  jumps
  hang@7          the process sleeps forever before batch 7; hang@7:1 only process 1 does

A fault belongs to its batch, whichever step reads it. The train step itself is unchanged; only the
numbers in the batch are (its loss weights become float32, so the step compiles once more).

T5LAB_FAILPOINT=NAME or NAME@STEP kills the process at that point of a checkpoint's commit:
before_manifest, before_rename, after_rename.
"""

from collections.abc import Sequence
import dataclasses
import os
import re
import signal
import time

import numpy as np

from t5lab.errors import UsageError

KINDS = ('nan_grad', 'nan_shard', 'inf_loss', 'spike', 'hang')


@dataclasses.dataclass(frozen=True)
class Fault:
  """`kind` at the batches first … last.

  row: the row of the batch that it changes, None for all; for 'hang', the process that hangs.
  """
  kind: str
  first: int
  last: int
  row: int | None

  def inject(self, batch: dict[str, np.ndarray], number: int, rows: Sequence[int] | None = None,
             process: int = 0) -> dict[str, np.ndarray]:
    """Returns batch `number` of the stream, on the host, as the train step shall see it.

    rows: the rows of the global batch that `batch` holds; None: all.
    """
    if not self.first <= number <= self.last:
      return batch
    if self.kind == 'hang':
      while self.row in (None, process):
        time.sleep(3600)
      return batch

    name = next(k for k in ('decoder_loss_weights', 'encoder_loss_weights') if k in batch)
    weights = batch[name].astype(np.float32)
    rows = np.arange(len(weights)) if rows is None else np.asarray(rows)
    is_hit = np.ones(len(rows), bool) if self.row is None else rows == self.row
    if self.kind == 'inf_loss':
      # The first loss token of the first row that has one, in the process that holds row 0.
      has_tokens = (weights > 0).any(axis=1)
      row = np.flatnonzero(is_hit & has_tokens)[:1 if 0 in rows else 0]
      weights[row, (weights[row] > 0).argmax(axis=1)] = 3e38
    elif self.kind == 'spike':
      signs = np.where(np.arange(weights.shape[1]) % 2, -99., 101.)
      weights[is_hit] *= signs.astype(np.float32)
    else:
      weights[is_hit] = np.nan
    return {**batch, name: weights}


def requested() -> Fault | None:
  """The fault that T5LAB_FAULT asks for; UsageError if it is not one."""
  text = os.environ.get('T5LAB_FAULT', '')
  if not text:
    return None
  match = re.fullmatch(r'(\w+)@(\d+)(?:-(\d+))?(?::(\d+))?', text)
  if not match or match[1] not in KINDS:
    raise UsageError(f'T5LAB_FAULT must be KIND@BATCH, KIND@FIRST-LAST or KIND@BATCH:ROW, got '
                     f'{text!r}; kinds: {", ".join(KINDS)}')
  kind, first, last, row = match.groups()
  return Fault(kind, int(first), int(last or first), int(row) if row else None)


def failpoint(name: str, step: int) -> None:
  """Kills this process if T5LAB_FAILPOINT is `name` or `name@step`."""
  if os.environ.get('T5LAB_FAILPOINT', '') in (name, f'{name}@{step}'):
    os.kill(os.getpid(), signal.SIGKILL)
