"""t5lab convert --from hf|t5x|gguf|t5lab --to t5lab|hf|t5x SRC DST
t5lab convert --explain SRC         says what SRC is and whether it converts, and writes nothing

Converts weights from one format to another and verifies them before DST exists: our logits and
greedy decoding must agree with Hugging Face's implementation (pip install 't5lab[parity]').
Without it, golden vectors and the bit-equal round trip must hold. DST/certificate.json records
which check was made and the differences.

  hf     a directory with config.json and safetensors, or a LoRA adapter of PEFT and --base;
         tokenizer files are copied along
  t5x    a checkpoint_<step> directory, msgpack and zarr or Orbax, scanned or not; give its
         vocabulary with --vocab; Adafactor's slots are converted too
  gguf   a .gguf file of the LLaMA architecture, also split, with its tokenizer (only --from)
  t5lab  the directory of a run (its averaged weights if it keeps them, adapters merged) or DST of
         another conversion; t5lab.load, eval, infer and init.path read it
"""

import functools
import resource
import sys
import textwrap
import time

from t5lab import files
from t5lab.commands import Parser, use_compilation_cache
from t5lab.errors import DataError, UsageError


def main(argv: list[str]) -> int:
  args = _parse(argv)
  from t5lab.tools.interop import convert, explain
  use_compilation_cache()
  if args.explain:
    args.from_ = args.from_ or explain.guess_format(args.src)
  _check(args)
  start = time.perf_counter()
  progress = lambda total: files.Progress('reading', 'tensors', total, file=sys.stdout, every=5.)
  open_source = {'hf': lambda: convert.read_hf(args.src, args.allow_pickle, progress, args.base),
                 't5x': lambda: convert.read_t5x(args.src, args.vocab, progress),
                 'gguf': lambda: convert.read_gguf(args.src, progress),
                 't5lab': lambda: convert.read_t5lab(args.src, args.step, args.weights)}[args.from_]
  log = functools.partial(print, flush=True)
  try:
    if args.explain:
      declared = explain.declared(args.src) if args.from_ == 'hf' else []
      for what, text in [('format', args.from_), *declared]:
        log(f'{what + ":":<24}{text}')
      for what, text in explain.lines(open_source()):
        log(f'{what + ":":<24}{text}')
      return 0
    convert.convert(open_source(), args.dst, args.to, log=log, scanned=args.scanned,
                    form='orbax' if args.orbax else 't5x', use_reference=not args.golden)
  except DataError as e:            # raised for the vocabulary, which is an argument here
    raise UsageError(str(e)) from e
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  print(f'{args.dst}: written in {time.perf_counter() - start:.0f} s, peak memory {peak:.2f} GB')
  return 0


def _parse(argv):
  parser = Parser('t5lab convert', description=_help())
  parser.add_argument('src', metavar='SRC')
  parser.add_argument('dst', metavar='DST', nargs='?', help='a directory that does not exist yet')
  parser.add_argument('--from', dest='from_', choices=('hf', 't5x', 'gguf', 't5lab'))
  parser.add_argument('--to', choices=('t5lab', 'hf', 't5x'))
  parser.add_argument('--explain', action='store_true',
                      help='say what SRC is, without reading its arrays')
  parser.add_argument('--allow-pickle', action='store_true',
                      help="read pytorch_model.bin, with torch's weights-only loader")
  parser.add_argument('--vocab', default='', help='for --from t5x: a name or path, like data.vocab')
  parser.add_argument('--step', default='latest', help='for --from t5lab: latest, best or a number')
  parser.add_argument('--weights', choices=('ema', 'raw'), help='for --from t5lab')
  parser.add_argument('--scanned', action='store_true', help="for --to t5x: scalable_t5's layout")
  parser.add_argument('--orbax', action='store_true', help="for --to t5x: T5X's Orbax form")
  parser.add_argument('--golden', action='store_true',
                      help='verify with golden vectors even if Hugging Face is installed')
  parser.add_argument('--base', metavar='DIR',
                      help='for --from hf: the model whose LoRA adapter (PEFT) SRC is')
  return parser.parse_args(argv)


def _check(args) -> None:
  """UsageError for arguments that are missing or do not go together."""
  missing = [name for name, value in (('DST', args.dst), ('--from', args.from_), ('--to', args.to))
             if not value]
  if missing and not args.explain:
    raise UsageError(f'convert needs {", ".join(missing)}; or --explain SRC alone')
  if args.explain and (args.dst or args.to):
    raise UsageError('--explain writes nothing: leave out DST and --to')
  for name, applies in (('vocab', args.from_ == 't5x'), ('weights', args.from_ == 't5lab'),
                        ('base', args.from_ == 'hf'),
                        ('scanned', args.to == 't5x'), ('orbax', args.to == 't5x')):
    if getattr(args, name) and not applies:
      raise UsageError(f'--{name} does not apply to --from {args.from_} --to {args.to}')


def _help() -> str:
  """Returns the description with the architectures that convert."""
  from t5lab.tools.interop import architectures
  names = ', '.join(row.title for row in architectures.TABLE)
  lines = textwrap.fill(f'Architectures of hf: {names}.', 78)
  return f'{__doc__}\n{lines}\n'
