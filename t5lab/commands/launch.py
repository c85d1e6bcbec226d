"""t5lab launch --platform tpu-vm|gke|slurm|local --config FILE[:ARG] --workdir DIR …

Runs `t5lab train` (or --command doctor) on every host of a job. --dry-run prints all commands and
manifests as one script and does nothing; it needs no account.

  tpu-vm  --topology v5e:4x4 --zone us-west4-a [--queue] [--spot | --reserved]
          Creates or queues machines, installs this checkout as git tracks it, starts the job on all
          workers, shows the log and deletes the machines. Preempted spot machines are recreated.
  gke     --topology v5e:4x4 --image IMAGE [--build] [--spot]
          Submits a JobSet. The image has t5lab in its working directory; --build makes and pushes
          it.
  slurm   --nodes N --gpus-per-node G [--partition P] [--time 24:00:00]
          Submits an sbatch script, which is requeued if the job can resume.
  local   --processes N --devices-per-process D [--device gpu]
          Starts processes on this machine, e.g. to test a job before it runs elsewhere.

A job that ends with 75 (preempted), 124 (watchdog) or a signal is started again, up to --restarts
times; 2, 3, 4 and 70 are final, because a retry would end the same way. Of several processes the
worst exit code counts: 2, 3, 4, 70, any other, 124, a signal (128 + N), 75, 0.

--workdir gs://BUCKET/FOLDER is mounted on every host with Cloud Storage FUSE, because checkpoints
need a folder, and passed as /mnt/t5lab/BUCKET/FOLDER; a bucket with a hierarchical namespace is
recommended. The path of a folder that all hosts share (NFS, Filestore, Lustre) is passed unchanged.
The coordinator is process 0, port 8476. Hosts get none of your environment variables, only those of
--env. Arguments after -- are passed to the command.

Errors that would end the job on every host are reported before any machine is created: a mistake in
the config, a vocabulary or a file that is not in the checkout, TFDS data without
--env TFDS_DATA_DIR=gs://….
"""

import os
from pathlib import Path
import sys

from t5lab import config
from t5lab.commands import Parser, split_overrides
from t5lab.data import vocab
from t5lab.data.sources import records
from t5lab.data.tasks import names
from t5lab.errors import UsageError
from t5lab.tools.launching import bundle, executor, gke, local, slurm, topologies, tpu_vm
from t5lab.tools.launching.job import PORT, LaunchJob

PLATFORMS = ('tpu-vm', 'gke', 'slurm', 'local')
FILES = './t5lab-launch'     # where the script of --dry-run keeps its files


def main(argv: list[str]) -> int:
  argv = list(argv)
  arguments = ()
  if '--' in argv:
    argv, arguments = argv[:argv.index('--')], tuple(argv[argv.index('--') + 1:])
  argv, overrides = split_overrides(argv)
  args = _parser().parse_args(argv)
  _check_flags(args)
  if args.platform == 'local':
    return _run_locally(args, overrides, arguments)

  root, job, plan = _plan(args, overrides, arguments)
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
                      make_bundle=lambda path: bundle.make(root, args.allow_dirty, path))
  if plan.follow:
    print(f't5lab: {executor.describe_code(code)}', file=sys.stderr)
  return code


def _plan(args, overrides, arguments):
  """-> (root of the checkout or None, job, plan) for a platform other than local."""
  if args.platform == 'slurm':
    job = _job(args, overrides, arguments, os.path.abspath(args.config),
               devices=args.nodes * args.gpus_per_node)
    plan = slurm.plan(
        job, nodes=args.nodes, gpus=args.gpus_per_node, root=os.getcwd(), python=sys.executable,
        time=args.time, partition=args.partition, account=args.account)
    return None, job, plan

  if not args.topology:
    raise UsageError(f'--platform {args.platform} needs --topology, e.g. v5e:4x4')
  machine = topologies.parse(args.topology)
  root = bundle.find_root(args.config)
  job = _job(args, overrides, arguments, bundle.relative_config(args.config, root),
             devices=machine.chips)
  capacity = 'spot' if args.spot else 'reserved' if args.reserved else ''
  if args.platform == 'tpu-vm':
    plan = tpu_vm.plan(job, machine, zone=args.zone, project=args.project, queue=args.queue,
                       capacity=capacity, runtime=args.runtime_version)
  else:
    plan = gke.plan(job, machine, image=args.image, build=args.build,
                    service_account=args.service_account, namespace=args.namespace,
                    capacity=capacity)
  return root, job, plan


def _check_config(file, overrides, job, root) -> None:
  """Raises UsageError for an error that would end the job on its hosts.

  That is a mistake in the config, or data that the hosts would not have. root: of the checkout, if
  the hosts get nothing else; None if they share a file system with this machine.
  """
  c = config.load(file, overrides)
  config.check_names(c)
  if root is None:
    return
  paths = [(f'data.files.{split}', path) for split, patterns in c.data.files.items()
           for path in records.split_patterns(patterns) if '://' not in path]   # fsspec reads URLs
  if c.data.vocab.endswith(vocab.KINDS):
    paths.append(('data.vocab', c.data.vocab))
  paths += [(key, path) for key, path in (('init.path', c.init.path), ('data.cache', c.data.cache))
            if path]
  bundle.check_paths(root, job, paths)

  from_tfds = sorted(name for name in config.mixtures(c)
                     if name in names.NAMES and not config.is_embedded(name))
  if from_tfds and not c.data.cache and 'TFDS_DATA_DIR' not in job.environment:
    raise UsageError(f'data.mixture={from_tfds[0]}: new hosts have no TFDS data; give its location '
                     'with --env TFDS_DATA_DIR=gs://BUCKET/FOLDER')


def _run_locally(args, overrides, arguments) -> int:
  job = _job(args, overrides, arguments, args.config,
             devices=args.processes * args.devices_per_process, default_restarts=0)
  options = dict(processes=args.processes, devices=args.devices_per_process, device=args.device,
                 port=args.port)
  if args.dry_run:
    print(local.shell(job, **options), end='')
    return 0
  return local.run(job, **options, all_logs=args.all_logs, grace=args.grace)


def _job(args, overrides, arguments, config_on_hosts, devices, default_restarts=100) -> LaunchJob:
  """The job; `devices` is the number of devices that `doctor` has to expect."""
  file = args.config if os.path.isfile(args.config) else args.config.rpartition(':')[0]
  if not Path(file).is_file():
    raise UsageError(f'config file {args.config!r} does not exist')
  if args.command == 'doctor' and not any(a.startswith('--expect-devices') for a in arguments):
    arguments = ('--expect-devices', str(devices), *arguments)
  environment = {}
  for text in args.env:
    key, equals, value = text.partition('=')
    if not equals:
      raise UsageError(f'--env must be KEY=VALUE, got {key}; values are never taken from your '
                       'environment')
    environment[key] = value
  return LaunchJob(config_on_hosts, args.workdir, args.command, overrides, arguments, environment,
                   args.name, default_restarts if args.restarts is None else args.restarts)


# The platforms of a flag; flags that are not listed are for all platforms.
FLAG_PLATFORMS = {
    'topology': ('tpu-vm', 'gke'), 'zone': ('tpu-vm',), 'project': ('tpu-vm',),
    'queue': ('tpu-vm',), 'runtime_version': ('tpu-vm',), 'spot': ('tpu-vm', 'gke'),
    'reserved': ('tpu-vm',), 'allow_dirty': ('tpu-vm', 'gke'), 'keep': ('tpu-vm', 'gke'),
    'attach': ('tpu-vm', 'gke'), 'image': ('gke',), 'build': ('gke',),
    'namespace': ('gke',), 'service_account': ('gke',), 'nodes': ('slurm',),
    'gpus_per_node': ('slurm',), 'partition': ('slurm',), 'account': ('slurm',),
    'time': ('slurm',), 'processes': ('local',), 'devices_per_process': ('local',),
    'device': ('local',), 'port': ('local',), 'all_logs': ('local',), 'grace': ('local',),
}


def _check_flags(args) -> None:
  parser = _parser()
  for name, value in vars(args).items():
    platforms = FLAG_PLATFORMS.get(name, PLATFORMS)
    if value != parser.get_default(name) and args.platform not in platforms:
      raise UsageError(f'--{name.replace("_", "-")} is for --platform {" and ".join(platforms)}, '
                       f'not for {args.platform}')
  if args.spot and args.reserved:
    raise UsageError('--spot and --reserved exclude each other')


def _parser() -> Parser:
  parser = Parser('t5lab launch', description=__doc__)
  add = parser.add_argument
  add('--platform', required=True, choices=PLATFORMS)
  add('--config', required=True, metavar='FILE[:ARG]', help='the config of `t5lab train`')
  add('--workdir', required=True, help='gs://BUCKET/FOLDER, or a folder that all hosts share')
  add('--command', choices=('train', 'doctor'), default='train', help='what every host runs')
  add('--name', default='', help='name of the machines or the job (default: made from the workdir, '
                                 'so that a second launch of a workdir fails)')
  add('--restarts', type=int,
      help='how often the job may be started again (default: 100, local 0)')
  add('--env', action='append', default=[], metavar='KEY=VALUE',
      help='environment variable for the processes: T5LAB_…, JAX_…, XLA_…, NCCL_…, '
           'LIBTPU_INIT_ARGS, TFDS_DATA_DIR')
  add('--dry-run', action='store_true', help='print everything, do nothing')

  tpu = parser.add_argument_group('tpu-vm and gke').add_argument
  tpu('--topology', default='', help='e.g. v4:2x2x2, v5e:4x4, v5p:2x2x2; v6e:4x4*2 is two slices, '
                                     'joined by the data centre network')
  tpu('--spot', action='store_true', help='cheaper machines that may be preempted')
  tpu('--reserved', action='store_true', help='machines of your reservation (tpu-vm)')
  tpu('--allow-dirty', action='store_true', help='send uncommitted changes too')
  tpu('--keep', action='store_true', help='do not delete the machines at the end')
  tpu('--attach', action='store_true', help='follow a job that runs already')
  tpu('--zone', default='', help='zone of Google Cloud')
  tpu('--project', default='', help="project of Google Cloud (default: gcloud's)")
  tpu('--queue', action='store_true', help='request a queued resource and wait for capacity')
  tpu('--runtime-version', default='', help='version of the TPU image (default: the one for JAX)')
  tpu('--image', default='', help='container image for gke')
  tpu('--build', action='store_true',
      help='build the image from this checkout and push it, with docker')
  tpu('--namespace', default='', help='namespace of Kubernetes')
  tpu('--service-account', default='',
      help='service account of Kubernetes that may write to the bucket')

  gpu = parser.add_argument_group('slurm').add_argument
  gpu('--nodes', type=int, default=1)
  gpu('--gpus-per-node', type=int, default=8)
  gpu('--partition', default='')
  gpu('--account', default='')
  gpu('--time', default='', help='time limit, e.g. 24:00:00')

  this_machine = parser.add_argument_group('local').add_argument
  this_machine('--processes', type=int, default=2)
  this_machine('--devices-per-process', type=int, default=1)
  this_machine('--device', choices=('cpu', 'gpu'), default='cpu',
               help='virtual CPU devices, or the GPUs divided among the processes')
  this_machine('--port', type=int, default=PORT, help='port of the coordinator')
  this_machine('--all-logs', action='store_true',
               help='print the output of all processes, not only of process 0')
  this_machine('--grace', type=float, default=30.,
               help='seconds that the other processes get after one has failed')
  return parser
