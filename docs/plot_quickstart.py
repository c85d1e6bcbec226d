r"""Draws docs/quickstart.png from the folder of a quickstart run.

  make quickstart
  .venv/bin/pip install -c constraints/py311.txt -e '.[plots]'
  .venv/bin/python docs/plot_quickstart.py runs/quickstart
"""

import json
from pathlib import Path
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

COLOR = '#1f5fa8'


def main(workdir):
  rows = [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  train = [row for row in rows if 'loss' in row]
  last = max((Path(workdir) / 'eval').glob('*.json'), key=lambda path: int(path.stem))
  scores = json.loads(last.read_text())
  predictions = [json.loads(line) for line in
                 last.with_name(f'{last.stem}.ema.jsonl').read_text().splitlines()]

  figure, (curve, bars) = plt.subplots(
      1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout='constrained')

  # Training loss.
  curve.plot([row['step'] for row in train], [row['loss'] for row in train], color=COLOR)
  curve.set(xlabel='step', ylabel='training loss per token',
            title='English→German, 3.7 M parameters', xlim=(0, None))
  curve.grid(alpha=0.3)

  # BLEU of the averaged and raw weights, and of handing in the source.
  from t5lab.evaluation.metrics import bleu
  copied = bleu([p['target'] for p in predictions], [p['source'] for p in predictions])['bleu']
  names = ['averaged weights', 'raw weights', 'copy of the source']
  values = [scores['ha_ende/ema/bleu'], scores['ha_ende/raw/bleu'], copied]
  bars.barh(names, values, color=[COLOR, '#7fa8d1', '#c4c4c4'])
  bars.invert_yaxis()
  bars.bar_label(bars.containers[0], fmt='%.1f', padding=3)
  bars.set(xlabel='BLEU (sacrebleu, intl), beam 4', xlim=(0, max(values) * 1.2),
           title=f'Validation, {len(predictions)} sentences')
  bars.spines[['top', 'right']].set_visible(False)

  figure.savefig(Path(__file__).with_name('quickstart.png'), dpi=110)


if __name__ == '__main__':
  main(sys.argv[1])
