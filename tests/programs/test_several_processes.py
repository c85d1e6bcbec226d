"""Real processes on loopback that train as one run: the numbers of one, and everything once."""

import ctypes
import json

import processes
import pytest

# 8 rows a step, as configs/quickstart.py:tiny; without dropout, whose bits are drawn a mesh
RUN = {'total_steps': 8, 'checkpoint.every': 4, 'log.every': 1, 'eval.every': 4,
       'optim.schedule': 'constant'}


def train(count, workdir, said, devices=1, **overrides):
  """A run of `count` processes to its end -> their outputs."""
  overrides = RUN | {k.replace('__', '.'): v for k, v in overrides.items()}
  with processes.together(count, workdir, said, overrides, devices=devices) as several:
    codes = [p.wait(300) for p in several]
    outputs = [p.output() for p in several]
  assert codes == [0] * count, '\n'.join(outputs)
  return outputs


def same(workdir, reference):
  """The same data to the last bit; losses, gradient norms and scores to 1e-5."""
  ours, theirs = processes.rows(workdir), processes.rows(reference)
  assert [(r['step'], 'eval' in r, r.get('data')) for r in ours] == [
      (r['step'], 'eval' in r, r.get('data')) for r in theirs]      # each row once, in order
  for mine, other in zip(ours, theirs):
    for name in ('loss', 'grad_norm', 'tokens'):
      if name in other:
        assert mine[name] == pytest.approx(other[name], rel=1e-5), (name, mine['step'])
    for name, value in other.get('eval', {}).items():
      assert mine['eval'][name] == pytest.approx(value, rel=1e-5), (name, mine['step'])


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The run on one process with one device."""
  base = tmp_path_factory.mktemp('alone')
  train(1, base / 'run', base / 'said')
  return base / 'run'


def test_two_processes_are_one_run(alone, tmp_path):
  """Trained, evaluated, saved; the report and the files come from process 0 alone."""
  said = train(2, tmp_path / 'run', tmp_path / 'said', mesh__fsdp=2, mesh__data=1, rules='fsdp')
  same(tmp_path / 'run', alone)
  assert 'of 2 processes' in said[0] and 'bleu' in said[0]
  assert 'loss' not in said[1] and 'bleu' not in said[1]
  assert processes.committed(tmp_path / 'run') == [4, 8]
  assert len(list((tmp_path / 'run' / 'tensorboard').iterdir())) == 1
  chain = processes.Checkpoints(alone / 'checkpoints').manifest(8).meta['data']['digest']
  assert processes.Checkpoints(tmp_path / 'run' / 'checkpoints').manifest(8).meta['data'][
      'digest'] == chain


@pytest.mark.slow
def test_four_processes_with_two_devices_each(alone, tmp_path):
  train(4, tmp_path / 'run', tmp_path / 'said', devices=2, mesh__data=2, mesh__model=2,
        mesh__fsdp=2, rules='fsdp_tp')
  same(tmp_path / 'run', alone)


@pytest.mark.slow
@pytest.mark.parametrize('count, devices, mesh', [
    (4, 1, dict(mesh__data=4)),
    (2, 2, dict(mesh__data=2, mesh__model=2, rules='tp')),
    (1, 8, dict(mesh__data=1, mesh__fsdp=8, rules='fsdp'))])
def test_a_run_goes_on_with_other_processes_and_another_mesh(alone, tmp_path, count, devices, mesh):
  """Four steps on two processes, the rest on `count` with a mesh of another shape."""
  half = RUN | {'total_steps': 4}
  with processes.together(2, tmp_path / 'run', tmp_path / 'half', half) as several:
    assert [p.wait(300) for p in several] == [0, 0], several[0].output()
  said = train(count, tmp_path / 'run', tmp_path / 'said', devices=devices, **mesh)
  assert 'resuming from step 4' in said[0]
  same(tmp_path / 'run', alone)


@pytest.mark.slow
def test_hosts_that_were_given_different_things_end_together(tmp_path):
  """Another config on one host: both say who differs, both exit 2."""
  with processes.together(2, tmp_path / 'run', tmp_path / 'said', RUN,
                          last={'optim.lr': 0.5}) as both:
    codes = [p.wait(120) for p in both]
  assert codes == [2, 2], both[0].output() + both[1].output()
  assert 'the config of process 1 is not that of process 0' in both[1].output()
  assert 'process 0 ends with process 1: the config' in both[0].output()
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_what_one_process_alone_runs_into_ends_all(tmp_path):
  """A file that only one host cannot read: nobody waits for a heartbeat."""
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('\n'.join(json.dumps({'inputs': f'a {i}', 'targets': f'b {i}'})
                            for i in range(64)) + '\n')
  own = RUN | {'data.files.train': rows, 'data.files.validation': rows, 'eval.every': 0}
  with processes.together(2, tmp_path / 'run', tmp_path / 'said', own,
                          before_last=lambda: hide(rows)) as both:
    codes = [p.wait(120) for p in both]
  assert codes == [3, 3], both[0].output() + both[1].output()
  assert 'process 0 ends with process 1' in both[0].output()


def hide(path):
  """In a mount namespace of its own, nothing in the file."""
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.unshare(0x00020000) == 0                     # CLONE_NEWNS
  libc.mount(None, b'/', None, 0x44000, None)              # MS_REC | MS_PRIVATE
  assert libc.mount(b'/dev/null', str(path).encode(), None, 0x1000, None) == 0     # MS_BIND
