"""No rule set makes XLA replicate an array because it could not move it between shardings.

XLA warns of that as 'Involuntary full rematerialization'. Each step is compiled without a cache, in
a process of its own (rematerialization.py).
"""

import json
import pathlib
import subprocess
import sys

import jax
import meshes
import pytest

PROGRAM = pathlib.Path(__file__).parent / 'rematerialization.py'
MORE_MESHES = [
    ('dp', dict(data=4, fsdp=2)), ('dp', dict(dcn_data=2, data=4)), ('tp', dict(data=4, model=2)),
    ('fsdp_tp', dict(data=1, fsdp=4, model=2))]
MODELS = ('encoder_decoder', 'decoder', 'experts')


def warnings(cases) -> list[list[str]]:
  process = subprocess.run([sys.executable, PROGRAM, json.dumps(cases)], timeout=1500,
                           capture_output=True, text=True, cwd=PROGRAM.parents[2])
  assert process.returncode == 0, process.stderr[-2000:]
  return json.loads(process.stdout)


def case(kind, rules, mesh, **changes):
  return {'kind': kind, 'rules': rules, 'mesh': mesh, **changes}


def test_rules_cause_no_warning_but_weights_without_pins_do():
  # XLA of jax 0.12 moves the weights of the simpler mesh without a warning.
  mesh = dict(data=2, fsdp=4)
  if jax.__version_info__ >= (0, 12):
    mesh = dict(data=2, dcn_fsdp=2, fsdp=2)
  unpinned, *pinned = warnings([
      case('decoder', 'fsdp', mesh, pins=False),
      case('experts', 'ep', dict(data=1, fsdp=2, expert=2, model=2), tied=True,
           **{'loss.chunks': 2}),
      case('decoder', 'sp', dict(data=1, fsdp=2, sequence=2, model=2))])
  assert unpinned and 'cannot go from sharding' in unpinned[0]
  assert pinned == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize('rules, mesh', meshes.ALL + MORE_MESHES, ids=meshes.mesh_id)
def test_no_rules_cause_a_warning_for_any_model(rules, mesh):
  cases = [case(kind, rules, mesh, tied=tied) for kind in MODELS for tied in (False, True)]
  cases += [case('encoder_decoder', rules, mesh, tied=True, remat='full', dtype='bfloat16',
                 **{'loss.chunks': 4, 'optim.microbatches': 2, 'model.dropout': 0.1}),
            case('experts', rules, mesh, remat='dots', **{'optim.name': 'adamw', 'optim.clip': 1.})]
  for c, lines in zip(cases, warnings(cases), strict=True):
    assert not lines, (c, lines[0])
