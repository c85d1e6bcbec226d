"""t5lab convert --from hf|t5x|gguf|t5lab --to t5lab|hf|t5x SRC DST

Weights from one form to another, proven before DST exists: ours and Hugging Face's implementation
(pip install 't5lab[parity]') must agree on logits and greedy decoding, or, without it, golden
vectors and the bit-equal round trip must hold; DST/certificate.json says which and how well.

  hf     a directory with config.json and safetensors (T5, mT5, umT5, ByT5, LongT5, BART, GPT-2,
         LLaMA, BERT); tokenizer files are carried along
  t5x    a checkpoint_<step> directory, msgpack and zarr or Orbax, scanned or not; name its
         vocabulary with --vocab; Adafactor's slots come along
  gguf   a .gguf file of the LLaMA architecture, its tokenizer included (only --from)
  t5lab  a run's directory (averaged weights where it keeps them, adapters merged) or DST of another
         conversion; t5lab.load, eval and infer take it, and configs as init.path
"""

import argparse
import resource
import sys
import time

from t5lab.commands import Parser, use_compilation_cache
from t5lab.errors import DataError, UsageError


def main(argv: list[str] | None = None) -> int:
  parser = Parser('t5lab convert', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('src', metavar='SRC')
  parser.add_argument('dst', metavar='DST', help='a directory that does not exist yet')
  parser.add_argument('--from', dest='from_', required=True, choices=('hf', 't5x', 'gguf', 't5lab'))
  parser.add_argument('--to', required=True, choices=('t5lab', 'hf', 't5x'))
  parser.add_argument('--allow-pickle', action='store_true',
                      help="read pytorch_model.bin, with torch's weights-only loader")
  parser.add_argument('--vocab', default='', help='of --from t5x: a name or path, as data.vocab')
  parser.add_argument('--step', default='latest', help='of --from t5lab: latest, best, or a number')
  parser.add_argument('--weights', choices=('ema', 'raw'), help='of --from t5lab')
  parser.add_argument('--scanned', action='store_true', help="of --to t5x: scalable_t5's layout")
  parser.add_argument('--orbax', action='store_true', help="of --to t5x: T5X's Orbax form")
  parser.add_argument('--golden', action='store_true',
                      help='certify by golden vectors even where Hugging Face is installed')
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  for name, used in (('vocab', args.from_ == 't5x'), ('weights', args.from_ == 't5lab'),
                     ('scanned', args.to == 't5x'), ('orbax', args.to == 't5x')):
    if getattr(args, name) and not used:
      raise UsageError(f'--{name} has no meaning for --from {args.from_} --to {args.to}')

  from t5lab.tools.interop import convert
  use_compilation_cache()
  began = time.perf_counter()
  try:
    if args.from_ == 'hf':
      source = convert.read_hf(args.src, args.allow_pickle, tick=Progress('reading'))
    elif args.from_ == 'gguf':
      source = convert.read_gguf(args.src, tick=Progress('reading'))
    elif args.from_ == 't5x':
      source = convert.read_t5x(args.src, args.vocab, tick=Progress('reading'))
    else:
      source = convert.read_t5lab(args.src, args.step, args.weights)
    convert.convert(source, args.dst, args.to, say=lambda line: print(line, flush=True),
                    scanned=args.scanned, form='orbax' if args.orbax else 't5x',
                    use_reference=not args.golden)
  except DataError as e:            # a vocabulary that cannot be read is a source that cannot be
    raise UsageError(str(e)) from e
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  print(f'{args.dst}: written in {time.perf_counter() - began:.0f} s, peak memory {peak:.2f} GB')
  return 0


class Progress:
  """tick(done, total): a line with the time that is left, every few seconds."""

  def __init__(self, what: str, every: float = 5.):
    self._what, self._every = what, every
    self._began = self._said = None

  def __call__(self, done: int, total: int) -> None:
    now = time.perf_counter()
    self._began = self._began or now
    self._said = self._said or now
    if now - self._said < self._every or done == total:
      return
    self._said = now
    left = (now - self._began) / done * (total - done)
    print(f'{self._what} {done}/{total} tensors · ETA {int(left) // 60}:{int(left) % 60:02d}',
          flush=True)

