"""Meshes of eight devices for every rule set, derived from sharding.RULES.

A new rule set is thereby tested by all tests of this folder.
"""

from t5lab.errors import UsageError
from t5lab.parallel import sharding

DEVICES = 8
WEIGHTS = ('vocab', 'embed', 'heads', 'kv_heads', 'mlp')     # logical axes of large parameters


def weight_axes(rules: str) -> tuple[str, ...]:
  """The mesh axes that the weights are split over, except those of experts."""
  targets = sharding.RULES[rules]
  used = {axis for name in WEIGHTS for axis in sharding.mesh_axes(targets.get(name))}
  return tuple(axis for axis in sharding.MESH_AXES if axis in used)


def special_axes(rules: str) -> tuple[str, ...]:
  """The mesh axes that the rule set uses in another way than plain data parallelism."""
  plain = sharding.RULES['dp'].items()
  used = {axis for name, target in sharding.RULES[rules].items() if (name, target) not in plain
          for axis in sharding.mesh_axes(target)}
  return tuple(axis for axis in sharding.MESH_AXES if axis in used)


def meshes(rules: str) -> list[dict[str, int]]:
  """The arguments of make_mesh: each special axis alone, with a dcn_ axis, then all together."""
  special = special_axes(rules)
  inside = [axis for axis in special if not axis.startswith('dcn_')]
  candidates = [{axis: 4} for axis in inside]
  candidates += [{axis: 2, **dict.fromkeys(inside[:2], 2)} for axis in special
                 if axis not in inside]
  if len(inside) != 1:
    candidates.append(dict.fromkeys(inside[:3], 2))
  # `data` takes the remaining devices
  sized = [sharding.mesh_sizes({'data': -1, **mesh}, DEVICES) for mesh in candidates]
  return [mesh for mesh in sized if _is_accepted(mesh, rules)]


def _is_accepted(mesh: dict[str, int], rules: str) -> bool:
  try:
    sharding.check_mesh(sharding.make_mesh(**mesh), rules)
  except UsageError:
    return False
  return True


def mesh_id(value) -> str:
  """The id of a parameter: a name, or 'data=2,fsdp=4' for a mesh."""
  return value if isinstance(value, str) else ','.join(f'{k}={n}' for k, n in value.items())


ALL = [(rules, mesh) for rules in sharding.RULES for mesh in meshes(rules)]
