r"""Measures how fast batches come from a cache of many examples, and how fast a step is reached.

  python benchmarks/data_stream.py [EXAMPLES] [DIR]

Writes EXAMPLES (default one million) random pairs of 5 to 60 tokens as a cache of 16 shards. Prints
the seconds to open it for the first time (its blocks are packed) and again, to the first batch and
to the batch of step 1,000,000, then batches per second of 64 packed rows of 64 + 64 tokens, one
after the other and from the thread that reads ahead; then the same for 200,000 examples in memory.
"""
import pathlib
import sys
import tempfile
import time

import numpy as np

from t5lab.data.batches import cache, pipeline
from t5lab.data.batches.examples import Examples
from t5lab.data.tasks import registry

LENGTHS = {'inputs': 64, 'targets': 64}
SHARDS = 16


def random_examples(k, count):
  rng = np.random.default_rng(k)
  for _ in range(count):
    inputs, targets = rng.integers(5, 60, 2)
    yield {'inputs': rng.integers(3, 2000, inputs, dtype=np.int32),
           'targets': rng.integers(3, 2000, targets, dtype=np.int32)}


def write_cache(folder, count):
  features, identity = tuple(LENGTHS), {'task': 'random'}
  entries = cache.begin(folder, identity, SHARDS, {})
  for k in range(SHARDS):
    if k not in entries:
      entries[k] = cache.write_shard(folder, k, SHARDS, random_examples(k, count // SHARDS),
                                     features)
  cache.commit(folder, identity, features, entries, (), '')
  for layout in (*folder.glob('rows-*.npy'), *folder.glob('layout*.npy')):
    layout.unlink()                    # so that the first opening packs
  return cache.Cached(folder, identity, '')


def open_pipeline(examples):
  component = registry.Component('random', 1., examples, None)
  return pipeline.Pipeline([component], LENGTHS, batch_size=64, seed=0)


def print_seconds(name, run):
  start = time.perf_counter()
  result = run()
  print(f'{name:<48}{time.perf_counter() - start:8.3f} s', flush=True)
  return result


def print_rate(name, batches, count):
  start = time.perf_counter()
  for _ in batches:
    pass
  print(f'{name:<48}{count / (time.perf_counter() - start):8.1f} batches/s', flush=True)


def main(count=1_000_000, root=None, batches=200):
  root = root or tempfile.mkdtemp(prefix='data_stream_')
  folder = cache.folder(root, 'random', 'train')
  cached = write_cache(folder, count)
  size = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir()) / 2**20
  print(f'{count:,} examples, {size:,.0f} MiB in {folder}')

  print_seconds('open, first time', lambda: open_pipeline(cached))
  p = print_seconds('open again', lambda: open_pipeline(cached))
  rows = p.rows[0]
  print(f'{"rows per epoch":<48}{rows.count:8,} in {rows.blocks} blocks, {rows.fill:.1%} filled')
  print_seconds('batch of step 0', lambda: p.batch(0))
  print_seconds('batch of step 1,000,000', lambda: p.batch(1_000_000))
  print_rate('cache, one after the other', map(p.batch, range(1, 1 + batches)), batches)
  print_rate('cache, read ahead', p.iterate(1, 1 + 2 * batches), 2 * batches)

  memory = open_pipeline(Examples([cached[i] for i in range(min(count, 200_000))]))
  print_seconds('memory: batch of step 1,000,000', lambda: memory.batch(1_000_000))
  print_rate('memory, one after the other', map(memory.batch, range(1, 1 + batches)), batches)


if __name__ == '__main__':
  main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))
