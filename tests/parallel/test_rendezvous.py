"""Processes that connect over TCP, as threads; and those that do not come."""

import contextlib
import json
import socket
import threading
import time

import pytest

from t5lab.errors import UsageError
from t5lab.parallel.rendezvous import VARIABLES, ProcessAddress, Rendezvous, find_address


@pytest.fixture
def address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def run_processes(address, count, work, indices=None, seconds=3., clocks=None):
  """work(rendezvous) in each process of `indices` -> {index: its result or UsageError's text}."""
  results = {}

  def run(i):
    shift = (clocks or {}).get(i, 0)
    clock = lambda: time.time() + shift
    try:
      with Rendezvous(ProcessAddress(address, count, i), seconds, clock) as rendezvous:
        results[i] = work(rendezvous)
    except UsageError as e:
      results[i] = str(e)
  threads = [threading.Thread(target=run, args=(i,)) for i in indices or range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


def test_every_process_gets_all_values(address):
  def work(rendezvous):
    first = rendezvous.exchange({'i': rendezvous.address.index}, 3)
    return first, rendezvous.exchange('x' * rendezvous.address.index, 3)
  expected = [{'i': 0}, {'i': 1}, {'i': 2}], ['', 'x', 'xx']
  assert run_processes(address, 3, work) == dict.fromkeys(range(3), expected)


def test_one_process_alone():
  with Rendezvous(ProcessAddress(), 0.) as rendezvous:
    assert rendezvous.exchange([1], 0) == [[1]]


def test_missing_processes_are_named_in_time(address):
  results = run_processes(address, 4, lambda r: 'connected', indices=(0, 2), seconds=0.6)
  for i in (0, 2):
    assert results[i].startswith(
        f'processes 1, 3 of 4 did not connect to {address} within 0.6 s; connected: 0, 2')


def test_a_missing_coordinator_is_named(address):
  results = run_processes(address, 2, lambda r: 'connected', indices=(1,), seconds=0.5)
  assert (f'process 1 on {socket.gethostname()} cannot reach the coordinator at {address} within '
          '0.5 s: Connection refused') in results[1]


def test_a_process_that_falls_silent_is_named(address):
  def work(rendezvous):
    if rendezvous.address.index == 1:
      return 'left'
    return rendezvous.exchange('present', 2)
  results = run_processes(address, 3, work)
  assert results[1] == 'left'
  assert results[0] == results[2]
  assert results[0].startswith('process 1 of 3 connected, but then sent nothing within 2 s')


def test_a_wrong_number_of_processes_is_reported_to_both(address):
  errors = {}

  def other():
    try:
      Rendezvous(ProcessAddress(address, 3, 1), 2.)
    except UsageError as e:
      errors[1] = str(e)
  thread = threading.Thread(target=other)
  thread.start()
  with pytest.raises(UsageError,
                     match='process 1 of 3; process 0 expects 1 to 1 of 2, each once'):
    Rendezvous(ProcessAddress(address, 2, 0), 2.)
  thread.join()
  assert 'claims to be process 1 of 3' in errors[1]


def test_a_port_in_use_is_named(address):
  port = int(address.rpartition(':')[2])
  with socket.create_server(('', port)):
    with pytest.raises(UsageError, match=f'process 0 cannot listen on coordinator port {port}'):
      Rendezvous(ProcessAddress(address, 2, 0), 1.)


def test_strangers_are_ignored(address):
  """A port scan, a line that never ends and JSON that is no hello do not disturb a rendezvous."""
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
  stranger = threading.Thread(target=knock)
  stranger.start()

  results = {}

  def work(rendezvous):
    return rendezvous.exchange(rendezvous.address.index, 3)

  def start_late():
    time.sleep(0.5)
    results.update(run_processes(address, 2, work, indices=(1,)))
  late = threading.Thread(target=start_late)
  late.start()
  results.update(run_processes(address, 2, work, indices=(0,), seconds=8))
  late.join()
  stop.set()
  stranger.join()
  assert results == {0: [0, 1], 1: [0, 1]}


def test_clocks_are_compared(address):
  offsets = run_processes(address, 3, lambda r: r.offsets, clocks={1: 7., 2: -3600.})[0]
  assert offsets[0] == (0., 0.)
  for i, ahead in ((1, 7.), (2, -3600.)):
    measured, uncertainty = offsets[i]
    assert abs(measured - ahead) <= uncertainty + 1e-3 and 0 <= uncertainty < 0.5


@pytest.fixture
def environment(monkeypatch, request):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in request.param.items():
    monkeypatch.setenv(name, value)


@pytest.mark.parametrize('environment, address', [
    ({}, ProcessAddress()),
    ({'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0', 'JAX_COORDINATOR_ADDRESS': 'h:1'},
     ProcessAddress()),
    ({'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3', 'JAX_COORDINATOR_ADDRESS': 'h:8476'},
     ProcessAddress('h:8476', 4, 3)),
    ({'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[3-4]', 'SLURM_NTASKS': '2',
      'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', 'JAX_COORDINATOR_PORT': '8476'},
     ProcessAddress('n3:8476', 2, 1)),
], indirect=['environment'])
def test_the_address_comes_from_jax_variables_or_the_cluster(environment, address):
  assert find_address(1) == address


@pytest.mark.parametrize('environment, message', [
    ({'JAX_COORDINATOR_ADDRESS': 'h:8476'}, 'got JAX_COORDINATOR_ADDRESS=h:8476'),
    ({'JAX_COORDINATOR_ADDRESS': 'h', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'},
     'HOST:8476'),
    ({'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'},
     'JAX_PROCESS_ID must be 0 to 1 with JAX_NUM_PROCESSES=2'),
    ({'JAX_NUM_PROCESSES': 'two'}, "'two'"),
], indirect=['environment'])
def test_incomplete_or_invalid_addresses_are_refused(environment, message):
  with pytest.raises(UsageError, match=message):
    find_address(1)
