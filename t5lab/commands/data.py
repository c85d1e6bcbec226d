"""t5lab data clean|dedup|decontaminate|scrub|augment|vocab INPUT … --output FILE

Prepares your own text. `t5lab data TOOL --help` describes each tool.

  clean           clean web pages with the rules of C4
  dedup           drop exact and near duplicates
  decontaminate   find, and drop, training records that overlap with evaluation data
  scrub           mask e-mail and IP addresses, phone and card numbers
  augment         add noisy or back-translated copies of records
  vocab           train a sentencepiece vocabulary

INPUT is one or more files or globs, local or gs://, separated by commas or spaces: .jsonl, .csv,
.tsv and .txt (each also .gz or .zst), .parquet, or a folder written by Hugging Face's save_to_disk.
Records are streamed to OUTPUT as JSON lines (.jsonl, .jsonl.gz or .jsonl.zst) and keep all their
fields. OUTPUT.report.json lists the inputs, counts and examples for each rule, the settings and the
seconds taken. Both files are written completely or not at all. Progress is printed on standard
error.
"""

import functools

from t5lab.commands import Parser, use_compilation_cache
from t5lab.data.sources import records
from t5lab.errors import UsageError
from t5lab.tools.prepare import augment, clean, decontaminate, dedup, scrub, vocabulary
from t5lab.tools.prepare.job import OUTPUT_SUFFIXES, PrepareJob

BACK_TRANSLATION = 'back_translation'


def main(argv: list[str]) -> int:
  args = parser().parse_args(argv)
  not_settings = ('run', 'tool', 'inputs', 'output', 'field', 'overwrite')
  settings = {key: value for key, value in vars(args).items() if key not in not_settings}
  job = PrepareJob(args.tool, ','.join(args.inputs), args.output, args.field or ['text'],
                   settings=settings, bad_rows=args.bad_rows, overwrite=args.overwrite,
                   suffixes=OUTPUT_SUFFIXES if args.tool != 'vocab' else ('.model',))
  args.run(args, job)
  counts = job.counts
  written = f'{counts["written"]:,} records written, ' if 'written' in counts else ''
  print(f'{args.output}: {written}{counts["read"]:,} read · {job.report_path}')
  return 0


def parser() -> Parser:
  top = Parser('t5lab data', description=__doc__)
  tools = top.add_subparsers(dest='tool', metavar='TOOL', required=True)

  add = _add_tool(tools, 'clean', clean, _clean)
  add('--rules', metavar='RULES',
      help='comma-separated rules to apply (default: all; bad_words and language only if their '
           'option is given)')
  add('--without', metavar='RULES', help='comma-separated rules to leave out')
  add('--bad-words', metavar='FILE', help='a word or phrase per line, for rule bad_words')
  add('--language', metavar='CODE',
      help='keep only pages in this language, e.g. en, for rule language (needs py3langid)')

  add = _add_tool(tools, 'dedup', dedup, _dedup)
  add('--exact', action='store_true', help='drop only exact duplicates (default: near ones too)')
  add('--threshold', type=float, default=0.8, metavar='SIMILARITY',
      help='Jaccard similarity of 5-word shingles from which records count as near, 0.03 to 1 '
           '(default: 0.8)')

  add = _add_tool(tools, 'decontaminate', decontaminate, _decontaminate)
  add('--against', action='append', required=True, metavar='NAME=FILES',
      help='an evaluation split and its name in the report; may be repeated')
  add('--against-field', action='append', metavar='NAME',
      help='a column of the evaluations that holds text or lists of texts; may be repeated '
           '(default: those of --field)')
  add('--mode', choices=('report', 'drop'), default='drop',
      help='drop: write the records without overlap; report: write only the report (default: drop)')
  add('--ngram', type=int, default=13, metavar='WORDS',
      help='number of consecutive shared words that is an overlap (default: 13)')
  add('--short', type=int, default=8, metavar='WORDS',
      help='the same for evaluation texts of fewer than --ngram words (default: 8)')

  _add_tool(tools, 'scrub', scrub, lambda args, job: scrub.run(job))

  add = _add_tool(tools, 'augment', augment, _augment)
  add('--method', required=True, choices=('word_dropout', 'span_deletion', BACK_TRANSLATION))
  add('--copies', type=int, default=1, help='noisy copies per record (default: 1)')
  add('--seed', type=int, default=0, help='seed of the noise (default: 0)')
  add('--rate', type=float, metavar='FRACTION',
      help='fraction of the words to drop (default: 0.1 for word_dropout, 0.15 for span_deletion)')
  add('--mean-span', type=float, metavar='WORDS',
      help='mean length of a deleted span in words (default: 3)')
  add('--workdir', metavar='DIR',
      help='for back_translation: a run or converted checkpoint that maps targets to sources; '
           '--field names the target column')
  add('--source', metavar='NAME', help='for back_translation: the column to generate')
  add('--tag', default='', metavar='TEXT',
      help='for back_translation: text put before each generated source, e.g. <BT> (default: none)')

  add = _add_tool(tools, 'vocab', vocabulary, _vocab)
  add('--size', type=int, required=True,
      help='number of ids, including 100 sentinels; at least 512 is recommended')
  add('--max-sentences', type=int, default=1_000_000, metavar='N',
      help='lines of up to 1000 characters to train on (default: 1000000)')
  return top


def _add_tool(tools, name: str, module, run):
  """Adds the parser of one tool, with the options of all tools -> its add_argument."""
  p = tools.add_parser(name, prog=f't5lab data {name}', description=module.__doc__)
  p.set_defaults(run=run)
  add = p.add_argument
  add('inputs', nargs='+', metavar='INPUT',
      help='files or globs: .jsonl .csv .tsv .txt (.gz, .zst), .parquet, saved datasets')
  add('--output', required=True, metavar='FILE',
      help='.model' if name == 'vocab' else '.jsonl, .jsonl.gz or .jsonl.zst')
  add('--field', action='append', metavar='NAME',
      help='a text column; repeat it for pairs (default: text)')
  add('--bad-rows', type=float, default=0.01, metavar='FRACTION',
      help='fraction of records that may be unreadable; they are skipped and counted (default: '
           '0.01; 0: none)')
  add('--overwrite', action='store_true', help='replace an existing output')
  return add


def _clean(args, job):
  rules = clean.select(
      records.split_patterns(args.rules or ''), records.split_patterns(args.without or ''),
      bad_words=args.bad_words, language=args.language)
  job.settings['rules'] = [rule for rule in clean.RULES if rule in rules]
  clean.run(job, rules, bad_words=clean.read_bad_words(args.bad_words) if args.bad_words else (),
            language=clean.language_probability(args.language) if args.language else None)


def _dedup(args, job):
  dedup.run(job, near=not args.exact, threshold=args.threshold)


def _decontaminate(args, job):
  against = {}
  for text in args.against:
    name, _, files = text.partition('=')
    if not (name and files):
      raise UsageError(f'--against must be NAME=FILES, e.g. test=data/test.jsonl, got {text}')
    if name in against:
      raise UsageError(f'--against {name} is given twice; list several files as {name}=a,b')
    against[name] = records.expand(files)
  decontaminate.run(job, against, fields=args.against_field or (), drop=args.mode == 'drop',
                    ngram=args.ngram, short=args.short)


def _augment(args, job):
  given = {name: getattr(args, name) for name in ('rate', 'mean_span')
           if getattr(args, name) is not None}
  if args.method == BACK_TRANSLATION:
    _back_translate(args, job, given)
    return
  for name in ('workdir', 'source', 'tag'):
    if getattr(args, name):
      raise UsageError(f'--{name} needs --method {BACK_TRANSLATION}, got {args.method}')
  if 'mean_span' in given and args.method != 'span_deletion':
    raise UsageError(f'--mean-span needs --method span_deletion, got {args.method}')
  augment.run_noise(job, args.method, copies=args.copies, seed=args.seed,
                    **{**augment.DEFAULTS[args.method], **given})


def _back_translate(args, job, given):
  if not args.workdir or not args.source:
    raise UsageError(f'--method {BACK_TRANSLATION} needs --workdir DIR and --source NAME')
  if len(args.field or []) != 1 or args.source in args.field:
    raise UsageError(f'--method {BACK_TRANSLATION} needs one --field, the target column, other '
                     f'than --source {args.source}')
  if args.copies != 1:
    raise UsageError(f'--copies must be 1 with --method {BACK_TRANSLATION}, which is greedy; '
                     f'got {args.copies}')
  if given:
    name = next(iter(given)).replace('_', '-')
    raise UsageError(f'--{name} cannot be used with --method {BACK_TRANSLATION}')
  from t5lab.programs import lab
  use_compilation_cache()
  generate = functools.partial(lab.load(args.workdir).generate, temperature=0.)
  augment.run_back_translation(job, generate, args.source, tag=args.tag)


def _vocab(args, job):
  least = 100 + 3 + 256
  if args.size <= least:
    raise UsageError(f'--size must be above {least} (100 sentinels, 3 special ids, 256 bytes), got '
                     f'{args.size}; at least 512 is recommended')
  if args.max_sentences < 1:
    raise UsageError(f'--max-sentences must be at least 1, got {args.max_sentences}')
  vocabulary.run(job, args.size, args.max_sentences)
