"""Real processes on this machine."""

import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import pytest

from t5lab.errors import UsageError
from t5lab.tools.launching import local
from t5lab.tools.launching.job import LaunchJob

ROOT = Path(__file__).parents[3]

# Process i does what the i-th item of the test's argument says.
PROGRAM = r"""
import os, signal, sys, time
me = int(os.environ.get('JAX_PROCESS_ID', 0))
action = sys.argv[1].split(',')[me]
print(f'process {me} does {action}', flush=True)
while 'wait' in sys.argv[1] and action != 'wait' and not os.path.exists('ready'):
  time.sleep(0.01)                        # otherwise the TERM may come before its handler
if action == 'kill':
  os.kill(os.getpid(), signal.SIGKILL)
elif action == 'wait':                    # for a TERM, and then save something
  def saved(*_): print('saved', flush=True); os._exit(75)
  signal.signal(signal.SIGTERM, saved)
  print('ready', flush=True)
  open('ready', 'w').close()
  time.sleep(60)
elif action == 'deaf':
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  time.sleep(60)
elif action.startswith('once'):           # exit with that code at the first start, then with 0
  first = not os.path.exists(f'started{me}')
  open(f'started{me}', 'w').close()
  sys.exit(int(action[4:]) if first else 0)
else:
  sys.exit(int(action))
"""


@pytest.fixture
def port():
  with socket.socket() as s:
    s.bind(('', 0))
    return s.getsockname()[1]


def run(tmp_path, actions, port, grace=0.2, restarts=0, **options):
  return local.run(LaunchJob('c.py', str(tmp_path / 'run'), restarts=restarts),
                   processes=actions.count(',') + 1, devices=2, port=port, grace=grace,
                   argv=[sys.executable, '-IS', '-c', PROGRAM, actions], **options)


@pytest.mark.parametrize('actions, code', [
    ('0,0', 0), ('0,3', 3), ('75,75', 75), ('2,4', 2), ('0,kill', 137), ('wait,kill', 137),
    ('wait,70', 70), ('deaf,124', 124)])
def test_the_worst_code_counts_and_no_process_stays(tmp_path, capfd, monkeypatch, port, actions,
                                                     code):
  monkeypatch.chdir(tmp_path)
  assert run(tmp_path, actions, port) == code
  first, _, second = actions.partition(',')
  output = capfd.readouterr().out
  assert f'[0] process 0 does {first}\n' in output
  assert 'process 1 does' not in output
  log = (tmp_path / 'run/launch/process_1.log').read_text()
  assert log == f'process 1 does {second}\n'
  assert ('[0] saved' in output) is (first == 'wait')              # it had the time to save
  assert not children()


def children():
  """The number of living children of this process."""
  return subprocess.run(['ps', '-o', 'pid=,stat=,args=', '--ppid', str(os.getpid())],
                        capture_output=True, text=True).stdout.count('-IS')


def test_all_logs_are_printed_on_request(tmp_path, capfd, port):
  assert run(tmp_path, '0,0,0', port, all_logs=True) == 0
  output = capfd.readouterr().out
  for i in range(3):
    assert f'[{i}] process {i} does 0\n' in output
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('actions, restarts, code, starts', [
    ('once75,once75', 1, 0, 2), ('0,once124', 2, 0, 2), ('once2,0', 3, 2, 1), ('75,0', 2, 75, 3)])
def test_restarts(tmp_path, capfd, monkeypatch, port, actions, restarts, code, starts):
  monkeypatch.chdir(tmp_path)
  assert run(tmp_path, actions, port, restarts=restarts) == code
  captured = capfd.readouterr()
  assert captured.out.count('process 0 does') == starts
  assert captured.err.count('starting again') == starts - 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_all(tmp_path, port, number):
  code = ('from t5lab.tools.launching import local\n'
          'from t5lab.tools.launching.job import LaunchJob; import sys\n'
          f'job = LaunchJob("c.py", {str(tmp_path / "run")!r}, restarts=5)\n'
          f'sys.exit(local.run(job, processes=2, devices=1, port={port}, '
          f'argv=[sys.executable, "-IS", "-c", {PROGRAM!r}, "wait,wait"]))')
  process = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE,
                             text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  log = tmp_path / 'run/launch/process_1.log'
  assert '[0] process 0' in process.stdout.readline()
  assert process.stdout.readline() == '[0] ready\n'
  while not log.exists() or 'ready' not in log.read_text():
    time.sleep(0.01)
  process.send_signal(number)
  rest, _ = process.communicate(timeout=20)
  assert process.returncode == 75 and rest == '[0] saved\n'        # and is not restarted
  assert log.read_text().endswith('saved\n')


def test_a_port_in_use_is_named(tmp_path, port):
  with socket.socket() as s:
    s.bind(('', port))
    s.listen()
    with pytest.raises(UsageError, match=f'coordinator port {port} is already in use, .* choose '
                                         'another --port'):
      run(tmp_path, '0,0', port)
    assert run(tmp_path, '0', port) == 0             # one process needs no port


def test_the_environment_of_a_process():
  added = local.environment(1, processes=2, devices=4, device='cpu', port=9, given={'T5LAB_X': 'y'},
                            flags='--xla_dump_to=/x --xla_force_host_platform_device_count=8')
  assert added == {
      'TF_CPP_MIN_LOG_LEVEL': '3', 'JAX_COORDINATOR_ADDRESS': '127.0.0.1:9',
      'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1', 'JAX_PLATFORMS': 'cpu', 'T5LAB_X': 'y',
      'XLA_FLAGS': '--xla_dump_to=/x --xla_force_host_platform_device_count=4 '
                   '--xla_cpu_multi_thread_eigen=false'}
  added = local.environment(1, processes=2, devices=4, device='gpu', port=9)
  assert added['CUDA_VISIBLE_DEVICES'] == '4,5,6,7' and 'XLA_FLAGS' not in added


JAX_PROGRAM = r"""
from t5lab.parallel import multihost
multihost.initialize()
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ('x',))
x = jax.make_array_from_callback((4,), NamedSharding(mesh, P('x')), lambda i: jnp.arange(4.)[i])
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(x)
print(multihost.index(), multihost.count(), jax.local_device_count(), float(total),
      multihost.gather(multihost.index()), flush=True)
"""


def test_jax_processes_join(tmp_path, capfd, port):
  code = local.run(LaunchJob('c.py', str(tmp_path)), processes=2, devices=2, port=port,
                   argv=[sys.executable, '-c', JAX_PROGRAM])
  output = capfd.readouterr().out
  assert code == 0, output + (tmp_path / 'launch/process_1.log').read_text()
  assert '[0] 0 2 2 6.0 [0, 1]\n' in output
  assert '1 2 2 6.0 [0, 1]\n' in (tmp_path / 'launch/process_1.log').read_text()


@pytest.mark.slow
def test_training_on_two_processes(tmp_path, port):
  """`t5lab launch --platform local` trains the quickstart, and then resumes it."""
  command = [sys.executable, '-m', 't5lab', 'launch', '--platform', 'local', '--config',
             'configs/quickstart.py:tiny', '--workdir', str(tmp_path), '--processes', '2',
             '--devices-per-process', '2', '--port', str(port), '--config.log.every=1']
  environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache/jax')}
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280,
                        env=environment)
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'on 4 cpu devices' in done.stdout
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert max(row['step'] for row in rows) == 10
  assert (tmp_path / 'checkpoints/step_00000010/MANIFEST.json').is_file()
  done = subprocess.run([*command, '--config.total_steps=12'], cwd=ROOT, capture_output=True,
                        text=True, timeout=280, env=environment)
  assert done.returncode == 0 and 'resuming from step 10' in done.stdout, done.stderr
