"""Where the processes of a run meet before JAX does: plain TCP at the coordinator's port.

For `t5lab doctor`. JAX waits minutes for a process that never comes, and two versions of it may not
even understand each other. Here who is missing is known after seconds, by number, and what the
others have installed before anything is trusted to it. Lines of JSON; nothing else is understood.

  with Meeting(whereabouts(30), 30) as meeting:
    facts = meeting.exchange({'jax': '0.10.2'})      # of every process, in all of them
"""

import contextlib
import dataclasses
import json
import os
import socket
import time

from jax._src import clusters

from t5lab.errors import UsageError

LINE = 1 << 20        # bytes that a process may say at once
PINGS = 5


@dataclasses.dataclass(frozen=True)
class Place:
  """address: host:port of the coordinator, '' for a single process."""
  address: str = ''
  count: int = 1
  index: int = 0


def whereabouts(seconds: float) -> Place:
  """As jax.distributed.initialize would see it: JAX's variables, or the cluster that it knows."""
  given = {name: os.environ.get(name) for name in
           ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')}
  address, count, index = given.values()
  try:
    count, index = (int(x) if x else None for x in (count, index))
    if None in (address, count, index):
      address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
          address, count, index, None, None, int(seconds))
  except (ValueError, RuntimeError, OSError) as e:
    raise UsageError(f'cannot tell where the processes meet: {str(e).splitlines()[0][:200]}') from e
  if (address, count, index) == (None, None, None) or count == 1:
    return Place()
  said = ', '.join(f'{k}={v}' for k, v in given.items() if v) or 'none is set'
  if None in (address, count, index) or not address.rpartition(':')[2].isdigit():
    raise UsageError('several processes need JAX_COORDINATOR_ADDRESS=HOST:8476, JAX_NUM_PROCESSES '
                     f'and JAX_PROCESS_ID, or a cluster that JAX knows; {said}')
  if not 0 <= index < count:
    raise UsageError(f'JAX_PROCESS_ID is 0 to {count - 1} for JAX_NUM_PROCESSES={count}; {said}')
  return Place(address, count, index)


class Meeting:
  """Process 0 listens, the others come to it. Every process makes the same calls in order.

  offsets: {index: (seconds by which its clock is ahead of process 0's, uncertainty)}, on process
  0. UsageError, in all that came, for who did not come in `seconds`.
  """

  def __init__(self, place: Place, seconds: float, clock=time.time):
    self.place, self.offsets = place, {0: (0., 0.)}
    self._clock = clock
    self._peers: dict[int, _Line] = {}
    if place.count == 1:
      return
    host, _, port = place.address.rpartition(':')
    end = time.monotonic() + seconds
    try:
      if place.index == 0:
        self._receive(int(port), seconds, end)
      else:
        self._come(host.strip('[]'), int(port), seconds, end)
    except BaseException:
      self.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    for line in self._peers.values():
      line.close()
    self._peers = {}

  def exchange(self, value, seconds: float) -> list:
    """JSON of each process -> those of all, in order, in all; UsageError names who fell silent."""
    if self.place.count == 1:
      return [value]
    if self.place.index:
      line = self._peers[0]
      line.say({'value': value})
      return self._heard(line, 'values', seconds + 10)
    end, values, silent = time.monotonic() + seconds, [value], []
    for i in range(1, self.place.count):
      try:
        values.append(self._peers[i].hear(end)['value'])
      except (OSError, ValueError, KeyError, TypeError):
        silent.append(i)
    if silent:
      self._complain(f'{_processes(silent)} of {self.place.count} came, but said nothing more '
                     f'within {seconds:g} s; see what it printed')
    for line in self._peers.values():
      with contextlib.suppress(OSError):
        line.say({'values': values})
    return values

  # --- process 0 ---------------------------------------------------------------------------------

  def _receive(self, port, seconds, end):
    count = self.place.count
    try:
      listener = _listen(port)
    except OSError as e:
      raise UsageError(f'process 0 cannot listen on port {port} of {socket.gethostname()}: '
                       f'{e.strerror}; end what uses it, perhaps a run that was left') from None
    with listener:
      while len(self._peers) < count - 1 and (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
          line = _Line(listener.accept()[0])
          hello = line.hear(min(end, time.monotonic() + 5))
          index, thinks = int(hello['index']), int(hello['count'])
        except (OSError, ValueError, KeyError, TypeError):
          continue                                  # somebody else's knock
        if thinks != count or index in self._peers or not 0 < index < count:
          wrong = (f'a process of {hello.get("host", "?")} says that it is {index} of {thinks}; '
                   f'process 0 expects 1 to {count - 1} of {count}, each once')
          line.say({'error': wrong})
          line.close()
          self._complain(wrong)
        self._peers[index] = line
    if missing := [i for i in range(1, count) if i not in self._peers]:
      came = ', '.join(map(str, [0, *sorted(self._peers)]))
      self._complain(f'{_processes(missing)} of {count} did not come to {self.place.address} '
                     f'within {seconds:g} s; came: {came}. Is it running there, and can it reach '
                     'this address?')
    for i, line in self._peers.items():
      self.offsets[i] = self._offset(line, end + 5)
    for line in self._peers.values():
      line.say({'met': True})

  def _offset(self, line, end):
    best = None
    for _ in range(PINGS):
      before = self._clock()
      line.say({'ping': True})
      theirs = float(line.hear(end)['time'])
      after = self._clock()
      found = (after - before) / 2, theirs - (before + after) / 2
      best = min(best or found, found)              # the shortest way says most
    return best[1], best[0]

  def _complain(self, message):
    for line in self._peers.values():
      with contextlib.suppress(OSError):
        line.say({'error': message})
    raise UsageError(message)

  # --- the others --------------------------------------------------------------------------------

  def _come(self, host, port, seconds, end):
    failure = 'no answer'
    while (left := end - time.monotonic()) > 0:
      try:
        line = _Line(socket.create_connection((host, port), timeout=min(left, 5)))
        break
      except OSError as e:
        failure = e.strerror or str(e)
        time.sleep(min(0.2, max(end - time.monotonic(), 0)))
    else:
      raise UsageError(
          f'process {self.place.index} on {socket.gethostname()} cannot reach the coordinator at '
          f'{self.place.address} within {seconds:g} s: {failure}. Does process 0 run, is this its '
          'address, does the firewall let the port through?')
    self._peers[0] = line
    line.say({'index': self.place.index, 'count': self.place.count, 'host': socket.gethostname()})
    self._heard(line, 'met', end - time.monotonic() + 10)

  def _heard(self, line, what, seconds):
    """The answer called `what`; clocks are asked for in between."""
    end = time.monotonic() + seconds
    try:
      while True:
        said = line.hear(end)
        if 'ping' in said:
          line.say({'time': self._clock()})
        elif 'error' in said:
          raise UsageError(str(said['error']))
        else:
          return said[what]
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise UsageError(f'process {self.place.index}: the coordinator at {self.place.address} fell '
                       f'silent ({str(e) or type(e).__name__}): has process 0 ended, or is '
                       'something else at this port?') from None


class _Line:
  """A connection that speaks JSON, a value a line."""

  def __init__(self, connection):
    self._connection, self._left = connection, b''

  def say(self, value):
    self._connection.settimeout(10)
    self._connection.sendall(json.dumps(value).encode() + b'\n')

  def hear(self, end: float) -> dict:
    while b'\n' not in self._left:
      self._connection.settimeout(max(end - time.monotonic(), 0.01))
      more = self._connection.recv(1 << 16)
      if not more:
        raise ConnectionError('connection closed')
      self._left += more
      if len(self._left) > LINE:
        raise ValueError('not one of us')
    text, _, self._left = self._left.partition(b'\n')
    said = json.loads(text)
    if not isinstance(said, dict):
      raise ValueError('not one of us')
    return said

  def close(self):
    self._connection.close()


def _listen(port):
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):
      return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _processes(which) -> str:
  return f'process{"es" * (len(which) > 1)} {", ".join(map(str, which))}'
