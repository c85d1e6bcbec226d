"""t5lab bisect RUN_A RUN_B

Finds the first step and tensor at which two runs part. Compares their configs, metrics and
checkpoints, then replays both from the last checkpoint at which they are the same, or from their
seeds, and looks at the data, the loss, the gradients and the updated arrays of each step, bit for
bit. Nothing in either folder changes.

Exit code 0: the runs are equal; 70: they part, and the last line says where.
"""

import argparse
import sys

from t5lab.commands import Parser, use_compilation_cache
from t5lab.errors import NumericalError


def main(argv: list[str] | None = None) -> int:
  parser = Parser('t5lab bisect', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('a', metavar='RUN_A')
  parser.add_argument('b', metavar='RUN_B')
  parser.add_argument('--modules', default='', metavar='A,B',
                      help="modules of yours that register the runs' tasks")
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)

  from t5lab.programs import bisect as bisecting
  from t5lab.programs import replay as replaying
  use_compilation_cache()
  modules = tuple(filter(None, args.modules.split(',')))
  a, b = (replaying.Replay(path, modules) for path in (args.a, args.b))
  verdict = bisecting.bisect(a, b, say=lambda text: print(text, flush=True))
  print(verdict.text)
  return NumericalError.code if verdict.parted else 0

