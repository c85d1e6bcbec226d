r"""T5 1.1 base, span corruption on C4, on 16 chips of v5e (arXiv 1910.10683, 2002.05202).

  t5lab plan  --config configs/t5_1_1_base_c4.py
  t5lab check --config configs/t5_1_1_base_c4.py
  t5lab train --config configs/t5_1_1_base_c4.py --workdir runs/t5_base

The pretraining of T5 1.1: one million steps of 2048 rows of 512 inputs and 114 targets, no dropout,
Adafactor. Four microbatches, the fastest choice according to `t5lab plan`. Products in bfloat16,
parameters in float32. The vocabulary is the spiece.model of Hugging Face's t5-v1_1-base. For ten
steps on one CPU, append `:tiny`.
"""
from t5lab import config


def get_config(arg=''):
  c = config.base('t5_1_1/base', dropout=0., dtype='bfloat16', remat='full')
  c.total_steps = 1_000_000
  c.data.mixture, c.data.vocab = 'c4_v220_span_corruption', 'spiece.model'
  c.data.lengths.inputs, c.data.lengths.targets = 512, 114
  c.data.batch_size, c.optim.microbatches = 2048, 4
  c.optim.lr, c.optim.schedule, c.optim.warmup = 1e-2, 'rsqrt', 10_000
  c.checkpoint.every = 1000
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.rules = 'fsdp'
  c.plan.topology = 'v5e:4x4'
  if arg == 'tiny':
    c.mesh.fsdp, c.data.vocab, c.optim.microbatches = 1, 'byte', 2
    return config.tiny(c)
  return c
