"""Digest of the data that a run has read: two runs that saw the same batches have the same digest.

Each step sums a hash of every number of its batch, on the devices where the batch was placed; the
host chains those sums. Neither the mesh nor the number of processes changes the result.
"""

import hashlib
import zlib

import jax
import jax.numpy as jnp


def batch_digest(batch: dict[str, jax.Array]) -> jax.Array:
  """uint32[]: the sum of hashes of (feature, index, value), which no order of adding changes."""
  total = jnp.zeros((), jnp.uint32)
  for name, x in batch.items():
    if x.dtype.itemsize == 4:
      bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
      bits = x.astype(jnp.uint32)

    # The index of each element in the global array, row-major.
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
      index = index * length + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    feature = jnp.uint32(zlib.crc32(name.encode()))
    total += jnp.sum(_mix(bits ^ _mix(index + feature)), dtype=jnp.uint32)
  return total


def _mix(h):
  """MurmurHash3's finalizer: every bit of the input affects every bit of the output."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85ebca6b)
  h = (h ^ (h >> 13)) * jnp.uint32(0xc2b2ae35)
  return h ^ (h >> 16)


def chain(digest: str, batch: int) -> str:
  """Extends a digest by one batch: 16 hex digits of SHA-256(digest + the batch's sum)."""
  return hashlib.sha256(f'{digest}{int(batch):08x}'.encode()).hexdigest()[:16]
