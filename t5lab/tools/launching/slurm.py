"""SLURM for GPU clusters: one sbatch script with one process per node, requeued if it can resume.

All nodes share a file system, so they use the caller's checkout and Python as they are. SLURM sends
SIGTERM WARNING seconds before the time limit or a preemption; the run saves a checkpoint and exits
with 75, and the script puts the job back into the queue.
"""

import shlex

from t5lab.errors import UsageError
from t5lab.tools.launching import scripts
from t5lab.tools.launching.job import FINAL, PORT, RETRY, LaunchJob, check_remote
from t5lab.tools.launching.plan import LaunchStep, Plan

WARNING = 120       # seconds between SIGTERM and the end
WAIT = 300          # seconds for the others, after a task ended, to save or miss its heartbeat

# Bundles XLA's latency-hiding scheduler, pipelined collectives and double-buffered while loops,
# which overlap the all-reduce of gradients with computation [JAX docs, gpu_performance_tips].
# NVLS: reductions in the NVSwitch, if there is one. --env can override all of them.
GPU = {'JAX_OPTIMIZATION_LEVEL': 'O1', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9',
       'NCCL_NVLS_ENABLE': '1'}


def _script(job: LaunchJob, nodes: int, gpus: int, root: str, python: str, limits: dict) -> str:
  options = {'job-name': job.name, 'nodes': nodes, 'ntasks-per-node': 1, 'gpus-per-node': gpus,
             'exclusive': '', 'requeue': '', 'open-mode': 'append', 'output': f'{job.name}-%j.log',
             'export': 'NONE',         # the default stores the whole environment of the caller
             'signal': f'B:TERM@{WARNING}', **limits}
  lines = [f'#SBATCH --{k}' + f'={v}' * (v != '') for k, v in options.items()
           if v != '' or k in ('exclusive', 'requeue')]
  environment = {**GPU, **job.environment,
                 # by default JAX gives a SLURM task only the GPU of its local number
                 'JAX_LOCAL_DEVICE_IDS': ','.join(map(str, range(gpus)))}
  # These variables exist only inside srun. JAX itself would derive the port from the job's number.
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
# srun exits with the highest code of its tasks. {', '.join(map(str, FINAL))} would repeat.
case "$code" in {'|'.join(map(str, RETRY))}) retry=yes;; *) [ "$code" -gt 128 ] && retry=yes;; esac
if [ -n "${{retry:-}}" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then
  echo "t5lab: ended with $code, requeueing the job"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def plan(job: LaunchJob, *, nodes: int, gpus: int, root: str, python: str, **limits: str) -> Plan:
  """limits: options of sbatch, '' for none: time, partition, account."""
  check_remote(job)
  if job.on_bucket:
    raise UsageError('--workdir must be a folder that all nodes share on SLURM, because jobs may '
                     f'not mount a bucket, got {job.workdir}')
  if nodes < 1 or gpus < 1:
    raise UsageError('--nodes and --gpus-per-node must be 1 or more, got '
                     f'{nodes} and {gpus}')
  return Plan(
      notes=(f'{job.name}: {nodes} nodes of {gpus} GPUs, one process per node; checkout {root}',
             f'coordinator: the first node, port {PORT}',
             f'to watch it: squeue --name={job.name}; tail -F {root}/{job.name}-*.log',
             f'to end it: scancel --name={job.name}'),
      files={'job.sbatch': _script(job, nodes, gpus, root, python, limits)},
      create=(LaunchStep('submit the job', ('sbatch', f'--chdir={root}', '{files}/job.sbatch')),))
