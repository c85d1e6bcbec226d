r"""A small BERT from scratch on the embedded books: masked words and next sentences (1810.04805).

  t5lab train --config configs/bert_books.py --workdir runs/bert

Result: validation loss 5.79 = masked words 5.11 (12.1 % right) + next sentence 0.69 (57.8 %), after
400 steps of 0.3 to 0.9 s on two cores of a shared AMD EPYC, 2026-11-24, commit 280756f.
`t5lab infer --workdir runs/bert --fill-mask` fills <extra_id_0>, the mask token of this
vocabulary.

For ten steps on one CPU, append `:tiny`. BERT's own sizes: config.base('bert/base').
"""
from t5lab import config


def get_config(arg=''):
  c = config.base('bert/base', d_model=128, d_ff=512, n_heads=4, d_head=32, enc_layers=4,
                  vocab_size=2048, max_length=128, eos_id=1, dtype='float32')
  c.data.mixture = 'books_bert'
  c.data.lengths.inputs, c.data.lengths.targets = 128, 0
  c.data.batch_size = 32
  c.total_steps = 400
  c.optim.name, c.optim.lr, c.optim.schedule, c.optim.warmup = 'adamw', 1e-3, 'linear', 40
  c.optim.weight_decay, c.optim.clip = 0.01, 1.0
  c.loss.z_loss = 0.
  c.eval.batch_size = 32
  c.checkpoint.every = 200
  return config.tiny(c) if arg == 'tiny' else c
