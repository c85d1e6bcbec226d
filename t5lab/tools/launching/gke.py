"""GKE with a JobSet: one Job per slice, one pod per host, all restarted together.

JobSet restarts all pods after any failure, up to --restarts times, except for exit codes that a
retry would repeat: those fail the Job by its podFailurePolicy, and with it the JobSet. This needs
JobSet 0.6 or later in the cluster (failurePolicy.rules), and the add-on GcsFuseCsiDriver for gs://.

GKE sets the names and numbers of TPU pods (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_…), which
JAX reads; JAX_COORDINATOR_PORT sets the port.
"""

import json

from t5lab.errors import UsageError
from t5lab.tools.launching import scripts
from t5lab.tools.launching.job import FINAL, MOUNT, PORT, LaunchJob, check_remote
from t5lab.tools.launching.plan import LaunchStep, Plan
from t5lab.tools.launching.topologies import Machine

GRACE = 120                       # seconds from SIGTERM to SIGKILL, to save a checkpoint
# ADD unpacks the archive of the checkout.
DOCKERFILE = """\
FROM python:3.11-slim
ADD bundle.tar.gz /t5lab/
WORKDIR /t5lab
RUN pip install --no-cache-dir -c constraints/py311.txt -e '.[tpu,gcs]'
"""
PORTS = (8471, 8080, PORT)        # of the TPU runtime, MegaScale and JAX [GKE's multislice guide]


def manifest(job: LaunchJob, machine: Machine, *, image: str, service_account: str = '',
             namespace: str = '', capacity: str = '') -> dict:
  """The JobSet (jobset.x-k8s.io/v1alpha2) of a job on a bucket, ready for json.dumps."""
  chips = {'google.com/tpu': str(machine.chips_per_node)}
  container = {
      'name': 't5lab', 'image': image, 'command': job.argv('python'),
      'env': [{'name': k, 'value': v}
              for k, v in {'JAX_COORDINATOR_PORT': str(PORT), **job.environment}.items()],
      'ports': [{'containerPort': port} for port in PORTS],
      'resources': {'requests': chips, 'limits': chips},
      'volumeMounts': [{'name': 'bucket', 'mountPath': f'{MOUNT}/{job.bucket}'}],
  }
  pod = {
      'restartPolicy': 'Never', 'terminationGracePeriodSeconds': GRACE,
      'nodeSelector': {'cloud.google.com/gke-tpu-accelerator': machine.generation.label,
                       'cloud.google.com/gke-tpu-topology': machine.topology,
                       **({'cloud.google.com/gke-spot': 'true'} if capacity == 'spot' else {})},
      'containers': [container],
      **({'serviceAccountName': service_account} if service_account else {}),
      'volumes': [{'name': 'bucket', 'csi': {
          'driver': 'gcsfuse.csi.storage.gke.io',
          'volumeAttributes': {
              'bucketName': job.bucket,
              'mountOptions': ','.join(option for _, option in scripts.MOUNT_OPTIONS)}}}],
  }
  hosts = {
      'backoffLimit': 0, 'completionMode': 'Indexed', 'completions': machine.nodes,
      'parallelism': machine.nodes,
      'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
          'containerName': 't5lab', 'operator': 'In', 'values': sorted(FINAL)}}]},
      'template': {'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}}, 'spec': pod},
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


def plan(job: LaunchJob, machine: Machine, *, image: str, namespace: str = '', build: bool = False,
         **options) -> Plan:
  check_remote(job)
  if not image:
    raise UsageError('--platform gke needs --image, a container image with t5lab (see --help)')
  if not job.on_bucket:
    raise UsageError('--workdir must be gs://BUCKET/FOLDER on GKE, because every pod mounts it, '
                     f'got {job.workdir}')
  if machine.slices > 1 and machine.nodes == 1:
    raise UsageError(f'--topology: GKE joins only slices of several hosts, got {machine.slices} '
                     'slices of one host each')
  jobset = manifest(job, machine, image=image, namespace=namespace, **options)
  kubectl = ('kubectl', *(f'--namespace={namespace}',) * bool(namespace))
  selector = f'jobset.sigs.k8s.io/jobset-name={job.name}'
  get = lambda *arguments: (*kubectl, 'get', *arguments)
  return Plan(
      notes=(f'{job.name}: {machine.slices} x {machine.generation.label} {machine.topology}, '
             f'{machine.nodes} hosts of {machine.chips_per_node} chips each',
             f'gs://{job.bucket} is mounted by the Cloud Storage FUSE CSI driver, and the run '
             f'writes to {job.folder}; a bucket with a hierarchical namespace is recommended',
             f'coordinator: the first pod of the first slice, port {PORT}'),
      files={'jobset.json': json.dumps(jobset, indent=2) + '\n',
             **({'Dockerfile': DOCKERFILE} if build else {})},
      prepare=(
          LaunchStep('build the image', ('docker', 'build', f'--tag={image}', '{files}')),
          LaunchStep('push the image', ('docker', 'push', image))) * build,
      create=(LaunchStep('submit the JobSet', (*kubectl, 'create', '-f', '{files}/jobset.json')),),
      follow=LaunchStep('show the log of the first host', (
          *kubectl, 'logs', '--follow', '--ignore-errors', '--container=t5lab', '--tail=-1',
          f'--selector={selector},jobset.sigs.k8s.io/job-index=0,'
          'batch.kubernetes.io/job-completion-index=0')),
      state=LaunchStep('ask whether the JobSet has ended', get(
          'jobset', job.name, '--output=jsonpath={.status.terminalState}')),
      states={'Completed': 'done', 'Failed': 'done'},
      codes=LaunchStep('print the exit code of each pod', get(
          'pods', f'--selector={selector}', '--output=jsonpath={range .items[*]}t5lab-exit='
          '{.status.containerStatuses[?(@.name=="t5lab")].state.terminated.exitCode}{"\\n"}{end}')),
      delete=(LaunchStep('delete the JobSet', (*kubectl, 'delete', 'jobset', job.name)),),
      bundle=build)
