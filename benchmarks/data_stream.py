r"""How fast the stream of batches is, and how far it may jump, from a cache of many examples.

  python benchmarks/data_stream.py [EXAMPLES] [DIR]

Writes EXAMPLES (a million) random pairs of 5 to 60 tokens as a cache of 16 shards, then prints: the
seconds to open it the first time (its blocks are packed) and again, to the first batch, to the
batch of step 1,000,000, and the batches of 64 packed rows of 64 + 64 tokens a second, one after the
other and from the thread that reads ahead; beside them those of 200,000 examples in memory.
"""
import pathlib
import sys
import tempfile
import time

import numpy as np

from t5lab.data.batches import cache, pipeline
from t5lab.data.tasks import registry as tasks

LENGTHS = {'inputs': 64, 'targets': 64}
SHARDS = 16


def examples(k, count):
  rng = np.random.default_rng(k)
  for _ in range(count):
    inputs, targets = rng.integers(5, 60, 2)
    yield {'inputs': rng.integers(3, 2000, inputs, dtype=np.int32),
           'targets': rng.integers(3, 2000, targets, dtype=np.int32)}


def clock(what, run):
  before = time.perf_counter()
  out = run()
  print(f'{what:<48}{time.perf_counter() - before:8.3f} s', flush=True)
  return out


def open_pipeline(found):
  component = tasks.Component('random', 1., found, None)
  return pipeline.Pipeline([component], LENGTHS, batch_size=64, seed=0)


def rate(what, make, count):
  before = time.perf_counter()
  for _ in make():
    pass
  print(f'{what:<48}{count / (time.perf_counter() - before):8.1f} batches/s', flush=True)


def main(count=1_000_000, root=None):
  root = root or tempfile.mkdtemp(prefix='data_stream_')
  where = cache.folder(root, 'random', 'train')
  features, identity = tuple(LENGTHS), {'task': 'random'}
  entries = cache.begin(where, identity, SHARDS)
  for k in range(SHARDS):
    if k not in entries:
      entries[k] = cache.write_shard(where, k, SHARDS, examples(k, count // SHARDS), features)
  cache.commit(where, identity, features, entries, ())
  for remembered in (*where.glob('rows-*.npy'), *where.glob('layout*.npy')):
    remembered.unlink()
  size = sum(path.stat().st_size for path in pathlib.Path(where).iterdir()) / 2**20
  print(f'{count:,} examples, {size:,.0f} MiB in {where}')
  load = lambda: open_pipeline(cache.Cached(where, identity, ''))
  clock('open, first time', load)
  p = clock('open again', load)
  print(f'{"rows an epoch":<48}{p.rows[0].count:8,} in {p.rows[0].blocks} blocks, '
        f'{p.rows[0].fill:.1%} filled')
  clock('batch of step 0', lambda: p.batch(0))
  clock('batch of step 1,000,000', lambda: p.batch(1_000_000))
  rate('cache, one after the other', lambda: map(p.batch, range(1, 201)), 200)
  rate('cache, read ahead', lambda: p.iterate(1, 401), 400)
  found = cache.Cached(where, identity, '')
  memory = open_pipeline([found[i] for i in range(min(count, 200_000))])
  clock('memory: batch of step 1,000,000', lambda: memory.batch(1_000_000))
  rate('memory, one after the other', lambda: map(memory.batch, range(1, 201)), 200)


if __name__ == '__main__':
  main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))
