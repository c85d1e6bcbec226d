"""`t5lab plan --search`: meshes x rules x remat x microbatches, by formula first, then compiled.

The formula discards combinations that do not fit. The compiler decides between the promising ones,
and each of its results corrects the formula for the next.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import math
import statistics
import time
from typing import NamedTuple

from t5lab import config
from t5lab.errors import UsageError
from t5lab.models.families import REMAT
from t5lab.parallel import sharding
from t5lab.tools.planning import chips, estimate, formula, planned_step

MARGIN = 0.9                   # of the usable memory, because the formula is inexact
MICROBATCHES = (1, 2, 4, 8, 16)
MOST_AXES = 2                  # mesh axes that are varied at a time, besides data
LARGEST_AXIS = 16              # of sequence and model
OPTIMISM = 0.05                # the fraction of its time that an untried choice may save
SETTINGS = ('mesh', 'rules', 'remat', 'microbatches')


class Candidate(NamedTuple):
  """seconds: by the formula; config: the searched config with these choices."""
  seconds: float
  rules: str
  mesh: dict[str, int]
  remat: str
  microbatches: int
  config: object

  @property
  def choices(self) -> tuple:
    """Mesh with rules, remat, microbatches."""
    return (self.rules, *self.mesh.items()), self.remat, self.microbatches


def search(c, topology: chips.Topology, prices: dict, finalists: int = 6,
           log: Callable = lambda text: None, use_cache: bool = True) -> dict:
  """Tries all combinations, compiles the best, and returns {'tried', 'fitting', 'finalists', …}.

  finalists: best first, rows with mesh, rules, remat, microbatches, formula_seconds, own (true for
  those of c) and the plan. best: the first that fits, with `lines` for the config and `overrides`
  for the command line.
  """
  tried, candidates = _try_all(c, topology, log)
  count = min(finalists, len(candidates))
  compiles = chips.has_compiler()
  log(f'{tried} combinations, {len(candidates)} fit by the formula; '
      + (f'compiling {count}' if compiles else 'no compiler, so none is compiled'))
  own = _own_candidate(candidates, c, topology)
  rows, results = [], []
  started = time.monotonic()
  for i in range(1, count + 1):
    chosen = own if own and not results else _next_candidate(candidates, results)
    step = planned_step.describe(chosen.config, topology)
    plan, _ = estimate.plan(step, prices, use_cache)
    results.append((chosen, plan.get('step_seconds')))
    settings = {name: getattr(chosen, name) for name in SETTINGS}
    rows.append(dict(settings, formula_seconds=chosen.seconds, own=chosen is own, plan=plan))
    remaining = (time.monotonic() - started) / i * (count - i)
    log(_progress(chosen, plan, i, count, remaining))
  rows = ranked(rows)
  best = next((_as_settings(row, c) for row in rows if row['plan']['fits']), None)
  return dict(family=c.family, topology=topology.name, tried=tried, fitting=len(candidates),
              source='compiler' if compiles else 'formula', estimate=True, finalists=rows,
              best=best)


# --- candidates --------------------------------------------------------------------------------


def searched_axes(rules: str) -> tuple[str, ...]:
  """The mesh axes that are varied under these rules, besides data.

  These are the first axes, from the slowest network to the fastest, over which the rules shard
  parameters or activations. The batch and the experts use whatever axes there are.
  """
  rule_set = sharding.rule_set(rules)
  used = {axis for name, target in rule_set.items() if name not in ('batch', 'expert')
          for axis in sharding.mesh_axes(target)}
  ordered = [axis for axis in sharding.MESH_AXES if axis in used and not axis.startswith('dcn_')]
  return tuple(ordered[:MOST_AXES])


def factorizations(n: int, factors: int) -> list[tuple[int, ...]]:
  """All ways to write n as a product of this many ordered factors."""
  if factors == 0:
    return [()] if n == 1 else []
  return [(first, *rest) for first in range(1, n + 1) if n % first == 0
          for rest in factorizations(n // first, factors - 1)]


def meshes(c, topology: chips.Topology) -> Iterator[tuple[str, dict[str, int]]]:
  """Yields (rules, {axis: devices}) of the meshes to try.

  Every searched axis has at least 2 devices, data has the rest. Slices are joined by dcn_data.
  """
  heads = config.model_config(c).n_heads
  for rules in sharding.RULES:
    axes = searched_axes(rules)
    if 'expert' in axes and not c.model.experts:
      continue
    for sizes in factorizations(topology.slice_chips, 1 + len(axes)):
      mesh = dict(zip(('data', *axes), sizes))
      if (1 not in sizes[1:] and mesh.get('model', 1) <= min(LARGEST_AXIS, heads)
          and mesh.get('sequence', 1) <= LARGEST_AXIS):
        yield rules, {'dcn_data': topology.slices, **mesh}


def _with_choices(c, rules: str, mesh: dict[str, int], remat: str, microbatches: int):
  changed = config.from_dict(config.to_dict(c))
  for axis in sharding.MESH_AXES:
    changed.mesh[axis] = mesh.get(axis, 1)
  changed.rules, changed.model.remat = rules, remat
  changed.optim.microbatches = microbatches
  return changed


def _try_all(c, topology: chips.Topology, log: Callable) -> tuple[int, list[Candidate]]:
  """(combinations tried, candidates that fit by the formula, the fastest first)."""
  tried, candidates = 0, []
  options = list(meshes(c, topology))
  started = time.monotonic()
  for number, (rules, mesh) in enumerate(options, 1):
    # Shapes do not depend on remat and microbatches, so one description serves all of them.
    try:
      base = planned_step.describe(_with_choices(c, rules, mesh, 'none', 1), topology)
    except UsageError:                           # heads, widths or rows do not divide
      tried += len(REMAT) * len(MICROBATCHES)
      continue
    for remat, microbatches in itertools.product(REMAT, MICROBATCHES):
      tried += 1
      if c.data.batch_size % (microbatches * sharding.batch_devices(base.mesh)):
        continue
      changed = _with_choices(c, rules, mesh, remat, microbatches)
      plan = formula.estimate(dataclasses.replace(base, config=changed))
      if plan['hbm']['total'] <= MARGIN * topology.chip.usable:
        candidates.append(
            Candidate(plan['step_seconds'], rules, mesh, remat, microbatches, changed))
    if number % 10 == 0:
      spent = time.monotonic() - started
      log(f'{number} of {len(options)} meshes, {len(candidates)} combinations fit, '
          f'{spent / number * (len(options) - number):.0f} s left')
  return tried, sorted(candidates, key=lambda row: (row.seconds, row.microbatches))


def _own_candidate(candidates: list[Candidate], c, topology: chips.Topology) -> Candidate | None:
  """The candidate with the choices of config c; None if it is not among them."""
  try:
    sizes = sharding.mesh_sizes(c.mesh.to_dict(), topology.chips)
  except UsageError:
    return None
  for row in candidates:
    same_mesh = all(row.mesh.get(axis, 1) == n for axis, n in sizes.items())
    choices = row.rules, row.remat, row.microbatches
    if same_mesh and choices == (c.rules, c.model.remat, c.optim.microbatches):
      return row
  return None


def _next_candidate(candidates: list[Candidate], results: list) -> Candidate:
  """The candidate to compile next: the one that may be the fastest.

  results: [(candidate, the compiler's seconds, or None if it does not fit)]. The formula's errors
  exceed the differences between its best candidates, but candidates that share a choice have
  similar errors. So each choice's time is corrected by the results of candidates with it, and an
  untried choice is assumed to be faster than average.
  """
  errors = {row.choices: math.log((seconds or 2 * row.seconds) / row.seconds)
            for row, seconds in results}

  def corrected(row: Candidate) -> float:
    total = math.log(row.seconds)
    if errors:
      overall = statistics.fmean(errors.values())
      total += overall
      for i, choice in enumerate(row.choices):
        shared = [error for choices, error in errors.items() if choices[i] == choice]
        total += statistics.fmean(shared) - overall if shared else -OPTIMISM
    return total
  return min((row for row in candidates if row.choices not in errors), key=corrected)


# --- results -----------------------------------------------------------------------------------


def ranked(rows: list[dict]) -> list[dict]:
  """Rows that fit first, then the fastest."""
  def key(row):
    return not row['plan']['fits'], row['plan'].get('step_seconds', math.inf)
  return sorted(rows, key=key)


def _as_settings(row: dict, c) -> dict:
  """The settings of this row, and lines of a config and overrides that change c to them."""
  values = {f'mesh.{axis}': row['mesh'].get(axis, 1) for axis in sharding.MESH_AXES
            if row['mesh'].get(axis, 1) > 1 or c.mesh[axis] != 1}
  values |= {'rules': row['rules'], 'model.remat': row['remat'],
             'optim.microbatches': row['microbatches']}
  return {**{name: row[name] for name in SETTINGS},
          'lines': [f'c.{key} = {value!r}' for key, value in values.items()],
          'overrides': [f'--config.{key}={value}' for key, value in values.items()]}


def _progress(row: Candidate, plan: dict, i: int, count: int, remaining: float) -> str:
  outcome = 'does not fit'
  if 'mfu' in plan:
    outcome = f'{plan["step_seconds"] * 1e3:.1f} ms, MFU {plan["mfu"]:.1%}'
  if remaining:
    outcome += f', about {remaining:.0f} s left'
  mesh = planned_step.mesh_text(row.mesh)
  return f'{i} of {count}: {row.rules} {mesh} remat {row.remat} x{row.microbatches}: {outcome}'
