"""Prints plans as tables of at most 100 columns. Estimates are labelled as such."""

import textwrap

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t5lab.tools.planning.chips import GIB
from t5lab.tools.planning.planned_step import mesh_text

WIDTH = 100


def show(plan: dict) -> None:
  """Prints a plan of estimate.plan."""
  out = Console(width=WIDTH, highlight=False)
  _head(plan, out)
  _memory(plan, out)
  if 'step_seconds' not in plan:
    return
  _time(plan, out)
  _traffic(plan, out)
  _warnings(plan, out)
  if 'run' in plan:
    _money(plan, out)
  out.print('\n[bold]Assumptions[/]')
  for line in plan['assumptions']:
    out.print(escape(textwrap.fill(line, WIDTH, initial_indent='  · ', subsequent_indent='    ')))


def _head(p, out):
  versions = ' '.join(f'{name} {version}' for name, version in p['versions'].items() if version)
  out.print(f'[bold]{p["family"]}[/] {p["what"]} on [bold]{p["topology"]}[/] ({p["chips"]} chips)')
  lengths = '+'.join(str(n) for n in p['lengths'] if n)
  micro = f' · {p["microbatches"]} microbatches' if p['microbatches'] > 1 else ''
  out.print(f'{p["parameters"]:,} parameters · {mesh_text(p["mesh"])} · rules {p["rules"]} · '
            f'remat {p["remat"]} · {p["dtype"]} · {p["rows"]} rows of {lengths}{micro}')
  if p['source'] == 'compiler':
    cached = 'cached by an earlier run, ' if p['cached'] else ''
    out.print(f'compiled by libtpu ({cached}{p["compile_seconds"]:.0f} s) · {versions}')
  else:
    out.print('[bold yellow]ANALYTIC ESTIMATE[/]: libtpu is not installed, so nothing was '
              "compiled; pip install 't5lab\\[tpu]' for the compiler's numbers")


def _memory(p, out):
  h = p['hbm']
  fits = '[green]fits[/]' if p['fits'] else '[bold red]does NOT fit[/]'
  out.print(f'\n[bold]Memory of a chip[/]: {fits}, {gib(h["total"])} of {gib(h["usable"])} usable, '
            f'headroom {gib(h["headroom"])}')
  table = _key_value_table()
  scale = 50 / max(h['usable'], h['total'])
  for kind, size in h['kinds'].items():
    if size > 0:
      table.add_row(kind, gib(size), '█' * round(size * scale) or '▏')
    if kind.startswith('temporaries'):
      for purpose, part in h['of_temporaries'].items():
        table.add_row(f'  including: {purpose}', gib(part), '')
  out.print(table)
  if h['of_temporaries'] and p['source'] == 'compiler':
    out.print('  (they are not all alive at once, so they need not add up)')
  if 'unfit' in p:
    out.print(f'  the compiler: {escape(p["unfit"][:600])}')
  for row in p.get('largest_buffers', [])[:4]:
    _print_op(out, f'  {gib(row["bytes"]):>10} {row["shape"]} ', row['where'])


def _time(p, out):
  out.print(f'\n[bold]A step, estimated[/]: {ms(p["step_seconds"])}, MFU {p["mfu"]:.1%}, '
            f'{p["tokens_per_second_chip"]:,.0f} tokens/s/chip; limited by '
            f'[bold]{p["limiting"]}[/]')
  table = _key_value_table()
  source = 'estimated cycles' if p['source'] == 'compiler' else 'formula'
  table.add_row('compute', ms(p['compute_seconds']), source)
  network = ''
  if 'collective_seconds' in p:
    network = f'of {ms(p["collective_seconds"])} on the network'
  table.add_row('waiting for collectives', ms(p['exposed_seconds']), network)
  if 'wait_seconds' in p:
    table.add_row('waiting for copies', ms(p['wait_seconds']), 'between HBM and VMEM')
  table.add_row('model FLOPs', tera(p['model_flops']), f'{p["what"]}, per chip')
  if 'hlo_flops' in p:
    table.add_row('program FLOPs', tera(p['hlo_flops']),
                  f'{p["flops_ratio"]:.2f} x the model\'s, with all iterations of loops')
  if 'hbm_bytes' in p:
    table.add_row('bytes to and from HBM', gib(p['hbm_bytes']),
                  f'{ms(p["limits"]["HBM bandwidth"])} at full bandwidth')
  out.print(table)
  if p.get('unpriced'):
    out.print(f'  not counted, because the compiler gives no cost: {p["unpriced_count"]} '
              f'operations, at least {ms(p["unpriced_floor_seconds"])}')
    for row in p['unpriced'][:3]:
      _print_op(out, f'  {gib(row["bytes"]):>10} {row["count"]} x ', row['op'])
  if p.get('hottest'):
    out.print('  most of the compute:')
  for row in p.get('hottest', [])[:5]:
    _print_op(out, f'  {ms(row["seconds"]):>10} ', row['op'])


def _traffic(p, out):
  rows = p['collectives']
  if not rows:
    return
  head = f'\n[bold]Collectives of a chip[/]: {gib(p["collective_bytes"])} sent'
  if 'async_share' in p:
    head += (f', {p["async_share"]:.0%} of their time asynchronous, {p["hidden_share"]:.0%} '
             'behind compute')
  if p.get('fsdp_minimum'):
    times = p['collective_bytes'] / p['fsdp_minimum']
    head += f'\n  {times:.2f} x the 6 bytes per parameter and microbatch that FSDP needs'
  out.print(head)
  table = Table(box=None, padding=(0, 2), header_style='dim')
  for name in ('kind', 'mesh axis', 'count', 'GiB', 'ms', 'async', 'waits ms'):
    table.add_column(name, justify='left' if name in ('kind', 'mesh axis') else 'right')
  for t in rows[:12]:
    table.add_row(t['kind'], t['where'], str(t['count']), f'{t["wire"] / GIB:.3f}',
                  f'{t["seconds"] * 1e3:.2f}', f'{t["asynchronous"] / t["seconds"]:.0%}'
                  if t['seconds'] else '', f'{t["exposed"] * 1e3:.2f}')
  out.print(table)


def _warnings(p, out):
  lines = []
  if whole := p['replicated']:
    size = sum(row['bytes'] for row in whole)
    lines.append(f'whole on every chip, larger than 64 MB: {len(whole)} tensors, {gib(size)} in '
                 f'all, e.g. {whole[0]["tensor"]}')
  for text in p.get('spmd_warnings') or []:
    lines.append(f'the partitioner replicates a tensor: {text}')
  if p.get('not_aliased'):
    lines.append(f'donated but not reused: {", ".join(p["not_aliased"][:5])}')
  for where in p.get('unknown_loops', []):
    lines.append(f'a loop of unknown length is counted once: {where}')
  out.print(f'\n[bold]Warnings[/]: {len(lines) or "none"}' + (
      '' if p['source'] == 'compiler' else " (the partitioner's need the compiler)"))
  for line in lines[:12]:
    out.print('  [yellow]![/] ' + escape(textwrap.fill(line, WIDTH, initial_indent='    ',
                                                       subsequent_indent='    ').lstrip()))


def _money(p, out):
  r = p['run']
  prices = ', '.join(f'{cost:,.0f} {r["currency"]} {kind}' for kind, cost in r['cost'].items())
  out.print(f'\n[bold]The whole run, estimated[/]: {p["steps"]:,} steps, {r["hours"]:,.1f} hours, '
            f'{r["chip_hours"]:,.0f} chip-hours')
  if prices:
    out.print(f'  {prices}')
    out.print(f'  prices of {r["price_date"]}: {r["price_note"]}')


def show_search(result: dict) -> None:
  """Prints a result of search.search, best first, and the lines to paste into the config."""
  out = Console(width=WIDTH, highlight=False)
  out.print(f'[bold]{result["family"]}[/] on [bold]{result["topology"]}[/]: {result["tried"]} '
            f'combinations, {result["fitting"]} fit by the formula, '
            f'{len(result["finalists"])} shown'
            + (', compiled' if result['source'] == 'compiler' else ' by the formula alone'))
  table = Table(box=None, padding=(0, 1), header_style='dim')
  for name in ('', 'mesh', 'rules', 'remat', 'micro', 'step ms', 'MFU', 'GiB', 'sent GiB',
               'formula'):
    table.add_column(name, justify='left' if name in ('', 'mesh', 'rules', 'remat') else 'right')
  for i, row in enumerate(result['finalists'], 1):
    plan = row['plan']
    if 'step_seconds' not in plan:
      numbers = ('no fit', '', gib(plan['hbm']['total']), '')
    else:
      numbers = (f'{plan["step_seconds"] * 1e3:.1f}' + '!' * (not plan['fits']),
                 f'{plan["mfu"]:.1%}', f'{plan["hbm"]["total"] / GIB:.2f}',
                 f'{plan["collective_bytes"] / GIB:.2f}')
    table.add_row(f'{i}{"*" * row["own"]}', mesh_text(row['mesh']), row['rules'],
                  row['remat'], str(row['microbatches']), *numbers,
                  f'{row["formula_seconds"] * 1e3:.1f}')
  out.print(table)
  if any(row['own'] for row in result['finalists']):
    out.print(' * the current config')
  if not result['best']:
    out.print('[bold red]None of them fits[/]: use more chips, a smaller batch or more '
              'microbatches')
    return
  out.print('\n[bold]For the config[/] (all numbers are estimates):')
  for line in result['best']['lines']:
    out.print(f'  {escape(line)}')
  out.print('or on the command line:')
  out.print(f'  {escape(" ".join(result["best"]["overrides"]))}', soft_wrap=True)


def gib(size: float) -> str:
  return f'{size / GIB:.2f} GiB' if size >= GIB / 100 or size < 0 else f'{size / 2 ** 20:.1f} MiB'


def ms(seconds: float) -> str:
  return f'{seconds:.2f} s' if seconds >= 10 else f'{seconds * 1e3:.2f} ms'


def tera(flops: float) -> str:
  return f'{flops / 1e12:.3f} T'


def _print_op(out, start: str, op_name: str) -> None:
  """Prints a line that ends in an op name, or in its end, which is the most specific part."""
  name = op_name.replace('jit(train_step)/', '').replace('Transformer.', '')
  width = WIDTH - len(start)
  out.print(escape(start + (name if len(name) <= width else '…' + name[-width + 1:])))


def _key_value_table() -> Table:
  table = Table(box=None, padding=(0, 2), show_header=False)
  for justify in ('left', 'right', 'left'):
    table.add_column(justify=justify)
  return table
