"""Launches with our own scripts and executor, and with small fakes of the cloud's commands.

A fake logs its arguments and does what the real command would: `gcloud … ssh` runs the command with
bash in a folder that stands for the worker, `srun` starts the tasks, states change. Neither the
network nor a real cloud tool takes part: the folder of fakes is first in the PATH.
"""

import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

import pytest

from t5lab import cli
from t5lab.errors import Failure
from t5lab.tools.launching import executor, gke, slurm, topologies, tpu_vm
from t5lab.tools.launching.job import LaunchJob

GCLOUD = r"""
import os, pathlib, shutil, subprocess, sys, time
here, argv = pathlib.Path(os.environ['ACT']), sys.argv[1:]
with open(here / 'calls', 'a') as f: f.write(' '.join(argv) + '\n')
state, verb = here / 'state', argv[3]
flags = dict(a.partition('=')[::2] for a in argv if a.startswith('--'))
several = here / 'several'            # exists: two slices of one worker, else one slice of two
if verb == 'create':
  if state.exists():
    sys.exit('ERROR: ALREADY_EXISTS')
  state.write_text('READY')
  if '--node-count' in flags:
    assert flags['--node-count'] == '2' and flags['--node-prefix'] == argv[4]
    several.touch()
elif several.exists() and argv[2] != 'queued-resources':
  sys.exit('ERROR: (gcloud) NOT_FOUND: the nodes are NAME-0 and NAME-1')
elif verb == 'delete':
  state.unlink()
  several.unlink(missing_ok=True)
  shutil.rmtree(here / 'worker0'); shutil.rmtree(here / 'worker1')
elif not state.exists():
  sys.exit('ERROR: (gcloud) NOT_FOUND: no such thing')
elif verb == 'describe':
  queue = 'SUSPENDED' if several.exists() and state.read_text() == 'PREEMPTED' else 'ACTIVE'
  print(queue if 'state.state' in ' '.join(argv) else state.read_text())
elif state.read_text() != 'READY':
  sys.exit(255)
else:
  which = flags['--node' if several.exists() else '--worker']
  for worker in ([0, 1] if which == 'all' else [int(which)]):
    home = here / f'worker{worker}'
    home.mkdir(exist_ok=True)
    if verb == 'scp':
      *sources, to = [a for a in argv[4:] if not a.startswith('--')]
      for source in sources: shutil.copy(source, home / to.partition(':')[2])
      continue
    ran = subprocess.Popen(['bash', '-c', flags['--command']], cwd=home, start_new_session=True,
                           env={**os.environ, 'HOME': str(home), 'WORKER': str(worker)})
    while ran.poll() is None:
      time.sleep(0.01)
      if state.read_text() != 'READY':                  # the machine was preempted
        os.killpg(ran.pid, 9)
        sys.exit(255)
    if ran.returncode: sys.exit(ran.returncode)
"""
# Stands for venv/bin/python of a worker. Its nth start ends as line n of `ends` says.
JOB = r"""#!/bin/bash
n=$(cat "$ACT/starts$WORKER" 2> /dev/null || echo 0)
echo $((n + 1)) > "$ACT/starts$WORKER"
echo "worker $WORKER start $n: $* port $JAX_COORDINATOR_PORT"
end=$(sed -n "$((n + 1))p" "$ACT/ends")
case "$end" in
  preempted) kill -9 "$PPID"; sleep 1; printf PREEMPTED > "$ACT/state$WORKER"
             mv "$ACT/state$WORKER" "$ACT/state";;
  *) exit "$end";;
esac
"""
FAKES = {
    'gcloud': f'#!{os.path.realpath(sys.executable)} -IS\n{GCLOUD}',
    # commands of the worker's image
    'python3': '#!/bin/bash\n[ "$1 $2" = "-m site" ] && echo "$ACT/user"; exit 0\n',
    'user/bin/uv': '#!/bin/bash\n[ "$1" != venv ] || { mkdir -p venv/bin; cp "$ACT/job" '
                   'venv/bin/python; }\n',
    'job': JOB, 'mountpoint': '#!/bin/bash\nexit 0\n', 'gcsfuse': '#!/bin/bash\nexit 0\n',
    'sudo': '#!/bin/bash\nexit 0\n', 'sleep': '#!/bin/bash\nexec /bin/sleep 0.05\n',
    # commands of a cluster
    'kubectl': '#!/bin/bash\necho "$*" >> "$ACT/calls"\ncase "$*" in\n  *jobset*terminalState*) '
               'n=$(grep -c terminalState "$ACT/calls"); [ "$n" -lt 2 ] || cat "$ACT/state";;\n'
               '  *"get pods"*) cat "$ACT/ends";;\n  *logs*) echo log;;\n'
               '  *create*) cp "${@: -1}" "$ACT/created"; [ ! -e "$ACT/exists" ];;\nesac\n',
    'sbatch': '#!/bin/bash\necho "$*" >> "$ACT/calls"\ncp "${@: -1}" "$ACT/submitted"\n',
    'scontrol': '#!/bin/bash\necho "scontrol $*" >> "$ACT/calls"\n'
                '[ "$1" != show ] || printf "node7\\nnode8\\n"\n',
    'srun': '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\n'
            'most=0\nfor i in 0 1; do SLURM_PROCID=$i SLURM_NTASKS=2 "$@"; c=$?; '
            '[ $c -gt $most ] && most=$c; done\nexit $most\n',
}


@pytest.fixture
def act(tmp_path, monkeypatch):
  here = tmp_path / 'act'
  for name, text in FAKES.items():
    path = here / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
  monkeypatch.setenv('PATH', f'{here}:/usr/bin:/bin')
  monkeypatch.setenv('ACT', str(here))
  monkeypatch.setattr(executor, 'PAUSE', 0.05)
  assert shutil.which('gcloud') == str(here / 'gcloud')         # not a real one
  return here


def calls(act):
  return (act / 'calls').read_text().splitlines()


def tpu(act, ends, capfd, capacity='', restarts=3, **options):
  (act / 'ends').write_text('\n'.join(map(str, ends)) + '\n')
  plan = tpu_vm.plan(LaunchJob('configs/x.py', 'gs://bucket/run', restarts=restarts),
                     topologies.parse(options.pop('topology', 'v5e:4x4')), zone='z',
                     capacity=capacity, queue=options.pop('queue', False))
  def bundle(path):
    subprocess.run(['tar', '-czf', path, '-C', act, 'job'], check=True)
  try:
    return executor.run(plan, restarts=restarts, make_bundle=bundle, **options)
  finally:
    captured = capfd.readouterr()
    (act / 'output').write_text(captured.out + captured.err)


def test_a_tpu_job_runs_on_all_workers_and_its_machines_are_deleted(act, capfd):
  assert tpu(act, [0], capfd) == 0
  output = (act / 'output').read_text()
  assert ('worker 0 start 0: -m t5lab train --config configs/x.py --workdir '
          '/mnt/t5lab/bucket/run port 8476') in output
  assert (act / 'starts1').read_text() == '1\n'
  verbs = [line.split()[3] for line in calls(act)]
  assert verbs == ['create', 'describe', 'ssh', 'scp', 'ssh', 'ssh', 'ssh', 'describe', 'ssh',
                   'delete']
  assert not (act / 'state').exists()


def test_several_slices_are_one_queued_resource(act, capfd):
  assert tpu(act, ['preempted', 0], capfd, 'spot', queue=True, topology='v5e:4x4*2') == 0
  assert [(act / f'starts{n}').read_text() for n in (0, 1)] == ['2\n', '2\n']
  output = (act / 'output').read_text()
  assert 'worker 0 start 1' in output and '# preempted; starting again' in output
  assert {line.split()[2] for line in calls(act)} == {'queued-resources'}
  verbs = [line.split()[3] for line in calls(act)]
  assert verbs.count('create') == verbs.count('delete') == 2
  assert not (act / 'state').exists()


@pytest.mark.parametrize('ends, code', [
    ([75, 124, 134, 0], 0), ([2], 2), ([3], 3), ([75, 4], 4), ([70], 70), ([1], 1)])
def test_a_worker_retries_what_can_resume(act, ends, code):
  assert worker(act, ends) == (code, len(ends))


def test_a_worker_retries_at_most_three_times(act):
  assert worker(act, [124] * 9) == (124, 4)


def worker(act, ends):
  """Runs run.sh like a worker, with 3 restarts -> (the code in `exit`, number of starts)."""
  (act / 'ends').write_text('\n'.join(map(str, ends)) + '\n')
  plan = tpu_vm.plan(LaunchJob('configs/x.py', 'gs://bucket/run', restarts=3),
                     topologies.parse('v5e:4x4'), zone='z')
  (act / 'w/venv/bin').mkdir(parents=True)
  (act / 'w/checkout').mkdir()
  shutil.copy(act / 'job', act / 'w/venv/bin/python')
  (act / 'w/run.sh').write_text(plan.files['run.sh'])
  subprocess.run(['bash', act / 'w/run.sh'], env=os.environ | {'WORKER': '0'}, check=True,
                 timeout=60)
  return int((act / 'w/exit').read_text()), int((act / 'starts0').read_text())


def test_a_worker_passes_on_a_term_and_does_not_retry(act):
  (act / 'job').write_text('#!/bin/bash\necho x >> "$ACT/starts0"\n'
                           'trap "echo saved >> $ACT/starts0; exit 75" TERM\n'
                           'for i in $(seq 1000); do /bin/sleep 0.02; done\n')
  (act / 'w/venv/bin').mkdir(parents=True)
  (act / 'w/checkout').mkdir()
  shutil.copy(act / 'job', act / 'w/venv/bin/python')
  plan = tpu_vm.plan(LaunchJob('configs/x.py', 'gs://bucket/run', restarts=3),
                     topologies.parse('v5e:4x4'), zone='z')
  (act / 'w/run.sh').write_text(plan.files['run.sh'])
  process = subprocess.Popen(['bash', act / 'w/run.sh'])
  while not (act / 'starts0').exists():
    assert process.poll() is None
    time.sleep(0.01)
  process.terminate()
  assert process.wait(20) == 0
  assert (act / 'w/exit').read_text() == '75\n'
  assert (act / 'starts0').read_text() == 'x\nsaved\n'


@pytest.mark.parametrize('queue', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preempted_spot_machines_are_created_again(act, capfd, queue):
  assert tpu(act, ['preempted', 0], capfd, 'spot', queue=queue) == 0
  verbs = [line.split()[3] for line in calls(act)]
  assert verbs.count('create') == verbs.count('delete') == 2
  assert '--spot' in calls(act)[0]
  assert 'preempted; starting again (3 restarts left)' in (act / 'output').read_text()
  assert (act / 'starts0').read_text() == '2\n' and not (act / 'state').exists()


@pytest.mark.slow
def test_preempted_too_often_is_75(act, capfd):
  assert tpu(act, ['preempted'] * 3, capfd, 'spot', restarts=1) == 75
  assert not (act / 'state').exists()


def test_machines_of_another_job_are_not_deleted(act, capfd):
  (act / 'state').write_text('READY')
  with pytest.raises(Failure, match='create the slice: gcloud exited with 1'):
    tpu(act, [0], capfd)
  assert len(calls(act)) == 1 and (act / 'state').exists()


def test_machines_are_deleted_when_the_installation_fails_but_not_with_keep(act, capfd):
  (act / 'user/bin/uv').write_text('#!/bin/bash\nexit 3\n')
  with pytest.raises(Failure, match='install t5lab: gcloud exited with 3'):
    tpu(act, [0], capfd)
  assert not (act / 'state').exists()
  with pytest.raises(Failure, match='install t5lab: gcloud exited with 3'):
    tpu(act, [0], capfd, keep=True)
  assert (act / 'state').read_text() == 'READY'


def test_a_job_that_is_kept_can_be_followed_again_and_has_no_secrets(act, capfd, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hunter2')
  assert tpu(act, [0], capfd, keep=True) == 0
  texts = [p.read_bytes() for p in act.glob('worker*/**/*') if p.is_file()]
  assert len(texts) > 8 and not any(b'hunter2' in text for text in texts)
  assert 'hunter2' not in (act / 'output').read_text() + '\n'.join(calls(act))

  (act / 'calls').unlink()
  assert tpu(act, [0], capfd, attach=True) == 0
  assert [line.split()[3] for line in calls(act)] == ['ssh', 'describe', 'ssh', 'delete']
  assert 'worker 0 start 0' in (act / 'output').read_text()


def jobset(act, state, ends, **options):
  (act / 'state').write_text(state)
  (act / 'ends').write_text(''.join(f't5lab-exit={e}\n' for e in ends))
  plan = gke.plan(LaunchJob('configs/x.py', 'gs://bucket/run'), topologies.parse('v5e:4x4'),
                  image='i')
  return executor.run(plan, **options)


@pytest.mark.parametrize('state, ends, code', [
    ('Completed', [0, 0], 0), ('Failed', ['', 134, 3], 3), ('Failed', [75, 75], 75)])
def test_a_jobset_is_followed_to_its_end(act, state, ends, code):
  assert jobset(act, state, ends) == code
  assert [c.split()[0] for c in calls(act)] == ['create', 'logs', 'get', 'get', 'get', 'delete']
  assert '"kind": "JobSet"' in (act / 'created').read_text()


def test_a_jobset_of_another_job_is_not_deleted(act):
  (act / 'exists').touch()
  with pytest.raises(Failure, match='submit the JobSet: kubectl exited with 1'):
    jobset(act, 'Completed', [0])
  assert [c.split()[0] for c in calls(act)] == ['create']


@pytest.mark.parametrize('end, restarts, requeued', [
    (0, 3, False), (75, 3, True), (124, 3, True), (134, 3, True), (2, 3, False), (70, 3, False),
    (75, 0, False)])
def test_the_sbatch_script_requeues_what_can_resume(act, tmp_path, end, restarts, requeued):
  python = tmp_path / 'python'
  python.write_text('#!/bin/bash\nexport | grep -E "JAX|NCCL" > "$ACT/task$JAX_PROCESS_ID"\n'
                    f'echo "$@" >> "$ACT/task$JAX_PROCESS_ID"\nexit {end}\n')
  python.chmod(0o755)
  plan = slurm.plan(LaunchJob('/x/c.py', '/nfs/run', restarts=restarts), nodes=2, gpus=4,
                    root=str(tmp_path), python=str(python))
  assert executor.run(plan) == 0
  done = subprocess.run(['bash', act / 'submitted'], capture_output=True, text=True, timeout=60,
                        env=os.environ | {'SLURM_JOB_ID': '9', 'SLURM_JOB_NODELIST': 'node[7-8]'})
  assert done.returncode == end, done.stderr
  assert ('scontrol requeue 9' in calls(act)) is requeued
  for i in range(2):
    task = (act / f'task{i}').read_text()
    for part in ('JAX_COORDINATOR_ADDRESS="node7:8476"', 'JAX_NUM_PROCESSES="2"',
                 f'JAX_PROCESS_ID="{i}"', 'JAX_LOCAL_DEVICE_IDS="0,1,2,3"',
                 '-m t5lab train --config /x/c.py --workdir /nfs/run'):
      assert part in task


# --- the checkout --------------------------------------------------------------------------------


def test_only_what_git_tracks_is_sent(act, tmp_path, monkeypatch, capfd):
  root = tmp_path / 'checkout'
  config = (Path(__file__).parents[3] / 'configs/quickstart.py').read_text()
  for name, text in {'t5lab/__init__.py': '', 'configs/x.py': config,
                     '.gitignore': '*.env\n'}.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  git = lambda *argv: subprocess.run(
      ['git', '-c', 'user.name=t', '-c', 'user.email=t@t', *argv], cwd=root, check=True,
      capture_output=True, text=True).stdout
  git('init', '-q'), git('add', '.'), git('commit', '-qm', 'a')
  for name in ('keys.env', 'notes.txt', 'configs/y.py'):
    (root / name).write_text('hunter2')
  (act / 'ends').write_text('0\n0\n')
  monkeypatch.chdir(root)
  launch = ['launch', '--platform', 'tpu-vm', '--topology', 'v5e:4x4', '--zone', 'z', '--workdir',
            'gs://bucket/run', '--keep', '--config']

  assert cli.main([*launch, 'configs/y.py']) == 2
  assert 'not tracked by git' in capfd.readouterr().err
  (root / 't5lab/__init__.py').write_text('changed')
  assert cli.main([*launch, 'configs/x.py']) == 2
  assert 'uncommitted changes (t5lab/__init__.py)' in capfd.readouterr().err
  assert not (act / 'calls').exists()

  before = git('status', '--porcelain', '--ignored')
  assert cli.main([*launch, 'configs/x.py', '--allow-dirty']) == 0
  assert git('status', '--porcelain', '--ignored') == before and not git('stash', 'list')
  [folder] = (act / 'worker0').iterdir()
  sent = sorted(p.relative_to(folder / 'checkout').as_posix()
                for p in (folder / 'checkout').rglob('*') if p.is_file())
  assert sent == ['.gitignore', 'configs/x.py', 't5lab/__init__.py']
  assert (folder / 'checkout/t5lab/__init__.py').read_text() == 'changed'
  assert Path('t5lab-launch').exists() is False
