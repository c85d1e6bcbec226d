"""rematerialization.py '[{"rules": …, "mesh": {…}, …}, …]': compiles a train step for each case.

Prints a JSON list with the lines of XLA's log that contain 'Involuntary', for each case. It is a
process of its own because XLA's log level is fixed when XLA is loaded. Only the compiler knows
whether to warn, so the compilation cache, which would skip it, is off.
"""

import json
import os
import sys
import tempfile

os.environ.update(JAX_PLATFORMS='cpu', TF_CPP_MIN_LOG_LEVEL='1', XLA_FLAGS=(
    '--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false '
    '--xla_backend_optimization_level=0'))

import jax  # noqa: E402

from t5lab import config
from t5lab.models import layers, moe, transformer  # noqa: E402
from t5lab.parallel import sharding  # noqa: E402
from t5lab.programs import build

jax.config.update('jax_enable_compilation_cache', False)
sharding.SMALL = 1             # small leaves are split like large ones

KINDS = {
    'encoder_decoder': {},
    'decoder': dict(enc_layers=0, positions='rope', n_kv_heads=4, scale_attn=True),
    'experts': dict(experts=4, expert_top_k=2, n_kv_heads=4),
}


def unpinned_product(f, x, w, *axes, dtype=None):
  """sharding.product without its pins: the compiler decides where weights are gathered."""
  return f(x, w.astype(dtype or w.dtype))


def warnings(kind, mesh, rules, tied=False, dtype='float32', remat='none', pins=True, **keys):
  """XLA's warnings about one step. pins=False: FSDP in the obvious way, without pins."""
  for module in (layers, moe, transformer):
    module.product = sharding.product if pins else unpinned_product
  c = config.base('t5_1_1/small', **{**dict(
      vocab_size=256, d_model=64, d_ff=128, n_heads=8, d_head=8, enc_layers=2, dec_layers=2,
      tied=tied, dtype=dtype, remat=remat), **KINDS[kind]})
  c.data.lengths = {'inputs': 16 * bool(c.model.enc_layers), 'targets': 16}
  c.data.batch_size = 16
  c.optim.ema = 0.99
  c.mesh.update(mesh)
  c.rules = rules
  for key, value in keys.items():
    config.override(c, key, str(value))
  lowered = build.program(c).lower()
  with tempfile.TemporaryFile() as file:
    stderr = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      lowered.compile()
    finally:
      os.dup2(stderr, 2)
    file.seek(0)
    return [line for line in file.read().decode().splitlines() if 'Involuntary' in line]


if __name__ == '__main__':
  print(json.dumps([warnings(**case) for case in json.loads(sys.argv[1])]))
