"""t5lab params --config FILE[:ARG] | --workdir DIR  [--json]

Lists the parameters of a model: path, shape, dtype, logical axes, the mesh axes that the config's
rules split them over, and the number of elements. With adapters (lora.rank), these are listed.
Nothing is allocated, so the model may be of any size.
"""

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
  header = {'path': 'path', 'count': 'count', 'dtype': 'dtype', 'shape': 'shape', 'axes': 'axes'}
  lines = [header] + [
      {'path': row['path'], 'count': f'{row["count"]:,}', 'dtype': row['dtype'],
       'shape': ' '.join(map(str, row['shape'])), 'axes': _axes(row)} for row in rows]
  width = {name: max(len(line[name]) for line in lines) for name in header}
  for line in lines:
    print(f'{line["path"]:{width["path"]}}  {line["count"]:>{width["count"]}}  '
          f'{line["dtype"]:{width["dtype"]}}  {line["shape"]:{width["shape"]}}  {line["axes"]}')

  total = sum(row['count'] for row in rows)
  by_module = {}
  for row in rows:
    module = row['path'].split('/')[0]
    by_module[module] = by_module.get(module, 0) + row['count']
  modules = ', '.join(f'{module} {count:,}' for module, count in by_module.items())
  print(f'{total:,} parameters ({modules}), {total * 4 / 2**20:,.1f} MiB in float32')


def _axes(row: dict) -> str:
  """'layers, embed → fsdp, heads → model'."""
  shown = []
  for axis, mesh_axes in zip(row['axes'], row['mesh_axes']):
    shown.append(f'{axis or "-"} → {"+".join(mesh_axes)}' if mesh_axes else axis or '-')
  return ', '.join(shown)
