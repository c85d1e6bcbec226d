"""The identity of a task: a text that names everything its stored examples depend on.

A cache with another identity is refused.

Code is identified by its source: that of a preprocessor, of the functions it calls by name in its
module, and the values it closes over.
"""
import functools
import hashlib
import inspect
import types

from t5lab.data import vocab
from t5lab.data.batches import cache
from t5lab.data.tasks.parts import trims
from t5lab.data.tasks.record_sources import FileSource
from t5lab.data.tasks.seqio_tf import NumpyObjective, seqio

PLAIN = (str, bytes, int, float, bool, type(None))
# Raise it when our own preprocessors return other tokens for the same records: functions that a
# task's functions import from other modules of ours are not followed.
CODE_VERSION = 1


def identity(task, split: str, lengths: dict[str, int], vocab_spec: str) -> dict:
  """{what: text}. lengths count only if a preprocessor cuts text to them."""
  preprocessors = [p for p in task.preprocessors if not isinstance(p, NumpyObjective)]
  cuts = any('sequence_length' in _parameters(p) and not trims(p) for p in preprocessors)
  return {
      'format': cache.FORMAT, 'code': CODE_VERSION, 'task': task.name, 'split': split,
      'vocabulary': vocab.load(vocab_spec).sha256,
      'source': _source_identity(task.source, split),
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


def _source_identity(source, split) -> str:
  if isinstance(source, FileSource):
    return source.fingerprint(split)
  if isinstance(source, seqio.TfdsDataSource):
    return repr([source.tfds_dataset.name, source.tfds_dataset._split_map])
  # seqio's other sources have a function or file patterns, as private attributes.
  return _digest([type(source).__name__, describe(getattr(source, '_dataset_fn', None)),
                  repr(getattr(source, '_split_to_filepattern', ''))])


def describe(value, depth: int = 6):
  """A nested tuple that changes when the code or the settings of a preprocessor change."""
  if isinstance(value, PLAIN):
    return repr(value)
  if depth == 0:
    return type(value).__name__
  inner = lambda x: describe(x, depth - 1)
  if isinstance(value, (list, tuple)):
    return tuple(map(inner, value))
  if isinstance(value, (set, frozenset)):
    return tuple(sorted(map(repr, map(inner, value))))
  if isinstance(value, (dict, types.MappingProxyType)):
    return tuple((repr(k), inner(v)) for k, v in value.items())
  if isinstance(value, functools.partial):
    return 'partial', inner(value.func), inner(value.args), inner(value.keywords)
  if isinstance(value, types.MethodType):
    return 'method', inner(value.__func__)
  if isinstance(value, types.FunctionType):
    return _describe_function(value, inner)
  return f'{type(value).__module__}.{type(value).__qualname__}'


def _describe_function(fn, inner):
  module, codes = fn.__module__ or '', list(_codes(fn.__code__))
  cells = zip(fn.__code__.co_freevars, fn.__closure__ or ())
  closure = tuple((name, inner(cell.cell_contents)) for name, cell in cells if _is_filled(cell))

  # Plain globals that the code names, and functions of the same module.
  names = [name for code in codes for name in code.co_names if name in fn.__globals__]
  used = {name: fn.__globals__[name] for name in names}
  followed = tuple((name, inner(value)) for name, value in used.items()
                   if isinstance(value, (*PLAIN, types.FunctionType, tuple, dict))
                   and getattr(value, '__module__', module) == module)

  try:
    text = inspect.getsource(fn)
  except (OSError, TypeError):          # defined in an interactive session
    text = fn.__code__.co_code.hex()
  # Two lambdas in one line have the same source; their constants tell them apart.
  constants = tuple(repr(x) for code in codes for x in code.co_consts if isinstance(x, PLAIN))
  return (f'{module}.{fn.__qualname__}', _digest(text), constants, closure, followed,
          inner(fn.__defaults__))


def _codes(code):
  """A function's code, and that of the functions inside it."""
  yield code
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from _codes(constant)


def _is_filled(cell) -> bool:
  """A cell is empty until the enclosing function has assigned its variable."""
  try:
    return cell.cell_contents is not cell
  except ValueError:
    return False
