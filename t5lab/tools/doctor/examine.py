"""Is this cluster fit for the run? A minute before the hours: what `t5lab doctor` looks at.

First without JAX, for a JAX of two versions may hang: the hosts meet over TCP (parallel/meeting.py)
and compare versions, clocks, what they see of the workdir, the data, the vocabulary. Then, where
that was well, they start JAX together, count devices, and save and restore a state with every leaf
and every sharding of the real one, scaled down.

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
from t5lab.parallel import meeting as meetings
from t5lab.parallel import multihost, sharding
from t5lab.programs import build as programs
from t5lab.runs import checkpoint
from t5lab.tools.doctor import facts

SKEW = 5.             # seconds; logs and the order of files are by clock, and a certificate may not
                      # be valid yet. The lock of a run does not depend on it.
ARRIVE = 30.          # seconds that hosts have to come
# The checks, in order, and the exit code of what each finds.
CODES = {'coordinator': 2, 'versions': 2, 'clocks': 70, 'workdir': 4, 'data': 3, 'vocabulary': 3,
         'devices': 2, 'disk': 4, 'save and restore': 4}
ORDER = (2, 3, 4, 70)


@dataclasses.dataclass
class Check:
  """ok: None where it was not looked at. says: one sentence."""
  name: str
  ok: bool | None
  says: str
  seconds: float = 0.

  @property
  def code(self) -> int:
    return CODES[self.name]


@dataclasses.dataclass
class Result:
  checks: list[Check]
  hosts: list[dict]        # name, devices, ahead, free: a row each
  index: int = 0           # of this host
  code: int = 0
  alone: str = ''          # what only this host knows: the others wait for it, and are to end too


def examine(c, workdir, *, expect: int = 0, free_gb: float = 0., arrive: float = ARRIVE,
            progress=lambda name: None) -> Result:
  """Looks at everything for config c in workdir. UsageError where the hosts do not even meet.

  expect: devices of all hosts, 0: not known. free_gb: 0: what the checkpoints of this config take.
  """
  found = _Findings(progress)
  workdir = Path(workdir).absolute()
  with found.timed('coordinator'):
    place = meetings.whereabouts(arrive)
    meeting = meetings.Meeting(place, arrive, clock=_clock)
  token = f'doctor-{os.getpid()}-{time.time_ns():x}'
  with meeting:
    first = meeting.exchange({
        'host': socket.gethostname(), 'versions': facts.versions(c), 'token': token,
        'offsets': {str(i): offset for i, offset in meeting.offsets.items()}}, 10)
    token = first[0]['token']
    found.add('coordinator', True, f'all {place.count} hosts met at {place.address}'
              if place.count > 1 else 'one process, nobody to meet')
    with found.timed('versions'):
      _compare_versions(found, [f['versions'] for f in first])
    with found.timed('clocks'):
      _compare_clocks(found, first[0]['offsets'])
    with found.timed('workdir'):
      folder = facts.leave_a_file(workdir, token, place.index)
    second = meeting.exchange({'workdir': folder}, 30)
    with found.timed('workdir'):
      seen = facts.look_for_files(workdir, token, second)
    with found.timed('data'):
      data = facts.of_data(c)
    third = meeting.exchange({'seen': seen, 'data': data, 'free': facts.free(workdir)}, 60)
    facts.tidy(workdir, token, place.index)
  with found.timed('workdir'):
    _judge_workdir(found, workdir, [f['workdir'] for f in second], [f['seen'] for f in third])
  with found.timed('data'):
    _compare_data(found, [f['data'] for f in third])
  hosts = [{'name': a['host'], 'ahead': first[0]['offsets'][str(i)][0], 'free': b['free'],
            'devices': None} for i, (a, b) in enumerate(zip(first, third))]
  if found.bad('versions'):
    found.skip('hosts of different versions do not compute together', 'devices', 'disk',
               'save and restore')
  else:
    _with_jax(found, c, workdir, token, hosts, expect, free_gb)
  alone = next((check.says for check in found.checks if check.name == 'save and restore'
                and check.ok is False), '')
  return Result(found.checks, hosts, place.index, found.worst(), alone)


class _Findings:
  """Checks as they are made, and how long each took."""

  def __init__(self, progress):
    self.checks: list[Check] = []
    self._seconds: dict[str, float] = {}
    self._progress = progress

  @contextlib.contextmanager
  def timed(self, name):
    self._progress(name)
    before = time.monotonic()
    try:
      yield
    finally:
      self._seconds[name] = self._seconds.get(name, 0) + time.monotonic() - before
      for check in self.checks:
        check.seconds = self._seconds.get(check.name, 0)

  def add(self, name, ok, says):
    self.checks.append(Check(name, ok, ' '.join(str(says).split()), self._seconds.get(name, 0)))

  def skip(self, why, *names):
    for name in names:
      self.add(name, None, f'not looked at: {why}')

  def bad(self, name) -> bool:
    return any(check.name == name and check.ok is False for check in self.checks)

  def worst(self) -> int:
    codes = [check.code for check in self.checks if check.ok is False]
    return min(codes, key=ORDER.index, default=0)


def _clock() -> float:
  """T5LAB_CLOCK_AHEAD: seconds that this host pretends to be ahead. For tests of the doctor."""
  return time.time() + float(os.environ.get('T5LAB_CLOCK_AHEAD', 0))


# --- versions and clocks -------------------------------------------------------------------------


def _compare_versions(found, hosts):
  lines = [f'{name} is {said}' for name in hosts[0]
           if (said := _differ([host.get(name, 'absent') for host in hosts]))]
  short = ', '.join(f'{name} {hosts[0][name]}' for name in ('python', 'jax', 'libtpu', 't5lab'))
  found.add('versions', not lines, '; '.join(lines) + ': install the same everywhere' if lines else
            f'{short}, and {len(hosts[0]) - 4} more, the same on all')


def _differ(values) -> str:
  """'1.0 on host 0, 1.1 on hosts 1, 2' where values differ, else ''."""
  by_value = {}
  for i, value in enumerate(values):
    by_value.setdefault(value, []).append(str(i))
  if len(by_value) == 1:
    return ''
  return ', '.join(f'{value} on host{"s" * (len(at) > 1)} {", ".join(at[:8])}'
                   + ', …' * (len(at) > 8) for value, at in by_value.items())


def _compare_clocks(found, offsets):
  far = {i: ahead for i, (ahead, doubt) in offsets.items() if abs(ahead) - doubt > SKEW}
  most = max(abs(ahead) for ahead, _ in offsets.values())
  found.add('clocks', not far, '; '.join(
      f'the clock of host {i} is {abs(ahead):.1f} s {"ahead of" if ahead > 0 else "behind"} that '
      f'of host 0' for i, ahead in far.items()) + f', the limit is {SKEW:g} s: start NTP there'
      if far else f'within {most:.3f} s of each other')


# --- the workdir ---------------------------------------------------------------------------------


def _judge_workdir(found, workdir, errors, seen):
  lines = [f'host {i}: {error}' for i, error in enumerate(errors) if error]
  written = {i for i, error in enumerate(errors) if not error}
  for i, sees in enumerate(seen):
    if missing := sorted(written - set(sees)):
      lines.append(f'host {i} does not see in {workdir} what host{"s" * (len(missing) > 1)} '
                   f'{", ".join(map(str, missing))} wrote there: it is not the same folder on all')
  found.add('workdir', not lines, '; '.join(lines) or
            f'{workdir}: written, renamed and listed by all {len(errors)}')


def _compare_data(found, hosts):
  said = _differ([host['vocabulary'] for host in hosts])
  errors = {i: host['error'] for i, host in enumerate(hosts) if host['error']}
  unread = [i for i, host in enumerate(hosts) if not host['vocabulary']]
  lines = []
  for what in sorted({what for host in hosts for what in host['tasks']}):
    values = [host['tasks'].get(what, 'absent') for host in hosts if not host['error']]
    if values and (differ := _differ(values)):
      lines.append(f'{what}: {differ}')
  lines += [f'host {i}: {sentence}' for i, (_, sentence) in errors.items() if i not in unread]
  found.add('data', not lines if len(unread) < len(hosts) or lines else None,
            '; '.join(lines) if lines else
            f'{len(hosts[0]["tasks"])} hashes of it are the same on all')
  if unread:
    said = '; '.join(f'host {i}: {errors[i][1]}' for i in unread)
  found.add('vocabulary', not said, f'the vocabulary differs, its hash is {said}'
            if said and not unread else said or f'hash {hosts[0]["vocabulary"]} on all')


# --- devices, disk, save and restore -------------------------------------------------------------


def _with_jax(found, c, workdir, token, hosts, expect, free_gb):
  with found.timed('devices'):
    program, counts = None, []
    try:
      multihost.start(60.)
      counts = multihost.gather(jax.local_device_count(), 60.)
      kind = jax.devices()[0].platform
      if expect and sum(counts) != expect:
        by = ', '.join(f'host {i} has {n}' for i, n in enumerate(counts))
        raise UsageError(f'{expect} devices are expected, there are {sum(counts)}: {by}')
      program = programs.build(c)
      mesh = ', '.join(f'{k}={n}' for k, n in program.mesh.shape.items() if n > 1)
      says = f'{sum(counts)} of {kind}' + f', mesh {mesh}' * bool(mesh)
    except Failure as e:
      says = str(e)
    except Exception as e:             # whatever a runtime of accelerators says at its start
      says = f'JAX does not start: {str(e)[:300]}'
    for host, n in zip(hosts, counts):
      host['devices'] = n
  found.add('devices', program is not None, says)
  if program is None:
    found.skip('that needs the devices', 'disk', 'save and restore')
    return
  with found.timed('disk'):
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract))
    need = int(free_gb * 1e9) or size * (c.checkpoint.keep + 1)
    short = [f'host {i} has {host["free"] / 1e9:.3g} GB free in {workdir}'
             for i, host in enumerate(hosts) if host['free'] is not None and host['free'] < need]
  found.add('disk', not short, '; '.join(short) + f', the run needs {need / 1e9:.3g} GB '
            f'({c.checkpoint.keep + 1} checkpoints of {size / 1e9:.3g} GB)' * bool(short)
            if short else f'enough for {c.checkpoint.keep + 1} checkpoints of {size / 1e9:.3g} GB')
  if found.bad('workdir'):
    found.skip('the workdir is not fit', 'save and restore')
    return
  with found.timed('save and restore'):
    says = save_and_restore(program.abstract, workdir / f'{token}-state')
    if not says:
      multihost.barrier(f'{token}_equal', 60.)
  leaves = len(jax.tree.leaves(program.abstract))
  found.add('save and restore', not says, f'host {multihost.index()}: {says}' if says else
            f'{leaves} arrays, scaled down, saved, restored and equal')


def scaled_down(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """As many axes, the same sharding, each axis as short as the mesh allows, or 2."""
  shape = []
  spec = tuple(x.sharding.spec) + (None,) * (len(x.shape) - len(x.sharding.spec))
  for size, axis in zip(x.shape, spec):
    shape.append(min(size, sharding.spread(x.sharding.mesh.shape, axis)
                     if sharding.mesh_axes(axis) else 2))
  return jax.ShapeDtypeStruct(tuple(shape), x.dtype, sharding=x.sharding)


def save_and_restore(abstract, folder) -> str:
  """Through the checkpoints of training -> '' or what is wrong. Leaves nothing behind."""
  small = jax.tree.map(scaled_down, abstract)
  values = {path: _values(path, x) for path, x in trees.flatten(small).items()}
  state = jax.tree.unflatten(jax.tree.structure(small), [
      jax.make_array_from_callback(x.shape, x.sharding, lambda at, v=values[path]: v[at])
      for path, x in trees.flatten(small).items()])
  try:
    checkpoints = checkpoint.Checkpoints(folder, log=lambda text: None)
    checkpoints.save(1, state, meta={'for': 'doctor'})
    checkpoints.wait(120)
    restored, _ = checkpoints.restore(small)
    for path, x in trees.flatten(restored).items():
      for shard in x.addressable_shards:
        if not np.array_equal(np.asarray(shard.data), values[path][shard.index]):
          return f'{path} came back other than it was saved'
    multihost.barrier(f'{folder.name}_read', 60.)
  except CheckpointError as e:
    return str(e)
  finally:
    if multihost.is_main():
      _remove(folder)
  return ''


def _remove(folder):
  """Of a save that failed some writers may still be at work for a moment, and make it anew."""
  clean = 0
  for _ in range(50):
    shutil.rmtree(folder, ignore_errors=True)
    clean = 0 if folder.exists() else clean + 1
    if clean == 3:
      return
    time.sleep(0.05)


def _values(path, x) -> np.ndarray:
  """Small whole numbers by the path: exact in every dtype."""
  rng = np.random.default_rng(zlib.crc32(path.encode()))
  return rng.integers(0, 100, x.shape).astype(x.dtype)


# --- time ----------------------------------------------------------------------------------------


class Deadline:
  """Ends the process when the doctor has not ended in `seconds`: a host that hangs says where.

  leave(code, sentence): called then, from a thread, for it to print and exit.
  """

  def __init__(self, seconds: float, leave):
    self._seconds, self._leave, self._name = seconds, leave, 'coordinator'
    self._timer = threading.Timer(seconds, self._late)
    self._timer.daemon = True

  def __enter__(self):
    self._timer.start()
    return self

  def __exit__(self, *_):
    self._timer.cancel()

  def progress(self, name: str) -> None:
    self._name = name

  def _late(self):
    self._leave(CODES[self._name], f'the check of {self._name} has not ended after '
                f'{self._seconds:g} s, on {socket.gethostname()}')
