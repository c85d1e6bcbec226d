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
import sys

from t5lab import config
from t5lab.commands import Parser, split_overrides
from t5lab.data import vocab
from t5lab.data.sources import records
from t5lab.data.tasks import names
from t5lab.errors import UsageError
from t5lab.tools.launching import bundle, executor, gke, local, slurm, topologies, tpu_vm
from t5lab.tools.launching.job import PORT, LaunchJob, can_retry

FILES = './t5lab-launch'     # where the script of --dry-run keeps its files


def main(argv: list[str]) -> int:
  arguments = ()
  if '--' in argv:
    argv, arguments = argv[:argv.index('--')], tuple(argv[argv.index('--') + 1:])
  argv, overrides = split_overrides(argv)
  args = _parse(argv)
  args.overrides, args.arguments = overrides, arguments
  if args.platform == 'local':
    return _run_locally(args)

  root, job, plan = _plan(args)
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
    advice = 'run the same command to resume' if can_retry(code) else 'see its log'
    outcome = f'the job ended with {code}; {advice}' if code else 'the job has finished'
    print(f't5lab: {outcome}', file=sys.stderr)
  return code


def _plan(args):
  """-> (root of the checkout or None, job, plan) for a platform other than local."""
  if args.platform == 'slurm':
    job = _job(args, os.path.abspath(args.config), devices=args.nodes * args.gpus_per_node)
    plan = slurm.plan(
        job, nodes=args.nodes, gpus=args.gpus_per_node, root=os.getcwd(), python=sys.executable,
        time=args.time, partition=args.partition, account=args.account)
    return None, job, plan

  if not args.topology:
    raise UsageError(f'--platform {args.platform} needs --topology, e.g. v5e:4x4')
  machine = topologies.parse(args.topology)
  root, config_on_hosts = bundle.locate(args.config)
  job = _job(args, config_on_hosts, devices=machine.chips)
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
  vocab_file = c.data.vocab if c.data.vocab.endswith(vocab.KINDS) else ''
  paths += [(key, path) for key, path in (('data.vocab', vocab_file), ('init.path', c.init.path),
                                          ('data.cache', c.data.cache)) if path]
  bundle.check_paths(root, job, paths)

  from_tfds = sorted(name for name in config.mixtures(c)
                     if name in names.NAMES and not config.is_embedded(name))
  if from_tfds and not c.data.cache and 'TFDS_DATA_DIR' not in job.environment:
    raise UsageError(f'data.mixture={from_tfds[0]}: new hosts have no TFDS data; give its location '
                     'with --env TFDS_DATA_DIR=gs://BUCKET/FOLDER')


def _run_locally(args) -> int:
  job = _job(args, args.config, devices=args.processes * args.devices_per_process,
             default_restarts=0)
  options = dict(processes=args.processes, devices=args.devices_per_process, device=args.device,
                 port=args.port)
  if args.dry_run:
    print(local.shell(job, **options), end='')
    return 0
  return local.run(job, **options, all_logs=args.all_logs, grace=args.grace)


def _job(args, config_on_hosts, devices, default_restarts=100) -> LaunchJob:
  """The job; `devices` is the number of devices that `doctor` has to expect."""
  bundle.split_config(args.config)     # it must exist
  arguments = args.arguments
  if args.command == 'doctor' and not any(a.startswith('--expect-devices') for a in arguments):
    arguments = ('--expect-devices', str(devices), *arguments)
  for text in args.env:
    if '=' not in text:
      raise UsageError(f'--env must be KEY=VALUE, got {text}; values are never taken from your '
                       'environment')
  return LaunchJob(config_on_hosts, args.workdir, args.command, args.overrides, arguments,
                   dict(text.split('=', 1) for text in args.env), args.name,
                   default_restarts if args.restarts is None else args.restarts)


def _parse(argv):
  """Parses the flags. Those that are added by `flags_of` are for the named platforms only."""
  parser = Parser('t5lab launch', description=__doc__)
  platforms_of = {}

  def flags_of(group, *platforms):
    def add(flag, **options):
      platforms_of[group.add_argument(flag, **options).dest] = platforms
    return add

  add = parser.add_argument
  add('--platform', required=True, choices=('tpu-vm', 'gke', 'slurm', 'local'))
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

  group = parser.add_argument_group('tpu-vm and gke')
  tpu, vm = flags_of(group, 'tpu-vm', 'gke'), flags_of(group, 'tpu-vm')
  kubernetes = flags_of(group, 'gke')
  tpu('--topology', default='', help='e.g. v4:2x2x2, v5e:4x4, v5p:2x2x2; v6e:4x4*2 is two slices, '
                                     'joined by the data centre network')
  tpu('--spot', action='store_true', help='cheaper machines that may be preempted')
  vm('--reserved', action='store_true', help='machines of your reservation (tpu-vm)')
  tpu('--allow-dirty', action='store_true', help='send uncommitted changes too')
  tpu('--keep', action='store_true', help='do not delete the machines at the end')
  tpu('--attach', action='store_true', help='follow a job that runs already')
  vm('--zone', default='', help='zone of Google Cloud')
  vm('--project', default='', help="project of Google Cloud (default: gcloud's)")
  vm('--queue', action='store_true', help='request a queued resource and wait for capacity')
  vm('--runtime-version', default='', help='version of the TPU image (default: the one for JAX)')
  kubernetes('--image', default='', help='container image for gke')
  kubernetes('--build', action='store_true',
             help='build the image from this checkout and push it, with docker')
  kubernetes('--namespace', default='', help='namespace of Kubernetes')
  kubernetes('--service-account', default='',
             help='service account of Kubernetes that may write to the bucket')

  gpu = flags_of(parser.add_argument_group('slurm'), 'slurm')
  gpu('--nodes', type=int, default=1)
  gpu('--gpus-per-node', type=int, default=8)
  gpu('--partition', default='')
  gpu('--account', default='')
  gpu('--time', default='', help='time limit, e.g. 24:00:00')

  here = flags_of(parser.add_argument_group('local'), 'local')
  here('--processes', type=int, default=2)
  here('--devices-per-process', type=int, default=1)
  here('--device', choices=('cpu', 'gpu'), default='cpu',
       help='virtual CPU devices, or the GPUs divided among the processes')
  here('--port', type=int, default=PORT, help='port of the coordinator')
  here('--all-logs', action='store_true',
       help='print the output of all processes, not only of process 0')
  here('--grace', type=float, default=30.,
       help='seconds that the other processes get after one has failed')

  args = parser.parse_args(argv)
  for name, platforms in platforms_of.items():
    if getattr(args, name) != parser.get_default(name) and args.platform not in platforms:
      raise UsageError(f'--{name.replace("_", "-")} is for --platform {" and ".join(platforms)}, '
                       f'not for {args.platform}')
  if args.spot and args.reserved:
    raise UsageError('--spot and --reserved exclude each other')
  return args
