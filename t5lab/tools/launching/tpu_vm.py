"""Cloud TPU VMs with gcloud: create or queue, install, run on all workers, follow, delete.

On each worker ~/NAME holds the bundle, the scripts, `log` and, at the end, `exit` (the exit code).
A script there restarts the job after 75, 124 or a signal, even if the launcher no longer runs.
Preempted machines take that script with them; only the launcher can then delete and recreate them.

Flags as of gcloud 528 [cloud.google.com/sdk/gcloud/reference/compute/tpus].
"""

import shlex

from t5lab.errors import UsageError
from t5lab.tools.launching import scripts
from t5lab.tools.launching.job import PORT, LaunchJob, check_remote
from t5lab.tools.launching.plan import LaunchStep, Plan
from t5lab.tools.launching.topologies import Machine

DEAD_QUEUE_STATES = ('FAILED', 'SUSPENDED', 'SUSPENDING', 'DELETING')
GONE_STATES = ('PREEMPTED', 'TERMINATED', 'STOPPED', 'SUSPENDED', 'HIDDEN')

# The images have Python 3.10, so uv installs ours. Versions are those that tests passed on.
INSTALL = """#!/bin/bash
# Installs the checkout beside this file. A second run changes nothing.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf checkout
mkdir checkout
tar -xzf bundle.tar.gz -C checkout
python3 -m pip install --user --quiet uv
uv="$(python3 -m site --user-base)/bin/uv"
[ -x venv/bin/python ] || "$uv" venv --quiet --python 3.11 venv
"$uv" pip install --quiet --python venv/bin/python \\
  -c checkout/constraints/py311.txt -e 'checkout[tpu,gcs]'
"""
FOLLOW = """#!/bin/bash
# Prints the log from its beginning until the job has ended.
cd "$(dirname "$0")" || exit 70
touch log
tail -n +1 -F log 2> /dev/null &
tail=$!
while [ ! -f exit ]; do sleep 2; done
sleep 1
kill "$tail"
"""


def plan(job: LaunchJob, machine: Machine, *, zone: str, project: str = '', queue: bool = False,
         capacity: str = '', runtime: str = '') -> Plan:
  """The plan for one slice, or for several as the nodes of one queued resource.

  A queued resource is created, described and reached as a whole; on its hosts JAX finds the first
  slice through the metadata server.
  """
  check_remote(job)
  if not zone:
    raise UsageError('--platform tpu-vm needs --zone, e.g. us-central2-b')
  several = machine.slices > 1
  if several and not queue:
    raise UsageError(f'--topology: {machine.slices} slices are only available as one queued '
                     'resource: add --queue')
  runtime = runtime or machine.generation.runtime

  # The commands of gcloud. Several slices are reached as the nodes of their queued resource.
  location = (f'--zone={zone}', *(f'--project={project}',) * bool(project))
  gcloud = lambda group, verb, *rest: ('gcloud', 'compute', 'tpus', group, verb, *rest, *location)
  reach = lambda verb, workers, *rest: gcloud(
      'queued-resources' if several else 'tpu-vm', verb, *rest, *(f'--node={workers}',) * several,
      f'--worker={workers}', '--quiet')
  ssh = lambda workers, command: reach('ssh', workers, job.name, f'--command={command}')

  # Create and delete.
  queue_state = gcloud('queued-resources', 'describe', job.name, '--format=value(state.state)')
  noun = 'slices' if several else 'slice'
  options = (f'--accelerator-type={machine.accelerator}',
             f'--{"runtime-" * queue}version={runtime}', *(f'--{capacity}',) * bool(capacity))
  if queue:
    nodes = (f'--node-id={job.name}',)
    if several:
      nodes = (f'--node-count={machine.slices}', f'--node-prefix={job.name}')
    create = (
        LaunchStep(f'queue the {noun}', gcloud(
            'queued-resources', 'create', job.name, *nodes, *options, '--async', '--quiet')),
        LaunchStep('wait for capacity; this may take hours', queue_state, until=('ACTIVE',),
                   unless=DEAD_QUEUE_STATES, every=30.))
    delete = gcloud('queued-resources', 'delete', job.name, '--force', '--quiet')
  else:
    create = (LaunchStep('create the slice', gcloud(
        'tpu-vm', 'create', job.name, *options, '--quiet')),)
    delete = gcloud('tpu-vm', 'delete', job.name, '--quiet')

  # A queued resource is active when all of its nodes are up, and suspended when it loses them.
  if several:
    state, ready, gone, wait = queue_state, 'ACTIVE', DEAD_QUEUE_STATES, ()
  else:
    state = gcloud('tpu-vm', 'describe', job.name, '--format=value(state)')
    ready, gone = 'READY', GONE_STATES
    wait = (LaunchStep('wait until the slice is up', state, until=(ready,), unless=gone),)

  mount = scripts.mount(job.bucket) if job.on_bucket else ''
  files = {'install.sh': INSTALL + mount, 'run.sh': _run(job), 'follow.sh': FOLLOW}
  return Plan(
      notes=tuple(_notes(job, machine, runtime, capacity)), files=files, create=create,
      start=(
          *wait,
          LaunchStep('make a folder on every worker', ssh('all', f'mkdir -p {job.name}')),
          LaunchStep('copy the checkout and the scripts', reach(
              'scp', 'all', '{files}/bundle.tar.gz', *('{files}/' + name for name in files),
              f'{job.name}:{job.name}/')),
          LaunchStep('install t5lab', ssh('all', f'bash {job.name}/install.sh')),
          LaunchStep('start the job on all workers', ssh(
              # detached, with its output closed: otherwise the connection would wait for its end
              'all', f'cd {job.name} && rm -f exit && '
                     '(nohup setsid bash run.sh > log 2>&1 < /dev/null &)')),
      ),
      follow=LaunchStep('show the log of worker 0', ssh('0', f'bash {job.name}/follow.sh')),
      state=LaunchStep('ask whether the machines still exist', state),
      states={ready: 'ask', **dict.fromkeys(gone, 'gone')},
      codes=LaunchStep('print the exit code of each worker', ssh(
          'all', f'test -f {job.name}/exit && echo t5lab-exit=$(cat {job.name}/exit)')),
      delete=(LaunchStep(f'delete the {noun}', delete),), recreate=capacity == 'spot', bundle=True)


def _notes(job, machine, runtime, capacity):
  several = machine.slices > 1
  many = f'{machine.slices} x ' * several
  yield f'{job.name}: {many}{machine.accelerator}, {machine.slice_chips} chips, runtime {runtime}'
  if job.on_bucket:
    yield (f'gs://{job.bucket} is mounted with Cloud Storage FUSE, and the run writes to '
           f'{job.folder}; a bucket with a hierarchical namespace is recommended, because renames '
           'are atomic there')
  yield f'coordinator: worker 0{" of slice 0" * several}, port {PORT}'
  if capacity == 'spot':
    yield 'spot: while this command runs, preempted machines are created again'


def _run(job: LaunchJob) -> str:
  command = shlex.join(job.argv('../venv/bin/python'))
  return ('#!/bin/bash\n# Runs the job on this worker until its exit code is final. JAX finds the '
          'other workers through the metadata server.\ncd "$(dirname "$0")/checkout" || exit 70\n' +
          scripts.exports({'JAX_COORDINATOR_PORT': str(PORT), **job.environment}) +
          scripts.supervise(command, job.restarts) +
          'echo "$code" > ../exit.new\nmv ../exit.new ../exit\n')
