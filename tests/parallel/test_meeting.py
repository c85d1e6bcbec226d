"""Processes that meet over TCP, as threads; and those that do not come."""

import contextlib
import json
import socket
import threading
import time

import pytest

from t5lab.errors import UsageError
from t5lab.parallel.meeting import Meeting, Place, whereabouts


@pytest.fixture
def address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def together(address, count, work, who=None, seconds=3., clocks=None):
  """work(meeting) in each of the processes `who` -> {index: result or UsageError's text}."""
  results = {}

  def one(i):
    shift = (clocks or {}).get(i, 0)
    try:
      with Meeting(Place(address, count, i), seconds, lambda: time.time() + shift) as meeting:
        results[i] = work(meeting)
    except UsageError as e:
      results[i] = str(e)
  threads = [threading.Thread(target=one, args=(i,)) for i in who or range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


def test_what_each_says_all_hear(address):
  def work(meeting):
    first = meeting.exchange({'i': meeting.place.index}, 3)
    return first, meeting.exchange('x' * meeting.place.index, 3)
  expected = [{'i': 0}, {'i': 1}, {'i': 2}], ['', 'x', 'xx']
  assert together(address, 3, work) == dict.fromkeys(range(3), expected)


def test_one_process_meets_itself():
  with Meeting(Place(), 0.) as meeting:
    assert meeting.exchange([1], 0) == [[1]]


def test_who_does_not_come_is_named_in_time(address):
  said = together(address, 4, lambda m: 'met', who=(0, 2), seconds=0.6)
  for i in (0, 2):
    assert said[i].startswith(f'processes 1, 3 of 4 did not come to {address} within 0.6 s; came: '
                              '0, 2')


def test_a_coordinator_that_is_not_there_is_named(address):
  said = together(address, 2, lambda m: 'met', who=(1,), seconds=0.5)[1]
  assert f'cannot reach the coordinator at {address} within 0.5 s: Connection refused' in said


def test_who_comes_and_falls_silent_is_named(address):
  def work(meeting):
    if meeting.place.index == 1:
      return 'went away'
    return meeting.exchange('here', 2)
  said = together(address, 3, work)
  assert said[1] == 'went away'
  assert said[0] == said[2] and said[0].startswith('process 1 of 3 came, but said nothing more')


def test_a_wrong_number_of_processes_is_told(address):
  results = {}

  def other():
    try:
      Meeting(Place(address, 3, 1), 2.)
    except UsageError as e:
      results[1] = str(e)
  thread = threading.Thread(target=other)
  thread.start()
  with pytest.raises(UsageError, match='it is 1 of 3; process 0 expects 1 to 1 of 2, each once'):
    Meeting(Place(address, 2, 0), 2.)
  thread.join()
  assert 'it is 1 of 3' in results[1]


def test_a_port_in_use_is_named(address):
  port = int(address.rpartition(':')[2])
  with socket.create_server(('', port)):
    with pytest.raises(UsageError, match=f'cannot listen on port {port}'):
      Meeting(Place(address, 2, 0), 1.)


def test_strangers_are_not_understood(address):
  """A scanner's knock, a line that never ends, JSON that is no hello: the meeting takes place."""
  host, _, port = address.rpartition(':')
  stop = threading.Event()

  def knock():
    for text in (b'GET / HTTP/1.1\r\n\r\n', b'[1]\n', json.dumps({'index': 'x'}).encode() + b'\n',
                 b'{' * (1 << 21)):
      while not stop.is_set():
        with contextlib.suppress(OSError):
          with socket.create_connection((host, int(port)), timeout=1) as s:
            s.sendall(text)
            break
        time.sleep(0.01)
  thread = threading.Thread(target=knock)
  thread.start()

  def work(meeting):
    return meeting.exchange(meeting.place.index, 3)
  def later(meeting):
    return work(meeting)
  timer = threading.Thread(target=lambda: (time.sleep(0.5), results.update(
      together(address, 2, later, who=(1,)))))
  results = {}
  timer.start()
  results.update(together(address, 2, work, who=(0,), seconds=8))
  timer.join()
  stop.set()
  thread.join()
  assert results == {0: [0, 1], 1: [0, 1]}


def test_clocks_are_compared(address):
  offsets = together(address, 3, lambda m: m.offsets, clocks={1: 7., 2: -3600.})[0]
  assert offsets[0] == (0., 0.)
  for i, ahead in ((1, 7.), (2, -3600.)):
    found, doubt = offsets[i]
    assert abs(found - ahead) <= doubt + 1e-3 and 0 <= doubt < 0.5


@pytest.mark.parametrize('environment, place', [
    ({}, Place()), ({'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0',
                     'JAX_COORDINATOR_ADDRESS': 'h:1'}, Place()),
    ({'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3', 'JAX_COORDINATOR_ADDRESS': 'h:8476'},
     Place('h:8476', 4, 3)),
    ({'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[3-4]', 'SLURM_NTASKS': '2',
      'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', 'JAX_COORDINATOR_PORT': '8476'},
     Place('n3:8476', 2, 1))])
def test_whereabouts(monkeypatch, environment, place):
  for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'JAX_COORDINATOR_ADDRESS'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert whereabouts(1) == place


@pytest.mark.parametrize('environment, says', [
    ({'JAX_COORDINATOR_ADDRESS': 'h:8476'}, 'JAX_COORDINATOR_ADDRESS=h:8476'),
    ({'JAX_COORDINATOR_ADDRESS': 'h', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'},
     'HOST:8476'),
    ({'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, '0 to 1'),
    ({'JAX_NUM_PROCESSES': 'two'}, "'two'")])
def test_whereabouts_that_are_none(monkeypatch, environment, says):
  for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'JAX_COORDINATOR_ADDRESS'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UsageError, match=says):
    whereabouts(1)
