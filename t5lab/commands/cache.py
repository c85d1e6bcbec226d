"""t5lab cache --config FILE[:ARG] --config.data.cache=DIR [--config.KEY=VALUE …]

Tokenizes the training split once into ArrayRecord shards under DIR, with a manifest. `t5lab train`
with the same data.cache reads from there. Kill it at any time; run the same command to resume with
the missing shards, without duplicates. A cache made with another vocabulary, other files or other
preprocessors is rejected by the training, and made again by this command.
"""

import os

from t5lab import config, files
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab cache', description=__doc__)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]',
                      help='a config file; ARG is passed to its get_config')
  parser.add_argument('--processes', type=int, default=os.cpu_count(), metavar='N',
                      help='processes that tokenize in parallel (default: one per core); the cache '
                           'does not depend on them')
  parser.add_argument('--shards', type=int, default=16, metavar='N',
                      help='files per task (default: 16)')
  args = parser.parse_args(argv)
  for name in ('processes', 'shards'):
    if getattr(args, name) < 1:
      raise UsageError(f'--{name} must be 1 or more, got {getattr(args, name)}')
  c = config.load(args.config, overrides)
  if not c.data.cache:
    raise UsageError('the folder of the cache is missing: --config.data.cache=DIR')

  from t5lab.data.tasks import cache_build, registry
  from t5lab.programs import streams
  from t5lab.runs.lock import RunLock
  spec = streams.settle_vocabulary(c)
  own_files = config.files(c)
  registry.register(spec, own_files, c.data.modules)
  lengths = {name: length for name, length in c.data.lengths.items() if length}
  with RunLock(c.data.cache):
    for task, _ in registry.select(c.data.mixture, c.data.split):
      job = cache_build.CacheJob(task.name, c.data.split, lengths, spec, own_files,
                                 tuple(c.data.modules))
      count = task.num_input_examples(c.data.split)     # None if the source does not know
      with files.Progress(task.name, 'examples', count) as progress:
        manifest = cache_build.build(job, c.data.cache, shards=args.shards,
                                     processes=args.processes, tick=progress.add)
      print(f'{task.name}: {manifest["rows"]:,} examples of {manifest["tokens"]:,} tokens in '
            f'{len(manifest["shards"])} shards of {c.data.cache}', flush=True)
    # Packs the rows, which the cache remembers.
    for line in streams.open_stream(c).batches.summary():
      print(line)
  return 0
