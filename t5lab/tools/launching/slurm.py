"""SLURM for GPU clusters: one sbatch script, one process a node, requeued where it may go on.

All nodes see the same file system: the checkout and the Python that launches are used as they are.
SLURM sends SIGTERM so many seconds before the time limit or a preemption; the run saves, exits 75,
and the script puts the job back into the queue.
"""

import shlex

from t5lab.errors import UsageError
from t5lab.tools.launching import scripts
from t5lab.tools.launching.job import AGAIN, FINAL, PORT, Job, check_remote
from t5lab.tools.launching.plan import Plan, Step

WARNING = 120       # seconds between SIGTERM and the end
WAIT = 300          # that the others have when a task has ended: they save, or miss its heartbeat

# Bundles XLA's latency-hiding scheduler, pipelined collectives and double-buffered while loops,
# which overlap the gradients' all-reduce with computing [JAX docs, gpu_performance_tips].
# NVLS: reductions in the NVSwitch, where there is one. All may be overridden by --env.
GPU = {'JAX_OPTIMIZATION_LEVEL': 'O1', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9',
       'NCCL_NVLS_ENABLE': '1'}


def script(job: Job, *, nodes: int, gpus: int, root: str, python: str, time: str = '',
           partition: str = '', account: str = '') -> str:
  options = {'job-name': job.name, 'nodes': nodes, 'ntasks-per-node': 1, 'gpus-per-node': gpus,
             'exclusive': '', 'requeue': '', 'open-mode': 'append', 'output': f'{job.name}-%j.log',
             'export': 'NONE',         # else SLURM stores the whole environment of who submits
             'signal': f'B:TERM@{WARNING}', 'time': time, 'partition': partition,
             'account': account}
  lines = [f'#SBATCH --{k}' + f'={v}' * (v != '') for k, v in options.items()
           if v != '' or k in ('exclusive', 'requeue')]
  environment = {**GPU, **job.environment,
                 # else JAX gives a task of SLURM the GPU of its local number alone
                 'JAX_LOCAL_DEVICE_IDS': ','.join(map(str, range(gpus)))}
  # These exist inside srun only. JAX's own guess for SLURM is a port by the job's number.
  inside = ('export JAX_NUM_PROCESSES="$SLURM_NTASKS" JAX_PROCESS_ID="$SLURM_PROCID"; '
            f'exec {shlex.join(job.argv(python))}')
  return f"""#!/bin/bash
{chr(10).join(lines)}
set -u
cd {shlex.quote(root)} || exit 70
{scripts.exports(environment)}first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export JAX_COORDINATOR_ADDRESS="$first:{PORT}"
srun --export=ALL --kill-on-bad-exit=0 --wait={WAIT} --label bash -c {shlex.quote(inside)} &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
while [ "$code" -gt 128 ] && kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done
# srun ends with the highest code of its tasks. {', '.join(map(str, FINAL))} would come again.
case "$code" in {'|'.join(map(str, AGAIN))}) again=yes;; *) [ "$code" -gt 128 ] && again=yes;; esac
if [ -n "${{again:-}}" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then
  echo "t5lab: ended with $code, back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def plan(job: Job, *, nodes: int, gpus: int, root: str, python: str, **options) -> Plan:
  check_remote(job)
  if job.on_bucket:
    raise UsageError(f'--workdir {job.workdir}: on SLURM it is a folder that all nodes share, for '
                     'mounting a bucket needs rights that jobs lack')
  if nodes < 1 or gpus < 1:
    raise UsageError(f'--nodes {nodes}, --gpus-per-node {gpus}: 1 or more')
  text = script(job, nodes=nodes, gpus=gpus, root=root, python=python, **options)
  return Plan(
      notes=(f'{job.name}: {nodes} nodes of {gpus} GPUs, one process a node; checkout {root}',
             f'coordinator: the first node, port {PORT}',
             f'watch: squeue --name={job.name}; tail -F {root}/{job.name}-*.log; end: '
             f'scancel --name={job.name}'),
      files={'job.sbatch': text},
      create=(Step('submit', ('sbatch', f'--chdir={root}', '{files}/job.sbatch')),))
