"""What a run tells: metrics.jsonl (exact), TensorBoard, and one live line (or plain ones).

metrics.jsonl has one JSON object a line, in order of step:

  {"step": 20, "loss": 5.25, …, "data": "9f86…", "timing": {"tokens_per_second": 9000.1, …}}
  {"step": 20, "eval": {"bleu": 11.7, …}}

the first a training row, the second an evaluation.

Floats are written with repr, so float() gives back the same bits; a non-finite one is NaN, Infinity
or -Infinity, as Python's json has it. Whatever depends on the clock is under "timing" and nothing
else is: without that key the file of a killed and resumed run equals that of an uninterrupted one.
"""

from collections.abc import Mapping
import json
import os
from pathlib import Path
import sys
import time

import rich.console
import rich.progress
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from t5lab.errors import Failure
from t5lab.runs import jsonl

PLAIN_SECONDS = 15.  # between lines where there is no terminal


class Report:
  """Writes a run's rows in `workdir`, continuing after `resume_step` (0: from the beginning).

  Rows after resume_step, which the resumed run will write again, and a torn last line are removed
  at construction; `evaluated` holds the steps that already have an evaluation row, so that a run
  killed between its checkpoint and its evaluation knows to evaluate.
  tty: a live bar (True), plain lines (False), or what `file` (default: standard output) is (None).
  """

  def __init__(self, workdir, *, resume_step: int, total_steps: int, tty: bool | None = None,
               file=None):
    self._file = file or sys.stdout
    self._bar = None
    self._printed = float('-inf')
    self._total = total_steps
    self._path = Path(workdir) / 'metrics.jsonl'
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self.evaluated = _truncate(self._path, resume_step)
      self._rows = open(self._path, 'a', encoding='utf-8')
    except OSError as e:
      raise Failure(f'cannot write {self._path}: {e.strerror}') from None
    self._board = _Board(Path(workdir) / 'tensorboard', resume_step, self.log)
    if self._file.isatty() if tty is None else tty:
      columns = rich.progress
      self._bar = rich.progress.Progress(
          columns.TextColumn('step'), columns.MofNCompleteColumn(), columns.BarColumn(),
          columns.TextColumn('{task.fields[line]}'),
          console=rich.console.Console(file=self._file, force_terminal=True))
      self._task = self._bar.add_task('', total=total_steps, completed=resume_step, line='')
      self._bar.start()

  def step(self, step: int, metrics: Mapping, timing: Mapping | None = None, *,
           data: str = '') -> None:
    """A training row: metrics are deterministic scalars, timing whatever the clock decides, data
    the digest of all batches so far (training/digests.py).

    The display shows metrics['loss'], timing['tokens_per_second'] and ['steps_per_second'].
    """
    metrics, timing = _scalars(metrics), _scalars(timing or {})
    if clash := {'step', 'eval', 'timing', 'data'} & metrics.keys():
      raise ValueError(f'metrics named {sorted(clash)}: these are keys of a row')
    self._write({'step': step, **metrics, **({'data': data} if data else {}), 'timing': timing})
    self._board.add(step, *(summary.scalar(f'{group}/{name}', value)
                            for group, values in (('train', metrics), ('timing', timing))
                            for name, value in values.items()))
    self._show(step, metrics, timing)

  def eval(self, step: int, metrics: Mapping) -> None:
    """An evaluation row; it is also printed."""
    metrics = _scalars(metrics)
    self._write({'step': step, 'eval': metrics})
    self.evaluated.add(step)
    self._board.add(step, *(summary.scalar(f'eval/{k}', v) for k, v in metrics.items()))
    self.log(f'step {step} eval ' + ' '.join(f'{k} {v:.4g}' for k, v in metrics.items()))

  def rewind(self, step: int) -> None:
    """Forgets the rows after `step`, which the run will write again."""
    self._rows.close()
    self.evaluated = _truncate(self._path, step)
    self._rows = open(self._path, 'a', encoding='utf-8')

  def text(self, step: int, tag: str, text: str) -> None:
    """A text such as sample predictions, for TensorBoard's text page (it reads markdown)."""
    self._board.add(step, summary.text(tag, text))

  def log(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
      print(text, file=self._file, flush=True)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()
    self._rows.close()
    self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _write(self, row):
    try:
      self._rows.write(json.dumps(row, ensure_ascii=False) + '\n')
      self._rows.flush()  # one write a line: a kill tears none
    except OSError as e:
      raise Failure(f'cannot write {self._path}: {e.strerror}') from None

  def _show(self, step, metrics, timing):
    parts = []
    if 'loss' in metrics:
      parts.append(f'loss {metrics["loss"]:.4f}')
    if 'tokens_per_second' in timing:
      parts.append(f'{timing["tokens_per_second"]:,.0f} tokens/s')
    if speed := timing.get('steps_per_second'):
      parts.append(f'{speed:.2f} steps/s')
      parts.append(f'ETA {_clock((self._total - step) / speed)}')
    line = ' · '.join(parts)
    if self._bar:
      self._bar.update(self._task, completed=step, line=line)
      return
    now = time.monotonic()
    if now - self._printed >= PLAIN_SECONDS or step >= self._total:
      self._printed = now
      self.log(f'step {step}/{self._total} · {line}')


class NoReport:
  """The report of every process but the main one: nothing is written, nothing said."""
  evaluated = frozenset()

  def step(self, step, metrics, timing=None, *, data=''):
    pass

  def eval(self, step, metrics):
    pass

  def rewind(self, step):
    pass

  def text(self, step, tag, text):
    pass

  def log(self, text):
    pass

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


class _Board:
  """TensorBoard's event file, written in place.

  tensorboardX' SummaryWriter hands events to a thread through a queue of ten: once a full disk has
  ended the thread, the next calls wait for ever. A run goes on without its TensorBoard instead.
  """

  def __init__(self, directory: Path, resume_step: int, log):
    self._log = log
    self._writer = None
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(directory / 'events'), f'.{os.getpid()}.{resume_step}')
    except OSError as e:
      self._log(f'no TensorBoard log: cannot write {directory}: {e.strerror}')
    # hides what an earlier process wrote after resume_step
    self._add(event_pb2.Event(step=resume_step + 1, session_log=event_pb2.SessionLog(
        status=event_pb2.SessionLog.START)))

  def add(self, step: int, *summaries) -> None:
    for each in summaries:
      self._add(event_pb2.Event(step=step, wall_time=time.time(), summary=each))
    self._call('flush')

  def close(self) -> None:
    self._call('close')

  def _add(self, event):
    self._call('write_event', event)

  def _call(self, method, *args):
    try:
      if self._writer:
        getattr(self._writer, method)(*args)
    except OSError as e:
      self._writer = None
      self._log(f'no more TensorBoard log: {e.strerror}')


def _truncate(path: Path, resume_step: int) -> set[int]:
  """Keeps the whole rows up to resume_step (none if 0) -> steps with an evaluation row."""
  last = resume_step or -1              # from the beginning, not even an evaluation of step 0
  return {row['step'] for row in jsonl.truncate(path, 'step', last) if 'eval' in row}


def _scalars(values: Mapping) -> dict:
  """Numbers or 0-d arrays -> int or float; float(float32) keeps its value exactly."""
  return {k: int(v) if isinstance(v, int) else float(v) for k, v in values.items()}


def _clock(seconds: float) -> str:
  """3725.2 -> '1:02:05'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
