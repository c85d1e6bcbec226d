"""The compiler at work: a step lowered and compiled for described chips, and what it left behind.

Results are kept under a hash of everything that decides the program: config, code, versions, slice.
Nothing that is read back is executed: it is HLO as text and numbers as JSON.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
from pathlib import Path
import re
import tempfile
import time

from t5lab.errors import UsageError
from t5lab.tools.planning import topology as topologies

# What decides the text of the program; the rest of the code only reads it.
CODE = ('config.py', 'trees.py', 'models', 'training', 'parallel/sharding.py',
        'data/batches/features.py', 'programs/build.py', 'programs/loading.py',
        'tools/planning/decode.py')
FORMAT = 1                     # of what is kept, and of what the compiler is told
REMATERIALIZED = 'Involuntary full rematerialization'


@dataclasses.dataclass(frozen=True)
class Compiled:
  """memory: bytes by field of memory_analysis. unfit: what the compiler said where the program
  needs more memory than there is; text is then ''. warnings: the partitioner's."""
  text: str
  memory: dict[str, int]
  warnings: list[str]
  seconds: float
  lower_seconds: float = 0.
  unfit: str = ''
  cached: bool = False
  flops_once: float = 0.       # XLA's own count, loop bodies once
  largest: tuple = ()          # of an unfit program: (bytes, shape), as the compiler reports it


def folder() -> Path:
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 't5lab' / 'plan'


def key(config: dict, topology, what: str) -> str:
  """A hash of the config without what no program depends on, the code, versions and the slice."""
  free = ('plan', 'guard', 'log', 'checkpoint', 'total_steps', 'init')
  kept = {k: v for k, v in config.items() if k not in free}
  if what == 'train':
    kept.pop('eval', None)
  digest = hashlib.sha256()
  root = Path(__file__).parents[2]
  for name in CODE:
    for path in sorted((root / name).rglob('*.py')) if (root / name).is_dir() else [root / name]:
      if path.is_file():
        digest.update(path.read_bytes())
  digest.update(json.dumps([FORMAT, kept, topology.name, what, topologies.versions()],
                           sort_keys=True).encode())
  return digest.hexdigest()[:32]


def read(name: str) -> Compiled | None:
  """What an earlier run kept; None where there is nothing, or nothing whole."""
  path = folder() / f'{name}.json.gz'
  try:
    with gzip.open(path, 'rt') as f:
      return Compiled(**{**json.load(f), 'cached': True})
  except (OSError, ValueError, TypeError, EOFError):
    return None


def write(name: str, compiled: Compiled) -> None:
  """Whole or not at all; a folder that cannot be written only costs time."""
  try:
    folder().mkdir(parents=True, mode=0o700, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as f:
      f.write(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 5))
    os.replace(f.name, folder() / f'{name}.json.gz')
  except OSError:
    return


def compile_step(lower, name: str = '') -> Compiled:
  """lower() -> jax Lowered. Compiles it, or reads what was kept as `name` ('': neither)."""
  if name and (found := read(name)):
    return found
  with captured() as said:
    started = time.perf_counter()
    lowered = lower()
    between = time.perf_counter()
    try:
      done = lowered.compile()
    except Exception as e:                             # jaxlib's own class is not public
      text = ' '.join(str(e).split())
      if 'RESOURCE_EXHAUSTED' not in text and 'hbm capacity' not in text.lower():
        raise UsageError(f'the TPU compiler refuses this program: {text[:400]}') from e
      found = Compiled('', {}, warnings(said()), time.perf_counter() - between,
                       between - started, unfit=text[:1000], largest=buffers(said()))
    else:
      stats = done.memory_analysis()
      memory = {f: int(getattr(stats, f'{f}_size_in_bytes')) for f in (
          'argument', 'output', 'alias', 'temp', 'generated_code')}
      cost = done.cost_analysis() or {}
      found = Compiled(done.as_text(), memory, warnings(said()),
                       time.perf_counter() - between, between - started,
                       flops_once=float(cost.get('flops', 0.)))
  if name:
    write(name, found)
  return found


@contextlib.contextmanager
def captured():
  """Yields a function that gives what C++ code wrote to stderr since."""
  with tempfile.TemporaryFile() as f:
    kept = os.dup(2)
    os.dup2(f.fileno(), 2)
    def said() -> str:
      f.seek(0)
      return f.read().decode('utf-8', 'replace')
    try:
      yield said
    finally:
      os.dup2(kept, 2)
      os.close(kept)


def warnings(text: str) -> list[str]:
  """What the partitioner said about tensors that it has to gather whole, each operation once:
  'op_name: f32[8,64] reshape, from {devices=[4,1]<=[4]} to {…}'."""
  found = {}
  for line in text.split('\n'):
    if REMATERIALIZED not in line:
      continue
    ends = re.search(r'from sharding (.*?) to (.*?) efficiently for HLO operation '
                     r'%?[\w.-]+ = (\w+\[[\d,]*\])\S* ([\w-]+)', line)
    where = re.search(r'op_name="([^"]*)"', line)
    where = f'{where.group(1)}: ' if where else ''
    found[where + (f'{ends.group(3)} {ends.group(4)}, from {ends.group(1)} to {ends.group(2)}'
                   if ends else line[line.index(REMATERIALIZED):][:300])] = True
  return list(found)


_UNIT = {'': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30}


def buffers(text: str) -> list[tuple[float, str]]:
  """(bytes, shapes) of the largest buffers in the memory report of a refusal, largest first."""
  found = re.findall(r'iB\( *\d+%\); +([\d.]+)([KMG]?)i?B; +\d+; +\d+; (\S+)', text)
  return sorted({(float(n) * _UNIT[unit], shape) for n, unit, shape in found}, reverse=True)[:8]


def exceeded(text: str) -> tuple[float, float] | None:
  """The compiler's refusal -> (needed, available) in bytes, arguments included: 'HLO temporaries
  (24.00G) exceeds available HBM (15.75G)' or 'Used 17.2G of 15.75G hbm'."""
  size = r'([\d.]+)([KMG])'
  found = (re.search(rf'temporaries \({size}\) exceeds available HBM \({size}\)', text)
           or re.search(rf'Used {size} of {size} hbm', text))
  if not found:
    return None
  return (float(found.group(1)) * _UNIT[found.group(2)],
          float(found.group(3)) * _UNIT[found.group(4)])
