"""Opens a foreign tokenizer.json in a child process, with limits on its time and memory.

A hostile or broken file can panic the tokenizers library, abort its process, or make a short text
cost hours and all memory (nested quantifiers, replacements that multiply). The child is this file,
run alone: it imports nothing of t5lab.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys

MEMORY = 3 << 30      # bytes of address space; a vocabulary of 262,144 needs less than 1 GiB
SECONDS = 60          # of CPU time; a vocabulary of 262,144 needs about 2
REFUSED = 3           # the child's exit code if the library refuses the file


def check(path, texts: list[str]) -> None:
  """UsageError if the file cannot be opened and read these texts within the limits."""
  from t5lab.errors import UsageError
  environment = {**os.environ, 'TOKENIZERS_PARALLELISM': 'false', 'RAYON_NUM_THREADS': '1',
                 'RUST_BACKTRACE': '0'}
  command = [sys.executable, '-I', os.path.abspath(__file__), os.fspath(path)]
  try:
    child = subprocess.run(command, input=json.dumps(texts).encode(), capture_output=True,
                           env=environment, timeout=2 * SECONDS)
  except subprocess.TimeoutExpired:
    raise UsageError(f'{path} is not used: it took more than {2 * SECONDS} s to open it and read '
                     f'{len(texts)} short texts') from None
  if child.returncode == REFUSED:
    raise UsageError(f'{path} is not a tokenizer.json that the tokenizers library reads: '
                     f'{child.stdout.decode("utf-8", "replace")}')
  if child.returncode:
    raise UsageError(f'{path} is not used: opening it and reading {len(texts)} short texts ended a '
                     f'process with a limit of {SECONDS} s and {MEMORY >> 30} GiB '
                     f'(exit code {child.returncode})')


def _main(path: str) -> int:
  limits = ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0))
  for kind, limit in limits:
    with contextlib.suppress(ValueError, OSError):       # not every system has each of them
      resource.setrlimit(kind, (limit, limit))
  texts = json.load(sys.stdin)
  import tokenizers
  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in texts:
      ids = tokenizer.encode(text).ids
      tokenizer.decode(ids)
  except BaseException as e:       # a panic of Rust is a BaseException
    print(' '.join(str(e).split())[:200], end='')
    return REFUSED
  return 0


if __name__ == '__main__':
  # Not sys.exit: threads of a library that panicked may never end.
  code = _main(sys.argv[1])
  sys.stdout.flush()
  os._exit(code)
