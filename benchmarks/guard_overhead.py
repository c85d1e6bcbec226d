"""Measures the cost of the guard in a healthy train step.

  python benchmarks/guard_overhead.py [PAIRS] [--config FILE[:ARG]] [--config.KEY=VALUE …]
  python benchmarks/guard_overhead.py --topology v5e:4x4 --config FILE …

Runs the same step with and without the guard (spike detection included) in alternation. Prints the
median milliseconds of both, the median of the differences within a pair, and the temporary memory
of both programs. With --topology nothing runs: the TPU compiler reports FLOPs, bytes accessed and
temporary memory of both.
"""
import argparse
import os
import statistics
import sys
import time

from t5lab import config
from t5lab.commands import split_overrides

WARMUP = 5          # steps that are not timed


def main(argv):
  argv, overrides = split_overrides(argv)
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('pairs', type=int, nargs='?', default=200)
  parser.add_argument('--config', default='configs/quickstart.py')
  parser.add_argument('--topology')
  args = parser.parse_args(argv)
  c = config.load(args.config, {'guard.policy': 'skip', 'guard.spike': '8.', **overrides})
  if args.topology:
    compile_both(c, args.topology)
  else:
    time_both(c, args.pairs)


def steps_to_compare(program):
  """{'without': the step with a guard that it returns unchanged, 'with': the real step}, jitted."""
  import jax

  from t5lab.parallel import sharding
  from t5lab.programs import build
  from t5lab.training import digests, steps
  c = program.config
  options = dict(model=program.model, tx=program.tx, ema=c.optim.ema, **build.step_options(c))

  def plain_step(state, batch, base, guard):
    state, metrics = steps.train_step(state, batch, base, **options)
    return state, guard, {**metrics, 'batch': digests.batch_digest(batch)}

  replicated = sharding.replicated(program.mesh)
  shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
  without = jax.jit(plain_step, donate_argnums=(0, 3),
                    out_shardings=(shardings, replicated, replicated),
                    compiler_options=build.compiler_options(program.mesh))
  return {'without': without, 'with': program.step}


def compiled(program, step):
  from t5lab.parallel import sharding
  with sharding.use(program.mesh, program.config.rules):
    return step.lower(program.abstract, program.batch, program.base, program.guard).compile()


def compile_both(c, topology_name):
  from t5lab.tools.planning import chips
  topology = chips.parse(topology_name)
  os.environ.update(chips.environment(topology))
  from t5lab.programs import build
  program = build.program(c, chips.devices(topology))
  costs = {}
  for name, step in steps_to_compare(program).items():
    executable = compiled(program, step)
    cost = executable.cost_analysis()
    costs[name] = {'flops': cost['flops'], 'bytes': cost['bytes accessed'],
                   'temporary bytes': executable.memory_analysis().temp_size_in_bytes}
  changes = []
  for quantity, without in costs['without'].items():
    guarded = costs['with'][quantity]
    changes.append(f'{quantity} {without:.6g} -> {guarded:.6g} ({guarded / without - 1:+.3%})')
  print(f'{topology_name} {c.family} batch {c.data.batch_size} rules {c.rules}: '
        + ', '.join(changes))


def time_both(c, pairs):
  import jax
  import numpy as np

  from t5lab.parallel import sharding
  from t5lab.programs import build
  program = build.program(c)
  steps = steps_to_compare(program)

  # random tokens, one segment per row
  rng = np.random.default_rng(0)
  batch = {}
  for name, x in program.batch.items():
    batch[name] = np.ones(x.shape, np.int32)
    if name.endswith('tokens'):
      batch[name] = rng.integers(3, c.model.vocab_size, x.shape).astype(np.int32)

  milliseconds, temporary_bytes = {name: [] for name in steps}, {}
  with sharding.use(program.mesh, c.rules):
    batch = sharding.put(batch, program.mesh)
    for name, step in steps.items():
      temporary_bytes[name] = compiled(program, step).memory_analysis().temp_size_in_bytes
    states = {name: program.make_state() for name in steps}
    guards = {name: program.make_guard() for name in steps}
    for i in range(WARMUP + pairs):
      for name in sorted(steps, reverse=i % 2):        # alternate the order within a pair
        started = time.perf_counter()
        states[name], guards[name], metrics = steps[name](states[name], batch, None, guards[name])
        jax.block_until_ready((states[name], metrics))
        if i >= WARMUP:
          milliseconds[name].append((time.perf_counter() - started) * 1e3)
  assert {int(state.step) for state in states.values()} == {WARMUP + pairs}

  without, guarded = (np.array(milliseconds[name]) for name in ('without', 'with'))
  overhead = statistics.median(guarded - without) / statistics.median(without)
  print(f'{jax.devices()[0].device_kind} {c.family} batch {c.data.batch_size}: '
        f'{statistics.median(without):.3f} ms -> {statistics.median(guarded):.3f} ms per step, in '
        f'pairs {overhead:+.2%} ({pairs} pairs); temporary bytes {temporary_bytes["without"]:,} -> '
        f'{temporary_bytes["with"]:,}')


if __name__ == '__main__':
  main(sys.argv[1:])
