"""Time and peak memory of `t5lab convert` for a T5 of real size with random weights: one row.

  python benchmarks/convert_memory.py t5_1_0/large      # 0.74 B
  python benchmarks/convert_memory.py t5_1_0/3b         # 2.85 B: 11.4 GB each of disk twice over

Prints GB of weights, what the issue allows (weights + largest tensor + 1 GB) and the peak of the
converting process, which includes the certificate by Hugging Face's own forward pass.
"""

import argparse
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from t5lab.models import families
from t5lab.programs import loading as weights
from t5lab.tools.interop import hf, rows
from t5lab.tools.interop import tensor_files as files


def make(folder: Path, family: str) -> tuple[float, float]:
  """A Hugging Face directory of random float32 weights -> (GB in all, GB of the largest)."""
  c = families.TransformerConfig(**families.row(family))
  format_ = hf.for_config(c)
  shapes = rows.specs(format_.rows(c), weights.abstract_params(c))
  (folder / 'config.json').write_text(json.dumps(format_.config(c)))
  block = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

  def tensor(shape):
    size = int(np.prod(shape))
    x = np.resize(block, size) if size > block.size else block[:size]
    scale = 1. if len(shape) == 1 else shape[-1] ** -0.5
    return (x.reshape(shape) * np.float32(scale)).astype(np.float32)
  files.write_safetensors(folder, ((n, tensor(s)) for n, s in shapes.items()),
                          {n: (s, np.dtype(np.float32)) for n, s in shapes.items()})
  sizes = [int(np.prod(s)) * 4 / 1e9 for s in shapes.values()]
  return sum(sizes), max(sizes)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('family')
  parser.add_argument('--golden', action='store_true')
  parser.add_argument('--to', default='t5lab', choices=('t5lab', 'hf', 't5x'))
  args = parser.parse_args()
  folder = Path(tempfile.mkdtemp(prefix='convert_', dir='.'))
  try:
    (folder / 'src').mkdir()
    total, largest = make(folder / 'src', args.family)
    began = time.perf_counter()
    command = [sys.executable, '-m', 't5lab', 'convert', '--from', 'hf', '--to', args.to,
               str(folder / 'src'), str(folder / 'dst')] + ['--golden'] * args.golden
    child = subprocess.Popen(command, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    print(f'{args.family}: {total:.2f} GB of weights, allowed {total + largest + 1:.2f} GB, peak '
          f'{usage.ru_maxrss / 1e6:.2f} GB, {seconds:.0f} s, exit '
          f'{os.waitstatus_to_exitcode(status)}')
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  main()
