"""metrics.jsonl of a killed and resumed run equals an uninterrupted run's; TensorBoard; display."""

import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from t5lab.runs.report import Report


def losses(step):
  return {'loss': np.float32(7) / np.float32(step), 'grad_norm': np.float32(0.1), 'skipped': 0}


def run(workdir, first, last, *, resume, evaluate=(), speed=1., tty=False, file=None):
  file = file or io.StringIO()
  with Report(workdir, resume_step=resume, total_steps=10, tty=tty, file=file) as r:
    for step in range(first, last + 1):
      r.step(step, losses(step), {'steps_per_second': speed, 'tokens_per_second': 1000 * speed})
      if step in evaluate:
        r.eval(step, {'bleu': 11.7})
        r.text(step, 'predictions', '*ein* Haus')
    return r


def entries(workdir):
  entries = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  for entry in entries:
    entry.pop('timing', None)
  return entries


def events(workdir):
  """[(tag or 'start', step)] of all event files, oldest first."""
  result = []
  for path in sorted((workdir / 'tensorboard').iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      size, = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12:12 + size])
      data = data[16 + size:]
      if event.HasField('session_log'):
        result.append(('start', event.step))
      result += [(value.tag, event.step) for value in event.summary.value]
  return result


def test_entries_are_literal_and_exact(tmp_path):
  with Report(tmp_path, resume_step=0, total_steps=10, tty=False, file=io.StringIO()) as r:
    r.step(1, {'loss': np.float32(0.1), 'skipped': 0}, {'steps_per_second': 2.5})
    r.step(2, {'loss': float('nan')})
    r.eval(2, {'bleu': 11.7, 'ema/bleu': 1e-30})
    # every entry is on disk immediately
    assert (tmp_path / 'metrics.jsonl').read_text() == (
        '{"step": 1, "loss": 0.10000000149011612, "skipped": 0, '
        '"timing": {"steps_per_second": 2.5}}\n'
        '{"step": 2, "loss": NaN, "timing": {}}\n'
        '{"step": 2, "eval": {"bleu": 11.7, "ema/bleu": 1e-30}}\n')
  assert np.float32(entries(tmp_path)[0]['loss']) == np.float32(0.1)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
  run(tmp_path / 'whole', 1, 10, resume=0, evaluate=(5, 10))
  run(tmp_path / 'cut', 1, 7, resume=0, evaluate=(5,), speed=3.)  # killed in step 8, saved at 5
  with open(tmp_path / 'cut/metrics.jsonl', 'a') as f:
    f.write('{"step": 8, "lo')
  r = run(tmp_path / 'cut', 6, 10, resume=5, evaluate=(10,), speed=2.)
  assert entries(tmp_path / 'cut') == entries(tmp_path / 'whole')
  assert r.evaluated == {5, 10}


def test_a_torn_line_is_removed_and_whole_lines_stay_as_they_are(tmp_path):
  run(tmp_path, 1, 3, resume=0)
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  for torn in (b'{"step": 3, "loss": 1.', b'\x00\x00\x00', b'\xff\xfe', b'[]', b'{"loss": 1}'):
    path.write_bytes(before + torn)
    run(tmp_path, 4, 3, resume=3)
    assert path.read_bytes() == before
  path.write_bytes(before[:-1])  # only the newline is missing
  run(tmp_path, 4, 3, resume=3)
  assert path.read_bytes() == before


def test_a_run_killed_before_its_evaluation_knows(tmp_path):
  run(tmp_path, 1, 5, resume=0, evaluate=(2,))
  assert run(tmp_path, 6, 5, resume=5).evaluated == {2}


def test_a_run_from_the_beginning_removes_everything(tmp_path):
  run(tmp_path, 1, 3, resume=0, evaluate=(2,))
  with Report(tmp_path, resume_step=0, total_steps=3, tty=False, file=io.StringIO()) as r:
    r.eval(0, {'bleu': 0.})
  assert run(tmp_path, 1, 2, resume=0).evaluated == set()
  assert [entry['step'] for entry in entries(tmp_path)] == [1, 2]


def test_keys_of_an_entry_are_reserved(tmp_path):
  with Report(tmp_path, resume_step=0, total_steps=3, tty=False, file=io.StringIO()) as r:
    with pytest.raises(ValueError, match=r"must not be named .*, got \['timing'\]"):
      r.step(1, {'timing': 1.})


def test_tensorboard_hides_what_will_be_written_again(tmp_path):
  run(tmp_path, 1, 2, resume=0)
  run(tmp_path, 2, 2, resume=1, evaluate=(2,))
  tags = ['train/loss', 'train/grad_norm', 'train/skipped', 'timing/steps_per_second',
          'timing/tokens_per_second']
  assert events(tmp_path) == [
      ('start', 1), *((t, 1) for t in tags), *((t, 2) for t in tags),
      ('start', 2), *((t, 2) for t in tags), ('eval/bleu', 2), ('predictions/text_summary', 2)]


def test_a_run_continues_without_tensorboard(tmp_path):
  (tmp_path / 'tensorboard').write_text('in the way')
  file = io.StringIO()
  run(tmp_path, 1, 50, resume=0, evaluate=(2,), file=file)
  assert len(entries(tmp_path)) == 51
  assert file.getvalue().count('TensorBoard is off: cannot write') == 1


def test_plain_lines_are_printed_rarely(tmp_path, monkeypatch):
  file, now = io.StringIO(), [100.]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Report(tmp_path, resume_step=0, total_steps=10, file=file) as r:
    for step in range(1, 11):
      r.step(step, {'loss': 1.5}, {'steps_per_second': 0.25, 'tokens_per_second': 12345.6})
      now[0] += 4.
    r.log('[done] {x}')
  assert file.getvalue().splitlines() == [
      'step 1/10 · loss 1.5000 · 12,346 tokens/s · 0.25 steps/s · ETA 0:00:36',
      'step 5/10 · loss 1.5000 · 12,346 tokens/s · 0.25 steps/s · ETA 0:00:20',
      'step 9/10 · loss 1.5000 · 12,346 tokens/s · 0.25 steps/s · ETA 0:00:04',
      'step 10/10 · loss 1.5000 · 12,346 tokens/s · 0.25 steps/s · ETA 0:00:00',
      '[done] {x}']


def test_live_line_on_a_terminal(tmp_path):
  file = io.StringIO()
  with Report(tmp_path, resume_step=3, total_steps=10, tty=True, file=file) as r:
    r.step(4, {'loss': 1.5}, {'steps_per_second': 2., 'tokens_per_second': 900.})
    r.log('saved [bold]step 4')
  text = file.getvalue()
  assert '4/10' in text and 'loss 1.5000' in text and 'ETA 0:00:03' in text
  assert text.count('saved [bold]step 4') == 1


def test_imports_neither_tensorflow_nor_jax():
  code = ('import sys, t5lab.runs.report\n'
          'print([m for m in ("tensorflow", "jax", "seqio") if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert done.stdout.strip() == '[]', done.stderr
