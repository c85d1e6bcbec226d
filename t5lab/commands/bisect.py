"""t5lab bisect RUN_A RUN_B

Finds the first step and tensor at which two runs differ. Compares their configs, metrics and
checkpoints, then replays both from the last checkpoint at which they agree, or from their seeds,
and compares the data, loss, gradients and updated arrays of each step bit for bit. Nothing in
either folder changes.

Exit codes: 0 the runs are equal; 70 they differ, and the last line says where.
"""

import functools

from t5lab.commands import Parser, use_compilation_cache
from t5lab.errors import NumericalError


def main(argv: list[str]) -> int:
  parser = Parser('t5lab bisect', description=__doc__)
  parser.add_argument('a', metavar='RUN_A')
  parser.add_argument('b', metavar='RUN_B')
  parser.add_argument('--modules', default='', metavar='A,B',
                      help="modules of yours that register the runs' tasks")
  args = parser.parse_args(argv)

  from t5lab.programs import bisect
  from t5lab.programs.replay import Replay
  use_compilation_cache()
  modules = tuple(filter(None, args.modules.split(',')))
  a, b = (Replay(path, modules) for path in (args.a, args.b))
  verdict = bisect.bisect(a, b, log=functools.partial(print, flush=True))
  print(verdict.text)
  return NumericalError.code if verdict.differ else 0
