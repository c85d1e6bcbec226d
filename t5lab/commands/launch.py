"""t5lab launch --platform tpu-vm|gke|slurm|local --config FILE[:ARG] --workdir DIR …

Runs `t5lab train` (or --command doctor) on every host of a job. --dry-run prints every command and
manifest, as one script, and does nothing: it needs no account.

  tpu-vm  --topology v5e:4x4 --zone us-west4-a [--queue] [--spot | --reserved]
          creates or queues machines, installs this checkout as git has it, starts the job on all
          workers, shows the log, deletes the machines. Spot: preempted, they are created again.
  gke     --topology v5e:4x4 --image IMAGE [--build] [--spot]
          a JobSet; the image holds t5lab in its working folder, --build makes and pushes it.
  slurm   --nodes N --gpus-per-node G [--partition P] [--time 24:00:00]
          an sbatch script, requeued when it may go on.
  local   --processes N --devices-per-process D [--device gpu]
          processes on this machine, as a test of what will run elsewhere.

Exit codes of a job: 75 (preempted), 124 (watchdog) and signals start it again, --restarts times;
2, 3, 4 and 70 would come again and end it. Of several processes the worst counts: 2, 3, 4, 70,
another, 124, a signal as 128 + N, 75, 0.

--workdir gs://BUCKET/FOLDER is mounted on every host with Cloud Storage FUSE and passed as
/mnt/t5lab/BUCKET/FOLDER, because checkpoints need a folder; best a bucket with a hierarchical
namespace. The path of a folder that all hosts share (NFS, Filestore, Lustre) is passed as it is.
The processes meet at port 8476 of the first. No variable of your environment reaches a host but
what --env sets. Arguments after -- go to the command.

What would end the job on every host is told before a machine is paid for: a mistake in the config,
a vocabulary or a file that the checkout lacks, TFDS data without --env TFDS_DATA_DIR=gs://….
"""

import argparse
import os
from pathlib import Path
import sys

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides
from t5lab.data import vocab
from t5lab.data.sources import records
from t5lab.data.tasks import names as task_names
from t5lab.errors import UsageError
from t5lab.tools.launching import bundle, executor, gke, local, slurm, topologies, tpu_vm
from t5lab.tools.launching.job import PORT, Job

PLATFORMS = ('tpu-vm', 'gke', 'slurm', 'local')
FILES = './t5lab-launch'     # where the script of --dry-run keeps its files


def main(argv: list[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  passed = ()
  if '--' in argv:
    argv, passed = argv[:argv.index('--')], tuple(argv[argv.index('--') + 1:])
  argv, overrides = split_overrides(argv)
  args = _parser().parse_args(argv)
  given = {name for name in vars(args) if getattr(args, name) != _parser().get_default(name)}
  _only_theirs(args.platform, given)
  if args.spot and args.reserved:
    raise UsageError('--spot or --reserved, not both')
  if args.platform == 'local':
    return _local(args, overrides, passed)
  if args.platform == 'slurm':
    job = _job(args, overrides, passed, os.path.abspath, args.nodes * args.gpus_per_node)
    root, plan = None, slurm.plan(
        job, nodes=args.nodes, gpus=args.gpus_per_node, root=os.getcwd(), python=sys.executable,
        time=args.time, partition=args.partition, account=args.account)
  else:
    if not args.topology:
      raise UsageError(f'--platform {args.platform} needs --topology, as v5e:4x4')
    machine = topologies.parse(args.topology)
    root = bundle.root_of(args.config)
    job = _job(args, overrides, passed, lambda config: bundle.inside(config, root),
               machine.chips)
    capacity = 'spot' if args.spot else 'reserved' if args.reserved else ''
    if args.platform == 'tpu-vm':
      plan = tpu_vm.plan(job, machine, zone=args.zone, project=args.project, queue=args.queue,
                         capacity=capacity, runtime=args.runtime_version)
    else:
      plan = gke.plan(job, machine, image=args.image, build=args.build,
                      service_account=args.service_account, namespace=args.namespace,
                      capacity=capacity)
  if not args.attach:
    _check_config(args.config, overrides, job, root if plan.bundle else None)
  if args.dry_run:
    archive = ''
    if plan.bundle:
      archive = bundle.shell(root, args.allow_dirty, f'{FILES}/bundle.tar.gz')
    print(plan.shell(FILES, archive, keep=args.keep), end='')
    return 0
  if plan.bundle and not args.attach:
    bundle.check_clean(root, args.allow_dirty)
  code = executor.run(plan, restarts=job.restarts, keep=args.keep, attach=args.attach,
                      make_bundle=lambda to: bundle.make(root, args.allow_dirty, to))
  if plan.follow:
    print(f't5lab: {executor.code_says(code)}', file=sys.stderr)
  return code


def _check_config(file, overrides, job, root) -> None:
  """UsageError for what would end the job on its hosts, before they are paid for: a mistake in the
  config, and data that they would not have. root: of the checkout that is all that they get, or
  None."""
  c = configs.load(file, overrides)
  configs.check_names(c)
  if root is None:
    return
  paths = [(f'data.files.{split}', path) for split, patterns in c.data.files.items()
           for path in records.split_patterns(patterns) if '://' not in path]      # of a URL fsspec takes care
  paths += [(knob, path) for knob, path in (
      ('data.vocab', c.data.vocab if c.data.vocab.endswith(vocab.KINDS) else ''),
      ('init.path', c.init.path), ('data.cache', c.data.cache)) if path]
  bundle.check_sent(root, job, paths)
  named = {name for name in configs.mixtures(c)
           if name in task_names.NAMES and not configs.embedded(name)}
  if named and not c.data.cache and 'TFDS_DATA_DIR' not in job.environment:
    raise UsageError(f'data.mixture={sorted(named)[0]}: new hosts have no TFDS data; say where it '
                     'is with --env TFDS_DATA_DIR=gs://BUCKET/FOLDER')


def _local(args, overrides, passed) -> int:
  job = _job(args, overrides, passed, lambda config: config,
             args.processes * args.devices_per_process, restarts=0)
  options = dict(processes=args.processes, devices=args.devices_per_process, device=args.device,
                 port=args.port)
  if args.dry_run:
    print(local.shell(job, **options), end='')
    return 0
  return local.run(job, **options, all_logs=args.all_logs, grace=args.grace)


def _job(args, overrides, passed, place, devices, restarts=100) -> Job:
  """place: FILE[:ARG] -> as the hosts see it."""
  file = args.config if os.path.isfile(args.config) else args.config.rpartition(':')[0]
  if not Path(file).is_file():
    raise UsageError(f'no config file {args.config!r}')
  if args.command == 'doctor' and not any(a.startswith('--expect-devices') for a in passed):
    passed = ('--expect-devices', str(devices), *passed)
  environment = {}
  for text in args.env:
    key, equals, value = text.partition('=')
    if not equals:
      raise UsageError(f'--env {key}: KEY=VALUE; values are never taken from your environment')
    environment[key] = value
  return Job(place(args.config), args.workdir, args.command, overrides, passed, environment,
             args.name, restarts if args.restarts is None else args.restarts)


# Flags that only some platforms have; the others are for all.
THEIRS = {
    'topology': ('tpu-vm', 'gke'), 'zone': ('tpu-vm',), 'project': ('tpu-vm',),
    'queue': ('tpu-vm',), 'runtime_version': ('tpu-vm',), 'spot': ('tpu-vm', 'gke'),
    'reserved': ('tpu-vm',), 'allow_dirty': ('tpu-vm', 'gke'), 'keep': ('tpu-vm', 'gke'),
    'attach': ('tpu-vm', 'gke'), 'image': ('gke',), 'build': ('gke',),
    'namespace': ('gke',), 'service_account': ('gke',), 'nodes': ('slurm',),
    'gpus_per_node': ('slurm',), 'partition': ('slurm',), 'account': ('slurm',),
    'time': ('slurm',), 'processes': ('local',), 'devices_per_process': ('local',),
    'device': ('local',), 'port': ('local',), 'all_logs': ('local',), 'grace': ('local',),
}


def _only_theirs(platform, given):
  for name in given:
    if platform not in THEIRS.get(name, PLATFORMS):
      flag, theirs = name.replace('_', '-'), ' and '.join(THEIRS[name])
      raise UsageError(f'--{flag} is for --platform {theirs}, not for {platform}')


def _parser() -> Parser:
  parser = Parser('t5lab launch', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--platform', required=True, choices=PLATFORMS)
  add('--config', required=True, metavar='FILE[:ARG]', help='of `t5lab train`')
  add('--workdir', required=True, help='gs://BUCKET/FOLDER, or a folder that all hosts share')
  add('--command', choices=('train', 'doctor'), default='train', help='what every host runs')
  add('--name', default='', help='of the machines or the job; made from the workdir, so that '
                                 'a second launch of a workdir collides')
  add('--restarts', type=int, help='how often it may start again (default: 100, local 0)')
  add('--env', action='append', default=[], metavar='KEY=VALUE',
      help='for the processes: T5LAB_…, JAX_…, XLA_…, NCCL_…, LIBTPU_INIT_ARGS, '
           'TFDS_DATA_DIR')
  add('--dry-run', action='store_true', help='print all of it, do nothing')

  tpu = parser.add_argument_group('tpu-vm and gke').add_argument
  tpu('--topology', default='', help='v4:2x2x2, v5e:4x4, v5p:2x2x2; v6e:4x4*2 are two '
                                   'slices, joined by the data centre network')
  tpu('--spot', action='store_true', help='cheaper, may be taken away')
  tpu('--reserved', action='store_true', help='from your reservation (tpu-vm)')
  tpu('--allow-dirty', action='store_true', help='send changes that are not committed')
  tpu('--keep', action='store_true', help='do not delete at the end')
  tpu('--attach', action='store_true', help='the job is there: only follow it')
  tpu('--zone', default='', help='of Google Cloud')
  tpu('--project', default='', help="of Google Cloud; gcloud's own")
  tpu('--queue', action='store_true', help='a queued resource: wait for capacity')
  tpu('--runtime-version', default='', help='of the image; the one for JAX')
  tpu('--image', default='', help='container image for gke')
  tpu('--build', action='store_true', help='build and push it from this checkout, with docker')
  tpu('--namespace', default='', help='of Kubernetes')
  tpu('--service-account', default='', help='of Kubernetes, which may write to the bucket')

  gpu = parser.add_argument_group('slurm').add_argument
  gpu('--nodes', type=int, default=1)
  gpu('--gpus-per-node', type=int, default=8)
  gpu('--partition', default='')
  gpu('--account', default='')
  gpu('--time', default='', help='limit, as 24:00:00')

  here = parser.add_argument_group('local').add_argument
  here('--processes', type=int, default=2)
  here('--devices-per-process', type=int, default=1)
  here('--device', choices=('cpu', 'gpu'), default='cpu', help='virtual CPU devices, or GPUs split')
  here('--port', type=int, default=PORT, help='where they meet')
  here('--all-logs', action='store_true', help='show all processes, not only the first')
  here('--grace', type=float, default=30., help='seconds for the others when one has died')
  return parser

