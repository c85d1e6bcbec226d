r"""English to German on embedded interface strings: a small T5 that trains in minutes on two cores.

  t5lab train --config configs/quickstart.py --workdir runs/quickstart

3.7 M parameters, 1,800 steps of 16 packed rows, eight epochs. For ten steps, append `:tiny`.
The model has T5 1.1's block with T5 1.0's tied embedding, because there are few sentences. AdamW,
unlike Adafactor, needs scaled attention scores (models/attention.py).
"""
from t5lab import config


def get_config(arg=''):
  c = config.base('t5_1_1/small', vocab_size=2048, d_model=256, d_ff=512, n_heads=4, d_head=64,
                  enc_layers=2, dec_layers=2, tied=True, scale_logits=True, scale_attn=True,
                  dropout=0.05)
  c.total_steps = 1800
  c.data.mixture, c.data.vocab = 'ha_ende', 't5lab_2048'
  c.data.lengths.inputs, c.data.lengths.targets = 64, 64
  c.data.batch_size = 16
  c.optim.name, c.optim.lr, c.optim.b2 = 'adamw', 2e-3, 0.98
  c.optim.schedule, c.optim.warmup, c.optim.end_lr = 'cosine', 200, 0.02
  c.optim.clip, c.optim.weight_decay, c.optim.ema = 1.0, 0.01, 0.995
  c.loss.z_loss, c.loss.label_smoothing = 0., 0.1
  c.eval.beams, c.eval.alpha = 4, 1.   # T5's 0.6 is for sentences; these are a few words
  c.checkpoint.best = 'ha_ende/ema/bleu'
  return config.tiny(c) if arg == 'tiny' else c
