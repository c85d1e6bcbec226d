"""t5lab params --config FILE[:ARG] | --workdir DIR  [--json]

Lists the parameters of a model: path, shape, dtype, logical axes, the mesh axes that the config's
rules split them over, and the number of elements. With adapters (lora.rank), these are listed.
Nothing is allocated, so the model may be of any size.
"""

import collections
import json

from t5lab import config
from t5lab.commands import Parser, split_overrides
from t5lab.errors import UsageError


def main(argv: list[str]) -> int:
  argv, overrides = split_overrides(argv)
  parser = Parser('t5lab params', description=__doc__)
  parser.add_argument('--config', metavar='FILE[:ARG]', help='a config file')
  parser.add_argument('--workdir', help='a run or converted checkpoint, instead of a config')
  parser.add_argument('--json', action='store_true', help='print one JSON object and nothing else')
  args = parser.parse_args(argv)
  if bool(args.config) == bool(args.workdir):
    raise UsageError('params needs --config or --workdir, and not both')

  from t5lab.programs import build, loading
  if args.config:
    c = config.load(args.config, overrides)
  else:
    c = loading.read_config(args.workdir)
    config.apply(c, overrides)
  rows = build.parameter_rows(c)
  if args.json:
    print(json.dumps({'family': c.family, 'rules': c.rules,
                      'total': sum(row['count'] for row in rows), 'parameters': rows}, indent=1))
  else:
    show(c, rows)
  return 0


def show(c, rows: list[dict]) -> None:
  """Prints a line for each parameter, then the totals."""
  print(f'{c.family}, rules {c.rules}')
  lines = [('path', 'count', 'dtype', 'shape', 'axes')]
  for row in rows:
    lines.append((row['path'], f'{row["count"]:,}', row['dtype'],
                  ' '.join(map(str, row['shape'])), _axes(row)))
  width = [max(map(len, column)) for column in zip(*lines)]
  for path, count, dtype, shape, axes in lines:
    print(f'{path:{width[0]}}  {count:>{width[1]}}  {dtype:{width[2]}}  {shape:{width[3]}}  {axes}')

  by_module = collections.Counter()
  for row in rows:
    by_module[row['path'].split('/')[0]] += row['count']
  total = by_module.total()
  modules = ', '.join(f'{module} {count:,}' for module, count in by_module.items())
  print(f'{total:,} parameters ({modules}), {total * 4 / 2**20:,.1f} MiB in float32')


def _axes(row: dict) -> str:
  """'layers, embed → fsdp, heads → model'."""
  return ', '.join(f'{axis or "-"} → {"+".join(mesh_axes)}' if mesh_axes else axis or '-'
                   for axis, mesh_axes in zip(row['axes'], row['mesh_axes']))
