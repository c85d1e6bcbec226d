"""t5lab doctor --config FILE[:ARG] --workdir DIR [--expect-devices N] [--free-gb X]

Is this cluster fit for the run? Run on every host as `t5lab train` would be, by
`t5lab launch … --command doctor`, or alone on one machine. Under a minute it looks at

  coordinator       do all hosts reach it, and each other's numbers?         2
  versions          Python, JAX, libtpu, t5lab's own code, the config        2
  devices           as many as expected, and does the mesh fit?              2
  data, vocabulary  the same hashes on every host?                           3
  workdir           writable, listable, the same folder on all?              4
  disk              room for the checkpoints that are kept, and one more?    4
  save and restore  every array of the state, scaled down, and its sharding  4
  clocks            within 5 s: logs of hosts are compared by them          70

The number is the exit code where it is not well; of several findings the first of 2, 3, 4, 70.
The first host prints the table. What hangs ends after --seconds with the code of its check.
"""

import argparse
import os
import sys
import time

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab doctor', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--config', required=True, metavar='FILE[:ARG]', help='of `t5lab train`')
  add('--workdir', required=True, help='of `t5lab train`')
  add('--expect-devices', type=int, default=0, metavar='N', help='of all hosts together')
  add('--free-gb', type=float, default=0., metavar='X',
      help='room there should be (default: checkpoint.keep + 1 checkpoints)')
  add('--arrive', type=float, default=30., metavar='SECONDS', help='that the hosts have to come')
  add('--seconds', type=float, default=60., help='for all of it')
  args = parser.parse_args(argv)
  c = configs.load(args.config, overrides)
  from t5lab.parallel import multihost
  from t5lab.tools.doctor import examine
  start = time.monotonic()
  with examine.Deadline(args.seconds, _leave) as deadline:
    result = examine.examine(c, args.workdir, expect=args.expect_devices, free_gb=args.free_gb,
                            arrive=args.arrive, progress=deadline.progress)
  if result.index == 0:
    show(result, time.monotonic() - start)
  if result.alone:
    multihost.give_up(result.code, result.alone)
  return result.code


def _leave(code, sentence):
  print(f't5lab: {sentence}', file=sys.stderr, flush=True)
  os._exit(code)


def show(result, seconds) -> None:
  """The table: hosts, then checks."""
  gb = lambda n: 'unknown' if n is None else f'{n / 1e9:.3g} GB'
  print(f'{"host":>4}  {"name":24} {"devices":>8} {"clock":>10} {"free":>10}')
  for i, host in enumerate(result.hosts):
    devices = '?' if host['devices'] is None else host['devices']
    print(f'{i:>4}  {host["name"][:24]:24} {devices:>8} {host["ahead"]:>+8.3f} s '
          f'{gb(host["free"]):>10}')
  print()
  for check in result.checks:
    verdict = {True: 'ok', False: 'BAD', None: '-'}[check.ok]
    print(f'{verdict:>4}  {check.name:17} {check.seconds:6.1f} s  {check.says}')
  bad = sum(check.ok is False for check in result.checks)
  print(f'\n{"fit for the run" if not bad else f"{bad} not well"}, in {seconds:.1f} s', flush=True)

