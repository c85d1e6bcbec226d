"""The reference run, measurements and the mark: only `make faults` runs these tests."""

import os
from pathlib import Path
import signal

import processes
import pytest


@pytest.hookimpl(tryfirst=True)      # before pytest applies -m
def pytest_collection_modifyitems(items):
  here = Path(__file__).parent
  for item in items:
    if here in item.path.parents:
      item.add_marker(pytest.mark.faults)


@pytest.fixture(scope='session', autouse=True)
def nothing_is_left_behind():
  """A SIGTERM to this program also ends the runs that it started: their `with` blocks unwind."""
  before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit('SIGTERM'))
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.fixture
def record(record_property):
  """record(name, value): a measurement for the scorecard."""
  def write(name, value):
    print(f'measured: {name} = {value}')
    record_property(name, value)
  return write


@pytest.fixture(scope='session')
def common(tmp_path_factory):
  """A folder of this session, which parallel test processes share."""
  folder = os.environ.get('T5LAB_FAULTS_DIR')      # set by the scorecard
  return Path(folder) if folder else tmp_path_factory.mktemp('common')


@pytest.fixture(scope='session')
def reference(common):
  """The run R without a fault, in a process of its own with one device."""
  return processes.shared(common, 'R', processes.train)
