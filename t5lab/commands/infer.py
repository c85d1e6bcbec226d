"""t5lab infer --workdir DIR [--task NAME] < lines > lines
t5lab infer --workdir DIR --input x.jsonl --output y.jsonl
t5lab infer --workdir DIR --chat < lines          each line a user's message, by the chat template
t5lab infer --workdir DIR --fill-mask < lines     BERT: the 5 best words for each [MASK]; a '|', or
                                                  in JSONL a list, between one mask and the next

DIR is a run, or what `t5lab convert` wrote. A line in, a line out, in order. Rows of JSONL, CSV,
TSV or Parquet are objects with the fields of the task (translation: en; question answering:
question and context; your own files: your columns) or {"inputs": the model's input as it is}; each
comes back as JSON with "output" added. Plain lines fill a task's only field. To make the inputs of
other columns than in training: --config.data.prompt='ask: {q}' or --config.data.fields.inputs=q.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
import sys

from t5lab.commands import Parser, split_overrides, use_compilation_cache
from t5lab.data.sources import record_formats
from t5lab.data.sources import records
from t5lab.data.tasks import own_files
from t5lab.errors import DataError, UsageError

CHUNK = 1024     # rows decoded before their output is written
MAY_CHANGE = ('data.prompt', 'data.fields.inputs')


def main(argv: list[str] | None = None) -> int:
  parser = Parser('t5lab infer', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--step', default='latest', help='latest (default), best, or a number')
  parser.add_argument('--weights', choices=('ema', 'raw'),
                      help='default: the average where the run keeps one')
  parser.add_argument('--task', help="whose prompt to put around each row; default: the run's own; "
                                     "'' for none")
  parser.add_argument('--input', help='.jsonl, .csv, .tsv or .parquet, or else text; default: '
                                      'standard input, as text')
  parser.add_argument('--output', help='a file; default: standard output')
  use = parser.add_mutually_exclusive_group()
  use.add_argument('--chat', action='store_true', help='rows are messages of a user to the model')
  use.add_argument('--fill-mask', action='store_true',
                   help='words for the mask tokens, with their probabilities')
  parser.add_argument('--max-length', type=int, help='most tokens generated')
  parser.add_argument('--beams', type=int, help='over 1: beam search')
  parser.add_argument('--temperature', type=float, help='0: greedy')
  parser.add_argument('--top-k', type=int)
  parser.add_argument('--top-p', type=float)
  parser.add_argument('--seed', type=int)
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  args = parser.parse_args(argv)
  for key in overrides:
    if key not in MAY_CHANGE:
      raise UsageError(f'--config.{key}: infer takes changes of {", ".join(MAY_CHANGE)} only')
  if args.task is not None and (args.chat or args.fill_mask):
    raise UsageError(f'--task {args.task} puts a prompt around texts, --chat and --fill-mask take '
                     'them as they are')

  from t5lab import config as configs
  from t5lab.programs import lab as labs
  use_compilation_cache()
  rows, as_json = read(args.input)
  if args.output and not Path(args.output).absolute().parent.is_dir():
    raise UsageError(f'--output {args.output}: its folder does not exist')
  lab = labs.load(args.workdir, args.step, args.weights)
  for key, value in overrides.items():
    configs.override(lab.config, key, value)
    lab.config.data.mixture = own_files.NAME
  if args.chat or args.fill_mask:
    texts = [_text(row, number) for number, row in enumerate(rows, start=1)]
  options = dict(length=args.max_length, beams=args.beams, temperature=args.temperature,
                 top_k=args.top_k, top_p=args.top_p, seed=args.seed)
  limit, cut = lab.config.data.lengths.inputs, 0
  with _writer(args.output) as write:
    if args.chat or args.fill_mask:
      for row, output in zip(rows, _use(lab, args, texts, options)):
        write(json.dumps({**row, 'output': output}, ensure_ascii=False) + '\n' if as_json else
              _line(output) + '\n')
      return 0
    for first in range(0, len(rows), CHUNK):
      part = rows[first:first + CHUNK]
      texts = [row.get('inputs') if isinstance(row, dict) and 'inputs' in row else row
               for row in part]
      plain = all(isinstance(row, dict) and 'inputs' in row for row in part)
      task = '' if plain and args.task is None else args.task
      cut += sum(limit and len(lab.tokens(text)) > limit for text in texts if isinstance(text, str))
      for row, output in zip(part, lab.generate(texts, task, **options)):
        if as_json:
          row = row if isinstance(row, dict) else {'inputs': row}
          write(json.dumps({**row, 'output': output}, ensure_ascii=False) + '\n')
        else:
          write(_line(output) + '\n')
      if args.output and len(rows) > CHUNK:
        print(f'{min(first + CHUNK, len(rows))}/{len(rows)}', file=sys.stderr)
  if cut:
    print(f't5lab: {cut} of {len(rows)} inputs are longer than the {limit} tokens that the model '
          'was trained on; their outputs may be poor', file=sys.stderr)
  return 0


def _text(row, number: int) -> str:
  text = row if isinstance(row, str) else row.get('inputs')
  if not isinstance(text, str):
    raise DataError(f'row {number}: expected {{"inputs": "…"}}, a text; found '
                    f'{json.dumps(row, ensure_ascii=False)[:80]}')
  return text


def _use(lab, args, texts, options):
  """What --chat and --fill-mask make of each text, as it comes."""
  if args.fill_mask:
    for masks in lab.fill_mask(texts):
      yield [[{'word': word, 'probability': round(p, 4)} for word, p in mask] for mask in masks]
  else:
    for text in texts:
      yield lab.chat([{'role': 'user', 'content': text}], **options)


def _line(output) -> str:
  """A line in, a line out."""
  if isinstance(output, list):
    return ' | '.join(' · '.join(f'{best["word"]} {best["probability"]:.4f}' for best in mask)
                      for mask in output)
  return output.replace('\n', ' ')


def read(path: str | None) -> tuple[list, bool]:
  """(rows, whether they are objects). A DataError names the file, the line and what is wrong."""
  if path and record_formats.is_table(path):
    return [row.fields for row in records.RecordReader([path], bad_rows=0, flag='')], True
  name = path or 'standard input'
  try:
    data = Path(path).read_bytes() if path else sys.stdin.buffer.read()
  except OSError as e:
    raise DataError(f'cannot read {name}: {e.strerror}') from e
  rows = []
  lines = data.removeprefix(b'\xef\xbb\xbf').split(b'\n')
  if lines and not lines[-1]:
    lines.pop()
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(line.rstrip(b'\r').decode('utf-8'))
    except UnicodeDecodeError as e:
      raise DataError(f'{name}:{number}: byte {e.start} (0x{line[e.start]:02x}) is not UTF-8; '
                      'convert the file, as with iconv -f latin1 -t utf-8') from e
  if not rows:
    raise DataError(f'{name} is empty')
  return rows, False


@contextlib.contextmanager
def _writer(path):
  """A write function; a file appears whole or not at all."""
  if not path:
    yield lambda text: (sys.stdout.write(text), sys.stdout.flush())
    return
  part = f'{path}.part'
  try:
    with open(part, 'w', encoding='utf-8') as f:
      yield f.write
    os.replace(part, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(part)
    raise

