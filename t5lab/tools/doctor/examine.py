"""`t5lab doctor`: checks in a minute that a cluster is ready for a run of hours.

The first checks do without JAX, because two versions of JAX may hang together: the hosts connect
over TCP (parallel/rendezvous.py) and compare versions, clocks, the workdir, data and vocabulary. If
the versions agree, they start JAX together, count devices, and save and restore a state with every
leaf and sharding of the real one, scaled down.

Every host draws the same conclusions from the same facts, so all end with the same exit code.
"""

import collections
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


@dataclasses.dataclass(frozen=True)
class Finding:
  """The outcome of one check. ok: None if it was skipped. message: one sentence."""
  check: str
  ok: bool | None
  message: str


class Examination:
  """The findings, and the seconds that each check took.

  hosts: {name, devices, ahead, free} of each. index: of this host. progress: as `examine` takes it.
  """

  def __init__(self, progress):
    self.findings: list[Finding] = []
    self.seconds: dict[str, float] = collections.defaultdict(float)
    self.hosts, self.index = [], 0
    self._progress = progress

  @contextlib.contextmanager
  def timed(self, check):
    """Adds the time of the block to the check's; a check may have several blocks."""
    self._progress(check)
    before = time.monotonic()
    try:
      yield
    finally:
      self.seconds[check] += time.monotonic() - before

  def add(self, check, failures, success, advice=''):
    message = '; '.join(failures) + advice if failures else success
    self.findings.append(Finding(check, not failures, ' '.join(message.split())))

  def skip(self, reason, *checks):
    self.findings += [Finding(check, None, f'skipped: {reason}') for check in checks]

  def failure(self, check) -> str:
    """Its message if the check failed, else ''."""
    return next((finding.message for finding in self.findings
                 if finding.check == check and finding.ok is False), '')

  @property
  def code(self) -> int:
    codes = [CODES[finding.check] for finding in self.findings if finding.ok is False]
    return min(codes, key=ORDER.index, default=0)


def examine(c, workdir, *, expect: int, free_gb: float, arrive: float, progress) -> Examination:
  """Runs all checks for config c in workdir. UsageError if not all hosts connect.

  expect: the number of devices of all hosts, 0 if unknown. free_gb: the space to require, 0 for
  that of the checkpoints of this config. arrive: seconds that the hosts have to connect.
  progress(check): called when a check starts.
  """
  checks = Examination(progress)
  workdir = Path(workdir).absolute()
  with checks.timed('coordinator'):
    address = rendezvous.find_address(arrive)
    meeting = rendezvous.Rendezvous(address, arrive, clock=_clock)
  checks.index = address.index
  token = f'doctor-{os.getpid()}-{time.time_ns():x}'

  # Three exchanges without JAX: each host sends facts about itself and gets those of all.
  with meeting:
    first = meeting.exchange({
        'host': socket.gethostname(), 'versions': facts.versions(c), 'token': token,
        'offsets': {str(i): offset for i, offset in meeting.offsets.items()}}, 10)
    token = first[0]['token']
    checks.add('coordinator', [], f'all {address.count} hosts connected to {address.coordinator}'
               if address.count > 1 else 'one process, no coordinator needed')
    with checks.timed('versions'):
      _compare_versions(checks, [host['versions'] for host in first])
    with checks.timed('clocks'):
      _compare_clocks(checks, first[0]['offsets'])

    with checks.timed('workdir'):
      error = facts.write_file(workdir / token, address.index)
    second = meeting.exchange({'workdir': error}, 30)

    with checks.timed('workdir'):
      visible = facts.visible_files(workdir / token, [host['workdir'] for host in second])
    with checks.timed('data'):
      data = facts.data_hashes(c)
    third = meeting.exchange({'visible': visible, 'data': data, 'free': facts.free(workdir)}, 60)
    facts.remove_file(workdir / token, address.index)

  with checks.timed('workdir'):
    _compare_workdirs(checks, workdir, [host['workdir'] for host in second],
                      [host['visible'] for host in third])
  with checks.timed('data'):
    _compare_data(checks, [host['data'] for host in third])
  checks.hosts = [{'name': a['host'], 'ahead': first[0]['offsets'][str(i)][0], 'free': b['free'],
                   'devices': None} for i, (a, b) in enumerate(zip(first, third))]

  if checks.failure('versions'):
    checks.skip('hosts with different versions cannot compute together', 'devices', 'disk',
                'save and restore')
  else:
    _check_with_jax(checks, c, workdir, token, expect, free_gb)
  return checks


def _clock() -> float:
  """time.time(), ahead by T5LAB_CLOCK_AHEAD seconds, which tests of the doctor set."""
  return time.time() + float(os.environ.get('T5LAB_CLOCK_AHEAD', 0))


# --- versions and clocks -------------------------------------------------------------------------


def _compare_versions(checks, hosts):
  differences = [
      f'{name} is {difference}' for name in hosts[0]
      if (difference := _difference([host.get(name, 'absent') for host in hosts]))]
  main = ('python', 'jax', 'libtpu', 't5lab')
  shown = ', '.join(f'{name} {hosts[0].get(name)}' for name in main)
  checks.add('versions', differences,
             f'{shown}, and {len(hosts[0]) - len(main)} more are the same on all hosts',
             advice=': install the same versions everywhere')


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
  wrong = [f'the clock of host {i} is {abs(ahead):.1f} s {"ahead of" if ahead > 0 else "behind"} '
           'that of host 0'
           for i, (ahead, uncertainty) in offsets.items() if abs(ahead) - uncertainty > SKEW]
  largest = max(abs(ahead) for ahead, _ in offsets.values())
  checks.add('clocks', wrong, f'within {largest:.3f} s of each other',
             advice=f', the limit is {SKEW:g} s: start NTP there')


# --- workdir, data and vocabulary ----------------------------------------------------------------


def _compare_workdirs(checks, workdir, errors, visible):
  failures = [f'host {i}: {error}' for i, error in enumerate(errors) if error]
  written = {i for i, error in enumerate(errors) if not error}
  for i, files in enumerate(visible):
    if missing := sorted(written - set(files)):
      failures.append(f'host {i} does not see the file in {workdir} that {_hosts(missing)} wrote: '
                      'it is not the same folder on all hosts')
  checks.add('workdir', failures,
             f'{workdir}: files written, renamed and listed by all {len(errors)} hosts')


def _compare_data(checks, hosts):
  """Two checks: a host without a vocabulary hash failed before it came to the data."""
  without_vocab = [i for i, host in enumerate(hosts) if not host['vocabulary']]

  failures = []
  for name in sorted({name for host in hosts for name in host['tasks']}):
    hashes = [host['tasks'].get(name, 'absent') for host in hosts if not host['error']]
    if hashes and (difference := _difference(hashes)):
      failures.append(f'{name}: {difference}')
  failures += [f'host {i}: {host["error"]}' for i, host in enumerate(hosts)
               if host['error'] and i not in without_vocab]
  same = f'{len(hosts[0]["tasks"])} hashes are the same on all hosts'
  if failures or len(without_vocab) < len(hosts):
    checks.add('data', failures, same)
  else:
    checks.findings.append(Finding('data', None, same))

  failures = [f'host {i}: {hosts[i]["error"]}' for i in without_vocab]
  if not failures and (difference := _difference([host['vocabulary'] for host in hosts])):
    failures = [f'the vocabulary differs, its hash is {difference}']
  checks.add('vocabulary', failures, f'hash {hosts[0]["vocabulary"]} on all hosts')


# --- devices, disk, save and restore -------------------------------------------------------------


def _check_with_jax(checks, c, workdir, token, expect, free_gb):
  program = _check_devices(checks, c, expect)
  if program is None:
    checks.skip('it needs the devices', 'disk', 'save and restore')
    return
  with checks.timed('disk'):
    _check_disk(checks, c, program, workdir, free_gb)
  if checks.failure('workdir'):
    checks.skip('the workdir is not usable', 'save and restore')
    return
  with checks.timed('save and restore'):
    error = save_and_restore(program.abstract, workdir / f'{token}-state')
    if not error:
      multihost.barrier(f'{token}_equal', 60.)
  leaves = len(jax.tree.leaves(program.abstract))
  checks.add('save and restore', [f'host {checks.index}: {error}'] if error else [],
             f'{leaves} arrays, scaled down, were saved, restored and compared')


def _check_devices(checks, c, expect):
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
    for host, n in zip(checks.hosts, counts):
      host['devices'] = n
  checks.add('devices', [message] if program is None else [], message)
  return program


def _check_disk(checks, c, program, workdir, free_gb):
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract))
  checkpoints = f'{c.checkpoint.keep + 1} checkpoints of {size / 1e9:.3g} GB'
  need = int(free_gb * 1e9) or size * (c.checkpoint.keep + 1)
  short = [f'host {i} has {host["free"] / 1e9:.3g} GB free in {workdir}'
           for i, host in enumerate(checks.hosts)
           if host['free'] is not None and host['free'] < need]
  checks.add('disk', short, f'room for {checkpoints}',
             advice=f', the run needs {need / 1e9:.3g} GB ({checkpoints})')


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
  # Integers below 100, which depend on the path and are exact in every dtype.
  values = {path: np.random.default_rng(zlib.crc32(path.encode())).integers(
      0, 100, x.shape).astype(x.dtype) for path, x in trees.flatten(small).items()}
  state = trees.map_paths(lambda path, x: jax.make_array_from_callback(
      x.shape, x.sharding, values[path].__getitem__), small)
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


# --- time ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def deadline(seconds: float, leave):
  """Ends the process if the block takes over `seconds`, and names the check that hangs.

  Yields progress(check), to be called when a check starts. leave(code, message): called from a
  thread; prints the message and exits.
  """
  current = 'coordinator'

  def progress(check):
    nonlocal current
    current = check

  def expired():
    leave(CODES[current], f'the check of {current} has not ended within {seconds:g} s on '
                          f'{socket.gethostname()}')

  timer = threading.Timer(seconds, expired)
  timer.daemon = True
  timer.start()
  try:
    yield progress
  finally:
    timer.cancel()
