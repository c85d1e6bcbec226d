"""The toy twin: a tiny run with the structure of a large one, on this machine's CPU.

The kind of model, activations, experts, positions, rules and optimizer are those of the large run.
Sizes are small, and divisible by their mesh axes exactly where the large ones are. An error that
the pod would raise because something does not divide, or because two processes do not agree, is
raised here within a minute.
"""

from collections.abc import Callable
import dataclasses
import json
import math
import os
from pathlib import Path
import re
import socket
import sys
import tempfile
import time

from t5lab import config
from t5lab.data.objectives import table
from t5lab.data.tasks import names
from t5lab.parallel import sharding
from t5lab.tools.launching import local

PROCESSES, DEVICES = 2, 16     # virtual devices of all processes
STEPS = 10
GRACE = 20.                    # seconds in which the other processes may report the error of one


@dataclasses.dataclass(frozen=True)
class Twin:
  """config: of the tiny run; mesh: its axes over 1; notes: differences other than sizes."""
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


# --- sizes -------------------------------------------------------------------------------------


def shrink(size: int, shards: int, small_shards: int, least: int) -> int:
  """A size of at least `least` that small_shards divides exactly if `shards` divides `size`."""
  if size % shards == 0:
    return -(-least // small_shards) * small_shards
  return next(n for n in range(least, 3 * least + small_shards) if n % small_shards)


def shrink_mesh(sizes: dict[str, int]) -> dict[str, int]:
  """A mesh of DEVICES devices in which axes over 1 stay over 1.

  Each such axis becomes 2 and the largest takes the remaining devices. If many axes are over 1, the
  mesh has more devices.
  """
  small = {axis: min(n, 2) for axis, n in sizes.items()}
  largest = max(sizes, key=sizes.get)
  if sizes[largest] > 1:
    small[largest] *= max(1, DEVICES // math.prod(small.values()))
  return small


def derive(c, sizes: dict[str, int]) -> Twin:
  """The twin of config c on a mesh of these sizes, none of them -1."""
  small = shrink_mesh(sizes)
  t = config.from_dict(config.to_dict(c))
  t.unlock()
  for axis, n in small.items():
    t.mesh[axis] = n
  _shrink_model(t, c, sizes, small)
  _shrink_batch(t, c, sizes, small)
  notes = _replace_data(t, c) + _replace_weights(t, c)

  t.total_steps, t.log.every, t.checkpoint.every, t.eval.every = STEPS, 1, STEPS, 0
  t.log.profile = 0
  t.optim.warmup = min(2, c.optim.warmup)
  t.loss.chunks = min(2, c.loss.chunks)
  t.checkpoint.best = ''
  t.eval.examples, t.eval.max_length, t.eval.beams = 8, 8, 1
  t.eval.batch_size = sharding.num_shards(small, sharding.BATCH_AXES)
  t.lock()
  devices = math.prod(small.values())
  return Twin(t, devices, PROCESSES if devices >= PROCESSES else 1,
              {axis: n for axis, n in small.items() if n > 1}, notes)


def _shrink_model(t, c, sizes, small) -> None:
  """Sets the sizes of t.model, and the lengths, so that they divide exactly where those of c do."""
  rules = sharding.rule_set(c.rules)

  def shards(name, mesh):
    return sharding.num_shards(mesh, rules.get(name))

  def size(name, value, least):
    return shrink(value, shards(name, sizes), shards(name, small), least)

  m, model = t.model, config.model_config(c)
  m.d_model, m.d_ff = size('embed', model.d_model, 32), size('mlp', model.d_ff, 64)
  m.vocab_size = size('vocab', model.vocab_size, 384)
  m.eos_id, m.pad_id, m.start_id = 1, 0, 0
  m.local_radius, m.global_block = min(7, model.local_radius), min(4, model.global_block)

  # heads: `group` queries share a key
  kv_heads, group = size('act_kv_heads', model.kv_heads, 1), 1
  if model.n_heads > model.kv_heads:
    head_shards = shards('act_heads', small)
    divides = model.n_heads % shards('act_heads', sizes) == 0
    group = next(g for g in range(2, 2 + 2 * head_shards)
                 if (kv_heads * g % head_shards == 0) == divides)
  m.n_heads, m.n_kv_heads, m.d_head = kv_heads * group, kv_heads * (model.n_kv_heads > 0), 8

  # layers: two, or a group of mixtures and one more if the groups do not divide the layers
  if model.experts:
    m.experts, m.moe_every = size('expert', model.experts, 4), min(2, model.moe_every)
  for stack in ('enc_layers', 'dec_layers'):
    layers = getattr(model, stack)
    partial_group = model.experts > 0 and layers % model.moe_every > 0
    m[stack] = min(layers, 2) + partial_group

  for feature, length in c.data.lengths.items():
    if length > 1:
      t.data.lengths[feature] = size('length', length, 32)
  if model.max_length:
    m.max_length = max(64, sum(t.data.lengths.values()))


def _shrink_batch(t, c, sizes, small) -> None:
  """Sets batch size and microbatches, which divide over devices exactly where those of c do."""
  t.optim.microbatches = micro = min(2, c.optim.microbatches)
  rows = c.data.batch_size
  shards, small_shards = (sharding.num_shards(mesh, sharding.BATCH_AXES) for mesh in (sizes, small))
  if rows % shards:
    t.data.batch_size = shrink(rows, shards, small_shards, small_shards * micro) * micro
  elif rows // c.optim.microbatches % shards:
    t.data.batch_size = small_shards       # the batch divides, its microbatches do not
  else:
    t.data.batch_size = small_shards * micro


# --- data and weights --------------------------------------------------------------------------


def _replace_data(t, c) -> list[str]:
  """Sets the data of t to embedded text like that of c -> notes."""
  mixture = c.data.mixture
  note = [] if c.data.vocab == 'byte' else ['the byte vocabulary']
  if not all(map(config.is_embedded, mixture.split(','))):
    t.data.mixture = similar_task(c)
    note = [f'embedded text ({t.data.mixture}, byte vocabulary) instead of {mixture}']
  t.data.vocab, t.data.cache, t.data.modules = 'byte', '', ()
  for split in t.data.files:
    t.data.files[split] = ''
  t.eval.mixture, t.eval.split, t.eval.forced_first = '', 'validation', -1
  return note


def similar_task(c) -> str:
  """The embedded task that is most similar to the data of config c."""
  model = config.model_config(c)
  if model.classes:
    return 'docs_match'
  if model.kind == 'encoder':
    return 'books_bert' if model.nsp else 'books_mlm'
  objective = _objective(c)
  if objective and table.TABLE[objective].kind == model.kind:
    return f'books_{objective}'
  return 'books_lm' if model.kind == 'decoder' else 'ha_ende'


def _objective(c) -> str:
  """The objective of the data of config c; '' if it is supervised."""
  if c.data.objective:
    return c.data.objective
  for task in c.data.mixture.split(','):
    if task in names.OBJECTIVE_OF:
      return names.OBJECTIVE_OF[task]
  # The user's own tasks are not in the table, but may be named after their objective.
  named = [objective for objective in table.TABLE if objective in c.data.mixture]
  return max(named, key=len, default='')


def _replace_weights(t, c) -> list[str]:
  """Makes t start from the seed -> notes."""
  t.init.path, t.init.optimizer, t.lora.rank = '', 'fresh', 0
  if c.lora.rank:
    return ['weights from the seed instead of init.path, all of them trained']
  return ['weights from the seed instead of init.path'] if c.init.path else []


# --- the run -----------------------------------------------------------------------------------

_CONFIG_FILE = '''"""The toy twin of `t5lab check`."""
import json
import pathlib

from t5lab import config


def get_config(arg=''):
  return config.from_dict(json.loads(pathlib.Path(__file__).with_name('twin.json').read_text()))
'''


def run(twin: Twin, timeout: float = 900., log: Callable = lambda text: None) -> Outcome:
  """Trains the twin in separate processes. A failure is one line; no process is left running."""
  processes = 'process' if twin.processes == 1 else 'processes'
  log(f'toy twin: {STEPS} steps on {twin.devices} virtual devices, {twin.processes} {processes} …')
  with tempfile.TemporaryDirectory(prefix='t5lab_twin_') as folder:
    folder = Path(folder)
    (folder / 'twin.json').write_text(json.dumps(config.to_dict(twin.config)))
    (folder / 'twin.py').write_text(_CONFIG_FILE)
    command = [sys.executable, '-m', 't5lab', 'train', '--config', str(folder / 'twin.py'),
               '--workdir', str(folder / 'run')]
    logs = [folder / f'{i}.log' for i in range(twin.processes)]
    started = time.monotonic()
    codes = local.Group(command, _environments(twin), logs, GRACE).wait(timeout=timeout)
    seconds = time.monotonic() - started
    output = [path.read_text(errors='replace') for path in logs]
    if any(codes):
      late = f'still running after {timeout:.0f} s; ' if seconds >= timeout else ''
      return Outcome(late + _cause(output, codes), seconds)
    rows = map(json.loads, (folder / 'run/metrics.jsonl').read_text().splitlines())
    losses = [row['loss'] for row in rows if 'loss' in row and 'step' in row]
  compilations = max(len(re.findall(r'Compiling (?:jit\()?train_step', text)) for text in output)
  return Outcome('', seconds, len(losses), compilations, losses[0], losses[-1])


def _environments(twin: Twin) -> list[dict[str, str]]:
  """The environment of each process: without this process's accelerators and flags of JAX."""
  dropped = ('TPU_', 'JAX_', 'LIBTPU', 'ALLOW_MULTIPLE', 'XLA_')
  inherited = {key: value for key, value in os.environ.items()
               if not key.startswith(dropped) or key == 'JAX_COMPILATION_CACHE_DIR'}
  root = str(Path(__file__).parents[3])
  inherited['PYTHONPATH'] = os.pathsep.join(filter(None, [root, inherited.get('PYTHONPATH')]))
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  return [inherited | local.environment(
      i, processes=twin.processes, devices=twin.devices // twin.processes, device='cpu', port=port,
      given={'JAX_LOG_COMPILES': '1', 'T5LAB_HEARTBEAT': '30'}) for i in range(twin.processes)]


def _cause(output: list[str], codes: list[int]) -> str:
  """The line that names the cause: a process's own error rather than another's report of it."""
  errors = []
  for i, (text, code) in enumerate(zip(output, codes)):
    lines = [line for line in text.splitlines() if line.strip()] or ['no output']
    own = [line for line in lines if line.startswith('t5lab:')]
    if code and own:
      errors.append(own[-1].removeprefix('t5lab: '))
    elif code:
      errors.append(f'process {i} exited with {code}: {lines[-1][:300]}')
  causes = [line for line in errors
            if not re.search(r'process \d+ (?:exited|ended|gave up|of)', line)]
  return (causes or errors)[0]
