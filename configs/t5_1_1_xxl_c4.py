r"""T5 1.1 XXL (11B), span corruption on C4, on a v5e pod (arXiv 1910.10683, 2002.05202).

  t5lab plan  --config configs/t5_1_1_xxl_c4.py
  t5lab check --config configs/t5_1_1_xxl_c4.py
  t5lab train --config configs/t5_1_1_xxl_c4.py --workdir gs://bucket/t5_xxl

The pretraining of T5 1.1: one million steps of 2048 rows of 512 inputs and 114 targets, no dropout,
Adafactor. State and gradients are sharded over all 256 chips. For ten steps on one CPU, append
`:tiny`.
"""
from t5lab import config


def get_config(arg=''):
  c = config.base('t5_1_1/xxl', dropout=0., dtype='bfloat16', remat='full')
  c.total_steps = 1_000_000
  c.data.mixture, c.data.vocab = 'c4_v220_span_corruption', 'spiece.model'
  c.data.lengths.inputs, c.data.lengths.targets = 512, 114
  c.data.batch_size = 2048
  c.optim.lr, c.optim.schedule, c.optim.warmup = 1e-2, 'rsqrt', 10_000
  c.checkpoint.every = 1000
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.rules = 'fsdp'
  c.plan.topology = 'v5e:16x16'
  if arg == 'tiny':
    c.mesh.fsdp, c.data.vocab = 1, 'byte'
    return config.tiny(c)
  return c
