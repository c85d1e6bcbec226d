"""What the stored examples of a task depend on, as text: a cache of anything else is refused.

Code is told by its source, so a changed preprocessor is another one: its own source, that of the
functions it calls by name in its module, and what it closes over.
"""
import functools
import hashlib
import inspect
import types

from t5lab.data import vocab
from t5lab.data.batches import cache
from t5lab.data.sources.base import RecordSource
from t5lab.data.tasks.parts import trims
from t5lab.data.tasks.seqio_tf import NumpyObjective

PLAIN = (str, bytes, int, float, bool, type(None))
# Raise it when our own preprocessors give other tokens for the same rows: what a task's functions
# import from other modules of ours is not looked into.
TASKS = 1


def identity(task, split: str, lengths: dict[str, int], vocab_spec: str) -> dict:
  """{what: text}. lengths count only where a preprocessor cuts text to them."""
  preprocessors = [p for p in task.preprocessors if not isinstance(p, NumpyObjective)]
  cuts = any('sequence_length' in _parameters(p) and not trims(p) for p in preprocessors)
  return {
      'format': cache.FORMAT, 'code': TASKS, 'task': task.name, 'split': split,
      'vocabulary': vocab.load(vocab_spec).sha256,
      'source': _source(task.source, split),
      'preprocessors': _digest([describe(p) for p in preprocessors]),
      'lengths': ', '.join(f'{k} {v}' for k, v in sorted(lengths.items())) if cuts else 'whole',
  }


def _parameters(fn) -> set[str]:
  try:
    return set(inspect.signature(fn).parameters)
  except (TypeError, ValueError):
    return set()


def _digest(value) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()


def _source(source, split) -> str:
  if isinstance(source, RecordSource):
    return source.fingerprint(split)
  if hasattr(source, 'tfds_dataset'):
    return repr([source.tfds_dataset.name, source.tfds_dataset._split_map])
  return _digest([type(source).__name__, describe(getattr(source, '_dataset_fn', None)),
                  repr(getattr(source, '_split_to_filepattern', ''))])


def describe(value, depth: int = 6):
  """A nested tuple that changes when the code or the settings of a preprocessor do."""
  if isinstance(value, PLAIN):
    return repr(value)
  if depth == 0:
    return type(value).__name__
  inner = lambda x: describe(x, depth - 1)
  if isinstance(value, (list, tuple)):
    return tuple(map(inner, value))
  if isinstance(value, (set, frozenset)):
    return tuple(sorted(map(repr, map(inner, value))))
  if isinstance(value, dict) or isinstance(value, types.MappingProxyType):
    return tuple((repr(k), inner(v)) for k, v in value.items())
  if isinstance(value, functools.partial):
    return 'partial', inner(value.func), inner(value.args), inner(value.keywords)
  if isinstance(value, types.MethodType):
    return 'method', inner(value.__func__)
  if isinstance(value, types.FunctionType):
    return _function(value, inner)
  return f'{type(value).__module__}.{type(value).__qualname__}'


def _function(fn, inner):
  closed = tuple((name, inner(cell.cell_contents)) for name, cell in zip(
      fn.__code__.co_freevars, fn.__closure__ or ()) if _filled(cell))
  module, codes = fn.__module__ or '', list(_codes(fn.__code__))
  used = {name: fn.__globals__[name] for code in codes for name in code.co_names
          if name in fn.__globals__}
  called = tuple((name, inner(value)) for name, value in used.items()
                 if isinstance(value, (*PLAIN, types.FunctionType, tuple, dict))
                 and getattr(value, '__module__', module) == module)
  try:
    text = inspect.getsource(fn)
  except (OSError, TypeError):                      # made in an interpreter
    text = fn.__code__.co_code.hex()
  # Two lambdas of one line have the same source.
  constants = tuple(repr(x) for code in codes for x in code.co_consts if isinstance(x, PLAIN))
  return (f'{module}.{fn.__qualname__}', _digest(text), constants, closed, called,
          inner(fn.__defaults__))


def _codes(code):
  """A function's code, and that of the functions inside it."""
  yield code
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from _codes(constant)


def _filled(cell) -> bool:
  """A cell is empty while the function that fills it has not come so far."""
  try:
    return cell.cell_contents is not cell
  except ValueError:
    return False
