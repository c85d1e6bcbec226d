"""GKE through a JobSet: one Job a slice, one pod a host, restarted together.

JobSet starts all of them again after any failure, up to --restarts times, but for the exit codes
that would come again: those fail the Job by its podFailurePolicy and with it the JobSet. It needs
JobSet 0.6 or later in the cluster (failurePolicy.rules) and the add-on GcsFuseCsiDriver for gs://.

GKE gives TPU pods their names and numbers (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_…),
which JAX reads; JAX_COORDINATOR_PORT sets the port.
"""

import json

from t5lab.errors import UsageError
from t5lab.tools.launching import scripts
from t5lab.tools.launching.job import FINAL, MOUNT, PORT, Job, check_remote
from t5lab.tools.launching.plan import Plan, Step
from t5lab.tools.launching.topologies import Machine

GRACE = 120                       # seconds from SIGTERM to SIGKILL: time to save
# ADD unpacks the archive of the checkout.
DOCKERFILE = """\
FROM python:3.11-slim
ADD bundle.tar.gz /t5lab/
WORKDIR /t5lab
RUN pip install --no-cache-dir -c constraints.txt -e '.[tpu,gcs]'
"""
PORTS = (8471, 8080, PORT)        # TPU runtime, MegaScale, JAX [GKE's multislice guide]


def manifest(job: Job, machine: Machine, *, image: str, service_account: str = '',
             namespace: str = '', capacity: str = '') -> dict:
  """The JobSet (jobset.x-k8s.io/v1alpha2) as JSON values."""
  chips = {'google.com/tpu': str(machine.chips_a_node)}
  container = {
      'name': 't5lab', 'image': image, 'command': job.argv('python'),
      'env': [{'name': k, 'value': v}
              for k, v in {'JAX_COORDINATOR_PORT': str(PORT), **job.environment}.items()],
      'ports': [{'containerPort': port} for port in PORTS],
      'resources': {'requests': chips, 'limits': chips},
  }
  pod = {
      'restartPolicy': 'Never', 'terminationGracePeriodSeconds': GRACE,
      'nodeSelector': {'cloud.google.com/gke-tpu-accelerator': machine.generation.label,
                       'cloud.google.com/gke-tpu-topology': machine.topology,
                       **({'cloud.google.com/gke-spot': 'true'} if capacity == 'spot' else {})},
      'containers': [container],
  }
  annotations = {}
  if service_account:
    pod['serviceAccountName'] = service_account
  if job.on_bucket:
    options = ','.join(option for _, option in scripts.MOUNT_OPTIONS)
    annotations['gke-gcsfuse/volumes'] = 'true'
    pod['volumes'] = [{'name': 'bucket', 'csi': {
        'driver': 'gcsfuse.csi.storage.gke.io',
        'volumeAttributes': {'bucketName': job.bucket, 'mountOptions': options}}}]
    container['volumeMounts'] = [{'name': 'bucket', 'mountPath': f'{MOUNT}/{job.bucket}'}]
  hosts = {
      'backoffLimit': 0, 'completionMode': 'Indexed', 'completions': machine.nodes,
      'parallelism': machine.nodes,
      'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
          'containerName': 't5lab', 'operator': 'In', 'values': sorted(FINAL)}}]},
      'template': {'metadata': {'annotations': annotations}, 'spec': pod},
  }
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
      'metadata': {'name': job.name, **({'namespace': namespace} if namespace else {}),
                   'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology':
                                   'cloud.google.com/gke-nodepool'}},
      'spec': {
          'network': {'enableDNSHostnames': True},
          'failurePolicy': {
              'maxRestarts': job.restarts,
              'rules': [{'name': 'endedForGood', 'action': 'FailJobSet',
                         'onJobFailureReasons': ['PodFailurePolicy']}]},
          'replicatedJobs': [{'name': 'slice', 'replicas': machine.slices,
                              'template': {'spec': hosts}}],
      },
  }


def plan(job: Job, machine: Machine, *, image: str, service_account: str = '',
         namespace: str = '', capacity: str = '', build: bool = False) -> Plan:
  check_remote(job)
  if not image:
    raise UsageError('--platform gke needs --image, a container with t5lab in it (see --help)')
  if not job.on_bucket:
    raise UsageError(f'--workdir {job.workdir}: on GKE it is gs://BUCKET/FOLDER, which every pod '
                     'mounts')
  if machine.slices > 1 and machine.nodes == 1:
    raise UsageError(f'--topology: {machine.slices} slices of one host each; GKE joins only slices '
                     'of several hosts')
  made = manifest(job, machine, image=image, service_account=service_account,
                  namespace=namespace, capacity=capacity)
  kubectl = ('kubectl', *(f'--namespace={namespace}',) * bool(namespace))
  mine = f'jobset.sigs.k8s.io/jobset-name={job.name}'
  get = lambda *what: (*kubectl, 'get', *what)
  return Plan(
      notes=(f'{job.name}: {machine.slices} x {machine.generation.label} {machine.topology}, '
             f'{machine.nodes} hosts of {machine.chips_a_node} chips each',
             f'gs://{job.bucket} is mounted by the Cloud Storage FUSE CSI driver, the run writes '
             f'to {job.folder}; best in a bucket with a hierarchical namespace',
             f'coordinator: the first pod of the first slice, port {PORT}'),
      files={'jobset.json': json.dumps(made, indent=2) + '\n',
             **({'Dockerfile': DOCKERFILE} if build else {})},
      prepare=(
          Step('build the image', ('docker', 'build', f'--tag={image}', '{files}')),
          Step('push it', ('docker', 'push', image))) * build,
      create=(Step('submit', (*kubectl, 'create', '-f', '{files}/jobset.json')),),
      follow=Step('the log of the first host', (
          *kubectl, 'logs', '--follow', '--ignore-errors', '--container=t5lab', '--tail=-1',
          f'--selector={mine},jobset.sigs.k8s.io/job-index=0,'
          'batch.kubernetes.io/job-completion-index=0')),
      state=Step('has it ended?', get('jobset', job.name,
                                      '--output=jsonpath={.status.terminalState}')),
      states={'Completed': 'done', 'Failed': 'done'},
      codes=Step('how each pod ended', get(
          'pods', f'--selector={mine}', '--output=jsonpath={range .items[*]}t5lab-exit='
          '{.status.containerStatuses[?(@.name=="t5lab")].state.terminated.exitCode}{"\\n"}{end}')),
      delete=(Step('delete', (*kubectl, 'delete', 'jobset', job.name)),), bundle=build)
