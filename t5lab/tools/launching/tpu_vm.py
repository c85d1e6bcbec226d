"""Cloud TPU VMs through gcloud: create or queue, install, run on all workers, follow, delete.

On the workers ~/NAME holds the bundle, the scripts, `log`, and in the end `exit`. A script there
starts the job again after 75, 124 or a signal, also when nobody follows. Preempted machines are
gone with it: then the launcher, if it is there, deletes and creates them again.

Flags as of gcloud 528 [cloud.google.com/sdk/gcloud/reference/compute/tpus].
"""

import shlex

from t5lab.errors import UsageError
from t5lab.tools.launching import scripts
from t5lab.tools.launching.job import MOUNT, PORT, Job, check_remote
from t5lab.tools.launching.plan import Plan, Step
from t5lab.tools.launching.topologies import Machine

QUEUED_DEAD = ('FAILED', 'SUSPENDED', 'SUSPENDING', 'DELETING')
GONE = ('PREEMPTED', 'TERMINATED', 'STOPPED', 'SUSPENDED', 'HIDDEN')


def plan(job: Job, machine: Machine, *, zone: str, project: str = '', queue: bool = False,
         capacity: str = '', runtime: str = '') -> Plan:
  """Several slices are nodes of one queued resource, which is created, asked and reached as a
  whole; on their hosts JAX finds the first slice through the metadata server."""
  check_remote(job)
  if not zone:
    raise UsageError('--platform tpu-vm needs --zone, as us-central2-b')
  several = machine.slices > 1
  if several and not queue:
    raise UsageError(f'--topology: {machine.slices} slices come only as one queued resource: '
                     'add --queue')
  where = (f'--zone={zone}', *(f'--project={project}',) * bool(project))
  extra = (f'--{capacity}',) * bool(capacity)
  runtime = runtime or machine.generation.runtime
  call = lambda group, verb, *rest: ('gcloud', 'compute', 'tpus', group, verb, *rest, *where)
  queued = lambda verb, *rest: call('queued-resources', verb, job.name, *rest)
  vm = lambda verb, *rest: call('tpu-vm', verb, *rest)
  # ssh and scp, to these workers
  reach = lambda verb, workers, *rest: call(
      'queued-resources' if several else 'tpu-vm', verb, *rest,
      *(f'--node={workers}',) * several, f'--worker={workers}', '--quiet')
  on = lambda workers, command: reach('ssh', workers, job.name, f'--command={command}')
  queue_state = queued('describe', '--format=value(state.state)')
  node_state = vm('describe', job.name, '--format=value(state)')

  if queue:
    nodes = ((f'--node-count={machine.slices}', f'--node-prefix={job.name}') if several else
             (f'--node-id={job.name}',))
    create = (
        Step('queue the slices' if several else 'queue the slice', queued(
            'create', *nodes, f'--accelerator-type={machine.accelerator}',
            f'--runtime-version={runtime}', *extra, '--async', '--quiet')),
        Step('wait for capacity; this may take hours', queue_state, until=('ACTIVE',),
             unless=QUEUED_DEAD, every=30.))
    delete = Step('delete the slices' if several else 'delete the slice',
                  queued('delete', '--force', '--quiet'))
  else:
    create = (Step('create the slice', vm(
        'create', job.name, f'--accelerator-type={machine.accelerator}', f'--version={runtime}',
        *extra, '--quiet')),)
    delete = Step('delete the slice', vm('delete', job.name, '--quiet'))

  files = {'install.sh': _install(job), 'run.sh': _run(job), 'follow.sh': _follow()}
  # a queued resource is active once all of its nodes are up, and suspended when it loses them
  state, up, gone = ((queue_state, 'ACTIVE', QUEUED_DEAD) if several else
                     (node_state, 'READY', GONE))
  wait = () if several else (Step('wait until it is up', state, until=(up,), unless=gone),)
  return Plan(
      notes=tuple(_notes(job, machine, runtime, capacity)), files=files, create=create,
      start=(
          *wait,
          Step('a folder on every worker', on('all', f'mkdir -p {job.name}')),
          Step('copy the checkout and the scripts', reach(
              'scp', 'all', '{files}/bundle.tar.gz', *('{files}/' + name for name in files),
              f'{job.name}:{job.name}/')),
          Step('install', on('all', f'bash {job.name}/install.sh')),
          Step('start the job on all workers', on(
              # detached: it outlives the connection, which would wait for an open output
              'all', f'cd {job.name} && rm -f exit && '
                     '(nohup setsid bash run.sh > log 2>&1 < /dev/null &)')),
      ),
      follow=Step('the log of worker 0', on('0', f'bash {job.name}/follow.sh')),
      state=Step('is it still there?', state),
      states={up: 'ask', **dict.fromkeys(gone, 'gone')},
      codes=Step('how each worker ended',
                 on('all', f'test -f {job.name}/exit && echo t5lab-exit=$(cat {job.name}/exit)')),
      delete=(delete,), recreate=capacity == 'spot', bundle=True)


def _notes(job, machine, runtime, capacity):
  several = machine.slices > 1
  many = f'{machine.slices} x ' * several
  yield f'{job.name}: {many}{machine.accelerator}, {machine.slice_chips} chips, runtime {runtime}'
  if job.on_bucket:
    yield (f'gs://{job.bucket} is mounted with Cloud Storage FUSE, the run writes to {job.folder}; '
           'best in a bucket with a hierarchical namespace, where renames are atomic')
  yield f'coordinator: worker 0{" of slice 0" * several}, port {PORT}'
  if capacity == 'spot':
    yield 'spot: preempted machines are created again while this command runs'


def _install(job: Job) -> str:
  """The images have Python 3.10: uv brings ours. Versions are those the suite passed on."""
  return """#!/bin/bash
# Installs the checkout beside this file. A second run only looks.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf checkout
mkdir checkout
tar -xzf bundle.tar.gz -C checkout
python3 -m pip install --user --quiet uv
uv="$(python3 -m site --user-base)/bin/uv"
[ -x venv/bin/python ] || "$uv" venv --quiet --python 3.11 venv
"$uv" pip install --quiet --python venv/bin/python -c checkout/constraints.txt \\
  -e 'checkout[tpu,gcs]'
""" + (scripts.mount(job.bucket, f'{MOUNT}/{job.bucket}') if job.on_bucket else '')


def _run(job: Job) -> str:
  command = shlex.join(job.argv('../venv/bin/python'))
  return ('#!/bin/bash\n# The job on this worker, until it ends for good. JAX finds the others '
          'through the metadata server.\ncd "$(dirname "$0")/checkout" || exit 70\n' +
          scripts.exports({'JAX_COORDINATOR_PORT': str(PORT), **job.environment}) +
          scripts.supervise(command, job.restarts) +
          'echo "$code" > ../exit.new\nmv ../exit.new ../exit\n')


def _follow() -> str:
  return """#!/bin/bash
# The log from its beginning until the job has ended.
cd "$(dirname "$0")" || exit 70
touch log
tail -n +1 -F log 2> /dev/null &
tail=$!
while [ ! -f exit ]; do sleep 2; done
sleep 1
kill "$tail"
"""
