"""Files replaced whole or not at all, bounded reads, the progress line."""

import io
import json
import os

import pytest

from t5lab import files
from t5lab.errors import CheckpointError, DataError, UsageError


def names(folder):
  return sorted(path.name for path in folder.iterdir())


# --- writing -----------------------------------------------------------------------------------


def test_the_new_content_appears_when_the_block_ends(tmp_path):
  path = tmp_path / 'f'
  files.write_text(path, 'old ü\r\n')
  assert path.read_bytes() == 'old ü\r\n'.encode()
  with files.replacing(path) as f:
    f.write(b'new')
    f.flush()
    assert path.read_bytes() == 'old ü\r\n'.encode() and names(tmp_path) == ['.f.tmp', 'f']
  assert path.read_bytes() == b'new' and names(tmp_path) == ['f']


@pytest.mark.parametrize('failing', ['block', 'fsync', 'replace'])
def test_a_failure_keeps_the_old_content_and_leaves_nothing_else(failing, tmp_path, monkeypatch):
  path = tmp_path / 'f'
  path.write_text('old')

  def fail(*args):
    raise OSError(28, 'No space left on device')

  if failing != 'block':
    monkeypatch.setattr(os, failing, fail)
  with pytest.raises(OSError, match='No space left on device'):
    with files.replacing(path, 'w') as f:
      f.write('new' * 100_000)
      if failing == 'block':
        fail()
  assert path.read_text() == 'old' and names(tmp_path) == ['f']


def test_an_interrupt_keeps_the_old_content(tmp_path):
  (tmp_path / 'f').write_text('old')
  with pytest.raises(KeyboardInterrupt):
    with files.replacing(tmp_path / 'f', 'w') as f:
      f.write('new')
      raise KeyboardInterrupt
  assert (tmp_path / 'f').read_text() == 'old' and names(tmp_path) == ['f']


def test_the_temporary_file_of_a_killed_writer_is_reused(tmp_path):
  (tmp_path / '.f.tmp').write_text('a long half-written text')
  files.write_text(tmp_path / 'f', 'new')
  assert (tmp_path / 'f').read_text() == 'new' and names(tmp_path) == ['f']


def test_two_writers_with_a_suffix_each(tmp_path):
  with files.replacing(tmp_path / 'f', suffix='.1') as one:
    with files.replacing(tmp_path / 'f', suffix='.2') as two:
      one.write(b'one')
      two.write(b'two')
    assert (tmp_path / 'f').read_bytes() == b'two'
  assert (tmp_path / 'f').read_bytes() == b'one' and names(tmp_path) == ['f']


def test_a_planted_link_is_not_followed(tmp_path):
  (tmp_path / 'elsewhere').write_text('precious')
  (tmp_path / '.f.tmp').symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(OSError):
    files.write_text(tmp_path / 'f', 'new')
  assert (tmp_path / 'elsewhere').read_text() == 'precious'


# --- reading -----------------------------------------------------------------------------------


def test_the_size_limit(tmp_path):
  path = tmp_path / 'f'
  path.write_bytes(b'x' * 1000)
  assert files.read_bytes(path, 1000) == b'x' * 1000
  with pytest.raises(DataError, match=f'^{path} has 1,000 bytes; the limit .* is 999$'):
    files.read_bytes(path, 999, DataError)
  with pytest.raises(UsageError, match='has 1,048,577 bytes; .* is 1,048,576$'):
    path.write_bytes(b' ' * ((1 << 20) + 1))
    files.read_json(path)


def test_a_fifo_or_a_directory_is_refused_without_opening_it(tmp_path):
  os.mkfifo(tmp_path / 'fifo')
  for path in (tmp_path / 'fifo', tmp_path):
    with pytest.raises(CheckpointError, match=f'^{path} is not a regular file$'):
      files.read_bytes(path, 10, CheckpointError)
  files.check_regular(tmp_path / 'missing')        # open() has the better message


def test_a_file_that_does_not_exist(tmp_path):
  with pytest.raises(FileNotFoundError):
    files.read_bytes(tmp_path / 'f', 10)
  with pytest.raises(DataError, match='^cannot read .*/f: No such file or directory$'):
    files.read_json(tmp_path / 'f', error=DataError)


@pytest.mark.parametrize('data, message', [
    (b'{', 'f.json is not valid JSON: Expecting property name'),
    (b'{"a": \xff}', 'f.json is not valid JSON: .*0xff'),
    (b'[' * 100_000, 'f.json is not valid JSON: maximum recursion depth'),
    (b'[1]', 'f.json must hold a JSON object, got list'),
    (b'null', 'f.json must hold a JSON object, got NoneType')])
def test_what_is_not_a_json_object(data, message, tmp_path):
  (tmp_path / 'f.json').write_bytes(data)
  with pytest.raises(DataError, match=message) as e:
    files.read_json(tmp_path / 'f.json', error=DataError)
  assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_json_object(tmp_path):
  (tmp_path / 'f.json').write_text(json.dumps({'ü': [1]}))
  assert files.read_json(tmp_path / 'f.json') == {'ü': [1]}


# --- progress ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [100.]
  monkeypatch.setattr(files.time, 'monotonic', lambda: now[0])
  return now


def test_progress_with_a_total(clock):
  file = io.StringIO()
  progress = files.Progress('cleaning', 'records', 4000, file=file)
  clock[0] += 4.9
  progress.add(600)
  assert file.getvalue() == ''
  clock[0] += 5.1
  progress.add(400)
  assert file.getvalue() == 'cleaning: 1,000 of 4,000 records · 100 records/s · ETA 0:30\n'
  clock[0] += 10
  progress.done()
  assert file.getvalue().splitlines()[1:] == [
      'cleaning: 1,000 of 4,000 records · 50 records/s · done']


@pytest.mark.parametrize('total, fraction, end', [
    (None, None, ''), (None, 0.1, ' · ETA 12:00'), (4000, 0.5, ' · ETA 1:20'),
    (500, None, ''), (None, 0., '')])
def test_the_time_left(total, fraction, end, clock):
  file = io.StringIO()
  progress = files.Progress('x', 'rows', total, file=file)
  clock[0] += 80
  progress.add(1000, fraction)
  assert file.getvalue().removesuffix('\n').partition('rows/s')[2] == end


def test_a_terminals_line_is_redrawn_every_second(clock):
  file = Terminal()
  progress = files.Progress('x', 'rows', file=file)
  for _ in range(4):
    clock[0] += 0.5
    progress.add(10)
  assert file.getvalue() == '\rx: 20 rows · 20 rows/s   \rx: 40 rows · 20 rows/s   '
  progress.done()
  assert file.getvalue().endswith('\rx: 40 rows · 20 rows/s · done   \n')


def test_short_work_prints_nothing(clock):
  file = io.StringIO()
  with files.Progress('x', 'rows', file=file) as progress:
    clock[0] += 4.9
    progress.add(10)
  assert file.getvalue() == ''


def test_a_block_that_fails_is_not_done_and_ends_the_line(clock):
  file = Terminal()
  with pytest.raises(KeyError), files.Progress('x', 'rows', file=file) as progress:
    clock[0] += 2
    progress.add(10)
    raise KeyError
  assert file.getvalue() == '\rx: 10 rows · 5 rows/s   \n'
