r"""English to German on the embedded interface strings: the quickstart.

  t5lab train --config configs/quickstart.py --workdir runs/quickstart
"""
from t5lab import config


def get_config(arg=''):
  c = config.base('t5_1_1/small', vocab_size=2048, d_model=256, d_ff=512, n_heads=4, d_head=64,
                  enc_layers=2, dec_layers=2, tied=True, scale_logits=True, scale_attn=True,
                  dropout=0.1)
  c.data.mixture = 'ha_ende'
  c.data.vocab = 't5lab_2048'
  c.data.lengths.inputs, c.data.lengths.targets = 64, 64
  c.data.batch_size = 32
  c.total_steps = 1000
  c.optim.name, c.optim.lr, c.optim.schedule, c.optim.warmup = 'adamw', 2e-3, 'cosine', 100
  c.optim.b2, c.optim.clip, c.optim.weight_decay, c.optim.ema = 0.98, 1.0, 0.01, 0.998
  c.loss.z_loss, c.loss.label_smoothing = 0., 0.1
  c.checkpoint.best = 'ha_ende/ema/bleu'
  return config.tiny(c) if arg == 'tiny' else c
