"""The host's side of the guard: reports each bad step, records it, and decides what follows.

  anomalies.jsonl    one JSON object per bad step or rewind, in the order in which they happened:

  {"step": 17, "batch": 17, "kind": "nonfinite", "loss": NaN, …, "layer": "decoder/layers/mlp/wo,
   layer 1 of 2", "found": "…", "rows": [3], "examples": ["ha_ende:12", …], "blamed": ["ha_ende:7"],
   "text": [{"id": "ha_ende:7", "inputs": "…", "targets": "…"}], "action": "skip"}
  {"step": 17, "batch": 17, "rewound_to": 12, "offset": 5}

`batch` counts the batches of the stream from 1: a step reads batch step + offset, and a rewind
raises the offset. Nothing in the file depends on the clock.
"""

from collections.abc import Callable
import json
import math
from pathlib import Path

from t5lab.errors import NumericalError
from t5lab.runs import jsonl
from t5lab.training.diagnosis import Finding
from t5lab.training.guards import Settings

NAME = 'anomalies.jsonl'
SHOWN = 3            # examples whose text is recorded
CHARACTERS = 300     # of each text


class Rewind(Exception):
  """Step `step` was bad: restore the newest checkpoint, call Sentry.record_rewind, continue."""

  def __init__(self, step: int, message: str):
    super().__init__(message)
    self.step = step


class Sentry:
  """Checks the metrics of a run's steps: `logged = sentry.check(pending, state)` after each fetch.

  data: the run's Pipeline.
  vocabulary: decodes the examples of a bad batch.
  explain: explain(state, number) -> diagnosis.Finding for batch `number`; every process of the run
    makes the same calls.
  newest: returns the newest checkpoint's step, or None.
  step, offset: where the run starts. Entries of batches that it is yet to read are removed.
  write: whether this process writes the file and prints.
  """

  def __init__(self, workdir, settings: Settings, *, data, vocabulary,
               explain: Callable[..., Finding], newest: Callable[[], int | None], step: int = 0,
               offset: int = 0, log=print, write: bool = True):
    self._path = Path(workdir) / NAME
    self._settings, self._data, self._vocabulary = settings, data, vocabulary
    self._explain, self._newest = explain, newest
    self._offset = offset
    self._rewound_to, self._rewinds = -1, 0   # the newest target and the rewinds to it in a row
    self._log = log if write else lambda text: None
    self._write = write
    if write:
      jsonl.truncate(self._path, 'batch', step + offset)

  def check(self, pending: list, state) -> list:
    """Returns the [(step, metrics)] that the run logs, and reports the bad steps among them.

    pending: [(step, metrics)] on the host, in order. state: after the last of them.
    Errors: NumericalError under 'stop', or 'skip' after `patience` bad steps; Rewind if 'rewind'.
    """
    logged = []
    for i, (step, metrics) in enumerate(pending):
      halted = bool(metrics['halted'])
      if metrics['skipped']:
        # Bad steps leave the state as it was, so it is the bad step's unless a good one followed.
        is_exact = halted or all(later['skipped'] for _, later in pending[i:])
        line = self._report(step, metrics, state, is_exact)
        if halted:
          self._end(step, line)
      logged.append((step, {k: v for k, v in metrics.items() if k != 'halted'}))
    return logged

  def record_rewind(self, step: int, to: int) -> int:
    """Records that the bad step `step` sent the run back to checkpoint `to`.

    Returns the new offset. Errors: NumericalError after `patience` rewinds to one checkpoint.
    """
    self._rewinds = self._rewinds + 1 if to <= self._rewound_to else 1
    self._rewound_to = to
    if self._rewinds > self._settings.patience:
      raise NumericalError(
          f'step {step}: bad again before the next checkpoint, after {self._settings.patience} '
          f'rewinds to step {to} (guard.patience); details in {self._path}; lower optim.lr or '
          'set optim.clip')
    number = step + self._offset
    first = to + self._offset + 1
    self._offset += step - to
    self._append({'step': step, 'batch': number, 'rewound_to': to, 'offset': self._offset})
    self._log(f'rewound from step {step} to the checkpoint of step {to}; batches {first} to '
              f'{number} are left out')
    return self._offset

  def _end(self, step, line):
    newest = self._newest()
    line += f'; last good checkpoint: {f"step {newest}" if newest else "none yet"}'
    if self._settings.policy == 'rewind':
      raise Rewind(step, line)
    if self._settings.policy == 'skip':
      line += f'; {self._settings.patience} bad steps in a row (guard.patience)'
    else:
      line += '; guard.policy=skip or rewind continues without such a batch'
    raise NumericalError(line + '; or lower optim.lr, or set optim.clip')

  def _report(self, step, metrics, state, is_exact) -> str:
    """Records a bad step and returns the line that describes it; logs it if it is skipped."""
    number = step + self._offset
    numbers = {name: float(value) for name, value in metrics.items()
               if name not in ('skipped', 'halted', 'batch')}
    is_finite = all(math.isfinite(numbers[k]) for k in ('loss', 'grad_norm', 'param_norm'))
    kind = 'spike' if is_finite else 'nonfinite'

    # The cause, and the examples of the rows that it is in.
    finding = self._explain(state, number)
    cause = finding.text
    if not is_exact:
      cause += f', with the weights of update {int(state.step)}, some good steps later'
    ids = self._data.row_ids(number - 1)
    examples = [name for row in ids for name in row]
    blamed = [name for row in finding.rows for name in ids[row]]
    texts = self._texts(number, finding.rows or list(range(len(ids))), ids)
    self._append({
        'step': step, 'batch': number, 'kind': kind, **numbers, 'layer': finding.layer,
        'found': cause, 'rows': finding.rows, 'examples': examples, 'blamed': blamed,
        'text': texts, 'action': self._settings.policy})

    # The same in one line.
    line = f'step {step}: {_describe_numbers(kind, numbers)}; {cause}'
    if rows := finding.rows:
      line += f' (rows {", ".join(map(str, rows[:4]))}{", …" * (len(rows) > 4)})'
    line += (f'; the batch held {len(examples)} examples ({", ".join((blamed or examples)[:4])}, …;'
             f' all of them in {self._path})')
    if texts:
      first = f'{texts[0]["id"]}: {texts[0]["inputs"] or texts[0]["targets"]}'
      line += '; ' + ' '.join(first.split())[:120]
    if self._settings.policy == 'skip':
      self._log(line + '; skipped')
    return line

  def _texts(self, number, rows, ids) -> list[dict]:
    """Inputs and targets of the first examples of these rows."""
    rows = rows[:SHOWN]
    batch = self._data.batch(number - 1, rows)
    targets_side = 'decoder' if 'decoder_target_tokens' in batch else 'encoder'

    def decode(side, kind, i, segment):
      tokens = batch.get(f'{side}_{kind}_tokens')
      if tokens is None:
        return ''
      segments = batch.get(f'{side}_segment_ids')
      tokens = tokens[i] if segments is None else tokens[i][segments[i] == segment]
      return self._vocabulary.decode([int(t) for t in tokens])[:CHARACTERS]

    texts = []
    for i, row in enumerate(rows):
      for segment, name in enumerate(ids[row], start=1):
        texts.append({'id': name, 'inputs': decode('encoder', 'input', i, segment),
                      'targets': decode(targets_side, 'target', i, segment)})
    return texts[:SHOWN]

  def _append(self, entry):
    if self._write:
      with open(self._path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(entry, ensure_ascii=False) + '\n')


def _describe_numbers(kind, numbers) -> str:
  text = f'loss is {numbers["loss"]:g}, gradient norm {numbers["grad_norm"]:g}'
  if kind == 'spike':
    return text + f', {numbers["deviations"]:.1f} deviations above their running means'
  if math.isfinite(numbers['loss']) and math.isfinite(numbers['grad_norm']):
    return text + f', norm of the new parameters {numbers["param_norm"]:g}'
  return text


def read_anomalies(workdir) -> list[dict]:
  """Reads a run's anomalies.jsonl; [] if there is none."""
  return jsonl.read(Path(workdir) / NAME, 'batch')
