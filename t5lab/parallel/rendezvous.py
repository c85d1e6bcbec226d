"""The processes of a run connect to the coordinator over plain TCP, before JAX does.

For `t5lab doctor`. JAX waits minutes for a process that never comes. A rendezvous takes seconds,
names the missing processes, and lets the others compare their installations. The protocol is one
JSON object a line; anything else is rejected.

  with Rendezvous(find_address(30), 30) as rendezvous:
    versions = rendezvous.exchange({'jax': '0.10.2'}, 10)      # of all processes, in all of them
"""

import contextlib
import dataclasses
import json
import os
import socket
import time

from jax._src import clusters

from t5lab.errors import UsageError, first_line

MAX_LINE = 1 << 20    # bytes of one message
PINGS = 5
VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# raised by a broken connection or by a message that is not of t5lab
_BAD_MESSAGE = (OSError, ValueError, KeyError, TypeError)


@dataclasses.dataclass(frozen=True)
class ProcessAddress:
  """Process `index` of `count`. coordinator: HOST:PORT, '' for a single process."""
  coordinator: str = ''
  count: int = 1
  index: int = 0


def find_address(seconds: float) -> ProcessAddress:
  """Finds what jax.distributed.initialize would: JAX's variables, or a cluster that JAX knows."""
  variables = {name: os.environ.get(name) for name in VARIABLES}
  coordinator, count, index = variables.values()
  try:
    count, index = (int(x) if x else None for x in (count, index))
    if None in (coordinator, count, index):
      coordinator, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
          coordinator, count, index, None, None, int(seconds))
  except (ValueError, RuntimeError, OSError) as e:
    raise UsageError(f'cannot determine the coordinator of this run: {first_line(e)}') from e
  if (coordinator, count, index) == (None, None, None) or count == 1:
    return ProcessAddress()

  given = ', '.join(f'{k}={v}' for k, v in variables.items() if v) or 'none is set'
  if None in (coordinator, count, index) or not coordinator.rpartition(':')[2].isdigit():
    raise UsageError('several processes need JAX_COORDINATOR_ADDRESS=HOST:8476, JAX_NUM_PROCESSES '
                     f'and JAX_PROCESS_ID, or a cluster that JAX recognizes; got {given}')
  if not 0 <= index < count:
    raise UsageError(f'JAX_PROCESS_ID must be 0 to {count - 1} with JAX_NUM_PROCESSES={count}; '
                     f'got {given}')
  return ProcessAddress(coordinator, count, index)


class Rendezvous(contextlib.AbstractContextManager):
  """Connects all processes: process 0 listens, the others connect to it.

  Every process makes the same calls in the same order. Process 0 reports an error to all that have
  connected, so each raises the same UsageError, with the processes that did not in `seconds`.

  offsets: {index: (seconds by which its clock is ahead of process 0's, uncertainty)}, on process 0.
  """

  def __init__(self, address: ProcessAddress, seconds: float, clock=time.time):
    self.address, self.offsets = address, {0: (0., 0.)}
    self._clock = clock
    self._peers: dict[int, _Connection] = {}       # on process 0 all others, on others process 0
    if address.count == 1:
      return
    host, _, port = address.coordinator.rpartition(':')
    end = time.monotonic() + seconds
    try:
      if address.index == 0:
        self._accept_all(int(port), seconds, end)
      else:
        self._connect(host.strip('[]'), int(port), seconds, end)
    except BaseException:
      self.__exit__()
      raise

  def __exit__(self, *_):
    for peer in self._peers.values():
      peer.close()
    self._peers = {}

  def exchange(self, value, seconds: float) -> list:
    """Returns the values (JSON) of all processes, in order, in every process.

    UsageError names the processes that sent nothing within `seconds`.
    """
    if self.address.count == 1:
      return [value]
    if self.address.index:
      coordinator = self._peers[0]
      coordinator.send({'value': value})
      return self._await_reply(coordinator, 'values', seconds + 10)

    end, values, silent = time.monotonic() + seconds, [value], []
    for i in range(1, self.address.count):
      try:
        values.append(self._peers[i].receive(end)['value'])
      except _BAD_MESSAGE:
        silent.append(i)
    if silent:
      self._fail(f'{_processes(silent)} of {self.address.count} connected, but then sent nothing '
                 f'within {seconds:g} s; see the output there')
    self._send_all({'values': values})
    return values

  # --- process 0 ---------------------------------------------------------------------------------

  def _accept_all(self, port: int, seconds: float, end: float) -> None:
    count = self.address.count
    try:
      listener = _listen(port)
    except OSError as e:
      raise UsageError(f'process 0 cannot listen on coordinator port {port} of '
                       f'{socket.gethostname()}: {e.strerror}; stop the program that uses it, '
                       'perhaps an earlier run') from None
    with listener:
      while len(self._peers) < count - 1 and time.monotonic() < end:
        self._accept_one(listener, end)

    if missing := [i for i in range(1, count) if i not in self._peers]:
      connected = ', '.join(map(str, [0, *sorted(self._peers)]))
      self._fail(f'{_processes(missing)} of {count} did not connect to {self.address.coordinator} '
                 f'within {seconds:g} s; connected: {connected}. Check that it runs and can reach '
                 'this address')
    for i, peer in self._peers.items():
      self.offsets[i] = self._clock_offset(peer, end + 5)
    for peer in self._peers.values():
      peer.send({'met': True})

  def _accept_one(self, listener: socket.socket, end: float) -> None:
    listener.settimeout(max(end - time.monotonic(), 0.001))
    try:
      peer = _Connection(listener.accept()[0])
      hello = peer.receive(min(end, time.monotonic() + 5))
      index, peer_count = int(hello['index']), int(hello['count'])
    except _BAD_MESSAGE:
      return                                      # timed out, or not one of our processes
    count = self.address.count
    if peer_count != count or index in self._peers or not 0 < index < count:
      message = (f'a process on {hello.get("host", "?")} claims to be process {index} of '
                 f'{peer_count}; process 0 expects 1 to {count - 1} of {count}, each once')
      peer.send({'error': message})
      peer.close()
      self._fail(message)
    self._peers[index] = peer

  def _clock_offset(self, peer: '_Connection', end: float) -> tuple[float, float]:
    measurements = []
    for _ in range(PINGS):
      before = self._clock()
      peer.send({'ping': True})
      peer_time = float(peer.receive(end)['time'])
      after = self._clock()
      measurements.append(((after - before) / 2, peer_time - (before + after) / 2))
    uncertainty, ahead = min(measurements)        # the shortest round trip is the most accurate
    return ahead, uncertainty

  def _send_all(self, message: dict) -> None:
    for peer in self._peers.values():
      with contextlib.suppress(OSError):
        peer.send(message)

  def _fail(self, message: str):
    self._send_all({'error': message})
    raise UsageError(message)

  # --- the other processes -----------------------------------------------------------------------

  def _connect(self, host: str, port: int, seconds: float, end: float) -> None:
    error = 'timed out'
    while (remaining := end - time.monotonic()) > 0:
      try:
        peer = _Connection(socket.create_connection((host, port), timeout=min(remaining, 5)))
        break
      except OSError as e:
        error = e.strerror or str(e)
        time.sleep(min(0.2, max(end - time.monotonic(), 0)))
    else:
      raise UsageError(
          f'process {self.address.index} on {socket.gethostname()} cannot reach the coordinator at '
          f'{self.address.coordinator} within {seconds:g} s: {error}. Check that process 0 runs, '
          'that this is its address, and that the firewall lets the port through')
    self._peers[0] = peer
    peer.send({'index': self.address.index, 'count': self.address.count,
               'host': socket.gethostname()})
    self._await_reply(peer, 'met', end - time.monotonic() + 10)

  def _await_reply(self, coordinator: '_Connection', key: str, seconds: float):
    """Returns `key` of the coordinator's reply, answering its pings in between."""
    end = time.monotonic() + seconds
    try:
      while True:
        message = coordinator.receive(end)
        if 'ping' in message:
          coordinator.send({'time': self._clock()})
        elif 'error' in message:
          raise UsageError(str(message['error']))
        else:
          return message[key]
    except _BAD_MESSAGE as e:
      raise UsageError(
          f'process {self.address.index} lost the coordinator at {self.address.coordinator} '
          f'({str(e) or type(e).__name__}); check that process 0 still runs and that no other '
          'program uses this port') from None


class _Connection:
  """A connection over which each side sends JSON objects, one a line."""

  def __init__(self, connection: socket.socket):
    self._socket, self._buffer = connection, b''

  def send(self, message: dict) -> None:
    self._socket.settimeout(10)
    self._socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self, end: float) -> dict:
    while b'\n' not in self._buffer:
      self._socket.settimeout(max(end - time.monotonic(), 0.01))
      data = self._socket.recv(1 << 16)
      if not data:
        raise ConnectionError('connection closed')
      self._buffer += data
      if len(self._buffer) > MAX_LINE:
        raise ValueError('not a message of t5lab')
    line, _, self._buffer = self._buffer.partition(b'\n')
    message = json.loads(line)
    if not isinstance(message, dict):
      raise ValueError('not a message of t5lab')
    return message

  def close(self) -> None:
    self._socket.close()


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):
      return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _processes(indices: list[int]) -> str:
  return f'process{"es" if len(indices) > 1 else ""} {", ".join(map(str, indices))}'
