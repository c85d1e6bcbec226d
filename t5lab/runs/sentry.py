"""The host's side of the guard: what a bad step was, said and written down, and what follows.

  anomalies.jsonl    one JSON object a bad step, in the order in which they came:

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
SHOWN = 3            # examples whose text is written
CHARACTERS = 300     # of each text


class Rewind(Exception):
  """Step `step` was bad: restore the newest checkpoint, call Sentry.record_rewind, continue."""

  def __init__(self, step: int, message: str):
    super().__init__(message)
    self.step = step


class Sentry:
  """`rows = sentry.check(pending, state)` after each fetch of metrics.

  data: the run's Pipeline. vocabulary: decodes. explain(state, number) -> diagnosis.Finding for
  batch `number`, the same call in every process of the run. newest() -> the newest checkpoint or
  None. step, offset: where the run starts; records of batches that it is still to read are removed.
  write: whether this process writes the file and the lines.
  """

  def __init__(self, workdir, settings: Settings, *, data, vocabulary,
               explain: Callable[..., Finding], newest: Callable[[], int | None], step: int = 0,
               offset: int = 0, log=print, write: bool = True):
    self._path = Path(workdir) / NAME
    self._settings, self._data, self._vocabulary = settings, data, vocabulary
    self._explain, self._newest = explain, newest
    self._offset = offset
    self._rewound_to, self._rewinds = -1, 0
    self._log = log if write else lambda text: None
    self._write = write
    if write:
      jsonl.truncate(self._path, 'batch', step + offset)

  def check(self, pending: list, state) -> list:
    """[(step, metrics)] from the host, steps in order -> those that are rows of the run.

    state: after the last of them. Reports the bad ones. NumericalError under 'stop' and after
    `patience` bad steps in a row; Rewind under 'rewind'.
    """
    rows = []
    for i, (step, metrics) in enumerate(pending):
      halted = bool(metrics['halted'])
      if metrics['skipped']:
        exact = halted or all(m['skipped'] for _, m in pending[i:])
        line = self._report(step, metrics, state, exact)
        if halted:
          self._end(step, line)
      rows.append((step, {k: v for k, v in metrics.items() if k != 'halted'}))
    return rows

  def record_rewind(self, step: int, to: int) -> int:
    """The run stands at checkpoint `to` again, after the bad step `step` -> the new offset.

    NumericalError if it came back there more than `patience` times.
    """
    self._rewinds = self._rewinds + 1 if to <= self._rewound_to else 1
    self._rewound_to = to
    if self._rewinds > self._settings.patience:
      raise NumericalError(
          f'step {step}: bad again before the next checkpoint, after {self._settings.patience} '
          f'rewinds to step {to} (guard.patience); all of it in {self._path}; lower optim.lr or '
          'set optim.clip')
    number = step + self._offset
    self._offset += step - to
    self._append({'step': step, 'batch': number, 'rewound_to': to, 'offset': self._offset})
    self._log(f'rewound from step {step} to the checkpoint of step {to}; batches '
              f'{number - step + to + 1} to {number} are left out')
    return self._offset

  def _end(self, step, line):
    kept = self._newest()
    line += f'; last good checkpoint: {f"step {kept}" if kept else "none yet"}'
    if self._settings.policy == 'rewind':
      raise Rewind(step, line)
    if self._settings.policy == 'skip':
      line += f'; {self._settings.patience} bad steps in a row (guard.patience)'
    else:
      line += '; guard.policy=skip or rewind goes on without such a batch'
    raise NumericalError(line + '; or lower optim.lr, or set optim.clip')

  def _report(self, step, metrics, state, exact) -> str:
    """Writes the record -> the line that says what it was."""
    number = step + self._offset
    numbers = {k: float(v) for k, v in metrics.items() if k not in ('skipped', 'halted', 'batch')}
    finite = all(math.isfinite(numbers[k]) for k in ('loss', 'grad_norm', 'param_norm'))
    kind = 'spike' if finite else 'nonfinite'
    finding = self._explain(state, number)
    ids = self._data.row_ids(number - 1)
    blamed = [i for row in finding.rows for i in ids[row]]
    every = [i for row in ids for i in row]
    text = self._text(number, finding.rows or list(range(len(ids))), ids)
    found = finding.text if exact else (
        f'{finding.text}, with the weights of {step_name(state)}, some good steps later')
    self._append({
        'step': step, 'batch': number, 'kind': kind, **numbers, 'layer': finding.layer,
        'found': found, 'rows': finding.rows, 'examples': every, 'blamed': blamed, 'text': text,
        'action': self._settings.policy})
    what = f'loss is {numbers["loss"]:g}, gradient norm {numbers["grad_norm"]:g}'
    if kind == 'spike':
      what += f', {numbers["deviations"]:.1f} deviations above their running means'
    elif math.isfinite(numbers['loss']) and math.isfinite(numbers['grad_norm']):
      what += f', norm of the new parameters {numbers["param_norm"]:g}'
    shown = ', '.join(map(str, finding.rows[:4])) + ', …' * (len(finding.rows) > 4)
    rows = f' (rows {shown})' * bool(finding.rows)
    line = (f'step {step}: {what}; {found}{rows}; the batch held {len(every)} examples '
            f'({", ".join((blamed or every)[:4])}, …; all in {self._path})')
    if text:
      first = f'{text[0]["id"]}: {text[0]["inputs"] or text[0]["targets"]}'
      line += '; ' + ' '.join(first.split())[:120]
    if self._settings.policy == 'skip':
      self._log(line + '; skipped')
    return line

  def _text(self, number, rows, ids) -> list[dict]:
    """Inputs and targets of the first examples of these rows."""
    rows = rows[:SHOWN]
    batch, texts = self._data.batch(number - 1, rows), []
    for at, row in enumerate(rows):
      for segment, name in enumerate(ids[row], start=1):
        def text(side, kind, at=at, segment=segment):
          tokens = batch.get(f'{side}_{kind}_tokens')
          if tokens is None:
            return ''
          segments = batch.get(f'{side}_segment_ids')
          mine = tokens[at] if segments is None else tokens[at][segments[at] == segment]
          return self._vocabulary.decode([int(t) for t in mine])[:CHARACTERS]
        side = 'decoder' if 'decoder_target_tokens' in batch else 'encoder'
        texts.append({'id': name, 'inputs': text('encoder', 'input'),
                      'targets': text(side, 'target')})
    return texts[:SHOWN]

  def _append(self, record):
    if self._write:
      with open(self._path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(record, ensure_ascii=False) + '\n')


def step_name(state) -> str:
  return f'update {int(state.step)}'


def read_anomalies(workdir) -> list[dict]:
  """The whole lines of a run's anomalies.jsonl; [] where there is none."""
  return jsonl.read(Path(workdir) / NAME, 'batch')
