r"""What the guard costs a healthy step: the same train step with and without it, in turns.

  python benchmarks/guard_overhead.py [PAIRS] [--config FILE[:ARG]] [--config.KEY=VALUE …]
  python benchmarks/guard_overhead.py --topology v5e:4x4 --config FILE …

Prints a row: the median milliseconds of a step without and with the guard (spikes looked for too),
the median of the differences within a pair, the temporary memory of both compiled programs. With
--topology nothing runs: the TPU compiler says flops, bytes read and written, and memory of both.
"""
import argparse
import functools
import os
import statistics
import sys
import time

from t5lab import config as configs
from t5lab.commands import split_overrides


def main(argv):
  argv, overrides = split_overrides(argv)
  parser = argparse.ArgumentParser()
  parser.add_argument('pairs', type=int, nargs='?', default=200)
  parser.add_argument('--config', default='configs/quickstart.py')
  parser.add_argument('--topology')
  args = parser.parse_args(argv)
  c = configs.load(args.config, {'guard.policy': 'skip', 'guard.spike': '8.', **overrides})
  if args.topology:
    compile_both(c, args.topology)
  else:
    time_both(c, args.pairs)


def both(program):
  """{'without': the jitted step that takes and gives a guard and looks at nothing, 'with': …}."""
  import jax

  from t5lab.parallel import sharding
  from t5lab.programs import build as programs
  from t5lab.training import digests, steps
  c = program.config
  options = dict(model=program.model, tx=program.tx, ema=c.optim.ema, **programs._step_options(c))

  def plain(state, batch, base, guard):
    state, metrics = steps.train_step(state, batch, base, **options)
    return state, guard, {**metrics, 'batch': digests.batch_digest(batch)}

  alone = sharding.replicated(program.mesh)
  shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
  without = jax.jit(plain, donate_argnums=(0, 3), out_shardings=(shardings, alone, alone),
                    compiler_options=programs.compiler_options(program.mesh))
  return {'without': without, 'with': program.step}


def compiled(program, step):
  from t5lab.parallel import sharding
  with sharding.use(program.mesh, program.config.rules):
    return step.lower(program.abstract, program.batch, program.base, program.guard).compile()


def compile_both(c, name):
  from t5lab.tools.planning import topology as topologies
  topology = topologies.parse(name)
  os.environ.update(topologies.environment(topology))
  from t5lab.programs import build as programs
  program = programs.build(c, topologies.devices(topology))
  found = {}
  for which, step in both(program).items():
    made = compiled(program, step)
    costs, memory = made.cost_analysis(), made.memory_analysis()
    found[which] = (costs['flops'], costs['bytes accessed'], memory.temp_size_in_bytes)
  print(f'{name} {c.family} batch {c.data.batch_size} rules {c.rules}: ' + ', '.join(
      f'{what} {a:.6g} -> {b:.6g} ({(b - a) / a:+.3%})' for what, a, b in zip(
          ('flops', 'bytes', 'temporary bytes'), found['without'], found['with'])))


def time_both(c, pairs):
  import jax
  import numpy as np

  from t5lab.parallel import sharding
  from t5lab.programs import build as programs
  program = programs.build(c)
  rng = np.random.default_rng(0)
  random = lambda x: rng.integers(3, c.model.vocab_size, x.shape).astype(np.int32)
  batch = {k: random(x) if k.endswith('tokens') else np.ones(x.shape, np.int32)
           for k, x in program.batch.items()}
  runs = {}
  with sharding.use(program.mesh, c.rules):
    placed = sharding.put(batch, program.mesh)
    for which, step in both(program).items():
      temp = compiled(program, step).memory_analysis().temp_size_in_bytes
      runs[which] = [functools.partial(step), program.make_state(), program.make_guard(), [], temp]
    for i in range(pairs + 5):
      for which in sorted(runs, reverse=i % 2):      # who goes first changes
        step, state, guard, seconds, _ = run = runs[which]
        before = time.perf_counter()
        run[1], run[2], metrics = step(state, placed, None, guard)
        jax.block_until_ready((run[1], metrics))
        if i >= 5:
          seconds.append(time.perf_counter() - before)
  assert int(runs['with'][1].step) == int(runs['without'][1].step) == pairs + 5
  a, b = (np.array(runs[which][3]) * 1e3 for which in ('without', 'with'))
  share = statistics.median(b - a) / statistics.median(a)
  kind = jax.devices()[0].device_kind
  print(f'{kind} {c.family} batch {c.data.batch_size}: '
        f'{statistics.median(a):.3f} ms -> {statistics.median(b):.3f} ms a step, in pairs '
        f'{share:+.2%} ({pairs} pairs); temporary bytes {runs["without"][4]:,} -> '
        f'{runs["with"][4]:,}')


if __name__ == '__main__':
  main(sys.argv[1:])
