"""The commands, scripts and manifests of a launch, without a cloud."""

import http.server
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse

import jsonschema
import pytest

from t5lab import cli
from t5lab.errors import UsageError
from t5lab.tools.launching import gke, topologies
from t5lab.tools.launching.job import PORT, LaunchJob, can_retry, default_name, worst

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CONFIG = 'configs/quickstart.py'
LAUNCHES = {
    'tpu-vm': ('--topology', 'v5e:4x4', '--zone', 'us-west4-a', '--project', 'p'),
    'tpu-vm queued spot': ('--topology', 'v4:2x2x2', '--zone', 'us-central2-b', '--queue',
                           '--spot'),
    'tpu-vm slices': ('--topology', 'v5p:2x2x2*3', '--zone', 'us-east5-a', '--queue',
                      '--reserved'),
    'gke': ('--topology', 'v6e:4x4*2', '--image', 'r/t5lab', '--build', '--spot',
            '--service-account', 'trainer', '--namespace', 'ml'),
    'slurm': ('--nodes', '4', '--gpus-per-node', '8', '--time', '24:00:00', '--partition', 'a100'),
    'local': ('--processes', '2', '--devices-per-process', '4'),
}
SECRET = 'hunter2-must-not-appear'


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """As much of a clone of t5lab as a launch looks at."""
  root = tmp_path_factory.mktemp('clone') / 'checkout'
  (root / 't5lab').mkdir(parents=True)
  (root / 'configs').mkdir()
  (root / 't5lab/__init__.py').write_text('')
  shutil.copy(ROOT / CONFIG, root / CONFIG)
  (root / '.gitignore').write_text('*.env\n')
  git(root, 'init', '-q')
  git(root, 'add', '.')
  git(root, 'commit', '-q', '-m', 'a')
  (root / 'keys.env').write_text(SECRET)
  return root


@pytest.fixture
def checkout(original, tmp_path, monkeypatch):
  """A copy of the clone, as the current directory."""
  root = shutil.copytree(original, tmp_path / 'checkout')
  monkeypatch.chdir(root)
  return root


def git(root, *argv):
  subprocess.run(['git', '-c', 'user.name=t', '-c', 'user.email=t@t', *argv], cwd=root, check=True)


def example_workdir(platform):
  return '/nfs/runs/big' if platform in ('slurm', 'local') else 'gs://bucket/runs/big'


def dry_run(capsys, launch, *more):
  platform = launch.split()[0]
  code = cli.main(['launch', '--platform', platform, '--config', f'{CONFIG}:tiny', '--workdir',
                   example_workdir(platform), *LAUNCHES[launch], '--dry-run', *more])
  captured = capsys.readouterr()
  assert code == 0, captured.err
  return captured.out


def here_documents(script):
  """The here-documents of a dry run -> {name: text}."""
  return dict(re.findall(r"^cat > \S*?([\w.]+) <<'T5LAB_END'\n(.*?)^T5LAB_END$", script,
                         re.DOTALL | re.MULTILINE))


def command_lines(script):
  """The lines of a dry run that are neither comments nor in a here-document."""
  bare = re.sub(r"<<'T5LAB_END'\n.*?^T5LAB_END$", '', script, flags=re.DOTALL | re.MULTILINE)
  return [line for line in bare.splitlines() if line and not line.startswith('#')]


@pytest.mark.parametrize('launch', LAUNCHES)
def test_a_dry_run_is_a_script_of_valid_scripts(checkout, capsys, tmp_path, launch):
  script = dry_run(capsys, launch, '--config.optim.lr=1e-3',
                   "--config.data.prompt=ask: it's {x} $HOME")
  scripts = {'all': script}
  scripts |= {name: text for name, text in here_documents(script).items()
              if name.endswith(('.sh', '.sbatch'))}
  assert len(scripts) == {'tpu-vm': 4, 'slurm': 2}.get(launch.split()[0], 1)
  for name, text in scripts.items():
    path = tmp_path / name
    path.write_text(text)
    done = subprocess.run(['bash', '-n', path], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, (name, done.stderr)
  assert str(PORT) in script
  assert script.count('ask: it') and 'optim.lr=1e-3' in script
  assert not list(checkout.glob('t5lab-launch*'))


@pytest.mark.parametrize('launch', LAUNCHES)
def test_nothing_of_the_environment_is_printed(checkout, capsys, monkeypatch, launch):
  for name in ('HF_TOKEN', 'T5LAB_SECRET', 'JAX_PASSWORD', 'GOOGLE_APPLICATION_CREDENTIALS'):
    monkeypatch.setenv(name, SECRET)
  monkeypatch.setenv('XLA_FLAGS', f'--{SECRET}')
  assert SECRET not in dry_run(capsys, launch, '--env', 'XLA_FLAGS=--xla_dump_to=/tmp/x')


@pytest.mark.parametrize('bad', [
    '--workdir=https://me:hunter2@host/x', '--config.init.path=gs://b/x?X-Goog-Signature=ab12',
    '--env=T5LAB_X=hf_abcdefghijklmnopqrstuvwx', '--config.data.files.train=s3://x?token=abc',
    '--env=XLA_FLAGS=--password=hunter2'])
def test_arguments_that_look_like_secrets_are_refused_and_not_repeated(checkout, capsys, bad):
  code = cli.main(['launch', '--platform', 'local', '--config', CONFIG, '--workdir', '/x',
                   '--dry-run', bad])
  captured = capsys.readouterr()
  assert code == 2 and 'password, key or token' in captured.err and not captured.out
  for secret in ('hunter2', 'ab12', 'hf_abc', '=abc'):
    assert secret not in captured.err


@pytest.mark.parametrize('argv, message', [
    (('--platform', 'tpu-vm', '--workdir', 'gs://b1b/x', '--topology', 'v5e:4x4'), '--zone'),
    (('--platform', 'tpu-vm', '--workdir', 'runs/x', '--topology', 'v5e:4x4', '--zone', 'z'),
     'absolute path'),
    (('--platform', 'tpu-vm', '--workdir', 's3://b1b/x', '--topology', 'v5e:4x4', '--zone', 'z'),
     'gs://BUCKET/FOLDER'),
    (('--platform', 'gke', '--workdir', 'gs://B/x', '--topology', 'v5e:4x4', '--image', 'i'),
     'bucket has 3 to 63'),
    (('--platform', 'gke', '--workdir', 'gs://b1b/x', '--topology', 'v5e:4x4'), '--image'),
    (('--platform', 'gke', '--workdir', 'gs://b1b/x', '--image', 'i'), '--topology, e.g. v5e:4x4'),
    (('--platform', 'slurm', '--workdir', 'gs://b1b/x'), 'a folder that all nodes share'),
    (('--platform', 'slurm', '--workdir', '/x', '--zone', 'z'), '--zone is for --platform tpu-vm'),
    (('--platform', 'local', '--workdir', 'gs://b1b/x'), 'a folder on this machine'),
    (('--platform', 'local', '--workdir', '/x', '--env', 'HOME=/x'), 'LIBTPU_INIT_ARGS'),
    (('--platform', 'local', '--workdir', '/x', '--name', 'Big_One'), 'lowercase letter'),
    (('--platform', 'tpu-vm', '--workdir', 'gs://b1b/x', '--topology', 'v5e:4x4*2', '--zone', 'z'),
     '2 slices are only available as one queued resource: add --queue'),
    (('--platform', 'tpu-vm', '--workdir', 'gs://b1b/x', '--topology', 'v5:4x4', '--zone', 'z'),
     "chip 'v5' is unknown. Did you mean 'v5p' or 'v5e'"),
    (('--platform', 'tpu-vm', '--workdir', 'gs://b1b/x', '--topology', 'v5p:4x4', '--zone', 'z'),
     'has 3 sizes, e.g. v5p:2x2x2'),
])
def test_usage_errors_are_one_line(checkout, capsys, argv, message):
  assert cli.main(['launch', '--config', CONFIG, '--dry-run', *argv]) == 2
  captured = capsys.readouterr()
  assert message in captured.err and captured.err.count('\n') == 1 and not captured.out


TFDS = ('--env', 'TFDS_DATA_DIR=gs://bucket/tfds')
FILES = ('--config.data.files.validation=gs://b/dev.jsonl', '--config.checkpoint.best=')


@pytest.mark.parametrize('launch, argv, message', [
    ('tpu-vm', ('--config.optim.lrr=1',), "unknown config key 'optim.lrr'. Did you mean"),
    ('slurm', ('--config.data.mixture=ha_ened',), "no task or mixture 'ha_ened'. Did you mean"),
    ('tpu-vm', ('--config.data.vocab=x/spiece.model',),
     'data.vocab=x/spiece.model is not tracked by git in'),
    ('tpu-vm', ('--config.data.vocab=keys.env/spiece.model',), 'git add it, or put it into '
     '/mnt/t5lab/bucket/…, in the bucket of the workdir'),
    ('tpu-vm', ('--config.data.vocab=/home/me/spiece.model',), 'the hosts have only the checkout'),
    ('tpu-vm', ('--config.data.vocab=/mnt/t5lab/other/spiece.model',),
     'the hosts have only the checkout'),
    ('gke', (*FILES, '--config.data.files.train=gs://b/t.jsonl, t.jsonl'),
     'data.files.train=t.jsonl is not tracked'),
    ('tpu-vm', ('--config.data.cache=tokens',), 'data.cache=tokens is not tracked'),
    ('tpu-vm', ('--config.init.path=runs/a',), 'init.path=runs/a is not tracked'),
    ('tpu-vm', ('--config.data.mixture=c4_v220_lm',), "Did you mean 'c4_v220_full_lm'"),
    ('tpu-vm', ('--config.data.mixture=ha_ende,xsum',), 'data.mixture=xsum: new hosts have no TFDS '
     'data; give its location with --env TFDS_DATA_DIR='),
])
def test_errors_that_would_end_every_host_are_found_before(checkout, capsys, monkeypatch, launch,
                                                           argv, message):
  monkeypatch.delitem(sys.modules, 'seqio', raising=False)    # its registry may have such a task
  platform = launch.split()[0]
  code = cli.main(['launch', '--platform', platform, '--config', CONFIG, '--workdir',
                   example_workdir(platform), *LAUNCHES[launch], '--dry-run', *argv])
  captured = capsys.readouterr()
  assert code == 2 and message in captured.err and captured.err.count('\n') == 1
  assert not captured.out


@pytest.mark.parametrize('launch, argv', [
    ('tpu-vm', ('--config.data.vocab=/mnt/t5lab/bucket/spiece.model',)),
    ('tpu-vm', ('--config.data.vocab=here/spiece.model',)),
    ('gke', ('--config.data.files.train=gs://b/t-*.jsonl,here/*.jsonl', *FILES)),
    ('tpu-vm', ('--config.data.mixture=ha_ende,xsum', *TFDS)),
    ('slurm', ('--config.data.mixture=xsum', '--config.data.vocab=/home/me/spiece.model')),
])
def test_paths_that_the_hosts_have_are_accepted(checkout, capsys, launch, argv):
  for name in ('spiece.model', 't.jsonl'):
    (checkout / 'here').mkdir(exist_ok=True)
    (checkout / 'here' / name).write_text('')
  git(checkout, 'add', '.')
  assert argv[0].partition('=')[2].split(',')[0] in dry_run(capsys, launch, *argv)


@pytest.mark.parametrize('text, accelerator, chips, nodes, per_node', [
    ('v5e:4x4', 'v5litepod-16', 16, 4, 4), ('v5e:1x1', 'v5litepod-1', 1, 1, 1),
    ('v5e:2x4', 'v5litepod-8', 8, 1, 8), ('v6e:16x16', 'v6e-256', 256, 64, 4),
    ('v4:2x2x2', 'v4-16', 8, 2, 4), ('v4:2x2x1', 'v4-8', 4, 1, 4),
    ('v5p:2x2x2', 'v5p-16', 8, 2, 4)])
def test_topologies(text, accelerator, chips, nodes, per_node):
  machine = topologies.parse(text)
  assert (machine.accelerator, machine.slice_chips, machine.nodes, machine.chips_per_node) == (
      accelerator, chips, nodes, per_node)


@pytest.mark.parametrize('text', ['v5e', 'v5e:3x1', 'v5e:4', 'v5e:0x4', 'v4:1x3x3', '',
                                  'v5e:4x4*0', 'v5e:4x32'])
def test_invalid_topologies(text):
  with pytest.raises(UsageError, match=f"^--topology '{re.escape(text)}'"):
    topologies.parse(text)


def test_tpu_vm_commands(checkout, capsys):
  script = dry_run(capsys, 'tpu-vm queued spot')
  name = default_name('gs://bucket/runs/big')
  lines = '\n'.join(command_lines(script))
  positions = [lines.index(part) for part in (
      'git', f'queued-resources create {name} --node-id={name} ', 'in ACTIVE)', 'in READY)',
      f'command=mkdir -p {name}', 'scp ./t5lab-launch/bundle.tar.gz',
      f'command=bash {name}/install.sh', 'setsid bash run.sh', '--worker=0', 't5lab-exit',
      f'queued-resources delete {name}')]
  assert positions == sorted(positions)
  for part in ('--accelerator-type=v4-16', '--runtime-version=tpu-ubuntu2204-base', '--spot',
               '--zone=us-central2-b'):
    assert part in lines
  run = here_documents(script)['run.sh']
  assert 'export JAX_COORDINATOR_PORT=8476' in run
  assert '--workdir /mnt/t5lab/bucket/runs/big' in run and f'--config {CONFIG}:tiny' in run
  assert 'gcsfuse --implicit-dirs' in here_documents(script)['install.sh']
  assert 'delete' not in '\n'.join(command_lines(dry_run(capsys, 'tpu-vm', '--keep')))


def test_several_tpu_slices_are_created_described_and_reached_as_one(checkout, capsys):
  name = default_name('gs://bucket/runs/big')
  script = dry_run(capsys, 'tpu-vm slices')
  gcloud = [line for line in command_lines(script) if 'gcloud' in line]
  assert all(f'queued-resources {verb} ' in line for verb, line in zip(
      ('create', 'describe', 'ssh', 'scp', 'ssh', 'ssh', 'ssh', 'describe', 'ssh', 'delete'),
      gcloud, strict=True))
  assert f'create {name} --node-count=3 --node-prefix={name} --accelerator-type=v5p-16' in gcloud[0]
  assert all('--node=all --worker=all' in line for line in gcloud[2:6] + gcloud[8:9])
  assert '--node=0 --worker=0' in gcloud[6]
  assert f'# {name}: 3 x v5p-16' in script


def schema():
  return json.loads((HERE / 'jobset_schema.json').read_text())


def test_the_jobset_follows_the_schema(checkout, capsys):
  jobset = json.loads(here_documents(dry_run(capsys, 'gke', '--restarts', '7'))['jobset.json'])
  jsonschema.validate(jobset, schema())
  spec = jobset['spec']
  assert spec['failurePolicy']['maxRestarts'] == 7
  [slices] = spec['replicatedJobs']
  hosts = slices['template']['spec']
  assert (slices['replicas'], hosts['completions'], hosts['parallelism']) == (2, 4, 4)
  assert hosts['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2, 3, 4, 70]
  pod = hosts['template']['spec']
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
      'cloud.google.com/gke-tpu-topology': '4x4', 'cloud.google.com/gke-spot': 'true'}
  [container] = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': '4'}
  assert container['env'] == [{'name': 'JAX_COORDINATOR_PORT', 'value': '8476'}]
  assert container['volumeMounts'][0]['mountPath'] == '/mnt/t5lab/bucket'
  assert hosts['template']['metadata']['annotations'] == {'gke-gcsfuse/volumes': 'true'}


def test_the_schema_detects_mistakes():
  job = LaunchJob(CONFIG, 'gs://bucket/x')
  for path, wrong in ((('spec', 'failurePolicy', 'maxRestart'), 3), (('spec', 'slices'), 2),
                      (('apiVersion',), 'jobset.x-k8s.io/v1'),
                      (('spec', 'failurePolicy', 'rules', 0, 'action'), 'Fail'),
                      (('spec', 'replicatedJobs', 0, 'template', 'spec', 'retries'), 1)):
    jobset = gke.manifest(job, topologies.parse('v5e:4x4'), image='i')
    jsonschema.validate(jobset, schema())
    node = jobset
    for key in path[:-1]:
      node = node[key]
    node[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.validate(jobset, schema())


def test_slurm_stores_no_environment(checkout, capsys):
  script = here_documents(dry_run(capsys, 'slurm'))['job.sbatch']
  options = script[:script.index('set -u')]
  assert '#SBATCH --export=NONE\n' in options and '#SBATCH --requeue\n' in options
  assert '#SBATCH --signal=B:TERM@120\n' in options and '#SBATCH --time=24:00:00\n' in options
  assert 'srun --export=ALL ' in script              # of variables that the script has set


def test_doctor_gets_the_number_of_devices(checkout, capsys):
  for launch, devices in (('tpu-vm', 16), ('tpu-vm slices', 24), ('slurm', 32), ('local', 8)):
    assert f'--expect-devices {devices}' in dry_run(capsys, launch, '--command', 'doctor')
  files = here_documents(dry_run(capsys, 'gke', '--command', 'doctor'))
  jobset = json.loads(files['jobset.json'])
  hosts = jobset['spec']['replicatedJobs'][0]['template']['spec']
  command = hosts['template']['spec']['containers'][0]['command']
  assert command[-2:] == ['--expect-devices', '32'] and 'doctor' in command


def test_a_second_launch_of_a_workdir_has_the_same_name():
  assert default_name('gs://bucket/runs/big') == default_name('gs://bucket/runs/big')
  assert default_name('gs://bucket/runs/big') != default_name('gs://other/runs/big')
  for workdir in ('gs://bucket/runs/big', '/x/' + 'Long Name_' * 9, '/', '/ü'):
    assert LaunchJob(CONFIG, workdir).name.startswith('t5lab-')


@pytest.mark.parametrize('codes, code', [
    ([0, 0], 0), ([0, 75], 75), ([75, 75], 75), ([-6, 2], 2), ([3, 70, 4], 3), ([0, -9, 75], 137),
    ([124, -6], 124), ([1, 134, 75], 1), ([70, 1], 70), ([143, 0], 143)])
def test_worst(codes, code):
  assert worst(codes) == code


def test_codes_that_can_be_retried():
  assert [c for c in (0, 1, 2, 3, 4, 70, 75, 124, -6, 137) if can_retry(c)] == [75, 124, -6, 137]


def test_the_port_is_that_of_multihost():
  from t5lab.parallel import multihost
  assert PORT == multihost.PORT == 8476


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('gcloud'), reason='gcloud is not installed')
def test_gcloud_has_the_flags(checkout, capsys, monkeypatch, tmp_path):
  """By its own --help: no command is run, and no account is used."""
  monkeypatch.setenv('CLOUDSDK_CONFIG', str(tmp_path / 'gcloud'))
  flags_of = {}
  for launch in ('tpu-vm', 'tpu-vm queued spot', 'tpu-vm slices'):
    for line in command_lines(dry_run(capsys, launch)):
      for verb, rest in re.findall(r'gcloud (compute tpus [\w-]+ [\w-]+) ([^\n]*)', line):
        flags_of.setdefault(verb, set()).update(re.findall(r'(?<![\w-])--([a-z][a-z-]+)', rest))
  assert len(flags_of) == 10
  for verb, flags in flags_of.items():
    help_text = subprocess.run(['gcloud', *verb.split(), '--help'], capture_output=True, text=True,
                               timeout=60).stdout
    for flag in flags:
      assert f'--{flag}' in help_text.replace('\x1b[1m', '').replace('\x1b[m', ''), (verb, flag)


class Cluster(http.server.BaseHTTPRequestHandler):
  """The part of a Kubernetes API that `kubectl get` needs: three pods of a failed JobSet."""

  def do_GET(self):
    path, _, query = self.path.partition('?')
    self.server.requests.append(urllib.parse.unquote(self.path))
    answer = {
        '/api': {'kind': 'APIVersions', 'versions': ['v1']},
        '/apis': {'kind': 'APIGroupList', 'apiVersion': 'v1', 'groups': [{
            'name': 'jobset.x-k8s.io', 'versions': [version := {
                'groupVersion': 'jobset.x-k8s.io/v1alpha2', 'version': 'v1alpha2'}],
            'preferredVersion': version}]},
        '/api/v1': {'kind': 'APIResourceList', 'groupVersion': 'v1', 'resources': [
            {'name': 'pods', 'namespaced': True, 'kind': 'Pod', 'verbs': ['get', 'list']}]},
        '/apis/jobset.x-k8s.io/v1alpha2': {
            'kind': 'APIResourceList', 'groupVersion': 'jobset.x-k8s.io/v1alpha2', 'resources': [
                {'name': 'jobsets', 'singularName': 'jobset', 'namespaced': True, 'kind': 'JobSet',
                 'verbs': ['get', 'list']}]},
        '/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets/t5lab-x': {
            'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
            'metadata': {'name': 't5lab-x'}, 'status': {'terminalState': 'Failed'}},
        '/api/v1/namespaces/default/pods': {
            'kind': 'PodList', 'apiVersion': 'v1', 'items': [
                {'kind': 'Pod', 'apiVersion': 'v1', 'metadata': {'name': f'p{i}'}, 'status': {
                    'containerStatuses': [
                        {'name': 'gke-gcsfuse-sidecar', 'state': {'terminated': {'exitCode': 0}}},
                        {'name': 't5lab', 'state': state}]}}
                for i, state in enumerate([{'terminated': {'exitCode': 3}}, {'running': {}},
                                           {'terminated': {'exitCode': 134}}])]},
    }.get(path)
    body = json.dumps(answer or {}).encode()
    self.send_response(200 if answer else 404)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('kubectl'), reason='kubectl is not installed')
def test_kubectl_understands_our_queries(tmp_path, monkeypatch):
  """The real kubectl, which parses our selectors and JSONPath, against a small API."""
  plan = gke.plan(LaunchJob(CONFIG, 'gs://bucket/x', name='t5lab-x'), topologies.parse('v5e:4x4'),
                  image='i')
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Cluster) as server:
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / 'kubeconfig').write_text(json.dumps({
        'apiVersion': 'v1', 'kind': 'Config', 'current-context': 'c',
        'clusters': [{'name': 'c', 'cluster': {
            'server': f'http://127.0.0.1:{server.server_port}'}}],
        'contexts': [{'name': 'c', 'context': {'cluster': 'c', 'user': ''}}]}))
    monkeypatch.setenv('KUBECONFIG', str(tmp_path / 'kubeconfig'))
    monkeypatch.setenv('HOME', str(tmp_path))
    state, codes = [subprocess.run(step.argv, capture_output=True, text=True, timeout=60)
                    for step in (plan.state, plan.codes)]
    server.shutdown()
  assert state.stdout == 'Failed', state.stderr
  assert codes.stdout == 't5lab-exit=3\nt5lab-exit=\nt5lab-exit=134\n', codes.stderr
  assert any('labelSelector=jobset.sigs.k8s.io/jobset-name=t5lab-x' in request
             for request in server.requests)
