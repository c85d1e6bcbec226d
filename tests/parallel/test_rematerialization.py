"""No shipped row makes XLA replicate an array that it could not move: 'Involuntary full
rematerialization'. Each step is compiled anew, by a process of its own (rematerialization.py)."""

import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parent / 'rematerialization.py'
MESHES = [
    ('dp', dict(data=4, fsdp=2)), ('dp', dict(dcn_data=2, data=4)),
    ('fsdp', dict(data=2, fsdp=4)), ('fsdp', dict(dcn_fsdp=2, data=2, fsdp=2)),
    ('tp', dict(data=2, model=4)), ('tp', dict(data=4, model=2)),
    ('fsdp_tp', dict(data=1, fsdp=4, model=2)), ('fsdp_tp', dict(data=2, fsdp=2, model=2)),
    ('sp', dict(data=2, sequence=4)), ('sp', dict(data=1, fsdp=2, sequence=2, model=2)),
    ('ep', dict(data=2, expert=4)), ('ep', dict(data=1, fsdp=2, expert=2, model=2)),
]
KINDS = ('encoder_decoder', 'decoder', 'experts')


def warnings(cases) -> list[list[str]]:
  done = subprocess.run([sys.executable, PROGRAM, json.dumps(cases)], timeout=1500,
                        capture_output=True, text=True, cwd=PROGRAM.parent.parent.parent)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


def case(kind, rules, mesh, **changes):
  return {'kind': kind, 'rules': rules, 'mesh': mesh, **changes}


def test_shipped_rows_warn_of_nothing_and_weights_left_to_the_compiler_do():
  unpinned, *shipped = warnings([
      case('decoder', *MESHES[2], pins=False),
      case('experts', *MESHES[-1], tied=True, **{'loss.chunks': 2}),
      case('decoder', *MESHES[-3])])
  assert unpinned and 'cannot go from sharding' in unpinned[0]
  assert shipped == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize('rules, mesh', MESHES, ids=str)
def test_no_row_warns_for_any_model(rules, mesh):
  cases = [case(kind, rules, mesh, tied=tied) for kind in KINDS for tied in (False, True)]
  cases += [case('encoder_decoder', rules, mesh, tied=True, remat='full', dtype='bfloat16',
                 **{'loss.chunks': 4, 'optim.microbatches': 2, 'model.dropout': 0.1}),
            case('experts', rules, mesh, remat='dots', **{'optim.name': 'adamw', 'optim.clip': 1.})]
  for c, lines in zip(cases, warnings(cases), strict=True):
    assert not lines, (c, lines[0])
