"""The toy twin: a tiny run with the structure of a large one, for this machine's processor.

Same kind of model, activations, experts, positions, rules and optimizer; sizes small, each
divisible by its mesh axes exactly where the large one is. What would fail on the pod because
something does not divide, or because two processes do not agree, fails here in a minute.
"""

from collections.abc import Callable
import dataclasses
import json
import math
import os
from pathlib import Path
import re
import socket
import subprocess
import sys
import tempfile
import time

from t5lab import config as configs
from t5lab.parallel import sharding
from t5lab.tools.launching import local

PROCESSES, DEVICES = 2, 16     # virtual devices of all processes
STEPS = 10


@dataclasses.dataclass(frozen=True)
class Twin:
  """config: to train; mesh: its axes over 1; notes: what differs from the run but its sizes."""
  config: object
  devices: int
  processes: int
  mesh: dict[str, int]
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """failure: one line, '' if it ran; compilations: of the step, the most of any process."""
  failure: str
  seconds: float
  steps: int = 0
  compilations: int = 0
  first_loss: float = math.nan
  last_loss: float = math.nan


# -- sizes --------------------------------------------------------------------------------------


def shrunk(size: int, axis: int, small: int, least: int) -> int:
  """A size of `least` or more that `small` divides exactly if `axis` divides `size`."""
  if size % axis == 0:
    return -(-least // small) * small
  return next(n for n in range(least, 3 * least + small) if n % small)


def shrunk_mesh(sizes: dict[str, int], devices: int = DEVICES) -> dict[str, int]:
  """Axes over 1 become 2; what is left of the devices goes to the largest, so their product is
  `devices`, or more where so many axes are over 1."""
  found = {axis: min(n, 2) for axis, n in sizes.items()}
  largest = max(sizes, key=sizes.get)
  if sizes[largest] > 1:
    found[largest] *= max(1, devices // math.prod(found.values()))
  return found


def derive(c, sizes: dict[str, int]) -> Twin:
  """The twin of config c on a mesh of these sizes, none of them -1."""
  t = configs.from_dict(configs.to_dict(c))
  t.unlock()
  small = shrunk_mesh(sizes)
  rules = sharding.rules_row(c.rules)
  notes = []

  def spread(name, mesh):
    return sharding.spread(mesh, rules.get(name))

  def size(name, value, least):
    return shrunk(value, spread(name, sizes), spread(name, small), least)

  m, old = t.model, configs.model_config(c)
  kv = size('act_kv_heads', old.kv_heads, 1)
  group = 1
  if old.n_heads > old.kv_heads:
    heads = spread('act_heads', small)
    divides = old.n_heads % spread('act_heads', sizes) == 0
    group = next(g for g in range(2, 2 + 2 * heads) if (kv * g % heads == 0) == divides)
  m.n_heads, m.n_kv_heads, m.d_head = kv * group, kv * (old.n_kv_heads > 0), 8
  m.d_model, m.d_ff = size('embed', old.d_model, 32), size('mlp', old.d_ff, 64)
  m.vocab_size = size('vocab', old.vocab_size, 384)
  if old.experts:
    m.experts, m.moe_every = size('expert', old.experts, 4), min(2, old.moe_every)
  for stack in ('enc_layers', 'dec_layers'):
    layers = getattr(old, stack)
    every = old.moe_every if old.experts else 1
    m[stack] = min(layers, max(2, m.moe_every) if old.experts else 2) + (
        1 if old.experts and layers % every else 0)
  m.eos_id, m.pad_id, m.start_id = 1, 0, 0
  m.local_radius, m.global_block = min(7, old.local_radius), min(4, old.global_block)

  for feature, length in c.data.lengths.items():
    if length > 1:
      t.data.lengths[feature] = size('length', length, 32)
  if old.max_length:
    m.max_length = max(64, sum(t.data.lengths.values()))
  t.optim.microbatches = micro = min(2, c.optim.microbatches)
  t.data.batch_size = _batch(c, micro, sizes, small)
  t.loss.chunks = min(2, c.loss.chunks)
  for axis, n in small.items():
    t.mesh[axis] = n

  t.data.mixture, t.data.vocab, note = _data(c, old)
  notes += note
  if c.init.path or c.lora.rank:
    notes.append('weights from the seed instead of init.path' + ', all of them trained' * bool(
        c.lora.rank))
  t.init.path, t.init.optimizer, t.lora.rank = '', 'fresh', 0
  t.data.cache, t.data.modules, t.eval.mixture, t.eval.forced_first = '', (), '', -1
  for split in t.data.files:
    t.data.files[split] = ''
  t.total_steps, t.log.every, t.checkpoint.every, t.eval.every = STEPS, 1, STEPS, 0
  t.optim.warmup = min(2, c.optim.warmup)
  t.checkpoint.best, t.eval.examples, t.eval.max_length, t.eval.beams = '', 8, 8, 1
  t.eval.batch_size = math.prod(small[axis] for axis in sharding.BATCH)
  t.eval.split = 'validation'
  t.lock()
  total = math.prod(small.values())
  return Twin(t, total, PROCESSES if total >= PROCESSES else 1,
              {axis: n for axis, n in small.items() if n > 1}, notes)


def _batch(c, micro, sizes, small) -> int:
  """Rows that divide over devices, whole and in microbatches, as the run's do."""
  spread = lambda mesh: math.prod(mesh[axis] for axis in sharding.BATCH)
  large, little = spread(sizes), spread(small)
  rows = c.data.batch_size
  if rows % large:
    return shrunk(rows, large, little, little * micro) * micro
  if rows // c.optim.microbatches % large:
    return little                          # whole it divides, in parts it does not
  return little * micro


def _data(c, model) -> tuple[str, str, list[str]]:
  """(mixture, vocabulary, notes): embedded text of the same kind."""
  name = c.data.mixture
  vocab = 'byte'
  if all(map(configs.embedded, name.split(','))):
    return name, vocab, ['the byte vocabulary'] * (c.data.vocab != vocab)
  objective = next((o for o in ('span_corruption', 'iid_denoising', 'prefix_lm', 'ul2',
                                'gap_sentences', 'fill_in_the_middle') if o in name + (
                                    c.data.objective or '')), '')
  if model.classes:
    chosen = 'docs_match'
  elif model.kind == 'encoder':
    chosen = 'books_bert' if model.nsp else 'books_mlm'
  elif model.kind == 'decoder':
    chosen = 'books_lm'
  else:
    chosen = f'books_{objective}' if objective else 'ha_ende'
  return chosen, vocab, [f'embedded text ({chosen}, byte vocabulary) instead of {name}']


# -- the run ------------------------------------------------------------------------------------


def run(twin: Twin, seconds: float = 900., say: Callable = lambda text: None) -> Outcome:
  """Trains it, in really separate processes. Whatever fails is one line; no process is left."""
  with tempfile.TemporaryDirectory(prefix='t5lab_twin_') as folder:
    folder = Path(folder)
    (folder / 'twin.json').write_text(json.dumps(configs.to_dict(twin.config)))
    (folder / 'twin.py').write_text(_FILE)
    say(f'toy twin: {STEPS} steps on {twin.devices} virtual devices, {twin.processes} '
        f'process{"es" * (twin.processes > 1)} …')
    return _run(twin, folder, seconds)


_FILE = '''"""The toy twin of `t5lab check`."""
import json
import pathlib

from t5lab import config


def get_config(arg=''):
  return config.from_dict(json.loads(pathlib.Path(__file__).with_name('twin.json').read_text()))
'''


def environment(twin: Twin, number: int, port: int) -> dict[str, str]:
  """Of one process of the twin."""
  free = ('TPU_', 'JAX_', 'LIBTPU', 'ALLOW_MULTIPLE', 'XLA_')
  env = {k: v for k, v in os.environ.items()
         if not k.startswith(free) or k == 'JAX_COMPILATION_CACHE_DIR'}
  return env | local.environment(
      number, processes=twin.processes, devices=twin.devices // twin.processes, device='cpu',
      port=port, given={'JAX_LOG_COMPILES': '1', 'T5LAB_HEARTBEAT': '30'})


def _run(twin, folder, seconds) -> Outcome:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  command = [sys.executable, '-m', 't5lab', 'train', '--config', str(folder / 'twin.py'),
             '--workdir', str(folder / 'run')]
  started, processes, failure = time.monotonic(), [], ''
  root = str(Path(__file__).parents[3])
  try:
    for i in range(twin.processes):
      with open(folder / f'{i}.log', 'wb') as log:
        env = environment(twin, i, port)
        env['PYTHONPATH'] = os.pathsep.join(filter(None, [root, env.get('PYTHONPATH')]))
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env,
                                          stdin=subprocess.DEVNULL))
    while any(p.poll() is None for p in processes):
      if time.monotonic() - started > seconds:
        failure = f'still running after {seconds:.0f} s; '
        break
      if any(p.returncode for p in processes):
        _wait(processes, 20.)              # the others say why too
        break
      time.sleep(0.2)
  finally:
    for p in processes:
      if p.poll() is None:
        p.kill()
      p.wait()
  logs = [(folder / f'{i}.log').read_text(errors='replace') for i in range(twin.processes)]
  took = time.monotonic() - started
  if failure or any(p.returncode for p in processes):
    return Outcome(failure + _why(logs, [p.returncode for p in processes]), took)
  rows = [json.loads(line) for line in (folder / 'run/metrics.jsonl').read_text().splitlines()]
  losses = [row['loss'] for row in rows if 'loss' in row and 'step' in row]
  compiled = max(len(re.findall(r'Compiling (?:jit\()?train_step', log)) for log in logs)
  return Outcome('', took, len(losses), compiled, losses[0], losses[-1])


def _wait(processes, seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end and any(p.poll() is None for p in processes):
    time.sleep(0.2)


def _why(logs, codes) -> str:
  """The line that names the cause: a process's own error before another's report of it."""
  said = []
  for i, (log, code) in enumerate(zip(logs, codes)):
    lines = [line for line in log.splitlines() if line.startswith('t5lab:')]
    if code and lines:
      said.append(lines[-1].removeprefix('t5lab: '))
    elif code:
      last = [line for line in log.splitlines() if line.strip()]
      said.append(f'process {i} ended with {code}: {last[-1][:300] if last else "no output"}')
  own = [line for line in said if not re.search(r'process \d+ (?:ended|gave up|of)', line)]
  return (own or said or ['no process said why'])[0]
