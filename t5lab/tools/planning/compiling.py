"""Compiles a step ahead of time for described chips, and caches the results.

The cache's key is a hash of everything that determines the program: config, code, versions, slice.
Cached results are HLO text and JSON, which are never executed.
"""

import ast
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
from pathlib import Path
import re
import tempfile
import time

from t5lab import files
from t5lab.errors import UsageError
from t5lab.tools.planning import chips

FORMAT = 1                     # of cached results, and of the options given to the compiler
PACKAGE = Path(__file__).parents[2]
# The program depends on the code of these modules and of all that they import.
PROGRAMS = ('t5lab.programs.build', 't5lab.tools.planning.decode')
# Sections and keys of a config that no program depends on.
NOT_COMPILED = ('plan', 'guard', 'log', 'checkpoint', 'total_steps', 'init', 'embed')
REMATERIALIZED = 'Involuntary full rematerialization'


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step.

  memory: bytes by field of memory_analysis. unfit: the compiler's message if the program needs more
  memory than there is; text is then ''. warnings: those of the partitioner.
  """
  text: str
  memory: dict[str, int]
  warnings: list[str]
  seconds: float
  lower_seconds: float = 0.
  unfit: str = ''
  cached: bool = False
  largest: tuple = ()          # (bytes, shape) of the largest buffers of an unfit program


# --- the cache ---------------------------------------------------------------------------------


def _cache_path(key: str) -> Path:
  folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
  return folder / 't5lab' / 'plan' / f'{key}.json.gz'


def cache_key(config: dict, topology: chips.Topology, step: str) -> str:
  """A hash of code, versions, slice, and the config that matters to `step` (train | decode)."""
  unused = (*NOT_COMPILED, 'eval') if step == 'train' else NOT_COMPILED
  used = {name: value for name, value in config.items() if name not in unused}
  parts = [FORMAT, code_digest(), used, topology.name, step, chips.versions()]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def code_digest(modules: tuple[str, ...] = PROGRAMS, package: Path = PACKAGE) -> str:
  code = b''.join(path.read_bytes() for path in source_files(modules, package))
  return hashlib.sha256(code).hexdigest()


def source_files(modules: tuple[str, ...], package: Path = PACKAGE) -> list[Path]:
  """The files of these modules and, transitively, of the modules of this package that they import.

  Imports inside functions count. The package's own __init__.py does not: it imports the rest
  lazily, for users. Errors: FileNotFoundError for a module that has no file.
  """
  paths, queue = {}, list(modules)
  while queue:
    name = queue.pop()
    if name in paths or not name.startswith(f'{package.name}.'):
      continue
    paths[name] = _module_file(name, package)
    if paths[name] is None:
      raise FileNotFoundError(f'the module {name} has no file in {package}')
    for node in ast.walk(ast.parse(paths[name].read_bytes())):
      if isinstance(node, ast.Import):
        queue += [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        inner = [f'{node.module}.{alias.name}' for alias in node.names]
        queue += [node.module, *(name for name in inner if _module_file(name, package))]
  return [paths[name] for name in sorted(paths)]


def _module_file(name: str, package: Path) -> Path | None:
  base = package.parent.joinpath(*name.split('.'))
  candidates = base.with_name(f'{base.name}.py'), base / '__init__.py'
  return next((path for path in candidates if path.is_file()), None)


def read_cache(key: str) -> Compiled | None:
  """The cached result; None if there is none or the file is damaged."""
  try:
    with gzip.open(_cache_path(key), 'rt') as f:
      return Compiled(**{**json.load(f), 'cached': True})
  except (OSError, ValueError, TypeError, EOFError):
    return None


def write_cache(key: str, compiled: Compiled) -> None:
  """Writes a result. If the folder is not writable, the next run compiles again."""
  data = gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 5)
  with contextlib.suppress(OSError):
    path = _cache_path(key)
    path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    with files.replacing(path, suffix=str(os.getpid())) as f:
      f.write(data)


# --- the compiler ------------------------------------------------------------------------------


def compile_step(lower: Callable, key: str = '') -> Compiled:
  """Compiles lower(), a jax Lowered, or reads the cached result of `key`; '': without the cache."""
  compiled = read_cache(key) if key else None
  if compiled is None:
    compiled = _compile(lower)
    if key:
      write_cache(key, compiled)
  return compiled


def _compile(lower: Callable) -> Compiled:
  with captured_stderr() as messages:
    started = time.perf_counter()
    lowered = lower()
    lower_seconds = time.perf_counter() - started
    started = time.perf_counter()
    try:
      program = lowered.compile()
    except Exception as e:                             # jaxlib's own class is not public
      text = ' '.join(str(e).split())
      if 'RESOURCE_EXHAUSTED' not in text and 'hbm capacity' not in text.lower():
        raise UsageError(f'the TPU compiler rejects this program: {text[:400]}') from e
      return Compiled('', {}, spmd_warnings(messages()), time.perf_counter() - started,
                      lower_seconds, unfit=text[:1000], largest=reported_buffers(messages()))
    stats = program.memory_analysis()
    memory = {field: int(getattr(stats, f'{field}_size_in_bytes')) for field in (
        'argument', 'output', 'alias', 'temp', 'generated_code')}
    return Compiled(program.as_text(), memory, spmd_warnings(messages()),
                    time.perf_counter() - started, lower_seconds)


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
  """Captures stderr, also of C++ code; yields a function that returns the text so far."""
  with tempfile.TemporaryFile() as f:
    stderr = os.dup(2)
    os.dup2(f.fileno(), 2)
    def captured() -> str:
      f.seek(0)
      return f.read().decode('utf-8', 'replace')
    try:
      yield captured
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)


def spmd_warnings(text: str) -> list[str]:
  """The partitioner's warnings of tensors that it replicates, one for each operation.

  E.g. 'op_name: f32[8,64] reshape, from {devices=[4,1]<=[4]} to {…}'.
  """
  warnings = {}                            # as an ordered set
  for line in re.findall(f'{REMATERIALIZED}.*', text):
    warning = line[:300]
    if match := re.search(r'from sharding (.*?) to (.*?) efficiently for HLO operation '
                          r'%?[\w.-]+ = (\w+\[[\d,]*\])\S* ([\w-]+)', line):
      before, after, shape, kind = match.groups()
      warning = f'{shape} {kind}, from {before} to {after}'
    if match := re.search(r'op_name="([^"]*)"', line):
      warning = f'{match.group(1)}: {warning}'
    warnings[warning] = True
  return list(warnings)


_UNIT = {'': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30}


def reported_buffers(text: str) -> list[tuple[float, str]]:
  """(bytes, shapes) of the largest buffers in the compiler's memory report, largest first."""
  rows = re.findall(r'iB\( *\d+%\); +([\d.]+)([KMG]?)i?B; +\d+; +\d+; (\S+)', text)
  buffers = {(float(size) * _UNIT[unit], shape) for size, unit, shape in rows}
  return sorted(buffers, reverse=True)[:8]


def exceeded_memory(text: str) -> tuple[float, float] | None:
  """The compiler's message -> (needed, available) in bytes, arguments included.

  E.g. 'HLO temporaries (24.00G) exceeds available HBM (15.75G)' or 'Used 17.2G of 15.75G hbm'.
  """
  size = r'([\d.]+)([KMG])'
  match = (re.search(rf'temporaries \({size}\) exceeds available HBM \({size}\)', text)
           or re.search(rf'Used {size} of {size} hbm', text))
  if not match:
    return None
  needed, needed_unit, available, available_unit = match.groups()
  return float(needed) * _UNIT[needed_unit], float(available) * _UNIT[available_unit]
