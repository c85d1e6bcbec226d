"""t5lab train --config FILE[:ARG] --workdir DIR [--config.KEY=VALUE …]

Trains and evaluates. Stop it at any time and run the same command to resume; SIGTERM saves a
checkpoint first and exits with code 75. A workdir with another model or other data is rejected, and
the differences are listed.

For your own files: --config.data.files.train=x.jsonl --config.data.files.validation=y.tsv
--config.data.fields.inputs=COLUMN --config.data.fields.targets=COLUMN, and optionally
--config.data.prompt='ask: {COLUMN}' --config.data.metrics=squad,rouge. `t5lab inspect` with the
same options shows what the model will see.
"""

import os
import sys

from t5lab import config
from t5lab.commands import Parser, split_overrides, use_compilation_cache


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab train', description=__doc__)
  add = parser.add_argument
  add('--config', required=True, metavar='FILE[:ARG]',
      help='a config file; ARG is passed to its get_config, e.g. FILE:tiny')
  add('--workdir', required=True, metavar='DIR',
      help='folder for the checkpoints, metrics and predictions of the run')
  add('--resume', choices=('auto', 'never', 'must'), default='auto',
      help='auto: resume if the workdir has checkpoints; never: reject a workdir that has some; '
           'must: reject one that has none (default: auto)')
  add('--allow-data-change', action='store_true',
      help='resume even if the data differs from that of the checkpoint')
  args = parser.parse_args(argv)
  c = config.load(args.config, overrides)
  config.check_names(c)
  from t5lab.parallel import multihost
  from t5lab.programs import loop
  use_compilation_cache()
  result = loop.train(c, args.workdir, resume=args.resume,
                      allow_data_change=args.allow_data_change)
  if multihost.is_main():
    summary(c, args.workdir, result)
  result.check()
  return 0


def summary(c, workdir, result) -> None:
  """Prints the scores, a command to try next, and the paths of the output."""
  from t5lab.commands.eval import show
  from t5lab.data.tasks import prompts
  show(result, f'{workdir} · step {c.total_steps} · {c.eval.split}', c.eval.samples)
  program = 'python -m t5lab'
  if not sys.argv[0].endswith('__main__.py'):
    program = os.path.relpath(sys.argv[0])
  command = f'{program} infer --workdir {workdir}'
  if not c.model.dec_layers:
    use = '--classify' if c.model.classes else '--embed'
    print(f"Try your own:  echo 'Turn on the light' | {command} {use}")
  elif c.data.mixture in prompts.PROMPTS and len(prompts.fields(c.data.mixture)) == 1:
    example = 'lighthouse' if c.data.mixture == 'g2p_en_us' else 'Turn on the light'
    print(f"Try your own:  echo '{example}' | {command}")
  elif not c.model.enc_layers:
    print(f"Try your own:  echo 'Once upon a time' | {command}")
  else:
    print(f'Try your own:  {command} --input rows.jsonl --output out.jsonl')
  for name, path in (('checkpoints', 'checkpoints/'), ('metrics', 'metrics.jsonl'),
                     ('predictions', 'eval/'), ('TensorBoard', 'tensorboard/')):
    print(f'{name:>12}:  {os.path.join(workdir, path)}')
