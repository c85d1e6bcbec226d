"""`t5lab doctor`: checks in a minute that a cluster is ready for a run of hours.

The first checks do without JAX, because two versions of JAX may hang together: the hosts connect
over TCP (parallel/rendezvous.py) and compare versions, clocks, the workdir, data and vocabulary. If
the versions agree, they start JAX together, count devices, and save and restore a state with every
leaf and sharding of the real one, scaled down.

Every host draws the same conclusions from the same facts, so all end with the same exit code.
"""

import contextlib
import dataclasses
import os
from pathlib import Path
import shutil
import socket
import threading
import time
import zlib

import jax
import numpy as np

from t5lab import trees
from t5lab.errors import CheckpointError, Failure, UsageError
from t5lab.parallel import multihost, rendezvous, sharding
from t5lab.programs import build
from t5lab.runs import checkpoint
from t5lab.tools.doctor import facts

# Seconds. Logs and the order of files are by clock, and a certificate may not be valid yet. The
# lock of a run does not depend on clocks.
SKEW = 5.
# The checks, in order, and the exit code if one fails.
CODES = {'coordinator': 2, 'versions': 2, 'clocks': 70, 'workdir': 4, 'data': 3, 'vocabulary': 3,
         'devices': 2, 'disk': 4, 'save and restore': 4}
ORDER = (2, 3, 4, 70)   # of several failures the first of these is the exit code


@dataclasses.dataclass
class Finding:
  """The outcome of one check. ok: None if it was skipped. message: one sentence."""
  check: str
  ok: bool | None
  message: str
  seconds: float = 0.

  @property
  def code(self) -> int:
    return CODES[self.check]


@dataclasses.dataclass
class Examination:
  """All findings.

  hosts: {name, devices, ahead, free} of each. index: of this host. local_failure: '' or a message
  that only this host knows; the others wait for this host and must be ended.
  """
  findings: list[Finding]
  hosts: list[dict]
  index: int = 0
  code: int = 0
  local_failure: str = ''


def examine(c, workdir, *, expect: int, free_gb: float, arrive: float, progress) -> Examination:
  """Runs all checks for config c in workdir. UsageError if not all hosts connect.

  expect: the number of devices of all hosts, 0 if unknown. free_gb: the space to require, 0 for
  that of the checkpoints of this config. arrive: seconds that the hosts have to connect.
  progress(check): called when a check starts.
  """
  checks = _Checks(progress)
  workdir = Path(workdir).absolute()
  with checks.timed('coordinator'):
    address = rendezvous.find_address(arrive)
    meeting = rendezvous.Rendezvous(address, arrive, clock=_clock)
  token = f'doctor-{os.getpid()}-{time.time_ns():x}'

  # Three exchanges without JAX: each host sends facts about itself and gets those of all.
  with meeting:
    first = meeting.exchange({
        'host': socket.gethostname(), 'versions': facts.versions(c), 'token': token,
        'offsets': {str(i): offset for i, offset in meeting.offsets.items()}}, 10)
    token = first[0]['token']
    checks.add('coordinator', True,
               f'all {address.count} hosts connected to {address.coordinator}'
               if address.count > 1 else 'one process, no coordinator needed')
    with checks.timed('versions'):
      _compare_versions(checks, [host['versions'] for host in first])
    with checks.timed('clocks'):
      _compare_clocks(checks, first[0]['offsets'])

    with checks.timed('workdir'):
      error = facts.write_file(workdir, token, address.index)
    second = meeting.exchange({'workdir': error}, 30)

    with checks.timed('workdir'):
      visible = facts.visible_files(workdir, token, [host['workdir'] for host in second])
    with checks.timed('data'):
      data = facts.data_hashes(c)
    third = meeting.exchange({'visible': visible, 'data': data, 'free': facts.free(workdir)}, 60)
    facts.remove_file(workdir, token, address.index)

  with checks.timed('workdir'):
    _compare_workdirs(checks, workdir, [host['workdir'] for host in second],
                      [host['visible'] for host in third])
  with checks.timed('data'):
    _compare_data(checks, [host['data'] for host in third])
  hosts = [{'name': a['host'], 'ahead': first[0]['offsets'][str(i)][0], 'free': b['free'],
            'devices': None} for i, (a, b) in enumerate(zip(first, third))]

  if checks.failed('versions'):
    checks.skip('hosts with different versions cannot compute together', 'devices', 'disk',
                'save and restore')
  else:
    _check_with_jax(checks, c, workdir, token, hosts, expect, free_gb)
  local_failure = next((finding.message for finding in checks.findings
                        if finding.check == 'save and restore' and finding.ok is False), '')
  return Examination(checks.findings, hosts, address.index, checks.exit_code(), local_failure)


class _Checks:
  """Collects findings and the time that each check takes."""

  def __init__(self, progress):
    self.findings: list[Finding] = []
    self._seconds: dict[str, float] = {}
    self._progress = progress

  @contextlib.contextmanager
  def timed(self, check):
    """Adds the time of the block to the check's; a check may have several blocks."""
    self._progress(check)
    before = time.monotonic()
    try:
      yield
    finally:
      self._seconds[check] = self._seconds.get(check, 0) + time.monotonic() - before
      for finding in self.findings:
        finding.seconds = self._seconds.get(finding.check, 0)

  def add(self, check, ok, message):
    self.findings.append(
        Finding(check, ok, ' '.join(str(message).split()), self._seconds.get(check, 0)))

  def skip(self, reason, *checks):
    for check in checks:
      self.add(check, None, f'skipped: {reason}')

  def failed(self, check) -> bool:
    return any(finding.check == check and finding.ok is False for finding in self.findings)

  def exit_code(self) -> int:
    codes = [finding.code for finding in self.findings if finding.ok is False]
    return min(codes, key=ORDER.index, default=0)


def _clock() -> float:
  """time.time(), ahead by T5LAB_CLOCK_AHEAD seconds, which tests of the doctor set."""
  return time.time() + float(os.environ.get('T5LAB_CLOCK_AHEAD', 0))


# --- versions and clocks -------------------------------------------------------------------------


def _compare_versions(checks, hosts):
  differences = []
  for name in hosts[0]:
    if difference := _difference([host.get(name, 'absent') for host in hosts]):
      differences.append(f'{name} is {difference}')
  if differences:
    message = '; '.join(differences) + ': install the same versions everywhere'
  else:
    main = ('python', 'jax', 'libtpu', 't5lab')
    shown = ', '.join(f'{name} {hosts[0][name]}' for name in main)
    message = f'{shown}, and {len(hosts[0]) - len(main)} more are the same on all hosts'
  checks.add('versions', not differences, message)


def _difference(values) -> str:
  """'1.0 on host 0, 1.1 on hosts 1, 2' if the hosts' values differ, else ''."""
  hosts_of = {}
  for i, value in enumerate(values):
    hosts_of.setdefault(value, []).append(i)
  if len(hosts_of) == 1:
    return ''
  return ', '.join(f'{value} on {_hosts(indices)}' for value, indices in hosts_of.items())


def _hosts(indices) -> str:
  more = ', …' if len(indices) > 8 else ''
  return f'host{"s" if len(indices) > 1 else ""} {", ".join(map(str, indices[:8]))}{more}'


def _compare_clocks(checks, offsets):
  wrong = []
  for i, (ahead, uncertainty) in offsets.items():
    if abs(ahead) - uncertainty > SKEW:
      direction = 'ahead of' if ahead > 0 else 'behind'
      wrong.append(f'the clock of host {i} is {abs(ahead):.1f} s {direction} that of host 0')
  largest = max(abs(ahead) for ahead, _ in offsets.values())
  checks.add('clocks', not wrong,
             '; '.join(wrong) + f', the limit is {SKEW:g} s: start NTP there' if wrong
             else f'within {largest:.3f} s of each other')


# --- workdir, data and vocabulary ----------------------------------------------------------------


def _compare_workdirs(checks, workdir, errors, visible):
  failures = [f'host {i}: {error}' for i, error in enumerate(errors) if error]
  written = {i for i, error in enumerate(errors) if not error}
  for i, files in enumerate(visible):
    if missing := sorted(written - set(files)):
      failures.append(f'host {i} does not see the file in {workdir} that {_hosts(missing)} wrote: '
                      'it is not the same folder on all hosts')
  checks.add('workdir', not failures, '; '.join(failures) or
             f'{workdir}: files written, renamed and listed by all {len(errors)} hosts')


def _compare_data(checks, hosts):
  """Two checks: a host without a vocabulary hash failed before it came to the data."""
  errors = {i: host['error'][1] for i, host in enumerate(hosts) if host['error']}
  without_vocab = [i for i, host in enumerate(hosts) if not host['vocabulary']]

  failures = []
  for name in sorted({name for host in hosts for name in host['tasks']}):
    hashes = [host['tasks'].get(name, 'absent') for host in hosts if not host['error']]
    if hashes and (difference := _difference(hashes)):
      failures.append(f'{name}: {difference}')
  failures += [f'host {i}: {error}' for i, error in errors.items() if i not in without_vocab]
  examined = failures or len(without_vocab) < len(hosts)
  checks.add('data', not failures if examined else None, '; '.join(failures) or
             f'{len(hosts[0]["tasks"])} hashes are the same on all hosts')

  if without_vocab:
    failure = '; '.join(f'host {i}: {errors[i]}' for i in without_vocab)
  elif failure := _difference([host['vocabulary'] for host in hosts]):
    failure = f'the vocabulary differs, its hash is {failure}'
  checks.add('vocabulary', not failure,
             failure or f'hash {hosts[0]["vocabulary"]} on all hosts')


# --- devices, disk, save and restore -------------------------------------------------------------


def _check_with_jax(checks, c, workdir, token, hosts, expect, free_gb):
  program = _check_devices(checks, c, hosts, expect)
  if program is None:
    checks.skip('it needs the devices', 'disk', 'save and restore')
    return
  with checks.timed('disk'):
    _check_disk(checks, c, program, workdir, hosts, free_gb)
  if checks.failed('workdir'):
    checks.skip('the workdir is not usable', 'save and restore')
    return
  with checks.timed('save and restore'):
    error = save_and_restore(program.abstract, workdir / f'{token}-state')
    if not error:
      multihost.barrier(f'{token}_equal', 60.)
  leaves = len(jax.tree.leaves(program.abstract))
  checks.add('save and restore', not error, f'host {multihost.index()}: {error}' if error else
             f'{leaves} arrays, scaled down, were saved, restored and compared')


def _check_devices(checks, c, hosts, expect):
  """Starts JAX on all hosts and builds the program; returns None if that fails."""
  program, counts = None, []
  with checks.timed('devices'):
    try:
      multihost.initialize(60.)
      counts = multihost.gather(jax.local_device_count(), 60.)
      platform = jax.devices()[0].platform
      if expect and sum(counts) != expect:
        each = ', '.join(f'host {i} has {n}' for i, n in enumerate(counts))
        raise UsageError(f'expected {expect} devices, found {sum(counts)}: {each}')
      program = build.program(c)
      mesh = ', '.join(f'{axis}={n}' for axis, n in program.mesh.shape.items() if n > 1)
      message = f'{sum(counts)} {platform} devices' + (f', mesh {mesh}' if mesh else '')
    except Failure as e:
      message = str(e)
    except Exception as e:             # an accelerator's runtime may raise anything at its start
      message = f'JAX does not start: {str(e)[:300]}'
    for host, n in zip(hosts, counts):
      host['devices'] = n
  checks.add('devices', program is not None, message)
  return program


def _check_disk(checks, c, program, workdir, hosts, free_gb):
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract))
  checkpoints = f'{c.checkpoint.keep + 1} checkpoints of {size / 1e9:.3g} GB'
  need = int(free_gb * 1e9) or size * (c.checkpoint.keep + 1)
  short = [f'host {i} has {host["free"] / 1e9:.3g} GB free in {workdir}'
           for i, host in enumerate(hosts) if host['free'] is not None and host['free'] < need]
  checks.add('disk', not short,
             '; '.join(short) + f', the run needs {need / 1e9:.3g} GB ({checkpoints})' if short
             else f'room for {checkpoints}')


def scaled_down(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """The same rank, dtype and sharding, with each axis as short as the mesh allows, or 2."""
  mesh_shape = x.sharding.mesh.shape
  entries = tuple(x.sharding.spec) + (None,) * (len(x.shape) - len(x.sharding.spec))
  shape = tuple(min(size, sharding.num_shards(mesh_shape, entry) if entry else 2)
                for size, entry in zip(x.shape, entries))
  return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


def save_and_restore(abstract, folder) -> str:
  """Saves and restores a small state with training's checkpoints -> '' or the error.

  Leaves nothing behind.
  """
  small = jax.tree.map(scaled_down, abstract)
  values = {path: _values(path, x) for path, x in trees.flatten(small).items()}
  state = jax.tree.unflatten(jax.tree.structure(small), [
      jax.make_array_from_callback(x.shape, x.sharding, lambda index, v=values[path]: v[index])
      for path, x in trees.flatten(small).items()])
  try:
    checkpoints = checkpoint.Checkpoints(folder, log=lambda text: None)
    checkpoints.save(1, state, meta={'for': 'doctor'})
    checkpoints.wait(120)
    restored, _ = checkpoints.restore(small)
    for path, x in trees.flatten(restored).items():
      for shard in x.addressable_shards:
        if not np.array_equal(np.asarray(shard.data), values[path][shard.index]):
          return f'{path} was restored with other values than were saved'
    multihost.barrier(f'{folder.name}_read', 60.)
  except CheckpointError as e:
    return str(e)
  finally:
    if multihost.is_main():
      _remove(folder)
  return ''


def _remove(folder):
  """Removes it until it stays removed: writers of a failed save may create it again."""
  absent = 0
  for _ in range(50):
    shutil.rmtree(folder, ignore_errors=True)
    absent = 0 if folder.exists() else absent + 1
    if absent == 3:
      return
    time.sleep(0.05)


def _values(path, x) -> np.ndarray:
  """Integers below 100, which depend on the path and are exact in every dtype."""
  rng = np.random.default_rng(zlib.crc32(path.encode()))
  return rng.integers(0, 100, x.shape).astype(x.dtype)


# --- time ----------------------------------------------------------------------------------------


class Deadline:
  """Ends the process if the block takes over `seconds`, and names the check that hangs.

  leave(code, message): called from a thread; prints the message and exits.
  """

  def __init__(self, seconds: float, leave):
    self._seconds, self._leave, self._check = seconds, leave, 'coordinator'
    self._timer = threading.Timer(seconds, self._expired)
    self._timer.daemon = True

  def __enter__(self):
    self._timer.start()
    return self

  def __exit__(self, *_):
    self._timer.cancel()

  def progress(self, check: str) -> None:
    self._check = check

  def _expired(self):
    self._leave(CODES[self._check], f'the check of {self._check} has not ended within '
                f'{self._seconds:g} s on {socket.gethostname()}')
