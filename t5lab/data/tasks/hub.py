"""Text on the Hugging Face hub that TFDS lacks, as plain data; builtin.py registers it."""
import dataclasses
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Repository:
  """The Parquet files of one folder. files: {split: glob}."""
  name: str
  folder: str
  files: dict[str, str]
  objective: str


def _wikitext(size: int) -> Repository:
  files = {split: f'{split}-*.parquet' for split in ('train', 'validation', 'test')}
  return Repository('Salesforce/wikitext', f'wikitext-{size}-raw-v1', files, 'lm')


# [Merity et al. 2016]
TEXT = MappingProxyType({f'wikitext_{size}_lm': _wikitext(size) for size in (2, 103)})
