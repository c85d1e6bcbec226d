"""What a run has read, as one number after the other: two runs that saw the same data agree.

Each step sums a hash of every number of the batch, on the devices and after they were placed there;
the host chains those sums. Neither the mesh nor the number of processes changes the chain.
"""

import hashlib
import zlib

import jax
import jax.numpy as jnp


def batch_digest(batch: dict[str, jax.Array]) -> jax.Array:
  """uint32[]: a sum of hashes of (feature, place, value), whatever the order of adding."""
  total = jnp.zeros((), jnp.uint32)
  for name, x in batch.items():
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype.itemsize == 4 else (
        x.astype(jnp.uint32))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
      place = place * length + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    total += jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(zlib.crc32(name.encode())))),
                     dtype=jnp.uint32)
  return total


def _mix(h):
  """MurmurHash3's finalizer: every bit of the input moves every bit of the output."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85ebca6b)
  h = (h ^ (h >> 13)) * jnp.uint32(0xc2b2ae35)
  return h ^ (h >> 16)


def chain(before: str, batch: int) -> str:
  """The digest after one more batch: 16 hex digits of SHA-256(before + that batch's sum)."""
  return hashlib.sha256(f'{before}{int(batch):08x}'.encode()).hexdigest()[:16]
