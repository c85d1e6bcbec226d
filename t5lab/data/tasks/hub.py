"""Text of the Hugging Face hub that TFDS does not have, read from files that were downloaded."""
import os
import pathlib

from t5lab.data.tasks import own_files
from t5lab.data.tasks import text as text_tasks
from t5lab.data.tasks.files import FileSource
from t5lab.errors import DataError

# name: (repository, folder in it, {split: files}). WikiText's text is a line a row, and every
# second line is empty: those are no rows. [Merity et al. 2016]
TEXT = {f'wikitext_{size}_lm': ('Salesforce/wikitext', f'wikitext-{size}-raw-v1', {
    split: f'{split}-*.parquet' for split in ('train', 'validation', 'test')}) for size in (2, 103)}
NAMES = tuple(TEXT)


def _root() -> pathlib.Path:
  """Beside the data of TFDS: one place for what was downloaded."""
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()


class HubSource(FileSource):
  """The text column of a repository's Parquet files."""
  reports_bad_records = False                       # the empty lines

  def __init__(self, repository: str, folder: str, files: dict[str, str]):
    self.repository, self._folder = repository, folder
    self.where = _root() / repository.replace('/', '--')
    super().__init__(own_files.OwnFiles(
        {split: str(self.where / folder / pattern) for split, pattern in files.items()},
        {'inputs': '', 'targets': 'text'}, bad_rows=1.))      # empty lines

  def check(self, task: str) -> None:
    """DataError with the command that gets the files, if they are not here."""
    if not list((self.where / self._folder).glob('*.parquet')):
      raise DataError(
          f'task {task!r}: {self.where / self._folder} holds no files: where there is a network '
          f'run `hf download {self.repository} --repo-type dataset --local-dir {self.where}` (pip '
          'install huggingface_hub); TFDS_DATA_DIR says where to look')


def register(spec: str) -> None:
  for name, row in TEXT.items():
    text_tasks.add(name, spec, HubSource(*row), 'lm', column='targets')
