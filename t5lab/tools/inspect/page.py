"""The page of `t5lab inspect`: one HTML file without scripts or links, for light and dark mode.

All text from the data passes through view.printable and html.escape; a Content-Security-Policy
blocks anything that would still run or load. Plots are PNGs inside the page.
"""
import base64
from collections.abc import Iterable
import html
import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from t5lab.tools.inspect import view

SLOTS = 1024      # shown of a sequence
# Colours that are visible on white and on near-black, so that one image serves both modes.
INK, BAR, BEYOND = '#7a7a7a', '#3d85c6', '#d9534f'

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #fff; --line: #d8dce2;
  --card: #f5f6f8; --loss: #c9ecd0; --mark: #dfe6ff; --bad: #ffd9d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3af; --paper: #121417;
  --line: #333941; --card: #1c2025; --loss: #1f5130; --mark: #2f3b68; --bad: #6a2723; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { margin-top: 2.5rem; font-size: 1.25rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin-bottom: .25rem; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem;
  font-size: .9375rem; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.text { background: var(--card); padding: .5rem .75rem; border-radius: .375rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .875rem/1.7 ui-monospace, monospace; }
.special, .sentinel { background: var(--mark); border-radius: .25rem; padding: 0 .2rem; }
.unknown, .cut { background: var(--bad); border-radius: .25rem; padding: 0 .2rem; }
.number { color: var(--soft); }
.slots { display: flex; flex-wrap: wrap; gap: .25rem 2px;
  font: .75rem/1.4 ui-monospace, monospace; }
.slot { background: var(--card); border-top: 3px solid var(--line); padding: 0 .2rem;
  min-width: 1.25rem; max-width: 100%; } .slot.loss { background: var(--loss); }
.slot.even { border-top-color: #3d85c6; } .slot.odd { border-top-color: #d98e2b; }
.slot > * { display: block; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 1.4em; }
.slot > i { color: var(--soft); font-style: normal; } .first { flex-basis: 100%; margin-top: .25rem;
  color: var(--soft); }
"""


def render(title: str, settings: list[tuple[str, str]], numbers: dict, shown: dict) -> str:
  """Returns the HTML.

  numbers: {'tasks': {name: task_statistics with 'round_trip'}, 'mixture': mixture_statistics}.
  shown: {task: (notes, list of view.ShownExample, view.ShownRow)}.
  """
  parts = [f'<h1>{_safe(title)}</h1>', _list(settings), '<h2>The mixture</h2>',
           _table(view.MIXTURE_COLUMNS, view.mixture_table(numbers['mixture'])),
           _list(view.mixture_facts(numbers['mixture']))]
  for name, task in numbers['tasks'].items():
    parts += _task(name, task, *shown[name])
  return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
          '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
          'img-src data:; style-src \'unsafe-inline\'">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'<title>{_safe(title)}</title><style>{STYLE}</style></head>\n<body>\n'
          + '\n'.join(parts) + '\n</body></html>\n')


def _safe(text: str) -> str:
  return html.escape(view.printable(text))


def _list(pairs: Iterable[tuple[str, str]]) -> str:
  return '<dl>' + ''.join(f'<dt>{_safe(k)}</dt><dd>{_safe(v)}</dd>' for k, v in pairs) + '</dl>'


def _table(columns, rows) -> str:
  def line(tag, cells):
    return '<tr>' + ''.join(f'<{tag}>{_safe(cell)}</{tag}>' for cell in cells) + '</tr>'
  lines = [line('th', columns), *(line('td', row) for row in rows)]
  return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _task(name, task, notes, examples, row) -> list[str]:
  parts = [f'<h2>{_safe(name)}</h2>', *(f'<p>{_safe(note)}</p>' for note in notes),
           _list(view.facts(task)), '<h3>Lengths in tokens, before cutting</h3>',
           _table(view.LENGTH_COLUMNS, view.length_table(task))]
  for feature, numbers in task['lengths'].items():
    image = base64.b64encode(plot(feature, numbers)).decode()
    parts.append(f'<img alt="Histogram of the lengths of {_safe(feature)}; the limit is '
                 f'{numbers["limit"]}" src="data:image/png;base64,{image}">')
  if task['round_trip']['shown']:
    parts.append('<h3>Texts that change in a round trip</h3>')
    parts += [f'<div class="text">{_safe(text)}\n{_safe(restored)}</div><p></p>'
              for text, restored in task['round_trip']['shown']]
  parts.append('<h3>Examples, as the model sees them</h3>')
  for example in examples:
    parts.append(f'<p class="soft">{_safe(example.name)}</p>')
    for feature, spans in example.features.items():
      cut = example.cut[feature]
      mark = f' <span class="cut">✂ {cut:,} tokens cut</span>' if cut else ''
      parts.append(f'<div class="text"><b>{_safe(feature)}</b> '
                   + ''.join(map(_span, spans)) + f'{mark}</div><p></p>')
  return [*parts, '<h3>A row of a batch</h3>', _row(row)]


def _span(span: view.Span) -> str:
  text = html.escape(span.text)
  return text if span.kind == 'text' else f'<span class="{span.kind}">{text}</span>'


def _row(row: view.ShownRow) -> str:
  labels = ''.join(f'; {name} = {value}' for name, value in row.labels.items())
  parts = [f'<p>Examples ({len(row.examples):,}): {_safe(", ".join(row.examples[:20]))}'
           f'{", …" * (len(row.examples) > 20)}{_safe(labels)}.</p>'
           '<p class="soft">Each box is a position: its number, the token read and, below, the '
           'token to predict. The bar on top distinguishes segments; <span class="slot loss">this '
           'background</span> marks predictions that count in the loss.</p>']
  for sequence in row.sequences:
    hidden = len(sequence.slots) - SLOTS
    more = f' The first {SLOTS:,} are shown, {hidden:,} are not.' if hidden > 0 else ''
    parts.append(f'<h3>{sequence.name}: {len(sequence.slots):,} tokens and {sequence.padding:,} '
                 f'padding</h3><p class="soft">{more}</p><div class="slots">')
    segment = 0
    for slot in sequence.slots[:SLOTS]:
      if slot.segment != segment:
        segment = slot.segment
        parts.append(f'<span class="first">segment {segment}</span>')
      predicted = '' if slot.predicted is None else f'<b>{_span(slot.predicted)}</b>'
      parts.append(f'<span class="slot {"even" if segment % 2 else "odd"}'
                   f'{" loss" * slot.loss}"><i>{slot.position}</i><span>{_span(slot.read)}</span>'
                   f'{predicted}</span>')
    parts.append('</div>')
  return ''.join(parts)


def plot(feature: str, numbers: dict) -> bytes:
  """Returns a PNG: the histogram of statistics.length_statistics, with the limit as a line."""
  histogram, limit = numbers['histogram'], numbers['limit']
  starts = [histogram['first'] + k * histogram['width'] for k in range(len(histogram['counts']))]
  figure = Figure(figsize=(6, 2.8), dpi=130, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.bar([start - 0.5 for start in starts], histogram['counts'], width=histogram['width'],
           align='edge', linewidth=0, color=[BEYOND if start > limit else BAR for start in starts])
  axes.axvline(limit + 0.5, color=BEYOND, linestyle='--', label=f'limit {limit:,}')
  end = '; the last bar holds all longer ones' if histogram['open'] else ''
  axes.set_xlabel(f'tokens of {feature}{end}', color=INK, parse_math=False)   # a name may hold $
  axes.set_ylabel('examples', color=INK)
  axes.tick_params(colors=INK)
  axes.legend(labelcolor=INK, framealpha=0)
  for side, spine in axes.spines.items():
    spine.set_visible(side in ('left', 'bottom'))
    spine.set_color(INK)
  out = io.BytesIO()
  figure.savefig(out, format='png', transparent=True)
  return out.getvalue()
