"""Errors that end a command: one line for the user, one exit code for the machine.

Exit codes: 0 done · 2 usage or config · 3 data · 4 checkpoint · 70 numerical or internal ·
75 preempted: run the same command to resume · 124 watchdog.
"""


WATCHDOG = 124       # runs/watchdog.py exits with it, without an exception


class Failure(Exception):
  """Ends a command with exit code `code`. The message is one line: value, limit, alternatives."""
  code = 70


class UsageError(Failure):
  code = 2


class DataError(Failure):
  code = 3


class CheckpointError(Failure):
  code = 4


class NumericalError(Failure):
  code = 70


class Preempted(Failure):
  code = 75


def first_line(error: Exception, limit: int = 200) -> str:
  """The first line of an error's message, or else the name of its class."""
  return (str(error).splitlines() or [type(error).__name__])[0][:limit]


def did_you_mean(name: str, known) -> str:
  """A sentence with the closest known names, " Did you mean 'x'?", or else with all of them."""
  import difflib
  known = sorted(filter(None, map(str, known)))
  if not known:
    return ' There is none.'
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
  if close:
    return f" Did you mean {' or '.join(map(repr, close))}?"
  shown = ', '.join(known[:20]) + (f', … ({len(known)} in all)' if len(known) > 20 else '')
  return f' Known: {shown}.'
