"""Real processes that train as one run: the same numbers as one process, and every file once."""

import ctypes
import json

import processes
import pytest

# 8 rows per step, like configs/quickstart.py:tiny; no dropout, whose bits depend on the mesh
RUN = {'total_steps': 8, 'checkpoint.every': 4, 'log.every': 1, 'eval.every': 4,
       'optim.schedule': 'constant'}


def train(count, workdir, logs, devices=1, **overrides):
  """Trains with `count` processes to the end -> their outputs."""
  overrides = RUN | {k.replace('__', '.'): v for k, v in overrides.items()}
  with processes.train_together(count, workdir, logs, overrides, devices=devices) as several:
    codes = [p.wait(300) for p in several]
    outputs = [p.output() for p in several]
  assert codes == [0] * count, '\n'.join(outputs)
  return outputs


def assert_same(workdir, reference):
  """The data is the same bit for bit; losses, gradient norms and scores to 1e-5."""
  actual, expected = processes.entries(workdir), processes.entries(reference)
  data = lambda entries: [(e['step'], 'eval' in e, e.get('data')) for e in entries]
  assert data(actual) == data(expected)                      # each entry once, in order
  for entry, other in zip(actual, expected):
    for name in ('loss', 'grad_norm', 'tokens'):
      if name in other:
        assert entry[name] == pytest.approx(other[name], rel=1e-5), (name, entry['step'])
    for name, value in other.get('eval', {}).items():
      assert entry['eval'][name] == pytest.approx(value, rel=1e-5), (name, entry['step'])


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The workdir of the same run on one process with one device."""
  base = tmp_path_factory.mktemp('alone')
  train(1, base / 'run', base / 'logs')
  return base / 'run'


def test_two_processes_are_one_run(alone, tmp_path):
  """They train, evaluate and save; only process 0 prints the report and writes the files."""
  outputs = train(2, tmp_path / 'run', tmp_path / 'logs', mesh__fsdp=2, mesh__data=1, rules='fsdp')
  assert_same(tmp_path / 'run', alone)
  assert 'of 2 processes' in outputs[0] and 'bleu' in outputs[0]
  assert 'loss' not in outputs[1] and 'bleu' not in outputs[1]
  assert processes.committed(tmp_path / 'run') == [4, 8]
  assert len(list((tmp_path / 'run' / 'tensorboard').iterdir())) == 1
  assert data_digest(tmp_path / 'run') == data_digest(alone)


def data_digest(workdir) -> str:
  """The digest of all batches up to step 8."""
  return processes.Checkpoints(workdir / 'checkpoints').manifest(8).meta['data']['digest']


@pytest.mark.slow
def test_four_processes_with_two_devices_each(alone, tmp_path):
  train(4, tmp_path / 'run', tmp_path / 'logs', devices=2, mesh__data=2, mesh__model=2,
        mesh__fsdp=2, rules='fsdp_tp')
  assert_same(tmp_path / 'run', alone)


@pytest.mark.slow
@pytest.mark.parametrize('count, devices, mesh', [
    (4, 1, dict(mesh__data=4)),
    (2, 2, dict(mesh__data=2, mesh__model=2, rules='tp')),
    (1, 8, dict(mesh__data=1, mesh__fsdp=8, rules='fsdp'))])
def test_a_run_resumes_with_other_processes_and_another_mesh(alone, tmp_path, count, devices, mesh):
  """Four steps on two processes, the rest on `count` with a mesh of another shape."""
  half = RUN | {'total_steps': 4}
  with processes.train_together(2, tmp_path / 'run', tmp_path / 'half', half) as several:
    assert [p.wait(300) for p in several] == [0, 0], several[0].output()
  outputs = train(count, tmp_path / 'run', tmp_path / 'logs', devices=devices, **mesh)
  assert 'resuming from step 4' in outputs[0]
  assert_same(tmp_path / 'run', alone)


@pytest.mark.slow
def test_hosts_with_different_configs_end_together(tmp_path):
  """Both name the process whose config differs, and both exit with 2."""
  with processes.train_together(2, tmp_path / 'run', tmp_path / 'logs', RUN,
                                last={'optim.lr': 0.5}) as both:
    codes = [p.wait(120) for p in both]
  assert codes == [2, 2], both[0].output() + both[1].output()
  assert 'the config of process 1 differs from that of process 0' in both[1].output()
  assert 'process 0 ended because process 1 failed: the config' in both[0].output()
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
  """One host cannot read a file; the other does not wait for its heartbeat."""
  records = tmp_path / 'records.jsonl'
  records.write_text('\n'.join(json.dumps({'inputs': f'a {i}', 'targets': f'b {i}'})
                               for i in range(64)) + '\n')
  overrides = RUN | {'data.files.train': records, 'data.files.validation': records,
                     'eval.every': 0}
  with processes.train_together(2, tmp_path / 'run', tmp_path / 'logs', overrides,
                                before_last=lambda: hide(records)) as both:
    codes = [p.wait(120) for p in both]
  assert codes == [3, 3], both[0].output() + both[1].output()
  assert 'process 0 ended because process 1 failed' in both[0].output()


def hide(path):
  """Makes the file empty for this process alone, by a mount namespace of its own."""
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.unshare(0x00020000) == 0                     # CLONE_NEWNS
  libc.mount(None, b'/', None, 0x44000, None)              # MS_REC | MS_PRIVATE
  assert libc.mount(b'/dev/null', str(path).encode(), None, 0x1000, None) == 0     # MS_BIND
