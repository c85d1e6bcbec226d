"""Shared set-up: CPU, eight virtual devices, highest precision, a compilation cache."""

import gc
import importlib.metadata
import os
import pathlib
import subprocess

# Before jax is imported anywhere: the number of devices is fixed when the backend starts.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# XLA on CPU starts a program's independent collectives in any order: two devices may then wait for
# each other's for ever, and XLA aborts the process after 40 s. Without Eigen's thread pool that is
# rare. (Training adapters in tests/training/test_lora.py on 8 devices, two runs at a time on two
# cores: 4 of 4 aborted; with a pool of 32 threads 1 of 4; without 1 of 16. It has one device now.)
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
    ' --xla_cpu_multi_thread_eigen=false'
    # Most of the suite's time is compilation: at LLVM's -O0 it takes 40 % less of it.
    ' --xla_backend_optimization_level=0')
# The older emitters of fused loops take another 40 % less; jaxlib 0.12 no longer has them.
if [int(n) for n in importlib.metadata.version('jaxlib').split('.')[:2]] < [0, 12]:
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# jax, TensorFlow and PyTorch are millions of objects, which tracing makes the collector visit again
# and again.
gc.set_threshold(50_000, 10, 10)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

_CACHE = pathlib.Path(__file__).parent.parent / '.cache' / 'jax'
_CACHE.mkdir(parents=True, mode=0o700, exist_ok=True)
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture
def rng():
  """A numpy Generator: random streams of jax change between versions, numpy's do not."""
  return np.random.default_rng(0)


@pytest.fixture
def plain_registry():
  """Afterwards seqio's registry has our tasks on the default vocabulary, and nobody's files."""
  yield
  from t5lab.data.tasks import registry as tasks
  tasks.register()


@pytest.fixture(scope='module')
def on_bytes():
  """Our tasks on the vocabulary of bytes."""
  from t5lab.data.tasks import registry as tasks
  tasks.register('byte')
  yield
  tasks.register()


@pytest.fixture
def no_tfds_data(monkeypatch, tmp_path):
  """TFDS looks where there is nothing, unless a test puts something there."""
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))


@pytest.fixture
def mounted(tmp_path):
  """mount(options) -> a tmpfs of its own, unmounted afterwards; skips where that is not allowed."""
  places = []

  def mount(options):
    place = tmp_path / f'disk{len(places)}'
    place.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'none', place],
                          capture_output=True, text=True)
    if done.returncode:
      pytest.skip(f'cannot mount a tmpfs: {done.stderr.strip()} (root is needed)')
    places.append(place)
    return place
  yield mount
  for place in places:
    subprocess.run(['umount', '-l', place], check=True)
