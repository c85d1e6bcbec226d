"""t5lab doctor --config FILE[:ARG] --workdir DIR [--expect-devices N] [--free-gb X]

Checks that a cluster is ready for a run. Run it on every host in the way that `t5lab train` will be
run, e.g. with `t5lab launch … --command doctor`, or alone on one machine. It takes under a minute:

  coordinator       can all hosts reach it, each with its own number?           2
  versions          are Python, JAX, libtpu, t5lab and the config the same?     2
  devices           as many as expected, and does the mesh fit?                 2
  data, vocabulary  are the hashes the same on every host?                      3
  workdir           writable, listable, and the same folder on all hosts?       4
  disk              room for the checkpoints that are kept, and one more?       4
  save and restore  every array of the state, scaled down, with its sharding    4
  clocks            within 5 s of each other, so that logs can be compared     70

The number is the exit code if the check fails; of several failures the first of 2, 3, 4, 70 counts.
The first host prints the table. If a check hangs, the command ends after --seconds with
the code of that check.
"""

import os
import sys
import time

from t5lab import config
from t5lab.commands import Parser, split_overrides


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab doctor', description=__doc__)
  add = parser.add_argument
  add('--config', required=True, metavar='FILE[:ARG]', help='the config of `t5lab train`')
  add('--workdir', required=True, help='the workdir of `t5lab train`')
  add('--expect-devices', type=int, default=0, metavar='N',
      help='the number of devices of all hosts together')
  add('--free-gb', type=float, default=0., metavar='X',
      help='free space to require (default: room for checkpoint.keep + 1 checkpoints)')
  add('--arrive', type=float, default=30., metavar='SECONDS',
      help='how long to wait for all hosts to connect (default: 30)')
  add('--seconds', type=float, default=60., help='time limit of the whole command (default: 60)')
  args = parser.parse_args(argv)
  c = config.load(args.config, overrides)
  from t5lab.parallel import multihost
  from t5lab.tools.doctor import examine
  start = time.monotonic()
  with examine.deadline(args.seconds, _leave) as progress:
    examination = examine.examine(
        c, args.workdir, expect=args.expect_devices, free_gb=args.free_gb, arrive=args.arrive,
        progress=progress)
  if examination.index == 0:
    show(examination, time.monotonic() - start)
  # The other hosts do not know of this failure, and wait for this host.
  if failure := examination.failure('save and restore'):
    multihost.abort_all(examination.code, failure)
  return examination.code


def _leave(code, message):
  print(f't5lab: {message}', file=sys.stderr, flush=True)
  os._exit(code)


def show(examination, seconds) -> None:
  """Prints the table of the hosts, then that of the checks."""
  gb = lambda n: 'unknown' if n is None else f'{n / 1e9:.3g} GB'
  print(f'{"host":>4}  {"name":24} {"devices":>8} {"clock":>10} {"free":>10}')
  for i, host in enumerate(examination.hosts):
    devices = '?' if host['devices'] is None else host['devices']
    print(f'{i:>4}  {host["name"][:24]:24} {devices:>8} {host["ahead"]:>+8.3f} s '
          f'{gb(host["free"]):>10}')
  print()
  for finding in examination.findings:
    verdict = {True: 'ok', False: 'FAIL', None: '-'}[finding.ok]
    print(f'{verdict:>4}  {finding.check:17} {examination.seconds[finding.check]:6.1f} s  '
          f'{finding.message}')
  failed = sum(finding.ok is False for finding in examination.findings)
  plural = 's' if failed > 1 else ''
  verdict = f'{failed} check{plural} failed' if failed else 'ready for the run'
  print(f'\n{verdict}, in {seconds:.1f} s', flush=True)
