"""Measures time and peak memory of `t5lab convert` for a T5 of real size with random weights.

  python benchmarks/convert_memory.py t5_1_0/large      # 0.74 B
  python benchmarks/convert_memory.py t5_1_0/3b         # 2.85 B: needs 11.4 GB of disk twice

Prints the GB of weights, the limit (weights + largest tensor + 1 GB) and the peak of the converting
process, which includes Hugging Face's forward pass for the certificate.
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
from t5lab.programs import shapes
from t5lab.tools.interop import hf, tensor_files, tensor_map


def write_model(folder: Path, family: str) -> tuple[float, float]:
  """Writes a Hugging Face directory of random weights; returns GB in all and of the largest tensor.
  """
  c = families.TransformerConfig(**families.row(family))
  format_ = hf.format_for(c)
  tensors = tensor_map.shapes(format_.tensor_rows(c), shapes.abstract_params(c))
  (folder / 'config.json').write_text(json.dumps(format_.config(c)))
  block = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

  def tensor(shape):
    x = np.resize(block, shape)
    scale = 1. if len(shape) == 1 else shape[-1] ** -0.5
    return (x * np.float32(scale)).astype(np.float32)

  tensor_files.write_safetensors(
      folder, ((name, tensor(shape)) for name, shape in tensors.items()),
      {name: (shape, np.dtype(np.float32)) for name, shape in tensors.items()})
  sizes = [int(np.prod(shape)) * 4 / 1e9 for shape in tensors.values()]
  return sum(sizes), max(sizes)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('family')
  parser.add_argument('--golden', action='store_true')
  parser.add_argument('--to', default='t5lab', choices=('t5lab', 'hf', 't5x'))
  args = parser.parse_args(argv)
  folder = Path(tempfile.mkdtemp(prefix='convert_', dir='.'))
  try:
    (folder / 'src').mkdir()
    total, largest = write_model(folder / 'src', args.family)
    start = time.perf_counter()
    command = [sys.executable, '-m', 't5lab', 'convert', '--from', 'hf', '--to', args.to,
               str(folder / 'src'), str(folder / 'dst')] + ['--golden'] * args.golden
    child = subprocess.Popen(command, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    print(f'{args.family}: {total:.2f} GB of weights, limit {total + largest + 1:.2f} GB, peak '
          f'{usage.ru_maxrss / 1e6:.2f} GB, {seconds:.0f} s, exit '
          f'{os.waitstatus_to_exitcode(status)}')
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  main()
