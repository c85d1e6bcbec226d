"""The prompt of a task around the texts of a user."""

from collections.abc import Sequence
import functools

from t5lab.data.tasks import own_files, prompts
from t5lab.errors import UsageError


def fill(d, texts: Sequence[str | dict], task: str | None) -> list[str]:
  """Returns model inputs.

  d: the data section of a config. texts: strings, or dicts of a task's fields. task: whose prompt
  is put around them; None is the task the model was trained on, if it has a prompt; '' takes the
  strings unchanged. Errors: UsageError for dicts without a task.
  """
  if task is None:
    has_prompt = d.mixture in prompts.PROMPTS or d.mixture == own_files.NAME
    task = d.mixture if has_prompt else ''
  if not task and any(not isinstance(text, str) for text in texts):
    raise UsageError('dicts of fields need a task: pass task=, one of '
                     + ', '.join(prompts.PROMPTS))
  if not task:
    return list(texts)
  prompt = functools.partial(prompts.prompt, task)
  if task == own_files.NAME:
    prompt = own_files.OwnFiles(d.files.to_dict(), d.fields.to_dict(), d.prompt).inputs_for
  return [prompt(text) for text in texts]
