"""The progress line: on a terminal it is redrawn, elsewhere printed, and short work has none."""

import io

import pytest

from t5lab import files


@pytest.fixture
def clock(monkeypatch):
  """clock.now is the time."""
  clock = type('Clock', (), {'now': 0.})()
  monkeypatch.setattr(files.time, 'monotonic', lambda: clock.now)
  return clock


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_in_a_log(clock):
  log = io.StringIO()
  with files.Progress('reading', 'rows', 1000, file=log) as progress:
    for clock.now in (1., 4.9, 5., 9., 10., 11.):
      progress.add(100)
  assert log.getvalue() == ('reading: 300 of 1,000 rows · 60 rows/s · ETA 0:11\n'
                            'reading: 500 of 1,000 rows · 50 rows/s · ETA 0:10\n'
                            'reading: 600 of 1,000 rows · 55 rows/s · done\n')


@pytest.mark.parametrize('fraction, eta', [(None, ''), (0.25, ' · ETA 0:30'), (0., ''), (2., '')])
def test_the_fraction_done_gives_the_time_left(clock, fraction, eta):
  log = io.StringIO()
  progress = files.Progress('reading', 'rows', file=log)
  clock.now = 10.
  progress.add(20, fraction)
  assert log.getvalue() == f'reading: 20 rows · 2 rows/s{eta}\n'


def test_progress_on_a_terminal(clock):
  terminal = Terminal()
  with pytest.raises(KeyError), files.Progress('reading', 'rows', file=terminal) as progress:
    clock.now = 2.
    progress.add(8)
    raise KeyError
  assert terminal.getvalue() == '\rreading: 8 rows · 4 rows/s   \n'      # never done


def test_short_work_prints_nothing(clock):
  log = io.StringIO()
  with files.Progress('reading', 'rows', file=log) as progress:
    clock.now = 4.9
    progress.add(8)
  assert log.getvalue() == ''
