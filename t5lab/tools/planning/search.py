"""`t5lab plan --search`: meshes x rules x remat x microbatches, by formula first, then compiled.

The formula sorts out what does not fit; the compiler decides between those that may be fast, and
what it says of one corrects the formula for the next.
"""

from collections.abc import Callable
import itertools
import math
import statistics
import time

from t5lab import config as configs
from t5lab.errors import UsageError
from t5lab.models.families import REMAT
from t5lab.parallel import sharding
from t5lab.tools.planning import estimate
from t5lab.tools.planning import topology as topologies

MARGIN = 0.9                   # of the usable memory: the formula is no compiler
MICROBATCHES = (1, 2, 4, 8, 16)
SPLITS = {'dp': (), 'fsdp': ('fsdp',), 'tp': ('model',), 'fsdp_tp': ('fsdp', 'model'),
          'sp': ('fsdp', 'sequence'), 'ep': ('fsdp', 'expert')}


def factorizations(chips: int, axes: int):
  """Every way to write `chips` as a product of so many ordered factors."""
  if axes == 0:
    return [()] if chips == 1 else []
  if axes == 1:
    return [(chips,)]
  return [(n, *rest) for n in range(1, chips + 1) if chips % n == 0
          for rest in factorizations(chips // n, axes - 1)]


def meshes(c, topology):
  """(rules, {axis: devices}) that are worth a look: each axis of the row over 1 but data, which
  takes the rest; model at most 16; slices are data."""
  heads = configs.model_config(c).n_heads
  inside = topology.chips // topology.slices
  for rules, axes in SPLITS.items():
    if rules == 'ep' and not c.model.experts:
      continue
    for sizes in factorizations(inside, 1 + len(axes)):
      mesh = dict(zip(('data', *axes), sizes))
      if any(mesh[axis] == 1 for axis in axes) and axes:
        continue
      if mesh.get('model', 1) > min(16, heads) or mesh.get('sequence', 1) > 16:
        continue
      yield rules, {'dcn_data': topology.slices, **mesh}


def variant(c, rules: str, mesh: dict[str, int], remat: str, micro: int):
  """Config c with these."""
  v = configs.from_dict(configs.to_dict(c))
  for axis in sharding.MESH_AXES:
    v.mesh[axis] = mesh.get(axis, 1)
  v.rules, v.model.remat, v.optim.microbatches = rules, remat, micro
  return v


def search(c, topology, prices: dict, finalists: int = 6, say: Callable = lambda text: None,
           use_cache: bool = True) -> dict:
  """Tries, compiles the best, and returns {'tried', 'fitting', 'finalists', 'best', …}.

  finalists: rows with mesh, rules, remat, microbatches, formula_seconds, own (what c has now) and
  the plan, best first.
  best: the first that fits, with `lines` for the config and `overrides` for the command line.
  """
  tried, found = 0, []
  started = time.monotonic()
  options = list(meshes(c, topology))
  for number, (rules, mesh) in enumerate(options, 1):
    # shapes do not depend on remat and microbatches: one set-up for all of them
    try:
      base = estimate.set_up(variant(c, rules, mesh, 'none', 1), topology)
    except UsageError:
      tried += len(REMAT) * len(MICROBATCHES)      # heads, widths or rows do not divide
      continue
    for remat, micro in itertools.product(REMAT, MICROBATCHES):
      tried += 1
      if c.data.batch_size % (micro * sharding.batch_devices(base.mesh)):
        continue
      v = variant(c, rules, mesh, remat, micro)
      plan = estimate.formula(base.changed(v))
      if plan['hbm']['total'] <= MARGIN * topology.chip.usable:
        found.append((plan['step_seconds'], rules, mesh, remat, micro, v))
    if number % 10 == 0:
      spent = time.monotonic() - started
      say(f'{number} of {len(options)} meshes, {len(found)} combinations fit, '
          f'{spent / number * (len(options) - number):.0f} s to go')
  found.sort(key=lambda row: (row[0], row[4]))
  count = min(finalists, len(found))
  say(f'{tried} combinations, {len(found)} fit by the formula; '
      + (f'compiling {count}' if topologies.has_compiler() else 'no compiler here'))
  rows, measured = [], []
  own = _own(found, c, topology)
  begun = time.monotonic()
  for i in range(1, count + 1):
    seconds, rules, mesh, remat, micro, v = chosen = (
        own if own and not measured else _next(found, measured))
    plan, _ = estimate.plan(estimate.set_up(v, topology), prices, use_cache)
    measured.append((chosen, plan.get('step_seconds')))
    left = (time.monotonic() - begun) / i * (count - i)
    say(f'{i} of {count}: {rules} {_shown(mesh)} remat {remat} x{micro}: '
        + (f'{plan["step_seconds"] * 1e3:.1f} ms, MFU {plan["mfu"]:.1%}' if 'mfu' in plan
           else 'does not fit') + (f', about {left:.0f} s to go' if left else ''))
    rows.append(dict(mesh=mesh, rules=rules, remat=remat, microbatches=micro,
                     formula_seconds=seconds, own=chosen is own, plan=plan))
  rows = ranked(rows)
  best = next((row for row in rows if row['plan']['fits']), None)
  return dict(family=c.family, topology=topology.name, tried=tried, fitting=len(found),
              source='compiler' if topologies.has_compiler() else 'formula', estimate=True,
              finalists=rows, best=best and {**{k: best[k] for k in (
                  'mesh', 'rules', 'remat', 'microbatches')}, **_paste(best, c)})


def _own(found, c, topology):
  """The combination that the config has now; None if it is not among them."""
  try:
    shape = sharding.mesh_sizes(c.mesh.to_dict(), topology.chips)
  except UsageError:
    return None
  mine = (c.rules, c.model.remat, c.optim.microbatches)
  return next((row for row in found if (row[1], row[3], row[4]) == mine and all(
      row[2].get(axis, 1) == n for axis, n in shape.items())), None)


NEW = 0.05                     # of its time: how much faster an untried part may turn out


def _parts(row) -> tuple:
  """What a combination is made of: mesh and rules, remat, microbatches."""
  _, rules, mesh, remat, micro, _ = row
  return (rules, *mesh.items()), remat, micro


def _next(found, measured):
  """The combination that the compiler sees next: the one that may be the fastest.

  found: combinations by the formula's seconds; measured: [(combination, the compiler's seconds or
  None where it does not fit)]. The formula is off by more than its best combinations differ, but
  off alike where they share a part: each part's time is corrected by what the compiler said of the
  combinations that have it, and a part that none has yet gets the benefit of the doubt.
  """
  seen = [(_parts(row), math.log((seconds or 2 * row[0]) / row[0])) for row, seconds in measured]
  tried = {parts for parts, _ in seen}

  def hoped(row):
    total = math.log(row[0])
    if seen:
      overall = statistics.fmean(error for _, error in seen)
      total += overall
      for i, part in enumerate(_parts(row)):
        mine = [error for parts, error in seen if parts[i] == part]
        total += statistics.fmean(mine) - overall if mine else -NEW
    return total
  return min((row for row in found if _parts(row) not in tried), key=hoped)


def ranked(rows: list[dict]) -> list[dict]:
  """What fits first, then the fastest."""
  return sorted(rows, key=lambda row: (
      not row['plan']['fits'], row['plan'].get('step_seconds', float('inf'))))


def _paste(row, c) -> dict:
  """Lines and overrides that turn c into this row."""
  values = {f'mesh.{axis}': n for axis in sharding.MESH_AXES
            if (n := row['mesh'].get(axis, 1)) > 1 or c.mesh[axis] != 1}
  values |= {'rules': row['rules'], 'model.remat': row['remat'],
             'optim.microbatches': row['microbatches']}
  quoted = lambda v: f"'{v}'" if isinstance(v, str) else str(v)
  return {'lines': [f'c.{key} = {quoted(value)}' for key, value in values.items()],
          'overrides': [f'--config.{key}={value}' for key, value in values.items()]}


def _shown(mesh) -> str:
  return ' '.join(f'{axis}={n}' for axis, n in mesh.items() if n > 1) or 'one device'
