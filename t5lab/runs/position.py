"""Position of a run: what a checkpoint's manifest holds besides the arrays, to resume exactly."""

import dataclasses

from t5lab.training import guards


@dataclasses.dataclass(frozen=True)
class Position:
  """The step of a run, and what the steps so far have read and judged.

  offset: batches that rewinds left out. Step s reads batch s + offset of the stream, counted from
    1.
  digest: of the batches so far, see training/digests.py.
  guard: guards.to_json of the guard's state; None is a new guard.
  """
  step: int = 0
  offset: int = 0
  digest: str = ''
  guard: dict | None = None

  @classmethod
  def from_manifest(cls, manifest) -> 'Position':
    data = manifest.meta['data']
    return cls(step=manifest.step, offset=data.get('offset', 0), digest=data.get('digest', ''),
               guard=manifest.meta.get('guard'))


def checkpoint_meta(step: int, offset: int, digest: str, guard: guards.Guard, data) -> dict:
  """The meta that `Position.from_manifest` reads back. data: the run's Pipeline."""
  return {'data': {**data.position(step + offset), 'offset': offset, 'digest': digest},
          'guard': guards.to_json(guard)}
