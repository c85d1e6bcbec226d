"""t5lab data clean|dedup|decontaminate|scrub|augment|vocab INPUT … --output FILE

Prepares a person's own text. `t5lab data clean --help` says the rest of each.

  clean           web pages by C4's rules
  dedup           drops rows that are there already, exactly or nearly
  decontaminate   finds, and drops, training rows that overlap with evaluations
  scrub           masks e-mail and IP addresses, phone and card numbers
  augment         adds noisy or back-translated copies of rows
  vocab           trains a sentencepiece vocabulary

INPUT is files or globs, local or gs://, comma-separated or one after another: .jsonl, .csv, .tsv,
.txt, each also .gz or .zst, .parquet, or a folder that Hugging Face's save_to_disk wrote. Rows are
streamed, and go to OUTPUT as JSON lines (.jsonl, .jsonl.gz or .jsonl.zst) with the fields they had;
OUTPUT.report.json says what was done: inputs, counts and examples for each rule, settings, seconds.
Both appear whole or not at all. Progress goes to standard error.
"""

import argparse
import functools
import sys

from t5lab.commands import Parser
from t5lab.errors import UsageError

BACK_TRANSLATION = 'back_translation'


def main(argv: list[str] | None = None) -> int:
  args = parser().parse_args(sys.argv[1:] if argv is None else argv)
  job = args.run(args)
  written = f"{job.counts['written']:,} rows written, " if 'written' in job.counts else ''
  print(f"{args.output}: {written}{job.counts['read']:,} read · {job.report_path}")
  return 0


def parser() -> Parser:
  top = Parser('t5lab data', description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
  tools = top.add_subparsers(dest='tool', metavar='TOOL', required=True)

  p = _add(tools, 'clean', _clean, 'Cleans web pages by the rules that made C4.')
  p.add_argument('--rules', help='comma-separated: these only; default: all below')
  p.add_argument('--without', help='comma-separated: not these')
  p.add_argument('--bad-words', metavar='FILE', help='a word or phrase a line, for rule bad_words')
  p.add_argument('--language', metavar='CODE',
                 help='as en: keep pages in this language only, by py3langid, for rule language')

  p = _add(tools, 'dedup', _dedup, 'Drops rows that are there already; the first stays.')
  p.add_argument('--exact', action='store_true', help='only rows that are the same, not near ones')
  p.add_argument('--threshold', type=float, default=0.8,
                 help='Jaccard similarity of 5-word shingles that makes rows near (default 0.8)')

  p = _add(tools, 'decontaminate', _decontaminate,
           'Finds training rows that share 13 words in a row with an evaluation.')
  p.add_argument('--against', action='append', required=True, metavar='NAME=FILES',
                 help='an evaluation split, for the report by that name; give it again for more')
  p.add_argument('--against-field', action='append', metavar='NAME',
                 help="the evaluations' columns of text or lists of texts; default: as --field")
  p.add_argument('--mode', choices=('report', 'drop'), default='drop',
                 help='drop (default): write the rows without overlap; report: only the report')
  p.add_argument('--ngram', type=int, default=13, help='words in a row (default 13)')
  p.add_argument('--short', type=int, default=8,
                 help='words in a row for evaluation texts under --ngram words (default 8)')

  _add(tools, 'scrub', _scrub, 'Masks personal numbers and addresses.')

  p = _add(tools, 'augment', _augment, 'Adds copies of rows; the rows themselves stay.')
  p.add_argument('--method', required=True,
                 choices=('word_dropout', 'span_deletion', BACK_TRANSLATION))
  p.add_argument('--copies', type=int, default=1, help='of each row (default 1)')
  p.add_argument('--seed', type=int, default=0)
  p.add_argument('--rate', type=float,
                 help='share of words that go (default: word_dropout 0.1, span_deletion 0.15)')
  p.add_argument('--mean-span', type=float, help='words in a deleted span (default 3)')
  p.add_argument('--workdir', metavar='DIR', help='for back_translation: a run or converted '
                 'checkpoint from targets to sources; --field names the target column')
  p.add_argument('--source', metavar='NAME', help='for back_translation: the column to make')
  p.add_argument('--tag', default='', help='for back_translation: before what was made, as <BT>')

  p = _add(tools, 'vocab', _vocab, 'Trains a sentencepiece vocabulary with the ids of T5.')
  p.add_argument('--size', type=int, required=True, help='ids in all, 100 sentinels included')
  p.add_argument('--max-sentences', type=int, default=1_000_000,
                 help='lines of up to 1000 characters to learn from (default 1000000)')
  return top


def _add(tools, name: str, run, first_line: str) -> Parser:
  """The parser of one tool, with what all of them take. Its help has the tool's own text."""
  module = {'vocab': 'vocabulary'}.get(name, name)
  p = tools.add_parser(name, prog=f't5lab data {name}',
                       formatter_class=argparse.RawDescriptionHelpFormatter)
  p.format_help = functools.partial(_help, p, module, first_line)
  p.set_defaults(run=run)
  p.add_argument('inputs', nargs='+', metavar='INPUT',
                 help='files or globs: .jsonl .csv .tsv .txt (.gz, .zst), .parquet, saved datasets')
  p.add_argument('--output', required=True, metavar='FILE',
                 help='.model' if name == 'vocab' else '.jsonl, .jsonl.gz or .jsonl.zst')
  p.add_argument('--field', action='append', metavar='NAME',
                 help='the column of text (default text); for pairs give it twice')
  p.add_argument('--bad-rows', type=float, default=0.01, metavar='SHARE',
                 help='of rows that may be unreadable, skipped and counted (default 0.01; 0: none)')
  p.add_argument('--overwrite', action='store_true', help='replace an output that exists')
  return p


def _help(p: Parser, module: str, first_line: str) -> str:
  """With the text of the tool's module, which is read only here: the modules are slow to load."""
  import importlib
  text = importlib.import_module(f't5lab.tools.prepare.{module}').__doc__
  p.description = f'{first_line}\n\n{text}'
  return Parser.format_help(p)


def _job(args, **changes):
  from t5lab.tools.prepare.job import Job
  known = ('run', 'tool', 'inputs', 'output', 'field', 'overwrite')
  settings = {key: value for key, value in vars(args).items() if key not in known}
  return Job(args.tool, ','.join(args.inputs), args.output, args.field or ['text'],
             settings=settings, bad_rows=args.bad_rows, overwrite=args.overwrite, **changes)


def _clean(args):
  from t5lab.tools.prepare import clean
  split = lambda text: [name.strip() for name in (text or '').split(',') if name.strip()]
  rules = clean.select(split(args.rules), split(args.without), bad_words=bool(args.bad_words),
                       language=args.language or '')
  job = _job(args)
  job.settings['rules'] = [rule for rule in clean.RULES if rule in rules]
  clean.run(job, rules, bad_words=clean.read_bad_words(args.bad_words) if args.bad_words else (),
            language=clean.language_probability(args.language) if args.language else None)
  return job


def _dedup(args):
  from t5lab.tools.prepare import dedup
  job = _job(args)
  dedup.run(job, near=not args.exact, threshold=args.threshold)
  return job


def _decontaminate(args):
  from t5lab.data.sources import records
  from t5lab.tools.prepare import decontaminate
  against = {}
  for text in args.against:
    name, equals, files = text.partition('=')
    if not (name and equals and files):
      raise UsageError(f'--against {text}: expected NAME=FILES, as test=data/test.jsonl')
    if name in against:
      raise UsageError(f'--against {name} is given twice; name several files as {name}=a,b')
    against[name] = records.expand(files)
  job = _job(args)
  decontaminate.run(job, against, fields=args.against_field or (), drop=args.mode == 'drop',
                    ngram=args.ngram, short=args.short)
  return job


def _scrub(args):
  from t5lab.tools.prepare import scrub
  job = _job(args)
  scrub.run(job)
  return job


def _augment(args):
  from t5lab.tools.prepare import augment
  if args.method == BACK_TRANSLATION:
    return _back_translate(args, augment)
  for name in ('workdir', 'source', 'tag'):
    if getattr(args, name):
      raise UsageError(f'--{name} is for --method {BACK_TRANSLATION}')
  given = {'rate': args.rate, 'mean_span': args.mean_span}
  options = {**augment.DEFAULTS[args.method],
             **{name: value for name, value in given.items() if value is not None}}
  if 'mean_span' in options and args.method != 'span_deletion':
    raise UsageError('--mean-span is for --method span_deletion')
  job = _job(args)
  augment.run_noise(job, args.method, copies=args.copies, seed=args.seed, **options)
  return job


def _back_translate(args, augment):
  if not args.workdir or not args.source:
    raise UsageError(f'--method {BACK_TRANSLATION} needs --workdir DIR and --source NAME')
  if len(args.field or []) != 1 or args.source in args.field:
    raise UsageError(f'--method {BACK_TRANSLATION} needs one --field, the target, which is not '
                     f'--source {args.source}')
  if args.copies != 1:
    raise UsageError(f'--copies {args.copies}: a back-translation is searched, not sampled: 1')
  for name in ('rate', 'mean_span'):
    if getattr(args, name) is not None:
      raise UsageError(f'--{name.replace("_", "-")} is not for --method {BACK_TRANSLATION}')
  job = _job(args)                     # what is wrong with the files, before the model is loaded
  from t5lab.commands import use_compilation_cache
  from t5lab.programs import lab as labs
  use_compilation_cache()
  lab = labs.load(args.workdir)
  augment.run_back_translation(job, functools.partial(lab.generate, temperature=0.), args.source,
                               tag=args.tag)
  return job


def _vocab(args):
  from t5lab.tools.prepare import vocabulary
  if args.size <= 100 + 3 + 256:
    raise UsageError(f'--size {args.size}: 100 sentinels, 3 special ids and 256 bytes leave none '
                     'for pieces; take 512 at least')
  if args.max_sentences < 1:
    raise UsageError(f'--max-sentences {args.max_sentences}: at least 1')
  job = _job(args, ends=('.model',))
  vocabulary.run(job, args.size, args.max_sentences)
  return job

