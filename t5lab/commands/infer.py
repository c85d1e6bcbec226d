"""t5lab infer --workdir DIR [--task NAME] < lines > lines
t5lab infer --workdir DIR --input x.jsonl --output y.jsonl
t5lab infer --workdir DIR --chat < lines          each line is a user message, in the chat template
t5lab infer --workdir DIR --fill-mask < lines     BERT: the 5 best words for each [MASK]; masks are
                                                  separated by '|', or a list in JSONL
t5lab infer --workdir DIR --classify < lines      labels with their probabilities, the best first:
                                                  good 0.9912 · bad 0.0088, or in JSONL
                                                  [{"label": "good", "probability": 0.9912}, …];
                                                  a regression or a single label has a "score";
                                                  a classifier of tokens has a "piece" for each, a
                                                  question-answering head one "answer"
t5lab infer --workdir DIR --embed < lines         the vector of each line as a JSON list

DIR is a run or a checkpoint written by `t5lab convert`. Encoder-only models classify if they have
classes, and embed if they have no head at all, without being told to. A record for --classify may
hold a pair of texts, {"inputs": [TEXT, TEXT]}. Every input line or record gives one output line, in
order. A question-answering head takes records of question and context. Records of JSONL, CSV, TSV
or Parquet hold the fields of the task (translation: en; question answering: question and context;
your own files: your columns), or {"inputs": TEXT} with the exact input of the model. Each is
returned as JSON with "output" added. Plain lines fill the only field of a task. To build inputs
from other columns than in training: --config.data.prompt='ask: {q}' or
--config.data.fields.inputs=q.
"""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import sys

from t5lab import config, files
from t5lab.commands import Parser, split_overrides, use_compilation_cache
from t5lab.data.sources import record_formats, records
from t5lab.data.tasks import own_files
from t5lab.errors import DataError, UsageError

CHUNK = 1024     # records decoded before their output is written
MAY_CHANGE = ('data.prompt', 'data.fields.inputs')


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  args = _parse(argv)
  for key in overrides:
    if key not in MAY_CHANGE:
      raise UsageError(f'--config.{key} cannot be set for infer, only {" and ".join(MAY_CHANGE)}')
  if args.task is not None and args.use:
    raise UsageError(f'--task {args.task} adds a prompt, but --{args.use} takes texts as they are')
  for name in ('date', 'template'):
    if getattr(args, name) and args.use != 'chat':
      raise UsageError(f'--{name} is for --chat')

  from t5lab.programs import lab
  use_compilation_cache()
  inputs = read(args.input)
  if args.output and not Path(args.output).absolute().parent.is_dir():
    raise UsageError(f'--output {args.output}: its folder does not exist')
  model = lab.load(args.workdir, args.step, args.weights)
  for key, value in overrides.items():
    config.override(model.config, key, value)
    model.config.data.mixture = own_files.NAME

  use = args.use or _default_use(model)
  if args.task is not None and use != 'generate':
    raise UsageError(f'--task {args.task} adds a prompt, but this model can only {use}')
  outputs = _outputs(model, use, args, inputs)
  stdout = contextlib.nullcontext(sys.stdout)
  with (files.replacing(args.output, 'w') if args.output else stdout as out,
        files.Progress('infer', 'inputs', len(inputs)) as progress):
    for item, output in zip(inputs, outputs):
      if isinstance(item, dict):
        line = json.dumps({**item, 'output': output}, ensure_ascii=False)
      else:
        line = _one_line(output)
      print(line, file=out, flush=not args.output)
      if args.output:        # on a terminal the outputs themselves show the progress
        progress.add(1)
  if use == 'generate':
    _warn_of_long_inputs(model, inputs)
  return 0


def _parse(argv):
  parser = Parser('t5lab infer', description=__doc__)
  add = parser.add_argument
  add('--workdir', required=True, metavar='DIR',
      help='a run, or a checkpoint written by `t5lab convert`')
  add('--step', default='latest', help='latest, best, or a number (default: latest)')
  add('--weights', choices=('ema', 'raw'),
      help='averaged or raw weights (default: ema if the run has them)')
  add('--task', help="task whose prompt is added to the inputs, '' for none (default: the run's)")
  add('--input', metavar='FILE',
      help='.jsonl, .csv, .tsv or .parquet, otherwise text (default: text from standard input)')
  add('--output', metavar='FILE', help='default: standard output')
  use = parser.add_mutually_exclusive_group()
  for name, text in (('chat', 'treat each input as a user message'),
                     ('fill-mask', 'predict words and their probabilities for each mask'),
                     ('classify', 'the labels of each input with their probabilities'),
                     ('embed', 'the vector of each input')):
    use.add_argument(f'--{name}', action='store_const', dest='use', const=name, help=text)
  add('--template', default='', metavar='NAME',
      help='with --chat: one of several chat templates (default: the one named default)')
  add('--date', metavar='YYYY-MM-DD',
      help='with --chat: what a template that prints the date prints (default: today)')
  add('--max-length', type=int, metavar='TOKENS',
      help='maximum length of an output (default: eval.max_length of the config)')
  add('--beams', type=int, metavar='N', help='above 1: beam search (default: eval.beams)')
  add('--temperature', type=float, metavar='T',
      help='above 0: sample, 0: greedy (default: eval.temperature)')
  add('--top-k', type=int, metavar='K', help='sample from the K most likely tokens (default: all)')
  add('--top-p', type=float, metavar='P',
      help='sample from the most likely tokens that have probability P together (default: 1)')
  for name in ('source', 'target'):
    add(f'--{name}-language', metavar='CODE',
        help=f'{name} language of mBART, M2M100 and NLLB, as their tokenizers write it, e.g. '
             "deu_Latn (default: the model's)")
  add('--seed', type=int, help='seed of the sampling (default: 0)')
  return parser.parse_args(argv)


def _default_use(lab) -> str:
  """The use of a model without an option that names one."""
  model = lab.model
  if model.classes:
    return 'classify'
  if model.kind != 'encoder':
    return 'generate'
  if model.mlm_head:
    raise UsageError(f'{lab.name} is encoder-only and generates no text: use --fill-mask '
                     'or --embed')
  return 'embed'


def _outputs(model, use: str, args, inputs: list) -> Iterator:
  """Returns an iterator of outputs, one per input, in order."""
  options = dict(length=args.max_length, beams=args.beams, temperature=args.temperature,
                 top_k=args.top_k, top_p=args.top_p, seed=args.seed)
  languages = dict(source_language=args.source_language, target_language=args.target_language)
  if use == 'generate':
    return _generate(model, inputs, args.task, options | languages)
  if any(languages.values()):
    raise UsageError(f'--source-language and --target-language are for texts, not for --{use}')
  if use == 'classify' and model.model.class_of == 'span':
    return _answers(model, inputs)
  texts = [_text(item, number, pairs=use == 'classify')
           for number, item in enumerate(inputs, start=1)]
  if use == 'chat':
    options |= dict(template=args.template, date=args.date)
    return (model.chat([{'role': 'user', 'content': text}], place=place, **options)
            for place, text in enumerate(texts))
  if use == 'classify' and model.model.class_of == 'token':
    return ([{'piece': piece, 'label': label, 'probability': round(p, 4)}
             for piece, label, p in tags] for tags in model.tag(texts))
  if use == 'fill-mask':
    return ([[{'word': word, 'probability': round(p, 4)} for word, p in mask] for mask in masks]
            for masks in model.fill_mask(texts))
  run = model.classify if use == 'classify' else model.embed
  rows = (row for first in range(0, len(texts), CHUNK) for row in run(texts[first:first + CHUNK]))
  if use == 'classify':
    return (_classes(model, row) for row in rows)
  return ([float(str(x)) for x in row] for row in rows)      # the shortest float32 digits


def _answers(model, inputs) -> Iterator[list[dict]]:
  for number, item in enumerate(inputs, start=1):
    pair = [item.get(name) for name in ('question', 'context')] if isinstance(item, dict) else []
    if not pair or not all(isinstance(text, str) for text in pair):
      raise DataError(f'row {number} must be {{"question": TEXT, "context": TEXT}}, got '
                      f'{json.dumps(item, ensure_ascii=False, default=str)[:80]}')
    (answer, probability), = model.answer(pair[:1], pair[1:])
    yield [{'answer': answer, 'probability': round(probability, 4)}]


def _classes(model, row) -> list[dict]:
  """[{'label', 'probability'}, …], the best first; a score if there is no probability."""
  is_score = len(row) == 1 or model.config.eval.problem_type == 'regression'
  name = 'score' if is_score else 'probability'
  classes = [{'label': label, name: round(float(x), 4)} for label, x in zip(model.labels, row)]
  return sorted(classes, key=lambda c: -c[name])


def _generate(model, inputs, task, options) -> Iterator[str]:
  for first in range(0, len(inputs), CHUNK):
    chunk = inputs[first:first + CHUNK]
    # Records with "inputs" take no prompt, unless a task is named.
    is_plain = all(isinstance(item, dict) and 'inputs' in item for item in chunk)
    yield from model.generate([_model_input(item) for item in chunk],
                              '' if is_plain and task is None else task, place=first, **options)


def _model_input(item):
  return item['inputs'] if isinstance(item, dict) and 'inputs' in item else item


def _text(item, number: int, pairs: bool = False):
  text = item if isinstance(item, str) else item.get('inputs')
  is_pair = pairs and isinstance(text, list) and len(text) == 2
  if not all(isinstance(part, str) for part in (text if is_pair else [text])):
    form = '{"inputs": TEXT}' + ' or {"inputs": [TEXT, TEXT]}' * pairs
    raise DataError(f'row {number} must be {form}, got '
                    f'{json.dumps(item, ensure_ascii=False, default=str)[:80]}')
  return text


def _one_line(output) -> str:
  """Formats an output as a single line."""
  if isinstance(output, str):
    return output.replace('\n', ' ')
  if not output or isinstance(output[0], float):
    return json.dumps(output)
  groups = [output] if isinstance(output[0], dict) else output
  return ' | '.join(' · '.join(' '.join(x if isinstance(x, str) else f'{x:.4f}'
                                        for x in best.values()) for best in group)
                    for group in groups)


def _warn_of_long_inputs(model, inputs):
  limit = model.config.data.lengths.inputs
  texts = [text for text in map(_model_input, inputs) if isinstance(text, str)]
  count = sum(len(model.tokens(text)) > limit for text in texts) if limit else 0
  if count:
    print(f't5lab: {count} of {len(inputs)} inputs are longer than {limit} tokens, the limit in '
          'training; their outputs may be poor', file=sys.stderr)


def read(path: str | None) -> list:
  """Returns dicts from a table, otherwise lines of text.

  Raises DataError with the file, the line and the reason.
  """
  if path and record_formats.is_table(path):
    reader = records.RecordReader([path], bad_rows=0, flag='')
    return [record.fields for record in reader]
  name = path or 'standard input'
  try:
    data = Path(path).read_bytes() if path else sys.stdin.buffer.read()
  except OSError as e:
    raise DataError(f'cannot read {name}: {e.strerror}') from e
  lines = data.removeprefix(b'\xef\xbb\xbf').split(b'\n')
  if not lines[-1]:
    lines.pop()
  texts = []
  for number, line in enumerate(lines, start=1):
    try:
      texts.append(line.rstrip(b'\r').decode('utf-8'))
    except UnicodeDecodeError as e:
      raise DataError(f'{name}:{number}: byte {e.start} (0x{line[e.start]:02x}) is not UTF-8; '
                      'convert the file, e.g. with iconv -f latin1 -t utf-8') from e
  if not texts:
    raise DataError(f'{name} is empty')
  return texts
