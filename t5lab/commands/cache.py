"""t5lab cache --config FILE[:ARG] --config.data.cache=DIR [--config.KEY=VALUE …]

Tokenizes the training split once, into ArrayRecord shards under DIR with a manifest; `t5lab train`
with the same data.cache then reads from there. Killed, the same command goes on with the shards
that are missing, and no row is written twice. What was made with another vocabulary, other files or
other preprocessors is refused by the training, and made anew by this command.
"""

import argparse
import os
import sys
import time

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab cache', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]')
  parser.add_argument('--processes', type=int, default=os.cpu_count(),
                      help='that tokenize at once (default: one a core); they do not change the '
                           'cache')
  parser.add_argument('--shards', type=int, default=16, help='files a task (default 16)')
  args = parser.parse_args(argv)
  for name in ('processes', 'shards'):
    if getattr(args, name) < 1:
      raise UsageError(f'--{name}={getattr(args, name)}: it must be 1 or more')
  c = configs.load(args.config, overrides)
  if not c.data.cache:
    raise UsageError('say where the cache goes: --config.data.cache=DIR')

  from t5lab.data.tasks import cache_build
  from t5lab.data.tasks import registry as tasks
  from t5lab.programs import streams
  from t5lab.runs.lock import RunLock
  spec = streams.settle_vocabulary(c)
  files = configs.files(c)
  tasks.register(spec, files, c.data.modules)
  lengths = {name: length for name, length in c.data.lengths.items() if length}
  with RunLock(c.data.cache):
    for task, _ in tasks.select(c.data.mixture, c.data.split):
      total = task.num_input_examples(c.data.split)
      show = _Progress(task.name, total)
      try:
        manifest = cache_build.build(
            cache_build.Job(task.name, c.data.split, lengths, spec, files, tuple(c.data.modules)),
            c.data.cache, shards=args.shards, processes=args.processes, tick=show)
      finally:
        show.end()
      print(f'{task.name}: {manifest["rows"]:,} examples of {manifest["tokens"]:,} tokens in '
            f'{len(manifest["shards"])} shards of {c.data.cache}', flush=True)
    for line in streams.open_stream(c).batches.summary():      # packed once, and remembered
      print(line)
  return 0


class _Progress:
  """Examples, rate and, where the source knows its rows and none is cut or joined, an ETA."""

  def __init__(self, name: str, total: int | None):
    self._name, self._total = name, total
    self._done, self._start, self._shown = 0, time.monotonic(), 0.

  def __call__(self, rows: int) -> None:
    self._done += rows
    if time.monotonic() - self._shown > 1:
      self._shown = time.monotonic()
      rate = self._done / max(self._shown - self._start, 1e-9)
      left = (self._total or 0) - self._done
      eta = f' · ETA {left / rate:,.0f} s' if left > 0 and self._done else ''
      print(f'\r{self._name}: {self._done:,} examples · {rate:,.0f}/s{eta}   ', end='',
            file=sys.stderr, flush=True)

  def end(self) -> None:
    if self._shown:
      print(file=sys.stderr)

