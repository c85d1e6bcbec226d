"""Where a run stands, as the manifest of a checkpoint knows it besides the arrays."""

import dataclasses

from t5lab.training import guards


@dataclasses.dataclass(frozen=True)
class Position:
  """offset: batches that rewinds left out: step s reads batch s + offset of the stream, counted
  from 1. digest: of the batches so far. guard: training/guards.py's, as JSON; None: a new one."""
  step: int = 0
  offset: int = 0
  digest: str = ''
  guard: dict | None = None

  @classmethod
  def from_manifest(cls, manifest) -> 'Position':
    data = manifest.meta['data']
    return cls(manifest.step, data.get('offset', 0), data.get('digest', ''),
               manifest.meta.get('guard'))


def checkpoint_meta(step: int, offset: int, digest: str, guard: guards.Guard, data) -> dict:
  """What `Position.from_manifest` reads back. data: the run's Pipeline."""
  return {'data': {**data.position(step + offset), 'offset': offset, 'digest': digest},
          'guard': guards.to_json(guard)}
