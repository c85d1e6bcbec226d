"""t5lab train --config FILE[:ARG] --workdir DIR [--config.KEY=VALUE …]

Trains and evaluates. Run again, it goes on where it was: after a crash, a kill, or a SIGTERM, which
saves and exits 75. A workdir that holds another model or data is refused, naming what differs.

Your own files: --config.data.files.train=x.jsonl --config.data.files.validation=y.tsv
--config.data.fields.inputs=COLUMN --config.data.fields.targets=COLUMN, and if you like
--config.data.prompt='ask: {COLUMN}' --config.data.metrics=squad,rouge. `t5lab inspect` with the
same options shows what the model will see.
"""

import argparse
import os
import sys

from t5lab import config as configs
from t5lab.commands import Parser, split_overrides, use_compilation_cache


def main(argv: list[str] | None = None) -> int:
  argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
  parser = Parser('t5lab train', description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]',
                      help='a config file; ARG goes to its get_config, as :tiny')
  parser.add_argument('--workdir', required=True, help='where everything of this run goes')
  parser.add_argument('--resume', choices=('auto', 'never', 'must'), default='auto',
                      help='what to do with a workdir that has checkpoints: go on (auto), refuse '
                           'it (never), refuse one without (must)')
  parser.add_argument('--allow-data-change', action='store_true',
                      help='resume even though the data is not that of the checkpoint')
  args = parser.parse_args(argv)
  c = configs.load(args.config, overrides)
  configs.check_names(c)
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
  """What came out, what to do with it, and where it lies."""
  from t5lab.commands.eval import show
  from t5lab.data.tasks import prompts
  show(result, f'{workdir} · step {c.total_steps} · {c.eval.split}', c.eval.samples)
  command = f'{os.path.relpath(sys.argv[0])} infer --workdir {workdir}'
  if not c.model.dec_layers:
    use = 'classify' if c.model.classes else 'embed'
    print(f"Try your own:  t5lab.load('{workdir}').{use}(['Turn on the light'])  in Python")
  elif c.data.mixture in prompts.PROMPTS and len(prompts.fields(c.data.mixture)) == 1:
    example = 'lighthouse' if c.data.mixture == 'g2p_en_us' else 'Turn on the light'
    print(f"Try your own:  echo '{example}' | {command}")
  elif not c.model.enc_layers:
    print(f"Try your own:  echo 'Once upon a time' | {command}")
  else:
    print(f'Try your own:  {command} --input rows.jsonl --output out.jsonl')
  for what, where in (('checkpoints', 'checkpoints/'), ('metrics', 'metrics.jsonl'),
                      ('predictions', 'eval/'), ('TensorBoard', 'tensorboard/')):
    print(f'{what:>12}:  {os.path.join(workdir, where)}')

