"""The record of a run: metrics.jsonl (exact), TensorBoard, and a progress bar or plain lines.

metrics.jsonl has one JSON object per line, in order of step. A training entry and an evaluation:

  {"step": 20, "loss": 5.25, …, "data": "9f86…", "timing": {"tokens_per_second": 9000.1, …}}
  {"step": 20, "eval": {"bleu": 11.7, …}}

Floats are written with repr, so float() gives back the same bits; a non-finite one is NaN, Infinity
or -Infinity, as in Python's json. Everything that depends on the clock is under "timing": without
that key, the file of a killed and resumed run equals that of an uninterrupted one.
"""

from collections.abc import Mapping
import contextlib
import json
import os
from pathlib import Path
import sys
import time

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from t5lab.errors import Failure
from t5lab.runs import jsonl

PLAIN_SECONDS = 15.  # between lines without a terminal
RESERVED = {'step', 'eval', 'timing', 'data'}  # keys of an entry that are not metrics


class Report(contextlib.AbstractContextManager):
  """Writes a run's entries in `workdir`, continuing after `resume_step` (0: from the beginning).

  The constructor removes entries after resume_step, which the resumed run will write again, and a
  torn last line. `evaluated` holds the steps that have an evaluation entry, so that a run that was
  killed between its checkpoint and its evaluation evaluates when it resumes.
  """

  def __init__(self, workdir, *, resume_step: int, total_steps: int, tty: bool | None = None,
               file=None):
    """tty: a progress bar (True) or plain lines (False); None: a bar if `file` is a terminal.
    file: where the run is shown; default: standard output."""
    self._file, self._total = file or sys.stdout, total_steps
    self._last_shown, self._bar = float('-inf'), None
    self._path = Path(workdir) / 'metrics.jsonl'
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._open_entries(resume_step)
    except OSError as e:
      raise Failure(f'cannot write {self._path}: {e.strerror}') from None
    self._board = _Board(Path(workdir) / 'tensorboard', resume_step, self.log)
    if self._file.isatty() if tty is None else tty:
      self._bar = Progress(
          TextColumn('step'), MofNCompleteColumn(), BarColumn(), TextColumn('{task.fields[line]}'),
          console=rich.console.Console(file=self._file, force_terminal=True))
      self._task = self._bar.add_task('', total=total_steps, completed=resume_step, line='')
      self._bar.start()

  def step(self, step: int, metrics: Mapping, timing: Mapping | None = None, *,
           data: str = '') -> None:
    """Writes a training entry.

    metrics: deterministic scalars. timing: scalars that depend on the clock. data: the digest of
    all batches so far (training/digests.py).
    The display shows metrics['loss'], timing['tokens_per_second'] and ['steps_per_second'].
    """
    metrics, timing = _scalars(metrics), _scalars(timing or {})
    if clash := RESERVED & metrics.keys():
      raise ValueError(f'metrics must not be named {sorted(RESERVED)}, got {sorted(clash)}')
    digest = {'data': data} if data else {}
    self._write({'step': step, **metrics, **digest, 'timing': timing})
    scalars = {f'train/{name}': value for name, value in metrics.items()}
    scalars |= {f'timing/{name}': value for name, value in timing.items()}
    self._board.add_scalars(step, scalars)
    self._show(step, metrics, timing)

  def eval(self, step: int, metrics: Mapping) -> None:
    """Writes an evaluation entry and prints it."""
    metrics = _scalars(metrics)
    self._write({'step': step, 'eval': metrics})
    self.evaluated.add(step)
    self._board.add_scalars(step, {f'eval/{name}': value for name, value in metrics.items()})
    shown = ' '.join(f'{name} {value:.4g}' for name, value in metrics.items())
    self.log(f'step {step} eval {shown}')

  def rewind(self, step: int) -> None:
    """Removes the entries after `step`, which the run will write again."""
    self._entries.close()
    self._open_entries(step)

  def text(self, step: int, tag: str, text: str) -> None:
    """Adds a text, e.g. sample predictions, to TensorBoard's text page, which reads markdown."""
    self._board.add(step, summary.text(tag, text))

  def log(self, text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
      print(text, file=self._file, flush=True)

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()
    self._entries.close()
    self._board.close()

  def _open_entries(self, step):
    """Opens metrics.jsonl to append after `step`."""
    # From the beginning (0), not even an evaluation of step 0 stays.
    entries = jsonl.truncate(self._path, 'step', step or -1)
    self.evaluated = {entry['step'] for entry in entries if 'eval' in entry}
    self._entries = open(self._path, 'a', encoding='utf-8')

  def _write(self, entry):
    try:
      self._entries.write(json.dumps(entry, ensure_ascii=False) + '\n')
      self._entries.flush()  # one write per line: a kill does not tear it
    except OSError as e:
      raise Failure(f'cannot write {self._path}: {e.strerror}') from None

  def _show(self, step, metrics, timing):
    fields = []
    if 'loss' in metrics:
      fields.append(f'loss {metrics["loss"]:.4f}')
    if 'tokens_per_second' in timing:
      fields.append(f'{timing["tokens_per_second"]:,.0f} tokens/s')
    if speed := timing.get('steps_per_second'):
      fields.append(f'{speed:.2f} steps/s')
      fields.append(f'ETA {_clock((self._total - step) / speed)}')
    line = ' · '.join(fields)
    if self._bar:
      self._bar.update(self._task, completed=step, line=line)
      return
    now = time.monotonic()
    if now - self._last_shown >= PLAIN_SECONDS or step >= self._total:
      self._last_shown = now
      self.log(f'step {step}/{self._total} · {line}')


class NoReport(contextlib.AbstractContextManager):
  """The report of every process but the main one: writes and prints nothing."""
  evaluated = frozenset()

  def _ignore(self, *args, **kwargs):
    pass

  step = eval = rewind = text = log = __exit__ = _ignore


class _Board:
  """TensorBoard's event file, written in this thread.

  tensorboardX's SummaryWriter passes events to a thread through a queue of ten: once a full disk
  has ended that thread, later calls block forever. Here a failed write ends only TensorBoard's log.
  """

  def __init__(self, directory: Path, resume_step: int, log):
    self._log = log
    self._writer = None
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._writer = EventsWriter(str(directory / 'events'), f'.{os.getpid()}.{resume_step}')
    except OSError as e:
      self._log(f'TensorBoard is off: cannot write {directory}: {e.strerror}')
    # Makes TensorBoard hide what an earlier process wrote after resume_step.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._call('write_event', event_pb2.Event(step=resume_step + 1, session_log=start))

  def add_scalars(self, step: int, scalars: Mapping) -> None:
    self.add(step, *(summary.scalar(name, value) for name, value in scalars.items()))

  def add(self, step: int, *summaries) -> None:
    for each in summaries:
      event = event_pb2.Event(step=step, wall_time=time.time(), summary=each)
      self._call('write_event', event)
    self._call('flush')

  def close(self) -> None:
    self._call('close')

  def _call(self, method, *args):
    if not self._writer:
      return
    try:
      getattr(self._writer, method)(*args)
    except OSError as e:
      self._writer = None
      self._log(f'TensorBoard is off from here on: {e.strerror}')


def _scalars(values: Mapping) -> dict:
  """Numbers or 0-d arrays -> int or float; float(float32) keeps its value exactly."""
  return {k: int(v) if isinstance(v, int) else float(v) for k, v in values.items()}


def _clock(seconds: float) -> str:
  """3725.2 -> '1:02:05'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
